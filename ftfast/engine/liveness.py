"""Noticing dead processes: each tells the others that it lives; one that stops telling ends the job within a minute.

An exchange with a process that died may wait for the communication library's own timeout, which is long on purpose
(measuring and saving take time). So a thread in every process looks after the others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from ftfast.engine.processes import Processes
from ftfast.errors import FtfastError, Interrupted

BEAT_S = 2.0
"""Seconds between two signs of life."""
SILENCE_S = 40.0
"""Seconds without a sign of life after which a process counts as dead."""
DONE, FAILED = "done", "failed"


class Liveness:
    """A thread that gives signs of life and watches those of the other processes.

    When another process is gone, this one prints which and ends with exit code 1, wherever its main thread waits.

    Args:
        processes: This process among the others.
        silence_s: Seconds without a sign of life after which a process counts as dead.
    """

    def __init__(self, processes: Processes, silence_s: float = SILENCE_S) -> None:
        self.processes = processes
        self.silence_s = silence_s
        # A connection of its own: the library's may be blocked by the exchange that waits for the dead process.
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if processes.several else None
        self._identity = {"host": socket.gethostname(), "pid": os.getpid()}
        self._seen: dict[int, tuple[str, float]] = {}
        self._finished: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Liveness:
        if self.processes.several:
            self._beat("0")
            self.processes.wait()
            for rank in range(self.processes.world_size):
                self._look_at(rank)
            self._thread = threading.Thread(target=self._watch, name="ftfast-liveness", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> None:
        if self._thread is None:
            return
        if kind is not None and not issubclass(kind, FtfastError):
            return  # keep watching: an exchange that failed is usually the work of another process's death
        self._stop.set()
        self._thread.join()
        self._beat(DONE if kind is None or issubclass(kind, Interrupted) else FAILED)

    def _beat(self, count: str) -> None:
        self._store.set(_key(self.processes.rank), json.dumps({**self._identity, "beat": count}))

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_S):
            count += 1
            try:
                self._beat(str(count))
                for rank in range(self.processes.world_size):
                    if rank != self.processes.rank and rank not in self._finished:
                        self._look_at(rank)
            except (RuntimeError, dist.DistError) as error:
                if not self._stop.is_set():
                    self._look_without_store(str(error).splitlines()[0])

    def _look_without_store(self, reason: str) -> None:
        """End the job when the meeting point is gone, naming a process of this machine that is gone with it."""
        time.sleep(1.0)
        for rank, (text, _) in sorted(self._seen.items()):
            told = json.loads(text)
            if told["host"] == self._identity["host"] and not _exists(told["pid"]):
                self._end(f"{_name(rank, told)} is gone: it was killed or failed; its own messages say why")
        self._end(f"the meeting point of the processes is gone, with process 0 or its launcher ({reason})")

    def _look_at(self, rank: int) -> None:
        text = self._store.get(_key(rank)).decode()
        told = json.loads(text)
        where = _name(rank, told)
        if told["beat"] == FAILED:
            # Mostly this process was told in an orderly way and is about to end by itself.
            if not self._stop.wait(2 * BEAT_S):
                self._end(f"{where} could not go on; its own message says why")
            return
        if told["beat"] == DONE:
            self._finished.add(rank)
            return
        now = time.monotonic()
        if self._seen.get(rank, ("", 0.0))[0] != text:
            self._seen[rank] = (text, now)
        elif now - self._seen[rank][1] > self.silence_s:
            self._end(f"{where} has given no sign of life for {self.silence_s:g} s")
        if told["host"] == self._identity["host"] and not _exists(told["pid"]):
            again = json.loads(self._store.get(_key(rank)).decode())
            if again["beat"] != DONE:
                self._end(f"{where} is gone: it was killed or failed; its own messages say why")

    def _end(self, what: str) -> None:
        print(
            f"error: {what}. Process {self.processes.rank} ends too; the last checkpoint is intact, "
            "go on with --resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _name(rank: int, told: dict[str, Any]) -> str:
    return f"process {rank} (pid {told['pid']} on {told['host']})"


def _key(rank: int) -> str:
    return f"ftfast/alive/{rank}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process ended and its launcher has not taken note yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False

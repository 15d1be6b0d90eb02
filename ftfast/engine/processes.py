"""The processes that train together: who is who, and the few exchanges the loop needs. One process needs none."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ftfast.data import Batch
from ftfast.errors import ConfigError, FtfastError

Result = TypeVar("Result")

PATIENCE = datetime.timedelta(days=2)
"""How long processes wait while the first one measures or writes; a dead one is noticed by other means."""


class StoppedElsewhere(FtfastError):
    """Another process met a problem and reports it; this one ends without a message of its own.

    Args:
        exit_code: Exit code of the process that met the problem.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass
class Processes:
    """This process among those that train together.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        local_rank: Number of this process on its machine.
        patient: Group for waits of any length, over the CPU; None with one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: Any = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    def wait(self) -> None:
        """Wait for all processes, however long it takes."""
        if self.several:
            dist.barrier(group=self.patient)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run something in the first process and give every process its result.

        Args:
            action: Called in process 0 only; its result must be picklable.

        Returns:
            The result.

        Raises:
            StoppedElsewhere: In the other processes, if the action raised in the first.
            Exception: In the first process: what the action raised.
        """
        if not self.several:
            return action()
        result: list[Any] = [None, None]
        problem: BaseException | None = None
        if self.main:
            try:
                result[1] = action()
            except BaseException as error:  # the others must not wait for a process that has given up
                problem, result[0] = error, getattr(error, "exit_code", 1)
        dist.broadcast_object_list(result, src=0, group=self.patient)
        if problem is not None:
            raise problem
        if result[0] is not None:
            raise StoppedElsewhere(result[0])
        return result[1]

    def in_turn(self, action: Callable[[], Result]) -> Result:
        """Run something in the first process of each machine, then in the others, which find its files there."""
        if not self.several:
            return action()
        result = action() if self.local_rank == 0 else None
        self.wait()
        return action() if result is None else result

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if not self.several:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.patient)
        return bool(raised)

    def collect(self, value: Any) -> list[Any]:
        """Return the value of every process, in order, to every process."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.several:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the processes, in one exchange per 64 MiB.

        Args:
            parameters: The same list in every process; those without a gradient here count as zero.
        """
        if not self.several:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=self.patient)
        bucket: list[Tensor] = []
        size = 0
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.numel() * parameter.grad.element_size()
            if size >= 64 << 20:
                self._average(bucket)
                bucket, size = [], 0
        self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        if not gradients:
            return
        flat = self.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def whole_batch(self, batch: Batch, captions: Sequence[str] | None) -> Batch:
        """Join the numbers, labels and captions of all processes' batches; the images stay this process's own.

        Args:
            batch: This process's part.
            captions: Captions of the data set, if it has any.

        Returns:
            N indices, labels and texts in rank order.
        """
        columns = [batch.indices] + ([] if batch.labels is None else [batch.labels])
        rows = torch.stack(columns, dim=1)
        gathered = rows.new_empty((self.world_size * len(rows), rows.shape[1]))
        dist.all_gather_into_tensor(gathered, rows)
        indices = gathered[:, 0].contiguous()
        texts = None if captions is None or batch.texts is None else tuple(captions[i] for i in indices.tolist())
        labels = None if batch.labels is None else gathered[:, 1].contiguous()
        return dataclasses.replace(batch, indices=indices, labels=labels, texts=texts)


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join_processes(device: str, timeout_s: float, needs_group: bool = False) -> Processes:
    """Join the processes that a launcher started; without a launcher, or with one process, return a single one.

    Args:
        device: The setting ``train.device``.
        timeout_s: Longest wait for another process inside one exchange.
        needs_group: Make a process group for a single process too (DeepSpeed does not run without one).

    Returns:
        This process among the others.

    Raises:
        ConfigError: If the launcher's variables are incomplete, or the others cannot be reached.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and not needs_group:
        return Processes()
    if world_size == 1:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            os.environ.setdefault(name, value)
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but the environment has no {', '.join(missing)}. Start training with "
            "torchrun or deepspeed, which set them."
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {rank} of {world_size} ({socket.gethostname()}) did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}"
        ) from error
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(rank, world_size, local_rank, patient)


def leave_processes() -> None:
    """End the exchange between processes; nothing to do in a single one."""
    if dist.is_initialized():
        dist.destroy_process_group()

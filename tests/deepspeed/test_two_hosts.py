"""Two hosts, each with DeepSpeed's launcher and no ssh: the steps of one process, and what happens when a host fails.

The hosts are network namespaces with a cable between them where this user may make them (root, iproute2), and two
launchers on the loopback device otherwise: the same job either way.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from together import assert_same_losses, assert_same_weights, run_alone, short_run

from ftfast.engine.processes import free_port

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).parents[2] / "ftfast" / "train.py"
LAUNCHER = Path(sys.executable).parent / "deepspeed"


@dataclass(frozen=True)
class Host:
    """Where a launcher runs.

    Attributes:
        enter: Words before its command.
        interface: Network device of the exchange.
    """

    enter: tuple[str, ...]
    interface: str


@dataclass(frozen=True)
class Hosts:
    """Two hosts and the address of the first."""

    each: tuple[Host, Host]
    address: str

    def start(self, words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
        """Start one launcher on each host; output goes to ``host<N>.log``."""
        hostfile = folder / "hosts"
        hostfile.write_text("host0 slots=1\nhost1 slots=1\n")
        port, launchers = str(free_port()), []
        for number, host in enumerate(self.each):
            command = [
                *host.enter, str(LAUNCHER), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number),
                "--master_addr", self.address, "--master_port", port, str(SCRIPT), *words,
            ]  # fmt: skip
            variables = {
                **os.environ, "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "FTFAST_CACHE": str(folder / "cache"),
            }  # fmt: skip
            log = (folder / f"host{number}.log").open("w")
            launchers.append(
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=variables, text=True, start_new_session=True
                )
            )
        return launchers


def wire(names: tuple[str, str]) -> bool:
    """Make two network namespaces with a cable between them; False if this user may not."""
    if shutil.which("ip") is None:
        return False
    steps = [["netns", "add", name] for name in names]
    steps.append(["link", "add", names[0], "type", "veth", "peer", "name", names[1]])
    for number, name in enumerate(names, 1):
        steps.append(["link", "set", name, "netns", name])
        steps.append(["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name])
        steps += [["-n", name, "link", "set", device, "up"] for device in (name, "lo")]
    return all(subprocess.run(["ip", *step], capture_output=True).returncode == 0 for step in steps)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    names = (f"fta{os.getpid()}", f"ftb{os.getpid()}")
    wired = wire(names)
    if wired:
        first, second = (Host(("ip", "netns", "exec", name), name) for name in names)
        yield Hosts((first, second), "10.77.0.1")
    else:
        yield Hosts((Host((), "lo"), Host((), "lo")), "127.0.0.1")
    for name in names if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def end(launchers: list[subprocess.Popen[str]]) -> None:
    """Kill whatever is left of a job."""
    for launcher in launchers:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def trainer(launcher: subprocess.Popen[str]) -> int:
    """Process id of the training process below a launcher."""
    found = subprocess.run(
        ["ps", "-s", str(launcher.pid), "-o", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return next(int(line.split()[0]) for line in found if f"-u {SCRIPT}" in line)


def log(folder: Path, number: int) -> str:
    return (folder / f"host{number}.log").read_text()


def test_a_host_that_dies_is_named_and_the_job_goes_on_to_the_same_weights(
    hosts: Hosts, tiny_folder: Path, class_table: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start = load_file(tiny_folder / "open_clip_model.safetensors")
    run_alone(short_run(tiny_folder, class_table, whole, 8, steps=60), tmp_path / "cache")

    launchers = hosts.start([*short_run(tiny_folder, class_table, cut, 4, steps=60), "--zero", "3"], tmp_path)
    try:
        patience = time.monotonic() + 240
        while not (cut / "checkpoints" / "step_00000004").is_dir():
            assert time.monotonic() < patience, log(tmp_path, 0)[-4000:] + log(tmp_path, 1)[-4000:]
            assert launchers[0].poll() is None, log(tmp_path, 0)[-4000:]
            time.sleep(0.05)
        victim = trainer(launchers[1])
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        codes = [launcher.wait(timeout=90) for launcher in launchers]
        seconds = time.monotonic() - killed
    finally:
        end(launchers)
    assert all(codes), "a job that lost a process must not report success"
    assert seconds < 60
    assert f"process 1 (pid {victim} on" in log(tmp_path, 0), log(tmp_path, 0)[-4000:]
    assert not (cut / "final").exists()

    launchers = hosts.start(["--resume", str(cut)], tmp_path)
    try:
        codes = [launcher.wait(timeout=240) for launcher in launchers]
    finally:
        end(launchers)
    assert codes == [0, 0], log(tmp_path, 0)[-4000:] + log(tmp_path, 1)[-4000:]
    assert "step 60/60" in log(tmp_path, 0)
    assert "step 60/60" not in log(tmp_path, 1), "only the first process prints"
    assert_same_losses(cut, whole)
    assert_same_weights(cut, whole, start)

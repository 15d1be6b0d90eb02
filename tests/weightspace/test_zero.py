"""AnchoredAdamW inside DeepSpeed ZeRO 1, 2 and 3 on two CPU processes equals one process; see zero_worker.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """What two ranks printed while they went through every stage and anchor."""
    folder = tmp_path_factory.mktemp("zero")
    worker, port = Path(__file__).with_name("zero_worker.py"), free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), str(rank), "2", port, str(folder)]
        ranks.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return f"exit codes {codes}\n" + "\n".join(log.read_text() for log in logs)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", ["ewc coupled", "l2_sp coupled", "awc coupled", "ewc proximal"])
def test_losses_weights_penalties_and_resume_equal_one_process(report, stage, case):
    assert f"ok stage {stage} {case}\n" in report, report[-8000:]


def test_both_ranks_end_well(report):
    assert report.startswith("exit codes [0, 0]"), report[-8000:]

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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_weights_penalties_and_resume_equal_one_process(stage, tmp_path):
    worker, port = Path(__file__).with_name("zero_worker.py"), free_port()
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), str(rank), "2", port, str(stage), str(tmp_path)]
        ranks.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    text = "\n".join(log.read_text()[-4000:] for log in logs)
    assert codes == [0, 0], text
    for case in ("ewc coupled", "l2_sp coupled", "awc coupled", "ewc proximal"):
        assert f"ok {case}" in text

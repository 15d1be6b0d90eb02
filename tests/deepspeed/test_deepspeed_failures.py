"""A process killed while saving: the others end and name it; every way to go on gives the same weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from together import assert_same_losses, assert_same_weights, run_alone, short_run, start_ranks

pytest.importorskip("deepspeed")


def test_killed_while_saving_then_resumed_with_two_processes_and_with_one(
    tiny_folder: Path, class_table: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start = load_file(tiny_folder / "open_clip_model.safetensors")
    run_alone(short_run(tiny_folder, class_table, whole, 8), tmp_path / "cache")
    ranks = start_ranks([*short_run(tiny_folder, class_table, cut, 4), "--zero", "2"], tmp_path, dying=1)
    try:
        assert ranks[1].wait(timeout=240) == -signal.SIGKILL, (tmp_path / "rank1.log").read_text()[-4000:]
        killed = time.monotonic()
        code = ranks[0].wait(timeout=60)
        seconds = time.monotonic() - killed
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / "rank0.log").read_text()
    assert code not in (0, None)
    assert seconds < 60
    assert f"process 1 (pid {ranks[1].pid} on" in said, said[-4000:]
    steps = sorted(path.name for path in (cut / "checkpoints").glob("step_*"))
    assert steps == ["step_00000002"]

    other = tmp_path / "other"
    shutil.copytree(cut, other, symlinks=True)
    ranks = start_ranks(["--resume", str(cut)], tmp_path)
    codes = [rank.wait(timeout=240) for rank in ranks]
    assert codes == [0, 0], (tmp_path / "rank0.log").read_text()[-4000:]
    assert_same_losses(cut, whole)
    assert_same_weights(cut, whole, start)

    alone = subprocess.run(
        [sys.executable, "-m", "ftfast", "train", "--resume", str(other), "--batch-size", "8"],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "FTFAST_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-4000:]
    assert_same_losses(other, whole)
    assert_same_weights(other, whole, start)

    refused = subprocess.run(
        [sys.executable, "-m", "ftfast", "train", "--resume", str(other), "--batch-size", "4"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "was written with batch_size = 8, but" in refused.stderr

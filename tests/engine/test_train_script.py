"""``ftfast/train.py`` as launchers start it: by path, from anywhere, with --local_rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "ftfast" / "train.py"


def start(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script by path from ``folder``."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, **environment},
    )


def test_script_runs_by_path_and_tolerates_a_launcher(tmp_path: Path) -> None:
    done = start(["--local_rank=0", "--recipe", "infusing", "--data", "x.csv", "--print-config"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "anchor_weight: 100000.0" in done.stdout
    assert "# recipe infusing" in done.stdout


def test_script_reports_problems_in_one_sentence(tmp_path: Path) -> None:
    done = start(["--recipe", "infusing", "--data", "nowhere.csv"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'nowhere.csv'}: no such file. Check data.path."
    done = start(["--recipe", "infusing", "--data", "nowhere.csv"], tmp_path, WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE is 2, but the environment has no RANK, LOCAL_RANK, MASTER_ADDR, ")

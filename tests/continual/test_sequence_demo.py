"""``ftfast demo --recipe gift``: both methods over the built-in tasks, one report, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftfast.cli import main
from ftfast.continual import demo
from ftfast.data.builtin import TASK_ORDERS


def test_demo_of_gift_learns_all_tasks_with_both_methods_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = list(demo.BRIEF)
    brief[brief.index("--max-steps") + 1] = "1"
    monkeypatch.setattr(demo, "BRIEF", (*brief, "--batch-size", "8"))
    out = tmp_path / "demo"
    assert main(["demo", "--recipe", "gift", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert set(result["summary"]) == {"zero-shot", "finetune", "gift"}
    assert "points on tasks before they are learned" in printed.err
    assert Path(result["report"]).stat().st_size > 10_000
    for name in ("finetune", "gift"):
        rows = (out / name / "report" / f"matrix_{name}_0.csv").read_text(encoding="utf-8").splitlines()
        assert all(task in rows[0] for task in TASK_ORDERS["I"])
        assert len(rows) >= len(TASK_ORDERS["I"]) + 1
    zero = result["summary"]["zero-shot"]["average"]["mean"]
    assert zero == pytest.approx(41.2, abs=1.0)  # the shipped weights
    known = {path: path.stat().st_mtime_ns for path in out.rglob("open_clip_model.safetensors")}
    assert known
    assert main(["demo", "--recipe", "gift", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["demo", "--recipe", "gift", "--out", str(out), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == result["summary"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("open_clip_model.safetensors")} == known

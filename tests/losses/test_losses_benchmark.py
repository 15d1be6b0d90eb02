"""The benchmark harness on cases with known answers, and a smoke run of the losses benchmark with its plots."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, losses, plotting
from benchmarks.__main__ import main as dispatch
from benchmarks.registry import OPERATIONS


def test_peak_memory_counts_what_is_held_at_once():
    a = torch.zeros(1000, 1000)
    one = a.numel() * 4
    assert harness.peak_memory(lambda: a + 1) == pytest.approx(one, rel=0.01)
    assert harness.peak_memory(lambda: (a + 1) * 2) == pytest.approx(2 * one, rel=0.01)
    assert harness.peak_memory(lambda: [(a + 1).sum() for _ in range(5)]) == pytest.approx(one, rel=0.01)


def test_peak_resident_in_a_fresh_process():
    """A process that has freed much memory before reuses it unseen, so the count is checked in a new one."""
    code = (
        "import torch\nfrom benchmarks import harness\n"
        "torch.ones(10)\nprint(harness.peak_resident(lambda: torch.ones(8_000_000)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split()[-1]
    assert shown == "None" or float(shown) == pytest.approx(32_000_000, rel=0.1)


def test_interleave_takes_turns_and_separates_stages():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = harness.interleave(functions, repeats=3, warmup=1)
    assert calls == list("ab" + "ab" + "ba" + "ab")
    assert {timing.repeats for timing in timings.values()} == {3}
    seen = []
    stages = {"slow": [lambda _: time.sleep(0.02) or "graph", seen.append]}
    slow = harness.interleave_stages(stages, repeats=2, warmup=0)["slow"]
    assert seen == ["graph", "graph"]
    assert slow[0].best_ms >= 20 > slow[1].best_ms
    assert slow[2].best_ms >= slow[0].best_ms
    with pytest.raises(ValueError, match="repeats"):
        harness.summarize([])


def test_interleave_stops_when_time_is_up():
    timing = harness.interleave({"nap": lambda: time.sleep(0.02)}, repeats=1000, warmup=0, seconds=0.1)["nap"]
    assert 1 <= timing.repeats < 50


def test_smoke_run_writes_a_complete_record_and_pictures(tmp_path, capsys):
    torch.manual_seed(0)
    assert losses.main(["--smoke", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "losses_cpu.json").read_text())
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"device", "commit", "date", "threads"} <= record["environment"].keys()
    assert {case["op"] for case in record["cases"]} == set(OPERATIONS)
    for case in record["cases"]:
        assert "failed" not in case
        assert case["both"]["best_ms"] >= case["forward"]["best_ms"] > 0
        assert case["peak_bytes"] > 0
        assert case["loss_error"] < 2e-6
        assert case["gradient_error"] < 1e-5
        assert case["speedup"] > 0
    assert "speed-up" in capsys.readouterr().out
    assert plotting.main(["--results", str(tmp_path)]) == 0
    for op in OPERATIONS:
        assert (tmp_path / f"losses_cpu_{op}.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_peer_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(OPERATIONS["clip"].implementations, "broken", broken)
    assert (
        losses.main(["--smoke", "--op", "clip", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    )
    cases = json.loads((tmp_path / "losses_cpu.json").read_text())["cases"]
    assert [case["failed"] for case in cases if case["implementation"] == "broken"] == ["RuntimeError: no such kernel"]
    assert plotting.main(["--results", str(tmp_path)]) == 0


def test_dispatcher_and_empty_folder(tmp_path, capsys):
    assert dispatch(["no-such-benchmark"]) == 2
    assert dispatch([]) == 2
    assert dispatch(["--help"]) == 0
    assert dispatch(["plot", "--results", str(tmp_path)]) == 1
    assert "python -m benchmarks losses" in capsys.readouterr().out

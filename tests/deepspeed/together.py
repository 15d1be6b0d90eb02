"""Start processes that train together, and read what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from ftfast.config.arguments import split_arguments
from ftfast.config.resolve import find_recipe, resolve
from ftfast.engine.processes import free_port
from ftfast.engine.run import train
from ftfast.recipes import get_recipe

WORKER = Path(__file__).with_name("ranks.py")


def run_together(cases: list[list[str]], folder: Path, world: int = 2, timeout: int = 300) -> str:
    """Train each case in ``world`` processes; returns their output and fails if any of them failed."""
    file = folder / "cases.json"
    file.write_text(json.dumps([{"argv": argv} for argv in cases]))
    port = str(free_port())
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(WORKER), str(rank), str(world), port, str(file)]
        ranks.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    text = "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs)
    assert codes == [0] * world, text
    return text


def run_alone(argv: list[str], cache: Path) -> None:
    """Train one case in this process."""
    words = split_arguments(argv)
    recipe = get_recipe(find_recipe(words.files, words.overrides)[0])
    config = resolve(recipe.options, recipe.preset, words.files, words.overrides, world_size=1).config
    train(config, argv=argv, resume=words.resume, console=Console(quiet=True), cache_dir=cache)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Rows of training steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def assert_same_losses(folder: Path, expected: Path, rtol: float = 1e-5) -> None:
    """Every term of every step agrees, to ``rtol`` of the step's loss that it is part of.

    The anchor is tiny and squares an Adam step, in which weights with a gradient of rounding size move at full rate.
    """
    mine, theirs = logged(folder), logged(expected)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        names = sorted(key for key in b if key.startswith(("train/loss", "train/grad_norm")))
        assert sorted(key for key in a if key.startswith(("train/loss", "train/grad_norm"))) == names
        for name in names:
            whole = b["train/grad_norm"] if name == "train/grad_norm" else b["train/loss"]
            gap = abs(a[name] - b[name]) / max(abs(b[name]), abs(whole))
            assert gap <= rtol, f"{folder.name} step {b['step']} {name}: {a[name]!r} and {b[name]!r}, {gap:.1e}"


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "open_clip_model.safetensors")


def assert_same_weights(folder: Path, expected: Path, start: Mapping[str, torch.Tensor], share: float = 5e-2) -> None:
    """Final weights agree: they differ by at most ``share`` of the way from the start, in the Euclidean norm.

    Losses are the strict comparison. Adam moves weights whose true gradient is zero, such as the bias of attention
    keys, at full rate in whatever direction rounding points.
    """
    mine, theirs = final_weights(folder), final_weights(expected)
    assert mine.keys() == theirs.keys() == start.keys()
    assert all(mine[name].shape == value.shape for name, value in theirs.items())
    floats = [name for name, value in theirs.items() if value.is_floating_point()]
    apart = torch.stack([(mine[name] - theirs[name]).double().norm() for name in floats]).norm()
    moved = torch.stack([(theirs[name] - start[name]).double().norm() for name in floats]).norm()
    assert moved > 0
    assert apart <= share * moved, f"{folder.name}: {float(apart / moved):.1e} of the way"


def short_run(tiny_folder: Path, table: Path, out: Path, batch: int, steps: int = 6) -> list[str]:
    """Command line of a run that saves at every second step."""
    suite = out.parent / "suite.yaml"
    suite.write_text(
        "eval:\n  alphas: [1.0]\n  suites:\n"
        f"    - {{name: kinds, task: image_retrieval, role: target, data: {{path: '{table}', split: val}}}}\n"
        "log: {report_to: []}\n"
    )
    return [
        "--recipe", "l2sp", "--config", str(suite), "--model", f"local-dir:{tiny_folder}", "--data", str(table),
        "--data.split", "train", "--lr", "1e-5", "--max-steps", str(steps),
        "--batch-size", str(batch), "--workers", "0", "--device", "cpu", "--checkpoint.every-steps", "2",
        "--eval.selection", "last", "--optim.ema-decay", "0.5", "--out", str(out),
    ]  # fmt: skip


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
real, count = torch.save, [0]
def save(state, path, *rest, **options):
    real(state, path, *rest, **options)
    count[0] += isinstance(path, os.PathLike)
    if count[0] == 2:
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
"""Makes a process die in the middle of its second checkpoint."""


START = """
import sys
from ftfast.cli import guard
from ftfast.train import main
sys.exit(guard.run(main, {argv!r}))
"""


def start_ranks(argv: list[str], folder: Path, dying: int | None = None, world: int = 2) -> list[subprocess.Popen[str]]:
    """Start ``ftfast train`` in several processes as a launcher would, their output in ``rank<N>.log``."""
    port = str(free_port())
    ranks = []
    for rank in range(world):
        code = (KILLED_WHILE_SAVING if rank == dying else "") + START.format(argv=argv)
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FTFAST_CACHE": str(folder / "cache"),
        }  # fmt: skip
        log = (folder / f"rank{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, env=environment, text=True
            )
        )
    return ranks

"""The demo of continual learning: the built-in tasks, a method against plain continual fine-tuning, side by side."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ftfast.continual.driver import ContinualConfig, run_continual
from ftfast.continual.folder import IDENTITY
from ftfast.engine.folder import environment
from ftfast.evaluation.continual import SequenceMatrix
from ftfast.evaluation.continual_report import (
    ZERO_SHOT,
    SequenceInfo,
    figures_markdown,
    summary,
    write_sequence_report,
)
from ftfast.evaluation.results import write_atomically

BASELINE = "finetune"
BRIEF = ("--lr", "1e-3", "--max-steps", "24", "--model.channels-last", "--model.trim-text")
"""A few minutes: fewer steps than the tasks file has, at a rate at which forgetting shows all the same."""


@dataclass
class SequenceDemo:
    """What the demo measured.

    Attributes:
        folder: Output folder.
        page: The report.
        runs: Method -> one matrix per seed.
        seconds: Wall time.
    """

    folder: Path
    page: Path
    runs: dict[str, list[SequenceMatrix]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        table = {run: {n: asdict(f) for n, f in row.items()} for run, row in summary(self.runs).items()}
        return {"folder": str(self.folder), "report": str(self.page), "summary": table, "seconds": self.seconds}


def run_sequence_demo(
    recipe: str, out: str, seeds: tuple[int, ...], model: str, *, overwrite: bool, resume: bool, console: Console
) -> SequenceDemo:
    """Learn the built-in tasks in order I with two methods and write one report.

    Args:
        recipe: Method compared with continual fine-tuning.
        out: Output folder; each method has a folder in it.
        seeds: Seeds.
        model: Built-in start model.
        overwrite: Replace an earlier demo.
        resume: Continue an interrupted one.
        console: Where to tell what happens.

    Returns:
        Matrices of both methods.

    Raises:
        ConfigError: If the output folder exists.
    """
    begin = time.perf_counter()
    folder = Path(out)
    runs: dict[str, list[SequenceMatrix]] = {}
    for name in (BASELINE, recipe):
        console.rule(f"[bold]{name}[/bold]")
        there = (folder / name / IDENTITY).is_file()
        config = ContinualConfig(
            tasks="builtin",
            recipe=name,
            order="I",
            out=str(folder / name),
            seeds=seeds,
            overwrite=overwrite and not resume,
            resume=resume and there,
            overrides=("--model", model, *BRIEF),
        )
        runs[name] = run_continual(config, console).runs
    seconds = round(time.perf_counter() - begin, 1)
    info = SequenceInfo(
        title=f"Eight tasks, one after the other: {BASELINE} and {recipe}",
        subtitle=f"{model} · drawings of eight groups, tested on a drawing hand that was never trained on",
        facts={"Seeds": ", ".join(str(seed) for seed in seeds), "Time": f"{seconds:.0f} s"},
    )
    page = write_sequence_report(folder, runs, info, {"seconds": seconds, "environment": environment()})
    result = SequenceDemo(folder, page, runs, seconds)
    write_atomically(folder / "demo.json", json.dumps(result.as_dict(), indent=2) + "\n")
    _tell(result, recipe, console)
    return result


def _tell(result: SequenceDemo, recipe: str, console: Console) -> None:
    """Print the table and what it means."""
    table = summary(result.runs)
    console.rule("result")
    console.print(figures_markdown(table), highlight=False, soft_wrap=True)
    zero = table[ZERO_SHOT]["transfer"].mean
    for name in (BASELINE, recipe):
        change = table[name]["transfer"].mean - zero
        console.print(
            f"{name}: {change:+.1f} points on tasks before they are learned (zero-shot {zero:.1f})", highlight=False
        )
    console.print(f"report   {result.page}", highlight=False, soft_wrap=True)

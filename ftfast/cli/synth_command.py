"""``ftfast synth``: generate image-caption pairs for replay."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.synth.settings import SynthConfig

_LINE_SECONDS = 10.0


def run(argv: Sequence[str]) -> int:
    """Generate, with a progress bar on a terminal and a line every ten seconds elsewhere.

    Args:
        argv: Arguments after ``ftfast synth``.

    Returns:
        Exit code.
    """
    config = parse_options(SynthConfig, argv, "ftfast synth")
    from ftfast.synth.generate import is_main_rank, synthesize

    with _Progress() as progress:
        result = synthesize(config, progress=progress)
    if result.replaced or result.dropped:
        output.note(f"{result.replaced:,} black images replaced, {result.dropped:,} left out")
    if result.table is None:
        output.note(f"rank {os.environ.get('RANK', '0')}: made {result.made:,} pairs; other ranks still work")
        return 0
    if result.made:
        output.note(f"made {result.made:,} pairs, {result.made / max(result.seconds, 1e-9):.1f} images/s")
    elif is_main_rank():
        output.note("nothing to do: all pairs are there")
    output.emit(f"{result.folder}: {result.pairs:,} pairs of {result.pool:,} possible, table {result.table.name}")
    return 0


class _Progress:
    """A bar on a terminal, lines elsewhere; both on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()
        rank = os.environ.get("RANK")
        self._label = "synth" if rank is None else f"synth rank {rank}"

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, made: int, seconds: float) -> None:
        """Show the state."""
        speed = made / max(seconds, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        note = f"{speed:.2f} images/s, {left:.0f} s left"
        if self._bar is None and not self._start(total):
            now = time.monotonic()
            if now - self._last >= _LINE_SECONDS or done == total:
                self._last = now
                output.note(f"{self._label}: {done:,}/{total:,} images, {note}")
            return
        self._bar.update(self._task, completed=done, note=note)

    def _start(self, total: int) -> bool:
        """Open the bar if standard error is a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            return False
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(self._label, total=total, note="")
        self._bar.start()
        return True

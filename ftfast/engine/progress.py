"""What a person sees while training: a bar on a terminal, plain lines anywhere else. All of it goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows step, losses, learning rate, samples/s, the share of time spent waiting for data, and the time left.

    Args:
        console: Console on stderr.
        total_steps: Length of training.
        start_step: Steps already done (resume).
        every: Steps between plain lines.
        folder: Run folder; the lines also go to ``train.log`` in it. None: nowhere else.
    """

    def __init__(
        self, console: Console, total_steps: int, start_step: int, every: int, folder: Path | None = None
    ) -> None:
        self.console = console
        self.total = total_steps
        self.every = max(1, every)
        self._log = None if folder is None else (folder / "train.log").open("a", encoding="utf-8")
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begin = self._last = time.perf_counter()
        self._start_step = self._last_step = start_step
        self._waited = 0.0
        self._samples = 0

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console
            )
            self._task = self._bar.add_task("train", total=self.total, completed=self._start_step, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()

    def count(self, samples: int, waited: float) -> None:
        """Add the images of one step and the seconds spent waiting for them."""
        self._samples += samples
        self._waited += waited

    def update(self, step: int, values: Mapping[str, float], learning_rate: float) -> dict[str, float]:
        """Show a step if it is due.

        Args:
            step: Steps done.
            values: Loss and terms.
            learning_rate: Base rate times the schedule's factor.

        Returns:
            "train/samples_per_s" and "train/data_wait" when a line was due, else nothing.
        """
        due = step % self.every == 0 or step == self.total
        if self._bar is not None and self._task is not None:
            note = f"loss {values['loss']:.4f}  lr {learning_rate:.2e}"
            self._bar.update(self._task, completed=step, note=note)
        if not due:
            return {}
        now = time.perf_counter()
        elapsed = max(now - self._last, 1e-9)
        speed, wait = self._samples / elapsed, min(1.0, self._waited / elapsed)
        left = (now - self._begin) / max(1, step - self._start_step) * (self.total - step)
        terms = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._write(
            f"step {step}/{self.total}  {terms}  lr {learning_rate:.2e}  {speed:.0f} img/s  "
            f"data wait {100 * wait:.0f} %  left {left:.0f} s",
            show=self._bar is None,
        )
        self._last, self._samples, self._waited = now, 0, 0.0
        return {"train/samples_per_s": speed, "train/data_wait": wait}

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._write(text, show=True)

    def _write(self, text: str, show: bool) -> None:
        if show:
            self.console.print(text, highlight=False, soft_wrap=True)
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

"""Logs of a run: one JSON line per step and per evaluation, a CSV made from them, TensorBoard if installed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftfast.evaluation.results import write_atomically


class RunLog:
    """Append-only log of a run; the JSON lines are the truth, everything else derives from them.

    Args:
        folder: Run folder.
        report_to: Extra writers; "tensorboard" is used when installed.
        resume_step: Rows after this step are dropped, so that a resumed run writes one consistent sequence; None
            starts a new log.
    """

    def __init__(self, folder: Path, report_to: Sequence[str] = (), resume_step: int | None = None) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [] if resume_step is None else [row for row in read_rows(self.path) if row["step"] <= resume_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(folder, resume_step) if "tensorboard" in report_to else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row.

        Args:
            step: Optimizer steps done.
            values: Scalars by name ("train/loss", "eval/target/map_at_20").
        """
        self._file.write(json.dumps({"step": step, **{name: float(v) for name, v in values.items()}}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def rows(self) -> list[dict[str, Any]]:
        """Return every row so far."""
        return read_rows(self.path)

    def close(self) -> None:
        """Flush, write ``metrics.csv`` and close."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        write_csv(self.folder / "metrics.csv", self.rows())


class SilentLog:
    """The log of a process other than the first: nothing is written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write nothing."""

    def rows(self) -> list[dict[str, Any]]:
        """Return no rows."""
        return []

    def close(self) -> None:
        """Nothing to close."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line cut short by a kill is dropped.

    Args:
        path: ``metrics.jsonl``; a missing file reads as empty.

    Returns:
        Rows in file order.
    """
    return list(_rows(path)) if path.is_file() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with different keys as one table.

    Args:
        path: Target, replaced atomically.
        rows: Mappings; missing keys become empty cells.
    """
    import io

    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue())


def _tensorboard_writer(folder: Path, resume_step: int | None) -> Any:
    """Return a SummaryWriter, or None when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

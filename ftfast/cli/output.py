"""Results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def note(text: str) -> None:
    """Write one line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Write a result for people to standard output."""
    print(text)


def emit_json(value: Any) -> None:
    """Write a result for programs to standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def use_colour() -> bool:
    """Whether standard output is a terminal that wants colour (NO_COLOR and TERM=dumb are respected)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Align rows in columns; numbers to the right.

    Args:
        header: Column titles.
        rows: Cells; floats are shown with two decimals.

    Returns:
        Lines without trailing blanks.
    """
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[column], (int, float)) for row in rows) for column in range(len(header))
    ]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [list(header), *cells]
    ]
    if use_colour():
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return "\n".join(lines)

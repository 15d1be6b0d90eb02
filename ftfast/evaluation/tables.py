"""The before/after table as text: for the terminal, for Markdown, and as one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ftfast.config.schema import SuiteConfig
from ftfast.evaluation.results import SummaryRow, SweepPoint, role_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def percent(value: float) -> str:
    """A share as a percentage with one decimal, without the sign; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference in points with its sign."""
    return "–" if math.isnan(value) else f"{100 * value:+.1f}"


def after_text(row: SummaryRow) -> str:
    """The value after training in percent, with ``± standard deviation`` where there are several seeds."""
    return percent(row.after) + (f" ± {percent(row.spread)}" if row.spread is not None else "")


def _kept(row: SummaryRow) -> str:
    return f"kept {percent(row.kept)} %" if row.role == "control" and not math.isnan(row.kept) else ""


def headline(rows: Sequence[SummaryRow]) -> str:
    """One sentence: what the target gained, and how much the controls kept.

    Args:
        rows: Summary rows.

    Returns:
        For example "unseen people R@1 17.8 → 34.5 (+16.7); controls kept 97.2 % on average, 94.8 % at worst."
    """
    parts = [
        f"{row.title} {percent(row.before)} → {percent(row.after)} ({signed(row.change)})"
        for row in rows
        if row.role == "target"
    ]
    kept = [row.kept for row in rows if row.role == "control" and not math.isnan(row.kept)]
    if len(kept) == 1:
        parts.append(f"the control kept {percent(kept[0])} %")
    elif kept:
        parts.append(f"controls kept {percent(sum(kept) / len(kept))} % on average, {percent(min(kept))} % at worst")
    return "; ".join(parts) + "." if parts else "Nothing was measured."


def sweep_line(suites: Sequence[SuiteConfig], best: SweepPoint | None) -> str:
    """The line under the table that names the best point of the alpha sweep; empty without a sweep."""
    if best is None:
        return ""
    means = [(role, role_mean(suites, best.results, role)) for role in ("target", "control")]
    figures = ", ".join(f"{role} {percent(value)}" for role, value in means if not math.isnan(value))
    return f"best alpha on sweep: {best.alpha:g} ({figures})"


def print_summary(
    rows: Sequence[SummaryRow], console: Console | None = None, *, best: str = "", weights: str = ""
) -> None:
    """Print the before/after table; colours only on a terminal.

    Args:
        rows: Summary rows.
        console: Where to; None: standard output.
        best: Line about the alpha sweep, from :func:`sweep_line`.
        weights: Where the final weights are.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        good = row.change >= 0 if row.role == "target" else row.kept >= 0.95
        colour = "green" if good else ("red" if row.role == "target" or row.kept < 0.8 else "yellow")
        table.add_row(
            Text(f"{row.role}: {row.title}", style="bold" if row.role == "target" else ""),
            percent(row.before),
            after_text(row),
            Text(signed(row.change), style=colour),
            Text(_kept(row), style="dim"),
        )
    _print_table(out, table)
    note = "   ".join(part for part in (best, f"weights: {weights}" if weights else "") if part)
    if note:
        out.print(note, highlight=False, soft_wrap=True)


def _print_table(console: Console, table: Table) -> None:
    """Print without breaking long names into a log file, which has no width."""
    if console.is_terminal:
        console.print(table)
        return
    width = console.width
    console.width = max(width, 400)
    try:
        console.print(table)
    finally:
        console.width = width


def summary_markdown(rows: Sequence[SummaryRow]) -> str:
    """The before/after table in Markdown."""
    lines = ["| | before | after | change | kept |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        kept = f"{percent(row.kept)} %" if row.role == "control" else ""
        cells = (f"{row.role}: {row.title}", percent(row.before), after_text(row), signed(row.change), kept)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share_of_reference(row: SummaryRow, reference: SummaryRow) -> float:
    """A run's change as a share of the reference run's; NaN where the reference changed by less than 0.1 points."""
    return row.change / reference.change if abs(reference.change) >= 1e-3 else math.nan


def comparison_cells(tables: Mapping[str, Sequence[SummaryRow]]) -> tuple[list[str], list[list[str]]]:
    """The comparison as header and text cells: suite, start, then each run's value with its change.

    Args:
        tables: Run name -> summary rows over the same suites.

    Returns:
        Header and rows.
    """
    names = list(tables)
    first = tables[names[0]] if names else []
    cells = []
    for place, row in enumerate(first):
        runs = [tables[name][place] for name in names]
        cells.append(
            [
                f"{row.role}: {row.title}",
                percent(row.before),
                *(f"{after_text(r)} ({signed(r.change)})" for r in runs),
            ]
        )
    return ["", "pretrained", *names], cells


def comparison_markdown(tables: Mapping[str, Sequence[SummaryRow]]) -> str:
    """The comparison of several runs in Markdown."""
    header, cells = comparison_cells(tables)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def print_comparison(tables: Mapping[str, Sequence[SummaryRow]], console: Console | None = None) -> None:
    """Print the comparison of several runs.

    Args:
        tables: Run name -> summary rows over the same suites.
        console: Where to; None: standard output.
    """
    from rich.console import Console
    from rich.table import Table

    header, cells = comparison_cells(tables)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name in header:
        table.add_column(name, justify="left" if name == "" else "right")
    for row in cells:
        table.add_row(*row)
    _print_table(console or Console(), table)

"""The report of a sequence of tasks: matrices, figures over seeds, heat maps, curves; one HTML page and CSVs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftfast.evaluation.continual import ContinualMetrics, SequenceMatrix, mean_matrix
from ftfast.evaluation.continual_plots import curves, heat_maps, task_curves
from ftfast.evaluation.page import Card, Section, page
from ftfast.evaluation.report import plot_sections
from ftfast.evaluation.results import write_atomically, write_csv

FIGURES = ("transfer", "average", "last", "forgetting")
"""Names of the figures, as in :class:`ftfast.evaluation.continual.ContinualMetrics`."""

ZERO_SHOT = "zero-shot"
"""Name of the row of the model that never learns."""


@dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation over seeds, in percent."""

    mean: float
    spread: float = 0.0

    def text(self) -> str:
        """Return "71.2 ± 0.4", or "71.2" for one seed, or "-" where the figure has no meaning."""
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.1f}" + (f" ± {self.spread:.1f}" if self.spread else "")


@dataclass(frozen=True)
class SequenceInfo:
    """What a report says besides measurements.

    Attributes:
        title: Heading.
        subtitle: Model and data.
        facts: Rows of the table at the end.
    """

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def summary(runs: Mapping[str, Sequence[SequenceMatrix]]) -> dict[str, dict[str, Figure]]:
    """Figures of every method, means over seeds, with the zero-shot row first.

    Args:
        runs: Method -> one matrix per seed, over the same tasks.

    Returns:
        Method -> figure name -> value in percent.
    """
    first = next(iter(runs.values()))[0]
    table = {ZERO_SHOT: _figures([first.zero_shot_metrics])}
    table.update({name: _figures([matrix.metrics for matrix in matrices]) for name, matrices in runs.items()})
    for name, matrices in runs.items():
        if matrices[0].seen:
            seen = 100 * np.array([matrix.seen for matrix in matrices])
            table[name]["seen_average"] = _figure(seen.mean(axis=1))
            table[name]["seen_last"] = _figure(seen[:, -1])
    return table


def _figures(metrics: Sequence[ContinualMetrics]) -> dict[str, Figure]:
    return {name: _figure(np.array([100 * getattr(each, name) for each in metrics])) for name in FIGURES}


def _figure(values: np.ndarray) -> Figure:
    return Figure(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0)


def write_sequence_report(
    folder: Path,
    runs: Mapping[str, Sequence[SequenceMatrix]],
    info: SequenceInfo,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``results.json``, CSVs of matrices and figures, PNGs and ``report/index.html``.

    Args:
        folder: The report goes to ``folder/report``.
        runs: Method -> one matrix per seed; the first method is the reference of a comparison.
        info: Heading and facts.
        extra: Further entries of results.json.

    Returns:
        Path of the page.
    """
    target = Path(folder) / "report"
    table = summary(runs)
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    write_csv(
        target / "summary.csv",
        ("run", *(part for name in names for part in (name, f"{name}_spread"))),
        [(run, *_cells(row, names)) for run, row in table.items()],
    )
    for name, matrices in runs.items():
        for number, matrix in enumerate(matrices):
            write_csv(target / f"matrix_{_slug(name)}_{number}.csv", ("after", *matrix.tasks), _matrix_rows(matrix))
    results = {
        "summary": {run: {n: asdict(f) for n, f in row.items()} for run, row in table.items()},
        "runs": {name: [as_dict(matrix) for matrix in matrices] for name, matrices in runs.items()},
        **(extra or {}),
    }
    write_atomically(target / "results.json", json.dumps(results, indent=2) + "\n")
    plots = [plot for plot in (heat_maps(runs), curves(runs), task_curves(runs)) if plot is not None]
    sections = [
        Section("Figures", figures_html(table), wide=True),
        *([Section("Further suites", _suites_html(runs), wide=True)] if _has_suites(runs) else []),
        *plot_sections(target, plots),
        Section("This run", _facts_html(info), wide=True),
    ]
    lead, cards = _lead(table), _cards(table)
    return write_atomically(target / "index.html", page(info.title, info.subtitle, lead, cards, sections))


def as_dict(matrix: SequenceMatrix) -> dict[str, Any]:
    """Return plain containers for JSON; :func:`from_dict` reads them."""
    return {
        "tasks": list(matrix.tasks),
        "zero_shot": matrix.zero_shot.tolist(),
        "accuracy": matrix.accuracy.tolist(),
        "suites": {name: list(values) for name, values in matrix.suites.items()},
        "seen": list(matrix.seen),
    }


def from_dict(values: Mapping[str, Any]) -> SequenceMatrix:
    """Read what :func:`as_dict` made."""
    return SequenceMatrix(
        tasks=tuple(values["tasks"]),
        zero_shot=np.array(values["zero_shot"], dtype=np.float64),
        accuracy=np.array(values["accuracy"], dtype=np.float64),
        suites={name: tuple(line) for name, line in values["suites"].items()},
        seen=tuple(values["seen"]),
    )


def _slug(name: str) -> str:
    return "".join(mark if mark.isalnum() else "-" for mark in name.lower())


def _cells(row: Mapping[str, Figure], names: Sequence[str]) -> list[Any]:
    return [part for name in names for part in ((row[name].mean, row[name].spread) if name in row else (None, None))]


def _matrix_rows(matrix: SequenceMatrix) -> list[tuple[Any, ...]]:
    labels = (ZERO_SHOT, *matrix.tasks)
    return [
        (label, *(100 * value for value in line)) for label, line in zip(labels, matrix.with_zero_shot(), strict=True)
    ]


TITLES = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "forgetting": "Forgetting",
    "seen_average": "Seen classes, average",
    "seen_last": "Seen classes, last",
}
"""Column headings."""


def figures_html(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """The figures as a table; the best method of each column is marked."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    learned = {run: row for run, row in table.items() if run != ZERO_SHOT}
    best = {name: max((row[name].mean for row in learned.values() if name in row), default=math.nan) for name in names}
    body = ""
    for run, row in table.items():
        cells = "".join(
            f"<td class='{'good' if run in learned and len(learned) > 1 and row[name].mean == best[name] else ''}'>"
            f"{row[name].text().replace('-', '−')}</td>"
            if name in row
            else "<td></td>"
            for name in names
        )
        body += f"<tr><th scope=row>{html.escape(run)}</th>{cells}</tr>"
    head = "".join(f"<th>{TITLES[name]}</th>" for name in names)
    note = (
        "<p class=note>Percent. Transfer: tasks before they are learned. Average: all entries of the matrix. "
        "Last: after the last task. Forgetting: change of a task's accuracy from when it was learned to the end "
        "(negative: forgotten). The zero-shot row is the model before the first task.</p>"
    )
    return f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"


def figures_markdown(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """The figures as a Markdown table."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = [f"| | {' | '.join(TITLES[name] for name in names)} |", f"|---|{'---:|' * len(names)}"]
    for run, row in table.items():
        lines.append(f"| {run} | {' | '.join(row[name].text() if name in row else '' for name in names)} |")
    return "\n".join(lines)


def _has_suites(runs: Mapping[str, Sequence[SequenceMatrix]]) -> bool:
    return any(matrix.suites for matrices in runs.values() for matrix in matrices)


def _suites_html(runs: Mapping[str, Sequence[SequenceMatrix]]) -> str:
    """Further suites: before, and after every task."""
    body, tasks = "", next(iter(runs.values()))[0].tasks
    for run, matrices in runs.items():
        for name, values in mean_matrix(matrices).suites.items():
            cells = "".join(f"<td>{100 * value:.1f}</td>" for value in values)
            body += f"<tr><th scope=row>{html.escape(name)}<small>{html.escape(run)}</small></th>{cells}</tr>"
    head = "".join(f"<th>{html.escape(label)}</th>" for label in (ZERO_SHOT, *tasks))
    return f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _facts_html(info: SequenceInfo) -> str:
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in info.facts.items()
    )
    note = '<p class=note>Files beside this page: <a href="results.json">results.json</a>, '
    note += '<a href="summary.csv">summary.csv</a>, a CSV per matrix, a PNG and a CSV for each plot.</p>'
    return f"<table class=facts>{rows}</table>{note}"


def _lead(table: Mapping[str, Mapping[str, Figure]]) -> str:
    """One sentence: what the last method keeps of zero-shot ability, and where it ends."""
    name, row = list(table.items())[-1]
    zero = table[ZERO_SHOT]
    if math.isnan(row["transfer"].mean):
        return f"{name}: {row['last'].text()} % on the task, {zero['last'].text()} % before."
    gap = row["transfer"].mean - zero["transfer"].mean
    ahead, end = (f"{value:+.1f}".replace("-", "−") for value in (gap, row["last"].mean - zero["last"].mean))
    return (
        f"{name}: tasks not learned yet are recognised at {row['transfer'].mean:.1f} % ({ahead} points against the "
        f"untouched model), all tasks at the end at {row['last'].mean:.1f} % ({end})."
    )


def _cards(table: Mapping[str, Mapping[str, Figure]]) -> list[Card]:
    """Large figures of the last method, with the first one's beside them."""
    learned = [name for name in table if name != ZERO_SHOT]
    row, zero = table[learned[-1]], table[ZERO_SHOT]
    cards = []
    for name in ("transfer", "average", "last"):
        if math.isnan(row[name].mean):
            continue
        detail = f"zero-shot: {zero[name].mean:.1f}"
        if len(learned) > 1:
            detail += f"; {learned[0]}: {table[learned[0]][name].mean:.1f}"
        cards.append(Card(TITLES[name], f"{row[name].mean:.1f}", "%", detail))
    return cards

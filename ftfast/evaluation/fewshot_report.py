"""Tables and pictures of the few-shot protocols: text for a terminal, one HTML page, CSV, JSON, PNG."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes
from ftfast.evaluation.fewshot import (
    AVERAGE,
    Record,
    as_dict,
    average_over_sets,
    base_to_new_table,
    figure,
    select,
    suite_table,
)
from ftfast.evaluation.page import Section, page
from ftfast.evaluation.report import plot_sections
from ftfast.evaluation.results import write_atomically, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header, rows of text."""


@dataclass(frozen=True)
class ReportHead:
    """What a report says besides measurements.

    Attributes:
        data: Name of the data sets together.
        protocol: Which protocol.
        model: Start model.
        source: Training set of "domain" and "cross-dataset"; empty: the first.
    """

    data: str
    protocol: str
    model: str
    source: str = ""


TITLES = {
    "fsl": "Few-shot classification",
    "base-to-new": "Base-to-new generalisation",
    "domain": "Domain generalisation",
    "cross-dataset": "Cross-dataset transfer",
    "cross-cite": "Effect on the source's base and new classes",
}


def runs_of(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Methods with their shots, in order of appearance."""
    return list(dict.fromkeys((record.recipe, record.shots) for record in records))


def label(recipe: str, shots: int) -> str:
    """Name of a method in tables."""
    return recipe if recipe == "zero-shot" else f"{recipe}, {shots or 'all'} shots"


def tables(records: Sequence[Record], head: ReportHead) -> list[Table]:
    """Make the tables of a protocol.

    Args:
        records: All of one protocol.
        head: Which.

    Returns:
        One table or more; figures in percent, mean and spread over seeds.
    """
    if head.protocol in ("base-to-new", "cross-cite"):
        return _base_new_tables(records, harmonic=head.protocol == "base-to-new")
    if head.protocol == "fsl":
        sets = list(dict.fromkeys(record.trained_on for record in records))
        rows = []
        for recipe, shots in runs_of(records):
            own = select(records, recipe=recipe, shots=shots)
            each = [figure([r.results[s] for r in own if r.trained_on == s]).text() for s in sets]
            flat = [
                Record(r.protocol, r.recipe, r.trained_on, r.shots, r.seed, {"own": r.results[r.trained_on]})
                for r in own
            ]
            rows.append((label(recipe, shots), *each, average_over_sets(flat, "own").text()))
        return [("Accuracy on the test images", ("", *sets, AVERAGE), rows)]
    source = records[0].trained_on
    suites = [suite for suite in records[0].results if suite != source]
    rows = []
    for recipe, shots in runs_of(records):
        table = suite_table(select(records, recipe=recipe, shots=shots), own=source)
        rows.append((label(recipe, shots), *(table[name].text() for name in (source, *suites, AVERAGE))))
    return [(f"Trained on {source}", ("", source, *suites, "average of the others"), rows)]


def _base_new_tables(records: Sequence[Record], *, harmonic: bool) -> list[Table]:
    """One table of averages, then one per method."""
    header = ("base", "new", "HM") if harmonic else ("base", "new")
    averages, single = [], []
    for recipe, shots in runs_of(records):
        found = base_to_new_table(select(records, recipe=recipe, shots=shots))
        rows = [
            (name, row.base.text(), row.new.text(), *((f"{100 * row.harmonic:.1f}",) if harmonic else ()))
            for name, row in found.items()
        ]
        averages.append((label(recipe, shots), *rows[-1][1:]))
        if len(rows) > 2:
            single.append((label(recipe, shots), ("", *header), rows))
    return [("Averages over data sets", ("", *header), averages), *single]


def text_tables(records: Sequence[Record], head: ReportHead) -> str:
    """The first table as text in columns."""
    title, header, rows = tables(records, head)[0]
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        """Put cells into columns."""
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([title, line(header), *(line(row) for row in rows)])


def write_fewshot_report(
    folder: Path, records: Sequence[Record], head: ReportHead, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write ``report/index.html``, ``results.json``, ``records.csv`` and a PNG with its CSV.

    Args:
        folder: The report goes to ``folder/report``.
        records: All of one protocol.
        head: Heading.
        extra: Further entries of results.json.

    Returns:
        Path of the page.
    """
    target = Path(folder) / "report"
    lines = [
        (r.protocol, r.recipe, r.trained_on, r.shots, r.seed, suite, 100 * value)
        for r in records
        for suite, value in r.results.items()
    ]
    header = ("protocol", "recipe", "trained_on", "shots", "seed", "suite", "accuracy_percent")
    write_csv(target / "records.csv", header, lines)
    made = tables(records, head)
    values = {
        "tables": [
            {"title": title, "header": list(top), "rows": [list(row) for row in rows]} for title, top, rows in made
        ],
        "records": [as_dict(record) for record in records],
        **(extra or {}),
    }
    write_atomically(target / "results.json", json.dumps(values, indent=2) + "\n")
    sections = [
        *(Section(title, table_html(top, rows), wide=True) for title, top, rows in made[:1]),
        *plot_sections(target, [figure_of(records, head)]),
        *(Section(title, table_html(top, rows)) for title, top, rows in made[1:]),
    ]
    subtitle = f"{head.model} · {head.data}"
    lead = "Top-1 accuracy in percent: mean over seeds, with the sample standard deviation where there are several."
    return write_atomically(target / "index.html", page(TITLES[head.protocol], subtitle, lead, [], sections))


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def figure_of(records: Sequence[Record], head: ReportHead) -> Plot:
    """Curves over shots for "fsl"; otherwise base (or source) against new (or the others), one point per method."""
    return _shot_curves(records) if head.protocol == "fsl" else _two_sides(records, head)


def _shot_curves(records: Sequence[Record]) -> Plot:
    rows: list[tuple[Any, ...]] = []
    for recipe, shots in runs_of(records):
        own = select(records, recipe=recipe, shots=shots)
        flat = [
            Record(r.protocol, r.recipe, r.trained_on, r.shots, r.seed, {"own": r.results[r.trained_on]}) for r in own
        ]
        average = average_over_sets(flat, "own")
        rows.append((recipe, shots, 100 * average.mean, 100 * average.spread))

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        picture = new_figure(theme)
        axes = picture.add_subplot(1, 1, 1)
        style_axes(axes, theme, "training images per class", "accuracy (%)")
        names = [name for name in dict.fromkeys(row[0] for row in rows) if name != "zero-shot"]
        for row in rows:
            if row[0] == "zero-shot":
                axes.axhline(row[2], color=theme.muted, linewidth=1.2, linestyle=(0, (3, 3)), label="zero-shot")
        for number, name in enumerate(names):
            chosen = sorted(row for row in rows if row[0] == name)
            colour = theme.cycle[number % len(theme.cycle)]
            bars = [row[3] for row in chosen]
            axes.errorbar(
                [str(row[1] or "all") for row in chosen], [row[2] for row in chosen], yerr=bars, color=colour,
                linewidth=2, marker="o", ms=5, capsize=3, label=name,
            )  # fmt: skip
        legend_below(picture, axes, theme)
        return picture

    caption = "Average over data sets; bars are the standard deviation over seeds, the dashed line is the start model."
    return Plot("shots", "Accuracy over shots", caption, ("run", "shots", "accuracy", "spread"), rows, draw, wide=True)


def _two_sides(records: Sequence[Record], head: ReportHead) -> Plot:
    halves = head.protocol in ("base-to-new", "cross-cite")
    rows: list[tuple[Any, ...]] = []
    for recipe, shots in runs_of(records):
        own = select(records, recipe=recipe, shots=shots)
        if halves:
            row = base_to_new_table(own)[AVERAGE]
            here, there = row.base, row.new
        else:
            table = suite_table(own, own=own[0].trained_on)
            here, there = table[own[0].trained_on], table[AVERAGE]
        rows.append((label(recipe, shots), *(100 * v for v in (here.mean, here.spread, there.mean, there.spread))))
    names = ("base classes", "new classes") if halves else (records[0].trained_on, "the other suites")

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        picture = new_figure(theme)
        axes = picture.add_subplot(1, 1, 1)
        style_axes(axes, theme, f"accuracy on {names[0]} (%)", f"accuracy on {names[1]} (%)")
        for number, (name, x, dx, y, dy) in enumerate(rows):
            colour = theme.muted if name == "zero-shot" else theme.cycle[(number - 1) % len(theme.cycle)]
            axes.errorbar([x], [y], xerr=[dx], yerr=[dy], color=colour, marker="o", ms=8, linestyle="", label=name)
        legend_below(picture, axes, theme, columns=2)
        return picture

    caption = "Each point is a method; bars are the standard deviation over seeds. Up and to the right is better."
    header = ("run", names[0], "spread", names[1], "spread")
    return Plot("two_sides", f"{names[0]} and {names[1]}".capitalize(), caption, header, rows, draw, wide=True)

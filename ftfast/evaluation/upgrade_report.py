"""Table and picture of modules moved from one model to another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes
from ftfast.evaluation.fewshot import Figure as Spread
from ftfast.evaluation.fewshot import figure
from ftfast.evaluation.fewshot_report import table_html
from ftfast.evaluation.page import Section, page
from ftfast.evaluation.report import plot_sections
from ftfast.evaluation.results import write_atomically, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "own": "own model (i)",
    "moved": "moved (ii)",
    "zero_shot": "zero-shot (iii)",
    "retrained": "retrained (iv)",
    "compatibility": "compatibility (ii) - (iii)",
    "cost": "residual cost (iv) - (ii)",
}


@dataclass(frozen=True, kw_only=True)
class Move:
    """One module, moved.

    Attributes:
        source: Where it lies.
        recipe: Method.
        data: What it was trained on.
        seed: Seed of its training.
        old: Model it was trained on.
        to: The new model.
        share: Share of the new model's values that the module changes (tuned weights); 1 for prompts.
        own: (i) suite -> metric of the module on its own model.
        moved: (ii) of the same module on the new model.
        zero_shot: (iii) of the new model without it.
        retrained: (iv) of the method trained on the new model; empty if that was not asked for.
    """

    source: str
    recipe: str
    data: str
    seed: int
    old: str
    to: str
    share: float
    own: Mapping[str, float]
    moved: Mapping[str, float]
    zero_shot: Mapping[str, float]
    retrained: Mapping[str, float]

    def figures(self) -> dict[str, float]:
        """Means over suites: (i) to (iv), compatibility (ii) - (iii), residual cost (iv) - (ii); NaN if not known."""
        values = {name: _mean(getattr(self, name)) for name in ("own", "moved", "zero_shot", "retrained")}
        values["compatibility"] = values["moved"] - values["zero_shot"]
        values["cost"] = values["retrained"] - values["moved"]
        return values


def _mean(values: Mapping[str, float]) -> float:
    return math.fsum(values.values()) / len(values) if values else math.nan


def by_recipe(moves: Sequence[Move]) -> dict[str, dict[str, Spread]]:
    """Mean and spread over the seeds of each method; within a seed, over its modules.

    Args:
        moves: All moves.

    Returns:
        Method -> column -> figure.
    """
    table: dict[str, dict[str, Spread]] = {}
    for recipe in dict.fromkeys(move.recipe for move in moves):
        own = [move for move in moves if move.recipe == recipe]
        seeds = {seed: [m.figures() for m in own if m.seed == seed] for seed in dict.fromkeys(m.seed for m in own)}
        table[recipe] = {
            name: figure([math.fsum(each[name] for each in group) / len(group) for group in seeds.values()])
            for name in COLUMNS
        }
    return table


def rows(moves: Sequence[Move]) -> list[tuple[str, ...]]:
    """The table as text: accuracies in percent, differences in points."""
    return [(recipe, *(cells[name].text() for name in COLUMNS)) for recipe, cells in by_recipe(moves).items()]


def text_table(moves: Sequence[Move]) -> str:
    """The table in columns, and one sentence per method."""
    header = ("", *COLUMNS.values())
    body = rows(moves)
    widths = [max(len(row[place]) for row in (header, *body)) for place in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *body)]
    for recipe, cells in by_recipe(moves).items():
        gain = 100 * cells["compatibility"].mean
        word = "compatible" if gain > 0 else "not compatible"
        lines.append(f"{recipe}: {word}; moved, it is {gain:+.1f} points from the new model without it.")
    return "\n".join(lines)


def write_upgrade_report(folder: Path, moves: Sequence[Move], *, to: str, extra: Mapping[str, Any]) -> Path:
    """Write ``report/index.html``, ``results.json``, ``moves.csv`` and a PNG.

    Args:
        folder: The report goes to ``folder/report``.
        moves: All moves.
        to: The new model.
        extra: Further entries of results.json.

    Returns:
        Path of the page.
    """
    target = Path(folder) / "report"
    header = ("source", "recipe", "data", "seed", "old", "to", "share", *COLUMNS)
    lines = [
        (m.source, m.recipe, m.data, m.seed, m.old, m.to, m.share, *(100 * v for v in m.figures().values()))
        for m in moves
    ]
    write_csv(target / "moves.csv", header, lines)
    summary = {recipe: {n: asdict(f) for n, f in cells.items()} for recipe, cells in by_recipe(moves).items()}
    values = {"summary": summary, "moves": [asdict(move) for move in moves], **extra}
    write_atomically(target / "results.json", json.dumps(values, indent=2) + "\n")
    note = (
        "<p class=note>Percent, means over suites and data sets, standard deviation over seeds. Compatible: the "
        "moved module is better than the new model without it. Residual cost: what training again would gain.</p>"
    )
    sections = [
        Section("Moved modules", table_html(("", *COLUMNS.values()), rows(moves)) + note, wide=True),
        *plot_sections(target, [_plot(moves)]),
    ]
    old = ", ".join(dict.fromkeys(move.old for move in moves))
    lead = text_table(moves).splitlines()[-1]
    return write_atomically(target / "index.html", page(f"{old} becomes {to}", "Module upgrade", lead, [], sections))


def _plot(moves: Sequence[Move]) -> Plot:
    table = by_recipe(moves)
    every = ("own", "moved", "zero_shot", "retrained")
    shown = [name for name in every if not all(math.isnan(cells[name].mean) for cells in table.values())]
    lines = [
        (recipe, COLUMNS[name], 100 * cells[name].mean, 100 * cells[name].spread)
        for recipe, cells in table.items()
        for name in shown
        if not math.isnan(cells[name].mean)
    ]

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        picture = new_figure(theme, width=max(5.8, 1.6 + 1.3 * len(table)))
        axes = picture.add_subplot(1, 1, 1)
        style_axes(axes, theme, "", "accuracy (%)")
        for place, name in enumerate(shown):
            chosen = [(number, cells[name]) for number, cells in enumerate(table.values())]
            chosen = [(number, cell) for number, cell in chosen if not math.isnan(cell.mean)]
            axes.bar(
                [number + 0.2 * (place - (len(shown) - 1) / 2) for number, _ in chosen],
                [100 * cell.mean for _, cell in chosen],
                0.18,
                yerr=[100 * cell.spread for _, cell in chosen],
                color=theme.muted if name == "zero_shot" else theme.cycle[place],
                ecolor=theme.ink,
                label=COLUMNS[name],
            )
        axes.set_xticks(range(len(table)), list(table))
        legend_below(picture, axes, theme, columns=2)
        return picture

    caption = "Bars above the grey one stay useful on the new model. Whiskers are the standard deviation over seeds."
    return Plot(
        "moves", "Before and after the move", caption, ("recipe", "what", "mean", "spread"), lines, draw, wide=True
    )

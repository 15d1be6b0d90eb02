"""Report of a search: the front between target and generic validation, the course of the search, every trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes
from ftfast.evaluation.fewshot_report import table_html
from ftfast.evaluation.page import Section, page
from ftfast.evaluation.report import plot_sections
from ftfast.evaluation.results import write_atomically, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trial:
    """One finished trial.

    Attributes:
        number: Its number.
        params: What was tried.
        target: Validation metric on the target, in [0, 1].
        generic: Validation metric on generic data.
        score: What the search maximises.
        is_default: Whether these are the values before the search.
    """

    number: int
    params: Mapping[str, Any]
    target: float
    generic: float
    score: float
    is_default: bool = False


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in one figure without losing in the other, from low to high target.

    Of equal trials the first stays.
    """
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.target, -t.generic, t.number)):
        if not kept or trial.generic > kept[-1].generic:
            kept.append(trial)
    return kept[::-1]


def tell(trials: Sequence[Trial], objective: str) -> str:
    """One sentence: the best trial beside the default."""
    best, default = max(trials, key=lambda t: (t.score, t.is_default)), next((t for t in trials if t.is_default), None)
    text = (
        f"best of {len(trials)} trials: {objective} {100 * best.score:.1f} (target {100 * best.target:.1f}, generic "
        f"{100 * best.generic:.1f})"
    )
    if default is None:
        return text
    return (
        f"{text}; shipped default: {100 * default.score:.1f} (target {100 * default.target:.1f}, generic "
        f"{100 * default.generic:.1f})"
    )


def write_tune_report(
    folder: Path, trials: Sequence[Trial], objective: str, recipe: str, extra: Mapping[str, Any]
) -> Path:
    """Write ``report/index.html``, ``results.json``, ``trials.csv`` and PNGs.

    Args:
        folder: The report goes to ``folder/report``.
        trials: Finished trials.
        objective: What was maximised.
        recipe: Method.
        extra: Further entries of results.json.

    Returns:
        Path of the page.
    """
    target = Path(folder) / "report"
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    ordered = sorted(trials, key=lambda trial: trial.number)
    write_csv(
        target / "trials.csv",
        ("trial", "target", "generic", "score", *names),
        [(t.number, t.target, t.generic, t.score, *(t.params[name] for name in names)) for t in ordered],
    )
    values = {"trials": [asdict(trial) for trial in ordered], "front": [t.number for t in front(trials)], **extra}
    write_atomically(target / "results.json", json.dumps(values, indent=2) + "\n")
    on_front = {trial.number for trial in front(trials)}
    rows = [
        (
            f"{t.number}{' (default)' if t.is_default else ''}{' on the front' if t.number in on_front else ''}",
            f"{100 * t.target:.1f}",
            f"{100 * t.generic:.1f}",
            f"{100 * t.score:.1f}",
            *(f"{t.params[name]:.3g}" if isinstance(t.params[name], float) else str(t.params[name]) for name in names),
        )
        for t in sorted(trials, key=lambda trial: -trial.score)
    ]
    sections = [
        *plot_sections(target, [_front_plot(trials, objective), _course_plot(ordered, objective)]),
        Section("Trials", table_html(("trial", "target", "generic", objective, *names), rows), wide=True),
    ]
    title, lead = f"Search for {recipe}", f"{tell(trials, objective)}."
    return write_atomically(target / "index.html", page(title, "Validation data only", lead, [], sections))


def _front_plot(trials: Sequence[Trial], objective: str) -> Plot:
    best = max(trials, key=lambda t: (t.score, t.is_default))
    edge = front(trials)
    numbers = {trial.number for trial in edge}
    rows = [(t.number, 100 * t.generic, 100 * t.target, t.number in numbers) for t in trials]

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        picture = new_figure(theme)
        axes = picture.add_subplot(1, 1, 1)
        style_axes(axes, theme, "generic validation (%)", "target validation (%)")
        axes.scatter([row[1] for row in rows], [row[2] for row in rows], s=26, color=theme.muted, label="trials")
        xs, ys = [100 * t.generic for t in edge], [100 * t.target for t in edge]
        axes.plot(xs, ys, color=theme.cycle[0], linewidth=2, marker="o", ms=5, label="front")
        for trial, marker, name in ((default, "s", "shipped default") for default in trials if default.is_default):
            axes.scatter(
                [100 * trial.generic], [100 * trial.target], s=70, marker=marker, color=theme.cycle[1], label=name
            )
        axes.scatter([100 * best.generic], [100 * best.target], s=130, marker="*", color=theme.cycle[2], label="best")
        legend_below(picture, axes, theme, columns=4)
        return picture

    caption = (
        f"Each point is a trial; the star has the best {objective}. No trial is above and to the right of the front."
    )
    return Plot("front", "Target and generic validation", caption, ("trial", "generic", "target", "front"), rows, draw)


def _course_plot(trials: Sequence[Trial], objective: str) -> Plot:
    best, rows = -1.0, []
    for trial in trials:
        best = max(best, trial.score)
        rows.append((trial.number, 100 * trial.score, 100 * best))

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        picture = new_figure(theme)
        axes = picture.add_subplot(1, 1, 1)
        style_axes(axes, theme, "trial", f"{objective} on validation (%)")
        axes.scatter([row[0] for row in rows], [row[1] for row in rows], s=26, color=theme.muted, label="trial")
        axes.step([row[0] for row in rows], [row[2] for row in rows], where="post", color=theme.cycle[0], label="best")
        legend_below(picture, axes, theme)
        return picture

    return Plot(
        "course", "Course of the search", "The line is the best so far.", ("trial", "score", "best"), rows, draw
    )

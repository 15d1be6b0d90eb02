"""The trade-off plots: gained versus forgotten, and the sweep between start and end weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftfast.config.schema import SuiteConfig
from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes
from ftfast.evaluation.results import METRIC_TITLES, CheckpointResult, SweepPoint, best_alpha, role_mean
from ftfast.evaluation.suites import Results, main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunPoints:
    """What one run adds to the gained-versus-forgotten plot.

    Attributes:
        name: Name of the run.
        end: Results of its final weights.
        sweep: Interpolations between start and end.
        checkpoints: Results during training.
    """

    name: str
    end: Results
    sweep: tuple[SweepPoint, ...] = ()
    checkpoints: tuple[CheckpointResult, ...] = ()


def _axis_label(suites: Sequence[SuiteConfig], role: str) -> str:
    chosen = [suite for suite in suites if suite.role == role]
    if len(chosen) == 1:
        metric = main_metric(chosen[0])
        return f"{role}: {chosen[0].name}, {METRIC_TITLES.get(metric, metric)} (%)"
    return f"mean of {len(chosen)} {role}s (%)"


def _place(suites: Sequence[SuiteConfig], results: Results) -> tuple[float, float]:
    """(mean control, mean target) in percent."""
    return 100 * role_mean(suites, results, "control"), 100 * role_mean(suites, results, "target")


def gained_versus_forgotten(
    suites: Sequence[SuiteConfig], start: Results, runs: Sequence[RunPoints], start_label: str = "start"
) -> Plot | None:
    """Scatter of target (y) against mean control (x): one point per checkpoint, per alpha, per final model.

    Args:
        suites: Suites of all results.
        start: Results of the start model.
        runs: One entry per run.
        start_label: Text beside the star.

    Returns:
        The plot; None unless there are a target and a control.
    """
    if any(math.isnan(value) for value in _place(suites, start)):
        return None
    rows: list[tuple[Any, ...]] = [("start", "start", None, *_place(suites, start))]
    for run in runs:
        rows += [(run.name, "alpha", p.alpha, *_place(suites, p.results)) for p in run.sweep]
        rows += [(run.name, "checkpoint", c.step, *_place(suites, c.results)) for c in run.checkpoints]
        rows.append((run.name, "end", None, *_place(suites, run.end)))
    # a validation suite that is not one of the report's has no place on these axes
    rows = [row for row in rows if not math.isnan(row[3]) and not math.isnan(row[4])]

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        figure = new_figure(theme, width=5.8 if len(runs) == 1 else 7.6, height=4.9)
        axes = figure.add_subplot()
        style_axes(axes, theme, _axis_label(suites, "control"), _axis_label(suites, "target"))
        _draw_start(axes, theme, rows, start_label)
        for number, run in enumerate(runs):
            _draw_run(
                axes, theme, theme.cycle[number % len(theme.cycle)], [r for r in rows if r[0] == run.name], rows[0]
            )
        legend_below(figure, axes, theme, columns=2)
        return figure

    caption = (
        "Up is gained, left is forgotten. The star is the model before training; in the shaded quarter something was "
        "learned and nothing lost. Each line joins the weights interpolated between start (α = 0) and end (α = 1)."
    )
    columns = ("run", "kind", "alpha_or_step", "control_percent", "target_percent")
    return Plot("gained_vs_forgotten", "Gained versus forgotten", caption, columns, rows, draw, wide=len(runs) > 1)


def _draw_start(axes: Axes, theme: Theme, rows: Sequence[tuple[Any, ...]], label: str) -> None:
    """Fix the limits around all points, shade the quarter above and right of the start, mark the start."""
    xs, ys = [row[3] for row in rows], [row[4] for row in rows]
    high = max(max(ys) - min(ys), 2.0)
    # a tenth of a point must not look like a large step beside a gain of ten
    wide = max(max(xs) - min(xs), 0.6 * high)
    middle = (max(xs) + min(xs)) / 2
    axes.set_xlim(middle - 0.66 * wide, middle + 0.66 * wide)
    axes.set_ylim(min(ys) - 0.16 * high, max(ys) + 0.16 * high)
    x, y = xs[0], ys[0]
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    axes.fill_between([x, right], y, top, color=theme.good, linewidth=0, zorder=0)
    axes.axvline(x, color=theme.muted, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.axhline(y, color=theme.muted, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    axes.scatter([x], [y], marker="*", s=240, color=theme.ink, edgecolors=theme.face, linewidths=1, zorder=6)
    _note(axes, theme, label, (x, y), (9, -13), ha="left")
    if right - x > 0.4 * (right - axes.get_xlim()[0]):
        _note(axes, theme, "gained, and kept", (right, top), (-6, -6), ha="right", va="top")


def _note(
    axes: Axes, theme: Theme, text: str, at: tuple[float, float], offset: tuple[float, float], **align: Any
) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", color=theme.muted, fontsize=9.5, zorder=7, **align)


def _draw_run(axes: Axes, theme: Theme, colour: str, rows: Sequence[tuple[Any, ...]], start: tuple[Any, ...]) -> None:
    """Checkpoints as open circles, the alpha curve as a line with dots, the end as a large labelled dot."""
    from matplotlib.patheffects import withStroke

    name = rows[-1][0]
    steps = sorted((row for row in rows if row[1] == "checkpoint"), key=lambda row: row[2])
    if steps:
        xs, ys = [row[3] for row in steps], [row[4] for row in steps]
        path = (start, *steps, rows[-1])
        axes.plot(
            [row[3] for row in path], [row[4] for row in path], color=colour, linewidth=0.9, linestyle=":", zorder=2
        )
        ring: dict[str, Any] = {"facecolors": theme.face, "edgecolors": colour, "linewidths": 1.2}
        axes.scatter(xs, ys, s=26, zorder=3, label=f"{name}: checkpoints", **ring)
    sweep = sorted((row for row in rows if row[1] == "alpha"), key=lambda row: row[2])
    if sweep:
        xs, ys = [row[3] for row in sweep], [row[4] for row in sweep]
        axes.plot(
            xs, ys, color=colour, linewidth=1.8, marker="o", markersize=4.5, zorder=4, label=f"{name}: α from 0 to 1"
        )
        for before, row, after in zip(sweep, sweep[1:], sweep[2:], strict=False):
            _note(axes, theme, f"{row[2]:g}", (row[3], row[4]), _beside(axes, before, after), ha="center", va="center")
    end = rows[-1]
    axes.scatter([end[3]], [end[4]], s=120, color=colour, edgecolors=theme.face, linewidths=1.5, zorder=5)
    axes.annotate(
        name,
        (end[3], end[4]),
        (0, 10 if end[4] >= start[4] else -10),
        textcoords="offset points",
        ha="center",
        va="bottom" if end[4] >= start[4] else "top",
        color=colour,
        fontsize=11,
        fontweight="bold",
        zorder=7,
        path_effects=[withStroke(linewidth=3, foreground=theme.face)],
    )


def _beside(axes: Axes, before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[float, float]:
    """Offset in points to the right of a curve's direction of travel, so that a label does not lie on its own line."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    along, up = (after[3] - before[3]) / (x1 - x0), (after[4] - before[4]) / (y1 - y0)
    length = math.hypot(along, up) or 1.0
    return 15 * up / length, -12 * along / length


def alpha_sweep(suites: Sequence[SuiteConfig], sweeps: Mapping[str, Sequence[SweepPoint]]) -> Plot | None:
    """Main metric of every suite against the interpolation point, one panel per run.

    Args:
        suites: Suites of the sweeps.
        sweeps: Run name -> points; runs with fewer than two are left out.

    Returns:
        The plot; None if no run has a sweep.
    """
    drawn = {name: sorted(points, key=lambda point: point.alpha) for name, points in sweeps.items() if len(points) > 1}
    every = [point for points in drawn.values() for point in points]
    shown = [s for s in suites if all(main_metric(s) in p.results.get(s.name, {}) for p in every)]
    if not drawn or not shown:
        return None
    rows = [
        (name, p.alpha, s.name, s.role, main_metric(s), 100 * p.results[s.name][main_metric(s)])
        for name, points in drawn.items()
        for s in shown
        for p in points
    ]
    best = {name: best_alpha(shown, points) for name, points in drawn.items()}

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        figure = new_figure(theme, width=5.8 if len(drawn) == 1 else 8.6, height=4.9 if len(drawn) == 1 else 4.6)
        panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, drawn, strict=True):
            style_axes(axes, theme, "α", "%" if axes is panels[0] else "")
            _draw_sweep(axes, theme, shown, [row for row in rows if row[0] == name], best[name])
            axes.set_ylim(bottom=0, top=1.14 * max(row[5] for row in rows) or 1)
            if len(drawn) > 1:
                axes.set_title(name, color=theme.ink, fontsize=11, fontweight="bold", loc="left")
        legend_below(figure, panels[0], theme, columns=2)
        return figure

    caption = (
        "Weights between start (α = 0) and end (α = 1), as in WiSE-FT. Best balance is the highest mean of target and "
        "controls on these very suites: a picture of the trade-off, not a selected result."
    )
    columns = ("run", "alpha", "suite", "role", "metric", "percent")
    return Plot("alpha_sweep", "Between start and end", caption, columns, rows, draw, wide=len(drawn) > 1)


def _draw_sweep(
    axes: Axes,
    theme: Theme,
    suites: Sequence[SuiteConfig],
    rows: Sequence[tuple[Any, ...]],
    best: SweepPoint | None,
) -> None:
    """One line per suite, solid for targets, and a mark at the best alpha."""
    for number, suite in enumerate(suites):
        points = [(row[1], row[5]) for row in rows if row[2] == suite.name]
        metric = main_metric(suite)
        target = suite.role == "target"
        axes.plot(
            *zip(*points, strict=True),
            color=theme.cycle[number % len(theme.cycle)],
            linewidth=2.6 if target else 1.8,
            linestyle="-" if target else (0, (5, 2)),
            marker="o",
            markersize=5.5 if target else 4.5,
            label=f"{suite.role}: {suite.name} {METRIC_TITLES.get(metric, metric)}",
        )
    if best is not None:
        axes.axvline(best.alpha, color=theme.muted, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
        left = best.alpha > 0.5
        text = f"best balance: {best.alpha:g}"
        align: dict[str, Any] = {"ha": "right" if left else "left", "va": "top", "xycoords": axes.get_xaxis_transform()}
        _note(axes, theme, text, (best.alpha, 1.0), (-6 if left else 6, -2), **align)

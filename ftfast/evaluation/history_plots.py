"""Plots of a run's log: loss terms, learning rate, validation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftfast.config.schema import SuiteConfig
from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes
from ftfast.evaluation.plots import RunPoints, gained_versus_forgotten
from ftfast.evaluation.results import METRIC_TITLES, CheckpointResult
from ftfast.evaluation.suites import DEFAULT_METRIC, main_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TERM = re.compile(r"^(?:train/)?loss/(?P<term>.+)$")
_RATE = re.compile(r"^(?:train/)?lr(?:[/_](?P<group>.+))?$")
_EVAL = re.compile(r"^(?:eval|val|validation)/(?P<suite>.+)/(?P<metric>[^/]+)$")


def _series(
    history: Sequence[Mapping[str, Any]], keep: Callable[[str], str | None]
) -> dict[str, list[tuple[int, float]]]:
    """Named curves out of log rows: ``keep`` maps a key to its curve's name, or to None."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for key, value in row.items():
            name = keep(key)
            if name is not None and isinstance(value, (int, float)) and math.isfinite(value) and "step" in row:
                curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return {name: sorted(points) for name, points in curves.items()}


def _long_rows(curves: Mapping[str, list[tuple[int, float]]]) -> list[tuple[Any, ...]]:
    return [(step, name, value) for name, points in curves.items() for step, value in points]


def _loss_name(key: str) -> str | None:
    if key in ("train/loss", "loss"):
        return "total"
    if key in ("train/anchor_penalty", "train/anchor", "anchor_penalty"):
        return "weight anchor"
    found = _TERM.match(key)
    return found["term"] if found else None


def _rate_name(key: str) -> str | None:
    found = _RATE.match(key)
    return (found["group"] or "learning rate") if found else None


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a fifteenth of the curve, of even width: it levels losses that alternate by domain."""
    reach = max(len(values) // 30, 2)
    windows = (values[max(i - reach, 0) : i + reach] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def loss_terms(history: Sequence[Mapping[str, Any]]) -> Plot | None:
    """One small panel per loss term, each on its own scale: raw values thin, their running mean thick.

    Args:
        history: Log rows with "step" and "train/loss", "train/loss/<term>".

    Returns:
        The plot; None without losses.
    """
    curves = _series(history, _loss_name)
    if not curves:
        return None
    curves = dict(sorted(curves.items(), key=lambda item: item[0] != "total"))

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        across = 1 if len(curves) == 1 else (2 if len(curves) <= 4 else 3)
        down = -(-len(curves) // across)
        figure = new_figure(theme, width=5.8 if across < 3 else 8.6, height=0.4 + (3.5 if down == 1 else 2.2 * down))
        for number, (name, points) in enumerate(curves.items()):
            axes = figure.add_subplot(down, across, number + 1)
            style_axes(axes, theme, "step" if number >= len(curves) - across else "")
            colour = theme.cycle[number % len(theme.cycle)]
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps, _smooth(values), color=colour, linewidth=2)
            axes.locator_params(axis="x", integer=True)
            axes.set_title(name, color=theme.ink, fontsize=11, fontweight="bold", loc="left")
        return figure

    caption = "The total is the weighted sum, the terms are shown before weighting. Every panel has its own scale."
    return Plot(
        "loss_terms", "Loss terms", caption, ("step", "term", "value"), _long_rows(curves), draw, wide=len(curves) > 4
    )


def _lines(
    curves: Mapping[str, list[tuple[int, float]]], ylabel: str, *, marker: str = ""
) -> Callable[[Theme], Figure]:
    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        figure = new_figure(theme, height=3.9)
        axes = figure.add_subplot()
        style_axes(axes, theme, "step", ylabel)
        axes.locator_params(axis="x", integer=True)
        for number, (name, points) in enumerate(curves.items()):
            colour = theme.cycle[number % len(theme.cycle)]
            style = "-" if number % 2 == 0 else (0, (5, 2))
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, linestyle=style, marker=marker, label=name)
        if len(curves) > 1:
            legend_below(figure, axes, theme, columns=2)
        return figure

    return draw


def learning_rate(history: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Learning rate of each parameter group against the step; None without one in the log."""
    curves = _series(history, _rate_name)
    if not curves:
        return None

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        figure = _lines(curves, "learning rate")(theme)
        figure.axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        figure.axes[0].yaxis.get_offset_text().set_color(theme.muted)
        figure.axes[0].set_ylim(bottom=0)
        return figure

    caption = "Per parameter group."
    if len(curves) == 1:
        caption = "The base rate; towers and heads with a rate of their own follow the same curve."
    columns = ("step", "group", "value")
    return Plot("learning_rate", "Learning rate", caption, columns, _long_rows(curves), draw)


def validation_path(
    history: Sequence[Mapping[str, Any]], suites: Sequence[SuiteConfig], name: str = "run"
) -> Plot | None:
    """Gained versus forgotten on the validation data: the way the run took, one circle per validation.

    Args:
        history: Log rows with "step" and "eval/<suite>/<metric>".
        suites: Validation suites; a target and a control are needed.
        name: Name of the run.

    Returns:
        The plot; None with fewer than two complete validations, or without both roles.
    """
    keys = {f"eval/{suite.name}/{main_metric(suite)}": suite for suite in suites}
    measured = [
        CheckpointResult(int(row["step"]), {s.name: {main_metric(s): float(row[key])} for key, s in keys.items()})
        for row in history
        if keys and all(key in row for key in keys)
    ]
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    run = RunPoints(name, last.results, checkpoints=tuple(measured[1:-1]))
    plot = gained_versus_forgotten(suites, first.results, [run], start_label=f"step {first.step}")
    caption = (
        f"The same trade-off on the validation data, one circle per validation from step {first.step} (star) to step "
        f"{last.step} (dot)."
    )
    return plot and dataclasses.replace(plot, name="validation_path", title="The way there", caption=caption)


def validation(history: Sequence[Mapping[str, Any]], suites: Sequence[SuiteConfig] = ()) -> Plot | None:
    """Validation during training: one curve per suite, of its main metric.

    Args:
        history: Log rows with "step" and "eval/<suite>/<metric>".
        suites: Validation suites, for their main metrics; others show the first default metric they logged.

    Returns:
        The plot; None without validation in the log.
    """
    wanted = {suite.name: main_metric(suite) for suite in suites}
    order = tuple(DEFAULT_METRIC.values())

    logged: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in history for key in row):
        found = _EVAL.match(key)
        if found:
            logged.setdefault(found["suite"], []).append(found["metric"])
    chosen: dict[str, str] = {}
    for suite, metrics in logged.items():
        preferred = (wanted.get(suite, ""), *order, metrics[0])
        metric = next(name for name in preferred if name in metrics)
        chosen[f"eval/{suite}/{metric}"] = f"{suite}, {METRIC_TITLES.get(metric, metric)}"
    curves = _series(history, chosen.get)
    curves = {name: [(step, 100 * value) for step, value in points] for name, points in curves.items()}
    if not curves:
        return None
    caption = "On the validation data that selects the weights; none of it is in the table above."
    draw = _lines(curves, "%", marker="o")
    return Plot(
        "validation", "Validation during training", caption, ("step", "suite", "percent"), _long_rows(curves), draw
    )

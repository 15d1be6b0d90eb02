"""Pictures of a sequence of tasks: accuracy matrices as heat maps, and accuracies along the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftfast.evaluation.continual import SequenceMatrix, mean_matrix
from ftfast.evaluation.drawing import Plot, Theme, legend_below, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def heat_maps(runs: Mapping[str, Sequence[SequenceMatrix]]) -> Plot:
    """Accuracy matrices side by side, means over seeds, with the zero-shot row on top.

    Args:
        runs: Method -> one matrix per seed, over the same tasks.

    Returns:
        The plot; its table has one row per method, step and task.
    """
    means = {name: mean_matrix(matrices) for name, matrices in runs.items()}
    rows: list[tuple[Any, ...]] = [
        (name, "zero-shot" if step == 0 else matrix.tasks[step - 1], task, 100 * value)
        for name, matrix in means.items()
        for step, line in enumerate(matrix.with_zero_shot())
        for task, value in zip(matrix.tasks, line, strict=True)
    ]
    shown = [100 * matrix.with_zero_shot() for matrix in means.values()]
    span = (min(float(table.min()) for table in shown), max(float(table.max()) for table in shown))

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        columns = min(len(means), 2 if len(means) < 5 else 3)
        lines = -(-len(means) // columns)
        size = 1.3 + 0.46 * len(next(iter(means.values())).tasks)
        figure = new_figure(theme, width=columns * size + 0.9, height=lines * size)
        for place, (name, matrix) in enumerate(means.items()):
            axes = figure.add_subplot(lines, columns, place + 1)
            _heat_map(axes, theme, matrix, span, name, first=place % columns == 0)
        return figure

    caption = (
        "Top-1 accuracy in percent; each row is the model after one more task, each column a task, outlined where it "
        "was learned. Right of the outline is what was never trained on (transfer), left of it what must not be "
        "forgotten."
    )
    header = ("run", "after", "task", "accuracy_percent")
    return Plot("accuracy_matrix", "Accuracy after every task", caption, header, rows, draw, wide=True)


def _heat_map(
    axes: Axes, theme: Theme, matrix: SequenceMatrix, span: tuple[float, float], title: str, *, first: bool
) -> None:
    """One matrix: zero-shot row, a gap, then one row per task."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    table = 100 * matrix.with_zero_shot()
    count = len(matrix.tasks)
    colours = LinearSegmentedColormap.from_list("accuracy", [theme.face, theme.cycle[0]])
    low, high = span
    gap = 0.35
    for step, line in enumerate(table):
        y = step if step == 0 else step + gap
        for column, value in enumerate(line):
            shade = (value - low) / max(high - low, 1e-9)
            axes.add_patch(Rectangle((column, y), 0.96, 0.96, color=colours(0.08 + 0.84 * shade), linewidth=0))
            ink = theme.face if shade > 0.62 else theme.ink
            axes.text(column + 0.48, y + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
        if step:
            box = Rectangle((step - 1, y), 0.96, 0.96, fill=False, edgecolor=theme.ink, linewidth=1.6)
            axes.add_patch(box)
    axes.set_xlim(-0.05, count + 0.05)
    axes.set_ylim(count + 1 + gap + 0.05, -0.05)
    axes.set_aspect("equal")
    axes.set_facecolor(theme.face)
    axes.set_title(title, color=theme.ink, fontsize=11, pad=8)
    axes.set_xticks([column + 0.48 for column in range(count)], matrix.tasks, rotation=45, ha="right")
    names = ["zero-shot", *(f"after {task}" for task in matrix.tasks)] if first else []
    axes.set_yticks([0.5, *(step + gap + 0.5 for step in range(1, count + 1))] if first else [], names)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def curves(runs: Mapping[str, Sequence[SequenceMatrix]]) -> Plot:
    """Mean change from zero-shot along the sequence: over tasks already learned, and over tasks not learned yet.

    Args:
        runs: Method -> one matrix per seed.

    Returns:
        The plot; lines are means over seeds, bands their range.
    """
    from matplotlib.ticker import MaxNLocator

    rows: list[tuple[Any, ...]] = []
    for name, matrices in runs.items():
        for kind, lower in (("learned", True), ("not learned yet", False)):
            values = 100 * np.stack([_along(matrix, lower) for matrix in matrices])
            tasks = ("zero-shot", *matrices[0].tasks)
            for step in range(values.shape[1]):
                line = values[:, step]
                if not np.isnan(line).any():
                    rows.append((name, kind, step, tasks[step], line.mean(), line.min(), line.max()))

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        figure = new_figure(theme, width=9.4, height=4.3)
        for place, kind in enumerate(("learned", "not learned yet")):
            axes = figure.add_subplot(1, 2, place + 1)
            style_axes(axes, theme, "tasks learned", f"tasks {kind}: points against zero-shot")
            axes.axhline(0, color=theme.muted, linewidth=1, linestyle=(0, (4, 4)))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            for number, name in enumerate(runs):
                chosen = [row for row in rows if row[0] == name and row[1] == kind]
                colour = theme.cycle[number % len(theme.cycle)]
                steps = [row[2] for row in chosen]
                axes.plot(steps, [row[4] for row in chosen], color=colour, linewidth=2, marker="o", ms=4, label=name)
                axes.fill_between(
                    steps, [row[5] for row in chosen], [row[6] for row in chosen], color=colour, alpha=0.15, linewidth=0
                )
            if place == 0:
                legend_below(figure, axes, theme, columns=4)
        return figure

    caption = (
        "Mean accuracy against the untouched model on the same tasks; lines are means over seeds, bands their range. "
        "Left: what was learned, as more is learned. Right: what comes later."
    )
    header = ("run", "kind", "tasks_learned", "after", "mean_points", "lowest", "highest")
    return Plot("along_the_sequence", "Along the sequence", caption, header, rows, draw, wide=True)


def _along(matrix: SequenceMatrix, lower: bool) -> np.ndarray:
    """Mean change on tasks learned so far (or not yet) at the start and after every task; NaN where there is none."""
    table = matrix.with_zero_shot() - matrix.zero_shot
    parts = [line[:step] if lower else line[step:] for step, line in enumerate(table)]
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def task_curves(runs: Mapping[str, Sequence[SequenceMatrix]]) -> Plot | None:
    """Accuracy on every task along the sequence, one small picture per task; None for a single task."""
    from matplotlib.ticker import MaxNLocator

    means = {name: mean_matrix(matrices) for name, matrices in runs.items()}
    tasks = next(iter(means.values())).tasks
    if len(tasks) < 2:
        return None
    rows = [
        (name, task, step, 100 * value)
        for name, matrix in means.items()
        for column, task in enumerate(tasks)
        for step, value in enumerate(matrix.with_zero_shot()[:, column])
    ]

    def draw(theme: Theme) -> Figure:
        """Draw in a theme."""
        columns = min(4, len(tasks))
        lines = -(-len(tasks) // columns)
        figure = new_figure(theme, width=9.4, height=0.6 + 2.0 * lines)
        for place, task in enumerate(tasks):
            axes = figure.add_subplot(lines, columns, place + 1)
            style_axes(axes, theme)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(task, color=theme.ink, fontsize=10)
            axes.axvline(place + 1, color=theme.muted, linewidth=1, linestyle=(0, (3, 3)))
            for number, name in enumerate(means):
                chosen = [row for row in rows if row[0] == name and row[1] == task]
                colour = theme.cycle[number % len(theme.cycle)]
                axes.plot(
                    [row[2] for row in chosen], [row[3] for row in chosen], color=colour, linewidth=1.8, label=name
                )
            if place == 0:
                legend_below(figure, axes, theme, columns=4)
        return figure

    caption = (
        "Accuracy in percent over the number of tasks learned; the dashed line is where the task itself was learned."
    )
    header = ("run", "task", "tasks_learned", "accuracy_percent")
    return Plot("every_task", "Every task along the sequence", caption, header, rows, draw, wide=True)

"""How plots look: themes, a table with its drawing, quiet axes. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; ``cycle`` is Okabe and Ito's palette for colour-blind readers, fitted to the background."""

    name: str
    face: str
    ink: str
    muted: str
    grid: str
    good: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    name="light",
    face="#ffffff",
    ink="#1b2430",
    muted="#66717f",
    grid="#e4e8ee",
    good="#e9f6f0",
    cycle=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b"),
)
DARK = Theme(
    name="dark",
    face="#171d26",
    ink="#e8edf4",
    muted="#94a1b2",
    grid="#2b3441",
    good="#17302a",
    cycle=("#4aa8e0", "#f08043", "#2fc79b", "#e09ac4", "#f2b63c", "#8fd0f5", "#c9aa74"),
)


@dataclass(frozen=True)
class Plot:
    """A plot before it is drawn.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: One or two sentences that say how to read it.
        columns: Header of the table behind it.
        rows: The table.
        draw: Draws the figure in a theme.
        wide: Give it a whole row of the page.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    draw: Callable[[Theme], Figure]
    wide: bool = False

    def png(self, theme: Theme) -> bytes:
        """Draw and encode as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = self.draw(theme)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        # without Software and date the same results give the same bytes
        figure.savefig(buffer, format="png", dpi=160, facecolor=theme.face, metadata={"Software": None})
        return buffer.getvalue()


def new_figure(theme: Theme, width: float = 5.8, height: float = 4.2) -> Figure:
    """An empty figure in the theme's background; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor=theme.face, layout="constrained")


def style_axes(axes: Axes, theme: Theme, xlabel: str = "", ylabel: str = "") -> None:
    """Quiet axes: a light grid, no box, muted ticks."""
    axes.set_facecolor(theme.face)
    axes.set_axisbelow(True)
    axes.grid(color=theme.grid, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=10, length=0)
    axes.set_xlabel(xlabel, color=theme.ink, fontsize=11, labelpad=8)
    axes.set_ylabel(ylabel, color=theme.ink, fontsize=11, labelpad=8)


def legend_below(figure: Figure, axes: Axes, theme: Theme, columns: int = 3) -> None:
    """A frameless legend under the axes, where it cannot cover a point."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, fontsize=10
    )
    for text in legend.get_texts():
        text.set_color(theme.ink)

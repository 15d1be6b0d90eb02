"""Draw the recorded results: time and memory of every loss against the batch size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks import harness

COLOURS = {"ftfast": "#0b6e4f", "open_clip": "#c0392b", "pytorch": "#c0392b"}
OTHERS = ["#e08e0b", "#34568b", "#7b3f99", "#6b6b6b"]


def colour(name: str, names: list[str]) -> str:
    """Return a fixed colour for us and the baselines, and one by position for the others."""
    others = [other for other in names if other not in COLOURS]
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def draw(axes: Axes, cases: list[dict[str, Any]], value: str, label: str) -> None:
    """Draw one quantity of one loss against the batch size, on doubly logarithmic axes.

    Args:
        axes: Where to draw.
        cases: Records of one loss.
        value: "time" or "memory".
        label: The vertical axis's label.
    """
    names = list(dict.fromkeys(case["implementation"] for case in cases))
    for name in names:
        done = [case for case in cases if case["implementation"] == name and "both" in case]
        rows = [case["rows"] for case in done]
        if value == "time":
            heights = [case["both"]["median_ms"] for case in done]
        else:
            heights = [case["peak_bytes"] / 2**20 for case in done]
        axes.plot(rows, heights, marker="o", markersize=4, label=name, color=colour(name, names), linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({case["rows"] for case in cases}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch size N")
    axes.set_ylabel(label)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def plot_losses(path: Path, folder: Path) -> list[Path]:
    """Draw one picture per loss from a record of ``python -m benchmarks losses``.

    Args:
        path: The JSON record.
        folder: Where the PNG files go.

    Returns:
        The files written.
    """
    record = json.loads(path.read_text())
    environment, settings = record["environment"], record["settings"]
    written = []
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["op"] == op]
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
        draw(axes[0], cases, "time", "forward + backward, ms (median)")
        draw(axes[1], cases, "memory", "peak memory beyond inputs, MiB")
        axes[0].legend(frameon=False)
        figure.suptitle(
            f"{op}: D = {settings['width']}, {settings['dtype']}, {environment['device']}, "
            f"{environment['threads']} threads, torch {environment['versions']['torch']}",
            fontsize=10,
        )
        target = folder / f"{path.stem}_{op}.png"
        figure.savefig(target, dpi=130)
        plt.close(figure)
        written.append(target)
    return written


def main(argv: list[str]) -> int:
    """Draw every recorded result.

    Args:
        argv: Options; ``--help`` lists them.

    Returns:
        0, or 1 if there is nothing to draw.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the JSON records and pictures")
    folder = parser.parse_args(argv).results
    written = [picture for path in sorted(folder.glob("losses_*.json")) for picture in plot_losses(path, folder)]
    for picture in written:
        print(f"wrote {picture}")
    if not written:
        print(f"{folder} holds no losses_*.json; run python -m benchmarks losses first")
    return 0 if written else 1

"""``ftfast merge``: weights between two models (WiSE-FT), measured and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.errors import ConfigError

if TYPE_CHECKING:
    from ftfast.config.schema import SuiteConfig
    from ftfast.evaluation import SweepPoint
    from ftfast.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """Interpolate weights, (1 - alpha) START + alpha END, measure each point and write the best or the only one."""

    start: tyro.conf.Positional[str]
    """Weights at alpha 0: a run, a folder, a weights file (with --model) or an open_clip name (with --pretrained)."""
    end: tyro.conf.Positional[str]
    """Weights at alpha 1, of the same architecture."""
    alpha: str = "0:1:0.1"
    """One value (0.5), a list (0,0.5,1) or first:last:step (0:1:0.1)."""
    suite: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """YAML file of suites to measure each point with; may be repeated."""
    out: str = ""
    """Folder for the merged weights in open_clip's format; with several alphas the best by the suites is written."""
    model: str = ""
    """Architecture of weights files."""
    pretrained: str = ""
    """open_clip tag, if START is an open_clip name."""
    overwrite: bool = False
    """Replace --out if it exists."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 2
    """Decoding processes."""
    device: str = "auto"
    """auto, cpu or cuda:0."""
    json: bool = False
    """Print results as JSON."""


def parse_alphas(text: str) -> tuple[float, ...]:
    """Read interpolation points.

    Args:
        text: "0.5", "0,0.5,1" or "first:last:step".

    Returns:
        Points in the order given; a range includes its last value.

    Raises:
        ConfigError: If the text is none of these, or a point lies outside [0, 1].
    """
    problem = f"--alpha is '{text}'. Give numbers between 0 and 1: one (0.5), a list (0,0.5,1) or a range (0:1:0.1)."
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            count = math.floor((last - first) / step + 1e-9) + 1 if step > 0 else 0
            points = tuple(round(first + position * step, 10) for position in range(min(count, 100_001)))
        else:
            points = tuple(float(part) for part in text.split(","))
    except (ValueError, OverflowError):
        raise ConfigError(problem) from None
    if not points or len(points) > 100_000 or not all(0 <= point <= 1 for point in points):
        raise ConfigError(problem)
    return points


def run(argv: Sequence[str]) -> int:
    """Interpolate, measure, write.

    Args:
        argv: Arguments after ``ftfast merge``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If nothing would come out of the command, or the output folder exists.
    """
    arguments = parse_options(MergeArguments, argv, "ftfast merge")
    alphas = parse_alphas(arguments.alpha)
    if not arguments.suite and not arguments.out:
        raise ConfigError("ftfast merge needs --suite to measure the points, --out to write weights, or both.")
    if len(alphas) > 1 and not arguments.suite:
        raise ConfigError(
            f"--alpha has {len(alphas)} points, but no --suite says which is best. Add --suite FILE or give one alpha."
        )
    if arguments.out and Path(arguments.out).exists() and not arguments.overwrite:
        raise ConfigError(f"--out {arguments.out} already exists. Replace it with --overwrite or choose another --out.")
    from ftfast.cli.weights import load, read_suites

    suites = read_suites(arguments.suite, "") if arguments.suite else ()
    start = load(arguments.start, model=arguments.model, pretrained=arguments.pretrained, device=arguments.device)
    end = load(arguments.end, model=arguments.model, pretrained=arguments.pretrained, device="cpu")
    points = _measure(start, end, alphas, suites, arguments)
    alpha = _choose(alphas, suites, points)
    written = _write(start, end, alpha, arguments) if arguments.out else ""
    if arguments.json:
        measured = [{"alpha": point.alpha, "suites": point.results} for point in points]
        output.emit_json({"alpha": alpha, "out": written, "points": measured})
        return 0
    _print(suites, points, alpha)
    if written:
        output.emit(f"wrote alpha {alpha:g} to {written}")
    return 0


def _measure(
    start: LoadedModel,
    end: LoadedModel,
    alphas: tuple[float, ...],
    suites: tuple[SuiteConfig, ...],
    arguments: MergeArguments,
) -> list[SweepPoint]:
    if not suites:
        return []
    from ftfast.evaluation import alpha_sweep

    return alpha_sweep(
        start,
        start.model.state_dict(),
        end.model.state_dict(),
        alphas,
        suites,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )


def _choose(alphas: tuple[float, ...], suites: tuple[SuiteConfig, ...], points: list[SweepPoint]) -> float:
    """The only alpha, or the one that the report would call best."""
    from ftfast.evaluation import best_alpha

    best = best_alpha(suites, points) if len(alphas) > 1 else None
    return alphas[0] if best is None else best.alpha


def _write(start: LoadedModel, end: LoadedModel, alpha: float, arguments: MergeArguments) -> str:
    from ftfast.models import save_open_clip_folder
    from ftfast.weightspace.interpolation import interpolate

    state = interpolate(start.model.state_dict(), end.model.state_dict(), alpha)
    card = (
        f"# Merged weights\n\n(1 - {alpha:g}) × {arguments.start} + {alpha:g} × {arguments.end}, "
        "as in WiSE-FT (Wortsman et al., CVPR 2022). Written by `ftfast merge`.\n"
    )
    return str(save_open_clip_folder(Path(arguments.out), state, end, card))


def _print(suites: tuple[SuiteConfig, ...], points: list[SweepPoint], alpha: float) -> None:
    from ftfast.evaluation import main_metric
    from ftfast.evaluation.results import METRIC_TITLES

    if not points:
        return
    metrics = [(suite.name, main_metric(suite)) for suite in suites]
    header = ["alpha", *(f"{name} {METRIC_TITLES.get(metric, metric)}" for name, metric in metrics), ""]
    rows: list[Sequence[Any]] = []
    for point in points:
        values = (100 * point.results[name][metric] for name, metric in metrics)
        rows.append((point.alpha, *values, "best" if point.alpha == alpha and len(points) > 1 else ""))
    output.emit(output.table(header, rows))

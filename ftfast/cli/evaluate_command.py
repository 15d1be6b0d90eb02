"""``ftfast eval``: measure a run, a weights file or a model on suites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ftfast.cli import output
from ftfast.cli.options import parse_options


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Measure a run, a weights file or a model on suites; without --suite, on the suites of the run."""

    target: tyro.conf.Positional[str]
    """A run folder, an open_clip folder, a weights file (with --model) or an open_clip name (with --pretrained)."""
    suite: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """YAML file of suites; may be repeated."""
    model: str = ""
    """Architecture of a weights file, such as ViT-B-16."""
    pretrained: str = ""
    """open_clip tag, if the target is an open_clip name."""
    out: str = ""
    """Also write results.json (CLIP_benchmark's schema) and results.csv into this folder."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 2
    """Decoding processes."""
    device: str = "auto"
    """auto, cpu or cuda:0."""
    json: bool = False
    """Print results as JSON."""


def run(argv: Sequence[str]) -> int:
    """Measure and print.

    Args:
        argv: Arguments after ``ftfast eval``.

    Returns:
        Exit code.
    """
    arguments = parse_options(EvaluateArguments, argv, "ftfast eval")
    from ftfast.cli.weights import load, model_settings, read_suites

    suites = read_suites(arguments.suite, arguments.target)
    model_settings(arguments.target, arguments.model, arguments.pretrained)
    from ftfast.evaluation import evaluate, main_metric, open_suites
    from ftfast.evaluation.results import METRIC_TITLES, write_results

    opened = open_suites(suites)
    loaded = load(arguments.target, model=arguments.model, pretrained=arguments.pretrained, device=arguments.device)
    for item in opened:
        output.note(f"{item.config.name}: {item.queries.description}")
    results = evaluate(loaded, opened, batch_size=arguments.batch_size, workers=arguments.workers)
    if arguments.out:
        tag = arguments.pretrained or "evaluated"
        written = write_results(Path(arguments.out), suites, {tag: results}, model=loaded.name)
        output.note(f"wrote {written}")
    if arguments.json:
        output.emit_json({"model": arguments.target, "suites": results})
        return 0
    rows: list[Sequence[Any]] = []
    for suite in suites:
        main = main_metric(suite)
        for metric, value in results[suite.name].items():
            mark = "*" if metric == main else ""
            rows.append((suite.name, suite.role, METRIC_TITLES.get(metric, metric) + mark, 100 * value))
    output.emit(output.table(("suite", "role", "metric", "%"), rows))
    output.emit("* counts in summaries and selection")
    return 0

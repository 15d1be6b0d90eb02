"""Results as data: summary rows, means over seeds, CLIP_benchmark records, CSV files."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftfast.config.schema import SuiteConfig
from ftfast.errors import DataError
from ftfast.evaluation.suites import Results, main_metric

METRIC_TITLES = {
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
    "map_at_20": "mAP@20",
    "map_at_r": "mAP@R",
    "mmp_at_5": "mMP@5",
    "precision_at_5": "P@5",
    **{f"recall_at_{k}": f"R@{k}" for k in (1, 5, 10)},
    **{f"mean_recall_at_{k}": f"mean R@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_recall_at_{k}": f"image→text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_recall_at_{k}": f"text→image R@{k}" for k in (1, 5, 10)},
}
"""How metrics are written for people."""


@dataclass(frozen=True)
class SummaryRow:
    """One suite's main metric before and after training.

    Attributes:
        suite: Name of the suite.
        role: "target" or "control".
        metric: Main metric.
        before: Value of the start model, in [0, 1].
        after: Value of the tuned model, in [0, 1]; with several seeds their mean.
        spread: Sample standard deviation of ``after`` over seeds; None for one seed.
    """

    suite: str
    role: str
    metric: str
    before: float
    after: float
    spread: float | None = None

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def kept(self) -> float:
        """``after / before``; NaN if the start model scored 0."""
        return self.after / self.before if self.before > 0 else math.nan

    @property
    def title(self) -> str:
        """Suite and metric, for people."""
        return f"{self.suite} {METRIC_TITLES.get(self.metric, self.metric)}"


@dataclass(frozen=True)
class SweepPoint:
    """Results of the weights ``(1 - alpha) start + alpha tuned``."""

    alpha: float
    results: Results


@dataclass(frozen=True)
class CheckpointResult:
    """Results of the weights after ``step`` optimizer steps."""

    step: int
    results: Results


def summary_rows(
    suites: Sequence[SuiteConfig], before: Results, after: Results, seeds: Sequence[Results] = ()
) -> list[SummaryRow]:
    """Main metric of each suite before and after, targets first.

    Args:
        suites: Suites that were measured both times.
        before: Results of the start model.
        after: Results of the tuned model.
        seeds: Results of each seed that ``after`` is the mean of, for the spread.

    Returns:
        One row per suite.

    Raises:
        DataError: A suite was not measured before or after.
    """
    rows = []
    for suite in sorted(suites, key=lambda item: item.role != "target"):
        metric = main_metric(suite)
        values = []
        for when, results in (("before", before), ("after", after)):
            if metric not in results.get(suite.name, {}):
                raise DataError(
                    f"suite {suite.name!r} has no result for {metric!r} {when} training; measured "
                    f"were: {', '.join(results) or 'none'}."
                )
            values.append(results[suite.name][metric])
        spread = statistics.stdev(run[suite.name][metric] for run in seeds) if len(seeds) > 1 else None
        rows.append(SummaryRow(suite.name, suite.role, metric, values[0], values[1], spread))
    return rows


def role_mean(suites: Sequence[SuiteConfig], results: Results, role: str) -> float:
    """Mean of the main metric over the suites of one role; NaN if there are none or one of them was not measured."""
    values = [results.get(s.name, {}).get(main_metric(s), math.nan) for s in suites if s.role == role]
    return sum(values) / len(values) if values else math.nan


def best_alpha(suites: Sequence[SuiteConfig], sweep: Sequence[SweepPoint]) -> SweepPoint | None:
    """Sweep point with the highest equal-weight mean of target and controls (INFUSING's selection rule "all").

    Args:
        suites: Suites of the sweep.
        sweep: Points in any order.

    Returns:
        The point; None for an empty sweep.
    """

    def score(point: SweepPoint) -> float:
        """Mean of the role means that are known."""
        means = [role_mean(suites, point.results, role) for role in ("target", "control")]
        known = [value for value in means if not math.isnan(value)]
        return sum(known) / len(known) if known else -math.inf

    return max(sweep, key=score, default=None)


@dataclass(frozen=True)
class SeedSummary:
    """A figure over several seeds: mean, sample standard deviation (0 for one seed), smallest, largest, count."""

    mean: float
    std: float
    low: float
    high: float
    seeds: int


def aggregate(runs: Sequence[Results]) -> dict[str, dict[str, SeedSummary]]:
    """Mean and spread of each metric over runs with different seeds.

    Args:
        runs: Results of each seed; every run must hold the same suites and metrics.

    Returns:
        Suite -> metric -> summary.

    Raises:
        DataError: There are no runs, or they hold different suites or metrics.
    """
    if not runs:
        raise DataError("there are no runs to aggregate.")
    layout = {(suite, metric) for suite, metrics in runs[0].items() for metric in metrics}
    for number, run in enumerate(runs[1:], start=2):
        other = {(suite, metric) for suite, metrics in run.items() for metric in metrics}
        if other != layout:
            odd = ", ".join(sorted(f"{suite}/{metric}" for suite, metric in layout ^ other))
            raise DataError(
                f"run {number} of {len(runs)} does not hold the same figures as run 1: {odd}. Compare like with like."
            )
    summary: dict[str, dict[str, SeedSummary]] = {}
    for suite, metrics in runs[0].items():
        for metric in metrics:
            values = [run[suite][metric] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            figure = SeedSummary(statistics.fmean(values), spread, min(values), max(values), len(values))
            summary.setdefault(suite, {})[metric] = figure
    return summary


_BENCHMARK_TASK = {
    "zero_shot": "zeroshot_classification",
    "image_text_retrieval": "zeroshot_retrieval",
    "image_retrieval": "image_retrieval",
}
"""CLIP_benchmark's task names; it has none for image -> image retrieval."""


def _benchmark_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """CLIP_benchmark names retrieval by what is retrieved: ``image_retrieval`` is text -> image."""
    renamed = {}
    for name, value in metrics.items():
        name = name.replace("text_to_image_recall_at_", "image_retrieval_recall@")
        name = name.replace("image_to_text_recall_at_", "text_retrieval_recall@")
        renamed[name] = value
    return renamed


def benchmark_records(
    suites: Sequence[SuiteConfig], results: Results, *, model: str, pretrained: str, language: str = "en"
) -> list[dict[str, Any]]:
    """Results in CLIP_benchmark's schema, one record per suite.

    Args:
        suites: Suites of the results; those that were not measured are left out.
        results: Values.
        model: Model name, as open_clip calls it.
        pretrained: Tag of the weights.
        language: Language of the texts.

    Returns:
        Records of dataset, model, pretrained, task, metrics and language.
    """
    return [
        {
            "dataset": suite.name,
            "model": model,
            "pretrained": pretrained,
            "task": _BENCHMARK_TASK[suite.task],
            "metrics": _benchmark_metrics(results[suite.name]),
            "language": language,
        }
        for suite in suites
        if suite.name in results
    ]


def slug(name: str) -> str:
    """A file name from a suite's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "suite"


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file through a temporary neighbour and a rename: readers see the old or the new one, never a part.

    Args:
        path: Target; its folder is made if missing.
        content: Text (written as UTF-8) or bytes.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a CSV file atomically.

    Args:
        path: Target.
        columns: Header.
        rows: Cells; floats are written with full precision, None as an empty cell.

    Returns:
        ``path``.
    """
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return write_atomically(path, text.getvalue())


def write_results(folder: Path, suites: Sequence[SuiteConfig], versions: Mapping[str, Results], *, model: str) -> Path:
    """Write ``results.json`` (all records), ``results.csv`` (long) and ``clip_benchmark/*.json`` (one record each).

    The last folder is what ``clip_benchmark build <folder>`` reads.

    Args:
        folder: Report folder.
        suites: Suites of the results.
        versions: Tag of the weights (CLIP_benchmark's ``pretrained``) -> results.
        model: Model name.

    Returns:
        Path of ``results.json``.
    """
    records: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    for tag, results in versions.items():
        for record in benchmark_records(suites, results, model=model, pretrained=tag):
            records.append(record)
            name = f"{len(records):02d}-{slug(record['dataset'])}-{slug(tag)}.json"
            write_atomically(folder / "clip_benchmark" / name, json.dumps(record, indent=2) + "\n")
        for suite in suites:
            rows += [(tag, suite.name, suite.role, suite.task, m, v) for m, v in results.get(suite.name, {}).items()]
    write_csv(folder / "results.csv", ("weights", "suite", "role", "task", "metric", "value"), rows)
    return write_atomically(folder / "results.json", json.dumps(records, indent=2) + "\n")

"""Figures of the few-shot protocols: means and spreads over seeds, harmonic means, averages over data sets.

Conventions are those of the printed tables: a data set's base and new accuracies are means over seeds, its HM is the
harmonic mean of these two, and the average row's HM is the harmonic mean of the averages (not the average of HMs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftfast.evaluation.continual import harmonic_mean

Protocol = Literal["fsl", "base-to-new", "domain", "cross-dataset", "cross-cite"]
PROTOCOLS: tuple[Protocol, ...] = ("fsl", "base-to-new", "domain", "cross-dataset", "cross-cite")
AVERAGE = "average"


@dataclass(frozen=True)
class Figure:
    """Mean over seeds and sample standard deviation, in the unit of the values."""

    mean: float
    spread: float = 0.0

    def text(self, digits: int = 1) -> str:
        """Return "71.2 ± 0.4" in percent, without a spread if there is none."""
        if math.isnan(self.mean):
            return "–"
        spread = f" ± {100 * self.spread:.{digits}f}" if self.spread else ""
        return f"{100 * self.mean:.{digits}f}{spread}"


def figure(values: Sequence[float]) -> Figure:
    """Mean and sample standard deviation of one value per seed; NaN without values."""
    if not values:
        return Figure(math.nan)
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return Figure(mean, spread)


@dataclass(frozen=True)
class Record:
    """One trained (or zero-shot) model, measured.

    Attributes:
        protocol: Which protocol it belongs to.
        recipe: Method.
        trained_on: Data set it was trained on.
        shots: Images per class; 0: all.
        seed: Seed.
        results: Suite -> accuracy in [0, 1].
    """

    protocol: Protocol
    recipe: str
    trained_on: str
    shots: int
    seed: int
    results: Mapping[str, float]


@dataclass(frozen=True)
class BaseToNew:
    """Base accuracy, new accuracy and their harmonic mean."""

    base: Figure
    new: Figure

    @property
    def harmonic(self) -> float:
        """2 B N / (B + N) of the two means."""
        return harmonic_mean(self.base.mean, self.new.mean)


def base_to_new_table(records: Iterable[Record]) -> dict[str, BaseToNew]:
    """Summarise base-to-new records of one method and one number of shots.

    Args:
        records: Results with the suites "base" and "new".

    Returns:
        Data set -> figures, and last the row "average": means over data sets, seed by seed.
    """
    chosen = list(records)
    sets = list(dict.fromkeys(record.trained_on for record in chosen))
    table = {
        name: BaseToNew(
            *(figure([r.results[side] for r in chosen if r.trained_on == name]) for side in ("base", "new"))
        )
        for name in sets
    }
    table[AVERAGE] = BaseToNew(*(average_over_sets(chosen, side) for side in ("base", "new")))
    return table


def average_over_sets(records: Sequence[Record], suite: str) -> Figure:
    """Average a suite over data sets within each seed, then take mean and spread over seeds."""
    seeds = dict.fromkeys(record.seed for record in records)
    each = [[r.results[suite] for r in records if r.seed == seed and suite in r.results] for seed in seeds]
    return figure([math.fsum(values) / len(values) for values in each if values])


def average_rows(rows: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Average printed rows of (base, new) and return (base, new, HM of the averages), as tables do."""
    base = math.fsum(row[0] for row in rows) / len(rows)
    new = math.fsum(row[1] for row in rows) / len(rows)
    return base, new, harmonic_mean(base, new)


def suite_table(records: Iterable[Record], own: str = "") -> dict[str, Figure]:
    """Summarise records of one method, one training set and one number of shots, suite by suite.

    Args:
        records: Results over the same suites.
        own: Suite of the training set itself, left out of the average over the others.

    Returns:
        Suite -> figure, and last "average" over all suites but ``own``.
    """
    chosen = list(records)
    suites = list(dict.fromkeys(suite for record in chosen for suite in record.results))
    table = {suite: figure([r.results[suite] for r in chosen if suite in r.results]) for suite in suites}
    others = [suite for suite in suites if suite != own]
    if others:
        per_seed = [math.fsum(r.results[suite] for suite in others) / len(others) for r in chosen]
        table[AVERAGE] = figure(per_seed)
    return table


def as_dict(record: Record) -> dict[str, Any]:
    """Return plain containers for JSON."""
    return {**vars(record), "results": dict(record.results)}


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Return the records whose attributes have the given values."""
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]

"""Harmonic means and averages against CLIP-CITE's printed tables, and against hand-made seeds."""

from __future__ import annotations

import math

import pytest

from ftfast.evaluation.continual import harmonic_mean
from ftfast.evaluation.fewshot import (
    AVERAGE,
    Record,
    average_rows,
    base_to_new_table,
    figure,
    select,
    suite_table,
)

PRINTED = {  # arXiv 2407.04003, base-to-new with ViT-B/16: base, new, HM
    "ImageNet": (78.44, 71.07, 74.58),
    "Caltech101": (98.82, 94.28, 96.50),
    "OxfordPets": (96.01, 97.95, 96.97),
    "Cars": (82.83, 74.51, 78.45),
    "Flowers102": (95.98, 76.45, 85.11),
    "UCF101": (87.56, 79.01, 83.07),
    "Food101": (90.81, 91.55, 91.18),
    "Aircraft": (47.26, 38.37, 42.35),
    "SUN397": (82.30, 79.40, 80.82),
    "DTD": (84.26, 64.54, 73.09),
    "EuroSAT": (95.61, 80.59, 87.46),
}
AVERAGES = {  # the printed average rows of the competitors
    "CLIP-CITE": (85.48, 77.08, 81.06),
    "CLIP": (69.34, 74.22, 71.70),
    "CoOp": (82.69, 63.22, 71.66),
    "CoCoOp": (80.47, 71.69, 75.83),
    "MaPLe": (82.28, 75.14, 78.55),
    "CLIPood": (83.90, 74.50, 78.92),
    "no ensembling": (85.79, 73.52, 79.19),
}
OUT_OF_DOMAIN = {  # ImageNet-V2, Sketch, A, R and the printed mean
    "CLIP-CITE": ((65.8, 49.6, 50.0, 77.5), 60.7),
    "naive": ((61.9, 46.8, 46.4, 75.1), 57.6),
    "CoOp": ((64.2, 48.0, 49.7, 75.2), 59.3),
    "CoCoOp": ((64.2, 48.8, 50.6, 76.2), 59.9),
    "MaPLe": ((64.1, 49.1, 50.9, 77.0), 60.3),
    "CLIPood": ((64.9, 49.3, 50.4, 77.2), 60.4),
}


def records(base: float, new: float, name: str = "x", seed: int = 1) -> list[Record]:
    return [Record("base-to-new", "clip-cite", name, 16, seed, {"base": base / 100, "new": new / 100})]


@pytest.mark.parametrize("name", list(PRINTED))
def test_printed_rows_recompute(name: str) -> None:
    base, new, printed = PRINTED[name]
    value = 100 * base_to_new_table(records(base, new))["x"].harmonic
    if name == "ImageNet":  # printed from unrounded accuracies: the rounded ones give 74.57
        assert round(value, 2) == 74.57
        assert harmonic_mean(base - 0.005, new - 0.005) <= printed + 0.005
        assert printed - 0.005 <= harmonic_mean(base + 0.005, new + 0.005)
    else:
        assert round(value, 2) == printed


@pytest.mark.parametrize("name", list(AVERAGES))
def test_printed_average_rows_are_harmonic_means_of_averages(name: str) -> None:
    base, new, printed = AVERAGES[name]
    if name == "no ensembling":  # the rounded averages give 79.18, the unrounded ones may give 79.19
        assert harmonic_mean(base - 0.005, new - 0.005) <= printed - 0.005 <= harmonic_mean(base + 0.005, new + 0.005)
    else:
        assert round(harmonic_mean(base, new), 2) == printed


def test_average_of_the_printed_rows() -> None:
    base, new, harmonic = average_rows([row[:2] for row in PRINTED.values()])
    assert (round(base, 2), round(new, 2)) == (85.44, 77.07)  # the paper prints 85.48 / 77.08
    assert round(harmonic, 2) == 81.04
    table = base_to_new_table([r for name, row in PRINTED.items() for r in records(*row[:2], name)])
    assert table[AVERAGE].base.mean == pytest.approx(base / 100)
    assert table[AVERAGE].harmonic == pytest.approx(harmonic / 100)
    assert table[AVERAGE].harmonic != pytest.approx(sum(t.harmonic for t in table.values()) / len(table), abs=1e-5)


@pytest.mark.parametrize("name", list(OUT_OF_DOMAIN))
def test_printed_out_of_domain_means_recompute(name: str) -> None:
    values, printed = OUT_OF_DOMAIN[name]
    suites = dict(zip(("V2", "S", "A", "R"), (v / 100 for v in values), strict=True))
    record = Record("domain", name, "ImageNet", 16, 1, {"ImageNet": 0.729, **suites})
    mean = 100 * suite_table([record], own="ImageNet")[AVERAGE].mean
    assert abs(mean - printed) <= 0.05 + 1e-9  # the printed digit; two means end in 5 and were rounded down


def test_spread_is_over_seeds_of_the_average_over_sets() -> None:
    found = [
        *records(80, 60, "a", 1),
        *records(90, 70, "b", 1),
        *records(84, 50, "a", 2),
        *records(86, 90, "b", 2),
    ]
    table = base_to_new_table(found)
    assert table["a"].base.mean == pytest.approx(0.82)
    assert table["a"].base.spread == pytest.approx(math.sqrt(2 * 0.02**2))
    assert table[AVERAGE].base.spread == pytest.approx(0.0, abs=1e-12)
    assert table[AVERAGE].new.spread == pytest.approx(math.sqrt(2 * 0.025**2))
    assert select(found, seed=2, trained_on="b")[0].results["new"] == 0.9
    assert math.isnan(figure([]).mean)
    assert figure([0.5]).text() == "50.0"
    assert figure([0.5, 0.6]).text() == "55.0 ± 7.1"

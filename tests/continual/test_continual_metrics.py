"""The published figures of MTIL, to the printed digit, from matrices; tables, CSVs and pages made of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ftfast.errors import ShapeError
from ftfast.evaluation.continual import SequenceMatrix, continual_metrics, mean_matrix
from ftfast.evaluation.continual_report import (
    SequenceInfo,
    as_dict,
    figures_markdown,
    from_dict,
    summary,
    write_sequence_report,
)

ZERO_SHOT = (24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2)
ORDER_ONE = tuple(range(11))
ORDER_TWO = (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2)
# rows of the table in the ZSCL and GIFT papers: Transfer, Average, Last; published matrices are not redistributed here
PUBLISHED = {
    "continual FT": (44.56, 55.85, 77.27),
    "LwF": (56.90, 64.70, 74.64),
    "iCaRL": (50.37, 65.66, 80.10),
    "LwF-VR": (57.24, 65.13, 76.56),
    "WiSE-FT": (52.33, 60.72, 77.69),
    "ZSCL*": (62.17, 72.63, 84.46),
    "ZSCL": (68.14, 75.39, 83.62),
    "ZSCL*, order II": (59.78, 71.77, 83.25),
    "ZSCL, order II": (64.15, 74.52, 83.42),
    "GIFT": (69.3, 77.3, 86.0),
    "GIFT, order II": (65.9, 75.7, 85.3),
}


def matrix_with(transfer: float, average: float, last: float, seed: int) -> np.ndarray:
    """An 11 x 11 matrix with uneven entries and exactly these figures.

    Three disjoint regions fix the three figures one after the other: the last row its mean; the columns above the
    diagonal the transfer (each column's own mean counts, not the mean of entries); the rest the mean of everything.
    """
    random = np.random.default_rng(seed)
    count = 11
    matrix = 50 + 20 * random.random((count, count))
    matrix[-1] += last - matrix[-1].mean()
    upper = np.triu(np.ones((count, count), bool), 1)
    now = np.mean([matrix[:task, task].mean() for task in range(1, count)])
    matrix[upper] += transfer - now
    rest = ~upper
    rest[-1] = False
    matrix[rest] += (average - matrix.mean()) * count * count / rest.sum()
    return matrix


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_rows_are_reproduced_to_the_printed_digit(name: str) -> None:
    transfer, average, last = PUBLISHED[name]
    digits = 1 if name.startswith("GIFT") else 2
    for seed in range(3):
        found = continual_metrics(matrix_with(transfer, average, last, seed))
        assert (round(found.transfer, digits), round(found.average, digits), round(found.last, digits)) == PUBLISHED[
            name
        ]


@pytest.mark.parametrize(("order", "transfer"), [(ORDER_ONE, "69.4"), (ORDER_TWO, "65.4")])
def test_zero_shot_rows(order: tuple[int, ...], transfer: str) -> None:
    row = np.array([ZERO_SHOT[place] for place in order])
    matrix = SequenceMatrix(tuple(f"t{n}" for n in order), row, np.tile(row, (11, 1)))
    for metrics in (matrix.metrics, matrix.zero_shot_metrics):
        assert f"{metrics.average:.1f}" == f"{metrics.last:.1f}" == "65.3"
        assert metrics.forgetting == 0
        assert metrics.transfer == pytest.approx(float(transfer), abs=0.051)


def test_transfer_weighs_columns_not_entries_and_leaves_out_the_first_task() -> None:
    matrix = np.array([[1.0, 0.2, 0.9], [1.0, 1.0, 0.1], [0.4, 0.7, 1.0]])
    found = continual_metrics(matrix)
    assert found.transfer == pytest.approx((0.2 + (0.9 + 0.1) / 2) / 2)  # the mean of entries would be 0.4
    matrix[:, 0] = (0.9, 0.3, 0.4)
    assert continual_metrics(matrix).transfer == found.transfer
    assert found.forgetting == pytest.approx(((0.4 - 1.0) + (0.7 - 1.0)) / 2)


def sequence(seed: int, shift: float = 0.0) -> SequenceMatrix:
    random = np.random.default_rng(seed)
    return SequenceMatrix(
        tasks=("cats", "dogs <b>", "birds"),
        zero_shot=np.array([0.5, 0.4, 0.3]),
        accuracy=0.3 + 0.5 * random.random((3, 3)) + shift,
        suites={"unseen": (0.2, *(float(x) for x in random.random(3)))},
        seen=tuple(float(x) for x in random.random(3)),
    )


def test_summary_is_mean_and_sample_deviation_over_seeds() -> None:
    runs = [sequence(1), sequence(2), sequence(3)]
    table = summary({"gift": runs})
    values = np.array([100 * run.metrics.average for run in runs])
    assert table["gift"]["average"].mean == pytest.approx(values.mean())
    assert table["gift"]["average"].spread == pytest.approx(values.std(ddof=1))
    assert table["zero-shot"]["transfer"].mean == pytest.approx(35.0)
    assert table["gift"]["seen_last"].mean == pytest.approx(100 * np.mean([run.seen[-1] for run in runs]))
    mean = mean_matrix(runs)
    assert np.allclose(mean.accuracy, sum(run.accuracy for run in runs) / 3)
    with pytest.raises(ShapeError, match="different task sequences"):
        mean_matrix([runs[0], SequenceMatrix(("a",), np.zeros(1), np.zeros((1, 1)))])
    assert "| zero-shot | 35.0 | 40.0 | 40.0 | 0.0 |" in figures_markdown(table)


def test_matrices_survive_json() -> None:
    matrix = sequence(4)
    again = from_dict(json.loads(json.dumps(as_dict(matrix))))
    assert again.tasks == matrix.tasks
    assert np.array_equal(again.with_zero_shot(), matrix.with_zero_shot())
    assert again.suites == matrix.suites
    assert again.seen == matrix.seen


def test_report_of_two_methods(tmp_path: Path) -> None:
    runs = {"finetune": [sequence(1), sequence(2)], "gift": [sequence(3, 0.1), sequence(4, 0.1)]}
    page = write_sequence_report(tmp_path, runs, SequenceInfo("Title <x>", "sub", {"Seeds": "0, 1"}), {"order": "I"})
    text = page.read_text()
    assert "Title &lt;x&gt;" in text
    assert "dogs &lt;b&gt;" in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 6  # three plots, light and dark
    folder = page.parent
    rows = list(csv.reader((folder / "matrix_gift_1.csv").open()))
    assert rows[0] == ["after", "cats", "dogs <b>", "birds"]
    assert [row[0] for row in rows[1:]] == ["zero-shot", "cats", "dogs <b>", "birds"]
    assert float(rows[2][1]) == pytest.approx(100 * runs["gift"][1].accuracy[0, 0])
    results = json.loads((folder / "results.json").read_text())
    assert results["order"] == "I"
    assert results["summary"]["gift"]["last"]["mean"] == pytest.approx(
        100 * np.mean([run.metrics.last for run in runs["gift"]])
    )
    drawn = list(csv.DictReader((folder / "accuracy_matrix.csv").open()))
    assert len(drawn) == 2 * 4 * 3
    assert (folder / "accuracy_matrix.png").stat().st_size > 5000


def test_report_of_a_single_task_has_no_transfer(tmp_path: Path) -> None:
    matrix = SequenceMatrix(("only",), np.array([0.5]), np.array([[0.75]]))
    text = write_sequence_report(tmp_path, {"gift": [matrix]}, SequenceInfo("one")).read_text()
    assert "75.0" in text
    assert "nan" not in text

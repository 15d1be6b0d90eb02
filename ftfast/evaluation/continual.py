"""Metrics of continual learning, from the matrix of accuracies after each task.

``accuracy[t, i]`` is the accuracy on task ``i`` after learning tasks ``0 .. t``; a zero-shot row is not part of it.
Definitions are those of the MTIL benchmark (ZSCL, ICCV 2023; GIFT, CVPR 2025) as its code computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftfast.errors import ShapeError


@dataclass(frozen=True)
class ContinualMetrics:
    """Summary of an accuracy matrix, in the matrix's own unit.

    Attributes:
        transfer: Mean over tasks ``i >= 1`` of the mean accuracy on ``i`` before it was learned.
        average: Mean of all entries.
        last: Mean of the last row.
        forgetting: ``sum_i (accuracy[N-1, i] - accuracy[i, i]) / (N - 1)``; negative when tasks were forgotten (GIFT's
            sign).
    """

    transfer: float
    average: float
    last: float
    forgetting: float


def continual_metrics(accuracy: Any) -> ContinualMetrics:
    """Transfer, Average, Last and Forgetting of a square accuracy matrix.

    Args:
        accuracy: ``(N, N)``, row = after which task, column = on which task.

    Returns:
        The four figures; transfer and forgetting are NaN for a single task, where they have no meaning.

    Raises:
        ShapeError: The matrix is not square or is empty.
    """
    matrix = np.asarray(accuracy, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ShapeError(
            f"the accuracy matrix has shape {matrix.shape}; it must be (tasks, tasks), without a zero-shot row."
        )
    tasks = len(matrix)
    if tasks == 1:
        return ContinualMetrics(float("nan"), float(matrix[0, 0]), float(matrix[0, 0]), float("nan"))
    before = [matrix[:task, task].mean() for task in range(1, tasks)]
    return ContinualMetrics(
        transfer=float(np.mean(before)),
        average=float(matrix.mean()),
        last=float(matrix[-1].mean()),
        forgetting=float((matrix[-1] - np.diag(matrix)).sum() / (tasks - 1)),
    )


@dataclass(frozen=True)
class SequenceMatrix:
    """Accuracies of one run over a sequence of tasks, in [0, 1].

    Attributes:
        tasks: Names, in the order of learning.
        zero_shot: ``(N,)``, before anything was learned.
        accuracy: ``(N, N)``, row = after which task, column = on which task.
        suites: Further suites: name -> N + 1 values, the first before anything was learned.
        seen: Class-incremental: accuracy over all classes seen so far after every task, or empty.
    """

    tasks: tuple[str, ...]
    zero_shot: np.ndarray
    accuracy: np.ndarray
    suites: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seen: tuple[float, ...] = ()

    def with_zero_shot(self) -> np.ndarray:
        """Return the ``(N + 1, N)`` matrix with the zero-shot row on top."""
        return np.vstack([self.zero_shot, self.accuracy])

    @property
    def metrics(self) -> ContinualMetrics:
        """Transfer, Average, Last and Forgetting of the run."""
        return continual_metrics(self.accuracy)

    @property
    def zero_shot_metrics(self) -> ContinualMetrics:
        """The same figures of a model that never learns: every row is the zero-shot row (MTIL's reference)."""
        return continual_metrics(np.tile(self.zero_shot, (len(self.tasks), 1)))


def mean_matrix(matrices: Sequence[SequenceMatrix]) -> SequenceMatrix:
    """Mean over seeds of the same sequence.

    Args:
        matrices: At least one, over the same tasks and suites.

    Returns:
        Elementwise means.

    Raises:
        ShapeError: The matrices belong to different sequences.
    """
    first = matrices[0]
    if any(matrix.tasks != first.tasks for matrix in matrices):
        raise ShapeError("matrices of different task sequences cannot be averaged; compare runs of one order.")

    def mean(values: Sequence[Any]) -> np.ndarray:
        """Average over the runs."""
        return np.mean(np.stack([np.asarray(value, dtype=np.float64) for value in values]), axis=0)

    return SequenceMatrix(
        tasks=first.tasks,
        zero_shot=mean([matrix.zero_shot for matrix in matrices]),
        accuracy=mean([matrix.accuracy for matrix in matrices]),
        suites={name: tuple(mean([matrix.suites[name] for matrix in matrices])) for name in first.suites},
        seen=tuple(mean([matrix.seen for matrix in matrices])),
    )


def harmonic_mean(base: float, new: float) -> float:
    """``2 b n / (b + n)``, the summary of base and new accuracy in base-to-new generalisation; 0 if both are 0."""
    return 0.0 if base + new == 0 else 2 * base * new / (base + new)

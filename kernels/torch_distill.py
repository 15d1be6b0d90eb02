"""Blockwise PyTorch backend of distillation between two similarity matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import matmul_nt
from .torch_softmax import (
    SMALLEST_SUM,
    GradientSums,
    OnlineSum,
    add_block,
    at,
    blocks,
    finite,
    pair_diagonal,
    softmax_sum,
    work_dtype,
)


class Teacher:
    """Produces blocks of the teacher's logits, from its features or from given logits."""

    def __init__(self, x: Tensor | None, y: Tensor | None, logits: Tensor | None, scale: Tensor, like: Tensor) -> None:
        dtype = work_dtype(like)
        self.scale = scale.to(dtype)
        self.logits = logits
        self.x = None if x is None or logits is not None else x.to(dtype) * self.scale
        self.y = None if y is None or logits is not None else y.to(dtype)

    def block(self, where: tuple[slice, slice]) -> Tensor:
        """Return one (R, C) block in the work dtype."""
        if self.logits is not None:
            return self.logits[where].to(self.scale.dtype) * self.scale
        if self.x is None or self.y is None:
            raise ValueError("a teacher needs features or logits")
        return matmul_nt(self.x[where[0]], self.y[where[1]])


def _values(kind: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits that weigh (teacher's, or student's for reverse KL) and the values they average."""
    if kind == "reverse_kl":
        return student, student - teacher
    return teacher, teacher - student if kind == "forward_kl" else -student


def _add_weighted(
    weigher: Tensor, values: Tensor, where: tuple[slice, slice], sums: tuple[OnlineSum | None, OnlineSum | None]
) -> None:
    """Add Σ exp(weigher) and Σ exp(weigher)·values by row and by column, from one exponential where that is exact."""
    rows, cols = sums
    if rows is not None and cols is not None and weigher.device.type == "cpu":
        shift = weigher.amax()
        weights = (weigher - shift).exp_()
        by_row, by_col = weights.sum(1), weights.sum(0)
        if min(by_row.min().item(), by_col.min().item()) > SMALLEST_SUM:
            weights.mul_(values)
            rows.add(where[0], shift, by_row, weights.sum(1))
            cols.add(where[1], shift, by_col, weights.sum(0))
            return
    for axis, side in ((1, rows), (0, cols)):
        if side is not None:
            top = weigher.amax(axis, keepdim=True)
            weights = (weigher - finite(top)).exp_()
            side.add(where[1 - axis], top.squeeze(axis), weights.sum(axis), (weights * values).sum(axis))


def forward(
    x: Tensor, y: Tensor, scale: Tensor, teacher: Teacher, kind: str, offset: int, rows: bool, columns: bool
) -> tuple[Tensor, ...]:
    """Compute the statistics of :func:`ftfast.kernels.distill_pairs.distill_statistics` block by block.

    Returns:
        lse, teacher_lse, inner, positive of the rows (M,), then of the columns (N,); size 0 where not asked for.
    """
    dtype = work_dtype(x)
    scaled, other = x.to(dtype) * scale.to(dtype), y.to(dtype)
    sizes = (x.shape[0] if rows else 0, y.shape[0] if columns else 0)
    student_sums = tuple(OnlineSum(size, scaled) if size else None for size in sizes)
    teacher_sums = tuple(OnlineSum(size, scaled) if size else None for size in sizes)
    weighing, plain = (student_sums, teacher_sums) if kind == "reverse_kl" else (teacher_sums, student_sums)
    positive = [scaled.new_zeros(size) for size in sizes]
    for where in blocks(x.shape[0], y.shape[0]):
        student, taught = matmul_nt(scaled[where[0]], other[where[1]]), teacher.block(where)
        found = pair_diagonal(student, where, offset)
        if found is not None:
            for side, part in zip(positive, found[1:], strict=True):
                if side.numel():
                    side[part] += found[0]
        weigher, values = _values(kind, student, taught)
        _add_weighted(weigher, values, where, weighing)  # type: ignore[arg-type]
        add_block(taught if kind == "reverse_kl" else student, where, *plain)
    out: list[Tensor] = []
    for student_sum, teacher_sum, weigh, diagonal in zip(student_sums, teacher_sums, weighing, positive, strict=True):
        if student_sum is None or teacher_sum is None or weigh is None:
            out += [diagonal.new_empty(0) for _ in range(4)]
        else:
            out += [student_sum.lse(), teacher_sum.lse(), weigh.mean(), diagonal]
    return tuple(out)


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher: Teacher,
    kind: str,
    offset: int,
    row: tuple[Tensor | None, ...],
    col: tuple[Tensor | None, ...],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate gradients of the statistics to x, y and the scale, recomputing both matrices once.

    Args:
        x: (M, D).
        y: (N, D).
        scale: 0-d.
        teacher: The teacher's logits.
        kind: Divergence.
        offset: Column of row 0's pair.
        row: lse, teacher_lse, inner and the gradients of lse, inner and positive, (M,) each; None without rows.
        col: The same for the columns.
        need: Whether dX and dY are wanted.

    Returns:
        dX, dY (size 0 where not needed) and d scale.
    """
    dtype = work_dtype(x)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    scaled = wide_x * scale.to(dtype)
    sums = GradientSums(wide_x, wide_y, *need)
    for where in blocks(x.shape[0], y.shape[0]):
        student, taught = matmul_nt(scaled[where[0]], wide_y[where[1]]), teacher.block(where)
        r = tuple(at(v, where[0]) for v in row)
        c = tuple(at(v, where[1]) for v in col)
        gradient = (
            _reverse_gradient(student, taught, r, c) if kind == "reverse_kl" else _gradient(student, taught, r, c)
        )
        found = pair_diagonal(gradient, where, offset)
        if found is not None:
            for side, part, start in ((r[5], found[1], where[0].start), (c[5], found[2], where[1].start)):
                if side is not None:
                    found[0].add_(side[part.start - start : part.stop - start])
        sums.add(gradient, where)
    return sums.finish(scale, (x.dtype, y.dtype))


def _gradient(
    student: Tensor, taught: Tensor, row: tuple[Tensor | None, ...], col: tuple[Tensor | None, ...]
) -> Tensor:
    """G = g_lse · softmax(student) - g_inner · softmax(teacher), over rows plus over columns."""
    gradient = softmax_sum(student, row[0], col[0], row[3], col[3])
    return gradient.sub_(softmax_sum(taught, row[1], col[1], row[4], col[4]))


def _reverse_gradient(
    student: Tensor, taught: Tensor, row: tuple[Tensor | None, ...], col: tuple[Tensor | None, ...]
) -> Tensor:
    """G = softmax(student) · (g_lse + g_inner (1 + s - t - inner)), over rows plus over columns."""
    difference = (student - taught).add_(1)
    gradient = torch.zeros_like(student)
    for (lse, _, inner, g_lse, g_inner, _), axis in ((row, 1), (col, 0)):
        if lse is None or inner is None or g_inner is None:
            continue
        weight = (difference - inner.unsqueeze(axis)).mul_(g_inner.unsqueeze(axis))
        if g_lse is not None:
            weight.add_(g_lse.unsqueeze(axis))
        gradient.add_(weight.mul_((student - lse.unsqueeze(axis)).exp_()))
    return gradient

"""Blockwise PyTorch backend of distillation between two similarity matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .distill_parts import POSITIVE, divergence_terms, merge_parts, nothing_yet
from .matmul import matmul_nt
from .torch_softmax import (
    LN_2,
    LOG2_E,
    SMALLEST_SUM,
    GradientSums,
    at,
    blocks,
    finite,
    pair_diagonal,
    vector_dtype,
    work_dtype,
)

_DOMINATED = 1.0  # a row whose other terms add up to less than this times its largest needs them added up alone


class Teacher:
    """Produces blocks of the teacher's logits, from its features or from given logits."""

    def __init__(self, x: Tensor | None, y: Tensor | None, logits: Tensor | None, scale: Tensor, like: Tensor) -> None:
        dtype = work_dtype(like)
        self.scale = scale.to(dtype) * LOG2_E
        self.logits = logits
        self.x = None if x is None or logits is not None else x.to(dtype) * self.scale
        self.y = None if y is None or logits is not None else y.to(dtype)

    def block(self, where: tuple[slice, slice]) -> Tensor:
        """Return one (R, C) block of base-2 logits in the work dtype."""
        if self.logits is not None:
            return self.logits[where].to(self.scale.dtype) * self.scale
        if self.x is None or self.y is None:
            raise ValueError("a teacher needs features or logits")
        return matmul_nt(self.x[where[0]], self.y[where[1]])


class BlockSoftmax:
    """exp2 of one block and its sums by row (axis 1) and by column (axis 0), relative to shifts per axis."""

    def __init__(self, block: Tensor, axes: tuple[int, ...]) -> None:
        self.block = block
        self.weights: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.shifts: dict[int, Tensor] = {}
        if len(axes) == 2 and block.device.type == "cpu":
            shift = finite(block.amax())
            weights = (block - shift).exp2_()
            sums = {axis: weights.sum(axis) for axis in axes}
            if min(total.min().item() for total in sums.values()) > SMALLEST_SUM:
                self.weights, self.sums = dict.fromkeys(axes, weights), sums
                self.shifts = {axis: shift.expand(sums[axis].shape) for axis in axes}
                return
        for axis in axes:
            top = finite(block.amax(axis, keepdim=True))
            self.weights[axis] = (block - top).exp2_()
            self.sums[axis] = self.weights[axis].sum(axis)
            self.shifts[axis] = top.squeeze(axis)

    def parts(self, axis: int) -> tuple[Tensor, Tensor]:
        """Return the largest logit and log(1 + the others), natural units; the second keeps its relative accuracy."""
        wide = vector_dtype(self.block.device)
        top = finite(self.block.amax(axis))
        head = torch.exp2(top - self.shifts[axis])
        others = self.sums[axis] / head - 1
        # Where one term dominates, that difference cancels: add the others up without it.
        chosen = (others < _DOMINATED).nonzero().squeeze(1)
        lines = self.weights[axis].movedim(axis, 1)[chosen]
        others[chosen] = lines.scatter(1, lines.argmax(1, keepdim=True), 0).sum(1) / head[chosen]
        return top.to(wide) * LN_2, torch.log1p(others.to(wide))


def _add_parts(
    student: Tensor,
    taught: Tensor,
    where: tuple[slice, slice],
    states: dict[int, Tensor],
    kind: str,
) -> None:
    """Merge the parts of one block into those of its rows (states[1]) and its columns (states[0])."""
    axes = tuple(states)
    own, teacher = BlockSoftmax(student, axes), BlockSoftmax(taught, axes)
    for axis in axes:
        (top, tail), (teacher_top, teacher_tail) = own.parts(axis), teacher.parts(axis)
        below = student - student.amax(axis, keepdim=True)
        if kind == "soft_cross_entropy":
            inner = below.neg_().mul_(teacher.weights[axis]).sum(axis) / teacher.sums[axis] * LN_2
        else:
            p = teacher.weights[axis] / teacher.sums[axis].unsqueeze(axis)
            q = own.weights[axis] / own.sums[axis].unsqueeze(axis)
            below.sub_(taught - taught.amax(axis, keepdim=True)).mul_(LN_2)
            log_ratio = below.sub_((tail - teacher_tail).to(below.dtype).unsqueeze(axis))
            if kind == "reverse_kl":
                p, q, log_ratio = q, p, log_ratio.neg_()
            inner = divergence_terms(p, q, log_ratio).sum(axis)
        new = torch.stack([top, tail, teacher_top, teacher_tail, inner.to(top.dtype), torch.zeros_like(top)])
        part = states[axis][:, where[1 - axis]]
        part.copy_(merge_parts(torch.stack([part, new], 1), kind))


def forward(
    x: Tensor, y: Tensor, scale: Tensor, teacher: Teacher, kind: str, offset: int, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    """Compute the parts of :func:`ftfast.kernels.distill_pairs.distill_parts` block by block.

    Returns:
        (6, M) of the rows and (6, N) of the columns; size 0 where not asked for.
    """
    dtype = work_dtype(x)
    scaled, other = x.to(dtype) * (scale.to(dtype) * LOG2_E), y.to(dtype)
    sizes = {1: x.shape[0] if rows else 0, 0: y.shape[0] if columns else 0}
    states = {axis: nothing_yet(size, x.device) for axis, size in sizes.items()}
    asked = {axis: states[axis] for axis in (1, 0) if sizes[axis]}
    for where in blocks(x.shape[0], y.shape[0]):
        student, taught = matmul_nt(scaled[where[0]], other[where[1]]), teacher.block(where)
        found = pair_diagonal(student, where, offset)
        if found is not None:
            for axis, state in asked.items():
                state[POSITIVE, found[2 - axis]] += found[0].to(state.dtype) * LN_2
        _add_parts(student, taught, where, asked, kind)
    return states[1], states[0]


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
        row: Of :func:`gradient_vectors`, (M,) each; None without rows.
        col: The same for the columns.
        need: Whether dX and dY are wanted.

    Returns:
        dX, dY (size 0 where not needed) and d scale.
    """
    dtype = work_dtype(x)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    scaled = wide_x * (scale.to(dtype) * LOG2_E)
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
    """G = w_q · softmax(student) - w_p · softmax(teacher), over rows plus over columns.

    Each direction takes exponentials of its own: where both softmaxes are 1, their difference is then exactly 0.
    """
    gradient: Tensor | None = None
    for (top, teacher_top, _, w_q, w_p, _), axis in ((row, 1), (col, 0)):
        if top is None or teacher_top is None or w_q is None or w_p is None:
            continue
        part = (student - top.unsqueeze(axis)).exp2_().mul_(w_q.unsqueeze(axis))
        part.addcmul_((taught - teacher_top.unsqueeze(axis)).exp2_(), w_p.unsqueeze(axis), value=-1)
        gradient = part if gradient is None else gradient.add_(part)
    return torch.zeros_like(student) if gradient is None else gradient


def _reverse_gradient(
    student: Tensor, taught: Tensor, row: tuple[Tensor | None, ...], col: tuple[Tensor | None, ...]
) -> Tensor:
    """G = softmax(student) · (w_q + w_p ((s - top) - (t - teacher top) - origin)), over rows plus over columns."""
    gradient = torch.zeros_like(student)
    for (top, teacher_top, origin, w_q, w_p, _), axis in ((row, 1), (col, 0)):
        if top is None or teacher_top is None or origin is None or w_q is None or w_p is None:
            continue
        below = student - top.unsqueeze(axis)
        weight = (below - (taught - teacher_top.unsqueeze(axis))).mul_(LN_2).sub_(origin.unsqueeze(axis))
        weight.mul_(w_p.unsqueeze(axis)).add_(w_q.unsqueeze(axis))
        gradient.add_(weight.mul_(below.exp2_()))
    return gradient

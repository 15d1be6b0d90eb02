"""The operation under similarity distillation: parts of two similarity matrices taken in one pass.

With S = logit_scale · X Yᵀ (student), P = the teacher's logits, q and p their softmaxes, per row and per column:

    CE(one-hot of the pair, q) = tail + (top - positive)
    CE(p, q) = tail + inner  "soft_cross_entropy"     KL(p || q), KL(q || p) = inner  "forward_kl", "reverse_kl"

with the parts of :mod:`ftfast.kernels.distill_parts`. No term cancels, so a small loss keeps its relative accuracy.
Gradients: see :func:`ftfast.kernels.distill_parts.gradient_vectors`. Cost at equal widths: 2 products forward, 4
backward. Because ``tail``, ``top`` and ``positive`` also give the contrastive loss, it comes at no further cost.

Legend: M rows, N columns, D width of the student, D' of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_distill
from .dispatch import follow_autocast
from .distill_parts import gradient_vectors
from .pairs import resolve
from .torch_softmax import vector_dtype, work_dtype

TeacherParts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]


def distill_parts(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    teacher: TeacherParts,
    kind: str,
    *,
    offset: int = 0,
    rows: bool = True,
    columns: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the row and column parts of a student and a frozen teacher, differentiably in the student.

    Args:
        x: (M, D) student rows; float32, float16 or bfloat16 (float64 with "torch").
        y: (N, D) student columns.
        logit_scale: 0-d tensor; the temperature is already divided out.
        teacher: (M, D') rows, (N, D') columns, (M, N) logits (either both features or logits), 0-d scale of either.
        kind: "forward_kl", "reverse_kl" or "soft_cross_entropy".
        offset: Column of row 0's pair (only for ``positive``).
        rows: Compute row parts.
        columns: Compute column parts.
        backend: "auto", "triton" or "torch".

    Returns:
        (6, M) and (6, N) float64; size 0 for a direction that was not asked for. Only tail, inner and positive carry
        gradients, and the gradient of tail is that of the whole log-sum-exp.

    Memory: O((M + N)·(D + D') + block). Determinism: bitwise for fixed shapes and device.
    """
    x, y = follow_autocast(x, y)
    y = y.to(x.dtype)
    given = [None if t is None else t.detach().to(x.dtype) for t in teacher[:2]]
    logits = None if teacher[2] is None else teacher[2].detach()
    scale = teacher[3].detach()
    return _forward(x, y, logit_scale, *given, logits, scale, kind, offset, rows, columns, resolve(backend, x))


def distill_parts_backward(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    teacher: TeacherParts,
    kind: str,
    parts: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    *,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn gradients of (merged) parts of rows and columns into gradients of one block; the building block of a ring.

    Args:
        x: (M, D) rows of this block.
        y: (N, D) columns of this block.
        logit_scale: 0-d tensor.
        teacher: As in :func:`distill_parts`, of this block.
        kind: Divergence.
        parts: (6, M) and (6, N), merged over all blocks.
        gradients: (6, M) and (6, N).
        offset: Column of row 0's pair.
        backend: "auto", "triton" or "torch".

    Returns:
        dX, dY in the dtypes of x and y, d logit_scale (0-d).

    Memory: O((M + N)·(D + D') + block). Determinism: bitwise for fixed shapes and device.
    """
    both = (*parts, *gradients)
    return _backward(x, y, logit_scale, *teacher, list(both), kind, offset, True, True, True, True, resolve(backend, x))


@torch.library.custom_op("ftfast::distill_pairs", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor | None,
    teacher_y: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_scale: Tensor,
    kind: str,
    offset: int,
    rows: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import triton_distill

        teacher_parts = (teacher_x, teacher_y, teacher_logits, teacher_scale)
        return triton_distill.forward(x, y, scale, teacher_parts, kind, offset, rows, columns)
    teacher = torch_distill.Teacher(teacher_x, teacher_y, teacher_logits, teacher_scale, x)
    return torch_distill.forward(x, y, scale, teacher, kind, offset, rows, columns)


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor | None,
    teacher_y: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_scale: Tensor,
    kind: str,
    offset: int,
    rows: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    sizes = (x.shape[0] if rows else 0, y.shape[0] if columns else 0)
    row, col = (x.new_empty((6, size), dtype=vector_dtype(x.device)) for size in sizes)
    return row, col


@torch.library.custom_op("ftfast::distill_pairs_backward", mutates_args=())
def _backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor | None,
    teacher_y: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_scale: Tensor,
    vectors: list[Tensor],
    kind: str,
    offset: int,
    rows: bool,
    columns: bool,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # vectors: parts of rows and of columns, then their gradients.
    nothing: tuple[Tensor | None, ...] = (None,) * 6
    dtype = work_dtype(x)
    row = gradient_vectors(vectors[0], vectors[2], kind, dtype) if rows else nothing
    col = gradient_vectors(vectors[1], vectors[3], kind, dtype) if columns else nothing
    if backend == "triton":
        from . import triton_distill

        teacher_parts = (teacher_x, teacher_y, teacher_logits, teacher_scale)
        return triton_distill.backward(x, y, scale, teacher_parts, kind, offset, row, col, (need_x, need_y))
    teacher = torch_distill.Teacher(teacher_x, teacher_y, teacher_logits, teacher_scale, x)
    return torch_distill.backward(x, y, scale, teacher, kind, offset, row, col, (need_x, need_y))


@_backward.register_fake
def _backward_fake(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor | None,
    teacher_y: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_scale: Tensor,
    vectors: list[Tensor],
    kind: str,
    offset: int,
    rows: bool,
    columns: bool,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_y = x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))
    return grad_x, grad_y, x.new_empty((), dtype=work_dtype(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, row, col = ctx.saved_tensors
    kind, offset, rows, columns, backend = ctx.options
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    vectors = [row, col, grad_row.contiguous(), grad_col.contiguous()]
    grad_x, grad_y, grad_scale = _backward(
        *inputs, vectors, kind, offset, rows, columns, need_x or not need_y, need_y, backend
    )
    scale_grad = grad_scale.to(inputs[2].dtype) if need_scale else None
    return (grad_x if need_x else None, grad_y if need_y else None, scale_grad, *[None] * 9)


_forward.register_autograd(_differentiate, setup_context=_setup_context)

"""The operation under similarity distillation: statistics of two similarity matrices taken in one pass.

With S = logit_scale · X Yᵀ (student), P = the teacher's logits, and per row (and per column)

    lse = log Σ exp S,  teacher_lse = log Σ exp P,  positive = S at the row's pair,
    inner = Σ softmax(P)·(P - S)   "forward_kl":          KL(teacher || student) = inner - teacher_lse + lse
            Σ softmax(P)·(-S)      "soft_cross_entropy":  CE(teacher, student)   = inner + lse
            Σ softmax(S)·(S - P)   "reverse_kl":          KL(student || teacher) = inner - lse + teacher_lse

the gradient matrix is G = g_lse softmax(S) - g_inner softmax(P), or for reverse KL
G = softmax(S)·(g_lse + g_inner·(1 + S - P - inner)), plus g_positive at pairs. Cost at equal widths: 2 products
forward, 4 backward. Because ``lse`` and ``positive`` are also those of the contrastive loss, it comes with them at no
further cost.

Legend: M rows, N columns, D width of the student, D' of the teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_distill
from .dispatch import follow_autocast
from .pairs import resolve
from .torch_softmax import work_dtype


class DistillStatistics(NamedTuple):
    """Statistics of one direction: four float32 vectors over rows (M,) or columns (N,)."""

    lse: Tensor
    """Log-sum-exp of the student's logits."""
    teacher_lse: Tensor
    """Log-sum-exp of the teacher's logits; not differentiable."""
    inner: Tensor
    """The softmax-weighted mean described in the module docstring."""
    positive: Tensor
    """The student's logit of the pair (0 without one)."""


def distill_statistics(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor],
    kind: str,
    *,
    offset: int = 0,
    rows: bool = True,
    columns: bool = True,
    backend: str = "auto",
) -> tuple[DistillStatistics, DistillStatistics]:
    """Compute the row and column statistics of a student and a frozen teacher, differentiably in the student.

    Args:
        x: (M, D) student rows; float32, float16 or bfloat16 (float64 with "torch").
        y: (N, D) student columns.
        logit_scale: 0-d tensor; the temperature is already divided out.
        teacher: (M, D') rows, (N, D') columns, (M, N) logits (either both features or logits), 0-d scale of either.
        kind: "forward_kl", "reverse_kl" or "soft_cross_entropy".
        offset: Column of row 0's pair (only for ``positive``).
        rows: Compute row statistics.
        columns: Compute column statistics.
        backend: "auto", "triton" or "torch".

    Returns:
        Row and column statistics; size 0 for a direction that was not asked for.

    Memory: O((M + N)·(D + D') + block). Determinism: bitwise for fixed shapes and device.
    """
    x, y = follow_autocast(x, y)
    y = y.to(x.dtype)
    given = [None if t is None else t.detach().to(x.dtype) for t in teacher[:2]]
    logits = None if teacher[2] is None else teacher[2].detach()
    scale = teacher[3].detach()
    out = _forward(x, y, logit_scale, *given, logits, scale, kind, offset, rows, columns, resolve(backend, x))
    return DistillStatistics(*out[:4]), DistillStatistics(*out[4:])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from . import triton_distill

        teacher_parts = (teacher_x, teacher_y, teacher_logits, teacher_scale)
        parts = triton_distill.forward(x, y, scale, teacher_parts, kind, offset, rows, columns)
        return parts  # type: ignore[return-value]
    teacher = torch_distill.Teacher(teacher_x, teacher_y, teacher_logits, teacher_scale, x)
    return torch_distill.forward(x, y, scale, teacher, kind, offset, rows, columns)  # type: ignore[return-value]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = work_dtype(x)
    sizes = [x.shape[0] if rows else 0] * 4 + [y.shape[0] if columns else 0] * 4
    return tuple(x.new_empty(size, dtype=dtype) for size in sizes)  # type: ignore[return-value]


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
    # vectors: (lse, teacher_lse, inner, g_lse, g_inner, g_positive) of the rows if asked for, then of the columns.
    nothing: tuple[Tensor | None, ...] = (None,) * 6
    row = tuple(vectors[:6]) if rows else nothing
    col = tuple(vectors[-6:]) if columns else nothing
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
    ctx.save_for_backward(*inputs[:7], *output[:3], *output[4:7])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1], output[5])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, statistics = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    kind, offset, rows, columns, backend = ctx.options
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    vectors: list[Tensor] = []
    for asked, start in ((rows, 0), (columns, 1)):
        if asked:
            known = statistics[3 * start : 3 * start + 3]
            given = [grads[4 * start + index] for index in (0, 2, 3)]
            vectors += [*known, *(torch.zeros_like(known[0]) if g is None else g.contiguous() for g in given)]
    grad_x, grad_y, grad_scale = _backward(
        *inputs, vectors, kind, offset, rows, columns, need_x or not need_y, need_y, backend
    )
    scale_grad = grad_scale.to(inputs[2].dtype) if need_scale else None
    return (grad_x if need_x else None, grad_y if need_y else None, scale_grad, *[None] * 9)


_forward.register_autograd(_differentiate, setup_context=_setup_context)

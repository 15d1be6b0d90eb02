"""The operation under every softmax loss: log-sum-exps and positive sums of S = logit_scale · X Yᵀ.

    row_lse[i] = log Σ_j exp S_ij      row_positive[i] = Σ_{j positive} S_ij      and the same per column

Positives and exclusions come from a :class:`~ftfast.kernels.relations.Relation`. A loss is a few O(M + N) operations on
these vectors, so autograd hands their gradients back and one backward serves every loss:

    G_ij = g_row_lse[i] softmax_row(S)_ij + g_col_lse[j] softmax_col(S)_ij
           + [ij positive] (g_row_positive[i] + g_col_positive[j])
    dX = scale · G Y,   dY = scale · Gᵀ X,   d scale = <G Y, X>

Cost for both directions: 1 product forward, 3 backward. Blocks of columns (or ranks of a ring) can be handled one after
the other: merge their statistics, then give the merged log-sum-exps to :func:`pair_statistics_backward` for each block.

Legend: M rows, N columns, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_softmax
from .dispatch import choose, follow_autocast
from .relations import Relation


class PairStatistics(NamedTuple):
    """Four float64 vectors, so that differences between them lose nothing; size 0 for a direction not asked for."""

    row_lse: Tensor
    """(M,) log-sum-exp of each row over the columns that are not excluded; -inf over none."""
    row_positive: Tensor
    """(M,) sum of each row's positive logits."""
    col_lse: Tensor
    """(N,) log-sum-exp of each column."""
    col_positive: Tensor
    """(N,) sum of each column's positive logits."""


def pair_statistics(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    relation: Relation,
    *,
    rows: bool = True,
    columns: bool = True,
    backend: str = "auto",
) -> PairStatistics:
    """Compute log-sum-exps and positive sums of S = logit_scale · X Yᵀ, differentiably.

    Args:
        x: (M, D) features; float32, float16 or bfloat16 (float64 with "torch").
        y: (N, D) features of the same dtype.
        logit_scale: 0-d tensor.
        relation: Positives and exclusions.
        rows: Compute the row statistics.
        columns: Compute the column statistics.
        backend: "auto", "triton" or "torch".

    Returns:
        The statistics, differentiable in x, y and logit_scale.

    Memory: O((M + N)·D + block). Determinism: bitwise for fixed shapes and device.
    """
    x, y = follow_autocast(x, y)
    y = y.to(x.dtype)
    ids = (relation.row_ids, relation.col_ids)
    resolved = resolve(backend, x)
    return PairStatistics(*_forward(x, y, logit_scale, *ids, relation.mode, relation.offset, rows, columns, resolved))


def pair_statistics_backward(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    relation: Relation,
    lse: tuple[Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    *,
    need_x: bool = True,
    need_y: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn gradients of (merged) statistics into gradients of one block's features; the building block of a ring.

    Args:
        x: (M, D) rows of this block.
        y: (N, D) columns of this block.
        logit_scale: 0-d tensor.
        relation: The relation of this block.
        lse: row_lse (M,) and col_lse (N,) over all blocks; None for a direction without statistics.
        gradients: Of row_lse, row_positive, col_lse, col_positive, each as long as its statistic; None means zero.
        need_x: Compute dX.
        need_y: Compute dY.
        backend: "auto", "triton" or "torch".

    Returns:
        dX (M, D) and dY (N, D) in the dtypes of x and y (size 0 where not needed), d logit_scale (0-d).

    Memory: O((M + N)·D + block). Determinism: bitwise for fixed shapes and device.
    """
    ids = (relation.row_ids, relation.col_ids)
    resolved = resolve(backend, x)
    return _backward(
        x, y, logit_scale, *ids, *lse, *gradients, relation.mode, relation.offset, need_x, need_y, resolved
    )


def merge_statistics(first: PairStatistics, second: PairStatistics) -> PairStatistics:
    """Combine statistics of the same rows and columns taken over disjoint blocks (not differentiable)."""
    return PairStatistics(
        torch.logaddexp(first.row_lse, second.row_lse),
        first.row_positive + second.row_positive,
        torch.logaddexp(first.col_lse, second.col_lse),
        first.col_positive + second.col_positive,
    )


def resolve(backend: str, x: Tensor) -> str:
    """Return the backend of a building block: "triton" or "torch"; float64 always takes "torch"."""
    resolved = choose(backend, x)
    return "torch" if resolved == "reference" or x.dtype == torch.float64 else resolved


@torch.library.custom_op("ftfast::pair_statistics", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: str,
    offset: int,
    rows: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    relation = Relation(mode, offset, row_ids, col_ids)
    if backend == "triton":
        from . import triton_softmax

        return triton_softmax.forward(x, y, scale, relation, rows, columns)
    return torch_softmax.forward(x, y, scale, relation, rows, columns)


@_forward.register_fake
def _forward_fake(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: str,
    offset: int,
    rows: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch_softmax.vector_dtype(x.device)
    m, n = x.shape[0] if rows else 0, y.shape[0] if columns else 0
    return tuple(x.new_empty(size, dtype=dtype) for size in (m, m, n, n))  # type: ignore[return-value]


@torch.library.custom_op("ftfast::pair_statistics_backward", mutates_args=())
def _backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    g_row_lse: Tensor | None,
    g_row_positive: Tensor | None,
    g_col_lse: Tensor | None,
    g_col_positive: Tensor | None,
    mode: str,
    offset: int,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    relation = Relation(mode, offset, row_ids, col_ids)
    grads = (g_row_lse, g_row_positive, g_col_lse, g_col_positive)
    if backend == "triton":
        from . import triton_softmax

        return triton_softmax.backward(x, y, scale, relation, (row_lse, col_lse), grads, (need_x, need_y))
    return torch_softmax.backward(x, y, scale, relation, (row_lse, col_lse), grads, (need_x, need_y))


@_backward.register_fake
def _backward_fake(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    g_row_lse: Tensor | None,
    g_row_positive: Tensor | None,
    g_col_lse: Tensor | None,
    g_col_positive: Tensor | None,
    mode: str,
    offset: int,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_y = y.new_empty(y.shape if need_y else (0,))
    return grad_x, grad_y, x.new_empty((), dtype=torch_softmax.work_dtype(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, row_ids, col_ids, mode, offset, rows, columns, backend = inputs
    row_lse, _, col_lse, _ = output
    ctx.save_for_backward(x, y, scale, row_ids, col_ids, row_lse, col_lse)
    ctx.options = (mode, offset, rows, columns, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, scale, row_ids, col_ids, row_lse, col_lse = ctx.saved_tensors
    mode, offset, rows, columns, backend = ctx.options
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    lse = (row_lse if rows else None, col_lse if columns else None)
    kept = (*(grads[:2] if rows else (None, None)), *(grads[2:] if columns else (None, None)))
    grad_x, grad_y, grad_scale = _backward(
        x, y, scale, row_ids, col_ids, *lse, *kept, mode, offset, need_x or not need_y, need_y, backend
    )
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale.to(scale.dtype) if need_scale else None,
        *[None] * 7,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)

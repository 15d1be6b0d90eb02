"""Blockwise PyTorch backend of the pairwise softmax statistics: one similarity block at a time.

Forward: one product per block; where the block's spread allows, one exponential serves the row and the column sums.
Backward: the block is recomputed and consumed by two products. Blocks hold S · log2(e): on CPU exp2 runs four times as
fast as exp. Vectors over rows and columns are float64. Legend: M rows, N columns, D width, block (R, C).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .matmul import matmul_nt
from .relations import Relation, diagonal_span

BLOCK_ROWS = 1024
BLOCK_COLUMNS = 2048
SMALLEST_SUM = 1e-26  # below this, terms lost to underflow (1e-38 each) could matter next to a row's sum
_LARGEST_SPREAD = 86.0  # 2^86 times a term that underflowed (1e-38) is below 1e-12 of a probability
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that blocks are computed in: float32, or float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def vector_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of statistics vectors: float64, so that they round nothing (float32 where a device has none)."""
    return torch.float32 if device.type == "mps" else torch.float64


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield the (row, column) slices of every block, row stripes outermost."""
    for r in range(0, rows, BLOCK_ROWS):
        for c in range(0, columns, BLOCK_COLUMNS):
            yield slice(r, min(r + BLOCK_ROWS, rows)), slice(c, min(c + BLOCK_COLUMNS, columns))


def pair_diagonal(block: Tensor, at: tuple[slice, slice], offset: int) -> tuple[Tensor, slice, slice] | None:
    """Return the block's entries j = i + offset as a view, with their global rows and columns; None if none."""
    r, c = at
    first, last = diagonal_span(r.start, r.stop, c.start, c.stop, offset)
    if first == last:
        return None
    local = block[first - r.start : last - r.start, first + offset - c.start : last + offset - c.start]
    return local.diagonal(), slice(first, last), slice(first + offset, last + offset)


def same_ids(relation: Relation, at: tuple[slice, slice]) -> Tensor | None:
    """Return the block's (R, C) mask of equal ids, or None if the relation has no ids."""
    if relation.row_ids is None or relation.col_ids is None:
        return None
    return relation.row_ids[at[0], None] == relation.col_ids[None, at[1]]


class OnlineSum:
    """Running Σ exp2(s) per row (or column) of a matrix seen in pieces, relative to a running maximum, in float64."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.top = torch.full((size,), -torch.inf, dtype=vector_dtype(like.device), device=like.device)
        self.total = torch.zeros_like(self.top)

    def add(self, at: slice, shift: Tensor, total: Tensor) -> None:
        """Add sums that were taken relative to exp2(finite(shift)); a shift of -inf stands for an empty set."""
        shift = shift.to(self.top.dtype)
        top = torch.maximum(self.top[at], shift)
        origin = finite(top)
        old, new = torch.exp2(self.top[at] - origin), torch.exp2(shift - origin)
        self.total[at] = self.total[at] * old + total * new
        self.top[at] = top

    def lse(self) -> Tensor:
        """Return the natural log-sum-exp; -inf where nothing was added."""
        return (finite(self.top) + self.total.log2()) * LN_2


def finite(shift: Tensor) -> Tensor:
    """Replace the -inf maximum of an empty set by 0, so that shift arithmetic stays finite."""
    return torch.where(shift == -torch.inf, torch.zeros_like(shift), shift)


def add_block(block: Tensor, at: tuple[slice, slice], rows: OnlineSum | None, cols: OnlineSum | None) -> None:
    """Add exp2(block) to the running row and column sums, with a single exponential where that is exact."""
    if rows is not None and cols is not None and block.device.type == "cpu":
        shift = finite(block.amax())
        weights = (block - shift).exp2_()
        by_row, by_col = weights.sum(1), weights.sum(0)
        if min(by_row.min().item(), by_col.min().item()) > SMALLEST_SUM:
            rows.add(at[0], shift, by_row)
            cols.add(at[1], shift, by_col)
            return
    for axis, sums, part in ((1, rows, at[0]), (0, cols, at[1])):
        if sums is not None:
            top = block.amax(axis, keepdim=True)
            sums.add(part, top.squeeze(axis), (block - finite(top)).exp2_().sum(axis))


def base_two_weights(lse: Tensor | None, *weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Round log-sum-exps to base-2 shifts, and move what the rounding lost into the weights of the probabilities.

    A float32 log-sum-exp near 64 is off by up to 4e-6, which would be a relative error of every probability of the row.

    Args:
        lse: (M,) natural log-sum-exps; None: no such direction. An empty row's -inf becomes probability 0.
        weights: (M,) factors of the probabilities, or None.
        dtype: Of the results.

    Returns:
        The shifts, then the weights.
    """
    if lse is None:
        return (None,) * (1 + len(weights))
    exact = torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E)
    shift = exact.to(dtype)
    lost = torch.where(exact.isinf(), 0, shift.to(exact.dtype) - exact)
    return shift, *(None if w is None else (w * torch.exp2(lost)).to(dtype) for w in weights)


def forward(
    x: Tensor, y: Tensor, scale: Tensor, relation: Relation, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the statistics of :func:`ftfast.kernels.pairs.pair_statistics` block by block.

    Returns:
        row_lse (M,), row_positive (M,), col_lse (N,), col_positive (N,); size 0 where not asked for.
    """
    dtype = work_dtype(x)
    scaled, other = x.to(dtype) * (scale.to(dtype) * LOG2_E), y.to(dtype)
    row_sums = OnlineSum(x.shape[0], scaled) if rows else None
    col_sums = OnlineSum(y.shape[0], scaled) if columns else None
    row_positive = scaled.new_zeros(x.shape[0] if rows else 0, dtype=vector_dtype(x.device))
    col_positive = row_positive.new_zeros(y.shape[0] if columns else 0)
    for at in blocks(x.shape[0], y.shape[0]):
        block = matmul_nt(scaled[at[0]], other[at[1]])
        _positives(block, at, relation, row_positive if rows else None, col_positive if columns else None)
        add_block(exclude(block, at, relation), at, row_sums, col_sums)
    empty = row_positive.new_empty(0)
    row_lse = row_sums.lse() if row_sums is not None else empty
    col_lse = col_sums.lse() if col_sums is not None else empty.clone()
    return row_lse, row_positive * LN_2, col_lse, col_positive * LN_2


def _positives(
    block: Tensor, at: tuple[slice, slice], relation: Relation, rows: Tensor | None, cols: Tensor | None
) -> None:
    """Add the sums of the block's positive base-2 logits to ``rows`` and ``cols``."""
    if relation.mode in ("pair", "rivals"):
        found = pair_diagonal(block, at, relation.offset)
        if found is not None:
            values, r, c = found
            if rows is not None:
                rows[r] += values
            if cols is not None:
                cols[c] += values
        return
    positive = positive_mask(relation, at)
    kept = torch.where(positive, block, 0)
    if rows is not None:
        rows[at[0]] += kept.sum(1)
    if cols is not None:
        cols[at[1]] += kept.sum(0)


def positive_mask(relation: Relation, at: tuple[slice, slice]) -> Tensor:
    """Return the block's (R, C) mask of positives for the modes that decide them by ids."""
    same = same_ids(relation, at)
    if same is None:
        raise ValueError(f"mode {relation.mode!r} needs row_ids and col_ids")
    found = pair_diagonal(same, at, relation.offset) if relation.mode == "self" else None
    if found is not None:
        found[0].fill_(False)
    return same


def exclude(block: Tensor, at: tuple[slice, slice], relation: Relation) -> Tensor:
    """Set the logits that the relation leaves out to -inf, in place."""
    if relation.mode in ("pair", "self", "rivals"):
        found = pair_diagonal(block, at, relation.offset)
        if found is not None:
            found[0].fill_(-torch.inf)
    if relation.mode in ("target", "rivals"):
        same = same_ids(relation, at)
        if same is not None:
            block.masked_fill_(same, -torch.inf)
    return block


def softmax_sum(
    block: Tensor, row_lse: Tensor | None, col_lse: Tensor | None, row_weight: Tensor | None, col_weight: Tensor | None
) -> Tensor:
    """Return row_weight·softmax over each row + col_weight·softmax over each column, from one exponential if exact.

    Args:
        block: (R, C) base-2 logits, -inf where excluded; may be overwritten.
        row_lse: (R,) base-2 log-sum-exp of whole rows; +inf gives probability 0.
        col_lse: (C,) log-sum-exp of whole columns.
        row_weight: (R,), or None for no row part.
        col_weight: (C,), or None for no column part.

    Returns:
        (R, C).
    """
    if row_weight is None or row_lse is None:
        return block.sub_(col_lse).exp2_().mul_(col_weight)  # type: ignore[arg-type]
    if col_weight is None or col_lse is None:
        return block.sub_(row_lse[:, None]).exp2_().mul_(row_weight[:, None])
    if block.device.type == "cpu":
        low, high = col_lse.min().item(), row_lse.max().item()
        if high - low < _LARGEST_SPREAD:
            shift = 0.5 * (low + high)
            by_col = col_weight * (shift - col_lse).exp2_()
            factor = torch.addcmul(row_weight[:, None], (row_lse - shift).exp2_()[:, None], by_col[None, :])
            return factor.mul_(block.sub_(row_lse[:, None]).exp2_())
    by_row = (block - row_lse[:, None]).exp2_().mul_(row_weight[:, None])
    return by_row.addcmul_(block.sub_(col_lse).exp2_(), col_weight[None, :])


class GradientSums:
    """Accumulates dX = G Y and dY = Gᵀ X over blocks of G, without the scale, in the work dtype."""

    def __init__(self, x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> None:
        self.x, self.y = x, y  # work dtype
        self.grad_x = torch.zeros_like(x) if need_x else None
        # dYᵀ = Xᵀ G: a product with G on the right does not have to transpose G first.
        self.x_t = x.T.contiguous() if need_y else None
        self.grad_y_t = torch.zeros_like(y.T, memory_format=torch.contiguous_format) if need_y else None

    def add(self, gradient: Tensor, at: tuple[slice, slice]) -> None:
        """Add the products of one (R, C) block of G."""
        if self.grad_x is not None:
            self.grad_x[at[0]] += matmul_nt(gradient, self.y[at[1]].T)
        if self.grad_y_t is not None and self.x_t is not None:
            self.grad_y_t[:, at[1]] += matmul_nt(self.x_t[:, at[0]], gradient.T)

    def finish(self, scale: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
        """Return dX, dY (scaled, in the dtypes of the inputs; size 0 where not needed) and d scale = <G Y, X>."""
        grad_y = None if self.grad_y_t is None else self.grad_y_t.T.contiguous()
        self.x_t = self.grad_y_t = None
        # One sum of cancelling terms.
        if self.grad_x is not None:
            grad_scale = row_dots(self.grad_x, self.x).sum().to(self.x.dtype)
        elif grad_y is not None:
            grad_scale = row_dots(grad_y, self.y).sum().to(self.x.dtype)
        else:
            grad_scale = self.x.new_zeros(())
        factor = scale.to(self.x.dtype)
        grads = [
            self.x.new_empty(0, dtype=dtype) if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip((self.grad_x, grad_y), dtypes, strict=True)
        ]
        return grads[0], grads[1], grad_scale


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return <a_i, b_i> of every row in float64, a stripe at a time."""
    wide = vector_dtype(a.device)
    pairs = zip(a.split(BLOCK_ROWS), b.split(BLOCK_ROWS), strict=True)
    return torch.cat([(p.to(wide) * q.to(wide)).sum(1) for p, q in pairs])


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    relation: Relation,
    lse: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate gradients of the four statistics to x, y and the scale, recomputing each block once.

    Returns:
        dX, dY (in the dtypes of x and y; size 0 where not needed) and d scale (work dtype).
    """
    dtype = work_dtype(x)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    scaled = wide_x * (scale.to(dtype) * LOG2_E)
    sums = GradientSums(wide_x, wide_y, *need)
    row_lse, g_row_lse = base_two_weights(lse[0], grads[0], dtype=dtype)
    col_lse, g_col_lse = base_two_weights(lse[1], grads[2], dtype=dtype)
    g_row_positive, g_col_positive = (None if g is None else g.to(dtype) for g in (grads[1], grads[3]))
    for r, c in blocks(x.shape[0], y.shape[0]):
        block = exclude(matmul_nt(scaled[r], wide_y[c]), (r, c), relation)
        if g_row_lse is None and g_col_lse is None:
            gradient = torch.zeros_like(block)
        else:
            gradient = softmax_sum(block, at(row_lse, r), at(col_lse, c), at(g_row_lse, r), at(g_col_lse, c))
        add_positive_gradient(gradient, (r, c), relation, at(g_row_positive, r), at(g_col_positive, c))
        sums.add(gradient, (r, c))
    return sums.finish(scale, (x.dtype, y.dtype))


def at(vector: Tensor | None, part: slice) -> Tensor | None:
    """Slice an optional vector."""
    return None if vector is None else vector[part]


def add_positive_gradient(
    gradient: Tensor, where: tuple[slice, slice], relation: Relation, row: Tensor | None, col: Tensor | None
) -> None:
    """Add row[i] + col[j] to the block of G at every positive pair, in place."""
    if row is None and col is None:
        return
    if relation.mode in ("pair", "rivals"):
        found = pair_diagonal(gradient, where, relation.offset)
        if found is not None:
            values, r, c = found
            for vector, part, start in ((row, r, where[0].start), (col, c, where[1].start)):
                if vector is not None:
                    values += vector[part.start - start : part.stop - start]
        return
    total = (0 if row is None else row[:, None]) + (0 if col is None else col[None, :])
    gradient += torch.where(positive_mask(relation, where), total, 0)

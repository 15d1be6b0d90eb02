"""The one tile of the Triton backend: a block of S = scale · X Yᵀ in base-2 units, and what epilogues do with it.

A program multiplies BLOCK_M rows by BLOCK_N columns over the whole width D in float32 accumulators; the epilogues
(log-sum-exps, softmax gradient, sigmoid, distillation) are elementwise on those registers. Logits are kept as
S · log2(e), so an exponential is one exp2. Legend: M rows, N columns, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Relation modes as the kernels know them; the order is that of ``relations.MODES``.
PAIR = tl.constexpr(0)
TARGET = tl.constexpr(1)
GROUP = tl.constexpr(2)
SELF = tl.constexpr(3)
RIVALS = tl.constexpr(4)
NONE = tl.constexpr(5)


@triton.jit
def tile_position(pid: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP_M: tl.constexpr) -> tuple:
    """Return the (row, column) tile of a program; GROUP_M row tiles share their columns in the L2 cache."""
    width = GROUP_M * tiles_n
    group = pid // width
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def product_tile(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    row_start: tl.tensor,
    col_start: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the float32 inner products of BLOCK_M rows of X with BLOCK_N rows of Y; past the end the last row repeats.

    The first element's address is 64-bit and scalar; offsets inside the tile are 32-bit, which halves their registers.
    """
    first_row = tl.minimum(row_start, M - 1)
    first_col = tl.minimum(col_start, N - 1)
    x_ptr += first_row.to(tl.int64) * x_stride
    y_ptr += first_col.to(tl.int64) * y_stride
    width = tl.arange(0, BLOCK_K)
    x_at = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_row)[:, None] * x_stride + width[None, :]
    y_at = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_col)[None, :] * y_stride + width[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + x_at)
            y = tl.load(y_ptr + y_at)
        else:
            inside = width < D - start
            x = tl.load(x_ptr + x_at, mask=inside[None, :], other=0.0)
            y = tl.load(y_ptr + y_at, mask=inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        x_ptr += BLOCK_K
        y_ptr += BLOCK_K
    return total


@triton.jit
def store_tile(
    g_ptr: tl.tensor,  # (R, C), fewer than 2^31 elements
    g: tl.tensor,
    tile_m: tl.tensor,
    tile_n: tl.tensor,
    g_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Store a whole tile of G into the superblock, in its dtype."""
    g_ptr += tile_m.to(tl.int64) * BLOCK_M * g_stride + tile_n * BLOCK_N
    at = tl.arange(0, BLOCK_M)[:, None] * g_stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty))


@triton.jit
def positive_mask(
    rows: tl.tensor,
    cols: tl.tensor,
    row_ids: tl.tensor,
    col_ids: tl.tensor,
    offset: tl.tensor,
    MODE: tl.constexpr,
) -> tl.tensor:
    """Return the (BLOCK_M, BLOCK_N) mask of positives."""
    if MODE == PAIR or MODE == RIVALS:  # noqa: SIM109
        return rows[:, None] + offset == cols[None, :]
    elif MODE == SELF:
        return (row_ids[:, None] == col_ids[None, :]) & (rows[:, None] + offset != cols[None, :])
    else:
        return row_ids[:, None] == col_ids[None, :]


@triton.jit
def kept_mask(
    rows: tl.tensor,
    cols: tl.tensor,
    row_ids: tl.tensor,
    col_ids: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    offset: tl.tensor,
    MODE: tl.constexpr,
) -> tl.tensor:
    """Return the (BLOCK_M, BLOCK_N) mask of pairs that exist and take part in the log-sum-exp."""
    kept = (rows < M)[:, None] & (cols < N)[None, :]
    if MODE == PAIR or MODE == SELF:  # noqa: SIM109
        kept = kept & (rows[:, None] + offset != cols[None, :])
    elif MODE == TARGET:
        kept = kept & (row_ids[:, None] != col_ids[None, :])
    elif MODE == RIVALS:
        kept = kept & (row_ids[:, None] != col_ids[None, :]) & (rows[:, None] + offset != cols[None, :])
    return kept


@triton.jit
def needs_mask(
    row_start: tl.tensor,
    col_start: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    offset: tl.tensor,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Tell whether the tile crosses an edge or the diagonal, or ids decide: other tiles skip all masking."""
    crosses = (row_start + BLOCK_M > M) | (col_start + BLOCK_N > N)
    if MODE == PAIR or MODE == SELF:  # noqa: SIM109
        near = (row_start + offset < col_start + BLOCK_N) & (row_start + offset + BLOCK_M > col_start)
        return crosses | near
    elif MODE == NONE:
        return crosses
    else:
        return crosses | (row_start >= 0)


@triton.jit
def _origin(top: tl.tensor) -> tl.tensor:
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def tile_lse(s: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tuple:
    """Return base-2 log-sum-exps of the tile's rows and columns (-inf over nothing).

    One exponential, relative to the tile's maximum, serves both. Where a row or column sum came out so small that
    underflow could matter (below 2^-86, of terms that vanish below 2^-126), the tile takes the exact two-maxima path.
    """
    if ROWS and COLS:
        top = _origin(tl.max(tl.max(s, 1), 0))
        e = tl.exp2(s - top)
        by_row = tl.sum(e, 1)
        by_col = tl.sum(e, 0)
        row = top + tl.log2(by_row)
        col = top + tl.log2(by_col)
        if tl.minimum(tl.min(by_row, 0), tl.min(by_col, 0)) < 1.2e-26:
            row_top = _origin(tl.max(s, 1))
            row = row_top + tl.log2(tl.sum(tl.exp2(s - row_top[:, None]), 1))
            col_top = _origin(tl.max(s, 0))
            col = col_top + tl.log2(tl.sum(tl.exp2(s - col_top[None, :]), 0))
        return row, col
    elif ROWS:
        row_top = _origin(tl.max(s, 1))
        row = row_top + tl.log2(tl.sum(tl.exp2(s - row_top[:, None]), 1))
        return row, row
    else:
        col_top = _origin(tl.max(s, 0))
        col = col_top + tl.log2(tl.sum(tl.exp2(s - col_top[None, :]), 0))
        return col, col


@triton.jit
def tile_lse_mean(s: tl.tensor, values: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tuple:
    """Return log-sum-exps of rows and columns, and the means of ``values`` under those softmaxes (same two paths)."""
    if ROWS and COLS:
        top = _origin(tl.max(tl.max(s, 1), 0))
        e = tl.exp2(s - top)
        by_row = tl.sum(e, 1)
        by_col = tl.sum(e, 0)
        row = top + tl.log2(by_row)
        col = top + tl.log2(by_col)
        row_mean = tl.sum(e * values, 1) / tl.maximum(by_row, 1e-37)
        col_mean = tl.sum(e * values, 0) / tl.maximum(by_col, 1e-37)
        if tl.minimum(tl.min(by_row, 0), tl.min(by_col, 0)) < 1.2e-26:
            row, row_mean = _lse_mean(s, values, 1)
            col, col_mean = _lse_mean(s, values, 0)
        return row, col, row_mean, col_mean
    elif ROWS:
        row, row_mean = _lse_mean(s, values, 1)
        return row, row, row_mean, row_mean
    else:
        col, col_mean = _lse_mean(s, values, 0)
        return col, col, col_mean, col_mean


@triton.jit
def _lse_mean(s: tl.tensor, values: tl.tensor, AXIS: tl.constexpr) -> tuple:
    top = _origin(tl.max(s, AXIS))
    e = tl.exp2(s - tl.expand_dims(top, AXIS))
    total = tl.sum(e, AXIS)
    return top + tl.log2(total), tl.sum(e * values, AXIS) / tl.maximum(total, 1e-37)


@triton.jit
def tile_softmax_sum(
    s: tl.tensor,
    row_lse: tl.tensor,
    col_lse: tl.tensor,
    row_weight: tl.tensor,
    col_weight: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Return row_weight · row softmax + col_weight · column softmax of base-2 logits, given whole log-sum-exps.

    One exponential for both: exp2(s - c) (w_i 2^(c - lse_i) + v_j 2^(c - lse_j)) with c the largest of them. No term
    overflows, and one that underflows is below 2^-46 of a probability as long as the spread of the log-sum-exps in the
    tile is below 80; otherwise the tile takes two exponentials.
    """
    if ROWS and COLS:
        high = tl.maximum(tl.max(row_lse, 0), tl.max(col_lse, 0))
        low = tl.minimum(tl.min(row_lse, 0), tl.min(col_lse, 0))
        if high - low < 80.0:
            a = row_weight * tl.exp2(high - row_lse)
            b = col_weight * tl.exp2(high - col_lse)
            g = tl.exp2(s - high) * (a[:, None] + b[None, :])
        else:
            g = tl.exp2(s - row_lse[:, None]) * row_weight[:, None]
            g += tl.exp2(s - col_lse[None, :]) * col_weight[None, :]
        return g
    elif ROWS:
        return tl.exp2(s - row_lse[:, None]) * row_weight[:, None]
    else:
        return tl.exp2(s - col_lse[None, :]) * col_weight[None, :]

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
def tile_lines(
    row_start: tl.tensor,
    col_start: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple:
    """Return the tile's rows and columns, and both again with those past the end replaced by the last (for loads)."""
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    return rows, cols, tl.minimum(rows, M - 1), tl.minimum(cols, N - 1)


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
    """Return base-2 log-sum-exps of the tile's rows and columns, each as a shift and the log of the sum beyond it.

    Their sum would round to the precision of the shift. One exponential, relative to the tile's maximum, serves both
    directions. Where a row or column sum came out so small that underflow could matter (below 2^-86, of terms that
    vanish below 2^-126), the tile takes the exact two-maxima path. Over nothing the log is -inf.
    """
    if ROWS and COLS:
        top = _origin(tl.max(tl.max(s, 1), 0))
        e = tl.exp2(s - top)
        by_row = tl.sum(e, 1)
        by_col = tl.sum(e, 0)
        row_top = tl.zeros_like(by_row) + top
        col_top = tl.zeros_like(by_col) + top
        if tl.minimum(tl.min(by_row, 0), tl.min(by_col, 0)) < 1.2e-26:
            row_top = _origin(tl.max(s, 1))
            by_row = tl.sum(tl.exp2(s - row_top[:, None]), 1)
            col_top = _origin(tl.max(s, 0))
            by_col = tl.sum(tl.exp2(s - col_top[None, :]), 0)
        return row_top, tl.log2(by_row), col_top, tl.log2(by_col)
    elif ROWS:
        row_top = _origin(tl.max(s, 1))
        row = tl.log2(tl.sum(tl.exp2(s - row_top[:, None]), 1))
        return row_top, row, row_top, row
    else:
        col_top = _origin(tl.max(s, 0))
        col = tl.log2(tl.sum(tl.exp2(s - col_top[None, :]), 0))
        return col_top, col, col_top, col


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


@triton.jit
def lines(values: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Return a vector over rows (AXIS 1) or columns (AXIS 0) as a tensor that broadcasts over the tile."""
    return tl.expand_dims(values, AXIS)


@triton.jit
def tile_parts(s: tl.tensor, AXIS: tl.constexpr) -> tuple:
    """Return each line's largest base-2 logit and the sum of the other exponentials relative to it, added up alone."""
    top = _origin(tl.max(s, AXIS))
    below = s < lines(top, AXIS)
    others = tl.sum(tl.where(below, tl.exp2(s - lines(top, AXIS)), 0.0), AXIS)
    ties = tl.sum(tl.where(s == lines(top, AXIS), 1.0, 0.0), AXIS)
    return top, others + tl.maximum(ties - 1.0, 0.0)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """Return log(1 + x) for x >= 0, keeping the relative accuracy of small x."""
    return tl.where(x < 2e-4, x * (1.0 - 0.5 * x), tl.log2(1.0 + x) * LN_2)


@triton.jit
def divergence_term(p: tl.tensor, q: tl.tensor, log_ratio: tl.tensor) -> tl.tensor:
    """Return q - p - p·log(q/p) >= 0 elementwise; near p = q by the series of exp(r) - 1 - r, which does not cancel."""
    r = tl.minimum(tl.maximum(log_ratio, -1.0), 1.0)
    series = 1.0 + r * (1.0 / 8.0 + r * (1.0 / 72.0 + r * (1.0 / 720.0)))
    series = 1.0 + r * (1.0 / 5.0 + r * (1.0 / 30.0 + r * (1.0 / 210.0) * series))
    series = 0.5 * r * r * (1.0 + r * (1.0 / 3.0 + r * (1.0 / 12.0) * series))
    return tl.where(tl.abs(log_ratio) < 1.0, p * series, q - p - tl.where(p > 0, p * log_ratio, 0.0))

"""Triton backend of the pairwise softmax statistics: log-sum-exp epilogue forward, softmax-gradient epilogue backward.

Forward: one stripe of rows at a time, every tile writes the log-sum-exps of its rows and columns; the small partial
arrays are merged by ``torch.logsumexp`` in a fixed order. Backward: G is recomputed tile by tile into an L2-sized
superblock that two products consume (see ``triton_products``). A fully fused backward would need a (rows, D) float32
accumulator in registers, which at D = 768 leaves no room for tensor-core tiles. Legend: M rows, N columns, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .relations import MODES, Relation, dense_ids
from .torch_softmax import base_two_weights
from .triton_products import superblock_gradients
from .triton_tiles import (
    LN_2,
    LOG2_E,
    PAIR,
    RIVALS,
    SELF,
    kept_mask,
    needs_mask,
    positive_mask,
    product_tile,
    store_tile,
    tile_lines,
    tile_lse,
    tile_position,
    tile_softmax_sum,
)
from .tuning import PARTIAL_BYTES, Tile, capability_of, tiles

HALF_HEADROOM = 4096.0  # float16 G is scaled so that its largest weight is this; four such weights still fit


@triton.jit
def _softmax_fwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    scale_ptr: tl.tensor,  # () float32
    row_ids_ptr: tl.tensor,  # (M,) int32
    col_ids_ptr: tl.tensor,  # (N,) int32
    row_lse_ptr: tl.tensor,  # (2, tiles_n, stripe) float32, base 2: shift and log of the sum beyond it
    col_lse_ptr: tl.tensor,  # (2, tiles_m, N)
    row_pos_ptr: tl.tensor,  # (stripe,) by diagonal, else (tiles_n, stripe)
    col_pos_ptr: tl.tensor,  # (N,) by diagonal, else (tiles_m, N)
    first_row: tl.tensor,
    stripe: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    offset: tl.tensor,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Log-sum-exps and positive sums of one tile of a row stripe."""
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(stripe, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start = first_row + tile_m * BLOCK_M
    dots = product_tile(
        x_ptr, y_ptr, start, tile_n * BLOCK_N, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    rows, cols, near_rows, near_cols = tile_lines(start, tile_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
    local = rows - first_row
    limit = tl.minimum(first_row + stripe, M)
    scale = tl.load(scale_ptr)
    s = dots * (scale * LOG2_E)
    row_ids = rows
    col_ids = cols
    if MODE != PAIR:
        row_ids = tl.load(row_ids_ptr + near_rows)
        col_ids = tl.load(col_ids_ptr + near_cols)
    if needs_mask(start, tile_n * BLOCK_N, limit, N, offset, MODE, BLOCK_M, BLOCK_N):
        exists = (rows < limit)[:, None] & (cols < N)[None, :]
        positive = positive_mask(rows, cols, row_ids, col_ids, offset, MODE) & exists
        sums = tl.where(positive, dots * scale, 0.0)
        if MODE == PAIR or MODE == RIVALS:  # noqa: SIM109
            pair_cols = rows + offset
            mine = (
                (rows < limit) & (pair_cols >= tile_n * BLOCK_N) & (pair_cols < tl.minimum(N, (tile_n + 1) * BLOCK_N))
            )
            pair_rows = cols - offset
            yours = (cols < N) & (pair_rows >= start) & (pair_rows < tl.minimum(limit, start + BLOCK_M))
            if ROWS:
                tl.store(row_pos_ptr + local, tl.sum(sums, 1), mask=mine)
            if COLS:
                tl.store(col_pos_ptr + cols, tl.sum(sums, 0), mask=yours)
        else:
            if ROWS:
                tl.store(row_pos_ptr + tile_n.to(tl.int64) * stripe + local, tl.sum(sums, 1), mask=local < stripe)
            if COLS:
                tl.store(col_pos_ptr + tile_m.to(tl.int64) * N + cols, tl.sum(sums, 0), mask=cols < N)
        s = tl.where(kept_mask(rows, cols, row_ids, col_ids, limit, N, offset, MODE), s, float("-inf"))
    elif MODE == SELF:
        # Tiles away from the diagonal and the edges still have positives by id.
        same = row_ids[:, None] == col_ids[None, :]
        sums = tl.where(same, dots * scale, 0.0)
        if ROWS:
            tl.store(row_pos_ptr + tile_n.to(tl.int64) * stripe + local, tl.sum(sums, 1), mask=local < stripe)
        if COLS:
            tl.store(col_pos_ptr + tile_m.to(tl.int64) * N + cols, tl.sum(sums, 0), mask=cols < N)
    row_top, row, col_top, col = tile_lse(s, ROWS, COLS)
    if ROWS:
        row_ptrs = row_lse_ptr + tile_n.to(tl.int64) * stripe + local
        tl.store(row_ptrs, row_top, mask=local < stripe)
        tl.store(row_ptrs + tl.cdiv(N, BLOCK_N).to(tl.int64) * stripe, row, mask=local < stripe)
    if COLS:
        col_ptrs = col_lse_ptr + tile_m.to(tl.int64) * N + cols
        tl.store(col_ptrs, col_top, mask=cols < N)
        tl.store(col_ptrs + tl.cdiv(stripe, BLOCK_M).to(tl.int64) * N, col, mask=cols < N)


@triton.jit
def _softmax_bwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    scale_ptr: tl.tensor,  # () float32
    row_ids_ptr: tl.tensor,  # (M,) int32
    col_ids_ptr: tl.tensor,  # (N,) int32
    row_lse_ptr: tl.tensor,  # (M,) float32, base 2, finite
    col_lse_ptr: tl.tensor,  # (N,)
    row_weight_ptr: tl.tensor,  # (M,) gradients of row_lse, normalised
    col_weight_ptr: tl.tensor,  # (N,)
    row_pos_ptr: tl.tensor,  # (M,) gradients of row_positive, normalised
    col_pos_ptr: tl.tensor,  # (N,)
    g_ptr: tl.tensor,  # (R, C) superblock
    first_row: tl.tensor,
    first_col: tl.tensor,
    tiles_m: tl.tensor,
    tiles_n: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    g_stride: tl.tensor,
    offset: tl.tensor,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of G; tiles past the last row or column are written as zeros."""
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    col_start = first_col + tile_n * BLOCK_N
    dots = product_tile(
        x_ptr, y_ptr, row_start, col_start, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    rows, cols, near_rows, near_cols = tile_lines(row_start, col_start, M, N, BLOCK_M, BLOCK_N)
    s = dots * (tl.load(scale_ptr) * LOG2_E)
    row_ids = rows
    col_ids = cols
    if MODE != PAIR:
        row_ids = tl.load(row_ids_ptr + near_rows)
        col_ids = tl.load(col_ids_ptr + near_cols)
    masked = needs_mask(row_start, col_start, M, N, offset, MODE, BLOCK_M, BLOCK_N)
    if masked:
        s = tl.where(kept_mask(rows, cols, row_ids, col_ids, M, N, offset, MODE), s, float("-inf"))
    row_lse = tl.load(row_lse_ptr + near_rows)
    col_lse = tl.load(col_lse_ptr + near_cols)
    row_weight = tl.load(row_weight_ptr + near_rows)
    col_weight = tl.load(col_weight_ptr + near_cols)
    g = tile_softmax_sum(s, row_lse, col_lse, row_weight, col_weight, ROWS, COLS)
    if masked or MODE == SELF:
        positive = positive_mask(rows, cols, row_ids, col_ids, offset, MODE)
        positive = positive & (rows < M)[:, None] & (cols < N)[None, :]
        row_pos = tl.load(row_pos_ptr + near_rows)
        col_pos = tl.load(col_pos_ptr + near_cols)
        g = tl.where(positive, g + (row_pos[:, None] + col_pos[None, :]), g)
    store_tile(g_ptr, g, tile_m, tile_n, g_stride, BLOCK_M, BLOCK_N)


def rows_contiguous(features: Tensor) -> Tensor:
    """Return features whose last dimension has stride 1."""
    return features if features.stride(1) == 1 and features.stride(0) >= features.shape[1] else features.contiguous()


def stripe_rows(rows: int, columns: int, tile: Tile) -> int:
    """Choose how many rows one forward launch covers, so that the partial statistics stay small."""
    by_row = PARTIAL_BYTES // (8 * triton.cdiv(columns, tile.n))
    by_col = PARTIAL_BYTES // (8 * columns) * tile.m
    return min(triton.cdiv(rows, tile.m), max(1, min(by_row, by_col) // tile.m)) * tile.m


def forward(
    x: Tensor, y: Tensor, scale: Tensor, relation: Relation, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the statistics of :func:`ftfast.kernels.pairs.pair_statistics` with one launch per row stripe.

    Returns:
        row_lse (M,), row_positive (M,), col_lse (N,), col_positive (N,), float64; size 0 where not asked for.
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    (m, width), n = x.shape, y.shape[0]
    tile = tiles(x.dtype, capability_of(x.device)).similarity
    stripe = stripe_rows(m, n, tile)
    tiles_n = triton.cdiv(n, tile.n)
    by_diagonal = relation.mode in ("pair", "rivals")
    wide: Any = {"dtype": torch.float64, "device": x.device}
    row_lse, col_lse = torch.empty(m if rows else 0, **wide), torch.full((n if columns else 0,), -torch.inf, **wide)
    row_positive, col_positive = torch.zeros(m if rows else 0, **wide), torch.zeros(n if columns else 0, **wide)
    wide_scale, ids = scale.to(torch.float32), dense_ids(relation) or (x, y)  # without ids the pointers are not read
    for first in range(0, m, stripe):
        count = min(stripe, m - first)
        used = triton.cdiv(count, tile.m)
        row_part = torch.empty((2, tiles_n, count if rows else 0), device=x.device)
        col_part = torch.empty((2, used, n if columns else 0), device=x.device)
        # Pairs lie in one tile of a row: without a plane per tile, zeros stay where there is none.
        row_sums = torch.zeros((1 if by_diagonal else tiles_n, count if rows else 0), device=x.device)
        col_sums = torch.zeros((1 if by_diagonal else used, n if columns else 0), device=x.device)
        _softmax_fwd_kernel[(used * tiles_n,)](
            x,
            y,
            wide_scale,
            *ids,
            row_part,
            col_part,
            row_sums,
            col_sums,
            first,
            count,
            m,
            n,
            width,
            x.stride(0),
            y.stride(0),
            relation.offset,
            **launch_options(relation.mode, rows, columns, tile, width),
        )
        part = slice(first, first + count)
        if rows:
            row_lse[part] = merge_lse(row_part)
            row_positive[part] = row_sums.sum(0, dtype=torch.float64)
        if columns:
            col_lse = torch.logaddexp(col_lse, merge_lse(col_part))
            col_positive += col_sums.sum(0, dtype=torch.float64)
    return row_lse, row_positive, col_lse, col_positive


def merge_lse(parts: Tensor) -> Tensor:
    """Merge the (2, pieces, size) base-2 shifts and logs of a stripe to natural float64 log-sum-exps."""
    return torch.logsumexp(parts.sum(0, dtype=torch.float64) * LN_2.value, 0)


def launch_options(mode: str, rows: bool, columns: bool, tile: Tile, width: int) -> dict[str, object]:
    """Return the compile-time arguments and schedule shared by the similarity kernels."""
    return {
        "MODE": MODES.index(mode),
        "ROWS": rows,
        "COLS": columns,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": tile.group,
        "EVEN_K": width % tile.k == 0,
        "PRECISION": "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def power_of_two(value: Tensor) -> Tensor:
    """Round a positive 0-d tensor down to a power of two; 1 for 0."""
    return torch.where(value > 0, torch.exp2(torch.floor(torch.log2(value))), 1.0)


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    relation: Relation,
    lse: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate gradients of the four statistics to x, y and the scale; see :mod:`ftfast.kernels.torch_softmax`.

    Returns:
        dX, dY (in the dtypes of x and y; size 0 where not needed) and d scale (float32).
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    (m, width), n = x.shape, y.shape[0]
    rows, columns = lse[0] is not None, lse[1] is not None
    # Masks by id need registers of their own: those modes take the smaller tile.
    table = tiles(x.dtype, capability_of(x.device))
    tile = table.heavy if relation.mode in ("group", "rivals") else table.similarity
    shifts, filled = [], []
    for size, side, (g_lse, g_positive) in ((m, lse[0], grads[:2]), (n, lse[1], grads[2:])):
        # The -inf of a row without terms becomes 0, as all its logits are masked.
        nothing = torch.zeros(size, device=x.device)
        shift, weight = base_two_weights(side, g_lse, dtype=torch.float32)
        shifts.append(nothing if shift is None else torch.where(shift == torch.inf, 0, shift))
        filled += [nothing if weight is None else weight, nothing if g_positive is None else g_positive.float()]
    norm: Tensor | float = 1.0
    if x.dtype == torch.float16:
        norm = HALF_HEADROOM / power_of_two(torch.stack([g.abs().max() for g in filled]).max())
    weights = [g * norm for g in filled]
    wide_scale, ids = scale.to(torch.float32), dense_ids(relation) or (x, y)  # without ids the pointers are not read
    options = launch_options(relation.mode, rows, columns or not rows, tile, width)

    def launch(workspace: Tensor, row_part: slice, col_part: slice, grid: tuple[int, int]) -> None:
        """Write the gradient weights of one superblock into the workspace."""
        _softmax_bwd_kernel[(grid[0] * grid[1],)](
            x,
            y,
            wide_scale,
            *ids,
            *shifts,
            weights[0],
            weights[2],
            weights[1],
            weights[3],
            workspace,
            row_part.start,
            col_part.start,
            *grid,
            m,
            n,
            width,
            x.stride(0),
            y.stride(0),
            workspace.stride(0),
            relation.offset,
            **options,
        )

    return superblock_gradients(x, y, wide_scale, norm, need, tile, launch)

"""Triton backend of similarity distillation: the student's and the teacher's tile side by side in registers.

Legend: M rows, N columns, D and E widths of student and teacher, superblock (R, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_products import superblock_gradients
from .triton_softmax import HALF_HEADROOM, base_two, power_of_two, rows_contiguous, stripe_rows
from .triton_tiles import (
    LN_2,
    LOG2_E,
    product_tile,
    store_tile,
    tile_lse,
    tile_lse_mean,
    tile_position,
    tile_softmax_sum,
)
from .tuning import Tile, capability_of, tiles

FORWARD_KL = tl.constexpr(0)
SOFT = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
KINDS = ("forward_kl", "soft_cross_entropy", "reverse_kl")
TeacherParts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]


@triton.jit
def _teacher_tile(
    x_ptr: tl.tensor,  # (M, E), or (M, N) logits
    y_ptr: tl.tensor,  # (N, E)
    row_start: tl.tensor,
    col_start: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    E: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    LOGITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the teacher's unscaled logits of the tile, multiplied or loaded."""
    if LOGITS:
        first_row = tl.minimum(row_start, M - 1)
        rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_row)
        cols = tl.minimum(col_start + tl.arange(0, BLOCK_N), N - 1)
        return tl.load(x_ptr + first_row.to(tl.int64) * x_stride + rows[:, None] * x_stride + cols[None, :]).to(
            tl.float32
        )
    else:
        return product_tile(
            x_ptr,
            y_ptr,
            row_start,
            col_start,
            M,
            N,
            E,
            x_stride,
            y_stride,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            PRECISION,
        )


@triton.jit
def _distill_fwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    teacher_x_ptr: tl.tensor,  # (M, E), or (M, N) logits
    teacher_y_ptr: tl.tensor,  # (N, E)
    scale_ptr: tl.tensor,  # () float32
    teacher_scale_ptr: tl.tensor,  # () float32
    row_part_ptr: tl.tensor,  # (3, tiles_n, stripe): lse, teacher lse, inner
    col_part_ptr: tl.tensor,  # (3, tiles_m, N)
    row_pos_ptr: tl.tensor,  # (M,)
    col_pos_ptr: tl.tensor,  # (N,)
    first_row: tl.tensor,
    stripe: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    E: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    teacher_x_stride: tl.tensor,
    teacher_y_stride: tl.tensor,
    offset: tl.tensor,
    KIND: tl.constexpr,
    LOGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Log-sum-exps of both matrices, weighted means and pair logits of one tile."""
    tiles_m = tl.cdiv(stripe, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    local = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_start = first_row + tile_m * BLOCK_M
    col_start = tile_n * BLOCK_N
    rows = first_row + local
    cols = col_start + tl.arange(0, BLOCK_N)
    M = first_row + stripe
    s = product_tile(
        x_ptr, y_ptr, row_start, col_start, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    t = _teacher_tile(
        teacher_x_ptr, teacher_y_ptr, row_start, col_start, M, N, E, teacher_x_stride, teacher_y_stride,
        LOGITS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E, PRECISION,
    )  # fmt: skip
    s = s * (tl.load(scale_ptr) * LOG2_E)
    t = t * (tl.load(teacher_scale_ptr) * LOG2_E)
    pair_cols = rows + offset
    mine = (local < stripe) & (pair_cols >= tile_n * BLOCK_N) & (pair_cols < tl.minimum(N, (tile_n + 1) * BLOCK_N))
    if tl.max(mine.to(tl.int32), 0) > 0:
        pair_rows = cols - offset
        yours = (cols < N) & (pair_rows >= row_start) & (pair_rows < tl.minimum(M, row_start + BLOCK_M))
        pairs = tl.where(rows[:, None] + offset == cols[None, :], s * LN_2, 0.0)
        if ROWS:
            tl.store(row_pos_ptr + rows, tl.sum(pairs, 1), mask=mine)
        if COLS:
            tl.store(col_pos_ptr + cols, tl.sum(pairs, 0), mask=yours)
    if KIND == FORWARD_KL:
        values = t - s
    elif KIND == SOFT:
        values = -s
    else:
        values = s - t
    exists = (local < stripe)[:, None] & (cols < N)[None, :]
    s = tl.where(exists, s, float("-inf"))
    t = tl.where(exists, t, float("-inf"))
    if KIND == REVERSE_KL:
        row, col, row_inner, col_inner = tile_lse_mean(s, values, ROWS, COLS)
        teacher_row, teacher_col = tile_lse(t, ROWS, COLS)
    else:
        teacher_row, teacher_col, row_inner, col_inner = tile_lse_mean(t, values, ROWS, COLS)
        row, col = tile_lse(s, ROWS, COLS)
    if ROWS:
        row_ptrs = row_part_ptr + tile_n.to(tl.int64) * stripe + local
        plane = tiles_n.to(tl.int64) * stripe
        tl.store(row_ptrs, row * LN_2, mask=local < stripe)
        tl.store(row_ptrs + plane, teacher_row * LN_2, mask=local < stripe)
        tl.store(row_ptrs + 2 * plane, row_inner * LN_2, mask=local < stripe)
    if COLS:
        col_ptrs = col_part_ptr + tile_m.to(tl.int64) * N + cols
        plane = tiles_m.to(tl.int64) * N
        tl.store(col_ptrs, col * LN_2, mask=cols < N)
        tl.store(col_ptrs + plane, teacher_col * LN_2, mask=cols < N)
        tl.store(col_ptrs + 2 * plane, col_inner * LN_2, mask=cols < N)


@triton.jit
def _distill_bwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    teacher_x_ptr: tl.tensor,  # (M, E), or (M, N) logits
    teacher_y_ptr: tl.tensor,  # (N, E)
    scale_ptr: tl.tensor,  # () float32
    teacher_scale_ptr: tl.tensor,  # () float32
    row_ptr: tl.tensor,  # (6, M): lse, teacher lse, inner (base 2); weights of lse, inner, positive (normalised)
    col_ptr: tl.tensor,  # (6, N)
    g_ptr: tl.tensor,  # (R, C) superblock
    first_row: tl.tensor,
    first_col: tl.tensor,
    tiles_m: tl.tensor,
    tiles_n: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    E: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    teacher_x_stride: tl.tensor,
    teacher_y_stride: tl.tensor,
    g_stride: tl.tensor,
    offset: tl.tensor,
    KIND: tl.constexpr,
    LOGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile of G; tiles past the last row or column are written as zeros."""
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    col_start = first_col + tile_n * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_M)
    cols = col_start + tl.arange(0, BLOCK_N)
    near_rows = tl.minimum(rows, M - 1)
    near_cols = tl.minimum(cols, N - 1)
    s = product_tile(
        x_ptr, y_ptr, row_start, col_start, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    t = _teacher_tile(
        teacher_x_ptr, teacher_y_ptr, row_start, col_start, M, N, E, teacher_x_stride, teacher_y_stride,
        LOGITS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E, PRECISION,
    )  # fmt: skip
    s = s * (tl.load(scale_ptr) * LOG2_E)
    t = t * (tl.load(teacher_scale_ptr) * LOG2_E)
    row_lse = tl.load(row_ptr + near_rows)
    col_lse = tl.load(col_ptr + near_cols)
    row_weight = tl.load(row_ptr + 3 * M.to(tl.int64) + near_rows)
    col_weight = tl.load(col_ptr + 3 * N.to(tl.int64) + near_cols)
    row_inner_weight = tl.load(row_ptr + 4 * M.to(tl.int64) + near_rows)
    col_inner_weight = tl.load(col_ptr + 4 * N.to(tl.int64) + near_cols)
    if KIND == REVERSE_KL:
        difference = (s - t) * LN_2 + 1.0
        g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if ROWS:
            inner = tl.load(row_ptr + 2 * M.to(tl.int64) + near_rows)
            weight = row_weight[:, None] + row_inner_weight[:, None] * (difference - inner[:, None])
            g += tl.exp2(s - row_lse[:, None]) * weight
        if COLS:
            inner = tl.load(col_ptr + 2 * N.to(tl.int64) + near_cols)
            weight = col_weight[None, :] + col_inner_weight[None, :] * (difference - inner[None, :])
            g += tl.exp2(s - col_lse[None, :]) * weight
    else:
        teacher_row = tl.load(row_ptr + M + near_rows)
        teacher_col = tl.load(col_ptr + N + near_cols)
        g = tile_softmax_sum(s, row_lse, col_lse, row_weight, col_weight, ROWS, COLS)
        g -= tile_softmax_sum(t, teacher_row, teacher_col, row_inner_weight, col_inner_weight, ROWS, COLS)
    row_pos = tl.load(row_ptr + 5 * M.to(tl.int64) + near_rows)
    col_pos = tl.load(col_ptr + 5 * N.to(tl.int64) + near_cols)
    g = tl.where(rows[:, None] + offset == cols[None, :], g + (row_pos[:, None] + col_pos[None, :]), g)
    g = tl.where((rows < M)[:, None] & (cols < N)[None, :], g, 0.0)
    store_tile(g_ptr, g, tile_m, tile_n, g_stride, BLOCK_M, BLOCK_N)


def _teacher_arguments(teacher: TeacherParts, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return both pointers, the scale and whether the first is a matrix of logits."""
    teacher_x, teacher_y, logits, scale = teacher
    if logits is not None:
        return rows_contiguous(logits), y, scale.to(torch.float32), True
    if teacher_x is None or teacher_y is None:
        raise ValueError("a teacher needs features or logits")
    return rows_contiguous(teacher_x), rows_contiguous(teacher_y), scale.to(torch.float32), False


def _options(
    kind: str, logits: bool, rows: bool, columns: bool, tile: Tile, widths: tuple[int, int]
) -> dict[str, object]:
    return {
        "KIND": KINDS.index(kind),
        "LOGITS": logits,
        "ROWS": rows,
        "COLS": columns,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": tile.group,
        "EVEN_K": widths[0] % tile.k == 0,
        "EVEN_E": widths[1] % tile.k == 0,
        "PRECISION": "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def forward(
    x: Tensor, y: Tensor, scale: Tensor, teacher: TeacherParts, kind: str, offset: int, rows: bool, columns: bool
) -> tuple[Tensor, ...]:
    """Compute the statistics of :func:`ftfast.kernels.distill_pairs.distill_statistics`, one launch per row stripe.

    Returns:
        lse, teacher_lse, inner, positive of the rows (M,), then of the columns (N,), float32; size 0 if not asked for.
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    m, n = x.shape[0], y.shape[0]
    teacher_x, teacher_y, teacher_scale, logits = _teacher_arguments(teacher, x, y)
    tile = tiles(x.dtype, capability_of(x.device)).paired
    stripe = stripe_rows(m, n, tile)
    tiles_n = triton.cdiv(n, tile.n)
    row = torch.zeros((4, m if rows else 0), device=x.device)
    col = torch.zeros((4, n if columns else 0), device=x.device)
    running: Tensor | None = None
    for first in range(0, m, stripe):
        count = min(stripe, m - first)
        row_part = torch.empty((3, tiles_n, count if rows else 0), device=x.device)
        col_part = torch.empty((3, triton.cdiv(count, tile.m), n if columns else 0), device=x.device)
        _distill_fwd_kernel[(triton.cdiv(count, tile.m) * tiles_n,)](
            x,
            y,
            teacher_x,
            teacher_y,
            scale.to(torch.float32),
            teacher_scale,
            row_part,
            col_part,
            row[3],
            col[3],
            first,
            count,
            n,
            x.shape[1],
            teacher_x.shape[1],
            x.stride(0),
            y.stride(0),
            teacher_x.stride(0),
            teacher_y.stride(0),
            offset,
            **_options(kind, logits, rows, columns, tile, (x.shape[1], teacher_x.shape[1])),
        )
        if rows:
            row[:3, first : first + count] = _merge(row_part, kind)
        if columns:
            merged = _merge(col_part, kind)
            running = merged if running is None else _merge(torch.stack([running, merged], 1), kind)
    if running is not None:
        col[:3] = running
    return tuple(v.clone() for v in (*row, *col))


def _merge(parts: Tensor, kind: str) -> Tensor:
    """Merge (3, pieces, size) partial statistics: two log-sum-exps, and the mean weighted by one of them."""
    lse = torch.logsumexp(parts[:2], 1)
    weigher = 0 if kind == "reverse_kl" else 1
    weights = torch.exp(parts[weigher] - lse[weigher])
    return torch.cat([lse, (weights * parts[2]).sum(0, keepdim=True)])


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher: TeacherParts,
    kind: str,
    offset: int,
    row: tuple[Tensor | None, ...],
    col: tuple[Tensor | None, ...],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate gradients of the statistics; see :func:`ftfast.kernels.torch_distill.backward`.

    Returns:
        dX, dY (size 0 where not needed) and d scale (float32).
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    teacher_x, teacher_y, teacher_scale, logits = _teacher_arguments(teacher, x, y)
    tile = tiles(x.dtype, capability_of(x.device)).paired
    widths = (x.shape[1], teacher_x.shape[1])
    options = _options(kind, logits, row[0] is not None, col[0] is not None, tile, widths)
    packed = []
    for side, size in ((row, x.shape[0]), (col, y.shape[0])):
        given = [v for v in side if v is not None]
        values = torch.stack(given).float() if given else torch.zeros((6, size), device=x.device)
        packed.append(torch.cat([base_two(values[:2]), values[2:]]))
    norm: Tensor | float = 1.0
    if x.dtype == torch.float16:
        # Reverse KL multiplies its weight by 1 + S - P - inner, which may exceed one; leave room for 16.
        room = HALF_HEADROOM / 16 if kind == "reverse_kl" else HALF_HEADROOM
        norm = room / power_of_two(torch.stack([v[3:].abs().max() for v in packed]).max())
        packed = [torch.cat([v[:3], v[3:] * norm]) for v in packed]
    wide_scale = scale.to(torch.float32)

    def launch(workspace: Tensor, rows: slice, cols: slice, grid: tuple[int, int]) -> None:
        """Write the gradient weights of one superblock into the workspace."""
        _distill_bwd_kernel[(grid[0] * grid[1],)](
            x,
            y,
            teacher_x,
            teacher_y,
            wide_scale,
            teacher_scale,
            *packed,
            workspace,
            rows.start,
            cols.start,
            *grid,
            x.shape[0],
            y.shape[0],
            *widths,
            x.stride(0),
            y.stride(0),
            teacher_x.stride(0),
            teacher_y.stride(0),
            workspace.stride(0),
            offset,
            **options,
        )

    return superblock_gradients(x, y, wide_scale, norm, need, tile, launch)

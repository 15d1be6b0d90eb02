"""Triton backend of similarity distillation: the student's and the teacher's tile side by side in registers.

Legend: M rows, N columns, D and E widths of student and teacher, superblock (R, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distill_parts import POSITIVE, merge_parts, nothing_yet
from .triton_products import superblock_gradients
from .triton_softmax import HALF_HEADROOM, launch_options, power_of_two, rows_contiguous, stripe_rows
from .triton_tiles import (
    LN_2,
    LOG2_E,
    divergence_term,
    lines,
    log1p,
    product_tile,
    store_tile,
    tile_lines,
    tile_parts,
    tile_position,
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
        x_ptr += first_row.to(tl.int64) * x_stride
        return tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :]).to(tl.float32)
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
def _store_parts(
    s: tl.tensor,
    t: tl.tensor,
    ptrs: tl.tensor,  # (lines,) into (5, ...) planes: top, others, teacher's top, teacher's others (base 2), inner
    plane: tl.tensor,
    mask: tl.tensor,
    KIND: tl.constexpr,
    AXIS: tl.constexpr,
) -> None:
    """Store the parts of the tile's lines along one axis; see ``distill_parts``."""
    top, others = tile_parts(s, AXIS)
    teacher_top, teacher_others = tile_parts(t, AXIS)
    p = tl.exp2(t - lines(teacher_top, AXIS)) / lines(1.0 + teacher_others, AXIS)
    exists = t != float("-inf")
    if KIND == SOFT:
        inner = tl.sum(tl.where(exists, p * (lines(top, AXIS) - s), 0.0), AXIS) * LN_2
    else:
        q = tl.exp2(s - lines(top, AXIS)) / lines(1.0 + others, AXIS)
        ratio = ((s - lines(top, AXIS)) - (t - lines(teacher_top, AXIS))) * LN_2
        ratio -= lines(log1p(others) - log1p(teacher_others), AXIS)
        if KIND == FORWARD_KL:
            inner = tl.sum(tl.where(exists, divergence_term(p, q, ratio), 0.0), AXIS)
        else:
            inner = tl.sum(tl.where(exists, divergence_term(q, p, -ratio), 0.0), AXIS)
    tl.store(ptrs, top, mask=mask)
    tl.store(ptrs + plane, others, mask=mask)
    tl.store(ptrs + 2 * plane, teacher_top, mask=mask)
    tl.store(ptrs + 3 * plane, teacher_others, mask=mask)
    tl.store(ptrs + 4 * plane, inner, mask=mask)


@triton.jit
def _distill_fwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    teacher_x_ptr: tl.tensor,  # (M, E), or (M, N) logits
    teacher_y_ptr: tl.tensor,  # (N, E)
    scale_ptr: tl.tensor,  # () float32
    teacher_scale_ptr: tl.tensor,  # () float32
    row_part_ptr: tl.tensor,  # (5, tiles_n, stripe), see _store_parts
    col_part_ptr: tl.tensor,  # (5, tiles_m, N)
    row_pos_ptr: tl.tensor,  # (M,) base 2
    col_pos_ptr: tl.tensor,  # (N,) base 2
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
    """Parts of one tile's rows and columns, and pair logits."""
    tiles_m = tl.cdiv(stripe, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    col_start = tile_n * BLOCK_N
    M = first_row + stripe
    rows, cols, _, _ = tile_lines(row_start, col_start, M, N, BLOCK_M, BLOCK_N)
    local = rows - first_row
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
        pairs = tl.where(rows[:, None] + offset == cols[None, :], s, 0.0)
        if ROWS:
            tl.store(row_pos_ptr + rows, tl.sum(pairs, 1), mask=mine)
        if COLS:
            tl.store(col_pos_ptr + cols, tl.sum(pairs, 0), mask=yours)
    exists = (local < stripe)[:, None] & (cols < N)[None, :]
    s = tl.where(exists, s, float("-inf"))
    t = tl.where(exists, t, float("-inf"))
    if ROWS:
        ptrs = row_part_ptr + tile_n.to(tl.int64) * stripe + local
        _store_parts(s, t, ptrs, tiles_n.to(tl.int64) * stripe, local < stripe, KIND, 1)
    if COLS:
        ptrs = col_part_ptr + tile_m.to(tl.int64) * N + cols
        _store_parts(s, t, ptrs, tiles_m.to(tl.int64) * N, cols < N, KIND, 0)


@triton.jit
def _line_gradient(
    s: tl.tensor,
    t: tl.tensor,
    vectors_ptr: tl.tensor,  # (6, size), see distill_parts.gradient_vectors
    near: tl.tensor,
    size: tl.tensor,
    KIND: tl.constexpr,
    AXIS: tl.constexpr,
) -> tl.tensor:
    """Return one direction's share of G; where both softmaxes are 1 their difference is exactly 0."""
    plane = size.to(tl.int64)
    s -= lines(tl.load(vectors_ptr + near), AXIS)
    t -= lines(tl.load(vectors_ptr + plane + near), AXIS)
    w_q = lines(tl.load(vectors_ptr + 3 * plane + near), AXIS)
    w_p = lines(tl.load(vectors_ptr + 4 * plane + near), AXIS)
    if KIND == REVERSE_KL:
        origin = lines(tl.load(vectors_ptr + 2 * plane + near), AXIS)
        return tl.exp2(s) * (w_q + w_p * ((s - t) * LN_2 - origin))
    else:
        return tl.exp2(s) * w_q - tl.exp2(t) * w_p


@triton.jit
def _distill_bwd_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    teacher_x_ptr: tl.tensor,  # (M, E), or (M, N) logits
    teacher_y_ptr: tl.tensor,  # (N, E)
    scale_ptr: tl.tensor,  # () float32
    teacher_scale_ptr: tl.tensor,  # () float32
    row_ptr: tl.tensor,  # (6, M), see distill_parts.gradient_vectors; weights normalised
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
    rows, cols, near_rows, near_cols = tile_lines(row_start, col_start, M, N, BLOCK_M, BLOCK_N)
    s = product_tile(
        x_ptr, y_ptr, row_start, col_start, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    t = _teacher_tile(
        teacher_x_ptr, teacher_y_ptr, row_start, col_start, M, N, E, teacher_x_stride, teacher_y_stride,
        LOGITS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E, PRECISION,
    )  # fmt: skip
    s = s * (tl.load(scale_ptr) * LOG2_E)
    t = t * (tl.load(teacher_scale_ptr) * LOG2_E)
    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ROWS:
        g += _line_gradient(s, t, row_ptr, near_rows, M, KIND, 1)
    if COLS:
        g += _line_gradient(s, t, col_ptr, near_cols, N, KIND, 0)
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
    options = launch_options("pair", rows, columns, tile, widths[0])
    del options["MODE"]
    return options | {"KIND": KINDS.index(kind), "LOGITS": logits, "EVEN_E": widths[1] % tile.k == 0}


def forward(
    x: Tensor, y: Tensor, scale: Tensor, teacher: TeacherParts, kind: str, offset: int, rows: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    """Compute the parts of :func:`ftfast.kernels.distill_pairs.distill_parts`, one launch per row stripe.

    Returns:
        (6, M) parts of the rows and (6, N) of the columns, float64; size 0 if not asked for.
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    teacher_x, teacher_y, teacher_scale, logits = _teacher_arguments(teacher, x, y)
    table = tiles(x.dtype, capability_of(x.device))
    tile = table.paired if kind == "soft_cross_entropy" else table.divergence
    m, n = len(x), len(y)
    stripe, tiles_n = stripe_rows(m, n, tile), triton.cdiv(n, tile.n)
    row, col = nothing_yet(m if rows else 0, x.device), nothing_yet(n if columns else 0, x.device)
    positive = [torch.zeros(side.shape[1], device=x.device) for side in (row, col)]
    for first in range(0, m, stripe):
        count = min(stripe, m - first)
        row_part = torch.empty((5, tiles_n, count if rows else 0), device=x.device)
        col_part = torch.empty((5, triton.cdiv(count, tile.m), n if columns else 0), device=x.device)
        _distill_fwd_kernel[(triton.cdiv(count, tile.m) * tiles_n,)](
            x,
            y,
            teacher_x,
            teacher_y,
            scale.to(torch.float32),
            teacher_scale,
            row_part,
            col_part,
            *positive,
            first,
            count,
            n,
            x.shape[1],
            teacher_x.shape[1],
            *(features.stride(0) for features in (x, y, teacher_x, teacher_y)),
            offset,
            **_options(kind, logits, rows, columns, tile, (x.shape[1], teacher_x.shape[1])),
        )
        if rows:
            row[:, first : first + count] = merge_parts(_natural(row_part), kind)
        if columns:
            col = merge_parts(torch.cat([col[:, None], _natural(col_part)], 1), kind)
    for side, pairs in zip((row, col), positive, strict=True):
        side[POSITIVE] = pairs.double() * LN_2.value
    return row, col


def _natural(part: Tensor) -> Tensor:
    """Turn (5, pieces, size) parts from the kernel into (6, pieces, size) parts in natural units."""
    top, others, teacher_top, teacher_others, inner = part.double()
    parts = (top * LN_2.value, others.log1p(), teacher_top * LN_2.value, teacher_others.log1p(), inner)
    return torch.stack([*parts, torch.zeros_like(inner)])


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
    widths, wide_scale = (x.shape[1], teacher_x.shape[1]), scale.to(torch.float32)
    options = _options(kind, logits, row[0] is not None, col[0] is not None, tile, widths)
    packed = []
    for side, size in ((row, x.shape[0]), (col, y.shape[0])):
        given = [v for v in side if v is not None]
        packed.append(torch.stack(given).float() if given else torch.zeros((6, size), device=x.device))
    norm: Tensor | float = 1.0
    if x.dtype == torch.float16:
        # Reverse KL multiplies its weight by 1 + S - P - inner, which may exceed one; leave room for 16.
        room = HALF_HEADROOM / 16 if kind == "reverse_kl" else HALF_HEADROOM
        norm = room / power_of_two(torch.stack([v[3:].abs().max() for v in packed]).max())
        packed = [torch.cat([v[:3], v[3:] * norm]) for v in packed]

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
            *(features.stride(0) for features in (x, y, teacher_x, teacher_y)),
            workspace.stride(0),
            offset,
            **options,
        )

    return superblock_gradients(x, y, wide_scale, norm, need, tile, launch)

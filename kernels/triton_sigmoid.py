"""Triton backend of the pairwise sigmoid loss: one pass makes the loss and the superblocks of G for the two products.

Legend: M rows, N columns, D width, superblock (R, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .relations import Relation, dense_ids
from .triton_products import superblock_gradients
from .triton_softmax import HALF_HEADROOM, rows_contiguous
from .triton_tiles import (
    GROUP,
    LN_2,
    LOG2_E,
    NONE,
    PAIR,
    needs_mask,
    positive_mask,
    product_tile,
    store_tile,
    tile_lines,
    tile_position,
)
from .tuning import Tile, capability_of, tiles

STRIPE_TILES = 64  # rows of tiles per launch when no gradient is wanted


@triton.jit
def _sigmoid_kernel(
    x_ptr: tl.tensor,  # (M, D)
    y_ptr: tl.tensor,  # (N, D)
    scale_ptr: tl.tensor,  # () float32
    bias_ptr: tl.tensor,  # () float32
    row_ids_ptr: tl.tensor,  # (M,) int32
    col_ids_ptr: tl.tensor,  # (N,) int32
    g_ptr: tl.tensor,  # (R, C) superblock
    loss_ptr: tl.tensor,  # (programs,) float32
    bias_grad_ptr: tl.tensor,  # (programs,) float32
    norm: tl.tensor,
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
    GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Loss of one tile: Σ softplus(∓(S + bias)); G = σ(S + bias) for negatives, -σ(-S - bias) for positives."""
    tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    col_start = first_col + tile_n * BLOCK_N
    rows, cols, near_rows, near_cols = tile_lines(row_start, col_start, M, N, BLOCK_M, BLOCK_N)
    dots = product_tile(
        x_ptr, y_ptr, row_start, col_start, M, N, D, x_stride, y_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    s = dots * (tl.load(scale_ptr) * LOG2_E) + tl.load(bias_ptr) * LOG2_E
    row_ids = rows
    col_ids = cols
    if MODE == GROUP:
        row_ids = tl.load(row_ids_ptr + near_rows)
        col_ids = tl.load(col_ids_ptr + near_cols)
    masked = needs_mask(row_start, col_start, M, N, offset, MODE, BLOCK_M, BLOCK_N)
    if masked:
        if MODE != NONE:
            s = tl.where(positive_mask(rows, cols, row_ids, col_ids, offset, MODE), -s, s)
        s = tl.where((rows < M)[:, None] & (cols < N)[None, :], s, float("-inf"))
    # softplus(s) = max(s, 0) + log(1 + exp(-|s|)), with log(1 + e) = e for small e, where 1 + e would lose it
    e = tl.exp2(-tl.abs(s))
    log_term = tl.where(e < 2e-4, e * (1.0 - 0.5 * e), tl.log2(1.0 + e) * LN_2)
    loss = tl.maximum(s, 0.0) * LN_2 + log_term
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))
    if GRADIENT:
        g = tl.where(s >= 0, norm, e * norm) / (1.0 + e)
        if masked and MODE != NONE:
            g = tl.where(positive_mask(rows, cols, row_ids, col_ids, offset, MODE), -g, g)
        tl.store(bias_grad_ptr + tl.program_id(0), tl.sum(tl.sum(g, 1), 0))
        store_tile(g_ptr, g, tile_m, tile_n, g_stride, BLOCK_M, BLOCK_N)


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, relation: Relation | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum the sigmoid loss over all pairs, with its gradients; see :func:`ftfast.kernels.torch_sigmoid.forward`.

    Returns:
        Loss (0-d float32), dX, dY (dtypes of the inputs; size 0 where not needed), d scale, d bias (0-d float32).
    """
    x, y = rows_contiguous(x), rows_contiguous(y)
    tile = tiles(x.dtype, capability_of(x.device)).heavy
    scalars = (scale.to(torch.float32), bias.to(torch.float32))
    ids = (None if relation is None else dense_ids(relation)) or (x, y)  # without ids the pointers are not read
    norm = HALF_HEADROOM if x.dtype == torch.float16 else 1.0
    losses: list[Tensor] = []
    bias_grads: list[Tensor] = []

    def launch(workspace: Tensor, rows: slice, cols: slice, grid: tuple[int, int]) -> None:
        """Write the gradient weights of one superblock and keep its loss and bias gradient."""
        parts = torch.empty((2, grid[0] * grid[1]), dtype=torch.float32, device=x.device)
        _launch_sigmoid(x, y, scalars, relation, ids, workspace, parts, norm, (rows, cols), grid, tile, any(need))
        losses.append(parts[0].sum(dtype=torch.float64))
        if any(need):
            bias_grads.append(parts[1].sum(dtype=torch.float64) / norm)

    empty = torch.zeros((), dtype=torch.float32, device=x.device)
    if not any(need):
        step = STRIPE_TILES * tile.m
        for first in range(0, x.shape[0], step):
            rows = slice(first, min(first + step, x.shape[0]))
            grid = (triton.cdiv(rows.stop - first, tile.m), triton.cdiv(y.shape[0], tile.n))
            launch(x, rows, slice(0, y.shape[0]), grid)
        return torch.stack(losses).sum().float(), x.new_empty(0), y.new_empty(0), empty, empty.clone()
    used = (need[0] or not need[1], need[1])
    grad_x, grad_y, grad_scale = superblock_gradients(x, y, scalars[0], norm, used, tile, launch)
    loss, grad_bias = torch.stack(losses).sum().float(), torch.stack(bias_grads).sum().float()
    return loss, grad_x if need[0] else x.new_empty(0), grad_y, grad_scale, grad_bias


def _launch_sigmoid(
    x: Tensor,
    y: Tensor,
    scalars: tuple[Tensor, Tensor],
    relation: Relation | None,
    ids: tuple[Tensor, Tensor],
    workspace: Tensor,
    parts: Tensor,
    norm: float,
    at: tuple[slice, slice],
    grid: tuple[int, int],
    tile: Tile,
    gradient: bool,
) -> None:
    mode = NONE.value if relation is None else PAIR.value if relation.mode == "pair" else GROUP.value
    _sigmoid_kernel[(grid[0] * grid[1],)](
        x,
        y,
        *scalars,
        *ids,
        workspace,
        parts[0],
        parts[1],
        float(norm),
        at[0].start,
        at[1].start,
        *grid,
        # Without a superblock the stripe's end bounds the rows, so that no pair is counted twice.
        x.shape[0] if gradient else at[0].stop,
        y.shape[0],
        x.shape[1],
        x.stride(0),
        y.stride(0),
        workspace.stride(0),
        0 if relation is None else relation.offset,
        MODE=mode,
        GRADIENT=gradient,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=tile.group,
        EVEN_K=x.shape[1] % tile.k == 0,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

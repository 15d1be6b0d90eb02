"""The two products of every backward pass, dX += G Y and dY += Gᵀ X, over one superblock of G, and their finish.

G is a workspace that stays small enough to be re-read from cache; sums over superblocks live in float32 buffers and are
added in a fixed order, so results repeat bit for bit. Legend: M rows, N columns, D width, superblock (R, C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Tile, capability_of, superblock, tiles


@triton.jit
def _product_kernel(
    g_ptr: tl.tensor,  # A[o, i] at o * g_stride_out + i * g_stride_in: G or its transpose
    y_ptr: tl.tensor,  # (K, D) rows that are summed over
    out_ptr: tl.tensor,  # (OUT, D) float32
    OUT: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    g_stride_out: tl.tensor,
    g_stride_in: tl.tensor,
    y_stride: tl.tensor,
    out_stride: tl.tensor,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One (BLOCK_M, BLOCK_N) tile of out (+)= A @ Y; A is 0 beyond OUT and K, so only Y's reads are clamped."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(D, BLOCK_N)
    rows = (pid // tiles_d) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = (pid % tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TRANSPOSED:
        g_at = rows[:, None] + inner[None, :] * g_stride_in
    else:
        g_at = rows[:, None] * g_stride_out + inner[None, :]
    for start in range(0, K, BLOCK_K):
        g = tl.load(g_ptr + g_at)
        y_ptrs = y_ptr + (tl.minimum(inner, K - 1 - start)[:, None] * y_stride + width[None, :])
        if EVEN_D:
            y = tl.load(y_ptrs)
        else:
            y = tl.load(y_ptrs, mask=(width < D)[None, :], other=0.0)
        total = tl.dot(g, y, total, input_precision=PRECISION)
        y_ptr += BLOCK_K * y_stride
        if TRANSPOSED:
            g_ptr += BLOCK_K * g_stride_in
        else:
            g_ptr += BLOCK_K
    out_ptr += (pid // tiles_d).to(tl.int64) * BLOCK_M * out_stride
    out_ptrs = out_ptr + (tl.arange(0, BLOCK_M)[:, None] * out_stride + width[None, :])
    inside = (rows < OUT)[:, None] & (width < D)[None, :]
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, total, mask=inside)


@triton.jit
def _finish_kernel(
    sum_ptr: tl.tensor,  # (M, D) float32
    x_ptr: tl.tensor,  # (M, D)
    factor_ptr: tl.tensor,  # () float32
    out_ptr: tl.tensor,  # (M, D)
    dot_ptr: tl.tensor,  # (programs,) float32
    M: tl.tensor,
    D: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Out = factor · sum in the feature dtype; dot = this program's share of <sum, X>."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr)
    share = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        width = start + tl.arange(0, BLOCK_D)
        inside = (rows < M)[:, None] & (width < D)[None, :]
        at = rows[:, None].to(tl.int64) * D + width[None, :]
        total = tl.load(sum_ptr + at, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + width[None, :], mask=inside, other=0.0)
        share += total * x.to(tl.float32)
        tl.store(out_ptr + at, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(dot_ptr + tl.program_id(0), tl.sum(tl.sum(share, 1), 0))


def add_product(workspace: Tensor, features: Tensor, total: Tensor, transposed: bool, first: bool, tile: Tile) -> None:
    """Launch total (+)= G @ features, or Gᵀ @ features.

    Args:
        workspace: (R', C') superblock of G, zero outside the pairs that exist, dimensions multiples of the tiles.
        features: (K, D) rows that are summed over.
        total: (OUT, D) float32 slice of the running sum.
        transposed: Sum over the rows of G instead of its columns.
        first: Overwrite ``total`` instead of adding to it.
        tile: Blocks.
    """
    outputs, width = total.shape
    grid = (triton.cdiv(outputs, tile.m) * triton.cdiv(width, tile.n),)
    strides = (1, workspace.stride(0)) if transposed else (workspace.stride(0), 1)
    _product_kernel[grid](
        workspace,
        features,
        total,
        outputs,
        features.shape[0],
        width,
        *strides,
        features.stride(0),
        total.stride(0),
        TRANSPOSED=transposed,
        ACCUMULATE=not first,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        EVEN_D=width % tile.n == 0,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def superblock_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    norm: Tensor | float,
    need: tuple[bool, bool],
    similarity: Tile,
    launch: Callable[[Tensor, slice, slice, tuple[int, int]], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Make G superblock by superblock and turn it into dX = scale · G Y, dY = scale · Gᵀ X and d scale = <G Y, X>.

    Args:
        x: (M, D).
        y: (N, D).
        scale: 0-d float32.
        norm: What the workspace's G was multiplied by.
        need: Whether dX and dY are wanted; at least one for d scale.
        similarity: Tile of the kernel that writes G.
        launch: ``launch(workspace, rows, columns, grid)`` writes ``grid`` tiles of G for the given rows and columns.

    Returns:
        dX, dY in the dtypes of the inputs (size 0 where not needed), d scale (0-d float32).
    """
    (m, width), n = x.shape, y.shape[0]
    capability = capability_of(x.device)
    product = tiles(x.dtype, capability).product
    step = max(similarity.m, similarity.n, product.m, product.k)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if capability else 1
    block_rows, block_cols = superblock(m, n, width, x.element_size(), product, processors)
    workspace = torch.empty((block_rows, block_cols), dtype=x.dtype, device=x.device)
    total_x = torch.empty((m, width), dtype=torch.float32, device=x.device) if need[0] else None
    total_y = torch.empty((n, width), dtype=torch.float32, device=x.device) if need[1] else None
    for r in range(0, m, block_rows):
        for c in range(0, n, block_cols):
            rows, cols = slice(r, min(r + block_rows, m)), slice(c, min(c + block_cols, n))
            padded = [triton.cdiv(part.stop - part.start, step) * step for part in (rows, cols)]
            launch(workspace, rows, cols, (padded[0] // similarity.m, padded[1] // similarity.n))
            if total_x is not None:
                add_product(workspace, y[cols], total_x[rows], False, c == 0, product)
            if total_y is not None:
                add_product(workspace, x[rows], total_y[cols], True, r == 0, product)
    factor = (scale / norm).reshape(())
    grad_x, grad_y, dot = x.new_empty(0), y.new_empty(0), torch.zeros((), dtype=torch.float32, device=x.device)
    if total_y is not None:
        grad_y, dot = finish(total_y, y, factor)
    if total_x is not None:
        grad_x, dot = finish(total_x, x, factor)
    return grad_x, grad_y, dot / norm


def finish(total: Tensor, features: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor · total in the dtype of ``features`` and <total, features> in float32.

    Args:
        total: (M, D) float32 sums.
        features: (M, D).
        factor: 0-d float32.

    Returns:
        (M, D) gradient and a 0-d inner product, summed in a fixed order.
    """
    rows, width = total.shape
    block_rows = 4
    programs = triton.cdiv(rows, block_rows)
    out = torch.empty((rows, width), dtype=features.dtype, device=features.device)
    dots = torch.empty(programs, dtype=torch.float32, device=features.device)
    _finish_kernel[(programs,)](
        total, features, factor, out, dots, rows, width, features.stride(0), ROWS=block_rows, BLOCK_D=256, num_warps=4
    )
    return out, dots.sum(dtype=torch.float64).float()  # terms of both signs: their sum must not round

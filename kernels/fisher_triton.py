"""Triton kernels of the Fisher: accumulation over lists of tensors, and the per-sample Fisher of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ftfast.kernels.dispatch import interpreting
from ftfast.kernels.weight_triton import (
    BLOCK,
    CHUNK,
    DTYPES,
    NUM_WARPS,
    Row,
    _device_of,
    _dtype,
    _load,
    _pointer,
    _store,
    _tables,
)
from torch import Tensor

__all__ = ["accumulate", "per_sample_fisher", "per_sample_fisher_kernel", "tile_of"]


@triton.jit
def square_sum_kernel(
    table: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_numbers: tl.tensor,
    partials: tl.tensor,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``partials[p] = sum g^2`` over one chunk."""
    program = tl.program_id(0)
    begin = tl.load(chunk_numbers + program).to(tl.int64) * CHUNK
    table += tl.load(chunk_rows + program).to(tl.int64) * 8
    left = tl.minimum(tl.load(table + 6) - begin, CHUNK)
    whole = left // BLOCK * BLOCK
    grad = _pointer(table, 1, GRAD, ALIGNED) + begin
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, whole, BLOCK):
        value = tl.load(grad + step + lanes).to(tl.float32)
        total += value * value
    tail = _load(grad + whole + lanes, whole + lanes < left, True)
    tl.store(partials + program, tl.sum(total + tail * tail, 0))


@triton.jit
def accumulate_fisher_kernel(
    table: tl.tensor,
    scales: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_numbers: tl.tensor,
    decay: tl.tensor,
    THETA: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``F <- decay F + scale_row g^2`` on one chunk; F sits in column 0, g in column 1 of the table."""
    program = tl.program_id(0)
    row = tl.load(chunk_rows + program).to(tl.int64)
    begin = tl.load(chunk_numbers + program).to(tl.int64) * CHUNK
    table += row * 8
    left = tl.minimum(tl.load(table + 6) - begin, CHUNK)
    whole = left // BLOCK * BLOCK
    scale = tl.load(scales + row)
    fisher = _pointer(table, 0, THETA, ALIGNED) + begin
    grad = _pointer(table, 1, GRAD, ALIGNED) + begin
    lanes = tl.arange(0, BLOCK)
    for step in range(0, whole, BLOCK):
        index = step + lanes
        value = tl.load(grad + index).to(tl.float32)
        _store(
            fisher + index, decay * tl.load(fisher + index).to(tl.float32) + scale * value * value, index < left, False
        )
    index = whole + lanes
    mask = index < left
    value = _load(grad + index, mask, True)
    _store(fisher + index, decay * _load(fisher + index, mask, True) + scale * value * value, mask, True)


@triton.jit
def per_sample_fisher_kernel(
    fisher: tl.tensor,
    inputs: tl.tensor,
    grads: tl.tensor,
    samples: tl.tensor,
    length: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    fisher_stride: tl.tensor,
    input_sample: tl.tensor,
    input_step: tl.tensor,
    grad_sample: tl.tensor,
    grad_step: tl.tensor,
    weight: tl.tensor,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """``F[o, i] += weight sum_n (sum_t G[n, t, o] A[n, t, i])^2`` for one tile of F.

    Each sample's product is one register tile, squared and added to a second one: no per-sample gradient is stored.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for n in range(0, samples):
        product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        grad = grads + tl.cast(n, tl.int64) * grad_sample + o[:, None]
        source = inputs + tl.cast(n, tl.int64) * input_sample + i[None, :]
        for base in range(0, length, BLOCK_T):
            step = base + t
            g = tl.load(grad + step[None, :] * grad_step, (step[None, :] < length) & (o[:, None] < rows), 0.0)
            a = tl.load(source + step[:, None] * input_step, (step[:, None] < length) & (i[None, :] < columns), 0.0)
            if WIDEN:
                g, a = g.to(tl.float32), a.to(tl.float32)
            product = tl.dot(g, a, product, input_precision=PRECISION)
        squares += product * product
    to = fisher + o[:, None].to(tl.int64) * fisher_stride + i[None, :]
    mask = (o[:, None] < rows) & (i[None, :] < columns)
    tl.store(to, tl.load(to, mask, 0.0) + weight * squares, mask)


def tile_of(length: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of :func:`per_sample_fisher_kernel`: sequence steps per dot chosen so that little of it is padding.

    Args:
        length: Sequence length T.
        dtype: Of activations and gradients.

    Returns:
        Keyword arguments of the launch.
    """
    if dtype == torch.float32:  # full-precision dots run on the ordinary units and need the registers themselves
        return {"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_T": 16, "num_warps": 8, "num_stages": 2}
    block_t = next((size for size in (64, 32) if -(-length // size) * size <= 1.1 * length), 16)
    return {"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": block_t, "num_warps": 8, "num_stages": 3}


def per_sample_fisher(fisher: Tensor, inputs: Tensor, grads: Tensor, weight: float) -> bool:
    """``F += weight sum_n (G_n^T A_n)^2``; float32 inputs are multiplied in full precision.

    Args:
        fisher: (out, in) float32.
        inputs: (N, T, in).
        grads: (N, T, out), same dtype.
        weight: Factor on the squares.

    Returns:
        False if the kernel cannot take these tensors; nothing was changed then.
    """
    usable = fisher.dtype == torch.float32 and inputs.dtype == grads.dtype and inputs.dtype in DTYPES
    on_device = fisher.device.type == "cuda" or interpreting()
    if not usable or not on_device or any(t.stride(-1) != 1 for t in (fisher, inputs, grads)):
        return False
    samples, length, columns = inputs.shape
    rows = grads.shape[-1]
    launch = tile_of(length, inputs.dtype)
    grid = (triton.cdiv(rows, launch["BLOCK_O"]), triton.cdiv(columns, launch["BLOCK_I"]))
    per_sample_fisher_kernel[grid](
        fisher, inputs, grads, samples, length, rows, columns, fisher.stride(0), inputs.stride(0), inputs.stride(1),
        grads.stride(0), grads.stride(1), weight, WIDEN=interpreting(),
        PRECISION="ieee" if inputs.dtype == torch.float32 else "tf32", **launch,
    )  # fmt: skip
    return True


def accumulate(rows: Sequence[Row], decay: float, weight: float, normalize: bool) -> None:
    """``F <- decay F + weight g^2`` over rows (F, g, ...) that share one signature.

    Args:
        rows: At least one row.
        decay: Factor on F.
        weight: Factor on the squares.
        normalize: Divide each row's squares by their mean.
    """
    device = _device_of(rows)
    table, chunk_rows, chunks, aligned = _tables(rows, device)
    if len(chunks) == 0:
        return
    scales = torch.full((len(rows),), weight, dtype=torch.float32, device=device)
    grid, common = (len(chunks),), {"ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    if normalize:
        partials = torch.empty(len(chunks), dtype=torch.float32, device=device)
        square_sum_kernel[grid](table, chunk_rows, chunks, partials, GRAD=_dtype(rows[0], 1), **common)
        # A sum per row in a fixed order: chunks of one row are neighbours.
        sums = torch.segment_reduce(partials, "sum", lengths=torch.bincount(chunk_rows.long(), minlength=len(rows)))
        scales = torch.where(sums > 0, weight * table[:, 6] / sums, torch.zeros_like(sums))
    accumulate_fisher_kernel[grid](
        table, scales, chunk_rows, chunks, decay, THETA=_dtype(rows[0], 0), GRAD=_dtype(rows[0], 1), **common
    )

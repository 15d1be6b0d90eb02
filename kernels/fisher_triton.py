"""Triton kernel of the exact per-sample Fisher of a linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ftfast.kernels.dispatch import interpreting
from torch import Tensor

__all__ = ["per_sample_fisher", "per_sample_fisher_kernel", "tile_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

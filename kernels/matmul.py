"""Matrix products of the blockwise PyTorch backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_PIECE = 128  # terms added up in a row: oneDNN adds all of them in order, and over 512 its error is twice that of MKL


@functools.lru_cache(maxsize=1)
def _has_onednn_linear() -> bool:
    """Try oneDNN's float32 linear once and compare it with ``torch.mm``.

    PyTorch sends CPU float32 products to MKL, which runs at about half of oneDNN's speed on AMD processors. The
    operator is what torch.compile emits for CPU linears; it is not documented, hence the trial and the fallback.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        a, b = torch.ones(3, 5), torch.arange(35.0).reshape(7, 5)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), a @ b.T)
    except (AttributeError, RuntimeError):
        return False


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T.

    Args:
        a: (M, K), any strides.
        b: (N, K), any strides, same dtype.

    Returns:
        (M, N) in the same dtype; float32 accumulation, full float32 products on CPU.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_onednn_linear():
        return a @ b.T
    out: Tensor | None = None
    for start in range(0, a.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        product = torch.ops.mkldnn._linear_pointwise(_dense(a[:, piece]), _dense(b[:, piece]), None, "none", [], "")
        out = product if out is None else out.add_(product)
    return a @ b.T if out is None else out


def _dense(matrix: Tensor) -> Tensor:
    """Copy a matrix that is neither contiguous nor the transpose of one; oneDNN is very slow on such strides."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()

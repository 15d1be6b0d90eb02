"""Fisher accumulation over lists of tensors, and the exact per-sample Fisher of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ftfast.kernels import weight_cpu
from ftfast.kernels.anchor_ops import split_rows
from ftfast.kernels.dispatch import has_triton
from torch import Tensor

from ftfast.errors import ConfigError, ShapeError

__all__ = ["accumulate_fisher_", "per_sample_fisher_"]


def accumulate_fisher_(
    fishers: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    decay: float = 1.0,
    weight: float = 1.0,
    normalize: bool = False,
    backend: str = "auto",
) -> None:
    """``F <- decay F + weight g^2`` for a list of tensors, in place.

    Args:
        fishers: Running importances F.
        grads: Gradients g, same shapes.
        decay: Factor on the old values.
        weight: Factor on the new squares.
        normalize: Divide each tensor's squares by their mean first (mean importance one; GIFT's adaptive weight
            consolidation). A tensor whose gradient is all zero adds nothing.
        backend: "auto", "cpp", "triton" or "torch".

    Raises:
        ShapeError: Lengths or shapes differ.
        ConfigError: The backend cannot take these tensors.
    """
    if len(fishers) != len(grads):
        raise ShapeError(f"{len(fishers)} importance tensors but {len(grads)} gradients; give one per tensor")
    for index, (fisher, grad) in enumerate(zip(fishers, grads, strict=True)):
        if fisher.shape != grad.shape:
            raise ShapeError(
                f"tensor {index}: importance is {tuple(fisher.shape)} but its gradient is {tuple(grad.shape)}"
            )
    rows = [(f, g, None, None, None, None) for f, g in zip(fishers, grads, strict=True) if f.numel() > 0]
    with torch.no_grad():
        for name, picked in split_rows(rows, backend).items():
            some = [rows[i] for i in picked]
            if name[0] == "cpp":
                weight_cpu.accumulate(some, decay, weight, normalize)
            elif name[0] == "triton":
                from ftfast.kernels import fisher_triton

                fisher_triton.accumulate(some, decay, weight, normalize)
            else:
                for row in some:
                    _accumulate_torch(row[0], row[1], decay, weight, normalize)


def _accumulate_torch(fisher: Tensor, grad: Tensor, decay: float, weight: float, normalize: bool) -> None:
    """The update of one tensor with PyTorch operations."""
    dtype = torch.promote_types(fisher.dtype, torch.float32)
    square = grad.to(dtype).square()
    scale: Tensor | float = weight
    if normalize:
        mean = square.mean()
        scale = torch.where(mean > 0, weight / mean, torch.zeros_like(mean))
    fisher.copy_(fisher.to(dtype) * decay + square * scale)


def per_sample_fisher_(
    fisher: Tensor, activations: Tensor, output_grads: Tensor, *, weight: float = 1.0, backend: str = "auto"
) -> None:
    """``F[o, i] += w sum_n (sum_t G[n, t, o] A[n, t, i])^2``, in place, without storing per-sample gradients.

    Args:
        fisher: (out, in) running importance.
        activations: (N, T, in) layer inputs; (N, in) is read as T = 1.
        output_grads: (N, T, out) gradients at the layer output; (N, out) is read as T = 1.
        weight: Factor w.
        backend: "auto", "cpp", "triton" or "torch".

    Memory: a packed copy of at most 2,048 sequence steps on the C++ path, nothing on the Triton path, one (out, in)
    product on the PyTorch path. Deterministic on all three.

    Raises:
        ShapeError: The shapes do not fit together.
        ConfigError: The backend cannot take these tensors.
    """
    if activations.dim() == 2:
        activations, output_grads = activations[:, None], output_grads[:, None]
    fits = activations.dim() == 3 and output_grads.dim() == 3 and activations.shape[:2] == output_grads.shape[:2]
    if not fits or fisher.shape != (output_grads.shape[-1], activations.shape[-1]):
        raise ShapeError(
            f"per-sample Fisher needs F (out, in), A (N, T, in), G (N, T, out); got {tuple(fisher.shape)}, "
            f"{tuple(activations.shape)}, {tuple(output_grads.shape)}"
        )
    with torch.no_grad():
        if backend == "auto" and activations.shape[1] == 1:  # one plain product of squares
            squares = output_grads[:, 0].float().square().t() @ activations[:, 0].float().square()
            fisher.add_(squares.to(fisher.dtype), alpha=weight)
            return
        if backend in ("auto", "cpp") and weight_cpu.per_sample_fisher(fisher, activations, output_grads, weight):
            return
        if backend == "triton" or (backend == "auto" and fisher.is_cuda and has_triton()):
            from ftfast.kernels import fisher_triton

            if fisher_triton.per_sample_fisher(fisher, activations, output_grads, weight):
                return
        if backend not in ("auto", "torch"):
            raise ConfigError(
                f"backend '{backend}' cannot take F {fisher.dtype} on {fisher.device} with A {activations.dtype}, "
                f"strides {activations.stride()}; use backend='auto'"
            )
        wide = torch.promote_types(fisher.dtype, torch.float32)
        for sample, grad in zip(activations, output_grads, strict=True):
            product = grad.to(wide).t() @ sample.to(wide)
            fisher.add_(product.square_().to(fisher.dtype), alpha=weight)

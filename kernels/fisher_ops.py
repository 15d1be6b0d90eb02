"""Fisher accumulation over lists of tensors, and the exact per-sample Fisher of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ftfast.errors import ShapeError

__all__ = ["accumulate_fisher_", "per_sample_fisher_"]


def accumulate_fisher_(
    fishers: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    decay: float = 1.0,
    weight: float = 1.0,
    normalize: bool = False,
) -> None:
    """``F <- decay F + weight g^2`` for a list of tensors, in place.

    Args:
        fishers: Running importances F.
        grads: Gradients g, same shapes.
        decay: Factor on the old values.
        weight: Factor on the new squares.
        normalize: Divide each tensor's squares by their mean first (mean importance one; GIFT's adaptive weight
            consolidation). A tensor whose gradient is all zero adds nothing.

    Raises:
        ShapeError: Lengths or shapes differ.
    """
    if len(fishers) != len(grads):
        raise ShapeError(f"{len(fishers)} importance tensors but {len(grads)} gradients; give one per tensor")
    with torch.no_grad():
        for index, (fisher, grad) in enumerate(zip(fishers, grads, strict=True)):
            if fisher.shape != grad.shape:
                raise ShapeError(
                    f"tensor {index}: importance is {tuple(fisher.shape)} but its gradient is {tuple(grad.shape)}"
                )
            if fisher.numel() == 0:
                continue
            dtype = torch.promote_types(fisher.dtype, torch.float32)
            square = grad.to(dtype).square()
            scale: Tensor | float = weight
            if normalize:
                mean = square.mean()
                scale = torch.where(mean > 0, weight / mean, torch.zeros_like(mean))
            fisher.copy_(fisher.to(dtype) * decay + square * scale)


def per_sample_fisher_(fisher: Tensor, activations: Tensor, output_grads: Tensor, *, weight: float = 1.0) -> None:
    """``F[o, i] += w sum_n (sum_t G[n, t, o] A[n, t, i])^2``, in place, without storing per-sample gradients.

    Args:
        fisher: (out, in) running importance.
        activations: (N, T, in) layer inputs; (N, in) is read as T = 1.
        output_grads: (N, T, out) gradients at the layer output; (N, out) is read as T = 1.
        weight: Factor w.

    Raises:
        ShapeError: The shapes do not fit together.
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
        if activations.shape[1] == 1:
            squares = output_grads[:, 0].float().square().t() @ activations[:, 0].float().square()
            fisher.add_(squares.to(fisher.dtype), alpha=weight)
            return
        for sample, grad in zip(activations.float(), output_grads.float(), strict=True):
            product = grad.t() @ sample
            fisher.addcmul_(product, product, value=weight)

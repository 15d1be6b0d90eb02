"""Dense, unfused formulas of the weight-space operations: the oracle of the tests and the last fallback.

One tensor at a time, in the dtype of its inputs, with no attention to memory. Everything here is written from the
equations and shares no code with the fused versions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["accumulate_fisher", "adamw_anchored", "anchor_penalty", "per_sample_fisher"]


def anchor_penalty(param: Tensor, start: Tensor, precision: Tensor | None, coefficient: float) -> tuple[Tensor, Tensor]:
    """Quadratic penalty of one tensor and its gradient.

    ``penalty = c sum_i F_i (theta_i - theta*_i)^2`` and ``gradient = 2 c F (theta - theta*)``.

    Args:
        param: Weights theta, any shape.
        start: Anchor theta*, same shape.
        precision: Elementwise importance F, same shape; None means one everywhere.
        coefficient: The scalar c.

    Returns:
        The 0-d penalty and the gradient, shaped like ``param``.
    """
    delta = param - start
    weighted = delta if precision is None else precision * delta
    return coefficient * (weighted * delta).sum(), 2.0 * coefficient * weighted


def accumulate_fisher(fisher: Tensor, grad: Tensor, *, decay: float, weight: float, normalize: bool) -> Tensor:
    """``F <- decay F + weight g^2``, with ``g^2`` divided by its mean over the tensor when ``normalize`` is set.

    Args:
        fisher: Running importance F.
        grad: Gradient g, same shape.
        decay: Factor on the old value.
        weight: Factor on the new square.
        normalize: Divide the square by its mean first, so that each tensor's mean importance is one
            (GIFT, CVPR 2025, adaptive weight consolidation).

    Returns:
        The new importance.
    """
    square = grad * grad
    if normalize and square.numel() > 0:
        mean = square.mean()
        square = square / mean if float(mean) > 0.0 else torch.zeros_like(square)
    return decay * fisher + weight * square


def per_sample_fisher(fisher: Tensor, activations: Tensor, output_grads: Tensor, *, weight: float) -> Tensor:
    """``F[o, i] + w sum_n (sum_t G[n, t, o] A[n, t, i])^2``: exact diagonal Fisher of a linear layer.

    Args:
        fisher: (out, in) running importance.
        activations: (N, T, in) layer inputs A.
        output_grads: (N, T, out) gradients G of each sample's loss at the layer output.
        weight: Factor w on the new squares.

    Returns:
        The new importance.
    """
    per_sample = torch.einsum("nto,nti->noi", output_grads, activations)
    return fisher + weight * (per_sample * per_sample).sum(0)


def adamw_anchored(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    anchor: tuple[Tensor, Tensor | None, float] | None,
    hyper: dict[str, float],
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One AdamW step (Loshchilov and Hutter, 2019) with a quadratic anchor, as separate formulas.

    Args:
        param: Weights before the step.
        grad: Gradient of the data loss.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        anchor: (theta*, F or None, c), or None for plain AdamW.
        hyper: lr, beta1, beta2, eps, weight_decay and step (counted from 1).
        mode: "coupled" adds the anchor's gradient to ``grad``; "decoupled" subtracts lr times it from the weights;
            "proximal" applies ``theta <- (theta + eta theta*) / (1 + eta)`` with ``eta = 2 lr c F`` after the step.

    Returns:
        New weights, first moment, second moment, and the 0-d penalty at the old weights.
    """
    lr, beta1, beta2, step = hyper["lr"], hyper["beta1"], hyper["beta2"], hyper["step"]
    penalty, pull = torch.zeros((), dtype=param.dtype), torch.zeros_like(param)
    if anchor is not None:
        penalty, pull = anchor_penalty(param, *anchor)
    if mode == "coupled":
        grad = grad + pull
    new_avg = beta1 * exp_avg + (1 - beta1) * grad
    new_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    denominator = new_sq.sqrt() / math.sqrt(1 - beta2**step) + hyper["eps"]
    new_param = param * (1 - lr * hyper["weight_decay"]) - lr / (1 - beta1**step) * new_avg / denominator
    if mode == "decoupled":
        new_param = new_param - lr * pull
    if mode == "proximal" and anchor is not None:
        start, precision, coefficient = anchor
        eta = 2.0 * lr * coefficient * (torch.ones_like(param) if precision is None else precision)
        new_param = (new_param + eta * start) / (1 + eta)
    return new_param, new_avg, new_sq, penalty

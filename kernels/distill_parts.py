"""Partial statistics of distillation, and how disjoint pieces of a row merge without losing small divergences.

A piece of a row (a block, a tile, a visitor of a ring) is described by five numbers, in natural units:

    top, tail             log Σ exp S = top + tail, where top is the largest S: a nearly one-hot row keeps its small
                          tail = log(1 + the others)
    teacher_top, teacher_tail    the same of P
    inner                 with p, q the softmaxes of P and S within the piece:
                          Σ p (top - S) "soft_cross_entropy"; KL(p || q) "forward_kl"; KL(q || p) "reverse_kl"

All terms are non-negative, so sums never cancel. Cross-entropies and divergences of pieces combine by the chain rule,
KL(p || q) = KL(P || Q) + Σ_T P_T KL(p|T || q|T), P_T and Q_T being the pieces' shares; so one pass suffices. Elements
and shares contribute q - p - p log(q/p) >= 0 instead of -p log(q/p): the same sum, as Σ (q - p) = 0, but without the
first-order terms that cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_softmax import LOG2_E, vector_dtype

TOP, TAIL, TEACHER_TOP, TEACHER_TAIL, INNER, POSITIVE = range(6)


def divergence_terms(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return q - p - p·log(q/p) elementwise: what each element adds to KL(p || q), never negative.

    Args:
        p: Probabilities.
        q: Probabilities.
        log_ratio: log(q/p), from the logits; not read where p is 0.

    Returns:
        The terms; near p = q from expm1, where the difference would cancel.
    """
    far = q - p - torch.where(p > 0, p * log_ratio, 0)
    return torch.where(log_ratio.abs() < 1, p * (torch.expm1(log_ratio) - log_ratio), far)


def nothing_yet(size: int, device: torch.device) -> Tensor:
    """Return the (6, size) parts of empty pieces, which merge with anything."""
    parts = torch.zeros((6, size), dtype=vector_dtype(device), device=device)
    parts[[TOP, TEACHER_TOP]] = -torch.inf
    return parts


def merge_parts(parts: Tensor, kind: str) -> Tensor:
    """Merge pieces of the same rows.

    Args:
        parts: (6, pieces, size) float64.
        kind: "forward_kl", "soft_cross_entropy" or "reverse_kl".

    Returns:
        (6, size) float64.
    """
    merged = torch.empty_like(parts[:, 0])
    shares, logs = [], []
    for at in (TOP, TEACHER_TOP):
        top, first = parts[at].max(0, keepdim=True)
        gap = parts[at] - torch.where(top == -torch.inf, 0, top)
        weights = gap.exp()
        others = weights.scatter(0, first, 0).sum(0)  # without the largest piece, whose weight is exactly 1
        tail = torch.log1p((weights * torch.expm1(parts[at + 1])).sum(0) + others)
        merged[at], merged[at + 1] = top[0], tail
        logs.append(gap + parts[at + 1] - tail)
        shares.append(logs[-1].exp())
    (q, p), (log_q, log_p) = shares, logs
    if kind == "soft_cross_entropy":
        lower = torch.where(p > 0, merged[TOP] - parts[TOP], 0)
        merged[INNER] = (p * (parts[INNER] + lower)).sum(0)
    else:
        if kind == "reverse_kl":
            p, q, log_p, log_q = q, p, log_q, log_p
        log_ratio = torch.where((p > 0) & (q > 0), log_q - log_p, torch.inf)
        merged[INNER] = (p * parts[INNER] + divergence_terms(p, q, log_ratio)).sum(0)
    merged[POSITIVE] = parts[POSITIVE].sum(0)
    return merged


def gradient_vectors(parts: Tensor, grads: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return what a backward pass needs to know about every row.

    The gradient matrix is G = g_tail q + g_inner d(inner) + g_positive at pairs, with d(inner) = -p for soft
    cross-entropy, q - p for forward KL, and q (log(q/p) - KL) for reverse KL.

    Args:
        parts: (6, M) merged parts.
        grads: (6, M) gradients of the parts (top and the teacher's are constants).
        kind: Divergence.
        dtype: Of the results.

    Returns:
        (M,) each: base-2 top, base-2 teacher's top, log of the tails' ratio plus the divergence (reverse KL), and the
        weights of exp2(s - top), exp2(t - teacher's top) and of the pair. Probabilities are taken relative to the
        largest logit: where one is nearly 1 on both sides, their difference is as small as it should be.
    """
    g_tail, g_inner = grads[TAIL], grads[INNER]
    w_p = g_inner * torch.exp(-parts[TEACHER_TAIL])
    w_q = torch.exp(-parts[TAIL]) * (g_tail + g_inner if kind == "forward_kl" else g_tail)
    if kind == "reverse_kl":
        w_p = g_inner * torch.exp(-parts[TAIL])
    origin = parts[TAIL] - parts[TEACHER_TAIL] + parts[INNER]
    vectors = (parts[TOP] * LOG2_E, parts[TEACHER_TOP] * LOG2_E, origin, w_q, w_p, grads[POSITIVE])
    return tuple(v.to(dtype) for v in vectors)

"""From pair statistics to losses: the few O(B) operations that tell one softmax loss from another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import PairStatistics, pair_statistics
from .relations import Relation, positive_counts


def mean_over(losses: Tensor, counted: Tensor) -> Tensor:
    """Average ``losses`` where ``counted``; 0 if nothing counts."""
    return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


def uniform_mean(x: Tensor, y: Tensor, scale: Tensor, counted: Tensor) -> Tensor:
    """Average of the logits of all counted rows over all columns, in O((M + N)·D): scale · <mean x, mean y>."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = counted.to(dtype) / counted.sum().clamp(min=1)
    return scale.to(dtype) * ((weights[:, None] * x).sum(0) * y.mean(0, dtype=dtype)).sum()


def cross_entropy(
    lse: Tensor, positive: Tensor, counts: Tensor, uniform: Tensor | None, smoothing: float, *, without_positive: bool
) -> Tensor:
    """Mean cross-entropy of rows against (smoothed) uniform targets over their positives.

    Args:
        lse: (M,) log-sum-exp; without the single positive if ``without_positive``.
        positive: (M,) sum of positive logits.
        counts: (M,) number of positives; rows with none do not count.
        uniform: 0-d mean logit of the counted rows over all columns, or None without smoothing.
        smoothing: Weight of the uniform target.
        without_positive: How ``lse`` was taken.

    Returns:
        0-d loss.
    """
    mean_positive = positive / counts.clamp(min=1)
    excess = F.softplus(lse - positive, threshold=40) if without_positive else lse - mean_positive
    if uniform is None:
        return mean_over(excess, counts > 0)
    return mean_over(excess + smoothing * mean_positive, counts > 0) - smoothing * uniform


def two_way_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    relation: Relation,
    *,
    directions: str,
    smoothing: float = 0.0,
    without_positive: bool,
    backend: str,
) -> Tensor:
    """Average over the asked directions of :func:`cross_entropy` of S = scale · X Yᵀ."""
    rows, columns = directions in ("both", "image"), directions in ("both", "text")
    stats: PairStatistics = pair_statistics(x, y, scale, relation, rows=rows, columns=columns, backend=backend)
    row_counts, col_counts = positive_counts(relation, x.shape[0], y.shape[0], x.device)
    sides = []
    if rows:
        sides.append((stats.row_lse, stats.row_positive, row_counts, x, y))
    if columns:
        sides.append((stats.col_lse, stats.col_positive, col_counts, y, x))
    losses = []
    for lse, positive, counts, own, others in sides:
        uniform = uniform_mean(own, others, scale, counts > 0) if smoothing > 0 else None
        losses.append(cross_entropy(lse, positive, counts, uniform, smoothing, without_positive=without_positive))
    return torch.stack(losses).mean().to(torch.promote_types(x.dtype, torch.float32))

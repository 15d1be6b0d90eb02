"""Supervised contrastive losses: SupCon in one or across two modalities, and CLIP-CITE's equation 4."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .assemble import mean_over, two_way_loss
from .checks import as_scalar, check_choice, check_features, check_ids, check_same_rows
from .dispatch import choose
from .pairs import pair_statistics
from .relations import Relation, group_relation, positive_counts


def supervised_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    other_features: Tensor | None = None,
    *,
    other_labels: Tensor | None = None,
    variant: str = "supcon",
    directions: str = "both",
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss whose positives are decided by class labels.

    With P(i) the columns of row i's class and S = logit_scale · F Gᵀ (G = F, without self pairs, if
    ``other_features`` is None), the loss of row i is, by ``variant``:

    - "supcon": -1/|P(i)| Σ_{p in P(i)} (S_ip - log Σ_a exp S_ia), a over all columns but i itself;
    - "cite": -S_ii + log(exp S_ii + Σ_{j not in P(i)} exp S_ij), two modalities only;
    - "cite_literal": without exp S_ii in the sum, as CLIP-CITE prints it (rows without negatives do not count).

    Rows are averaged over those that have a positive. With two modalities the result is the average of the
    row and the column direction.

    Args:
        features: (B, D) rows of unit length; float32, float16 or bfloat16.
        labels: (B,) integer class ids.
        logit_scale: 1 / temperature, 0-d tensor or number.
        other_features: (C, D) features of the other modality; None: ``features`` against itself.
        other_labels: (C,) class ids of ``other_features``; default ``labels``.
        variant: "supcon", "cite" or "cite_literal".
        directions: "both", "image" (rows) or "text" (columns); one modality has only one.
        offset: Column of row 0's own pair (or of itself), for local rows against gathered columns.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        0-d float32 loss, 0 if no row has a positive; differentiable in the features and scale.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        ConfigError: If an option has an unknown value.

    Memory: O((B + C)·D + block); no mask is built. One modality takes its positives from the classes' sums of features,
    and as S is symmetric one gradient product serves both sides: 3 similarity products in all instead of 4.
    Determinism: bitwise for fixed shapes and device.

    Source: Khosla et al. 2020, L_out (eq. 2) without the factor temperature/base_temperature; CLIP-CITE
    (arXiv 2407.04003) eq. 4, with the minus sign missing in print, averaged over rows and over the two directions
    where the paper sums.
    """
    check_choice("variant", variant, ("supcon", "cite", "cite_literal"))
    check_choice("directions", directions, ("both", "image", "text"))
    if other_features is None:
        check_choice("variant without other_features", variant, ("supcon",))
        check_features(features=features)
    else:
        check_features(features=features, other_features=other_features)
        if other_labels is None:
            check_same_rows(features=features, other_features=other_features)
        check_ids(other_features.shape[0], features.device, other_labels=other_labels)
    check_ids(features.shape[0], features.device, labels=labels)
    scale = as_scalar(logit_scale, features, "logit_scale")
    if choose(backend, features) == "reference":
        return reference.supervised_contrastive_loss_reference(
            features,
            labels,
            scale,
            other_features,
            other_labels=other_labels,
            variant=variant,
            directions=directions,
            offset=offset,
        )
    if other_features is None and other_labels is None and offset == 0:
        return _single_modality_loss(features, labels, scale, backend)
    if other_features is None:
        relation = group_relation(labels, other_labels, "self", offset)
        other_features, directions = features, "image"
    else:
        relation = group_relation(labels, other_labels, "group" if variant == "supcon" else "rivals", offset)
    if variant == "cite_literal":
        return _literal_loss(features, other_features, scale, relation, directions, backend)
    return two_way_loss(
        features,
        other_features,
        scale,
        relation,
        directions=directions,
        without_positive=variant == "cite",
        backend=backend,
    )


def _single_modality_loss(x: Tensor, labels: Tensor, scale: Tensor, backend: str) -> Tensor:
    """SupCon within one set: mean_i log Σ_{a ≠ i} exp S_ia - scale Σ_c w_c (|M_c|² - Σ_{i in c} |x_i|²).

    M_c is the sum of class c's features and w_c = 1 / ((n_c - 1) · rows that count), so no row looks at its positives
    one by one.
    """
    # With Y = X detached, the gradient that X would get as Y is, by symmetry, the one of the column statistics in X.
    half_scale = scale.detach() + (scale - scale.detach()) / 2  # both halves of that sum contribute to the scale
    stats = pair_statistics(x, x.detach(), half_scale, Relation("pair"), backend=backend)
    lse = stats.row_lse + (stats.col_lse - stats.col_lse.detach())
    ordered, order = labels.sort(stable=True)
    starts = torch.cat([ordered.new_ones(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).long()])
    class_of = starts.cumsum(0) - 1
    sizes = torch.zeros_like(class_of).scatter_add_(0, class_of, torch.ones_like(class_of))  # (B,), zeros at the end
    features = x.index_select(0, order).to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.segment_reduce(features, "sum", lengths=sizes, axis=0, initial=0)
    squares = torch.segment_reduce(_squared(features), "sum", lengths=sizes, axis=0, initial=0)
    rivals = (sizes - 1).clamp(min=0)
    counted = (sizes * (rivals > 0)).sum().clamp(min=1)
    weights = torch.where(rivals > 0, 1 / (rivals.clamp(min=1) * counted), 0)
    positive = scale * (weights * (_squared(sums) - squares)).sum()
    has_positive = torch.zeros_like(class_of, dtype=torch.bool).scatter_(0, order, rivals[class_of] > 0)
    loss = torch.where(has_positive, lse, 0).sum() / counted - positive
    return loss.to(features.dtype)


def _squared(features: Tensor) -> Tensor:
    """Return |row|² in float64."""
    return (features * features).sum(1, dtype=torch.float64)


def _literal_loss(x: Tensor, y: Tensor, scale: Tensor, relation: Relation, directions: str, backend: str) -> Tensor:
    """Average over directions of mean_i (log Σ_{negatives} exp S_ij - S_ii), over rows that have a negative."""
    rows, columns = directions in ("both", "image"), directions in ("both", "text")
    stats = pair_statistics(x, y, scale, relation, rows=rows, columns=columns, backend=backend)
    row_counts, col_counts = positive_counts(relation, x.shape[0], y.shape[0], x.device)
    losses = []
    if rows:
        losses.append(mean_over(stats.row_lse - stats.row_positive, (row_counts > 0) & stats.row_lse.isfinite()))
    if columns:
        losses.append(mean_over(stats.col_lse - stats.col_positive, (col_counts > 0) & stats.col_lse.isfinite()))
    return torch.stack(losses).mean().to(torch.promote_types(x.dtype, torch.float32))

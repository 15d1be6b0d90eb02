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

    Memory: O((B + C)·D + block); no mask is built. Determinism: bitwise for fixed shapes and device.

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
    return torch.stack(losses).mean()

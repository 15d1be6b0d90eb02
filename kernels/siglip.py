"""Pairwise sigmoid loss (SigLIP)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .checks import as_scalar, check_features, check_ids
from .dispatch import choose
from .relations import Relation, group_relation
from .sigmoid_pairs import sigmoid_pairs


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    negative_only: bool = False,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sigmoid loss over all image-text pairs.

    loss = -1/B Σ_ij log σ(z_ij (logit_scale · <image_i, text_j> + logit_bias)),  z = +1 for positives, -1 otherwise

    Args:
        image_features: (B, D) rows of unit length; float32, float16 or bfloat16.
        text_features: (C, D).
        logit_scale: The multiplier itself, 0-d tensor or number.
        logit_bias: Added to every logit (SigLIP starts at -10); None means 0.
        labels: (B,) integer ids: pairs with equal ids are positive (multi-positive); None: j = i + offset.
        text_labels: (C,) ids of the columns; default ``labels``.
        negative_only: Every pair is a negative, as for texts of another rank.
        offset: Column of row 0's pair.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        0-d float32 loss; differentiable in both features, scale and bias.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        ConfigError: If the backend is unknown or cannot run here.

    Memory: O((B + C)·D + block); the gradients are made in the forward pass (3 similarity products in all).
    Determinism: bitwise for fixed shapes and device.

    Source: Zhai et al. 2023, algorithm 1; division by B as in open_clip.
    """
    check_features(image_features=image_features, text_features=text_features)
    check_ids(image_features.shape[0], image_features.device, labels=labels)
    text_labels = labels if text_labels is None else text_labels
    check_ids(text_features.shape[0], image_features.device, text_labels=text_labels)
    scale = as_scalar(logit_scale, image_features, "logit_scale")
    bias = as_scalar(0.0 if logit_bias is None else logit_bias, image_features, "logit_bias")
    if choose(backend, image_features) == "reference":
        return reference.siglip_loss_reference(
            image_features,
            text_features,
            scale,
            bias,
            labels=labels,
            text_labels=text_labels,
            negative_only=negative_only,
            offset=offset,
        )
    if negative_only:
        relation = None
    else:
        relation = Relation("pair", offset) if labels is None else group_relation(labels, text_labels)
    total = sigmoid_pairs(image_features, text_features, scale, bias, relation, backend=backend)
    return total / image_features.shape[0]

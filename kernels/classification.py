"""Image-to-class cosine softmax (NormFace, CLIP class prompts, ArcFace, CosFace)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .assemble import mean_over, uniform_mean
from .checks import as_scalar, check_choice, check_features, check_ids, check_smoothing
from .dispatch import choose
from .pairs import pair_statistics
from .relations import group_relation


def classification_loss(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    margin_type: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of images against class vectors under a scaled cosine softmax.

    loss = mean_i CE(logit_scale · <image_i, class_c>, labels_i), where the true class's cosine is first replaced by
    cos(θ + margin) ("arcface") or cos θ - margin ("cosface").

    Args:
        image_features: (B, D) rows of unit length; float32, float16 or bfloat16.
        class_features: (C, D) rows of unit length: class prompts or a normalised weight matrix.
        labels: (B,) integers in [0, C); rows with a negative label do not count.
        logit_scale: Multiplier of the cosines. INFUSING uses 16, CLIP heads about 100.
        label_smoothing: Weight of the uniform target, in [0, 1). GIFT uses 0.2.
        margin: Radians ("arcface", paper 0.5) or cosine ("cosface", paper 0.35).
        margin_type: "none", "arcface" or "cosface".
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        0-d float32 loss; differentiable in both features and the scale.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        ConfigError: If an option has an unknown value.

    Memory: O((B + C)·D + block), never B x C. Determinism: bitwise for fixed shapes and device.

    Source: Wang et al. 2017 (NormFace); Deng et al. 2019 (ArcFace, with the usual linear continuation
    cos θ - margin·sin(margin) where θ + margin > π); Wang et al. 2018 (CosFace).
    """
    check_features(image_features=image_features, class_features=class_features)
    check_ids(image_features.shape[0], image_features.device, labels=labels)
    check_choice("margin_type", margin_type, ("none", "arcface", "cosface"))
    check_smoothing(label_smoothing)
    scale = as_scalar(logit_scale, image_features, "logit_scale")
    if choose(backend, image_features) == "reference":
        return reference.classification_loss_reference(
            image_features,
            class_features,
            labels,
            scale,
            label_smoothing=label_smoothing,
            margin=margin,
            margin_type=margin_type,
        )
    classes = torch.arange(class_features.shape[0], device=labels.device)
    relation = group_relation(labels, classes, "target")
    stats = pair_statistics(image_features, class_features, scale, relation, columns=False, backend=backend)
    counted = (labels >= 0) & (labels < class_features.shape[0])
    true_logit = stats.row_positive
    moved = _apply_margin(true_logit, scale, margin, margin_type)
    losses = F.softplus(stats.row_lse - moved, threshold=40)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    if label_smoothing == 0:
        return mean_over(losses, counted).to(dtype)
    # The mean logit over classes, with the true class's logit moved by the margin.
    uniform = uniform_mean(image_features, class_features, scale, counted)
    shift = (moved - true_logit) / class_features.shape[0]
    return (mean_over(losses + label_smoothing * (moved - shift), counted) - label_smoothing * uniform).to(dtype)


def _apply_margin(logits: Tensor, scale: Tensor, margin: float, margin_type: str) -> Tensor:
    """Return the true class's logits after the margin."""
    if margin_type == "none":
        return logits
    if margin_type == "cosface":
        return logits - scale * margin
    # The clamp keeps acos differentiable; past pi - margin the logit goes on falling linearly.
    cosines = logits / scale
    angle = torch.acos(cosines.clamp(-1 + 1e-6, 1 - 1e-6))
    fallback = cosines - margin * math.sin(margin)
    return scale * torch.where(angle + margin <= math.pi, torch.cos(angle + margin), fallback)

"""Symmetric softmax contrastive loss (CLIP, LiT, multi-positive, label smoothing)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .assemble import two_way_loss
from .checks import as_scalar, check_choice, check_features, check_ids, check_same_rows, check_smoothing
from .dispatch import choose
from .relations import Relation, group_relation


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    directions: str = "both",
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Symmetric softmax contrastive loss over a batch of matched pairs.

    loss = ½ [CE(S, Y) + CE(Sᵀ, Y')],  S = logit_scale · I Tᵀ (+ logit_bias, to which the loss is invariant)

    Y is the pairing i ↔ i + offset, or with ``labels`` the multi-positive target
    Y[i, j] = 1{labels[i] = text_labels[j]} / (number of such j). Rows without a positive do not count.
    A frozen tower (LiT) is a feature tensor that does not require grad: its gradient product is not computed.

    Args:
        image_features: (B, D) rows of unit length; float32, float16 or bfloat16 (float64 with "torch").
        text_features: (C, D); C = B unless labels, directions="image" or an offset say otherwise.
        logit_scale: The multiplier itself (about 100 for CLIP), not its log: 0-d tensor or number.
        logit_bias: Accepted for open_clip's call; its gradient is exactly 0.
        labels: (B,) integer group ids of the rows, such as caption ids; None: pairs.
        text_labels: (C,) group ids of the columns; default ``labels``.
        label_smoothing: Weight of the uniform target, in [0, 1). GIFT uses 0.2 with caption ids.
        directions: "both", or only the softmax over texts ("image") or over images ("text").
        offset: Column of row 0's pair, for local rows against gathered columns.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        0-d float32 loss; differentiable in both features, scale and bias.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit.
        ConfigError: If an option has an unknown value.

    Memory: O((B + C)·D + block), never B x C. Determinism: bitwise for fixed shapes and device.

    Source: Radford et al. 2021, figure 3; Zhai et al. 2022 (LiT); multi-positive targets as in GIFT's alignment term.
    """
    check_features(image_features=image_features, text_features=text_features)
    check_choice("directions", directions, ("both", "image", "text"))
    check_smoothing(label_smoothing)
    check_ids(image_features.shape[0], image_features.device, labels=labels)
    if labels is None and directions == "both" and offset == 0:
        check_same_rows(image_features=image_features, text_features=text_features)
    text_labels = labels if text_labels is None else text_labels
    check_ids(text_features.shape[0], image_features.device, text_labels=text_labels)
    scale = as_scalar(logit_scale, image_features, "logit_scale")
    if choose(backend, image_features) == "reference":
        return reference.clip_loss_reference(
            image_features,
            text_features,
            scale,
            logit_bias,
            labels=labels,
            text_labels=text_labels,
            label_smoothing=label_smoothing,
            directions=directions,
            offset=offset,
        )
    relation = Relation("pair", offset) if labels is None else group_relation(labels, text_labels)
    loss = two_way_loss(
        image_features,
        text_features,
        scale,
        relation,
        directions=directions,
        smoothing=label_smoothing,
        without_positive=labels is None,
        backend=backend,
    )
    # The softmax does not see a shift of all logits: the bias gets a gradient, and it is exactly 0.
    return loss if logit_bias is None else loss + 0.0 * logit_bias.sum().to(loss.dtype)

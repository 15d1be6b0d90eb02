"""Dense PyTorch definition of every similarity loss: the oracle of the tests and what each fused kernel must equal.

Each function has the signature of the public operation of the same name without ``backend``, builds the whole (B, C)
similarity matrix and reads like the paper. Logits are computed in the dtype of the inputs, softmaxes in at least
float32 (as autocast does); float64 inputs give float64 truth.

Shapes: B rows (images), C columns (texts or classes), D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .distillation import DistillOptions


def _logits(rows: Tensor, columns: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | None = None) -> Tensor:
    logits = logit_scale * rows @ columns.T
    if logit_bias is not None:
        logits = logits + logit_bias
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _diagonal(logits: Tensor, offset: int) -> Tensor:
    rows = torch.arange(logits.shape[0], device=logits.device)
    columns = torch.arange(logits.shape[1], device=logits.device)
    return (rows[:, None] + offset) == columns[None, :]


def _cross_entropy(logits: Tensor, positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over rows that have a positive of CE(logits, uniform over the positives, smoothed)."""
    counts = positives.sum(1, keepdim=True)
    targets = positives.to(logits.dtype) / counts.clamp(min=1)
    targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[1]
    losses = -(targets * F.log_softmax(logits, 1)).sum(1)
    has_positive = counts[:, 0] > 0
    return (losses * has_positive).sum() / has_positive.sum().clamp(min=1)


def _average(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def clip_loss_reference(
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
) -> Tensor:
    """Average of CE(S, targets) over rows and CE(S^T, targets) over columns; see :func:`ftfast.kernels.clip_loss`."""
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    if labels is None:
        positives = _diagonal(logits, offset)
    else:
        positives = labels[:, None] == (labels if text_labels is None else text_labels)[None, :]
    losses = []
    if directions in ("both", "image"):
        losses.append(_cross_entropy(logits, positives, label_smoothing))
    if directions in ("both", "text"):
        losses.append(_cross_entropy(logits.T, positives.T, label_smoothing))
    return _average(losses)


def siglip_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    negative_only: bool = False,
    offset: int = 0,
) -> Tensor:
    """Sum over pairs of -log sigmoid(±(S + bias)) divided by B; see :func:`ftfast.kernels.siglip_loss`."""
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    if negative_only:
        positives = torch.zeros_like(logits, dtype=torch.bool)
    elif labels is None:
        positives = _diagonal(logits, offset)
    else:
        positives = labels[:, None] == (labels if text_labels is None else text_labels)[None, :]
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / logits.shape[0]


def supervised_contrastive_loss_reference(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    other_features: Tensor | None = None,
    *,
    other_labels: Tensor | None = None,
    variant: str = "supcon",
    directions: str = "both",
    offset: int = 0,
) -> Tensor:
    """SupCon (L_out) or CLIP-CITE eq. 4; see :func:`ftfast.kernels.supervised_contrastive_loss`."""
    columns = features if other_features is None else other_features
    logits = _logits(features, columns, logit_scale)
    same = labels[:, None] == (labels if other_labels is None else other_labels)[None, :]
    pair = _diagonal(logits, offset)
    if variant == "supcon":
        if other_features is None:
            same = same & ~pair
            logits = logits.masked_fill(pair, -torch.inf)
        log_p = [logits - logits.logsumexp(1, keepdim=True), (logits - logits.logsumexp(0, keepdim=True)).T]
        positives = [same, same.T]
    else:
        kept = ~same | pair if variant == "cite" else ~same & ~pair
        excluded = torch.where(kept, logits, -torch.inf)
        lse = [excluded.logsumexp(1, keepdim=True), excluded.logsumexp(0, keepdim=True)]
        log_p = [logits - lse[0], (logits - lse[1]).T]
        positives = [pair & torch.isfinite(lse[0]), (pair & torch.isfinite(lse[1])).T]
    losses = []
    for direction, (value, mask) in zip(("image", "text"), zip(log_p, positives, strict=True), strict=True):
        counts = mask.sum(1)
        loss = -torch.where(mask, value, 0).sum(1) / counts.clamp(min=1)
        if directions in ("both", direction):
            losses.append(loss.sum() / (counts > 0).sum().clamp(min=1))
    return losses[0] if other_features is None else _average(losses)


def classification_loss_reference(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    margin_type: str = "none",
) -> Tensor:
    """Cosine softmax over classes with an optional margin; see :func:`ftfast.kernels.classification_loss`."""
    cosines = image_features @ class_features.T
    cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
    target = labels[:, None] == torch.arange(class_features.shape[0], device=labels.device)[None, :]
    if margin_type == "arcface":
        # The clamp keeps acos differentiable; past pi - margin the logit goes on falling linearly.
        angle = torch.acos(cosines.clamp(-1 + 1e-6, 1 - 1e-6))
        moved = torch.where(angle + margin <= torch.pi, torch.cos(angle + margin), cosines - margin * _sin(margin))
        cosines = torch.where(target, moved, cosines)
    elif margin_type == "cosface":
        cosines = cosines - margin * target.to(cosines.dtype)
    return _cross_entropy(logit_scale * cosines, target, label_smoothing)


def _sin(angle: float) -> float:
    return float(torch.sin(torch.tensor(angle, dtype=torch.float64)))


def similarity_distillation_loss_reference(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    logit_scale: Tensor | float,
    *,
    teacher_logit_scale: Tensor | float | None = None,
    teacher_logits: Tensor | None = None,
    options: DistillOptions,
) -> Tensor:
    """Divergence of student from teacher similarities; see :func:`ftfast.kernels.similarity_distillation_loss`."""
    student = _logits(student_image, student_text, logit_scale) / options.temperature
    if teacher_logits is None:
        scale = logit_scale if teacher_logit_scale is None else teacher_logit_scale
        teacher_logits = _logits(teacher_image, teacher_text, scale)  # type: ignore[arg-type]
    teacher = teacher_logits.detach().to(student.dtype) / options.temperature
    losses = []
    for direction, axis in (("image", 1), ("text", 0)):
        if options.directions not in ("both", direction):
            continue
        log_q, log_p = F.log_softmax(student, axis), F.log_softmax(teacher, axis)
        if options.kind == "forward_kl":
            loss = log_p.exp() * (log_p - log_q)
        elif options.kind == "reverse_kl":
            loss = log_q.exp() * (log_q - log_p)
        else:
            loss = -log_p.exp() * log_q
        losses.append(loss.sum(axis).mean())
    factor = options.temperature**2 if options.temperature_squared else 1.0
    return factor * _average(losses)


def feature_distillation_loss_reference(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared difference, by default averaged over batch and width; INFUSING's embedding distillation."""
    squares = (student - teacher.detach()).to(torch.promote_types(student.dtype, torch.float32)).square()
    if reduction == "mean":
        return squares.mean()
    return squares.sum(1).mean() if reduction == "mean_of_sums" else squares.sum()

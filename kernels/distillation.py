"""Distillation between two similarity matrices, and between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftfast.errors import ConfigError, ShapeError

from . import reference
from .assemble import mean_over
from .checks import as_scalar, check_choice, check_features, check_same_rows
from .dispatch import choose
from .distill_pairs import distill_parts
from .distill_parts import INNER, POSITIVE, TAIL, TOP
from .relations import Relation, positive_counts


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """How the student's similarities are compared with the teacher's.

    Raises:
        ConfigError: If a value is not allowed.
    """

    kind: str = "forward_kl"
    """"forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher) or "soft_cross_entropy"."""
    temperature: float = 1.0
    """Divisor of both sides' logits; GIFT and ZSCL use 2."""
    temperature_squared: bool = True
    """Multiply the loss by temperature², which keeps gradients comparable between temperatures."""
    directions: str = "both"
    """"both" (average of the two), "image" (softmax over columns) or "text" (softmax over rows)."""

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("kind", self.kind, ("forward_kl", "reverse_kl", "soft_cross_entropy"))
        check_choice("directions", self.directions, ("both", "image", "text"))
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be positive")


def similarity_distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    logit_scale: Tensor | float,
    *,
    teacher_logit_scale: Tensor | float | None = None,
    teacher_logits: Tensor | None = None,
    options: DistillOptions | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's image-text similarities from a frozen teacher's.

    S = logit_scale · I Tᵀ / temperature (student), P = teacher_logit_scale · I' T'ᵀ / temperature (teacher, constant)
    loss = temperature² · average over directions of mean_i D(softmax P_i, softmax S_i)

    Args:
        student_image: (B, D) rows of unit length; float32, float16 or bfloat16.
        student_text: (C, D): the batch's texts (C = B) or class prompts.
        teacher_image: (B, D') from the frozen teacher; its width may differ. None with ``teacher_logits``.
        teacher_text: (C, D') from the frozen teacher. None with ``teacher_logits``.
        logit_scale: The student's multiplier, 0-d tensor or number.
        teacher_logit_scale: The teacher's multiplier; default the student's value, without gradient.
        teacher_logits: (B, C) teacher logits including their scale, instead of teacher features.
        options: Divergence, temperature, directions; default :class:`DistillOptions`.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        0-d float32 loss; differentiable in the student's features and scale.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit, or teacher tensors require grad.

    Memory: O((B + C)·(D + D') + block), never B x C (besides ``teacher_logits`` itself). Determinism: bitwise.

    Source: ZSCL and GIFT ("soft_cross_entropy", T = 2, directions summed: twice this average); CLIP-CITE eq. 5
    ("reverse_kl" as printed); open_clip's DistillClipLoss ("soft_cross_entropy", T = 1).
    """
    options = options or DistillOptions()
    check_features(student_image=student_image, student_text=student_text)
    scale = as_scalar(logit_scale, student_image, "logit_scale")
    teacher_scale = (
        scale if teacher_logit_scale is None else as_scalar(teacher_logit_scale, scale, "teacher_logit_scale")
    )
    check_teacher(student_image, student_text, teacher_image, teacher_text, teacher_logits)
    if choose(backend, student_image) == "reference":
        return reference.similarity_distillation_loss_reference(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            scale,
            teacher_logit_scale=teacher_scale,
            teacher_logits=teacher_logits,
            options=options,
        )
    logit_factor = torch.ones_like(scale) if teacher_logits is not None else teacher_scale
    sides = distill_parts(
        student_image,
        student_text,
        scale / options.temperature,
        (teacher_image, teacher_text, teacher_logits, logit_factor.detach() / options.temperature),
        options.kind,
        rows=options.directions in ("both", "image"),
        columns=options.directions in ("both", "text"),
        backend=backend,
    )
    factor = options.temperature**2 if options.temperature_squared else 1.0
    loss = torch.stack([divergence(side, options.kind).mean() for side in sides if side.numel()]).mean()
    return (factor * loss).to(torch.promote_types(student_image.dtype, torch.float32))


def divergence(parts: Tensor, kind: str) -> Tensor:
    """Return the divergence of every row (or column) from its (6, M) parts."""
    return parts[INNER] + parts[TAIL] if kind == "soft_cross_entropy" else parts[INNER]


def contrast(parts: Tensor) -> Tensor:
    """Return every row's cross-entropy against its pair from its (6, M) parts."""
    return parts[TAIL] + (parts[TOP].detach() - parts[POSITIVE])


def clip_and_distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float,
    *,
    directions: str = "both",
    offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Contrastive loss and soft cross-entropy distillation of the same similarities, in one pass over them.

    Equals ``clip_loss`` and ``similarity_distillation_loss`` (kind "soft_cross_entropy", temperature 1) with the same
    directions, at the cost of the second alone: what open_clip's DistillClipLoss returns.

    Args:
        student_image: (B, D) rows of unit length; float32, float16 or bfloat16.
        student_text: (C, D).
        teacher_image: (B, D') from the frozen teacher.
        teacher_text: (C, D') from the frozen teacher.
        logit_scale: The student's multiplier.
        teacher_logit_scale: The teacher's multiplier.
        directions: "both", "image" or "text".
        offset: Column of row 0's pair.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        Contrastive and distillation loss, 0-d float32 each; differentiable in the student's features and scale.

    Raises:
        ShapeError: If shapes, dtypes or devices do not fit, or the teacher requires grad.

    Memory: O((B + C)·(D + D') + block). Determinism: bitwise for fixed shapes and device.
    """
    check_features(student_image=student_image, student_text=student_text)
    check_choice("directions", directions, ("both", "image", "text"))
    check_teacher(student_image, student_text, teacher_image, teacher_text, None)
    scale = as_scalar(logit_scale, student_image, "logit_scale")
    teacher_scale = as_scalar(teacher_logit_scale, student_image, "teacher_logit_scale").detach()
    if choose(backend, student_image) == "reference":
        contrastive = reference.clip_loss_reference(
            student_image, student_text, scale, directions=directions, offset=offset
        )
        distill = reference.similarity_distillation_loss_reference(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            scale,
            teacher_logit_scale=teacher_scale,
            options=DistillOptions(kind="soft_cross_entropy", directions=directions),
        )
        return contrastive, distill
    sides = distill_parts(
        student_image,
        student_text,
        scale,
        (teacher_image, teacher_text, None, teacher_scale),
        "soft_cross_entropy",
        offset=offset,
        rows=directions in ("both", "image"),
        columns=directions in ("both", "text"),
        backend=backend,
    )
    counts = positive_counts(Relation("pair", offset), student_image.shape[0], student_text.shape[0], scale.device)
    used = [(side, count > 0) for side, count in zip(sides, counts, strict=True) if side.numel()]
    dtype = torch.promote_types(student_image.dtype, torch.float32)
    contrastive = torch.stack([mean_over(contrast(side), counted) for side, counted in used]).mean()
    distill = torch.stack([divergence(side, "soft_cross_entropy").mean() for side, _ in used]).mean()
    return contrastive.to(dtype), distill.to(dtype)


def check_teacher(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logits: Tensor | None,
) -> None:
    """Require frozen teacher features or frozen teacher logits that fit the student.

    Raises:
        ShapeError: Naming what is missing, has the wrong shape or requires grad.
    """
    if teacher_logits is not None:
        expected = (student_image.shape[0], student_text.shape[0])
        if tuple(teacher_logits.shape) != expected:
            raise ShapeError(f"teacher_logits must have shape {expected}, got {tuple(teacher_logits.shape)}")
    elif teacher_image is None or teacher_text is None:
        raise ShapeError("give teacher_image and teacher_text, or teacher_logits")
    else:
        check_features(teacher_image=teacher_image, teacher_text=teacher_text)
        check_same_rows(student_image=student_image, teacher_image=teacher_image)
        check_same_rows(student_text=student_text, teacher_text=teacher_text)
    named = {"teacher_image": teacher_image, "teacher_text": teacher_text, "teacher_logits": teacher_logits}
    for name, tensor in named.items():
        if tensor is not None and tensor.requires_grad:
            raise ShapeError(f"{name} requires grad, but the teacher is frozen; detach it or use torch.no_grad()")


def feature_distillation_loss(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared difference between student and frozen teacher features.

    loss = mean_b mean_d (student_bd - teacher_bd)²; for unit rows this equals (2 - 2 cos) / D averaged over rows.

    Args:
        student: (B, D) features; float32, float16 or bfloat16.
        teacher: (B, D) frozen features.
        reduction: "mean" over batch and width (INFUSING), "mean_of_sums" over the batch only, or "sum".

    Returns:
        0-d float32 loss; differentiable in ``student``.

    Raises:
        ShapeError: If the shapes differ or the teacher requires grad.
        ConfigError: If the reduction is unknown.

    Memory: O(B·D). Determinism: bitwise.

    Source: INFUSING (arXiv 2508.12137), embedding distillation, weight 1000 in the paper's code.
    """
    check_features(student=student, teacher=teacher)
    check_same_rows(student=student, teacher=teacher)
    check_choice("reduction", reduction, ("mean", "mean_of_sums", "sum"))
    if teacher.requires_grad:
        raise ShapeError("teacher requires grad, but the teacher is frozen; detach it or use torch.no_grad()")
    return reference.feature_distillation_loss_reference(student, teacher, reduction=reduction)

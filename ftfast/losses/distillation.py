"""Losses that hold a student to a frozen teacher: similarity matrices, features, and open_clip's combination."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ftfast import kernels
from ftfast.errors import ConfigError
from ftfast.kernels import DistillOptions
from ftfast.kernels.checks import check_same_rows
from ftfast.losses.contrastive import ClipLoss
from ftfast.losses.distributed import check_process_group
from ftfast.losses.ring_distillation import ring_distillation_losses


class DistillClipLoss(ClipLoss):
    """Contrastive loss and distillation of the teacher's similarities; replaces ``open_clip.DistillClipLoss``.

    contrastive = ClipLoss(image, text);  distill = ½ [CE(softmax P, S) + CE(softmax Pᵀ, Sᵀ)]

    with the student's S and the teacher's P = dist_logit_scale · dist_image_features · dist_text_featuresᵀ.
    Arguments of the constructor are those of :class:`ClipLoss`, ``ring`` included.

    Deviation from open_clip: the teacher must not require grad (there, its gradient would be computed).

    Source: open_clip 3.3.
    """

    def forward(  # type: ignore[override]  # open_clip's own signature differs from its base class in the same way
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses of one batch of matched pairs.

        Args:
            image_features: (b, D) L2-normalised rows of the student.
            text_features: (b, D) L2-normalised rows of the student.
            logit_scale: The student's multiplier, one element.
            dist_image_features: (b, D') rows of the frozen teacher; its width may differ.
            dist_text_features: (b, D') rows of the frozen teacher.
            dist_logit_scale: The teacher's multiplier, one element.
            output_dict: Return ``{"contrastive_loss": ..., "distill_loss": ...}``.

        Returns:
            (contrastive, distill), each 0-d float32, or the dictionary.

        Raises:
            ShapeError: If shapes do not fit or teacher features require grad.
            ConfigError: If ``world_size`` > 1 and torch.distributed is not set up for it.
        """
        check_same_rows(image_features=image_features, text_features=text_features)
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        contrastive, distill = self._both(student, teacher, (logit_scale, dist_logit_scale))
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _both(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        scales: tuple[Tensor | float, Tensor | float],
    ) -> tuple[Tensor, Tensor]:
        both = kernels.clip_and_distillation_loss
        if self.world_size == 1:
            return both(*student, *teacher, *scales, backend=self.backend)
        check_process_group(type(self).__name__, self.rank, self.world_size)
        if self.ring:
            return ring_distillation_losses(student, teacher, scales, backend=self.backend)
        all_student = self.gather(student[0]), self.gather(student[1])
        all_teacher = self.gather(teacher[0]), self.gather(teacher[1])
        if not self.local_loss:
            return both(*all_student, *all_teacher, *scales, backend=self.backend)
        (image, text), (teacher_image, teacher_text) = student, teacher
        offset = self.rank * len(image)
        by_image, by_text = (
            both(*tower, *scales, directions="image", offset=offset, backend=self.backend)
            for tower in (
                (image, all_student[1], teacher_image, all_teacher[1]),
                (text, all_student[0], teacher_text, all_teacher[0]),
            )
        )
        return (by_image[0] + by_text[0]) / 2, (by_image[1] + by_text[1]) / 2


class SimilarityDistillLoss(nn.Module):
    """Divergence of the student's image-text similarities from a frozen teacher's.

    S = logit_scale · I Tᵀ / temperature (student), P likewise of the teacher;
    loss = temperature² · average over directions of mean_i D(softmax P_i, softmax S_i)

    Args:
        kind: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher; CLIP-CITE as printed) or
            "soft_cross_entropy" (ZSCL, GIFT, open_clip).
        temperature: Divisor of both sides' logits. GIFT and ZSCL use 2, open_clip 1.
        temperature_squared: Multiply by temperature², which keeps gradients comparable between temperatures.
        directions: "both" (average; GIFT sums, so twice this), "image" (softmax over texts) or "text" (over images).
        ring: Compare the rows of all processes of torch.distributed, passing texts around a ring: the global loss, with
            O(b·(D + D')) memory in both passes. Needs directions="both" and equal rows on all processes.
        backend: "auto", "triton" or "torch".

    Raises:
        ConfigError: If an option has an unknown value.

    Source: see :func:`ftfast.kernels.similarity_distillation_loss`.
    """

    def __init__(
        self,
        kind: str = "forward_kl",
        temperature: float = 1.0,
        temperature_squared: bool = True,
        directions: str = "both",
        *,
        ring: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if ring and directions != "both":
            raise ConfigError(f"SimilarityDistillLoss(ring=True, directions={directions!r}): the ring takes both")
        self.ring = ring
        self.options = DistillOptions(
            kind=kind, temperature=temperature, temperature_squared=temperature_squared, directions=directions
        )
        self.backend = backend

    def forward(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: Tensor | float,
        teacher_logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Compare one batch.

        Args:
            student_image: (B, D) L2-normalised rows.
            student_text: (C, D) L2-normalised rows: the batch's texts, or class prompts.
            teacher_image: (B, D') rows of the frozen teacher.
            teacher_text: (C, D') rows of the frozen teacher.
            logit_scale: The student's multiplier, one element.
            teacher_logit_scale: The teacher's multiplier; default the student's, without gradient.

        Returns:
            The 0-d float32 loss.

        Raises:
            ShapeError: If shapes do not fit or teacher features require grad.
        """
        if self.ring:
            return self._around_the_ring(
                (student_image, student_text), (teacher_image, teacher_text), (logit_scale, teacher_logit_scale)
            )
        return kernels.similarity_distillation_loss(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            options=self.options,
            backend=self.backend,
        )

    def _around_the_ring(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        scales: tuple[Tensor | float, Tensor | float | None],
    ) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "SimilarityDistillLoss(ring=True) exchanges features between processes, but torch.distributed is not "
                "initialised. Call torch.distributed.init_process_group first, or use ring=False."
            )
        options = self.options
        both = (scales[0], scales[0] if scales[1] is None else scales[1])
        divided = (both[0] / options.temperature, both[1] / options.temperature)
        _, loss = ring_distillation_losses(student, teacher, divided, options.kind, backend=self.backend)
        return loss * (options.temperature**2 if options.temperature_squared else 1.0)


class FeatureDistillLoss(nn.Module):
    """Squared difference between student and frozen teacher features.

    loss = mean_b mean_d (student - teacher)²

    Args:
        reduction: "mean" over batch and width (INFUSING, weight 1000), "mean_of_sums" over the batch only, or "sum".

    Source: INFUSING (arXiv 2508.12137), embedding distillation.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare one batch.

        Args:
            student: (B, D) features.
            teacher: (B, D) features of the frozen teacher.

        Returns:
            The 0-d float32 loss.

        Raises:
            ShapeError: If the shapes differ or the teacher requires grad.
            ConfigError: If the reduction is unknown.
        """
        return kernels.feature_distillation_loss(student, teacher, reduction=self.reduction)

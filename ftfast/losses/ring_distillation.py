"""Distillation over the rows of all processes, with texts passed around a ring; see :mod:`ftfast.losses.ring`.

The visiting text brings its teacher's text along. The accumulators that follow it are the partial statistics of its
columns (forward) and its gradient (backward), so memory is O(b·(D + D')) per process in both passes.

Legend: W processes, b rows on each, D width of the student, D' of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftfast.kernels.checks import as_scalar
from ftfast.kernels.dispatch import follow_autocast
from ftfast.kernels.distill_pairs import distill_parts, distill_parts_backward
from ftfast.kernels.distill_parts import INNER, POSITIVE, TAIL, merge_parts, nothing_yet
from ftfast.kernels.distillation import check_teacher, contrast, divergence
from ftfast.losses.ring import Tensors, check_ring, walk


class _RingDistill(torch.autograd.Function):
    """Global contrastive and distillation loss; see :func:`ring_distillation_losses`."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, teacher: Tensors, kind: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Compute both losses and save the merged statistics of this process's rows and columns."""
        teacher_image, teacher_text, teacher_scale = teacher
        row = nothing_yet(len(image), image.device)

        def merge(first: Tensor, second: Tensor) -> Tensor:
            """Merge the statistics of two pieces."""
            return merge_parts(torch.stack([first, second], 1), kind)

        def compare(visitor: Tensors, distance: int) -> Tensor:
            """Add one visit to the row statistics and return those of the visitor's columns."""
            nonlocal row
            guide = (teacher_image, visitor[1], None, teacher_scale)
            offset = 0 if distance == 0 else len(image)  # pairs are at home
            rows, columns = distill_parts(image, visitor[0], scale, guide, kind, offset=offset, backend=backend)
            row = merge(row, rows)
            return columns

        column = walk((text, teacher_text), compare, merge, dist.get_world_size() - 1)
        losses = torch.stack(
            [contrast(row).sum() + contrast(column).sum(), divergence(row, kind).sum() + divergence(column, kind).sum()]
        )
        dist.all_reduce(losses)
        losses = (losses / (2 * len(image) * dist.get_world_size())).float()
        ctx.save_for_backward(image, text, scale, *teacher, row, column)
        ctx.kind, ctx.backend = kind, backend
        return losses[0], losses[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Walk the texts around the ring again and return the gradients of both sides and the scale."""
        image, text, scale, teacher_image, teacher_text, teacher_scale, row, column = ctx.saved_tensors
        own = torch.stack(grad_outputs).double()
        everybody = own.clone()
        dist.all_reduce(everybody)
        contrastive, distill = everybody / (2 * len(image) * dist.get_world_size())
        weights = torch.zeros_like(row)
        weights[TAIL] = contrastive + (distill if ctx.kind == "soft_cross_entropy" else 0)
        weights[INNER], weights[POSITIVE] = distill, -contrastive
        image_gradient = torch.zeros_like(image, dtype=torch.float32)
        scale_gradient = torch.zeros((), dtype=torch.float64, device=image.device)

        def compare(visitor: Tensors, distance: int) -> Tensor:
            """Add one visit to the image and scale gradients and return the visitor's gradient."""
            features, guide, parts = visitor
            rows, columns, tile_scale = distill_parts_backward(
                image,
                features,
                scale,
                (teacher_image, guide, None, teacher_scale),
                ctx.kind,
                (row, parts),
                (weights, weights),
                offset=0 if distance == 0 else len(image),
                backend=ctx.backend,
            )
            image_gradient.add_(rows)
            scale_gradient.add_(tile_scale)
            return columns.float()

        text_gradient = walk((text, teacher_text, column), compare, torch.add, dist.get_world_size() - 1)
        dist.all_reduce(scale_gradient)
        # The scale is not exchanged: this process's loss gives its share of what all losses together give.
        total = everybody.sum()
        share = torch.where(total == 0, 0, own.sum() / torch.where(total == 0, 1, total))
        gradients = (image_gradient.to(image.dtype), text_gradient.to(text.dtype), share * scale_gradient)
        return (gradients[0], gradients[1], gradients[2].to(scale.dtype), None, None, None)


def ring_distillation_losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    scales: tuple[Tensor | float, Tensor | float],
    kind: str = "soft_cross_entropy",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute contrastive loss and distillation over the rows of all processes, passing texts around a ring.

    Args:
        student: (b, D) image and text rows of this process; row i of one belongs to row i of the other.
        teacher: (b, D') image and text rows of the frozen teacher.
        scales: The student's and the teacher's multiplier, one element each, equal on all processes.
        kind: "forward_kl", "reverse_kl" or "soft_cross_entropy".
        backend: "auto", "triton" or "torch".

    Returns:
        The global contrastive loss and distillation, 0-d float32, the same on every process; both directions averaged.
        Gradients are those of gathering with gradients. That of the scale is exact if all processes weigh the two
        losses in the same proportion, as they do in training.

    Raises:
        ShapeError: If shapes do not fit or the teacher requires grad.

    Memory: O(b·(D + D') + block) in both passes. Determinism: bitwise for fixed shapes and processes.

    Source: the exchange is SigLIP's (Zhai et al. 2023, algorithm 2); the losses are those of
    :func:`ftfast.kernels.clip_and_distillation_loss` and :func:`ftfast.kernels.similarity_distillation_loss`.
    """
    check_ring(*student)
    check_teacher(*student, *teacher, None)
    image, text = follow_autocast(*student)
    scale = as_scalar(scales[0], image, "logit_scale")
    teacher_scale = as_scalar(scales[1], image, "teacher_logit_scale").detach()
    guides = (*(t.to(image.dtype).contiguous() for t in teacher), teacher_scale)
    contrastive, distill = _RingDistill.apply(image, text, scale, guides, kind, backend)
    return contrastive, distill

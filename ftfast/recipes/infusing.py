"""INFUSING: fine-grained retrieval that keeps generic image and text retrieval; image tower only, no text data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ftfast import kernels
from ftfast.recipes.base import BatchSpec, Context, Features, Paper, Plan, Recipe, Term, View
from ftfast.recipes.task_loss import build_task
from ftfast.weightspace import l2_sp


@dataclass(frozen=True, kw_only=True)
class InfusingOptions:
    """Options of INFUSING; defaults are the published full method."""

    classification_scale: float = 16.0
    """Scale s of the normalised softmax; fixed, not trained (the paper's 16)."""
    embedding_weight: float = 1000.0
    """Weight of the embedding distillation on generic images (the paper's 1000)."""
    anchor_weight: float = 1e5
    """Weight of the mean-per-tensor L2 to the start weights; the published scripts pass 1e4 and use 1e5."""
    generic_view: View = "resize_crop"
    """Student's view of generic images; published: the training augmentation, against a teacher in evaluation view."""
    batch_form: Literal["round_robin", "joint"] = "round_robin"
    """One domain per step in turn, as published; or both in each step, with the weight anchor doubled."""


def embedding_distillation(features: Features) -> Tensor:
    """Mean over batch and width of (f - f0)^2; equals (2 - 2 cos)/D on unit vectors."""
    return kernels.feature_distillation_loss(features.image, features.teacher_image)


def build(context: Context) -> Plan:
    """Declare classification on target batches, distillation on generic ones, the weight anchor on every step."""
    options: InfusingOptions = context.options
    task = build_task(context, "normface", scale=options.classification_scale)
    joint = options.batch_form == "joint"
    image_tower = [(n, p) for n, p in context.loaded.model.named_parameters() if n.startswith("visual.")]
    anchor = None
    if options.anchor_weight:
        # A round-robin pair of steps applies the anchor twice, so one joint step must double it.
        strength = options.anchor_weight * (2.0 if joint else 1.0)
        anchor = l2_sp(image_tower, strength, reduction="mean_per_tensor", split_qkv=True)
    return Plan(
        batches=(
            task.batch,
            BatchSpec(name="generic", source="generic", view=options.generic_view, teacher="cached_image"),
        ),
        terms=(
            task.term,
            Term(
                name="embedding",
                on="generic",
                loss=embedding_distillation,
                weight=options.embedding_weight,
                source="INFUSING, embedding distillation: mean (f - f0)^2, f0 of the evaluation view",
            ),
        ),
        schedule=options.batch_form,
        heads=task.heads,
        anchor=anchor,
    )


RECIPE = Recipe(
    name="infusing",
    summary="Learn classes with the image tower alone; embeddings and weights are held near the pretrained ones.",
    papers=(
        Paper(
            "Infusing fine-grained visual knowledge to Vision-Language Models",
            "arXiv 2508.12137, ICCV 2025 workshops",
        ),
    ),
    options=InfusingOptions,
    build=build,
    uses_generic=True,
    deviations=(
        "Adam's weight decay 1e-6 is applied to tensors with two or more dimensions only.",
        "Every tensor of the model is one leaf of the anchor, except that fused q/k/v weights count as three.",
    ),
)

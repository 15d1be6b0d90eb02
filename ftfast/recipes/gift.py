"""GIFT: learn a task while distilling and aligning replayed image-text pairs, with adaptive weight consolidation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ftfast import kernels
from ftfast.recipes.base import BatchSpec, Context, Features, Paper, Plan, Recipe, Term, View
from ftfast.recipes.replay import ReplayTexts, pair_texts, text_groups
from ftfast.recipes.task_loss import build_task
from ftfast.weightspace import adaptive_consolidation, l2_sp


@dataclass(frozen=True, kw_only=True)
class GIFTOptions:
    """Options of GIFT. Defaults are the authors' released configuration; the other choices are its ablations."""

    label_smoothing: float = 0.2
    """Label smoothing of the task's cross-entropy over the class prompts."""
    distill_kind: Literal["soft_cross_entropy", "reverse_kl", "feature_mse", "none"] = "soft_cross_entropy"
    """CE(teacher, student) of similarities; KL(student || teacher); squared difference of features; none."""
    distill_sides: Literal["both", "image", "text"] = "both"
    """Towers the distillation reaches; the other side of the similarities is the teacher's."""
    distill_weight: float = 1.0
    """Weight of EACH direction (rows, columns): the two are added, not averaged."""
    temperature: float = 2.0
    """T of both sides; the loss is multiplied by T squared."""
    teacher: Literal["previous", "initial"] = "previous"
    """Model before this task, or before the first task of the sequence (the same model in the first task)."""
    alignment_weight: float = 0.25
    """Weight of EACH direction of the hard-target contrastive loss on replayed pairs; 0 leaves it out."""
    alignment_label_smoothing: float = 0.2
    """Label smoothing of the alignment's multi-positive targets."""
    consolidation: Literal["adaptive", "static", "l2", "none"] = "adaptive"
    """Importance re-estimated every step; its mean over the first static_steps, then fixed; all ones; no penalty."""
    consolidation_weight: float = 1.0
    """lambda in lambda sum F (theta - theta_before_this_task)^2: SUM over weights, no 1/2, F of mean 1 per tensor."""
    static_steps: int = 100
    """Steps over which consolidation "static" averages its importance."""
    view: View = "random_resized_crop"
    """View of the task's images (scale 0.9 to 1, no flip); replayed images take the evaluation view."""
    replay_texts: ReplayTexts = "auto"
    """Texts of replayed images: their captions, or prompts of their classes; auto: captions if there are any."""


def distillation(options: GIFTOptions) -> Callable[[Features], Tensor]:
    """T^2 [CE(softmax(S'/T), S/T) + CE(softmax(S'^T/T), S^T/T)], S = tau Z U^T, S' the teacher's; or an ablation."""
    settings = None
    if options.distill_kind in ("soft_cross_entropy", "reverse_kl"):
        settings = kernels.DistillOptions(kind=options.distill_kind, temperature=options.temperature)

    def loss(f: Features) -> Tensor:
        """Compare the pairs' similarities (or features) with the teacher's."""
        image = f.teacher_image if options.distill_sides == "text" else f.image
        text = f.teacher_text if options.distill_sides == "image" else f.text
        if settings is None:
            sides = [(image, f.teacher_image), (text, f.teacher_text)]
            moving = [kernels.feature_distillation_loss(a, b) for a, b in sides if a is not b]
            return sum(moving[1:], moving[0])
        return 2 * kernels.similarity_distillation_loss(
            image, text, f.teacher_image, f.teacher_text, f.logit_scale, options=settings
        )

    return loss


def build(context: Context) -> Plan:
    """Declare the task term, the two terms on replayed pairs, and the anchor at the weights before the task."""
    options: GIFTOptions = context.options
    task = build_task(context, "class_prompts", label_smoothing=options.label_smoothing, view=options.view)
    texts = pair_texts(context.datasets["generic"], options.replay_texts)
    replay = BatchSpec(
        name="replay",
        source="generic",
        view="eval",
        texts=texts,
        teacher="live" if options.teacher == "previous" else "initial",
        replay=True,
    )

    def alignment(f: Features) -> Tensor:
        """L_ITA = CE(S, Y) + CE(S^T, Y), Y spread evenly over the pairs with the same text."""
        groups = text_groups(texts(f.batch, 0), f.image.device)
        smoothing = options.alignment_label_smoothing
        return 2 * kernels.clip_loss(f.image, f.text, f.logit_scale, labels=groups, label_smoothing=smoothing)

    losses = [
        ("distill", distillation(options), options.distill_weight if options.distill_kind != "none" else 0.0),
        ("align", alignment, options.alignment_weight),
    ]
    source = "GIFT: rows + columns; distillation with T^2, alignment with multi-positive targets"
    replayed = [Term(name=n, on="replay", loss=loss, weight=w, source=source) for n, loss, w in losses if w]
    plan = Plan(batches=(task.batch, replay) if replayed else (task.batch,), terms=(task.term, *replayed))
    moving = [(n, p) for n, p in context.loaded.model.named_parameters() if p.requires_grad]
    if options.consolidation == "l2":
        plan.anchor = l2_sp(moving, options.consolidation_weight, reduction="sum")
    elif options.consolidation != "none":
        plan.anchor = adaptive_consolidation(moving, options.consolidation_weight)
        plan.importance_steps = options.static_steps if options.consolidation == "static" else 0
    return plan


RECIPE = Recipe(
    name="gift",
    summary="Continual learning: distil and align replayed (synthetic) pairs; hold weights by an adaptive importance.",
    papers=(Paper("Synthetic Data is an Elegant GIFT for Continual Vision-Language Models", "CVPR 2025"),),
    options=GIFTOptions,
    build=build,
    uses_generic=True,
    deviations=(
        "Replay batches have train.batch_size pairs; any pairs serve as replay, not only generated ones.",
        "The anchor pulls inside the optimizer step; the gradient is that of the added penalty.",
    ),
)

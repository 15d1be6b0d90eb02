"""ZSCL: distil the initial CLIP on reference images and texts, average weights, hold them by L2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ftfast import kernels
from ftfast.recipes.base import BatchSpec, Context, Features, Paper, Plan, Recipe, Term, View
from ftfast.recipes.replay import ReplayTexts, image_texts
from ftfast.recipes.task_loss import build_task
from ftfast.weightspace import l2_sp


@dataclass(frozen=True, kw_only=True)
class ZSCLOptions:
    """Options of ZSCL."""

    label_smoothing: float = 0.2
    """Label smoothing of the task's cross-entropy over the class prompts."""
    distill_weight: float = 1.0
    """Weight of EACH direction: reference images over texts, and texts over images; they are added."""
    temperature: float = 2.0
    """T of both sides; the loss is multiplied by T squared."""
    average_every: int = 100
    """Weight ensemble: mean of the start weights and those after every n-th step; 0 turns it off."""
    anchor_weight: float = 1.0
    """lambda in lambda sum (theta - theta_before_this_task)^2: SUM over weights, no 1/2; 0 turns it off."""
    reference_texts: ReplayTexts = "auto"
    """Texts of the reference data: captions, or prompts of its classes; every distinct one is used at every step."""
    view: View = "random_resized_crop"
    """View of the task's images (scale 0.9 to 1, no flip); reference images take the evaluation view."""


def build(context: Context) -> Plan:
    """Declare the task term, the distillation on reference images, the anchor and the weight ensemble."""
    options: ZSCLOptions = context.options
    task = build_task(context, "class_prompts", label_smoothing=options.label_smoothing, view=options.view)
    texts = tuple(dict.fromkeys(image_texts(context.datasets["generic"], options.reference_texts)))
    reference = BatchSpec(
        name="reference",
        source="generic",
        view="eval",
        texts=lambda batch, step: texts,
        teacher="initial",
        student_text=False,
    )
    settings = kernels.DistillOptions(kind="soft_cross_entropy", temperature=options.temperature)

    def distillation(f: Features) -> Tensor:
        """T^2 [CE(softmax(S'/T), S/T) + CE(softmax(S'^T/T), S^T/T)], S = tau f(images) g0(texts)^T: teacher's texts."""
        return 2 * kernels.similarity_distillation_loss(
            f.image, f.teacher_text, f.teacher_image, f.teacher_text, f.logit_scale, options=settings
        )

    source = "ZSCL, distillation in feature space: image + text direction, T = 2, T^2"
    term = Term(name="distill", on="reference", loss=distillation, weight=options.distill_weight, source=source)
    moving = [(n, p) for n, p in context.loaded.model.named_parameters() if p.requires_grad]
    return Plan(
        batches=(task.batch, reference),
        terms=(task.term, term),
        anchor=l2_sp(moving, options.anchor_weight, reduction="sum") if options.anchor_weight else None,
        average_every=options.average_every,
    )


RECIPE = Recipe(
    name="zscl",
    summary="Continual learning: distil the initial CLIP on reference data, average weights, L2 to the task's start.",
    papers=(Paper("Preventing Zero-Shot Transfer Degradation in Continual Learning of VLMs", "ICCV 2023"),),
    options=ZSCLOptions,
    build=build,
    uses_generic=True,
    deviations=("Reference batches have train.batch_size images; texts are those of the same reference data.",),
)

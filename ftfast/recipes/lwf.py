"""LwF: fine-tuning that keeps the start model's answers on the task's own images."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.recipes.base import Context, Paper, Plan, Recipe, Term, View
from ftfast.recipes.task_loss import build_task, class_distillation


@dataclass(frozen=True, kw_only=True)
class LwFOptions:
    """Options of LwF on a CLIP."""

    distill_weight: float = 1.0
    """Weight of the distillation."""
    temperature: float = 2.0
    """Softmax temperature of teacher and student."""
    label_smoothing: float = 0.0
    """Label smoothing of the task's cross-entropy."""
    view: View = "resize_crop"
    """View of the task's images: resize, crop and flip; random_resized_crop (scale 0.9 to 1, no flip); or eval."""


def build(context: Context) -> Plan:
    """Declare CE over class prompts, and soft CE between the start model's class probabilities and the student's."""
    options: LwFOptions = context.options
    task = build_task(
        context, "class_prompts", label_smoothing=options.label_smoothing, view=options.view, teacher="live"
    )
    term = Term(
        name="distill",
        on="task",
        loss=class_distillation(options.temperature),
        weight=options.distill_weight,
        source="LwF: T^2 CE(softmax(teacher/T), student/T) over the task's class prompts",
    )
    return Plan(batches=(task.batch,), terms=(task.term, term), heads=task.heads)


RECIPE = Recipe(
    name="lwf",
    summary="Learning without forgetting: keep the start model's class probabilities on the task images.",
    papers=(
        Paper("Learning without Forgetting", "TPAMI 2018"),
        Paper("ZSCL, LwF baseline: class prompts as texts", "ICCV 2023"),
    ),
    options=LwFOptions,
    build=build,
    deviations=("The teacher is the start model; in a sequence of tasks it is the model before the task.",),
)

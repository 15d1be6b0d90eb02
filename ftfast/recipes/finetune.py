"""Naive fine-tuning: the task loss and nothing that remembers. The baseline every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.recipes.base import Context, Paper, Plan, Recipe, View
from ftfast.recipes.task_loss import TaskKind, build_task


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Options of plain fine-tuning."""

    loss: TaskKind = "auto"
    """normface: cosine classifier; class_prompts: CE against class texts; clip: captions; auto: by the data."""
    classification_scale: float = 16.0
    """Scale of the cosine classifier."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    view: View = "resize_crop"
    """View of the task's images: resize, crop and flip; random_resized_crop (scale 0.9 to 1, no flip); or eval."""


def build(context: Context) -> Plan:
    """Declare the task term alone."""
    options: FinetuneOptions = context.options
    task = build_task(
        context,
        options.loss,
        scale=options.classification_scale,
        label_smoothing=options.label_smoothing,
        view=options.view,
    )
    return Plan(batches=(task.batch,), terms=(task.term,), heads=task.heads)


RECIPE = Recipe(
    name="finetune",
    summary="Plain fine-tuning on the task: learns fast, forgets fast. The baseline.",
    papers=(Paper("INFUSING's baseline: same schedule, both regularisers off", "arXiv 2508.12137"),),
    options=FinetuneOptions,
    build=build,
    needs_labels=False,
    deviations=("Generic batches, which carry no loss in the published baseline, are not drawn at all.",),
)

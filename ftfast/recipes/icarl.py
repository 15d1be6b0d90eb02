"""Exemplar replay after iCaRL: a few images of every earlier class, learned again and held by distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ftfast import kernels
from ftfast.recipes.base import BatchSpec, Context, Features, Paper, Plan, Recipe, Term, View, class_prompts_source
from ftfast.recipes.exemplars import Exemplars, choose_exemplars
from ftfast.recipes.task_loss import build_task, class_distillation


@dataclass(frozen=True, kw_only=True)
class ICaRLOptions:
    """Options of iCaRL-style replay."""

    memory_size: int = 2000
    """Images kept in all (K), the same number of every class seen so far, at least one."""
    replay_weight: float = 1.0
    """Weight of the cross-entropy on exemplars, over the prompts of all classes of earlier tasks."""
    distill_weight: float = 1.0
    """Weight of the distillation from the model before the task, on the same exemplars and prompts."""
    temperature: float = 2.0
    """Softmax temperature of teacher and student."""
    label_smoothing: float = 0.2
    """Label smoothing of the task's cross-entropy; the exemplars' has none."""
    view: View = "random_resized_crop"
    """View of task images and exemplars (scale 0.9 to 1, no flip)."""


def build(context: Context) -> Plan:
    """Declare the task term; from the second task on, CE and distillation on exemplars; and what to keep."""
    options: ICaRLOptions = context.options
    task = build_task(context, "class_prompts", label_smoothing=options.label_smoothing, view=options.view)
    before = Exemplars.from_tensors(context.history.carried)

    def carry() -> dict[str, Tensor]:
        """Choose the finished task's exemplars beside those of earlier tasks."""
        return choose_exemplars(context.loaded, context.datasets["data"], before, options.memory_size).tensors()

    if not before.prompts:
        return Plan(batches=(task.batch,), terms=(task.term,), carry=carry)
    memory = before.as_dataset()

    def replay_loss(features: Features) -> Tensor:
        """Classify exemplars among all classes of earlier tasks."""
        return kernels.classification_loss(features.image, features.text, features.batch.labels, features.logit_scale)

    replay = Term(
        name="replay",
        on="memory",
        loss=replay_loss,
        weight=options.replay_weight,
        source="iCaRL, representation update: classification of exemplars",
    )
    distill = Term(
        name="distill",
        on="memory",
        loss=class_distillation(options.temperature),
        weight=options.distill_weight,
        source="iCaRL, representation update: outputs of the previous model; T^2 soft CE",
    )
    texts = class_prompts_source(memory)
    batch = BatchSpec(name="memory", source="memory", view=options.view, texts=texts, teacher="live")
    return Plan(batches=(task.batch, batch), terms=(task.term, replay, distill), memory=memory, carry=carry)


RECIPE = Recipe(
    name="icarl",
    summary="Exemplar replay: a few herded images of every earlier class, learned again and held by distillation.",
    papers=(Paper("iCaRL: Incremental Classifier and Representation Learning", "CVPR 2017"),),
    options=ICaRLOptions,
    build=build,
    deviations=(
        "Class prompts classify, in training (softmax, not one sigmoid per class) and in evaluation (not the nearest "
        "mean of exemplars), as in every method here.",
        "Classes of the task and remembered classes are told apart among themselves; exemplars have a batch of their "
        "own, of the task's size or the whole memory, rather than being mixed with the task's images.",
        "The previous model's outputs are kept on exemplars only, not on the new images.",
    ),
)

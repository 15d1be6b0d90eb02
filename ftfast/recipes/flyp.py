"""FLYP: fine-tune like you pretrain, with the contrastive loss on (image, class prompt) pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from ftfast.data import Batch
from ftfast.losses import ClipLoss
from ftfast.losses.ring import ring_clip_loss
from ftfast.recipes.base import BatchSpec, Context, Paper, Plan, Recipe, Term, TextSource, captions


@dataclass(frozen=True, kw_only=True)
class FlypOptions:
    """Options of FLYP."""


def sampled_prompts(context: Context) -> TextSource:
    """Text source: for each image one prompt of its class, template drawn by (seed, step, position)."""
    dataset = context.datasets["data"]
    if dataset.labels is None:
        return captions
    names, templates = dataset.class_names or (), dataset.templates

    def source(batch: Batch, step: int) -> Sequence[str]:
        """Draw one prompt of its class for each image of the batch."""
        draw = random.Random(f"{context.seed}/{step}")
        labels = batch.labels.tolist() if batch.labels is not None else []
        return [draw.choice(templates).format(names[label]) for label in labels]

    return source


def build(context: Context) -> Plan:
    """Declare the CLIP loss on sampled prompts; images of one class in a batch are negatives, as in the paper."""
    clip = ClipLoss()
    term = Term(
        name="clip",
        on="task",
        loss=lambda f: clip(f.image, f.text, f.logit_scale),
        source="FLYP: symmetric CE over (image, class prompt) pairs",
        ring=lambda f: ring_clip_loss(f.image, cast(Tensor, f.text), f.logit_scale),
    )
    batch = BatchSpec(name="task", view="random_resized_crop", texts=sampled_prompts(context))
    return Plan(batches=(batch,), terms=(term,))


RECIPE = Recipe(
    name="flyp",
    summary="Fine-tune like you pretrain: contrastive loss on class prompts (or captions), both towers.",
    papers=(Paper("Finetune like you pretrain", "CVPR 2023"),),
    options=FlypOptions,
    build=build,
    needs_labels=False,
)

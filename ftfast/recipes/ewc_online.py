"""Online EWC over a sequence of tasks: both towers are held where earlier tasks' Fisher says they matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftfast import kernels
from ftfast.data import Batch, ImageDataset, iterate_once
from ftfast.recipes.base import BatchSpec, Context, Paper, Plan, Recipe, View
from ftfast.recipes.ewc import spread
from ftfast.recipes.replay import pair_texts, text_groups
from ftfast.recipes.task_loss import build_task
from ftfast.weightspace import ewc
from ftfast.weightspace.fisher import FisherOptions, estimate_fisher


@dataclass(frozen=True, kw_only=True)
class OnlineEWCOptions:
    """Options of online EWC."""

    label_smoothing: float = 0.2
    """Label smoothing of the task's cross-entropy over the class prompts; the Fisher has none."""
    anchor_weight: float = 1e3
    """lambda in lambda sum F (theta - theta_before_this_task)^2: SUM over weights, no 1/2 (Avalanche's convention)."""
    fisher_decay: float = 1.0
    """F <- decay F + F_task after each task; 1 adds the Fishers of all tasks."""
    fisher_images: int = 1024
    """Images of each task the Fisher is estimated on, spread evenly over it."""
    fisher_batch_size: int = 64
    """Images per batch: F is the mean of squared BATCH-mean gradients (true labels), about 1/size of the exact one."""
    protect_start: bool = True
    """Before the first task, estimate F of the contrastive loss on generic pairs: what pretraining knows."""
    view: View = "random_resized_crop"
    """View of the task's images (scale 0.9 to 1, no flip)."""


def estimate(context: Context, dataset: ImageDataset, texts: BatchSpec, by_class: bool) -> dict[str, Tensor]:
    """Mean of squared batch gradients of both towers, in evaluation mode.

    Args:
        context: Model at the weights to judge, and options.
        dataset: Images.
        texts: Its text source: class prompts, or one text per image.
        by_class: CE over class prompts; else the symmetric contrastive loss.

    Returns:
        F by parameter name.
    """
    options: OnlineEWCOptions = context.options
    model, few = context.loaded.model, spread(dataset, options.fisher_images)
    device = next(model.parameters()).device
    source = texts.texts

    def batches() -> Iterator[Batch]:
        """Yield the samples batch by batch, on the model's device."""
        for batch in iterate_once(few, context.loaded.eval_transform, batch_size=options.fisher_batch_size):
            yield batch.to(device)

    def loss(model: nn.Module, batch: Any, generator: torch.Generator | None) -> Tensor:
        """Batch loss as a vector of one element, differentiable in both towers."""
        clip: Any = model
        words = list(source(batch, 0)) if source is not None else []
        image = clip.encode_image(batch.images, normalize=True)
        text = clip.encode_text(context.loaded.tokenizer(words).to(device), normalize=True)
        scale = clip.logit_scale.exp().detach()
        if by_class:
            return kernels.classification_loss(image, text, batch.labels, scale).reshape(1)
        return kernels.clip_loss(image, text, scale, labels=text_groups(words, device)).reshape(1)

    options_ = FisherOptions(require_full_coverage=False)
    return estimate_fisher(model, batches(), kind="squared_batch_gradient", loss=loss, options=options_).values


def build(context: Context) -> Plan:
    """Declare the task term, the anchor by the Fisher carried so far, and what to carry on."""
    options: OnlineEWCOptions = context.options
    task = build_task(context, "class_prompts", label_smoothing=options.label_smoothing, view=options.view)
    carried = {name: value.clone() for name, value in context.history.carried.items()}
    if not carried and options.protect_start:
        pairs = spread(context.datasets["generic"], options.fisher_images)
        spec = BatchSpec(name="pairs", texts=pair_texts(pairs))
        carried = estimate(context, pairs, spec, by_class=False)
    moving = [(n, p) for n, p in context.loaded.model.named_parameters() if p.requires_grad]

    def carry() -> dict[str, Tensor]:
        """Estimate the finished task's Fisher and add it to what was carried."""
        new = estimate(context, context.datasets["data"], task.batch, by_class=True)
        return {n: f.cpu() + options.fisher_decay * carried.get(n, torch.zeros_like(f)).cpu() for n, f in new.items()}

    anchor = ewc(moving, carried, options.anchor_weight) if carried else None
    return Plan(batches=(task.batch,), terms=(task.term,), anchor=anchor, carry=carry)


RECIPE = Recipe(
    name="ewc-online",
    summary="Online EWC: a pull to the weights before the task, weighted by the summed Fishers of what came before.",
    papers=(Paper("Progress & Compress", "ICML 2018"), Paper("Overcoming catastrophic forgetting", "PNAS 2017")),
    options=OnlineEWCOptions,
    build=build,
    uses_generic=True,
    deviations=("With protect_start, pretraining counts as the first task, seen through generic pairs.",),
)

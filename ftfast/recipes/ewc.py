"""EWC: fine-tuning with a pull towards the start weights, stronger where the Fisher says a weight matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ftfast.data import Batch, ImageDataset, iterate_once
from ftfast.errors import ConfigError
from ftfast.recipes import finetune
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.weightspace import ewc
from ftfast.weightspace.fisher import FisherOptions, estimate_fisher
from ftfast.weightspace.objectives import ClassificationObjective


@dataclass(frozen=True, kw_only=True)
class EWCOptions(finetune.FinetuneOptions):
    """Options of EWC."""

    anchor_weight: float = 1e3
    """lambda in lambda sum F (theta - theta*)^2, without the factor 1/2 (Avalanche's convention)."""
    fisher: Literal["empirical", "sampled", "squared_batch_gradient"] = "empirical"
    """Per-sample Fisher (true or drawn labels), or each batch's squared mean gradient, often called Fisher too."""
    fisher_images: int = 1024
    """Generic images the Fisher is estimated on, spread evenly over the data."""
    fisher_batch_size: int = 64
    """Images per batch; squared_batch_gradient shrinks with it, so lambda must grow with it."""


def spread(dataset: ImageDataset, count: int) -> ImageDataset:
    """Return ``count`` images evenly spaced over the data, classes renumbered only if some vanish."""
    step = max(1, len(dataset) // count)
    return dataset.subset(range(0, len(dataset), step)[:count], keep_classes=True)


@torch.no_grad()
def class_features(context: Context, dataset: ImageDataset) -> Tensor:
    """Unit-length text features of one prompt per class, (C, D)."""
    model = context.loaded.model
    prompts = [dataset.templates[0].format(name) for name in dataset.class_names or ()]
    device = next(model.parameters()).device
    tokens = context.loaded.tokenizer(prompts)
    return torch.cat([model.encode_text(part.to(device), normalize=True) for part in tokens.split(256)])


def fisher_of_generic(context: Context, options: EWCOptions) -> dict[str, Tensor]:
    """Estimate the Fisher of zero-shot classification on generic data: what the start model knows and must keep.

    Raises:
        ConfigError: If the generic data has no classes.
    """
    dataset = context.datasets["generic"]
    if dataset.labels is None:
        raise ConfigError(f"recipe 'ewc' needs classes in the generic data, but {dataset.description} has none.")
    device = next(context.loaded.model.parameters()).device
    objective = ClassificationObjective(class_features(context, dataset), context.loaded.model.logit_scale.exp().item())
    few = spread(dataset, options.fisher_images)

    def batches() -> Iterator[Batch]:
        """Yield the Fisher samples once, batch by batch, on the model's device."""
        for batch in iterate_once(few, context.loaded.eval_transform, batch_size=options.fisher_batch_size):
            yield batch.to(device)

    estimate = estimate_fisher(
        context.loaded.model, batches(), kind=options.fisher, loss=objective, options=FisherOptions(seed=context.seed)
    )
    return estimate.values


def build(context: Context) -> Plan:
    """Declare the task term and the Fisher-weighted anchor of the image tower."""
    options: EWCOptions = context.options
    plan = finetune.build(context)
    tower = [(n, p) for n, p in context.loaded.model.named_parameters() if p.requires_grad]
    if any(not name.startswith("visual.") for name, _ in tower):
        raise ConfigError(
            "recipe 'ewc' anchors the image tower; set model.lock_text and model.lock_logit_scale to true."
        )
    plan.anchor = ewc(tower, fisher_of_generic(context, options), options.anchor_weight)
    return plan


RECIPE = Recipe(
    name="ewc",
    summary="Elastic weight consolidation: a pull to the start weights, weighted by an exact per-sample Fisher.",
    papers=(Paper("Overcoming catastrophic forgetting in neural networks", "PNAS 2017"),),
    options=EWCOptions,
    build=build,
    uses_generic=True,
    deviations=(
        "The Fisher is that of zero-shot classification on generic data, since pretraining data is not at hand.",
    ),
)

"""L2-SP: fine-tuning with a quadratic pull towards the start weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ftfast.recipes import finetune
from ftfast.recipes.base import Context, Features, Paper, Plan, Recipe
from ftfast.weightspace import l2_sp


@dataclass(frozen=True, kw_only=True)
class L2SPOptions(finetune.FinetuneOptions):
    """Options of L2-SP."""

    anchor_weight: float = 0.01
    """alpha in alpha/2 |w - w0|^2, summed over all shared weights (the paper's range is 1e-3 to 1)."""
    head_weight: float = 0.01
    """beta in beta/2 |w_head|^2 on the classifier, which has no start weights to return to."""


def build(context: Context) -> Plan:
    """Declare the task term and the sum-reduced anchor; the head is pulled towards zero."""
    options: L2SPOptions = context.options
    plan = finetune.build(context)
    shared = [(n, p) for n, p in context.loaded.model.named_parameters() if p.requires_grad]
    plan.anchor = l2_sp(shared, options.anchor_weight, reduction="sum", half=True)
    terms = plan.terms
    if plan.heads and options.head_weight:
        weights = list(plan.heads.parameters())

        def half_squared_norm(features: Features) -> Tensor:
            """Return half the sum of squared head weights."""
            return 0.5 * torch.stack([(weight.float() ** 2).sum() for weight in weights]).sum()

        decay = replace(
            terms[0],
            name="head_decay",
            loss=half_squared_norm,
            weight=options.head_weight,
            source="L2-SP eq. 2, second sum",
        )
        plan.terms = (*terms, decay)
    return plan


RECIPE = Recipe(
    name="l2sp",
    summary="Fine-tuning with an L2 penalty on the distance to the start weights.",
    papers=(Paper("Explicit Inductive Bias for Transfer Learning with Convolutional Networks", "ICML 2018"),),
    options=L2SPOptions,
    build=build,
    needs_labels=False,
)

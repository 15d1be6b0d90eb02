"""LP-FT: fit a linear probe on frozen features first, then fine-tune everything from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.data import ImageDataset
from ftfast.recipes import finetune
from ftfast.recipes.base import Context, Paper, Plan, Recipe


@dataclass(frozen=True, kw_only=True)
class LPFTOptions:
    """Options of LP-FT."""

    classification_scale: float = 16.0
    """Scale of the cosine classifier."""
    probe_weight_decay: float = 1e-4
    """L2 penalty of the probe's logistic regression."""
    probe_iterations: int = 200
    """L-BFGS iterations at most."""


def fit_probe(features: Tensor, labels: Tensor, start: Tensor, options: LPFTOptions) -> Tensor:
    """Logistic regression on frozen unit-length features with unit-length class weights.

    Args:
        features: (N, D) float32.
        labels: (N,) int64.
        start: (C, D) initial weights.
        options: Scale, penalty and iterations.

    Returns:
        (C, D) fitted weights.
    """
    weight = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=options.probe_iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        """Return the regularised probe loss and leave its gradient in the weight."""
        optimizer.zero_grad()
        logits = options.classification_scale * features @ F.normalize(weight, dim=-1).T
        loss = F.cross_entropy(logits, labels) + options.probe_weight_decay * (weight**2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def build(context: Context) -> Plan:
    """Declare the cosine classifier; replace its random weights by the probe before the first step."""
    options: LPFTOptions = context.options
    task_options = finetune.FinetuneOptions(loss="normface", classification_scale=options.classification_scale)
    plan = finetune.build(Context(context.loaded, context.datasets, task_options, context.seed))
    dataset = context.datasets["data"]
    (weight,) = plan.heads.parameters()

    def prepare(embed: Callable[[ImageDataset], Tensor]) -> None:
        """Fit the probe on the embedded data and copy it into the classifier."""
        labels = torch.as_tensor(dataset.labels)
        fitted = fit_probe(embed(dataset), labels, weight.detach().float().cpu(), options)
        with torch.no_grad():
            weight.copy_(fitted)

    plan.prepare = prepare
    return plan


RECIPE = Recipe(
    name="lp-ft",
    summary="Linear probe on frozen features, then full fine-tuning from it.",
    papers=(Paper("Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", "ICLR 2022"),),
    options=LPFTOptions,
    build=build,
    deviations=(
        "The probe is a cosine classifier fitted by L-BFGS on evaluation-view features: the head of the fine-tuning.",
    ),
)

"""WiSE-FT: fine-tune, then walk back part of the way to the start weights."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.recipes import finetune
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.weightspace import interpolate


@dataclass(frozen=True, kw_only=True)
class WiSEOptions(finetune.FinetuneOptions):
    """Options of WiSE-FT."""

    alpha: float = 0.5
    """theta = (1 - alpha) theta_start + alpha theta_tuned; 0 keeps the start weights, 1 the tuned ones."""


def build(context: Context) -> Plan:
    """Declare the task term; interpolate every state entry when training ends."""
    options: WiSEOptions = context.options
    plan = finetune.build(context)
    plan.finalize = lambda start, tuned: interpolate(start, tuned, options.alpha)
    return plan


RECIPE = Recipe(
    name="wise-ft",
    summary="Plain fine-tuning followed by interpolation with the start weights.",
    papers=(Paper("Robust fine-tuning of zero-shot models", "CVPR 2022"),),
    options=WiSEOptions,
    build=build,
    needs_labels=False,
    deviations=("The classifier is not part of the exported CLIP, so it is not interpolated.",),
)

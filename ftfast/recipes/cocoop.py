"""CoCoOp: contexts shifted by a vector that a small network computes from the image."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.models.prompts import PromptSpec
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.recipes.prompt_terms import PromptOptions, prompt_plan


@dataclass(frozen=True, kw_only=True)
class CoCoOpOptions(PromptOptions):
    """Options of CoCoOp."""


def build(context: Context) -> Plan:
    """Declare CE over classes whose contexts are P + meta(f(x)), meta: D -> D/16 -> d."""
    options: CoCoOpOptions = context.options
    spec = PromptSpec(init_text=options.init_text, context_length=options.context_length, image_conditioned=True)
    return prompt_plan(context, spec, "cocoop")


RECIPE = Recipe(
    name="cocoop",
    summary="CoOp whose contexts depend on the image; slow, since every image has its own class texts.",
    papers=(Paper("Conditional Prompt Learning for Vision-Language Models", "CVPR 2022"),),
    options=CoCoOpOptions,
    build=build,
    deviations=("AdamW in place of SGD; the schedule counts steps, not epochs; no random flips.",),
)

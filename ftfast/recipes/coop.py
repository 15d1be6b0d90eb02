"""CoOp: learn the words around the class name; the CLIP is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.models.prompts import PromptSpec
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.recipes.prompt_terms import PlacedPromptOptions, prompt_plan


@dataclass(frozen=True, kw_only=True)
class CoOpOptions(PlacedPromptOptions):
    """Options of CoOp."""


def build(context: Context) -> Plan:
    """Declare CE over classes whose prompts share M trained contexts."""
    options: CoOpOptions = context.options
    spec = PromptSpec(
        init_text=options.init_text,
        context_length=options.context_length,
        position=options.position,
        class_specific=options.class_specific,
    )
    return prompt_plan(context, spec, "coop")


RECIPE = Recipe(
    name="coop",
    summary="Learn a prompt: trained contexts before the class name, nothing else moves.",
    papers=(Paper("Learning to Prompt for Vision-Language Models", "IJCV 2022"),),
    options=CoOpOptions,
    build=build,
    deviations=("AdamW in place of SGD; the schedule counts steps, not epochs; no random flips.",),
)

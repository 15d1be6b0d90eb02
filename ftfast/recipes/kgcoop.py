"""KgCoOp: CoOp whose class features are held near those of the hand-written prompts."""

from __future__ import annotations

from dataclasses import dataclass

from ftfast.models.prompts import PromptSpec
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.recipes.prompt_terms import PlacedPromptOptions, prompt_plan


@dataclass(frozen=True, kw_only=True)
class KgCoOpOptions(PlacedPromptOptions):
    """Options of KgCoOp."""

    knowledge_weight: float = 8.0
    """Weight of 1 - mean_c cos(t_c, hand-written t_c); the hand-written prompts are the data's templates."""


def build(context: Context) -> Plan:
    """Declare CE and the distance to the hand-written class features."""
    options: KgCoOpOptions = context.options
    spec = PromptSpec(
        init_text=options.init_text,
        context_length=options.context_length,
        position=options.position,
        class_specific=options.class_specific,
    )
    return prompt_plan(context, spec, "kgcoop", distill="text_features", distill_weight=options.knowledge_weight)


RECIPE = Recipe(
    name="kgcoop",
    summary="CoOp with its class features held near the hand-written prompts'.",
    papers=(Paper("Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", "CVPR 2023"),),
    options=KgCoOpOptions,
    build=build,
    deviations=("AdamW in place of SGD; the schedule counts steps, not epochs; no random flips.",),
)

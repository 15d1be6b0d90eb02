"""ContCoOp: contexts that attend to the current model's class embeddings, so that they survive a model upgrade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftfast.models.prompts import PromptSpec
from ftfast.recipes.base import Context, Paper, Plan, Recipe
from ftfast.recipes.prompt_terms import Distill, PromptOptions, prompt_plan


@dataclass(frozen=True, kw_only=True)
class ContCoOpOptions(PromptOptions):
    """Options of ContCoOp. The paper's equations were not at hand; what it leaves open is an option."""

    knowledge: Distill = "text_features"
    """L_kd: class features near the hand-written ones (as KgCoOp), or KL(zero-shot || prompted) of each image."""
    knowledge_weight: float = 8.0
    """lambda in L_ce + lambda L_kd; 8 is KgCoOp's."""
    class_embedding: Literal["tokens", "pooled"] = "tokens"
    """What the contexts attend to: the embeddings of the name's tokens ("tokens"), or their mean ("pooled")."""
    weights: Literal["width", "tokens"] = "width"
    """Attention with d x d matrices, for text towers of one origin; or on tokens, P + A E_names + g mean(E_c)."""
    recompute_words: bool = True
    """Contexts are the model's embeddings of init_text plus a trained offset; a new model looks the words up anew."""


def build(context: Context) -> Plan:
    """Declare L_ce + lambda L_kd; P_c = P + W_o Attn(P, E_c, E_c) with W_o = 0 at the start."""
    options: ContCoOpOptions = context.options
    tokens = options.weights == "tokens"
    spec = PromptSpec(
        init_text=options.init_text,
        context_length=options.context_length,
        attention=not tokens,
        token_mixing=tokens,
        pooled=options.class_embedding == "pooled",
        recompute_words=tokens or (options.recompute_words and bool(options.init_text)),
    )
    return prompt_plan(context, spec, "contcoop", distill=options.knowledge, distill_weight=options.knowledge_weight)


RECIPE = Recipe(
    name="contcoop",
    summary="A prompt for several models: contexts attend to the class embeddings of whatever model is loaded.",
    papers=(Paper("Towards Compatible Fine-tuning for Vision-Language Model Updates", "arXiv 2412.20895"),),
    options=ContCoOpOptions,
    build=build,
    deviations=(
        "The paper's code and equations were not available; residual, zero start, query and keys are this project's.",
        "Both forms of L_kd, its weight, recompute_words and weights: tokens are this project's choice.",
        "AdamW in place of SGD; no random flips.",
    ),
)

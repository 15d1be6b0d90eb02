"""CLIP-CITE: full fine-tuning from few images: class vectors, supervised contrast, distillation, then WiSE-FT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.data import Batch
from ftfast.recipes.base import BatchSpec, Context, Paper, Plan, Recipe, Term, class_prompts_source
from ftfast.recipes.cite_terms import ClassVectors, ClipCiteOptions, alignment, contrast, distillation
from ftfast.weightspace import interpolate


def build(context: Context) -> Plan:
    """Declare L = L_DVA + lambda L_SCL + eta L_VLD, and the interpolation of both towers."""
    options: ClipCiteOptions = context.options
    dataset = context.datasets["data"]
    every_prompt = class_prompts_source(dataset)
    prompts = tuple(every_prompt(Batch(torch.empty(0), torch.empty(0), None, None), 0))
    vectors = ClassVectors(_text_features(context, prompts), options.train != "FrozenTC")
    teacher_scale = float(context.loaded.model.logit_scale.detach().exp())
    declared = {
        "DVA": Term(name="dva", on="task", loss=alignment(options, vectors), source="CLIP-CITE eq. 2-3"),
        "SCL": Term(name="scl", on="task", loss=contrast(options), weight=options.scl_weight, source="CLIP-CITE eq. 4"),
        "VLD": Term(
            name="vld",
            on="task",
            loss=distillation(options, teacher_scale),
            weight=options.vld_weight,
            source="CLIP-CITE eq. 5",
        ),
    }

    def prompt_of_each(batch: Batch, step: int) -> Sequence[str]:
        """Text source: the class prompt of each image."""
        return [prompts[label] for label in batch.labels.tolist()] if batch.labels is not None else []

    def merge(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Eq. 7 on every state entry of both towers."""
        return interpolate(start, tuned, options.alpha)

    texts = prompt_of_each if options.vld_axis == "batch" else every_prompt
    return Plan(
        batches=(BatchSpec(name="task", view=options.view, texts=texts, teacher="live"),),
        terms=tuple(term for name, term in declared.items() if name in options.terms),
        heads=nn.ModuleDict({"class_vectors": vectors}),
        finalize=merge,
        classify=vectors.scorer(dataset.class_names or (), options.alpha) if options.classifier == "weights" else None,
    )


def _text_features(context: Context, prompts: Sequence[str]) -> Tensor:
    """Unit text features of the start model, on its device."""
    model = context.loaded.model
    tokens = context.loaded.tokenizer(list(prompts)).to(next(model.parameters()).device)
    with torch.no_grad():
        return F.normalize(model.encode_text(tokens).float(), dim=-1)


RECIPE = Recipe(
    name="clip-cite",
    summary="Few images: tune both towers with class vectors, supervised contrast and distillation; then WiSE-FT.",
    papers=(Paper("Fully Fine-tuned CLIP Models are Efficient Few-Shot Learners", "arXiv 2407.04003"),),
    options=ClipCiteOptions,
    build=build,
    deviations=(
        "Sums over a batch are means (options.reduction: sum restores them); the directions of eq. 4 are added.",
        "The class prompt is the data's first template; the paper writes 'a photo of a [c]' for every data set.",
        "Weight decay is not stated; 0.1 is CLIPood's. The scale of the random crops is not stated; it is 0.9 to 1.",
        "The softmax of eq. 5 runs over the texts of the batch, image to text only, one divergence per image.",
    ),
)

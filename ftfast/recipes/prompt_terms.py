"""Shared by the recipes that learn prompts: their options, plan, and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import kernels
from ftfast.data import class_prompts
from ftfast.models.prompt_files import save_prompt
from ftfast.models.prompts import Position, PromptLearner, PromptSpec
from ftfast.recipes.base import BatchSpec, Context, Features, Plan, Term, View


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that all prompt learners share."""

    init_text: str = "a photo of a"
    """Words the contexts start from; empty: random contexts, N(0, 0.02)."""
    context_length: int = 16
    """Number of random contexts; with init_text there are as many as it has tokens."""
    view: View = "random_resized_crop"
    """View of the images."""


@dataclass(frozen=True, kw_only=True)
class PlacedPromptOptions(PromptOptions):
    """Options of contexts that do not depend on the image."""

    position: Position = "end"
    """Where the class name stands: after the contexts, among them, or before them."""
    class_specific: bool = False
    """Own contexts for every class; such a prompt cannot be used for other classes."""


class PromptLosses:
    """Class features once per step, and the losses made of them.

    Args:
        learner: The prompt.
        names: Training classes.
    """

    def __init__(self, learner: PromptLearner, names: Sequence[str]) -> None:
        self.learner = learner
        self.names = tuple(names)
        self._last: tuple[Features, Tensor] | None = None

    def class_features(self, f: Features) -> Tensor:
        """(C, D), or (B, C, D) for image-conditioned prompts; kept until the next batch."""
        if self._last is None or self._last[0] is not f:
            self._last = (f, self.learner.class_features(self.names, f.image))
        return self._last[1]

    def cross_entropy(self, f: Features) -> Tensor:
        """CE(tau <f(x), t_c>, y)."""
        classes = self.class_features(f)
        if classes.ndim == 2:
            return kernels.classification_loss(f.image, classes, f.batch.labels, f.logit_scale)
        scores = f.logit_scale * torch.einsum("bd,bcd->bc", f.image, classes)
        return F.cross_entropy(scores, torch.as_tensor(f.batch.labels))

    def to_zero_shot(self, zero_shot: Tensor) -> Callable[[Features], Tensor]:
        """KgCoOp: 1 - mean_c cos(t_c, t_c of the hand-written prompts)."""

        def loss(f: Features) -> Tensor:
            """Distance of the class features from the hand-written ones."""
            return 1 - (self.class_features(f) * zero_shot).sum(-1).mean()

        return loss

    def to_zero_shot_scores(self, zero_shot: Tensor) -> Callable[[Features], Tensor]:
        """KL(zero-shot || prompted) between class distributions, per image, with CLIP's temperature."""
        settings = kernels.DistillOptions(kind="forward_kl", directions="image")

        def loss(f: Features) -> Tensor:
            """Compare the class probabilities of each image."""
            return kernels.similarity_distillation_loss(
                f.image, self.class_features(f), f.image.detach(), zero_shot, f.logit_scale, options=settings
            )

        return loss


def zero_shot_features(context: Context) -> Tensor:
    """(C, D) unit class features of the data's hand-written templates, averaged per class, without gradients."""
    dataset, loaded = context.datasets["data"], context.loaded
    device = next(loaded.model.parameters()).device
    groups = class_prompts(dataset.class_names or (), dataset.templates)
    with torch.no_grad():
        tokens = loaded.tokenizer([prompt for group in groups for prompt in group]).to(device)
        each = F.normalize(loaded.model.encode_text(tokens).float(), dim=-1)
        return F.normalize(each.view(len(groups), -1, each.shape[-1]).mean(1), dim=-1)


Distill = Literal["none", "text_features", "class_scores"]


def prompt_plan(
    context: Context, spec: PromptSpec, recipe: str, *, distill: Distill = "none", distill_weight: float = 0.0
) -> Plan:
    """Declare CE over prompted classes, optionally kept near the zero-shot classes; the CLIP is frozen.

    Args:
        context: Model and data.
        spec: What the prompt is made of.
        recipe: Name for the exported folder.
        distill: Keep class features near the hand-written ones (KgCoOp), or class probabilities of each image.
        distill_weight: Weight of that term.

    Returns:
        The plan; it classifies with the prompt and exports it to ``prompt/``.
    """
    names = context.datasets["data"].class_names or ()
    context.loaded.model.requires_grad_(False)
    learner = PromptLearner(context.loaded, spec, names)
    losses = PromptLosses(learner, names)
    terms = [Term(name="classification", on="task", loss=losses.cross_entropy, source="CoOp: CE(tau <f, t_c>, y)")]
    if distill != "none" and distill_weight:
        make = losses.to_zero_shot if distill == "text_features" else losses.to_zero_shot_scores
        source = {"text_features": "KgCoOp: 1 - mean cos(t_c, t_c^zs)", "class_scores": "KL(zero-shot || prompted)"}
        loss = make(zero_shot_features(context))
        terms.append(Term(name="knowledge", on="task", loss=loss, weight=distill_weight, source=source[distill]))

    def export(folder: Path) -> None:
        """Write ``folder/prompt``."""
        config = Path(folder) / "config.yaml"
        settings = config.read_text(encoding="utf-8") if config.is_file() else ""
        save_prompt(Path(folder) / "prompt", learner, context.loaded, recipe=recipe, settings=settings)

    return Plan(
        batches=(BatchSpec(name="task", view=context.options.view),),
        terms=tuple(terms),
        heads=nn.ModuleDict({"prompt": learner}),
        classify=learner.scores,
        export=export,
    )

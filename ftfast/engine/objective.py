"""From batches to one loss: run the model once per batch, then each term on the batch it names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftfast.data import Batch
from ftfast.engine.torch_engine import Engine, unit
from ftfast.models import LoadedModel
from ftfast.recipes import BatchSpec, Features, Plan


class Teachers:
    """The frozen start model, as a table of image features per source and, if a batch asks, as a live copy.

    Args:
        plan: Says which batches need which teacher.
        loaded: Start model; copied before training moves it.
        tables: (N, D) evaluation-view features by source, for "cached_image".
        device: Where teacher features are needed.
        initial: State dict before the first task, for "initial"; None: the start model is the initial one.
    """

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedModel,
        tables: Mapping[str, Tensor],
        device: torch.device,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.device = device
        self.tables = tables
        self.models: dict[str, Any] = {}
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in ("live", "initial"):
            if any(spec.teacher == kind for spec in plan.batches):
                model = copy.deepcopy(loaded.model)
                if kind == "initial" and initial is not None:
                    model.load_state_dict(initial)
                self.models[kind] = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, spec: BatchSpec, batch: Batch, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's (image, text) features for one batch; None where the batch has no such teacher."""
        if spec.teacher == "cached_image":
            return self.tables[spec.source][batch.indices.cpu()].to(self.device, non_blocking=True), None
        model = self.models.get(spec.teacher)
        if model is None:
            return None, None
        text = None if tokens is None else self._text_features(spec.name, model, tokens)
        return unit(model.encode_image(batch.images)), text

    def _text_features(self, name: str, model: Any, tokens: Tensor) -> Tensor:
        """Text features of a batch; kept while the texts stay the same, as class prompts do."""
        known = self._texts.get(name)
        if known is None or known[0] is not tokens:
            self._texts[name] = known = (tokens, unit(model.encode_text(tokens)))
        return known[1]


class Objective:
    """Evaluate a plan's terms on the batches of a step.

    Args:
        plan: The recipe's declaration.
        engine: Runs the model.
        teachers: Frozen start model.
        tokenizer: Texts to tokens.
    """

    def __init__(self, plan: Plan, engine: Engine, teachers: Teachers, loaded: LoadedModel) -> None:
        self.plan = plan
        self.engine = engine
        self.teachers = teachers
        self.tokenizer = loaded.tokenizer
        self._tokens: dict[str, tuple[tuple[str, ...], Tensor]] = {}

    def __call__(self, batches: Mapping[str, Batch], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum and every term.

        Args:
            batches: The batches of this step by name; terms on absent batches are left out.
            step: 0-based step, for text sources that draw.

        Returns:
            The total, differentiable, and the detached unweighted terms by name.
        """
        features = {
            spec.name: self._features(spec, batches[spec.name], step)
            for spec in self.plan.batches
            if spec.name in batches
        }
        total = torch.zeros((), device=self.engine.device)
        values = {}
        for term in self.plan.terms:
            if term.on in features:
                value = term.loss(features[term.on])
                total = total + term.weight * value
                values[term.name] = value.detach()
        return total, values

    def _features(self, spec: BatchSpec, batch: Batch, step: int) -> Features:
        tokens = None if spec.texts is None else self._tokenize(spec.name, tuple(spec.texts(batch, step)))
        image, text, logit_scale = self.engine.forward(batch.images, tokens if spec.student_text else None)
        teacher_image, teacher_text = self.teachers.features(spec, batch, tokens)
        return Features(batch, image, text, logit_scale, teacher_image, teacher_text)

    def _tokenize(self, name: str, texts: tuple[str, ...]) -> Tensor:
        """Tokenize; the last list of each batch is remembered, since class prompts are the same at every step."""
        known = self._tokens.get(name)
        if known is None or known[0] != texts:
            self._tokens[name] = known = (texts, self.tokenizer(list(texts)).to(self.engine.device))
        return known[1]

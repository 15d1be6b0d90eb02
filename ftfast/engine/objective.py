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
    """

    def __init__(self, plan: Plan, loaded: LoadedModel, tables: Mapping[str, Tensor], device: torch.device) -> None:
        self.device = device
        self.tables = tables
        self.model: Any = None
        if any(spec.teacher == "live" for spec in plan.batches):
            self.model = copy.deepcopy(loaded.model).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, spec: BatchSpec, batch: Batch, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's (image, text) features for one batch; None where the batch has no such teacher."""
        if spec.teacher == "cached_image":
            return self.tables[spec.source][batch.indices.cpu()].to(self.device, non_blocking=True), None
        if spec.teacher == "live" and self.model is not None:
            text = None if tokens is None else unit(self.model.encode_text(tokens))
            return unit(self.model.encode_image(batch.images)), text
        return None, None


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
        self._tokens: dict[tuple[str, ...], Tensor] = {}

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
        tokens = None if spec.texts is None else self._tokenize(tuple(spec.texts(batch, step)))
        image, text, logit_scale = self.engine.forward(batch.images, tokens)
        teacher_image, teacher_text = self.teachers.features(spec, batch, tokens)
        return Features(batch, image, text, logit_scale, teacher_image, teacher_text)

    def _tokenize(self, texts: tuple[str, ...]) -> Tensor:
        """Tokenize; the last list is remembered, since class prompts are the same at every step."""
        if texts not in self._tokens:
            self._tokens.clear()
            self._tokens[texts] = self.tokenizer(list(texts)).to(self.engine.device)
        return self._tokens[texts]

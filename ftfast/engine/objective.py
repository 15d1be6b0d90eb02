"""From batches to one loss: run the model once per batch, then each term on the batch it names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ftfast.data import Batch, ImageDataset
from ftfast.engine.torch_engine import Engine, unit
from ftfast.errors import TrainingError
from ftfast.losses.distributed import gather_features
from ftfast.models import LoadedModel
from ftfast.models.speedups import trim_padding
from ftfast.recipes import BatchSpec, Features, Plan, Term
from ftfast.recipes.base import TextSource


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
        loaded: Gives the tokenizer.
        datasets: Data by source; needed with several processes.
        ring: Let terms that can pass texts around a ring of processes do so.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        teachers: Teachers,
        loaded: LoadedModel,
        datasets: Mapping[str, ImageDataset] | None = None,
        ring: bool = False,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.teachers = teachers
        self.tokenizer = loaded.tokenizer
        self._tokens: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        self.datasets = datasets or {}
        self.ring = ring and engine.processes.several
        self._text_per_image: dict[str, bool] = {}

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
                value = self._value(term, features[term.on])
                total = total + term.weight * value
                values[term.name] = value.detach()
        return total, values

    def _value(self, term: Term, features: Features) -> Tensor:
        """A term over the batch of all processes: on gathered features, or by its ring on this process's own."""
        if not self.engine.processes.several:
            return term.loss(features)
        if self.ring and term.ring is not None:
            return term.ring(features)
        return term.loss(self._gathered(features))

    def _gathered(self, features: Features) -> Features:
        """Join the features of all processes, with gradients.

        Every process then computes the same global loss; the gradient that comes back to its own rows is the sum over
        the processes, which averaging parameter gradients turns into the gradient of the global loss.
        """
        processes = self.engine.processes
        own = len(features.image)

        def gather(rows: Tensor | None) -> Tensor | None:
            """Gather features that have one row per image."""
            if rows is None:
                return None
            return gather_features(
                rows, rank=processes.rank, world_size=processes.world_size, local_loss=False, gather_with_grad=True
            )

        def gather_texts(rows: Tensor | None) -> Tensor | None:
            """Gather text features unless they are those of class prompts, which every process has."""
            return gather(rows) if features.text_per_image else rows

        whole: Batch = features.whole_batch or features.batch
        if own * processes.world_size != len(whole.indices):
            raise TrainingError(f"process {processes.rank} has {own} images, the whole batch {len(whole.indices)}.")
        return dataclasses.replace(
            features,
            batch=whole,
            image=cast(Tensor, gather(features.image)),
            text=gather_texts(features.text),
            teacher_image=gather(features.teacher_image),
            teacher_text=gather_texts(features.teacher_text),
        )

    def _features(self, spec: BatchSpec, batch: Batch, step: int) -> Features:
        if self.engine.processes.several:
            return self._shared_features(spec, batch, step)
        tokens = None if spec.texts is None else self._tokenize(spec.name, tuple(spec.texts(batch, step)))
        image, text, logit_scale = self.engine.forward(batch.images, tokens if spec.student_text else None)
        teacher_image, teacher_text = self.teachers.features(spec, batch, tokens)
        return Features(batch, image, text, logit_scale, teacher_image, teacher_text)

    def _shared_features(self, spec: BatchSpec, batch: Batch, step: int) -> Features:
        """Encode this process's rows of the whole batch, so that texts are those a single process would draw."""
        processes, dataset = self.engine.processes, self.datasets.get(spec.source)
        whole = processes.whole_batch(batch, dataset.texts if dataset is not None else None)
        tokens, per_image = None, False
        if spec.texts is not None:
            texts = tuple(spec.texts(whole, step))
            per_image = self._is_per_image(spec, spec.texts, whole, step, len(texts))
            start = processes.rank * len(batch.indices)
            tokens = self._tokenize(spec.name, texts[start : start + len(batch.indices)] if per_image else texts)
        image, text, logit_scale = self.engine.forward(batch.images, tokens if spec.student_text else None)
        teacher_image, teacher_text = self.teachers.features(spec, batch, tokens)
        found = Features(batch, image, text, logit_scale, teacher_image, teacher_text)
        return dataclasses.replace(found, whole_batch=whole, text_per_image=per_image)

    def _is_per_image(self, spec: BatchSpec, texts: TextSource, whole: Batch, step: int, count: int) -> bool:
        """Whether a text source has one text per image (captions), rather than the same texts always (classes)."""
        if spec.name not in self._text_per_image:
            rows = len(whole.indices)
            twice = dataclasses.replace(
                whole,
                indices=whole.indices.repeat(2),
                labels=None if whole.labels is None else whole.labels.repeat(2),
                texts=None if whole.texts is None else whole.texts * 2,
            )
            self._text_per_image[spec.name] = count == rows and len(tuple(texts(twice, step))) == 2 * rows
        return self._text_per_image[spec.name]

    def _tokenize(self, name: str, texts: tuple[str, ...]) -> Tensor:
        """Tokenize; the last list of each batch is remembered, since class prompts are the same at every step."""
        known = self._tokens.get(name)
        if known is None or known[0] != texts:
            tokens = trim_padding(self.engine.module.clip, self.tokenizer(list(texts)))
            self._tokens[name] = known = (texts, tokens.to(self.engine.device))
        return known[1]

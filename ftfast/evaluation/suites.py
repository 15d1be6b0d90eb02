"""Evaluation suites: what is measured on which data, and ``evaluate``, which measures it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ftfast.config.schema import SuiteConfig
from ftfast.data import ImageDataset, class_prompts, open_dataset
from ftfast.errors import ConfigError, DataError
from ftfast.evaluation.embedding import ImageEmbeddings, PixelCache, Progress, embed_images, embed_texts
from ftfast.evaluation.metrics import (
    RETRIEVAL_METRICS,
    classification_metrics,
    ensemble_class_features,
    image_text_metrics,
    retrieval_metrics,
    score_metrics,
)
from ftfast.models.loading import LoadedModel

Results = dict[str, dict[str, float]]
"""Suite name -> metric -> value in [0, 1]."""

DEFAULT_METRIC = {
    "zero_shot": "acc1",
    "image_text_retrieval": "mean_recall_at_1",
    "image_retrieval": "map_at_20",
}
"""Metric in the summary when a suite names none."""

TASK_METRICS = {
    "zero_shot": ("acc1", "acc5", "mean_per_class_recall"),
    "image_text_retrieval": tuple(
        f"{direction}_recall_at_{k}" for k in (1, 5, 10) for direction in ("image_to_text", "text_to_image", "mean")
    ),
    "image_retrieval": RETRIEVAL_METRICS,
}
"""Every metric a task can report."""


def main_metric(suite: SuiteConfig) -> str:
    """Metric that stands for a suite in the summary and in model selection.

    Args:
        suite: Suite settings.

    Returns:
        ``suite.metric``, or the task's default when it is empty.

    Raises:
        ConfigError: The metric is not one that the task reports.
    """
    known = TASK_METRICS[suite.task]
    chosen = suite.metric or DEFAULT_METRIC[suite.task]
    if chosen not in known:
        near = difflib.get_close_matches(chosen, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"suite {suite.name!r}: task '{suite.task}' does not report metric {chosen!r}; it "
            f"reports {', '.join(known)}.{hint}"
        )
    return chosen


@dataclass(frozen=True)
class Suite:
    """A suite with its data opened, ready to be measured many times.

    Attributes:
        config: Settings.
        queries: Images to classify, pairs, or retrieval queries.
        gallery: Images to search; None: the queries themselves.
    """

    config: SuiteConfig
    queries: ImageDataset
    gallery: ImageDataset | None = None


def open_suites(suites: Sequence[SuiteConfig | Suite]) -> list[Suite]:
    """Open the data of each suite and check that its task can be measured on it.

    Args:
        suites: Settings, or suites that are open already.

    Returns:
        One open suite each, in order.

    Raises:
        DataError: A source cannot be opened, or lacks the labels or texts that its task needs.
        ConfigError: Two suites share a name, or a metric does not exist.
    """
    opened: list[Suite] = []
    for item in suites:
        suite = item if isinstance(item, Suite) else _open(item)
        main_metric(suite.config)
        _check(suite)
        if any(suite.config.name == other.config.name for other in opened):
            raise ConfigError(
                f"two suites are called {suite.config.name!r}; results are kept by name, so rename one of them."
            )
        opened.append(suite)
    return opened


def _open(config: SuiteConfig) -> Suite:
    gallery = None if config.gallery is None else open_dataset(config.gallery)
    return Suite(config, open_dataset(config.data), gallery)


def _check(suite: Suite) -> None:
    name, task = suite.config.name, suite.config.task
    for role, dataset in (("data", suite.queries), ("gallery", suite.gallery)):
        if dataset is None:
            continue
        if len(dataset) == 0:
            raise DataError(f"suite {name!r}: {role} ({dataset.description}) has no images.")
        if task in ("zero_shot", "image_retrieval") and dataset.labels is None:
            raise DataError(
                f"suite {name!r}: task '{task}' needs class labels, but {role} ({dataset.description}) has none."
            )
    if task == "zero_shot" and not suite.queries.class_names:
        raise DataError(
            f"suite {name!r}: task 'zero_shot' needs class names, but data ({suite.queries.description}) has none."
        )
    if task == "image_text_retrieval" and suite.queries.texts is None:
        raise DataError(
            f"suite {name!r}: task 'image_text_retrieval' needs a text per image, but data "
            f"({suite.queries.description}) has none."
        )


@dataclass
class _Encoder:
    """One model's embeddings during one ``evaluate`` call; each data set and each list of texts is embedded once."""

    model: nn.Module
    loaded: LoadedModel
    batch_size: int
    device: str | torch.device
    workers: int
    cache: PixelCache | None
    progress: Progress | None
    classify: Callable[[torch.Tensor, Sequence[str]], torch.Tensor | None] | None = None
    _images: dict[str, ImageEmbeddings] = field(default_factory=dict)

    def images(self, dataset: ImageDataset) -> ImageEmbeddings:
        """Features of a data set, computed on first use."""
        key = dataset.fingerprint
        if key not in self._images:
            self._images[key] = embed_images(
                self.model,
                dataset,
                self.loaded.eval_transform,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
                cache=self.cache,
                progress=self.progress,
            )
        return self._images[key]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts."""
        return embed_texts(
            self.model,
            self.loaded.tokenizer,
            texts,
            batch_size=self.batch_size,
            device=self.device,
            progress=self.progress,
        )


def evaluate(
    loaded: LoadedModel,
    suites: Sequence[SuiteConfig | Suite],
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    model: nn.Module | None = None,
    cache: PixelCache | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    classify: Callable[[torch.Tensor, Sequence[str]], torch.Tensor | None] | None = None,
) -> Results:
    """Measure a CLIP on every suite.

    Args:
        loaded: Transform, tokenizer and, unless ``model`` is given, the weights.
        suites: What to measure; open them once with :func:`open_suites` when measuring often.
        batch_size: Images or texts per forward pass.
        device: Where the model is; None: where its parameters are.
        model: Evaluate this model instead of ``loaded.model``, for example the one in training. Its train/eval modes
            are restored afterwards.
        cache: Keeps the transformed images between calls.
        workers: Decoding processes.
        progress: Progress callback.
        classify: Scores (N, C) of images for class names, in place of class prompts (learned prompts, a classifier);
            where it returns None, class prompts decide.

    Returns:
        Suite name -> metric -> value in [0, 1].

    Raises:
        DataError: Data cannot be read or does not fit its task.
        ConfigError: A suite's metric does not exist.
    """
    network = loaded.model if model is None else model
    place = device if device is not None else next((p.device for p in network.parameters()), "cpu")
    encoder = _Encoder(network, loaded, batch_size, place, workers, cache, progress, classify)
    return {suite.config.name: _MEASURE[suite.config.task](suite, encoder) for suite in open_suites(suites)}


def _zero_shot(suite: Suite, encoder: _Encoder) -> dict[str, float]:
    data = suite.queries
    names = tuple(data.class_names or ())
    if encoder.classify is not None:
        images = encoder.images(data)
        scores = encoder.classify(images.features, names)
        if scores is not None:
            return score_metrics(scores, _labels(data)[images.indices.numpy()])
    prompts = class_prompts(names, data.templates)
    flat = [prompt for group in prompts for prompt in group]
    owner = np.repeat(np.arange(len(names)), [len(group) for group in prompts])
    classifier = ensemble_class_features(encoder.texts(flat), owner, len(names))
    images = encoder.images(data)
    return classification_metrics(images.features, classifier, _labels(data)[images.indices.numpy()])


def _image_text(suite: Suite, encoder: _Encoder) -> dict[str, float]:
    """Rows with the same image file are one image with several captions; identical captions are one caption.

    Without the second rule exact ties between identical captions would be decided by their order in the file.
    """
    data = suite.queries
    number_of: dict[str, int] = {}
    first_rows: list[int] = []
    owner: list[int] = []
    for row in range(len(data)):
        name = data.image_name(row)
        if name not in number_of:
            number_of[name] = len(first_rows)
            first_rows.append(row)
        owner.append(number_of[name])
    images = encoder.images(data if len(first_rows) == len(data) else data.subset(first_rows, keep_classes=True))
    place = {image: row for row, image in enumerate(images.indices.tolist())}
    decoded = [row for row in range(len(data)) if owner[row] in place]
    texts = data.texts or []
    captions = {text: number for number, text in enumerate(dict.fromkeys(texts[row] for row in decoded))}
    pairs = np.array([(place[owner[row]], captions[texts[row]]) for row in decoded])
    return image_text_metrics(images.features, encoder.texts(list(captions)), pairs)


def _image_retrieval(suite: Suite, encoder: _Encoder) -> dict[str, float]:
    queries = encoder.images(suite.queries)
    query_labels = _labels(suite.queries)[queries.indices.numpy()]
    gallery_data = suite.gallery
    if gallery_data is None or gallery_data.fingerprint == suite.queries.fingerprint:
        if len(query_labels) == len(np.unique(query_labels)):
            raise DataError(
                f"suite {suite.config.name!r}: every class of {suite.queries.description} has a "
                "single image, so no image has a match "
                "to find. Retrieval needs two images per class, or a gallery."
            )
        return retrieval_metrics(queries.features, query_labels)
    gallery = encoder.images(gallery_data)
    gallery_labels = _shared_labels(suite.queries, gallery_data)[gallery.indices.numpy()]
    if not np.isin(query_labels, gallery_labels).any():
        raise DataError(
            f"suite {suite.config.name!r}: no class of the queries ({suite.queries.description}) occurs in the gallery "
            f"({gallery_data.description}); check that both name their classes alike."
        )
    return retrieval_metrics(queries.features, query_labels, gallery.features, gallery_labels)


def _labels(dataset: ImageDataset) -> np.ndarray:
    return np.asarray(dataset.labels, dtype=np.int64)


def _shared_labels(queries: ImageDataset, gallery: ImageDataset) -> np.ndarray:
    """Gallery labels in the queries' numbering, by class name; a class the queries lack becomes a negative number."""
    labels = _labels(gallery)
    if not queries.class_names or not gallery.class_names:
        return labels
    number = {name: place for place, name in enumerate(queries.class_names)}
    table = np.array([number.get(name, -1 - place) for place, name in enumerate(gallery.class_names)], dtype=np.int64)
    return table[labels]


_MEASURE: Mapping[str, Callable[[Suite, _Encoder], dict[str, float]]] = {
    "zero_shot": _zero_shot,
    "image_text_retrieval": _image_text,
    "image_retrieval": _image_retrieval,
}

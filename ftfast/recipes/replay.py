"""Texts of replayed pairs, shared by the recipes that remember through image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ftfast.data import Batch, ImageDataset, class_prompts
from ftfast.errors import ConfigError
from ftfast.recipes.base import TextSource

ReplayTexts = Literal["auto", "captions", "class_prompts"]


def image_texts(dataset: ImageDataset, kind: ReplayTexts = "auto") -> list[str]:
    """Return one text per image.

    Args:
        dataset: Pairs, or images with classes.
        kind: "captions": the data's own; "class_prompts": the first template with the class name; "auto": captions if
            there are any.

    Returns:
        N texts.

    Raises:
        ConfigError: If the data lacks what ``kind`` needs.
    """
    if kind != "class_prompts" and dataset.texts is not None:
        return list(dataset.texts)
    if kind == "captions" or dataset.labels is None or dataset.class_names is None:
        missing = "classes" if kind == "class_prompts" else "captions"
        raise ConfigError(
            f"replay needs a text per image, but generic data ({dataset.description}) has no {missing}. "
            "Set generic.text_column or generic.label_column, or options.replay_texts."
        )
    prompts = [group[0] for group in class_prompts(dataset.class_names, dataset.templates[:1])]
    return [prompts[label] for label in dataset.labels]


def pair_texts(dataset: ImageDataset, kind: ReplayTexts = "auto") -> TextSource:
    """Text source: the text of each image of the batch, see :func:`image_texts`."""
    texts = image_texts(dataset, kind)

    def of_batch(batch: Batch, step: int) -> Sequence[str]:
        """Look the texts up by image number."""
        return [texts[index] for index in batch.indices.tolist()]

    return of_batch


def text_groups(texts: Sequence[str], device: torch.device) -> Tensor:
    """Number texts so that equal texts share a number: multi-positive targets.

    Args:
        texts: B texts.
        device: Where the numbers go.

    Returns:
        (B,) int64.
    """
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts], device=device)

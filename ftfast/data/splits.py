"""Deterministic ways to divide a data set: by class, by image, few-shot, base and new."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.errors import DataError


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise DataError(f"a split fraction must lie between 0 and 1, not {fraction:g}.")


def _classes(dataset: ImageDataset, purpose: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if dataset.labels is None or dataset.class_names is None:
        raise DataError(f"{dataset.name}: {purpose} needs classes; use class folders or set data.label_column.")
    return dataset.labels, dataset.class_names


def _share(count: int, fraction: float) -> int:
    """Round, but leave at least one on each side."""
    return min(max(round(count * fraction), 1), count - 1)


def split_classes(dataset: ImageDataset, fraction: float = 0.8, seed: int = 42) -> tuple[ImageDataset, ImageDataset]:
    """Split by class, so that no class stands on both sides (open-set validation).

    INFUSING (arXiv 2508.12137) trains on 80 % of the training classes and validates on the rest; rounding to the
    nearest number gives its published class counts (SOP 9,054 of 11,318; In-Shop 3,198 of 3,997; Cars 78 of 98).

    Args:
        dataset: Images with at least two classes.
        fraction: Share of the classes in the first part.
        seed: Seed of the choice.

    Returns:
        Two sets in dataset order, each relabelled from 0.

    Raises:
        DataError: No classes, fewer than two, or a fraction outside (0, 1).
    """
    _check_fraction(fraction)
    labels, class_names = _classes(dataset, "a split by class")
    if len(class_names) < 2:
        raise DataError(f"{dataset.name}: a split by class needs two classes, but there is only '{class_names[0]}'.")
    order = np.random.default_rng(seed).permutation(len(class_names))
    first = np.isin(labels, order[: _share(len(class_names), fraction)])
    return dataset.subset(np.flatnonzero(first)), dataset.subset(np.flatnonzero(~first))


def split_images(dataset: ImageDataset, fraction: float = 0.8, seed: int = 42) -> tuple[ImageDataset, ImageDataset]:
    """Split by image; both sides keep the class numbering of the whole set.

    With classes the split is made inside each class (rounded, at least one image on each side where the class has
    two), so that every class occurs on both sides even in small sets. INFUSING splits ImageNet by image without regard
    to class, which amounts to the same with 1,000 images per class.

    Args:
        dataset: At least two images.
        fraction: Share of the images in the first part.
        seed: Seed of the choice.

    Returns:
        Two sets in dataset order without common images.

    Raises:
        DataError: Fewer than two images, or a fraction outside (0, 1).
    """
    _check_fraction(fraction)
    if len(dataset) < 2:
        raise DataError(f"{dataset.name}: a split needs two images, but there are {len(dataset)}.")
    rng = np.random.default_rng(seed)
    first = np.zeros(len(dataset), dtype=bool)
    if dataset.labels is None:
        first[rng.permutation(len(dataset))[: _share(len(dataset), fraction)]] = True
    else:
        for members in _members(dataset.labels):
            if len(members) == 1:
                first[members] = True
            else:
                first[rng.permutation(members)[: _share(len(members), fraction)]] = True
    if first.all():  # only classes of one image: nothing was left for the second part
        first[rng.permutation(len(dataset))[_share(len(dataset), fraction) :]] = False
    return (
        dataset.subset(np.flatnonzero(first), keep_classes=True),
        dataset.subset(np.flatnonzero(~first), keep_classes=True),
    )


def few_shot(dataset: ImageDataset, shots: int, seed: int, *, repeat: bool = False) -> ImageDataset:
    """Draw exactly ``shots`` images of every class.

    The draw of a class depends on (seed, class name) only and smaller draws are prefixes of larger ones, so curves
    over 1, 2, 4, 8, 16 shots vary less and adding a class changes no other.

    Args:
        dataset: Images with classes.
        shots: Images per class.
        seed: Seed of the draw.
        repeat: A class with fewer images: False takes all it has (as Dassl does), True repeats them to ``shots``.

    Returns:
        The drawn images, sorted by class; all class names are kept.

    Raises:
        DataError: No classes, no images, or ``shots`` below 1.
    """
    if shots < 1:
        raise DataError(f"few-shot sampling needs at least 1 image per class, not {shots}.")
    drawn = [order[:shots] if not repeat else np.resize(order, shots) for order in _drawn_orders(dataset, seed)]
    if not drawn:
        raise DataError(f"{dataset.name} ({dataset.origin}) has no images to draw from.")
    return dataset.subset(np.concatenate(drawn), keep_classes=True)


def few_shot_validation(dataset: ImageDataset, shots: int, seed: int) -> ImageDataset:
    """Draw the validation images that go with :func:`few_shot`: ``min(shots, 4)`` of the next ones of every class.

    Args:
        dataset: The set that the training images were drawn from.
        shots: Training images per class.
        seed: Seed of the draw.

    Returns:
        Images disjoint from the training draw, sorted by class; all class names are kept.

    Raises:
        DataError: No classes, or no class has more than ``shots`` images.
    """
    drawn = np.concatenate(
        [np.empty(0, np.int64), *(order[shots : shots + min(shots, 4)] for order in _drawn_orders(dataset, seed))]
    )
    if not len(drawn):
        raise DataError(f"{dataset.name}: no class has more than {shots} images, so none is left for validation.")
    return dataset.subset(drawn, keep_classes=True)


def base_new_split(dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Split the classes, in label order, into the first ceil(n / 2) ("base") and the rest ("new").

    The protocol of CoCoOp, MaPLe and CLIP-CITE (arXiv 2407.04003).

    Args:
        dataset: Images with at least two classes.

    Returns:
        Base and new, each relabelled from 0.

    Raises:
        DataError: Fewer than two classes.
    """
    labels, class_names = _classes(dataset, "a base/new split")
    if len(class_names) < 2:
        raise DataError(f"{dataset.name}: a base/new split needs two classes, but there is only '{class_names[0]}'.")
    base = labels < -(-len(class_names) // 2)
    return dataset.subset(np.flatnonzero(base)), dataset.subset(np.flatnonzero(~base))


def class_half(dataset: ImageDataset, half: Literal["base", "new"]) -> ImageDataset:
    """Keep the first ceil(n / 2) classes in label order ("base"), or the others ("new"), by name, not by presence.

    Unlike :func:`base_new_split`, a class without images keeps its number, so that the training and the test side of a
    set are numbered alike.

    Args:
        dataset: Images with at least two classes.
        half: Which classes.

    Returns:
        Their images, relabelled from 0.

    Raises:
        DataError: Fewer than two classes.
    """
    labels, class_names = _classes(dataset, "a base/new split")
    if len(class_names) < 2:
        raise DataError(f"{dataset.name}: a base/new split needs two classes, but there is only '{class_names[0]}'.")
    cut = -(-len(class_names) // 2)
    low, high = (0, cut) if half == "base" else (cut, len(class_names))
    chosen = dataset.subset(np.flatnonzero((labels >= low) & (labels < high)), keep_classes=True)
    own = np.asarray(chosen.labels) - low
    return replace(chosen, labels=own, class_names=class_names[low:high], origin=f"{dataset.origin}, {half} classes")


def classes_short_of(dataset: ImageDataset, shots: int) -> int:
    """Count the classes that have fewer than ``shots`` images; a few-shot draw takes all of theirs."""
    labels, class_names = _classes(dataset, "few-shot sampling")
    return int((np.bincount(labels, minlength=len(class_names)) < shots).sum())


def _members(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def _drawn_orders(dataset: ImageDataset, seed: int) -> Iterator[np.ndarray]:
    labels, class_names = _classes(dataset, "few-shot sampling")
    for members in _members(labels):
        name = class_names[labels[members[0]]]
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield np.random.default_rng([seed, int.from_bytes(digest, "little")]).permutation(members)

"""Which images form which batch: plans that are pure functions of (seed, epoch), so any position can be restored.

A plan yields *global* batches, those of all processes together. Process r of W takes the r-th slice of each, so all
processes do equal work and no image is seen twice in one global batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.errors import DataError

SamplerName = Literal["shuffle", "class_balanced", "no_duplicate_text", "hard_negative"]


class BatchPlan(Protocol):
    """The batches of every epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in each epoch."""

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the global batches of one epoch, each an int64 array of dataset indices."""


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Rarely changed settings of a loader."""

    images_per_class: int = 4
    """Images of each class in a class-balanced batch."""
    neighbours: np.ndarray | None = None
    """(N, K) int64 hard negatives of every image (`ftfast.search.hard_negatives`), -1 where there are fewer."""
    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """Number of processes that share each global batch."""
    prefetch_factor: int = 4
    """Batches that each worker prepares in advance."""


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed & (2**63 - 1), epoch])


def _chunks(order: np.ndarray, size: int, drop_last: bool, multiple: int) -> list[np.ndarray]:
    steps = len(order) // size if drop_last else -(-len(order) // size)
    batches = [order[i * size : (i + 1) * size] for i in range(steps)]
    if batches and len(batches[-1]) % multiple:
        # As in DistributedSampler: repeat images from the front so that every process gets the same number.
        missing = multiple - len(batches[-1]) % multiple
        batches[-1] = np.concatenate([batches[-1], np.resize(order, missing)])
    return batches


@dataclass(frozen=True)
class SequentialPlan:
    """Every image once, in order.

    Args:
        size: Number of images.
        batch_size: Global batch size.
        drop_last: Leave out a last, smaller batch.
        multiple: Pad the last batch to a multiple of this (the number of processes).
    """

    size: int
    batch_size: int
    drop_last: bool = False
    multiple: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches; the same in every epoch."""
        return _chunks(np.arange(self.size), self.batch_size, self.drop_last, self.multiple)


@dataclass(frozen=True)
class ShuffledPlan(SequentialPlan):
    """Every image once, in an order drawn anew for each epoch.

    Args:
        size: Number of images.
        batch_size: Global batch size.
        drop_last: Leave out a last, smaller batch.
        multiple: Pad the last batch to a multiple of this (the number of processes).
        seed: Seed of the order.
    """

    seed: int = 0

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of ``epoch``."""
        order = _generator(self.seed, epoch).permutation(self.size)
        return _chunks(order, self.batch_size, self.drop_last, self.multiple)


class ClassBalancedPlan:
    """P classes x K images in every batch, for losses that need positives.

    Classes are drawn without replacement until all were used, then again; every class is therefore seen equally often,
    whatever its size. A class walks through its shuffled images; one with fewer than K images repeats them.

    Args:
        labels: Class of each image, int64 (N,).
        class_names: Names, for messages.
        batch_size: Images per process, a multiple of K.
        seed: Seed of the order.
        options: K and the number of processes.

    Raises:
        DataError: The batch size is no multiple of K, or the set has fewer than P classes.
    """

    def __init__(
        self, labels: np.ndarray, class_names: Sequence[str], batch_size: int, seed: int, options: LoaderOptions
    ) -> None:
        images_per_class = options.images_per_class
        per_batch = batch_size * options.world_size // images_per_class
        if batch_size % images_per_class:
            raise DataError(
                f"class-balanced batches of {images_per_class} images per class need a batch size that is a "
                f"multiple of {images_per_class}, not {batch_size}. "
                f"Set train.batch_size: {max(1, batch_size // images_per_class) * images_per_class}."
            )
        if per_batch > len(class_names):
            largest = max(1, len(class_names) // options.world_size) * images_per_class
            raise DataError(
                f"class-balanced batches need {per_batch} classes ({images_per_class} images each, "
                f"{per_batch * images_per_class} in all), but the data has {len(class_names)}. "
                f"Set train.batch_size: {largest} or less."
            )
        order = np.argsort(labels, kind="stable")
        self._members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        self._per_batch, self._images, self._seed = per_batch, images_per_class, seed
        self._steps = max(1, len(labels) // (per_batch * images_per_class))

    @property
    def steps_per_epoch(self) -> int:
        """As many batches as fit the number of images."""
        return self._steps

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of ``epoch``; images of one class stand together."""
        rng = _generator(self._seed, epoch)
        members = [rng.permutation(m) for m in self._members]
        cursor = np.zeros(len(members), dtype=np.int64)
        queue: list[int] = []
        batches = []
        for _ in range(self._steps):
            chosen = queue[: self._per_batch]
            del queue[: self._per_batch]
            if len(chosen) < self._per_batch:
                fresh = rng.permutation(len(members))
                added = [int(c) for c in fresh if c not in chosen][: self._per_batch - len(chosen)]
                taken = set(added)
                queue = [int(c) for c in fresh if c not in taken]
                chosen += added
            rows = []
            for c in chosen:
                rows.append(np.take(members[c], np.arange(cursor[c], cursor[c] + self._images), mode="wrap"))
                cursor[c] += self._images
            batches.append(np.concatenate(rows))
        return batches


class DistinctTextPlan:
    """No caption twice in one batch: a duplicate would be pushed away from its own twin by a contrastive loss.

    With c_t images of caption t, m full batches of size B without duplicates exist exactly if
    ``sum_t min(c_t, m) >= m * B``; the plan uses the largest such m. Dealing the images, grouped by caption, to m
    batches in turn then never puts two of one group into one batch, and costs O(N log N).

    Args:
        texts: Caption of each image.
        batch_size: Global batch size B.
        seed: Seed of the order.

    Raises:
        DataError: Fewer distinct captions than B.
    """

    def __init__(self, texts: Sequence[str], batch_size: int, seed: int) -> None:
        numbers: dict[str, int] = {}
        self._groups = np.fromiter((numbers.setdefault(t, len(numbers)) for t in texts), np.int64, len(texts))
        self._counts = np.bincount(self._groups)
        if len(numbers) < batch_size:
            raise DataError(
                f"batches without duplicate captions need {batch_size} distinct captions, but the data has "
                f"{len(numbers)}. Set train.batch_size: {len(numbers)} or less."
            )
        self._batch_size, self._seed = batch_size, seed
        low, high = 1, len(texts) // batch_size  # feasible(m) is monotone: min(c, m) / m falls as m grows
        while low < high:
            middle = (low + high + 1) // 2
            if np.minimum(self._counts, middle).sum() >= middle * batch_size:
                low = middle
            else:
                high = middle - 1
        self._steps = low

    @property
    def steps_per_epoch(self) -> int:
        """The largest possible number of full batches."""
        return self._steps

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of ``epoch``."""
        rng = _generator(self._seed, epoch)
        images = rng.permutation(len(self._groups))
        rank_of_group = rng.permutation(len(self._counts))
        images = images[np.argsort(rank_of_group[self._groups[images]], kind="stable")]
        groups = self._groups[images]
        starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
        position = np.arange(len(images)) - np.repeat(starts, np.diff(np.r_[starts, len(images)]))
        dealt = images[position < self._steps]
        return [dealt[b :: self._steps][: self._batch_size] for b in rng.permutation(self._steps)]


class HardNegativePlan:
    """Batches of images that the model confuses: each is grown along the hard negatives of its own members.

    A batch starts at the next image of the epoch's order, takes that image's hard negatives, then theirs, and so on,
    until it is full; where they run out, the next image of the order starts anew. Every image comes at most once in an
    epoch, and no caption twice in a batch, unless only its own twins are left to fill the batch.

    Args:
        neighbours: (N, K) int64 negatives of each image, hardest first, -1 for none.
        size: Number of images.
        batch_size: Global batch size.
        seed: Seed of the order.
        texts: Caption of each image, if there are any.

    Raises:
        DataError: `neighbours` has other than one row per image, or names an image that does not exist.
    """

    def __init__(
        self, neighbours: np.ndarray, size: int, batch_size: int, seed: int, texts: Sequence[str] | None = None
    ) -> None:
        if neighbours.ndim != 2 or len(neighbours) != size:
            raise DataError(f"LoaderOptions.neighbours has shape {neighbours.shape}; the data has {size} images.")
        if neighbours.size and not -1 <= neighbours.min() <= neighbours.max() < size:
            wrong = neighbours.max() if neighbours.max() >= size else neighbours.min()
            raise DataError(
                f"LoaderOptions.neighbours names image {wrong}, but the data has images 0 to {size - 1} (-1: none)."
            )
        self._neighbours = neighbours.tolist()
        self._texts = list(texts) if texts is not None else None
        self._batch_size, self._seed = batch_size, seed

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches."""
        return len(self._neighbours) // self._batch_size

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of ``epoch``; the hardest stand next to each other."""
        order = deque(_generator(self._seed, epoch).permutation(len(self._neighbours)).tolist())
        free = [True] * len(order)
        return [self._grow(order, free) for _ in range(self.steps_per_epoch)]

    def _grow(self, order: deque[int], free: list[bool]) -> np.ndarray:
        batch: list[int] = []
        captions: set[str] = set()
        waiting: deque[int] = deque()  # negatives of members, hardest members first
        postponed: list[int] = []  # twins of a caption that is in the batch already
        while len(batch) < self._batch_size:
            source = waiting or order
            if not source:
                order.extend(postponed)
                captions, postponed = set(), []
                continue
            image = source.popleft()
            if not free[image]:
                continue
            text = self._texts[image] if self._texts is not None else None
            if text is not None and text in captions:
                if source is order:
                    postponed.append(image)
                continue
            if text is not None:
                captions.add(text)
            free[image] = False
            batch.append(image)
            waiting.extend(other for other in self._neighbours[image] if other >= 0 and free[other])
        order.extendleft(image for image in reversed(postponed) if free[image])
        return np.asarray(batch, dtype=np.int64)


def make_plan(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    sampler: SamplerName,
    options: LoaderOptions,
) -> BatchPlan:
    """Choose and build the plan of a loader.

    Args:
        dataset: Images, labels and captions.
        batch_size: Images per batch and process.
        seed: Seed of the order.
        shuffle: Draw a new order for each epoch; False: dataset order.
        drop_last: Leave out a last, smaller batch.
        sampler: How batches are composed.
        options: Images per class and number of processes.

    Returns:
        A plan with at least one batch per epoch.

    Raises:
        DataError: The data cannot fill one batch, or lacks what the sampler needs.
    """
    total = batch_size * options.world_size
    if batch_size < 1:
        raise DataError(f"batch size {batch_size} is not positive; set train.batch_size to 1 or more.")
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to load.")
    if sampler == "class_balanced":
        if dataset.labels is None or dataset.class_names is None:
            raise DataError(f"{dataset.name}: class-balanced batches need classes; set data.label_column.")
        return ClassBalancedPlan(dataset.labels, dataset.class_names, batch_size, seed, options)
    if drop_last and len(dataset) < total:
        raise DataError(
            f"{dataset.name}: {len(dataset)} images do not fill one batch of {total}. "
            f"Set train.batch_size: {max(1, len(dataset) // options.world_size)} or less."
        )
    if sampler == "no_duplicate_text":
        if dataset.texts is None:
            raise DataError(f"{dataset.name}: batches without duplicate captions need captions; set data.text_column.")
        return DistinctTextPlan(dataset.texts, total, seed)
    if sampler == "hard_negative":
        if options.neighbours is None:
            raise DataError(
                f"{dataset.name}: hard-negative batches need LoaderOptions(neighbours=...), the result of "
                "ftfast.search.hard_negatives on the model's features."
            )
        return HardNegativePlan(options.neighbours, len(dataset), total, seed, dataset.texts)
    if sampler != "shuffle":
        raise DataError(
            f"unknown sampler '{sampler}'; use shuffle, class_balanced, no_duplicate_text or hard_negative."
        )
    if not shuffle:
        return SequentialPlan(len(dataset), total, drop_last, options.world_size)
    return ShuffledPlan(len(dataset), total, drop_last, options.world_size, seed)

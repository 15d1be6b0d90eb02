"""One batch: decoding, seeded augmentation and the replacement of bad images. Runs inside the loading workers."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftfast.data.dataset import ImageDataset
from ftfast.data.images import BadImageError

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Args:
        images: (B, 3, H, W) float, transformed.
        indices: Position of each image in the dataset, (B,) int64.
        labels: Class of each image, (B,) int64; None without classes.
        texts: Caption of each image; None without captions.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """Copy the tensors to ``device`` without waiting for the copy (pinned memory permitting)."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            indices=self.indices.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Move the tensors to page-locked memory; called by PyTorch's DataLoader."""
        return replace(
            self,
            images=self.images.pin_memory(),
            indices=self.indices.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


@dataclass(frozen=True)
class Fetched:
    """A batch, or None when no image of it could be decoded, and what could not be decoded on the way.

    Args:
        batch: The batch.
        bad: Index and message of each image that could not be decoded.
    """

    batch: Batch | None
    bad: tuple[tuple[int, str], ...] = ()

    def pin_memory(self) -> Fetched:
        """Move the batch to page-locked memory; called by PyTorch's DataLoader."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class BatchKey:
    """Which images to fetch.

    Args:
        epoch: Number of the epoch, from 0.
        indices: Images of this process, int64 (B,).
        whole: Images of all processes, int64 (B * processes,).
    """

    epoch: int
    indices: np.ndarray
    whole: np.ndarray


def augmentation_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of the random numbers that augment image ``index`` in ``epoch``, in [0, 2^63)."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def _private_randomness() -> Iterator[None]:
    """Give back the global random states that augmentations draw from as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # the CPU's only: never starts CUDA in a worker
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


class Fetcher:
    """Turns (epoch, indices) into a batch.

    Args:
        dataset: Images.
        transform: From RGB image to tensor.
        seed: Seed of the augmentation.
        replace_bad: What may stand in for a bad image: ``next``, ``class_balanced``, ``no_duplicate_text``, ``never``.
        allowed: Number of bad images above which loading stops, so that looking for replacements may end.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int, replace_bad: str, allowed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.replace_bad = replace_bad
        self.allowed = allowed

    def __getitem__(self, key: BatchKey) -> Fetched:
        bad: dict[int, str] = {}
        images: list[Tensor] = []
        used: list[int] = []
        with _private_randomness():
            for index in key.indices.tolist():
                for candidate in self._candidates(index, key.whole, used):
                    try:
                        image = self.dataset.load_image(candidate)
                    except BadImageError as error:
                        bad[candidate] = str(error)
                        if len(bad) > self.allowed:
                            return Fetched(None, tuple(bad.items()))
                        continue
                    _seed_all(augmentation_seed(self.seed, key.epoch, candidate))
                    images.append(self.transform(image))
                    used.append(candidate)
                    break
        return Fetched(self._collate(images, used) if images else None, tuple(bad.items()))

    def _candidates(self, index: int, whole: np.ndarray, used: list[int]) -> Iterator[int]:
        """Yield the image itself, then those that may stand in for it, best first."""
        yield index
        if self.replace_bad == "never":
            return
        size = len(self.dataset)
        taken = {*whole.tolist(), *used}
        others = [i % size for i in range(index + 1, index + size)]
        labels, texts = self.dataset.labels, self.dataset.texts
        if self.replace_bad == "class_balanced" and labels is not None:
            others = [i for i in others if labels[i] == labels[index]]
        elif self.replace_bad == "no_duplicate_text" and texts is not None:
            present = {texts[i] for i in taken if i != index}
            others = [i for i in others if texts[i] not in present]
        yield from (i for i in others if i not in taken)
        yield from (i for i in others if i in taken)  # rather an image twice than a smaller batch

    def _collate(self, images: list[Tensor], used: list[int]) -> Batch:
        labels, texts = self.dataset.labels, self.dataset.texts
        return Batch(
            images=torch.stack(images),
            indices=torch.tensor(used, dtype=torch.int64),
            labels=None if labels is None else torch.from_numpy(labels[used]),
            texts=None if texts is None else tuple(texts[i] for i in used),
        )

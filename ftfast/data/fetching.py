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
from PIL import Image
from torch import Tensor
from torchvision import transforms

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


class TwoStage:
    """A torchvision pipeline ending with ``ToTensor, Normalize``, with these two applied to whole batches.

    One by one they cost a third of the time of a small image; on a batch they give the same bits. open_clip's
    transforms and those of this package end so; other transforms are called as they are.

    Args:
        transform: Any transform from an image to a tensor.
    """

    def __init__(self, transform: Transform) -> None:
        steps = list(transform.transforms) if isinstance(transform, transforms.Compose) else []
        self._fits = [type(step) for step in steps[-2:]] == [transforms.ToTensor, transforms.Normalize]
        self._steps = steps[:-2] if self._fits else [transform]
        self._last = steps[-2:] if self._fits else []
        if self._fits:
            self._mean = torch.as_tensor(steps[-1].mean, dtype=torch.float32).view(-1, 1, 1)
            self._std = torch.as_tensor(steps[-1].std, dtype=torch.float32).view(-1, 1, 1)

    def one(self, image: Image.Image) -> Tensor | np.ndarray:
        """Return uint8 (H, W, 3) before the last two steps, or the finished tensor where that does not fit."""
        result: Any = image
        for step in self._steps:
            result = step(result)
        if self._fits and isinstance(result, Image.Image) and result.mode == "RGB":
            return np.asarray(result)
        for step in self._last:
            result = step(result)
        return result

    def batch(self, images: list[Tensor | np.ndarray]) -> Tensor:
        """Finish and stack what :meth:`one` returned, to float (B, 3, H, W)."""
        pixels = [image for image in images if isinstance(image, np.ndarray)]
        if len(pixels) < len(images):
            return torch.stack([i if isinstance(i, Tensor) else self.batch([i])[0] for i in images])
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return stacked.float().div_(255).sub_(self._mean).div_(self._std)


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
        self.transform = TwoStage(transform)
        self.seed = seed
        self.replace_bad = replace_bad
        self.allowed = allowed

    def __getitem__(self, key: BatchKey) -> Fetched:
        bad: dict[int, str] = {}
        images: list[Tensor | np.ndarray] = []
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
                    images.append(self.transform.one(image))
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

    def _collate(self, images: list[Tensor | np.ndarray], used: list[int]) -> Batch:
        labels, texts = self.dataset.labels, self.dataset.texts
        return Batch(
            images=self.transform.batch(images),
            indices=torch.tensor(used, dtype=torch.int64),
            labels=None if labels is None else torch.from_numpy(labels[used]),
            texts=None if texts is None else tuple(texts[i] for i in used),
        )

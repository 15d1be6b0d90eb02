"""Embed images and texts with a CLIP: no gradients, eval mode, float32 rows of unit length on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.data import Batch, ImageDataset, iterate_once
from ftfast.errors import DataError
from ftfast.models.speedups import trim_padding

Progress = Callable[[str, int, int], None]
"""Called with (what is being embedded, items done, items in all)."""


@dataclass
class PixelCache:
    """Transformed images kept in memory, so that evaluating many weights decodes each image once.

    Only pixels are kept, never features: they do not depend on the weights. Safe to share between calls that use the
    same transform.

    Attributes:
        max_bytes: Data sets that would go over this are read again each time instead.
    """

    max_bytes: int = 1 << 30
    _batches: dict[tuple[str, int], list[Batch]] = field(default_factory=dict, repr=False)
    _used: int = field(default=0, repr=False)

    def batches(
        self, dataset: ImageDataset, transform: Callable[[Any], Tensor], batch_size: int, workers: int
    ) -> Iterator[Batch]:
        """Yield the batches of ``iterate_once``, from memory where they are there."""
        key = (dataset.fingerprint, batch_size)
        if key in self._batches:
            yield from self._batches[key]
            return
        kept: list[Batch] | None = []
        size = 0
        for batch in iterate_once(dataset, transform, batch_size=batch_size, workers=workers):
            size += batch.images.numel() * batch.images.element_size()
            if kept is not None and self._used + size <= self.max_bytes:
                kept.append(batch)
            else:
                kept = None
            yield batch
        if kept is not None:
            self._batches[key] = kept
            self._used += size


@dataclass(frozen=True)
class ImageEmbeddings:
    """Features of the images that could be decoded.

    Attributes:
        features: ``(n, D)`` float32 on the CPU, rows of unit length.
        indices: ``(n,)`` int64, which image of the data set each row is.
    """

    features: Tensor
    indices: Tensor


@contextlib.contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode without gradients, and restore each module's own mode afterwards.

    Modes are kept one by one: a model in training may hold frozen BatchNorm layers in eval mode, which
    ``model.train()`` would wake up.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _input_dtype(model: nn.Module) -> torch.dtype:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _unit_rows(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-12).cpu()


def embed_images(
    model: nn.Module,
    dataset: ImageDataset,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int = 0,
    cache: PixelCache | None = None,
    progress: Progress | None = None,
) -> ImageEmbeddings:
    """Embed every image of a data set once, in order.

    Args:
        model: A CLIP with ``encode_image``.
        dataset: Images.
        transform: Evaluation transform of the model.
        batch_size: Images per forward pass.
        device: Where the model is.
        workers: Decoding processes; 0 decodes in this process.
        cache: Keeps the transformed images for the next call.
        progress: Progress callback.

    Returns:
        Features and the indices they belong to; images that cannot be decoded are left out.

    Raises:
        DataError: No image could be decoded.
    """
    rows: list[Tensor] = []
    indices: list[Tensor] = []
    done = 0
    source = (cache or PixelCache(max_bytes=0)).batches(dataset, transform, batch_size, workers)
    with inference_mode_of(model):
        dtype = _input_dtype(model)
        encode: Any = model.encode_image
        for batch in source:
            if len(batch.indices) == 0:
                continue
            rows.append(_unit_rows(encode(batch.images.to(device=device, dtype=dtype))))
            indices.append(batch.indices.cpu())
            done += len(batch.indices)
            if progress is not None:
                progress(dataset.name, done, len(dataset))
    if not rows:
        raise DataError(
            f"{dataset.name}: none of its {len(dataset)} images could be decoded, so there is nothing to evaluate."
        )
    return ImageEmbeddings(torch.cat(rows), torch.cat(indices))


def embed_texts(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Embed texts in order.

    Args:
        model: A CLIP with ``encode_text``.
        tokenizer: Tokenizer of the model.
        texts: At least one text.
        batch_size: Texts per forward pass.
        device: Where the model is.
        progress: Progress callback.

    Returns:
        ``(N, D)`` float32 on the CPU, rows of unit length.

    Raises:
        DataError: There are no texts.
    """
    if not texts:
        raise DataError("there are no texts to embed; give captions or class names.")
    rows: list[Tensor] = []
    with inference_mode_of(model):
        encode: Any = model.encode_text
        for chunk in _chunks(list(texts), batch_size):
            tokens = trim_padding(model, tokenizer(chunk)).to(device)
            rows.append(_unit_rows(encode(tokens)))
            if progress is not None:
                progress("texts", sum(len(part) for part in rows), len(texts))
    return torch.cat(rows)


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))

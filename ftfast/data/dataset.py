"""``ImageDataset``: numbered images with a caption each, a class each, both or neither."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ftfast.data.images import ArrayImages, ImageStore
from ftfast.errors import DataError

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """A map-style, picklable set of images in a fixed order.

    Args:
        images: Store that the pixels come from.
        rows: Numbers of the images of this set in the store, int64 (N,); None: all of them in order.
        name: Short name for tables and logs.
        origin: How the set was read, for example ``table pairs.csv (separator ',')``.
        class_names: Name of each class; None without classes.
        labels: Class of each image, int64 (N,) in ``[0, len(class_names))``; None without classes.
        texts: Caption of each image; None without captions.
        templates: Prompt templates for the class names, each with one ``{}``.
        max_bad_fraction: Share of undecodable images above which loading stops.

    Raises:
        DataError: Lengths disagree, or a label has no class name.
    """

    images: ImageStore
    rows: np.ndarray | None = None
    name: str = "data"
    origin: str = "images"
    class_names: tuple[str, ...] | None = None
    labels: np.ndarray | None = None
    texts: list[str] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for what, values in (("labels", self.labels), ("texts", self.texts)):
            if values is not None and len(values) != len(self):
                raise DataError(f"{self.name}: {len(values)} {what} for {len(self)} images.")
        if (self.labels is None) != (self.class_names is None):
            raise DataError(f"{self.name}: labels and class_names must be given together.")
        if self.labels is not None and self.class_names is not None:
            labels = np.ascontiguousarray(self.labels, dtype=np.int64)
            object.__setattr__(self, "labels", labels)
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
                raise DataError(
                    f"{self.name}: labels run from {labels.min()} to {labels.max()}, "
                    f"but there are {len(self.class_names)} class names."
                )

    @classmethod
    def from_arrays(cls, pixels: np.ndarray | Sequence[np.ndarray], **fields: Any) -> ImageDataset:
        """Make a set from images in memory.

        Args:
            pixels: uint8 (N, H, W, 3), or a sequence of uint8 (H, W, 3).
            **fields: Other fields of this class (``labels``, ``class_names``, ``texts``, ``name`` ...).

        Returns:
            The set; nothing is copied.
        """
        return cls(images=ArrayImages(pixels, fields.get("name", "array")), **fields)

    def __len__(self) -> int:
        return len(self.images) if self.rows is None else len(self.rows)

    @property
    def description(self) -> str:
        """One line for people: ``1,234 images, 78 classes, table pairs.csv (separator ',')``."""
        parts = [f"{len(self):,} image" + "s" * (len(self) != 1)]
        if self.class_names is not None:
            parts.append(f"{len(self.class_names):,} class" + "es" * (len(self.class_names) != 1))
        if self.texts is not None:
            parts.append("captions")
        return ", ".join([*parts, self.origin])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the images' list, labels, class names and captions; keys caches and guards resuming."""
        state = hashlib.blake2b(self.images.digest().encode(), digest_size=16)
        if self.rows is not None:
            state.update(np.ascontiguousarray(self.rows, dtype=np.int64).data)
        if self.labels is not None:
            state.update(b"labels" + self.labels.tobytes())
        for strings in (self.class_names, self.texts):
            for text in strings or ():
                state.update(text.encode("utf-8", "surrogatepass") + b"\0")
            state.update(b"\1")
        return state.hexdigest()

    def load_image(self, index: int) -> Image.Image:
        """Decode one image.

        Args:
            index: Position in this set.

        Returns:
            RGB image; do not modify it in place.

        Raises:
            BadImageError: The image is missing or cannot be decoded.
        """
        return self.images.load(index if self.rows is None else int(self.rows[index]))

    def image_name(self, index: int) -> str:
        """Return the path (or name) of image ``index``, for messages."""
        return self.images.label_of(index if self.rows is None else int(self.rows[index]))

    def subset(
        self, indices: Sequence[int] | np.ndarray, *, name: str | None = None, keep_classes: bool = False
    ) -> ImageDataset:
        """Select images, in the order given.

        Args:
            indices: Positions in this set; they may repeat.
            name: Name of the subset; default the name of this set.
            keep_classes: Keep every class name and label as they are, so that two subsets share one numbering. By
                default only the classes present remain, relabelled 0..C-1 in the same order.

        Returns:
            A view on the same images.

        Raises:
            DataError: An index is outside the set.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise DataError(
                f"{self.name}: indices {chosen.min()}..{chosen.max()} do not fit a set of {len(self)} images."
            )
        labels, class_names = self.labels, self.class_names
        if labels is not None and class_names is not None:
            labels = labels[chosen]
            if not keep_classes:
                present = np.unique(labels)
                labels = np.searchsorted(present, labels)
                class_names = tuple(class_names[c] for c in present)
        return replace(
            self,
            rows=chosen if self.rows is None else self.rows[chosen],
            name=name or self.name,
            labels=labels,
            class_names=class_names,
            texts=None if self.texts is None else [self.texts[i] for i in chosen],
        )

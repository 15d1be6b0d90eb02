"""Where pixels come from: files, arrays in memory, or byte ranges of tar files.

A store answers three questions: how many images, which pixels, and what to call image *i* in a message. Stores never
decode when they are made, so opening a data set is cheap; every decoding problem becomes a :class:`BadImageError`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from ftfast.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""File suffixes (lower case) that are taken for images in folders and tars."""

CACHE_BYTES = 256 * 2**20
"""A set of image files whose decoded pixels fit in this many bytes is kept in memory after the first pass."""

_STAT_LIMIT = 100_000


class BadImageError(DataError):
    """One image that is missing or cannot be decoded. Loaders count it and take another image instead."""


class ImageStore(Protocol):
    """A numbered collection of images."""

    def __len__(self) -> int:
        """Return the number of images."""

    def load(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB; raise :class:`BadImageError` when that is impossible."""

    def label_of(self, index: int) -> str:
        """Return what image ``index`` is called in messages: usually its path."""

    def digest(self) -> str:
        """Return a hex digest that changes when the list of images changes."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as open_clip does (transparency is dropped, not blended).

    Args:
        image: Any PIL image.

    Returns:
        The same pixels in mode ``RGB``.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way warns and gives the same colours
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # 16-bit scans: PIL clips at 255, which turns almost every pixel white.
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide >> 8 if wide.max(initial=0) > 255 else wide).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def decode(source: str | Path | BinaryIO, called: str) -> Image.Image:
    """Decode one image completely.

    Args:
        source: Path or binary file object.
        called: What to call the image in the message.

    Returns:
        An RGB image with its pixels loaded.

    Raises:
        BadImageError: The file is missing, unreadable, truncated, no image, or absurdly large.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise BadImageError(f"{called}: no such file.") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        reason = "not an image that Pillow can read" if "cannot identify" in str(error) else str(error).rstrip(".")
        raise BadImageError(f"{called}: {reason}.") from None


class FileImages:
    """Images in files below one folder.

    Small sets are kept decoded in memory: when the number of images times the size of the first decoded one is at
    most ``cache_bytes``, every image is decoded once per process.

    Args:
        root: Folder that relative paths start from.
        paths: Path of every image, absolute or relative to ``root``.
        cache_bytes: Memory that decoded pixels may take; 0 turns the cache off.
    """

    def __init__(self, root: str | Path, paths: Sequence[str], cache_bytes: int = CACHE_BYTES) -> None:
        self.root = str(root)
        self.paths = list(paths)
        self.cache_bytes = cache_bytes
        self._cache: dict[int, Image.Image] = {}
        self._cached = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached": 0}

    def load(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB. Callers must not draw on it: it may be the cached one."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        path = self.paths[index]
        image = decode(os.path.join(self.root, path), path)
        size = 3 * image.width * image.height
        if size * len(self.paths) <= self.cache_bytes and self._cached + size <= self.cache_bytes:
            self._cache[index] = image
            self._cached += size
        return image

    def label_of(self, index: int) -> str:
        """Return the path of image ``index``."""
        return self.paths[index]

    def missing(self) -> tuple[list[int], int]:
        """Look for files that do not exist; sets above 100,000 images are sampled evenly.

        Returns:
            Indices of missing files, and how many files were looked at.
        """
        checked = self._sample()
        return [i for i in checked if not os.path.isfile(os.path.join(self.root, self.paths[i]))], len(checked)

    def digest(self) -> str:
        """Return a digest of the paths and (for at most 100,000 of them) the file sizes."""
        state = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            state.update(path.encode("utf-8", "surrogateescape") + b"\0")
        for i in self._sample():
            try:
                size = os.stat(os.path.join(self.root, self.paths[i])).st_size
            except OSError:
                size = -1
            state.update(size.to_bytes(8, "little", signed=True))
        return state.hexdigest()

    def _sample(self) -> list[int]:
        step = max(1, -(-len(self.paths) // _STAT_LIMIT))
        return list(range(0, len(self.paths), step))


class ArrayImages:
    """Images already in memory.

    Args:
        pixels: uint8 array (N, H, W, 3), or a sequence of uint8 arrays (H, W, 3) of different sizes.
        called: Name of the collection in messages.
        digest: Known hex digest of the pixels; None: computed when needed.

    Raises:
        DataError: Another shape or dtype.
    """

    def __init__(
        self, pixels: np.ndarray | Sequence[np.ndarray], called: str = "array", digest: str | None = None
    ) -> None:
        shapes = {pixels.shape[1:]} if isinstance(pixels, np.ndarray) else {p.shape for p in pixels}
        kinds = {pixels.dtype} if isinstance(pixels, np.ndarray) else {p.dtype for p in pixels}
        if any(len(shape) != 3 or shape[-1] != 3 for shape in shapes) or kinds - {np.dtype(np.uint8)}:
            raise DataError(
                f"{called}: images must be uint8 (height, width, 3), not {sorted(map(str, kinds))} {sorted(shapes)}."
            )
        self.pixels = pixels
        self.called = called
        self._digest = digest

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB."""
        return Image.fromarray(self.pixels[index])

    def label_of(self, index: int) -> str:
        """Return ``name[index]``."""
        return f"{self.called}[{index}]"

    def digest(self) -> str:
        """Return a digest of all pixels."""
        if self._digest is not None:
            return self._digest
        state = hashlib.blake2b(digest_size=16)
        for image in self.pixels:
            state.update(repr(image.shape).encode())
            state.update(np.ascontiguousarray(image).data)
        self._digest = state.hexdigest()
        return self._digest


class ByteRangeImages:
    """Encoded images inside larger files, found by offset: the random access that exact resuming needs.

    Args:
        files: Paths of the containers (tar files).
        file_numbers: Which container each image lies in, int32 (N,).
        offsets: First byte of each image, int64 (N,).
        sizes: Length of each image in bytes, int64 (N,).
        names: Name of each image inside its container.
    """

    def __init__(
        self,
        files: Sequence[str],
        file_numbers: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        names: Sequence[str],
    ) -> None:
        self.files = list(files)
        self.file_numbers = file_numbers
        self.offsets = offsets
        self.sizes = sizes
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB."""
        try:
            with open(self.files[self.file_numbers[index]], "rb") as file:
                file.seek(int(self.offsets[index]))
                content = file.read(int(self.sizes[index]))
        except OSError as error:
            raise BadImageError(f"{self.label_of(index)}: {error}.") from None
        return decode(io.BytesIO(content), self.label_of(index))

    def label_of(self, index: int) -> str:
        """Return ``container.tar/member.jpg``."""
        return f"{self.files[self.file_numbers[index]]}/{self.names[index]}"

    def digest(self) -> str:
        """Return a digest of container names, member names, offsets and sizes."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\0".join([*(os.path.basename(f) for f in self.files), *self.names]).encode("utf-8", "replace"))
        for numbers in (self.file_numbers, self.offsets, self.sizes):
            state.update(np.ascontiguousarray(numbers).data)
        return state.hexdigest()

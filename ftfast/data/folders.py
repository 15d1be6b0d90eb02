"""Folders of images: one folder per class, images with caption files beside them, or images alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.data.images import IMAGE_SUFFIXES, FileImages
from ftfast.errors import DataError

CLASS_NAMES_FILE = "classnames.json"
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
FolderFormat = Literal["imagefolder", "pairs", "images"]


def is_image(name: str) -> bool:
    """Tell from its suffix whether a file is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def natural_order(names: Sequence[str]) -> list[str]:
    """Sort names; if all are whole numbers, by value ("2" before "10")."""
    if names and all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def walk_files(root: Path) -> Iterator[str]:
    """Yield the path of every file below ``root``, relative to it, sorted, hidden ones left out."""
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in sorted(files):
            if not name.startswith("."):
                yield name if relative == "." else os.path.join(relative, name)


def class_folders(root: Path) -> list[str]:
    """Return the names of the folders directly below ``root``, hidden ones left out, in natural order."""
    with os.scandir(root) as entries:
        return natural_order([e.name for e in entries if e.is_dir() and not e.name.startswith(".")])


def recognise(root: Path) -> FolderFormat:
    """Infer how a folder of images is organised.

    Args:
        root: Folder.

    Returns:
        ``pairs`` if images have .txt files beside them, ``imagefolder`` if images lie in sub-folders only, else
        ``images``.

    Raises:
        DataError: The folder holds no images, or some in itself and some in sub-folders.
    """
    files = list(walk_files(root))
    images = [name for name in files if is_image(name)]
    if not images:
        raise DataError(
            f"{root}: the folder holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}). Check data.path."
        )
    texts = {name[:-4] for name in files if name.endswith(".txt")}
    if any(os.path.splitext(name)[0] in texts for name in images):
        return "pairs"
    inside = sum(os.sep in name for name in images)
    if 0 < inside < len(images):
        raise DataError(
            f"{root}: {len(images) - inside:,} images lie in the folder itself and {inside:,} in folders below it. "
            "Set data.format: imagefolder (folders are classes, the others are ignored) or data.format: images."
        )
    return "imagefolder" if inside else "images"


def open_class_folders(root: Path, templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open a folder with one sub-folder per class (images may lie deeper inside it).

    Class names are the folder names, or those of ``classnames.json`` in ``root``: an object {folder: name}, or a list
    of names in folder order.

    Args:
        root: Folder of class folders.
        templates: Prompt templates.
        max_bad_fraction: Passed on to the set.

    Returns:
        The set, sorted by class and path.

    Raises:
        DataError: A class folder without images, folders that are splits rather than classes, a bad classnames.json.
    """
    folders = class_folders(root)
    if folders and {name.lower() for name in folders} <= _SPLIT_NAMES:
        raise DataError(
            f"{root}: the folders {', '.join(map(repr, folders))} look like splits, not classes. "
            f"Set data.path: {root / folders[0]}"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = [os.path.join(folder, name) for name in walk_files(root / folder) if is_image(name)]
        if not inside:
            raise DataError(f"{root}: class folder '{folder}' holds no images. Add some or remove the folder.")
        paths += inside
        labels += [label] * len(inside)
    if not paths:
        raise DataError(f"{root}: no class folders with images were found. Check data.path and data.format.")
    return ImageDataset(
        images=FileImages(root, paths),
        name=root.name,
        origin=f"class folders in {root.name}",
        class_names=_class_names(root, folders),
        labels=np.asarray(labels, dtype=np.int64),
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )


def _class_names(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    path = root / CLASS_NAMES_FILE
    if not path.exists():
        return tuple(folders)
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}).") from None
    if isinstance(given, list):
        if len(given) != len(folders):
            raise DataError(f"{path}: {len(given)} names for {len(folders)} class folders. Give one name per folder.")
        given = dict(zip(folders, given, strict=True))
    if not isinstance(given, dict):
        raise DataError(f"{path}: must be an object {{folder: name}} or a list of names.")
    missing = [folder for folder in folders if folder not in given]
    if missing:
        raise DataError(f"{path}: no name for the class folder '{missing[0]}' ({len(missing)} missing). Add it.")
    names = [given[folder] for folder in folders]
    wrong = next((name for name in names if not isinstance(name, str) or not name.strip()), None)
    if wrong is not None:
        raise DataError(f"{path}: class name {wrong!r} is not a text.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the name '{twice[0]}' stands for {names.count(twice[0])} folders. Use distinct names."
        )
    return tuple(names)


def open_caption_files(root: Path, templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open a folder of images with a .txt file of the same stem beside each, as img2dataset writes it.

    Args:
        root: Folder, searched recursively.
        templates: Prompt templates (unused without classes, kept for completeness).
        max_bad_fraction: Passed on to the set.

    Returns:
        The set, sorted by path; captions are stripped and their line breaks become spaces.

    Raises:
        DataError: No images, an image without a caption file, an empty caption, or one that is not UTF-8.
    """
    files = list(walk_files(root))
    paths = [name for name in files if is_image(name)]
    captions = {name[:-4] for name in files if name.endswith(".txt")}
    if not paths:
        raise DataError(f"{root}: the folder holds no images. Check data.path.")
    bare = [name for name in paths if os.path.splitext(name)[0] not in captions]
    if bare:
        raise DataError(
            f"{root}: {len(bare):,} of {len(paths):,} images have no .txt file beside them, the first is "
            f"'{bare[0]}'. Add the captions, move these images away, or set data.format: images."
        )
    return ImageDataset(
        images=FileImages(root, paths),
        name=root.name,
        origin=f"images with .txt files in {root.name}",
        texts=[_caption(root, os.path.splitext(name)[0] + ".txt") for name in paths],
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )


def _caption(root: Path, name: str) -> str:
    try:
        caption = " ".join((root / name).read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{root / name}: not UTF-8 (byte {error.start}). Save the caption as UTF-8.") from None
    if not caption:
        raise DataError(f"{root / name}: the caption is empty. Fill the file, or remove it and its image.")
    return caption


def open_plain_images(root: Path, templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open a folder of images without captions or classes.

    Args:
        root: Folder, searched recursively.
        templates: Prompt templates (unused without classes, kept for completeness).
        max_bad_fraction: Passed on to the set.

    Returns:
        The set, sorted by path.

    Raises:
        DataError: No images.
    """
    paths = [name for name in walk_files(root) if is_image(name)]
    if not paths:
        raise DataError(f"{root}: the folder holds no images. Check data.path.")
    return ImageDataset(
        images=FileImages(root, paths),
        name=root.name,
        origin=f"images in {root.name}",
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )

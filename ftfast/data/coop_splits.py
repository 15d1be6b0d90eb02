"""CoOp's few-shot benchmark as sources: ``coop:NAME/SIDE?root=FOLDER``, and its ``split_zhou_*.json`` as they are.

Folders and split files are those of CoOp's DATASETS.md (Zhou et al., 2022). Nothing is downloaded. Classes are numbered
by the label in the split file, so the base and new halves are CoOp's.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.data.images import FileImages
from ftfast.errors import DataError

ROOT_VARIABLE = "FTFAST_DATA"
SIDES = ("train", "val", "test")

Items = list[tuple[str, int, str]]
"""(image path, label, class name)."""


@dataclass(frozen=True)
class CoopSet:
    """Where one data set lies below the root.

    Attributes:
        folder: Its folder.
        images: Folder that the paths of the split file start from, below ``folder``.
        split: Split file, or empty.
        read: Reads sides that have no split file: (folder, side) -> items with paths below ``folder``.
    """

    folder: str
    images: str = ""
    split: str = ""
    read: Callable[[Path, str], Items] | None = None


def _imagenet(folder: Path, side: str) -> Items:
    """ImageNet's folders; its validation images are both "val" and "test"."""
    return _folders(folder, f"images/{'train' if side == 'train' else 'val'}", _wordnet_names(folder))


def _wordnet_folders(images: str) -> Callable[[Path, str], Items]:
    def read(folder: Path, side: str) -> Items:
        """Folders called by WordNet id; the classes are those that have a folder."""
        return _folders(folder, images, _wordnet_names(folder))

    return read


def _imagenet_v2(folder: Path, side: str) -> Items:
    """Folders called 0 to 999: places in the list of names."""
    names = list(_wordnet_names(folder).values())
    places = {str(place): name for place, name in enumerate(names)}
    return _folders(folder, "imagenetv2-matched-frequency-format-val", places)


def _wordnet_names(folder: Path) -> dict[str, str]:
    """classnames.txt of CoOp: "n01440764 tench" in each line; beside the set or in imagenet/."""
    path = next(
        (p for p in (folder / "classnames.txt", folder.parent / "imagenet/classnames.txt") if p.is_file()), None
    )
    if path is None:
        raise DataError(f"{folder / 'classnames.txt'} does not exist. Put CoOp's list of ImageNet class names there.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return dict(line.split(" ", 1) for line in lines)  # type: ignore[misc]


def _folders(root: Path, images: str, names: dict[str, str]) -> Items:
    place = root / images
    if not place.is_dir():
        raise DataError(f"{place} does not exist. Put the images there, one folder per class.")
    present = [name for name in names if (place / name).is_dir()]
    inside = {name: sorted(entry.name for entry in (place / name).iterdir() if entry.is_file()) for name in present}
    return [
        (f"{images}/{name}/{file}", label, names[name]) for label, name in enumerate(present) for file in inside[name]
    ]


def _aircraft(folder: Path, side: str) -> Items:
    """FGVC-Aircraft's own lists: images_variant_<side>.txt holds "<image> <variant>"."""
    names = (folder / "variants.txt").read_text(encoding="utf-8").splitlines()
    number = {name.strip(): label for label, name in enumerate(names)}
    lines = (folder / f"images_variant_{side}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
    return [(f"images/{image}.jpg", number[name], name) for image, name in pairs]


COOP_SETS: dict[str, CoopSet] = {
    "imagenet": CoopSet("imagenet", read=_imagenet),
    "caltech101": CoopSet("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": CoopSet("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": CoopSet("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": CoopSet("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": CoopSet("food-101", "images", "split_zhou_Food101.json"),
    "fgvc_aircraft": CoopSet("fgvc_aircraft", read=_aircraft),
    "sun397": CoopSet("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": CoopSet("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": CoopSet("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": CoopSet("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "imagenetv2": CoopSet("imagenetv2", read=_imagenet_v2),
    "imagenet_sketch": CoopSet("imagenet-sketch", read=_wordnet_folders("images")),
    "imagenet_a": CoopSet("imagenet-adversarial", read=_wordnet_folders("imagenet-a")),
    "imagenet_r": CoopSet("imagenet-rendition", read=_wordnet_folders("imagenet-r")),
}


def open_coop(path: str, templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open one side of a data set of CoOp's benchmark.

    Args:
        path: ``coop:NAME/SIDE`` with NAME one of ``COOP_SETS`` and SIDE train, val or test; or
            ``coop:FOLDER/split_zhou_X.json/SIDE`` for any split file. ``?root=FOLDER`` names the root (otherwise
            ``$FTFAST_DATA``, else ``data``), for a split file the folder of its images (otherwise its own folder).
        templates: Prompt templates.
        max_bad_fraction: Share of undecodable images above which loading stops.

    Returns:
        The side; every side of a set has the same classes in the same order.

    Raises:
        DataError: Unknown name or side, missing or damaged files; the sentence says where they belong.
    """
    place, _, root = path.removeprefix("coop:").partition("?root=")
    name, _, side = place.rpartition("/")
    is_file = name.endswith(".json")
    if side not in SIDES or not (name in COOP_SETS or is_file):
        near = difflib.get_close_matches(name, COOP_SETS, n=1)
        hint = f" Did you mean 'coop:{near[0]}/test'?" if near else ""
        raise DataError(
            f"{path}: write coop:NAME/train, /val or /test, with NAME one of {', '.join(COOP_SETS)}, or "
            f"coop:FOLDER/split_zhou_X.json/train.{hint}"
        )
    if is_file:
        file = Path(name).expanduser()
        images = Path(root).expanduser() if root else file.parent
        items, classes = read_split(file, side)
        return _dataset(
            file.stem.removeprefix("split_zhou_"), side, images, items, classes, templates, max_bad_fraction
        )
    known = COOP_SETS[name]
    folder = Path(root or os.environ.get(ROOT_VARIABLE, "data")).expanduser() / known.folder
    if not folder.is_dir():
        raise DataError(
            f"coop:{name}: {folder} does not exist. Put the data there as CoOp's DATASETS.md says, or name another "
            f"root with --data-root or ${ROOT_VARIABLE}."
        )
    if known.split:
        items, classes = read_split(folder / known.split, side)
        return _dataset(name, side, folder / known.images, items, classes, templates, max_bad_fraction)
    try:
        items = known.read(folder, side) if known.read else []
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"coop:{name}: {folder} is incomplete: {error}. Put all of it there.") from error
    names = {label: word for _, label, word in items}
    classes = tuple(names[label] for label in sorted(names))
    return _dataset(name, side, folder, items, classes, templates, max_bad_fraction)


def read_split(file: Path, side: str) -> tuple[Items, tuple[str, ...]]:
    """Read one side of a CoOp split file.

    Args:
        file: JSON with "train", "val" and "test", each a list of [image, label, class name].
        side: Which list.

    Returns:
        The items in the file's order, and the class names of all sides by label.

    Raises:
        DataError: The file is missing or is something else.
    """
    try:
        table: Any = json.loads(file.read_text(encoding="utf-8"))
        sides = {key: [(str(p), int(label), str(word)) for p, label, word in table[key]] for key in SIDES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read as a CoOp split ({type(error).__name__}: {error}). It is a JSON object with train, "
            "val and test, each a list of [image, label, class name]; put CoOp's file there."
        ) from error
    names: dict[int, str] = {}
    for items in sides.values():
        for _, label, word in items:
            if names.setdefault(label, word) != word:
                raise DataError(f"{file}: label {label} is called both '{names[label]}' and '{word}'.")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{file}: labels are not 0 to {len(names) - 1}; {len(names)} different ones occur.")
    return sides[side], tuple(names[label] for label in sorted(names))


def _dataset(
    name: str,
    side: str,
    images: Path,
    items: Items,
    classes: tuple[str, ...],
    templates: tuple[str, ...],
    max_bad_fraction: float,
) -> ImageDataset:
    if not items:
        raise DataError(f"coop:{name}/{side} has no images. Check {images}.")
    store = FileImages(Path(os.path.abspath(images)), [file for file, _, _ in items])
    missing, checked = store.missing()
    if len(missing) > max_bad_fraction * checked:
        raise DataError(
            f"coop:{name}/{side}: {store.label_of(missing[0])} does not exist ({len(missing):,} of {checked:,} images "
            f"are missing). Put the images into {images}."
        )
    return ImageDataset(
        images=store,
        name=f"{name}/{side}",
        origin=f"CoOp's {name}, {side}",
        class_names=classes,
        labels=np.array([label for _, label, _ in items], dtype=np.int64),
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )

"""torchvision's data sets as sources: ``torchvision:NAME/SIDE?root=FOLDER``, with the splits of the MTIL benchmark.

Nothing is downloaded. Sides are torchvision's own where it has two; the three sets that it does not divide (Caltech101,
EuroSAT, SUN397) take MTIL's 80 / 20 split, ``random_split`` with a generator seeded 42, over sorted file names.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.data.images import ArrayImages, FileImages
from ftfast.errors import DataError

ROOT_VARIABLE = "FTFAST_DATA"
SPLIT_SEED = 42

_EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
_CALTECH = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}


@dataclass(frozen=True)
class _Images:
    """Image files (or arrays), labels and class names of one side."""

    files: Sequence[Any]
    labels: Sequence[int]
    names: Sequence[str]
    arrays: np.ndarray | None = None


@dataclass(frozen=True)
class TorchvisionSet:
    """How one data set is opened and divided.

    Attributes:
        folder: What lies under the root.
        sides: Train and test as torchvision calls them; None: 80 / 20 random split.
        open: ``(root, side)`` to images; the side is None for an undivided set.
        get: How to obtain the files.
    """

    folder: str
    sides: tuple[str, str] | None
    open: Callable[[str, str], _Images]
    get: str = "torchvision downloads it with download=True"


def _aircraft(root: str, side: str) -> _Images:
    from torchvision.datasets import FGVCAircraft

    data = FGVCAircraft(root, split=side)
    return _Images(data._image_files, data._labels, data.classes)


def _caltech(root: str, side: str) -> _Images:
    from torchvision.datasets import Caltech101

    data = Caltech101(root)
    folder = Path(data.root) / "101_ObjectCategories"
    files = [folder / data.categories[y] / f"image_{n:04d}.jpg" for y, n in zip(data.y, data.index, strict=True)]
    return _Images(files, data.y, [_CALTECH.get(name, name.lower()) for name in data.categories])


def _cifar100(root: str, side: str) -> _Images:
    from torchvision.datasets import CIFAR100

    data = CIFAR100(root, train=side == "train")
    return _Images((), data.targets, data.classes, np.asarray(data.data))


def _dtd(root: str, side: str) -> _Images:
    from torchvision.datasets import DTD

    data = DTD(root, split=side, partition=1)
    return _Images(data._image_files, data._labels, data.classes)


def _eurosat(root: str, side: str) -> _Images:
    from torchvision.datasets import EuroSAT

    data = EuroSAT(root)
    files, labels = zip(*sorted(data.samples), strict=True)
    return _Images(files, labels, [_EUROSAT.get(name, name) for name in data.classes])


def _flowers(root: str, side: str) -> _Images:
    from torchvision.datasets import Flowers102

    data = Flowers102(root, split=side)  # labels already start at 0 there
    return _Images(data._image_files, data._labels, data.classes)


def _food(root: str, side: str) -> _Images:
    from torchvision.datasets import Food101

    data = Food101(root, split=side)
    return _Images(data._image_files, data._labels, data.classes)


def _mnist(root: str, side: str) -> _Images:
    from torchvision.datasets import MNIST

    data = MNIST(root, train=side == "train")
    grey = data.data.numpy()
    return _Images((), data.targets.tolist(), [str(digit) for digit in range(10)], np.repeat(grey[..., None], 3, 3))


def _pets(root: str, side: str) -> _Images:
    from torchvision.datasets import OxfordIIITPet

    data = OxfordIIITPet(root, split=side)
    return _Images(data._images, data._labels, data.classes)


def _cars(root: str, side: str) -> _Images:
    from torchvision.datasets import StanfordCars

    data = StanfordCars(root, split=side)
    files, labels = zip(*data._samples, strict=True)
    return _Images(files, [int(label) for label in labels], data.classes)


def _sun397(root: str, side: str) -> _Images:
    from torchvision.datasets import SUN397

    data = SUN397(root)
    pairs = sorted(zip(map(str, data._image_files), data._labels, strict=True))  # rglob has no fixed order
    files, labels = zip(*pairs, strict=True)
    return _Images(files, labels, [name.replace("/", " ") for name in data.classes])


SETS: dict[str, TorchvisionSet] = {
    "aircraft": TorchvisionSet("fgvc-aircraft-2013b", ("train", "test"), _aircraft),
    "caltech101": TorchvisionSet(
        "caltech101",
        None,
        _caltech,
        "download caltech-101.zip from data.caltech.edu and unpack 101_ObjectCategories and Annotations into it",
    ),
    "cifar100": TorchvisionSet("cifar-100-python", ("train", "test"), _cifar100),
    "dtd": TorchvisionSet("dtd/dtd", ("train", "test"), _dtd),
    "eurosat": TorchvisionSet("eurosat/2750", None, _eurosat, "unpack EuroSAT.zip (RGB, zenodo.org/records/7711810)"),
    "flowers": TorchvisionSet("flowers-102", ("train", "test"), _flowers),
    "food": TorchvisionSet("food-101", ("train", "test"), _food),
    "mnist": TorchvisionSet("MNIST/raw", ("train", "test"), _mnist),
    "pets": TorchvisionSet("oxford-iiit-pet", ("trainval", "test"), _pets),
    "cars": TorchvisionSet(
        "stanford_cars",
        ("train", "test"),
        _cars,
        "its original site is gone (pytorch/vision issue 7545): unpack a copy with cars_train, cars_test, devkit and "
        "cars_test_annos_withlabels.mat into it",
    ),
    "sun397": TorchvisionSet("SUN397", None, _sun397),
}


def open_torchvision(path: str, templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open one side of a torchvision data set.

    Args:
        path: ``torchvision:NAME/train`` or ``/test``, optionally with ``?root=FOLDER``; without it the root is
            ``$FTFAST_DATA``, else ``data``.
        templates: Prompt templates.
        max_bad_fraction: Share of undecodable images above which loading stops.

    Returns:
        The set, with class names as CLIP's zero-shot evaluation writes them.

    Raises:
        DataError: The name is unknown, or files are missing; the sentence says where they belong.
    """
    place, _, root = path.removeprefix("torchvision:").partition("?root=")
    name, _, side = place.partition("/")
    if name not in SETS or side not in ("train", "test"):
        near = difflib.get_close_matches(name, SETS, n=1)
        hint = f" Did you mean 'torchvision:{near[0]}/train'?" if near else ""
        raise DataError(
            f"{path}: write torchvision:NAME/train or torchvision:NAME/test, with NAME one of {', '.join(SETS)}.{hint}"
        )
    kind = SETS[name]
    folder = Path(root or os.environ.get(ROOT_VARIABLE, "data")).expanduser()
    where = f"{folder / kind.folder}"
    if not (folder / kind.folder).exists():
        raise DataError(
            f"torchvision:{name}: {where} does not exist. Put the data there ({kind.get}), or name another folder with "
            f"--data-root or ${ROOT_VARIABLE}."
        )
    try:
        found = kind.open(str(folder), (kind.sides or ("", ""))[side == "test"])
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"torchvision:{name}: {where} is incomplete: {str(error).splitlines()[0]} Put all of it there ({kind.get})."
        ) from error
    except ImportError as error:
        raise DataError(
            f"torchvision:{name} needs the package '{error.name}'. Run: pip install {error.name}"
        ) from error
    labels = np.asarray(found.labels, dtype=np.int64)
    store: Any = ArrayImages(found.arrays, name) if found.arrays is not None else _files(found.files)
    dataset = ImageDataset(
        images=store,
        name=f"{name}/{side}",
        origin=f"torchvision's {name}, {side}" + ("" if kind.sides else f" (80 / 20, seed {SPLIT_SEED})"),
        class_names=tuple(str(word).replace("_", " ") for word in found.names),
        labels=labels,
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )
    return dataset if kind.sides else dataset.subset(split_80_20(len(dataset), side), keep_classes=True)


def _files(files: Sequence[Any]) -> FileImages:
    paths = [os.path.abspath(str(file)) for file in files]
    return FileImages(os.path.commonpath(paths) if len(paths) > 1 else "/", paths)


def split_80_20(count: int, side: str) -> np.ndarray:
    """Images of one side of MTIL's random split.

    Args:
        count: Number of images.
        side: "train" (the first 80 % of the permutation, rounded down) or "test".

    Returns:
        Indices, as ``torch.utils.data.random_split`` with a generator seeded 42 draws them.
    """
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    cut = int(0.8 * count)
    return order[:cut] if side == "train" else order[cut:]

"""``open_dataset``: one entry for every format, inferred from what lies at the path."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftfast.config.schema import DataConfig
from ftfast.data import folders, shards
from ftfast.data.coop_splits import open_coop
from ftfast.data.dataset import ImageDataset
from ftfast.data.folders import natural_order
from ftfast.data.images import ArrayImages, FileImages
from ftfast.data.prompts import resolve_templates
from ftfast.data.splits import class_half, few_shot, split_classes, split_images
from ftfast.data.tables import Columns, Table, is_table, read_table
from ftfast.data.torchvision_sets import open_torchvision
from ftfast.errors import DataError

_METADATA_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_dataset(config: DataConfig) -> ImageDataset:
    """Open images with captions, classes, both or neither. No image is decoded.

    Args:
        config: Path, format and columns.

    Returns:
        The set; ``description`` says what was found.

    Raises:
        DataError: Anything that makes the data unusable, in one sentence.
        MissingExtraError: The format needs a package that is not installed.
    """
    if not config.path:
        raise DataError("data.path is empty. Give a table, a folder of images, tars, or a built-in set.")
    whole = _open_whole(config)
    kept = _only(whole, config.classes) if config.classes else whole
    side = _side(kept if config.half == "all" else class_half(kept, config.half), config)
    return side if not config.shots else few_shot(side, config.shots, config.shots_seed)


def _only(dataset: ImageDataset, classes: tuple[str, ...]) -> ImageDataset:
    """Keep the images of some classes and number these in the order given."""
    known = {name: label for label, name in enumerate(dataset.class_names or ())}
    strange = [name for name in classes if name not in known]
    if strange or dataset.labels is None:
        near = difflib.get_close_matches(strange[0], known, n=1) if strange else []
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DataError(
            f"{dataset.name}: data.classes names '{(strange or classes)[0]}', which is none of its {len(known):,} "
            f"classes.{hint}"
        )
    number = np.full(len(known), -1)
    number[[known[name] for name in classes]] = np.arange(len(classes))
    chosen = dataset.subset(np.flatnonzero(number[dataset.labels] >= 0), keep_classes=True)
    return replace(chosen, labels=number[chosen.labels], class_names=classes)


def _side(dataset: ImageDataset, config: DataConfig) -> ImageDataset:
    """Return the side of the source's fixed split that ``config.split`` names."""
    if config.split == "all":
        return dataset
    if config.split_by == "classes" and dataset.labels is None:
        raise DataError(
            f"{dataset.name}: data.split_by is 'classes', but the data has none. Set data.split_by: images, "
            "or data.label_column."
        )
    divide = split_classes if config.split_by == "classes" else split_images
    train, val = divide(dataset, 1.0 - config.val_fraction, config.split_seed)
    chosen = train if config.split == "train" else val
    return replace(chosen, origin=f"{dataset.origin}, {config.split} side by {config.split_by}")


def _open_whole(config: DataConfig) -> ImageDataset:
    templates = resolve_templates(config.templates)
    form = _recognise(config) if config.format == "auto" else config.format
    if form == "builtin":
        return _open_builtin(config, templates)
    if form == "coop":
        return open_coop(config.path, templates, config.max_bad_fraction)
    if form == "torchvision":
        return open_torchvision(config.path, templates, config.max_bad_fraction)
    if form == "webdataset":
        dataset = shards.open_tars(_tar_paths(config.path), templates, config.max_bad_fraction)
    elif form == "table":
        dataset = _open_table(Path(config.path).expanduser(), config, templates)
    else:
        opener = {
            "imagefolder": folders.open_class_folders,
            "pairs": folders.open_caption_files,
            "images": folders.open_plain_images,
        }[form]
        root = _folder(config.path)
        dataset = opener(root, templates, config.max_bad_fraction)
    _check_class_sizes(dataset, config)
    return dataset


def _recognise(config: DataConfig) -> str:
    if config.path.startswith("builtin:"):
        return "builtin"
    if config.path.startswith("torchvision:"):
        return "torchvision"
    if config.path.startswith("coop:"):
        return "coop"
    if "::" in config.path or config.path.endswith(".tar"):
        return "webdataset"
    path = Path(config.path).expanduser()
    if path.is_dir():
        if any(path.glob("*.tar")):
            return "webdataset"
        if any((path / name).is_file() for name in _METADATA_TABLES):
            return "table"
        return folders.recognise(path)
    if is_table(path):
        return "table"
    if not path.exists():
        raise DataError(f"{config.path}: no such file or folder. Check data.path.")
    raise DataError(
        f"{config.path}: unknown kind of file. data.path may be a table (.csv .tsv .jsonl .parquet), a folder of "
        "images, tars, or 'builtin:...'; set data.format if the name misleads."
    )


def _folder(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(f"{path}: {problem}. Check data.path and data.format.")
    return Path(os.path.abspath(root))


def _tar_paths(pattern: str) -> list[Path]:
    folder = Path(pattern).expanduser()
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise DataError(f"{pattern}: the folder holds no .tar files. Check data.path.")
        return paths
    return shards.expand_pattern(pattern)


def _open_builtin(config: DataConfig, templates: tuple[str, ...]) -> ImageDataset:
    from ftfast.data.builtin import load_builtin

    split = load_builtin(config.path.removeprefix("builtin:"))
    return ImageDataset(
        images=ArrayImages(split.store, f"builtin:{split.name}", split.fingerprint),
        rows=split.rows,
        name=split.name,
        origin=f"built-in set {split.name}",
        class_names=split.class_names,
        labels=split.labels,
        texts=split.texts,
        templates=templates,
        max_bad_fraction=config.max_bad_fraction,
    )


def _open_table(path: Path, config: DataConfig, templates: tuple[str, ...]) -> ImageDataset:
    if path.is_dir():
        path = next((path / name for name in _METADATA_TABLES if (path / name).is_file()), path)
    path = Path(os.path.abspath(path))
    table = read_table(
        path, Columns(config.image_column, config.text_column, config.label_column), separator=config.separator
    )
    columns = table.columns
    images = FileImages(path.parent, table.values[columns.image])
    _check_missing(table, images, config)
    labels, class_names = None, None
    if columns.label:
        values = [value.strip() for value in table.values[columns.label]]
        found = natural_order(list(dict.fromkeys(values)))
        number = {value: i for i, value in enumerate(found)}
        labels = np.fromiter((number[value] for value in values), np.int64, len(values))
        class_names = tuple(found)
    return ImageDataset(
        images=images,
        name=path.stem,
        origin=f"table {path.name} ({table.kind})",
        class_names=class_names,
        labels=labels,
        texts=table.values[columns.text] if columns.text else None,
        templates=templates,
        max_bad_fraction=config.max_bad_fraction,
    )


def _check_missing(table: Table, images: FileImages, config: DataConfig) -> None:
    missing, checked = images.missing()
    if len(missing) > config.max_bad_fraction * checked:
        first = images.label_of(missing[0])
        if first.startswith(("http://", "https://")):
            raise DataError(
                f"{table.where(missing[0])}: '{first}' is a web address. Download the images first, for example with "
                "img2dataset, and open what it writes."
            )
        raise DataError(
            f"{table.where(missing[0])}: image '{first}' does not exist ({len(missing):,} of {checked:,} are missing). "
            f"Paths are relative to the table's folder, {table.path.parent}."
        )


def _check_class_sizes(dataset: ImageDataset, config: DataConfig) -> None:
    if dataset.labels is None or dataset.class_names is None:
        return
    counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))
    small = np.flatnonzero(counts < config.min_images_per_class)
    if not len(small):
        return
    count = int(counts[small[0]])
    more = f" (and {len(small) - 1:,} more classes like it)" if len(small) > 1 else ""
    raise DataError(
        f"{dataset.name}: class '{dataset.class_names[small[0]]}' has {count} image{'s' * (count != 1)}{more}, fewer "
        f"than data.min_images_per_class {config.min_images_per_class}. Retrieval and a train/validation split need "
        f"two: add images, remove the class, or set data.min_images_per_class: {max(count, 1)}."
    )

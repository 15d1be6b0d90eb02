"""WebDataset tars, read with random access.

Every tar is indexed once (headers and small text members only); images are then read by offset. That gives up
streaming, and in return shuffling is global, resuming is exact and the length is known. Samples are grouped as
webdataset groups them: members whose names agree up to the first dot of the file name.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftfast.data.dataset import ImageDataset
from ftfast.data.folders import CLASS_NAMES_FILE, natural_order
from ftfast.data.images import IMAGE_SUFFIXES, ByteRangeImages
from ftfast.data.tables import LABEL_COLUMNS, TEXT_COLUMNS
from ftfast.errors import DataError, MissingExtraError


@dataclass
class _Samples:
    files: list[str]
    numbers: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    without_image: int = 0


def expand_pattern(pattern: str) -> list[Path]:
    """Expand ``a/{00..07}.tar::b/{0..3}.tar`` to paths.

    Args:
        pattern: Paths with braces, joined by ``::``.

    Returns:
        Paths in order.

    Raises:
        DataError: A path that does not exist.
        MissingExtraError: Braces without the package braceexpand.
    """
    parts = pattern.split("::")
    if "{" in pattern:
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise MissingExtraError("braceexpand", "data", "Expanding braces in data.path") from None
        try:
            parts = [path for part in parts for path in braceexpand(part)]
        except ValueError:
            raise DataError(f"data.path '{pattern}': the braces do not match. Every {{ needs its }}.") from None
    paths = [Path(part).expanduser() for part in parts]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: no such file ({len(missing)} of {len(paths)} tars of data.path '{pattern}' are missing)."
        )
    return paths


def open_tars(paths: list[Path], templates: tuple[str, ...], max_bad_fraction: float) -> ImageDataset:
    """Open WebDataset tars.

    An image member (.jpg, .png, .webp ...) makes a sample. Its caption comes from the .txt member or, without one, from
    a common key of the .json member; its class from the .cls member or the .json. Class names are the values found, or
    those of ``classnames.json`` beside the first tar.

    Args:
        paths: Uncompressed tar files.
        templates: Prompt templates.
        max_bad_fraction: Share of samples that may lack an image; they are left out. Also passed on to the set.

    Returns:
        The set, in the order of the tars.

    Raises:
        DataError: A damaged or compressed tar, no samples, or captions (classes) for some samples only.
    """
    samples = _Samples([str(path) for path in paths])
    for number, path in enumerate(paths):
        _index_tar(path, number, samples)
    total = len(samples.names) + samples.without_image
    origin = f"{len(paths)} tar{'s' * (len(paths) != 1)}"
    if not samples.names:
        raise DataError(f"{paths[0]}: no images in {origin}. Members must be named like 0001.jpg and 0001.txt.")
    if samples.without_image:
        if samples.without_image > max_bad_fraction * total:
            raise DataError(
                f"{paths[0]}: {samples.without_image:,} of {total:,} samples have no image, more than "
                f"data.max_bad_fraction {max_bad_fraction:g} allows. Check how the tars were written."
            )
        origin += f" ({samples.without_image:,} samples without an image left out)"
    texts = _complete(samples, samples.texts, "caption", ".txt")
    classes = _complete(samples, samples.labels, "class", ".cls")
    labels, class_names = _number_classes(classes, paths[0].parent) if classes else (None, None)
    return ImageDataset(
        images=ByteRangeImages(
            samples.files,
            np.asarray(samples.numbers, dtype=np.int32),
            np.asarray(samples.offsets, dtype=np.int64),
            np.asarray(samples.sizes, dtype=np.int64),
            samples.names,
        ),
        name=paths[0].stem,
        origin=origin,
        class_names=class_names,
        labels=labels,
        texts=texts,
        templates=templates,
        max_bad_fraction=max_bad_fraction,
    )


def _index_tar(path: Path, number: int, samples: _Samples) -> None:
    """Append the samples of one tar."""
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as content:
            for key, members in _grouped(tar):
                if key in seen:
                    raise DataError(
                        f"{path}: the members of sample '{key}' are not next to each other. Sort the tar by name."
                    )
                seen.add(key)
                _append_sample(number, key, members, content, samples)
    except tarfile.ReadError as error:
        raise DataError(_tar_problem(path, str(error))) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if not seen:
        raise DataError(f"{path}: the tar is empty or truncated.")


def _tar_problem(path: Path, reason: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\x28\xb5\x2f\xfd" or start == b"\xfd7zX":
        return f"{path}: compressed tars have no random access. Decompress it; images are compressed already."
    return f"{path}: damaged tar ({reason}). Download or write it again."


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield runs of members that agree up to the first dot of the file name, by extension."""
    current, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        folder, name = os.path.split(member.name)
        stem, dot, extension = name.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = os.path.join(folder, stem)
        if key != current and members:
            yield current, members
            members = {}
        current = key
        members[extension.lower()] = member
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
    if members:
        yield current, members


def _append_sample(number: int, key: str, members: dict[str, tarfile.TarInfo], content: Any, samples: _Samples) -> None:
    image = next((members[extension] for extension in members if f".{extension}" in IMAGE_SUFFIXES), None)
    if image is None:
        samples.without_image += 1
        return
    where = f"{samples.files[number]}/{key}"

    def read(extension: str) -> str:
        """Read the stripped text of the sample's member with this extension."""
        member = members[extension]
        content.seek(member.offset_data)
        try:
            return content.read(member.size).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"{where}.{extension}: not UTF-8.") from None

    record: dict[str, Any] = {}
    if "json" in members:
        try:
            parsed = json.loads(read("json"))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}.json: not JSON ({error.msg}).") from None
        record = parsed if isinstance(parsed, dict) else {}
    samples.numbers.append(number)
    samples.offsets.append(image.offset_data)
    samples.sizes.append(image.size)
    samples.names.append(image.name)
    samples.texts.append(" ".join(read("txt").split()) if "txt" in members else _from_json(record, TEXT_COLUMNS))
    samples.labels.append(read("cls") if "cls" in members else _from_json(record, LABEL_COLUMNS))


def _from_json(record: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((str(record[name]).strip() for name in names if isinstance(record.get(name), (str, int))), "")


def _complete(samples: _Samples, values: list[str], what: str, suffix: str) -> list[str] | None:
    """Return the values if every sample has one, None if none has."""
    blank = [i for i, value in enumerate(values) if not value]
    if not blank:
        return values
    if len(blank) == len(values):
        return None
    first = f"{samples.files[samples.numbers[blank[0]]]}/{samples.names[blank[0]]}"
    raise DataError(
        f"{first}: {len(blank):,} of {len(values):,} samples have no {what} ({suffix} or .json); "
        "the first is this one. Write the tars with it for every sample."
    )


def _number_classes(values: list[str], folder: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    found = natural_order(list(dict.fromkeys(values)))
    path = folder / CLASS_NAMES_FILE
    names = list(found)
    if path.exists():
        try:
            given = json.loads(path.read_text(encoding="utf-8-sig"))
            names = [str(given[int(v)] if isinstance(given, list) else given[v]) for v in found]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{path}: no usable name for every class in the tars ({error}).") from None
    number = {value: i for i, value in enumerate(found)}
    return np.fromiter((number[value] for value in values), np.int64, len(values)), tuple(names)

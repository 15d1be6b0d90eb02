"""The output of ``ftfast synth``: WebDataset tars that appear whole or not at all, and one table of all pairs."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from ftfast.errors import DataError, MissingExtraError
from ftfast.evaluation.results import write_atomically

_PNG_BELOW = 128
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Pair:
    """One row of the table.

    Attributes:
        file: Name of the image in its tar.
        caption: Prompt.
        class_name: Class name in the prompt; column "class".
        seed: Seed of the image; None for a pair that was not generated.
        shard: Name of the tar.
        source: "generic", "earlier" or "table".
        attempt: How often the image was replaced because it was black.
    """

    file: str
    caption: str
    class_name: str
    seed: int | None
    shard: str
    source: str
    attempt: int


COLUMNS = tuple("class" if field.name == "class_name" else field.name for field in fields(Pair))
"""Columns of the table."""


def shard_name(number: int) -> str:
    """Return the file name of a tar."""
    return f"shard-{number:05d}.tar"


def encode(image: Image.Image, form: str) -> tuple[bytes, str]:
    """Encode an image.

    Args:
        image: RGB image.
        form: "jpg", "png", or "auto": png below 128 pixels, where JPEG blurs and saves nothing.

    Returns:
        Content and file suffix.
    """
    if form == "auto":
        form = "png" if max(image.size) < _PNG_BELOW else "jpg"
    buffer = io.BytesIO()
    if form == "png":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), form


def write_shard(folder: Path, pairs: Sequence[Pair], contents: Sequence[bytes]) -> Path:
    """Write one tar: image, .txt (caption) and .json (everything) per pair; equal pairs give equal bytes.

    The .json calls the class "concept", not "class", so that readers see captioned images and no classes with a single
    image.

    Args:
        folder: Target folder.
        pairs: Rows, at least one, all of one shard.
        contents: Encoded image of each.

    Returns:
        Path of the tar.
    """
    path = folder / pairs[0].shard
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for pair, content in zip(pairs, contents, strict=True):
                    stem = pair.file.partition(".")[0]
                    record = asdict(pair)
                    record["concept"] = record.pop("class_name")
                    _add(tar, pair.file, content)
                    _add(tar, f"{stem}.json", json.dumps(record, ensure_ascii=False).encode())
                    _add(tar, f"{stem}.txt", pair.caption.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, owner and mode are fixed values
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def remove_leftovers(folder: Path, shard: str) -> None:
    """Delete what a killed process left of a tar."""
    for path in folder.glob(f".{shard}.*"):
        path.unlink(missing_ok=True)


def read_shard(path: Path) -> list[Pair]:
    """Read the rows of a tar.

    Raises:
        DataError: If it was not written by :func:`write_shard`.
    """
    pairs = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    record: dict[str, Any] = json.load(content) if content else {}
                    record["class_name"] = record.pop("concept")
                    pairs.append(Pair(**record))
    except (tarfile.TarError, ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path}: damaged, or not written by ftfast synth ({error}). Delete it and run again."
        ) from None
    return pairs


def write_table(folder: Path, pairs: Sequence[Pair], kind: str) -> Path:
    """Write ``table.csv`` or ``table.parquet``, atomically.

    Args:
        folder: Target folder.
        pairs: All rows.
        kind: "csv" or "parquet".

    Raises:
        MissingExtraError: Parquet without pyarrow.
    """
    rows = [tuple(asdict(pair).values()) for pair in pairs]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
        return write_atomically(folder / "table.csv", text.getvalue())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "--table parquet") from None
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return write_atomically(folder / "table.parquet", buffer.getvalue())

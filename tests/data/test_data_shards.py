"""WebDataset tars: the same samples as webdataset itself reads, random access, and damaged files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.errors import DataError


def png(red: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 7), (red, 1, 2)).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(start: int, count: int) -> list[tuple[str, bytes | str]]:
    out: list[tuple[str, bytes | str]] = []
    for i in range(start, start + count):
        out += [(f"d/{i:03d}.png", png(i)), (f"d/{i:03d}.txt", f"caption {i}\n"), (f"d/{i:03d}.cls", str(i % 2))]
    return out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / f"s{number}.tar", samples(number * 4, 4))
    return tmp_path


def message(path: str | Path, **fields) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(DataConfig(path=str(path), **fields))
    return str(caught.value)


def test_patterns_mixing_and_folders(shards):
    data = open_dataset(DataConfig(path=f"{shards}/s{{0..1}}.tar::{shards}/s2.tar"))
    assert data.texts == [f"caption {i}" for i in range(12)]
    assert data.class_names == ("0", "1")
    assert data.labels.tolist() == [i % 2 for i in range(12)]
    assert data.description == "12 images, 2 classes, captions, 3 tars"
    order = [11, 0, 7, 7, 3]
    assert [data.load_image(i).getpixel((0, 0))[0] for i in order] == order
    assert data.image_name(11) == f"{shards}/s2.tar/d/011.png"
    assert open_dataset(DataConfig(path=str(shards))).fingerprint == data.fingerprint


def test_same_samples_as_webdataset(shards):
    webdataset = pytest.importorskip("webdataset")
    theirs = list(webdataset.WebDataset(f"{shards}/s{{0..2}}.tar", shardshuffle=False).decode("rgb8"))
    ours = open_dataset(DataConfig(path=f"{shards}/s{{0..2}}.tar"))
    assert len(theirs) == len(ours) == 12
    for index, sample in enumerate(theirs):
        np.testing.assert_array_equal(np.asarray(ours.load_image(index)), sample["png"])
        assert ours.texts[index] == sample["txt"].strip()
        assert int(ours.class_names[ours.labels[index]]) == sample["cls"]


def test_json_members_long_names_dots_and_other_members(tmp_path):
    name = "x" * 150
    path = write(
        tmp_path / "a.tar",
        [
            ("._0.jpg", b"resource fork"),
            (f"{name}.seg.png", png(9)),
            (f"{name}.webp", png(3, "webp")),
            (f"{name}.json", json.dumps({"caption": "from json", "label": 7})),
            ("v1.5/b.jpg", png(4, "jpeg")),
            ("v1.5/b.json", json.dumps({"caption": "second", "label": 7})),
        ],
    )
    data = open_dataset(DataConfig(path=str(path)))
    assert data.texts == ["from json", "second"]
    assert data.class_names == ("7",)
    assert data.load_image(0).getpixel((0, 0))[0] == 3


def test_class_names_file(shards):
    (shards / "classnames.json").write_text('["even", "odd"]')
    assert open_dataset(DataConfig(path=str(shards))).class_names == ("even", "odd")
    (shards / "classnames.json").write_text('["even"]')
    assert message(shards) == (
        f"{shards}/classnames.json: no usable name for every class in the tars (list index out of range)."
    )


def test_messages(tmp_path):
    path = write(tmp_path / "a.tar", samples(0, 4))
    assert message(f"{tmp_path}/{{a,b,c}}.tar") == (
        f"{tmp_path}/b.tar: no such file (2 of 3 tars of data.path '{tmp_path}/{{a,b,c}}.tar' are missing)."
    )
    assert message(f"{tmp_path}/{{a.tar") == (
        f"data.path '{tmp_path}/{{a.tar': the braces do not match. Every {{ needs its }}."
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    assert message(path) == f"{path}: damaged tar (unexpected end of data). Download or write it again."
    path.write_bytes(b"")
    assert message(path) == f"{path}: damaged tar (empty file). Download or write it again."
    path.write_bytes(b"x" * 2000)
    assert message(path) == f"{path}: damaged tar (invalid header). Download or write it again."
    write(path, samples(0, 2), "w:gz")
    assert message(path) == (
        f"{path}: compressed tars have no random access. Decompress it; images are compressed already."
    )
    write(path, [])
    assert message(path) == f"{path}: the tar is empty or truncated."
    write(path, [("a.txt", "no image"), ("b.txt", "none")])
    assert message(path) == f"{path}: no images in 1 tar. Members must be named like 0001.jpg and 0001.txt."
    write(path, [("a.png", png(1)), ("b.png", png(1)), ("a.txt", "far away"), ("b.txt", "x")])
    assert message(path) == (f"{path}: the members of sample 'a' are not next to each other. Sort the tar by name.")
    write(path, [("a.png", png(1)), ("a.txt", "x"), ("b.png", png(1))])
    assert message(path) == (
        f"{path}/b.png: 1 of 2 samples have no caption (.txt or .json); the first is this one. "
        "Write the tars with it for every sample."
    )
    write(path, [("a.png", png(1)), ("a.txt", b"\xff\xfe")])
    assert message(path) == f"{path}/a.txt: not UTF-8."
    write(path, [("a.png", png(1)), ("a.json", "{")])
    assert message(path).startswith(f"{path}/a.json: not JSON (")
    write(path, [("a.png", png(1)), ("a.txt", "x"), ("b.txt", "no image")])
    assert message(path) == (
        f"{path}: 1 of 2 samples have no image, more than data.max_bad_fraction 0.01 allows. "
        "Check how the tars were written."
    )
    data = open_dataset(DataConfig(path=str(path), max_bad_fraction=0.5))
    assert data.description == "1 image, captions, 1 tar (1 samples without an image left out)"


def test_a_tar_that_vanishes_is_a_bad_image(shards):
    data = open_dataset(DataConfig(path=str(shards)))
    (shards / "s0.tar").unlink()
    with pytest.raises(DataError, match=r"s0.tar/d/000.png: .*No such file"):
        data.load_image(0)

"""Folders: class folders, caption files, plain images, and what is wrong with each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.errors import DataError


def image(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (red, 0, 0)).save(path)


def message(path: Path, **fields) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(DataConfig(path=str(path), **fields))
    return str(caught.value)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(["dog/a.png", "dog/b.PNG", "cat/x.jpg", "cat/deep/y.webp", "cat/.hidden.png"]):
        image(root / name, number * 20)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_class_folders(pets):
    data = open_dataset(DataConfig(path=str(pets)))
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert [data.image_name(i) for i in range(4)] == [
        os.path.join("cat", "x.jpg"),
        os.path.join("cat", "deep", "y.webp"),
        os.path.join("dog", "a.png"),
        os.path.join("dog", "b.PNG"),
    ]
    assert data.description == "4 images, 2 classes, class folders in pets"
    assert data.load_image(3).getpixel((0, 0)) == (20, 0, 0)


def test_numbered_class_folders_are_in_order_of_value(tmp_path):
    for name in ("10", "9", "1"):
        image(tmp_path / name / "a.png")
        image(tmp_path / name / "b.png")
    assert open_dataset(DataConfig(path=str(tmp_path))).class_names == ("1", "9", "10")


@pytest.mark.parametrize("given", [{"cat": "Felis", "dog": "Canis", "more": "x"}, ["Felis", "Canis"]])
def test_class_names_file(pets, given):
    (pets / "classnames.json").write_text(json.dumps(given))
    assert open_dataset(DataConfig(path=str(pets))).class_names == ("Felis", "Canis")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"cat": "Felis"}', "no name for the class folder 'dog' (1 missing). Add it."),
        ('["Felis"]', "1 names for 2 class folders. Give one name per folder."),
        ('"Felis"', "must be an object {folder: name} or a list of names."),
        ('["Felis", 3]', "class name 3 is not a text."),
        ('["Felis", "Felis"]', "the name 'Felis' stands for 2 folders. Use distinct names."),
        ("{", "not readable as JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))."),
    ],
)
def test_class_names_file_messages(pets, content, expected):
    (pets / "classnames.json").write_text(content)
    assert message(pets) == f"{pets}/classnames.json: {expected}"


def test_empty_class_folder(pets):
    (pets / "bird").mkdir()
    assert message(pets) == f"{pets}: class folder 'bird' holds no images. Add some or remove the folder."


def test_class_with_one_image(pets):
    image(pets / "bird" / "a.png")
    assert message(pets) == (
        "pets: class 'bird' has 1 image, fewer than data.min_images_per_class 2. Retrieval and a train/validation "
        "split need two: add images, remove the class, or set data.min_images_per_class: 1."
    )
    assert len(open_dataset(DataConfig(path=str(pets), min_images_per_class=1))) == 5


def test_split_folders_are_not_classes(tmp_path):
    for side in ("train", "val"):
        for name in ("a", "b"):
            image(tmp_path / side / name / "0.png")
    assert message(tmp_path) == (
        f"{tmp_path}: the folders 'train', 'val' look like splits, not classes. Set data.path: {tmp_path}/train"
    )


def test_images_beside_class_folders_are_ambiguous(pets):
    image(pets / "stray.png")
    assert message(pets) == (
        f"{pets}: 1 images lie in the folder itself and 4 in folders below it. Set data.format: imagefolder (folders "
        "are classes, the others are ignored) or data.format: images."
    )
    assert len(open_dataset(DataConfig(path=str(pets), format="imagefolder"))) == 4
    assert len(open_dataset(DataConfig(path=str(pets), format="images"))) == 5


def test_caption_files(tmp_path):
    for number in range(3):
        image(tmp_path / "00000" / f"{number}.jpg", number)
        (tmp_path / "00000" / f"{number}.txt").write_bytes(f"\ufeff caption\r\n{number}\n".encode())
        (tmp_path / "00000" / f"{number}.json").write_text("{}")
    data = open_dataset(DataConfig(path=str(tmp_path)))
    assert data.texts == ["caption 0", "caption 1", "caption 2"]
    assert data.labels is None
    assert data.origin == f"images with .txt files in {tmp_path.name}"
    image(tmp_path / "bare.png")
    assert message(tmp_path) == (
        f"{tmp_path}: 1 of 4 images have no .txt file beside them, the first is 'bare.png'. "
        "Add the captions, move these images away, or set data.format: images."
    )
    (tmp_path / "bare.txt").write_text(" \n")
    assert message(tmp_path) == (
        f"{tmp_path}/bare.txt: the caption is empty. Fill the file, or remove it and its image."
    )
    (tmp_path / "bare.txt").write_bytes(b"caf\xe9")
    assert message(tmp_path) == f"{tmp_path}/bare.txt: not UTF-8 (byte 3). Save the caption as UTF-8."


def test_plain_images_and_no_images(tmp_path):
    assert message(tmp_path) == (
        f"{tmp_path}: the folder holds no images (looked for .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, "
        ".webp). Check data.path."
    )
    for form in ("imagefolder", "pairs", "images"):
        assert message(tmp_path, format=form).startswith(f"{tmp_path}: ")
    image(tmp_path / "b.png", 9)
    image(tmp_path / "a.png", 3)
    data = open_dataset(DataConfig(path=str(tmp_path)))
    assert data.description == f"2 images, images in {tmp_path.name}"
    assert [data.load_image(i).getpixel((0, 0))[0] for i in (0, 1)] == [3, 9]


def test_wrong_format(tmp_path):
    image(tmp_path / "a.png")
    assert message(tmp_path / "a.png", format="images") == (
        f"{tmp_path}/a.png: is a file, not a folder. Check data.path and data.format."
    )
    assert message(tmp_path / "b", format="pairs") == f"{tmp_path}/b: no such folder. Check data.path and data.format."
    assert message(tmp_path, format="webdataset") == f"{tmp_path}: the folder holds no .tar files. Check data.path."


def test_link_loops_end(pets):
    os.symlink(pets, pets / "dog" / "again")
    assert len(open_dataset(DataConfig(path=str(pets), format="images"))) == 4


def test_fingerprint_follows_names_labels_texts_and_sizes(pets):
    first = open_dataset(DataConfig(path=str(pets)))
    assert open_dataset(DataConfig(path=str(pets))).fingerprint == first.fingerprint
    assert first.subset([1, 0, 2]).fingerprint != first.subset([0, 1, 2]).fingerprint
    (pets / "classnames.json").write_text('["x", "y"]')
    assert open_dataset(DataConfig(path=str(pets))).fingerprint != first.fingerprint
    (pets / "classnames.json").unlink()
    Image.new("RGB", (60, 60)).save(pets / "dog" / "a.png")
    assert open_dataset(DataConfig(path=str(pets))).fingerprint != first.fingerprint

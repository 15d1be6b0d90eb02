"""torchvision sources: labels, names and splits against files laid out as torchvision expects them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.data.torchvision_sets import split_80_20
from ftfast.errors import DataError


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 6, 3), value, np.uint8)).save(path)


def opened(name: str, side: str, root: Path, **more):
    return open_dataset(DataConfig(path=f"torchvision:{name}/{side}?root={root}", **more))


@pytest.mark.parametrize(("count", "train", "test"), [(8677, 6941, 1736), (27000, 21600, 5400), (108754, 87003, 21751)])
def test_the_random_split_is_torchs(count: int, train: int, test: int) -> None:
    parts = torch.utils.data.random_split(range(count), [train, test], generator=torch.Generator().manual_seed(42))
    assert split_80_20(count, "train").tolist() == list(parts[0].indices)
    assert split_80_20(count, "test").tolist() == list(parts[1].indices)


def test_eurosat_is_divided_and_named_as_clip_names_it(tmp_path: Path) -> None:
    folders = ("AnnualCrop", "Forest", "HerbaceousVegetation")
    for label, folder in enumerate(folders):
        for number in range(10):
            picture(tmp_path / "eurosat" / "2750" / folder / f"{folder}_{number}.png", 50 * label)
    train, test = (opened("eurosat", side, tmp_path) for side in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    assert train.class_names == ("annual crop land", "forest", "brushland or shrubland") == test.class_names
    for dataset in (train, test):
        for place in range(len(dataset)):
            assert np.asarray(dataset.load_image(place))[0, 0, 0] == 50 * dataset.labels[place]
    assert not {train.image_name(n) for n in range(24)} & {test.image_name(n) for n in range(6)}
    assert "80 / 20" in train.description


def test_aircraft_uses_the_train_list_alone(tmp_path: Path) -> None:
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nA380\n")
    for side, names in (("train", ("1", "2")), ("val", ("3",)), ("test", ("4", "5", "6"))):
        lines = [f"{name} {'A380' if int(name) % 2 else '707-320'}\n" for name in names]
        (data / f"images_variant_{side}.txt").write_text("".join(lines))
        for name in names:
            picture(data / "images" / f"{name}.jpg", 10 * int(name))
    train, test = (opened("aircraft", side, tmp_path) for side in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0], [0, 1, 0])
    assert train.class_names == ("707-320", "A380")


def test_caltech_and_sun397_names_and_labels(tmp_path: Path) -> None:
    root = tmp_path / "caltech101"
    for label, (category, annotation) in enumerate((("Faces", "Faces_2"), ("yin_yang", "yin_yang"))):
        for number in range(1, 6):
            picture(root / "101_ObjectCategories" / category / f"image_{number:04d}.jpg", 100 * label)
        (root / "Annotations" / annotation).mkdir(parents=True)
    (root / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    train = opened("caltech101", "train", tmp_path)
    assert train.class_names == ("off-center face", "yin and yang symbol")
    assert len(train) == 8
    assert all(np.asarray(train.load_image(n))[0, 0, 0] == 100 * train.labels[n] for n in range(8))
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")
    for label, folder in enumerate(("a/abbey", "a/apse/indoor")):
        for number in range(5):
            picture(tmp_path / "SUN397" / folder / f"sun_{number}{label}.jpg", 100 * label)
    sun = opened("sun397", "test", tmp_path)
    assert sun.class_names == ("abbey", "apse indoor")
    assert all(np.asarray(sun.load_image(n))[0, 0, 0] == 100 * sun.labels[n] for n in range(len(sun)))


def test_mnist_digits_become_colour_images(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, labels in (("train", (3, 1, 4)), ("t10k", (1, 5))):
        pixels = np.stack([np.full((28, 28), 10 * label, np.uint8) for label in labels])
        head = struct.pack(">IIII", 2051, len(labels), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    train = opened("mnist", "train", tmp_path)
    assert train.labels.tolist() == [3, 1, 4]
    assert train.class_names == tuple("0123456789")
    assert np.asarray(train.load_image(2)).shape == (28, 28, 3)
    assert np.asarray(train.load_image(2))[0, 0].tolist() == [40, 40, 40]


def test_a_subset_of_classes_keeps_its_own_order(tmp_path: Path, class_table: Path) -> None:
    kept = open_dataset(DataConfig(path=str(class_table), classes=("kind 7", "kind 2")))
    assert kept.class_names == ("kind 7", "kind 2")
    assert len(kept) == 12
    assert {kept.texts[n] for n in np.flatnonzero(kept.labels == 0)} == {f"thing number {n}" for n in range(7, 60, 10)}
    with pytest.raises(DataError, match=r"data.classes names 'kind 11', which is none of its 10 classes. Did you mean"):
        open_dataset(DataConfig(path=str(class_table), classes=("kind 7", "kind 11")))


def test_what_is_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"food-101 does not exist. Put the data there \(torchvision downloads it"):
        opened("food", "train", tmp_path)
    (tmp_path / "food-101").mkdir()
    with pytest.raises(DataError, match="food-101 is incomplete: Dataset not found"):
        opened("food", "train", tmp_path)
    with pytest.raises(DataError, match=r"Did you mean 'torchvision:flowers/train'\?"):
        open_dataset(DataConfig(path="torchvision:flower/train"))
    with pytest.raises(DataError, match="write torchvision:NAME/train or torchvision:NAME/test"):
        open_dataset(DataConfig(path="torchvision:flowers/val"))

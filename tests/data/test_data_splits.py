"""Splits, few-shot draws and batch plans: exact counts, determinism, and properties over random data sets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftfast.config.schema import DataConfig
from ftfast.data import (
    ImageDataset,
    base_new_split,
    few_shot,
    few_shot_validation,
    open_dataset,
    split_classes,
    split_images,
)
from ftfast.data.samplers import ClassBalancedPlan, DistinctTextPlan, LoaderOptions, ShuffledPlan
from ftfast.errors import DataError


def dataset(labels: list[int] | np.ndarray | None, count: int | None = None, **fields) -> ImageDataset:
    size = len(labels) if labels is not None else count
    pixels = np.zeros((size, 1, 1, 3), dtype=np.uint8)
    if labels is not None:
        present, numbers = np.unique(labels, return_inverse=True)
        fields |= {"labels": numbers, "class_names": tuple(f"c{c:05d}" for c in present)}
    return ImageDataset.from_arrays(pixels, **fields)


label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(labels=label_lists, data=st.data())
def test_subset_keeps_names_with_images(labels, data):
    whole = dataset(labels, texts=[f"t{i}" for i in range(len(labels))])
    chosen = data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=20))
    part = whole.subset(chosen)
    assert part.texts == [f"t{i}" for i in chosen]
    names = [whole.class_names[whole.labels[i]] for i in chosen]
    assert [part.class_names[c] for c in part.labels] == names
    assert list(part.class_names) == sorted(set(names))
    kept = whole.subset(chosen, keep_classes=True)
    assert kept.class_names == whole.class_names
    assert kept.labels.tolist() == whole.labels[chosen].tolist()
    again = part.subset(range(len(part))[::-1])
    assert again.rows.tolist() == chosen[::-1]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(11_318, 9_054), (3_997, 3_198), (5_690, 4_552), (98, 78)],  # SOP, In-Shop, iNaturalist, Cars in INFUSING
)
def test_split_classes_gives_the_published_counts(classes, expected):
    train, val = split_classes(dataset(np.arange(classes)), 0.8)
    assert (len(train.class_names), len(val.class_names)) == (expected, classes - expected)


def test_split_images_gives_the_published_counts_without_classes():
    # INFUSING: the first 80 % of 1,281,166 shuffled ImageNet images train, 256,233 validate.
    train, val = split_images(dataset(None, 1_281_166), 0.8)
    assert (len(train), len(val)) == (1_024_933, 256_233)


@settings(max_examples=60, deadline=None)
@given(labels=label_lists, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 3))
def test_splits_are_partitions(labels, fraction, seed):
    whole = dataset(labels)
    if len(labels) > 1:
        train, val = split_images(whole, fraction, seed)
        rows = train.subset(range(len(train))).rows.tolist() + val.subset(range(len(val))).rows.tolist()
        assert sorted(rows) == list(range(len(labels)))
        assert train.class_names == val.class_names == whole.class_names
        assert len(train)
        assert len(val)
        for label, count in Counter(whole.labels.tolist()).items():
            if count > 1:
                assert 1 <= int((train.labels == label).sum()) < count
        assert split_images(whole, fraction, seed)[0].fingerprint == train.fingerprint
    if len(whole.class_names) > 1:
        train, val = split_classes(whole, fraction, seed)
        assert len(train) + len(val) == len(whole)
        assert sorted(train.class_names + val.class_names) == list(whole.class_names)
        assert train.class_names
        assert val.class_names


def test_split_seed_matters():
    whole = dataset(np.arange(50))
    assert split_classes(whole, 0.5, 1)[0].class_names != split_classes(whole, 0.5, 2)[0].class_names
    plain = dataset(None, 50)
    assert split_images(plain, 0.5, 1)[0].rows.tolist() != split_images(plain, 0.5, 2)[0].rows.tolist()


@settings(max_examples=60, deadline=None)
@given(labels=label_lists, shots=st.integers(1, 6), seed=st.integers(0, 5))
def test_few_shot_counts_and_prefixes(labels, shots, seed):
    whole = dataset(labels)
    sizes = np.bincount(whole.labels)
    drawn = few_shot(whole, shots, seed)
    assert np.bincount(drawn.labels).tolist() == np.minimum(sizes, shots).tolist()
    assert len(set(drawn.rows.tolist())) == len(drawn)
    assert few_shot(whole, shots, seed).rows.tolist() == drawn.rows.tolist()
    assert set(drawn.rows.tolist()) <= set(few_shot(whole, shots + 1, seed).rows.tolist())
    repeated = few_shot(whole, shots, seed, repeat=True)
    assert np.bincount(repeated.labels).tolist() == [shots] * len(sizes)
    if sizes.max() > shots:
        val = few_shot_validation(whole, shots, seed)
        expected = np.clip(sizes - shots, 0, min(shots, 4))
        assert np.bincount(val.labels, minlength=len(sizes)).tolist() == expected.tolist()
        assert not set(val.rows.tolist()) & set(drawn.rows.tolist())


def test_few_shot_seeds_differ_and_other_classes_do_not_matter():
    whole = dataset(np.repeat(np.arange(5), 30))
    assert few_shot(whole, 8, 1).rows.tolist() != few_shot(whole, 8, 2).rows.tolist()
    part = whole.subset(np.flatnonzero(whole.labels >= 2))
    assert few_shot(part, 8, 1).rows.tolist() == [i for i in few_shot(whole, 8, 1).rows.tolist() if i >= 60]


@pytest.mark.parametrize(("classes", "base"), [(2, 1), (3, 2), (10, 5), (101, 51), (37, 19)])
def test_base_new_split(classes, base):
    whole = dataset(np.arange(2 * classes) % classes)
    first, second = base_new_split(whole)
    assert first.class_names == whole.class_names[:base]
    assert second.class_names == whole.class_names[base:]
    assert sorted(set(second.labels.tolist())) == list(range(classes - base))


def test_split_messages():
    plain, one, classes = dataset(None, 5), dataset([0, 0]), dataset([0, 1, 1])

    def message(function, *arguments) -> str:
        with pytest.raises(DataError) as caught:
            function(*arguments)
        return str(caught.value)

    hint = "needs classes; use class folders or set data.label_column."
    assert message(split_classes, plain) == f"data: a split by class {hint}"
    assert message(few_shot, plain, 1, 0) == f"data: few-shot sampling {hint}"
    assert message(base_new_split, plain) == f"data: a base/new split {hint}"
    assert message(split_classes, one) == "data: a split by class needs two classes, but there is only 'c00000'."
    assert message(base_new_split, one) == "data: a base/new split needs two classes, but there is only 'c00000'."
    assert message(split_classes, classes, 1.0) == "a split fraction must lie between 0 and 1, not 1."
    assert message(split_images, classes, -0.5) == "a split fraction must lie between 0 and 1, not -0.5."
    assert message(split_images, classes.subset([0])) == "data: a split needs two images, but there are 1."
    assert message(few_shot, classes, 0, 0) == "few-shot sampling needs at least 1 image per class, not 0."
    assert message(few_shot_validation, classes, 2, 0) == (
        "data: no class has more than 2 images, so none is left for validation."
    )


def test_split_of_a_configured_source(tmp_path):
    (tmp_path / "t.csv").write_text("image,text\n" + "".join(f"{i}.png,t\n" for i in range(10)))
    config = {"path": str(tmp_path / "t.csv"), "max_bad_fraction": 1.0}
    sides = [open_dataset(DataConfig(**config, split=s, split_by="images")) for s in ("train", "val")]
    assert [len(side) for side in sides] == [8, 2]
    assert sides[1].description == "2 images, captions, table t.csv (separator ','), val side by images"
    with pytest.raises(DataError) as caught:
        open_dataset(DataConfig(**config, split="val"))
    assert str(caught.value) == (
        "t: data.split_by is 'classes', but the data has none. Set data.split_by: images, or data.label_column."
    )


# ---- batch plans


@settings(max_examples=80, deadline=None)
@given(labels=st.lists(st.integers(0, 8), min_size=1, max_size=60), k=st.integers(1, 4), data=st.data())
def test_class_balanced_plan(labels, k, data):
    whole = dataset(labels)
    classes = len(whole.class_names)
    p = data.draw(st.integers(1, classes))
    plan = ClassBalancedPlan(whole.labels, whole.class_names, p * k, 3, LoaderOptions(images_per_class=k))
    sizes = np.bincount(whole.labels)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        batches = plan.epoch(epoch)
        assert len(batches) == plan.steps_per_epoch == max(1, len(labels) // (p * k))
        for batch in batches:
            counts = Counter(whole.labels[batch].tolist())
            assert sorted(counts.values()) == [k] * p
            for c in counts:
                assert len({i for i in batch.tolist() if whole.labels[i] == c}) == min(k, sizes[c])
            seen.update(counts.keys())
        # within an epoch no class gets two turns ahead of another
        turns = Counter(c for batch in batches for c in set(whole.labels[batch].tolist()))
        assert max(turns[c] for c in range(classes)) - min(turns[c] for c in range(classes)) <= 1
        assert [b.tolist() for b in plan.epoch(epoch)] == [b.tolist() for b in batches]


def most_batches(counts: list[int], batch_size: int) -> int:
    """The classical optimal schedule: always take one of each of the most frequent captions that are left."""
    left, batches = sorted(counts, reverse=True), 0
    while len([c for c in left if c]) >= batch_size:
        left = sorted((c - (i < batch_size) for i, c in enumerate(left)), reverse=True)
        batches += 1
    return batches


@settings(max_examples=120, deadline=None)
@given(texts=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=50), data=st.data())
def test_distinct_text_plan_is_optimal(texts, data):
    size = data.draw(st.integers(1, len(set(texts))))
    plan = DistinctTextPlan(texts, size, 5)
    assert plan.steps_per_epoch == most_batches(list(Counter(texts).values()), size)
    for epoch in range(2):
        batches = plan.epoch(epoch)
        assert len(batches) == plan.steps_per_epoch
        assert all(len({texts[i] for i in b}) == len(b) == size for b in batches)
        used = [i for b in batches for i in b.tolist()]
        assert len(set(used)) == len(used)


def test_distinct_text_plan_mixes_evenly():
    # Without duplicates it must be a plain shuffle: every pair of images equally likely to meet.
    plan = DistinctTextPlan([str(i) for i in range(12)], 4, 0)
    together = np.zeros((12, 12))
    for epoch in range(3000):
        for batch in plan.epoch(epoch):
            together[np.ix_(batch, batch)] += 1
    pairs = together[~np.eye(12, dtype=bool)] / 3000
    assert abs(pairs - 3 / 11).max() < 0.05  # 6 standard deviations


def test_shuffled_plan_is_uniform():
    first = Counter(ShuffledPlan(6, 2, True, 1, seed).epoch(0)[0][0].item() for seed in range(3000))
    assert set(first) == set(range(6))
    assert max(abs(v / 3000 - 1 / 6) for v in first.values()) < 0.04

"""Hard negatives against a dense float64 search, and the batches that are grown along them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftfast.data.samplers import HardNegativePlan
from ftfast.errors import DataError, ShapeError
from ftfast.search import hard_negatives


def dense(features, k, groups, gallery=None, gallery_groups=None):
    """Sort every row's scores; the oracle."""
    gallery, theirs = (features, groups) if gallery is None else (gallery, gallery_groups)
    x, y = (np.asarray(a, np.float64) / np.linalg.norm(a, axis=1, keepdims=True) for a in (features, gallery))
    scores = np.where(groups[:, None] == theirs[None], -np.inf, x @ y.T)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(scores, order, axis=1)), order, -1)


@pytest.mark.parametrize("rows", [1, 2, 37, 300])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("kinds", [1, 2, 7, 1000])
def test_equals_a_dense_search(rows, k, kinds):
    rng = np.random.default_rng(rows + k)
    features = rng.standard_normal((rows, 13)).astype(np.float32)
    groups = rng.integers(kinds, size=rows)
    found = hard_negatives(features, k, groups=groups)
    expected = np.full((rows, k), -1)
    expected[:, : min(k, rows)] = dense(features, k, groups)
    np.testing.assert_array_equal(found, expected)


def test_one_large_group_and_many_rows(monkeypatch):
    """All but three rows in one group, fetched a few rows at a time."""
    monkeypatch.setattr("ftfast.search.mining._FOUND_AT_ONCE", 900)
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((500, 8)).astype(np.float32))
    groups = torch.zeros(500, dtype=torch.int64)
    groups[[3, 250, 499]] = torch.tensor([1, 1, 2])
    found = hard_negatives(features, 4, groups=groups)
    np.testing.assert_array_equal(found, dense(features.numpy(), 4, groups.numpy()))


def test_pairs_and_groups_of_a_gallery():
    rng = np.random.default_rng(1)
    images, texts = (torch.from_numpy(rng.standard_normal((40, 6)).astype(np.float32)) for _ in range(2))
    pairs = np.arange(40)
    np.testing.assert_array_equal(hard_negatives(images, 3, gallery=texts), dense(images, 3, pairs, texts, pairs))
    mine, theirs = rng.integers(3, size=40), rng.integers(3, size=25)
    found = hard_negatives(images, 3, groups=mine, gallery=texts[:25], gallery_groups=theirs)
    np.testing.assert_array_equal(found, dense(images, 3, mine, texts[:25], theirs))


def test_errors():
    features = np.eye(4, dtype=np.float32)
    with pytest.raises(ShapeError, match=r"k is 0"):
        hard_negatives(features, 0)
    with pytest.raises(ShapeError, match=r"groups has shape \(3,\); features has 4 rows"):
        hard_negatives(features, 1, groups=[1, 2, 3])
    with pytest.raises(ShapeError, match="belong together"):
        hard_negatives(features, 1, groups=[1, 2, 3, 4], gallery=features)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_image_at_most_once_and_no_caption_twice(size, batch_size):
    rng = np.random.default_rng(size)
    features = rng.standard_normal((size, 5)).astype(np.float32)
    texts = [f"caption {i // 2}" for i in range(size)]
    neighbours = hard_negatives(features, 3, groups=np.arange(size) // 2)
    plan = HardNegativePlan(neighbours, size, batch_size, 5, texts)
    assert plan.steps_per_epoch == size // batch_size
    for epoch in (0, 1):
        batches = plan.epoch(epoch)
        assert len(batches) == size // batch_size
        assert all(len(batch) == batch_size for batch in batches)
        seen = np.concatenate([*batches, np.empty(0, np.int64)])
        assert len(np.unique(seen)) == len(seen)
        if size >= 64:  # at the very end of an epoch only twins may be left
            for batch in batches[: len(batches) // 2]:
                assert len({texts[i] for i in batch}) == len(batch)
    if size == 200:
        assert any((a != b).any() for a, b in zip(plan.epoch(0), plan.epoch(1), strict=True))
    np.testing.assert_equal(plan.epoch(1), plan.epoch(1))


def test_batches_are_harder_than_shuffled_ones():
    """Mean similarity inside a batch, on clustered features."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((20, 16))
    features = (centres[np.repeat(np.arange(20), 16)] + 0.5 * rng.standard_normal((320, 16))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)

    def hardness(batches):
        return np.mean([(features[b] @ features[b].T)[~np.eye(len(b), dtype=bool)].mean() for b in batches])

    plan = HardNegativePlan(hard_negatives(features, 8), 320, 16, 0)
    assert hardness(plan.epoch(0)) > hardness(np.split(rng.permutation(320), 20)) + 0.3


def test_plan_refuses_neighbours_of_other_data():
    with pytest.raises(DataError, match=r"shape \(3, 2\); the data has 4 images"):
        HardNegativePlan(np.zeros((3, 2), np.int64), 4, 2, 0)
    with pytest.raises(DataError, match="names image 9, but the data has images 0 to 3"):
        HardNegativePlan(np.full((4, 1), 9), 4, 2, 0)

"""One contract for every backend: the float64 order, ties to the lowest index, NaN never selected, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftfast.errors import ShapeError
from ftfast.search import topk

BACKENDS = ["torch", "native"]
METRICS = ["ip", "cosine", "l2"]


def oracle(queries, gallery, metric):
    """Float64 scores, larger is better; independent of the package."""
    q, x = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    with np.errstate(all="ignore"):
        if metric == "l2":
            return -np.stack([((row[None] - x) ** 2).sum(1) for row in q])
        product = np.stack([(row[None] * x).sum(1) for row in q])
        if metric == "ip":
            return product
        scale = np.sqrt((q**2).sum(1))[:, None] * np.sqrt((x**2).sum(1))[None]
        return np.where(scale == 0, 0.0, product / scale)


def rounding(queries, gallery, metric):
    """How far apart two float64 evaluations of each score can be that only add in another order."""
    q, x = np.abs(np.asarray(queries, np.float64)), np.abs(np.asarray(gallery, np.float64))
    with np.errstate(all="ignore"):
        terms = -oracle(queries, gallery, metric) if metric == "l2" else oracle(q, x, "ip")
        if metric == "cosine":
            norms = np.sqrt((q**2).sum(1))[:, None] * np.sqrt((x**2).sum(1))[None]
            terms = np.where(norms == 0, 0.0, terms / norms)
        return np.nan_to_num((q.shape[1] + 8) * 2.0**-52 * terms, nan=0.0, posinf=0.0)


def ranking(scores, k):
    """Indices by falling score, then rising index; NaN left out, padded with -1."""
    out = np.full((len(scores), k), -1, np.int64)
    for i, row in enumerate(scores):
        valid = np.flatnonzero(~np.isnan(row))
        order = valid[np.argsort(-row[valid], kind="stable")][:k]
        out[i, : len(order)] = order
    return out


def check(scores, indices, truth, noise, k, metric):
    """The ids of the oracle, except where its float64 scores cannot tell two rows apart; and the right scores."""
    sign = -1.0 if metric == "l2" else 1.0
    scores, indices = np.asarray(scores), np.asarray(indices)
    assert scores.dtype == np.float32
    assert indices.dtype == np.int64
    expected = ranking(truth, k)
    for i in range(len(truth)):
        got, want = indices[i], expected[i]
        assert (got < 0).sum() == (want < 0).sum()
        used = want >= 0
        kept, want = got[used], want[used]
        assert len(set(kept.tolist())) == len(kept)
        values, reference = truth[i][kept], truth[i][want]
        with np.errstate(all="ignore"):
            same = (kept == want) | (np.abs(values - reference) <= noise[i][kept] + noise[i][want])
            assert same.all(), (i, kept[~same], want[~same], values[~same], reference[~same])
            shown = np.float32(values).astype(np.float64)
            difference = np.abs(sign * scores[i][used].astype(np.float64) - shown)
        limit = 3e-7 * np.abs(shown) + noise[i][kept] + 1e-44
        assert ((difference <= limit) | (sign * scores[i][used] == shown)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_order_equals_float64(backend, metric):
    rng = np.random.default_rng(0)
    queries, gallery = rng.standard_normal((9, 33)).astype("f4"), rng.standard_normal((301, 33)).astype("f4")
    for k in (1, 7, 301):
        found = topk(queries, gallery, k, metric=metric, backend=backend)
        check(*found, oracle(queries, gallery, metric), rounding(queries, gallery, metric), k, metric)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_come_by_rising_index(backend, metric):
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((5, 19)).astype("f4")
    gallery = np.tile(rng.standard_normal((7, 19)).astype("f4"), (80, 1))
    for k in (1, 13, 300):
        _, indices = topk(queries, gallery, k, metric=metric, backend=backend)
        base = ranking(oracle(queries, gallery[:7], metric), 7)
        full = np.concatenate([base[:, j : j + 1] + 7 * np.arange(80)[None] for j in range(7)], axis=1)
        np.testing.assert_array_equal(indices, full[:, :k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity(backend, metric):
    rng = np.random.default_rng(2)
    queries, gallery = rng.standard_normal((6, 8)).astype("f4"), rng.standard_normal((50, 8)).astype("f4")
    gallery[3, 2] = np.nan
    gallery[11] = np.nan
    gallery[20, 1] = np.inf
    gallery[21, 1] = -np.inf
    queries[4, 0] = np.nan
    queries[5, 3] = np.inf
    truth = oracle(queries, gallery, metric)
    scores, indices = topk(queries, gallery, 50, metric=metric, backend=backend)
    np.testing.assert_array_equal(indices, ranking(truth, 50))
    assert (indices[4] == -1).all()
    assert np.isinf(scores[4]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_exclusion_and_masks(backend):
    rng = np.random.default_rng(3)
    features = rng.standard_normal((40, 16)).astype("f4")
    truth = oracle(features, features, "cosine")
    np.fill_diagonal(truth, np.nan)
    _, indices = topk(features, features, 40, exclude_self=True, backend=backend)
    np.testing.assert_array_equal(indices, ranking(truth, 40))
    mask = rng.random((40, 40)) < 0.3
    _, indices = topk(features, features, 12, mask=mask, exclude_self=np.arange(40), backend=backend)
    np.testing.assert_array_equal(indices, ranking(np.where(mask, truth, np.nan), 12))
    _, indices = topk(features, features, 12, mask=mask[0], backend=backend)
    full = np.where(mask[:1], oracle(features, features, "cosine"), np.nan)
    np.testing.assert_array_equal(indices, ranking(full, 12))
    scores, indices = topk(features, features, 3, mask=np.zeros(40, bool), metric="l2", backend=backend)
    assert (indices == -1).all()
    assert np.isposinf(scores).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes(backend, dtype, metric):
    generator = torch.Generator().manual_seed(4)
    queries = (torch.randn(7, 45, generator=generator) * 20).to(dtype)
    gallery = (torch.randn(203, 45, generator=generator) * 20).to(dtype)
    scores, indices = topk(queries, gallery, 9, metric=metric, backend=backend)
    assert isinstance(scores, torch.Tensor)
    queries, gallery = queries.double(), gallery.double()
    check(scores, indices, oracle(queries, gallery, metric), rounding(queries, gallery, metric), 9, metric)


ERRORS = [
    ({"k": 0}, "k is 0; it must be at least 1."),
    ({"k": 6}, "k is 6 but the gallery has 5 rows; lower k to at most 5."),
    ({"k": 2.0}, "k is 2.0; it must be an integer."),
    ({"metric": "dot"}, "metric is 'dot'; choose one of cosine, ip, l2."),
    ({"backend": "gpu"}, "backend is 'gpu'; choose one of auto, native, torch, faiss."),
    ({"queries": torch.zeros(3, 5)}, "queries have width 5 but gallery has width 4."),
    ({"queries": torch.zeros(3)}, "queries has shape (3,); it must be two-dimensional: (rows, width)."),
    (
        {"queries": torch.zeros(0, 4)},
        "queries is empty: shape (0, 4). It needs at least one row and one column.",
    ),
    (
        {"gallery": torch.zeros(5, 4, dtype=torch.float64)},
        "gallery has dtype torch.float64; use float32, float16, bfloat16 or int8 (convert with .float()).",
    ),
    (
        {"gallery": torch.zeros(5, 4, device="meta")},
        "queries are on cpu but gallery is on meta; move one of them.",
    ),
    (
        {"gallery": [[1.0]]},
        "gallery is a list; pass a numpy array, a torch tensor or an array with DLPack support.",
    ),
    (
        {"mask": torch.ones(4, dtype=torch.bool)},
        "mask has shape (4,) and dtype torch.bool; use bool of (5,) or (3, 5), "
        "True where a gallery row may be returned.",
    ),
    (
        {"exclude_self": True},
        "exclude_self=True needs queries and gallery to be the same rows, but there are 3 queries and 5 gallery rows; "
        "pass the gallery row of each query as an int64 array instead.",
    ),
    (
        {"exclude_self": torch.tensor([0, 1, 5])},
        "exclude_self names a row outside the gallery: allowed are -1 (none) to 4.",
    ),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_say_what_was_wrong(change, message):
    arguments = {"queries": torch.zeros(3, 4), "gallery": torch.zeros(5, 4), "k": 2} | change
    with pytest.raises(ShapeError) as caught:
        topk(**arguments)
    assert str(caught.value) == message

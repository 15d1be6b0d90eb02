"""ExactIndex beside faiss's IndexFlat, its files, and hostile files."""

from __future__ import annotations

import json
import struct

import faiss
import numpy as np
import pytest
import torch

from ftfast.errors import CheckpointError, ShapeError
from ftfast.search import ExactIndex, FaissIndex, topk


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((700, 24)).astype("f4"), rng.standard_normal((31, 24)).astype("f4")


@pytest.mark.parametrize("mode", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_answers_like_faiss(data, metric, mode):
    gallery, queries = data
    theirs = faiss.IndexFlatIP(24) if metric == "ip" else faiss.IndexFlatL2(24)
    ours = ExactIndex(24, metric, mode=mode)
    for start in (0, 5, 21, 300):  # additions that end inside a panel of sixteen rows
        part = gallery[start : {0: 5, 5: 21, 21: 300, 300: 700}[start]]
        theirs.add(part)
        ours.add(part)
    assert ours.ntotal == theirs.ntotal == len(ours)
    expected, got = theirs.search(queries, 10), ours.search(queries, 10)
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-4)
    radius = 6.0 if metric == "ip" else 30.0
    lims, scores, ids = ours.range_search(queries, radius)
    their_lims, their_scores, their_ids = theirs.range_search(queries, radius)
    np.testing.assert_array_equal(lims, their_lims.astype(np.int64))
    assert lims[-1] > 50
    for i in range(len(queries)):
        span = slice(lims[i], lims[i + 1])
        order = np.argsort(their_scores[span] if metric == "l2" else -their_scores[span], kind="stable")
        np.testing.assert_array_equal(ids[span], their_ids[span][order])
        np.testing.assert_allclose(scores[span], their_scores[span][order], rtol=1e-4, atol=1e-4)
    removed = np.arange(0, 700, 3)
    assert ours.remove_ids(removed) == theirs.remove_ids(removed)
    np.testing.assert_array_equal(ours.search(queries, 9)[1], theirs.search(queries, 9)[1])
    np.testing.assert_array_equal(ours.reconstruct(17), theirs.reconstruct(17))
    assert ours.remove_ids([-1, 10**9]) == 0


def test_pads_like_faiss_and_counts_work(data):
    gallery, queries = data
    index = ExactIndex(24)
    scores, ids = index.search(queries, 3)
    assert (ids == -1).all()
    assert np.isneginf(scores).all()
    assert index.range_search(queries, 0.0)[0].tolist() == [0] * 32
    index.add(gallery[:2])
    scores, ids = index.search(queries, 3)
    assert (ids[:, 2] == -1).all()
    assert (np.sort(ids[:, :2], axis=1) == [0, 1]).all()
    index.add(gallery)
    index.search(queries, 3)
    scanned, candidates, rescored = index.certificate
    assert scanned == 702 * 31
    assert 3 * 31 <= rescored <= candidates < scanned
    index.reset()
    assert index.ntotal == 0


def test_errors(data):
    gallery, _ = data
    index = ExactIndex(24)
    with pytest.raises(ShapeError, match=r"x has width 23 but the index has width 24"):
        index.add(gallery[:, :23])
    index.add(gallery)
    with pytest.raises(ShapeError, match=r"x is torch.float16 on cpu, but the index holds torch.float32"):
        index.add(gallery.astype(np.float16))
    with pytest.raises(ShapeError, match="k is 0; it must be at least 1"):
        index.search(gallery, 0)
    with pytest.raises(ShapeError, match=r"k is 1\.5; it must be an integer"):
        index.search(gallery, 1.5)
    with pytest.raises(ShapeError, match="key is 700, but the index has 700 rows"):
        index.reconstruct(700)
    for arguments in ((0,), (4, "dot"), (True,)):
        with pytest.raises(ShapeError):
            ExactIndex(*arguments)
    with pytest.raises(ShapeError, match="mode is 'int4'; choose one of auto, int8, bf16, fp32"):
        ExactIndex(4, mode="int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_save_and_load(tmp_path, dtype):
    rows = (torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    index = ExactIndex(16, "cosine")
    index.add(rows)
    index.save(tmp_path / "deep" / "index.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["index.safetensors"]
    loaded = ExactIndex.load(tmp_path / "deep" / "index.safetensors")
    for a, b in zip(index.search(rows[:9], 5), loaded.search(rows[:9], 5), strict=True):
        assert torch.equal(a, b)
    loaded.add(rows[:3])
    assert loaded.ntotal == 203
    assert ExactIndex.load(tmp_path / "deep" / "index.safetensors").ntotal == 200
    empty = ExactIndex(16)
    empty.save(tmp_path / "empty")
    assert ExactIndex.load(tmp_path / "empty").ntotal == 0


def test_truncated_and_hostile_files(tmp_path):
    index = ExactIndex(8)
    index.add(np.ones((50, 8), "f4"))
    good = tmp_path / "good"
    index.save(good)
    content = good.read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "bad").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="bad"):
            ExactIndex.load(tmp_path / "bad")
    rng = np.random.default_rng(0)
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(300):  # flipped bytes in the header: an error or a usable index, never a crash
        mutated = bytearray(content)
        mutated[rng.integers(0, 8 + header)] = rng.integers(0, 256)
        (tmp_path / "bad").write_bytes(mutated)
        try:
            loaded = ExactIndex.load(tmp_path / "bad")
        except CheckpointError:
            continue
        loaded.search(np.ones((1, loaded.d), "f4"), 3)

    def write(tensor_info, metadata, size):
        text = json.dumps({"__metadata__": metadata, **tensor_info}).encode()
        (tmp_path / "bad").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)

    metadata = {"format": "ftfast-exact-index-1", "metric": "ip", "d": "8"}
    cases = [
        ({"vectors": {"dtype": "F64", "shape": [1, 8], "data_offsets": [0, 64]}}, metadata, 64),
        ({"vectors": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}, metadata, 32),
        ({"vectors": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, metadata, 32),
        ({"vectors": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 32]}}, metadata, 32),
        ({"other": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}}, metadata, 32),
        ({}, metadata | {"d": "-3"}, 0),
        ({}, metadata | {"d": "x"}, 0),
        ({}, metadata | {"metric": "dot"}, 0),
        ({}, {"format": "ftfast-exact-index-1"}, 0),
        ({}, {}, 0),
    ]
    for case in cases:
        write(*case)
        with pytest.raises(CheckpointError, match="bad"):
            ExactIndex.load(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="no such index file"):
        ExactIndex.load(tmp_path / "missing")


def test_faiss_handover(data):
    gallery, queries = data
    for metric in ("ip", "cosine", "l2"):
        ours = topk(queries, gallery, 8, metric=metric)
        theirs = topk(queries, gallery, 8, metric=metric, backend="faiss")
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    mask = np.arange(700) % 2 == 0
    ours = topk(gallery, gallery, 5, mask=mask, exclude_self=True)
    theirs = topk(gallery, gallery, 5, mask=mask, exclude_self=True, backend="faiss")
    assert (ours[1] == theirs[1]).mean() > 0.999
    for factory in ("HNSW16", "IVF8,Flat"):
        approximate = FaissIndex(24, "cosine", factory=factory, search_breadth=64 if "HNSW" in factory else 8)
        approximate.add(gallery)
        found = approximate.search(queries, 8)[1]
        exact = topk(queries, gallery, 8)[1]
        recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found, exact, strict=True)])
        assert recall > 0.9
    with pytest.raises(ShapeError, match="faiss cannot build an index from 'Nonsense'"):
        FaissIndex(24, factory="Nonsense")
    with pytest.raises(ShapeError, match="cannot use a mask per query"):
        topk(queries, gallery, 2, mask=np.ones((31, 700), bool), backend="faiss")

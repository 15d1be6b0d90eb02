"""The certificate under attack: random shapes, adversarial vectors, every instruction set, every copy, every dtype."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_topk_contract import METRICS, check, oracle, ranking, rounding

from ftfast.search.arrays import check_problem
from ftfast.search.native import NativeShadow, default_mode, require_extension, topk_native
from ftfast.search.reference import topk_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
ISAS = require_extension().describe()["instruction_sets"]
MODES = ["fp32"] + ["bf16"] * (default_mode(8) in ("bf16", "int8")) + ["int8"] * (default_mode(8) == "int8")
FUZZ_CASES = int(os.environ.get("FTFAST_FUZZ_CASES", "150"))


def every_path(problem):
    """All ways through the extension that this processor has: (name, scores, indices)."""
    for isa in ISAS:
        for mode in MODES if isa == "avx512" else ["fp32"]:
            yield f"{isa} {mode}", *topk_native(problem, isa=isa, mode=mode)[:2]
    for mode in MODES:
        shadow = NativeShadow(problem.metric, mode, problem.gallery.shape[1])
        cut = problem.gallery.shape[0] // 3
        for part in (problem.gallery[:cut], problem.gallery[cut:]):
            if len(part):
                shadow.append(part)
        yield f"shadow {mode}", *topk_native(problem, shadow=shadow)[:2]


def check_all_paths(queries, gallery, k, metric):
    """Every path equals the float64 oracle, and every path equals every other bit for bit."""
    problem = check_problem(queries, gallery, k, metric)
    pair = problem.queries.double(), problem.gallery.double()
    truth, noise = oracle(*pair, metric), rounding(*pair, metric)
    first = None
    for name, scores, indices in every_path(problem):
        if first is None:
            check(scores.float(), indices, truth, noise, k, metric)
            first = scores, indices
        assert torch.equal(indices, first[1]), name
        assert torch.equal(scores.isnan(), first[0].isnan())
        assert torch.equal(scores, first[0]), name
    scores, indices = topk_reference(problem)
    check(scores.float(), indices, truth, noise, k, metric)


@pytest.mark.parametrize("case", range(100))
def test_random_shapes(case):
    rng = np.random.default_rng(case)
    n = int(np.exp(rng.uniform(0, np.log(5000))))
    d = int(np.exp(rng.uniform(0, np.log(1100))))
    nq = int(rng.choice([1, 2, 3, 5, 8, 9, 17, 40]))
    k = int(rng.choice([1, min(n, 10), rng.integers(1, n + 1)]))
    kind = rng.integers(3)
    gallery, queries = rng.standard_normal((n, d)), rng.standard_normal((nq, d))
    if kind == 1:  # clusters with a common mean, as embeddings have
        centres = rng.standard_normal((max(1, n // 50), d))
        gallery = 3 * rng.standard_normal(d) + centres[rng.integers(len(centres), size=n)] + 0.05 * gallery
    if kind == 2:
        gallery *= np.exp(rng.uniform(-6, 6, (n, 1)))
    dtype = DTYPES[case % 4]
    scale = 20 if dtype == torch.int8 else 1
    queries, gallery = (torch.from_numpy(a * scale).clamp(-120, 120).to(dtype) for a in (queries, gallery))
    for metric in METRICS:
        problem = check_problem(queries, gallery, k, metric)
        pair = queries.double(), gallery.double()
        truth, noise = oracle(*pair, metric), rounding(*pair, metric)
        results = [topk_native(problem, threads=threads, mode=mode) for threads in (1, 2) for mode in MODES]
        check(results[0][0].float(), results[0][1], truth, noise, k, metric)
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0])
            assert torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_paths_agree(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    for n, d, nq, k in ((1, 1, 1, 1), (17, 3, 9, 17), (333, 65, 20, 12), (4100, 30, 11, 5)):
        gallery = (torch.randn(n, d, generator=generator) * 20).to(dtype)
        queries = (torch.randn(nq, d, generator=generator) * 20).to(dtype)
        check_all_paths(queries, gallery, k, metric)


def attacks():
    """Galleries built to break a bound: the true best row looks as bad as its copy allows."""
    rng = np.random.default_rng(7)
    d = 48
    q = rng.standard_normal((10, d)).astype("f4")
    base = rng.standard_normal((400, d)).astype("f4")
    yield "denormal rows", q, np.concatenate([base * np.float32(1e-42), base * np.float32(1e-30), -base[:50]])
    yield "denormal queries", q * np.float32(1e-41), base
    yield "huge norms", q, np.concatenate([base, base[:90] * np.float32(1e30), base[:9] * np.float32(3e37)])
    yield "huge queries", q * np.float32(1e37), base * np.float32(1e20)
    yield "one-hot", np.eye(d, dtype="f4")[:10], np.eye(d, dtype="f4")[rng.integers(d, size=500)]
    yield "duplicates", q, np.repeat(base[:7], 90, axis=0)
    yield "all equal", q, np.ones((600, d), "f4")
    yield "zeros", np.concatenate([q[:5], np.zeros((5, d), "f4")]), np.concatenate([np.zeros((100, d), "f4"), base])
    spike = base * np.float32(0.004)
    spike[np.arange(400), rng.integers(d, size=400)] = 100.0  # one large value: everything else rounds to zero in int8
    yield "spikes", np.concatenate([q[:5], spike[:5] - np.float32(100) * (spike[:5] == 100)]), spike
    # Rows at the middle between two int8 (and bfloat16) steps, and queries along the rounding errors.
    step = np.float32(1 / 127)
    grid = rng.integers(-126, 126, (500, d)).astype("f4")
    middle = (grid + np.float32(0.4999) * np.sign(rng.standard_normal((500, d)))).astype("f4") * step
    middle[:, 0] = 1.0
    residual = middle - np.round(middle / step) * step
    yield "anti-correlated residuals", np.concatenate([residual[:5], -residual[:5]]) * np.float32(300), middle
    near = np.repeat(base[:1], 300, axis=0)
    near[np.arange(300), rng.integers(d, size=300)] *= 1 + rng.integers(-3, 4, 300).astype("f4") * np.float32(2**-23)
    yield "neighbouring floats", np.concatenate([base[:1], q[:4]]), near
    mean = 1000 + base
    yield "far from the origin", (q + 1000).astype("f4"), mean.astype("f4")
    cancel = np.concatenate([base, -base], axis=1)
    yield "cancellation", np.concatenate([q, q], axis=1) * np.float32(100), cancel
    outlier = base.copy()
    outlier[0] = 1e10
    yield "one outlier", q, outlier


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("attack", [pytest.param(a, id=a[0].replace(" ", "-")) for a in attacks()])
def test_adversarial_vectors(attack, metric):
    _, queries, gallery = attack
    for k in (1, 10, 100):
        check_all_paths(queries, gallery, k, metric)


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_is_needed_and_sufficient(mode):
    """An int8 copy alone would give a wrong answer on this gallery; with the residual term the answer is right."""
    rng = np.random.default_rng(11)
    base = rng.standard_normal(256).astype("f4")
    gallery = np.stack([base + np.float32(1e-3) * rng.standard_normal(256).astype("f4") for _ in range(3000)])
    queries = (gallery[rng.integers(3000, size=16)] - base).astype("f4")
    truth = oracle(queries, gallery, "ip")
    problem = check_problem(queries, gallery, 5, "ip")
    scores, indices, certificate = topk_native(problem, mode=mode)
    check(scores.float(), indices, truth, rounding(queries, gallery, "ip"), 5, "ip")
    assert certificate.scanned == 16 * 3000
    step = np.abs(gallery).max(axis=1, keepdims=True) / 127
    copy = np.round(gallery / step) * step
    assert (ranking(oracle(queries, copy, "ip"), 5) != ranking(truth, 5)).any()


def vectors(draw, rows, width):
    """A float32 matrix of ordinary, extreme and special values."""
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, 127.0, 0.5]
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)) * 10.0 ** draw(st.integers(-44, 37))
    matrix = values.astype("f4")
    share = draw(st.sampled_from([0.0, 0.0, 0.02, 0.5]))
    chosen = rng.random((rows, width)) < share
    matrix[chosen] = rng.choice(np.array(special, "f4"), chosen.sum())
    if draw(st.booleans()) and rows > 1:
        matrix[rng.integers(rows, size=rows // 2)] = matrix[0]
    return matrix


@settings(max_examples=FUZZ_CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fuzz(data):
    """FTFAST_FUZZ_CASES=2000 runs the long form."""
    n, d, nq = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    k = data.draw(st.integers(1, n))
    metric = data.draw(st.sampled_from(METRICS))
    with np.errstate(all="ignore"):
        queries, gallery = vectors(data.draw, nq, d), vectors(data.draw, n, d)
        check_all_paths(queries, gallery, k, metric)

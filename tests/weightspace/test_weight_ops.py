"""Fused weight-space operations against float64 formulas, on ragged lists of tensors."""

from __future__ import annotations

import math
import os

import pytest
import torch
from ftfast.kernels import weight_cpu
from ftfast.kernels import weight_reference as reference
from ftfast.kernels.anchor_ops import MODES, AdamWHyper, Anchors, adamw_anchored_, anchor_penalty
from ftfast.kernels.fisher_ops import accumulate_fisher_, per_sample_fisher_

from ftfast.errors import ConfigError, ShapeError

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(3, 5), (), (1,), (0, 4), (70_001,), (17, 33), (2, 3, 4, 5), (256,), (257,)]
BACKENDS = ["auto", "torch", *(["triton"] if INTERPRET else ["cpp"])]


def ragged(seed: int, dtype=torch.float32, positive=False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(t.abs() if positive else t).to(dtype) for t in tensors]


def close(ours, truth, dtype=torch.float32):
    rtol, atol = (2e-6, 1e-6) if dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision_dtype", [None, torch.float32, torch.bfloat16])
def test_penalty_and_its_gradient(backend, precision_dtype):
    params, starts, grads = ragged(0), ragged(1), ragged(2)
    precisions = [None] * len(params) if precision_dtype is None else ragged(3, precision_dtype, positive=True)
    coefficients = [0.5 + index for index in range(len(params))]
    expected, gradients = 0.0, []
    for p, s, f, c, g in zip(params, starts, precisions, coefficients, grads, strict=True):
        value, pull = reference.anchor_penalty(p.double(), s.double(), None if f is None else f.double(), c)
        expected += value.item()
        gradients.append(g.double() + pull)
    anchors = Anchors(starts, precisions, coefficients)
    assert anchor_penalty(params, anchors, backend=backend).item() == pytest.approx(expected, rel=2e-6)
    value = anchor_penalty(params, anchors, grads=grads, backend=backend)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=2e-6)
    for ours, truth in zip(grads, gradients, strict=True):
        close(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision_dtype", [None, torch.float32, torch.bfloat16])
def test_adamw_anchored(backend, mode, precision_dtype):
    params, grads, first, second = ragged(0), ragged(1), ragged(2), ragged(3, positive=True)
    starts: list = ragged(4)
    precisions: list = [None] * len(params) if precision_dtype is None else ragged(5, precision_dtype, positive=True)
    starts[5] = precisions[5] = None  # a head without an anchor in the middle of the list
    coefficients = [2.0] * len(params)
    numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    truths, penalty = [], 0.0
    for index, p in enumerate(params):
        precision = None if precisions[index] is None else precisions[index].double()
        anchor = None if starts[index] is None else (starts[index].double(), precision, coefficients[index])
        doubles = [t[index].double() for t in (params, grads, first, second)]
        *state, value = reference.adamw_anchored(*doubles, anchor, numbers, mode)
        truths.append(state)
        penalty += value.item()
        assert p.shape == state[0].shape
    untouched = [g.clone() for g in grads]
    hyper = AdamWHyper(**numbers, mode=mode)
    value = adamw_anchored_(
        params, grads, first, second, hyper, Anchors(starts, precisions, coefficients), backend=backend
    )
    assert value.item() == pytest.approx(penalty, rel=2e-6)
    for index, truth in enumerate(truths):
        for ours, expected in zip((params, first, second), truth, strict=True):
            close(ours[index], expected)
        assert torch.equal(grads[index], untouched[index])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_accumulate_fisher(backend, normalize):
    fishers, grads = ragged(0, positive=True), ragged(1)
    grads[1].zero_()
    truths = [
        reference.accumulate_fisher(f.double(), g.double(), decay=0.9, weight=0.3, normalize=normalize)
        for f, g in zip(fishers, grads, strict=True)
    ]
    accumulate_fisher_(fishers, grads, decay=0.9, weight=0.3, normalize=normalize, backend=backend)
    for ours, truth in zip(fishers, truths, strict=True):
        close(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "t", "i", "o"), [(3, 7, 5, 9), (1, 1, 1, 1), (2, 77, 64, 33), (5, 1, 40, 20), (4, 50, 129, 31)]
)
def test_per_sample_fisher(backend, n, t, i, o):
    torch.manual_seed(0)
    a, g = torch.randn(n, t, i), torch.randn(n, t, o)
    fisher = torch.rand(o, i)
    truth = reference.per_sample_fisher(fisher.double(), a.double(), g.double(), weight=0.7)
    for inputs, outputs in ((a, g), (a.transpose(0, 1).contiguous().transpose(0, 1), g)):
        ours = fisher.clone()
        per_sample_fisher_(ours, inputs, outputs, weight=0.7, backend=backend)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRET, reason="the C++ loops are tested without the interpreter")
def test_every_instruction_set_and_large_sizes_agree():
    assert weight_cpu.is_available(), "the C++ extension is part of a development install"
    torch.manual_seed(0)
    a, g = torch.randn(70, 40, 150), torch.randn(70, 40, 90)  # more samples than are packed at once
    truth = reference.per_sample_fisher(torch.zeros(90, 150).double(), a.double(), g.double(), weight=1.0)
    narrow = reference.per_sample_fisher(
        torch.zeros(90, 150).double(), a.bfloat16().double(), g.bfloat16().double(), weight=1.0
    )
    for isa in weight_cpu.instruction_sets():
        ours = torch.zeros(90, 150)
        assert weight_cpu.per_sample_fisher(ours, a, g, 1.0, isa)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)
        ours.zero_()
        assert weight_cpu.per_sample_fisher(ours, a.bfloat16(), g.bfloat16(), 1.0, isa)
        torch.testing.assert_close(ours.double(), narrow, rtol=1e-5, atol=1e-4)
        theta, start = torch.randn(200_003), torch.randn(200_003)
        value = weight_cpu.penalty([(theta, None, None, None, start, None)], [2.0], isa)
        assert value == pytest.approx(2 * (theta.double() - start.double()).square().sum().item(), rel=1e-6)
        fisher, grad = torch.rand(200_003), torch.randn(200_003)
        expected = fisher.double() + (grad.double() ** 2) / (grad.double() ** 2).mean()
        weight_cpu.accumulate([(fisher, grad, None, None, None, None)], 1.0, 1.0, True, isa)
        torch.testing.assert_close(fisher.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="instruction set"):
        weight_cpu.penalty([(theta, None, None, None, start, None)], [2.0], "mmx")


def test_other_layouts_and_dtypes_in_one_list():
    torch.manual_seed(0)
    conv = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    holes = torch.randn(6, 8)[:, ::2]
    params = [conv, holes, torch.randn(9, dtype=torch.float64), torch.randn(7).bfloat16(), torch.randn(5).half()]
    starts = [torch.randn_like(conv), torch.randn(6, 4), *(torch.randn_like(p) for p in params[2:])]
    grads = [torch.zeros_like(conv), torch.zeros(6, 4), *(torch.zeros_like(p) for p in params[2:])]
    if not INTERPRET:
        assert weight_cpu.takes((conv, grads[0], None, None, starts[0], None)) == weight_cpu.is_available()
        assert not weight_cpu.takes((holes, grads[1], None, None, starts[1], None))
    truth = [2 * 3.0 * (p.double() - s.double()) for p, s in zip(params, starts, strict=True)]
    total = sum(3.0 * (p.double() - s.double()).square().sum().item() for p, s in zip(params, starts, strict=True))
    value = anchor_penalty(params, Anchors(starts, [None] * 5, [3.0] * 5), grads=grads)
    assert value.item() == pytest.approx(total, rel=1e-3)
    for grad, expected in zip(grads, truth, strict=True):
        close(grad, expected, grad.dtype if grad.dtype.itemsize < 4 else torch.float32)


def odd_list(seed: int) -> list[torch.Tensor]:
    """Positive tensors in one list: channels last, with holes, transposed, and four dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    tensors = [rand(4, 3, 5, 6).to(memory_format=torch.channels_last), rand(6, 8)[:, ::2], rand(7, 5).t()]
    return [*tensors, rand(9).double(), rand(7).bfloat16(), rand(5).half(), rand(0, 3), rand(1)[0]]


@pytest.mark.parametrize("mode", MODES)
def test_step_and_fisher_on_other_layouts_and_dtypes(mode):
    params, grads, first, second, starts, precisions = (odd_list(seed) for seed in range(6))
    numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    truths, penalty = [], 0.0
    for tensors in zip(params, grads, first, second, starts, precisions, strict=True):
        p, g, m, v, start, precision = (t.double() for t in tensors)
        *state, value = reference.adamw_anchored(p, g, m, v, (start, precision, 2.0), numbers, mode)
        truths.append(state)
        penalty += value.item()
    anchors = Anchors(starts, precisions, [2.0] * len(params))
    value = adamw_anchored_(params, grads, first, second, AdamWHyper(**numbers, mode=mode), anchors)
    assert value.item() == pytest.approx(penalty, rel=2e-6)
    fishers, squares = odd_list(6), odd_list(7)
    expected = [
        reference.accumulate_fisher(f.double(), g.double(), decay=0.9, weight=0.3, normalize=f.numel() > 0)
        for f, g in zip(fishers, squares, strict=True)
    ]
    accumulate_fisher_(fishers, squares, decay=0.9, weight=0.3, normalize=True)
    for index, truth in enumerate(truths):
        dtype = params[index].dtype if params[index].dtype.itemsize < 4 else torch.float32
        for ours, wanted in zip((params, first, second), truth, strict=True):
            close(ours[index], wanted, dtype)
        close(fishers[index], expected[index], dtype)


def test_hostile_input():
    one = [torch.ones(3)]
    with pytest.raises(ShapeError, match="must match"):
        anchor_penalty(one, Anchors([torch.ones(4)], [None], [1.0]))
    with pytest.raises(ShapeError, match="one length"):
        Anchors([torch.ones(4)], [], [1.0])
    with pytest.raises(ShapeError, match="gradients"):
        anchor_penalty(one, Anchors(one, [None], [1.0]), grads=[])
    with pytest.raises(ShapeError, match="sideways"):
        adamw_anchored_(one, one, one, one, AdamWHyper(lr=1.0, mode="sideways"))
    with pytest.raises(ConfigError, match="choose one of"):
        anchor_penalty(one, Anchors(one, [None], [1.0]), backend="magic")
    with pytest.raises(ConfigError, match="cannot take"):
        anchor_penalty(
            [torch.ones(3, dtype=torch.float64)], Anchors([torch.ones(3).double()], [None], [1.0]), backend="cpp"
        )
    with pytest.raises(ShapeError, match="per-sample Fisher"):
        per_sample_fisher_(torch.zeros(2, 3), torch.ones(1, 4, 5), torch.ones(1, 4, 2))
    with pytest.raises(ShapeError, match="importance"):
        accumulate_fisher_([torch.ones(2)], [torch.ones(3)])
    assert anchor_penalty([], Anchors([], [], [])).item() == 0.0
    weights = [torch.full((2,), math.nan)]
    assert math.isnan(anchor_penalty(weights, Anchors([torch.zeros(2)], [None], [1.0])).item())

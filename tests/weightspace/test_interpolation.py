"""Interpolation, merging and moving averages of whole CLIP state dicts against formulas in numpy float64."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from ftfast.errors import ConfigError, ModelError
from ftfast.weightspace import ExponentialMovingAverage, interpolate, interpolation_sweep, merge_fisher_weighted

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
ALPHAS = (0.0, 0.1, 0.49, 0.5, 0.9, 1.0, 1.5)


def make_clip(seed: int) -> nn.Module:
    """A CLIP with a ModifiedResNet, whose BatchNorm has floating and integer buffers; the seed changes every entry."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=RESNET, text_cfg=TEXT)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
            else:
                value.fill_(10 * seed)
    return model


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def same(ours: torch.Tensor, truth: np.ndarray) -> None:
    np.testing.assert_allclose(wide(ours), truth, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    return [make_clip(seed).state_dict() for seed in (1, 2, 3)]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_interpolation_covers_both_towers_buffers_and_logit_scale(states, alpha):
    start, end, _ = states
    before = {name: value.clone() for name, value in (*start.items(), *end.items())}
    mixed = interpolate(start, end, alpha)
    assert list(mixed) == list(end)
    seen = set()
    for name, value in mixed.items():
        first, last = wide(start[name]), wide(end[name])
        if value.is_floating_point():
            same(value, first + alpha * (last - first))
            assert not np.array_equal(first, last), f"{name} could not show a mistake"
        else:
            same(value, last if alpha >= 0.5 else first)
        assert value.dtype == end[name].dtype
        assert value.data_ptr() not in (start[name].data_ptr(), end[name].data_ptr())
        seen.update(
            part for part in ("visual.", "transformer.", "logit_scale", "running_var", "num_batches") if part in name
        )
    assert seen == {"visual.", "transformer.", "logit_scale", "running_var", "num_batches"}
    if alpha in (0.0, 1.0):
        assert all(torch.equal(value, (end if alpha else start)[name]) for name, value in mixed.items())
    assert all(torch.equal(before[name], value) for name, value in end.items()), "inputs are left alone"
    model = make_clip(7)
    model.load_state_dict(mixed)


def test_half_precision_is_interpolated_in_single():
    start, end = {"w": torch.tensor([1.0, -3.0]).half()}, {"w": torch.tensor([1.001, 5.0]).bfloat16()}
    mixed = interpolate(start, end, 0.3)["w"]
    expected = torch.lerp(start["w"].double(), end["w"].double(), 0.3).bfloat16()
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, expected)


def test_sweep_yields_one_state_at_a_time(states):
    start, end, _ = states
    sweep = interpolation_sweep(start, end, itertools.count(0.0, 0.25))  # endless: only a lazy sweep returns
    for expected, (alpha, state) in zip((0.0, 0.25, 0.5, 0.75, 1.0), sweep, strict=False):
        assert alpha == expected
        same(state["logit_scale"], (1 - alpha) * wide(start["logit_scale"]) + alpha * wide(end["logit_scale"]))


def test_different_architectures_are_refused(states):
    start, end, _ = states
    with pytest.raises(ModelError, match="'logit_scale'"):
        interpolate(start, {name: value for name, value in end.items() if name != "logit_scale"}, 0.5)
    with pytest.raises(ModelError, match="has shape"):
        interpolate(start, {**end, "logit_scale": torch.zeros(1)}, 0.5)


def make_fishers(states, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in make_clip(1).named_parameters()]
    return [{name: torch.rand(states[0][name].shape, generator=generator) for name in names} for _ in states]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_fisher_merge_is_the_weighted_mean_and_minimises_the_quadratics(states, weights):
    fishers = make_fishers(states)
    name = "text_projection"
    fishers[0][name][0] = fishers[1][name][0] = fishers[2][name][0] = 0.0  # nobody knows anything here
    fishers[1][name][1] = 1e6  # and here one model knows everything
    merged = merge_fisher_weighted(states, fishers, weights)
    scales = [1.0, 1.0, 1.0] if weights is None else weights
    for key, value in merged.items():
        assert value.dtype == states[0][key].dtype
        thetas = [wide(state[key]) for state in states]
        if not value.is_floating_point():
            same(value, thetas[scales.index(max(scales))])
            continue
        if key in fishers[0]:
            shares = [s * np.maximum(wide(f[key]), 1e-8) for s, f in zip(scales, fishers, strict=True)]
            slope = sum(share * (wide(value) - theta) for share, theta in zip(shares, thetas, strict=True))
            assert np.abs(slope).max() <= 2e-6 * max(share.max() for share in shares)
        else:  # BatchNorm statistics have no Fisher
            shares = [np.full_like(thetas[0], s) for s in scales]
        same(value, sum(s * t for s, t in zip(shares, thetas, strict=True)) / sum(shares))
    same(merged[name][0], np.average([wide(s[name][0]) for s in states], axis=0, weights=scales))
    np.testing.assert_allclose(wide(merged[name][1]), wide(states[1][name][1]), atol=1e-5)


def test_merge_refuses_what_makes_no_sense(states):
    fishers = make_fishers(states)
    for models, given, weights in (([], [], None), (states, fishers[:2], None), (states, fishers, [1.0])):
        with pytest.raises(ConfigError, match="merging got"):
            merge_fisher_weighted(models, given, weights)
    with pytest.raises(ConfigError, match="positive"):
        merge_fisher_weighted(states, fishers, [1.0, 0.0, 1.0])
    with pytest.raises(ModelError, match="same architecture"):
        merge_fisher_weighted([states[0], {"w": torch.zeros(2)}], fishers[:2])


@pytest.mark.parametrize("warmup", [False, True])
def test_moving_average_equals_the_sum_over_its_past(warmup):
    """``average_n = sum_k (1 - d_k) (prod_{j > k} d_j) w_k``, written out over the whole history."""
    model = make_clip(1)
    average = ExponentialMovingAverage(model, 0.8, warmup)
    history = [copy.deepcopy(model.state_dict())]
    for seed in range(2, 7):
        model.load_state_dict(make_clip(seed).state_dict())
        average.update(model)
        history.append(copy.deepcopy(model.state_dict()))
    decays = [min(0.8, (1 + n) / (10 + n)) if warmup else 0.8 for n in range(1, 6)]
    parts = [np.prod(decays), *((1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays))]
    assert sum(parts) == pytest.approx(1.0)
    for name, value in average.average.items():
        if value.is_floating_point():
            same(value, sum(part * wide(state[name]) for part, state in zip(parts, history, strict=True)))
        else:
            assert torch.equal(value, history[-1][name])


def test_moving_average_resumes_and_loads_into_a_model():
    first, second = make_clip(1), make_clip(2)
    whole = ExponentialMovingAverage(first, 0.9)
    whole.update(second)
    resumed = ExponentialMovingAverage(make_clip(5), 0.9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for each in (whole, resumed):
        each.update(first)
    assert all(torch.equal(resumed.average[name], value) for name, value in whole.average.items())
    target = make_clip(9)
    resumed.copy_to(target)
    assert all(torch.equal(value, whole.average[name]) for name, value in target.state_dict().items())
    with pytest.raises(ModelError, match="damaged"):
        resumed.load_state_dict({"average": None, "updates": 3})
    with pytest.raises(ModelError, match="same architecture"):
        resumed.load_state_dict({"average": {"w": torch.zeros(1)}, "updates": 3})


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_moving_average_refuses_decays_that_never_move(decay):
    with pytest.raises(ConfigError, match="below 1"):
        ExponentialMovingAverage(nn.Linear(2, 2), decay)

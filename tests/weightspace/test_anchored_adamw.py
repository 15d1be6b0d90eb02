"""AnchoredAdamW against the plain formulation: the penalty written into the loss and differentiated by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ftfast.errors import ConfigError
from ftfast.weightspace import AnchoredAdamW, adaptive_consolidation, ewc, l2_sp


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 3)).double()
    model.attention = nn.MultiheadAttention(6, 2).double()
    return model


def data_loss(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 1, 6, generator=generator, dtype=torch.float64)
    return model[:4](x).square().mean() + model.attention(y, y, y)[0].square().mean()


def split_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    rows = []
    for name, parameter in model.named_parameters():
        parts = parameter.chunk(3) if "in_proj" in name else (parameter,)
        rows += [(name, part) for part in parts]
    return rows


def test_infusing_penalty_in_the_loss_gives_the_same_weights():
    ours, theirs = make_model(), make_model()
    strength = 3.0
    optimizer = AnchoredAdamW(
        ours.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        anchor=l2_sp(ours.named_parameters(), strength, reduction="mean_per_tensor"),
    )
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    start = [part.detach().clone() for _, part in split_tensors(theirs)]
    for step in range(6):
        optimizer.zero_grad()
        data_loss(ours, step).backward()
        optimizer.step()
        penalty = strength * sum(
            (part - old).square().mean() for (_, part), old in zip(split_tensors(theirs), start, strict=True)
        )
        reference.zero_grad()
        (data_loss(theirs, step) + penalty).backward()
        reference.step()
        assert optimizer.anchor_penalty.item() == pytest.approx(penalty.item(), rel=1e-6, abs=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert optimizer.anchor_penalty.item() > 0


def test_unsplit_attention_weights_have_a_third_of_the_penalty():
    model = nn.MultiheadAttention(6, 2)
    named = [("in_proj_weight", model.in_proj_weight)]
    split, fused = (l2_sp(named, 1.0, "mean_per_tensor", split_qkv=flag) for flag in (True, False))
    with torch.no_grad():
        model.in_proj_weight += torch.randn_like(model.in_proj_weight)
    assert split.penalty().item() == pytest.approx(3 * fused.penalty().item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "proximal"])
def test_every_mode_matches_its_formula_with_a_fisher(mode):
    model = make_model()
    torch.manual_seed(1)
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    start = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    lr, strength, decay = 3e-3, 0.7, 0.05
    expected = copy.deepcopy(model)
    adam = torch.optim.AdamW(expected.parameters(), lr=lr, weight_decay=decay)
    optimizer = AnchoredAdamW(
        model.parameters(),
        lr=lr,
        weight_decay=decay,
        anchor=ewc(model.named_parameters(), fisher, strength, start=start, half=True),
        anchor_mode=mode,
    )
    for step in range(4):
        optimizer.zero_grad()
        data_loss(model, step).backward()
        optimizer.step()
        adam.zero_grad()
        data_loss(expected, step).backward()
        before = {name: p.detach().clone() for name, p in expected.named_parameters()}
        pulls = {name: strength * fisher[name] * (before[name] - start[name]) for name in before}
        if mode == "coupled":
            for name, p in expected.named_parameters():
                p.grad += pulls[name]
        adam.step()
        with torch.no_grad():
            for name, p in expected.named_parameters():
                if mode == "decoupled":
                    p -= lr * pulls[name]
                if mode == "proximal":
                    eta = lr * strength * fisher[name]
                    p.copy_((p + eta * start[name]) / (1 + eta))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_proximal_is_stable_for_any_strength_and_coupled_clipping_is_opt_in():
    model = make_model()
    anchor = l2_sp(model.named_parameters(), 1e12)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = AnchoredAdamW(model.parameters(), lr=1.0, anchor=anchor, anchor_mode="proximal")
    for step in range(5):
        optimizer.zero_grad()
        data_loss(model, step).backward()
        optimizer.step()
    for p, old in zip(model.parameters(), start, strict=True):
        assert (p - old).abs().max() < 1e-9
    with pytest.raises(ConfigError, match="proximal"):
        optimizer.add_anchor_gradient_()


def test_clipping_scales_the_anchor_only_when_asked():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    anchor = l2_sp([("w", weight)], 1.0)
    optimizer = AnchoredAdamW([weight], lr=0.1, anchor=anchor)
    with torch.no_grad():
        weight += 1.0
    weight.grad = torch.zeros_like(weight)
    penalty = optimizer.add_anchor_gradient_()
    assert penalty.item() == pytest.approx(4.0)
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 2.0))
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.full_like(weight, 0.05), rtol=1e-5, atol=0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # the anchor acts by itself again
    assert optimizer.state[weight]["exp_avg"].min() > 0.2


def test_groups_frozen_heads_and_missing_gradients():
    model, head = make_model(), nn.Linear(3, 2).double()
    anchor = l2_sp(model.named_parameters(), 0.5)
    groups = [{"params": list(model.parameters()), "lr": 1e-2}, {"params": list(head.parameters()), "lr": 1e-1}]
    optimizer = AnchoredAdamW(groups, anchor=anchor)
    before = [p.detach().clone() for p in head.parameters()]
    model[0].weight.data += 1.0
    model[:4](torch.randn(2, 7, dtype=torch.float64)).sum().backward()
    model[0].weight.grad = None
    old = model[0].weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True))
    assert (model[0].weight < old).all(), "an anchored weight without gradient is pulled back"
    assert "anchor_start" not in optimizer.state[head.weight]
    with pytest.raises(ConfigError, match="not given to the optimizer"):
        AnchoredAdamW(head.parameters(), anchor=anchor)


def test_state_dict_round_trip_continues_exactly():
    model = make_model()
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    optimizer = AnchoredAdamW(
        model.parameters(), lr=1e-2, anchor=ewc(model.named_parameters(), fisher, 2.0), anchor_mode="decoupled"
    )

    def run(net, opt, steps):
        for step in steps:
            opt.zero_grad()
            data_loss(net, step).backward()
            opt.step()

    run(model, optimizer, range(3))
    saved_model, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(3, 6))
    again = make_model(seed=9)
    again.load_state_dict(saved_model)
    wrong = {name: torch.zeros_like(p) for name, p in again.named_parameters()}  # the state must win over these
    resumed = AnchoredAdamW(
        again.parameters(), lr=1e-2, anchor=ewc(again.named_parameters(), wrong, 2.0), anchor_mode="decoupled"
    )
    resumed.load_state_dict(saved)
    run(again, resumed, range(3, 6))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_awc_equals_gifts_two_backward_passes():
    ours, theirs = make_model(), make_model()
    optimizer = AnchoredAdamW(
        ours.parameters(), lr=1e-2, anchor=adaptive_consolidation(ours.named_parameters(), strength=1.0)
    )
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    start = [p.detach().clone() for p in theirs.parameters()]
    for step in range(4):
        optimizer.zero_grad()
        data_loss(ours, 100 + step).backward()
        optimizer.observe_replay_gradient()
        data_loss(ours, step).backward()
        optimizer.step()
        reference.zero_grad()
        data_loss(theirs, 100 + step).backward()
        importance = [p.grad.square() / p.grad.square().mean() for p in theirs.parameters()]
        penalty = sum(
            (f * (p - old) ** 2).sum() for f, p, old in zip(importance, theirs.parameters(), start, strict=True)
        )
        (data_loss(theirs, step) + penalty).backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_awc_without_or_with_zero_replay_gradient():
    model = make_model()
    optimizer = AnchoredAdamW(model.parameters(), anchor=adaptive_consolidation(model.named_parameters()))
    data_loss(model, 0).backward()
    model[0].weight.grad = None
    model[0].bias.grad.zero_()
    optimizer.observe_replay_gradient()
    precision = {name: optimizer.state[p]["anchor_precision"] for name, p in model.named_parameters()}
    assert set(precision["0.weight"].unique().tolist()) == {1e-6}
    assert not precision["0.bias"].any()
    for name, parameter in list(model.named_parameters())[2:]:
        square = parameter.grad.square()
        torch.testing.assert_close(precision[name], square / square.mean())
    plain = AnchoredAdamW(model.parameters(), anchor=l2_sp(model.named_parameters(), 1.0))
    with pytest.raises(ConfigError, match="adaptive_consolidation"):
        plain.observe_replay_gradient()


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1e-8}, {"betas": (1.0, 0.9)}, {"anchor_mode": "sideways"}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ConfigError):
        AnchoredAdamW([nn.Parameter(torch.ones(2))], **bad)


def test_ewc_refuses_a_fisher_that_misses_parameters():
    model = make_model()
    with pytest.raises(ConfigError, match="no entry"):
        ewc(model.named_parameters(), {}, 1.0)
    with pytest.raises(ConfigError, match="strength"):
        l2_sp(model.named_parameters(), -1.0)

"""The dense references against other people's code and hand-written float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ftfast.kernels import (
    DistillOptions,
    classification_loss,
    clip_and_distillation_loss,
    clip_loss,
    feature_distillation_loss,
    siglip_loss,
    similarity_distillation_loss,
    supervised_contrastive_loss,
)
from kernel_checks import unit
from torch import Tensor

N, D = 9, 13
SCALE = torch.tensor(12.0, dtype=torch.float64)
BACKENDS = ["reference", "torch"]


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return unit(N, D, 1, torch.float64), unit(N, D, 2, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_and_siglip_equal_open_clip(pair: tuple[Tensor, Tensor], backend: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    bias = torch.tensor(-3.0, dtype=torch.float64)
    torch.testing.assert_close(clip_loss(*pair, SCALE, backend=backend), ClipLoss()(*pair, SCALE))
    torch.testing.assert_close(siglip_loss(*pair, SCALE, bias, backend=backend), SigLipLoss()(*pair, SCALE, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_loss_equals_open_clip(pair: tuple[Tensor, Tensor], backend: str) -> None:
    from open_clip.loss import DistillClipLoss

    teacher = (unit(N, 5, 3, torch.float64), unit(N, 5, 4, torch.float64))
    expected = DistillClipLoss()(*pair, SCALE, *teacher, 7.0)
    got = clip_and_distillation_loss(*pair, *teacher, SCALE, 7.0, backend=backend)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_multi_positive_targets_equal_soft_cross_entropy(pair: tuple[Tensor, Tensor], backend: str) -> None:
    ids = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5])
    targets = (ids[:, None] == ids[None, :]).double()
    targets = targets / targets.sum(1, keepdim=True)
    logits = SCALE * pair[0] @ pair[1].T
    expected = sum(F.cross_entropy(s, targets, label_smoothing=0.2) for s in (logits, logits.T)) / 2
    torch.testing.assert_close(clip_loss(*pair, SCALE, labels=ids, label_smoothing=0.2, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_supervised_contrastive_by_loops(pair: tuple[Tensor, Tensor], backend: str) -> None:
    labels = [0, 1, 0, 2, 1, 1, 0, 3, 2]
    x, y = pair
    total, rows = 0.0, 0
    for i in range(N):
        others = [j for j in range(N) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            log_sum = math.log(sum(math.exp(SCALE * x[i] @ x[j]) for j in others))
            total += sum(log_sum - float(SCALE * x[i] @ x[j]) for j in positives) / len(positives)
            rows += 1
    got = supervised_contrastive_loss(x, torch.tensor(labels), SCALE, backend=backend)
    assert got.item() == pytest.approx(total / rows, rel=1e-12)
    for variant in ("cite", "cite_literal"):
        sides = []
        for a, b in ((x, y), (y, x)):
            value = 0.0
            for i in range(N):
                own = float(SCALE * a[i] @ b[i])
                rivals = sum(math.exp(SCALE * a[i] @ b[j]) for j in range(N) if labels[j] != labels[i])
                value += math.log(rivals + (math.exp(own) if variant == "cite" else 0.0)) - own
            sides.append(value / N)
        got = supervised_contrastive_loss(x, torch.tensor(labels), SCALE, y, variant=variant, backend=backend)
        assert got.item() == pytest.approx(sum(sides) / 2, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classification_and_margins(pair: tuple[Tensor, Tensor], backend: str) -> None:
    x, w = pair[0], pair[1][:5]
    labels = torch.tensor([0, 4, 2, 1, 1, 0, 3, 2, 4])
    cosines = x @ w.T
    rows = torch.arange(N)
    plain = classification_loss(x, w, labels, SCALE, label_smoothing=0.2, backend=backend)
    torch.testing.assert_close(plain, F.cross_entropy(SCALE * cosines, labels, label_smoothing=0.2))
    for margin_type, moved in (
        ("cosface", cosines[rows, labels] - 0.35),
        ("arcface", torch.cos(torch.acos(cosines[rows, labels]) + 0.35)),
    ):
        changed = cosines.clone()
        changed[rows, labels] = moved
        got = classification_loss(x, w, labels, SCALE, margin=0.35, margin_type=margin_type, backend=backend)
        torch.testing.assert_close(got, F.cross_entropy(SCALE * changed, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "soft_cross_entropy"])
def test_distillation_by_formula(pair: tuple[Tensor, Tensor], backend: str, kind: str) -> None:
    teacher = (unit(N, 5, 3, torch.float64), unit(N, 5, 4, torch.float64))
    options = DistillOptions(kind=kind, temperature=2.0)
    sides = []
    student, taught = SCALE * pair[0] @ pair[1].T / 2, 9 * teacher[0] @ teacher[1].T / 2
    for s, t in ((student, taught), (student.T, taught.T)):
        q, p = s.softmax(1), t.softmax(1)
        value = {"forward_kl": p * (p / q).log(), "reverse_kl": q * (q / p).log(), "soft_cross_entropy": -p * q.log()}[
            kind
        ]
        sides.append(value.sum(1).mean())
    got = similarity_distillation_loss(
        *pair, *teacher, SCALE, teacher_logit_scale=9.0, options=options, backend=backend
    )
    torch.testing.assert_close(got, 4 * sum(sides) / 2)
    as_logits = similarity_distillation_loss(
        *pair, None, None, SCALE, teacher_logits=2 * taught, options=options, backend=backend
    )
    torch.testing.assert_close(as_logits, got)


def test_feature_distillation_of_unit_rows_is_a_cosine_distance(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    expected = ((2 - 2 * (student * teacher).sum(1)) / D).mean()
    torch.testing.assert_close(feature_distillation_loss(student, teacher), expected)
    sums = feature_distillation_loss(student, teacher, reduction="mean_of_sums")
    torch.testing.assert_close(sums, expected * D)
    torch.testing.assert_close(feature_distillation_loss(student, teacher, reduction="sum"), expected * D * N)


@pytest.mark.parametrize("name", ["clip", "siglip", "supcon", "distill"])
def test_gradients_by_finite_differences(name: str) -> None:
    x, y = unit(5, 4, 1, torch.float64).requires_grad_(), unit(5, 4, 2, torch.float64).requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    ids, teacher = torch.tensor([0, 1, 0, 2, 1]), 3 * unit(5, 5, 3, torch.float64)
    functions = {
        "clip": lambda a, b, s, c: clip_loss(a, b, s, c, label_smoothing=0.1, backend="torch"),
        "siglip": lambda a, b, s, c: siglip_loss(a, b, s, c, labels=ids, backend="torch"),
        "supcon": lambda a, b, s, c: supervised_contrastive_loss(a, ids, s, b, backend="torch") + 0 * c,
        "distill": lambda a, b, s, c: (
            similarity_distillation_loss(
                a, b, None, None, s, teacher_logits=teacher, options=DistillOptions(kind="reverse_kl"), backend="torch"
            )
            + 0 * c
        ),
    }
    assert torch.autograd.gradcheck(functions[name], (x, y, scale, bias))

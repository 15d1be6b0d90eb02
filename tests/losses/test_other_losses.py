"""NormFaceLoss, SupConLoss, SimilarityDistillLoss and FeatureDistillLoss against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_learning

from ftfast.errors import ConfigError, ShapeError
from ftfast.losses import FeatureDistillLoss, NormFaceLoss, SimilarityDistillLoss, SupConLoss


def unit_rows(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def normface_truth(features, weight, labels, scale, smoothing, margin, margin_type):
    """Written over single entries, so that nothing is shared with the vectorised code."""
    features, weight = features.double(), weight.double()
    total = 0.0
    for row, label in zip(features, labels.tolist(), strict=True):
        cosines = [float(row @ w / row.norm() / w.norm()) for w in weight]
        if margin_type == "cosface":
            cosines[label] -= margin
        if margin_type == "arcface":
            angle = math.acos(cosines[label]) + margin
            cosines[label] = math.cos(angle) if angle <= math.pi else cosines[label] - margin * math.sin(margin)
        logits = [scale * cosine for cosine in cosines]
        lse = math.log(sum(math.exp(logit - max(logits)) for logit in logits)) + max(logits)
        hard, uniform = lse - logits[label], lse - sum(logits) / len(logits)
        total += (1 - smoothing) * hard + smoothing * uniform
    return total / len(features)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("margin", "margin_type"), [(0.0, "none"), (0.5, "arcface"), (0.35, "cosface")])
def test_normface_value(margin, margin_type, smoothing):
    torch.manual_seed(0)
    loss = NormFaceLoss(7, 11, scale=16, label_smoothing=smoothing, margin=margin, margin_type=margin_type)
    features, labels = 3 * torch.randn(23, 7), torch.randint(0, 11, (23,))
    expected = normface_truth(features, loss.weight.detach(), labels, 16, smoothing, margin, margin_type)
    assert loss(features, labels).item() == pytest.approx(expected, rel=1e-5)


def test_normface_gradients_reach_features_weights_and_learned_scale():
    torch.manual_seed(0)
    loss = NormFaceLoss(6, 5, learn_scale=True)
    features, labels = torch.randn(8, 6, requires_grad=True), torch.randint(0, 5, (8,))
    loss(features, labels).mul(0.37).backward()
    ours = [features.grad, loss.weight.grad, loss.logit_scale.grad]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (features, loss.weight, loss.logit_scale)]
    logits = leaves[2] * F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T
    F.cross_entropy(logits, labels).mul(0.37).backward()
    for our, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(our.double(), leaf.grad, rtol=1e-4, atol=1e-6)
    assert dict(loss.named_parameters()).keys() == {"weight", "logit_scale"}
    assert dict(NormFaceLoss(6, 5).named_parameters()).keys() == {"weight"}
    assert "logit_scale" in NormFaceLoss(6, 5).state_dict()


def test_normface_initialisation_is_lecun_uniform():
    torch.manual_seed(0)
    weight = NormFaceLoss(64, 2000).weight
    assert weight.abs().max() <= math.sqrt(3 / 64)
    assert weight.var().item() == pytest.approx(1 / 64, rel=0.02)


def test_normface_in_half_precision_and_refusals():
    loss = NormFaceLoss(6, 5)
    features = torch.randn(8, 6).bfloat16().requires_grad_()
    loss(features, torch.zeros(8, dtype=torch.long)).backward()
    assert features.grad.dtype == torch.bfloat16
    assert loss.weight.grad.dtype == torch.float32
    for wrong in ({"margin": 0.5}, {"margin_type": "sphere"}, {"label_smoothing": 1.0}):
        with pytest.raises(ConfigError):
            NormFaceLoss(6, 5, **wrong)(torch.randn(2, 6), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError):
        NormFaceLoss(6, 0)
    with pytest.raises(ShapeError):
        loss(torch.randn(2, 7), torch.zeros(2, dtype=torch.long))


def test_supcon_equals_pytorch_metric_learning():
    features, labels = unit_rows(40, 9, 0), torch.arange(40) % 7
    ours = SupConLoss(temperature=0.1)(features, labels)
    theirs = metric_learning.SupConLoss(temperature=0.1)(features.double(), labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


def test_supcon_across_modalities_and_options():
    image, text, labels = unit_rows(12, 5, 1), unit_rows(12, 5, 2), torch.arange(12) % 4
    log_p = F.log_softmax(image.double() @ text.double().T / 0.07, dim=1)
    same = labels[:, None] == labels[None, :]
    rows = -((log_p * same).sum(1) / same.sum(1)).mean()
    ours = SupConLoss(directions="image")(image, labels, text)
    torch.testing.assert_close(ours.double(), rows, rtol=1e-5, atol=0)
    scaled = SupConLoss(temperature=123.0, directions="image")(image, labels, text, logit_scale=torch.tensor(1 / 0.07))
    torch.testing.assert_close(scaled, ours)
    logits = image.double() @ text.double().T / 0.07
    own = logits.diagonal()
    cite = torch.log(own.exp() + (logits.exp() * ~same).sum(1)) - own
    ours = SupConLoss(variant="cite", directions="image")(image, labels, text)
    torch.testing.assert_close(ours.double(), cite.mean(), rtol=1e-5, atol=0)


def test_supcon_without_positives_is_zero_and_finite():
    features = unit_rows(6, 4, 0).requires_grad_()
    loss = SupConLoss()(features, torch.arange(6))
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "soft_cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("squared", [True, False])
def test_similarity_distillation(kind, temperature, squared):
    student = [unit_rows(13, 6, 1).requires_grad_(), unit_rows(13, 6, 2).requires_grad_()]
    teacher = [unit_rows(13, 8, 3), unit_rows(13, 8, 4)]
    scale = torch.tensor(12.0, requires_grad=True)
    loss = SimilarityDistillLoss(kind, temperature, squared)
    loss(*student, *teacher, scale, torch.tensor(9.0)).mul(0.37).backward()
    ours = [*(feature.grad for feature in student), scale.grad]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (*student, scale)]
    s = leaves[2] * leaves[0] @ leaves[1].T / temperature
    t = 9 * teacher[0].double() @ teacher[1].double().T / temperature
    total = 0
    for a, b in ((t, s), (t.T, s.T)):
        p, q = a.softmax(1), b.softmax(1)
        terms = {
            "forward_kl": p * (p.log() - q.log()),
            "reverse_kl": q * (q.log() - p.log()),
            "soft_cross_entropy": -p * q.log(),
        }[kind]
        total = total + terms.sum(1).mean() / 2
    total = total * (temperature**2 if squared else 1)
    total.mul(0.37).backward()
    value = loss(*student, *teacher, scale, torch.tensor(9.0))
    torch.testing.assert_close(value.double(), total, rtol=2e-5, atol=1e-7)
    for our, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(our.double(), leaf.grad, rtol=2e-4, atol=1e-6)


def test_feature_distillation_reductions():
    student, teacher = unit_rows(5, 8, 1).requires_grad_(), unit_rows(5, 8, 2)
    cosines = (student.detach() * teacher).sum(1).double()
    loss = FeatureDistillLoss()(student, teacher)
    torch.testing.assert_close(loss.double(), ((2 - 2 * cosines) / 8).mean(), rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(student.grad, (2 * (student - teacher) / 40).detach())
    assert FeatureDistillLoss("sum")(student, teacher).item() == pytest.approx(40 * loss.item(), rel=1e-5)
    assert FeatureDistillLoss("mean_of_sums")(student, teacher).item() == pytest.approx(8 * loss.item(), rel=1e-5)
    with pytest.raises(ConfigError):
        FeatureDistillLoss("median")(student, teacher)
    with pytest.raises(ShapeError):
        FeatureDistillLoss()(student, unit_rows(4, 8, 2))

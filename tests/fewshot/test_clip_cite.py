"""CLIP-CITE: every term against its equation in float64, in every reading; ablation rows; interpolation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.data import Batch, open_dataset
from ftfast.models import load_model
from ftfast.recipes import Context, Features, Plan, get_recipe

LABELS = torch.tensor([0, 3, 3, 9, 7, 0, 3])
SCALE = 21.0
SCALE0 = 17.0


def rows(count: int, seed: int, *, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 32, generator=generator), dim=-1).requires_grad_(grad)


def build(folder: Path, table: Path, **options: object) -> tuple[Plan, Context]:
    dataset = open_dataset(DataConfig(path=str(table)))
    loaded = load_model(ModelConfig(name=str(folder)))
    with torch.no_grad():
        loaded.model.logit_scale.fill_(torch.tensor(SCALE0).log())
    recipe = get_recipe("clip_cite")
    context = Context(loaded, {"data": dataset}, recipe.options(**options))
    return recipe.build(context), context


def features(texts: int = 7) -> Features:
    batch = Batch(torch.zeros(7, 3, 1, 1), torch.arange(7), LABELS, None)
    image, text = rows(7, 0, grad=True), rows(texts, 1, grad=True)
    return Features(batch, image, text, torch.tensor(SCALE, requires_grad=True), rows(7, 2), rows(texts, 3))


def term(plan: Plan, name: str):
    return next(item for item in plan.terms if item.name == name)


@pytest.mark.parametrize(("temperature", "scale"), [("clip", SCALE), ("none", 1.0)])
@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1.0), ("sum", 7.0)])
def test_alignment_is_cross_entropy_against_class_vectors(
    tiny_folder: Path, class_table: Path, temperature: str, scale: float, reduction: str, factor: float
) -> None:
    plan, context = build(tiny_folder, class_table, temperature=temperature, reduction=reduction)
    f = features()
    (weight,) = plan.heads.parameters()
    with torch.no_grad():
        weight.add_(0.1 * rows(10, 9))
    expected = factor * F.cross_entropy(scale * f.image.double() @ F.normalize(weight.double(), dim=-1).T, LABELS)
    value = term(plan, "dva").loss(f)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert f.image.grad.abs().max() > 0
    assert weight.grad.abs().max() > 0
    assert f.text.grad is None  # the text tower is frozen for this term
    assert len(weight) == len(context.datasets["data"].class_names)


def contrast(similarity: Tensor, with_positive: bool) -> Tensor:
    """-log ratio of eq. 4 for each row, over columns of other classes (and the own pair)."""
    total = []
    for i in range(7):
        others = similarity[i, LABELS[i] != LABELS].exp().sum()
        own = similarity[i, i]
        total.append(-own + torch.log(others + own.exp() if with_positive else others))
    return torch.stack(total)


@pytest.mark.parametrize("denominator", ["with_positive", "others_only"])
@pytest.mark.parametrize(("sign", "factor"), [("negative", 1.0), ("printed", -1.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_contrast_is_equation_four_in_every_reading(
    tiny_folder: Path, class_table: Path, denominator: str, sign: str, factor: float, reduction: str
) -> None:
    plan, _ = build(tiny_folder, class_table, scl_denominator=denominator, scl_sign=sign, reduction=reduction)
    f = features()
    similarity = SCALE * f.image.double() @ f.text.double().T
    each = contrast(similarity, denominator == "with_positive") + contrast(similarity.T, denominator == "with_positive")
    expected = factor * (each.sum() if reduction == "sum" else each.mean())
    value = term(plan, "scl").loss(f)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradient = torch.autograd.grad(expected, (f.image, f.text), retain_graph=True)
    for own, truth in zip(torch.autograd.grad(3 * value, (f.image, f.text)), expected_gradient, strict=True):
        assert torch.allclose(own, 3 * truth.float(), rtol=1e-3, atol=1e-4)
    assert term(plan, "scl").weight == 0.7


def test_contrast_without_repeated_classes_is_the_clip_loss(tiny_folder: Path, class_table: Path) -> None:
    plan, _ = build(tiny_folder, class_table)
    f = features()
    f.batch = dataclasses.replace(f.batch, labels=torch.arange(7))
    logits = SCALE * f.image.double() @ f.text.double().T
    target = torch.arange(7)
    expected = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    assert term(plan, "scl").loss(f).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("first", ["student", "teacher"])
@pytest.mark.parametrize(("axis", "texts"), [("batch", 7), ("classes", 10)])
def test_distillation_is_equation_five_in_every_reading(
    tiny_folder: Path, class_table: Path, first: str, axis: str, texts: int
) -> None:
    plan, _ = build(tiny_folder, class_table, vld_first=first, vld_axis=axis)
    f = features(texts)
    p = (SCALE * f.image.double() @ f.text.double().T).log_softmax(-1)
    p0 = (SCALE0 * f.teacher_image.double() @ f.teacher_text.double().T).log_softmax(-1)
    left, right = (p, p0) if first == "student" else (p0, p)
    expected = (left.exp() * (left - right)).sum(-1).mean()
    value = term(plan, "vld").loss(f)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    value.backward()
    assert min(f.image.grad.abs().max(), f.text.grad.abs().max()) > 0
    assert term(plan, "vld").weight == 0.1


def test_own_texts_are_looked_up_by_class_on_the_class_axis(tiny_folder: Path, class_table: Path) -> None:
    plan, _ = build(tiny_folder, class_table, vld_axis="classes")
    other, _ = build(tiny_folder, class_table)
    f, g = features(10), features()
    g.text = f.text[LABELS]
    assert term(plan, "scl").loss(f).item() == pytest.approx(term(other, "scl").loss(g).item(), rel=1e-6)
    source, single = plan.batches[0].texts, other.batches[0].texts
    assert len(source(f.batch, 0)) == 10
    assert list(single(f.batch, 0)) == [source(f.batch, 0)[label] for label in LABELS]


@pytest.mark.parametrize("rows_", [("DVA",), ("SCL",), ("DVA", "SCL"), ("DVA", "VLD"), ("DVA", "SCL", "VLD")])
def test_ablation_rows_keep_their_terms(tiny_folder: Path, class_table: Path, rows_: tuple[str, ...]) -> None:
    plan, _ = build(tiny_folder, class_table, terms=rows_)
    assert tuple(item.name.upper() for item in plan.terms) == rows_


def test_frozen_rows_stop_the_gradient_they_name(tiny_folder: Path, class_table: Path) -> None:
    for kind, vectors_move, texts_move in (("ALL", 1, 1), ("FrozenTC", 0, 1), ("FrozenTE", 1, 0)):
        plan, _ = build(tiny_folder, class_table, train=kind)
        f = features()
        (term(plan, "dva").loss(f) + term(plan, "scl").loss(f)).backward()
        (weight,) = plan.heads.parameters()
        assert (weight.grad is not None) == bool(vectors_move)
        assert (f.text.grad is not None and bool(f.text.grad.any())) == bool(texts_move)


def test_both_towers_are_interpolated_and_the_class_vectors_may_classify(tiny_folder: Path, class_table: Path) -> None:
    plan, context = build(tiny_folder, class_table, classifier="weights", alpha=0.25)
    start = {name: value.clone() for name, value in context.loaded.model.state_dict().items()}
    tuned = {name: value + 1 if value.is_floating_point() else value for name, value in start.items()}
    merged = plan.finalize(start, tuned)
    for name in ("visual.attnpool.c_proj.weight", "transformer.resblocks.0.mlp.c_fc.weight", "logit_scale"):
        assert torch.allclose(merged[name], start[name] + 0.25)
    (weight,) = plan.heads.parameters()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(rows(10, 4))
    names = context.datasets["data"].class_names
    images = rows(5, 8)
    expected = images @ F.normalize(before + 0.25 * rows(10, 4), dim=-1)[[7, 2]].T
    assert torch.allclose(plan.classify(images, (names[7], names[2])), expected, atol=1e-6)
    assert plan.classify(images, ("unheard of",)) is None
    assert build(tiny_folder, class_table)[0].classify is None


def test_defaults_are_the_paper_s(tiny_folder: Path) -> None:
    recipe = get_recipe("clip-cite")
    options = recipe.options()
    assert (options.scl_weight, options.vld_weight, options.alpha) == (0.7, 0.1, 0.5)
    assert (recipe.preset["optim"]["lr"], recipe.preset["train"]) == (5e-6, {"batch_size": 32, "epochs": 20})

"""Every recipe: its terms against hand-written formulas, its presets, its declarations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.config.resolve import resolve
from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.data import Batch, open_dataset
from ftfast.errors import ConfigError
from ftfast.models import apply_locks, load_model
from ftfast.recipes import Context, Features, Plan, Recipe, available, get_recipe


def unit_rows(rows: int, width: int, seed: int, grad: bool = False) -> Tensor:
    """Random unit rows in float32."""
    x = F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return x.requires_grad_(grad)


def make_plan(recipe: Recipe, tiny_folder: Path, table: Path, **options: object) -> tuple[Plan, Context]:
    """Build a recipe's plan on the small table."""
    dataset = open_dataset(DataConfig(path=str(table)))
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    apply_locks(loaded.model, ModelConfig(**recipe.preset.get("model", {})))
    context = Context(loaded, {"data": dataset, "generic": dataset}, recipe.options(**options), seed=3)
    return recipe.build(context), context


def batch(size: int, labels: Tensor | None = None) -> Batch:
    """A batch without pixels."""
    return Batch(torch.zeros(size, 3, 1, 1), torch.arange(size), labels, tuple(f"text {i}" for i in range(size)))


@pytest.mark.parametrize("name", list(available()))
def test_presets_resolve_and_plans_build(name: str, tiny_folder: Path, class_table: Path) -> None:
    recipe = get_recipe(name)
    resolved = resolve(recipe.options, recipe.preset, [], ["--recipe", name, "--data", str(class_table)])
    assert resolved.config.recipe == name
    plan, _ = make_plan(recipe, tiny_folder, class_table)
    assert {term.on for term in plan.terms} <= {spec.name for spec in plan.batches}
    assert all(term.source for term in plan.terms)
    assert recipe.papers
    assert len(Path(__import__(recipe.build.__module__, fromlist=["x"]).__file__).read_text().splitlines()) <= 120


def test_unknown_recipe_is_one_sentence() -> None:
    with pytest.raises(ConfigError) as error:
        get_recipe("infuse")
    assert str(error.value).startswith("recipe 'infuse' does not exist. Did you mean 'infusing'? Available: infusing, ")
    assert get_recipe("wise_ft") is get_recipe("wise-ft")


def test_infusing_terms_equal_the_equations(tiny_folder: Path, class_table: Path) -> None:
    plan, _context = make_plan(get_recipe("infusing"), tiny_folder, class_table)
    classification, embedding = plan.terms
    labels = torch.tensor([0, 3, 9, 3, 7])
    image = unit_rows(5, 32, 0, grad=True)
    value = classification.loss(Features(batch(5, labels), image, None, torch.tensor(1.0)))
    (weight,) = plan.heads.parameters()
    logits = 16.0 * image.double() @ F.normalize(weight.double(), dim=-1).T
    expected = F.cross_entropy(logits, labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0

    student, teacher = unit_rows(7, 32, 1, grad=True), unit_rows(7, 32, 2)
    value = embedding.weight * embedding.loss(Features(batch(7), student, None, torch.tensor(1.0), teacher))
    cosine = (student.double() * teacher.double()).sum(-1)
    assert value.item() == pytest.approx((1000.0 / 32 * (2 - 2 * cosine)).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.allclose(gradient, 1000.0 * 2 * (student - teacher).detach() / (7 * 32), rtol=1e-4, atol=1e-6)
    assert [spec.teacher for spec in plan.batches] == ["", "cached_image"]
    assert all(spec.texts is None for spec in plan.batches)  # no text data is needed


def test_infusing_anchor_is_mean_per_tensor_with_split_qkv(tiny_folder: Path, class_table: Path) -> None:
    plan, context = make_plan(get_recipe("infusing"), tiny_folder, class_table)
    expected = 0.0
    with torch.no_grad():
        for number, (name, parameter) in enumerate(context.loaded.model.named_parameters()):
            if not name.startswith("visual."):
                continue
            change = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(change)
            parts = change.chunk(3) if name.endswith(("in_proj_weight", "in_proj_bias")) else (change,)
            expected += sum((part.double() ** 2).mean().item() for part in parts)
    assert plan.anchor is not None
    assert plan.anchor.penalty().item() == pytest.approx(1e5 * expected, rel=1e-3)
    joint, _ = make_plan(get_recipe("infusing"), tiny_folder, class_table, batch_form="joint")
    alone, _other = make_plan(get_recipe("infusing"), tiny_folder, class_table)
    for plans, factor in ((joint, 2.0), (alone, 1.0)):
        entries = plans.anchor.entries.values()
        assert sum(entry.coefficient for entry in entries) == pytest.approx(
            factor * sum(entry.coefficient for entry in plan.anchor.entries.values())
        )
    assert joint.schedule == "joint"
    assert [len(joint.active(0)), len(alone.active(0)), alone.active(1)[0].name] == [2, 1, "generic"]


def test_lwf_equals_soft_cross_entropy_with_temperature_squared(tiny_folder: Path, class_table: Path) -> None:
    plan, _ = make_plan(get_recipe("lwf"), tiny_folder, class_table)
    image, text = unit_rows(6, 32, 0, grad=True), unit_rows(10, 32, 1)
    teacher_image, teacher_text = unit_rows(6, 32, 2), unit_rows(10, 32, 3)
    features = Features(batch(6), image, text, torch.tensor(20.0), teacher_image, teacher_text)
    value = plan.terms[1].loss(features)
    student = 20.0 * image.double() @ text.double().T / 2
    teacher = (20.0 * teacher_image.double() @ teacher_text.double().T / 2).softmax(-1)
    expected = 4 * -(teacher * student.log_softmax(-1)).sum(-1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_wise_ft_interpolates_everything(tiny_folder: Path, class_table: Path) -> None:
    plan, context = make_plan(get_recipe("wise-ft"), tiny_folder, class_table, alpha=0.25)
    start = {name: tensor.clone() for name, tensor in context.loaded.model.state_dict().items()}
    tuned = {name: t + 1 if t.is_floating_point() else t for name, t in start.items()}
    assert plan.finalize is not None
    merged = plan.finalize(start, tuned)
    assert merged.keys() == start.keys()
    assert torch.allclose(merged["logit_scale"], start["logit_scale"] + 0.25)
    running = next(name for name in start if name.endswith("running_mean"))
    assert torch.allclose(merged[running], start[running] + 0.25)


def test_l2sp_is_half_alpha_times_the_squared_distance(tiny_folder: Path, class_table: Path) -> None:
    plan, context = make_plan(get_recipe("l2sp"), tiny_folder, class_table)
    with torch.no_grad():
        for parameter in context.loaded.model.parameters():
            parameter.add_(1e-2)
    count = sum(p.numel() for p in context.loaded.model.parameters())
    assert plan.anchor is not None
    assert plan.anchor.penalty().item() == pytest.approx(0.5 * 0.01 * 1e-4 * count, rel=2e-3)
    (weight,) = plan.heads.parameters()
    decay = plan.terms[1].loss(Features(batch(2), unit_rows(2, 32, 0), None, torch.tensor(1.0)))
    assert decay.item() == pytest.approx(0.5 * (weight.double() ** 2).sum().item(), rel=1e-5)


def test_lp_ft_probe_separates_what_is_separable(tiny_folder: Path, class_table: Path) -> None:
    plan, context = make_plan(get_recipe("lp-ft"), tiny_folder, class_table)
    dataset = context.datasets["data"]
    labels = torch.as_tensor(dataset.labels)
    centres = unit_rows(10, 32, 5)
    features = F.normalize(centres[labels] + 0.05 * unit_rows(len(labels), 32, 6), dim=-1)
    assert plan.prepare is not None
    plan.prepare(lambda data: features)
    (weight,) = plan.heads.parameters()
    assert ((features @ F.normalize(weight, dim=-1).T).argmax(-1) == labels).all()


def test_flyp_prompts_follow_seed_and_step(tiny_folder: Path, class_table: Path) -> None:
    plan, _context = make_plan(get_recipe("flyp"), tiny_folder, class_table)
    source = plan.batches[0].texts
    assert source is not None
    labels = torch.tensor([2, 2, 5])
    assert list(source(batch(3, labels), 0)) == ["a photo of a kind 2.", "a photo of a kind 2.", "a photo of a kind 5."]


@pytest.mark.parametrize("name", ["infusing", "lwf", "lp-ft"])
def test_recipes_that_need_labels_say_so(name: str) -> None:
    assert get_recipe(name).needs_labels

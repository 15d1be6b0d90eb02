"""iCaRL-style replay: herding against the formula, the memory's budget and its travel, terms against float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from test_continual_driver import assert_same_weights, go, world  # noqa: F401

from ftfast.config.resolve import resolve
from ftfast.config.schema import ModelConfig, TrainConfig
from ftfast.continual.driver import ContinualConfig, run_continual
from ftfast.data import Batch, ImageDataset
from ftfast.engine.assembly import assemble
from ftfast.models import load_model
from ftfast.recipes import Context, History, get_recipe
from ftfast.recipes.base import Features
from ftfast.recipes.exemplars import Exemplars, choose_exemplars, herd


def unit(rows: int, columns: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(count: int, seed: int, shape: tuple[int, int] = (24, 24)) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), dtype=np.uint8))


def made_of(
    labels: list[int], names: tuple[str, ...], seed: int = 0, shape: tuple[int, int] = (24, 24)
) -> ImageDataset:
    return ImageDataset.from_arrays(
        images(len(labels), seed, shape), labels=np.array(labels), class_names=names, templates=("a {}.",)
    )


def herd_by_definition(features: np.ndarray, count: int) -> list[int]:
    """iCaRL, algorithm 4, candidate by candidate."""
    mean, chosen = features.mean(0), []
    for k in range(1, min(count, len(features)) + 1):
        distances = {
            row: np.linalg.norm(mean - (features[row] + sum(features[p] for p in chosen)) / k)
            for row in range(len(features))
            if row not in chosen
        }
        chosen.append(min(distances, key=lambda row: distances[row]))
    return chosen


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 5), (7, 3), (7, 7), (23, 11), (40, 100)])
def test_herding_is_the_papers(rows: int, count: int) -> None:
    features = unit(rows, 9, seed=rows)
    found = herd(features, count)
    assert found == herd_by_definition(features.double().numpy(), count)
    assert len(set(found)) == len(found) == min(rows, count)
    assert herd(features, 2) == found[:2]  # a longer list starts with the shorter one


def test_herding_takes_equal_images_in_order() -> None:
    assert herd(unit(1, 5, 0).repeat(4, 1), 3) == [0, 1, 2]


def test_exemplars_travel_as_tensors() -> None:
    pixels = [*images(2, 0, (5, 7)), *images(1, 1, (9, 3))]
    kept = Exemplars(pixels, np.array([0, 2, 2]), ("a café.", "a b.", "a 猫."))
    again = Exemplars.from_tensors(kept.tensors())
    assert all(np.array_equal(a, b) for a, b in zip(again.pixels, pixels, strict=True))
    assert again.labels.tolist() == [0, 2, 2]
    assert again.prompts == kept.prompts
    assert Exemplars.from_tensors({}).prompts == ()
    none = Exemplars.from_tensors(Exemplars((), np.zeros(0, np.int64), ("a b.",)).tensors())
    assert (len(none.pixels), none.prompts) == (0, ("a b.",))
    data = kept.as_dataset()
    assert data.class_names == kept.prompts
    assert np.array_equal(np.asarray(data.load_image(2)), pixels[2])


def test_the_memory_is_divided_among_all_classes(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    first = made_of([0, 1, 0, 1, 0, 1, 0, 0], ("cat", "dog"))
    one = choose_exemplars(loaded, first, Exemplars(), 6, batch_size=3)
    assert one.prompts == ("a cat.", "a dog.")
    assert one.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        rows = torch.stack([loaded.eval_transform(first.load_image(n)) for n in (0, 2, 4, 6, 7)])
        cats = loaded.model.eval().encode_image(rows, normalize=True)
    expected = [(0, 2, 4, 6, 7)[n] for n in herd_by_definition(cats.double().numpy(), 3)]
    for kept, number in zip(one.pixels[:3], expected, strict=True):
        assert np.array_equal(kept, np.asarray(first.load_image(number)))

    # a class met again keeps its number and its images; lists are cut from their end
    two = choose_exemplars(loaded, made_of([0, 0, 1, 1], ("dog", "owl"), seed=5), one, 6)
    assert two.prompts == ("a cat.", "a dog.", "a owl.")
    assert two.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for kept, before in zip(two.pixels[:4], [*one.pixels[:2], *one.pixels[3:5]], strict=True):
        assert np.array_equal(kept, before)
    assert len(choose_exemplars(loaded, first, two, 1).pixels) == 3  # one of every class at least


def test_large_images_are_kept_at_the_models_resolution(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    size = loaded.image_size
    for shape, expected in (
        ((4 * size, 2 * size), (2 * size, size)),
        ((size, 3 * size), (size, 3 * size)),
        ((5, 400), (5, 400)),
    ):
        kept = choose_exemplars(loaded, made_of([0], ("cat",), shape=shape), Exemplars(), 1)
        assert kept.pixels[0].shape == (*expected, 3)


def test_terms_are_the_written_equations(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    recipe, data = get_recipe("icarl"), made_of([0, 1, 0], ("cat", "dog"))
    assert [t.name for t in recipe.build(Context(loaded, {"data": data}, recipe.options())).terms] == ["classification"]
    kept = Exemplars(images(5, 3), np.array([0, 0, 1, 2, 2]), ("a b.", "a c.", "a d."))
    options = recipe.options(replay_weight=0.5, distill_weight=3.0, temperature=4.0)
    plan = recipe.build(Context(loaded, {"data": data}, options, history=History(carried=kept.tensors(), task=1)))
    assert [(t.name, t.on, t.weight) for t in plan.terms[1:]] == [("replay", "memory", 0.5), ("distill", "memory", 3.0)]
    batch = Batch(torch.zeros(5, 3, 1, 1), torch.arange(5), torch.tensor([0, 0, 1, 2, 2]), None)
    assert list(plan.batches[1].texts(batch, 0)) == list(kept.prompts)

    image, text = unit(5, 8, 0).requires_grad_(), unit(3, 8, 1).requires_grad_()
    teacher_image, teacher_text, scale = unit(5, 8, 2), unit(3, 8, 3), torch.tensor(7.0)
    features = Features(batch, image, text, scale, teacher_image, teacher_text)
    exact = [t.detach().double().requires_grad_() for t in (image, text)]
    logits = 7.0 * exact[0] @ exact[1].T
    target = (7.0 / 4.0 * teacher_image.double() @ teacher_text.double().T).softmax(1)
    written = {
        "replay": F.cross_entropy(logits, batch.labels),
        "distill": 16.0 * -(target * (logits / 4.0).log_softmax(1)).sum(1).mean(),
    }
    for term in plan.terms[1:]:
        value = term.loss(features)
        assert value.item() == pytest.approx(written[term.name].item(), rel=1e-5)
        found = torch.autograd.grad(3.0 * value, (image, text))
        expected = torch.autograd.grad(3.0 * written[term.name], exact, retain_graph=True)
        for ours, truth in zip(found, expected, strict=True):
            assert torch.allclose(ours.double(), truth, rtol=1e-4, atol=1e-6)


def test_a_small_memory_makes_a_small_batch(world: Path, tiny_folder: Path) -> None:  # noqa: F811
    recipe = get_recipe("icarl")
    path = world / "dark" / "train"
    words = ["--recipe", "icarl", "--data", str(path), "--model", str(tiny_folder)]
    words += ["--batch-size", "8", "--workers", "0"]
    words += ["--eval.suites", f'[{{name: own, task: zero_shot, data: {{path: "{path}"}}}}]']
    config: TrainConfig = resolve(recipe.options, recipe.preset, [], words).config
    kept = Exemplars(images(3, 3), np.array([0, 1, 1]), ("a b.", "a c."))
    run = assemble(config, History(carried=kept.tensors(), task=1))
    assert len(next(run.loaders["memory"]).indices) == 3
    assert len(next(run.loaders["data"]).indices) == 8


def test_a_sequence_with_memory_resumes_exactly(world: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = ("--max-steps", "3", "--options.memory-size", "10")
    done = go(world, tmp_path / "run", "icarl", overrides=flags, keep_weights="all")
    folder = tmp_path / "run" / "seed0"
    kept = Exemplars.from_tensors(load_file(folder / "02_plain" / "carried.safetensors"))
    assert len(kept.prompts) == 8
    assert np.bincount(kept.labels).tolist() == [1] * 8
    first = Exemplars.from_tensors(load_file(folder / "01_dark" / "carried.safetensors"))
    assert np.bincount(first.labels).tolist() == [2] * 4
    assert np.array_equal(first.pixels[0], kept.pixels[0])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "seed0" / "03_bright")
    again = go(world, tmp_path / "again", "icarl", overrides=flags, keep_weights="all", resume=True)
    assert np.array_equal(again.runs[0].accuracy, done.runs[0].accuracy)
    assert_same_weights(tmp_path / "run", tmp_path / "again")


def test_replay_keeps_more_of_the_first_task_than_fine_tuning(world: Path, tmp_path: Path) -> None:  # noqa: F811
    forgotten = {}
    for recipe in ("finetune", "icarl"):
        config = ContinualConfig(
            tasks=str(world / "tasks.yaml"),
            recipe=recipe,
            out=str(tmp_path / recipe),
            order="dark,bright",
            seeds=(0, 1, 2),
            overrides=("--max-steps", "25"),
        )
        runs = run_continual(config, Console(quiet=True)).runs
        forgotten[recipe] = np.mean([run.accuracy[0, 0] - run.accuracy[1, 0] for run in runs])
    assert forgotten["icarl"] < forgotten["finetune"]

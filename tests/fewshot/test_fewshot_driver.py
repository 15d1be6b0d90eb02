"""``ftfast fewshot`` and ``ftfast upgrade`` from the command line to the report, on a small table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ftfast.cli import main
from ftfast.config.tasks import read_tasks
from ftfast.demo import demo_settings
from ftfast.fewshot.settings import FewshotConfig, cells, data_file
from ftfast.models import load_model
from ftfast.models.prompt_files import read_facts
from ftfast.upgrade import moved_weights

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def table(folder: Path, name: str, per_class: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    rows = ["image,label"]
    for number in range(per_class * len(CLASSES)):
        path = folder / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.full((16, 16, 3), 50 * (number % len(CLASSES)), dtype=np.uint8)
        Image.fromarray(shade + rng.integers(0, 30, (16, 16, 3), dtype=np.uint8)).save(path)
        rows.append(f"{name}/{number:02d}.png,{CLASSES[number % len(CLASSES)]}")
    (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return folder / f"{name}.csv"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Two data sets, a shifted version of the first, and quick settings."""
    folder = tmp_path_factory.mktemp("sets")
    tasks = [
        {
            "name": name,
            "train": str(table(folder, f"{name}_train", 3, seed)),
            "test": str(table(folder, f"{name}_test", 2, seed + 1)),
        }
        for seed, name in ((0, "first"), (10, "second"))
    ]
    shifted = {"name": "shifted", "task": "zero_shot", "data": {"path": str(table(folder, "shifted", 2, 77))}}
    quick = {"model": str(tiny_folder), "train": {"max_steps": 2, "epochs": 1, "workers": 0}, "optim": {"lr": 1e-3}}
    content = {"name": "two sets", "tasks": tasks, "suites": [shifted], "settings": quick}
    content["recipes"] = {"finetune": {"options": {"loss": "class_prompts"}}}
    (folder / "sets.yaml").write_text(yaml.safe_dump(content))
    return folder / "sets.yaml"


def run(sets: Path, out: Path, *flags: str) -> list[dict]:
    assert main(["fewshot", str(sets), "--out", str(out), *flags]) == 0
    return json.loads((out / "report" / "results.json").read_text())["records"]


def test_base_to_new_from_end_to_end(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "few"
    flags = ("--recipes", "clip_cite", "contcoop", "--shots", "2", "4", "--seeds", "1", "2", "--sets", "first")
    records = run(sets, out, *flags)
    assert len(records) == 1 + 2 * 2 * 2
    assert {record["recipe"] for record in records} == {"zero-shot", "clip-cite", "contcoop"}
    assert all(set(record["results"]) == {"base", "new"} for record in records)
    told = capsys.readouterr().err
    assert told.count("3 of 3 classes have fewer than 4 training images; all of theirs are used") == 1
    assert "Averages over data sets" in told
    draw = json.loads((out / "splits" / "first_base_2shot_seed1.json").read_text())
    assert (draw["shots"], len(draw["images"])) == (2, 6)
    assert (out / "report" / "index.html").stat().st_size > 5000
    facts = read_facts(out / "cells" / "contcoop" / "first_base_2shot_seed1" / "base-to-new")
    assert (facts.recipe, facts.class_names) == ("contcoop", ("ant", "bee", "cat"))
    assert "shots: 2" in facts.settings
    assert not list(out.rglob("checkpoints"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result_*.json")}
    assert run(sets, out, *flags, "--resume") == records  # everything is measured already
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result_*.json")} == before
    assert main(["fewshot", str(sets), "--out", str(out), *flags]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["fewshot", str(sets), "--out", str(out), *flags, "--resume", "--lr", "0.5"]) == 2
    assert "was measured with other settings: optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("protocol", "suites", "trained"),
    [
        ("fsl", [["first"], ["second"]], ["first", "second"]),
        ("domain", [["first", "shifted"]], ["first"]),
        ("cross-dataset", [["first", "second"]], ["first"]),
        ("cross-cite", [["base", "new"]], ["second"]),
    ],
)
def test_every_protocol_measures_what_it_says(
    sets: Path, tmp_path: Path, protocol: str, suites: list[list[str]], trained: list[str]
) -> None:
    records = run(sets, tmp_path / "few", "--protocol", protocol, "--recipes", "coop", "--shots", "1")
    learned = [record for record in records if record["recipe"] == "coop"]
    assert [list(record["results"]) for record in learned] == suites
    assert [record["trained_on"] for record in learned] == trained
    assert [record["results"].keys() for record in records if record["recipe"] == "zero-shot"] == [
        record["results"].keys() for record in learned
    ]


def test_protocols_draw_from_the_right_classes(sets: Path) -> None:
    sequence = read_tasks(sets).sequence
    (classic,) = cells(FewshotConfig(protocol="cross-dataset", source="second"), sequence)
    assert (classic.task.name, classic.half, [s.data.half for s in classic.suites]) == ("second", "all", ["all"] * 2)
    (cite,) = cells(FewshotConfig(protocol="cross-cite"), sequence)
    assert (cite.data.half, cite.data.shots, cite.data.path) == ("base", 16, sequence.tasks[1].train.path)
    assert [(s.data.half, s.data.path) for s in cite.suites] == [
        ("base", sequence.tasks[0].test.path),
        ("new", sequence.tasks[0].test.path),
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--protocol", "bng"), "--protocol is 'bng'. Use one of: fsl, base-to-new"),
        (("--shots", "four"), "--shots is 'four'. Give whole numbers"),
        (("--seeds", "1", "1"), "--seeds is [1, 1]; give each value once"),
        (("--sets", "third"), "--sets names 'third', which is none of the data sets: first, second"),
        (("--recipes", "clipcite"), "Did you mean 'clip-cite'"),
        (("--out",), "--out needs a value"),
        (("--shots", "-1"), "must be 0 or more, not -1"),
    ],
)
def test_mistakes_are_sentences(
    sets: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fewshot", str(sets), *flags]) == 2
    assert said in capsys.readouterr().err


def test_check_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fewshot", "coop", "--check", "--data-root", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "0 of 15 ready" in said
    assert f"{tmp_path}/oxford_pets does not exist. Put the data there" in said
    assert data_file("builtin").is_file()


def test_upgrade_measures_all_four_and_explains_impossible_moves(
    sets: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    run(sets, few, "--recipes", "contcoop", "finetune", "--shots", "2", "--sets", "first", "--keep-weights")
    other = second_model(tiny_folder, tmp_path / "new-clip")
    out = tmp_path / "moved"
    capsys.readouterr()
    assert main(["upgrade", str(few), "--to", str(other), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert [move["recipe"] for move in result["moves"]] == ["contcoop", "finetune"]
    for move in result["moves"]:
        assert all(set(move[part]) == {"base", "new"} for part in ("own", "moved", "zero_shot", "retrained"))
    assert result["moves"][1]["share"] > 0.99
    summary = json.loads((out / "report" / "results.json").read_text())["summary"]["contcoop"]
    means = {name: summary[name]["mean"] for name in summary}
    assert means["compatibility"] == pytest.approx(means["moved"] - means["zero_shot"])
    assert means["cost"] == pytest.approx(means["retrained"] - means["moved"])
    assert "contcoop: " in printed.err
    assert (out / "report" / "moves.png").stat().st_size > 5000
    kept = {path: path.stat().st_mtime_ns for path in (out / "moves").glob("*.json")}
    assert len(kept) == 2
    run(sets, few, "--recipes", "coop", "--shots", "2", "--sets", "first", "--keep-weights", "--resume")
    assert main(["upgrade", str(few), "--to", str(other), "--out", str(out)]) == 0  # one more module: only it is moved
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((out / "moves").glob("*.json"))) == 3
    assert main(["upgrade", str(few), "--to", str(tiny_folder), "--out", str(out)]) == 2
    assert "holds another move" in capsys.readouterr().err
    assert main(["upgrade", str(few), "--to", "tiny-clip-v2", "--out", str(tmp_path / "no")]) == 2
    assert "has contexts of width 16" in capsys.readouterr().err.replace("the prompt ", "")
    assert main(["upgrade", str(tmp_path), "--to", "tiny-clip-v2"]) == 2
    assert "holds neither a prompt" in capsys.readouterr().err


def second_model(folder: Path, target: Path) -> Path:
    """The same architecture with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    path = target / "open_clip_model.safetensors"
    state = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(state, path)
    return target


def test_task_vectors_are_added_where_shapes_agree() -> None:
    start = {"a": torch.ones(2), "b": torch.zeros(3), "n": torch.tensor(1)}
    tuned = {"a": torch.full((2,), 3.0), "b": torch.ones(3), "n": torch.tensor(5)}
    new = {"a": torch.full((2,), 10.0), "b": torch.zeros(4), "n": torch.tensor(2), "c": torch.ones(1)}
    moved, share = moved_weights(start, tuned, new)
    assert moved["a"].tolist() == [12.0, 12.0]
    assert (moved["b"].tolist(), moved["n"].item(), moved["c"].item()) == ([0.0] * 4, 2, 1.0)
    assert share == pytest.approx(2 / 8)


@pytest.mark.parametrize("recipe", ["clip_cite", "contcoop", "finetune"])
def test_demo_of_the_few_shot_recipes_measures_names_of_learned_and_new_people(recipe: str, tmp_path: Path) -> None:
    compared = "clip-cite" if recipe == "finetune" else recipe
    config = demo_settings(recipe, 1, tmp_path, "tiny-clip-v1", compared)
    assert [suite.name for suite in config.eval.suites] == ["learned people", "new people", "generic drawings"]
    assert (config.data.half, config.data.shots) == ("base", 16)
    assert demo_settings("finetune", 1, tmp_path, "tiny-clip-v1").eval.suites == ()


def test_built_in_models_share_what_prompts_need() -> None:
    from ftfast.config.schema import ModelConfig
    from ftfast.models.prompts import TextPath

    first, second = (TextPath(load_model(ModelConfig(name=name))) for name in ("tiny-clip-v1", "tiny-clip-v2"))
    assert first.width == second.width

"""``ftfast tune``: validation only, resumable, the front, the best configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import ftfast.data.sources
from ftfast.cli import main
from ftfast.config.resolve import resolve
from ftfast.config.schema import DataConfig, TrainConfig
from ftfast.data import ImageDataset, open_dataset
from ftfast.errors import ConfigError, TrainingError
from ftfast.evaluation.tune_report import Trial, front
from ftfast.recipes import get_recipe
from ftfast.tune.driver import OBJECTIVES, validation_sides
from ftfast.tune.space import as_flags, read_space


def settings_of(recipe: str, *flags: str) -> TrainConfig:
    method = get_recipe(recipe)
    return resolve(method.options, method.preset, [], ["--recipe", recipe, *flags]).config


def flags(table: Path, model: Path, out: Path) -> list[str]:
    data = ["--data", str(table), "--generic", str(table), "--model", str(model)]
    return [*data, "--max-steps", "2", "--batch-size", "8", "--workers", "0", "--out", str(out), "--trials", "3"]


def names(config: DataConfig) -> set[str]:
    return set(open_dataset(config).class_names)


def test_validation_classes_are_in_neither_training_nor_test(class_table: Path) -> None:
    config = settings_of("infusing", "--data", str(class_table), "--generic", str(class_table))
    sides = validation_sides(config, get_recipe("infusing"), "image_retrieval")
    target, generic = (suite.data for suite in sides.eval.suites)
    test = dataclasses.replace(config.data, split="val")  # what ftfast train measures by default
    groups = [names(sides.data), names(target), names(test)]
    assert [len(group) for group in groups] == [6, 2, 2]
    assert len(set.union(*groups)) == 10
    assert not names(sides.generic) & names(generic)
    again = validation_sides(config, get_recipe("infusing"), "image_retrieval")
    assert again == sides
    builtin = settings_of("clip-cite", "--data", "builtin:target/train")
    sides = validation_sides(builtin, get_recipe("clip-cite"), "zero_shot")
    assert [suite.data.path for suite in sides.eval.suites] == ["builtin:target/val", "builtin:pairs/train"]
    assert sides.eval.suites[1].data.split == "val"


def test_search_writes_the_best_configuration_and_never_opens_test_data(
    class_table: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings_of("infusing", "--data", str(class_table))
    held_out = open_dataset(dataclasses.replace(config.data, split="val"))
    forbidden = {held_out.image_name(row) for row in range(len(held_out))}
    opened: set[str] = set()
    load = ImageDataset.load_image

    def recorded(self: ImageDataset, index: int) -> object:
        opened.add(self.image_name(index))
        return load(self, index)

    monkeypatch.setattr(ImageDataset, "load_image", recorded)
    measured: list[str] = []
    evaluate = ftfast.engine.run.evaluate

    def noted(loaded: object, suites: object, **rest: object) -> object:
        measured.extend(suite.config.name for suite in suites)
        return evaluate(loaded, suites, **rest)

    monkeypatch.setattr("ftfast.engine.run.evaluate", noted)
    out = tmp_path / "tune"
    command = ["tune", "infusing", *flags(class_table, tiny_folder, out)]
    # generic data of its own, so that everything that is opened belongs to the target
    command[command.index("--generic") + 1] = str(generic_table(tmp_path))
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert opened
    assert not opened & forbidden
    assert set(measured) == {"target", "generic"}
    assert result["trials"] == 3
    assert result["default"]["is_default"]
    assert result["default"]["number"] == 0
    assert result["best"]["score"] >= result["default"]["score"]
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["optim"]["lr"] == pytest.approx(result["best"]["params"]["optim.lr"])
    assert best["data"]["path"] == str(class_table)
    assert best["data"]["classes"] == []  # the user's data, not the search's part of it
    assert (out / "report" / "front.png").stat().st_size > 5000
    rows = (out / "report" / "trials.csv").read_text().splitlines()
    assert len(rows) == 4
    # searching on: two more trials, the first three stay
    more = [*command, "--resume"]
    more[more.index("--trials") + 1] = "5"
    assert main(more) == 0
    assert (out / "report" / "trials.csv").read_text().splitlines()[:4] == rows
    assert main(command) == 2
    assert "already exists. Go on with --resume" in capsys.readouterr().err
    assert main([*more, "--options.anchor-weight", "7"]) == 2
    assert "was started with another options.anchor_weight" in capsys.readouterr().err


def generic_table(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    rows = ["image,label"]
    for number in range(20):
        path = folder / "generic" / f"g{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 12 * number, dtype=np.uint8)).save(path)
        rows.append(f"generic/g{number:02d}.png,thing {number % 10}")
    (folder / "generic.csv").write_text("\n".join(rows) + "\n")
    return folder / "generic.csv"


def test_a_killed_search_goes_on(class_table: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a trial: the trial is run again, finished ones are kept."""
    out = tmp_path / "tune"
    command = [sys.executable, "-m", "ftfast", "tune", "finetune", *flags(class_table, tiny_folder, out)]
    command[command.index("--max-steps") + 1] = "100000"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (out / "trials" / "0000" / "config.yaml").is_file():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    import optuna

    storage = f"sqlite:///{out / 'study.db'}"
    study = optuna.load_study(study_name="finetune", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    # the same search with a length that ends: only the length is pretended to be the old one
    marker = out / "tune.json"
    marker.write_text(marker.read_text().replace("max_steps: 100000", "max_steps: 2"))
    again = ["tune", "finetune", *flags(class_table, tiny_folder, out), "--resume"]
    assert main(again) == 0
    study = optuna.load_study(study_name="finetune", storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[0].params  # the interrupted point, the shipped default
    results = json.loads((out / "report" / "results.json").read_text())
    assert [trial["is_default"] for trial in results["trials"]] == [True, False, False]


def test_a_trial_that_diverges_is_the_worst_and_the_search_goes_on(
    class_table: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def explode(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise TrainingError("step 1: term 'x' is nan")

    monkeypatch.setattr("ftfast.tune.driver.fit_task", explode)
    out = tmp_path / "tune"
    assert main(["tune", "finetune", *flags(class_table, tiny_folder, out)]) == 0
    assert len(calls) == 3
    assert all(trial["score"] == 0 for trial in json.loads((out / "report" / "results.json").read_text())["trials"])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_front_is_the_set_of_trials_nobody_beats(points: list[tuple[int, int]]) -> None:
    trials = [Trial(number, {}, float(t), float(g), 0.0) for number, (t, g) in enumerate(points)]
    beaten = [
        any(
            (o.target >= t.target and o.generic > t.generic) or (o.target > t.target and o.generic >= t.generic)
            for o in trials
        )
        for t in trials
    ]
    expected = {(t.target, t.generic) for t, lost in zip(trials, beaten, strict=True) if not lost}
    found = front(trials)
    assert {(t.target, t.generic) for t in found} == expected
    assert len(found) == len(expected)
    assert [t.target for t in found] == sorted(t.target for t in found)


@pytest.mark.parametrize(
    ("name", "value"), [("mean", 0.5), ("harmonic", 0.48), ("worst", 0.4), ("target", 0.6), ("generic", 0.4)]
)
def test_objectives(name: str, value: float) -> None:
    assert OBJECTIVES[name](0.6, 0.4) == pytest.approx(value)
    assert OBJECTIVES[name](0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lrr: {times: 3}", "'optim.lrr' is not a setting. Did you mean 'optim.lr'?"),
        ("optim.lr: {low: 2, high: 1}", "low 2 must be below high 1"),
        ("optim.lr: {low: 0, high: 1, log: true}", "and above 0 with log"),
        ("optim.lr: 3", "'optim.lr' is 3. Write {low"),
        ("optim.lr: {lo: 3}", "'optim.lr' has 'lo'"),
        ("optim.lr: {low: 1, high: 2}", "the default optim.lr 1e-05 lies outside 1 to 2"),
        ("optim.weight_decay: {times: 3}", "a default above 0"),
        ("data.shots: {low: 1, high: 4}", "it changes what is measured"),
        ("options.embedding_weight: {choices: []}", "give a list of plain values"),
        ("{}", "there is nothing to search"),
    ],
)
def test_impossible_spaces_are_sentences(text: str, said: str, tmp_path: Path) -> None:
    config = settings_of("infusing", "--data", "x.csv", "--generic", "y.csv", "--lr", "1e-5")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.0))
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_space(tmp_path / "space.yaml", config, get_recipe("infusing"))
    assert said in str(error.value)


def test_spaces_become_flags_that_resolve(tmp_path: Path) -> None:
    recipe = get_recipe("infusing")
    config = settings_of("infusing", "--data", "x.csv", "--generic", "y.csv")
    (tmp_path / "space.yaml").write_text(
        "optim.lr: {times: 10}\ntrain.batch_size: {low: 8, high: 256, log: true}\n"
        "options.batch_form: {choices: [round_robin, joint]}\nmodel.freeze_batch_norm: {choices: [true, false]}\n"
    )
    space = read_space(tmp_path / "space.yaml", config, recipe)
    assert [item.whole for item in space] == [False, True, False, False]
    assert (space[0].low, space[0].high) == pytest.approx((config.optim.lr / 10, config.optim.lr * 10))
    words = as_flags(
        {"optim.lr": 1.2345e-7, "train.batch_size": 9, "options.batch_form": "joint", "model.freeze_batch_norm": False}
    )
    tried = settings_of("infusing", "--data", "x.csv", "--generic", "y.csv", *words)
    assert (tried.optim.lr, tried.train.batch_size) == (1.2345e-7, 9)
    assert (tried.options.batch_form, tried.model.freeze_batch_norm) == ("joint", False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infusing", "--objective", "both"], "--objective is 'both'. Use one of: mean"),
        (["infusing", "--trials", "many"], "--trials has 'many'"),
        (["infusing", "--trials", "0", "--data", "x.csv"], "--trials is 0"),
        (["infusing"], "data.path is empty"),
        (["infusing", "--data", "x.csv", "--space", "none.yaml"], "--space 'none.yaml' does not exist"),
    ],
)
def test_mistakes_are_sentences_too(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["tune", *arguments, "--out", str(tmp_path / "t")]) == 2
    assert said in capsys.readouterr().err

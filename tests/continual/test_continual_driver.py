"""``ftfast continual``: matrices, resume after a kill, orders, class-incremental steps, and every error sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ftfast.cli import guard
from ftfast.cli.continual_command import run as command
from ftfast.config.tasks import read_tasks
from ftfast.continual.driver import ContinualConfig, plan_sequence, run_continual, tasks_file
from ftfast.engine import tasks as engine_tasks
from ftfast.errors import CheckpointError, ConfigError, DataError
from ftfast.models.exporting import read_state

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
SHADES = {"dark": 0.35, "plain": 0.7, "bright": 1.0}


def draw(path: Path, colour: str, shade: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 40, (24, 24, 3))
    pixels = np.clip(np.array(COLOURS[colour]) * SHADES[shade] + noise - 20, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of three or four classes, six training and three test images each; replay pairs; a tasks file."""
    root = tmp_path_factory.mktemp("world")
    for shade in SHADES:
        for colour in COLOURS:
            for side, count in (("train", 6), ("test", 3)):
                for number in range(count):
                    seed = hash((number, side == "test")) % 1000
                    draw(root / shade / side / f"{shade} {colour}" / f"{number}.png", colour, shade, seed)
    lines = ["image,caption"]
    for number, (shade, colour) in enumerate((s, c) for s in SHADES for c in COLOURS):
        draw(root / "pairs" / f"{number}.png", colour, shade, 7)
        lines.append(f"pairs/{number}.png,a picture of {colour}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    (root / "tasks.yaml").write_text(tasks_text(root))
    return root


def tasks_text(root: Path, names: tuple[str, ...] = ("dark", "plain", "bright")) -> str:
    items = "".join(
        f"  - name: {name}\n    train: {root / name / 'train'}\n    test: {root / name / 'test'}\n"
        + ("    settings:\n      optim: {lr: 2.0e-3}\n" if name == "plain" else "")
        for name in names
    )
    return (
        f"name: shades\ntasks:\n{items}"
        f"suites:\n  - {{name: never trained, task: zero_shot, data: {{path: {root / 'bright' / 'test'}}}}}\n"
        f"settings:\n  model: tiny-clip-v1\n  generic: {root / 'pairs.csv'}\n"
        "  optim: {lr: 1.0e-3, warmup: 0.25}\n"
        "  train: {batch_size: 8, max_steps: 4, workers: 0, device: cpu}\n"
        "  checkpoint: {every_steps: 1}\n"
        "recipes:\n  zscl:\n    options: {average_every: 2}\n"
        "  gift:\n    options: {consolidation_weight: 0.01, distill_weight: 0.1}\n"
    )


def go(world: Path, out: Path, recipe: str = "gift", **more):
    config = ContinualConfig(tasks=str(world / "tasks.yaml"), recipe=recipe, out=str(out), **more)
    return run_continual(config, Console(quiet=True))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory):
    return go(world, tmp_path_factory.mktemp("done") / "run", seeds=(0, 1))


def test_a_sequence_makes_matrices_weights_and_a_page(finished, world: Path) -> None:
    first, second = finished.runs
    assert first.tasks == ("dark", "plain", "bright")
    assert first.accuracy.shape == (3, 3)
    assert np.array_equal(first.zero_shot, second.zero_shot)
    # something is learned, so that equal matrices mean something
    assert not np.array_equal(first.accuracy, np.tile(first.zero_shot, (3, 1)))
    assert len(np.unique(first.accuracy)) > 1
    assert not np.array_equal(first.accuracy, second.accuracy)
    assert len(first.suites["never trained"]) == 4
    assert first.suites["never trained"][1:] == tuple(first.accuracy[:, 2])  # the same images as the last task's
    out = finished.folder
    assert finished.page == out / "report" / "index.html"
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert np.allclose(results["runs"]["gift"][1]["accuracy"], second.accuracy)
    kept = sorted(path.relative_to(out).as_posix() for path in out.glob("seed*/*/final"))
    assert kept == ["seed0/03_bright/final", "seed1/03_bright/final"]
    assert not list(out.glob("seed*/*/checkpoints"))
    config = (out / "seed0" / "02_plain" / "config.yaml").read_text()
    assert "lr: 0.002" in config  # the task's own rate
    assert "lr: 0.001\n" in (out / "seed0" / "01_dark" / "config.yaml").read_text()


def test_the_last_weights_load_in_plain_open_clip_and_give_the_last_row(finished, world: Path) -> None:
    import open_clip

    folder = finished.folder / "seed0" / "03_bright" / "final"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    names = sorted(path.name for path in (world / "dark" / "test").iterdir())
    with torch.no_grad():
        text = model.eval().encode_text(tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
        hits = []
        for label, name in enumerate(names):
            for path in sorted((world / "dark" / "test" / name).iterdir()):
                image = model.encode_image(preprocess(Image.open(path)).unsqueeze(0), normalize=True)
                hits.append(int((image @ text.T).argmax()) == label)
    assert finished.runs[0].accuracy[2, 0] == pytest.approx(np.mean(hits))


def start(world: Path, out: Path, *flags: str) -> subprocess.Popen:
    words = ["continual", str(world / "tasks.yaml"), "--out", str(out), "--recipe", "gift", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = "import sys; from ftfast.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def kill_when(child: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 180
    while not ready():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=60)


def assert_same_weights(first: Path, second: Path) -> None:
    """Compare the weights after the last task bit for bit."""
    states = [read_state(folder / "seed0" / "03_bright" / "final") for folder in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_killed_inside_a_task_and_between_tasks_gives_the_same_matrix(finished, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    inside = out / "seed0" / "02_plain"
    kill_when(start(world, out), lambda: any(inside.glob("checkpoints/step_*")))
    assert not (inside / "accuracy.json").exists()
    resumed = go(world, out, resume=True)
    assert np.array_equal(resumed.runs[0].accuracy, finished.runs[0].accuracy)
    assert_same_weights(out, finished.folder)
    assert resumed.runs[0].suites == finished.runs[0].suites

    # between tasks: everything of the second task is there, nothing of the third
    again = tmp_path / "again"
    second = go(world, again, keep_weights="all")
    assert len(list(again.glob("seed0/*/final"))) == 3
    shutil.rmtree(again / "seed0" / "03_bright")
    third = go(world, again, keep_weights="all", resume=True)
    assert np.array_equal(third.runs[0].accuracy, second.runs[0].accuracy)
    # learned but not measured: killed after the weights, before the accuracies
    (again / "seed0" / "03_bright" / "accuracy.json").unlink()
    fourth = go(world, again, keep_weights="all", resume=True)
    assert np.array_equal(fourth.runs[0].accuracy, finished.runs[0].accuracy)
    assert_same_weights(again, finished.folder)


@pytest.mark.parametrize("recipe", ["finetune", "lwf", "ewc-online", "icarl", "wise-ft", "zscl"])
def test_peers_run_in_the_same_driver(world: Path, tmp_path: Path, recipe: str) -> None:
    result = go(world, tmp_path / "run", recipe, order="dark,bright", overrides=("--max-steps", "2"))
    assert result.runs[0].accuracy.shape == (2, 2)
    text = (tmp_path / "run" / "seed0" / "01_dark" / "config.yaml").read_text()
    assert "label_smoothing: 0.2" in text
    assert ("loss: class_prompts" in text) == (recipe in ("finetune", "wise-ft"))
    assert ("average_every: 2" in text) == (recipe == "zscl")
    carried = tmp_path / "run" / "seed0" / "02_bright" / "carried.safetensors"
    assert carried.exists() == (recipe in ("ewc-online", "icarl"))


def test_class_incremental_steps_measure_the_classes_seen(world: Path, tiny_folder: Path, tmp_path: Path) -> None:
    classes = [f"dark {colour}" for colour in ("red", "blue", "green", "grey")]
    text = (
        f"class_incremental:\n  train: {world / 'dark' / 'train'}\n  test: {world / 'dark' / 'test'}\n  steps: 2\n"
        f"  class_order: [{', '.join(classes)}]\n"
        f"settings:\n  model: {tiny_folder}\n  train: {{batch_size: 6, max_steps: 2, workers: 0, device: cpu}}\n"
        "  optim: {lr: 1.0e-3, warmup: 0}\n"
    )
    (tmp_path / "cil.yaml").write_text(text)
    config = ContinualConfig(tasks=str(tmp_path / "cil.yaml"), recipe="finetune", out=str(tmp_path / "run"))
    plan = plan_sequence(config)
    assert [item.data.classes for item in plan.configs] == [tuple(classes[:2]), tuple(classes[2:])]
    assert [suite.queries.class_names for suite in plan.seen] == [tuple(classes[:2]), tuple(classes)]
    assert len(plan.seen[1].queries) == 12
    run = run_continual(config, Console(quiet=True)).runs[0]
    assert run.tasks == ("step 1", "step 2")
    assert len(run.seen) == 2
    assert run.seen[0] == run.accuracy[0, 0]  # after one step the classes seen are that step's
    with pytest.raises(ConfigError, match="divides 4 classes of class_order into 3 steps"):
        read_tasks(tmp_path / "cil.yaml", steps=3)


def test_shipped_sequences_have_the_published_shape() -> None:
    mtil = read_tasks(tasks_file("mtil"))
    assert mtil.order == "I"
    assert [task.name for task in mtil.sequence.tasks][:4] == ["aircraft", "caltech101", "cifar100", "dtd"]
    second = read_tasks(tasks_file("mtil"), order="II")
    assert [task.name for task in second.sequence.tasks] == (
        ["cars", "food", "mnist", "pets", "flowers", "sun397", "aircraft", "caltech101", "dtd", "eurosat", "cifar100"]
    )
    assert sorted(mtil.by_task) == ["aircraft", "mnist"]
    counts = {task.name: len(task.test.templates) for task in mtil.sequence.tasks}
    assert (counts["caltech101"], counts["cifar100"], counts["sun397"], counts["mnist"]) == (34, 18, 2, 1)
    for steps, size in ((10, 10), (20, 5), (50, 2)):
        cil = read_tasks(tasks_file("cifar100"), steps=steps)
        assert [len(task.train.classes) for task in cil.sequence.tasks] == [size] * steps
    assert len({name for task in cil.sequence.tasks for name in task.train.classes}) == 100
    builtin = [read_tasks(tasks_file("builtin"), order=order).sequence.tasks for order in ("I", "II")]
    assert sorted(task.name for task in builtin[0]) == sorted(task.name for task in builtin[1])
    assert builtin[0] != builtin[1]


def sentence(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = guard.run(command, list(argv))
    return code, capsys.readouterr().err.strip()


def test_missing_class_images_and_a_task_with_one_class(world: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(world, tmp_path / "w")
    file = tmp_path / "w" / "tasks.yaml"
    file.write_text(tasks_text(tmp_path / "w"))
    shutil.rmtree(tmp_path / "w" / "plain" / "test" / "plain blue")
    code, text = sentence(capsys, str(file), "--out", str(tmp_path / "o"))
    assert code == 2
    assert text == "error: task 'plain': test has no images of class 'plain blue', which the other side has."
    assert not (tmp_path / "o").exists()
    shutil.rmtree(tmp_path / "w" / "plain" / "train" / "plain blue")
    for colour in ("red", "green"):
        for side in ("train", "test"):
            shutil.rmtree(tmp_path / "w" / "plain" / side / f"plain {colour}")
    code, text = sentence(capsys, str(file), "--out", str(tmp_path / "o"))
    assert code == 2
    assert text.startswith("error: task 'plain' has 1 class (plain grey); there is nothing to tell apart")
    assert "\n" not in text
    assert command([str(file), "--check"]) == 2
    shown = capsys.readouterr().out
    assert "ready    dark" in shown
    assert "MISSING  plain" in shown
    assert "3 of 4 ready" in shown


def test_a_changed_list_or_setting_on_resume_is_one_sentence(finished, world: Path, capsys) -> None:
    out, file = str(finished.folder), str(world / "tasks.yaml")
    code, text = sentence(capsys, file, "--out", out, "--resume", "--order", "plain,dark,bright")
    assert code == 2
    assert text.startswith(
        f"error: --resume: {out} was started with tasks dark, plain, bright; now they are plain, dark,"
    )
    code, text = sentence(capsys, file, "--out", out, "--resume", "--recipe", "zscl")
    assert "was started with recipe gift; now it is zscl" in text
    code, text = sentence(capsys, file, "--out", out, "--resume", "--lr", "5e-3")
    assert code == 2
    assert "was started with other settings of task 'dark': optim.lr was 0.001, now 0.005" in text
    code, text = sentence(capsys, file, "--out", out)
    assert code == 2
    assert text.startswith(f"error: output folder {out} already exists. Continue it with --resume, replace it with")
    code, text = sentence(capsys, file, "--out", str(finished.folder.parent), "--overwrite")
    assert "is not a sequence of ftfast (no sequence.json), so it is left alone" in text
    code, text = sentence(capsys, file, "--out", str(finished.folder / "nothing"), "--resume")
    assert "holds no sequence.json, so there is no sequence to continue" in text


def test_a_full_disk_is_one_sentence_and_resume_goes_on(finished, world: Path, tmp_path: Path, monkeypatch) -> None:
    real = engine_tasks.save_open_clip_folder
    calls = []

    def full(folder: Path, *rest, **more):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(folder))
        return real(folder, *rest, **more)

    monkeypatch.setattr(engine_tasks, "save_open_clip_folder", full)
    with pytest.raises(CheckpointError) as error:
        go(world, tmp_path / "run")
    assert str(error.value).startswith(f"{tmp_path / 'run' / 'seed0' / '02_plain'} cannot be written: No space left")
    assert "--resume" in str(error.value)
    assert "\n" not in str(error.value)
    resumed = go(world, tmp_path / "run", resume=True)
    assert np.array_equal(resumed.runs[0].accuracy, finished.runs[0].accuracy)


def test_tasks_files_are_read_strictly(world: Path, tmp_path: Path, capsys) -> None:
    def problem(text: str) -> str:
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            plan_sequence(ContinualConfig(tasks=str(tmp_path / "t.yaml"), recipe="finetune"))
        return str(error.value)

    assert "t.yaml:2: unknown key 'taks'" in problem("name: x\ntaks: []\n")
    assert "there are no tasks" in problem("name: x\n")
    assert "task 'a' has no test.path" in problem("tasks:\n  - {name: a, train: x}\n")
    assert "two tasks are called 'a'" in problem(
        "tasks:\n  - {name: a, train: x, test: y}\n  - {name: a, train: x, test: y}\n"
    )
    assert "order 'z' names task 'z', which does not exist" in problem(
        "tasks:\n  - {name: a, train: x, test: y}\norders:\n  - {name: z, tasks: [z]}\n"
    )
    wrong = "tasks:\n  - {name: a, train: x, test: y}\nsettings:\n  optim:\n    lrr: 1\n"
    assert "t.yaml:5: unknown key 'optim.lrr'" in problem(wrong)
    assert "the file is empty" in problem("")
    code, text = sentence(capsys, "nowhere.yaml")
    assert (code, text) == (
        2,
        "error: tasks file 'nowhere.yaml' does not exist. Give a YAML file, or one of: builtin, cifar100, mtil.",
    )
    code, text = sentence(capsys, "builtin", "--seeds", "a")
    assert text == "error: --seeds has 'a', which is not a whole number. Write for example 0,1,2."
    assert command(["-h"]) == 0
    assert "ftfast continual TASKS" in capsys.readouterr().out


def test_replay_can_differ_from_task_to_task(world: Path) -> None:
    flags = ("--generic", "synth/{number}_{task}.csv")
    plan = ContinualConfig(tasks=str(world / "tasks.yaml"), overrides=flags)
    assert [item.generic.path for item in plan_sequence(plan).configs] == [
        "synth/01_dark.csv",
        "synth/02_plain.csv",
        "synth/03_bright.csv",
    ]


def test_missing_data_sets_say_where_they_belong(tmp_path: Path, capsys) -> None:
    assert command(["mtil", "--check", "--data-root", str(tmp_path)]) == 2
    shown = capsys.readouterr().out
    assert "0 of 11 ready" in shown
    assert f"torchvision:cars: {tmp_path}/stanford_cars does not exist. Put the data there" in shown
    with pytest.raises(DataError, match=r"torchvision:aircraft: .* does not exist"):
        plan_sequence(ContinualConfig(tasks="mtil", data_root=str(tmp_path)))

"""The loop on a small table: exact resume after a kill, signals, NaN, selection, outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from ftfast.config.resolve import resolve, to_yaml
from ftfast.config.schema import TrainConfig
from ftfast.engine.folder import changed_settings
from ftfast.engine.run import train
from ftfast.errors import CheckpointError, ConfigError, TrainingError
from ftfast.recipes import get_recipe

QUIET = Console(quiet=True)


def settings(tiny_folder: Path, table: Path, out: Path, recipe: str = "infusing", **changes: Any) -> TrainConfig:
    """Settings of a run of a few seconds, as a user would write them."""
    suite = {"task": "image_retrieval", "data": {"path": str(table), "split": "val"}}
    values: dict[str, Any] = {
        "recipe": recipe,
        "model": {"name": f"local-dir:{tiny_folder}"},
        "data": {"path": str(table), "split": "train"},
        "generic": {"path": str(table)},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 8, "batch_size": 8, "workers": 0, "device": "cpu"},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 4, "report_to": []},
        "eval": {
            "suites": [{"name": "kinds", "role": "target", **suite}, {"name": "kept", "role": "control", **suite}],
            "alphas": [0.0, 0.5, 1.0],
            "selection": "last",
        },
    }
    for path, value in changes.items():
        *blocks, name = path.split("__")
        block = values
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    method = get_recipe(recipe)
    return resolve(method.options, method.preset, [str(file)], ["--out", str(out)]).config


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and total loss of every logged step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_run_leaves_everything_it_promises(tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, class_table, tmp_path / "run", eval__selection="all", eval__every_steps=4)
    result = train(config, console=QUIET, cache_dir=tmp_path)
    folder = tmp_path / "run"
    for name in (
        "config.yaml",
        "environment.json",
        "command.txt",
        "train.log",
        "metrics.jsonl",
        "metrics.csv",
        "result.json",
        "report/index.html",
        "report/results.json",
        "final/open_clip_config.json",
        "final/open_clip_model.safetensors",
        "final/README.md",
        "checkpoints/best/state.pt",
    ):
        assert (folder / name).is_file(), name
    assert [p.name for p in sorted((folder / "checkpoints").glob("step_*"))] == ["step_00000006", "step_00000008"]
    assert [step for step, _ in losses(folder)] == list(range(1, 9))
    assert result.before.keys() == result.after.keys() == {"kinds", "kept"}
    assert [point.alpha for point in result.sweep] == [0.0, 0.5, 1.0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if any(key.startswith("eval/") for key in row)]
    assert evaluated == [1, 4, 8]  # the first evaluation follows the first update
    assert any("train/loss/anchor" in row for row in rows)
    again = resolve(get_recipe("infusing").options, {}, [str(folder / "config.yaml")], []).config
    assert again.data.split == "train"
    assert len(again.eval.validation) == 2


def test_killed_run_resumes_to_the_same_losses_and_weights(
    tiny_folder: Path, class_table: Path, tmp_path: Path
) -> None:
    whole = settings(tiny_folder, class_table, tmp_path / "whole", train__max_steps=30, optim__ema_decay=0.9)
    train(whole, console=QUIET, cache_dir=tmp_path)
    settings(tiny_folder, class_table, tmp_path / "cut", train__max_steps=30, optim__ema_decay=0.9)
    # The child dies in the middle of writing its third checkpoint: SIGKILL from inside torch.save.
    code = (
        "import os, signal, sys, torch\n"
        "real, count = torch.save, [0]\n"
        "def save(state, path):\n"
        "    real(state, path)\n"
        "    count[0] += 1\n"
        "    if count[0] == 3:\n"
        "        with open(path, 'r+b') as f: f.truncate(1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = save\n"
        "from ftfast.train import main\n"
        f"main(['--config', {str(tmp_path / 'cut.yaml')!r}, '--out', {str(tmp_path / 'cut')!r}])\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    folder = tmp_path / "cut"
    kept = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004"]
    assert any(p.name.startswith(".step_00000006") for p in (folder / "checkpoints").iterdir())
    resumed = subprocess.run(
        [sys.executable, "-m", "ftfast", "train", "--resume", str(folder)], capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 4 of 30" in resumed.stderr
    assert losses(folder) == losses(tmp_path / "whole")
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".step")]
    from ftfast.models import read_state

    first, second = read_state(tmp_path / "whole" / "final"), read_state(folder / "final")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_saves_and_exits_130(tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    settings(tiny_folder, class_table, tmp_path / "run", train__max_steps=100000, checkpoint__every_steps=100000)
    command = [sys.executable, "-m", "ftfast", "train", "infusing", "--config", str(tmp_path / "run.yaml")]
    child = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "train.log"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.is_file() and "step " in log.read_text()):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert len(steps) == 1
    assert f"SIGTERM at step {steps[0]}: checkpoint saved. Go on with --resume." in stderr
    assert "Traceback" not in stderr


def test_nan_stops_with_step_and_term(tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, class_table, tmp_path / "run", optim__lr=1e30, optim__head_lr=1e-3)
    with pytest.raises(TrainingError) as error:
        train(config, console=QUIET, cache_dir=tmp_path)
    message = str(error.value)
    assert message.startswith("step ")
    assert (
        "term 'embedding' is nan" in message or "term 'anchor' is inf" in message or "term 'anchor' is nan" in message
    )
    assert "\n" not in message


def test_existing_folder_and_changed_settings_are_refused(tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, class_table, tmp_path / "run", recipe="finetune", train__max_steps=2)
    train(config, console=QUIET, cache_dir=tmp_path)
    with pytest.raises(ConfigError) as error:
        train(config, console=QUIET)
    assert str(error.value) == (
        f"output folder {tmp_path / 'run'} already exists. Continue it with --resume, replace it with --overwrite, "
        "or choose another --out."
    )
    other = settings(tiny_folder, class_table, tmp_path / "run", recipe="finetune", train__max_steps=3)
    with pytest.raises(CheckpointError, match=r"train.max_steps was 2, now 3\. Resume with the same ones"):
        train(other, resume=True, console=QUIET)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    stranger = settings(tiny_folder, class_table, foreign, recipe="finetune")
    with pytest.raises(ConfigError, match=r"is not a run of ftfast \(no config.yaml\), so it is left alone"):
        train(stranger, overwrite=True, console=QUIET)
    assert (foreign / "thesis.txt").read_text() == "precious"
    with pytest.raises(CheckpointError, match="there is no run to continue"):
        train(stranger, resume=True, console=QUIET)


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default() -> None:
    now = to_yaml(TrainConfig())
    then = "".join(line for line in now.splitlines(keepends=True) if "trim_text:" not in line)
    assert then != now
    assert changed_settings(then, now) == []
    other = now.replace("trim_text: false", "trim_text: true")
    assert changed_settings(then, other) == ["model.trim_text was False, now True"]
    assert changed_settings(other, then) == ["model.trim_text was True, now None"]


def test_batch_larger_than_data_and_long_warmup(tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    big = settings(tiny_folder, class_table, tmp_path / "run", train__batch_size=1000)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1000, but data has only 48 images"):
        train(big, console=QUIET)
    slow = settings(
        tiny_folder, class_table, tmp_path / "run", recipe="finetune", train__max_steps=0, optim__warmup=500
    )
    with pytest.raises(ConfigError, match=r"optim.warmup is 500 steps but training has 18\."):
        train(slow, console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["finetune", "l2sp", "lwf", "ewc", "wise-ft", "lp-ft", "flyp"])
def test_every_recipe_trains(recipe: str, tiny_folder: Path, class_table: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, class_table, tmp_path / "run", recipe=recipe, train__max_steps=3)
    result = train(config, console=QUIET, cache_dir=tmp_path)
    assert len(losses(tmp_path / "run")) == 3
    assert all(0.0 <= value <= 1.0 for metrics in result.after.values() for value in metrics.values())


@pytest.mark.parametrize(("precision", "tolerance"), [("amp_bf16", 0.05)])
def test_mixed_precision_stays_close(
    precision: str, tolerance: float, tiny_folder: Path, class_table: Path, tmp_path: Path
) -> None:
    runs = {}
    for name in ("fp32", precision):
        config = settings(
            tiny_folder, class_table, tmp_path / name, recipe="finetune", train__precision=name, train__max_steps=3
        )
        train(config, console=QUIET, cache_dir=tmp_path)
        runs[name] = losses(tmp_path / name)
    for (_, exact), (_, mixed) in zip(runs["fp32"], runs[precision], strict=True):
        assert mixed == pytest.approx(exact, rel=tolerance)


def test_accumulation_of_a_mean_loss_equals_the_large_batch(
    tiny_folder: Path, class_table: Path, tmp_path: Path
) -> None:
    """Classification is a mean over images, so 2 x 8 accumulated equals 16 at once (BatchNorm is frozen)."""
    once = settings(
        tiny_folder, class_table, tmp_path / "once", recipe="finetune", train__batch_size=16, train__max_steps=1
    )
    twice = settings(
        tiny_folder, class_table, tmp_path / "twice", recipe="finetune", train__accum_freq=2, train__max_steps=1
    )
    train(once, console=QUIET, cache_dir=tmp_path)
    train(twice, console=QUIET, cache_dir=tmp_path)
    assert losses(tmp_path / "once")[0][1] == pytest.approx(losses(tmp_path / "twice")[0][1], rel=1e-5)

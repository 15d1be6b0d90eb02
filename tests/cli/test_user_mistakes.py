"""Situations a user runs into: each gets one clear sentence, exit code 2 and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import write_image

from ftfast.cli import main


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small images and tables, some of them wrong, as current folder."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        write_image(tmp_path / "img" / f"{number}.png", number)
    tables = {
        "good.csv": ["image,label", *(f"img/{n}.png,c{n % 3}" for n in range(12))],
        "columns.csv": ["a,b", *(f"img/{n}.png,c{n % 3}" for n in range(12))],
        "lonely.csv": ["image,label", *(f"img/{n}.png,c{min(n, 1)}" for n in range(12))],
        "unnamed.csv": ["image,label", "img/0.png,a", "img/1.png,", "img/2.png,a"],
        "absent.csv": ["image,label", "img/0.png,a", "img/99.png,a"],
    }
    for name, rows in tables.items():
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    for number in range(3):
        write_image(tmp_path / "classes" / "full" / f"{number}.png", number)
    (tmp_path / "classes" / "hollow").mkdir()
    (tmp_path / "my.yaml").write_text("data: good.csv\noptim:\n  wd: 0.1\n")
    (tmp_path / "old-run").mkdir()
    (tmp_path / "old-run" / "config.yaml").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--config my.yaml",
            "my.yaml:3: unknown key 'optim.wd'. ftfast calls this 'optim.weight_decay' (open_clip's --wd).",
        ),
        (
            "--data good.csv --train.global-batch-size 64",
            "train.global_batch_size is 64, but batch_size 4 × accum_freq 1 × 1 process = 4. Remove it or change one "
            "of the others. (train.global_batch_size from flag --train.global-batch-size, train.batch_size from flag "
            "--batch-size)",
        ),
        ("--data good.csv --bach-size 4", "unknown flag '--bach-size'. Did you mean '--batch-size'?"),
        (
            "--data good.csv --max-steps 9 --warmup 10000",
            "optim.warmup is 10000 steps but training has 9. Use "
            "optim.warmup: 0.1 (a fraction) or fewer steps. (optim.warmup from flag --warmup)",
        ),
    ],
)
def test_settings(arguments, message, project, capsys):
    assert main(["train", "finetune", "--batch-size", "4", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data columns.csv", ("columns.csv", "'a', 'b'", "separator ','", "data.image_column")),
        ("--data good.csv --data-label-col kind", ("good.csv", "'kind'", "'image', 'label'", "data.label_column")),
        ("--data none.csv", ("none.csv", "no such file", "data.path")),
        ("--data absent.csv", ("absent.csv:3", "img/99.png", "does not exist")),
        ("--data classes", ("hollow", "no images")),
        ("--data unnamed.csv", ("unnamed.csv:3", "no class", "'label'")),
        ("--data lonely.csv", ("c0", "1 image", "data.min_images_per_class")),
        ("--data good.csv --out old-run", ("old-run", "already exists", "--resume", "--overwrite", "--out")),
        ("--data good.csv --batch-size 4 --warmup 100", ("warmup is 100 steps", "training has")),
        ("--data good.csv --model ViT-B-17 --pretrained openai", ("'ViT-B-17'", "Did you mean ViT-B-16")),
        ("", ("data.path is empty", "--data")),
    ],
)
def test_data_model_and_folder(arguments, words, project, tiny_folder, capsys):
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    assert main(["train", "finetune", "--batch-size", "4", "--workers", "0", *model, *arguments.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len([line for line in printed if line.startswith("error: ")]) == 1
    assert "Traceback" not in "".join(printed)
    assert [word for word in words if word not in printed[-1]] == []


def test_all_problems_together(project, capsys):
    assert main(["train", "finetune", "--config", "my.yaml", "--lr", "x", "--epochs", "-1"]) == 2
    assert capsys.readouterr().err == (
        "error: 3 problems in the settings:\n"
        "  - my.yaml:3: unknown key 'optim.wd'. ftfast calls this 'optim.weight_decay' (open_clip's --wd).\n"
        "  - --lr must be a number, got 'x'.\n"
        "  - train.epochs is -1.0 and train.max_steps is 0, so nothing would be trained. Set one of them. "
        "(train.epochs from flag --epochs)\n"
    )


def test_unknown_recipe(capsys):
    assert main(["train", "infusion", "--data", "x"]) == 2
    assert "recipe 'infusion' does not exist. Did you mean 'infusing'?" in capsys.readouterr().err


def test_print_config_shows_origins(project, capsys):
    assert main(["train", "infusing", "--data", "good.csv", "--lr", "3e-6", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = {line.split("#")[0].strip(): line.split("#")[-1].strip() for line in printed.out.splitlines()}
    assert lines["lr: 3.0e-06"] == "flag --lr"
    assert lines["recipe: infusing"] == "flag --recipe"
    assert lines["lock_text: true"] == "recipe infusing"
    assert lines["path: good.csv"] == "flag --data"

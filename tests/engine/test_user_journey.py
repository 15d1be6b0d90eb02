"""What a user does with a CSV of images and class names, by the documented commands, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftfast.cli import main

FAST = [
    *("--max-steps", "4", "--batch-size", "8", "--workers", "0", "--lr", "1e-3"),
    *("--generic", "{table}", "--log.every-steps", "2", "--eval.alphas", "0", "1"),
]


@pytest.fixture
def suites(class_table: Path, tmp_path: Path) -> Path:
    """A file of evaluation suites on the same images (the built-in controls are slower)."""
    file = tmp_path / "suites.yaml"
    file.write_text(
        "eval:\n  suites:\n"
        f"  - {{name: kinds, task: image_retrieval, role: target, data: {{path: {class_table}, split: val}}}}\n"
        f"  - {{name: names, task: zero_shot, role: control, data: {{path: {class_table}}}}}\n"
    )
    return file


def run(*words: object) -> int:
    """Call the command line in this process."""
    return main([str(word) for word in words])


def flags(class_table: Path, tiny_folder: Path, out: Path) -> list[str]:
    """Flags of a short run."""
    fast = [word.format(table=class_table) for word in FAST]
    return ["--data", str(class_table), "--model", f"local-dir:{tiny_folder}", "--out", str(out), *fast]


def test_train_resume_eval_merge_export(
    class_table: Path, tiny_folder: Path, suites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "infusing", "--config", suites, *flags(class_table, tiny_folder, out)]
    assert run(*command, "--dry-run") == 0
    assert "would write to" in capsys.readouterr().err
    assert not out.exists()
    assert run(*command) == 0
    table = capsys.readouterr().err
    assert "target: kinds mAP@20" in table
    assert "control: names top-1" in table
    assert run("train", "--resume", out) == 0  # a finished run is measured again, not trained again
    assert run("eval", out, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert json.dumps(measured).count("map_at_20") >= 1
    assert run("merge", tiny_folder, out / "final", "--alpha", "0.5", "--out", tmp_path / "merged") == 0
    assert any(tmp_path.glob("merged/**/open_clip_model.safetensors"))
    assert run("export", out, "--to", "state-dict", "--out", tmp_path / "weights.safetensors") == 0
    assert (tmp_path / "weights.safetensors").is_file()
    assert run("export", out, "--to", "open-clip", "--out", tmp_path / "exported") == 0
    code = f"import open_clip; open_clip.create_model_and_transforms('local-dir:{tmp_path / 'exported'}')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with exit code 2; return its one sentence."""
    capsys.readouterr()
    assert run(*words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in err if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err[-1] == errors[0]
    return errors[0].removeprefix("error: ")


def copy_table(class_table: Path, tmp_path: Path, change: str, to: str) -> Path:
    """Copy the table beside links to its images, with one change."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "img").symlink_to(class_table.parent / "img")
    target = folder / "images.csv"
    target.write_text(class_table.read_text().replace(change, to))
    return target


def test_eight_situations_eight_sentences(
    class_table: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    base = flags(class_table, tiny_folder, out)
    train = ["train", "infusing"]

    settings = tmp_path / "my.yaml"
    settings.write_text("optim:\n  learning_rte: 1.0e-3\n")
    message = failing(capsys, *train, "--config", settings, *base)
    assert message.startswith(f"{settings}:2: unknown key 'optim.learning_rte'")

    message = failing(capsys, *train, *base, "--data.label-column", "colour")
    assert message.startswith(
        "images.csv: no column 'colour'. Columns found: 'image', 'label', 'caption' (separator ',')"
    )

    message = failing(capsys, *train, *base, "--data", tmp_path / "nowhere.csv")
    assert message.startswith(f"{tmp_path / 'nowhere.csv'}: no such file. Check data.path.")

    folders = tmp_path / "folders"
    for name in ("cat", "dog"):
        shutil.copytree(class_table.parent / "img", folders / name)
    (folders / "emu").mkdir()
    message = failing(capsys, *train, *base, "--data", folders)
    assert "emu" in message
    assert "no images" in message

    lonely = copy_table(class_table, tmp_path, "img/000.png,kind 0", "img/000.png,hermit")
    message = failing(capsys, *train, *base, "--data", lonely)
    assert "'hermit'" in message
    assert "1 image" in message

    message = failing(capsys, *train, *base, "--train.global-batch-size", "100")
    assert "100" in message
    assert "= 8" in message

    message = failing(capsys, *train, *base, "--warmup", "10000")
    assert message.startswith("optim.warmup is 10000 steps but training has 4")

    out.mkdir()
    (out / "config.yaml").write_text("recipe: infusing\n")
    message = failing(capsys, *train, *base)
    assert message == (
        f"output folder {out} already exists. Continue it with --resume, replace it with --overwrite, "
        "or choose another --out."
    )
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml"]

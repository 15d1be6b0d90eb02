"""eval, merge, export, recipes and doctor on a tiny model and a table of images."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftfast.cli import main
from ftfast.cli.merge_command import parse_alphas
from ftfast.cli.weights import model_settings
from ftfast.config.schema import ModelConfig
from ftfast.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def suite_file(class_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suites") / "my_eval.yaml"
    file.write_text(
        f"- {{name: kinds, task: zero_shot, role: control, data: {class_table}}}\n"
        f"- {{name: alike, task: image_retrieval, role: target, metric: recall_at_1, data: {class_table}}}\n"
    )
    return file


@pytest.fixture(scope="module")
def other_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "moved-clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text((tiny_folder / "open_clip_config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    state = load_file(tiny_folder / "open_clip_model.safetensors")
    moved = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) * value.std(correction=0)
        if value.is_floating_point() and value.dim() > 1
        else value
        for name, value in state.items()
    }
    save_file(moved, folder / "open_clip_model.safetensors")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_eval_prints_and_writes_the_same_numbers(tiny_folder, suite_file, tmp_path, capsys):
    common = ("eval", tiny_folder, "--suite", suite_file, "--workers", "0", "--device", "cpu")
    code, out, err = run(capsys, *common, "--json", "--out", tmp_path / "results")
    measured = json.loads(out)["suites"]
    assert code == 0
    assert set(measured) == {"kinds", "alike"}
    assert err.startswith("kinds: 60 images")
    records = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {record["dataset"]: record["metrics"] for record in records} == measured
    code, out, _ = run(capsys, *common)
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()[1:-1]]
    assert ["kinds", "control", "top-1*", f"{100 * measured['kinds']['acc1']:.2f}"] in rows
    assert ["alike", "target", "R@1*", f"{100 * measured['alike']['recall_at_1']:.2f}"] in rows


def test_eval_of_a_run_uses_its_weights_and_suites(tiny_folder, suite_file, tmp_path, capsys):
    run_folder = tmp_path / "run"
    (run_folder / "final").mkdir(parents=True)
    for file in tiny_folder.iterdir():
        (run_folder / "final" / file.name).write_bytes(file.read_bytes())
    suites = "".join(f"    {line}\n" for line in suite_file.read_text().splitlines())
    (run_folder / "config.yaml").write_text(f"seed: 3\neval:\n  suites:\n{suites}")
    assert run(capsys, "eval", run_folder, "--json", "--workers", "0")[0] == 0
    (run_folder / "config.yaml").write_text("seed: 3\n")
    code, _, err = run(capsys, "eval", run_folder)
    assert (code, err) == (
        2,
        f"error: {run_folder}/config.yaml: no suites. Write a list of '- name: ..., task: ..., data: ...'.\n",
    )


def test_merge_measures_and_writes_the_best(tiny_folder, other_folder, suite_file, tmp_path, capsys):
    out = tmp_path / "merged"
    words = ("--alpha", "0:1:0.5", "--suite", suite_file, "--workers", "0", "--device", "cpu")
    code, text, _ = run(capsys, "merge", tiny_folder, other_folder, *words, "--json", "--out", out)
    result = json.loads(text)
    assert code == 0
    assert [point["alpha"] for point in result["points"]] == [0.0, 0.5, 1.0]
    ends = [json.loads(run(capsys, "eval", f, *words[2:], "--json")[1])["suites"] for f in (tiny_folder, other_folder)]
    assert [result["points"][0]["suites"], result["points"][-1]["suites"]] == ends
    start, end = (load_file(f / "open_clip_model.safetensors") for f in (tiny_folder, other_folder))
    written = load_file(out / "open_clip_model.safetensors")
    alpha = result["alpha"]
    for name, value in written.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - alpha) * start[name] + alpha * end[name])
    open_clip.create_model_and_transforms(f"local-dir:{out}")
    code, text, _ = run(capsys, "merge", tiny_folder, other_folder, *words)
    assert text.splitlines()[0].split() == ["alpha", "kinds", "top-1", "alike", "R@1"]
    assert [line.split()[0] for line in text.splitlines()[1:] if line.endswith("best")] == [f"{alpha:.2f}"]


def test_merge_of_one_alpha_needs_no_suite(tiny_folder, other_folder, tmp_path, capsys):
    out = tmp_path / "half"
    code, text, _ = run(capsys, "merge", tiny_folder, other_folder, "--alpha", "0.25", "--out", out)
    assert (code, text) == (0, f"wrote alpha 0.25 to {out}\n")
    assert "0.25" in (out / "README.md").read_text()
    code, _, err = run(capsys, "merge", tiny_folder, other_folder, "--alpha", "0.25", "--out", out)
    assert code == 2
    assert err == f"error: --out {out} already exists. Replace it with --overwrite or choose another --out.\n"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0.5", (0.5,)),
        ("0,1", (0.0, 1.0)),
        ("0:1:0.1", tuple(round(0.1 * n, 10) for n in range(11))),
        ("0:1:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("1:1:1", (1.0,)),
    ],
)
def test_alphas(text, points):
    assert parse_alphas(text) == points


@pytest.mark.parametrize(
    "text", ["", "x", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "-1", "1.5", "nan", "0:1:1e-9", "0,,1", "inf:1:1"]
)
def test_wrong_alphas(text):
    with pytest.raises(ConfigError) as caught:
        parse_alphas(text)
    assert caught.value.problems == (
        f"--alpha is '{text}'. Give numbers between 0 and 1: one (0.5), a list (0,0.5,1) or a range (0:1:0.1).",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "a", "b"], "ftfast merge needs --suite to measure the points, --out to write weights, or both."),
        (
            ["merge", "a", "b", "--out", "x"],
            "--alpha has 11 points, but no --suite says which is best. Add --suite FILE or give one alpha.",
        ),
        (["merge", "a"], "ftfast merge needs END: weights at alpha 1, of the same architecture."),
        (["eval", "a/b", "--suite", "none.yaml"], "--suite: there is no file 'none.yaml'."),
        (["eval", "a"], "--suite is missing: name a YAML file of suites. See docs/config.md, section 'eval.suites'."),
        (["export", "a/b", "--out", "x"], "there is no run, folder or weights file 'a/b'."),
        (["export", "a"], "ftfast export needs --out: folder, or file for state-dict."),
        (
            ["export", "a", "--to", "state-dict", "--out", "x"],
            "--out is 'x', but a state dict is one file: end it in .safetensors or .pt.",
        ),
        (["export", "a", "--to", "onnx", "--out", "x"], "--to must be one of open-clip, hf, state-dict; got 'onnx'."),
        (["recipes", "explain"], "ftfast recipes does not know 'explain'. Use: ftfast recipes [show NAME]."),
        (["recipes", "show"], "ftfast recipes show needs a name, for example: ftfast recipes show infusing."),
        (["demo", "--seeds", "a"], "--seeds is 'a'. Give whole numbers separated by commas: 0,1,2."),
        (["doctor", "--selftest"], "unknown flag '--selftest'. Did you mean '--self-test'?"),
    ],
)
def test_wrong_use(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *words) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suites: 3", "'suites' must be a block of settings, got '3'."),
        ("- {name: a}", "'suites[0]' lacks 'task'."),
        (
            "- {name: a, task: zero_shoot, data: x}",
            "'suites[0].task' must be one of zero_shot, image_text_retrieval, "
            "image_retrieval; got 'zero_shoot'. Did you mean 'zero_shot'?",
        ),
        ("words", "expected a list of suites, got 'words'."),
    ],
)
def test_wrong_suite_files(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    code, _, err = run(capsys, "eval", "a", "--suite", "s.yaml")
    assert code == 2
    assert err.endswith(f"s.yaml:1: {message}\n")


def test_what_a_model_argument_means(tiny_folder, tmp_path):
    weights = tiny_folder / "open_clip_model.safetensors"
    assert model_settings(str(tiny_folder)) == ModelConfig(name=f"local-dir:{tiny_folder}")
    assert model_settings(f"local-dir:{tiny_folder}") == ModelConfig(name=f"local-dir:{tiny_folder}")
    assert model_settings(str(weights)) == ModelConfig(name=f"local-dir:{tiny_folder}")
    assert model_settings(str(weights), "RN50") == ModelConfig(name="RN50", pretrained=str(weights))
    assert model_settings("ViT-B-16", "", "openai") == ModelConfig(name="ViT-B-16", pretrained="openai")
    assert model_settings("hf-hub:a/b").name == "hf-hub:a/b"
    (tmp_path / "bare.pt").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ModelError) as caught:
        model_settings(str(tmp_path / "bare.pt"))
    assert str(caught.value) == (
        f"{tmp_path}/bare.pt holds weights only. Say which architecture with --model, e.g. --model ViT-B-16."
    )
    with pytest.raises(ModelError) as caught:
        model_settings(str(tmp_path))
    assert str(caught.value) == (
        f"run {tmp_path} has no final weights, so it did not finish. Continue it: ftfast train --resume {tmp_path}"
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_export_state_dict(name, tiny_folder, tmp_path, capsys):
    out = tmp_path / "sub" / name
    code, text, _ = run(capsys, "export", tiny_folder, "--to", "state-dict", "--out", out, "--half")
    assert code == 0
    assert text.startswith(f"wrote {out}\n")
    read = load_file(out) if name.endswith("safetensors") else torch.load(out, weights_only=True)
    truth = load_file(tiny_folder / "open_clip_model.safetensors")
    assert set(read) >= set(truth)
    for key, value in truth.items():
        assert torch.equal(read[key], value.half() if value.is_floating_point() else value)
    assert sorted(path.name for path in out.parent.iterdir()) == [name]


def test_export_open_clip(tiny_folder, tmp_path, capsys):
    out = tmp_path / "folder"
    assert run(capsys, "export", tiny_folder, "--out", out, "--json")[0] == 0
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    truth = load_file(tiny_folder / "open_clip_model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in truth.items())
    code, _, err = run(capsys, "export", tiny_folder, "--out", out)
    assert (code, err) == (
        2,
        f"error: --out {out} already exists. Replace it with --overwrite or choose another --out.\n",
    )


def test_recipes_are_listed_and_explained(capsys):
    code, text, _ = run(capsys, "recipes", "--json")
    names = list(json.loads(text))
    assert code == 0
    assert "infusing" in names
    listing = run(capsys, "recipes")[1].splitlines()
    assert [line.split()[0] for line in listing[1:]] == names
    for name in names:
        code, text, _ = run(capsys, "recipes", "show", name)
        assert code == 0
        assert text.startswith(f"{name}: ")
        assert text.splitlines()[-1] == f"Try it: ftfast train {name} --data TABLE_OR_FOLDER --dry-run"
    shown = json.loads(run(capsys, "recipes", "show", "infusing", "--json")[1])
    assert shown["options"]["embedding_weight"]["default"] == 1000.0
    assert shown["preset"]["model"]["lock_text"] is True


def test_doctor_agrees_with_its_references(capsys):
    begin = time.process_time()
    code, text, _ = run(capsys, "doctor", "--self-test", "--json")
    assert time.process_time() - begin < 30
    report = json.loads(text)
    assert code == 0
    names = {check["name"] for check in report["self_test"]}
    assert {row["operation"] for row in report["operations"] if row["operation"] != "search.topk"} < names
    assert {"search.topk cosine", "search.topk ip", "search.topk l2"} < names
    assert all(check["passed"] for check in report["self_test"])
    plain = run(capsys, "doctor")[1]
    assert plain.startswith("ftfast ")
    assert "pip install 'ftfast[" in plain or all(row["version"] for row in report["optional"])


def test_doctor_notices_a_wrong_kernel(monkeypatch, capsys):
    from ftfast import kernels

    true = kernels.clip_loss
    monkeypatch.setattr(kernels, "clip_loss", lambda *a, **k: true(*a, **k) * 1.001)
    monkeypatch.setattr(kernels, "siglip_loss", lambda *a, **k: 1 / 0)
    code, text, _ = run(capsys, "doctor", "--self-test")
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines() if " float32 " in line]
    verdicts = {row[0]: row[-1] for row in rows}
    assert code == 1
    assert verdicts.pop("clip_loss") == "WRONG"
    assert verdicts.pop("siglip_loss") == "ZeroDivisionError: division by zero"
    assert set(verdicts.values()) == {"ok"}
    assert "self-test: 2 of 13 failed" in text


def test_search_finds_the_picture_itself(tiny_folder, class_table, tmp_path, capsys):
    index = tmp_path / "index"
    common = ("search", "build", class_table, "--model", tiny_folder, "--out", index, "--workers", "0")
    code, text, _ = run(capsys, *common)
    assert (code, text) == (0, f'wrote 60 images to {index}\nftfast search query {index} --text "..."\n')
    code, _, err = run(capsys, *common)
    assert (code, err) == (
        2,
        f"error: --out {index} already exists. Replace it with --overwrite or choose another --out.\n",
    )
    picture = class_table.parent / "img" / "007.png"
    code, text, err = run(
        capsys, "search", "query", index, "--image", picture, "--text", "a kind", "--k", "2", "--json"
    )
    hits = json.loads(text)["hits"]
    assert code == 0
    assert [(hit["query"], hit["rank"]) for hit in hits] == [
        ("a kind", 1),
        ("a kind", 2),
        (str(picture), 1),
        (str(picture), 2),
    ]
    assert (hits[2]["image"], hits[2]["name"]) == (7, "thing number 7")
    assert hits[2]["score"] == pytest.approx(1, abs=1e-5)
    code, text, err = run(capsys, "search", "query", index, "--image", picture, "--k", "1", "--out", tmp_path / "sheet")
    assert text.splitlines()[1].split() == [str(picture), "1", "1.0000", "7", "thing", "number", "7"]
    assert err == f"wrote {tmp_path}/sheet.html and {tmp_path}/sheet.png\n"
    assert (tmp_path / "sheet.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "find"], "ftfast search does not know 'find'. Use: ftfast search build or ftfast search query."),
        (["search", "query", "x"], "ftfast search query needs --text WORDS or --image FILE."),
        (["search", "query", "x", "--text", "a", "--k", "0"], "--k is 0 but must be 1 or more."),
        (["search", "build", "x"], "ftfast search build needs --out: folder to write."),
    ],
)
def test_wrong_search(words, message, capsys):
    assert run(capsys, *words) == (2, "", f"error: {message}\n")

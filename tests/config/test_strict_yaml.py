"""Every message about a configuration file, compared whole."""

from __future__ import annotations

import pytest

from ftfast.config.aliases import ALIASES
from ftfast.config.resolve import resolve
from ftfast.config.schema import DataConfig, SuiteConfig, TrainConfig
from ftfast.config.settings import flatten, index_of
from ftfast.errors import ConfigError


def problems_of(tmp_path, monkeypatch, text: str | bytes) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, ["my.yaml"])
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optim:\n  wd: 1",
            "my.yaml:2: unknown key 'optim.wd'. ftfast calls this 'optim.weight_decay' (open_clip's --wd).",
        ),
        (
            "train-data: x",
            "my.yaml:1: unknown key 'train-data'. ftfast calls this 'data.path' (open_clip's --train-data).",
        ),
        (
            "per_device_train_batch_size: 8",
            "my.yaml:1: unknown key 'per_device_train_batch_size'. ftfast calls this 'train.batch_size' "
            "(HF Trainer's per_device_train_batch_size).",
        ),
        (
            "bf16: true",
            "my.yaml:1: unknown key 'bf16'. ftfast calls this 'train.precision' (HF Trainer's and "
            "DeepSpeed's bf16): train.precision: amp_bf16.",
        ),
        ("lr: 1", "my.yaml:1: unknown key 'lr'. Did you mean 'optim.lr'?"),
        ("warmup: 1", "my.yaml:1: unknown key 'warmup'. Did you mean 'optim.warmup'?"),
        (
            "optim:\n  lerning_rate: 1",
            "my.yaml:2: unknown key 'optim.lerning_rate'. ftfast calls this 'optim.lr' (HF Trainer's learning_rate).",
        ),
        ("optm: {}", "my.yaml:1: unknown key 'optm'. Did you mean 'optim'?"),
        (
            "checkpoint:\n  zzz: 1",
            "my.yaml:2: unknown key 'checkpoint.zzz'. Known keys in 'checkpoint': every_steps, keep_last.",
        ),
        ("options: {x: 1}", "my.yaml:1: unknown key 'options'. This recipe has no options."),
        (
            "1: 2",
            "my.yaml:1: unknown key '1'. Known keys: recipe, out, seed, model, data, generic, optim, train, "
            "deepspeed, checkpoint, eval, log.",
        ),
        ("seed: 1.5", "my.yaml:1: 'seed' must be a whole number, got '1.5'."),
        ("seed: true", "my.yaml:1: 'seed' must be a whole number, got 'true'."),
        ("seed:", "my.yaml:1: 'seed' must be a whole number, got nothing."),
        ("seed: [1]", "my.yaml:1: 'seed' must be a whole number, got a list."),
        ("optim: {lr: '1e-5'}", "my.yaml:1: 'optim.lr' must be a number, got the text '1e-5'."),
        ("optim: {lr: .nan}", "my.yaml:1: 'optim.lr' must be a number, got '.nan'."),
        ("optim: {lr: 1e999}", "my.yaml:1: 'optim.lr' must be a number, got '1e999'."),
        ("model: {lock_image: 2}", "my.yaml:1: 'model.lock_image' must be true or false, got '2'."),
        ("out:", "my.yaml:1: 'out' has no value. Give one or remove the line."),
        ("out: {a: b}", "my.yaml:1: 'out' must be text, got a block of settings."),
        ("optim: 3", "my.yaml:1: 'optim' must be a block of settings, got '3'."),
        ("optim: [3]", "my.yaml:1: 'optim' must be a block of settings, got a list."),
        (
            "train: {precision: half}",
            "my.yaml:1: 'train.precision' must be one of fp32, amp_bf16, amp_fp16, pure_bf16, pure_fp16; got 'half'.",
        ),
        ("train: {precision: [fp32]}", "my.yaml:1: 'train.precision' must be one word, got a list."),
        (
            "optim: {schedule: cosin}",
            "my.yaml:1: 'optim.schedule' must be one of cosine, constant; got 'cosin'. Did you mean 'cosine'?",
        ),
        ("eval: {alphas: [0, x]}", "my.yaml:1: 'eval.alphas[1]' must be a number, got 'x'."),
        ("seed: 1\nout: x\nseed: 2", "my.yaml:3: 'seed' is given twice (first on line 1). Keep one of them."),
        ("eval:\n  suites:\n  - {task: zero_shot}", "my.yaml:3: 'eval.suites[0]' lacks 'name'."),
        ("eval: {suites: [{}]}", "my.yaml:1: 'eval.suites[0]' lacks 'name' and 'task'."),
        ("eval: {suites: [x]}", "my.yaml:1: 'eval.suites[0]' must be a block of settings, got 'x'."),
        (
            "eval:\n  suites:\n  - {name: a, task: zero_shot, data: {pth: x}}",
            "my.yaml:3: unknown key 'eval.suites[0].data.pth'. Did you mean 'data.path'?",
        ),
        ("a: [", "my.yaml:1: not valid YAML: expected the node content, but found '<stream end>'."),
        ("a: b: c", "my.yaml:1: not valid YAML: mapping values are not allowed here."),
        ("--- {}\n--- {}", "my.yaml:2: not valid YAML: but found another document."),
        ("- x", "my.yaml:1: expected settings as 'key: value' lines, got a list."),
        ("just words", "my.yaml:1: expected settings as 'key: value' lines, got 'just words'."),
        (b"\xff\xfe\xff", "my.yaml: not a UTF-8 text file."),
        ("a: \x00", "my.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed."),
        ("a: " + "[" * 1000, "my.yaml: nested too deeply."),
        (
            "a: &a [*a]",
            "my.yaml:1: unknown key 'a'. Known keys: recipe, out, seed, model, data, generic, optim, train, "
            "deepspeed, checkpoint, eval, log.",
        ),
        ("seed: &a [*a]", "my.yaml:1: 'seed' must be a whole number, got a list."),
        (
            "? [a, b]\n: 1",
            "my.yaml:1: unknown key '?'. Known keys: recipe, out, seed, model, data, generic, optim, train, "
            "deepspeed, checkpoint, eval, log.",
        ),
    ],
)
def test_message(text, message, tmp_path, monkeypatch):
    assert problems_of(tmp_path, monkeypatch, text) == (message,)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("data: x.csv", "data.path", "x.csv"),
        ("generic: 2024", "generic.path", "2024"),
        ("model: ViT-B-16", "model.name", "ViT-B-16"),
        ("model:", "model.name", "tiny-clip-v1"),
        ("optim: {lr: 1e-5}", "optim.lr", 1e-5),
        ("optim: {lr: 3}", "optim.lr", 3.0),
        ("optim: {image_lr: null}", "optim.image_lr", None),
        ("data: {label_column: no}", "data.label_column", "no"),
        ("data: {label_column: null_col}", "data.label_column", "null_col"),
        ("data: {separator: '|'}", "data.separator", "|"),
        ("data: {templates: 'a {}'}", "data.templates", ("a {}",)),
        ("eval: {alphas: []}", "eval.alphas", ()),
        ("eval: {alphas: }", "eval.alphas", ()),
        ("model: {lock_image: yes}", "model.lock_image", True),
        ("data: {templates: ['é {}']}", "data.templates", ("é {}",)),
        ("data: &d {path: x, split_seed: 1}\ngeneric:\n  <<: *d\n  path: y", "generic.path", "y"),
        ("data: &d {path: x, split_seed: 1}\ngeneric:\n  <<: *d\n  path: y", "generic.split_seed", 1),
        (
            "data: &a {path: x, split_seed: 1}\ngeneric: &b\n  <<: [{split_seed: 2}, *a]\n  val_fraction: 0.5\n"
            "eval: {suites: [{name: n, task: zero_shot, data: {<<: *b, path: y}}]}",
            "eval.suites",
            (SuiteConfig(name="n", task="zero_shot", data=DataConfig(path="y", split_seed=2, val_fraction=0.5)),),
        ),
        ("data: &a\n  <<: {<<: *a}\n  path: x", "data.path", "x"),
        ("", "seed", 0),
        ("# nothing\n", "seed", 0),
    ],
)
def test_accepted(text, path, value, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(text, encoding="utf-8")
    read = flatten(resolve(None, {}, [str(file)]).config)[path]
    assert read == value
    assert type(read) is type(value)


def test_missing_files_and_folders(tmp_path):
    for file, message in (
        (str(tmp_path / "none.yaml"), f"--config: there is no file '{tmp_path / 'none.yaml'}'."),
        (str(tmp_path), f"--config: '{tmp_path}' is a folder, not a YAML file."),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(None, {}, [file])
        assert caught.value.problems == (message,)


def test_every_alias_points_to_a_setting_and_shadows_none():
    known = index_of(TrainConfig).settings
    for word, alias in ALIASES.items():
        assert alias.target in known, word
        assert word not in known, word

"""Merging of layers, origins, round trip, and the arguments of a training command line."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ftfast.config.resolve import find_recipe, resolve, split_arguments, to_yaml, with_origins
from ftfast.config.schema import DataConfig, SuiteConfig, TrainConfig
from ftfast.config.settings import build, flatten, index_of, optional_inner
from ftfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a made-up recipe."""

    weight: float = 0.5
    """Weight of a term."""
    mode: typing.Literal["joint", "round_robin"] = "joint"
    """Order."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight} but must be 0 or more.")


LAYERS = ("preset", "first.yaml", "second.yaml", "flag")


@pytest.mark.parametrize("present", [c for n in range(5) for c in itertools.combinations(LAYERS, n)], ids="+".join)
def test_later_layers_win_and_origins_say_which(present, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = {name: 0.1 * (position + 1) for position, name in enumerate(LAYERS)}
    for name in ("first.yaml", "second.yaml"):
        (tmp_path / name).write_text(f"# comment\noptim:\n  lr: {value[name]}\n" if name in present else "")
    resolved = resolve(
        None,
        {"recipe": "finetune", "optim": {"lr": value["preset"]}} if "preset" in present else {},
        ["first.yaml", "second.yaml"],
        ["--lr", str(value["flag"])] if "flag" in present else [],
    )
    origin = {
        "preset": "recipe infusing",
        "first.yaml": "first.yaml:3",
        "second.yaml": "second.yaml:3",
        "flag": "flag --lr",
    }
    winner = present[-1] if present else None
    assert resolved.config.optim.lr == (value[winner] if winner else 1e-5)
    assert resolved.origins["optim.lr"] == (origin[winner] if winner else "default")
    assert resolved.origins["optim.beta1"] == "default"
    assert set(resolved.origins) == set(index_of(TrainConfig).settings)


def test_all_problems_of_all_layers_come_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("optim:\n  wd: 0.1\n  lr: many\nlr: 3\n")
    (tmp_path / "b.yaml").write_text("train: {precision: bf16, batch_size: '3'}\nseed: -1\n")
    with pytest.raises(ConfigError) as caught:
        resolve(None, {"optim": {"lrr": 1}}, ["a.yaml", "b.yaml", "c.yaml"], ["--wd", "1", "--epochs", "x"])
    assert caught.value.problems == (
        "recipe infusing: unknown key 'optim.lrr'. Did you mean 'optim.lr'?",
        "a.yaml:2: unknown key 'optim.wd'. ftfast calls this 'optim.weight_decay' (open_clip's --wd).",
        "a.yaml:3: 'optim.lr' must be a number, got 'many'.",
        "a.yaml:4: unknown key 'lr'. Did you mean 'optim.lr'?",
        "b.yaml:1: 'train.precision' must be one of fp32, amp_bf16, amp_fp16, pure_bf16, pure_fp16; got 'bf16'. "
        "Did you mean 'amp_bf16'?",
        "b.yaml:1: 'train.batch_size' must be a whole number, got the text '3'.",
        "--config: there is no file 'c.yaml'.",
        "unknown flag '--wd'. ftfast calls this '--optim.weight-decay' (open_clip's --wd).",
        "--epochs must be a number, got 'x'.",
        "seed is -1 but must be between 0 and 4294967295. (seed from b.yaml:2)",
    )
    assert caught.value.exit_code == 2


def test_no_cross_field_problem_about_a_value_that_could_not_be_read():
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], ["--train.global-batch-size", "64", "--batch-size", "x"])
    assert caught.value.problems == ("--batch-size must be a whole number, got 'x'.",)


def test_recipe_options_are_a_block_with_their_own_flags():
    resolved = resolve(Options, {"options": {"weight": 2}}, [], ["--options.mode", "round_robin"])
    assert resolved.config.options == Options(weight=2.0, mode="round_robin")
    assert resolved.origins["options.weight"] == "recipe infusing"
    assert resolved.origins["options.mode"] == "flag --options.mode"
    assert resolve(Options, {}).config.options == Options()
    assert resolve(None, {}).config.options is None


@pytest.mark.parametrize(
    ("options_type", "argv", "message"),
    [
        (Options, ["--options.weight", "-1"], "options: weight is -1.0 but must be 0 or more."),
        (Options, ["--options.wieght", "1"], "unknown flag '--options.wieght'. Did you mean '--options.weight'?"),
        (None, ["--options.weight", "1"], "unknown flag '--options.weight'. This recipe has no options."),
    ],
)
def test_problems_of_options(options_type, argv, message):
    with pytest.raises(ConfigError) as caught:
        resolve(options_type, {}, [], argv)
    assert caught.value.problems == (message,)


def test_world_size_comes_from_the_launcher(monkeypatch):
    argv = ["--train.global-batch-size", "64", "--batch-size", "32"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve(None, {}, [], argv).config.train.global_batch_size == 64
    monkeypatch.delenv("WORLD_SIZE")
    assert resolve(None, {}, [], argv, world_size=2).config.train.global_batch_size == 64
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], argv)
    assert caught.value.problems == (
        "train.global_batch_size is 64, but batch_size 32 × accum_freq 1 × 1 process = 32. Remove it or change one of "
        "the others. (train.global_batch_size from flag --train.global-batch-size, train.batch_size from flag "
        "--batch-size)",
    )


@functools.cache
def _values(annotation: typing.Any) -> st.SearchStrategy:
    """Any value of a field's type, without regard to what makes sense."""
    inner, optional = optional_inner(annotation)
    if optional:
        return st.none() | _values(inner)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    if origin is tuple:
        return st.lists(_values(typing.get_args(annotation)[0]), max_size=2).map(tuple)
    if dataclasses.is_dataclass(annotation):
        leaves = {path: _values(leaf.type) for path, leaf in index_of(annotation).settings.items()}
        return st.fixed_dictionaries(leaves).map(lambda values: build(annotation, values))
    return {
        str: st.text(max_size=12)
        | st.sampled_from(["1e-5", "no", "null", "~", "", "#x", "a: b", "{}", "é\n ö", "- 1", "\x85x", "\u2028"]),
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }[annotation]


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_what_to_yaml_writes_reads_back_equal(data):
    from ftfast.config.yaml_io import Reader, Source, yaml

    leaves = index_of(TrainConfig, Options).settings
    some = data.draw(st.sets(st.sampled_from(sorted(leaves)), min_size=5, max_size=12))
    values = {path: data.draw(_values(leaves[path].type), label=path) for path in sorted(some)}
    values["options.weight"] = 1.5
    config = build(TrainConfig, values, options_type=Options)
    reader = Reader()
    for text in (to_yaml(config), to_yaml(config, {})):
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        read = reader.read_block(root, index_of(TrainConfig, Options), Source("file", "config.yaml"))
        assert reader.problems == []
        assert build(TrainConfig, {path: value for path, (value, _) in read.items()}, options_type=Options) == config


def test_printed_configuration_is_a_valid_configuration_file(tmp_path):
    suite = "[{name: pairs, task: image_text_retrieval, role: target, data: p.csv, metric: mean_recall_at_5}]"
    first = resolve(Options, {}, [], ["--lr", "3e-6", "--eval.suites", suite, "--model.no-freeze-batch-norm"])
    (tmp_path / "config.yaml").write_text(with_origins(first))
    second = resolve(Options, {}, [str(tmp_path / "config.yaml")], [])
    assert second.config == first.config
    assert first.config.eval.suites == (
        SuiteConfig(
            name="pairs",
            task="image_text_retrieval",
            role="target",
            data=DataConfig(path="p.csv"),
            metric="mean_recall_at_5",
        ),
    )
    lines = {line.split("#")[0].strip(): line.split("#")[-1].strip() for line in with_origins(first).splitlines()}
    assert lines["lr: 3.0e-06"] == "flag --lr"
    assert lines["freeze_batch_norm: false"] == "flag --model.no-freeze-batch-norm"
    assert lines["suites:"] == "flag --eval.suites"
    assert lines["eps: 1.0e-08"] == "default"


def test_flatten_and_build_are_inverse():
    config = resolve(Options, {}, [], ["--data", "x.csv", "--options.weight", "3"]).config
    assert build(TrainConfig, flatten(config), options_type=Options) == config


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--optim.weight-decay", "0.1"], "optim.weight_decay", 0.1),
        (["--optim.weight_decay=1e-1"], "optim.weight_decay", 0.1),
        (["--data", "a b.csv"], "data.path", "a b.csv"),
        (["--generic", "x"], "generic.path", "x"),
        (["--model", "ViT-B-16"], "model.name", "ViT-B-16"),
        (["--pretrained", "openai"], "model.pretrained", "openai"),
        (["--data-image-col", "img"], "data.image_column", "img"),
        (["--data_text_col", "t"], "data.text_column", "t"),
        (["--data-label-col", "l"], "data.label_column", "l"),
        (["--model.lock-image"], "model.lock_image", True),
        (["--model.lock-image", "false"], "model.lock_image", False),
        (["--model.no-freeze-batch-norm"], "model.freeze_batch_norm", False),
        (["--optim.image-lr", "none"], "optim.image_lr", None),
        (["--optim.image-lr", "-0"], "optim.image_lr", 0.0),
        (["--eval.alphas", "0", "0.5", "1"], "eval.alphas", (0.0, 0.5, 1.0)),
        (["--eval.alphas", "[0, 1]"], "eval.alphas", (0.0, 1.0)),
        (["--eval.alphas"], "eval.alphas", ()),
        (["--data.templates", "a {}", "b {}"], "data.templates", ("a {}", "b {}")),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--data.separator=--"], "data.separator", "--"),
        (["--data.separator", ""], "data.separator", ""),
    ],
)
def test_forms_of_flags(argv, path, value):
    assert flatten(resolve(None, {}, [], argv).config)[path] == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "unknown flag '--lrr'. Did you mean '--lr'?"),
        (["--optim.beta3", "1"], "unknown flag '--optim.beta3'. Did you mean '--optim.beta2'?"),
        (
            ["--train-data", "x"],
            "unknown flag '--train-data'. ftfast calls this '--data.path' (open_clip's --train-data).",
        ),
        (["--qqq", "x"], "unknown flag '--qqq'. See: ftfast train --help-all."),
        (["--lr"], "--lr needs one value, got none."),
        (["--lr", "1", "2"], "--lr needs one value, got '1' '2'."),
        (["--lr", "nan"], "--lr must be a number, got 'nan'."),
        (["--lr", "inf"], "--lr must be a number, got 'inf'."),
        (["--model.lock-image", "perhaps"], "--model.lock-image must be true or false, got 'perhaps'."),
        (["--model.no-lock-image", "true"], "--model.no-lock-image takes no value, got 'true'."),
        (["--eval.suites", "[{"], "--eval.suites: '[{' is not valid YAML."),
        (["--eval.suites", "x"], "--eval.suites must be a block of settings, got 'x'."),
        (["pairs.csv"], "unexpected argument 'pairs.csv'. Settings are given as --name value."),
        (["--optim", "x"], "unknown flag '--optim'. It is a block of settings; set one of them, such as '--optim.lr'."),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], argv)
    assert caught.value.problems == (message,)


def test_split_arguments():
    got = split_arguments(
        [
            *("--recipe", "gift", "--config", "a.yaml", "-c", "b.yaml", "--config=c.yaml", "--dry_run"),
            *("--print-config", "--local_rank=3", "--lr", "1", "--overwrite", "--debug", "--json"),
        ]
    )
    assert dataclasses.asdict(got) == {
        "files": ("a.yaml", "b.yaml", "c.yaml"),
        "overrides": ("--recipe", "gift", "--lr", "1"),
        "resume": False,
        "overwrite": True,
        "dry_run": True,
        "print_config": True,
        "debug": True,
        "json": True,
        "help": "",
        "local_rank": 3,
    }
    assert split_arguments(["--local_rank", "2", "--local-rank=1"]).local_rank == 1


def test_resume_with_a_folder_means_its_configuration():
    got = split_arguments(["--config", "more.yaml", "--resume", "runs/a/"])
    assert (got.resume, got.files) == (True, ("runs/a/config.yaml", "more.yaml"))
    assert got.overrides == ("--out", "runs/a/")
    alone = split_arguments(["--resume", "--lr", "1"])
    assert (alone.resume, alone.files, alone.overrides) == (True, (), ("--lr", "1"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config"], "--config needs a YAML file after it."),
        (["--config", "--lr"], "--config needs a YAML file after it."),
        (["--local_rank", "x"], "--local_rank must be a whole number, got 'x'."),
    ],
)
def test_split_arguments_problems(argv, message):
    with pytest.raises(ConfigError) as caught:
        split_arguments(argv)
    assert str(caught.value) == message


def test_find_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("recipe: lwf\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    assert find_recipe([], []) == ("infusing", "default")
    assert find_recipe(["a.yaml", "broken.yaml", "none.yaml"], []) == ("lwf", "a.yaml:1")
    assert find_recipe(["a.yaml"], ["--lr", "1", "--recipe", "flyp"]) == ("flyp", "flag --recipe")

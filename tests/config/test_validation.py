"""Every problem between well-typed settings, its message compared whole; and that sound settings have none."""

from __future__ import annotations

import pytest

from ftfast.config.resolve import resolve
from ftfast.config.schema import TrainConfig
from ftfast.config.validation import validate
from ftfast.errors import ConfigError

SUITE = "{{name: {0}, task: zero_shot, data: x.csv{1}}}"


def test_defaults_are_sound():
    assert validate(TrainConfig()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr -1", "optim.lr is -1.0 but must be 0 or more. (optim.lr from flag --lr)"),
        (
            "--optim.image-lr -1",
            "optim.image_lr is -1.0 but must be 0 or more. (optim.image_lr from flag --optim.image-lr)",
        ),
        (
            "--optim.beta2 1",
            "optim.beta2 is 1.0 but must be at least 0 and below 1. (optim.beta2 from flag --optim.beta2)",
        ),
        ("--optim.eps 0", "optim.eps is 0.0 but must be above 0. (optim.eps from flag --optim.eps)"),
        (
            "--optim.ema-decay 1",
            "optim.ema_decay is 1.0 but must be at least 0 and below 1. (optim.ema_decay from flag --optim.ema-decay)",
        ),
        ("--batch-size 0", "train.batch_size is 0 but must be 1 or more. (train.batch_size from flag --batch-size)"),
        ("--workers -1", "train.workers is -1 but must be 0 or more. (train.workers from flag --workers)"),
        (
            "--checkpoint.keep-last 0",
            "checkpoint.keep_last is 0 but must be 1 or more. (checkpoint.keep_last from flag --checkpoint.keep-last)",
        ),
        (
            "--log.every-steps 0",
            "log.every_steps is 0 but must be 1 or more. (log.every_steps from flag --log.every-steps)",
        ),
        ("--seed 4294967296", "seed is 4294967296 but must be between 0 and 4294967295. (seed from flag --seed)"),
        (
            "--data.max-bad-fraction 2",
            "data.max_bad_fraction is 2.0 but must be between 0 and 1. (data.max_bad_fraction "
            "from flag --data.max-bad-fraction)",
        ),
        (
            "--data.min-images-per-class 0",
            "data.min_images_per_class is 0 but must be 1 or more. "
            "(data.min_images_per_class from flag --data.min-images-per-class)",
        ),
        ("--model=", "model.name is empty. Name a model, for example --model ViT-B-16. (model.name from flag --model)"),
        (
            "--model.lock-text-unlocked-layers 2",
            "model.lock_text_unlocked_layers is 2 but model.lock_text is false. "
            "Set model.lock_text: true or drop it. (model.lock_text_unlocked_layers from flag "
            "--model.lock-text-unlocked-layers)",
        ),
        (
            "--data.templates shoe",
            "data.templates has 'shoe' without '{}'. Write '{}' where the class name goes. "
            "(data.templates from flag --data.templates)",
        ),
        (
            "--data.templates",
            "data.templates is empty. Give at least one, such as 'a photo of a {}.'. (data.templates "
            "from flag --data.templates)",
        ),
        (
            "--data.split val --data.val-fraction 1",
            "data.val_fraction is 1.0 but must lie between 0 and 1 when data.split "
            "is 'val'. (data.val_fraction from flag --data.val-fraction)",
        ),
        (
            "--warmup 10000 --max-steps 312",
            "optim.warmup is 10000 steps but training has 312. Use optim.warmup: 0.1 (a "
            "fraction) or fewer steps. (optim.warmup from flag --warmup)",
        ),
        (
            "--warmup 1.5",
            "optim.warmup is 1.5: neither a fraction below 1 nor a whole number of steps. (optim.warmup from "
            "flag --warmup)",
        ),
        (
            "--epochs 0",
            "train.epochs is 0.0 and train.max_steps is 0, so nothing would be trained. Set one of them. "
            "(train.epochs from flag --epochs)",
        ),
        (
            "--train.global-batch-size 512 --batch-size 32 --accum-freq 4",
            "train.global_batch_size is 512, but batch_size 32 × accum_freq 4 × 2 processes = 256. Remove it or change "
            "one of the others. (train.global_batch_size from flag --train.global-batch-size, train.batch_size from "
            "flag --batch-size, train.accum_freq from flag --accum-freq)",
        ),
        (
            "--device cpu --precision amp_fp16",
            "train.precision is amp_fp16 but train.device is cpu. Use amp_bf16 or fp32 "
            "there. (train.precision from flag --precision, train.device from flag --device)",
        ),
        ("--device gpu", "train.device is 'gpu'. Use auto, cpu, cuda or cuda:0. (train.device from flag --device)"),
        (
            "--eval.alphas 0 1.5",
            "eval.alphas has 1.5, but 0 means the start weights and 1 the tuned ones. Keep it between "
            "them. (eval.alphas from flag --eval.alphas)",
        ),
    ],
)
def test_message(argv, message):
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], argv.split(), world_size=2)
    assert caught.value.problems == (message,)


@pytest.mark.parametrize(
    ("suites", "message"),
    [
        (
            [SUITE.format("a", ""), SUITE.format("a", "")],
            "eval.suites[1].name 'a' is used twice. Names tell suites apart in tables and logs.",
        ),
        (
            [SUITE.format("a/b", "")],
            "eval.suites[0].name is 'a/b'. Use a short name without slashes, tabs or line ends.",
        ),
        (["{name: a, task: zero_shot}"], "eval.suites[0].data.path is empty. Say which images 'a' measures."),
        (
            [SUITE.format("a", ", gallery: y.csv")],
            "eval.suites[0].gallery is set but the task is zero_shot. Only image_retrieval searches one.",
        ),
        (
            ["{name: a, task: zero_shot, data: {path: x, max_bad_fraction: -1}}"],
            "eval.suites[0].data.max_bad_fraction is -1.0 but must be between 0 and 1.",
        ),
    ],
)
def test_suite_messages(suites, message):
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], ["--eval.suites", f"[{', '.join(suites)}]"])
    assert caught.value.problems == (f"{message} (eval.suites from flag --eval.suites)",)


def test_selection_needs_a_suite_of_that_role():
    argv = ["--eval.validation", f"[{SUITE.format('a', '')}]", "--eval.selection"]
    assert resolve(None, {}, [], [*argv, "control"]).config.eval.selection == "control"
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [], [*argv, "target"])
    assert caught.value.problems == (
        "eval.selection is 'target' but no suite in eval.validation has role: target. Add one or use "
        "eval.selection: all. (eval.selection from flag --eval.selection, eval.validation from flag --eval.validation)",
    )


def test_warm_up_is_checked_against_the_true_length_once_known():
    config = resolve(None, {}, [], ["--warmup", "500"]).config
    assert validate(config) == []
    assert validate(config, total_steps=501) == []
    assert validate(config, total_steps=500) == [
        "optim.warmup is 500 steps but training has 500. Use optim.warmup: 0.1 (a fraction) or fewer steps."
    ]
    fraction = resolve(None, {}, [], ["--warmup", "0.5", "--max-steps", "1"]).config
    assert validate(fraction, total_steps=1) == []

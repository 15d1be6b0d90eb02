"""Problems between settings that each are well-formed: ranges, contradictions, lengths. Pure; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ftfast.config.schema import (
    DataConfig,
    DeepSpeedConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SuiteConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Problem:
    """One sentence, and the settings it is about."""

    text: str
    paths: tuple[str, ...]


def validate(
    config: TrainConfig,
    *,
    world_size: int = 1,
    total_steps: int | None = None,
    origins: Mapping[str, str] | None = None,
) -> list[str]:
    """Find contradictions in a configuration.

    Args:
        config: A well-typed configuration.
        world_size: Number of processes that will train.
        total_steps: Optimizer steps of the whole run, if known already.
        origins: Where each setting came from; named in the messages if given.

    Returns:
        One sentence per problem; empty if there is none.
    """
    problems = find_problems(config, world_size=world_size, total_steps=total_steps)
    return [problem.text + _sources(problem.paths, origins or {}) for problem in problems]


def find_problems(config: TrainConfig, *, world_size: int = 1, total_steps: int | None = None) -> list[Problem]:
    """Like :func:`validate`, with the settings each problem is about.

    Args:
        config: A well-typed configuration.
        world_size: Number of processes that will train.
        total_steps: Optimizer steps of the whole run, if known already.

    Returns:
        All problems, in the order of the schema.
    """
    return [
        *_model(config.model),
        *_data(config.data, "data"),
        *_data(config.generic, "generic"),
        *_optim(config.optim),
        *_warmup(config, total_steps),
        *_loop(config, world_size),
        *_deepspeed(config.deepspeed),
        *_ranges(_CHECKPOINT_AND_LOG, config),
        *_evaluation(config.eval),
        *_seed(config.seed),
    ]


def _sources(paths: tuple[str, ...], origins: Mapping[str, str]) -> str:
    named = [f"{path} from {origins[path]}" for path in paths if origins.get(path, "default") != "default"]
    return f" ({', '.join(named)})" if named else ""


_AT_LEAST_0, _AT_LEAST_1, _POSITIVE, _SHARE, _BELOW_1 = (
    "0 or more",
    "1 or more",
    "above 0",
    "between 0 and 1",
    "at least 0 and below 1",
)
_HOLDS = {
    _AT_LEAST_0: lambda value: value >= 0,
    _AT_LEAST_1: lambda value: value >= 1,
    _POSITIVE: lambda value: value > 0,
    _SHARE: lambda value: 0 <= value <= 1,
    _BELOW_1: lambda value: 0 <= value < 1,
}
_MODEL = {"lock_image_unlocked_groups": _AT_LEAST_0, "lock_text_unlocked_layers": _AT_LEAST_0}
_DATA = {
    "min_images_per_class": _AT_LEAST_1,
    "max_bad_fraction": _SHARE,
    "split_seed": _AT_LEAST_0,
    "shots": _AT_LEAST_0,
    "shots_seed": _AT_LEAST_0,
}
_OPTIM = {
    "lr": _AT_LEAST_0,
    "image_lr": _AT_LEAST_0,
    "text_lr": _AT_LEAST_0,
    "head_lr": _AT_LEAST_0,
    "beta1": _BELOW_1,
    "beta2": _BELOW_1,
    "eps": _POSITIVE,
    "weight_decay": _AT_LEAST_0,
    "warmup": _AT_LEAST_0,
    "grad_clip_norm": _AT_LEAST_0,
    "ema_decay": _BELOW_1,
}
_LOOP = {
    "max_steps": _AT_LEAST_0,
    "batch_size": _AT_LEAST_1,
    "accum_freq": _AT_LEAST_1,
    "global_batch_size": _AT_LEAST_0,
    "workers": _AT_LEAST_0,
    "timeout_s": _POSITIVE,
}
_CHECKPOINT_AND_LOG = {
    "checkpoint.every_steps": _AT_LEAST_0,
    "checkpoint.keep_last": _AT_LEAST_1,
    "log.every_steps": _AT_LEAST_1,
}
_EVAL = {"every_steps": _AT_LEAST_0, "batch_size": _AT_LEAST_1}


def _ranges(rules: Mapping[str, str], block: object, prefix: str = "") -> Iterator[Problem]:
    for name, rule in rules.items():
        value = block
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None and not _HOLDS[rule](value):
            yield Problem(f"{prefix}{name} is {value!r} but must be {rule}.", (prefix + name,))


def _model(model: ModelConfig) -> Iterator[Problem]:
    yield from _ranges(_MODEL, model, "model.")
    if not model.name:
        yield Problem("model.name is empty. Name a model, for example --model ViT-B-16.", ("model.name",))
    for lock, part in (("lock_image", "lock_image_unlocked_groups"), ("lock_text", "lock_text_unlocked_layers")):
        if getattr(model, part) > 0 and not getattr(model, lock):
            yield Problem(
                f"model.{part} is {getattr(model, part)} but model.{lock} is false. Set model.{lock}: true or drop it.",
                (f"model.{part}", f"model.{lock}"),
            )


def _data(data: DataConfig, name: str) -> Iterator[Problem]:
    yield from _ranges(_DATA, data, f"{name}.")
    for template in data.templates:
        if "{}" not in template:
            yield Problem(
                f"{name}.templates has '{template}' without '{{}}'. Write '{{}}' where the class name goes.",
                (f"{name}.templates",),
            )
    if not data.templates:
        yield Problem(
            f"{name}.templates is empty. Give at least one, such as 'a photo of a {{}}.'.", (f"{name}.templates",)
        )
    if data.split != "all" and not 0 < data.val_fraction < 1:
        yield Problem(
            f"{name}.val_fraction is {data.val_fraction!r} but must lie between 0 and 1 when {name}.split is "
            f"'{data.split}'.",
            (f"{name}.val_fraction",),
        )


def _optim(optim: OptimConfig) -> Iterator[Problem]:
    yield from _ranges(_OPTIM, optim, "optim.")


def _warmup(config: TrainConfig, total_steps: int | None) -> Iterator[Problem]:
    warmup = config.optim.warmup
    steps = total_steps if total_steps is not None else config.train.max_steps
    if warmup >= 1 and steps > 0 and warmup >= steps:
        yield Problem(
            f"optim.warmup is {warmup:g} steps but training has {steps}. "
            "Use optim.warmup: 0.1 (a fraction) or fewer steps.",
            ("optim.warmup",),
        )
    elif warmup > 1 and warmup != int(warmup):
        yield Problem(
            f"optim.warmup is {warmup!r}: neither a fraction below 1 nor a whole number of steps.", ("optim.warmup",)
        )


def _loop(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    loop = config.train
    yield from _ranges(_LOOP, loop, "train.")
    if loop.max_steps == 0 and loop.epochs <= 0:
        yield Problem(
            f"train.epochs is {loop.epochs!r} and train.max_steps is 0, so nothing would be trained. Set one of them.",
            ("train.epochs", "train.max_steps"),
        )
    product = loop.batch_size * loop.accum_freq * world_size
    if loop.global_batch_size > 0 and product > 0 and loop.global_batch_size != product:
        processes = f"{world_size} process{'es' if world_size > 1 else ''}"
        yield Problem(
            f"train.global_batch_size is {loop.global_batch_size}, but batch_size {loop.batch_size} × accum_freq "
            f"{loop.accum_freq} × {processes} = {product}. Remove it or change one of the others.",
            ("train.global_batch_size", "train.batch_size", "train.accum_freq"),
        )
    if loop.device == "cpu" and loop.precision == "amp_fp16":
        yield Problem(
            "train.precision is amp_fp16 but train.device is cpu. Use amp_bf16 or fp32 there.",
            ("train.precision", "train.device"),
        )
    if loop.precision.startswith("pure_") and config.deepspeed.zero is None and not config.deepspeed.config:
        yield Problem(
            f"train.precision {loop.precision} keeps its full-precision weights in ZeRO's shards. Add --zero 1, 2 or "
            f"3, or use {loop.precision.replace('pure', 'amp')}.",
            ("train.precision", "deepspeed.zero"),
        )
    if loop.device not in ("auto", "cpu", "cuda") and not _is_cuda_index(loop.device):
        yield Problem(f"train.device is '{loop.device}'. Use auto, cpu, cuda or cuda:0.", ("train.device",))


def _deepspeed(deepspeed: DeepSpeedConfig) -> Iterator[Problem]:
    if deepspeed.zero is not None and not 0 <= deepspeed.zero <= 3:
        yield Problem(f"deepspeed.zero is {deepspeed.zero}. Use 0, 1, 2 or 3, or leave it out.", ("deepspeed.zero",))


def _is_cuda_index(device: str) -> bool:
    kind, _, index = device.partition(":")
    return kind == "cuda" and index.isdecimal()


def _evaluation(config: EvalConfig) -> Iterator[Problem]:
    yield from _ranges(_EVAL, config, "eval.")
    for alpha in config.alphas:
        if not 0 <= alpha <= 1:
            yield Problem(
                f"eval.alphas has {alpha!r}, but 0 means the start weights and 1 the tuned ones. Keep it between them.",
                ("eval.alphas",),
            )
    for key in ("suites", "validation"):
        suites: tuple[SuiteConfig, ...] = getattr(config, key)
        yield from _suites(suites, f"eval.{key}")
    roles = {suite.role for suite in config.validation}
    wanted = config.selection
    if config.validation and wanted in ("target", "control") and wanted not in roles:
        yield Problem(
            f"eval.selection is '{wanted}' but no suite in eval.validation has role: {wanted}. "
            "Add one or use eval.selection: all.",
            ("eval.selection", "eval.validation"),
        )


def suite_problems(suites: tuple[SuiteConfig, ...], key: str) -> list[str]:
    """Find contradictions in and between suites.

    Args:
        suites: Well-typed suites.
        key: Name of the list, for messages.

    Returns:
        One sentence per problem.
    """
    return [problem.text for problem in _suites(suites, key)]


def _suites(suites: tuple[SuiteConfig, ...], key: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for position, suite in enumerate(suites):
        path = f"{key}[{position}]"
        if suite.name in seen:
            yield Problem(
                f"{path}.name '{suite.name}' is used twice. Names tell suites apart in tables and logs.", (key,)
            )
        if not suite.name or any(mark in suite.name for mark in (os.sep, "\n", "\t")):
            yield Problem(
                f"{path}.name is {suite.name!r}. Use a short name without slashes, tabs or line ends.", (key,)
            )
        seen.add(suite.name)
        if not suite.data.path:
            yield Problem(f"{path}.data.path is empty. Say which images '{suite.name}' measures.", (key,))
        for data, name in ((suite.data, "data"), (suite.gallery, "gallery")):
            if data is not None:
                yield from (Problem(found.text, (key,)) for found in _data(data, f"{path}.{name}"))
        if suite.gallery is not None and suite.task != "image_retrieval":
            yield Problem(
                f"{path}.gallery is set but the task is {suite.task}. Only image_retrieval searches one.", (key,)
            )


def _seed(seed: int) -> Iterator[Problem]:
    if not 0 <= seed < 2**32:
        yield Problem(f"seed is {seed} but must be between 0 and 4294967295.", ("seed",))

"""The configuration handed to DeepSpeed: what the run's settings mean, merged with a user's own JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftfast.config.schema import TrainConfig
from ftfast.errors import ConfigError

AUTO = "auto"
FOREIGN = {
    "optimizer": "ftfast brings its own optimizer (AdamW with the recipe's anchor); set optim.lr and the like",
    "scheduler": "ftfast sets the learning rate; use optim.schedule and optim.warmup",
    "amp": "use train.precision",
    "torch_autocast": "use train.precision amp_bf16",
    "data_efficiency": "ftfast draws the batches",
    "curriculum_learning": "ftfast draws the batches",
}
"""Blocks of a DeepSpeed file that have no place here, and what to use instead."""


def read_user_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Args:
        path: The setting ``deepspeed.config``; empty: no file.

    Returns:
        Its content, without comments and "auto" values.

    Raises:
        ConfigError: If it is missing or not a JSON object.
    """
    if not path:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config {path!r} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed.config {path}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"deepspeed.config {path} must hold a JSON object, not a {type(values).__name__}.")
    return _without_auto(values)


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out values "auto": they mean what ftfast's settings say."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != AUTO
    }


def zero_stage(config: TrainConfig) -> int | None:
    """Return the ZeRO stage a run asks for by ``--zero`` or in its DeepSpeed file; None: DeepSpeed is not used.

    Args:
        config: Settings.

    Returns:
        0 to 3, or None.
    """
    if config.deepspeed.zero is not None:
        return config.deepspeed.zero
    if not config.deepspeed.config:
        return None
    return int(read_user_file(config.deepspeed.config).get("zero_optimization", {}).get("stage", 0))


def bucket_elements(trained: int) -> int:
    """Elements of the buffer gradients are exchanged through: a sixteenth of the trained weights, 1 to 500 million.

    Args:
        trained: Number of trained weights.

    Returns:
        DeepSpeed's ``reduce_bucket_size``; its own default is 500 million, 2 GB whatever the model.
    """
    return max(min(trained, 1_000_000), min(trained // 16, 500_000_000))


def deepspeed_settings(config: TrainConfig, world_size: int, trained: int) -> dict[str, Any]:
    """Make DeepSpeed's configuration.

    Args:
        config: Settings with a ZeRO stage.
        world_size: Number of processes.
        trained: Number of trained weights, which buffers are made for.

    Returns:
        A dictionary for ``deepspeed.initialize``. Accumulation is left to the loop, so DeepSpeed sees one forward pass
        per step.

    Raises:
        ConfigError: One sentence per contradiction between the user's file and the settings.
    """
    user = read_user_file(config.deepspeed.config)
    problems = [*_own_problems(config), *_contradictions(user, config, world_size)]
    if problems:
        raise ConfigError(problems)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        user.pop(key, None)
    merged = _merge(_settings(config, trained), user)
    merged["gradient_clipping"] = config.optim.grad_clip_norm
    return merged


def _settings(config: TrainConfig, trained: int) -> dict[str, Any]:
    """What ftfast's own settings mean, in DeepSpeed's words."""
    options = config.deepspeed
    bucket = bucket_elements(trained)
    zero: dict[str, Any] = {"stage": zero_stage(config), "reduce_bucket_size": bucket}
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if options.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip_norm,  # left out, DeepSpeed would clip at 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.train.precision.startswith("pure_"):
        settings[config.train.precision.removeprefix("pure_")] = {"enabled": True}
    return settings


def _own_problems(config: TrainConfig) -> Iterator[str]:
    """Combinations of ftfast's settings that DeepSpeed cannot run."""
    stage, precision = zero_stage(config), config.train.precision
    if precision == "amp_fp16":
        yield "train.precision amp_fp16 is not available with DeepSpeed. Use amp_bf16, pure_bf16 or pure_fp16."
    if stage == 0 and precision.startswith("pure_"):
        yield (
            f"train.precision {precision} keeps full-precision copies in shards, which ZeRO stage 0 does not have. "
            "Use --zero 1."
        )
    if config.deepspeed.offload_param and stage != 3:
        yield f"deepspeed.offload_param needs --zero 3, not stage {stage}."
    if config.deepspeed.offload_optimizer and stage == 0:
        yield "deepspeed.offload_optimizer needs --zero 1, 2 or 3."
    if config.deepspeed.zero_init and stage != 3:
        yield f"deepspeed.zero_init builds the model in shards, which needs --zero 3, not stage {stage}."


def _contradictions(user: Mapping[str, Any], config: TrainConfig, world_size: int) -> Iterator[str]:
    file, train = config.deepspeed.config, config.train
    whole = train.batch_size * train.accum_freq * world_size
    zero = user.get("zero_optimization", {})
    precisions = {name: user.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    pairs = [
        ("train_micro_batch_size_per_gpu", user.get("train_micro_batch_size_per_gpu"), "train.batch_size",
         train.batch_size),
        ("gradient_accumulation_steps", user.get("gradient_accumulation_steps"), "train.accum_freq", train.accum_freq),
        ("train_batch_size", user.get("train_batch_size"), "batch_size x accum_freq x processes", whole),
        ("gradient_clipping", user.get("gradient_clipping"), "optim.grad_clip_norm", config.optim.grad_clip_norm),
        ("zero_optimization.stage", zero.get("stage"), "--zero", config.deepspeed.zero),
    ]  # fmt: skip
    for key, theirs, setting, ours in pairs:
        if theirs is not None and ours is not None and theirs != ours:
            yield f"deepspeed.config {file} has {key} {theirs}, but {setting} is {ours}. Remove one of them."
    for name, enabled in precisions.items():
        if enabled is not None and bool(enabled) != (train.precision == f"pure_{name}"):
            wanted = f"pure_{name}" if enabled else "fp32"
            yield (
                f"deepspeed.config {file} has {name}.enabled {str(enabled).lower()}, but train.precision is "
                f"{train.precision}. Remove it from the file, or set --precision {wanted}."
            )
    for key, instead in FOREIGN.items():
        if user.get(key):
            yield f"deepspeed.config {file} has a block '{key}': {instead}. Remove the block."


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Join two nested mappings; the second one wins."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged

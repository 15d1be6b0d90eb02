"""DeepSpeed's configuration from ours, and contradictions with a file of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftfast.config.resolve import resolve
from ftfast.engine.deepspeed_settings import bucket_elements, deepspeed_settings, zero_stage
from ftfast.errors import ConfigError


def settings(tmp_path: Path, user: dict[str, Any] | str | None = None, *flags: str, world: int = 2) -> dict[str, Any]:
    words = ["--data", "x.csv", "--batch-size", "8", *flags]
    if user is not None:
        file = tmp_path / "ds.json"
        file.write_text(user if isinstance(user, str) else json.dumps(user))
        words += ["--deepspeed-config", str(file)]
    return deepspeed_settings(resolve(None, {}, (), words).config, world, 1000)


def test_clipping_is_off_and_batches_are_ours(tmp_path: Path) -> None:
    made = settings(tmp_path, None, "--zero", "2", "--accum-freq", "4")
    assert made["gradient_clipping"] == 0.0
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 1
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert "bf16" not in made
    assert settings(tmp_path, None, "--zero", "1", "--precision", "pure_bf16")["bf16"] == {"enabled": True}
    assert settings(tmp_path, None, "--zero", "1", "--optim.grad-clip-norm", "0.5")["gradient_clipping"] == 0.5


def test_users_file_is_merged(tmp_path: Path) -> None:
    user = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7, "reduce_bucket_size": "auto"},
        "wall_clock_breakdown": True,
    }
    made = settings(tmp_path, user)
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["wall_clock_breakdown"] is True
    assert "train_batch_size" not in made


@pytest.mark.parametrize(
    ("user", "flags", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, ["--zero", "1"], "has train_micro_batch_size_per_gpu 4, but train.ba"),
        ({"train_batch_size": 8}, ["--zero", "1"], "train_batch_size 8, but batch_size x accum_freq x processes is 16"),
        ({"gradient_accumulation_steps": 2}, ["--zero", "1"], "but train.accum_freq is 1"),
        ({"gradient_clipping": 1.0}, ["--zero", "1"], "gradient_clipping 1.0, but optim.grad_clip_norm is 0.0"),
        ({"zero_optimization": {"stage": 2}}, ["--zero", "3"], "zero_optimization.stage 2, but --zero is 3"),
        ({"bf16": {"enabled": True}}, ["--zero", "1"], "bf16.enabled true, but train.precision is fp32"),
        ({"bf16": {"enabled": False}}, ["--zero", "1", "--precision", "pure_bf16"], "bf16.enabled false"),
        ({"optimizer": {"type": "Adam"}}, ["--zero", "1"], "ftfast brings its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, ["--zero", "1"], "use optim.schedule"),
        ('{"a": 1,}', ["--zero", "1"], "ds.json:1: not valid JSON"),
        ("[1]", ["--zero", "1"], "must hold a JSON object"),
        (None, ["--zero", "1", "--precision", "amp_fp16"], "amp_fp16 is not available with DeepSpeed"),
        (None, ["--zero", "0", "--precision", "pure_bf16"], "Use --zero 1"),
        (None, ["--zero", "2", "--deepspeed.offload-param"], "offload_param needs --zero 3"),
        (None, ["--zero", "0", "--deepspeed.offload-optimizer"], "offload_optimizer needs --zero 1"),
        (None, ["--zero", "2", "--deepspeed.zero-init"], "zero_init builds the model in shards"),
        (None, ["--zero", "5"], "deepspeed.zero is 5"),
        (None, ["--precision", "pure_bf16"], "Add --zero 1, 2 or 3"),
    ],
)
def test_contradictions_are_one_sentence(tmp_path: Path, user: Any, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, user, *flags)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_missing_file_and_stage_from_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        deepspeed_settings(resolve(None, {}, (), ["--deepspeed-config", "/none.json"]).config, 1, 1)
    config = resolve(None, {}, (), []).config
    assert zero_stage(config) is None


def test_buckets_follow_the_model() -> None:
    assert bucket_elements(1000) == 1000
    assert bucket_elements(160_000_000) == 10_000_000
    assert bucket_elements(10**12) == 500_000_000

"""What ``ftfast plan`` says: by hand, for large models, and against measured runs of two processes."""

from __future__ import annotations

import json

import pytest

from benchmarks.ranks import in_processes
from ftfast.cli.application import main
from ftfast.errors import ConfigError
from ftfast.memory_plan import Job, plan

pytest.importorskip("deepspeed")


def test_states_by_hand() -> None:
    alone = plan(Job(model="ViT-B-32", batch=1, recipe="gift"))
    total = alone.parameters[0]
    assert total == 151_277_313
    assert alone.rows["weights"] == alone.rows["gradients"] == alone.rows["anchor"] == 4 * total
    assert alone.rows["importance"] == alone.rows["teacher"] == 4 * total
    assert alone.rows["optimizer"] == 8 * total
    assert "master weights" not in alone.rows
    second = plan(Job(model="ViT-B-32", batch=1, recipe="gift", zero=2, gpus=4, precision="pure_bf16"))
    assert second.rows["weights"] == 2 * total
    assert second.rows["master weights"] == second.rows["anchor"] == total
    third = plan(Job(model="ViT-B-32", batch=1, recipe="gift", zero=3, gpus=4, precision="pure_bf16"))
    assert total / 2 < third.rows["weights"] < 1.02 * total / 2
    host = plan(Job(model="ViT-B-32", batch=1, zero=3, gpus=4, offload_optimizer=True))
    assert host.host["optimizer"] == 2 * total
    assert "optimizer" not in host.rows


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    one, four = (plan(Job(model="ViT-B-32", batch=n)).rows["activations"] for n in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.01)
    half = plan(Job(model="ViT-B-32", batch=4, precision="pure_bf16", zero=1)).rows["activations"]
    assert 0.45 * four < half < 0.65 * four
    assert plan(Job(model="ViT-B-32", batch=4, grad_checkpointing=True)).rows["activations"] < 0.3 * four
    images = plan(Job(model="ViT-B-32", batch=4, recipe="infusing")).rows["activations"]
    assert images < four


@pytest.mark.parametrize("model", ["ViT-g-14", "ViT-bigG-14", "EVA01-g-14"])
def test_large_models_are_planned_without_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", model, "--batch", "256", "--zero", "3", "--gpus", "8"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "peak", "dense losses"):
        assert part in said
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] > 1e9
    assert sum(told["gpu_bytes"].values()) == pytest.approx(told["gpu_total_bytes"], abs=20)  # gradients stay
    assert told["dense_loss_bytes"] > told["gpu_bytes"]["loss"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(model="ViT-B-32", batch=0), "--batch is 0"),
        (Job(model="ViT-B-32", batch=1, zero=4), "--zero is 4"),
        (Job(model="ViT-B-32", batch=1, recipe="nope"), "--recipe 'nope' cannot be planned"),
        (Job(model="ViT-B-32", batch=1, precision="pure_bf16"), "Add --zero 1"),
    ],
)
def test_mistakes(job: Job, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(job)


def test_plan_is_within_15_percent_of_measured_peaks_and_zero_3_divides_everything() -> None:
    words = ["--models", "vit", "resnet", "--zero", "1", "3", "--batch", "16"]  # all models: python -m benchmarks zero
    rows = [row for rank in in_processes("zero", words, 2) for row in rank]
    assert len(rows) == 8
    for row in rows:
        assert abs(row["planned_peak"] / row["peak_mib"] - 1) <= 0.15, row
        assert abs(row["planned_states"] / row["states_mib"] - 1) <= 0.05, row
        if row["zero"] == 3:
            assert row["share"] <= 1 / 2 + 0.1, row

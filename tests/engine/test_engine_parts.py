"""Schedules, checkpoints, logs, parameter groups: against hand-made truths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ftfast.config.schema import ModelConfig, OptimConfig
from ftfast.engine.checkpoints import CheckpointManager
from ftfast.engine.runlog import RunLog, read_rows, write_csv
from ftfast.engine.schedules import learning_rate_factor, warmup_steps
from ftfast.engine.torch_engine import TorchEngine, TunedModel, parameter_groups
from ftfast.errors import CheckpointError, ConfigError
from ftfast.models import load_model
from ftfast.weightspace import l2_sp


def test_cosine_with_warmup_has_the_written_values() -> None:
    optim = OptimConfig(schedule="cosine", warmup=0.25)
    factors = [learning_rate_factor(step, 8, optim) for step in range(8)]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert factors == pytest.approx([0.5, 1.0, *cosine])
    assert [learning_rate_factor(s, 4, OptimConfig(schedule="constant", warmup=2)) for s in range(4)] == [0.5, 1, 1, 1]


def test_warmup_as_long_as_training_is_refused() -> None:
    assert warmup_steps(0.1, 5) == 0
    with pytest.raises(ConfigError) as error:
        warmup_steps(10000, 312)
    assert str(error.value) == (
        "optim.warmup is 10000 steps but training has 312. Use a fraction such as optim.warmup: 0.1, or fewer steps."
    )


def test_checkpoints_keep_the_last_and_refuse_damage(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (5, 10, 15):
        manager.save(step, {"x": torch.arange(step), "text": "a"}, {"step": step})
    manager.save_best({"x": torch.ones(1)}, {"step": 10})
    assert manager.steps() == [10, 15]
    assert (tmp_path / "last").resolve() == manager.path(15).resolve()
    assert torch.equal(manager.load(10)["x"], torch.arange(10))
    assert torch.equal(manager.load("best")["x"], torch.ones(1))
    (manager.path(15) / "state.pt").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(CheckpointError):
        manager.load(15)
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        manager.load(99)


def test_checkpoints_never_unpickle_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("executed",))

    manager = CheckpointManager(tmp_path)
    manager.path(1).mkdir()
    torch.save({"x": Bomb()}, manager.path(1) / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        manager.load(1)


def test_full_disk_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"x": torch.ones(1)}, {})

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.save(2, {"x": torch.ones(1)}, {})
    assert manager.steps() == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_00000001"]


def test_log_resumes_at_a_step_and_survives_a_cut_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"train/loss": step / 10})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    log = RunLog(tmp_path, resume_step=3)
    log.write(4, {"train/loss": 9.0, "eval/a": 1.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,train/loss,eval/a"
    write_csv(tmp_path / "empty.csv", [])
    assert (tmp_path / "empty.csv").read_text() == "\n"


def test_parameter_groups_cover_everything_once(tiny_folder: Path) -> None:
    clip = load_model(ModelConfig(name=str(tiny_folder))).model
    module = TunedModel(clip, nn.ModuleDict({"head": nn.Linear(4, 3)}))
    optim = OptimConfig(lr=1.0, image_lr=2.0, text_lr=3.0, head_lr=4.0, weight_decay=0.1)
    groups = parameter_groups(module, optim)
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in module.parameters())
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"image": 2.0, "text": 3.0, "logit": 1.0, "head": 4.0}
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim >= 2 else 0.0)
        assert len({p.ndim >= 2 for p in group["params"]}) == 1


def test_step_equals_torch_adamw_with_the_penalty_in_the_loss(tiny_folder: Path) -> None:
    """Three steps with a coupled anchor against autograd of task + penalty under torch.optim.AdamW."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        clip = load_model(ModelConfig(name=str(tiny_folder))).model
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
        start = {name: p.detach().clone() for name, p in clip.named_parameters() if p.requires_grad}
        module = TunedModel(clip, nn.ModuleDict()).train()
        optim = OptimConfig(lr=1e-3, eps=1e-4)  # tames gradients that are zero but for rounding (key biases)
        if ours:
            anchor = l2_sp(clip.named_parameters(), 100.0, reduction="mean_per_tensor")
            engine = TorchEngine(module, optim, "fp32", anchor, torch.device("cpu"))
        else:
            reference = torch.optim.AdamW(
                [p for p in clip.parameters() if p.requires_grad], lr=1e-3, eps=1e-4, weight_decay=0.0
            )
        for _ in range(3):
            image, _, _ = module(images, None)
            loss = image[:, 0].sum()
            if ours:
                engine.backward(loss)
                engine.step(1.0)
            else:
                for name, parameter in clip.named_parameters():
                    if name in start:
                        gap = parameter - start[name]
                        parts = gap.chunk(3) if name.endswith(("in_proj_weight", "in_proj_bias")) else (gap,)
                        loss = loss + 100.0 * sum((part**2).mean() for part in parts)
                reference.zero_grad()
                loss.backward()
                reference.step()
        results.append({name: p.detach() for name, p in clip.named_parameters()})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=2e-6), name

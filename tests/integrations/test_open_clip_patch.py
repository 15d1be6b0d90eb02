"""The stock open_clip trainer, run for real with and without the patch; and the patch itself."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys

import open_clip
import pytest
import torch

import ftfast.losses
from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.integrations.open_clip import patch, unpatch

trainer = pytest.importorskip("open_clip_train.train", reason="open_clip's trainer needs pandas and webdataset")
trainer_main = pytest.importorskip("open_clip_train.main")

IMAGES = 24
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 24 images of the built-in set, their captions in a CSV, and two tiny model configurations."""
    folder = tmp_path_factory.mktemp("stock")
    with open(folder / "pairs.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["filepath", "title"])
        pairs = open_dataset(DataConfig(path="builtin:pairs/train"))
        for index in range(0, len(pairs), len(pairs) // IMAGES)[:IMAGES]:
            path = folder / f"{index}.png"
            pairs.load_image(index).save(path)
            writer.writerow([path, pairs.texts[index]])
    configs = folder / "configs"
    configs.mkdir()
    (configs / "drop-in-tiny.json").write_text(json.dumps(MODEL))
    biased = {**MODEL, "init_logit_bias": -10}
    (configs / "drop-in-tiny-bias.json").write_text(json.dumps(biased))
    open_clip.add_model_config(configs)
    return folder


def train(folder, name, extra, monkeypatch):
    """Run open_clip_train.main and return every step's loss and the trained weights."""
    losses = []
    backward = trainer.backward

    def record(total_loss, scaler):
        losses.append(total_loss.item())
        backward(total_loss, scaler)

    handlers = logging.getLogger().handlers[:]
    arguments = {
        "train-data": folder / "pairs.csv",
        "csv-separator": ",",
        "dataset-type": "csv",
        "model": "drop-in-tiny",
        "batch-size": 8,
        "epochs": 3,
        "lr": 1e-3,
        "warmup": 2,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "logs": folder / "logs",
        "name": name,
        "seed": 3,
        **extra,
    }
    try:
        with monkeypatch.context() as patches:
            patches.setattr(trainer, "backward", record)
            trainer_main.main([word for key, value in arguments.items() for word in (f"--{key}", str(value)) if word])
    finally:
        logging.getLogger().handlers[:] = handlers
    checkpoint = torch.load(folder / "logs" / name / "checkpoints" / "epoch_3.pt", weights_only=True)
    return losses, checkpoint["state_dict"]


def felt(name, weight):
    """Leave out the key bias: a softmax does not feel it, so Adam moves it by rounding noise alone."""
    return torch.cat([weight.chunk(3)[0], weight.chunk(3)[2]]) if name.endswith("attn.in_proj_bias") else weight


CASES = {
    "clip": {},
    "accumulation": {"accum-freq": 3},
    "siglip": {"siglip": "", "model": "drop-in-tiny-bias"},
    "distill": {"distill-model": "drop-in-tiny", "distill-pretrained": "TEACHER"},
}


@pytest.mark.parametrize("case", CASES)
def test_stock_trainer_gives_the_same_curve_with_the_patch(case, workplace, monkeypatch):
    extra = dict(CASES[case])
    if case == "distill":
        torch.manual_seed(11)
        teacher = open_clip.create_model("drop-in-tiny")
        torch.save(teacher.state_dict(), workplace / "teacher.pt")
        extra["distill-pretrained"] = workplace / "teacher.pt"
    calls = []
    stock, stock_weights = train(workplace, f"{case}-stock", extra, monkeypatch)
    with patch():
        used = {"siglip": "SigLipLoss", "distill": "DistillClipLoss"}.get(case, "ClipLoss")
        forward = getattr(ftfast.losses, used).forward
        monkeypatch.setattr(
            getattr(ftfast.losses, used), "forward", lambda *a, **k: calls.append(used) or forward(*a, **k)
        )
        patched, patched_weights = train(workplace, f"{case}-patched", extra, monkeypatch)
    assert len(stock) == len(patched) == 9  # 24 images / 8 per batch x 3 epochs
    assert len(calls) == 9, "the stock trainer did not use the fused loss"
    assert patched == pytest.approx(stock, rel=2e-4)
    assert abs(stock[-1] - stock[0]) > 1e-2, "the model did not train, so the comparison says nothing"
    for name, weight in stock_weights.items():
        torch.testing.assert_close(felt(name, patched_weights[name]), felt(name, weight), rtol=1e-2, atol=2e-3)


def test_patch_reaches_every_module_and_is_undone():
    original = open_clip.loss.ClipLoss
    active = patch(ring=True, backend="torch")
    try:
        for module in (open_clip, open_clip.loss, open_clip.factory):
            assert issubclass(module.ClipLoss, ftfast.losses.ClipLoss)
            assert issubclass(module.DistillClipLoss, ftfast.losses.DistillClipLoss)
        assert issubclass(open_clip.factory.SigLipLoss, ftfast.losses.SigLipLoss)
        loss = open_clip.ClipLoss(rank=1, world_size=2)
        assert (loss.ring, loss.backend, loss.rank) == (True, "torch", 1)
        patch()  # replaces the first patch instead of stacking on it
        assert open_clip.ClipLoss().ring is False
    finally:
        unpatch()
    assert open_clip.ClipLoss is open_clip.loss.ClipLoss is open_clip.factory.ClipLoss is original
    unpatch()
    active.undo()
    assert open_clip.ClipLoss is original


def test_ring_is_handed_to_every_loss():
    with patch(ring=True):
        assert open_clip.DistillClipLoss(rank=0, world_size=2).ring is True
        assert open_clip.factory.SigLipLoss(rank=0, world_size=2).dist_impl == "shift"


def test_context_manager_undoes_after_an_error():
    original = open_clip.ClipLoss
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert open_clip.ClipLoss is original


def test_the_command_reaches_the_stock_trainer():
    done = subprocess.run(
        [sys.executable, "-m", "ftfast.integrations.open_clip", "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "--gather-with-grad" in done.stdout

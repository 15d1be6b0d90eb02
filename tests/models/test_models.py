"""Loading, locking, saving: against open_clip itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from ftfast.config.schema import ModelConfig
from ftfast.errors import ModelError
from ftfast.models import (
    apply_locks,
    freeze_batch_norm_statistics,
    load_model,
    read_state,
    save_open_clip_folder,
    tower_of,
    trainable_summary,
    weights_fingerprint,
)


def test_loads_the_same_weights_as_open_clip(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=f"local-dir:{tiny_folder}"))
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_folder}")
    assert loaded.embed_dim == 32
    assert loaded.image_size == 32
    for (name, ours), (other, reference) in zip(
        loaded.model.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, reference)


def test_saved_folder_loads_in_plain_open_clip_without_ftfast(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01)
    folder = save_open_clip_folder(tmp_path / "final", loaded.model.state_dict(), loaded, "card")
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    expected = loaded.model.eval().encode_image(image).detach()
    code = (
        "import sys, json, torch, open_clip\n"
        f"m, _, p = open_clip.create_model_and_transforms('local-dir:{folder}')\n"
        f"t = open_clip.get_tokenizer('local-dir:{folder}')\n"
        "x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)\n"
        "assert 'ftfast' not in sys.modules\n"
        "print(json.dumps([m.eval().encode_image(x).tolist(), list(t(['a cat']).shape)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    features, shape = json.loads(out.stdout.strip().splitlines()[-1])
    assert torch.allclose(torch.tensor(features), expected, atol=1e-6)
    assert shape == [1, 16]
    assert (folder / "README.md").read_text() == "card"


def test_saving_replaces_a_folder_as_a_whole_and_refuses_foreign_weights(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    state = loaded.model.state_dict()
    target = tmp_path / "final"
    target.mkdir()
    (target / "old.txt").write_text("old")
    save_open_clip_folder(target, state, loaded)
    assert sorted(p.name for p in target.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    with pytest.raises(ModelError, match=r"1 names differ, e\.g\. logit_scale"):
        save_open_clip_folder(target, {k: v for k, v in state.items() if k != "logit_scale"}, loaded)
    assert read_state(target).keys() == state.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="ViT-B-17", pretrained="openai"), "Did you mean"),
        (ModelConfig(name="ViT-B-16"), "would start from random weights"),
        (ModelConfig(name="ViT-B-16", pretrained="opnai"), "is neither a tag of 'ViT-B-16'"),
        (ModelConfig(name="local-dir:/nowhere"), "holds no open_clip_config.json"),
    ],
)
def test_unusable_models_are_one_sentence(config: ModelConfig, message: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_local_folder_with_a_tag_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"brings its own weights. Remove model.pretrained\."):
        load_model(ModelConfig(name=str(tiny_folder), pretrained="openai"))


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(ModelError, match="is damaged or not a safetensors file"):
        read_state(tmp_path)
    with pytest.raises(ModelError, match=r"holds no open_clip_model.safetensors"):
        read_state(tmp_path / "missing")


def test_towers_and_locks(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)))
    names = [name for name, _ in loaded.model.named_parameters()]
    assert {tower_of(name) for name in names} == {"image", "text", "logit"}
    assert all(
        tower_of(n) == ("image" if n.startswith("visual.") else "logit" if n == "logit_scale" else "text")
        for n in names
    )
    apply_locks(loaded.model, ModelConfig(lock_text=True, lock_logit_scale=True))
    rows = {tower: (moving, total) for tower, moving, total in trainable_summary(loaded.model)}
    assert rows["image"][0] == rows["image"][1] > 0
    assert rows["text"][0] == rows["logit"][0] == 0
    apply_locks(loaded.model, ModelConfig(lock_image=True))
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_batch_norm_statistics_do_not_move_when_frozen(tiny_folder: Path) -> None:
    model = load_model(ModelConfig(name=str(tiny_folder))).model.train()
    frozen = freeze_batch_norm_statistics(model)
    assert frozen > 0
    before = weights_fingerprint(model.state_dict())
    model.encode_image(torch.randn(4, 3, 32, 32))
    assert weights_fingerprint(model.state_dict()) == before
    model.train()
    model.encode_image(torch.randn(4, 3, 32, 32))
    assert weights_fingerprint(model.state_dict()) != before

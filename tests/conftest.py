"""Fixtures shared by all rooms: a tiny random CLIP, a table of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_files import write_image

TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with a random ModifiedResNet CLIP of about a million parameters."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny") / "random-clip"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**json.loads(json.dumps(TINY_CONFIG)))
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": TINY_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def class_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 60 random images in 10 classes, with captions too."""
    folder = tmp_path_factory.mktemp("table")
    rows = ["image,label,caption"]
    for number in range(60):
        write_image(folder / "img" / f"{number:03d}.png", number)
        rows.append(f"img/{number:03d}.png,kind {number % 10},thing number {number}")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return folder / "images.csv"

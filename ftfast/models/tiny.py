"""The built-in tiny CLIPs: small convolutional towers that plain open_clip builds, loads and tokenizes for.

They are real CLIPs, pretrained on drawings by ``ftfast pretrain``, small enough to be part of the package. Both share
the tokenizer (open_clip's own, so no tokenizer files are needed) and the width of the text tower; v2's image tower is
deeper. The text tower is narrow because the tokenizer has 49,408 tokens, of which the drawings' names use 1,769.
Weights are stored in float16 and computed in float32.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.errors import ModelError
from ftfast.models.exporting import CONFIG_NAME, WEIGHTS_NAME, atomic_folder

BUILTIN_MODELS = ("tiny-clip-v1", "tiny-clip-v2")
"""Names that stand for the shipped models wherever a model is named."""

IMAGE_SIZE = 64
"""Height and width of the images both models read."""

TEMPLATES = (
    "{}",
    "{}",
    "a photo of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "a picture of a {}.",
)
"""Prompts the models were pretrained with, each as often as it stands here."""

_IMAGE_LAYERS = {"tiny-clip-v1": [1, 1, 1, 1], "tiny-clip-v2": [1, 2, 2, 1]}
_IMAGE_WIDTH = 20
_EMBED_DIM = 256
_TEXT_CONFIG = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def builtin_model_folder(name: str) -> Path:
    """Return the open_clip folder of a shipped model, for ``"local-dir:<folder>"``.

    Args:
        name: One of ``BUILTIN_MODELS``.

    Raises:
        ModelError: If the name is not a built-in model.
    """
    _check_name(name)
    return Path(__file__).parent / "weights" / name


def tiny_config(name: str) -> dict[str, Any]:
    """Return the content of ``open_clip_config.json``: the model and how its images are prepared.

    Args:
        name: One of ``BUILTIN_MODELS``.

    Raises:
        ModelError: If the name is not a built-in model.
    """
    _check_name(name)
    vision = {
        "image_size": IMAGE_SIZE,
        "layers": list(_IMAGE_LAYERS[name]),
        "width": _IMAGE_WIDTH,
        "head_width": _IMAGE_WIDTH,
    }
    model = {"embed_dim": _EMBED_DIM, "vision_cfg": vision, "text_cfg": dict(_TEXT_CONFIG)}
    return {"model_cfg": model, "preprocess_cfg": copy.deepcopy(_PREPROCESS)}


def build_tiny(name: str) -> nn.Module:
    """Build an untrained tiny CLIP, in training mode; weights follow torch's global seed.

    Args:
        name: One of ``BUILTIN_MODELS``.

    Returns:
        An ``open_clip.CLIP``.

    Raises:
        ModelError: If the name is not a built-in model.
    """
    from open_clip.model import CLIP

    return CLIP(**tiny_config(name)["model_cfg"])


def save_tiny(folder: Path, name: str, state: dict[str, Tensor], card_text: str) -> Path:
    """Write a tiny CLIP as an open_clip folder, atomically and compactly.

    Floating-point tensors are stored in float16; open_clip widens them when it loads. Rounding is part of the model:
    measure what was written, not what was trained.

    Args:
        folder: Target; replaced as a whole.
        name: One of ``BUILTIN_MODELS``.
        state: ``state_dict()`` of the trained model.
        card_text: Text of README.md.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    tensors = {key: _compact(value) for key, value in state.items()}
    with atomic_folder(Path(folder)) as work:
        (work / CONFIG_NAME).write_text(json.dumps(tiny_config(name), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, work / WEIGHTS_NAME)
        (work / WEIGHTS_NAME).chmod(0o644)  # safetensors makes it private; the weights are part of a package
        (work / "README.md").write_text(card_text, encoding="utf-8")
    return Path(folder)


def _compact(tensor: Tensor) -> Tensor:
    value = tensor.detach().cpu()
    return (value.half() if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)


def _check_name(name: str) -> None:
    if name not in BUILTIN_MODELS:
        raise ModelError(f"'{name}' is not a built-in model. There are: {', '.join(BUILTIN_MODELS)}.")

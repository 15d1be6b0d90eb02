"""open_clip weights as a Hugging Face ``CLIPModel`` folder, offline and without importing transformers.

Covers the plain CLIP of Radford et al. 2021 with a ViT image tower, which is what ``CLIPModel`` implements. Anything
else (ResNet or timm towers, other poolings, SigLIP's bias) is refused by name rather than converted wrongly.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.errors import ModelError

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_SIZES = {"layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "context_length"}
_PLAIN = {"vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "output_tokens", "patch_dropout"}
_DEFAULTS = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "pos_embed_type": ("learnable",), "pad_id": (0,)}
_IGNORED = {"eos_id", "attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj", "block_type"}


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's entries to ``CLIPModel``'s; fused q/k/v become three tensors, projections are transposed.

    Args:
        state: State dict of an open_clip ``CLIP`` with a ViT image tower.

    Returns:
        State dict of ``transformers.CLIPModel``.

    Raises:
        ModelError: If an entry has no counterpart, so that the model is not a plain CLIP.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":
            continue
        if name in _OUTER:
            converted[_OUTER[name]] = value
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            converted.update(_convert_block(name, value))
    return converted


def _convert_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """One entry of a transformer block."""
    match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if match is None:
        raise ModelError(
            f"this model has '{name}', which Hugging Face's CLIPModel has no place for. Use --to open-clip."
        )
    tower = "vision_model" if match[1] else "text_model"
    prefix, part, kind = f"{tower}.encoder.layers.{match[2]}", match[3], match[4]
    if part == "attn.in_proj":
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.contiguous() for letter, third in thirds}
    if part not in _BLOCK:
        raise ModelError(
            f"this model has '{name}', which Hugging Face's CLIPModel has no place for. Use --to open-clip."
        )
    return {f"{prefix}.{_BLOCK[part]}.{kind}": value}


def convert_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate open_clip's ``model_cfg`` to the content of Hugging Face's ``config.json``.

    Args:
        model_config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and perhaps ``quick_gelu``.

    Returns:
        Plain values.

    Raises:
        ModelError: If a setting changes the computation in a way ``CLIPModel`` cannot express.
    """
    vision, text = dict(model_config["vision_cfg"]), dict(model_config["text_cfg"])
    _require_plain(vision, "vision_cfg")
    _require_plain(text, "text_cfg")
    if not isinstance(vision.get("layers", 12), int):
        raise ModelError("Hugging Face's CLIPModel has no ResNet image tower. Use --to open-clip.")
    image_size = vision.get("image_size", 224)
    activation = "quick_gelu" if model_config.get("quick_gelu") else "gelu"
    width, text_width = vision.get("width", 768), text.get("width", 512)
    shared = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": model_config["embed_dim"]}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_config["embed_dim"],
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": image_size[0] if isinstance(image_size, (list, tuple)) else image_size,
            "patch_size": vision.get("patch_size", 16),
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            # open_clip pools at the largest id, which is the end token of CLIP's vocabulary
            "bos_token_id": text.get("vocab_size", 49408) - 2,
            "eos_token_id": text.get("vocab_size", 49408) - 1,
        },
    }


def _require_plain(config: Mapping[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in _SIZES | _PLAIN | _IGNORED or value in (None, False, *_DEFAULTS.get(key, ())):
            continue
        raise ModelError(
            f"{name}.{key} is {value!r}, which Hugging Face's CLIPModel cannot express. Use --to open-clip."
        )


def convert_preprocessing(preprocess: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Translate open_clip's ``preprocess_cfg`` to the content of ``preprocessor_config.json``.

    Args:
        preprocess: ``mean``, ``std``, ``interpolation`` and ``resize_mode``.
        image_size: Side of the input in pixels.

    Returns:
        Plain values of a ``CLIPImageProcessor``.
    """
    squash = preprocess.get("resize_mode", "shortest") == "squash"
    side = {"height": image_size, "width": image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if squash else {"shortest_edge": image_size},
        "resample": 2 if preprocess.get("interpolation") == "bilinear" else 3,
        "do_center_crop": not squash,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """Write CLIP's byte-pair vocabulary as ``vocab.json`` and ``merges.txt``, from the file open_clip ships.

    Args:
        folder: Existing folder.
        context_length: Longest input in tokens.
    """
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": context_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def compare_with_transformers(folder: Path, model: torch.nn.Module, image_size: int) -> float | None:
    """Load a written folder with transformers and compare one forward pass of both towers.

    Args:
        folder: A written Hugging Face folder.
        model: The open_clip model it came from.
        image_size: Side of the input in pixels.

    Returns:
        Largest difference between unit-length features, or None if transformers is not installed.
    """
    try:
        from transformers import CLIPModel
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    theirs = CLIPModel.from_pretrained(folder).eval()
    settings = theirs.config.text_config
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, image_size, image_size, generator=generator)
    tokens = torch.zeros(1, settings.max_position_embeddings, dtype=torch.long)
    tokens[0, :4] = torch.tensor([settings.bos_token_id, 5, 6, settings.eos_token_id])
    with torch.no_grad():
        outer = theirs.vision_model(image).pooler_output, theirs.text_model(tokens).pooler_output
        features = theirs.visual_projection(outer[0]), theirs.text_projection(outer[1])
        own = model.cpu().float().eval()
        truth = own.encode_image(image), own.encode_text(tokens)  # type: ignore[operator]
    pairs = zip(features, truth, strict=True)
    unit = torch.nn.functional.normalize
    return max(float((unit(mine, dim=-1) - unit(true, dim=-1)).abs().max()) for mine, true in pairs)

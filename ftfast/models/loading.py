"""Load a CLIP: an open_clip model, a local open_clip folder or a built-in tiny model, always as ``LoadedModel``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.config.schema import ModelConfig
from ftfast.errors import ModelError

LOCAL_DIR = "local-dir:"


@dataclass
class LoadedModel:
    """A CLIP with everything needed to use it, save it and recognise it again.

    Attributes:
        model: open_clip ``CLIP`` or ``CustomTextCLIP`` in fp32, in eval mode.
        train_transform: open_clip's own training transform (recipes may build another).
        eval_transform: Transform of evaluation: PIL image to (3, H, W) float tensor.
        tokenizer: Callable from list of strings to (N, context_length) int64 tensor.
        model_config: open_clip ``model_cfg`` dictionary.
        preprocess_config: open_clip ``preprocess_cfg`` dictionary (mean, std, interpolation, resize_mode, size).
        name: What the user asked for.
        pretrained: Tag or file of the weights, as given.
        tokenizer_files: Files that must travel with the weights so that open_clip finds the tokenizer again.
    """

    model: Any  # an nn.Module; open_clip's classes share encode_image/encode_text but no typed base
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]
    name: str
    pretrained: str = ""
    tokenizer_files: tuple[Path, ...] = ()
    _fingerprint: str = field(default="", repr=False)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.preprocess_config.get("size") or self.model_config["vision_cfg"].get("image_size", 224)
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    @property
    def embed_dim(self) -> int:
        """Width of the joint embedding."""
        return int(self.model_config["embed_dim"])

    @property
    def fingerprint(self) -> str:
        """Hex digest of the weights as they were loaded; key of caches."""
        if not self._fingerprint:
            self._fingerprint = weights_fingerprint(self.model.state_dict())
        return self._fingerprint


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """Hash names, shapes and values of a state dict.

    Args:
        state: Tensors by name, on any device.

    Returns:
        32 hexadecimal digits; equal weights give equal digests on every machine of the same byte order.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's loading chatter; real failures arrive as exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def load_model(config: ModelConfig, device: str | torch.device = "cpu") -> LoadedModel:
    """Build the model that ``config`` names and load its weights.

    Args:
        config: ``name`` is an open_clip name, ``local-dir:<folder>`` (or a plain path to such a folder), or a built-in.
        device: Where the weights go.

    Returns:
        The model with transforms and tokenizer.

    Raises:
        ModelError: If the name, tag, folder or file cannot be used; the sentence says which and what exists instead.
    """
    import open_clip

    identifier, folder = _identifier(config)
    _check_pretrained(config, folder)
    try:
        with _quiet():
            model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                identifier, pretrained=config.pretrained or None, device=device
            )
            tokenizer = open_clip.get_tokenizer(identifier)
    except (RuntimeError, ValueError, FileNotFoundError, OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.name {config.name!r} (pretrained {config.pretrained!r}) cannot be loaded: {reason}"
        ) from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return LoadedModel(
        model=model.eval(),
        train_transform=train_transform,
        eval_transform=eval_transform,
        tokenizer=tokenizer,
        model_config=_model_config(identifier, folder),
        preprocess_config=dict(open_clip.get_model_preprocess_cfg(model)),
        name=config.name,
        pretrained=config.pretrained,
        tokenizer_files=_tokenizer_files(folder),
    )


def model_settings(name: str) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` of a model without building it.

    Args:
        name: As ``model.name``.

    Returns:
        A private copy.

    Raises:
        ModelError: If there is no such model.
    """
    return _model_config(*_identifier(ModelConfig(name=name)))


def _identifier(config: ModelConfig) -> tuple[str, Path | None]:
    """Return open_clip's identifier for ``config.name`` and the local folder behind it, if there is one."""
    import open_clip

    from ftfast.models.tiny import BUILTIN_MODELS, builtin_model_folder

    name = config.name
    if name in BUILTIN_MODELS:
        folder = builtin_model_folder(name)
        return f"{LOCAL_DIR}{folder}", folder
    if name.startswith(LOCAL_DIR) or Path(name, "open_clip_config.json").is_file():
        folder = Path(name.removeprefix(LOCAL_DIR))
        if not (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"model.name {name!r}: {folder} holds no open_clip_config.json. "
                "Name a folder that ftfast or open_clip saved."
            )
        return f"{LOCAL_DIR}{folder}", folder
    if name.startswith("hf-hub:"):
        return name, None
    known = [*open_clip.list_models(), *BUILTIN_MODELS]
    if name.replace("/", "-") not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = (
            f"Did you mean {', '.join(close)}?"
            if close
            else "List them with: python -c 'import open_clip; print(open_clip.list_models())'"
        )
        raise ModelError(f"model.name {name!r} is neither an open_clip model, a built-in nor a folder. {hint}")
    return name, None


def _check_pretrained(config: ModelConfig, folder: Path | None) -> None:
    """Refuse a tag that does not exist, and silent random weights."""
    import open_clip

    if folder is not None or config.name.startswith("hf-hub:"):
        if config.pretrained:
            raise ModelError(
                f"model.pretrained is {config.pretrained!r}, but {config.name!r} brings its own weights. "
                "Remove model.pretrained."
            )
        return
    tags = open_clip.list_pretrained_tags_by_model(config.name.replace("/", "-"))
    shown = ", ".join(tags) or "none"
    if not config.pretrained:
        raise ModelError(
            f"model.pretrained is empty: {config.name!r} would start from random weights. "
            f"Set a tag ({shown}) or a weights file."
        )
    if config.pretrained not in tags and not Path(config.pretrained).is_file():
        raise ModelError(
            f"model.pretrained {config.pretrained!r} is neither a tag of {config.name!r} ({shown}) "
            "nor an existing file."
        )


def _model_config(identifier: str, folder: Path | None) -> dict[str, Any]:
    """Return a private copy of open_clip's ``model_cfg``."""
    import open_clip

    if folder is not None:
        return dict(json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"])
    if identifier.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config

        return dict(_get_hf_config(identifier.removeprefix("hf-hub:"))["model_cfg"])
    return json.loads(json.dumps(open_clip.get_model_config(identifier)))


def _tokenizer_files(folder: Path | None) -> tuple[Path, ...]:
    """Return the tokenizer files lying beside local weights: everything that is neither config, weights nor prose."""
    if folder is None:
        return ()
    own = {"open_clip_config.json", "README.md"}
    weights = {".safetensors", ".bin", ".pt", ".pth"}
    return tuple(sorted(p for p in folder.iterdir() if p.is_file() and p.name not in own and p.suffix not in weights))

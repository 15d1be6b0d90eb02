"""Write weights as an open_clip folder that plain open_clip loads, with no ftfast installed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ftfast.errors import ModelError
from ftfast.models.loading import LoadedModel

WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``target`` only when the block ends without an error.

    Args:
        target: Final folder; an existing one is replaced, and is intact until the new one is complete.

    Yields:
        The folder to write into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private; results are meant to be read
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, retired / target.name)
            os.replace(temporary, target)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_open_clip_folder(
    folder: Path, state: Mapping[str, Tensor], loaded: LoadedModel, card_text: str = "", *, half: bool = False
) -> Path:
    """Write ``open_clip_config.json``, ``open_clip_model.safetensors``, tokenizer files and a model card, atomically.

    The folder loads with ``open_clip.create_model_and_transforms("local-dir:<folder>")`` and
    ``open_clip.get_tokenizer("local-dir:<folder>")``.

    Args:
        folder: Target; replaced as a whole.
        state: Weights, as in the model's ``state_dict()``.
        loaded: Gives configuration, preprocessing and tokenizer files.
        card_text: Text of README.md; empty: none is written.
        half: Store floating-point tensors in float16.

    Returns:
        The folder.

    Raises:
        ModelError: If the names in ``state`` are not those of the model.
    """
    from safetensors.torch import save_file

    expected = set(loaded.model.state_dict())
    if set(state) != expected:
        odd = sorted(expected ^ set(state))[:3]
        raise ModelError(
            f"weights do not fit {loaded.name!r}: {len(expected ^ set(state))} names differ, e.g. {', '.join(odd)}."
        )
    tensors = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu()
        value = value.half() if half and value.is_floating_point() else value
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    preprocess = {
        k: loaded.preprocess_config[k]
        for k in ("mean", "std", "interpolation", "resize_mode")
        if k in loaded.preprocess_config
    }
    with atomic_folder(Path(folder)) as work:
        config = {"model_cfg": loaded.model_config, "preprocess_cfg": preprocess}
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, work / WEIGHTS_NAME)
        (work / WEIGHTS_NAME).chmod(0o644)  # safetensors writes private files
        for path in loaded.tokenizer_files:
            shutil.copyfile(path, work / path.name)
        if card_text:
            (work / "README.md").write_text(card_text, encoding="utf-8")
    return Path(folder)


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an open_clip folder.

    Args:
        folder: As written by :func:`save_open_clip_folder`.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ModelError: If the folder holds no readable weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS_NAME}. Name a run's final/ folder or another open_clip folder.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}.") from error

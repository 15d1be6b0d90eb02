"""``ftfast export``: weights for other tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from ftfast.models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write the weights of a run or model for other tools, offline."""

    source: tyro.conf.Positional[str]
    """A run folder, an open_clip folder, a weights file (with --model) or an open_clip name (with --pretrained)."""
    to: Literal["open-clip", "hf", "state-dict"] = "open-clip"
    """open-clip: folder for local-dir:; hf: Hugging Face CLIPModel folder; state-dict: one .safetensors or .pt file."""
    out: str
    """Folder, or file for state-dict."""
    half: bool = False
    """Store floating-point weights as float16."""
    model: str = ""
    """Architecture of a weights file."""
    pretrained: str = ""
    """open_clip tag, if the source is an open_clip name."""
    overwrite: bool = False
    """Replace --out if it exists."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: Sequence[str]) -> int:
    """Write the weights.

    Args:
        argv: Arguments after ``ftfast export``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the output exists or has the wrong ending.
    """
    arguments = parse_options(ExportArguments, argv, "ftfast export")
    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"--out {out} already exists. Replace it with --overwrite or choose another --out.")
    if arguments.to == "state-dict" and out.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"--out is '{out}', but a state dict is one file: end it in .safetensors or .pt.")
    if arguments.to != "state-dict" and out.is_file():
        raise ConfigError(f"--out {out} is a file, but --to {arguments.to} writes a folder.")
    from ftfast.cli.weights import load

    loaded = load(arguments.source, model=arguments.model, pretrained=arguments.pretrained)
    writer = {"open-clip": _open_clip, "hf": _hugging_face, "state-dict": _state_dict}[arguments.to]
    usage = writer(loaded, out, arguments)
    if arguments.json:
        output.emit_json({"out": str(out), "format": arguments.to, "usage": usage})
    else:
        output.emit(f"wrote {out}\n{usage}")
    return 0


def _open_clip(loaded: LoadedModel, out: Path, arguments: ExportArguments) -> str:
    from ftfast.models import save_open_clip_folder

    card = Path(loaded.name.removeprefix("local-dir:")) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    save_open_clip_folder(out, loaded.model.state_dict(), loaded, text, half=arguments.half)
    return f'import open_clip\nmodel, _, preprocess = open_clip.create_model_and_transforms("local-dir:{out}")'


def _hugging_face(loaded: LoadedModel, out: Path, arguments: ExportArguments) -> str:
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import save_file

    from ftfast.integrations import huggingface
    from ftfast.models.exporting import atomic_folder

    config = huggingface.convert_config(loaded.model_config)
    state = {name: _stored(value, arguments.half) for name, value in loaded.model.state_dict().items()}
    converted = huggingface.convert_state(state)
    if not isinstance(loaded.tokenizer, SimpleTokenizer) and not hasattr(loaded.tokenizer, "tokenizer"):
        raise ModelError(f"the tokenizer of {loaded.name} cannot be written for Hugging Face. Use --to open-clip.")
    with atomic_folder(out) as work:
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(converted, work / "model.safetensors", metadata={"format": "pt"})
        preprocessing = huggingface.convert_preprocessing(loaded.preprocess_config, loaded.image_size)
        (work / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")
        if isinstance(loaded.tokenizer, SimpleTokenizer):
            huggingface.write_clip_tokenizer(work, config["text_config"]["max_position_embeddings"])
        else:
            loaded.tokenizer.tokenizer.save_pretrained(work)  # type: ignore[attr-defined]
        gap = huggingface.compare_with_transformers(work, loaded.model, loaded.image_size)
        if gap is None:
            output.note("not checked by a forward pass: transformers is not installed")
        elif not gap <= (2e-2 if arguments.half else 1e-4):
            raise ModelError(f"the converted model's features differ by {gap:.1e}; {out} was not written.")
    return f'from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained("{out}")'


def _state_dict(loaded: LoadedModel, out: Path, arguments: ExportArguments) -> str:
    import torch
    from safetensors.torch import save_file

    state = {name: _stored(value, arguments.half) for name, value in loaded.model.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".safetensors":
            save_file(state, partial)
        else:
            torch.save(state, partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    if out.suffix == ".safetensors":
        return f'from safetensors.torch import load_file\nmodel.load_state_dict(load_file("{out}"))'
    return f'import torch\nmodel.load_state_dict(torch.load("{out}", weights_only=True))'


def _stored(value: Tensor, half: bool) -> Tensor:
    """A private contiguous CPU copy: safetensors refuses shared memory."""
    import torch

    copied = value.detach().cpu()
    copied = copied.half() if half and copied.is_floating_point() else copied
    return copied.clone(memory_format=torch.contiguous_format)

"""The built-in tiny CLIPs."""

from __future__ import annotations

from pathlib import Path

BUILTIN_MODELS = ("tiny-clip-v1", "tiny-clip-v2")


def builtin_model_folder(name: str) -> Path:
    """Return the open_clip folder of a built-in model."""
    return Path(__file__).parent / "weights" / name

"""Settings of ``ftfast pretrain``; light, so that the command line can show them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EPOCHS = {"v1": 60, "v2": 90}
"""Epochs of the shipped weights, by version."""

AUGMENTATION = {"v1": "light", "v2": "strong"}
"""Augmentation of the shipped weights, by version."""

TEXT_FROM = {"v1": "random", "v2": "tiny-clip-v1"}
"""Where the text tower of the shipped weights starts: v2 descends from v1, as EVA-CLIP's text towers do from CLIP's."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a tiny CLIP on the built-in drawings; the defaults are the recipe of the shipped weights."""

    out: str
    """Folder to write: an open_clip folder with weights, configuration and model card."""
    version: Literal["v1", "v2"] = "v1"
    """Which of the two architectures."""
    epochs: int = 0
    """Passes over the 2,980 training drawings; 0: the recipe's (v1 60, v2 90)."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 2e-3
    """Highest learning rate of AdamW; linear warm-up over a tenth of the steps, then cosine to zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and filters; token table, norms and biases are left alone."""
    label_smoothing: float = 0.0
    """Weight of the uniform target in the contrastive loss."""
    text_from: Literal["auto", "random", "tiny-clip-v1"] = "auto"
    """Weights that the text tower and its projection start from; auto: the recipe's (v1 random, v2 tiny-clip-v1)."""
    text_lr: float = 0.3
    """Learning rate of a text tower that starts from trained weights, in parts of lr."""
    augmentation: Literal["auto", "light", "strong"] = "auto"
    """How much the drawings are distorted; auto: the recipe's (v1 light, v2 strong)."""
    seed: int = 0
    """Seed of initial weights, order and augmentation."""
    threads: int = 0
    """CPU threads; 0: torch's default. Rounding differs with the number of threads."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """amp_bf16 takes half the time on processors with bfloat16 arithmetic."""
    smoke: bool = False
    """Try everything in seconds: a few names, one epoch."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    log_every: int = 5
    """Epochs between progress lines; each measures the held-out drawings."""

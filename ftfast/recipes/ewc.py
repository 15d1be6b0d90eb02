"""EWC: fine-tuning with a pull towards the start weights, stronger where the Fisher says a weight matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftfast.recipes import finetune


@dataclass(frozen=True, kw_only=True)
class EWCOptions(finetune.FinetuneOptions):
    """Options of EWC."""

    anchor_weight: float = 1e4
    """lambda in lambda sum F (theta - theta*)^2, without the factor 1/2 (Avalanche's convention)."""
    fisher: Literal["empirical", "squared_batch_gradient"] = "empirical"
    """Per-sample Fisher, or the square of each batch's mean gradient (what many codebases call Fisher)."""
    fisher_batches: int = 8
    """Batches of generic data the Fisher is estimated on."""
    fisher_batch_size: int = 64
    """Images per batch; the per-batch Fisher shrinks with it, so lambda depends on it."""

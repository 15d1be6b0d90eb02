"""Towers: open_clip models, the built-in tiny CLIPs, freezing, saving."""

from __future__ import annotations

from ftfast.models.exporting import read_state, save_open_clip_folder
from ftfast.models.freezing import apply_locks, freeze_batch_norm_statistics, tower_of, trainable_summary
from ftfast.models.loading import LoadedModel, load_model, weights_fingerprint

__all__ = [
    "LoadedModel",
    "apply_locks",
    "freeze_batch_norm_statistics",
    "load_model",
    "read_state",
    "save_open_clip_folder",
    "tower_of",
    "trainable_summary",
    "weights_fingerprint",
]

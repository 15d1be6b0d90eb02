"""Validation shared by the public operations: one clear sentence per wrong tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ftfast.errors import ConfigError, ShapeError

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_features(**features: Tensor) -> None:
    """Require non-empty 2-D floating tensors with one width and one device.

    Raises:
        ShapeError: Naming the argument, its shape or dtype and what is expected.
    """
    first_name, first = next(iter(features.items()))
    for name, tensor in features.items():
        if tensor.ndim != 2 or tensor.shape[0] == 0 or tensor.shape[1] == 0:
            raise ShapeError(f"{name} must be (rows, width) with at least one row, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FEATURE_DTYPES:
            raise ShapeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if tensor.shape[1] != first.shape[1]:
            raise ShapeError(f"{name} has width {tensor.shape[1]} but {first_name} has width {first.shape[1]}")
        if tensor.device != first.device:
            raise ShapeError(f"{name} is on {tensor.device} but {first_name} is on {first.device}")


def check_same_rows(**features: Tensor) -> None:
    """Require one number of rows.

    Raises:
        ShapeError: Naming both arguments and both sizes.
    """
    first_name, first = next(iter(features.items()))
    for name, tensor in features.items():
        if tensor.shape[0] != first.shape[0]:
            raise ShapeError(f"{name} has {tensor.shape[0]} rows but {first_name} has {first.shape[0]}")


def check_ids(rows: int, device: torch.device, **ids: Tensor | None) -> None:
    """Require integer vectors of length ``rows`` on ``device``; None is allowed.

    Raises:
        ShapeError: Naming the argument and what is wrong with it.
    """
    for name, tensor in ids.items():
        if tensor is None:
            continue
        if tensor.ndim != 1 or tensor.shape[0] != rows:
            raise ShapeError(f"{name} must have shape ({rows},), got {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise ShapeError(f"{name} must be integers, got {tensor.dtype}")
        if tensor.device != device:
            raise ShapeError(f"{name} is on {tensor.device} but the features are on {device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Require ``value`` to be one of ``choices``.

    Raises:
        ConfigError: Naming the argument, its value and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


def check_smoothing(label_smoothing: float) -> None:
    """Require 0 <= label_smoothing < 1.

    Raises:
        ConfigError: Naming the value.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")


def as_scalar(value: Tensor | float, like: Tensor, name: str) -> Tensor:
    """Return ``value`` as a 0-d tensor on the device of ``like``, in float32 (float64 stays), keeping its graph.

    Raises:
        ShapeError: If it has more than one element.
    """
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=like.device)
    if value.numel() != 1:
        raise ShapeError(f"{name} must be a single number, got shape {tuple(value.shape)}")
    return value.reshape(()).to(device=like.device, dtype=torch.promote_types(value.dtype, torch.float32))

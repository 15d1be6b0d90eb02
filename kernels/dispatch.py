"""Which implementation runs an operation, and why.

Three backends compute the same numbers: ``triton`` (CUDA tensors; CPU tensors only under Triton's interpreter),
``torch`` (blockwise PyTorch, any device, memory O(B·D + block)) and ``reference`` (dense, the oracle of the tests).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from ftfast.errors import ConfigError

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "torch", "reference")


@functools.lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether the triton package can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=1)
def interpreting() -> bool:
    """Return whether Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``, read once)."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(backend: str, tensor: Tensor) -> str:
    """Resolve ``backend`` for operations on ``tensor``.

    Args:
        backend: One of :data:`BACKENDS`. "auto" takes triton for CUDA tensors when it is installed, else torch.
        tensor: Any input of the operation; only its device is looked at.

    Returns:
        "triton", "torch" or "reference".

    Raises:
        ConfigError: If the name is unknown, or "triton" is asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        return "triton" if tensor.device.type == "cuda" and has_triton() else "torch"
    if backend == "triton":
        if not has_triton():
            raise ConfigError("backend 'triton' needs the package triton; install it or use backend='torch'")
        if tensor.device.type != "cuda" and not interpreting():
            raise ConfigError(
                f"backend 'triton' needs CUDA tensors, got {tensor.device.type}; use backend='torch' "
                "or set TRITON_INTERPRET=1 before Python starts"
            )
    return backend


def follow_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Cast float32 CUDA features to the autocast dtype when autocast is on, as ``torch.matmul`` would."""
    if features[0].device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in features)
    return features


def explain() -> dict[str, str]:
    """Say, per device type, which backend "auto" takes and why (for ``ftfast doctor``)."""
    cuda = torch.cuda.is_available()
    if cuda and has_triton():
        reason = f"triton on {torch.cuda.get_device_name()}"
    elif cuda:
        reason = "torch: triton is not installed (pip install triton); same results, slower"
    else:
        reason = "torch: no CUDA device is visible"
    return {"cuda": reason, "cpu": "torch: blockwise PyTorch; Triton compiles for GPUs only"}

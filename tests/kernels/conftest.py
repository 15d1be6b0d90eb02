"""Uninitialised memory is NaN in kernel tests, so that an output nobody wrote cannot pass."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# The interpreter must be chosen before triton is imported, so its tests run in a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton_kernels.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks, stripes and superblocks so small that every loop over them runs several times."""
    from ftfast.kernels import torch_softmax, tuning

    monkeypatch.setattr(torch_softmax, "BLOCK_ROWS", 16)
    monkeypatch.setattr(torch_softmax, "BLOCK_COLUMNS", 24)
    monkeypatch.setattr(tuning, "WORKSPACE_BYTES", 32 * 32 * 4)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from ftfast.kernels import triton_softmax

        monkeypatch.setattr(triton_softmax, "PARTIAL_BYTES", 700)

"""Bridge to the C++ loops over weights (``ftfast._W``): which tensors they can take, and the calls.

The extension is optional. Without it, or for tensors it does not take (other dtypes, overlapping or differently laid
out memory), the callers use PyTorch operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["accumulate", "adamw", "instruction_sets", "is_available", "penalty", "per_sample_fisher", "takes"]

Row = Sequence[Tensor | None]  # theta, grad, exp_avg, exp_avg_sq, start, precision


def _load() -> Any:
    """The extension module, or None where it was not built."""
    try:
        return importlib.import_module("ftfast._W")
    except ImportError:
        return None


_EXTENSION = _load()


def is_available() -> bool:
    """Whether the extension was built.

    Returns:
        True if the C++ loops can be used.
    """
    return _EXTENSION is not None


def instruction_sets() -> list[str]:
    """Instruction sets the loops can use on this processor, best first.

    Returns:
        Names such as "avx512", "avx2", "portable"; empty without the extension.
    """
    return list(_EXTENSION.instruction_sets()) if _EXTENSION is not None else []


def takes(row: Row) -> bool:
    """Whether the loops can work on these tensors, which belong to one parameter.

    Args:
        row: theta, grad, exp_avg, exp_avg_sq, start, precision; None where absent.

    Returns:
        True for float32 CPU tensors (precision may be bfloat16) of one dense layout.
    """
    if _EXTENSION is None:
        return False
    present = [tensor for tensor in row if tensor is not None]
    first = present[0]
    if first.layout != torch.strided or not _is_dense(first):
        return False
    for tensor in present:
        allowed = (torch.float32, torch.bfloat16) if tensor is row[-1] else (torch.float32,)
        if tensor.device.type != "cpu" or tensor.dtype not in allowed or tensor.is_neg() or tensor.is_conj():
            return False
        if tensor.shape != first.shape or (tensor.stride() != first.stride() and not _both_contiguous(tensor, first)):
            return False
    return True


def _both_contiguous(one: Tensor, other: Tensor) -> bool:
    """Same memory order although strides of size-1 axes may differ."""
    return one.is_contiguous() and other.is_contiguous()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _table(rows: Sequence[Row]) -> np.ndarray:
    """Addresses, sizes and importance dtype of each row, as the extension wants them."""
    cells = []
    for row in rows:
        precision, theta = row[5], row[0]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in row]
        numel = 0 if theta is None else theta.numel()
        cells.append([*addresses, numel, int(precision is not None and precision.dtype == torch.bfloat16)])
    return np.array(cells, dtype=np.int64).reshape(-1, 8)


def adamw(
    rows: Sequence[Row], coefficients: Sequence[float], numbers: Sequence[float], mode: int, isa: str = ""
) -> float:
    """One anchored AdamW step over all rows.

    Args:
        rows: Tensors that :func:`takes` accepts.
        coefficients: c per row.
        numbers: lr, beta1, beta2, eps, weight decay, step.
        mode: 1 coupled, 2 decoupled, 3 proximal.
        isa: Instruction set; empty picks the best.

    Returns:
        The penalty before the step.
    """
    coefficient_array = np.asarray(coefficients, dtype=np.float64)
    number_array = np.asarray(numbers, dtype=np.float64)
    return float(_EXTENSION.adamw(_table(rows), coefficient_array, number_array, mode, torch.get_num_threads(), isa))


def penalty(rows: Sequence[Row], coefficients: Sequence[float], isa: str = "") -> float:
    """Penalty over all rows; rows with a gradient get the penalty's gradient added to it.

    Args:
        rows: Tensors that :func:`takes` accepts, with a start.
        coefficients: c per row.
        isa: Instruction set; empty picks the best.

    Returns:
        The penalty.
    """
    coefficient_array = np.asarray(coefficients, dtype=np.float64)
    return float(_EXTENSION.penalty(_table(rows), coefficient_array, torch.get_num_threads(), isa))


def accumulate(rows: Sequence[Row], decay: float, weight: float, normalize: bool, isa: str = "") -> None:
    """``F <- decay F + weight g^2`` over rows whose first two tensors are F and g.

    Args:
        rows: Tensors that :func:`takes` accepts.
        decay: Factor on F.
        weight: Factor on the squares.
        normalize: Divide each row's squares by their mean.
        isa: Instruction set; empty picks the best.
    """
    _EXTENSION.accumulate(_table(rows), decay, weight, normalize, torch.get_num_threads(), isa)


def per_sample_fisher(fisher: Tensor, inputs: Tensor, grads: Tensor, weight: float, isa: str = "") -> bool:
    """``F += weight sum_n (G_n^T A_n)^2`` for float32 or bfloat16 inputs with unit stride along the last axis.

    Args:
        fisher: (out, in) float32 with unit stride along the last axis.
        inputs: (N, T, in).
        grads: (N, T, out).
        weight: Factor on the squares.
        isa: Instruction set; empty picks the best.

    Returns:
        False if the loops cannot take these tensors; nothing was changed then.
    """
    operands = (inputs, grads)
    narrow = (torch.float32, torch.bfloat16)
    fits = all(t.device.type == "cpu" and t.dtype in narrow and (t.stride(-1) == 1 or t.numel() == 0) for t in operands)
    if _EXTENSION is None or not fits or fisher.dtype != torch.float32 or fisher.device.type != "cpu":
        return False
    if fisher.stride(-1) != 1 and fisher.shape[-1] > 1:
        return False
    samples, length, columns = inputs.shape
    sizes = [grads.shape[-1], columns, samples, length, fisher.stride(0), inputs.stride(0), inputs.stride(1)]
    sizes += [grads.stride(0), grads.stride(1), *(int(t.dtype == torch.bfloat16) for t in operands)]
    size_array = np.array(sizes, dtype=np.int64)
    _EXTENSION.per_sample_fisher(
        fisher.data_ptr(), inputs.data_ptr(), grads.data_ptr(), size_array, weight, torch.get_num_threads(), isa
    )
    return True

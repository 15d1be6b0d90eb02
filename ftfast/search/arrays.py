"""Checks and conversions at the door of the search room: numpy, torch and CuPy arrays become two checked tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ftfast.errors import ShapeError

METRICS = ("cosine", "ip", "l2")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Problem:
    """One checked search: everything a backend needs, and nothing it must check again.

    Args:
        queries: (Q, D), contiguous, one of `DTYPES`.
        gallery: (N, D), contiguous, one of `DTYPES`, on the device of `queries`.
        k: 1 <= k <= N.
        metric: One of `METRICS`.
        exclude: (Q,) int64 gallery row that each query must not return (-1: none), or None.
        mask: (N,) or (Q, N) bool, True where a gallery row may be returned, or None.
    """

    queries: torch.Tensor
    gallery: torch.Tensor
    k: int
    metric: str
    exclude: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def to_tensor(array: Any, name: str) -> torch.Tensor:
    """Views a numpy, torch or DLPack array as a detached tensor without copying.

    Args:
        array: numpy array, torch tensor, or any object with `__dlpack__` (CuPy, JAX).
        name: What to call it in an error message.

    Returns:
        A tensor that shares memory with `array` (read-only numpy arrays are shared too, and never written).

    Raises:
        ShapeError: If `array` is none of those.
    """
    if isinstance(array, torch.Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise ShapeError(f"{name} is a numpy array of {array.dtype}; use float32, float16, bfloat16 or int8.")
        if not array.flags.writeable:
            return _share_readonly(array)
        return torch.from_numpy(np.ascontiguousarray(array))
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    raise ShapeError(
        f"{name} is a {type(array).__name__}; pass a numpy array, a torch tensor or an array with DLPack support."
    )


def _share_readonly(array: np.ndarray) -> torch.Tensor:
    """Wraps a read-only numpy array (a memory map, for instance); torch would warn, and nothing here writes to it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def result_wrapper(array: Any) -> Callable[[torch.Tensor], Any]:
    """Returns the function that gives a result in the array library of `array`."""
    if isinstance(array, np.ndarray):
        return lambda tensor: tensor.cpu().numpy()
    if isinstance(array, torch.Tensor):
        return lambda tensor: tensor
    if type(array).__module__.partition(".")[0] == "cupy":
        import cupy

        return lambda tensor: cupy.from_dlpack(tensor)
    return lambda tensor: tensor


def check_matrix(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Checks one (rows, width) matrix and makes it contiguous.

    Args:
        tensor: The matrix.
        name: What to call it in an error message.

    Returns:
        The matrix, contiguous.

    Raises:
        ShapeError: If it is not two-dimensional, has no row or column, or has a dtype outside `DTYPES`.
    """
    if tensor.layout != torch.strided:
        raise ShapeError(f"{name} is a {tensor.layout} tensor; top-k needs a dense one. Call .to_dense() first.")
    if tensor.dim() != 2:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; it must be two-dimensional: (rows, width).")
    if tensor.dtype not in DTYPES:
        raise ShapeError(
            f"{name} has dtype {tensor.dtype}; use float32, float16, bfloat16 or int8 (convert with .float())."
        )
    if tensor.shape[0] == 0 or tensor.shape[1] == 0:
        raise ShapeError(f"{name} is empty: shape {tuple(tensor.shape)}. It needs at least one row and one column.")
    return tensor.contiguous()


def check_problem(
    queries: Any, gallery: Any, k: int, metric: str, exclude_self: Any = None, mask: Any = None
) -> Problem:
    """Turns the arguments of a search into a `Problem`.

    Args:
        queries: (Q, D) array.
        gallery: (N, D) array.
        k: Number of neighbours.
        metric: One of `METRICS`.
        exclude_self: See `ftfast.search.topk`.
        mask: See `ftfast.search.topk`.

    Returns:
        The checked problem.

    Raises:
        ShapeError: With one sentence that names the argument, its value and what to do.
    """
    if metric not in METRICS:
        raise ShapeError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}.")
    queries = check_matrix(to_tensor(queries, "queries"), "queries")
    gallery = check_matrix(to_tensor(gallery, "gallery"), "gallery")
    if queries.device != gallery.device:
        raise ShapeError(f"queries are on {queries.device} but gallery is on {gallery.device}; move one of them.")
    if queries.shape[1] != gallery.shape[1]:
        raise ShapeError(f"queries have width {queries.shape[1]} but gallery has width {gallery.shape[1]}.")
    check_k(k, gallery.shape[0])
    exclude = _check_exclude(exclude_self, queries, gallery)
    return Problem(queries, gallery, int(k), metric, exclude, _check_mask(mask, queries, gallery))


def check_k(k: int, rows: int) -> None:
    """Checks 1 <= k <= rows.

    Args:
        k: Number of neighbours asked for.
        rows: Number of gallery rows.

    Raises:
        ShapeError: If k is not an integer in that range.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise ShapeError(f"k is {k!r}; it must be an integer.")
    if k < 1:
        raise ShapeError(f"k is {k}; it must be at least 1.")
    if k > rows:
        raise ShapeError(f"k is {k} but the gallery has {rows} rows; lower k to at most {rows}.")


def _check_exclude(exclude_self: Any, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor | None:
    if exclude_self is None or exclude_self is False:
        return None
    rows, columns = queries.shape[0], gallery.shape[0]
    if exclude_self is True:
        if rows != columns:
            raise ShapeError(
                f"exclude_self=True needs queries and gallery to be the same rows, but there are {rows} queries and "
                f"{columns} gallery rows; pass the gallery row of each query as an int64 array instead."
            )
        return torch.arange(rows, device=queries.device)
    ids = to_tensor(exclude_self, "exclude_self")
    if ids.shape != (rows,) or ids.dtype != torch.int64:
        raise ShapeError(f"exclude_self has shape {tuple(ids.shape)} and dtype {ids.dtype}; use int64 of ({rows},).")
    ids = ids.to(queries.device).contiguous()
    if bool(((ids < -1) | (ids >= columns)).any()):
        raise ShapeError(f"exclude_self names a row outside the gallery: allowed are -1 (none) to {columns - 1}.")
    return ids


def _check_mask(mask: Any, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    tensor = to_tensor(mask, "mask")
    rows, columns = queries.shape[0], gallery.shape[0]
    if tensor.dtype != torch.bool or tuple(tensor.shape) not in ((columns,), (rows, columns)):
        raise ShapeError(
            f"mask has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; use bool of ({columns},) or "
            f"({rows}, {columns}), True where a gallery row may be returned."
        )
    return tensor.to(queries.device).contiguous()

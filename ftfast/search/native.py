"""The compiled extension `ftfast._C`: when it is there, what it can do, and calls by raw pointers."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any, NamedTuple

import torch

from ftfast.errors import FtfastError, ShapeError
from ftfast.search.arrays import Problem

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_METRICS = {"ip": 0, "cosine": 1, "l2": 2}
MODES = {"fp32": 0, "bf16": 1, "int8": 2}
_MAIN_PROCESS = os.getpid()


class Certificate(NamedTuple):
    """Work of one search: pairs whose bound was evaluated, pairs it could not drop, pairs rescored in float64."""

    scanned: int
    candidates: int
    rescored: int


@cache
def extension() -> Any | None:
    """Returns the compiled module, or None when it was not built for this Python."""
    try:
        return importlib.import_module("ftfast._C")
    except ImportError:
        return None


def require_extension() -> Any:
    """Returns the compiled module.

    Returns:
        The module `ftfast._C`.

    Raises:
        FtfastError: If it was not built.
    """
    module = extension()
    if module is None:
        raise FtfastError(
            "backend 'native' needs the compiled extension ftfast._C, which is not built; install a C++ compiler and "
            "reinstall ftfast, or use backend='torch'."
        )
    return module


def describe() -> str:
    """One sentence for `ftfast doctor`: which search path is active and why.

    Returns:
        For example "C++ extension, instructions avx512-vnni-bf16, OpenMP".
    """
    module = extension()
    if module is None:
        return "PyTorch (the C++ extension is not built: no compiler was found when ftfast was installed)"
    facts = module.describe()
    return f"C++ extension, instructions {facts['instructions']}, {'OpenMP' if facts['openmp'] else 'one thread'}"


def default_mode(width: int, isa: str = "auto") -> str:
    """The cheapest certified copy this processor can multiply: "int8", "bf16" or "fp32" (no prefilter).

    Args:
        width: Embedding width; int8 sums would overflow beyond 32768.
        isa: "auto", "avx512", "avx2" or "portable".

    Returns:
        The name of the mode.
    """
    module = extension()
    if module is None or isa not in ("auto", "avx512"):
        return "fp32"
    facts = module.describe()
    if facts["int8"] and width <= 32768:
        return "int8"
    return "bf16" if facts["bf16"] else "fp32"


def thread_count() -> int:
    """Threads to use: torch's setting, and one in a forked child, where OpenMP's pool does not survive."""
    return torch.get_num_threads() if os.getpid() == _MAIN_PROCESS else 1


class NativeShadow:
    """A low-precision copy of a gallery that grows by `append`; owned by an index, or made for one search.

    Args:
        metric: "ip", "cosine" or "l2".
        mode: "int8", "bf16" or "fp32".
        width: Embedding width.
    """

    def __init__(self, metric: str, mode: str, width: int) -> None:
        if mode not in MODES:
            raise ShapeError(f"mode is {mode!r}; choose one of {', '.join(MODES)}.")
        self.mode = mode
        self.handle = require_extension().Shadow(_METRICS[metric], MODES[mode], width)

    def append(self, rows: torch.Tensor, threads: int | None = None) -> None:
        """Encodes more rows.

        Args:
            rows: (N, D) contiguous CPU tensor.
            threads: Default: torch's setting.
        """
        self.handle.append(rows.data_ptr(), rows.shape[0], _TYPES[rows.dtype], threads or thread_count(), "auto")

    @property
    def nbytes(self) -> int:
        """Bytes held by the copy."""
        return int(self.handle.nbytes)


def _settings(problem: Problem, mode: str, threads: int | None) -> dict[str, int]:
    mask, exclude = problem.mask, problem.exclude
    return {
        "queries": problem.queries.data_ptr(),
        "query_rows": problem.queries.shape[0],
        "query_type": _TYPES[problem.queries.dtype],
        "gallery": problem.gallery.data_ptr(),
        "gallery_rows": problem.gallery.shape[0],
        "gallery_type": _TYPES[problem.gallery.dtype],
        "width": problem.gallery.shape[1],
        "k": problem.k,
        "metric": _METRICS[problem.metric],
        "mode": MODES[mode],
        "threads": threads or thread_count(),
        "mask": 0 if mask is None else mask.data_ptr(),
        "mask_per_query": int(mask is not None and mask.dim() == 2),
        "exclude": 0 if exclude is None else exclude.data_ptr(),
    }


def topk_native(
    problem: Problem,
    *,
    shadow: NativeShadow | None = None,
    mode: str | None = None,
    isa: str = "auto",
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Certificate]:
    """Exact top-k on the CPU by the certified prefilter of `csrc/topk.h`.

    Args:
        problem: The checked search, on the CPU.
        shadow: A copy of exactly this gallery; None: blocks are encoded on the way.
        mode: "int8", "bf16" or "fp32"; None chooses by processor.
        isa: "auto", or "avx512", "avx2", "portable" to force an instruction set (tests).
        threads: Default: torch's setting.

    Returns:
        Scores (Q, k) float64, indices (Q, k) int64 and the counters. The result does not depend on `mode`, `isa` or
        `threads`.
    """
    module = require_extension()
    scores = torch.empty(problem.queries.shape[0], problem.k, dtype=torch.float64)
    indices = torch.empty(problem.queries.shape[0], problem.k, dtype=torch.int64)
    settings = _settings(problem, mode or default_mode(problem.gallery.shape[1], isa), threads)
    handle = None if shadow is None else shadow.handle
    counts = module.topk(settings, handle, scores.data_ptr(), indices.data_ptr(), isa)
    return scores, indices, Certificate(*counts)


def range_native(
    problem: Problem, radius: float, *, shadow: NativeShadow | None = None, mode: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Certificate]:
    """Every row with score > radius (l2: squared distance < radius), compared in float32 as faiss does.

    Args:
        problem: The checked search; its k is not used.
        radius: The limit.
        shadow: As in `topk_native`.
        mode: As in `topk_native`.

    Returns:
        Counts (Q,) int64, indices (M,) int64, scores (M,) float32, best first within a query, and the counters.
    """
    module = require_extension()
    settings = _settings(problem, mode or default_mode(problem.gallery.shape[1]), None)
    handle = None if shadow is None else shadow.handle
    sizes, ids, scores, counts = module.range_search(settings, handle, float(radius), "auto")
    return (
        _from_bytes(sizes, torch.int64),
        _from_bytes(ids, torch.int64),
        _from_bytes(scores, torch.float32),
        Certificate(*counts),
    )


def _from_bytes(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

"""Exact top-k on CUDA: tensor-core products as a certified prefilter, the kernels of `csrc/cuda/topk.cu` for the rest.

The low-precision copies are bfloat16 (float16 and bfloat16 galleries stay as they are); a tile of products is made in
float32 by cuBLAS, small enough to stay in the L2 cache, and read once. Not measured on a GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from ftfast.search.arrays import Problem

_CAPACITY = 2048  # listed columns per query between two reductions
_TILE_ELEMENTS = 1 << 22  # float32 products held at once: 16 MB
_QUERIES = 4096
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_METRICS = {"ip": 0, "cosine": 1, "l2": 2}
_WILD_LOW, _WILD_HIGH = 2.0**-40, 2.0**40


class Launcher(Protocol):
    """Runs a kernel of topk.cu by name with C arguments."""

    def launch(self, name: str, grid: tuple[int, int], block: int, arguments: list[Any]) -> None:
        """Starts `name` on the current stream; `arguments` are ctypes values in the kernel's order."""


class DriverLauncher:
    """Launches kernels of a compiled fat binary through the CUDA driver; needs neither CuPy nor a build of torch.

    Args:
        image: The fat binary.

    Raises:
        RuntimeError: If the driver rejects it.
    """

    def __init__(self, image: bytes) -> None:
        torch.cuda.init()
        torch.cuda.current_stream()
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), image))

    def launch(self, name: str, grid: tuple[int, int], block: int, arguments: list[Any]) -> None:
        """Starts a kernel on the current stream.

        Args:
            name: Kernel name.
            grid: Blocks in x and y.
            block: Threads per block.
            arguments: ctypes values.
        """
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._functions[name] = function
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchKernel(
                self._functions[name], grid[0], grid[1], 1, block, 1, 1, 0, stream, pointers, None
            )
        )

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"the CUDA driver returned error {status} for the top-k kernels.")


class CupyLauncher:
    """Compiles the source by NVRTC through CuPy at first use.

    Args:
        source: The text of topk.cu.
    """

    def __init__(self, source: str) -> None:
        import cupy

        self._cupy = cupy
        self._module = cupy.RawModule(code=source, backend="nvrtc", options=("-std=c++17",))

    def launch(self, name: str, grid: tuple[int, int], block: int, arguments: list[Any]) -> None:
        """Starts a kernel on torch's current stream.

        Args:
            name: Kernel name.
            grid: Blocks in x and y.
            block: Threads per block.
            arguments: ctypes values.
        """
        import numpy as np

        kinds = {ctypes.c_int: np.int32, ctypes.c_int64: np.int64, ctypes.c_void_p: np.uint64}
        values = tuple(kinds[type(value)](value.value or 0) for value in arguments)
        stream = self._cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        with stream:
            self._module.get_function(name)((*grid, 1), (block, 1, 1), values)


def source_path() -> Path | None:
    """Where the kernels' source is: beside this file in a wheel, in `csrc/` in a checkout."""
    here = Path(__file__).resolve()
    candidates = (here.with_name("topk.cu"), here.parents[2] / "csrc" / "cuda" / "topk.cu")
    return next((path for path in candidates if path.is_file()), None)


@cache
def find_launcher() -> Launcher | None:
    """The way to run the kernels here: the fat binary made at install, else NVRTC through CuPy, else None."""
    if not torch.cuda.is_available():
        return None
    binary = Path(__file__).with_name("topk.fatbin")
    if binary.is_file():
        try:
            return DriverLauncher(binary.read_bytes())
        except (RuntimeError, OSError):
            pass  # built for another architecture; NVRTC compiles for this one
    source = source_path()
    if source is None:
        return None
    try:
        return CupyLauncher(source.read_text(encoding="utf-8"))
    except ImportError:
        return None


def cuda_kernels_available() -> bool:
    """True if `topk_cuda` can run; otherwise CUDA tensors are searched in plain PyTorch, with the same result."""
    return find_launcher() is not None


def describe_cuda() -> tuple[str, str]:
    """The backend that searches CUDA tensors here and why, for ``ftfast doctor``."""
    launcher = find_launcher()
    if isinstance(launcher, DriverLauncher):
        return "native", "tensor-core prefilter; kernels compiled by nvcc when ftfast was installed"
    if launcher is not None:
        return "native", "tensor-core prefilter; kernels compiled by NVRTC through CuPy"
    return (
        "torch",
        "blocks of float64 products: no nvcc at install, and no CuPy (pip install cupy-cuda12x)",
    )


def tensor_core_product(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(Q, B) float32 products of two low-precision matrices."""
    return torch.mm(queries, rows.T, out_dtype=torch.float32)


@dataclass
class _Lists:
    """Candidate lists and kept results of one batch of queries, in the layout of the kernels."""

    count: torch.Tensor
    candidates: torch.Tensor
    scores: torch.Tensor
    indices: torch.Tensor
    work_scores: torch.Tensor
    work_indices: torch.Tensor
    best_scores: torch.Tensor
    best_indices: torch.Tensor
    kth: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, k: int, device: torch.device) -> _Lists:
        """Make empty lists for a number of queries and results."""
        size = 1 << (k + _CAPACITY - 1).bit_length()

        def make(width: int, dtype: torch.dtype) -> torch.Tensor:
            """Allocate one uninitialised tensor of a row per query."""
            return torch.empty(rows, width, dtype=dtype, device=device)

        return cls(
            torch.zeros(rows, dtype=torch.int32, device=device),
            make(_CAPACITY, torch.int32),
            make(_CAPACITY, torch.float64),
            make(_CAPACITY, torch.int64),
            make(size, torch.float64),
            make(size, torch.int64),
            make(k, torch.float64).fill_(-torch.inf),
            make(k, torch.int64).fill_(-1),
            torch.full((rows,), -torch.inf, dtype=torch.float64, device=device),
        )


class _Batch:
    """The search of one batch of queries over all tiles."""

    def __init__(self, problem: Problem, launcher: Launcher, start: int, stop: int) -> None:
        self.problem, self.launcher, self.start = problem, launcher, start
        self.queries = problem.queries[start:stop]
        wide = self.queries.double()
        self.norm = wide.norm(dim=1)
        self.wild = ~((self.norm == 0) | ((self.norm > _WILD_LOW) & (self.norm < _WILD_HIGH)))
        low = torch.float16 if self.queries.dtype == torch.float16 == problem.gallery.dtype else torch.bfloat16
        self.copy = self.queries.masked_fill(self.wild[:, None], 0).to(low)
        lost = (wide - self.copy.double()).norm(dim=1) / self.norm
        self.relative_loss = float(lost[~self.wild & (self.norm > 0)].max()) if bool((self.norm > 0).any()) else 0.0
        if bool(self.wild.all()):
            self.relative_loss = 0.0
        self.weight = (self.norm.masked_fill(self.wild, 0) * (1 + 2.0**-18)).float()
        self.exclude = None if problem.exclude is None else problem.exclude[start:stop]
        self.lists = _Lists.allocate(stop - start, problem.k, self.queries.device)

    def prepare(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copy, error reach and offset of the rows [first, last)."""
        rows = self.problem.gallery[first:last].double()
        norm = rows.norm(dim=1)
        wild = ~((norm == 0) | ((norm > _WILD_LOW) & (norm < _WILD_HIGH)))
        scale = torch.ones_like(norm)
        if self.problem.metric == "cosine":
            scale = torch.where(norm > 0, 1 / norm, 1.0)
        shaped = (rows * scale[:, None]).masked_fill(wild[:, None], 0)
        copy = shaped.to(self.copy.dtype)
        kept, lost = copy.double().norm(dim=1), (shaped - copy.double()).norm(dim=1)
        # Tensor cores may truncate instead of round, which doubles the error of each addition.
        rounding = (self.queries.shape[1] + 32) * 2.0**-22
        reach = (lost + kept * (self.relative_loss + rounding) + 2.0**-80) * (1 + 2.0**-18)
        offset = 0.5 * shaped.square().sum(dim=1) * (1 - 2.0**-18)
        if self.problem.metric != "l2":
            offset = torch.zeros_like(offset)
        return copy, reach.float().masked_fill(wild, torch.inf), offset.float()

    def thresholds(self) -> torch.Tensor:
        """The smallest bound of a row that can still enter, per query, rounded down to float32."""
        kth, width = self.lists.kth, self.queries.shape[1]
        slack = (width + 16) * 2.0**-50
        if self.problem.metric == "l2":
            value = 0.5 * (self.norm.square() + kth) - slack * (self.norm.square() + kth.abs())
        elif self.problem.metric == "cosine":
            value = self.norm * kth - slack * self.norm
        else:
            value = kth - slack * kth.abs()
        value = value.masked_fill(self.wild | ~torch.isfinite(kth), -torch.inf)
        return torch.nextafter(value.float(), torch.full_like(self.weight, -torch.inf))

    def scan(self, first: int, last: int, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Merges the rows [first, last) into the result."""
        copy, reach, offset = self.prepare(first, last)
        scores = product(self.copy, copy)
        self._collect(scores, reach, offset, first, 0, last - first)
        longest = int(self.lists.count.max())
        if longest <= _CAPACITY:
            self._merge(first, longest)
            return
        for low in range(0, last - first, _CAPACITY):  # at most a full list each, and a better threshold after each
            high = min(last - first, low + _CAPACITY)
            self._collect(scores, reach, offset, first, low, high)
            self._merge(first + low, int(self.lists.count.max()))

    def _collect(
        self, scores: torch.Tensor, reach: torch.Tensor, offset: torch.Tensor, first: int, low: int, high: int
    ) -> None:
        mask, per_query = self.problem.mask, 0
        if mask is not None:
            mask = mask[first + low :] if mask.dim() == 1 else mask[self.start :, first + low :]
            per_query = mask.stride(0) if mask.dim() == 2 else 0
        limit = self.thresholds()
        self.lists.count.zero_()
        arguments = [
            *(_pointer(scores[:, low:]), ctypes.c_int64(scores.stride(0)), _pointer(reach[low:])),
            *(
                _pointer(self.weight),
                _pointer(offset[low:]),
                _pointer(limit),
                _pointer(mask),
                ctypes.c_int64(per_query),
            ),
            *(_pointer(self.exclude), ctypes.c_int(high - low), ctypes.c_int64(first + low), ctypes.c_int(_CAPACITY)),
            *(_pointer(self.lists.count), _pointer(self.lists.candidates)),
        ]
        blocks = max(1, min(64, (high - low + 255) // 256))
        self.launcher.launch("ftfast_collect", (blocks, len(self.queries)), 256, arguments)

    def _merge(self, first: int, longest: int) -> None:
        if longest == 0:
            return
        lists, problem = self.lists, self.problem
        counters = [_pointer(lists.count), _pointer(lists.candidates)]
        found = [_pointer(lists.scores), _pointer(lists.indices)]
        rescore = [
            *(_pointer(self.queries), ctypes.c_int(_TYPES[self.queries.dtype]), _pointer(problem.gallery)),
            *(ctypes.c_int(_TYPES[problem.gallery.dtype]), ctypes.c_int(self.queries.shape[1])),
            *(ctypes.c_int(_METRICS[problem.metric]), ctypes.c_int64(first), ctypes.c_int(_CAPACITY)),
            *counters,
            *found,
        ]
        self.launcher.launch("ftfast_rescore", (min(longest, 512), len(self.queries)), 32, rescore)
        reduce = [
            *(ctypes.c_int(problem.k), ctypes.c_int(_CAPACITY), ctypes.c_int(lists.work_scores.shape[1])),
            *(counters[0], *found, _pointer(lists.work_scores), _pointer(lists.work_indices)),
            *(_pointer(lists.best_scores), _pointer(lists.best_indices), _pointer(lists.kth)),
        ]
        self.launcher.launch("ftfast_reduce", (len(self.queries), 1), 256, reduce)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def topk_cuda(
    problem: Problem,
    *,
    launcher: Launcher | None = None,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = tensor_core_product,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k on the GPU, any k.

    Args:
        problem: The checked search, on one CUDA device.
        launcher: How to run kernels; None finds it. Tests pass an emulation on the CPU.
        product: (Q, B) float32 products of the low-precision copies.

    Returns:
        Scores (Q, k) float64 and indices (Q, k) int64, as `ftfast.search.topk` defines them. Deterministic.

    Raises:
        RuntimeError: If there is no way to run the kernels.

    Memory is O(Q k + Q 2048 + one tile of products). One number per tile is read back.
    """
    launcher = launcher or find_launcher()
    if launcher is None:
        raise RuntimeError("no compiled CUDA kernels and no CuPy; install CuPy or rebuild with nvcc.")
    scores, indices = [], []
    columns = problem.gallery.shape[0]
    for start in range(0, problem.queries.shape[0], _QUERIES):
        stop = min(problem.queries.shape[0], start + _QUERIES)
        batch = _Batch(problem, launcher, start, stop)
        width = max(_CAPACITY, _TILE_ELEMENTS // (stop - start))
        first = 0
        while first < columns:  # a short first tile gives the others a threshold
            last = min(columns, first + (_CAPACITY if first == 0 else width))
            batch.scan(first, last, product)
            first = last
        scores.append(batch.lists.best_scores)
        indices.append(batch.lists.best_indices)
    result = torch.cat(scores)
    return (-result if problem.metric == "l2" else result), torch.cat(indices)

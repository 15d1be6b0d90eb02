"""Handover to faiss: its flat index as a backend of `topk`, and its approximate indexes for huge galleries."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from ftfast.errors import MissingExtraError, ShapeError
from ftfast.search.arrays import Problem, check_matrix, to_tensor


def _faiss(purpose: str) -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", "search", purpose) from error


def _as_float32(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.float().cpu().numpy())


class FaissIndex:
    """A faiss index behind this package's conventions: cosine as well as ip and l2, -1 padding, exclude by id.

    Approximate unless the factory string is "Flat". Scores come from faiss in float32; ties are in faiss's order.

    Args:
        width: Embedding width.
        metric: "cosine" (rows are normalised on the way in), "ip" or "l2".
        factory: A faiss factory string, for example "Flat", "IVF1024,Flat" or "HNSW32".
        search_breadth: IVF lists to visit (nprobe) or HNSW queue length (efSearch); None keeps faiss's default.
        gpu: Moves the index to the first GPU (needs faiss-gpu).

    Raises:
        MissingExtraError: If faiss is not installed.
        ShapeError: If faiss cannot build that index.
    """

    def __init__(
        self,
        width: int,
        metric: str = "cosine",
        *,
        factory: str = "Flat",
        search_breadth: int | None = None,
        gpu: bool = False,
    ) -> None:
        faiss = _faiss("backend 'faiss'")
        self.metric = metric
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        try:
            index = faiss.index_factory(width, factory, kind)
        except RuntimeError as error:
            raise ShapeError(f"faiss cannot build an index from {factory!r} for width {width}.") from error
        if gpu:
            if not hasattr(faiss, "StandardGpuResources"):
                raise ShapeError("gpu=True needs faiss-gpu, but the installed faiss is for the CPU.")
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        if search_breadth is not None:
            name = "efSearch" if "HNSW" in factory else "nprobe"
            faiss.ParameterSpace().set_index_parameter(index, name, search_breadth)
        self.index = index

    def add(self, rows: Any) -> None:
        """Adds rows; an index that needs training (IVF, PQ) is trained on the first ones.

        Args:
            rows: (N, D) array.
        """
        values = self._prepare(rows, "rows")
        if not self.index.is_trained:
            self.index.train(values)
        self.index.add(values)

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows that faiss finds.

        Args:
            queries: (Q, D) array.
            k: Neighbours per query.

        Returns:
            Scores (Q, k) float32 and indices (Q, k) int64, -1 where faiss found fewer.
        """
        scores, indices = self.index.search(self._prepare(queries, "queries"), k)
        worst = np.inf if self.metric == "l2" else -np.inf
        return np.where(indices < 0, np.float32(worst), scores), indices

    def _prepare(self, array: Any, name: str) -> np.ndarray:
        values = _as_float32(check_matrix(to_tensor(array, name), name))
        if self.metric != "cosine":
            return values
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        return values / np.where(norms == 0, 1, norms)


def topk_faiss(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k by faiss's flat index, on the CPU.

    Args:
        problem: The checked search. A mask for each query is not something faiss can do.

    Returns:
        Scores (Q, k) float32 and indices (Q, k) int64.

    Raises:
        ShapeError: If the mask is (Q, N).
    """
    faiss = _faiss("backend 'faiss'")
    if problem.mask is not None and problem.mask.dim() == 2:
        raise ShapeError("backend 'faiss' cannot use a mask per query; pass a mask of (N,) or another backend.")
    index = FaissIndex(problem.gallery.shape[1], problem.metric)
    index.add(problem.gallery)
    extra = 0 if problem.exclude is None else 1
    k = min(problem.k + extra, problem.gallery.shape[0])
    parameters = None
    if problem.mask is not None:
        ids = problem.mask.nonzero()[:, 0].cpu().numpy()
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(ids))
    # faiss.contrib.torch_utils, once anyone imports it, replaces search by one without params and keeps the original.
    search = getattr(index.index, "search_numpy", index.index.search)
    found, ids = search(index._prepare(problem.queries, "queries"), k, params=parameters)
    worst = torch.inf if problem.metric == "l2" else -torch.inf
    indices = torch.from_numpy(ids)
    scores = torch.from_numpy(found).masked_fill(indices < 0, worst)
    if problem.exclude is not None:
        drop = indices == problem.exclude.cpu()[:, None]
        order = drop.to(torch.uint8).argsort(dim=1, stable=True)
        scores = scores.masked_fill(drop, worst).gather(1, order)
        indices = indices.masked_fill(drop, -1).gather(1, order)
    missing = problem.k - scores.shape[1]
    scores, indices = scores[:, : problem.k], indices[:, : problem.k]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=worst)
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    return scores.to(problem.queries.device), indices.to(problem.queries.device)

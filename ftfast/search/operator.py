"""`torch.ops.ftfast.topk`: the search as a PyTorch operator, so that torch.compile and fake tensors understand it."""

from __future__ import annotations

import torch

from ftfast.errors import ShapeError
from ftfast.search.arrays import Problem
from ftfast.search.cuda import cuda_kernels_available, topk_cuda
from ftfast.search.native import extension, topk_native
from ftfast.search.reference import topk_reference


def solve(problem: Problem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a checked search on the backend that was asked for, or the fastest one present.

    Args:
        problem: The search.
        backend: "auto", "native" or "torch".

    Returns:
        Scores (Q, k) float64 and indices (Q, k) int64.

    Raises:
        ShapeError: If the backend cannot search arrays on that device.
    """
    device = problem.queries.device.type
    if backend == "native" and device not in ("cpu", "cuda"):
        raise ShapeError(f"backend 'native' searches CPU and CUDA arrays, but queries are on {device}; use 'torch'.")
    if backend != "torch" and device == "cpu" and (backend == "native" or extension() is not None):
        scores, indices, _ = topk_native(problem)
        return scores, indices
    if backend != "torch" and device == "cuda" and (backend == "native" or cuda_kernels_available()):
        return topk_cuda(problem)
    return topk_reference(problem)


@torch.library.custom_op("ftfast::topk", mutates_args=())
def topk_op(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str,
    exclude: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator behind `ftfast.search.topk`; arguments as in `Problem`.

    Args:
        queries: (Q, D).
        gallery: (N, D).
        k: Neighbours per query.
        metric: "ip", "cosine" or "l2".
        exclude: (Q,) int64 or None.
        mask: (N,) or (Q, N) bool or None.
        backend: "auto", "native" or "torch".

    Returns:
        Scores (Q, k) float32 and indices (Q, k) int64.
    """
    problem = Problem(queries.contiguous(), gallery.contiguous(), k, metric, exclude, mask)
    scores, indices = solve(problem, backend)
    return scores.float(), indices


@topk_op.register_fake
def _topk_fake(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    metric: str,
    exclude: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)

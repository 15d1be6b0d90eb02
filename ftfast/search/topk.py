"""`topk`: the exact nearest neighbours of each query, by the fastest backend that is present."""

from __future__ import annotations

from typing import Any

from ftfast.errors import ShapeError
from ftfast.search.arrays import check_problem, result_wrapper
from ftfast.search.faiss_backend import topk_faiss
from ftfast.search.operator import topk_op

BACKENDS = ("auto", "native", "torch", "faiss")


def topk(
    queries: Any,
    gallery: Any,
    k: int,
    *,
    metric: str = "cosine",
    exclude_self: Any = None,
    mask: Any = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Finds the k best gallery rows of every query, exactly.

    Scores are defined in float64 on the inputs as stored: `ip` is q.x, `cosine` is q.x / (|q| |x|) (0 where a norm is
    0), `l2` is the squared distance |q - x|^2. The result is sorted best first (largest score; smallest distance),
    equal scores by the lowest index, and a NaN score is never selected. It does not depend on the number of threads.

    Args:
        queries: (Q, D) numpy, torch or DLPack array of float32, float16, bfloat16 or int8. Not copied if contiguous.
        gallery: (N, D) array on the same device.
        k: Neighbours per query, 1 <= k <= N.
        metric: "cosine", "ip" or "l2".
        exclude_self: True if the queries are the gallery (query i must not find row i), or (Q,) int64 naming the row
            that each query must not find (-1: none).
        mask: (N,) or (Q, N) bool, True where a row may be returned.
        backend: "auto", "native" (the compiled extension), "torch" (plain PyTorch) or "faiss" (the flat index of the
            installed faiss; its approximate indexes are in `ftfast.search.FaissIndex`).

    Returns:
        Scores (Q, k) float32 and indices (Q, k) int64, in the array library of `queries`. Where fewer than k rows are
        allowed the tail has index -1 and score -inf (+inf for l2).

    Raises:
        ShapeError: If a shape, dtype, device, k or metric cannot be used; the message names the argument.

    Memory beyond the inputs is O(Q k + a block), never O(Q N).
    """
    if backend not in BACKENDS:
        raise ShapeError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}.")
    p = check_problem(queries, gallery, k, metric, exclude_self, mask)
    wrap = result_wrapper(queries)
    if backend == "faiss":
        scores, indices = topk_faiss(p)
    else:
        scores, indices = topk_op(p.queries, p.gallery, p.k, p.metric, p.exclude, p.mask, backend)
    return wrap(scores), wrap(indices)

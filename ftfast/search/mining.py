"""Hard negatives: for every row the most similar rows that do not belong together with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftfast.errors import ShapeError
from ftfast.search.topk import topk

_FOUND_AT_ONCE = 1 << 22  # neighbours held while groups are compared: 48 MB


def hard_negatives(
    features: Any,
    k: int,
    *,
    groups: Any = None,
    gallery: Any = None,
    gallery_groups: Any = None,
    metric: str = "cosine",
    backend: str = "auto",
) -> np.ndarray:
    """Finds for every row its k nearest rows of other groups, exactly.

    Args:
        features: (N, D) rows, such as the start model's image features; anything that `topk` accepts.
        k: Negatives per row, at least 1.
        groups: (N,) group of each row, such as class labels or caption numbers; rows of one group are never each
            other's negatives. None: every row is a group of its own.
        gallery: (M, D) rows to search, such as text features; None: `features` itself.
        gallery_groups: (M,) groups of the gallery, required with `groups` and `gallery`. Without groups, row i of the
            gallery belongs to row i of `features` (image-text pairs).
        metric: "cosine", "ip" or "l2".
        backend: As in `topk`.

    Returns:
        (N, k) int64 gallery indices, hardest first; -1 at the end where fewer rows of other groups exist.

    Raises:
        ShapeError: k is below 1, a group list has the wrong length, or an argument does not suit `topk`.

    Memory beyond the inputs is O(N k + a block): neighbours are fetched for few rows at a time, in growing numbers
    until k of other groups are among them, so one very large group costs time and no memory.
    """
    if k < 1:
        raise ShapeError(f"k is {k}; hard negatives need 1 or more per row.")
    other = features if gallery is None else gallery
    rows, columns = len(features), len(other)
    own = np.arange(rows) if groups is None else _numbers(groups, rows, "groups", "features")
    if gallery is None:
        theirs = own
    elif groups is None and gallery_groups is None:
        theirs = np.arange(columns)
    elif groups is None or gallery_groups is None:
        raise ShapeError("groups and gallery_groups belong together: give both or neither.")
    else:
        theirs = _numbers(gallery_groups, columns, "gallery_groups", "gallery")
    found = np.full((rows, k), -1, np.int64)
    pending, fetch = np.arange(rows), min(columns, k + 1)
    while len(pending) and fetch:
        step, missing = max(1, _FOUND_AT_ONCE // fetch), []
        for part in np.split(pending, range(step, len(pending), step)):
            queries = features if len(part) == rows else features[_index_of(features, part)]
            ids = _to_numpy(topk(queries, other, fetch, metric=metric, backend=backend)[1])
            usable = (ids >= 0) & (theirs[ids] != own[part, None])
            rank = np.cumsum(usable, axis=1) - 1
            row, column = np.nonzero(usable & (rank < k))
            found[part[row], rank[row, column]] = ids[row, column]
            missing.append(part[usable.sum(axis=1) < k])
        pending = np.concatenate(missing)
        if fetch == columns:
            break
        fetch = min(columns, 4 * fetch)
    return found


def _numbers(groups: Any, count: int, name: str, of: str) -> np.ndarray:
    values = _to_numpy(groups)
    if values.shape != (count,):
        raise ShapeError(f"{name} has shape {values.shape}; {of} has {count} rows, so it must be ({count},).")
    return values


def _to_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    elif hasattr(array, "get"):  # CuPy
        array = array.get()
    return np.asarray(array)


def _index_of(features: Any, part: np.ndarray) -> Any:
    if hasattr(features, "detach"):
        import torch

        return torch.from_numpy(part).to(features.device)
    return part

"""Exact top-k in plain PyTorch: the path without a compiled extension, and the contract in its shortest form.

Every pair has one score, defined in float64 from the inputs as they are stored:

    ip      s(q, x) = sum_j q_j x_j
    cosine  s(q, x) = ip(q, x) / (|q| |x|), and 0 where a norm is 0
    l2      d(q, x) = sum_j (q_j - x_j)^2, searched as s = -d

The result holds the k pairs with the largest s, best first, equal scores by rising index; a NaN score is never
selected. Blocks of the gallery are scored by a float64 matrix product, whose rounding may depend on the position of a
row. Candidates within that rounding of the k-th best are scored again one pair at a time, so that equal rows get equal
bits and the tie rule holds.
"""

from __future__ import annotations

import torch

from ftfast.search.arrays import Problem

_BLOCK_ELEMENTS = 1 << 21  # float64 scores held at once: 16 MB
_ULPS = 4 * 2.0**-53


def topk_reference(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k by blocks of float64 products.

    Args:
        problem: The checked search.

    Returns:
        Scores (Q, k) float64 (squared distances for l2) and indices (Q, k) int64. Where fewer than k rows are allowed,
        the tail holds index -1 with score -inf (+inf for l2).

    Memory is O(Q k + one block). Runs on any device torch supports, and is deterministic.
    """
    rows = problem.queries.shape[0]
    step = max(1, min(rows, 1024))
    parts = [_search_chunk(problem, start, min(rows, start + step)) for start in range(0, rows, step)]
    scores = torch.cat([part[0] for part in parts])
    indices = torch.cat([part[1] for part in parts])
    if problem.metric == "l2":
        scores = -scores
    return scores, indices


def _search_chunk(problem: Problem, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of queries[start:stop]; scores in float64, larger is better."""
    queries = problem.queries[start:stop].double()
    count, columns = queries.shape[0], problem.gallery.shape[0]
    best = torch.full((count, problem.k), -torch.inf, dtype=torch.float64, device=queries.device)
    ids = torch.full((count, problem.k), -1, dtype=torch.int64, device=queries.device)
    width = max(1, min(columns, max(256, _BLOCK_ELEMENTS // max(count, queries.shape[1]))))
    for first in range(0, columns, width):
        block = problem.gallery[first : first + width].double()
        allowed = _allowed(problem, start, stop, first, first + block.shape[0])
        best, ids = _merge_block(queries, block, first, allowed, best, ids, problem.metric)
    return best, ids


def _allowed(problem: Problem, start: int, stop: int, first: int, last: int) -> torch.Tensor | None:
    """(Q, B) or (1, B) bool of pairs that may be returned, or None for all."""
    allowed = None
    if problem.mask is not None:
        mask = problem.mask
        allowed = mask[None, first:last] if mask.dim() == 1 else mask[start:stop, first:last]
    if problem.exclude is not None:
        columns = torch.arange(first, last, device=problem.queries.device)
        other = problem.exclude[start:stop, None] != columns[None]
        allowed = other if allowed is None else allowed & other
    return allowed


def _merge_block(
    queries: torch.Tensor,
    block: torch.Tensor,
    first: int,
    allowed: torch.Tensor | None,
    best: torch.Tensor,
    ids: torch.Tensor,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges one gallery block into the running result."""
    approximate, margin = _block_scores(queries, block, metric)
    invalid = approximate.isnan() if allowed is None else approximate.isnan() | ~allowed
    approximate = approximate.masked_fill(invalid, -torch.inf)
    k, width = best.shape[1], block.shape[0]
    pool = torch.cat([best, approximate.topk(min(k, width), dim=1).values], dim=1)
    threshold = pool.topk(k, dim=1).values[:, -1:]
    candidate = (approximate >= threshold - margin) & ~invalid
    count = int(candidate.sum(dim=1).max())
    if count == 0:
        return best, ids
    # Candidates first, by rising index, so that stable sorts below keep the lowest index of equal scores in front.
    order = (~candidate).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    kept = candidate.gather(1, order)
    step = max(1, _BLOCK_ELEMENTS // max(1, queries.shape[0] * queries.shape[1]))
    for low in range(0, count, step):
        columns, valid = order[:, low : low + step], kept[:, low : low + step]
        exact = pair_scores(queries[:, None, :], block[columns], metric).masked_fill(~valid, -torch.inf)
        best, ids = _merge_sorted(best, ids, exact, torch.where(valid, columns + first, -1))
    return best, ids


def _merge_sorted(
    best: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the k best of two lists; padding (index -1) goes last, also behind a valid score of -inf."""
    k = best.shape[1]
    all_scores, all_ids = torch.cat([best, scores], dim=1), torch.cat([ids, columns], dim=1)
    key = torch.where(all_ids < 0, torch.iinfo(torch.int64).max, all_ids)
    order = key.argsort(dim=1, stable=True)
    all_scores, all_ids = all_scores.gather(1, order), all_ids.gather(1, order)
    order = all_scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return all_scores.gather(1, order), all_ids.gather(1, order)


def _block_scores(queries: torch.Tensor, block: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores by matrix product (Q, B) and how far they may be from the pair scores (Q, 1)."""
    ulps = _ULPS * (queries.shape[1] + 8)
    product = queries @ block.T
    query_norm, block_norm = queries.norm(dim=1, keepdim=True), block.norm(dim=1)
    largest = block_norm.nan_to_num(0.0, 0.0, 0.0).max()
    if metric == "cosine":
        scale = query_norm * block_norm
        scores = torch.where(scale == 0, product.nan_to_num(0.0, torch.inf, -torch.inf) * 0, product / scale)
        return scores, torch.full_like(query_norm, 2 * ulps)
    finite_norm = query_norm.nan_to_num(0.0, 0.0, 0.0)
    if metric == "ip":
        return product, 2 * ulps * finite_norm * largest
    scores = 2 * product - query_norm.square() - block_norm.square()
    # An infinite coordinate makes inf - inf here, where the squared difference itself is simply infinite.
    if not bool(torch.isfinite(scores).all()):
        scores = torch.where(torch.isfinite(scores), scores, _slow_l2(queries, block))
    return scores, 4 * ulps * (finite_norm + largest).square()


def _slow_l2(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    return torch.stack([pair_scores(query[None], block, "l2") for query in queries])


def pair_scores(queries: torch.Tensor, rows: torch.Tensor, metric: str) -> torch.Tensor:
    """The defining score of each pair, reduced over the last dimension, one pair at a time.

    Args:
        queries: (..., D) float64.
        rows: (..., D) float64, broadcast against `queries`.
        metric: "ip", "cosine" or "l2".

    Returns:
        (...) float64; larger is better (l2: minus the squared distance).
    """
    if metric == "l2":
        return -(queries - rows).square().sum(dim=-1)
    product = (queries * rows).sum(dim=-1)
    if metric == "ip":
        return product
    scale = queries.square().sum(dim=-1).sqrt() * rows.square().sum(dim=-1).sqrt()
    return torch.where(scale == 0, torch.zeros_like(product), product / scale)

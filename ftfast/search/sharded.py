"""Exact search over a gallery that is spread over the processes of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ftfast.errors import ShapeError
from ftfast.search.arrays import METRICS, Problem, check_matrix, to_tensor
from ftfast.search.operator import solve


def topk_sharded(
    queries: Any,
    gallery_shard: Any,
    k: int,
    *,
    metric: str = "cosine",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k best rows of the whole gallery for this process's queries.

    Every process calls it with its own queries (any number, also none) and its own rows (any number, also none). Row
    indices count through the shards in rank order. Each process searches its shard for everyone's queries; the lists
    travel with float64 scores, so the merge is exact and ties go to the lowest global index, as if one process had done
    it all.

    Args:
        queries: (Q, D) array of this process, float32, float16, bfloat16 or int8.
        gallery_shard: (N_rank, D) array of this process.
        k: Neighbours per query, at most the total number of rows.
        metric: "cosine", "ip" or "l2".
        group: Process group; None is the default group.
        backend: As in `ftfast.search.topk` ("auto", "native", "torch").

    Returns:
        Scores (Q, k) float32 and global indices (Q, k) int64 for this process's queries.

    Raises:
        ShapeError: If the shapes, dtypes or k do not fit; every process raises it.

    Communication: all queries once, and 16 bytes per query, neighbour and process.
    """
    if metric not in METRICS:
        raise ShapeError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}.")
    mine, rows = _matrix(queries, "queries"), _matrix(gallery_shard, "gallery_shard")
    world = dist.get_world_size(group)
    facts = _gather_facts(mine, rows, k, group)
    sizes, counts = facts[:, 1].tolist(), facts[:, 0].tolist()
    if not 1 <= k <= sum(sizes):
        raise ShapeError(f"k is {k} but the gallery has {sum(sizes)} rows over {world} processes.")
    everyone = _gather_rows(mine, counts, group)
    scores, indices = _search_shard(everyone, rows, k, metric, backend)
    offset = sum(sizes[: dist.get_rank(group)])
    indices = torch.where(indices < 0, indices, indices + offset)
    all_scores = [torch.empty_like(scores) for _ in range(world)]
    all_indices = [torch.empty_like(indices) for _ in range(world)]
    dist.all_gather(all_scores, scores, group=group)
    dist.all_gather(all_indices, indices, group=group)
    first = sum(counts[: dist.get_rank(group)])
    own = slice(first, first + mine.shape[0])
    return _merge([part[own] for part in all_scores], [part[own] for part in all_indices], k, metric)


def _matrix(array: Any, name: str) -> torch.Tensor:
    """Like `check_matrix`, but a process may have no rows."""
    tensor = to_tensor(array, name)
    if tensor.dim() == 2 and tensor.shape[0] == 0 and tensor.shape[1] > 0:
        return tensor
    return check_matrix(tensor, name)


def _gather_facts(mine: torch.Tensor, rows: torch.Tensor, k: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(world, 6) of query count, row count, widths, dtype and k; raises on every process when they disagree."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
    dtype = dtypes.index(mine.dtype) if mine.dtype in dtypes else -1
    facts = torch.tensor([mine.shape[0], rows.shape[0], mine.shape[1], rows.shape[1], dtype, k], device=mine.device)
    gathered = [torch.empty_like(facts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, facts, group=group)
    table = torch.stack(gathered).cpu()
    if int(table[:, 2:4].min()) != int(table[:, 2:4].max()):
        raise ShapeError(f"widths differ between processes or between queries and gallery: {table[:, 2:4].tolist()}.")
    if len(set(table[:, 4].tolist())) > 1 or len(set(table[:, 5].tolist())) > 1:
        raise ShapeError(f"the processes disagree about dtype or k: {table[:, 4:].tolist()}.")
    return table


def _gather_rows(mine: torch.Tensor, counts: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """All queries in rank order; padded to one size for the exchange, sent as bytes so that any dtype can travel."""
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: mine.shape[0]] = mine
    payload = padded.contiguous().view(torch.uint8)
    received = [torch.empty_like(payload) for _ in counts]
    dist.all_gather(received, payload, group=group)
    return torch.cat([part.view(mine.dtype)[:count] for part, count in zip(received, counts, strict=True)])


def _search_shard(
    queries: torch.Tensor, rows: torch.Tensor, k: int, metric: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local lists of width k, padded with -1."""
    worst = torch.inf if metric == "l2" else -torch.inf
    shape = (queries.shape[0], k)
    scores = torch.full(shape, worst, dtype=torch.float64, device=queries.device)
    indices = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    used = min(k, rows.shape[0])
    if used and queries.shape[0]:
        found, ids = solve(Problem(queries.contiguous(), rows.contiguous(), used, metric), backend)
        scores[:, :used], indices[:, :used] = found, ids
    return scores, indices


def _merge(
    scores: list[torch.Tensor], indices: list[torch.Tensor], k: int, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the lists; rank order is index order, so a stable sort keeps the tie rule."""
    all_scores, all_indices = torch.cat(scores, dim=1), torch.cat(indices, dim=1)
    missing = (all_indices < 0).to(torch.uint8).argsort(dim=1, stable=True)
    all_scores, all_indices = all_scores.gather(1, missing), all_indices.gather(1, missing)
    order = all_scores.argsort(dim=1, descending=metric != "l2", stable=True)[:, :k]
    return all_scores.gather(1, order).float(), all_indices.gather(1, order)

"""Which pairs of rows and columns are positives and which are left out of the softmax, without a mask tensor.

A relation is described by integer ids and an offset; kernels evaluate it inside a tile. Legend: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODES: tuple[str, ...] = ("pair", "target", "group", "self", "rivals")


@dataclass(frozen=True)
class Relation:
    """Positives and exclusions of a pairwise softmax.

    ============  ==============================  ==========================================
    mode          positives                       left out of the log-sum-exp
    ============  ==============================  ==========================================
    ``pair``      j = i + offset                  the positive itself
    ``target``    col_ids[j] = row_ids[i]         the positives themselves
    ``group``     col_ids[j] = row_ids[i]         nothing
    ``self``      equal ids and j ≠ i + offset    j = i + offset
    ``rivals``    j = i + offset                  the positive and every pair with equal ids
    ============  ==============================  ==========================================

    Leaving the single positive out lets the loss be softplus(lse - positive), which keeps its relative accuracy when
    the loss is nearly 0, and keeps the one large gradient entry exact.

    Args:
        mode: One of :data:`MODES`.
        offset: Column of row 0's pair; may be negative or beyond N (then no row has a pair here).
        row_ids: (M,) int64, or None for mode "pair".
        col_ids: (N,) int64, or None for mode "pair".
    """

    mode: str
    offset: int = 0
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None


def group_relation(row_ids: Tensor, col_ids: Tensor | None, mode: str = "group", offset: int = 0) -> Relation:
    """Return a relation by ids, as contiguous int64 vectors; ``col_ids`` defaults to ``row_ids``."""
    rows = row_ids.to(torch.int64).contiguous()
    columns = rows if col_ids is None or col_ids is row_ids else col_ids.to(torch.int64).contiguous()
    return Relation(mode, offset, rows, columns)


def diagonal_span(row_start: int, row_stop: int, col_start: int, col_stop: int, offset: int) -> tuple[int, int]:
    """Return the rows [first, last) whose pair column i + offset lies in [col_start, col_stop)."""
    first = max(row_start, col_start - offset)
    return first, max(first, min(row_stop, col_stop - offset))


def positive_counts(relation: Relation, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count each row's and each column's positives in O((M + N) log) without building a mask.

    Returns:
        (M,) and (N,) int64 counts.
    """
    row_index = torch.arange(rows, device=device) + relation.offset
    col_index = torch.arange(columns, device=device) - relation.offset
    paired_rows = (row_index >= 0) & (row_index < columns)
    paired_cols = (col_index >= 0) & (col_index < rows)
    if relation.row_ids is None or relation.col_ids is None or relation.mode in ("pair", "rivals"):
        return paired_rows.long(), paired_cols.long()
    row_counts = _count(relation.row_ids, relation.col_ids)
    col_counts = _count(relation.col_ids, relation.row_ids)
    if relation.mode == "self":
        own_rows = relation.row_ids == relation.col_ids[row_index.clamp(0, columns - 1)]
        own_cols = relation.col_ids == relation.row_ids[col_index.clamp(0, rows - 1)]
        row_counts = row_counts - (own_rows & paired_rows).long()
        col_counts = col_counts - (own_cols & paired_cols).long()
    return row_counts, col_counts


def dense_ids(relation: Relation) -> tuple[Tensor, Tensor] | None:
    """Renumber arbitrary int64 ids as int32 ranks with the same equalities, without a device synchronisation.

    Returns:
        (M,) and (N,) int32, or None if the relation has no ids.
    """
    if relation.row_ids is None or relation.col_ids is None:
        return None
    joined = torch.cat([relation.row_ids, relation.col_ids])
    ordered, order = joined.sort(stable=True)
    ranks = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)])
    dense = torch.zeros_like(joined).scatter_(0, order, ranks).to(torch.int32)
    return dense[: len(relation.row_ids)].contiguous(), dense[len(relation.row_ids) :].contiguous()


def _count(queries: Tensor, keys: Tensor) -> Tensor:
    ordered = keys.sort().values
    return torch.searchsorted(ordered, queries, right=True) - torch.searchsorted(ordered, queries)

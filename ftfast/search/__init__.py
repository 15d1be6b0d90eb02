"""Exact nearest-neighbour search: `topk` over arrays, `ExactIndex` for galleries that stay, shards over processes."""

from __future__ import annotations

from ftfast.search.faiss_backend import FaissIndex
from ftfast.search.index import ExactIndex
from ftfast.search.mining import hard_negatives
from ftfast.search.native import Certificate, describe
from ftfast.search.sharded import topk_sharded
from ftfast.search.topk import topk

__all__ = ["Certificate", "ExactIndex", "FaissIndex", "describe", "hard_negatives", "topk", "topk_sharded"]

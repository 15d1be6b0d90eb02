"""Exact nearest-neighbour search: `topk` over arrays."""

from __future__ import annotations

from ftfast.search.topk import topk

__all__ = ["topk"]

"""Everything that looks at parameters rather than features: Fisher, anchors, the anchored optimizer, interpolation."""

from ftfast.weightspace.anchors import Anchor, adaptive_consolidation, ewc, l2_sp, online_ewc
from ftfast.weightspace.interpolation import (
    ExponentialMovingAverage,
    interpolate,
    interpolation_sweep,
    merge_fisher_weighted,
)
from ftfast.weightspace.optimizer import AnchoredAdamW

__all__ = [
    "Anchor",
    "AnchoredAdamW",
    "ExponentialMovingAverage",
    "adaptive_consolidation",
    "ewc",
    "interpolate",
    "interpolation_sweep",
    "l2_sp",
    "merge_fisher_weighted",
    "online_ewc",
]

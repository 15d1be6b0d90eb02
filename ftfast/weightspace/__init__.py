"""Everything that looks at parameters rather than features: Fisher, anchors, the anchored optimizer, interpolation."""

from ftfast.weightspace.anchors import Anchor, adaptive_consolidation, ewc, l2_sp, online_ewc
from ftfast.weightspace.fisher import FisherEstimate, FisherOptions, estimate_fisher
from ftfast.weightspace.interpolation import (
    ExponentialMovingAverage,
    interpolate,
    interpolation_sweep,
    merge_fisher_weighted,
)
from ftfast.weightspace.objectives import ClassificationObjective, ContrastiveObjective
from ftfast.weightspace.optimizer import AnchoredAdamW

__all__ = [
    "Anchor",
    "AnchoredAdamW",
    "ClassificationObjective",
    "ContrastiveObjective",
    "ExponentialMovingAverage",
    "FisherEstimate",
    "FisherOptions",
    "adaptive_consolidation",
    "estimate_fisher",
    "ewc",
    "interpolate",
    "interpolation_sweep",
    "l2_sp",
    "merge_fisher_weighted",
    "online_ewc",
]

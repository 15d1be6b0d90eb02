"""Fused operations on tensors: similarity losses, penalties, Fisher accumulation. Imported as ``ftfast.kernels``."""

from __future__ import annotations

# In a checkout this folder is also visible as the top-level module "kernels", a name that transformers looks for.
# Run a second time under it, the files would register their operations again and leave every earlier reference
# dangling (a crash in the next call); an error here would break transformers. So under that name it stays empty.
if __name__ != "kernels":
    from .classification import classification_loss
    from .clip import clip_loss
    from .dispatch import BACKENDS, choose, explain
    from .distillation import (
        DistillOptions,
        clip_and_distillation_loss,
        feature_distillation_loss,
        similarity_distillation_loss,
    )
    from .pairs import PairStatistics, merge_statistics, pair_statistics, pair_statistics_backward
    from .relations import Relation, group_relation, positive_counts
    from .siglip import siglip_loss
    from .supervised import supervised_contrastive_loss

__all__ = [
    "BACKENDS",
    "DistillOptions",
    "PairStatistics",
    "Relation",
    "choose",
    "classification_loss",
    "clip_and_distillation_loss",
    "clip_loss",
    "explain",
    "feature_distillation_loss",
    "group_relation",
    "merge_statistics",
    "pair_statistics",
    "pair_statistics_backward",
    "positive_counts",
    "siglip_loss",
    "similarity_distillation_loss",
    "supervised_contrastive_loss",
]

"""Losses on features, as ``nn.Module``s with the constructors and calls people already use.

``ClipLoss``, ``SigLipLoss`` and ``DistillClipLoss`` replace open_clip's classes of the same name: same arguments, same
results, memory that grows with the batch instead of its square. All of them are thin: the mathematics is in
:mod:`ftfast.kernels`, the exchange between processes in :mod:`ftfast.losses.distributed`.
"""

from ftfast.losses.classification import NormFaceLoss
from ftfast.losses.contrastive import ClipLoss, SigLipLoss
from ftfast.losses.distillation import DistillClipLoss, FeatureDistillLoss, SimilarityDistillLoss
from ftfast.losses.supervised import SupConLoss

__all__ = [
    "ClipLoss",
    "DistillClipLoss",
    "FeatureDistillLoss",
    "NormFaceLoss",
    "SigLipLoss",
    "SimilarityDistillLoss",
    "SupConLoss",
]

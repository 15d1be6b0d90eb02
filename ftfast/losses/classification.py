"""Image classification by cosines with learned class weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import kernels
from ftfast.errors import ConfigError


class NormFaceLoss(nn.Module):
    """Softmax cross-entropy over cosines between features and learned class weights.

    loss = mean_i CE(scale · <f_i/|f_i|, w_c/|w_c|>, y_i), the true class's cosine lowered by an optional margin

    Args:
        embed_dim: Width D of the features.
        num_classes: Number of classes C.
        scale: Multiplier of the cosines. INFUSING uses 16; ArcFace and CosFace 64.
        label_smoothing: Weight of the uniform target, in [0, 1).
        margin: Radians for "arcface" (paper 0.5), cosine for "cosface" (paper 0.35); 0 for "none".
        margin_type: "none" (NormFace), "arcface" or "cosface".
        learn_scale: Train the scale (NormFace does, INFUSING does not).
        backend: "auto", "triton" or "torch".

    Attributes:
        weight: (C, D) learned class weights; initialised lecun-uniform, U(±sqrt(3 / D)), as INFUSING does.
        logit_scale: 0-d multiplier; a parameter with ``learn_scale``, else a buffer.

    Raises:
        ConfigError: If there is no class, a margin without a ``margin_type``, or the reverse.

    Source: Wang et al. 2017 (NormFace, no bias); Deng et al. 2019 (ArcFace); Wang et al. 2018 (CosFace); INFUSING
    (arXiv 2508.12137), domain classification.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        scale: float = 16.0,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        margin_type: str = "none",
        learn_scale: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_classes < 1:
            raise ConfigError(f"NormFaceLoss needs a width and classes, got {embed_dim=} and {num_classes=}")
        if margin and margin_type == "none":
            raise ConfigError(f"margin={margin} has no effect without margin_type='arcface' or 'cosface'")
        self.label_smoothing = label_smoothing
        self.margin = margin
        self.margin_type = margin_type
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim))
        value = torch.tensor(float(scale))
        self.logit_scale: Tensor
        if learn_scale:
            self.logit_scale = nn.Parameter(value)
        else:
            self.register_buffer("logit_scale", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new class weights."""
        bound = math.sqrt(3 / self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Classify one batch.

        Args:
            features: (B, D) rows of any length; normalised here.
            labels: (B,) integers in [0, C); rows with a negative label do not count.

        Returns:
            The 0-d float32 loss.

        Raises:
            ShapeError: If shapes, dtypes or devices do not fit.
            ConfigError: If an option has an unknown value.
        """
        return kernels.classification_loss(
            F.normalize(features, dim=-1),
            F.normalize(self.weight, dim=-1).to(features.dtype),
            labels,
            self.logit_scale,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            margin_type=self.margin_type,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Describe the options in ``print(module)``."""
        classes, width = self.weight.shape
        return f"embed_dim={width}, num_classes={classes}, margin={self.margin}, margin_type={self.margin_type!r}"

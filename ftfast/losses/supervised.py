"""Contrastive losses whose positives are decided by class labels."""

from __future__ import annotations

from torch import Tensor, nn

from ftfast import kernels


class SupConLoss(nn.Module):
    """Supervised contrastive loss within one modality or across two.

    Row i: -1/|P(i)| Σ_{p in P(i)} (S_ip - log Σ_a exp S_ia),  S = F Gᵀ / temperature, P(i) the rows of i's class

    Args:
        temperature: Divisor of the cosines; SupCon uses 0.1 (its code 0.07). Ignored when forward gets logit_scale.
        variant: "supcon", or across modalities "cite" and "cite_literal", the two readings of CLIP-CITE's equation 4.
        directions: Across modalities: "both" (average), "image" (rows) or "text" (columns).
        backend: "auto", "triton" or "torch".

    Source: Khosla et al. 2020, L_out without the factor temperature / base_temperature; CLIP-CITE
    (arXiv 2407.04003); see :func:`ftfast.kernels.supervised_contrastive_loss`.
    """

    def __init__(
        self, temperature: float = 0.07, variant: str = "supcon", directions: str = "both", *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.variant = variant
        self.directions = directions
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        other_features: Tensor | None = None,
        other_labels: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Compare one batch.

        Args:
            features: (B, D) L2-normalised rows.
            labels: (B,) integer class ids.
            other_features: (C, D) L2-normalised rows of the other modality; None: ``features`` against itself,
                without self pairs.
            other_labels: (C,) class ids of ``other_features``; default ``labels``.
            logit_scale: Multiplier of the cosines, instead of 1 / temperature.

        Returns:
            The 0-d float32 loss; 0 if no row has a positive.

        Raises:
            ShapeError: If shapes, dtypes or devices do not fit.
            ConfigError: If an option has an unknown value.
        """
        return kernels.supervised_contrastive_loss(
            features,
            labels,
            1 / self.temperature if logit_scale is None else logit_scale,
            other_features,
            other_labels=other_labels,
            variant=self.variant,
            directions=self.directions,
            backend=self.backend,
        )

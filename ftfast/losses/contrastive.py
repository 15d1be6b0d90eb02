"""Contrastive losses between matched image and text features, with open_clip's interface."""

from __future__ import annotations

from torch import Tensor, nn

from ftfast import kernels
from ftfast.errors import ConfigError, ShapeError
from ftfast.losses.distributed import check_process_group, gather_features
from ftfast.losses.ring import ring_clip_loss, ring_siglip_loss

SIGLIP_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """Symmetric softmax contrastive loss; replaces ``open_clip.ClipLoss``.

    loss = ½ [CE(S, i) + CE(Sᵀ, i)],  S = logit_scale · image_features · text_featuresᵀ

    Args:
        local_loss: With several processes, compare this process's rows with everybody's instead of all with all; the
            mean over processes is the global loss.
        gather_with_grad: With several processes, let gradients flow back to the process a row came from. True gives
            the global loss's gradient after DDP's averaging, in both settings of ``local_loss``.
        cache_labels: Accepted for compatibility; no labels are built.
        rank: This process.
        world_size: Number of processes.
        use_horovod: Only False is supported with several processes.
        ring: Pass features around a ring instead of gathering them: the loss and gradient of
            ``gather_with_grad=True, local_loss=False`` with O(b·D) memory in both passes, where b is the number of
            rows of one process. ``local_loss`` and ``gather_with_grad`` then have no effect.
        backend: "auto", "triton" or "torch"; see :func:`ftfast.kernels.clip_loss`.

    Raises:
        ConfigError: If ``use_horovod`` is set with several processes.

    Deviation from open_clip: the loss is float32 for half-precision features (open_clip's is in the features' dtype
    unless autocast is on).

    Source: Radford et al. 2021, figure 3; open_clip 3.3 for the interface and the distributed modes.

    Example:
        >>> import torch
        >>> from ftfast.losses import ClipLoss
        >>> image = torch.nn.functional.normalize(torch.eye(3), dim=1)
        >>> loss = ClipLoss()(image, image, torch.tensor(100.0))
        >>> round(loss.item(), 6)
        0.0
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        ring: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if use_horovod and world_size > 1:
            raise ConfigError(
                f"{type(self).__name__}(use_horovod=True) is not supported: start the processes with torchrun."
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.ring = ring
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss of one batch of matched pairs.

        Args:
            image_features: (b, D) L2-normalised rows.
            text_features: (b, D) L2-normalised rows; row i belongs to image i.
            logit_scale: The multiplier itself (about 100 for CLIP), one element.
            logit_bias: Added to every logit; a softmax does not feel it, so its gradient is zero.
            output_dict: Return ``{"contrastive_loss": loss}``.

        Returns:
            The 0-d loss, or the dictionary.

        Raises:
            ShapeError: If the two batches differ in rows or width.
            ConfigError: If ``world_size`` > 1 and torch.distributed is not set up for it.
        """
        loss = self.contrast(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the loss as a tensor; see :meth:`forward`."""
        if self.world_size == 1:
            return kernels.clip_loss(image_features, text_features, logit_scale, logit_bias, backend=self.backend)
        check_process_group(type(self).__name__, self.rank, self.world_size)
        if self.ring:
            return ring_clip_loss(image_features, text_features, logit_scale, logit_bias, backend=self.backend)
        all_image, all_text = self.gather(image_features), self.gather(text_features)
        if not self.local_loss:
            return kernels.clip_loss(all_image, all_text, logit_scale, logit_bias, backend=self.backend)
        offset = self.rank * image_features.shape[0]
        image_loss, text_loss = (
            kernels.clip_loss(
                own, everybody, logit_scale, logit_bias, directions="image", offset=offset, backend=self.backend
            )
            for own, everybody in ((image_features, all_text), (text_features, all_image))
        )
        return (image_loss + text_loss) / 2

    def gather(self, features: Tensor) -> Tensor:
        """Gather the rows of all processes under this loss's gradient rule; (b, D) to (N, D)."""
        return gather_features(
            features,
            rank=self.rank,
            world_size=self.world_size,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
        )


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss; replaces ``open_clip.SigLipLoss``.

    loss = -1/b Σ_ij log σ(z_ij (logit_scale · <image_i, text_j> + logit_bias)),  z = +1 for pairs, -1 otherwise

    With several processes, i runs over this process's images and j over everybody's texts.

    Args:
        cache_labels: Accepted for compatibility; no labels are built.
        rank: This process.
        world_size: Number of processes.
        dist_impl: How texts travel. "bidir" (default) and "shift" pass them around a ring, in both directions or one,
            and keep only the visiting texts: O(b·D) memory in both passes (open_clip keeps every visitor for the
            backward pass). "gather" and "reduce" hold the texts of all processes, exchanged by one all-gather
            (open_clip's "reduce" sends them by one all-reduce per process; values and gradients are the same).
        ring: The same as ``dist_impl="shift"``.
        backend: "auto", "triton" or "torch"; see :func:`ftfast.kernels.siglip_loss`.

    Raises:
        ConfigError: If ``dist_impl`` is unknown (open_clip: AssertionError).

    Source: Zhai et al. 2023, algorithm 1; open_clip 3.3 for the interface, the division by b and the exchanges.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        ring: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dist_impl = dist_impl or ("shift" if ring else "bidir")
        if dist_impl not in SIGLIP_EXCHANGES:
            raise ConfigError(f"dist_impl is {dist_impl!r}; choose one of {', '.join(map(repr, SIGLIP_EXCHANGES))}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss of one batch of matched pairs.

        Args:
            image_features: (b, D) L2-normalised rows.
            text_features: (b, D) L2-normalised rows; row i belongs to image i.
            logit_scale: The multiplier itself (SigLIP starts at 10), one element.
            logit_bias: Added to every logit (SigLIP starts at -10); None means 0.
            output_dict: Return ``{"contrastive_loss": loss}``.

        Returns:
            The 0-d float32 loss, or the dictionary.

        Raises:
            ShapeError: If the two batches differ in rows or width.
            ConfigError: If ``world_size`` > 1 and torch.distributed is not set up for it.
        """
        loss = self.contrast(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
    ) -> Tensor:
        """Compute the loss as a tensor; see :meth:`forward`."""
        rows = len(image_features)
        if rows != len(text_features):
            raise ShapeError(f"text_features has {len(text_features)} rows but image_features has {rows}")
        if self.world_size == 1:
            return kernels.siglip_loss(image_features, text_features, logit_scale, logit_bias, backend=self.backend)
        check_process_group(type(self).__name__, self.rank, self.world_size)
        if self.dist_impl in ("bidir", "shift"):
            return ring_siglip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                bidirectional=self.dist_impl == "bidir",
                backend=self.backend,
            )
        all_text = gather_features(
            text_features, rank=self.rank, world_size=self.world_size, local_loss=True, gather_with_grad=True
        )
        offset = self.rank * rows
        return kernels.siglip_loss(
            image_features, all_text, logit_scale, logit_bias, offset=offset, backend=self.backend
        )

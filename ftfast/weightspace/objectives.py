"""Per-sample losses whose squared gradients make a Fisher.

A loss takes a model and a batch and returns one number per sample. Where labels are to be drawn from the model
(``kind="sampled"``) it is given a random generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.errors import ConfigError

__all__ = ["ClassificationObjective", "ContrastiveObjective", "PerSampleLoss"]


class PerSampleLoss(Protocol):
    """What :func:`ftfast.weightspace.fisher.estimate_fisher` needs from a loss."""

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator | None) -> Tensor:
        """Losses of a batch.

        Args:
            model: The model, in evaluation mode.
            batch: What the loader yields.
            generator: Draw labels from the model with this; None uses the true labels.

        Returns:
            (N,) losses, sample n's gradient being the gradient of element n.
        """
        ...


def _images(batch: Any) -> Tensor:
    """Images of a batch: attribute ``images``, or the first item."""
    return batch.images if hasattr(batch, "images") else batch[0]


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row, from the model's own distribution."""
    with torch.no_grad():
        probabilities = logits.detach().float().softmax(-1)
        return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross-entropy of image features against fixed class features (a zero-shot or prompt classifier).

    ``L_n = CE(logit_scale f_n W^T, y_n)`` with f_n the normalised image feature. Class features are constants here; to
    cover the text tower use :class:`ContrastiveObjective`.

    Args:
        class_features: (C, D) normalised features.
        logit_scale: Multiplier; None takes the model's own ``logit_scale.exp()``, which then has a Fisher too.
    """

    class_features: Tensor
    logit_scale: float | None = None

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator | None) -> Tensor:
        """(N,) cross-entropies; see :class:`PerSampleLoss`."""
        features = model.encode_image(_images(batch), normalize=True)  # type: ignore[operator]
        scale: Any = self.logit_scale
        if scale is None:
            scale = model.logit_scale.exp()  # type: ignore[operator, union-attr]
        logits = scale * features @ self.class_features.to(features).t()
        labels = batch.labels if hasattr(batch, "labels") else batch[1]
        target = labels if generator is None else _draw(logits, generator)
        return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class ContrastiveObjective:
    """The contrastive loss of image-text pairs, which couples samples; two definitions of "per sample" exist.

    * ``rows``: ``L_n = (CE(s f_n T^T, n) + CE(s t_n F^T, n)) / 2`` with the features it is compared to held constant;
      sample n's gradient is that of its own row and column.
    * ``contribution``: ``g_n = J_n^T dL/df_n`` for the coupled loss ``L = sum_n L_n``: what sample n adds to the batch
      gradient, including its role as another sample's negative. For ``logit_scale`` this is the part of its derivative
      made by sample n's own row and column.

    Args:
        definition: See above.
        tokenizer: Turns texts into tokens, for batches that carry ``texts``; None for batches of (images, tokens).
    """

    definition: Literal["rows", "contribution"] = "rows"
    tokenizer: Callable[[list[str]], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.definition not in ("rows", "contribution"):
            raise ConfigError(f"contrastive Fisher definition is '{self.definition}'; use 'rows' or 'contribution'")

    def _tokens(self, batch: Any, device: torch.device) -> Tensor:
        """Token ids of a batch."""
        if self.tokenizer is not None:
            return self.tokenizer(list(batch.texts)).to(device)
        return batch[1]

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator | None) -> Tensor:
        """(N,) losses (for ``contribution``: surrogates with the right gradients); see :class:`PerSampleLoss`."""
        images = _images(batch)
        image = model.encode_image(images, normalize=True)  # type: ignore[operator]
        text = model.encode_text(self._tokens(batch, images.device), normalize=True)  # type: ignore[operator]
        scale = model.logit_scale.exp()  # type: ignore[operator, union-attr]
        if self.definition == "rows":
            return self._rows(image, text, scale, generator)
        return self._contribution(image, text, scale, generator)

    def _rows(self, image: Tensor, text: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
        """Own row and own column of every pair."""
        losses = []
        for own, other in ((image, text), (text, image)):
            logits = scale * own @ other.detach().t()
            target = torch.arange(len(own), device=own.device) if generator is None else _draw(logits, generator)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        return (losses[0] + losses[1]) / 2

    def _contribution(self, image: Tensor, text: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
        """``<dL/df_n, f_n> + <dL/dt_n, t_n> + (dL_n/ds) s``: linear in the features, with the coupled gradients."""
        with torch.enable_grad():
            fixed = [value.detach().requires_grad_() for value in (image, text)]
            scales = scale.detach().reshape(-1)[:1].expand(len(image)).clone().requires_grad_()
            total: Tensor = torch.zeros((), device=image.device)
            for own, other in (fixed, fixed[::-1]):
                logits = scales[:, None] * (own @ other.t())
                target = torch.arange(len(own), device=own.device) if generator is None else _draw(logits, generator)
                total = total + F.cross_entropy(logits, target, reduction="sum") / 2
            grads = torch.autograd.grad(total, [*fixed, scales])
        parts = (grads[0] * image).sum(-1) + (grads[1] * text).sum(-1)
        return parts + grads[2] * scale

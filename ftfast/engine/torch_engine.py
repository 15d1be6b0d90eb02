"""Forward, backward and step in one process: mixed precision, clipping, per-tower rates, the anchored optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.config.schema import OptimConfig, Precision
from ftfast.engine.processes import Processes
from ftfast.models import freeze_batch_norm_statistics, tower_of
from ftfast.weightspace import Anchor, AnchoredAdamW


class TunedModel(nn.Module):
    """A CLIP and the heads trained beside it, as one module with one forward.

    Args:
        clip: open_clip model.
        heads: Extra trainable modules of the recipe.
        freeze_batch_norm: Keep BatchNorm statistics fixed while training.
    """

    def __init__(self, clip: nn.Module, heads: nn.ModuleDict, freeze_batch_norm: bool = True) -> None:
        super().__init__()
        self.clip: Any = clip  # open_clip's classes have no typed base with encode_image and encode_text
        self.heads = heads
        self.freeze_batch_norm = freeze_batch_norm

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode one batch.

        Args:
            images: (B, 3, H, W).
            tokens: (T, context) int64, or None to leave the text tower out.

        Returns:
            Unit-length float32 image features (B, D), text features (T, D) or None, and the 0-d logit scale.
        """
        image = unit(self.clip.encode_image(images))
        text = None if tokens is None else unit(self.clip.encode_text(tokens))
        return image, text, self.clip.logit_scale.exp().reshape(())

    def train(self, mode: bool = True) -> TunedModel:
        """Switch mode; frozen BatchNorm layers and fully locked towers stay in eval mode."""
        super().train(mode)
        if mode and self.freeze_batch_norm:
            freeze_batch_norm_statistics(self)
        return self


def unit(features: Tensor) -> Tensor:
    """Scale rows to unit length in float32: f / max(|f|, 1e-12)."""
    return F.normalize(features.float(), dim=-1, eps=1e-12)


class Engine(Protocol):
    """What the trainer needs of whatever owns devices, precision and the optimizer."""

    device: torch.device
    module: TunedModel
    processes: Processes
    weights: Any
    """What averages of weights follow: a ``state_dict`` and a ``load_state_dict``."""

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode one batch under the engine's precision."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate gradients of ``loss``; ``last``: no other pass follows before the step or the observation."""

    def observe_replay(self, step: int, average_steps: int) -> None:
        """Set an adaptive anchor's importance from the gradients present now, if there is such an anchor."""

    def step(self, factor: float) -> dict[str, Tensor]:
        """Update the weights at ``factor`` times the base learning rates, clear gradients, return scalars to log."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: weights, optimizer, loss scaling."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    def measured(self) -> contextlib.AbstractContextManager[Mapping[str, Tensor]]:
        """Make the present weights measurable in the first process, in eval mode; yields the CLIP's weights there."""

    def save_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Write what differs between processes into a checkpoint; every process calls it."""

    def load_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Read what differs between processes from a checkpoint; every process calls it."""


class TorchEngine:
    """The engine without DeepSpeed: whole weights in every process, gradients averaged if there are several.

    Args:
        module: Model and heads, already on ``device``.
        optim: Learning rates, clipping, AdamW's constants.
        precision: "fp32", "amp_bf16" or "amp_fp16" (the last with dynamic loss scaling).
        anchor: Weight-space guard added inside the step, or None.
        device: Where to run.
        processes: This process among those that train together; None: alone.
    """

    def __init__(
        self,
        module: TunedModel,
        optim: OptimConfig,
        precision: Precision,
        anchor: Anchor | None,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.module = self.weights = module
        self.processes = processes or Processes()
        self.device = device
        self.optim = optim
        self.groups = parameter_groups(module, optim)
        self.optimizer = AnchoredAdamW(
            self.groups,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=0.0,
            anchor=anchor,
            anchor_mode="coupled",
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.has_anchor = anchor is not None
        self.dtype = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp_fp16")

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode one batch under autocast."""
        with self.autocast():
            return self.module(images, tokens)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the precision context of forward passes."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate gradients of the (scaled) loss; a loss that reaches no parameter is skipped."""
        if loss.requires_grad:
            self.scaler.scale(loss).backward()

    @torch.no_grad()
    def observe_replay(self, step: int, average_steps: int) -> None:
        """Set the adaptive anchor's importance from the replay loss's gradient, which is all there is now.

        The importance is normalised per tensor, so loss scaling does not change it.

        Args:
            step: 0-based step.
            average_steps: 0: this gradient alone counts; N: running mean over the first N steps, then fixed.
        """
        optimizer = self.optimizer
        if optimizer.anchor is None or not optimizer.anchor.adaptive or 0 < average_steps <= step:
            return
        # Averaging is linear and leaves what is equal everywhere as it is, so the step may average once more.
        self.processes.average_gradients(self._parameters())
        states = [s for s in optimizer.state.values() if "anchor_precision" in s]
        before = [s["anchor_precision"].clone() for s in states] if average_steps and step else []
        optimizer.observe_replay_gradient()
        for state, mean in zip(states, before, strict=False):
            state["anchor_precision"].sub_(mean).div_(step + 1).add_(mean)

    def step(self, factor: float) -> dict[str, Tensor]:
        """Clip, step and clear.

        Args:
            factor: Multiplier of the base learning rates at this step.

        Returns:
            "grad_norm" before clipping (if clipping is on) and "anchor", the penalty at the weights before the step.
        """
        scalars: dict[str, Tensor] = {}
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.processes.average_gradients(self._parameters())
        if self.optim.grad_clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            scalars["grad_norm"] = nn.utils.clip_grad_norm_(self._parameters(), self.optim.grad_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Zero, not None: in a step whose batch does not reach a tensor, Adam's momentum still moves it (INFUSING's
        # classifier on generic batches).
        self.optimizer.zero_grad(set_to_none=False)
        if self.has_anchor:
            scalars["anchor"] = self.optimizer.anchor_penalty
        return scalars

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextlib.contextmanager
    def measured(self) -> Iterator[Mapping[str, Tensor]]:
        """Switch to eval mode; the trained model itself is measured."""
        self.module.eval()
        yield self.module.clip.state_dict()

    def save_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Nothing differs between processes."""

    def load_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Nothing differs between processes."""

    def state_dict(self) -> dict[str, Any]:
        """Return weights of model and heads, optimizer and loss-scaler state."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` exactly."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def parameter_groups(module: TunedModel, optim: OptimConfig) -> list[dict[str, Any]]:
    """Group trainable parameters by tower and by whether they decay.

    Weight decay applies to tensors with two or more dimensions (open_clip's rule).

    Args:
        module: Model and heads.
        optim: Learning rates per tower and weight decay.

    Returns:
        Groups with "params", "names", "lr", "weight_decay" and "name" ("image", "text", "logit", "head"); empty ones
        are left out.
    """
    rates = {
        "image": optim.image_lr,
        "text": optim.text_lr,
        "logit": None,
        "head": optim.head_lr,
    }
    named = [(tower_of(name), name, p) for name, p in module.clip.named_parameters() if p.requires_grad]
    named += [("head", f"heads.{name}", p) for name, p in module.heads.named_parameters() if p.requires_grad]
    groups = []
    for tower, rate in rates.items():
        for decays in (True, False):
            chosen = [(name, p) for kind, name, p in named if kind == tower and (p.ndim >= 2) == decays]
            if chosen:
                groups.append(
                    {
                        "params": [p for _, p in chosen],
                        "names": [name for name, _ in chosen],
                        "lr": optim.lr if rate is None else rate,
                        "weight_decay": optim.weight_decay if decays else 0.0,
                        "name": tower,
                    }
                )
    return groups

"""Points between and around weights: WiSE-FT interpolation, Fisher-weighted merging, moving averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ftfast.errors import ConfigError, ModelError

__all__ = ["ExponentialMovingAverage", "interpolate", "interpolation_sweep", "merge_fisher_weighted"]


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) start + alpha end`` for every entry of two state dicts (WiSE-FT, Wortsman et al., CVPR 2022).

    Both towers, floating buffers (such as BatchNorm statistics) and ``logit_scale`` take part. Entries that are not
    floating point (counters, position ids) cannot be interpolated and come from ``end`` when alpha is at least 0.5,
    else from ``start``. At alpha 0 and 1 the result equals the end point bit for bit.

    Args:
        start: State dict at alpha = 0, usually the pretrained weights.
        end: State dict at alpha = 1, the tuned weights, with the same keys and shapes.
        alpha: Position, usually between 0 and 1; values outside extrapolate.

    Returns:
        A new state dict, with the dtypes and devices of ``end``; computed in float32 or wider.

    Raises:
        ModelError: Keys or shapes differ.
    """
    _check_same_keys(start, end)
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, last in end.items():
            first = start[name].to(last.device)
            if not last.is_floating_point() or alpha in (0.0, 1.0):
                result[name] = (last if alpha >= 0.5 else first).to(last.dtype).clone()
                continue
            wide = torch.promote_types(last.dtype, torch.float32)
            result[name] = torch.lerp(first.to(wide), last.to(wide), alpha).to(last.dtype)
    return result


def interpolation_sweep(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alphas: Sequence[float]
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Interpolated state dicts one after another, so that only one is in memory.

    Args:
        start: Weights at alpha = 0.
        end: Weights at alpha = 1.
        alphas: Positions.

    Yields:
        (alpha, state dict).
    """
    for alpha in alphas:
        yield alpha, interpolate(start, end, alpha)


def merge_fisher_weighted(
    models: Sequence[Mapping[str, Tensor]],
    fishers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    floor: float = 1e-8,
) -> dict[str, Tensor]:
    """Fisher-weighted average of models (Matena and Raffel, NeurIPS 2022).

    ``theta = sum_m w_m max(F_m, floor) theta_m / sum_m w_m max(F_m, floor)``, elementwise. Floating entries without a
    Fisher (buffers) take the plain weighted mean; other entries come from the model with the largest weight.

    Args:
        models: State dicts with the same keys and shapes.
        fishers: Importance per model, by name.
        weights: Weight of each model; default equal.
        floor: Smallest importance (1e-8 in WiSE-FT's code), which also makes an all-zero element a plain mean.

    Returns:
        The merged state dict, with the dtypes of the first model.

    Raises:
        ConfigError: The lists differ in length, are empty, or the weights are not positive.
        ModelError: Keys or shapes differ.
    """
    scales = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if not models or len(models) != len(fishers) or len(models) != len(scales):
        raise ConfigError(f"merging got {len(models)} models, {len(fishers)} Fishers and {len(scales)} weights")
    if min(scales) <= 0.0:
        raise ConfigError(f"merge weights are {scales}; each must be positive")
    for other in models[1:]:
        _check_same_keys(models[0], other)
    heaviest = scales.index(max(scales))
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, first in models[0].items():
            if not first.is_floating_point():
                merged[name] = models[heaviest][name].clone()
                continue
            wide = torch.promote_types(first.dtype, torch.float32)
            top, bottom = torch.zeros_like(first, dtype=wide), torch.zeros_like(first, dtype=wide)
            for model, fisher, scale in zip(models, fishers, scales, strict=True):
                has_fisher = all(name in each for each in fishers)
                share = fisher[name].to(first.device, wide).clamp_min(floor) if has_fisher else torch.ones_like(top)
                top.addcmul_(share, model[name].to(first.device, wide), value=scale)
                bottom.add_(share, alpha=scale)
            merged[name] = (top / bottom).to(first.dtype)
    return merged


class ExponentialMovingAverage:
    """Moving average of weights and floating buffers: ``average <- decay average + (1 - decay) weights``.

    Args:
        model: The model whose state is followed.
        decay: Factor on the old average, in [0, 1).
        warmup: Use ``min(decay, (1 + n) / (10 + n))`` at update n, so that a short run does not keep its start.

    Raises:
        ConfigError: decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"the moving average's decay is {decay:g}; it must be at least 0 and below 1")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        Args:
            model: The model given at construction (or one with the same state).
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        floats: list[Tensor] = []
        present: list[Tensor] = []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                floats.append(self.average[name])
                present.append(value.to(self.average[name].device))
            else:
                self.average[name].copy_(value)
        if floats:
            torch._foreach_lerp_(floats, present, 1.0 - decay)

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on: the average and the update count.

        Returns:
            A dict for :meth:`load_state_dict`.
        """
        return {"average": dict(self.average), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore :meth:`state_dict`'s result.

        Args:
            state: The dict.

        Raises:
            ModelError: The average belongs to a model with other parameters.
        """
        average, updates = state["average"], state["updates"]
        if not isinstance(average, Mapping) or not isinstance(updates, int):
            raise ModelError("the moving average's state is damaged: it needs 'average' and 'updates'")
        _check_same_keys(self.average, average)
        for name, value in average.items():
            self.average[name].copy_(value)
        self.updates = updates

    def copy_to(self, model: nn.Module) -> None:
        """Load the average into a model.

        Args:
            model: A model with the same state dict.
        """
        model.load_state_dict(self.average)


def _check_same_keys(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Refuse state dicts with different keys or shapes, naming the first difference."""
    different = sorted(set(first) ^ set(second))
    if different:
        raise ModelError(
            f"the two state dicts differ in {len(different)} entries, first '{different[0]}'; both must come from the "
            f"same architecture"
        )
    for name, value in first.items():
        if value.shape != second[name].shape:
            raise ModelError(
                f"'{name}' has shape {tuple(value.shape)} in one state dict and {tuple(second[name].shape)} in the "
                f"other; both must come from the same architecture"
            )

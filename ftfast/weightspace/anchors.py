"""What weights are held to: L2-SP, elastic weight consolidation (EWC), online EWC and adaptive consolidation (AWC).

Every anchor is the quadratic ``sum_i c_i sum_j F_ij (theta_ij - theta*_ij)^2`` over named parameters i; they differ in
the importance F and in the scalar c. An :class:`Anchor` only describes:
:class:`ftfast.weightspace.optimizer.AnchoredAdamW` applies it inside its step, on whatever piece of them it owns.

Conventions that change the meaning of ``strength`` (always report them with it): no factor 1/2 unless ``half=True``;
``reduction="sum"`` adds over elements, ``"mean_per_tensor"`` takes the mean inside a tensor and the sum over tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ftfast.errors import ConfigError
from ftfast.kernels.anchor_ops import Anchors, anchor_penalty

__all__ = ["Anchor", "AnchorEntry", "adaptive_consolidation", "ewc", "l2_sp", "online_ewc"]

Reduction = Literal["sum", "mean_per_tensor"]
NamedParameters = Iterable[tuple[str, nn.Parameter]]
FUSED_QKV = ("in_proj_weight", "in_proj_bias", "qkv.weight", "qkv.bias")


@dataclass(frozen=True)
class AnchorEntry:
    """The anchor of one parameter.

    Args:
        start: theta*, shaped like the parameter; None means its value when the optimizer takes its first step (the
            only choice for weights that exist only in pieces, such as those of ``deepspeed.zero.Init``).
        precision: Elementwise importance F; None means one everywhere (or, for an adaptive anchor, not known yet).
        coefficient: The scalar c.
    """

    start: Tensor | None
    precision: Tensor | None
    coefficient: float


@dataclass(frozen=True)
class Anchor:
    """A quadratic anchor over named parameters.

    Args:
        parameters: The anchored parameters by name.
        entries: Start, importance and coefficient by the same names.
        adaptive: The importance is set every step from the gradient of a replay loss (AWC).
        description: The formula with its conventions, for logs.
    """

    parameters: Mapping[str, nn.Parameter]
    entries: Mapping[str, AnchorEntry]
    adaptive: bool = False
    description: str = field(default="", compare=False)

    def penalty(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Value of the penalty, without a graph.

        Args:
            parameters: Weights by name; default the anchored parameters as they are now.

        Returns:
            A float32 scalar.
        """
        source = self.parameters if parameters is None else parameters
        names = [name for name, entry in self.entries.items() if entry.start is not None and name in source]
        entries = [self.entries[name] for name in names]
        anchors = Anchors(
            [entry.start for entry in entries],
            [entry.precision for entry in entries],
            [entry.coefficient for entry in entries],
        )
        return anchor_penalty([source[name].detach() for name in names], anchors)


def l2_sp(
    named_parameters: NamedParameters,
    strength: float,
    reduction: Reduction = "sum",
    half: bool = False,
    split_qkv: bool = True,
) -> Anchor:
    """Anchor to the weights as they are now (L2-SP, Li et al., ICML 2018).

    ``sum``: ``strength * sum (theta - theta0)^2``. ``mean_per_tensor``: ``strength * sum_tensors mean (theta -
    theta0)^2``, the form INFUSING uses with strength 1e5; there, query, key and value weights fused in one tensor count
    as three tensors when ``split_qkv`` is set, as they do in a model that stores them apart.

    Args:
        named_parameters: Parameters to hold; frozen ones are left out.
        strength: Scalar lambda, at least 0.
        reduction: "sum" or "mean_per_tensor".
        half: Multiply by 1/2 (tllib's convention).
        split_qkv: See above; only matters for "mean_per_tensor".

    Returns:
        The anchor.

    Raises:
        ConfigError: The strength is negative or the reduction unknown.
    """
    _check_strength(strength)
    if reduction not in ("sum", "mean_per_tensor"):
        raise ConfigError(f"anchor reduction '{reduction}' is unknown; use 'sum' or 'mean_per_tensor'")
    parameters = _trainable(named_parameters)
    scale = 0.5 * strength if half else strength
    entries = {}
    for name, parameter in parameters.items():
        coefficient = scale
        if reduction == "mean_per_tensor":
            parts = 3 if split_qkv and name.endswith(FUSED_QKV) and parameter.shape[0] % 3 == 0 else 1
            coefficient = scale * parts / max(_full_numel(parameter), 1)
        entries[name] = AnchorEntry(_copy_of(parameter), None, coefficient)
    return Anchor(parameters, entries, description=f"L2-SP, {reduction}, strength {strength:g}, half={half}")


def ewc(
    named_parameters: NamedParameters,
    fisher: Mapping[str, Tensor],
    strength: float,
    start: Mapping[str, Tensor] | None = None,
    half: bool = False,
) -> Anchor:
    """Elastic weight consolidation with a diagonal Fisher (Kirkpatrick et al., PNAS 2017).

    ``strength * sum F (theta - theta*)^2``; the paper writes ``strength / 2``: pass ``half=True`` for that. Avalanche
    leaves the 1/2 out.

    Args:
        named_parameters: Parameters to hold; frozen ones are left out.
        fisher: Importance by parameter name, non-negative.
        strength: Scalar lambda, at least 0.
        start: theta* by name; default the weights as they are now.
        half: Multiply by 1/2.

    Returns:
        The anchor. Parameters without a Fisher entry are an error, since they would silently move freely.

    Raises:
        ConfigError: A negative strength, a missing Fisher entry or one of another shape.
    """
    _check_strength(strength)
    parameters = _trainable(named_parameters)
    missing = [name for name in parameters if name not in fisher]
    if missing:
        raise ConfigError(
            f"EWC: the Fisher has no entry for {len(missing)} of {len(parameters)} trainable parameters, first "
            f"'{missing[0]}'; estimate it on this model or freeze those parameters"
        )
    scale = 0.5 * strength if half else strength
    entries = {}
    for name, parameter in parameters.items():
        importance = fisher[name].detach().to(parameter.device)
        if importance.numel() != _full_numel(parameter):
            raise ConfigError(
                f"EWC: the Fisher of '{name}' has shape {tuple(importance.shape)}, the parameter {_shape(parameter)}; "
                f"they must match"
            )
        origin = _copy_of(parameter) if start is None else start[name].detach().to(parameter.device)
        entries[name] = AnchorEntry(origin, importance, scale)
    return Anchor(parameters, entries, description=f"EWC, strength {strength:g}, half={half}")


def online_ewc(
    named_parameters: NamedParameters,
    previous_fisher: Mapping[str, Tensor] | None,
    new_fisher: Mapping[str, Tensor],
    strength: float,
    decay: float = 1.0,
) -> tuple[Anchor, dict[str, Tensor]]:
    """Online EWC (Schwarz et al., ICML 2018): one running Fisher, anchored at the latest weights.

    ``F <- decay F_previous + F_new``, theta* = the weights as they are now.

    Args:
        named_parameters: Parameters to hold.
        previous_fisher: The running importance, None before the second task.
        new_fisher: Importance on the task just learnt.
        strength: Scalar lambda.
        decay: Factor on the running importance, between 0 and 1.

    Returns:
        The anchor, and the merged importance to pass as ``previous_fisher`` next time.

    Raises:
        ConfigError: decay outside [0, 1], or the conditions of :func:`ewc`.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"online EWC decay is {decay:g}; it must lie between 0 and 1")
    previous = previous_fisher or {}
    merged = {
        name: value + decay * previous[name].to(value) if name in previous else value.clone()
        for name, value in new_fisher.items()
    }
    return ewc(named_parameters, merged, strength), merged


def adaptive_consolidation(
    named_parameters: NamedParameters, strength: float = 1.0, exclude: Iterable[str] = ("logit_scale", "logit_bias")
) -> Anchor:
    """Adaptive weight consolidation (AWC) of GIFT (CVPR 2025): importance re-estimated at every step.

    ``strength * sum_p sum_i Fhat_pi (theta_pi - theta*_pi)^2`` with ``Fhat_p = g_p^2 / mean(g_p^2)``, g the gradient of
    the replay (distillation) loss on the current batch; tensors without that gradient get the constant 1e-6. Call
    :meth:`AnchoredAdamW.observe_replay_gradient` after the replay loss's backward pass, then run the task loss's
    backward pass without zeroing gradients, then step.

    Args:
        named_parameters: Parameters to hold; frozen ones are left out.
        strength: Scalar lambda (GIFT: 1).
        exclude: Parameter names left out, matched at the end of the dotted name.

    Returns:
        The anchor.

    Raises:
        ConfigError: The strength is negative.
    """
    _check_strength(strength)
    excluded = tuple(exclude)
    kept = {
        name: parameter
        for name, parameter in _trainable(named_parameters).items()
        if name.rsplit(".", 1)[-1] not in excluded
    }
    entries = {name: AnchorEntry(_copy_of(parameter), None, strength) for name, parameter in kept.items()}
    return Anchor(kept, entries, adaptive=True, description=f"AWC, strength {strength:g}")


def _check_strength(strength: float) -> None:
    """Refuse negative and non-finite strengths."""
    if not 0.0 <= strength < float("inf"):
        raise ConfigError(f"anchor strength is {strength:g}; it must be a finite number of at least 0")


def _trainable(named_parameters: NamedParameters) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in named_parameters if parameter.requires_grad}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Full shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _full_numel(parameter: nn.Parameter) -> int:
    """Number of elements of the whole parameter, also when ZeRO-3 holds only a piece here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _copy_of(parameter: nn.Parameter) -> Tensor | None:
    """A copy of the weights now; None when this process holds only a piece of them."""
    if hasattr(parameter, "ds_numel") and parameter.numel() != parameter.ds_numel:
        return None
    with torch.no_grad():
        return parameter.detach().clone()

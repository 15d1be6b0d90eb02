"""Anchored weight-space steps over lists of tensors: the penalty with its gradient, and AdamW with an anchor inside.

Three implementations stand behind each function: C++ loops for CPU tensors (one pass over memory), a multi-tensor
Triton launch for CUDA tensors, and PyTorch operations tensor by tensor everywhere else (``foreach`` operations would
hold temporaries as large as the model). ``backend="auto"`` picks by device, dtype and layout; asking for one by name
raises when it cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from ftfast.kernels import weight_cpu
from ftfast.kernels.dispatch import has_triton, interpreting
from torch import Tensor

from ftfast.errors import ConfigError, ShapeError

__all__ = ["AdamWHyper", "AnchorMode", "Anchors", "adamw_anchored_", "anchor_penalty", "split_rows"]

Row = Sequence[Tensor | None]  # theta, grad, exp_avg, exp_avg_sq, start, precision
BACKENDS = ("auto", "cpp", "triton", "torch")

AnchorMode = Literal["coupled", "decoupled", "proximal"]
MODES: tuple[AnchorMode, ...] = ("coupled", "decoupled", "proximal")


@dataclass(frozen=True)
class Anchors:
    """What each tensor of a list is held to: ``c_i sum F_i (theta_i - theta*_i)^2``.

    Args:
        starts: theta* per tensor, or None where the tensor has no anchor.
        precisions: Elementwise importance F per tensor; None means one everywhere.
        coefficients: The scalar c per tensor.
    """

    starts: Sequence[Tensor | None]
    precisions: Sequence[Tensor | None]
    coefficients: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.starts) == len(self.precisions) == len(self.coefficients):
            raise ShapeError(
                f"anchors need lists of one length, got {len(self.starts)} starts, {len(self.precisions)} precisions "
                f"and {len(self.coefficients)} coefficients; give one entry per tensor"
            )

    def check(self, params: Sequence[Tensor]) -> None:
        """Compare shapes and devices with the weights.

        Args:
            params: The weights, in the order of the lists.

        Raises:
            ShapeError: A length, shape or device differs.
        """
        if len(params) != len(self.starts):
            raise ShapeError(f"{len(params)} weight tensors but {len(self.starts)} anchors; give one per tensor")
        for index, param in enumerate(params):
            for label, other in (("anchor", self.starts[index]), ("precision", self.precisions[index])):
                if other is not None and (other.shape != param.shape or other.device != param.device):
                    raise ShapeError(
                        f"tensor {index}: weights are {tuple(param.shape)} on {param.device} but the {label} is "
                        f"{tuple(other.shape)} on {other.device}; they must match"
                    )


@dataclass(frozen=True)
class AdamWHyper:
    """Numbers of one AdamW step.

    Args:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        step: This step's number, counted from 1 (bias correction).
        mode: How the anchor acts, see :func:`adamw_anchored_`.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 1
    mode: AnchorMode = "coupled"


def split_rows(rows: Sequence[Row], backend: str) -> dict[tuple[Any, ...], list[int]]:
    """Sort rows by the implementation that takes them, one launch or call per group.

    Args:
        rows: Tensors of each parameter.
        backend: "auto" or a name to insist on.

    Returns:
        Row numbers by (implementation, dtypes...), in order.

    Raises:
        ConfigError: The backend is unknown, or cannot take a row.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is '{backend}'; choose one of {', '.join(BACKENDS)}")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        key: tuple[Any, ...] = ("torch",)
        cuda = any(tensor is not None and tensor.is_cuda for tensor in row)
        if backend in ("auto", "cpp") and not cuda and weight_cpu.takes(row):
            key = ("cpp",)
        elif backend in ("auto", "triton") and has_triton() and (cuda or (interpreting() and backend == "triton")):
            signature = _triton().signature_of(row)
            key = ("torch",) if signature is None else ("triton", *signature)
        if backend not in ("auto", key[0]):
            described = [None if t is None else f"{t.dtype} on {t.device}" for t in row]
            raise ConfigError(f"backend '{backend}' cannot take tensor {index} ({described}); use backend='auto'")
        groups.setdefault(key, []).append(index)
    return groups


def _triton() -> Any:
    """The Triton kernels, imported only where they run."""
    from ftfast.kernels import weight_triton

    return weight_triton


def anchor_penalty(
    params: Sequence[Tensor], anchors: Anchors, *, grads: Sequence[Tensor] | None = None, backend: str = "auto"
) -> Tensor:
    """Penalty ``sum_i c_i sum F_i (theta_i - theta*_i)^2``, and its gradient added in place where asked.

    Memory: nothing beyond a scalar per 65,536 elements on the fused paths; one temporary tensor on the PyTorch path.
    Sums are added in a fixed order: results repeat exactly on one machine.

    Args:
        params: Weights theta; any shapes, floating dtypes; empty tensors allowed.
        anchors: theta*, F and c per tensor.
        grads: If given, ``2 c F (theta - theta*)`` is added to each of these tensors.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The penalty, a float32 scalar on the device of the weights (cpu for an empty list).

    Raises:
        ShapeError: Lengths, shapes or devices do not match.
        ConfigError: The backend cannot take these tensors.
    """
    anchors.check(params)
    if grads is not None and len(grads) != len(params):
        raise ShapeError(f"{len(params)} weight tensors but {len(grads)} gradients; give one per tensor")
    rows: list[Row] = []
    coefficients = []
    for index, param in enumerate(params):
        start, coefficient = anchors.starts[index], float(anchors.coefficients[index])
        if start is not None and coefficient != 0.0 and param.numel() > 0:
            grad = None if grads is None else grads[index]
            rows.append((param, grad, None, None, start, anchors.precisions[index]))
            coefficients.append(coefficient)
    total = torch.zeros((), dtype=torch.float32, device=params[0].device if params else None)
    with torch.no_grad():
        for name, picked in split_rows(rows, backend).items():
            some, scale = [rows[i] for i in picked], [coefficients[i] for i in picked]
            if name[0] == "cpp":
                total += weight_cpu.penalty(some, scale)
            elif name[0] == "triton":
                total += _triton().penalty(some, scale)
            else:
                for row, coefficient in zip(some, scale, strict=True):
                    total += _penalty_torch(row, coefficient)
    return total


def _penalty_torch(row: Row, coefficient: float) -> Tensor:
    """Penalty of one row with PyTorch operations, adding the gradient where the row has one."""
    param, grad, start = row[0], row[1], row[4]
    if param is None or start is None:
        raise ShapeError("an anchored row needs weights and a start")
    pull, value = _pull_and_penalty(param, start, row[5], coefficient)
    if grad is not None:
        grad.add_(pull.to(grad.dtype))
    return value


def _pull_and_penalty(
    param: Tensor, start: Tensor, precision: Tensor | None, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Gradient ``2 c F (theta - theta*)`` in float32 or wider, and the penalty, of one tensor."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    delta = param.to(dtype) - start.to(dtype)
    pull = delta * (2.0 * coefficient) if precision is None else precision.to(dtype) * delta * (2.0 * coefficient)
    return pull, 0.5 * (pull * delta).sum(dtype=dtype).to(torch.float32)


def adamw_anchored_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    hyper: AdamWHyper,
    anchors: Anchors | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One AdamW step with a quadratic anchor, in place.

    With ``pull = 2 c F (theta - theta*)`` at the weights before the step:

    * ``coupled``: ``grad + pull`` goes through Adam like any loss gradient (``grads`` itself is not changed);
    * ``decoupled``: ``theta <- theta - lr pull`` beside the Adam update, as AdamW does with weight decay;
    * ``proximal``: after the Adam update ``theta <- (theta + eta theta*) / (1 + eta)``, ``eta = 2 lr c F``: the exact
      minimiser, stable for any strength.

    Memory: nothing beyond a scalar per 65,536 elements on the fused paths, which read and write each tensor once.

    Args:
        params: Weights, changed in place.
        grads: Gradients of the loss.
        exp_avgs: First moments, changed in place.
        exp_avg_sqs: Second moments, changed in place.
        hyper: Learning rate, betas, eps, weight decay, step number and mode.
        anchors: theta*, F and c per tensor; None is plain AdamW.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The penalty at the weights before the step, a float32 scalar on their device.

    Raises:
        ShapeError: Lengths, shapes or devices do not match, or the mode is unknown.
        ConfigError: The backend cannot take these tensors.
    """
    _check_step(hyper.mode, (params, grads, exp_avgs, exp_avg_sqs))
    if anchors is not None:
        anchors.check(params)
    rows: list[Row] = []
    coefficients = []
    for index, param in enumerate(params):
        if param.numel() > 0:
            anchor = None if anchors is None else _anchor_of(anchors, index)
            start, precision, coefficient = (None, None, 0.0) if anchor is None else anchor
            rows.append((param, grads[index], exp_avgs[index], exp_avg_sqs[index], start, precision))
            coefficients.append(coefficient)
    total = torch.zeros((), dtype=torch.float32, device=params[0].device if params else None)
    numbers = (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, float(hyper.step))
    with torch.no_grad():
        for name, picked in split_rows(rows, backend).items():
            some, scale = [rows[i] for i in picked], [coefficients[i] for i in picked]
            if name[0] == "cpp":
                total += weight_cpu.adamw(some, scale, numbers, 1 + MODES.index(hyper.mode))
            elif name[0] == "triton":
                total += _triton().adamw(some, scale, numbers, 1 + MODES.index(hyper.mode))
            else:
                for row, coefficient in zip(some, scale, strict=True):
                    total += _step_torch(row, coefficient, hyper)
    return total


def _check_step(mode: str, lists: Sequence[Sequence[Tensor]]) -> None:
    """Refuse an unknown mode and lists of different lengths."""
    if mode not in MODES:
        raise ShapeError(f"anchor mode '{mode}' is unknown; use one of {', '.join(MODES)}")
    lengths = {len(each) for each in lists}
    if len(lengths) != 1:
        raise ShapeError(f"params, grads and moments must be lists of one length, got lengths {sorted(lengths)}")


def _anchor_of(anchors: Anchors, index: int) -> tuple[Tensor, Tensor | None, float] | None:
    """The anchor of one tensor, or None where it has none."""
    start, coefficient = anchors.starts[index], float(anchors.coefficients[index])
    return None if start is None or coefficient == 0.0 else (start, anchors.precisions[index], coefficient)


def _step_torch(row: Row, coefficient: float, hyper: AdamWHyper) -> Tensor:
    """The step on one row with ordinary PyTorch operations; returns the penalty."""
    param, grad, exp_avg, exp_avg_sq, start, precision = row
    if param is None or grad is None or exp_avg is None or exp_avg_sq is None:
        raise ShapeError("an AdamW row needs weights, gradient and both moments")
    anchor = None if start is None else (start, precision, coefficient)
    dtype = torch.promote_types(param.dtype, torch.float32)
    weights, grad = param.to(dtype), grad.to(dtype)
    penalty, pull = torch.zeros((), device=param.device), None
    if anchor is not None:
        pull, penalty = _pull_and_penalty(param, *anchor)
        if hyper.mode == "coupled":
            grad = grad + pull
    first = exp_avg.to(dtype).lerp(grad, 1 - hyper.beta1)
    second = exp_avg_sq.to(dtype).mul(hyper.beta2).addcmul(grad, grad, value=1 - hyper.beta2)
    denominator = (second.sqrt() / math.sqrt(1 - hyper.beta2**hyper.step)).add_(hyper.eps)
    new = weights * (1 - hyper.lr * hyper.weight_decay)
    if pull is not None and hyper.mode == "decoupled":
        new.sub_(pull, alpha=hyper.lr)
    new.addcdiv_(first, denominator, value=-hyper.lr / (1 - hyper.beta1**hyper.step))
    if anchor is not None and hyper.mode == "proximal":
        start, precision, coefficient = anchor
        eta: Tensor | float = 2.0 * hyper.lr * coefficient
        eta = eta if precision is None else precision.to(dtype) * eta
        new = (new + eta * start.to(dtype)) / (1 + eta)
    param.copy_(new)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    return penalty

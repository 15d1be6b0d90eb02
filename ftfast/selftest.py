"""Does every operation give the right numbers on this machine? Checks against float64 references, in seconds.

The bar is relative: an operation may err at most twice as much as plain PyTorch in the same dtype, plus a small slack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Error allowed beyond twice plain PyTorch's, relative to the largest true value."""

_ROWS, _COLUMNS, _WIDTH = 203, 131, 72  # neither powers of two nor multiples of a block


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: Operation.
        device: Where it ran.
        dtype: Of the inputs.
        error: Largest deviation from the float64 truth, relative to the largest true value, over loss and gradients.
        limit: Largest deviation allowed.
        seconds: Time taken.
        problem: Message of an exception; empty if there was none.
    """

    name: str
    device: str
    dtype: str
    error: float
    limit: float
    seconds: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the operation ran and its error is within the limit (NaN is not)."""
        return not self.problem and self.error <= self.limit

    @property
    def verdict(self) -> str:
        """Say "ok", "WRONG" or what was raised."""
        return self.problem or ("ok" if self.passed else "WRONG")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """An operation with its definition: both map the same tensors to a list of results."""

    name: str
    inputs: Callable[[torch.Generator], list[Tensor]]
    operation: Callable[[Tensors], list[Tensor]]
    reference: Callable[[Tensors], list[Tensor]]


def run_checks() -> list[Check]:
    """Run every case in float32 on the CPU, and in float32 and bfloat16 on the first CUDA device if there is one.

    Returns:
        One check per case, device and dtype.
    """
    places = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    cases = [*_loss_cases(), *_weight_cases(), *_search_cases()]
    return [compare(case, device, dtype) for device, dtype in places for case in cases]


def compare(case: Case, device: str, dtype: torch.dtype) -> Check:
    """Compare one operation with its float64 definition.

    Args:
        case: The operation.
        device: Where it runs.
        dtype: Floating dtype of its inputs.

    Returns:
        The comparison; an exception inside the operation becomes its ``problem``.
    """
    begin = time.perf_counter()
    # Rounding to the dtype first: both sides see the same inputs.
    inputs = [_cast(x, dtype) for x in case.inputs(torch.Generator().manual_seed(0))]
    truth = case.reference([_cast(x, torch.float64) for x in inputs])
    placed = [x.to(device) for x in inputs]
    try:
        got, baseline = case.operation(placed), case.reference(placed)
        error, problem = _deviation(got, truth), ""
        limit = 2 * _deviation(baseline, truth) + SLACK[dtype]
    except Exception as failure:
        error, limit, problem = float("nan"), SLACK[dtype], f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - begin
    return Check(case.name, device, str(dtype).removeprefix("torch."), error, limit, seconds, problem)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _deviation(got: Tensors, truth: Tensors) -> float:
    worst = 0.0
    for mine, true in zip(got, truth, strict=True):
        if not mine.is_floating_point():  # indices are right or wrong
            worst = worst if torch.equal(mine.cpu(), true) else float("inf")
            continue
        gap = (mine.detach().cpu().double() - true.detach().double()).abs().max()
        relative = float(gap / true.detach().abs().max().clamp(min=1e-30))
        worst = relative if relative != relative else max(worst, relative)
    return worst


def _with_gradients(function: Callable[..., Tensor]) -> Callable[[Tensors], list[Tensor]]:
    """Turn a loss of floating tensors into (loss, gradients) for an incoming gradient other than 1."""

    def evaluated(inputs: Tensors) -> list[Tensor]:
        """Return the loss followed by the gradients of its floating inputs."""
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        loss = function(*leaves)
        moving = [x for x in leaves if x.is_floating_point()]
        gradients = torch.autograd.grad(0.37 * loss, moving, allow_unused=True)
        return [loss, *(g for g in gradients if g is not None)]

    return evaluated


def _features(generator: torch.Generator, *rows: int) -> list[Tensor]:
    return [F.normalize(torch.randn(n, _WIDTH, generator=generator), dim=1) for n in rows]


def _labels(generator: torch.Generator, classes: int) -> Tensor:
    return torch.randint(0, classes, (_ROWS,), generator=generator)


def _pairs(generator: torch.Generator) -> list[Tensor]:
    return _features(generator, _ROWS, _ROWS)


def _labelled(generator: torch.Generator) -> list[Tensor]:
    return [*_features(generator, _ROWS), _labels(generator, 20)]


def _classes(generator: torch.Generator) -> list[Tensor]:
    return [*_features(generator, _ROWS, _COLUMNS), _labels(generator, _COLUMNS)]


def _teacher_pairs(generator: torch.Generator) -> list[Tensor]:
    return _features(generator, _ROWS, _COLUMNS, _ROWS, _COLUMNS)


def _loss_cases() -> list[Case]:
    from ftfast import kernels
    from ftfast.kernels import reference

    scale, options = 14.0, kernels.DistillOptions()
    losses: list[tuple[str, Any, Callable[..., Tensor], Callable[..., Tensor]]] = [
        (
            "clip_loss",
            _pairs,
            lambda x, y: kernels.clip_loss(x, y, scale),
            lambda x, y: reference.clip_loss_reference(x, y, scale),
        ),
        (
            "siglip_loss",
            _pairs,
            lambda x, y: kernels.siglip_loss(x, y, scale),
            lambda x, y: reference.siglip_loss_reference(x, y, scale),
        ),
        (
            "supervised_contrastive_loss",
            _labelled,
            lambda x, labels: kernels.supervised_contrastive_loss(x, labels, scale),
            lambda x, labels: reference.supervised_contrastive_loss_reference(x, labels, scale),
        ),
        (
            "classification_loss",
            _classes,
            lambda x, c, labels: kernels.classification_loss(x, c, labels, scale, label_smoothing=0.1),
            lambda x, c, labels: reference.classification_loss_reference(x, c, labels, scale, label_smoothing=0.1),
        ),
        (
            "similarity_distillation_loss",
            _teacher_pairs,
            lambda x, y, a, b: kernels.similarity_distillation_loss(
                x, y, a.detach(), b.detach(), scale, options=options
            ),
            lambda x, y, a, b: reference.similarity_distillation_loss_reference(
                x, y, a.detach(), b.detach(), scale, options=options
            ),
        ),
        (
            "feature_distillation_loss",
            _pairs,
            lambda x, y: kernels.feature_distillation_loss(x, y.detach()),
            lambda x, y: reference.feature_distillation_loss_reference(x, y.detach()),
        ),
    ]
    return [
        Case(name, inputs, _with_gradients(operation), _with_gradients(definition))
        for name, inputs, operation, definition in losses
    ]


def _weight_cases() -> list[Case]:
    def tensors(generator: torch.Generator) -> list[Tensor]:
        """Draw four signed tensors and two positive ones."""
        signed = [torch.randn(_ROWS, _WIDTH, generator=generator) for _ in range(4)]
        positive = [torch.rand(_ROWS, _WIDTH, generator=generator) for _ in range(2)]
        return [*signed, *positive]

    def sequences(generator: torch.Generator) -> list[Tensor]:
        """Draw a positive accumulator, then inputs and gradients of a layer on sequences."""
        shapes = ((_WIDTH, 33), (5, 7, 33), (5, 7, _WIDTH))
        return [torch.rand(*shapes[0], generator=generator)] + [
            torch.randn(*shape, generator=generator) for shape in shapes[1:]
        ]

    return [
        Case("adamw_anchored", tensors, _step, _step_reference),
        Case("anchor_penalty", tensors, _penalty, _penalty_reference),
        Case("accumulate_fisher", tensors, _fisher, _fisher_reference),
        Case("per_sample_fisher", sequences, _per_sample, _per_sample_reference),
    ]


_STRENGTH = 0.3
_ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "step": 3}


def _step(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels.anchor_ops import AdamWHyper, Anchors, adamw_anchored_

    theta, grad, first, start, second, precision = (x.clone() for x in inputs)
    hyper = AdamWHyper(**_ADAMW, mode="decoupled")  # type: ignore[arg-type]
    anchors = Anchors([start], [precision], [_STRENGTH])
    penalty = adamw_anchored_([theta], [grad], [first], [second], hyper, anchors)
    return [theta, first, second, penalty]


def _step_reference(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels import weight_reference

    theta, grad, first, start, second, precision = inputs
    anchor = (start, precision, _STRENGTH)
    return list(weight_reference.adamw_anchored(theta, grad, first, second, anchor, _ADAMW, "decoupled"))


def _penalty(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels.anchor_ops import Anchors, anchor_penalty

    gradient = torch.zeros_like(inputs[0])
    anchors = Anchors([inputs[3]], [inputs[5]], [_STRENGTH])
    return [anchor_penalty([inputs[0]], anchors, grads=[gradient]), gradient]


def _penalty_reference(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels import weight_reference

    return list(weight_reference.anchor_penalty(inputs[0], inputs[3], inputs[5], _STRENGTH))


def _fisher(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels.fisher_ops import accumulate_fisher_

    fisher = inputs[4].clone()
    accumulate_fisher_([fisher], [inputs[1]], decay=0.9, weight=0.1, normalize=True)
    return [fisher]


def _fisher_reference(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels import weight_reference

    return [weight_reference.accumulate_fisher(inputs[4], inputs[1], decay=0.9, weight=0.1, normalize=True)]


def _per_sample(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels.fisher_ops import per_sample_fisher_

    fisher = inputs[0].clone()
    per_sample_fisher_(fisher, inputs[1], inputs[2], weight=0.5)
    return [fisher]


def _per_sample_reference(inputs: Tensors) -> list[Tensor]:
    from ftfast.kernels import weight_reference

    return [weight_reference.per_sample_fisher(inputs[0], inputs[1], inputs[2], weight=0.5)]


def _search_cases() -> list[Case]:
    def inputs(generator: torch.Generator) -> list[Tensor]:
        """Draw queries and a gallery."""
        return [
            torch.randn(31, _WIDTH, generator=generator),
            torch.randn(1009, _WIDTH, generator=generator),
        ]

    return [Case(f"search.topk {metric}", inputs, _search(metric), _search_reference(metric)) for metric in _SCORES]


_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda q, x: F.normalize(q, dim=1) @ F.normalize(x, dim=1).T,
    "ip": lambda q, x: q @ x.T,
    "l2": lambda q, x: -((q[:, None] - x[None]) ** 2).sum(2),
}
_NEIGHBOURS = 17


def _search(metric: str) -> Callable[[Tensors], list[Tensor]]:
    def found(inputs: Tensors) -> list[Tensor]:
        """Search with the operation under test."""
        from ftfast.search import topk

        scores, indices = topk(inputs[0], inputs[1], _NEIGHBOURS, metric=metric)
        return [scores, indices]

    return found


def _search_reference(metric: str) -> Callable[[Tensors], list[Tensor]]:
    """All pairs in float64, so that the order is the true one in every dtype."""

    def found(inputs: Tensors) -> list[Tensor]:
        """Rank all pairs by their exact scores."""
        queries, gallery = (x.cpu().double() for x in inputs)
        scores, indices = torch.topk(_SCORES[metric](queries, gallery), _NEIGHBOURS)
        return [scores.abs() if metric == "l2" else scores, indices]

    return found

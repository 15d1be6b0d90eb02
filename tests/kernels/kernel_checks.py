"""Shared checks of the kernel tests: inputs, and "no worse than PyTorch in the same dtype"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TOLERANCE = 2e-6  # of |loss|, against float64 on the same inputs


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64)).to(dtype)


def run(op: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: float = 0.37) -> list[Tensor]:
    """Return the loss and the gradient of every input for a given upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = op(*leaves)
    (loss * upstream).backward()
    return [loss.detach(), *[leaf.grad for leaf in leaves]]  # type: ignore[list-item]


def assert_no_worse_than_torch(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], slack: float
) -> None:
    """Require error(op) <= error(reference in the same dtype) + slack·scale, both against the reference in float64."""
    truth = run(reference, [x.double() for x in inputs])
    baseline, candidate = run(reference, inputs), run(op, inputs)
    assert abs(candidate[0].item() - truth[0].item()) <= max(
        LOSS_TOLERANCE * abs(truth[0].item()), abs(baseline[0].item() - truth[0].item())
    ), f"loss {candidate[0].item()!r}, truth {truth[0].item()!r}, PyTorch {baseline[0].item()!r}"
    for index, (true, base, got) in enumerate(zip(truth[1:], baseline[1:], candidate[1:], strict=True)):
        assert got.dtype == inputs[index].dtype
        assert got.shape == inputs[index].shape
        assert torch.isfinite(got).all(), f"gradient {index} is not finite"
        error, allowed = (got.double() - true).abs(), (base.double() - true).abs()
        bound = slack * true.abs().max()
        worst = error.argmax()
        values = [t.flatten()[worst].item() for t in (true, base, got)]
        assert error.max() <= allowed.max() + bound, f"gradient {index} at {worst}: true, PyTorch, ours = {values}"
        assert error.square().mean().sqrt() <= allowed.square().mean().sqrt() + bound, f"gradient {index}: RMS"

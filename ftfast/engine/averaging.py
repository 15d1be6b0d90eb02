"""The plain mean of weights along a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RunningMean:
    """Mean of the start weights and of the weights after every ``every``-th step (ZSCL's weight ensemble).

    Has the methods of :class:`ftfast.weightspace.ExponentialMovingAverage`. Entries that are not floating point are
    the latest ones.

    Args:
        model: The model whose state is followed.
        every: Steps between two members of the mean.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every = every
        self.steps = 0
        self.average: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count a step; take the weights into the mean if it is their turn.

        Args:
            model: The model given at construction.
        """
        self.steps += 1
        if self.steps % self.every:
            return
        members = self.steps // self.every  # before this one, counting the start
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.to(self.average[name]), 1.0 / (members + 1))
            else:
                self.average[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the step count."""
        return {"average": dict(self.average), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.steps = int(state["steps"])

    def copy_to(self, model: nn.Module) -> None:
        """Load the mean into a model."""
        model.load_state_dict(self.average)

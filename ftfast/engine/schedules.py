"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from ftfast.config.schema import OptimConfig
from ftfast.errors import ConfigError


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Translate the setting into steps.

    Args:
        warmup: A fraction of all steps if below 1, else a number of steps.
        total_steps: Length of training.

    Returns:
        Number of warm-up steps.

    Raises:
        ConfigError: If warm-up is not shorter than training.
    """
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    if steps and steps >= total_steps:
        raise ConfigError(
            f"optim.warmup is {steps} steps but training has {total_steps}. "
            "Use a fraction such as optim.warmup: 0.1, or fewer steps."
        )
    return steps


def learning_rate_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Multiplier of every base learning rate at one step.

    Linear warm-up to 1, then 1/2 (1 + cos(pi p)) with p the share of the remaining steps done, or constant 1.

    Args:
        step: 0-based optimizer step.
        total_steps: Length of training.
        optim: Schedule and warm-up.

    Returns:
        A factor in [0, 1]; the first step of a warm-up of n steps has 1/n.
    """
    warm = warmup_steps(optim.warmup, total_steps)
    if step < warm:
        return (step + 1) / warm
    if optim.schedule == "constant":
        return 1.0
    progress = (step - warm) / max(1, total_steps - warm)
    return 0.5 * (1.0 + math.cos(math.pi * progress))

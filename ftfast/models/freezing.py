"""Which parameters may move: tower locks with open_clip's meaning, and frozen BatchNorm statistics."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftfast.config.schema import ModelConfig
from ftfast.errors import ModelError

TEXT_PREFIXES = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def tower_of(name: str) -> str:
    """Return the tower a parameter of an open_clip model belongs to.

    Args:
        name: Parameter name as in ``model.named_parameters()``.

    Returns:
        "image", "text" or "logit" (logit_scale and logit_bias).
    """
    if name.startswith("visual."):
        return "image"
    return "text" if name.startswith(TEXT_PREFIXES) else "logit"


def apply_locks(model: Any, config: ModelConfig) -> None:
    """Freeze towers as ``config`` says, in place.

    Args:
        model: open_clip model whose parameters all require gradients.
        config: ``lock_image``, ``lock_text`` (with unlocked groups/layers) and ``lock_logit_scale``.

    Raises:
        ModelError: If the architecture cannot be locked partially, or nothing is left to train.
    """
    try:
        if config.lock_image:
            model.lock_image_tower(unlocked_groups=config.lock_image_unlocked_groups)
        if config.lock_text:
            model.lock_text_tower(unlocked_layers=config.lock_text_unlocked_layers)
    except (AssertionError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{config.name!r} does not support this lock: {error}. Lock the whole tower (0 unlocked)."
        ) from error
    if config.lock_logit_scale:
        for name, parameter in model.named_parameters():
            if tower_of(name) == "logit":
                parameter.requires_grad_(False)


def freeze_batch_norm_statistics(model: nn.Module) -> int:
    """Put every BatchNorm layer into eval mode so that running statistics neither move nor are bypassed.

    Call after ``model.train()``. The affine weights stay trainable.

    Args:
        model: Any module.

    Returns:
        Number of layers affected.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.eval()
    return len(layers)


def trainable_summary(model: nn.Module) -> list[tuple[str, int, int]]:
    """Count parameters per tower.

    Args:
        model: open_clip model, after locks.

    Returns:
        Rows (tower, trainable parameters, all parameters) for "image", "text" and "logit".
    """
    rows = {tower: [0, 0] for tower in ("image", "text", "logit")}
    for name, parameter in model.named_parameters():
        row = rows[tower_of(name)]
        row[0] += parameter.numel() if parameter.requires_grad else 0
        row[1] += parameter.numel()
    return [(tower, trainable, total) for tower, (trainable, total) in rows.items()]

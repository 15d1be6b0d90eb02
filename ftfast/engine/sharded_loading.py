"""Models built in shards (``deepspeed.zero.Init``), for those that do not fit one GPU."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from torch import nn

from ftfast.config.schema import TrainConfig
from ftfast.engine.deepspeed_settings import deepspeed_settings
from ftfast.engine.processes import Processes
from ftfast.errors import ConfigError
from ftfast.models import LoadedModel

RECIPES = ("infusing", "finetune", "l2sp", "flyp", "wise-ft")
"""Methods that neither run the model before training nor keep a live copy of it."""


def require_shardable(recipe: str) -> None:
    """Refuse recipes that need the whole model in every process.

    Raises:
        ConfigError: If the recipe is such a one.
    """
    if recipe not in RECIPES:
        raise ConfigError(
            f"recipe '{recipe}' runs the whole model beside the trained one, so deepspeed.zero_init does not help it. "
            f"Leave it out, or use one of {', '.join(RECIPES)}."
        )


def build_in_shards(loaded: LoadedModel, config: TrainConfig, processes: Processes, device: torch.device) -> nn.Module:
    """Build a model whose weights lie divided among the processes, and fill it from the first one's whole copy.

    Args:
        loaded: The model with its weights, in CPU memory.
        config: Settings with ZeRO stage 3.
        processes: This process among the others.
        device: Where the shards go.

    Returns:
        The divided model; names are those of ``loaded.model``, the temperature has one dimension.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    from ftfast.engine.deepspeed_engine import import_deepspeed

    deepspeed = import_deepspeed(device)
    settings = deepspeed_settings(config, processes.world_size, sum(p.numel() for p in loaded.model.parameters()))
    arguments = json.loads(json.dumps(loaded.model_config))
    custom = arguments.pop("custom_text", False) or isinstance(loaded.model, CustomTextCLIP)
    settings["train_batch_size"] = config.train.batch_size * processes.world_size
    with contextlib.redirect_stdout(sys.stderr), deepspeed.zero.Init(config_dict_or_path=settings):
        model: Any = (CustomTextCLIP if custom else CLIP)(**arguments, nonscalar_logit_scale=True)
    whole = dict(loaded.model.named_parameters())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if processes.main:
                parameter.data.copy_(whole[name].data.reshape(parameter.shape))
    for name, buffer in model.named_buffers():
        buffer.data.copy_(loaded.model.get_buffer(name))
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model.eval()

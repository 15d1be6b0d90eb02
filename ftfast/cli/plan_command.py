"""``ftfast plan``: how much of each GPU's memory a run will take, before anything is downloaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ftfast.cli import output
from ftfast.cli.options import parse_options


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Plan the memory of each GPU for a model, a batch and a ZeRO stage."""

    model: str
    """open_clip name such as ViT-g-14, a built-in, or local-dir:FOLDER."""
    batch: int = 128
    """Images per GPU and forward pass."""
    zero: int | None = None
    """ZeRO stage 0 to 3; left out: no DeepSpeed."""
    gpus: int = 1
    """Number of processes, one per GPU."""
    recipe: str = "flyp"
    """Method; decides about anchor, importance, teacher and which towers move."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16", "pure_bf16", "pure_fp16"] = "fp32"
    """As train.precision."""
    grad_checkpointing: bool = False
    """As model.grad_checkpointing."""
    offload_optimizer: bool = False
    """As deepspeed.offload_optimizer."""
    json: bool = False
    """Print bytes as JSON."""


def run(argv: Sequence[str]) -> int:
    """Print a memory plan.

    Args:
        argv: Arguments after ``ftfast plan``.

    Returns:
        0.
    """
    arguments = parse_options(PlanArguments, argv, "ftfast plan")
    from ftfast.memory_plan import Job, as_dict, as_text, plan

    result = plan(
        Job(
            model=arguments.model,
            batch=arguments.batch,
            zero=arguments.zero,
            gpus=arguments.gpus,
            recipe=arguments.recipe,
            precision=arguments.precision,
            grad_checkpointing=arguments.grad_checkpointing,
            offload_optimizer=arguments.offload_optimizer,
        )
    )
    if arguments.json:
        output.emit_json(as_dict(result))
    else:
        output.emit(as_text(result))
    return 0

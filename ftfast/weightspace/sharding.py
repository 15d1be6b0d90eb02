"""Which piece of which parameter a flat optimizer shard holds.

DeepSpeed's ZeRO replaces the parameters in an optimizer's groups by flat float32 shards. The maps between the two
already exist on the model's parameters; this file reads them (without importing DeepSpeed) so that an anchor can be cut
to the shard with no communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ftfast.weightspace.optimizer import AnchoredAdamW

__all__ = ["Segment", "global_penalty", "observe_replay_gradient", "segments_of"]


@dataclass(frozen=True)
class Segment:
    """A stretch of a tensor: ``tensor.view(-1)[offset : offset + length]``.

    Args:
        offset: First element in the tensor.
        length: Number of elements.
        name: Anchored parameter it belongs to; None for stretches without an anchor and for padding.
        source: First element inside that parameter, flattened.
    """

    offset: int
    length: int
    name: str | None
    source: int = 0

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.offset + self.length


def segments_of(tensor: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Segment]:
    """Stretches of a tensor that an optimizer was handed, in order and without gaps.

    Args:
        tensor: One of the parameters themselves, or a flat shard of ZeRO stage 1, 2 or 3.
        parameters: Anchored parameters by name.

    Returns:
        One segment for an ordinary parameter; for a shard, one per piece.
    """
    for name, parameter in parameters.items():
        if parameter is tensor:
            return [Segment(0, tensor.numel(), name)]
    pieces = [piece for name, parameter in parameters.items() for piece in _pieces(name, parameter, tensor)]
    return _fill_gaps(sorted(pieces, key=lambda piece: piece.offset), tensor.numel())


def _pieces(name: str, parameter: nn.Parameter, shard: Tensor) -> list[Segment]:
    """The piece of one parameter inside a shard: none or one segment."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:  # stages 1 and 2
        fragment, address = mapping.hp_fragment, mapping.hp_fragment_address
        offset = (fragment.data_ptr() - shard.data_ptr()) // shard.element_size()
        inside = fragment.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
        if inside and offset == address.start and address.numel > 0:
            return [Segment(offset, address.numel, name, mapping.lp_fragment_address.start)]
        return []
    zero = getattr(parameter, "_z3_optimizer", None)
    if zero is None:
        return []
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    if zero.fp32_partitioned_groups_flat[group] is not shard:
        return []
    source = _rank_of(zero) * length
    real = min(length, max(parameter.ds_numel - source, 0))  # type: ignore[attr-defined]
    return [Segment(offset, real, name, source)] if real > 0 else []


def _rank_of(zero: Any) -> int:
    """This process's place in the group that a stage 3 optimizer shards over."""
    return int(torch.distributed.get_rank(group=zero.dp_process_group))


def _fill_gaps(pieces: list[Segment], total: int) -> list[Segment]:
    """Add unnamed segments so that the list covers the tensor."""
    filled: list[Segment] = []
    position = 0
    for piece in pieces:
        if piece.offset > position:
            filled.append(Segment(position, piece.offset - position, None))
        filled.append(piece)
        position = piece.end
    if position < total or not filled:
        filled.append(Segment(position, total - position, None))
    return filled


def global_penalty(optimizer: AnchoredAdamW, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """The anchor's penalty over all shards: one scalar all-reduce, for logging.

    Args:
        optimizer: The optimizer given to ``deepspeed.initialize``.
        group: Processes that share the shards; default all.

    Returns:
        0-d float32 tensor, the same on every process.
    """
    total = optimizer.anchor_penalty.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def observe_replay_gradient(
    zero: Any, optimizer: AnchoredAdamW, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Set an adaptive anchor's importance from the replay gradient that ZeRO has just reduced onto the shards.

    Each process squares its own shard; per-tensor means need one all-reduce of a vector with one number per anchored
    parameter. Call it between the backward passes of the replay and of the task loss, both run at an accumulation
    boundary (``engine.set_gradient_accumulation_boundary(True)``). The replay gradient is taken off the engine (its
    stages differ in whether a second backward pass adds or overwrites) and joins the task gradient in the optimizer's
    step; so gradient clipping by the engine does not see it, and float16 loss scaling is not supported.

    Args:
        zero: ``engine.optimizer``, DeepSpeed's wrapper.
        optimizer: The :class:`AnchoredAdamW` inside it.
        group: Processes that share the shards; default all.
    """
    shards = getattr(zero, "single_partition_of_fp32_groups", None)
    if shards is None:
        shards = zero.fp32_partitioned_groups_flat
    gradients = []
    for index, shard in enumerate(shards):
        pieces = zero.averaged_gradients[index]
        flat = torch.cat([piece.reshape(-1) for piece in pieces]).float()
        gradients.append(torch.nn.functional.pad(flat, (0, shard.numel() - flat.numel())))
        for piece in pieces:
            piece.zero_()

    def reduce_sums(sums: Tensor) -> None:
        """Sum over the processes that share the shards, in place."""
        torch.distributed.all_reduce(sums, group=group)

    optimizer.set_adaptive_precision(shards, gradients, reduce_sums)
    optimizer.carry_gradients(shards, gradients)

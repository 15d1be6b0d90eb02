"""The exchange of features between processes: gathering, with or without gradients, and the ring.

Legend: W processes (``world_size``), b rows on each of them, N = W b, D width. Every process must hold the same number
of rows. Gathering holds all N rows on every process; the ring holds one neighbour's b rows at a time, in both passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftfast.errors import ConfigError


def check_process_group(loss_name: str, rank: int, world_size: int) -> None:
    """Compare a loss's rank and world size with the process group that will carry its features.

    Args:
        loss_name: Named in the message.
        rank: The loss's rank.
        world_size: The loss's number of processes.

    Raises:
        ConfigError: If torch.distributed is not initialised, or was initialised with other numbers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"{loss_name}(world_size={world_size}) exchanges features between processes, but torch.distributed is not "
            "initialised. Call torch.distributed.init_process_group first, or use world_size=1."
        )
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ConfigError(
            f"{loss_name}(rank={rank}, world_size={world_size}) runs in process {dist.get_rank()} of "
            f"{dist.get_world_size()}. Pass torch.distributed.get_rank() and get_world_size()."
        )


class _Gather(torch.autograd.Function):
    """All-gather of rows; backward returns this process's rows of the gradient, summed over processes if asked."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rank: int, world_size: int, sum_gradients: bool) -> Tensor:
        """Gather the rows of all processes."""
        ctx.rank, ctx.rows, ctx.sum_gradients = rank, features.shape[0], sum_gradients
        gathered = features.new_empty((world_size * features.shape[0], *features.shape[1:]))
        dist.all_gather_into_tensor(gathered, features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return this process's rows of the gradient, summed over processes if asked."""
        gradient = gradients[0]
        start = ctx.rank * ctx.rows
        if not ctx.sum_gradients:
            return gradient[start : start + ctx.rows], None, None, None
        return _reduce_scatter(gradient.contiguous(), ctx.rank, ctx.rows), None, None, None


def _reduce_scatter(gradient: Tensor, rank: int, rows: int) -> Tensor:
    if dist.get_backend() == "gloo":  # gloo's own reduce_scatter is missing from the older versions we support
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[rank * rows : (rank + 1) * rows]
    own = gradient.new_empty((rows, *gradient.shape[1:]))
    dist.reduce_scatter_tensor(own, gradient)
    return own


def gather_features(
    features: Tensor, *, rank: int, world_size: int, local_loss: bool, gather_with_grad: bool
) -> Tensor:
    """Gather the rows of all processes, with the gradient rule of open_clip's four modes.

    =================  ============  ==========================================================================
    gather_with_grad   local_loss    gradient that reaches this process's rows through the gathered tensor
    =================  ============  ==========================================================================
    True               either        the sum over processes of their gradients for these rows
    False              False         this process's own gradient for these rows
    False              True          none
    =================  ============  ==========================================================================

    Args:
        features: (b, D) rows of this process; b must be the same everywhere.
        rank: This process.
        world_size: Number of processes.
        local_loss: Whether the loss uses only this process's rows on one side.
        gather_with_grad: Whether gradients travel between processes.

    Returns:
        (N, D) rows of all processes in rank order.
    """
    if not gather_with_grad and local_loss:
        features = features.detach()
    return _Gather.apply(features, rank, world_size, gather_with_grad)

"""Blockwise PyTorch backend of the pairwise sigmoid loss; gradients are made in the forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import matmul_nt
from .relations import Relation
from .torch_softmax import GradientSums, blocks, pair_diagonal, same_ids, work_dtype


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, relation: Relation | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum -log sigmoid(±(S + bias)) over all pairs, with its gradients.

    Args:
        x: (M, D) features.
        y: (N, D) features.
        scale: 0-d.
        bias: 0-d.
        relation: Mode "pair" or "group"; None: every pair is a negative.
        need: Whether dX, dY, and the gradients of scale and bias are wanted.

    Returns:
        Loss (0-d, work dtype), dX, dY (dtypes of the inputs; size 0 where not needed), d scale, d bias (0-d).
    """
    dtype = work_dtype(x)
    wide_x, wide_y, shift = x.to(dtype), y.to(dtype), bias.to(dtype)
    scaled = wide_x * scale.to(dtype)
    need_x = need[0] or (need[2] and not need[1])
    sums = GradientSums(wide_x, wide_y, need_x, need[1])
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_bias = torch.zeros((), dtype=torch.float64, device=x.device)
    for at in blocks(x.shape[0], y.shape[0]):
        logits = matmul_nt(scaled[at[0]], wide_y[at[1]]).add_(shift)
        _negate_positives(logits, at, relation)
        loss += F.softplus(logits, threshold=40).sum()
        if any(need):
            gradient = torch.sigmoid(logits)  # of positives, whose logits were negated, this is minus the gradient
            _negate_positives(gradient, at, relation)
            grad_bias += gradient.sum()
            sums.add(gradient, at)
    grad_x, grad_y, grad_scale = sums.finish(scale, (x.dtype, y.dtype))
    return loss.to(dtype), grad_x if need[0] else grad_x.new_empty(0), grad_y, grad_scale, grad_bias.to(dtype)


def _negate_positives(block: Tensor, at: tuple[slice, slice], relation: Relation | None) -> None:
    """Change the sign of the block's positive pairs in place."""
    if relation is None:
        return
    if relation.mode == "pair":
        found = pair_diagonal(block, at, relation.offset)
        if found is not None:
            found[0].neg_()
        return
    same = same_ids(relation, at)
    if same is not None:
        block.copy_(torch.where(same, -block, block))

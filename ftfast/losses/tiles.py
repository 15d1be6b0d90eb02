"""One tile of the global similarity matrix: this process's images against a visitor's texts, in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 21
"""Similarities held at once (8 MiB in float32)."""


def _blocks(rows: Tensor, columns: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // len(columns))


def tile_logsumexp(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-sum-exps of logit_scale · rows · columnsᵀ along both axes without holding the matrix.

    Args:
        rows: (B, D) features.
        columns: (C, D) features.
        logit_scale: 0-d multiplier.

    Returns:
        (B,) over columns and (C,) over rows, float32.
    """
    scale = logit_scale.float()
    column_lse = torch.full((len(columns),), -torch.inf, dtype=torch.float32, device=columns.device)
    row_lse = []
    for block in rows.split(_blocks(rows, columns)):
        logits = scale * (block @ columns.T).float()
        row_lse.append(logits.logsumexp(1))
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    return torch.cat(row_lse), column_lse


def tile_gradients(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    weight: float,
    *,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute this tile's share of the symmetric loss's gradient, given the global log-sum-exps.

    dL/dS = weight · (exp(S - row_lse) + exp(S - column_lse) - 2 · identity if paired)

    Args:
        rows: (B, D) features.
        columns: (C, D) features.
        logit_scale: 0-d multiplier.
        row_lse: (B,) global log-sum-exp of each row.
        column_lse: (C,) global log-sum-exp of each column.
        weight: Factor of the whole gradient.
        paired: Whether row i's positive is column i of this tile.

    Returns:
        Gradients of rows (B, D), columns (C, D) and logit_scale (0-d), float32.
    """
    scale = logit_scale.float()
    column_gradient = torch.zeros_like(columns, dtype=torch.float32)
    scale_gradient = torch.zeros((), dtype=torch.float32, device=columns.device)
    row_gradients = []
    start = 0
    for block in rows.split(_blocks(rows, columns)):
        stop = start + len(block)
        cosines = (block @ columns.T).float()
        gradient = torch.exp(scale * cosines - row_lse[start:stop, None])
        gradient += torch.exp(scale * cosines - column_lse[None, :])
        if paired:
            gradient[:, start:stop].diagonal().sub_(2)
        scale_gradient += torch.vdot(gradient.flatten(), cosines.flatten())
        gradient = gradient.to(rows.dtype)
        row_gradients.append((gradient @ columns).float())
        column_gradient += (gradient.T @ block).float()
        start = stop
    factor = weight * scale
    return factor * torch.cat(row_gradients), factor * column_gradient, weight * scale_gradient

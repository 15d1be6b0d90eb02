"""Static launch tables of the Triton backend, per GPU generation and dtype; nothing is tuned at run time.

Chosen from ahead-of-time resource reports (``python -m benchmarks cards``): the largest tiles without spills whose
pipeline fits shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

WORKSPACE_BYTES = 64 * 2**20  # one superblock of the gradient matrix G
PARTIAL_BYTES = 16 * 2**20  # per-tile statistics of one row stripe


@dataclass(frozen=True)
class Tile:
    """Blocks and schedule of one kernel launch."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


class Tiles(NamedTuple):
    """The tiles of one GPU generation and dtype."""

    similarity: Tile
    """One similarity tile and a light epilogue."""
    heavy: Tile
    """Epilogues that need more registers."""
    product: Tile
    """Gradient products."""
    paired: Tile
    """Distillation: teacher's and student's similarities of the same tile at once."""
    divergence: Tile
    """Forward pass of the KL divergences, which needs both probabilities and their ratio as well."""


_HALF = {
    80: Tiles(
        similarity=Tile(128, 128, 32, 8, 3),
        heavy=Tile(64, 128, 32, 8, 3),
        product=Tile(128, 128, 32, 8, 3),
        paired=Tile(64, 32, 32, 8, 3),
        divergence=Tile(64, 32, 32, 8, 3),
    ),
    90: Tiles(
        similarity=Tile(128, 128, 64, 8, 3),
        heavy=Tile(128, 64, 64, 8, 3),
        product=Tile(128, 128, 64, 8, 3),
        paired=Tile(128, 64, 64, 8, 3),
        divergence=Tile(128, 32, 64, 8, 3),
    ),
    100: Tiles(
        similarity=Tile(128, 64, 64, 8, 3),
        heavy=Tile(128, 64, 64, 8, 3),
        product=Tile(128, 128, 64, 8, 3),
        paired=Tile(64, 64, 64, 8, 3),
        divergence=Tile(64, 64, 64, 8, 3),
    ),
}
_SMALL = Tile(64, 32, 16, 4, 2)
_SINGLE = Tiles(Tile(64, 64, 16, 4, 2), _SMALL, Tile(64, 64, 16, 4, 2), _SMALL, _SMALL)
_INTERPRETER = Tiles(*[Tile(16, 32, 16, 1, 1)] * 5)


def tiles(dtype: torch.dtype, capability: int | None) -> Tiles:
    """Return the tiles of every kernel.

    Args:
        dtype: Of the features.
        capability: 80, 86, 90, 100 ...; None: the CPU interpreter.

    Returns:
        The tiles.
    """
    if capability is None:
        return _INTERPRETER
    if dtype == torch.float32:
        return _SINGLE
    return _HALF[100 if capability >= 100 else 90 if capability == 90 else 80]


def capability_of(device: torch.device) -> int | None:
    """Return the compute capability as a number such as 90, or None for a CPU device (interpreter)."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def superblock(
    rows: int, columns: int, width: int, element_bytes: int, product: Tile, processors: int
) -> tuple[int, int]:
    """Choose how many rows and columns of G are made at once.

    The gradient kernel writes a superblock of G that two products consume. It must fit the workspace, and the number
    of product tiles should fill whole waves of processors.

    Args:
        rows: M.
        columns: N.
        width: D.
        element_bytes: Of G.
        product: Tile of the products.
        processors: Streaming multiprocessors.

    Returns:
        Rows and columns of a superblock, multiples of the tiles.
    """
    step = 128 if processors > 1 else 32
    largest = int((WORKSPACE_BYTES / element_bytes) ** 0.5) // step * step
    across = -(-width // product.n)

    def waste(size: int) -> float:
        """Return the cost of whole waves relative to perfectly filled ones."""
        count = size // product.m * across
        return -(-count // processors) * processors / count

    sizes = range(largest // 2 // step * step, largest + step, step)
    side = min((s for s in sizes if 0 < s <= largest), key=lambda s: (round(waste(s), 2), -s), default=step)
    return min(side, -(-rows // step) * step), min(side, -(-columns // step) * step)

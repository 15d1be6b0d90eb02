"""Relative accuracy of the blockwise PyTorch backend, down to losses that are nearly 0."""

from __future__ import annotations

import pytest
from accuracy_checks import KINDS, NOISE, assert_accurate


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("kind", ["clip", "both"])
def test_contrastive(kind: str, noise: str) -> None:
    assert_accurate(kind, NOISE[noise], 0.5, "torch", rows=1200, width=96)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("drift", [0.5, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation(kind: str, drift: float, noise: str) -> None:
    assert_accurate(kind, NOISE[noise], drift, "torch", rows=1200, width=96)

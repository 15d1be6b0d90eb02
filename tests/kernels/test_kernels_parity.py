"""The blockwise PyTorch backend of every similarity loss against the dense reference: loss and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import CASES, ROW_IDS, B, D, inputs_of, single
from kernel_checks import assert_no_worse_than_torch, run, unit
from torch import Tensor


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_dense_pytorch(case: str, small_pieces: None) -> None:
    op = CASES[case][0]
    inputs = inputs_of(case, torch.float32)
    assert_no_worse_than_torch(partial(op, backend="torch"), partial(op, backend="reference"), inputs, slack=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["clip", "siglip ids", "classes", "distill soft rows"])
def test_half_precision(case: str, dtype: torch.dtype, small_pieces: None) -> None:
    op = CASES[case][0]
    slack = 1e-3 if dtype == torch.float16 else 8e-3  # one rounding of the result
    inputs = inputs_of(case, dtype)
    assert_no_worse_than_torch(partial(op, backend="torch"), partial(op, backend="reference"), inputs, slack)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_in_float64(case: str, small_pieces: None) -> None:
    op = CASES[case][0]
    inputs = [x.double() for x in inputs_of(case, torch.float64)]
    truth, got = (run(partial(op, backend=backend), inputs) for backend in ("reference", "torch"))
    for expected, actual in zip(truth, got, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("labels", [ROW_IDS, torch.zeros(B, dtype=torch.int64)])
def test_single_modality_supcon(labels: Tensor, small_pieces: None) -> None:
    op = partial(single, labels=labels)
    inputs = [unit(B, D, 3), torch.tensor(10.0)]
    assert_no_worse_than_torch(partial(op, backend="torch"), partial(op, backend="reference"), inputs, slack=3e-6)

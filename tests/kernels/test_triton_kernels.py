"""The Triton kernels in Triton's CPU interpreter; collected only with TRITON_INTERPRET=1 (see test_kernels_gate.py)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy_checks import NOISE, assert_accurate
from ftfast.kernels import clip_loss, siglip_loss, supervised_contrastive_loss
from kernel_cases import CASES, ROW_IDS, B, D, inputs_of, single
from kernel_checks import assert_no_worse_than_torch, run, unit
from torch import Tensor

triton = partial(partial, backend="triton")
dense = partial(partial, backend="reference")


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, small_pieces: None) -> None:
    op = CASES[case][0]
    assert_no_worse_than_torch(triton(op), dense(op), inputs_of(case, torch.float32), slack=3e-6)


@pytest.mark.parametrize("case", ["clip", "clip ids smoothed", "siglip", "cite", "distill forward", "distill reverse"])
def test_float16(case: str, small_pieces: None) -> None:
    # float16 stands for the 16-bit path: bfloat16 products are wrong in Triton's interpreter.
    op = CASES[case][0]
    assert_no_worse_than_torch(triton(op), dense(op), inputs_of(case, torch.float16), slack=1.5e-3)


@pytest.mark.parametrize("labels", [ROW_IDS, torch.zeros(B, dtype=torch.int64)])
def test_single_modality(labels: Tensor, small_pieces: None) -> None:
    op = partial(single, labels=labels)
    assert_no_worse_than_torch(triton(op), dense(op), [unit(B, D, 3), torch.tensor(10.0)], slack=3e-6)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("kind", ["clip", "both", "forward_kl", "reverse_kl"])
def test_small_losses_keep_their_relative_accuracy(kind: str, noise: str) -> None:
    assert_accurate(kind, NOISE[noise], 0.1, "triton", rows=60, width=32)


def test_opcheck(small_pieces: None) -> None:
    x, y = unit(9, 6, 1).requires_grad_(), unit(9, 6, 2).requires_grad_()
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    ids, ops = torch.arange(9) % 3, torch.ops.ftfast
    torch.library.opcheck(ops.pair_statistics.default, (x, y, scale, ids, ids, "group", 0, True, True, "triton"))
    torch.library.opcheck(ops.pair_statistics.default, (x, y, scale, None, None, "pair", 2, True, False, "triton"))
    flags = (None, None, "pair", 0, True, True, True, "triton")
    torch.library.opcheck(ops.sigmoid_pairs.default, (x, y, scale, bias, *flags))
    arguments = (x, y, scale, y.detach(), x.detach(), None, torch.tensor(5.0), "forward_kl", 0, True, True, "triton")
    torch.library.opcheck(ops.distill_pairs.default, arguments)


@pytest.mark.parametrize("case", ["clip", "siglip", "distill reverse", "classes"])
def test_compiles_without_graph_breaks(case: str) -> None:
    # aot_eager: the graph, its fake kernels and its backward are what a GPU gets; inductor adds only C++ of its own.
    op, inputs = triton(CASES[case][0]), inputs_of(case, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs), run(op, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", [64, 48])
def test_widths_that_are_multiples_of_the_tile(width: int) -> None:
    inputs = [unit(64, width, 1), unit(64, width, 2), torch.tensor(50.0)]
    assert_no_worse_than_torch(triton(clip_loss), dense(clip_loss), inputs, slack=3e-6)


def test_sums_that_underflow_take_the_exact_path() -> None:
    # One pair of rows is far above all others: relative to the tile's maximum every other row sums to 0.
    x, y = unit(20, 8, 1), unit(20, 8, 2)
    x[3] = y[7] = 40.0 * unit(1, 8, 3)[0]
    inputs = [x, y, torch.tensor(2.0)]
    assert_no_worse_than_torch(triton(clip_loss), dense(clip_loss), inputs, slack=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_tiny_batches_and_duplicates_are_finite(rows: int) -> None:
    same = unit(1, 8, 1).expand(rows, 8)  # zero stride
    for op in (clip_loss, siglip_loss):
        for value in run(triton(op), [same, same, torch.tensor(100.0)]):
            assert torch.isfinite(value).all()


def test_logits_of_ten_thousand_are_finite() -> None:
    x, y = 10 * unit(19, 8, 1), 10 * unit(19, 8, 2)
    inputs = [x, y, torch.tensor(100.0)]
    # A float32 logit of 10^4 is rounded by up to 5e-4, twice here, and a probability by as much relatively.
    assert_no_worse_than_torch(triton(clip_loss), dense(clip_loss), inputs, slack=1e-3)


def test_runs_repeat_bit_for_bit_and_strides_do_not_matter(small_pieces: None) -> None:
    x, y, scale = unit(33, 20, 1), unit(33, 20, 2), torch.tensor(30.0)
    first, second = run(triton(clip_loss), [x, y, scale]), run(triton(clip_loss), [x, y, scale])
    strided = run(triton(clip_loss), [x.T.contiguous().T, y.repeat(1, 2)[:, :20], scale])
    for a, b, c in zip(first, second, strided, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tower_costs_no_product_and_changes_nothing(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.kernels import triton_products

    calls: list[bool] = []
    real = triton_products.add_product
    monkeypatch.setattr(triton_products, "add_product", lambda *a: (calls.append(a[3]), real(*a))[1])
    x, y = unit(17, 8, 1), unit(17, 8, 2)
    full = run(triton(clip_loss), [x, y, torch.tensor(20.0)])
    calls.clear()
    leaves = [t.clone().requires_grad_(index != frozen) for index, t in enumerate((x, y))]
    (0.37 * clip_loss(*leaves, 20.0, backend="triton")).backward()
    assert set(calls) == {frozen == 0}  # only the transposed product (dY) when the rows are frozen
    assert torch.equal(leaves[1 - frozen].grad, full[2 - frozen])  # type: ignore[arg-type]


def test_supcon_labels_decide_only_through_equality() -> None:
    x, labels = unit(19, 8, 1), torch.arange(19) % 4
    far = labels * 10**12 - 7
    values = [supervised_contrastive_loss(x, ids, 10.0, backend="triton") for ids in (labels, far)]
    assert torch.equal(*values)

"""What every operation promises besides its numbers: edge cases, errors, compile, determinism, memory, laziness."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ftfast.kernels import (
    DistillOptions,
    PairStatistics,
    Relation,
    classification_loss,
    clip_and_distillation_loss,
    clip_loss,
    explain,
    feature_distillation_loss,
    merge_statistics,
    pair_statistics,
    pair_statistics_backward,
    siglip_loss,
    similarity_distillation_loss,
    supervised_contrastive_loss,
)
from kernel_checks import run, unit
from torch import Tensor

from ftfast.errors import ConfigError, ShapeError

X, Y, SCALE = unit(11, 6, 1), unit(11, 6, 2), torch.tensor(20.0)
IDS = torch.arange(11) % 3


def distill(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return similarity_distillation_loss(x, y, Y, X, scale, options=DistillOptions(kind="reverse_kl"))


def distill_wide(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return sum(clip_and_distillation_loss(x, y, y.detach(), x.detach(), scale, 9.0))  # type: ignore[return-value]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": clip_loss,
    "siglip": siglip_loss,
    "supcon": lambda x, y, s: supervised_contrastive_loss(x, IDS[: len(x)], s, y),
    "classes": lambda x, y, s: classification_loss(x, y, IDS[: len(x)] % len(y), s),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_duplicates_and_tiny_batches_are_finite(name: str, rows: int) -> None:
    same = X[:1].expand(rows, 6)  # zero stride
    for value in run(LOSSES[name], [same, same, torch.tensor(100.0)]):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_ten_thousand_and_low_cosines_are_finite(name: str) -> None:
    low = unit(11, 256, 3)  # all cosines below 0.25, at scale 100 far below a fixed maximum of 100
    for inputs in ([10 * X, 10 * Y, torch.tensor(100.0)], [low, -low, torch.tensor(100.0)], [X, Y, torch.tensor(0.0)]):
        for value in run(LOSSES[name], inputs):
            assert torch.isfinite(value).all()


def test_small_losses_keep_their_relative_accuracy() -> None:
    # Nearly orthonormal pairs at scale 20: the loss is about 1e-7, far below the rounding of lse - logit.
    x = torch.eye(12)[:11]
    truth = clip_loss(x.double(), x.double(), 20.0, backend="reference").item()
    assert clip_loss(x, x, 20.0, backend="torch").item() == pytest.approx(truth, rel=2e-6)
    assert 0 < truth < 1e-7


def test_wide_spread_of_log_sum_exps_takes_two_exponentials() -> None:
    x, y = X.clone(), Y.clone()
    x[3] = y[7] = 40.0 * unit(1, 6, 3)[0]
    truth = run(lambda *a: clip_loss(*a, backend="reference"), [x.double(), y.double(), torch.tensor(2.0).double()])
    for true, got in zip(truth, run(clip_loss, [x, y, torch.tensor(2.0)]), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("name", [*LOSSES, "distill"])
def test_each_gradient_alone_equals_the_joint_gradient(name: str, wanted: tuple[int, ...]) -> None:
    op = distill if name == "distill" else LOSSES[name]
    full = run(op, [X, Y, SCALE])
    leaves = [t.clone().requires_grad_(index in wanted) for index, t in enumerate((X, Y, SCALE))]
    (0.37 * op(*leaves)).backward()
    for index, leaf in enumerate(leaves):
        if index in wanted:
            torch.testing.assert_close(leaf.grad, full[index + 1], rtol=1e-4, atol=1e-6)
        else:
            assert leaf.grad is None


def test_bias_of_the_softmax_loss_has_gradient_zero() -> None:
    bias = torch.tensor(-10.0, requires_grad=True)
    loss = clip_loss(X.clone().requires_grad_(), Y, SCALE, bias)
    loss.backward()
    assert bias.grad is not None
    assert bias.grad.item() == 0.0
    assert loss.item() == clip_loss(X, Y, SCALE).item()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_retained_graph_and_cached_embeddings(name: str) -> None:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    loss = LOSSES[name](x, y, SCALE)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (x, y))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_repeats_bit_for_bit() -> None:
    big = [unit(1500, 16, 1), unit(1500, 16, 2), SCALE]
    for a, b in zip(run(clip_loss, big), run(clip_loss, big), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*LOSSES, "distill"])
def test_compiles_without_graph_breaks(name: str) -> None:
    op = distill if name == "distill" else LOSSES[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, [X, Y, SCALE]), run(op, [X, Y, SCALE]), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    scale, bias = SCALE.clone().requires_grad_(), torch.tensor(-3.0, requires_grad=True)
    ops = torch.ops.ftfast
    torch.library.opcheck(ops.pair_statistics.default, (x, y, scale, IDS, IDS, "group", 0, True, True, "torch"))
    torch.library.opcheck(ops.pair_statistics.default, (x, y, scale, None, None, "pair", 2, True, False, "torch"))
    arguments = (x, y, scale, bias, None, None, "pair", 0, True, True, True, "torch")
    torch.library.opcheck(ops.sigmoid_pairs.default, arguments)
    teacher = (Y, X, None, torch.tensor(5.0))
    arguments = (x, y, scale, *teacher, "forward_kl", 0, True, True, "torch")
    torch.library.opcheck(ops.distill_pairs.default, arguments)


def test_nothing_of_size_n_by_n_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.kernels import torch_softmax
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(torch_softmax, "BLOCK_ROWS", 64)
    monkeypatch.setattr(torch_softmax, "BLOCK_COLUMNS", 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    inputs = [unit(512, 8, 1), unit(512, 8, 2), SCALE]
    with Watch():
        for name in ("clip", "siglip"):
            run(LOSSES[name], inputs)
        run(distill_wide, inputs)
        run(lambda x, s: supervised_contrastive_loss(x, torch.arange(512) % 100, s), [inputs[0], SCALE])
    assert 512 * 8 <= largest < 512 * 512 / 16


def test_blocks_of_a_ring_add_up_to_the_whole() -> None:
    x, y, scale = X.double(), Y.double(), SCALE.double()
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    whole = pair_statistics(*leaves, Relation("pair"), backend="torch")
    upstream = [unit(1, 11, 5 + k, torch.float64)[0] for k in range(4)]
    sum((a * g).sum() for a, g in zip(whole, upstream, strict=True)).backward()  # type: ignore[union-attr]
    cuts = (slice(0, 4), slice(4, 11))
    parts = [pair_statistics(x, y[c], scale, Relation("pair", -c.start), backend="torch") for c in cuts]
    rows = [PairStatistics(p.row_lse, p.row_positive, p.row_lse, p.row_positive) for p in parts]
    merged = merge_statistics(*rows)
    torch.testing.assert_close(merged.row_lse, whole.row_lse)
    torch.testing.assert_close(merged.row_positive, whole.row_positive)
    grad_x, grad_scale = torch.zeros_like(x), torch.zeros_like(scale)
    for cut, part in zip(cuts, parts, strict=True):
        gradients = (upstream[0], upstream[1], upstream[2][cut], upstream[3][cut])
        relation = Relation("pair", -cut.start)
        lse = (merged.row_lse, part.col_lse)
        gx, gy, gs = pair_statistics_backward(x, y[cut], scale, relation, lse, gradients, backend="torch")
        grad_x, grad_scale = grad_x + gx, grad_scale + gs
        torch.testing.assert_close(gy, leaves[1].grad[cut])  # type: ignore[index]
    torch.testing.assert_close(grad_x, leaves[0].grad)
    torch.testing.assert_close(grad_scale, leaves[2].grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clip_loss(X, Y[:5], 1.0), ShapeError, "text_features has 5 rows but image_features has 11"),
        (lambda: clip_loss(X, Y[:, :4], 1.0), ShapeError, "text_features has width 4 but image_features has width 6"),
        (
            lambda: clip_loss(X[:0], Y[:0], 1.0),
            ShapeError,
            "image_features must be (rows, width) with at least one row, got shape (0, 6)",
        ),
        (
            lambda: clip_loss(X.int(), Y, 1.0),
            ShapeError,
            "image_features must be float32, float16, bfloat16 or float64, got torch.int32",
        ),
        (lambda: clip_loss(X, Y, torch.ones(2)), ShapeError, "logit_scale must be a single number, got shape (2,)"),
        (lambda: clip_loss(X, Y, 1.0, labels=IDS[:4]), ShapeError, "labels must have shape (11,), got (4,)"),
        (lambda: clip_loss(X, Y, 1.0, labels=IDS.float()), ShapeError, "labels must be integers, got torch.float32"),
        (
            lambda: clip_loss(X, Y, 1.0, label_smoothing=1.0),
            ConfigError,
            "label_smoothing is 1.0; it must lie in [0, 1)",
        ),
        (
            lambda: clip_loss(X, Y, 1.0, directions="rows"),
            ConfigError,
            "directions is 'rows'; choose one of 'both', 'image', 'text'",
        ),
        (
            lambda: clip_loss(X, Y, 1.0, backend="cuda"),
            ConfigError,
            "backend is 'cuda'; choose one of 'auto', 'triton', 'torch', 'reference'",
        ),
        (
            lambda: similarity_distillation_loss(X, Y, X.clone().requires_grad_(), Y, 1.0),
            ShapeError,
            "teacher_image requires grad, but the teacher is frozen; detach it or use torch.no_grad()",
        ),
        (
            lambda: similarity_distillation_loss(X, Y, None, None, 1.0),
            ShapeError,
            "give teacher_image and teacher_text, or teacher_logits",
        ),
        (
            lambda: similarity_distillation_loss(X, Y, None, None, 1.0, teacher_logits=X),
            ShapeError,
            "teacher_logits must have shape (11, 11), got (11, 6)",
        ),
        (lambda: DistillOptions(temperature=0.0), ConfigError, "temperature is 0.0; it must be positive"),
        (
            lambda: feature_distillation_loss(X, Y.clone().requires_grad_()),
            ShapeError,
            "teacher requires grad, but the teacher is frozen; detach it or use torch.no_grad()",
        ),
    ],
)
def test_errors_are_one_clear_sentence(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_triton_on_cpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.kernels import dispatch

    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="backend 'triton' needs CUDA tensors, got cpu; use backend='torch'"):
        clip_loss(X, Y, 1.0, backend="triton")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="needs the package triton"):
        clip_loss(X, Y, 1.0, backend="triton")
    assert set(explain()) == {"cuda", "cpu"}

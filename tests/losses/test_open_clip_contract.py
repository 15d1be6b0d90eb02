"""Single-process losses against open_clip's own classes: constructors, calls, values, gradients, dtypes, errors."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from open_clip import loss as stock

import ftfast.losses
from ftfast.errors import ConfigError, ShapeError

NAMES = ["ClipLoss", "SigLipLoss", "DistillClipLoss"]
KEYS = {"ClipLoss": ["contrastive_loss"], "SigLipLoss": ["contrastive_loss"]}
KEYS["DistillClipLoss"] = ["contrastive_loss", "distill_loss"]


def unit_rows(rows, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def make_inputs(name, rows=33, width=19, dtype=torch.float32, scale=20.0, bias=True):
    """Positional arguments of ``name`` and the tensors whose gradients are compared."""
    leaves = [unit_rows(rows, width, 1, dtype), unit_rows(rows, width, 2, dtype), torch.tensor(scale)]
    if name != "DistillClipLoss" and bias:
        leaves.append(torch.tensor(-4.0))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if name == "DistillClipLoss":
        teacher = [unit_rows(rows, width + 4, seed, dtype) for seed in (3, 4)]
        return [*leaves, *teacher, torch.tensor(35.0)], leaves
    return ([*leaves, None] if name == "SigLipLoss" and not bias else list(leaves)), leaves


def run(module, name, *, output_dict=False, weight=0.37, **options):
    inputs, leaves = make_inputs(name, **options)
    outputs = getattr(module, name)()(*inputs, output_dict=output_dict)
    values = list(outputs.values()) if output_dict else list(outputs) if isinstance(outputs, tuple) else [outputs]
    (weight * sum(values)).backward()
    return outputs, values, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_call_accept_what_open_clip_accepts(name):
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(getattr(stock, name), method)).parameters
        ours = inspect.signature(getattr(getattr(ftfast.losses, name), method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [ours[key].default for key in theirs] == [parameter.default for parameter in theirs.values()]
        extra = [ours[key].kind for key in list(ours)[len(theirs) :]]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in extra)


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 33, 130])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, rows, output_dict):
    theirs, their_values, their_grads = run(stock, name, rows=rows, output_dict=output_dict)
    ours, our_values, our_grads = run(ftfast.losses, name, rows=rows, output_dict=output_dict)
    assert type(ours) is type(theirs)
    if output_dict:
        assert list(ours) == list(theirs) == KEYS[name]
    for our, their in zip([*our_values, *our_grads], [*their_values, *their_grads], strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_no_further_from_float64_than_open_clip(name, scale):
    truth_inputs, truth_leaves = make_inputs(name, rows=65, scale=scale)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in truth_inputs]
    outputs = getattr(stock, name)()(*doubles)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (0.37 * sum(outputs)).backward()
    truth = [*outputs, *[x.grad for x in doubles[: len(truth_leaves)]]]
    _, their_values, their_grads = run(stock, name, rows=65, scale=scale)
    _, our_values, our_grads = run(ftfast.losses, name, rows=65, scale=scale)
    for our, their, exact in zip([*our_values, *our_grads], [*their_values, *their_grads], truth, strict=True):
        slack = 2e-6 * exact.abs().max() + 1e-8
        assert (our - exact).abs().max() <= (their - exact).abs().max() + slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_no_worse_and_keeps_gradient_dtypes(name, dtype):
    doubles, leaves = make_inputs(name, dtype=dtype)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in doubles]
    outputs = getattr(stock, name)()(*doubles)
    (0.37 * sum(outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    truth = [x.grad for x in doubles[: len(leaves)]]
    _, _, their_grads = run(stock, name, dtype=dtype)
    _, our_values, our_grads = run(ftfast.losses, name, dtype=dtype)
    assert all(value.dtype == torch.float32 for value in our_values)
    for our, their, exact in zip(our_grads, their_grads, truth, strict=True):
        assert our.dtype == their.dtype
        slack = torch.finfo(dtype).eps * exact.norm() + 1e-8
        assert (our.double() - exact).norm() <= (their.double() - exact).norm() + slack


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_nonscalar_scale(name):
    """open_clip's nonscalar_logit_scale gives shape (1,); inside autocast the loss stays float32."""
    inputs, leaves = make_inputs(name)
    inputs[2] = leaves[2] = torch.tensor([20.0], requires_grad=True)
    expected, _ = make_inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = getattr(ftfast.losses, name)()(*inputs)
        theirs = getattr(stock, name)()(*expected)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    sum(outputs).backward()
    for our, their in zip(outputs, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our, their.float(), rtol=2e-2, atol=0)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * len(leaves)
    assert leaves[2].grad.shape == (1,)


def test_without_bias_and_with_numbers():
    image, text = unit_rows(9, 5, 1), unit_rows(9, 5, 2)
    for bias in (None, -3.0):
        ours = ftfast.losses.SigLipLoss()(image, text, 10.0, bias)
        torch.testing.assert_close(ours, stock.SigLipLoss()(image, text, 10.0, bias))
    torch.testing.assert_close(ftfast.losses.ClipLoss()(image, text, 10.0), stock.ClipLoss()(image, text, 10.0))


def test_a_frozen_side_gets_no_gradient():
    image, text = unit_rows(9, 5, 1), unit_rows(9, 5, 2).requires_grad_()
    for name in ("ClipLoss", "SigLipLoss"):
        text.grad = None
        getattr(ftfast.losses, name)()(image, text, torch.tensor(10.0), torch.tensor(-1.0)).backward()
        ours = text.grad
        text.grad = None
        getattr(stock, name)()(image, text, torch.tensor(10.0), torch.tensor(-1.0)).backward()
        torch.testing.assert_close(ours, text.grad)
        assert image.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_what_open_clip_refuses_is_refused_with_a_sentence(name):
    for module, errors in ((stock, (RuntimeError, ValueError, IndexError)), (ftfast.losses, ShapeError)):
        inputs, _ = make_inputs(name)
        inputs[1] = inputs[1][:, :-1]
        with pytest.raises(errors):
            getattr(module, name)()(*inputs)
        inputs, _ = make_inputs(name)
        inputs[1] = inputs[1][:-1]
        with pytest.raises(errors):
            getattr(module, name)()(*inputs)


def test_unknown_exchange_and_trained_teacher():
    with pytest.raises(AssertionError):
        stock.SigLipLoss(dist_impl="carrier pigeon")
    with pytest.raises(ConfigError, match="carrier pigeon"):
        ftfast.losses.SigLipLoss(dist_impl="carrier pigeon")
    inputs, _ = make_inputs("DistillClipLoss")
    inputs[3].requires_grad_()
    with pytest.raises(ShapeError, match="frozen"):
        ftfast.losses.DistillClipLoss()(*inputs)


def test_import_needs_no_open_clip_triton_or_gpu():
    """The three packages are made impossible to import in a fresh interpreter; a loss still runs."""
    code = """
import sys
for name in ("open_clip", "triton", "timm"):
    sys.modules[name] = None
import torch
from ftfast.losses import ClipLoss, DistillClipLoss, NormFaceLoss, SigLipLoss, SimilarityDistillLoss, SupConLoss
features = torch.nn.functional.normalize(torch.randn(5, 4), dim=1).requires_grad_()
ClipLoss()(features, features, torch.tensor(10.0)).backward()
print("ok", bool(features.grad.isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["ok", "True"], done.stderr

"""Layers whose backward pass hands per-sample gradients to a :class:`FisherSink` instead of summing them.

Each takes the forward pass of the ordinary operation, and in the backward pass computes the gradient of its input as
usual; the product that would make the weight's gradient is replaced by the Fisher's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.errors import ModelError
from ftfast.weightspace.fisher_sink import FisherSink

__all__ = ["batch_norm", "conv2d", "embedding", "layer_norm", "linear", "per_sample_view"]

PLAIN_LINEAR = F.linear  # taken at import: attention is captured by replacing F.linear for the length of a call
SAMPLES_AT_ONCE = 8  # convolutions are unfolded for this many samples at a time, to bound memory


def _sequence(tensor: Tensor, axis: int) -> Tensor:
    """(N, T, width) view of a tensor whose sample axis is ``axis`` and whose last axis is the width."""
    moved = tensor.movedim(axis, 0)
    if moved.dim() == 2:
        return moved.unsqueeze(1)
    return moved if moved.dim() == 3 else moved.flatten(1, -2)


class _Linear(torch.autograd.Function):
    """``x W^T + b``, or ``x W`` when transposed."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, x: Tensor, affine: tuple[Tensor, Tensor | None], sink: FisherSink, axis: int,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Compute the product and remember the input."""
        ctx.save_for_backward(x)
        ctx.affine, ctx.sink, ctx.axis, ctx.transposed = affine, sink, axis, transposed
        weight, bias = affine
        return x @ weight if transposed else PLAIN_LINEAR(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradient of the input; the weight's goes to the sink."""
        (grad,) = grads
        (x,) = ctx.saved_tensors
        weight, bias = ctx.affine
        inputs, outputs = _sequence(x.detach(), ctx.axis), _sequence(grad, ctx.axis)
        if weight.requires_grad:
            first, second = (outputs, inputs) if ctx.transposed else (inputs, outputs)
            ctx.sink.product(weight, first, second)
        if bias is not None and bias.requires_grad:
            ctx.sink.samples(bias, outputs.sum(1))
        needed = ctx.needs_input_grad[1]
        matrix = weight.detach()
        grad_x = (grad @ (matrix.t() if ctx.transposed else matrix)) if needed else None
        return None, grad_x, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation over the last axes."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, x: Tensor, shape: list[int], affine: tuple[Tensor | None, Tensor | None], eps: float,
        sink: FisherSink, axis: int,
    ) -> Tensor:  # fmt: skip
        """Normalise and remember the statistics."""
        weight, bias = affine
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.shape, ctx.affine, ctx.sink, ctx.axis = shape, affine, sink, axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradient of the input; weight and bias go to the sink."""
        (grad,) = grads
        x, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.affine
        plain = [None if t is None else t.detach() for t in ctx.affine]
        mask = [ctx.needs_input_grad[1], False, False]
        grad = grad.contiguous()
        grad_x = torch.ops.aten.native_layer_norm_backward(grad, x, ctx.shape, mean, rstd, *plain, mask)[0]
        kept = len(ctx.shape)
        normalized = (x - mean) * rstd
        ctx.sink.samples(weight, _sum_between(normalized.mul_(grad), ctx.axis, kept))
        ctx.sink.samples(bias, _sum_between(grad, ctx.axis, kept))
        return None, grad_x, None, None, None, None, None


def _sum_between(tensor: Tensor, axis: int, kept: int) -> Tensor:
    """Sum over every axis but the sample axis (moved first) and the last ``kept`` ones."""
    moved = tensor.movedim(axis, 0)
    between = tuple(range(1, moved.dim() - kept))
    return moved.sum(between) if between else moved


class _Conv2d(torch.autograd.Function):
    """Two-dimensional convolution."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, x: Tensor, affine: tuple[Tensor, Tensor | None], geometry: tuple[Any, Any, Any, int],
        sink: FisherSink,
    ) -> Tensor:  # fmt: skip
        """Convolve and remember the input."""
        stride, padding, dilation, groups = geometry
        weight, bias = affine
        ctx.save_for_backward(x)
        ctx.affine, ctx.geometry, ctx.sink = affine, geometry, sink
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradient of the input; weight and bias go to the sink."""
        (grad,) = grads
        (x,) = ctx.saved_tensors
        weight, bias = ctx.affine
        stride, padding, dilation, groups = ctx.geometry
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight.detach(), None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
            )[0]
        if weight.requires_grad:
            _conv_fisher(ctx.sink, x.detach(), grad, weight, ctx.geometry)
        if bias is not None:
            ctx.sink.samples(bias, grad.flatten(2).sum(2))
        return None, grad_x, None, None, None


def _conv_fisher(
    sink: FisherSink, x: Tensor, grad: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any, int]
) -> None:
    """Unfold the input, so that the convolution is a linear layer over positions, one group at a time."""
    stride, padding, dilation, groups = geometry
    kernel = weight.shape[2:]
    outputs = grad.flatten(2).transpose(1, 2)
    slot = sink.slot_of(weight)
    if slot is None or sink.uses(slot) != 1 or groups != 1:
        columns = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
        if groups == 1:
            sink.product(weight, columns, outputs)
            return
        per_group = [
            torch.einsum("nto,nti->noi", g, a)
            for a, g in zip(columns.chunk(groups, 2), outputs.chunk(groups, 2), strict=True)
        ]
        sink.samples(weight, torch.cat(per_group, 1).view(x.shape[0], *weight.shape))
        return
    for begin in range(0, x.shape[0], SAMPLES_AT_ONCE):
        part = slice(begin, begin + SAMPLES_AT_ONCE)
        columns = F.unfold(x[part], kernel, dilation, padding, stride).transpose(1, 2)
        sink.product(weight, columns, outputs[part])


class _Embedding(torch.autograd.Function):
    """Table look-up."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, table: tuple[Tensor], indices: Tensor, padding: int | None, sink: FisherSink, axis: int
    ) -> Tensor:
        """Look up and remember the indices."""
        ctx.save_for_backward(indices)
        (weight,) = table
        ctx.weight, ctx.padding, ctx.sink, ctx.axis = weight, padding, sink, axis
        return F.embedding(indices, weight, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The table's gradient goes to the sink."""
        (grad,) = grads
        (indices,) = ctx.saved_tensors
        moved = indices.movedim(ctx.axis, 0)
        outputs = grad.movedim(ctx.axis, 0)
        samples = moved.shape[0]
        ctx.sink.rows(ctx.weight, moved.reshape(samples, -1), outputs.reshape(samples, -1, grad.shape[-1]), ctx.padding)
        return None, None, None, None, None, None


class _PerSampleView(torch.autograd.Function):
    """A weight broadcast along the sample axis: the gradient of the result holds one gradient per sample."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, weights: tuple[Tensor], aligned: tuple[int, ...], shape: tuple[int, ...], axis: int,
        sink: FisherSink,
    ) -> Tensor:  # fmt: skip
        """Expand the weight."""
        (weight,) = weights
        ctx.weight, ctx.aligned, ctx.axis, ctx.sink = weight, aligned, axis, sink
        return weight.detach().reshape(aligned).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Per-sample gradients, summed over the other broadcast axes, go to the sink."""
        (grad,) = grads
        weight = ctx.weight
        aligned = (1,) * (grad.dim() - len(ctx.aligned)) + ctx.aligned
        moved = grad.movedim(ctx.axis, 0)
        sizes = [1, *(size for index, size in enumerate(aligned) if index != ctx.axis)]
        extra = tuple(i for i, size in enumerate(sizes) if i > 0 and size == 1 and moved.shape[i] != 1)
        per_sample = moved.sum(extra, keepdim=True) if extra else moved
        ctx.sink.samples(weight, per_sample.reshape(moved.shape[0], *weight.shape))
        return None, None, None, None, None, None


def linear(
    sink: FisherSink, axis: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Captured ``F.linear`` (or ``x @ weight`` when transposed).

    Args:
        sink: Receives the per-sample squares.
        axis: Sample axis of ``x``.
        x: (..., in).
        weight: (out, in), or (in, out) when transposed.
        bias: (out,) or None.
        transposed: See above.

    Returns:
        (..., out).
    """
    sink.expect(weight, matrix=True)
    sink.expect(bias)
    return _Linear.apply(sink.gate, x, (weight, bias), sink, axis, transposed)


def layer_norm(
    sink: FisherSink, axis: int, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Captured ``F.layer_norm``.

    Args:
        sink: Receives the per-sample squares.
        axis: Sample axis of ``x``.
        x: Input.
        shape: Normalised shape.
        weight: Scale or None.
        bias: Shift or None.
        eps: Added to the variance.

    Returns:
        The normalised tensor.
    """
    sink.expect(weight)
    sink.expect(bias)
    return _LayerNorm.apply(sink.gate, x, list(shape), (weight, bias), eps, sink, axis)


def conv2d(
    sink: FisherSink, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, Any, Any, Any]
) -> Tensor:
    """Captured ``F.conv2d``; the sample axis is the first.

    Args:
        sink: Receives the per-sample squares.
        x: (N, channels, height, width).
        weight: Filters.
        bias: Shift or None.
        geometry: stride, padding, dilation, groups as ``F.conv2d`` takes them.

    Returns:
        The convolution.

    Raises:
        ModelError: Padding "same" with an even kernel, which has no symmetric form.
    """
    stride, padding, dilation, groups = geometry
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(size % 2 for size in reach):
            raise ModelError(
                "a convolution with padding 'same' and an even kernel cannot be captured; use method='loop'"
            )
        padding = [size // 2 for size in reach]
    sink.expect(weight, matrix=weight.shape[0] > 0 and groups == 1)
    sink.expect(bias)
    return _Conv2d.apply(sink.gate, x, (weight, bias), (stride, _pair(padding), dilation, groups), sink)


def _pair(value: Any) -> list[int]:
    """Two integers from one or two."""
    return [int(value), int(value)] if isinstance(value, int) else [int(v) for v in value] * (3 - len(value))


def embedding(sink: FisherSink, axis: int, indices: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    """Captured ``F.embedding``.

    Args:
        sink: Receives the per-sample squares.
        axis: Sample axis of ``indices``.
        indices: Entries to look up.
        weight: The table.
        padding: Entry without gradient.

    Returns:
        The rows.
    """
    sink.expect(weight)
    return _Embedding.apply(sink.gate, (weight,), indices, padding, sink, axis)


def per_sample_view(
    sink: FisherSink, axis: int, weight: Tensor, shape: tuple[int, ...], aligned: tuple[int, ...] | None = None
) -> Tensor:
    """A weight expanded to a shape that has a sample axis.

    Args:
        sink: Receives the per-sample squares.
        axis: Sample axis of ``shape``.
        weight: A parameter or an expression of parameters.
        shape: Target of the broadcast.
        aligned: The weight's shape before the broadcast, if it is to be reshaped first.

    Returns:
        The expanded weight.
    """
    sink.expect(weight)
    before = tuple(weight.shape) if aligned is None else aligned
    return _PerSampleView.apply(sink.gate, (weight,), before, shape, axis, sink)


def batch_norm(
    sink: FisherSink, x: Tensor, mean: Tensor, variance: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float
) -> Tensor:
    """Captured batch normalisation with stored statistics (evaluation mode).

    Args:
        sink: Receives the per-sample squares.
        x: (N, channels, ...).
        mean: Stored mean.
        variance: Stored variance.
        affine: Scale and shift, each may be None.
        eps: Added to the variance.

    Returns:
        The normalised tensor.
    """
    out = F.batch_norm(x, mean, variance, None, None, False, 0.0, eps)
    aligned = (x.shape[1], *[1] * (x.dim() - 2))
    weight, bias = (None if t is None else per_sample_view(sink, 0, t, tuple(x.shape), aligned) for t in affine)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias

"""Reads per-sample gradients off an unmodified model while it runs.

Module hooks miss weights that are used functionally, such as those inside ``nn.MultiheadAttention``. This file watches
functions instead: under :class:`PerSampleCapture` every PyTorch function that meets a trainable parameter is replaced
by one that computes the same values and sends per-sample gradients to a :class:`FisherSink` in the backward pass.

Which axis of each tensor counts samples is not guessed: the computation is traced twice, with two and with three
samples, and the axis that grew is the sample axis. Operations whose size did not change are functions of parameters
alone (``logit_scale.exp()``, class prompts through the text tower) and are differentiated per sample at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ftfast.errors import ModelError
from ftfast.weightspace import capture_ops
from ftfast.weightspace.fisher_sink import FisherSink

__all__ = ["PerSampleCapture", "trace_sample_axes"]

Shapes = list[tuple[int, ...] | None]
ELEMENTWISE = frozenset(
    name
    for stem in ("add", "sub", "mul", "div", "true_divide", "multiply", "subtract")
    for name in (stem, f"{stem}_", f"__{stem}__", f"__r{stem}__", f"__i{stem}__")
) | {"__truediv__", "__rtruediv__", "where", "rsub", "__rsub__"}
PRODUCTS = frozenset({"matmul", "mm", "__matmul__"})
EXPANSIONS = frozenset({"expand", "expand_as", "repeat", "broadcast_to"})


def _first_tensor(result: Any) -> Tensor | None:
    """The tensor whose shape stands for a function's result."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple | list):
        return next((item for item in result if isinstance(item, Tensor)), None)
    return None


def _is_call(func: Callable[..., Any]) -> bool:
    """Whether a function computes something, as opposed to reading an attribute such as ``shape``."""
    return getattr(func, "__name__", "") not in ("__get__", "__set__", "size", "dim", "numel", "is_floating_point")


class _ShapeTrace(TorchFunctionMode):
    """Records the shape of every function's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Shapes = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note its result's shape."""
        result = func(*args, **(kwargs or {}))
        if _is_call(func):
            tensor = _first_tensor(result)
            self.shapes.append(None if tensor is None else tuple(tensor.shape))
        return result


def trace_sample_axes(run: Callable[[Any], Any], two: Any, three: Any) -> list[int | None]:
    """Find the sample axis of every function call of a computation.

    Args:
        run: Runs the computation on a batch.
        two: A batch of two samples.
        three: A batch of three samples.

    Returns:
        For each call in order, the first axis that grew with the samples, or None if the shape stayed.

    Raises:
        ModelError: The computation takes another path, or folds samples into another axis, when their number changes.
    """
    traces = []
    for batch in (two, three):
        trace = _ShapeTrace()
        with torch.enable_grad(), trace:
            run(batch)
        traces.append(trace.shapes)
    if len(traces[0]) != len(traces[1]):
        raise ModelError("the model takes another path for another batch size; use method='loop'")
    axes: list[int | None] = []
    for small, large in zip(*traces, strict=True):
        if small is None or large is None or small == large:
            axes.append(None)
            continue
        grown = [axis for axis, sizes in enumerate(zip(small, large, strict=True)) if sizes[0] != sizes[1]]
        axes.append(grown[0] if (small[grown[0]], large[grown[0]]) == (2, 3) else -1)
    return axes


class PerSampleCapture(TorchFunctionMode):
    """While active, sends per-sample gradients of every trainable parameter to a sink.

    Args:
        parameters: Trainable parameters by name.
        sink: Receives the gradients.
        axes: Result of :func:`trace_sample_axes` for the computation that will run.

    Raises:
        ModelError: An operation meets a parameter in a way that is not known; its name is in the message.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sink: FisherSink, axes: list[int | None]) -> None:
        super().__init__()
        self.sink = sink
        self._axes = axes
        self._call = 0
        self._derived: dict[int, Tensor] = {id(parameter): parameter for parameter in parameters.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function, captured if it joins parameters and samples."""
        kwargs = kwargs or {}
        if not _is_call(func):
            result = func(*args, **kwargs)
            return self._mark(result) if self._meets(args, kwargs) else result
        if self._call >= len(self._axes):
            raise ModelError("the model ran more operations than in its trial run; use method='loop'")
        axis = self._axes[self._call]
        self._call += 1
        if not self._meets(args, kwargs):
            return func(*args, **kwargs)
        if axis is None:
            return self._mark(func(*args, **kwargs))
        if axis == -1:
            raise ModelError(f"'{_name(func)}' folds samples into another axis; use method='loop'")
        return self._captured(func, axis, args, kwargs)

    def _is_weight(self, value: Any) -> bool:
        """Whether a value is a parameter or computed from parameters alone."""
        return isinstance(value, Tensor) and id(value) in self._derived

    def _meets(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether any argument is a weight."""
        return any(
            self._is_weight(item)
            for value in (*args, *kwargs.values())
            for item in (value if isinstance(value, tuple | list) else (value,))
        )

    def _mark(self, result: Any) -> Any:
        """Remember tensors computed from parameters alone; the reference keeps their identity unique."""
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.requires_grad:
                self._derived[id(item)] = item
        return result

    def _captured(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """The captured form of a function that joins parameters and samples."""
        name = _name(func)
        handler = getattr(self, f"_on_{name}", None)
        if handler is not None:
            return handler(func, axis, args, kwargs)
        if name in ELEMENTWISE:
            return self._elementwise(func, axis, args, kwargs)
        if name in PRODUCTS:
            return self._product(name, axis, args)
        if name in EXPANSIONS:
            with torch.no_grad():
                shape = tuple(func(*args, **kwargs).shape)
            if name == "repeat" and [s for i, s in enumerate(shape) if i != axis] != list(args[0].shape[1:]):
                raise ModelError("a parameter repeated along more than the sample axis; use method='loop'")
            return capture_ops.per_sample_view(self.sink, axis, args[0], shape)
        raise ModelError(f"'{name}' uses a parameter in a way that cannot be captured; use method='loop'")

    def _elementwise(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """Broadcasting arithmetic: weights are expanded along the sample axis first."""
        shape = tuple(torch.broadcast_shapes(*(value.shape for value in args if isinstance(value, Tensor))))
        expanded = []
        for value in args:
            if self._is_weight(value):
                place = axis - (len(shape) - value.dim())
                if place >= 0 and value.shape[place] != 1:
                    raise ModelError(f"'{_name(func)}' joins a parameter along the sample axis; use method='loop'")
                value = capture_ops.per_sample_view(self.sink, axis, value, shape)
            expanded.append(value)
        return func(*expanded, **kwargs)

    def _product(self, name: str, axis: int, args: Any) -> Tensor:
        """``x @ W`` with a two-dimensional weight on the right."""
        x, weight = args
        if self._is_weight(x) or weight.dim() != 2 or axis == x.dim() - 1:
            raise ModelError(f"'{name}' with a parameter on its left or along the samples; use method='loop'")
        return capture_ops.linear(self.sink, axis, x, weight, transposed=True)

    def _on_linear(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
        if self._is_weight(x):
            raise ModelError("'linear' with parameters as its input joins samples; use method='loop'")
        return capture_ops.linear(self.sink, axis, x, weight, bias)

    def _on_layer_norm(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        x, shape, weight, bias, eps = _bind(names, args, kwargs)
        return capture_ops.layer_norm(self.sink, axis, x, shape, weight, bias, 1e-5 if eps is None else eps)

    def _on_conv2d(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, weight, bias, stride, padding, dilation, groups = _bind(names, args, kwargs)
        geometry = (stride or 1, padding or 0, dilation or 1, groups or 1)
        if axis != 0 or x.dim() != 4:
            raise ModelError("a convolution whose first axis is not the samples; use method='loop'")
        return capture_ops.conv2d(self.sink, x, weight, bias, geometry)

    def _on_embedding(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        indices, weight, padding = _bind(("input", "weight", "padding_idx"), args, kwargs)
        return capture_ops.embedding(self.sink, axis, indices, weight, padding)

    def _on_batch_norm(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        x, mean, variance, weight, bias, training, _, eps = _bind(names, args, kwargs)
        if training or axis != 0:
            raise ModelError("batch normalisation with batch statistics mixes samples; put the model in eval mode")
        return capture_ops.batch_norm(self.sink, x, mean, variance, (weight, bias), 1e-5 if eps is None else eps)

    def _on_group_norm(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "num_groups", "weight", "bias", "eps")
        x, groups, weight, bias, eps = _bind(names, args, kwargs)
        out = F.group_norm(x, groups, None, None, 1e-5 if eps is None else eps)
        aligned = (x.shape[1], *[1] * (x.dim() - 2))
        for value, join in ((weight, torch.mul), (bias, torch.add)):
            if value is not None:
                view = capture_ops.per_sample_view(self.sink, axis, value, tuple(x.shape), aligned)
                out = join(out, view)
        return out

    def _on_multi_head_attention_forward(self, func: Any, axis: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run PyTorch's own attention with its projections captured; its layout is (length, samples, width)."""
        bound = inspect.signature(func).bind(*args, **kwargs).arguments
        if bound.get("bias_k") is not None or bound.get("bias_v") is not None:
            raise ModelError("attention with bias_k or bias_v cannot be captured; use method='loop'")

        samples = bound["query"].shape[1]

        def captured(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            """Run a linear layer through the capturing operation, sample axis restored where it is folded."""
            if x.dim() == 2:  # the output projection sees (length * samples, width)
                unfolded = x.view(-1, samples, x.shape[-1])
                return capture_ops.linear(self.sink, 1, unfolded, weight, bias).flatten(0, 1)
            return capture_ops.linear(self.sink, 1, x, weight, bias)

        F.linear = captured  # type: ignore[assignment]
        try:
            return func(*args, **kwargs)
        finally:
            F.linear = capture_ops.PLAIN_LINEAR


def _name(func: Any) -> str:
    """Plain name of a PyTorch function."""
    return str(getattr(func, "__name__", func))


def _bind(names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Arguments by name, None where absent."""
    given = dict(zip(names, args, strict=False))
    return [given.get(name, kwargs.get(name)) for name in names]

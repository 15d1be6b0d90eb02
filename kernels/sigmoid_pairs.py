"""The operation under the sigmoid loss: Σ_ij -log σ(±(S_ij + bias)) over S = logit_scale · X Yᵀ.

A sigmoid needs no normaliser, so the forward pass makes the gradients of every input that requires one and the
backward pass only multiplies them: 3 products instead of 4. Legend: M rows, N columns, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_sigmoid
from .dispatch import follow_autocast
from .pairs import resolve
from .relations import Relation
from .torch_softmax import work_dtype


def sigmoid_pairs(
    x: Tensor, y: Tensor, logit_scale: Tensor, bias: Tensor, relation: Relation | None, *, backend: str = "auto"
) -> Tensor:
    """Sum the sigmoid loss over all pairs, differentiably.

    Args:
        x: (M, D) features; float32, float16 or bfloat16 (float64 with "torch").
        y: (N, D) features.
        logit_scale: 0-d tensor.
        bias: 0-d tensor.
        relation: Mode "pair" or "group" gives the positives; None: every pair is a negative.
        backend: "auto", "triton" or "torch".

    Returns:
        0-d float32 sum (float64 for float64 inputs).

    Memory: O((M + N)·D + block). Determinism: bitwise for fixed shapes and device.
    """
    x, y = follow_autocast(x, y)
    y = y.to(x.dtype)
    grad = torch.is_grad_enabled()
    need = [
        grad and x.requires_grad,
        grad and y.requires_grad,
        grad and (logit_scale.requires_grad or bias.requires_grad),
    ]
    mode = "" if relation is None else relation.mode
    ids = (None, None) if relation is None else (relation.row_ids, relation.col_ids)
    offset = 0 if relation is None else relation.offset
    return _sigmoid(x, y, logit_scale, bias, *ids, mode, offset, *need, resolve(backend, x))[0]


@torch.library.custom_op("ftfast::sigmoid_pairs", mutates_args=())
def _sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: str,
    offset: int,
    need_x: bool,
    need_y: bool,
    need_scalars: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    relation = Relation(mode, offset, row_ids, col_ids) if mode else None
    need = (need_x, need_y, need_scalars)
    if backend == "triton":
        from . import triton_sigmoid

        return triton_sigmoid.forward(x, y, scale, bias, relation, need)
    return torch_sigmoid.forward(x, y, scale, bias, relation, need)


@_sigmoid.register_fake
def _sigmoid_fake(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: str,
    offset: int,
    need_x: bool,
    need_y: bool,
    need_scalars: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalars = [x.new_empty((), dtype=work_dtype(x)) for _ in range(3)]
    grad_x, grad_y = x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))
    return scalars[0], grad_x, grad_y, scalars[1], scalars[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, scale, bias = inputs[:4]
    ctx.save_for_backward(*output[1:])
    ctx.need, ctx.scalar_dtypes = inputs[8:11], (scale.dtype, bias.dtype)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    made = (ctx.need[0], ctx.need[1], ctx.need[2], ctx.need[2])
    grads = [
        (grad * saved).to(saved.dtype) if have and wanted else None
        for saved, have, wanted in zip(ctx.saved_tensors, made, ctx.needs_input_grad[:4], strict=True)
    ]
    for index, dtype in enumerate(ctx.scalar_dtypes, start=2):
        value = grads[index]
        grads[index] = None if value is None else value.to(dtype)
    return (*grads, *[None] * 8)


_sigmoid.register_autograd(_differentiate, setup_context=_setup_context)

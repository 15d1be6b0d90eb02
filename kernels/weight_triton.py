"""Multi-tensor Triton kernels over weights.

A whole list of tensors is one launch: each program finds its tensor and stretch in a chunk table and reads addresses
from a pointer table, so hundreds of small tensors cost no more than one large one. Sums are written per program and
added in a fixed order, so results repeat bit for bit. Compiled for CUDA; on CPU tensors the kernels run only under
Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ftfast.kernels.dispatch import interpreting
from torch import Tensor

__all__ = ["adamw", "penalty", "signature_of"]

CHUNK = 65536  # elements per program: 2.5 G parameters make 39 k programs
BLOCK = 1024
NUM_WARPS = 4
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Row = Sequence[Tensor | None]  # theta, grad, exp_avg, exp_avg_sq, start, precision


@triton.jit
def _pointer(table: tl.tensor, column: tl.constexpr, element: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Typed pointer from one cell of the address table; ALIGNED promises 16-byte alignment (vector loads)."""
    pointer = tl.load(table + column).to(tl.pointer_type(element))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Load as float32; whole blocks carry no mask, because a mask with a ragged end forbids vector loads."""
    return (tl.load(pointer, mask, 0.0) if MASKED else tl.load(pointer)).to(tl.float32)


@triton.jit
def _store(pointer: tl.tensor, value: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> None:
    """Store with the pointer's dtype."""
    if MASKED:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty))


@triton.jit
def _penalty_block(
    theta: tl.tensor,
    grad: tl.tensor,
    start: tl.tensor,
    precision: tl.tensor,
    coefficient: tl.tensor,
    index: tl.tensor,
    numel: tl.tensor,
    HAS_GRAD: tl.constexpr,
    HAS_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """``F (theta - theta*)^2`` of one block, adding its gradient."""
    mask = index < numel
    delta = _load(theta + index, mask, MASKED) - _load(start + index, mask, MASKED)
    weighted = delta
    if HAS_PRECISION:
        weighted = delta * _load(precision + index, mask, MASKED)
    if HAS_GRAD:
        value = _load(grad + index, mask, MASKED) + 2.0 * coefficient * weighted
        _store(grad + index, value, mask, MASKED)
    return weighted * delta


@triton.jit
def anchor_penalty_kernel(
    table: tl.tensor,
    coefficients: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_numbers: tl.tensor,
    partials: tl.tensor,
    THETA: tl.constexpr,
    GRAD: tl.constexpr,
    START: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``partials[p] = c sum F (theta - theta*)^2`` over one chunk; adds ``2 c F (theta - theta*)`` to the gradient."""
    program = tl.program_id(0)
    row = tl.load(chunk_rows + program).to(tl.int64)
    begin = tl.load(chunk_numbers + program).to(tl.int64) * CHUNK
    table += row * 8
    left = tl.minimum(tl.load(table + 6) - begin, CHUNK)
    whole = left // BLOCK * BLOCK
    c = tl.load(coefficients + row)
    theta = _pointer(table, 0, THETA, ALIGNED) + begin
    grad = _pointer(table, 1, GRAD, ALIGNED) + begin
    start = _pointer(table, 4, START, ALIGNED) + begin
    precision = _pointer(table, 5, PRECISION, ALIGNED) + begin
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, whole, BLOCK):
        index = step + lanes
        total += _penalty_block(theta, grad, start, precision, c, index, left, HAS_GRAD, HAS_PRECISION, False)
    if whole < left:
        index = whole + lanes
        total += _penalty_block(theta, grad, start, precision, c, index, left, HAS_GRAD, HAS_PRECISION, True)
    tl.store(partials + program, c * tl.sum(total, 0))


@triton.jit
def _adamw_block(
    theta: tl.tensor,
    grad: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    start: tl.tensor,
    precision: tl.tensor,
    coefficient: tl.tensor,
    numbers: tl.tensor,
    index: tl.tensor,
    numel: tl.tensor,
    MODE: tl.constexpr,
    HAS_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Anchored AdamW on one block; returns ``2 c F (theta - theta*)^2`` per element."""
    lr, beta1, beta2, eps, keep, rate, root = numbers
    mask = index < numel
    value = _load(theta + index, mask, MASKED)
    g = _load(grad + index, mask, MASKED)
    twice = tl.zeros_like(value)
    if MODE != 0:
        origin = _load(start + index, mask, MASKED)
        strength = tl.zeros_like(value) + 2.0 * coefficient
        if HAS_PRECISION:
            strength *= _load(precision + index, mask, MASKED)
        pull = strength * (value - origin)
        twice = pull * (value - origin)
        if MODE == 1:
            g += pull
    m = beta1 * _load(first + index, mask, MASKED) + (1.0 - beta1) * g
    v = beta2 * _load(second + index, mask, MASKED) + (1.0 - beta2) * g * g
    new = value * keep - rate * (m / (tl.sqrt(v) * root + eps))
    if MODE == 2:
        new -= lr * pull
    if MODE == 3:
        new = (new + lr * strength * origin) / (1.0 + lr * strength)
    _store(theta + index, new, mask, MASKED)
    _store(first + index, m, mask, MASKED)
    _store(second + index, v, mask, MASKED)
    return twice


@triton.jit
def adamw_anchored_kernel(
    table: tl.tensor,
    coefficients: tl.tensor,
    chunk_rows: tl.tensor,
    chunk_numbers: tl.tensor,
    partials: tl.tensor,
    lr: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    rate: tl.tensor,
    root: tl.tensor,
    THETA: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    START: tl.constexpr,
    PRECISION: tl.constexpr,
    MODE: tl.constexpr,
    HAS_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One AdamW step on one chunk; MODE 0 without anchor, 1 coupled, 2 decoupled, 3 proximal.

    ``keep = 1 - lr weight_decay``, ``rate = lr / (1 - beta1^step)``, ``root = 1 / sqrt(1 - beta2^step)``.
    """
    program = tl.program_id(0)
    row = tl.load(chunk_rows + program).to(tl.int64)
    begin = tl.load(chunk_numbers + program).to(tl.int64) * CHUNK
    table += row * 8
    left = tl.minimum(tl.load(table + 6) - begin, CHUNK)
    whole = left // BLOCK * BLOCK
    c = tl.load(coefficients + row)
    theta = _pointer(table, 0, THETA, ALIGNED) + begin
    grad = _pointer(table, 1, GRAD, ALIGNED) + begin
    first = _pointer(table, 2, MOMENT, ALIGNED) + begin
    second = _pointer(table, 3, MOMENT, ALIGNED) + begin
    start = _pointer(table, 4, START, ALIGNED) + begin
    precision = _pointer(table, 5, PRECISION, ALIGNED) + begin
    numbers = (lr, beta1, beta2, eps, keep, rate, root)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, whole, BLOCK):
        index = step + lanes
        total += _adamw_block(
            theta, grad, first, second, start, precision, c, numbers, index, left, MODE, HAS_PRECISION, False
        )
    if whole < left:
        index = whole + lanes
        total += _adamw_block(
            theta, grad, first, second, start, precision, c, numbers, index, left, MODE, HAS_PRECISION, True
        )
    tl.store(partials + program, 0.5 * tl.sum(total, 0))


def signature_of(row: Row) -> tuple[torch.dtype | None, ...] | None:
    """Dtypes of a row, or None if the kernels cannot take it.

    Args:
        row: theta, grad, exp_avg, exp_avg_sq, start, precision; None where absent.

    Returns:
        One dtype per column for contiguous float32, bfloat16 or float16 tensors on one device, else None.
    """
    present = [tensor for tensor in row if tensor is not None]
    first = present[0]
    usable = first.device.type == "cuda" or interpreting()
    for tensor in present:
        if tensor.dtype not in DTYPES or tensor.device != first.device or not tensor.is_contiguous():
            usable = False
    moments = [tensor.dtype for tensor in row[2:4] if tensor is not None]
    usable = usable and len(set(moments)) <= 1  # the kernel has one dtype for both
    return tuple(None if tensor is None else tensor.dtype for tensor in row) if usable else None


def _tables(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Pointer table (n, 8), row and number of each chunk, and whether all addresses are 16-byte aligned."""
    cells: list[list[int]] = []
    chunk_rows: list[int] = []
    numbers: list[int] = []
    aligned = True
    for index, row in enumerate(rows):
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in row]
        aligned = aligned and all(address % 16 == 0 for address in addresses)
        numel = 0 if row[0] is None else row[0].numel()
        cells.append([*addresses, numel, 0])
        chunks = -(-numel // CHUNK)
        chunk_rows += [index] * chunks
        numbers += range(chunks)
    pinned = device.type == "cuda"

    def upload(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        """Copy a table to the device without waiting for it."""
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)

    return upload(cells, torch.int64), upload(chunk_rows, torch.int32), upload(numbers, torch.int32), aligned


def _device_of(rows: Sequence[Row]) -> torch.device:
    """Device of the first tensor."""
    first = rows[0][0]
    return torch.device("cpu") if first is None else first.device


def _dtype(row: Row, column: int) -> tl.dtype:
    """Triton dtype of a column; float32 where the column is absent."""
    tensor = row[column]
    return tl.float32 if tensor is None else DTYPES[tensor.dtype]


def penalty(rows: Sequence[Row], coefficients: Sequence[float]) -> Tensor:
    """Penalty of rows that share one signature; adds its gradient where rows have one.

    Args:
        rows: At least one row, with starts.
        coefficients: c per row.

    Returns:
        Float32 scalar on the rows' device.
    """
    device = _device_of(rows)
    table, chunk_rows, chunks, aligned = _tables(rows, device)
    partials = torch.empty(len(chunks), dtype=torch.float32, device=device)
    if len(chunks):
        scale = torch.tensor(coefficients, dtype=torch.float32).to(device, non_blocking=True)
        anchor_penalty_kernel[(len(chunks),)](
            table, scale, chunk_rows, chunks, partials,
            THETA=_dtype(rows[0], 0), GRAD=_dtype(rows[0], 1), START=_dtype(rows[0], 4), PRECISION=_dtype(rows[0], 5),
            HAS_GRAD=rows[0][1] is not None, HAS_PRECISION=rows[0][5] is not None, ALIGNED=aligned,
            CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return partials.sum()


def adamw(rows: Sequence[Row], coefficients: Sequence[float], numbers: Sequence[float], mode: int) -> Tensor:
    """One anchored AdamW step over rows that share one signature.

    Args:
        rows: At least one row.
        coefficients: c per row.
        numbers: lr, beta1, beta2, eps, weight decay, step.
        mode: 1 coupled, 2 decoupled, 3 proximal; rows without a start take plain AdamW.

    Returns:
        The penalty before the step, float32 scalar on the rows' device.
    """
    device = _device_of(rows)
    lr, beta1, beta2, eps, decay, step = numbers
    table, chunk_rows, chunks, aligned = _tables(rows, device)
    partials = torch.empty(len(chunks), dtype=torch.float32, device=device)
    if len(chunks):
        scale = torch.tensor(coefficients, dtype=torch.float32).to(device, non_blocking=True)
        adamw_anchored_kernel[(len(chunks),)](
            table, scale, chunk_rows, chunks, partials,
            lr, beta1, beta2, eps, 1.0 - lr * decay, lr / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5,
            THETA=_dtype(rows[0], 0), GRAD=_dtype(rows[0], 1), MOMENT=_dtype(rows[0], 2), START=_dtype(rows[0], 4),
            PRECISION=_dtype(rows[0], 5), MODE=mode if rows[0][4] is not None else 0,
            HAS_PRECISION=rows[0][5] is not None, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return partials.sum()

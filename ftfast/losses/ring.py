"""Global losses whose features pass around a ring of processes instead of being gathered.

Each process keeps its own b rows. The texts of the others visit it one process at a time, in the forward and again in
the backward pass, together with an accumulator of what all hosts so far had to say about them: the log-sum-exp of
their columns, or their gradient. The accumulator arrives home with the last hop. So memory is O(b·D) per process
in both passes, whatever the number of processes, and the work is that of the gathered loss divided by W.

Transfers of the next visitor run while the present one is compared (double buffering).

Gradients are those of torch.distributed.nn's gathering: of the sum over processes of their (equal) losses, so that
DDP's averaging gives the gradient of the global loss exactly.

Legend: W processes, b rows on each, N = W b, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftfast import kernels
from ftfast.errors import ShapeError
from ftfast.losses.tiles import tile_gradients, tile_logsumexp


class _Transfer:
    """A tensor on its way to another process while one like it comes in."""

    def __init__(self, tensor: Tensor, to_rank: int, from_rank: int, tag: int) -> None:
        self._sent = tensor.contiguous()  # kept alive until the transfer is done
        self._received = torch.empty_like(self._sent)
        operations = [
            dist.P2POp(dist.isend, self._sent, to_rank, tag=tag),
            dist.P2POp(dist.irecv, self._received, from_rank, tag=tag),
        ]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        """Wait for both ends and return what came in."""
        for work in self._works:
            work.wait()
        return self._received


def _walk(
    visitor: Tensor,
    compare: Callable[[Tensor, int], Tensor],
    merge: Callable[[Tensor, Tensor], Tensor],
    hops: int,
    direction: int = 1,
) -> Tensor:
    """Send rows through ``hops`` other processes and return what all hosts accumulated about this process's rows.

    Args:
        visitor: This process's travelling rows.
        compare: Called with the visiting rows and their home's distance; returns a contribution to the visitor's
            accumulator. Distance 0 is this process itself.
        merge: Joins two contributions.
        hops: Other processes each visitor meets.
        direction: +1 sends to the next rank, -1 to the previous one.

    Returns:
        The merged contributions to this process's own rows.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ahead, behind = (rank + direction) % world_size, (rank - direction) % world_size
    tag = 10 if direction > 0 else 20
    arriving: _Transfer | None = None
    for distance in range(hops + 1):
        departing = _Transfer(visitor, ahead, behind, tag) if distance < hops else None
        contribution = compare(visitor, distance)
        if arriving is not None:
            contribution = merge(arriving.wait(), contribution)
        if distance < hops:
            arriving = _Transfer(contribution, ahead, behind, tag + 1)
        if departing is not None:
            visitor = departing.wait()
    if hops == 0:
        return contribution
    home, guest = (rank - direction * hops) % world_size, (rank + direction * hops) % world_size
    return _Transfer(contribution, home, guest, tag + 2).wait()


def _check(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ShapeError(
            "A ring needs as many texts as images on every process, got image_features "
            f"{tuple(image_features.shape)} and text_features {tuple(text_features.shape)}"
        )


class _RingClip(torch.autograd.Function):
    """Global symmetric softmax loss; see :func:`ring_clip_loss`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        row_lse = torch.full((len(image),), -torch.inf, dtype=torch.float32, device=image.device)
        hops = dist.get_world_size() - 1

        def compare(visitor: Tensor, _: int) -> Tensor:
            nonlocal row_lse
            rows, columns = tile_logsumexp(image, visitor, logit_scale)
            row_lse = torch.logaddexp(row_lse, rows)
            return columns

        column_lse = _walk(text, compare, torch.logaddexp, hops)
        pairs = logit_scale.float() * torch.linalg.vecdot(image.float(), text.float())
        total = (row_lse + column_lse - 2 * pairs).sum()
        dist.all_reduce(total)
        ctx.save_for_backward(image, text, logit_scale, row_lse, column_lse)
        return total / (2 * len(image) * dist.get_world_size())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, row_lse, column_lse = ctx.saved_tensors
        world_size = dist.get_world_size()
        weight = 1 / (2 * len(image) * world_size)
        image_gradient = torch.zeros_like(image, dtype=torch.float32)
        scale_gradient = torch.zeros_like(logit_scale, dtype=torch.float32)
        # One message per hop: the visitor's column statistics ride behind its features.
        visitor = torch.cat([text.float(), column_lse[:, None]], 1)

        def compare(visitor: Tensor, distance: int) -> Tensor:
            features, visiting_lse = visitor[:, :-1].to(text.dtype), visitor[:, -1]
            rows, columns, scale = tile_gradients(
                image, features, logit_scale, row_lse, visiting_lse, weight, paired=distance == 0
            )
            image_gradient.add_(rows)
            scale_gradient.add_(scale)
            return columns

        text_gradient = _walk(visitor, compare, torch.add, world_size - 1)
        grad_output = grad_outputs[0].float()
        everybody = torch.stack([grad_output, scale_gradient])
        dist.all_reduce(everybody)
        return (
            (everybody[0] * image_gradient).to(image.dtype),
            (everybody[0] * text_gradient).to(text.dtype),
            (grad_output * everybody[1]).to(logit_scale.dtype),
        )


def ring_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Compute the symmetric softmax loss over the rows of all processes, passing texts around a ring.

    Args:
        image_features: (b, D) rows of this process; b must be the same everywhere.
        text_features: (b, D) rows; row i belongs to image i.
        logit_scale: The multiplier itself, one element; must be equal on all processes.
        logit_bias: Accepted for open_clip's call; its gradient is exactly 0.

    Returns:
        The global 0-d float32 loss, the same on every process.

    Raises:
        ShapeError: If the two batches differ in rows or width.

    Memory: O(b·D + block) in both passes. Determinism: bitwise for fixed shapes and processes.

    Source: the exchange is SigLIP's (Zhai et al. 2023, algorithm 2) with two softmaxes; the merging of partial
    normalisers is Milakov & Gimelshein 2018.
    """
    _check(image_features, text_features)
    loss = _RingClip.apply(image_features, text_features, _scalar(logit_scale, image_features))
    return loss if not isinstance(logit_bias, Tensor) else loss + 0.0 * logit_bias.sum()


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(float(value), device=like.device)


class _RingSigLip(torch.autograd.Function):
    """This process's images against everybody's texts; see :func:`ring_siglip_loss`."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, bidirectional: bool, backend: str
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=image.device)

        nothing = torch.zeros((), device=image.device)
        for hops, direction in _routes(bidirectional):

            def compare(visitor: Tensor, distance: int, direction: int = direction) -> Tensor:
                if distance > 0 or direction > 0:  # both walks start at home
                    tile = kernels.siglip_loss(image, visitor, scale, bias, negative_only=distance > 0, backend=backend)
                    total.add_(tile)
                return nothing

            _walk(text, compare, torch.add, hops, direction)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.bidirectional, ctx.backend = bidirectional, backend
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, bias = ctx.saved_tensors
        own = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (image, scale, bias)]

        def compare(visitor: Tensor, distance: int) -> Tensor:
            leaves = [tensor.detach().requires_grad_() for tensor in (image, scale, bias, visitor)]
            with torch.enable_grad():
                loss = kernels.siglip_loss(
                    leaves[0], leaves[3], leaves[1], leaves[2], negative_only=distance > 0, backend=ctx.backend
                )
            *parts, visiting = torch.autograd.grad(loss, leaves, grad_outputs[0].to(loss.dtype))
            for gradient, part in zip(own, parts, strict=True):
                gradient.add_(part)
            return visiting.float()

        nothing = torch.zeros_like(text, dtype=torch.float32)
        text_gradient = nothing
        for hops, direction in _routes(ctx.bidirectional):

            def host(visitor: Tensor, distance: int, direction: int = direction) -> Tensor:
                once = distance > 0 or direction > 0
                return compare(visitor, distance) if once else nothing

            text_gradient = text_gradient + _walk(text, host, torch.add, hops, direction)
        like = zip([own[0], text_gradient, own[1], own[2]], (image, text, scale, bias), strict=True)
        return (*(gradient.to(tensor.dtype) for gradient, tensor in like), None, None)


def _routes(bidirectional: bool) -> list[tuple[int, int]]:
    """Return (hops, direction) of the walks that together visit every other process once."""
    others = dist.get_world_size() - 1
    return [(others - others // 2, 1), (others // 2, -1)] if bidirectional else [(others, 1)]


def ring_siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    bidirectional: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Compute the sigmoid loss of this process's images against the texts of all processes, passed around a ring.

    Args:
        image_features: (b, D) rows of this process; b must be the same everywhere.
        text_features: (b, D) rows; row i belongs to image i.
        logit_scale: The multiplier itself, one element.
        logit_bias: Added to every logit; None means 0.
        bidirectional: Send half of the way in each direction (open_clip's "bidir") or all the way in one ("shift").
        backend: Backend of :func:`ftfast.kernels.siglip_loss`.

    Returns:
        The 0-d float32 loss of this process's images; the mean over processes is the global loss.

    Raises:
        ShapeError: If the two batches differ in rows or width.

    Memory: O(b·D + block) in both passes; the backward pass compares again (one more similarity product than the
    gathered loss). Determinism: bitwise for fixed shapes and processes.

    Source: Zhai et al. 2023, algorithm 2.
    """
    _check(image_features, text_features)
    scale = _scalar(logit_scale, image_features)
    bias = _scalar(0.0 if logit_bias is None else logit_bias, image_features)
    return _RingSigLip.apply(image_features, text_features, scale, bias, bidirectional, backend)

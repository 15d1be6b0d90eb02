"""Global losses whose features pass around a ring of processes instead of being gathered.

Each process keeps its own b rows. The texts of the others visit it one process at a time, in the forward and again in
the backward pass, followed by an accumulator of what all hosts so far had to say about them: the log-sum-exp of their
columns, or their gradient. The accumulator arrives home with the last hop. So memory is O(b·D) per process in both
passes, whatever the number of processes, and the work is that of the gathered loss divided by W.

Transfers of the next visitor run while the present one is compared (double buffering).

Gradients are those of gathering with gradients: of the sum over processes of their losses, so that DDP's averaging
gives the gradient of the global loss exactly.

Legend: W processes, b rows on each, N = W b, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ftfast import kernels
from ftfast.errors import ShapeError
from ftfast.kernels.checks import as_scalar
from ftfast.kernels.dispatch import follow_autocast
from ftfast.kernels.pairs import pair_statistics, pair_statistics_backward
from ftfast.kernels.relations import Relation

Tensors = tuple[Tensor, ...]


class _Transfer:
    """Tensors on their way to another process while others like them come in."""

    def __init__(self, tensors: Tensors, to_rank: int, from_rank: int, tag: int) -> None:
        self._sent = tuple(tensor.contiguous() for tensor in tensors)  # kept alive until the transfer is done
        self._received = tuple(map(torch.empty_like, self._sent))
        operations = []
        for i, (sent, received) in enumerate(zip(self._sent, self._received, strict=True)):
            operations.append(dist.P2POp(dist.isend, sent, to_rank, tag=tag + i))
            operations.append(dist.P2POp(dist.irecv, received, from_rank, tag=tag + i))
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensors:
        """Wait for both ends and return what came in."""
        for work in self._works:
            work.wait()
        return self._received


def walk(
    visitor: Tensors,
    compare: Callable[[Tensors, int], Tensor],
    merge: Callable[[Tensor, Tensor], Tensor],
    hops: int,
    direction: int = 1,
) -> Tensor:
    """Send tensors through ``hops`` other processes and return what all hosts accumulated about them.

    Args:
        visitor: This process's travelling tensors.
        compare: Called with the visiting tensors and their home's distance; returns a contribution to the visitor's
            accumulator. Distance 0 is this process itself.
        merge: Joins two contributions.
        hops: Other processes each visitor meets.
        direction: +1 sends to the next rank, -1 to the previous one.

    Returns:
        The merged contributions to this process's own tensors.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ahead, behind = (rank + direction) % world_size, (rank - direction) % world_size
    tag = 100 if direction > 0 else 200
    arriving: _Transfer | None = None
    for distance in range(hops + 1):
        departing = _Transfer(visitor, ahead, behind, tag) if distance < hops else None
        contribution = compare(visitor, distance)
        if arriving is not None:
            contribution = merge(arriving.wait()[0], contribution)
        if departing is not None:
            arriving = _Transfer((contribution,), ahead, behind, tag + 50)
            visitor = departing.wait()
    if hops == 0:
        return contribution
    home, guest = (rank - direction * hops) % world_size, (rank + direction * hops) % world_size
    return _Transfer((contribution,), home, guest, tag + 60).wait()[0]


def _tile_relation(rows: int, distance: int) -> Relation:
    """Return the pairing of a tile: rows with columns of the same number at home, none elsewhere."""
    return Relation("pair", offset=0 if distance == 0 else rows)


class _RingClip(torch.autograd.Function):
    """Global symmetric softmax loss; see :func:`ring_clip_loss`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, backend: str) -> Tensor:
        """Compute the global loss and save the normalisers and weights of its rows and columns."""
        world_size, b = dist.get_world_size(), len(image)
        row_lse, positive = torch.empty(0), torch.empty(0)

        def compare(visitor: Tensors, distance: int) -> Tensor:
            """Add one visit to the row statistics and return the visitor's column normalisers."""
            nonlocal row_lse, positive
            relation = _tile_relation(b, distance)
            tile = pair_statistics(image, visitor[0], scale, relation, backend=backend)
            if distance == 0:  # where the pairs are
                row_lse, positive = tile.row_lse, tile.row_positive
            else:
                row_lse = torch.logaddexp(row_lse, tile.row_lse)
            return tile.col_lse

        column_lse = walk((text,), compare, torch.logaddexp, world_size - 1)
        # The statistics leave the pair itself out: CE = softplus(lse of the others - the pair's logit).
        gaps = torch.stack([row_lse - positive, column_lse - positive])
        total = F.softplus(gaps, threshold=40).sum()
        dist.all_reduce(total)
        weights = torch.sigmoid(gaps) / (2 * b * world_size)
        ctx.save_for_backward(image, text, scale, row_lse, column_lse, weights)
        ctx.backend = backend
        return (total / (2 * b * world_size)).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Walk the texts around the ring again and return the gradients of both sides and the scale."""
        image, text, scale, row_lse, column_lse, weights = ctx.saved_tensors
        image_gradient = torch.zeros_like(image, dtype=torch.float32)
        scale_gradient = torch.zeros_like(row_lse[0])

        def compare(visitor: Tensors, distance: int) -> Tensor:
            """Add one visit to the image and scale gradients and return the visitor's gradient."""
            features, visitor_lse, visitor_weights = visitor
            rows, columns, tile_scale = pair_statistics_backward(
                image,
                features,
                scale,
                _tile_relation(len(image), distance),
                (row_lse, visitor_lse),
                (weights[0], -weights[0], visitor_weights, -visitor_weights),
                backend=ctx.backend,
            )
            image_gradient.add_(rows)
            scale_gradient.add_(tile_scale)
            return columns.to(image_gradient.dtype)

        visitor = (text, column_lse, weights[1])
        text_gradient = walk(visitor, compare, torch.add, dist.get_world_size() - 1)
        grad_output = grad_outputs[0].to(row_lse.dtype)
        everybody = torch.stack([grad_output, scale_gradient])
        dist.all_reduce(everybody)
        return (
            (everybody[0] * image_gradient).to(image.dtype),
            (everybody[0] * text_gradient).to(text.dtype),
            (grad_output * everybody[1]).to(scale.dtype),
            None,
        )


def check_ring(image_features: Tensor, text_features: Tensor) -> None:
    """Require as many texts as images.

    Raises:
        ShapeError: Naming both shapes.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2 or len(image_features) == 0:
        raise ShapeError(
            "A ring needs as many texts as images on every process, got image_features "
            f"{tuple(image_features.shape)} and text_features {tuple(text_features.shape)}"
        )


def ring_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute the symmetric softmax loss over the rows of all processes, passing texts around a ring.

    Args:
        image_features: (b, D) rows of this process; b must be the same everywhere.
        text_features: (b, D) rows; row i belongs to image i.
        logit_scale: The multiplier itself, one element; must be equal on all processes.
        logit_bias: Accepted for open_clip's call; its gradient is exactly 0.
        backend: "auto", "triton" or "torch".

    Returns:
        The global 0-d float32 loss, the same on every process.

    Raises:
        ShapeError: If the two batches differ in rows or width.

    Memory: O(b·D + block) in both passes; 4 similarity products of b x N in all, as gathering has in its best mode.
    Determinism: bitwise for fixed shapes and processes.

    Source: the exchange is SigLIP's (Zhai et al. 2023, algorithm 2) with two softmaxes; the merging of partial
    normalisers is Milakov & Gimelshein 2018.
    """
    check_ring(image_features, text_features)
    image, text = follow_autocast(image_features, text_features)
    loss = _RingClip.apply(image, text, as_scalar(logit_scale, image, "logit_scale"), backend)
    # A trained bias must stay in the graph, or DDP would wait for its gradient.
    return loss if not isinstance(logit_bias, Tensor) else loss + 0.0 * logit_bias.sum()


class _RingSigLip(torch.autograd.Function):
    """This process's images against everybody's texts; see :func:`ring_siglip_loss`."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, bidirectional: bool, backend: str
    ) -> Tensor:
        """Sum the loss of this process's images over the texts of all walks."""
        total = torch.zeros((), dtype=torch.float32, device=image.device)
        nothing = torch.zeros((), device=image.device)
        for hops, direction in _routes(bidirectional):

            def compare(visitor: Tensors, distance: int, direction: int = direction) -> Tensor:
                """Add one visit to the loss, counting the home tile once over both walks."""
                if distance > 0 or direction > 0:  # both walks start at home
                    other = distance > 0
                    total.add_(kernels.siglip_loss(image, *visitor, scale, bias, negative_only=other, backend=backend))
                return nothing

            walk((text,), compare, torch.add, hops, direction)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.bidirectional, ctx.backend = bidirectional, backend
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Repeat the walks and return the gradients of images, texts, scale and bias."""
        image, text, scale, bias = ctx.saved_tensors
        own = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (image, scale, bias)]

        def compare(visitor: Tensors, distance: int) -> Tensor:
            """Add one visit to this process's gradients and return the visitor's gradient."""
            leaves = [tensor.detach().requires_grad_() for tensor in (image, *visitor, scale, bias)]
            with torch.enable_grad():
                loss = kernels.siglip_loss(
                    leaves[0], leaves[1], leaves[2], leaves[3], negative_only=distance > 0, backend=ctx.backend
                )
            image_part, visitor_part, *rest = torch.autograd.grad(loss, leaves, grad_outputs[0].to(loss.dtype))
            for gradient, part in zip(own, (image_part, *rest), strict=True):
                gradient.add_(part)
            return visitor_part.float()

        nothing = torch.zeros_like(text, dtype=torch.float32)
        text_gradient = nothing
        for hops, direction in _routes(ctx.bidirectional):

            def host(visitor: Tensors, distance: int, direction: int = direction) -> Tensor:
                """Return the visitor's gradient, counting the home tile once over both walks."""
                once = distance > 0 or direction > 0
                return compare(visitor, distance) if once else nothing

            text_gradient = text_gradient + walk((text,), host, torch.add, hops, direction)
        like = zip((own[0], text_gradient, own[1], own[2]), (image, text, scale, bias), strict=True)
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
    check_ring(image_features, text_features)
    image, text = follow_autocast(image_features, text_features)
    scale = as_scalar(logit_scale, image, "logit_scale")
    bias = as_scalar(0.0 if logit_bias is None else logit_bias, image, "logit_bias")
    return _RingSigLip.apply(image, text, scale, bias, bidirectional, backend)

"""Inputs and peers of the weight-space benchmark; see :mod:`benchmarks.weightspace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ftfast.kernels.anchor_ops import AdamWHyper, Anchors, adamw_anchored_, anchor_penalty
from ftfast.kernels.fisher_ops import accumulate_fisher_, per_sample_fisher_
from torch import Tensor, nn

from ftfast.weightspace import ClassificationObjective, FisherOptions, estimate_fisher

Table = dict[str, Callable[[], Any]]


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Parameter shapes of an open_clip model by name; "" is a tiny list for a trial run."""
    if not model:
        return [(192, 64), (192,), (64, 64), (64,), (), (256, 64), (256,), (64, 256), (64,)] * 4
    import open_clip

    with torch.device("meta"):
        built = open_clip.CLIP(**(open_clip.get_model_config(model) or {}))
    return [tuple(parameter.shape) for parameter in built.parameters()]


def make_list(shapes: list[tuple[int, ...]], seed: int, device: str) -> list[Tensor]:
    """Random tensors of these shapes."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return [torch.rand(shape, generator=generator, device=device) for shape in shapes]


def yardsticks(device: str, smoke: bool) -> tuple[Table, dict[str, int]]:
    """Plain passes over large tensors and the bytes each moves; the fastest of them is called the bandwidth."""
    size = 2**16 if smoke else 2**28
    one, two = torch.ones(size, device=device), torch.ones(size, device=device)
    table: Table = {
        "copy": lambda: two.copy_(one),
        "in-place add": lambda: two.add_(one),
        "sum": lambda: one.sum(),
    }
    return table, {"copy": 8 * size, "in-place add": 12 * size, "sum": 4 * size}


def autograd_penalty(params: list[nn.Parameter], starts: list[Tensor], fishers: list[Tensor], c: float) -> Tensor:
    """The penalty as a loop of autograd operations."""
    total: Any = 0.0
    for p, s, f in zip(params, starts, fishers, strict=True):
        total = total + (f * (p - s).pow(2)).sum()
    return c * total


def penalty_cases(shapes: list[tuple[int, ...]], device: str) -> tuple[Table, int]:
    """Penalty and gradient into ``.grad``; bytes: read theta, theta*, F, gradient, write gradient."""
    params = [nn.Parameter(t) for t in make_list(shapes, 0, device)]
    starts, fishers = make_list(shapes, 1, device), make_list(shapes, 2, device)
    for p in params:
        p.grad = torch.zeros_like(p)
    plain, grads = [p.detach() for p in params], [p.grad for p in params if p.grad is not None]
    anchors = Anchors(starts, fishers, [0.5] * len(params))

    def foreach() -> Tensor:
        """Add the penalty's gradient and return the penalty with foreach operations."""
        delta = torch._foreach_sub(plain, starts)
        pull = torch._foreach_mul(delta, fishers)
        torch._foreach_add_(grads, pull)
        torch._foreach_mul_(pull, delta)
        return torch.stack([t.sum() for t in pull]).sum()

    table: Table = {
        "ftfast anchor_penalty": lambda: anchor_penalty(plain, anchors, grads=grads),
        "torch foreach": foreach,
        "autograd penalty": lambda: autograd_penalty(params, starts, fishers, 0.5).backward(),
    }
    return table, 20 * sum(p.numel() for p in params)


def step_cases(shapes: list[tuple[int, ...]], device: str) -> tuple[Table, int]:
    """One optimizer step; the peers' fused AdamW has no anchor, so the honest peer adds the penalty before it."""
    params = [nn.Parameter(t) for t in make_list(shapes, 0, device)]
    grads = make_list(shapes, 1, device)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    starts, fishers = make_list(shapes, 2, device), make_list(shapes, 3, device)
    moments = [make_list(shapes, seed, device) for seed in (4, 5)]
    plain, anchors = [p.detach() for p in params], Anchors(starts, fishers, [0.5] * len(shapes))
    fused = torch.optim.AdamW(params, lr=1e-5, fused=True)
    foreach = torch.optim.AdamW(params, lr=1e-5, foreach=True)

    def with_autograd() -> None:
        """Differentiate the penalty by autograd, then take a fused AdamW step."""
        autograd_penalty(params, starts, fishers, 0.5).backward()
        fused.step()

    def anchored(mode: Any) -> Callable[[], Tensor]:
        """Our step in one anchor mode."""
        hyper = AdamWHyper(lr=1e-5, step=3, mode=mode)
        return lambda: adamw_anchored_(plain, grads, moments[0], moments[1], hyper, anchors)

    table: Table = {
        "ftfast adamw_anchored_": anchored("coupled"),
        "ftfast adamw_anchored_ proximal": anchored("proximal"),
        "torch AdamW fused (no anchor)": fused.step,
        "torch AdamW foreach (no anchor)": foreach.step,
        "autograd penalty + torch AdamW fused": with_autograd,
    }
    return table, 36 * sum(t.numel() for t in starts)


def accumulate_cases(shapes: list[tuple[int, ...]], device: str) -> tuple[Table, int]:
    """``F <- decay F + g^2``; bytes: read F and g, write F."""
    fishers, grads = make_list(shapes, 0, device), make_list(shapes, 1, device)
    names = [str(i) for i in range(len(fishers))]
    avalanche = dict(zip(names, make_list(shapes, 0, device), strict=True))

    def loop() -> None:
        """Accumulate one parameter at a time."""
        for name, grad in zip(names, grads, strict=True):
            avalanche[name] = 0.9 * avalanche[name] + grad.clone().pow(2)

    def foreach() -> None:
        """Accumulate with foreach operations."""
        torch._foreach_mul_(fishers, 0.9)
        torch._foreach_addcmul_(fishers, grads, grads)

    table: Table = {
        "ftfast accumulate_fisher_": lambda: accumulate_fisher_(fishers, grads, decay=0.9),
        "torch foreach": foreach,
        "per-parameter loop (Avalanche style)": loop,
    }
    return table, 12 * sum(t.numel() for t in fishers)


def linear_cases(device: str, smoke: bool) -> Table:
    """Exact Fisher of one linear layer of a text tower: 32 samples of 77 tokens, 2048 to 512 features."""
    n, t, i, o = (2, 7, 64, 32) if smoke else (32, 77, 2048, 512)
    torch.manual_seed(0)
    inputs, grads = torch.randn(n, t, i, device=device), torch.randn(n, t, o, device=device)
    fisher = torch.zeros(o, i, device=device)

    def loop() -> None:
        """Accumulate the squared gradient of one sample at a time."""
        for a, g in zip(inputs, grads, strict=True):
            product = g.t() @ a
            fisher.addcmul_(product, product)

    def bmm() -> None:
        """Accumulate the squared gradients of one batched product."""
        fisher.add_(torch.bmm(grads.transpose(1, 2), inputs).square_().sum(0))

    return {
        "ftfast per_sample_fisher_": lambda: per_sample_fisher_(fisher, inputs, grads),
        "loop of matmul and addcmul": loop,
        "bmm, square, sum": bmm,
        "plain weight gradient (no Fisher)": lambda: grads.flatten(0, 1).t() @ inputs.flatten(0, 1),
    }


def backpack_cases(device: str, smoke: bool) -> Table:
    """One linear layer on 4 samples of 77 tokens beside BackPACK, where it is installed.

    Its formula for layers with a sequence axis holds samples x tokens x inputs x outputs numbers: hence few samples.
    """
    import backpack
    from backpack.extensions import SumGradSquared

    n, t, i, o = (2, 7, 64, 32) if smoke else (4, 77, 2048, 512)
    torch.manual_seed(0)
    inputs, fisher = torch.randn(n, t, i, device=device), torch.zeros(o, i, device=device)
    layer = backpack.extend(nn.Linear(i, o, bias=False).to(device))
    loss_layer = backpack.extend(nn.Flatten())

    def by_backpack() -> Tensor:
        """Forward, backward and BackPACK's sum of squared gradients."""
        layer.zero_grad()
        with backpack.backpack(SumGradSquared()):
            loss_layer(layer(inputs)).square().sum().backward()
        squares: Tensor = layer.weight.sum_grad_squared
        return squares

    def captured() -> None:
        """Forward and backward with our sum in place of the weight's gradient."""
        outputs = layer(inputs)
        per_sample_fisher_(fisher, inputs, 2.0 * outputs.detach())

    return {"ftfast per_sample_fisher_": captured, "BackPACK SumGradSquared": by_backpack}


def tower_cases(device: str, smoke: bool) -> Table:
    """Exact Fisher of a ViT-B/32 image tower on 32 images beside an ordinary forward and backward pass."""
    import open_clip
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(image_size=224, layers=1 if smoke else 12, width=768, patch_size=32)
    visual = open_clip.model._build_vision_tower(512, vision).to(device)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = visual

        def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
            """Return the normalised image features."""
            return nn.functional.normalize(self.visual(images), dim=-1)

    model = Tower().eval()
    count = 2 if smoke else 32
    images, labels = torch.randn(count, 3, 224, 224, device=device), torch.arange(count, device=device) % 10
    loss = ClassificationObjective(torch.nn.functional.normalize(torch.randn(10, 512, device=device), dim=-1), 100.0)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def ordinary() -> None:
        """Run an ordinary forward and backward pass."""
        model.zero_grad()
        loss(model, (images, labels), None).mean().backward()

    def captured() -> Any:
        """Estimate the exact Fisher by per-sample capture."""
        return estimate_fisher(model, [(images, labels)], loss=loss)

    def one_loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        """Return the loss of one sample for given parameter values."""
        feature = functional_call(visual, {name[len("visual.") :]: v for name, v in values.items()}, (image[None],))
        logits = 100.0 * nn.functional.normalize(feature, dim=-1) @ loss.class_features.t()
        return nn.functional.cross_entropy(logits, label[None])

    per_sample = vmap(grad(one_loss), in_dims=(None, 0, 0), chunk_size=8)

    def with_vmap() -> list[Tensor]:
        """Return the mean squared per-sample gradients from vmap."""
        return [g.square().mean(0) for g in per_sample(parameters, images, labels).values()]

    def batch_of_one() -> None:
        """Estimate the Fisher one sample at a time."""
        options = FisherOptions(method="loop")
        estimate_fisher(
            model, [(images[i : i + 1], labels[i : i + 1]) for i in range(count)], loss=loss, options=options
        )

    return {
        "ftfast estimate_fisher (exact)": captured,
        "ordinary forward + backward": ordinary,
        "torch.func vmap per-sample gradients": with_vmap,
        "batch-size-1 loop": batch_of_one,
    }

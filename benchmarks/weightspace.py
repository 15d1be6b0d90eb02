"""Weight-space operations beside what people use: penalty, Fisher accumulation, the anchored step, exact Fisher.

Peers: the penalty written in autograd operations (as Avalanche's EWC does), PyTorch's foreach operations, PyTorch's
fused AdamW (which has no anchor), one backward pass per sample, and ``torch.func`` per-sample gradients. All
implementations of a case are timed by turns in one process; read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ftfast.kernels.anchor_ops import AdamWHyper, Anchors, adamw_anchored_, anchor_penalty
from ftfast.kernels.fisher_ops import accumulate_fisher_, per_sample_fisher_
from torch import Tensor, nn

from benchmarks.harness import format_table, interleave, peak_memory, write_result
from ftfast.weightspace import ClassificationObjective, FisherOptions, estimate_fisher

COLUMNS = ["case", "method", "median_ms", "best_ms", "gb_per_s", "of_bandwidth", "times", "extra_mb"]
Table = dict[str, Callable[[], Any]]


def shapes_of(parameters: float, width: int = 1024) -> list[tuple[int, ...]]:
    """Shapes of a transformer of about this many parameters: matrices, and many small vectors between them."""
    block: list[tuple[int, ...]] = [
        (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
        (4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,),
    ]  # fmt: skip
    return block * max(1, round(parameters / (12 * width * width)))


def make_list(shapes: list[tuple[int, ...]], seed: int, device: str) -> list[Tensor]:
    """Random tensors of these shapes."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return [torch.rand(shape, generator=generator, device=device) for shape in shapes]


def bandwidth(device: str) -> Callable[[], Any]:
    """A copy of 1 GB (read and write 2 GB), the yardstick of bandwidth."""
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


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
    starts, fishers = make_list(shapes, 1, device), make_list(shapes, 2, device)
    state = [make_list(shapes, seed, device) for seed in range(3, 7)]
    hyper = AdamWHyper(lr=1e-5, step=3)
    anchors = Anchors(starts, fishers, [0.5] * len(shapes))
    twins = []
    for fused in (True, False):
        params = [nn.Parameter(t) for t in make_list(shapes, 0, device)]
        for p in params:
            p.grad = torch.full_like(p, 0.1)
        twins.append((params, torch.optim.AdamW(params, lr=1e-5, fused=fused, foreach=not fused)))

    def with_autograd() -> None:
        """Differentiate the penalty by autograd, then take a fused AdamW step."""
        params, optimizer = twins[0]
        autograd_penalty(params, starts, fishers, 0.5).backward()
        optimizer.step()

    table: Table = {
        "ftfast adamw_anchored_": lambda: adamw_anchored_(state[0], state[1], state[2], state[3], hyper, anchors),
        "torch AdamW fused (no anchor)": twins[0][1].step,
        "torch AdamW foreach (no anchor)": twins[1][1].step,
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


def measure(case: str, table: Table, moved: int | None, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one case: times by turns, then memory, then the ratio of each method to the first (ours)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extra = {"copy of 1 GB": bandwidth(device)} if moved else {}
    timings = interleave({**table, **extra}, repeats=repeats, device=device, seconds=seconds)
    rows = []
    copied = 2 * 2**30 / timings["copy of 1 GB"].median_ms / 1e6 if moved else None
    ours = timings[next(iter(table))]
    for name, timing in timings.items():
        rate = None
        if moved is not None and (name.startswith("ftfast") or name == "copy of 1 GB"):
            rate = (moved if name in table else 2 * 2**30) / timing.median_ms / 1e6
        row = {
            "case": case,
            "method": name,
            **timing.as_dict(),
            "gb_per_s": rate,
            "of_bandwidth": rate / copied if rate is not None and copied is not None else None,
            "times": timing.median_ms / ours.median_ms if name in table else None,
            "extra_mb": peak_memory(table[name], device) / 2**20 if name in table else None,
        }
        rows.append(row)
    print(format_table(rows, COLUMNS), flush=True)
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and write ``results/weightspace_<device>.json``.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks weightspace", description=__doc__)
    parser.add_argument("--parameters", type=float, default=140e6, help="size of the model for the list operations")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per case")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop a case after the round that passes this")
    parser.add_argument("--only", default="", help="penalty, step, accumulate, linear or tower")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = shapes_of(2e5, 64) if options.smoke else shapes_of(options.parameters)
    makers: dict[str, Callable[[], tuple[Table, int | None]]] = {
        "penalty": lambda: penalty_cases(shapes, device),
        "step": lambda: step_cases(shapes, device),
        "accumulate": lambda: accumulate_cases(shapes, device),
        "linear": lambda: (linear_cases(device, options.smoke), None),
        "tower": lambda: (tower_cases(device, options.smoke), None),
    }
    rows = []
    for case, make in makers.items():
        if options.only in ("", case):
            table, moved = make()
            rows += measure(case, table, moved, options.repeats, options.seconds)
    if not options.smoke and not options.only:
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"written: {write_result('weightspace', {'parameters': parameters, 'rows': rows}, device)}")
    return 0

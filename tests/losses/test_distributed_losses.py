"""Losses over several processes (gloo) against open_clip's in the same processes and against one process."""

from __future__ import annotations

import importlib.util
import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from ftfast.errors import ConfigError, ShapeError
from ftfast.losses import ClipLoss, DistillClipLoss, SigLipLoss, SimilarityDistillLoss

# open_clip's loss.py alone: importing the whole package would cost every process several seconds.
_package = importlib.util.find_spec("open_clip").submodule_search_locations[0]
_spec = importlib.util.spec_from_file_location("open_clip_loss", Path(_package) / "loss.py")
stock = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stock)

ROWS, WIDTH, TEACHER_WIDTH, PEAK_ROWS = 5, 12, 7, 512
MODES = list(itertools.product((False, True), (False, True)))
EXCHANGES = ("bidir", "shift", "reduce", "gather")
GRAD_OUTPUT = 0.37
KINDS = ("forward_kl", "reverse_kl", "soft_cross_entropy")


def global_features(world_size, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(world_size * ROWS, width, generator=generator), dim=1).to(dtype)


def shard(features, rank):
    return features[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_()


def run_loss(loss, rank, world_size, *, bias=None, teacher=False, dtype=torch.float32, weight=GRAD_OUTPUT):
    """Values and gradients of this process: image, text, logit_scale, logit_bias."""
    image = shard(global_features(world_size, WIDTH, 1, dtype), rank)
    text = shard(global_features(world_size, WIDTH, 2, dtype), rank)
    scale = torch.tensor(20.0, requires_grad=True)
    inputs, leaves = [image, text, scale], [image, text, scale]
    if bias is not None:
        leaves.append(torch.tensor(bias, requires_grad=True))
        inputs.append(leaves[-1])
    if teacher:
        inputs += [shard(global_features(world_size, TEACHER_WIDTH, seed), rank).detach() for seed in (3, 4)]
        inputs.append(torch.tensor(30.0))
    outputs = loss(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(outputs[1:], outputs[0]).mul(weight).backward()
    return [output.detach().float() for output in outputs], [leaf.grad for leaf in leaves]


def similarity_loss(kind, **options):
    """SimilarityDistillLoss in the argument order of DistillClipLoss."""
    loss = SimilarityDistillLoss(kind, temperature=2.0, **options)
    return lambda image, text, scale, *teacher: loss(image, text, *teacher[:2], scale, teacher[2])


def peak_distill(place):
    """DistillClipLoss around the ring as a function of image, text, scale and bias, for peak_bytes."""
    loss = DistillClipLoss(ring=True, **place)
    return lambda image, text, scale, bias: sum(loss(image, text, scale, text.detach(), image.detach(), scale.detach()))


def ddp_gradients(loss, rank, world_size):
    """Parameter gradients of two towers under DDP."""
    torch.manual_seed(0)
    towers = nn.ModuleDict({"image": nn.Linear(WIDTH, 8), "text": nn.Linear(WIDTH, 8)})
    towers.logit_scale = nn.Parameter(torch.tensor(2.0))
    towers.logit_bias = nn.Parameter(torch.tensor(-1.0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, image, text):
            image = F.normalize(self.towers["image"](image), dim=1)
            text = F.normalize(self.towers["text"](text), dim=1)
            return image, text, self.towers.logit_scale.exp(), self.towers.logit_bias

    model = Model()
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
        image, text = (shard(global_features(world_size, WIDTH, seed), rank).detach() for seed in (1, 2))
    else:
        image, text = (global_features(rank, WIDTH, seed) for seed in (1, 2))  # rank stands for the processes
    loss(*model(image, text)).backward()
    return [parameter.grad for parameter in towers.parameters()]


def peak_bytes(loss, rows):
    """Most tensor memory held at once during forward and backward, counted by the allocator's profiler events."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    features = [torch.randn(rows, 32, generator=generator).requires_grad_() for _ in range(2)]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        loss(*features, torch.tensor(1.0), torch.tensor(0.0)).backward()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    place = {"rank": rank, "world_size": world_size}
    results = {}
    for local_loss, gather_with_grad in MODES:
        mode = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, **place}
        for name, package in (("ours", None), ("theirs", stock)):
            clip = (package.ClipLoss if package else ClipLoss)(**mode)
            distill = (package.DistillClipLoss if package else DistillClipLoss)(**mode)
            key = (name, local_loss, gather_with_grad)
            results[("clip", *key)] = run_loss(clip, rank, world_size, bias=-3.0)
            results[("distill", *key)] = run_loss(distill, rank, world_size, teacher=True)
    for exchange in EXCHANGES:
        for name, package in (("ours", None), ("theirs", stock)):
            loss = (package.SigLipLoss if package else SigLipLoss)(dist_impl=exchange, **place)
            results["siglip", name, exchange] = run_loss(loss, rank, world_size, bias=-3.0)
            # Weights that differ between processes check that gradients travel with the right factor.
            results["siglip uneven", name, exchange] = run_loss(loss, rank, world_size, bias=-3.0, weight=1.0 + rank)
    ring = ClipLoss(ring=True, **place)
    results["ring"] = run_loss(ring, rank, world_size, bias=-3.0)
    results["ring uneven"] = run_loss(ring, rank, world_size, weight=1.0 + rank)
    clip_gathered = ClipLoss(gather_with_grad=True, **place)
    results["gathered uneven"] = run_loss(clip_gathered, rank, world_size, weight=1.0 + rank)
    distill = DistillClipLoss(ring=True, **place)
    results["ring distill"] = run_loss(distill, rank, world_size, teacher=True)
    results["ring distill uneven"] = run_loss(distill, rank, world_size, teacher=True, weight=1.0 + rank)
    gathered = DistillClipLoss(gather_with_grad=True, **place)
    results["gathered distill uneven"] = run_loss(gathered, rank, world_size, teacher=True, weight=1.0 + rank)
    for kind in KINDS:
        results["ring", kind] = run_loss(similarity_loss(kind, ring=True), rank, world_size, teacher=True)
    results["ring bfloat16"] = run_loss(ring, rank, world_size, dtype=torch.bfloat16, weight=1.0)
    for name, loss in (
        ("ring", ring),
        ("local", ClipLoss(local_loss=True, gather_with_grad=True, **place)),
        ("global", clip_gathered),
        ("siglip", SigLipLoss(**place)),
    ):
        results["ddp", name] = ddp_gradients(loss, rank, world_size)
    for name, loss in (
        ("ring", ring),
        ("siglip", SigLipLoss(dist_impl="shift", **place)),
        ("distill", peak_distill(place)),
    ):
        peak_bytes(loss, 64)
        results["peak", name] = peak_bytes(loss, PEAK_ROWS)
    with pytest.raises(ConfigError, match="get_world_size"):
        ClipLoss(rank=0, world_size=world_size + 1)(*torch.ones(2, 3, 4), 1.0)
    with pytest.raises(ShapeError, match="ring"):
        ring(torch.ones(3, 4), torch.ones(2, 4), 1.0)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    """(world_size, per-process results), from one start of the processes."""
    world_size = request.param
    folder = tmp_path_factory.mktemp(f"world{world_size}")
    context = mp.spawn(worker, (world_size, str(folder)), nprocs=world_size, join=False)
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes did not finish within 240 s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return world_size, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def assert_same(ours, theirs):
    for our_values, their_values in zip(ours, theirs, strict=True):
        for our_value, their_value in zip(our_values, their_values, strict=True):
            if their_value is None:
                assert our_value is None or not our_value.any()
                continue
            assert our_value.dtype == their_value.dtype
            torch.testing.assert_close(our_value, their_value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["clip", "distill"])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), MODES)
def test_gather_modes_equal_open_clip(processes, kind, local_loss, gather_with_grad):
    for results in processes[1]:
        key = (local_loss, gather_with_grad)
        assert_same(results[(kind, "ours", *key)], results[(kind, "theirs", *key)])


@pytest.mark.parametrize("case", ["siglip", "siglip uneven"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_siglip_exchanges_equal_open_clip(processes, case, exchange):
    for results in processes[1]:
        assert_same(results[case, "ours", exchange], results[case, "theirs", exchange])


def single_process_truth(world_size, dtype=torch.float32):
    """Loss and gradients over all rows in float64, written out."""
    image, text = (global_features(world_size, WIDTH, seed, dtype).double().requires_grad_() for seed in (1, 2))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    logits = scale * image @ text.T
    pairs = logits.diagonal()
    loss = 0.5 * ((logits.logsumexp(1) - pairs).mean() + (logits.logsumexp(0) - pairs).mean())
    loss.backward()
    return loss.detach(), image.grad, text.grad, scale.grad


def test_ring_equals_the_single_process_loss(processes):
    world_size, everybody = processes
    loss, image, text, scale = single_process_truth(world_size)
    for rank, results in enumerate(everybody):
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        (value,), gradients = results["ring"]
        torch.testing.assert_close(value.double(), loss, rtol=2e-6, atol=0)
        # As after gathering with gradients, every process's (equal) loss sends its gradient: DDP's mean undoes W.
        for ours, truth in zip(gradients[:2], (image[rows], text[rows]), strict=True):
            torch.testing.assert_close(ours.double(), GRAD_OUTPUT * world_size * truth, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradients[2].double(), GRAD_OUTPUT * scale, rtol=1e-5, atol=1e-8)
        assert gradients[3].item() == 0


def test_ring_sends_gradients_like_gathering(processes):
    for results in processes[1]:
        assert_same(results["ring uneven"], results["gathered uneven"])


@pytest.mark.parametrize("loss", ["ring distill", *KINDS])
def test_ring_distillation_equals_the_single_process_loss(processes, loss):
    """Against one process in float64, whose values the kernels' own tests hold to the dense formulas."""
    world_size, everybody = processes
    leaves = [global_features(world_size, WIDTH, seed).double().requires_grad_() for seed in (1, 2)]
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    teacher = [global_features(world_size, TEACHER_WIDTH, seed).double() for seed in (3, 4)]
    module = DistillClipLoss(backend="torch") if loss == "ring distill" else similarity_loss(loss, backend="reference")
    truth = module(*leaves, scale, *teacher, torch.tensor(30.0, dtype=torch.float64))
    truth = truth if isinstance(truth, tuple) else (truth,)
    sum(truth).backward()
    for rank, results in enumerate(everybody):
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        values, gradients = results[loss] if loss == "ring distill" else results["ring", loss]
        for value, true in zip(values, truth, strict=True):
            torch.testing.assert_close(value.double(), true, rtol=2e-6, atol=0)
        for ours, leaf in zip(gradients[:2], leaves, strict=True):
            expected = GRAD_OUTPUT * world_size * leaf.grad[rows]
            # Reverse KL multiplies a probability by a log-ratio near 15, whose float32 rounding is 1e-6.
            torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=4e-6 * expected.abs().max().item())
        torch.testing.assert_close(gradients[2].double(), GRAD_OUTPUT * scale.grad, rtol=1e-5, atol=1e-7)


def test_ring_distillation_sends_gradients_like_gathering(processes):
    for results in processes[1]:
        assert_same(results["ring distill uneven"], results["gathered distill uneven"])


def test_ring_in_bfloat16(processes):
    world_size, everybody = processes
    loss, image, text, _ = single_process_truth(world_size, torch.bfloat16)
    for rank, results in enumerate(everybody):
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        (value,), gradients = results["ring bfloat16"]
        assert gradients[0].dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), loss, rtol=5e-3, atol=0)
        for ours, truth in zip(gradients[:2], (image[rows], text[rows]), strict=True):
            assert (ours.double() - world_size * truth).norm() < 2e-2 * (world_size * truth).norm()


def global_siglip(image, text, scale, bias):
    return SigLipLoss()(image, text, scale, bias)


@pytest.mark.parametrize("name", ["ring", "local", "global", "siglip"])
def test_ddp_gradients_equal_one_process(processes, name):
    world_size, everybody = processes
    truth = ddp_gradients(global_siglip if name == "siglip" else ClipLoss(), world_size, 1)
    for results in everybody:
        for ours, expected in zip(results["ddp", name], truth, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


def test_ring_memory_does_not_grow_with_processes(processes):
    _, everybody = processes
    features, tile = PEAK_ROWS * 32 * 4, PEAK_ROWS**2 * 4
    for results in everybody:
        for name, tiles in (("ring", 6), ("siglip", 6), ("distill", 10)):
            # Tensors of the size of this process's features and a few tiles, for any number of processes.
            assert results["peak", name] < 24 * features + tiles * tile, name


def test_missing_process_group_is_one_clear_error():
    features = torch.ones(2, 3)
    for loss in (ClipLoss(world_size=2), SigLipLoss(world_size=2), ClipLoss(world_size=2, ring=True)):
        with pytest.raises(ConfigError, match="init_process_group"):
            loss(features, features, 1.0, 0.0)
    with pytest.raises(ConfigError, match="init_process_group"):
        SimilarityDistillLoss(ring=True)(features, features, features, features, 1.0)


def test_unsupported_choices_are_refused():
    with pytest.raises(ConfigError, match="torchrun"):
        ClipLoss(use_horovod=True, world_size=2)
    with pytest.raises(ConfigError, match="directions='image'"):
        SimilarityDistillLoss(ring=True, directions="image")
    with pytest.raises(ConfigError, match="'bidir'"):
        SigLipLoss(dist_impl="telepathy")

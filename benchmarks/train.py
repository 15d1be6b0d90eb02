"""A training step in its parts: data, towers, loss, backward, communication, optimizer; stock losses beside ours.

``python -m benchmarks train --model tiny-clip-v1 --batch 64 --ranks 1 2``. Both losses train the same model by turns in
one process, so a disturbance of the machine meets both. Model FLOP utilisation is told on GPUs only.

``--zero N`` takes the step through DeepSpeed, which exchanges gradients inside the backward pass and weights inside the
optimizer's step, so communication has no column of its own then. ``--largest`` doubles the batch until memory ends, on
a GPU, for each loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.harness import environment, format_table, interleave_stages, peak_memory, write_result
from benchmarks.ranks import build_engine, in_processes, report
from ftfast.config.schema import DataConfig, ModelConfig, Precision
from ftfast.data import make_loader, open_dataset
from ftfast.data.samplers import LoaderOptions
from ftfast.engine.processes import Processes, join_processes, leave_processes
from ftfast.engine.torch_engine import Engine, TorchEngine
from ftfast.losses import ClipLoss
from ftfast.models import LoadedModel, load_model

RANDOM = "random"
"""Value of --data for random images and tokens."""
MOST = 1 << 18
"""Largest batch that --largest tries."""
STAGES = ("data", "towers", "loss", "backward", "communication", "optimizer")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bf16 TFLOP/s of tensor cores by a word of the device's name."""
COLUMNS = ["ranks", "zero", "loss", *STAGES, "step_ms", "samples_per_s", "tflops", "mfu", "peak_mib"]


@dataclass
class Step:
    """One training step in stages, for :func:`benchmarks.harness.interleave_stages`.

    Attributes:
        engine: Owns model and optimizer.
        batches: Endless batches of images and tokens.
        loss: Image features, text features and scale to a scalar.
    """

    engine: Engine
    batches: Iterator[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def stages(self) -> list[Callable[[Any], Any]]:
        """Return the stages in order; each takes the result of the one before it."""
        engine = self.engine

        def communicate(_: Any) -> None:
            """Average the gradients; DeepSpeed has done so in its backward pass."""
            if isinstance(engine, TorchEngine):
                engine.processes.average_gradients([p for group in engine.groups for p in group["params"]])

        def optimize(_: Any) -> None:
            """Take the optimizer's step alone."""
            together = engine.processes
            if isinstance(engine, TorchEngine):
                engine.processes = Processes()  # gradients are averaged already
            engine.step(1.0)
            engine.processes = together

        return [
            lambda _: next(self.batches),
            lambda batch: engine.forward(*batch),
            lambda features: self.loss(*features),
            engine.backward,
            communicate,
            optimize,
        ]

    def run(self) -> None:
        """Take a whole step."""
        result: Any = None
        for stage in self.stages():
            result = stage(result)


def endless(loaded: LoadedModel, options: argparse.Namespace, processes: Processes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, tokens) on the model's device, loaded as training loads them, or random and made once."""
    device = next(loaded.model.parameters()).device
    if options.data == RANDOM:
        context = int(loaded.model_config["text_cfg"]["context_length"])
        images = torch.randn(options.batch, 3, loaded.image_size, loaded.image_size, device=device)
        tokens = torch.randint(1, 1000, (options.batch, context), device=device)
        while True:
            yield images, tokens
    dataset = open_dataset(DataConfig(path=options.data))
    places = LoaderOptions(rank=processes.rank, world_size=processes.world_size)
    transform = loaded.train_transform
    loader = make_loader(dataset, transform, batch_size=options.batch, workers=options.workers, options=places)
    for part in loader:
        part = part.to(device)
        tokens = loaded.tokenizer([text or "" for text in part.texts or [""] * options.batch])
        yield part.images, tokens.to(device)


def losses(processes: Processes) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Our loss and open_clip's, over the batch of all processes."""
    from open_clip.loss import ClipLoss as StockLoss

    several = {"rank": processes.rank, "world_size": processes.world_size}
    return {
        "ftfast": ClipLoss(**several, local_loss=True, gather_with_grad=True),
        "open_clip": StockLoss(**several, local_loss=True, gather_with_grad=True),
    }


def measure(options: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """Time the step of both losses in this process, one of several.

    Args:
        options: Command line.
        processes: This process among the others.

    Returns:
        One row per loss.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, engine = start(options, processes, device)
    batches = endless(loaded, options, processes)
    steps = {name: Step(engine, batches, loss) for name, loss in losses(processes).items()}
    flops = step_flops(next(iter(steps.values())))
    timings = interleave_stages(
        {name: step.stages() for name, step in steps.items()}, repeats=options.repeats, warmup=1, device=device
    )
    rows = []
    for name, parts in timings.items():
        whole = parts[-1].median_ms
        images = options.batch * processes.world_size
        row: dict[str, Any] = {"ranks": processes.world_size, "zero": options.zero, "loss": name}
        row["batch"] = options.batch
        row |= {stage: part.median_ms for stage, part in zip(STAGES, parts, strict=False)}
        row |= {"step_ms": whole, "samples_per_s": 1e3 * images / whole, "tflops": flops / whole / 1e9}
        row |= {"mfu": utilisation(row["tflops"], device), "timings": [asdict(part) for part in parts]}
        row["peak_mib"] = peak_memory(steps[name].run, device) / 2**20
        rows.append(row)
    if options.trace and processes.main:
        trace(steps["ftfast"], Path(options.trace))
    return rows


def start(options: argparse.Namespace, processes: Processes, device: torch.device) -> tuple[LoadedModel, Engine]:
    """Load the model and build the engine that trains it."""
    model = ModelConfig(
        name=options.model, pretrained=options.pretrained, grad_checkpointing=options.grad_checkpointing
    )
    loaded = load_model(model, device)
    wanted = {"zero": options.zero, "batch": options.batch, "precision": options.precision}
    return loaded, build_engine(loaded, processes, device, **wanted)


def largest(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Double the batch from ``options.batch`` until a step does not fit the GPU, for each loss.

    Args:
        options: Command line.
        device: A CUDA device.

    Returns:
        One row per loss: the largest batch of the doublings that took a step, its time, and the one that failed.
    """
    processes = Processes()
    if options.zero is not None:
        processes = join_processes("auto", 600.0, True)
    loaded, engine = start(options, processes, device)
    rows = []
    for name, loss in losses(processes).items():
        batch, row = options.batch, {"loss": name, "zero": options.zero, "largest_batch": 0, "fails_at": None}
        while batch <= MOST:
            sized = argparse.Namespace(**{**vars(options), "batch": batch, "data": RANDOM})
            try:
                step = Step(engine, endless(loaded, sized, processes), loss)
                timing = interleave_stages({name: step.stages()}, repeats=3, warmup=1, device=device)[name][-1]
                peak = torch.cuda.max_memory_allocated(device) / 2**20
            except torch.OutOfMemoryError:
                row["fails_at"] = batch
                break
            row |= {"largest_batch": batch, "step_ms": timing.median_ms, "peak_mib": peak}
            row["samples_per_s"] = 1e3 * batch / timing.median_ms
            batch *= 2
        engine.module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        rows.append(row)
    leave_processes()
    return rows


def step_flops(step: Step) -> float:
    """Count the floating-point operations of one step of one process (matrix products and convolutions)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step.run()
    return float(counter.get_total_flops())


def utilisation(tflops: float, device: torch.device) -> float | None:
    """Return the share of the device's peak; None on a CPU or an unknown device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((value for word, value in PEAK_TFLOPS.items() if word in name), None)
    return None if peak is None else tflops / peak


def trace(step: Step, path: Path) -> None:
    """Write a torch.profiler trace of one step for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step.run()
    profiler.export_chrome_trace(str(path))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    made.add_argument("--model", default="tiny-clip-v1", help="open_clip name, built-in or local-dir folder")
    made.add_argument("--pretrained", default="", help="open_clip tag or file")
    made.add_argument("--data", default="builtin:pairs/train", help=f"pairs, as data.path, or '{RANDOM}'")
    made.add_argument("--batch", type=int, default=64, help="pairs per process")
    made.add_argument("--workers", type=int, default=0, help="data loading processes")
    made.add_argument("--precision", default="fp32", choices=get_args(Precision), help="train.precision")
    made.add_argument("--zero", type=int, choices=range(4), help="take the step through DeepSpeed at this ZeRO stage")
    made.add_argument("--grad-checkpointing", action="store_true", help="model.grad_checkpointing")
    made.add_argument("--largest", action="store_true", help="find the largest batch from --batch on by doubling (GPU)")
    made.add_argument("--name", default="train", help="name of the record")
    made.add_argument("--repeats", type=int, default=7, help="rounds that count")
    made.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of processes to compare")
    made.add_argument("--trace", default="", help="write a torch.profiler trace of one step here")
    made.add_argument("--smoke", action="store_true", help="few rounds, nothing is written")
    made.add_argument("--child", default="", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and write ``results/train_<device>.json``.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    options = parser().parse_args(argv)
    if options.smoke:
        options.batch, options.repeats = min(options.batch, 8), 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.child:
        processes = join_processes("auto", 600.0, True)
        report(options.child, processes, measure(options, processes))
        leave_processes()
        return 0
    if options.largest and device == "cpu":
        print("--largest fills the memory of a GPU, and there is none here.", file=sys.stderr)
        return 2
    table: list[dict[str, Any]] = []
    for ranks in options.ranks:
        alone = ranks == 1 and options.zero is None
        table += measure(options, Processes()) if alone else in_processes("train", argv, ranks)[0]
    print(format_table(table, COLUMNS))
    chosen: dict[str, Any] = {"model": options.model, "batch": options.batch, "precision": options.precision}
    if options.largest:
        chosen["largest"] = largest(options, torch.device("cuda"))
        print(format_table(chosen["largest"], ["loss", "zero", "largest_batch", "fails_at", "step_ms", "peak_mib"]))
    if not options.smoke:
        print(write_result(options.name, {**chosen, "rows": table, "environment": environment(device)}, device))
    return 0

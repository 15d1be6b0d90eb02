"""A training step in its parts: data, towers, loss, backward, communication, optimizer; stock losses beside ours.

``python -m benchmarks train --model tiny-clip-v1 --batch 64 --ranks 1 2``. Both losses train the same model by turns in
one process, so a disturbance of the machine meets both. Model FLOP utilisation is told on GPUs only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, format_table, interleave_stages, peak_memory, write_result
from ftfast.config.schema import DataConfig, ModelConfig, OptimConfig
from ftfast.data import make_loader, open_dataset
from ftfast.data.samplers import LoaderOptions
from ftfast.engine.processes import Processes, free_port, join_processes, leave_processes
from ftfast.engine.torch_engine import TorchEngine, TunedModel
from ftfast.losses import ClipLoss
from ftfast.models import LoadedModel, load_model

STAGES = ("data", "towers", "loss", "backward", "communication", "optimizer")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bf16 TFLOP/s of tensor cores by a word of the device's name."""
COLUMNS = ["ranks", "loss", *STAGES, "step_ms", "samples_per_s", "tflops", "mfu", "peak_mib"]


@dataclass
class Step:
    """One training step in stages, for :func:`benchmarks.harness.interleave_stages`.

    Attributes:
        engine: Owns model and optimizer.
        batches: Endless batches of images and tokens.
        loss: Image features, text features and scale to a scalar.
    """

    engine: TorchEngine
    batches: Iterator[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def stages(self) -> list[Callable[[Any], Any]]:
        """Return the stages in order; each takes the result of the one before it."""
        engine = self.engine

        def communicate(_: Any) -> None:
            engine.processes.average_gradients([p for group in engine.optimizer.param_groups for p in group["params"]])

        def optimize(_: Any) -> None:
            alone, engine.processes = engine.processes, Processes()  # gradients are averaged already
            engine.step(1.0)
            engine.processes = alone

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


def endless(
    loaded: LoadedModel, source: str, batch: int, workers: int, processes: Processes
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, tokens) on the model's device, loaded as training loads them."""
    dataset = open_dataset(DataConfig(path=source))
    options = LoaderOptions(rank=processes.rank, world_size=processes.world_size)
    loader = make_loader(dataset, loaded.train_transform, batch_size=batch, workers=workers, options=options)
    device = next(loaded.model.parameters()).device
    for part in loader:
        part = part.to(device)
        tokens = loaded.tokenizer([text or "" for text in part.texts or [""] * batch])
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
    loaded = load_model(ModelConfig(name=options.model, pretrained=options.pretrained), device)
    module = TunedModel(loaded.model, torch.nn.ModuleDict())
    engine = TorchEngine(module, OptimConfig(lr=1e-6), options.precision, None, device, processes)
    batches = endless(loaded, options.data, options.batch, options.workers, processes)
    steps = {name: Step(engine, batches, loss) for name, loss in losses(processes).items()}
    flops = step_flops(next(iter(steps.values())))
    timings = interleave_stages(
        {name: step.stages() for name, step in steps.items()}, repeats=options.repeats, warmup=1, device=device
    )
    rows = []
    for name, parts in timings.items():
        whole = parts[-1].median_ms
        images = options.batch * processes.world_size
        row: dict[str, Any] = {"ranks": processes.world_size, "loss": name, "batch": options.batch}
        row |= {stage: part.median_ms for stage, part in zip(STAGES, parts, strict=False)}
        row |= {"step_ms": whole, "samples_per_s": 1e3 * images / whole, "tflops": flops / whole / 1e9}
        row |= {"mfu": utilisation(row["tflops"], device), "timings": [asdict(part) for part in parts]}
        row["peak_mib"] = peak_memory(steps[name].run, device) / 2**20
        rows.append(row)
    if options.trace and processes.main:
        trace(steps["ftfast"], Path(options.trace))
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


def in_processes(argv: Sequence[str], ranks: int, seconds: float) -> list[dict[str, Any]]:
    """Run this benchmark in several processes and return the rows of the first.

    Raises:
        RuntimeError: If one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, port = Path(folder) / "rows.json", str(free_port())
        running = []
        for rank in range(ranks):
            known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in known.items()}}
            command = [sys.executable, "-m", "benchmarks", "train", *argv, "--child", str(result)]
            running.append(subprocess.Popen(command, env=variables))
        end = time.monotonic() + seconds
        codes = [process.wait(timeout=max(1.0, end - time.monotonic())) for process in running]
        if any(codes):
            raise RuntimeError(f"the processes ended with exit codes {codes}")
        return json.loads(result.read_text())


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    made.add_argument("--model", default="tiny-clip-v1", help="open_clip name, built-in or local-dir folder")
    made.add_argument("--pretrained", default="", help="open_clip tag or file")
    made.add_argument("--data", default="builtin:pairs/train", help="pairs, as data.path")
    made.add_argument("--batch", type=int, default=64, help="pairs per process")
    made.add_argument("--workers", type=int, default=0, help="data loading processes")
    made.add_argument("--precision", default="fp32", choices=["fp32", "amp_bf16", "amp_fp16"], help="train.precision")
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
    if options.child:
        processes = join_processes("auto", 600.0)
        rows = measure(options, processes)
        if processes.main:
            Path(options.child).write_text(json.dumps(rows))
        leave_processes()
        return 0
    table: list[dict[str, Any]] = []
    for ranks in options.ranks:
        table += measure(options, Processes()) if ranks == 1 else in_processes(argv, ranks, 900.0)
    print(format_table(table, COLUMNS))
    if not options.smoke:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = {"model": options.model, "batch": options.batch, "precision": options.precision}
        print(write_result("train", {**chosen, "rows": table, "environment": environment(device)}, device))
    return 0

"""Memory of each process under ZeRO: bytes of weights, optimizer, anchor and importance, and the peak of a step.

``python -m benchmarks zero --ranks 2 4 --zero 3`` builds random models, so nothing is downloaded. The plan of
``ftfast plan`` stands beside every measurement.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, format_table, peak_memory, write_result
from benchmarks.ranks import build_engine, in_processes, report
from ftfast import memory_plan
from ftfast.engine.deepspeed_engine import DeepSpeedEngine
from ftfast.engine.processes import Processes, join_processes, leave_processes
from ftfast.engine.torch_engine import Engine
from ftfast.losses import ClipLoss
from ftfast.models import LoadedModel
from ftfast.weightspace import ewc

TOWER = {"context_length": 32, "vocab_size": 8192, "width": 256, "heads": 4, "layers": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 256,
        "vision_cfg": {"layers": 6, "width": 384, "head_width": 64, "patch_size": 8, "image_size": 64},
        "text_cfg": TOWER,
    },
    "resnet": {
        "embed_dim": 256,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64},
        "text_cfg": TOWER,
    },
    "text": {
        "embed_dim": 256,
        "vision_cfg": {"layers": 2, "width": 192, "head_width": 64, "patch_size": 16, "image_size": 64},
        "text_cfg": {**TOWER, "width": 384, "heads": 6, "layers": 8},
    },
    "100m": {
        "embed_dim": 512,
        "vision_cfg": {"layers": 12, "width": 640, "head_width": 64, "patch_size": 16, "image_size": 64},
        "text_cfg": {**TOWER, "vocab_size": 16384, "width": 512, "heads": 8, "layers": 8},
    },
    "300m": {
        "embed_dim": 768,
        "vision_cfg": {"layers": 18, "width": 1024, "head_width": 64, "patch_size": 16, "image_size": 64},
        "text_cfg": {**TOWER, "vocab_size": 16384, "width": 768, "heads": 12, "layers": 8},
    },
}
"""Random models: three small ones whose activations matter, and two of 100 and 300 million weights."""
COLUMNS = ["model", "ranks", "zero", "states_mib", "share", "planned_states", "peak_mib", "planned_peak", "ratio"]


def random_model(name: str, folder: str = "") -> LoadedModel:
    """Build a model with random weights, the same in every process.

    Args:
        name: One of ``MODELS``.
        folder: Where the processes of one machine share the weights as one mapped file; empty: weights of its own.
    """
    from open_clip.model import CLIP

    torch.manual_seed(0)
    settings = MODELS[name]
    model = CLIP(**copy.deepcopy(settings))
    if folder:
        file = Path(folder, f"{name}.pt")
        if not file.is_file():
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, mmap=True, weights_only=True), assign=True)
    preprocess = {"size": settings["vision_cfg"]["image_size"]}
    return LoadedModel(model, lambda x: x, lambda x: x, lambda x: torch.zeros(1), settings, preprocess, name)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def state_tensors(engine: Engine) -> list[Tensor]:
    """Weights, master weights, optimizer state, anchor and importance of this process."""
    found: list[Tensor] = []
    for parameter in engine.module.parameters():
        found += [parameter.data, *([parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else [])]
    if isinstance(engine, DeepSpeedEngine):
        found += engine.shards.tensors
    optimizer: torch.optim.Optimizer = engine.optimizer  # type: ignore[attr-defined]
    for state in optimizer.state.values():
        found += [value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0]
    return found


def make_engine(loaded: LoadedModel, zero: int | None, batch: int, precision: str, processes: Processes) -> Engine:
    """Build an engine with an EWC anchor on all weights."""
    parameters = list(loaded.model.named_parameters())
    importance = {n: torch.ones(()).expand(p.shape) for n, p in parameters}  # takes no memory until it is divided
    # ZeRO cuts the anchor to its shards before the first step, so it may look at the start weights themselves.
    start = None if zero in (None, 0) else {n: p.detach() for n, p in parameters}
    anchor = ewc(parameters, importance, 1.0, start)
    device = torch.device("cpu")
    return build_engine(loaded, processes, device, zero=zero, batch=batch, precision=precision, anchor=anchor)


def measure(name: str, zero: int | None, options: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Measure one model at one stage in this process.

    Args:
        name: One of ``MODELS``.
        zero: ZeRO stage; None: no DeepSpeed.
        options: Batch, precision and whether steps are taken.
        processes: This process among the others.

    Returns:
        A row of the table.
    """
    loaded = processes.in_turn(lambda: random_model(name, options.child))
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    engine = make_engine(loaded, zero, options.batch, options.precision, processes)
    optimizer: Any = engine.optimizer  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        for tensor in group["params"] if not isinstance(engine, DeepSpeedEngine) else engine.shards.tensors:
            optimizer.state_of(tensor)
    states = held(state_tensors(engine))
    settings = MODELS[name]
    size, context = settings["vision_cfg"]["image_size"], settings["text_cfg"]["context_length"]
    loss = ClipLoss(rank=processes.rank, world_size=processes.world_size, local_loss=True, gather_with_grad=True)

    def steps() -> None:
        """Take two steps, the second with everything a first one leaves behind."""
        for number in range(2):
            images = torch.randn(options.batch, 3, size, size)
            tokens = torch.randint(1, 100, (options.batch, context))
            engine.backward(loss(*engine.forward(images, tokens)))
            del images
            engine.step(float(number))

    peak = states + peak_memory(steps) if options.steps else 0
    job = memory_plan.Job(
        model=name, batch=options.batch, zero=zero, gpus=processes.world_size, recipe="ewc-online",
        precision=options.precision,
    )  # fmt: skip
    planned = memory_plan.plan(job, settings)
    width = 2 if options.precision.startswith("pure_") else 4
    whole = count * (width + 4 * (width == 2) + 16)
    return {
        "model": name,
        "ranks": processes.world_size,
        "zero": zero,
        "states_mib": states / 2**20,
        "share": states / whole,
        "planned_states": planned.states / 2**20,
        "peak_mib": peak / 2**20,
        "planned_peak": planned.total / 2**20,
        "ratio": planned.total / peak if peak else None,
    }


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and write ``results/NAME_cpu.json``.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks zero", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit", "resnet", "text"], choices=list(MODELS), help="models")
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 3], help="stages")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of processes")
    parser.add_argument("--batch", type=int, default=32, help="pairs per process")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "pure_bf16"], help="train.precision")
    parser.add_argument("--no-steps", dest="steps", action="store_false", help="measure states, take no step")
    parser.add_argument("--name", default="zero", help="name of the record")
    parser.add_argument("--smoke", action="store_true", help="nothing is written")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        processes = join_processes("cpu", 600.0, True)
        rows = [measure(name, zero, options, processes) for name in options.models for zero in options.zero]
        report(options.child, processes, rows)
        leave_processes()
        return 0
    table = [
        max(same, key=lambda row: row["states_mib"])
        for ranks in options.ranks
        for same in zip(*in_processes("zero", argv, ranks), strict=True)
    ]
    print(format_table(table, COLUMNS))
    if not options.smoke:
        print(write_result(options.name, {"rows": table, "environment": environment("cpu")}))
    return 0

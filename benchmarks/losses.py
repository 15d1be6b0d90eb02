"""Similarity losses: time of forward, backward and both, peak memory, and error against float64.

All implementations of a loss run in one process by turns, so ratios are meaningful on a busy machine. Memory is the
peak beyond the inputs during forward and backward, gradients of the inputs included.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peers import implementations
from benchmarks.registry import OPERATIONS, Implementation, Inputs, Operation

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = [
    "op",
    "who",
    "N",
    "forward ms",
    "backward ms",
    "both ms",
    "speed-up",
    "by CPU",
    "MiB",
    "memory",
    "loss err",
    "grad err",
]


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks losses", description=__doc__)
    parser.add_argument("--op", nargs="+", default=list(OPERATIONS), choices=list(OPERATIONS), help="losses to measure")
    parser.add_argument("--rows", nargs="+", type=int, help="batch sizes N")
    parser.add_argument("--width", type=int, default=512, help="embedding width D")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of turns")
    parser.add_argument("--seconds", type=float, default=60, help="stop taking turns after this time per size")
    parser.add_argument("--error-rows", type=int, default=2048, help="batch size at which errors are measured")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the baseline")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON record")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.rows, arguments.width, arguments.repeats, arguments.error_rows = [96], 32, 2, 96
        arguments.no_compile = True
    if arguments.rows is None:
        arguments.rows = [2048, 4096, 8192, 16384, 32768, 65536] if cuda else [1024, 2048, 4096, 8192]
    return arguments


def leaves(inputs: Inputs) -> list[Tensor]:
    """Return the inputs whose gradients are taken."""
    return [tensor for tensor in inputs if tensor.requires_grad]


def step(implementation: Implementation, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Run forward and backward; return the gradients."""
    return torch.autograd.grad(implementation(inputs), leaves(inputs), allow_unused=True)


def in_stages(implementation: Implementation, inputs: Inputs) -> list[Callable[[Any], object]]:
    """Return forward and backward as separately timed stages."""

    def forward(_: object) -> Tensor:
        """Run the forward pass."""
        return implementation(inputs)

    def backward(loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        return torch.autograd.grad(loss, leaves(inputs), allow_unused=True)

    return [forward, backward]


def measure_errors(
    implementation: Implementation, inputs: Inputs, truth: tuple[Tensor, list[Tensor]]
) -> dict[str, float]:
    """Compare with float64: relative error of the loss, worst relative Frobenius error of the feature gradients."""
    loss = implementation(inputs)
    gradients = torch.autograd.grad(loss, leaves(inputs), allow_unused=True)
    errors = [
        float((ours.double() - exact).norm() / exact.norm())
        for ours, exact in zip(gradients, truth[1], strict=True)
        if ours is not None and exact.ndim == 2
    ]
    return {
        "loss_error": float((loss.detach().double() - truth[0]).abs() / truth[0].abs()),
        "gradient_error": max(errors),
    }


def exact(operation: Operation, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Evaluate the dense definition and its gradients in float64 on the same numbers."""
    doubles = tuple(
        tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for tensor in inputs
    )
    loss = operation.truth(doubles)
    return loss.detach(), list(torch.autograd.grad(loss, leaves(doubles)))


def measure_size(
    operation: Operation, runnable: dict[str, Implementation], inputs: Inputs, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure time and memory of one loss at one size; an implementation that fails is recorded with its error."""
    device = torch.device(arguments.device)
    records: list[dict[str, Any]] = []
    working = {}
    torch.compiler.reset()  # every size compiled for itself: beyond eight variants the compiler falls back to eager
    for name, implementation in runnable.items():
        record: dict[str, Any] = {"op": operation.name, "implementation": name, "rows": len(inputs[0])}
        records.append(record)
        try:
            step(implementation, inputs)  # compiles, tunes, and finds out whether it fits
            record["peak_bytes"] = harness.peak_memory(partial(step, implementation, inputs), device)
            working[name] = implementation
        except Exception as error:  # another package's failure is a result, not the end of the run
            record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    stages = {name: in_stages(implementation, inputs) for name, implementation in working.items()}
    times = harness.interleave_stages(
        stages, repeats=arguments.repeats, warmup=1, device=device, seconds=arguments.seconds
    )
    for record in records:
        for part, timing in zip(("forward", "backward", "both"), times.get(record["implementation"], ()), strict=False):
            record[part] = timing.as_dict()
    add_ratios(records, operation.baseline)
    return records


def add_ratios(records: list[dict[str, Any]], baseline: str) -> None:
    """Add each record's speed-up over the baseline (medians, minima, processor time) and its share of the memory."""
    base = next((record for record in records if record["implementation"] == baseline and "both" in record), None)
    for record in records:
        if base is None or "both" not in record:
            continue
        record["speedup"] = round(base["both"]["median_ms"] / record["both"]["median_ms"], 3)
        record["speedup_of_cpu_time"] = round(base["both"]["cpu_ms"] / max(1e-9, record["both"]["cpu_ms"]), 3)
        record["speedup_of_best"] = round(base["both"]["best_ms"] / record["both"]["best_ms"], 3)
        record["memory_share"] = round(record["peak_bytes"] / max(1, base["peak_bytes"]), 4)


def measure(operation: Operation, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one loss at every size."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    runnable = implementations(operation, device, compile_baseline=not arguments.no_compile)
    inputs = operation.make_inputs(arguments.error_rows, arguments.width, dtype, device)
    truth = exact(operation, inputs)
    errors: dict[str, dict[str, float]] = {}
    for name, implementation in runnable.items():
        try:
            errors[name] = measure_errors(implementation, inputs, truth)
        except Exception as error:  # recorded again, with its message, by the timing below
            print(f"{operation.name}: {name} failed: {error}")
    del truth
    records = []
    for rows in arguments.rows:
        inputs = operation.make_inputs(rows, arguments.width, dtype, device)
        for record in measure_size(operation, runnable, inputs, arguments):
            record.update(errors.get(record["implementation"], {}))
            records.append(record)
            print(harness.format_table([row(record)], COLUMNS).splitlines()[-1], flush=True)
    return records


def row(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as a line of the printed table."""
    if "failed" in record:
        return {"op": record["op"], "who": record["implementation"], "N": record["rows"], "both ms": record["failed"]}
    return {
        "op": record["op"],
        "who": record["implementation"],
        "N": record["rows"],
        "forward ms": record["forward"]["median_ms"],
        "backward ms": record["backward"]["median_ms"],
        "both ms": record["both"]["median_ms"],
        "speed-up": record.get("speedup"),
        "by CPU": record.get("speedup_of_cpu_time"),
        "MiB": record["peak_bytes"] / 2**20,
        "memory": record.get("memory_share"),
        "loss err": record.get("loss_error"),
        "grad err": record.get("gradient_error"),
    }


def merged(arguments: argparse.Namespace, settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the losses that were measured into the record, and keep the others of the same settings.

    Args:
        arguments: The command line.
        settings: What all losses of a record have in common.
        records: The cases just measured.

    Returns:
        The record's payload; every case names its commit.
    """
    for record in records:
        record["commit"] = harness.git_commit()
    path = arguments.out / f"losses_{harness.device_slug(arguments.device)}.json"
    kept = []
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("settings") == settings:
            kept = [case for case in before["cases"] if case["op"] not in arguments.op]
    cases = sorted([*kept, *records], key=lambda case: list(OPERATIONS).index(case["op"]))
    return {"settings": settings, "cases": cases}


def main(argv: list[str]) -> int:
    """Measure, print the table and write ``losses_<device>.json``.

    Args:
        argv: Options; ``--help`` lists them.

    Returns:
        Exit code 0.
    """
    arguments = parse(argv)
    records = [record for name in arguments.op for record in measure(OPERATIONS[name], arguments)]
    print("\n" + harness.format_table([row(record) for record in records], COLUMNS))
    settings = {
        "width": arguments.width,
        "dtype": arguments.dtype,
        "error_rows": arguments.error_rows,
        "smoke": arguments.smoke,
    }
    payload = merged(arguments, settings, records)
    path = harness.write_result("losses", payload, arguments.device, arguments.out)
    print(f"\nwrote {path}")
    return 0

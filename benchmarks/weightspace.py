"""Weight-space operations beside what people use: penalty, Fisher accumulation, the anchored step, exact Fisher.

Peers: the penalty written in autograd operations (as Avalanche's EWC does), PyTorch's foreach operations, PyTorch's
fused AdamW (which has no anchor), one backward pass per sample, ``torch.func`` per-sample gradients, and BackPACK where
it is installed. The case "flat" is the penalty on one tensor of the same size, like a ZeRO shard. All implementations
of a case are timed by turns in one process; read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import RESULTS, device_slug, environment, format_table, interleave, peak_memory, write_result
from benchmarks.weight_cases import (
    Table,
    accumulate_cases,
    backpack_cases,
    linear_cases,
    penalty_cases,
    shapes_of,
    step_cases,
    tower_cases,
    yardsticks,
)

COLUMNS = ["case", "method", "median_ms", "best_ms", "gb_per_s", "of_bandwidth", "times", "extra_mb"]


def measure(case: str, table: Table, moved: int | None, options: argparse.Namespace, device: str) -> list[dict]:
    """Rows of one case: times by turns, then memory, then the ratio of each method to the first (ours)."""
    plain, plain_bytes = yardsticks(device, options.smoke) if moved is not None else ({}, {})
    timings = interleave({**table, **plain}, repeats=options.repeats, device=device, seconds=options.seconds)
    rates = {name: size / timings[name].median_ms / 1e6 for name, size in plain_bytes.items()}
    ours = timings[next(iter(table))]
    rows = []
    for name, timing in timings.items():
        rate = rates.get(name)
        if moved is not None and name.startswith("ftfast"):
            rate = moved / timing.median_ms / 1e6
        rows.append(
            {
                "case": case,
                "method": name,
                **timing.as_dict(),
                "gb_per_s": rate,
                "of_bandwidth": rate / max(rates.values()) if rate is not None else None,
                "times": timing.median_ms / ours.median_ms if name in table else None,
                "extra_mb": peak_memory(table[name], device) / 2**20 if name in table else None,
            }
        )
    print(format_table(rows, COLUMNS), flush=True)
    return rows


def record(cases: Mapping[str, Any], device: str) -> None:
    """Write the cases just measured into the results file, keeping the others that are there."""
    path = RESULTS / f"weightspace_{device_slug(device)}.json"
    kept = json.loads(path.read_text())["cases"] if path.is_file() else {}
    print(f"written: {write_result('weightspace', {'cases': {**kept, **cases}}, device)}")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and write ``results/weightspace_<device>.json``.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks weightspace", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model whose parameter shapes the lists have")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per case")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop a case after the round that passes this")
    parser.add_argument("--only", default="", help="one of the cases, such as penalty")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = shapes_of("" if options.smoke else options.model)
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    makers: dict[str, Callable[[], tuple[Table, int | None]]] = {
        "penalty": lambda: penalty_cases(shapes, device),
        "flat": lambda: penalty_cases([(parameters,)], device),
        "step": lambda: step_cases(shapes, device),
        "accumulate": lambda: accumulate_cases(shapes, device),
        "linear": lambda: (linear_cases(device, options.smoke), None),
        "backpack": lambda: (backpack_cases(device, options.smoke), None),
        "tower": lambda: (tower_cases(device, options.smoke), None),
    }
    if options.only and options.only not in makers:
        parser.error(f"--only is '{options.only}'; use one of {', '.join(makers)}")
    if importlib.util.find_spec("backpack") is None:
        print("BackPACK is not installed (pip install backpack-for-pytorch); its case is left out.")
        del makers["backpack"]
    for case, make in makers.items():
        if options.only in ("", case):
            table, moved = make()
            facts = {"rows": measure(case, table, moved, options, device), "environment": environment(device)}
            if moved is not None:
                facts |= {"tensors": 1 if case == "flat" else len(shapes), "parameters": parameters}
            if not options.smoke:
                record({case: facts}, device)
            del table
    return 0

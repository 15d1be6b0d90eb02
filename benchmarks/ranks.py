"""Benchmarks in several processes: start them, read what each measured, and build the engine that each trains with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ftfast.config.resolve import resolve
from ftfast.engine.deepspeed_engine import DeepSpeedEngine
from ftfast.engine.processes import Processes, free_port
from ftfast.engine.torch_engine import TorchEngine, TunedModel
from ftfast.models import LoadedModel
from ftfast.weightspace import Anchor

Rows = list[dict[str, Any]]


def build_engine(
    loaded: LoadedModel,
    processes: Processes,
    device: torch.device,
    *,
    zero: int | None,
    batch: int,
    precision: str,
    anchor: Anchor | None = None,
) -> TorchEngine | DeepSpeedEngine:
    """Build the engine that training would use, at a learning rate that hardly moves the weights.

    Args:
        loaded: The model.
        processes: This process among the others.
        device: Where to train.
        zero: ZeRO stage; None: no DeepSpeed.
        batch: Pairs per process.
        precision: ``train.precision``.
        anchor: Weight-space guard.
    """
    flags = ["--data", "x", "--lr", "1e-6", "--batch-size", str(batch), "--precision", precision]
    config = resolve(None, {}, [], [*flags, *(["--zero", str(zero)] if zero is not None else [])]).config
    heads = torch.nn.ModuleDict()
    if zero is None:
        module = TunedModel(loaded.model, heads)
        return TorchEngine(module, config.optim, config.train.precision, anchor, device, processes)
    return DeepSpeedEngine(loaded, heads, config, anchor=anchor, processes=processes, device=device)


def in_processes(benchmark: str, argv: Sequence[str], ranks: int, seconds: float = 900.0) -> list[Rows]:
    """Measure in several processes.

    Args:
        benchmark: Name for ``python -m benchmarks``; it must understand ``--child FOLDER`` and call :func:`report`.
        argv: Its options.
        ranks: Number of processes.
        seconds: Time after which they are given up.

    Returns:
        The rows of every process.

    Raises:
        RuntimeError: If one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        port, running = str(free_port()), []
        for rank in range(ranks):
            known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in known.items()}}
            command = [sys.executable, "-m", "benchmarks", benchmark, *argv, "--child", folder]
            running.append(subprocess.Popen(command, env=variables, cwd=Path(__file__).parents[1]))
        end = time.monotonic() + seconds
        try:
            codes = [process.wait(timeout=max(1.0, end - time.monotonic())) for process in running]
        finally:
            for process in running:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the processes ended with exit codes {codes}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def report(folder: str, processes: Processes, rows: Rows) -> None:
    """Leave this process's rows for :func:`in_processes`."""
    Path(folder, f"{processes.rank}.json").write_text(json.dumps(rows))

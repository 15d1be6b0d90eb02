"""``--dry-run``: check settings, data, model, batch plan, memory and disk, show the plan, train nothing."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ftfast import kernels
from ftfast.config.resolve import Resolved, with_origins
from ftfast.config.schema import DeepSpeedConfig
from ftfast.data import check_decodable, duplicate_text_rate
from ftfast.engine.assembly import Run, assemble, build_engine, build_objective
from ftfast.engine.folder import check_folder
from ftfast.engine.run import describe
from ftfast.errors import ConfigError, FtfastError


def dry_run(resolved: Resolved, console: Console, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check everything a run depends on and print what it would do.

    Args:
        resolved: Settings with origins.
        console: Where to print.
        resume: As the run would be started.
        overwrite: As the run would be started.

    Raises:
        ConfigError: With every problem found; the exit code is 2.
    """
    config = resolved.config
    problems: list[str] = []
    folder = Path()
    try:
        folder = check_folder(config, resume=resume, overwrite=overwrite)
    except FtfastError as error:
        problems.append(str(error))
    console.print("settings", style="bold")
    console.print(with_origins(resolved), highlight=False, soft_wrap=True, markup=False)
    try:
        run = assemble(config)
        console.print("plan", style="bold")
        describe(run, console)
        problems += list(_data_problems(run, console))
        _terms(run, console)
        if not problems:
            _one_step(run, console)
            problems += list(_disk(run, folder, console))
    except FtfastError as error:
        problems += getattr(error, "problems", (str(error),))
    if problems:
        raise ConfigError(problems)
    console.print(f"would write to {folder}", highlight=False, soft_wrap=True)


def _data_problems(run: Run, console: Console) -> Iterator[str]:
    """Decode the first, middle and last image of each source; tell the rate of repeated captions."""
    for name, dataset in run.datasets.items():
        yield from check_decodable(dataset)
        if dataset.texts is not None and dataset.labels is None:
            rate = duplicate_text_rate(dataset)
            console.print(f"{name:8} {100 * rate:.1f} % of captions occur more than once", highlight=False)
    loader = run.loaders["data"]
    console.print(
        f"batches  {loader.steps_per_epoch} per pass over the task data, {run.plan.schedule}, "
        f"{run.total_steps * run.config.train.batch_size * run.config.train.accum_freq:,} images in all",
        highlight=False,
    )


def _terms(run: Run, console: Console) -> None:
    for term in run.plan.terms:
        console.print(
            f"term     {term.weight:g} x {term.name} on '{term.on}'  [{term.source}]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if run.plan.anchor is not None:
        console.print(f"anchor   {run.plan.anchor.description}", highlight=False)
    console.print(f"kernels  {kernels.explain()[run.device.type]}", highlight=False, soft_wrap=True)


def _one_step(run: Run, console: Console) -> None:
    """Run one forward and backward pass with few images, in memory only, and tell time and memory."""
    size = min(4, run.config.train.batch_size)
    # One process holds everything here, however the run will divide it.
    engine = build_engine(replace(run, config=replace(run.config, deepspeed=DeepSpeedConfig())))
    with tempfile.TemporaryDirectory() as cache:
        few = {name: dataset.subset(range(min(len(dataset), 64))) for name, dataset in run.datasets.items()}
        objective = build_objective(replace(run, datasets=few), engine, Path(cache), None)
    batches = {}
    for spec in run.plan.active(0):
        batch = next(run.loaders[spec.source]).to(run.device)
        batches[spec.name] = replace(
            batch,
            images=batch.images[:size],
            indices=batch.indices[:size] % min(64, len(run.datasets[spec.source])),
            labels=None if batch.labels is None else batch.labels[:size],
            texts=None if batch.texts is None else batch.texts[:size],
        )
    engine.module.train()
    begin = time.perf_counter()
    total, terms = objective(batches, 0)
    engine.backward(total)
    seconds = time.perf_counter() - begin
    shown = ", ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
    console.print(f"step     {size} images: {shown}; {seconds:.2f} s forward and backward", highlight=False)
    parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    state = 4 * parameters * (4 if run.plan.anchor is not None else 3)
    line = f"memory   {state / 2**20:,.0f} MiB for gradients, optimizer and anchor"
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
        line += f"; {peak / 2**20:,.0f} MiB allocated with {size} images"
    console.print(line, highlight=False)
    for loader in run.loaders.values():
        loader.close()


def _disk(run: Run, folder: Path, console: Console) -> Iterator[str]:
    """Compare the space checkpoints need with the space there is."""
    weights = sum(t.numel() * t.element_size() for t in run.start.values())
    moving = sum(p.numel() for p in run.loaded.model.parameters() if p.requires_grad)
    needed = (run.config.checkpoint.keep_last + 1) * (weights + 8 * moving) + 2 * weights
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    console.print(f"disk     {needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free", highlight=False)
    if needed > free:
        yield (
            f"checkpoints need {needed / 2**20:,.0f} MiB, but {parent} has {free / 2**20:,.0f} MiB free. "
            "Free space, choose another --out, or lower checkpoint.keep_last."
        )

"""One task of a sequence: train from what the previous tasks left behind, leave weights and state for the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftfast.config.schema import TrainConfig
from ftfast.engine.assembly import Run, assemble
from ftfast.engine.folder import create_folder, require_same
from ftfast.engine.progress import TrainingProgress
from ftfast.engine.run import build_trainer
from ftfast.errors import CheckpointError
from ftfast.models import save_open_clip_folder
from ftfast.models.exporting import read_state
from ftfast.recipes import History

CARRIED = "carried.safetensors"
FINAL = "final"


def run_task(
    config: TrainConfig, history: History, folder: Path, console: Console, *, resume: bool, card: str = ""
) -> None:
    """Train one task and write ``final/`` (an open_clip folder), and what the recipe carries on beside it.

    ``final/`` appears only when everything of the task is written, so its existence means that the task is done.

    Args:
        config: Settings of the task; ``eval.suites`` must be given.
        history: What the previous tasks left behind.
        folder: Folder of the task.
        console: Where to tell what happens.
        resume: Continue training that was interrupted in the folder, if there is any.
        card: Text of the model card.

    Raises:
        CheckpointError: The disk is full, or the folder belongs to other settings.
        FtfastError: Whatever stops training.
    """
    run = fit_task(config, history, folder, console, resume=resume)
    writing(folder, lambda: _write(run, folder, card))


def fit_task(
    config: TrainConfig,
    history: History,
    folder: Path,
    console: Console,
    *,
    resume: bool,
    command: str = "ftfast continual",
) -> Run:
    """Train one task and put the weights to keep into the model; nothing but checkpoints and logs is written.

    Args:
        config: Settings of the task; ``eval.suites`` must be given.
        history: What the previous tasks left behind.
        folder: Folder of the task.
        console: Where to tell what happens.
        resume: Continue training that was interrupted in the folder, if there is any.
        command: Who trains, for command.txt.

    Returns:
        The run, with tuned weights in ``run.loaded.model`` and trained heads in its plan.

    Raises:
        CheckpointError: The folder belongs to other settings.
        FtfastError: Whatever stops training.
    """
    run = assemble(config, history)
    started = resume and (folder / "config.yaml").is_file()
    if started:
        require_same(folder, run.config)
    else:
        create_folder(folder, run.config, [f"(part of {command})"])
    trainer = build_trainer(run, folder, started, console, None)
    with TrainingProgress(console, run.total_steps, trainer.state.step, run.config.log.every_steps, folder) as progress:
        try:
            trainer.fit(progress)
        finally:
            trainer.log.close()
            for loader in run.loaders.values():
                loader.close()
    tuned = {name: tensor.cpu() for name, tensor in trainer.selected_weights().items()}
    run.loaded.model.load_state_dict(tuned if run.plan.finalize is None else run.plan.finalize(run.start, tuned))
    run.loaded.model.eval()
    return run


def _write(run: Run, folder: Path, card: str) -> None:
    if run.plan.carry is not None:
        save_carried(folder / CARRIED, run.plan.carry())
    save_open_clip_folder(folder / FINAL, run.loaded.model.state_dict(), run.loaded, card)


def writing(folder: Path, write: Callable[[], object]) -> None:
    """Write results; a full disk becomes one sentence.

    Args:
        folder: Where, for the message.
        write: Writes.

    Raises:
        CheckpointError: If the operating system refuses.
    """
    try:
        write()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{folder} cannot be written: {reason}. What was finished before is intact; free disk space and go on "
            "with --resume."
        ) from error


def save_carried(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors through a temporary neighbour and a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def history_after(folder: Path, task: int) -> History:
    """Read what a finished task left behind.

    Args:
        folder: Folder of the finished task.
        task: Number of the next task, from 0.

    Returns:
        Weights and carried tensors.

    Raises:
        CheckpointError: The weights are gone.
    """
    if not (folder / FINAL).is_dir():
        raise CheckpointError(
            f"{folder / FINAL} is missing, so the sequence cannot go on. Start again in a new --out, or put it back."
        )
    carried = load_file(folder / CARRIED) if (folder / CARRIED).is_file() else {}
    return History(read_state(folder / FINAL), carried, task)

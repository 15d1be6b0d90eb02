"""Resumable checkpoints: written to a temporary folder, renamed when complete, pruned only afterwards."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ftfast.engine.processes import Processes
from ftfast.errors import CheckpointError
from ftfast.models.exporting import atomic_folder

STEP_FOLDER = re.compile(r"step_(\d{8})$")
STATE_NAME = "state.pt"


class CheckpointManager:
    """Keeps the last few checkpoints and the best one of a run.

    A checkpoint is a folder ``step_00001000`` with ``state.pt`` (tensors and plain containers only, readable with
    ``weights_only=True``) and ``meta.json``. A folder exists only when it is complete: a process killed while saving
    leaves a hidden temporary folder that the next run removes, and every earlier checkpoint.

    Args:
        folder: ``checkpoints/`` of the run.
        keep_last: Checkpoints kept besides the best.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder = folder
        self.keep_last = max(1, keep_last)
        folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending."""
        found = (STEP_FOLDER.match(path.name) for path in self.folder.iterdir() if (path / STATE_NAME).is_file())
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.folder / f"step_{step:08d}"

    def save(
        self,
        step: int,
        state: dict[str, Any],
        meta: dict[str, Any],
        save_shards: Callable[[Path], None] | None = None,
        processes: Processes | None = None,
    ) -> Path:
        """Write one checkpoint and prune old ones.

        Args:
            step: Optimizer steps done.
            state: Tensors and plain containers.
            meta: JSON-serialisable facts for people (step, metrics, date).
            save_shards: Writes what each process has for itself into the folder.
            processes: With several, all call this; the first writes the state when the others' shards are there.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: If the disk is full or not writable; earlier checkpoints are intact.
        """
        target, processes = self.path(step), processes or Processes()
        try:
            with _shared_folder(target, processes) as work:
                if save_shards is not None:
                    save_shards(work)
                processes.wait()
                if processes.main:
                    torch.save(state, work / STATE_NAME)
                    (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            if processes.several and isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise  # another process is gone, which is not this disk's fault
            raise CheckpointError(
                f"checkpoint {target} cannot be written: {error}. "
                "Earlier checkpoints are intact; free disk space and use --resume."
            ) from error
        if processes.main:
            self._link("last", target)
            self.prune()
        processes.wait()
        return target

    def save_best(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Replace the best weights: a folder ``best`` of the same form, holding model weights only."""
        with atomic_folder(self.folder / "best") as work:
            torch.save(state, work / STATE_NAME)
            (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def load(self, name: str | int) -> dict[str, Any]:
        """Read one checkpoint.

        Args:
            name: A step, or "best".

        Returns:
            The state given to :meth:`save`.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        folder = self.path(name) if isinstance(name, int) else self.folder / name
        try:
            return torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} holds no {STATE_NAME}; nothing to resume from.") from error
        except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise CheckpointError(
                f"{folder / STATE_NAME} is damaged: {error}. Remove the folder to resume from an earlier one."
            ) from error
        except Exception as error:  # torch raises pickle.UnpicklingError for anything that is not plain tensors
            raise CheckpointError(
                f"{folder / STATE_NAME} cannot be read as plain tensors: {str(error).splitlines()[0]}"
            ) from error

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        for path in self.folder.glob(".*.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def prune(self) -> None:
        """Delete all but the last ``keep_last`` checkpoints; ``best`` is separate and stays."""
        for step in self.steps()[: -self.keep_last]:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _link(self, name: str, target: Path) -> None:
        """Point a relative symbolic link at ``target``; skipped where links are not allowed."""
        link, temporary = self.folder / name, self.folder / f".{name}.link"
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target.name)
            temporary.replace(link)
        except OSError:
            return


@contextmanager
def _shared_folder(target: Path, processes: Processes) -> Iterator[Path]:
    """Yield one temporary folder to all processes; the first one made it and renames it when all are done."""
    if not processes.main:
        yield processes.on_main(Path)
        processes.wait()
        return
    with atomic_folder(target) as work:
        processes.on_main(lambda: work)
        yield work
    processes.wait()

"""The output folder of a sequence: which tasks are done, and whether it is the same sequence on resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftfast.engine.folder import changed_settings
from ftfast.engine.tasks import FINAL, writing
from ftfast.errors import CheckpointError, ConfigError
from ftfast.evaluation.results import write_atomically

IDENTITY = "sequence.json"


class SequenceFolder:
    """Folder of a sequence: ``sequence.json``, ``zero_shot.json`` and ``seed<k>/<number>_<task>/``.

    A task is learned when its ``final/`` exists and done when its ``accuracy.json`` does; both appear atomically.

    Args:
        path: The folder.
        keep_all: Keep the weights after every task, not only the latest ones.
    """

    def __init__(self, path: Path, *, keep_all: bool = False) -> None:
        self.path = path
        self.keep_all = keep_all

    def task(self, seed: int, number: int, name: str) -> Path:
        """Return the folder of one task of one seed."""
        return self.path / f"seed{seed}" / f"{number + 1:02d}_{name.replace(' ', '_')}"

    def prepare(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or check that it holds this very sequence.

        Args:
            identity: Recipe, tasks (name, data, settings) and suites.
            resume: Continue what is there.
            overwrite: Delete what is there, if it is a sequence.

        Raises:
            ConfigError: It exists and neither flag is given, or it is something else.
            CheckpointError: There is nothing to resume, or it is another sequence.
        """
        marker = self.path / IDENTITY
        if resume:
            self._require_same(marker, identity)
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"output folder {self.path} already exists. Continue it with --resume, replace it with "
                    "--overwrite, or choose another --out."
                )
            if not marker.is_file():
                raise ConfigError(
                    f"--overwrite: {self.path} is not a sequence of ftfast (no {IDENTITY}), so it is left alone. "
                    "Choose another --out."
                )
            shutil.rmtree(self.path)
        writing(self.path, lambda: write_atomically(marker, json.dumps(identity, indent=2) + "\n"))

    def _require_same(self, marker: Path, identity: Mapping[str, Any]) -> None:
        if not marker.is_file():
            raise CheckpointError(f"--resume: {self.path} holds no {IDENTITY}, so there is no sequence to continue.")
        then = json.loads(marker.read_text(encoding="utf-8"))
        old, new = ([task["name"] for task in each["tasks"]] for each in (then, identity))
        problem = ""
        if old != new:
            problem = f"tasks {', '.join(old)}; now they are {', '.join(new)}"
        elif then["recipe"] != identity["recipe"]:
            problem = f"recipe {then['recipe']}; now it is {identity['recipe']}"
        elif then["suites"] != identity["suites"]:
            problem = f"suites {', '.join(then['suites']) or 'none'}; now: {', '.join(identity['suites']) or 'none'}"
        else:
            for before, now in zip(then["tasks"], identity["tasks"], strict=True):
                if before["test"] != now["test"]:
                    problem = f"other test images of task '{now['name']}'"
                changed = changed_settings(before["settings"], now["settings"])
                if changed:
                    problem = f"other settings of task '{now['name']}': {'; '.join(changed)}"
                if problem:
                    break
        if problem:
            raise CheckpointError(
                f"--resume: {self.path} was started with {problem}. Resume with the same sequence, or start a new one "
                "in another --out."
            )

    def read_row(self, path: Path) -> dict[str, float] | None:
        """Read measured accuracies; None if they are not there yet."""
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_row(self, path: Path, row: Mapping[str, float]) -> None:
        """Write measured accuracies."""
        write_atomically(path, json.dumps(row, indent=2) + "\n")

    def tidy(self, done: Path, before: Path | None) -> None:
        """Delete the checkpoints of a finished task, and the weights it started from."""
        shutil.rmtree(done / "checkpoints", ignore_errors=True)
        if before is not None and not self.keep_all:
            shutil.rmtree(before / FINAL, ignore_errors=True)
            for path in before.glob("carried.safetensors"):
                path.unlink(missing_ok=True)

"""Is everything there that a sequence of tasks needs? Checks before anything runs, and ``--check``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftfast.config.schema import DataConfig
from ftfast.config.tasks import SequenceConfig, TaskConfig
from ftfast.data import ImageDataset, check_decodable, open_dataset
from ftfast.errors import DataError, FtfastError


@dataclass(frozen=True)
class TaskReport:
    """What the preparation checker found about one task.

    Attributes:
        name: Task or suite.
        found: Descriptions of the sides that are there.
        problems: One sentence each; empty when the task can run.
    """

    name: str
    found: tuple[str, ...]
    problems: tuple[str, ...]


def check_tasks(sequence: SequenceConfig) -> None:
    """Refuse tasks that cannot be learned or measured.

    Args:
        sequence: Tasks.

    Raises:
        DataError: The first problem, in one sentence.
    """
    for task in sequence.tasks:
        train, test = open_dataset(task.train), open_dataset(task.test)
        problems = task_problems(task, train, test)
        if problems:
            raise DataError(problems[0])


def task_problems(task: TaskConfig, train: ImageDataset, test: ImageDataset) -> list[str]:
    """Sentences about the classes of one task.

    Args:
        task: Names and paths.
        train: Its training side.
        test: Its test side.

    Returns:
        One sentence per problem.
    """
    sides = {"train": train, "test": test}
    for side, dataset in sides.items():
        if dataset.labels is None or dataset.class_names is None:
            return [
                f"task '{task.name}': {side} ({dataset.description}) has no classes. Set {side}.label_column, or use a "
                "folder per class."
            ]
    names, others = train.class_names or (), test.class_names or ()
    if len(names) < 2:
        return [
            f"task '{task.name}' has {len(names)} class{'es' * (len(names) != 1)} "
            f"({', '.join(names) or 'none'}); there is nothing to tell apart with fewer than two. Check its train data."
        ]
    for here, there, lacking in ((names, others, "test"), (others, names, "train")):
        missing = [name for name in here if name not in set(there)]
        if missing:
            return [f"task '{task.name}': {lacking} has no images of {_some(missing)}, which the other side has."]
    if names != others:
        return [f"task '{task.name}': train and test number their classes differently. Use one list for both."]
    found = []
    for side, dataset in sides.items():
        counts = np.bincount(dataset.labels, minlength=len(names))  # type: ignore[arg-type]
        empty = [names[place] for place in np.flatnonzero(counts == 0)]
        if empty:
            path = getattr(task, side).path
            found.append(f"task '{task.name}': {side} has no images of {_some(empty)}. Add some to {path}.")
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more classes" if len(names) > 1 else ""
    return f"class '{names[0]}'{more}"


def preparation(sequence: SequenceConfig) -> list[TaskReport]:
    """Look for everything a sequence needs, without stopping at the first problem.

    Args:
        sequence: Tasks and suites.

    Returns:
        One report per task and per suite.
    """
    reports = []
    for task in sequence.tasks:
        opened: dict[str, ImageDataset] = {}
        problems: list[str] = []
        for side in ("train", "test"):
            _open(getattr(task, side), side, opened, problems)
        if len(opened) == 2:
            problems += task_problems(task, opened["train"], opened["test"])
        found = tuple(f"{side}: {dataset.description}" for side, dataset in opened.items())
        reports.append(TaskReport(task.name, found, tuple(dict.fromkeys(problems))))
    for suite in sequence.suites:
        opened, problems = {}, []
        _open(suite.data, "data", opened, problems)
        found = tuple(dataset.description for dataset in opened.values())
        reports.append(TaskReport(suite.name, found, tuple(problems)))
    return reports


def _open(config: DataConfig, key: str, opened: dict[str, ImageDataset], problems: list[str]) -> None:
    """Open one side and decode a few of its images."""
    try:
        dataset = open_dataset(config)
    except FtfastError as error:
        problems.append(str(error))
        return
    opened[key] = dataset
    problems += check_decodable(dataset)

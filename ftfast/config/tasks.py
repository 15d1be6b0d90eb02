"""A sequence of tasks in a YAML file: what is learned in which order, and with which settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ftfast.config.schema import DataConfig, SuiteConfig
from ftfast.config.settings import build, index_of
from ftfast.config.validation import suite_problems
from ftfast.config.yaml_io import Reader, Source, load_nodes
from ftfast.errors import ConfigError

Block = tuple[yaml.Node, Source]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task: images to learn from, images to be measured on."""

    name: str
    """Short name in tables and folders."""
    train: DataConfig = field(default_factory=DataConfig)
    """Training images with classes."""
    test: DataConfig = field(default_factory=DataConfig)
    """Test images with the same classes."""
    templates: tuple[str, ...] = ()
    """Prompt templates of both sides (training uses the first, measuring all); empty: those of train and test."""


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """A named order of the tasks."""

    name: str
    """What --order says."""
    tasks: tuple[str, ...]
    """Names of tasks, each at most once; tasks that are left out are not learned."""


@dataclass(frozen=True, kw_only=True)
class ClassIncrementalConfig:
    """One data set whose classes arrive in steps."""

    train: DataConfig = field(default_factory=DataConfig)
    """Training images with classes."""
    test: DataConfig = field(default_factory=DataConfig)
    """Test images with the same classes."""
    steps: int = 10
    """Number of tasks the classes are divided into."""
    class_order: tuple[str, ...] = ()
    """Every class, in the order of arrival."""
    templates: tuple[str, ...] = ()
    """Prompt templates of both sides; empty: those of train and test."""


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Tasks to learn one after the other."""

    name: str = ""
    """Name in reports; empty: the file's."""
    tasks: tuple[TaskConfig, ...] = ()
    """The tasks, in their first order."""
    orders: tuple[OrderConfig, ...] = ()
    """Orders to choose from with --order; the first is the default."""
    class_incremental: ClassIncrementalConfig | None = None
    """Instead of tasks: one data set in steps; the classes seen so far are then measured together as well."""
    suites: tuple[SuiteConfig, ...] = ()
    """Further evaluations after every task: what is never trained on."""


@dataclass(frozen=True)
class TaskFile:
    """A tasks file, read.

    Attributes:
        sequence: Tasks in the chosen order; ``class_incremental`` is expanded into tasks.
        order: Name of the order, or empty.
        common: ``settings`` of the file.
        by_recipe: Settings under ``recipes.<name>``.
        by_task: ``settings`` of single tasks.
    """

    sequence: SequenceConfig
    order: str = ""
    common: tuple[Block, ...] = ()
    by_recipe: dict[str, Block] = field(default_factory=dict)
    by_task: dict[str, Block] = field(default_factory=dict)

    def blocks(self, recipe: str, task: str) -> tuple[Block, ...]:
        """Return the layers of settings of one task, lowest first: the file's, the recipe's, the task's."""
        own = [found[key] for found, key in ((self.by_recipe, recipe), (self.by_task, task)) if key in found]
        return (*self.common, *own)


def read_tasks(path: str | Path, *, order: str = "", steps: int = 0) -> TaskFile:
    """Read a tasks file strictly.

    Args:
        path: YAML file.
        order: Name of one of ``orders``, or task names separated by commas; empty: the first order, or the file's.
        steps: Number of class-incremental steps; 0: as in the file.

    Returns:
        The tasks in order, with every layer of settings.

    Raises:
        ConfigError: With every problem found.
    """
    root = load_nodes(path, flag="tasks file")
    if root is None:
        raise ConfigError(f"{path}: the file is empty. Write 'tasks:' and a list of '- name: ..., train: ..., test:'.")
    reader, source = Reader(), Source("file", str(path))
    root, taken = _take(root, ("settings", "recipes"))
    common = ((taken["settings"], source),) if "settings" in taken else ()
    by_recipe = {key.value: (value, source) for key, value in getattr(taken.get("recipes"), "value", ())}
    by_task = _take_task_settings(root, source)
    found = reader.read_block(root, index_of(SequenceConfig), source)
    if reader.problems:
        raise ConfigError(reader.problems)
    sequence: SequenceConfig = build(SequenceConfig, {key: value for key, (value, _) in found.items()})
    sequence = dataclasses.replace(sequence, name=sequence.name or Path(path).stem)
    sequence = _expand(sequence, steps, str(path))
    sequence, chosen = _in_order(sequence, order, str(path))
    sequence = dataclasses.replace(sequence, tasks=tuple(_completed(task) for task in sequence.tasks))
    problems = [*_task_problems(sequence, str(path)), *suite_problems(sequence.suites, f"{path}: suites")]
    if problems:
        raise ConfigError(problems)
    return TaskFile(sequence, chosen, common, by_recipe, by_task)


def _take(node: yaml.Node, keys: Sequence[str]) -> tuple[yaml.MappingNode, dict[str, yaml.Node]]:
    """Split a mapping into what is left and the values of some keys; lines of nodes are kept."""
    taken = {key.value: value for key, value in node.value if key.value in keys}
    rest = [pair for pair in node.value if pair[0].value not in keys]
    return yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark), taken


def _take_task_settings(root: yaml.MappingNode, source: Source) -> dict[str, Block]:
    """Remove ``settings`` from each task, in place, and return them by task name."""
    found: dict[str, Block] = {}
    for key, value in root.value:
        if key.value != "tasks" or not isinstance(value, yaml.SequenceNode):
            continue
        for place, item in enumerate(value.value):
            if isinstance(item, yaml.MappingNode):
                value.value[place], taken = _take(item, ("settings",))
                names = [word.value for word_key, word in item.value if word_key.value == "name"]
                if "settings" in taken and names:
                    found[str(names[0])] = (taken["settings"], source)
    return found


def _expand(sequence: SequenceConfig, steps: int, path: str) -> SequenceConfig:
    """Turn a class-incremental description into tasks."""
    plan = sequence.class_incremental
    if plan is None:
        if steps:
            raise ConfigError(f"--steps is {steps}, but {path} is not class-incremental. Leave it out.")
        return sequence
    count, classes = steps or plan.steps, plan.class_order
    if sequence.tasks:
        raise ConfigError(f"{path}: 'tasks' and 'class_incremental' are both given. Keep one.")
    if not classes or count < 1 or len(classes) % count or len(classes) < 2 * count:
        raise ConfigError(
            f"{path}: class_incremental divides {len(classes)} classes of class_order into {count} steps; the number "
            "of steps must divide the number of classes, with two classes or more in each."
        )
    size = len(classes) // count
    tasks = tuple(
        TaskConfig(
            name=f"step {number + 1}",
            train=dataclasses.replace(plan.train, classes=classes[number * size : (number + 1) * size]),
            test=dataclasses.replace(plan.test, classes=classes[number * size : (number + 1) * size]),
            templates=plan.templates,
        )
        for number in range(count)
    )
    return dataclasses.replace(sequence, tasks=tasks)


def _in_order(sequence: SequenceConfig, order: str, path: str) -> tuple[SequenceConfig, str]:
    """Put the tasks in the order asked for."""
    named = {item.name: item.tasks for item in sequence.orders}
    chosen = order or next(iter(named), "")
    if not chosen:
        return sequence, ""
    names = named.get(chosen, tuple(word.strip() for word in chosen.split(",")))
    tasks = {task.name: task for task in sequence.tasks}
    strange = [name for name in names if name not in tasks]
    if strange or len(set(names)) < len(names):
        what = f"task '{strange[0]}', which does not exist" if strange else "a task twice"
        raise ConfigError(
            f"{path}: order '{chosen}' names {what}. Orders: {', '.join(named) or 'none'}; tasks: {', '.join(tasks)}."
        )
    return dataclasses.replace(sequence, tasks=tuple(tasks[name] for name in names)), chosen


def _completed(task: TaskConfig) -> TaskConfig:
    """Give both sides the task's templates; a class may have a single image (the driver checks that it has one)."""
    changes = {"min_images_per_class": 1, **({"templates": task.templates} if task.templates else {})}
    sides = {side: dataclasses.replace(getattr(task, side), **changes) for side in ("train", "test")}
    return dataclasses.replace(task, **sides)


def _task_problems(sequence: SequenceConfig, path: str) -> list[str]:
    """Sentences about the list of tasks as a whole."""
    names = [task.name for task in sequence.tasks]
    problems = [] if names else [f"{path}: there are no tasks. List them under 'tasks:' with name, train and test."]
    problems += [f"{path}: two tasks are called '{name}'." for name in dict.fromkeys(names) if names.count(name) > 1]
    for task in sequence.tasks:
        missing = [side for side in ("train", "test") if not getattr(task, side).path]
        problems += [f"{path}: task '{task.name}' has no {side}.path." for side in missing]
        if not task.name or any(mark in task.name for mark in "/\\\n\t"):
            problems.append(f"{path}: task name {task.name!r} is not usable. Use a short name without slashes.")
    clash = set(names) & {suite.name for suite in sequence.suites}
    problems += [f"{path}: '{name}' names a task and a suite. Rename one." for name in sorted(clash)]
    return problems

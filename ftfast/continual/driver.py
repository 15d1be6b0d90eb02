"""Learn tasks one after the other, measure all of them after each, report what was transferred and what forgotten."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ftfast.config.resolve import resolve, to_yaml
from ftfast.config.schema import DataConfig, EvalConfig, SuiteConfig, TrainConfig
from ftfast.config.tasks import TaskConfig, TaskFile, read_tasks
from ftfast.config.yaml_io import Source, load_nodes
from ftfast.continual.checks import check_tasks
from ftfast.continual.folder import SequenceFolder
from ftfast.engine.assembly import choose_device
from ftfast.engine.folder import environment
from ftfast.engine.tasks import history_after, run_task, writing
from ftfast.errors import ConfigError
from ftfast.evaluation import PixelCache, Results, Suite, evaluate, main_metric, open_suites
from ftfast.evaluation.continual import SequenceMatrix
from ftfast.evaluation.continual_report import SequenceInfo, figures_markdown, summary, write_sequence_report
from ftfast.models import load_model
from ftfast.models.exporting import read_state
from ftfast.recipes import History, get_recipe

PRESETS = Path(__file__).parents[1] / "recipes" / "presets"
SEEN = "classes seen so far"


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """Settings of ``ftfast continual``."""

    tasks: str = "builtin"
    """Tasks file, or the name of a shipped one."""
    recipe: str = "gift"
    """Method."""
    order: str = ""
    """Order of the tasks: a name from the file, or task names separated by commas."""
    steps: int = 0
    """Number of class-incremental steps; 0: the file's."""
    out: str = ""
    """Output folder; empty: runs/<date>_continual_<tasks>_<recipe>."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; several give means and spreads."""
    resume: bool = False
    """Continue the sequence in the output folder."""
    overwrite: bool = False
    """Replace an earlier sequence in the output folder."""
    keep_weights: Literal["last", "all"] = "last"
    """Keep the weights after the last task only, or after every task."""
    data_root: str = ""
    """Folder of torchvision data sets."""
    files: tuple[str, ...] = ()
    """Further configuration files."""
    overrides: tuple[str, ...] = ()
    """Flags that set something."""


@dataclass
class ContinualResult:
    """What a sequence measured.

    Attributes:
        folder: Output folder.
        recipe: Method.
        runs: One matrix per seed.
        page: The report.
        seconds: Training and measuring, this call only.
    """

    folder: Path
    recipe: str
    runs: list[SequenceMatrix]
    page: Path
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        table = summary({self.recipe: self.runs})
        figures = {run: {n: dataclasses.asdict(f) for n, f in row.items()} for run, row in table.items()}
        return {"folder": str(self.folder), "report": str(self.page), "summary": figures, "seconds": self.seconds}


@dataclass
class TaskSequence:
    """Everything resolved: settings of each task, suites opened once."""

    file: TaskFile
    configs: list[TrainConfig]
    suites: list[Suite]
    seen: list[Suite] = field(default_factory=list)
    pixels: PixelCache = field(default_factory=PixelCache)


def run_continual(config: ContinualConfig, console: Console | None = None) -> ContinualResult:
    """Run every seed of a sequence and write the report.

    Args:
        config: Settings.
        console: Where to tell what happens; None: standard error.

    Returns:
        Matrices and the report's place.

    Raises:
        FtfastError: Anything a user can fix.
    """
    console = console or Console(stderr=True)
    begin = time.perf_counter()
    plan = plan_sequence(config)
    out = Path(config.out) if config.out else default_out(config)
    folder = SequenceFolder(out, keep_all=config.keep_weights == "all")
    folder.prepare(identity(plan, config), resume=config.resume, overwrite=config.overwrite)
    zero = _zero_shot(plan, folder, console)
    runs = []
    for seed in config.seeds:
        rows = [_one_task(plan, folder, seed, number, console) for number in range(len(plan.configs))]
        runs.append(to_matrix(plan, zero, rows))
    page = _report(plan, config, folder, runs)
    result = ContinualResult(folder.path, config.recipe, runs, page, round(time.perf_counter() - begin, 1))
    console.print(figures_markdown(summary({config.recipe: runs})), highlight=False, soft_wrap=True)
    console.print(f"report   {page}", highlight=False, soft_wrap=True)
    return result


def tasks_file(name: str) -> Path:
    """Return the path of a tasks file: a path, or the name of one that ftfast ships.

    Raises:
        ConfigError: If there is neither.
    """
    shipped = {path.stem: path for path in sorted((PRESETS / "tasks").glob("*.yaml"))}
    if name in shipped and not Path(name).is_file():
        return shipped[name]
    if not Path(name).is_file():
        raise ConfigError(f"tasks file '{name}' does not exist. Give a YAML file, or one of: {', '.join(shipped)}.")
    return Path(name)


def default_out(config: ContinualConfig) -> Path:
    """Return ``runs/<date>_continual_<tasks>_<recipe>``."""
    day = datetime.date.today().isoformat()
    return Path("runs") / f"{day}_continual_{Path(config.tasks).stem}_{config.recipe}"


def plan_sequence(config: ContinualConfig) -> TaskSequence:
    """Resolve the settings of every task, open all data, and check it.

    Args:
        config: Settings.

    Returns:
        The sequence, ready to run.

    Raises:
        ConfigError: Contradictions in settings, with every problem.
        DataError: Data that is missing or cannot serve as a task.
    """
    if len(set(config.seeds)) < len(config.seeds) or not config.seeds:
        raise ConfigError(f"seeds are {config.seeds}; give each once, and at least one.")
    file = read_tasks(tasks_file(config.tasks), order=config.order, steps=config.steps)
    file = with_root(file, config.data_root)
    strange = [name for name in file.by_recipe if get_recipe(name).name != name]
    if strange:
        raise ConfigError(f"recipes.{strange[0]}: write the recipe's name as '{get_recipe(strange[0]).name}'.")
    configs = [task_settings(config, file, task, number) for number, task in enumerate(file.sequence.tasks)]
    check_tasks(file.sequence)
    suites = open_suites([*(item.eval.suites[0] for item in configs), *file.sequence.suites])
    seen = []
    incremental = file.sequence.class_incremental
    for number in range(len(configs)) if incremental is not None else ():
        names = tuple(name for item in configs[: number + 1] for name in item.eval.suites[0].data.classes)
        data = dataclasses.replace(configs[0].eval.suites[0].data, classes=names)
        seen += open_suites([SuiteConfig(name=SEEN, task="zero_shot", role="target", data=data)])
    return TaskSequence(file, configs, suites, seen)


def with_root(file: TaskFile, root: str) -> TaskFile:
    """Point torchvision sources that name no folder to ``root``."""
    if not root:
        return file

    def rooted(data: DataConfig) -> DataConfig:
        """Add the folder to one source."""
        plain = data.path.startswith("torchvision:") and "?" not in data.path
        return dataclasses.replace(data, path=f"{data.path}?root={root}") if plain else data

    tasks = tuple(
        dataclasses.replace(task, train=rooted(task.train), test=rooted(task.test)) for task in file.sequence.tasks
    )
    suites = tuple(dataclasses.replace(suite, data=rooted(suite.data)) for suite in file.sequence.suites)
    return dataclasses.replace(file, sequence=dataclasses.replace(file.sequence, tasks=tasks, suites=suites))


def task_settings(config: ContinualConfig, file: TaskFile, task: TaskConfig, number: int) -> TrainConfig:
    """Settings of one task: recipe < its preset for sequences < tasks file < files < flags.

    ``{task}`` and ``{number}`` in ``generic.path`` stand for the task's name and its place (01, 02, ...), so that every
    task can have replay pairs of its own.

    Args:
        config: Settings of the sequence.
        file: Tasks and their layers.
        task: Which task.
        number: Its place, from 0.

    Returns:
        The training configuration; seed and folder are set by the driver.
    """
    recipe = get_recipe(config.recipe)
    preset = PRESETS / "continual" / f"{recipe.name}.yaml"
    blocks = file.blocks(recipe.name, task.name)
    if preset.is_file():
        node = load_nodes(preset)
        blocks = ((node, Source("recipe", recipe.name)), *blocks) if node is not None else blocks
    flags = ["--recipe", recipe.name, *config.overrides]
    settings = resolve(recipe.options, recipe.preset, config.files, flags, blocks=blocks).config
    own = SuiteConfig(name=task.name, task="zero_shot", role="target", data=task.test)
    evaluation = EvalConfig(suites=(own,), selection="last", alphas=(), batch_size=settings.eval.batch_size)
    path = settings.generic.path.replace("{task}", task.name).replace("{number}", f"{number + 1:02d}")
    generic = dataclasses.replace(settings.generic, path=path)
    return dataclasses.replace(settings, data=task.train, generic=generic, eval=evaluation, out="")


def identity(plan: TaskSequence, config: ContinualConfig) -> dict[str, Any]:
    """Facts that must not change when a sequence is resumed: tasks, their data, settings, seeds."""
    tasks = [
        {
            "name": item.eval.suites[0].name,
            "test": suite.queries.fingerprint,
            "settings": to_yaml(item),
        }
        for item, suite in zip(plan.configs, plan.suites, strict=False)
    ]
    return {
        "recipe": get_recipe(config.recipe).name,
        "tasks": tasks,
        "suites": [suite.config.name for suite in plan.suites[len(tasks) :]],
    }


def _zero_shot(plan: TaskSequence, folder: SequenceFolder, console: Console) -> dict[str, float]:
    """Measure the start model once for all seeds."""
    known = folder.read_row(folder.path / "zero_shot.json")
    if known is not None:
        return known
    console.print("measuring the start model", highlight=False)
    device = choose_device(plan.configs[0].train.device)
    loaded = load_model(plan.configs[0].model, device)
    row = main_metrics(plan.suites, measure(plan, loaded, plan.suites))
    folder.write_row(folder.path / "zero_shot.json", row)
    return row


def measure(plan: TaskSequence, loaded: Any, suites: Sequence[Suite]) -> Results:
    """Evaluate suites, decoding each image once for the whole sequence."""
    settings = plan.configs[0]
    return evaluate(loaded, suites, batch_size=settings.eval.batch_size, cache=plan.pixels)


def main_metrics(suites: Sequence[Suite], results: Results) -> dict[str, float]:
    """Reduce results to the main metric of each suite."""
    return {suite.config.name: results[suite.config.name][main_metric(suite.config)] for suite in suites}


def _one_task(plan: TaskSequence, folder: SequenceFolder, seed: int, number: int, console: Console) -> dict[str, float]:
    """Learn task ``number`` unless it is learned, measure everything unless it is measured."""
    name = plan.configs[number].eval.suites[0].name
    place = folder.task(seed, number, name)
    known = folder.read_row(place / "accuracy.json")
    if known is not None:
        return known
    before = folder.task(seed, number - 1, plan.configs[number - 1].eval.suites[0].name) if number else None
    console.rule(f"{number + 1} of {len(plan.configs)}: {name}, seed {seed}")
    # every task draws its own order of images, so that replay does not repeat itself from task to task
    config = dataclasses.replace(plan.configs[number], seed=100 * seed + number, out=str(place))
    if not (place / "final").is_dir():
        history = History(task=number) if before is None else history_after(before, number)
        run_task(config, history, place, console, resume=True, card=_card(plan, number))
    device = choose_device(config.train.device)
    loaded = load_model(dataclasses.replace(config.model, grad_checkpointing=False), device)
    loaded.model.load_state_dict(read_state(place / "final"))
    row = main_metrics(plan.suites, measure(plan, loaded, plan.suites))
    if plan.seen:
        row |= main_metrics([plan.seen[number]], measure(plan, loaded, [plan.seen[number]]))
    shown = "  ".join(f"{suite} {100 * value:.1f}" for suite, value in row.items())
    console.print(f"accuracy: {shown}", highlight=False, soft_wrap=True)
    writing(place, lambda: folder.write_row(place / "accuracy.json", row))
    folder.tidy(place, before)
    return row


def _card(plan: TaskSequence, number: int) -> str:
    names = ", ".join(item.eval.suites[0].name for item in plan.configs[: number + 1])
    config = plan.configs[number]
    return f"# {config.model.name}, tuned with {config.recipe}\n\nTasks learned one after the other: {names}.\n"


def to_matrix(plan: TaskSequence, zero: dict[str, float], rows: Sequence[dict[str, float]]) -> SequenceMatrix:
    """Arrange measured rows as a matrix."""
    import numpy as np

    tasks = tuple(item.eval.suites[0].name for item in plan.configs)
    further = [suite.config.name for suite in plan.suites[len(tasks) :]]
    return SequenceMatrix(
        tasks=tasks,
        zero_shot=np.array([zero[task] for task in tasks]),
        accuracy=np.array([[row[task] for task in tasks] for row in rows]),
        suites={name: (zero[name], *(row[name] for row in rows)) for name in further},
        seen=tuple(row[SEEN] for row in rows) if plan.seen else (),
    )


def _report(plan: TaskSequence, config: ContinualConfig, folder: SequenceFolder, runs: list[SequenceMatrix]) -> Path:
    first = plan.configs[0]
    order = f", order {plan.file.order}" if re.fullmatch(r"\w+", plan.file.order) else ""
    info = SequenceInfo(
        title=f"{config.recipe}: {plan.file.sequence.name}{order}",
        subtitle=f"{first.model.name} {first.model.pretrained} · {len(plan.configs)} tasks".replace("  ", " "),
        facts={
            "Recipe": config.recipe,
            "Model": f"{first.model.name} {first.model.pretrained}".strip(),
            "Tasks": ", ".join(runs[0].tasks),
            "Steps per task": ", ".join(dict.fromkeys(str(item.train.max_steps) for item in plan.configs)),
            "Learning rate": ", ".join(dict.fromkeys(f"{item.optim.lr:g}" for item in plan.configs)),
            "Replay": first.generic.path if get_recipe(config.recipe).uses_generic else "",
            "Seeds": ", ".join(str(seed) for seed in config.seeds),
        },
    )
    info = dataclasses.replace(info, facts={name: value for name, value in info.facts.items() if value})
    extra = {
        "recipe": config.recipe,
        "order": plan.file.order,
        "seeds": list(config.seeds),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "settings": {item.eval.suites[0].name: json.loads(json.dumps(to_yaml(item))) for item in plan.configs[:1]},
    }
    return write_sequence_report(folder.path, {config.recipe: runs}, info, extra)

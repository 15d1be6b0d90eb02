"""What ``ftfast fewshot`` runs: settings, and the list of trainings that each protocol asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftfast.config.schema import DataConfig, SuiteConfig
from ftfast.config.tasks import SequenceConfig, TaskConfig
from ftfast.errors import ConfigError
from ftfast.evaluation.fewshot import Protocol

PRESETS = Path(__file__).parents[1] / "recipes" / "presets" / "fewshot"


@dataclass(frozen=True, kw_only=True)
class FewshotConfig:
    """Settings of ``ftfast fewshot``."""

    file: str = "builtin"
    """File of data sets, or the name of a shipped one."""
    protocol: Protocol = "base-to-new"
    """Which protocol."""
    recipes: tuple[str, ...] = ("clip-cite",)
    """Methods."""
    shots: tuple[int, ...] = (16,)
    """Images per class; 0: all."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the draw and of training."""
    sets: tuple[str, ...] = ()
    """Data sets to train on; empty: all of the file."""
    source: str = ""
    """Data set that "domain" and "cross-dataset" train on; empty: the first."""
    out: str = ""
    """Output folder; empty: runs/<date>_fewshot_<file>_<protocol>."""
    resume: bool = False
    """Keep what is measured already and go on."""
    overwrite: bool = False
    """Replace earlier results in the output folder."""
    keep_weights: bool = False
    """Save the tuned weights of every training; prompts are always saved."""
    data_root: str = ""
    """Folder of the data sets."""
    files: tuple[str, ...] = ()
    """Further configuration files."""
    overrides: tuple[str, ...] = ()
    """Flags that set something."""


@dataclass(frozen=True)
class Cell:
    """One training and what is measured after it.

    Attributes:
        protocol: Protocol it belongs to.
        recipe: Method.
        task: Data set it is trained on.
        half: Classes it is trained on.
        shots: Images per class; 0: all.
        seed: Seed.
        suites: What is measured.
    """

    protocol: Protocol
    recipe: str
    task: TaskConfig
    half: Literal["all", "base"]
    shots: int
    seed: int
    suites: tuple[SuiteConfig, ...]

    @property
    def data(self) -> DataConfig:
        """Training images."""
        return dataclasses.replace(self.task.train, half=self.half, shots=self.shots, shots_seed=self.seed)

    @property
    def draw(self) -> str:
        """Name of the few-shot draw, shared by methods and protocols."""
        part = "" if self.half == "all" else f"_{self.half}"
        return f"{_slug(self.task.name)}{part}_{self.shots or 'all'}shot_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it is kept, below the output folder."""
        return Path("cells") / self.recipe / self.draw


def data_file(name: str) -> Path:
    """Return the path of a file of data sets: a path, or the name of one that ftfast ships.

    Raises:
        ConfigError: If there is neither.
    """
    shipped = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name in shipped and not Path(name).is_file():
        return shipped[name]
    if not Path(name).is_file():
        raise ConfigError(f"data set file '{name}' does not exist. Give a YAML file, or one of: {', '.join(shipped)}.")
    return Path(name)


def rooted(sequence: SequenceConfig, root: str) -> SequenceConfig:
    """Point sources of known data sets that name no folder to ``root``."""
    if not root:
        return sequence

    def point(data: DataConfig) -> DataConfig:
        """Add the folder to one source."""
        plain = data.path.startswith(("coop:", "torchvision:")) and "?" not in data.path
        return dataclasses.replace(data, path=f"{data.path}?root={root}") if plain else data

    tasks = tuple(dataclasses.replace(task, train=point(task.train), test=point(task.test)) for task in sequence.tasks)
    suites = tuple(dataclasses.replace(suite, data=point(suite.data)) for suite in sequence.suites)
    return dataclasses.replace(sequence, tasks=tasks, suites=suites)


def cells(config: FewshotConfig, sequence: SequenceConfig) -> list[Cell]:
    """List every training of a protocol.

    * fsl: train on all classes of each set, test on the same set.
    * base-to-new: train on the base classes of each set; test base images among base names, new among new names.
    * domain: train on the source set; test on it and on the file's suites (shifted versions of it).
    * cross-dataset (CoCoOp's): train on the source set; test on all other sets.
    * cross-cite (CLIP-CITE's): train on the base classes of each other set; test the source's base and new classes.

    Args:
        config: Which protocol, methods, shots, seeds and sets.
        sequence: Data sets.

    Returns:
        The trainings, seeds innermost.

    Raises:
        ConfigError: A set does not exist, or the protocol has nothing to measure.
    """
    known = {task.name: task for task in sequence.tasks}
    for flag, names in (("--sets", config.sets), ("--source", (config.source,) if config.source else ())):
        strange = [name for name in names if name not in known]
        if strange:
            raise ConfigError(f"{flag} names '{strange[0]}', which is none of the data sets: {', '.join(known)}.")
    chosen = [known[name] for name in config.sets] or list(sequence.tasks)
    source = known[config.source] if config.source else sequence.tasks[0]
    found = [
        Cell(config.protocol, recipe, task, half, shots, seed, suites)
        for recipe in config.recipes
        for task, half, suites in _trainings(config.protocol, chosen, source, sequence)
        for shots in config.shots
        for seed in config.seeds
    ]
    if not found:
        raise ConfigError(f"protocol {config.protocol} needs a data set besides '{source.name}'. Add one to the file.")
    return found


def _trainings(
    protocol: Protocol, chosen: Sequence[TaskConfig], source: TaskConfig, sequence: SequenceConfig
) -> Iterator[tuple[TaskConfig, Literal["all", "base"], tuple[SuiteConfig, ...]]]:
    """What each protocol trains on and measures."""
    if protocol == "fsl":
        yield from ((task, "all", (_suite(task.name, task),)) for task in chosen)
    elif protocol == "base-to-new":
        yield from ((task, "base", _halves(task)) for task in chosen)
    elif protocol == "domain":
        if not sequence.suites:
            raise ConfigError("protocol domain needs suites: list shifted versions of the source under 'suites:'.")
        yield source, "all", (_suite(source.name, source), *sequence.suites)
    elif protocol == "cross-dataset":
        others = [task for task in chosen if task.name != source.name]
        if others:
            yield source, "all", (_suite(source.name, source), *(_suite(task.name, task) for task in others))
    else:
        yield from ((task, "base", _halves(source)) for task in chosen if task.name != source.name)


def _suite(name: str, task: TaskConfig, half: Literal["all", "base", "new"] = "all") -> SuiteConfig:
    data = dataclasses.replace(task.test, half=half)
    return SuiteConfig(name=name, task="zero_shot", role="target", data=data)


def _halves(task: TaskConfig) -> tuple[SuiteConfig, ...]:
    return _suite("base", task, "base"), _suite("new", task, "new")


def _slug(name: str) -> str:
    return "".join(mark if mark.isalnum() else "-" for mark in name)

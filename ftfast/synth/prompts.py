"""What synthetic images show: the prompt pool of a task, and the deterministic draw from it.

GIFT (CVPR 2025): the pool of task t holds "a photo of a {}." over generic class names, and the prompts of all classes
of the tasks before t; 1000 prompts are drawn uniformly with replacement. Image j of task t has the seed
j + 100,000 (t - 1) + 10,000,000 s for the run's seed s, so that it depends on no batch, shard or process.

Two choices are ours: equal prompts count once, and a class of the current task leaves the pool under every name list
that holds it, since a generic list may contain it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftfast.config.schema import DataConfig
from ftfast.errors import ConfigError, DataError

_TASK_STRIDE = 100_000
_SEED_STRIDE = 10_000_000
_RETRY_STRIDE = 2**48  # far above every first seed, so that a retry never repeats another image


@dataclass(frozen=True)
class Prompt:
    """One entry of the pool.

    Attributes:
        text: The prompt.
        name: Class name in it.
        source: "generic" or "earlier".
    """

    text: str
    name: str
    source: str


@dataclass(frozen=True)
class NameList:
    """Class names that share a prompt template.

    Attributes:
        names: Class names.
        template: Prompt with one ``{}``.
        source: "generic" or "earlier".
    """

    names: tuple[str, ...]
    template: str
    source: str = "generic"


def prompt_pool(lists: Sequence[NameList], current: Iterable[str]) -> tuple[Prompt, ...]:
    """Return the distinct prompts of all lists, without the current task's classes.

    Args:
        lists: Name lists, in order.
        current: Class names of the current task; case and underscores do not matter.

    Returns:
        Prompts in order of first appearance.

    Raises:
        ConfigError: If nothing is left.
    """
    from ftfast.data.prompts import class_prompts

    barred = {_normal(name) for name in current}
    pool: dict[str, Prompt] = {}
    for group in lists:
        allowed = [name for name in group.names if _normal(name) not in barred]
        for name, (text,) in zip(allowed, class_prompts(allowed, (group.template,)), strict=True):
            pool.setdefault(text, Prompt(text, name, group.source))
    if not pool:
        total = sum(len(group.names) for group in lists)
        raise ConfigError(
            f"the prompt pool is empty: {total:,} names were given, and {len(barred):,} of the current task are never "
            "drawn. Add names with --generic or --earlier."
        )
    return tuple(pool.values())


def draw(pool: Sequence[Prompt], count: int, seed: int, task: int) -> list[Prompt]:
    """Draw prompts uniformly with replacement.

    Args:
        pool: From :func:`prompt_pool`.
        count: Prompts to draw; a smaller count gives a prefix of a larger one.
        seed: Seed of the run.
        task: Position of the task, from 1.

    Returns:
        ``count`` prompts.
    """
    random = np.random.default_rng([seed, task])
    return [pool[i] for i in random.integers(len(pool), size=count)]


def image_seed(seed: int, task: int, index: int, attempt: int = 0) -> int:
    """Return the seed of one image.

    Args:
        seed: Seed of the run.
        task: Position of the task, from 1.
        index: Number of the image in the task.
        attempt: 0, or how often the image was replaced.
    """
    return index + _TASK_STRIDE * (task - 1) + _SEED_STRIDE * seed + _RETRY_STRIDE * attempt


def read_names(source: str) -> tuple[str, ...]:
    """Read class names.

    Args:
        source: "imagenet" (the 1000 names of CLIP's evaluation), "none", a .txt file with one name a line, or data with
            classes (table, class folders, "builtin:...").

    Returns:
        Distinct names in order.

    Raises:
        DataError: A file that cannot be read or is empty, or data without classes.
    """
    if source == "none":
        return ()
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(dict.fromkeys(IMAGENET_CLASSNAMES))
    path = Path(source).expanduser()
    if source.endswith(".txt"):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise DataError(f"{source}: {reason}. Give a text file with one class name a line.") from None
        names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not names:
            raise DataError(f"{source}: the file holds no class name. Write one a line.")
        return names
    from ftfast.data import open_dataset

    found = open_dataset(DataConfig(path=source, min_images_per_class=1)).class_names
    if not found:
        raise DataError(f"{source}: the data has no classes. Give data with classes, or a .txt file of names.")
    return found


def read_list(source: str, template: str, kind: str) -> NameList:
    """Read ``SOURCE`` or ``SOURCE|TEMPLATE``.

    Args:
        source: As :func:`read_names`, optionally with a template of its own after the last bar.
        template: Template for sources without one.
        kind: "generic" or "earlier".

    Raises:
        DataError: As :func:`read_names`, or for a template without exactly one ``{}``.
    """
    where, bar, own = source.rpartition("|")
    if bar and own.count("{}") == 1:
        return NameList(read_names(where), own, kind)
    if bar:
        raise DataError(f"'{source}': after the | stands a prompt with {{}} once, as in 'flowers/|a photo of a {{}}.'")
    return NameList(read_names(source), template, kind)


def without_classes(names: Sequence[str], current: Iterable[str]) -> list[int]:
    """Return the positions of names that are no class of the current task."""
    barred = {_normal(name) for name in current}
    return [i for i, name in enumerate(names) if _normal(name) not in barred]


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())

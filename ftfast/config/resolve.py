"""Settings from four layers: field default < recipe preset < YAML files (left to right) < flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ftfast.config.arguments import find_setting, group_flags, read_flags, split_arguments
from ftfast.config.schema import TrainConfig
from ftfast.config.settings import build, index_of
from ftfast.config.validation import find_problems, validate
from ftfast.config.yaml_io import Reader, Source, load_nodes, nodes_of, to_yaml
from ftfast.errors import ConfigError, FtfastError

__all__ = ["Resolved", "find_recipe", "resolve", "split_arguments", "to_yaml", "validate", "with_origins"]


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: TrainConfig
    """The settings; ``options`` is an instance of the recipe's dataclass, or None."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted path to "default", "recipe infusing", "my.yaml:14" or "flag --optim.lr"; every leaf is present."""


def resolve(
    options_type: type | None,
    preset: Mapping[str, Any],
    files: Sequence[str] = (),
    argv: Sequence[str] = (),
    *,
    blocks: Sequence[tuple[yaml.Node, Source]] = (),
    world_size: int | None = None,
) -> Resolved:
    """Merge all layers into one configuration and check it.

    Args:
        options_type: Dataclass of the recipe's ``options``, or None if it has none.
        preset: The recipe's own values, nested like the schema.
        files: YAML files, later ones win.
        argv: Flags such as ``["--optim.lr", "3e-6", "--data", "pairs.csv"]``; switches like ``--dry-run`` must have
            been taken out by :func:`split_arguments`.
        blocks: Further mappings of settings, above the preset and below the files (parts of a tasks file).
        world_size: Number of processes, for the batch-size check; by default the launcher's ``WORLD_SIZE``, or 1.

    Returns:
        The configuration with origins.

    Raises:
        ConfigError: With every problem found in all layers and between settings.
    """
    index = index_of(TrainConfig, options_type)
    reader = Reader()
    name = find_recipe(files, argv)[0]
    layers = [reader.read_block(nodes_of(preset), index, Source("recipe", name))]
    layers += [reader.read_block(node, index, source) for node, source in blocks]
    for file in files:
        try:
            root = load_nodes(file)
        except ConfigError as error:
            reader.problems += error.problems
            continue
        if root is not None:
            layers.append(reader.read_block(root, index, Source("file", str(file))))
    layers.append(read_flags(argv, index, reader))

    origins = dict.fromkeys(index.settings, "default")
    values: dict[str, Any] = {}
    for layer in layers:
        for path, (value, origin) in layer.items():
            values[path], origins[path] = value, origin
    config = _build(values, options_type, reader.problems)
    if config is not None:
        world = world_size or int(os.environ.get("WORLD_SIZE", "1"))
        reader.problems += _cross_field(config, world, origins, reader.failed)
    if config is None or reader.problems:
        raise ConfigError(reader.problems)
    return Resolved(config, origins)


def _build(values: dict[str, Any], options_type: type | None, problems: list[str]) -> TrainConfig | None:
    """Make the dataclasses; a recipe's options may check themselves and refuse."""
    try:
        return build(TrainConfig, values, options_type=options_type)
    except (ValueError, FtfastError) as error:
        problems.append(f"options: {error}")
        return None


def _cross_field(config: TrainConfig, world_size: int, origins: Mapping[str, str], failed: set[str]) -> list[str]:
    """Problems between settings, leaving out those about values that could not even be read."""
    found = find_problems(config, world_size=world_size)
    unread = {text for problem in found if failed & set(problem.paths) for text in [problem.text]}
    kept = validate(config, world_size=world_size, origins=origins)
    return [text for text, problem in zip(kept, found, strict=True) if problem.text not in unread]


def find_recipe(files: Sequence[str], argv: Sequence[str]) -> tuple[str, str]:
    """Find which recipe a command line asks for, before its options are known.

    Args:
        files: YAML files, later ones win.
        argv: Flags that set something.

    Returns:
        (recipe name, origin). Files that cannot be read are passed over: :func:`resolve` reports them.
    """
    found = (TrainConfig.recipe, "default")
    for file in files:
        try:
            root = load_nodes(file)
        except ConfigError:
            continue
        for key, value in root.value if root is not None else ():
            if key.value == "recipe" and isinstance(value, yaml.ScalarNode):
                found = (str(value.value), f"{file}:{key.start_mark.line + 1}")
    for flag, words in group_flags(argv, []):
        if find_setting(flag, index_of(TrainConfig))[0] == "recipe" and len(words) == 1:
            found = (words[0], f"flag {flag}")
    return found


def with_origins(resolved: Resolved) -> str:
    """Return the configuration as YAML whose comments say where each value came from (``--print-config``)."""
    return to_yaml(resolved.config, resolved.origins)

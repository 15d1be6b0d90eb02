"""Files that hold evaluation suites and nothing else, or a run's whole configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ftfast.config.schema import SuiteConfig
from ftfast.config.validation import suite_problems
from ftfast.config.yaml_io import INVALID, Reader, Source, load_nodes
from ftfast.errors import ConfigError


def read_suite_files(files: Sequence[str]) -> tuple[SuiteConfig, ...]:
    """Read evaluation suites strictly.

    Args:
        files: YAML files. Each holds a list of suites, ``suites: [...]``, or settings with ``eval: {suites: [...]}``.

    Returns:
        All suites, in order.

    Raises:
        ConfigError: With every problem of every file.
    """
    reader, suites = Reader(), []
    for file in files:
        try:
            root = load_nodes(file, flag="--suite", root=(yaml.MappingNode, yaml.SequenceNode))
        except ConfigError as error:
            reader.problems += error.problems
            continue
        listed = root if isinstance(root, yaml.SequenceNode) else _find(_find(root, "eval") or root, "suites")
        if listed is None:
            reader.problems.append(f"{file}: no suites. Write a list of '- name: ..., task: ..., data: ...'.")
            continue
        found: Any = reader.read_value(listed, tuple[SuiteConfig, ...], Source("file", file), "suites")
        suites += [] if found is INVALID else list(found)
    problems = reader.problems or suite_problems(tuple(suites), "suites")
    if problems:
        raise ConfigError(problems)
    return tuple(suites)


def _find(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """Return the value of a key of a mapping node."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return value
    return None

"""Strict reading of settings from YAML nodes, with line numbers, and writing them back.

PyYAML only parses: values are converted by the type of the field, never by YAML's own guesses, so ``1e-5`` is a number
where a number is wanted and ``no`` is text where text is wanted. Files, recipe presets and flags all come through here.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ftfast.config.aliases import VALUE_ALIASES, explain_unknown, nearest_word
from ftfast.config.settings import SHORTHAND_FIELD, SettingsIndex, build, flatten, index_of, optional_inner
from ftfast.errors import ConfigError

INVALID = object()
"""Stands for a value that could not be read; the problem has been noted."""

_CORE_TAG = "tag:yaml.org,2002:"
_SCALAR_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Source:
    """Where a layer of settings comes from, for messages and origins."""

    kind: Literal["file", "recipe", "flag"]
    name: str
    """File name, recipe name or the flag as typed."""

    def origin(self, node: yaml.Node) -> str:
        """Return "my.yaml:14", "recipe infusing" or "flag --optim.lr"."""
        if self.kind == "file":
            return f"{self.name}:{node.start_mark.line + 1}"
        return f"{self.kind} {self.name}"

    def subject(self, node: yaml.Node, path: str) -> str:
        """Return the start of a message about one setting."""
        if self.kind == "flag":
            return self.name
        return f"{self.origin(node)}: '{path}'"


@dataclass
class Reader:
    """Reads layers of nodes into flat values, noting every problem instead of stopping at the first."""

    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    """Paths whose value could not be read."""

    def read_block(
        self, node: yaml.Node, index: SettingsIndex, source: Source, prefix: str = "", shown: str = ""
    ) -> dict[str, tuple[Any, str]]:
        """Read a mapping node.

        Args:
            node: The block; a scalar is allowed where the block has a shorthand.
            index: Settings that exist.
            source: Where the node comes from.
            prefix: Path of the block in the index, without trailing dot.
            shown: Text put before paths in messages, such as "eval.suites[0].".

        Returns:
            Dotted path to (value, origin).
        """
        if isinstance(node, yaml.ScalarNode):
            return self._read_shorthand(node, index, source, prefix, shown)
        if not isinstance(node, yaml.MappingNode):
            self._fail(
                prefix, f"{source.subject(node, (shown + prefix).rstrip('.'))} must be a block of settings, got a list."
            )
            return {}
        found: dict[str, tuple[Any, str]] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in _pairs(node):
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            path = f"{prefix}.{key}" if prefix else key
            if key in first_line:
                line = f" (first on line {first_line[key]})" if source.kind == "file" else ""
                self._fail(path, f"{source.subject(key_node, shown + path)} is given twice{line}. Keep one of them.")
                continue
            first_line[key] = key_node.start_mark.line + 1 if key_node.start_mark else 0
            if path in index.groups:
                found.update(self.read_block(value_node, index, source, path, shown))
            elif path in index.settings:
                value = self.read_value(value_node, index.settings[path].type, source, shown + path)
                if value is INVALID:
                    self.failed.add(path)
                else:
                    found[path] = (value, source.origin(key_node))
            else:
                where = source.origin(key_node)
                no_options = path == "options" and prefix == shown == ""
                hint = "This recipe has no options." if no_options else explain_unknown(path, index)
                self._fail(path, f"{where}: unknown key '{shown}{path}'. {hint}")
        return found

    def _read_shorthand(
        self, node: yaml.ScalarNode, index: SettingsIndex, source: Source, prefix: str, shown: str
    ) -> dict[str, tuple[Any, str]]:
        if node.tag == f"{_CORE_TAG}null":
            return {}
        short = SHORTHAND_FIELD.get(index.groups[prefix].type)
        if short is None:
            text = _shown(node)
            self._fail(
                prefix, f"{source.subject(node, (shown + prefix).rstrip('.'))} must be a block of settings, got {text}."
            )
            return {}
        path = f"{prefix}.{short}" if prefix else short
        return {path: (str(node.value), source.origin(node))}

    def read_value(self, node: yaml.Node, annotation: Any, source: Source, path: str) -> Any:
        """Convert a node to the type of its field.

        Args:
            node: Any YAML node.
            annotation: Resolved type: a scalar, ``Literal``, ``X | None``, ``tuple[X, ...]`` or a dataclass.
            source: Where the node comes from.
            path: Dotted name for messages.

        Returns:
            The value, or ``INVALID`` after noting a problem.
        """
        inner, optional = optional_inner(annotation)
        if optional:
            is_none_word = source.kind == "flag" and str(node.value).lower() in ("none", "null")
            if node.tag == f"{_CORE_TAG}null" or is_none_word:
                return None
            return self.read_value(node, inner, source, path)
        origin = typing.get_origin(annotation)
        if origin is tuple:
            return self._read_tuple(node, typing.get_args(annotation)[0], source, path)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self._read_object(node, annotation, source, path)
        if not isinstance(node, yaml.ScalarNode):
            wanted = "one word" if origin is Literal else _SCALAR_WORDS[annotation]
            got = "a list" if isinstance(node, yaml.SequenceNode) else "a block of settings"
            return self._fail(path, f"{source.subject(node, path)} must be {wanted}, got {got}.")
        if origin is Literal:
            return self._read_choice(node, typing.get_args(annotation), source, path)
        return self._read_scalar(node, annotation, source, path)

    def _read_tuple(self, node: yaml.Node, item_type: Any, source: Source, path: str) -> Any:
        if node.tag == f"{_CORE_TAG}null":
            return ()
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        values = [
            self.read_value(item, item_type, source, path if item is node else f"{path}[{position}]")
            for position, item in enumerate(items)
        ]
        return INVALID if any(value is INVALID for value in values) else tuple(values)

    def _read_object(self, node: yaml.Node, cls: type, source: Source, path: str) -> Any:
        index = index_of(cls)
        before = len(self.problems)
        found = self.read_block(node, index, source, "", f"{path}.")
        given = {name: value for name, (value, _) in found.items()}
        missing = [
            name
            for name, setting in index.settings.items()
            if setting.default is dataclasses.MISSING and name not in given and name not in self.failed
        ]
        if missing and len(self.problems) == before:
            names = " and ".join(f"'{name}'" for name in missing)
            self._fail(path, f"{source.subject(node, path)} lacks {names}.")
        self.failed -= set(index.settings)
        return INVALID if len(self.problems) > before else build(cls, given)

    def _read_choice(self, node: yaml.ScalarNode, choices: tuple[Any, ...], source: Source, path: str) -> Any:
        text = str(node.value)
        if text in choices:
            return text
        hint = VALUE_ALIASES.get(text.lower(), "")
        hint = hint if hint in choices else nearest_word(text.lower(), choices)
        ending = f" Did you mean '{hint}'?" if hint else ""
        listed = ", ".join(str(choice) for choice in choices)
        message = f"{source.subject(node, path)} must be one of {listed}; got {_shown(node)}.{ending}"
        return self._fail(path, message)

    def _read_scalar(self, node: yaml.ScalarNode, kind: type, source: Source, path: str) -> Any:
        text = str(node.value)
        quoted = node.style in ("'", '"')
        if kind is str:
            if node.tag == f"{_CORE_TAG}null" and source.kind != "flag":
                return self._fail(path, f"{source.subject(node, path)} has no value. Give one or remove the line.")
            return text
        value: Any = INVALID
        if not quoted:
            value = _parse_bool(text) if kind is bool else _parse_number(text, kind)
        if value is INVALID:
            wanted = _SCALAR_WORDS[kind]
            return self._fail(path, f"{source.subject(node, path)} must be {wanted}, got {_shown(node)}.")
        return value

    def _fail(self, path: str, problem: str) -> Any:
        self.failed.add(path)
        self.problems.append(problem)
        return INVALID


def _parse_bool(text: str) -> Any:
    return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower(), INVALID)


def _parse_number(text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        return INVALID
    return value if math.isfinite(value) else INVALID


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a block of settings"
    if node.value == "" and node.style is None:
        return "nothing"
    text = str(node.value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the text '{text}'" if node.style in ("'", '"') else f"'{text}'"


def _pairs(node: yaml.MappingNode, around: tuple[yaml.Node, ...] = ()) -> list[tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes with YAML merge keys (``<<``) applied; own keys win over merged ones, earlier over later."""
    own = [(key, value) for key, value in node.value if key.tag != f"{_CORE_TAG}merge"]
    names = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
    merged: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        if key.tag != f"{_CORE_TAG}merge":
            continue
        for block in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(block, yaml.MappingNode) and block not in (node, *around):  # an anchor may hold itself
                new = [pair for pair in _pairs(block, (node, *around)) if pair[0].value not in names]
                merged += new
                names |= {pair[0].value for pair in new if isinstance(pair[0], yaml.ScalarNode)}
    return merged + own


def load_nodes(
    file: str | Path, *, flag: str = "--config", root: tuple[type[yaml.Node], ...] = (yaml.MappingNode,)
) -> yaml.Node | None:
    """Parse a YAML file without interpreting it.

    Args:
        file: Path of the file.
        flag: Who named the file, for messages.
        root: What the file may hold.

    Returns:
        Its root node, or None for an empty file.

    Raises:
        ConfigError: If the file is missing, unreadable or not YAML.
    """
    text = _read_text(file, flag)
    try:
        found = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply.") from None
    if found is not None and not isinstance(found, root):
        wanted = "settings as 'key: value' lines" if yaml.SequenceNode not in root else "a list of suites"
        raise ConfigError(f"{file}:1: expected {wanted}, got {_shown(found)}.")
    return found


def _read_text(file: str | Path, flag: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{flag}: there is no file '{file}'.") from None
    except IsADirectoryError:
        raise ConfigError(f"{flag}: '{file}' is a folder, not a YAML file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not a UTF-8 text file.") from None
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read '{file}': {error.strerror}.") from None


def nodes_of(values: Mapping[str, Any]) -> yaml.Node:
    """Turn plain Python values into nodes, so that presets take the same way as files."""
    return yaml.representer.SafeRepresenter(sort_keys=False).represent_data(dict(values))


def scalar_node(text: str) -> yaml.ScalarNode:
    """Make a node of one word from a command line."""
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes text with any kind of line end in double quotes, where YAML keeps it exactly and on one line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if any(mark in text for mark in "\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_CORE_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _value_text(value: Any, indent: str) -> str:
    """YAML of one leaf: on one line, or as an indented block for lists of blocks."""
    simple = plain(value)
    nested = isinstance(simple, list) and any(isinstance(item, dict) for item in simple)
    text = yaml.dump(
        simple, Dumper=_Dumper, default_flow_style=not nested, sort_keys=False, allow_unicode=True, width=10**9
    ).removesuffix("\n")
    if nested:
        return "\n" + "".join(f"{indent}  {line}\n" for line in text.split("\n"))
    return f" {text.removesuffix(chr(10) + '...')}\n"


def to_yaml(config: Any, origins: Mapping[str, str] | None = None) -> str:
    """Write a configuration so that ``--config`` reads back an equal one.

    Args:
        config: A configuration dataclass.
        origins: If given, every line ends with a comment saying where its value came from.

    Returns:
        YAML text, one line per setting.
    """
    lines: list[str] = []
    blocks: list[str] = []
    for path, value in flatten(config).items():
        *parents, name = path.split(".")
        for depth, parent in enumerate(parents):
            if blocks[depth : depth + 1] != [parent]:
                lines.append(f"{'  ' * depth}{parent}:\n")
                blocks = [*parents[:depth], parent]
        blocks = parents
        indent = "  " * len(parents)
        text = f"{indent}{name}:{_value_text(value, indent)}"
        if origins is not None:
            first, rest = text.split("\n", 1)
            text = f"{first:<44}  # {origins.get(path, 'default')}\n{rest}"
        lines.append(text)
    return "".join(lines)

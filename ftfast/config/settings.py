"""The flat view of the settings: dotted path, type, default and help text of every leaf, read from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import MISSING, dataclass
from typing import Any

from ftfast.config.schema import DataConfig, ModelConfig

SHORTHAND_FIELD: dict[type, str] = {DataConfig: "path", ModelConfig: "name"}
"""Blocks that may be given as one value: ``data: x.csv`` means ``data: {path: x.csv}``."""


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration."""

    path: str
    """Dotted name, such as "optim.lr"."""
    type: Any
    """Resolved type annotation."""
    default: Any
    """Value if nobody sets it; ``dataclasses.MISSING`` if it must be set."""
    help: str
    """The sentence under the field."""


@dataclass(frozen=True)
class Group:
    """One block of settings, such as "optim"."""

    path: str
    """Dotted name; empty for the whole configuration."""
    type: Any
    """Its dataclass."""
    help: str
    """The sentence under the field that holds it."""


@dataclass(frozen=True)
class SettingsIndex:
    """All blocks and all leaves below one dataclass, in declaration order."""

    groups: dict[str, Group]
    settings: dict[str, Setting]

    def children(self, group: str) -> list[str]:
        """Return the paths directly inside a block (``""`` is the top)."""
        prefix = f"{group}." if group else ""
        paths = (prefix + field.name for field in dataclasses.fields(self.groups[group].type))
        return [path for path in paths if path in self.groups or path in self.settings]


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, base classes included.

    Args:
        cls: A dataclass whose source file can be read.

    Returns:
        Field name to sentence; fields without one are absent.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # no source, for example a class made at run time
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(lines):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def optional_inner(annotation: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into (X, True); any other type is (type, False)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        if len(inner) == 1 and len(typing.get_args(annotation)) == 2:
            return inner[0], True
    return annotation, False


def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of every field of a dataclass."""
    return typing.get_type_hints(cls)  # each base class is read in its own module


@functools.cache
def index_of(cls: type, options_type: type | None = None) -> SettingsIndex:
    """List every block and leaf below a dataclass.

    Args:
        cls: The dataclass, normally ``TrainConfig``.
        options_type: Dataclass of the ``options`` block; None leaves the block out.

    Returns:
        The index; fields typed ``Any`` are left out.
    """
    groups = {"": Group("", cls, (cls.__doc__ or "").strip())}
    settings: dict[str, Setting] = {}

    def visit(owner: type, prefix: str) -> None:
        """List the blocks and leaves below one block."""
        hints, texts = field_types(owner), field_help(owner)
        for field in dataclasses.fields(owner):
            path, annotation, text = prefix + field.name, hints[field.name], texts.get(field.name, "")
            if annotation is Any:
                if options_type is None or path != "options":
                    continue
                annotation = options_type
            if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
                groups[path] = Group(path, annotation, text)
                visit(annotation, f"{path}.")
                continue
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            settings[path] = Setting(path, annotation, default, text)

    visit(cls, "")
    return SettingsIndex(groups, settings)


def build(cls: type, values: dict[str, Any], prefix: str = "", options_type: type | None = None) -> Any:
    """Make a dataclass from flat values.

    Args:
        cls: The dataclass.
        values: Dotted path to value; absent leaves take their default.
        prefix: Path of ``cls`` inside ``values`` with a trailing dot, or empty.
        options_type: Dataclass of the ``options`` block, if any.

    Returns:
        An instance of ``cls``.
    """
    arguments: dict[str, Any] = {}
    hints = field_types(cls)
    for field in dataclasses.fields(cls):
        path, annotation = prefix + field.name, hints[field.name]
        if annotation is Any and path == "options":
            annotation = options_type
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            arguments[field.name] = build(annotation, values, f"{path}.")
        elif path in values:
            arguments[field.name] = values[path]
    return cls(**arguments)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted path to value for every leaf of a dataclass instance; the inverse of :func:`build`."""
    flat: dict[str, Any] = {}
    hints = field_types(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        is_block = dataclasses.is_dataclass(value) and not optional_inner(hints[field.name])[1]
        if is_block:
            flat.update(flatten(value, f"{path}."))
        elif not (value is None and hints[field.name] is Any):
            flat[path] = value
    return flat

"""Arguments of the small commands: one dataclass each, read with the same rules and messages as settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ftfast.config.aliases import nearest_word
from ftfast.config.settings import SettingsIndex, index_of
from ftfast.config.yaml_io import INVALID, Reader, Source, scalar_node
from ftfast.errors import ConfigError

Arguments = TypeVar("Arguments")


def parse_options(cls: type[Arguments], argv: Sequence[str], command: str) -> Arguments:
    """Read the arguments of a command.

    Fields annotated ``tyro.conf.Positional`` are given by position; tuple fields by repeating their flag. Hyphens
    and underscores are the same. ``-h`` prints help made by tyro from the docstrings and stops.

    Args:
        cls: Dataclass of the arguments.
        argv: Arguments after the command's name.
        command: Name shown in help and messages, such as "ftfast eval".

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: With every problem found.
        SystemExit: After printing help.
    """
    if any(token in ("-h", "--help") for token in argv):
        import tyro

        tyro.cli(cls, args=["--help"], prog=command)
    index, reader = index_of(typing.cast(Any, cls)), Reader()
    positional = _positional_fields(cls)
    waiting = list(positional)
    values: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--debug":
            continue
        if token.startswith("--"):
            _read_flag(token, tokens, index, reader, values)
        elif waiting:
            values[waiting.pop(0)] = token
        else:
            reader.problems.append(f"{command}: unexpected argument '{token}'.")
    for name, setting in index.settings.items():
        if setting.default is dataclasses.MISSING and name not in values:
            shown = name.upper() if name in positional else f"--{name.replace('_', '-')}"
            reader.problems.append(f"{command} needs {shown}: {setting.help[:1].lower()}{setting.help[1:]}")
    if reader.problems:
        raise ConfigError(reader.problems)
    return cls(**values)


def _positional_fields(cls: type) -> list[str]:
    import tyro

    marker = typing.get_args(tyro.conf.Positional[str])[1]
    hints = typing.get_type_hints(cls, include_extras=True)
    return [
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if marker in typing.get_args(hints[field.name])
    ]


def _read_flag(token: str, tokens: list[str], index: SettingsIndex, reader: Reader, values: dict[str, Any]) -> None:
    """Read one flag and the value after it."""
    flag, equals, text = token.partition("=")
    name = flag[2:].replace("-", "_")
    negated = name not in index.settings and name.startswith("no_")
    setting = index.settings.get(name[3:] if negated else name)
    if setting is None or (negated and setting.type is not bool):
        close = nearest_word(name, index.settings)
        hint = f" Did you mean '--{close.replace('_', '-')}'?" if close else ""
        reader.problems.append(f"unknown flag '{flag}'.{hint}")
        if not equals and tokens and not tokens[0].startswith("-"):
            tokens.pop(0)
        return
    if setting.type is bool and not equals:
        values[setting.path] = not negated
        return
    if not equals:
        if not tokens or tokens[0].startswith("--"):
            reader.problems.append(f"{flag} needs a value.")
            values.setdefault(setting.path, INVALID)
            return
        text = tokens.pop(0)
    value = reader.read_value(scalar_node(text), setting.type, Source("flag", flag), setting.path)
    if isinstance(value, tuple) and isinstance(values.get(setting.path), tuple):
        value = values[setting.path] + value
    values[setting.path] = value

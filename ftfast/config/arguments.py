"""The command line of a training run, taken apart: switches, configuration files, and settings as layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftfast.config.aliases import explain_unknown
from ftfast.config.settings import SHORTHAND_FIELD, SettingsIndex, optional_inner
from ftfast.config.yaml_io import INVALID, Reader, Source, scalar_node
from ftfast.errors import ConfigError

MODEL_PRESETS = Path(__file__).parents[1] / "recipes" / "presets" / "models"
"""Settings for large models, named by ``--config``."""

SHORTHANDS: dict[str, str] = {
    "data": "data.path",
    "data_image_col": "data.image_column",
    "data_text_col": "data.text_column",
    "data_label_col": "data.label_column",
    "generic": "generic.path",
    "model": "model.name",
    "pretrained": "model.pretrained",
    "lr": "optim.lr",
    "warmup": "optim.warmup",
    "batch_size": "train.batch_size",
    "accum_freq": "train.accum_freq",
    "max_steps": "train.max_steps",
    "epochs": "train.epochs",
    "precision": "train.precision",
    "device": "train.device",
    "workers": "train.workers",
    "zero": "deepspeed.zero",
    "deepspeed_config": "deepspeed.config",
    "report_to": "log.report_to",
}
"""Short flags (with underscores) and the setting each means; ``--recipe``, ``--out``, ``--seed`` need none."""

SWITCHES: dict[str, str] = {
    "dry_run": "Check configuration, data and model, print the plan, train nothing.",
    "print_config": "Print the resolved configuration and where each value came from, then stop.",
    "overwrite": "Replace the output folder if it exists.",
    "debug": "Show a full traceback for errors.",
    "json": "Print results as JSON on standard output.",
}
"""Flags without a value."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """A training command line, sorted into what it asks for."""

    files: tuple[str, ...] = ()
    """Configuration files (``--config``), left to right."""
    overrides: tuple[str, ...] = ()
    """Flags that set something, as typed, for :func:`ftfast.config.resolve.resolve`."""
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Replace the output folder."""
    dry_run: bool = False
    """Check everything, train nothing."""
    print_config: bool = False
    """Print settings with origins and stop."""
    debug: bool = False
    """Show tracebacks."""
    json: bool = False
    """Results as JSON on standard output."""
    help: str = ""
    """"short" for -h/--help, "all" for --help-all, else empty."""
    local_rank: int = -1
    """What a launcher appended; -1 if nothing."""


def split_arguments(argv: Sequence[str]) -> TrainArguments:
    """Separate switches and files from settings.

    ``--resume FOLDER`` stands for ``--config FOLDER/config.yaml --out FOLDER --resume``.

    Args:
        argv: Arguments after ``ftfast train``.

    Returns:
        The sorted arguments; settings are not checked yet.

    Raises:
        ConfigError: If ``--config`` or ``--local_rank`` lacks its value.
    """
    files: list[str] = []
    overrides: list[str] = []
    found: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else name
        if token in ("-h", "--help"):
            found["help"] = "short"
        elif token == "--help-all":
            found["help"] = "all"
        elif key in SWITCHES and name.startswith("--") and not equals:
            found[key] = True
        elif key in ("config", "-c"):
            files.append(preset_file(value if equals else _next_value(tokens, name, "a YAML file")))
        elif key == "local_rank":
            found[key] = _rank(value if equals else _next_value(tokens, name, "a number"), name)
        elif key == "resume" and name.startswith("--"):
            found["resume"] = True
            has_value = bool(tokens) and not tokens[0].startswith("-")
            folder = value if equals else (tokens.pop(0) if has_value else "")
            if folder:
                files.insert(0, f"{folder.rstrip('/')}/config.yaml")
                overrides += ["--out", folder]
        else:
            overrides.append(token)
    return TrainArguments(files=tuple(files), overrides=tuple(overrides), **found)


def preset_file(name: str) -> str:
    """Find a preset of a large model by its name, as in ``--config ViT-g-14``.

    Args:
        name: What was given as a configuration file.

    Returns:
        The preset's path if there is no such file but a preset of that name, else what was given.
    """
    preset = MODEL_PRESETS / f"{name}.yaml"
    return str(preset) if not Path(name).exists() and "/" not in name and preset.is_file() else name


def _next_value(tokens: list[str], flag: str, what: str) -> str:
    if not tokens or tokens[0].startswith("--"):
        raise ConfigError(f"{flag} needs {what} after it.")
    return tokens.pop(0)


def _rank(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag} must be a whole number, got '{text}'.") from None


def group_flags(argv: Sequence[str], problems: list[str]) -> list[tuple[str, list[str]]]:
    """Group tokens into (flag as typed, its values).

    Args:
        argv: Flags that set something.
        problems: Stray words are noted here.

    Returns:
        One entry per flag, in order.
    """
    grouped: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token.partition("=")
            grouped.append((name, [value] if equals else []))
        elif grouped:
            grouped[-1][1].append(token)
        else:
            problems.append(f"unexpected argument '{token}'. Settings are given as --name value.")
    return grouped


def find_setting(flag: str, index: SettingsIndex) -> tuple[str, bool]:
    """Find the setting a flag means.

    Args:
        flag: As typed, such as "--optim.weight-decay" or "--model.no-lock-image".
        index: Settings that exist.

    Returns:
        (path, negated); path is empty if there is no such flag.
    """
    path = flag[2:].replace("-", "_")
    path = SHORTHANDS.get(path, path)
    if path in index.settings:
        return path, False
    short = SHORTHAND_FIELD.get(index.groups[path].type) if path in index.groups else None
    if short:
        return f"{path}.{short}", False
    parent, _, name = path.rpartition(".")
    positive = f"{parent}.{name[3:]}" if parent else name[3:]
    if name.startswith("no_") and positive in index.settings and index.settings[positive].type is bool:
        return positive, True
    return "", False


def read_flags(argv: Sequence[str], index: SettingsIndex, reader: Reader) -> dict[str, tuple[Any, str]]:
    """Read settings from flags.

    Args:
        argv: Flags that set something.
        index: Settings that exist.
        reader: Converts values and collects problems.

    Returns:
        Dotted path to (value, origin); the last of repeated flags counts.
    """
    found: dict[str, tuple[Any, str]] = {}
    for flag, values in group_flags(argv, reader.problems):
        path, negated = find_setting(flag, index)
        if not path:
            reader.problems.append(f"unknown flag '{flag}'. {_explain_flag(flag, index)}")
            continue
        source = Source("flag", flag)
        node = _flag_node(values, index.settings[path].type, negated, flag, reader.problems)
        value = INVALID if node is None else reader.read_value(node, index.settings[path].type, source, path)
        if value is INVALID:
            reader.failed.add(path)
        else:
            found[path] = (value, source.origin(node or scalar_node("")))
    return found


def _explain_flag(flag: str, index: SettingsIndex) -> str:
    path = flag[2:].replace("-", "_")
    if path.startswith("options.") and "options" not in index.groups:
        return "This recipe has no options."
    if path in index.groups:
        example = index.children(path)[0].replace("_", "-")
        return f"It is a block of settings; set one of them, such as '--{example}'."
    return explain_unknown(path, index, flag=True, also=(*SHORTHANDS, *SWITCHES, "config", "resume"))


def _flag_node(values: list[str], annotation: Any, negated: bool, flag: str, problems: list[str]) -> yaml.Node | None:
    inner, _ = optional_inner(annotation)
    if getattr(inner, "__origin__", None) is tuple:
        if len(values) == 1 and values[0][:1] in ("[", "{"):
            return _inline(values[0], flag, problems)
        items: list[yaml.Node] = [scalar_node(value) for value in values]
        return yaml.SequenceNode("tag:yaml.org,2002:seq", items)
    if annotation is bool and not values:
        return scalar_node("false" if negated else "true")
    if negated:
        problems.append(f"{flag} takes no value, got '{values[0]}'.")
        return None
    if len(values) != 1:
        got = "none" if not values else "'" + "' '".join(values) + "'"
        problems.append(f"{flag} needs one value, got {got}.")
        return None
    return scalar_node(values[0])


def _inline(text: str, flag: str, problems: list[str]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        problems.append(f"{flag}: '{text}' is not valid YAML.")
        return None

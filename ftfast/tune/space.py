"""Search spaces of ``ftfast tune``: a YAML file that says between what each setting may vary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftfast.config.aliases import explain_unknown
from ftfast.config.schema import TrainConfig
from ftfast.config.settings import flatten, index_of, optional_inner
from ftfast.config.yaml_io import load_nodes
from ftfast.errors import ConfigError
from ftfast.recipes import Recipe

PRESETS = Path(__file__).parents[1] / "recipes" / "presets" / "tune"
_FORM = "Write {low: 1e-4, high: 1e-2, log: true}, {times: 10} (around the default) or {choices: [a, b]}."


@dataclass(frozen=True)
class Range:
    """Where one setting may go.

    Attributes:
        path: Dotted name of the setting.
        default: Its value before the search.
        low: Lower end of a numeric range.
        high: Upper end.
        log: Search the logarithm.
        choices: Values of a categorical setting; empty for ranges.
        whole: Integers only.
    """

    path: str
    default: Any
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()
    whole: bool = False

    def distribution(self) -> Any:
        """Return the Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies inside."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def space_file(name: str, recipe: Recipe) -> Path:
    """Return the space to use: a path, or the recipe's shipped one.

    Raises:
        ConfigError: If there is none.
    """
    if name:
        if not Path(name).is_file():
            raise ConfigError(f"--space '{name}' does not exist. {_FORM}")
        return Path(name)
    own = PRESETS / f"{recipe.name}.yaml"
    return own if own.is_file() else PRESETS / "default.yaml"


def read_space(path: Path, config: TrainConfig, recipe: Recipe) -> tuple[Range, ...]:
    """Read a search space strictly.

    Args:
        path: YAML file: dotted setting -> range.
        config: Settings before the search; their values are the defaults.
        recipe: Gives the ``options`` that exist.

    Returns:
        One range per setting.

    Raises:
        ConfigError: With every problem: unknown settings, impossible ranges, defaults outside of them.
    """
    load_nodes(path, flag="--space")  # the strict reader's messages about YAML itself
    table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    index, values = index_of(TrainConfig, recipe.options), flatten(config)
    problems: list[str] = []
    found: list[Range] = []
    for name, given in table.items() if isinstance(table, Mapping) else ():
        key = str(name)
        if key not in index.settings:
            problems.append(f"{path}: '{key}' is not a setting. {explain_unknown(key, index)}")
            continue
        if key.split(".")[0] in ("data", "eval", "seed", "out", "log", "checkpoint"):
            problems.append(f"{path}: '{key}' cannot be searched: it changes what is measured, not how well.")
            continue
        kind = optional_inner(index.settings[key].type)[0]
        made = _range(key, given, values.get(key), kind is int)
        problems += [f"{path}: {made}"] if isinstance(made, str) else []
        found += [made] if isinstance(made, Range) else []
    problems += [
        f"{path}: the default {item.path} {item.default} lies outside {_shown(item)}. Widen it: the first trial is the "
        "default."
        for item in found
        if not item.holds(item.default)
    ]
    if not found and not problems:
        problems.append(f"{path}: there is nothing to search. {_FORM}")
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _shown(item: Range) -> str:
    return f"{list(item.choices)}" if item.choices else f"{item.low:g} to {item.high:g}"


def _range(key: str, given: Any, default: Any, whole: bool) -> Range | str:
    """Make a range, or say what is wrong with it."""
    if not isinstance(given, Mapping):
        return f"'{key}' is {given!r}. {_FORM}"
    strange = set(given) - {"low", "high", "log", "times", "choices"}
    if strange:
        return f"'{key}' has '{sorted(strange)[0]}'. {_FORM}"
    if "choices" in given:
        choices = given["choices"]
        if not isinstance(choices, list) or not choices or any(isinstance(c, (list, dict)) for c in choices):
            return f"'{key}': choices is {choices!r}; give a list of plain values."
        return Range(key, default, choices=tuple(choices))
    try:
        if "times" in given:
            factor = float(given["times"])
            if not (isinstance(default, (int, float)) and default > 0 and factor > 1):
                return f"'{key}': times needs a factor above 1 and a default above 0, not {factor:g} and {default!r}."
            low, high, log = default / factor, default * factor, True
        else:
            low, high, log = float(given["low"]), float(given["high"]), bool(given.get("log", False))
    except (KeyError, TypeError, ValueError):
        return f"'{key}' is {dict(given)!r}. {_FORM}"
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (log and low <= 0):
        return f"'{key}': low {low:g} must be below high {high:g}{', and above 0 with log' if log else ''}."
    if whole:
        low, high = max(math.ceil(low), 1 if log else math.ceil(low)), math.floor(high)
    return Range(key, default, low, high, log, whole=whole)


def as_flags(params: Mapping[str, Any]) -> list[str]:
    """Return parameters as command-line flags."""
    flags: list[str] = []
    for path, value in params.items():
        text = (
            str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)
        )
        flags += [f"--{path.replace('_', '-')}", text]
    return flags

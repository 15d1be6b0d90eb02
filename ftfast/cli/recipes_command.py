"""``ftfast recipes``: list the methods, or explain one."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.errors import ConfigError

if TYPE_CHECKING:
    from ftfast.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class RecipesArguments:
    """List the methods, or explain one: ftfast recipes show infusing."""

    action: tyro.conf.Positional[str] = "list"
    """"list" or "show"."""
    name: tyro.conf.Positional[str] = ""
    """Recipe to show."""
    json: bool = False
    """Print as JSON."""


def run(argv: Sequence[str]) -> int:
    """List or show recipes.

    Args:
        argv: Arguments after ``ftfast recipes``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the action or the recipe does not exist.
    """
    arguments = parse_options(RecipesArguments, argv, "ftfast recipes")
    from ftfast.recipes import available, get_recipe

    if arguments.action == "list":
        recipes = list(available().values())
        if arguments.json:
            output.emit_json({recipe.name: recipe.summary for recipe in recipes})
        else:
            rows = [(recipe.name, recipe.summary, "; ".join(p.reference for p in recipe.papers)) for recipe in recipes]
            output.emit(output.table(("recipe", "what it does", "paper"), rows))
        return 0
    if arguments.action != "show":
        raise ConfigError(f"ftfast recipes does not know '{arguments.action}'. Use: ftfast recipes [show NAME].")
    if not arguments.name:
        raise ConfigError("ftfast recipes show needs a name, for example: ftfast recipes show infusing.")
    recipe = get_recipe(arguments.name)
    if arguments.json:
        output.emit_json(_as_dict(recipe))
    else:
        output.emit(_text(recipe))
    return 0


def _as_dict(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "papers": [dataclasses.asdict(paper) for paper in recipe.papers],
        "needs_labels": recipe.needs_labels,
        "uses_generic": recipe.uses_generic,
        "preset": recipe.preset,
        "options": {name: {"default": value, "help": text} for name, value, text in _options(recipe)},
        "deviations": list(recipe.deviations),
    }


def _options(recipe: Recipe) -> list[tuple[str, Any, str]]:
    from ftfast.config.resolve import resolve
    from ftfast.config.settings import field_help

    options = resolve(recipe.options, recipe.preset, (), ["--recipe", recipe.name]).config.options
    texts = field_help(recipe.options)
    return [
        (field.name, getattr(options, field.name), texts.get(field.name, ""))
        for field in dataclasses.fields(recipe.options)
    ]


def _text(recipe: Recipe) -> str:
    from ftfast.config.resolve import resolve
    from ftfast.config.settings import flatten

    lines = [f"{recipe.name}: {recipe.summary}", ""]
    lines += [f"  paper      {paper.title} ({paper.reference})" for paper in recipe.papers]
    lines.append(f"  data       {'images with classes' if recipe.needs_labels else 'images with captions or classes'}")
    lines.append(f"  generic    {'needed (--generic)' if recipe.uses_generic else 'not used'}")
    resolved = resolve(recipe.options, recipe.preset, (), ["--recipe", recipe.name])
    values = flatten(resolved.config)
    rows = [
        (path, _short(values[path]))
        for path, origin in resolved.origins.items()
        if origin.startswith("recipe ") and not path.startswith("options.")
    ]
    if rows:
        lines += [
            "",
            "Settings of the recipe (yours win):",
            textwrap.indent(output.table(("setting", "value"), rows), "  "),
        ]
    options = [(f"options.{name}", _short(value), text) for name, value, text in _options(recipe)]
    if options:
        table = output.table(("option", "value", "meaning"), options)
        lines += ["", "Options:", textwrap.indent(table, "  ")]
    if recipe.deviations:
        lines += ["", "Differences from the paper:", *(f"  - {text}" for text in recipe.deviations)]
    lines += ["", f"Try it: ftfast train {recipe.name} --data TABLE_OR_FOLDER --dry-run"]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

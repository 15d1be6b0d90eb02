"""``ftfast train``: help without importing torch, then the training script."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence

from ftfast.config.arguments import SHORTHANDS, SWITCHES, split_arguments
from ftfast.config.schema import TrainConfig
from ftfast.config.settings import index_of, optional_inner

_HEAD = """usage: ftfast train RECIPE --data PATH [--config FILE] [settings]

Fine-tune a CLIP-like model with one of the methods of "ftfast recipes", and report what it gained and forgot.

  ftfast train infusing --data shoes/ --model ViT-B-16 --pretrained openai
  ftfast train finetune --config my.yaml --lr 3e-6 --dry-run
"""
_TAIL = """
Settings come from the recipe, then --config files from left to right, then flags. Every setting has a flag:
"ftfast train RECIPE --help-all" lists them, "--print-config" shows their values and where each came from.
"ftfast recipes show RECIPE" explains a recipe and its options.
"""


def run(argv: Sequence[str]) -> int:
    """Show help, or train.

    Args:
        argv: Arguments after ``ftfast train``; a leading word is the recipe.

    Returns:
        Exit code.
    """
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--recipe", *arguments]
    wanted = split_arguments(arguments).help
    if wanted == "short":
        print(short_help(), end="")
        return 0
    if wanted == "all":
        return _full_help(arguments)
    from ftfast.train import main as train

    return train(arguments)


def short_help() -> str:
    """Return the text of ``ftfast train -h``: the settings that most runs touch."""
    index = index_of(TrainConfig)
    rows: list[tuple[str, str]] = []
    for short, path in {"out": "out", "seed": "seed", **SHORTHANDS}.items():
        setting = index.settings[path]
        rows.append((f"--{short.replace('_', '-')} {_value_name(setting.type)}", setting.help))
    rows.append(("--config FILE", "YAML file of settings; may be repeated, later files win."))
    rows.append(("--resume [FOLDER]", "Continue the run in --out (or FOLDER) exactly where it stopped."))
    rows += [(f"--{name.replace('_', '-')}", text) for name, text in SWITCHES.items()]
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    return _HEAD + "".join(f"\n{_row(flag, text, width)}" for flag, text in rows) + "\n" + _TAIL


def _value_name(annotation: object) -> str:
    inner, _ = optional_inner(annotation)
    return {int: "N", float: "X", bool: ""}.get(inner, "NAME")


def _row(flag: str, text: str, width: int) -> str:
    indent = " " * 24
    lines = textwrap.wrap(text, width - len(indent)) or [""]
    first = f"  {flag:<21} {lines[0]}" if len(flag) <= 21 else f"  {flag}\n{indent}{lines[0]}"
    return "\n".join([first, *(indent + line for line in lines[1:])])


def _full_help(arguments: Sequence[str]) -> int:
    """Print tyro's page of every setting, with the defaults and options of the recipe if one is named."""
    import tyro

    from ftfast.config.resolve import find_recipe, resolve

    asked = split_arguments(arguments)
    name, origin = find_recipe(asked.files, asked.overrides)
    options_type, preset = None, {}
    if origin != "default":
        from ftfast.recipes import get_recipe

        recipe = get_recipe(name)
        options_type, preset = recipe.options, recipe.preset
    config = resolve(options_type, preset, (), ["--recipe", name]).config
    shown: type = TrainConfig
    default: TrainConfig = config
    if options_type is not None:
        field = ("options", options_type, dataclasses.field(default_factory=options_type))
        shown = dataclasses.make_dataclass("TrainConfig", [field], bases=(TrainConfig,), frozen=True, kw_only=True)
        default = shown(**{item.name: getattr(config, item.name) for item in dataclasses.fields(config)})
    tyro.cli(shown, args=["--help"], prog=f"ftfast train {name}", default=default, description="Every setting.")
    return 0

"""``ftfast tune``: hyper-parameters found on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftfast.cli import output
from ftfast.config.arguments import split_arguments
from ftfast.errors import ConfigError

_HELP = """usage: ftfast tune RECIPE --data TABLE_OR_FOLDER [--generic DATA] [--space FILE] [--trials N] [settings]

Search a recipe's settings on validation data: the mean of target and generic validation by default. The first trial is
the shipped default. Validation classes are disjoint from those of training and of testing; test data is never opened.

  ftfast tune infusing --demo --trials 20
  ftfast tune clip-cite --data photos/ --generic coco.csv --task zero_shot --space space.yaml
  ftfast tune infusing --demo --resume                 after an interruption, or as a further process beside it

  --space FILE          YAML: "optim.lr: {low: 1e-5, high: 1e-3, log: true}", "{times: 10}" around the default, or
                        "{choices: [a, b]}"; default: the recipe's own space.
  --trials N            Trials in all; default 20. Raise it with --resume to search on.
  --objective NAME      mean (default), harmonic, worst, target or generic. The report shows the whole front.
  --task NAME           What validation measures: image_retrieval (mAP@20, default) or zero_shot (top-1).
  --search-seed N       Seed of the search; default 0.
  --demo                Search from the demo's settings, on the built-in data.
  --out FOLDER          Output folder; default runs/tune_<recipe>. It holds study.db (SQLite), best.yaml, report/.
  --resume              Go on; several processes may do so at once.
  --overwrite           Replace the search in --out.
  --json                Print the result as JSON.
  --config FILE         YAML file of settings; may be repeated.

Every training setting is a flag too (see "ftfast train -h"). Train with the result: ftfast train --config best.yaml
"""

_VALUES = ("space", "trials", "objective", "task", "search_seed", "out")
_CHOICES = {
    "objective": ("mean", "harmonic", "worst", "target", "generic"),
    "task": ("image_retrieval", "zero_shot"),
}


def run(argv: Sequence[str]) -> int:
    """Search.

    Args:
        argv: Arguments after ``ftfast tune``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the arguments are wrong.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return 0
    own, rest = _take_own(argv)
    arguments = split_arguments(rest)
    for word in ("dry_run", "print_config"):
        if getattr(arguments, word):
            raise ConfigError(f"--{word.replace('_', '-')} is of 'ftfast train', not of 'ftfast tune'.")
    from ftfast.tune.driver import TuneConfig, run_tune

    files = arguments.files
    if "demo" in own:
        files = (str(_demo_preset(own.get("recipe", ""))), *files)
    config = TuneConfig(
        recipe=own.get("recipe", "infusing"),
        space=own.get("space", ""),
        trials=_number(own.get("trials", "20"), "--trials"),
        objective=own.get("objective", "mean"),
        task=own.get("task", "image_retrieval"),
        out=own.get("out", ""),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        seed=_number(own.get("search_seed", "0"), "--search-seed"),
        files=files,
        overrides=arguments.overrides,
    )
    result = run_tune(config)
    if arguments.json:
        output.emit_json(result.as_dict())
    else:
        output.emit(str(result.folder / "best.yaml"))
    return 0


def _demo_preset(recipe: str) -> Path:
    from ftfast.recipes import get_recipe

    method = get_recipe(recipe or "infusing")
    path = method.preset_path.parent / "demo" / f"{method.name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise ConfigError(f"the demo has no settings for recipe '{recipe}'. It has: {known}.")
    return path


def _take_own(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separate the arguments of this command from training settings."""
    own: dict[str, Any] = {}
    rest: list[str] = []
    tokens = list(argv)
    if tokens and not tokens[0].startswith("-"):
        own["recipe"] = tokens.pop(0)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key == "demo" and not equals:
            own[key] = True
        elif key in _VALUES:
            if not equals and (not tokens or tokens[0].startswith("--")):
                raise ConfigError(f"{name} needs a value.")
            own[key] = value if equals else tokens.pop(0)
            if own[key] not in _CHOICES.get(key, (own[key],)):
                raise ConfigError(f"{name} is '{own[key]}'. Use one of: {', '.join(_CHOICES[key])}.")
        else:
            rest.append(token)
    return own, rest


def _number(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag} has '{text}', which is not a whole number.") from None

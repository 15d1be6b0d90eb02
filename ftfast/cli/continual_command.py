"""``ftfast continual``: tasks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftfast.cli import output
from ftfast.config.arguments import split_arguments
from ftfast.errors import ConfigError

_HELP = """usage: ftfast continual TASKS [--recipe NAME] [--out FOLDER] [settings]

Learn tasks one after the other; after each, measure all of them, learned or not. TASKS is a YAML file, or one of
  builtin    eight groups of drawings (no download), orders I and II
  mtil       eleven torchvision data sets, orders I and II: the MTIL benchmark
  cifar100   class-incremental CIFAR100 in 10, 20 or 50 --steps

  ftfast continual builtin --recipe gift --order II --seeds 0,1,2
  ftfast continual mtil --check --data-root /data
  ftfast continual tasks.yaml --recipe zscl --model ViT-B-16 --pretrained openai

  --recipe NAME         Method (gift, zscl, lwf, ewc-online, icarl, wise-ft, finetune, ...); default gift.
  --order NAME          Order from the file, or task names separated by commas.
  --seeds 0,1,2         Seeds; several give means and spreads.
  --steps N             Number of steps of a class-incremental sequence.
  --check               Say what data is missing and where to put it; run nothing.
  --data-root FOLDER    Where torchvision data sets lie.
  --out FOLDER          Output folder.
  --resume              Continue the sequence in --out, between tasks or inside one.
  --overwrite           Replace the sequence in --out.
  --keep-weights all    Keep the weights after every task, not only after the last.
  --json                Print the figures as JSON.
  --config FILE         YAML file of settings; may be repeated.

Every training setting is a flag too: --lr 1e-4 --max-steps 500 --generic pairs.csv --options.distill-weight 2
(see "ftfast train -h"; "ftfast recipes show NAME" lists a recipe's options).
"""

_VALUES = ("recipe", "order", "seeds", "steps", "data_root", "out", "keep_weights")
_SWITCHES = ("check",)


def run(argv: Sequence[str]) -> int:
    """Run or check a sequence.

    Args:
        argv: Arguments after ``ftfast continual``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the arguments are wrong, or --check finds something missing.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return 0
    own, rest = _take_own(argv)
    arguments = split_arguments(rest)
    for word in ("dry_run", "print_config"):
        if getattr(arguments, word):
            raise ConfigError(f"--{word.replace('_', '-')} is of 'ftfast train'. Use --check here.")
    from ftfast.continual.driver import ContinualConfig, run_continual

    config = ContinualConfig(
        tasks=own.get("tasks", "builtin"),
        recipe=own.get("recipe", "gift"),
        order=own.get("order", ""),
        steps=_number(own.get("steps", "0"), "--steps"),
        out=own.get("out", ""),
        seeds=tuple(_number(word, "--seeds") for word in own.get("seeds", "0").split(",")),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        keep_weights=_choice(own.get("keep_weights", "last")),
        data_root=own.get("data_root", ""),
        files=arguments.files,
        overrides=arguments.overrides,
    )
    if "check" in own:
        return _check(config)
    result = run_continual(config)
    if arguments.json:
        output.emit_json(result.as_dict())
    else:
        output.emit(str(result.folder))
    return 0


def _take_own(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separate the arguments of this command from training settings."""
    own: dict[str, Any] = {}
    rest: list[str] = []
    tokens = list(argv)
    if tokens and not tokens[0].startswith("-"):
        own["tasks"] = tokens.pop(0)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key in _SWITCHES and not equals:
            own[key] = True
        elif key in _VALUES:
            if not equals and (not tokens or tokens[0].startswith("--")):
                raise ConfigError(f"{name} needs a value.")
            own[key] = value if equals else tokens.pop(0)
        else:
            rest.append(token)
    return own, rest


def _number(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        example = "0,1,2" if flag == "--seeds" else "10"
        raise ConfigError(f"{flag} has '{text}', which is not a whole number. Write for example {example}.") from None


def _choice(text: str) -> Any:
    if text not in ("last", "all"):
        raise ConfigError(f"--keep-weights is '{text}'. Use last or all.")
    return text


def _check(config: Any) -> int:
    """Print what is there and what is not; exit code 2 if anything is missing."""
    from ftfast.config.tasks import read_tasks
    from ftfast.continual.checks import preparation
    from ftfast.continual.driver import tasks_file, with_root

    file = with_root(read_tasks(tasks_file(config.tasks), order=config.order, steps=config.steps), config.data_root)
    reports = preparation(file.sequence)
    for report in reports:
        output.emit(f"{'ready' if not report.problems else 'MISSING':8} {report.name}")
        for line in (*report.found, *report.problems):
            output.emit(f"         {line}")
    lacking = [report.name for report in reports if report.problems]
    output.emit(f"{len(reports) - len(lacking)} of {len(reports)} ready")
    return 2 if lacking else 0

"""The table of commands and the entry point ``ftfast``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ftfast
from ftfast.cli.guard import run
from ftfast.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """One subcommand; its module is imported only when it runs."""

    usage: str
    """What follows "ftfast" in the overview."""
    summary: str
    """One line."""
    target: str
    """"module:function"; the function takes the remaining arguments and returns an exit code."""

    def load(self) -> Callable[[Sequence[str]], int | None]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)


COMMANDS: dict[str, Command] = {
    "demo": Command("demo", "see forgetting, and its cure, on real images in minutes", "ftfast.cli.demo_command:run"),
    "train": Command(
        "train RECIPE --data TABLE_OR_FOLDER", "fine-tune; report gain and forgetting", "ftfast.cli.train_command:run"
    ),
    "continual": Command(
        "continual TASKS --recipe gift", "learn tasks one after the other", "ftfast.cli.continual_command:run"
    ),
    "fewshot": Command(
        "fewshot DATA --recipes clip-cite", "learn from a few images per class", "ftfast.cli.fewshot_command:run"
    ),
    "upgrade": Command(
        "upgrade PROMPT --to MODEL", "move a prompt to another model, measure it", "ftfast.cli.upgrade_command:run"
    ),
    "tune": Command("tune RECIPE --data DATA", "search settings on validation data", "ftfast.cli.tune_command:run"),
    "plan": Command(
        "plan --model NAME --zero 3 --gpus 8", "memory a run takes on each GPU", "ftfast.cli.plan_command:run"
    ),
    "eval": Command("eval RUN_OR_WEIGHTS --suite FILE", "measure a model", "ftfast.cli.evaluate_command:run"),
    "merge": Command(
        "merge START END --alpha 0:1:0.1", "interpolate weights (WiSE-FT)", "ftfast.cli.merge_command:run"
    ),
    "export": Command(
        "export RUN --to FORMAT --out PATH", "write weights for other tools", "ftfast.cli.export_command:run"
    ),
    "recipes": Command("recipes [show NAME]", "list the methods, or explain one", "ftfast.cli.recipes_command:run"),
    "search": Command("search build|query", "exact nearest neighbours over images", "ftfast.cli.search_command:run"),
    "synth": Command("synth --out FOLDER", "generate image-caption pairs for replay", "ftfast.cli.synth_command:run"),
    "pretrain": Command("pretrain", "make the built-in tiny CLIP again", "ftfast.cli.pretrain_command:run"),
    "doctor": Command("doctor [--self-test]", "what this machine uses, and why", "ftfast.cli.doctor_command:run"),
    "version": Command("version", "print the version", "ftfast.cli.application:print_version"),
}


def overview() -> str:
    """Return the text of ``ftfast -h``."""
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"  ftfast {command.usage:<{width}}  {command.summary}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "Fine-tune CLIP-like models without forgetting what they knew.",
            "",
            *lines,
            "",
            "Every command explains itself with -h. Results go to standard output, logs to standard error.",
            "Exit codes: 0 done, 1 failed while running, 2 wrong usage, settings or data, 130 interrupted.",
        ]
    )


def print_version(argv: Sequence[str]) -> int:
    """Print the version."""
    print(f"ftfast {ftfast.__version__}")
    return 0


def dispatch(argv: Sequence[str]) -> int:
    """Find the command and run it.

    Args:
        argv: Command name and its arguments.

    Returns:
        Its exit code.

    Raises:
        ConfigError: If there is no such command.
    """
    words = [word for word in argv if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("--version", "-V"):
        return print_version(())
    command = COMMANDS.get(words[0])
    if command is None:
        import difflib

        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Commands: {', '.join(COMMANDS)}."
        raise ConfigError(f"unknown command '{words[0]}'. {hint}")
    position = list(argv).index(words[0])
    return command.load()([*argv[:position], *argv[position + 1 :]]) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit code: 0 done, 1 runtime error, 2 wrong usage, settings or data, 130 interrupted.
    """
    return run(dispatch, sys.argv[1:] if argv is None else argv)

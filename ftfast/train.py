"""Train a recipe: ``ftfast train RECIPE ...``, ``python ftfast/train.py --recipe RECIPE ...`` or a launcher of either.

Switches (``--dry-run --print-config --resume [FOLDER] --overwrite --json --debug``) are documented by
``ftfast train -h``; everything else sets a configuration value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve settings and run what the command line asks for, in this process or as one of several.

    Args:
        argv: Arguments after the program name, with the recipe as ``--recipe NAME``; None: ``sys.argv``.

    Returns:
        0 when the run (or check) succeeded.

    Raises:
        FtfastError: Any problem a user can fix; :func:`ftfast.cli.main` turns it into one sentence and an exit code.
    """
    from ftfast.errors import FtfastError

    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except FtfastError:
        if not _first():
            # Most problems meet every process; the first one reports them, and its launcher ends the others meanwhile.
            time.sleep(5.0)
        raise


def _first() -> bool:
    """Whether this process prints: the only one, or the first of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _run(words: list[str]) -> int:
    from ftfast.config.arguments import split_arguments
    from ftfast.config.resolve import find_recipe, resolve, with_origins
    from ftfast.recipes import get_recipe

    arguments = split_arguments(words)
    if arguments.help:
        from ftfast.cli.train_command import run

        return run(words)
    recipe = get_recipe(find_recipe(arguments.files, arguments.overrides)[0])
    resolved = resolve(recipe.options, recipe.preset, arguments.files, arguments.overrides)
    if arguments.print_config:
        if _first():
            print(with_origins(resolved), end="")
        return 0

    from rich.console import Console

    console = Console(stderr=True)
    if arguments.dry_run:
        from ftfast.engine.dry_run import dry_run

        if _first():
            dry_run(resolved, console, resume=arguments.resume, overwrite=arguments.overwrite)
        return 0

    from ftfast.engine.launching import train_together

    result = train_together(
        resolved.config, argv=words, resume=arguments.resume, overwrite=arguments.overwrite, console=console
    )
    if arguments.json and _first():
        print(json.dumps(result.as_dict(), indent=2))
    return 0


if __name__ == "__main__":
    # A launcher starts this file with its own folder first on the path; ftfast must come from where it is installed.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != here]
    from ftfast.cli import guard

    sys.exit(guard.run(main, sys.argv[1:]))

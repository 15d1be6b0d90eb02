"""Train a recipe: ``ftfast train RECIPE ...``, ``python ftfast/train.py --recipe RECIPE ...`` or a launcher of either.

Switches (``--dry-run --print-config --resume [FOLDER] --overwrite --json --debug``) are documented by
``ftfast train -h``; everything else sets a configuration value.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve settings and run what the command line asks for.

    Args:
        argv: Arguments after the program name, with the recipe as ``--recipe NAME``; None: ``sys.argv``.

    Returns:
        0 when the run (or check) succeeded.

    Raises:
        FtfastError: Any problem a user can fix; :func:`ftfast.cli.main` turns it into one sentence and an exit code.
    """
    from ftfast.config.arguments import split_arguments
    from ftfast.config.resolve import find_recipe, resolve, with_origins
    from ftfast.recipes import get_recipe

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = split_arguments(words)
    if arguments.help:
        from ftfast.cli.train_command import run

        return run(words)
    recipe = get_recipe(find_recipe(arguments.files, arguments.overrides)[0])
    resolved = resolve(recipe.options, recipe.preset, arguments.files, arguments.overrides)
    if arguments.print_config:
        print(with_origins(resolved), end="")
        return 0

    _require_one_process()
    from rich.console import Console

    console = Console(stderr=True)
    if arguments.dry_run:
        from ftfast.engine.dry_run import dry_run

        dry_run(resolved, console, resume=arguments.resume, overwrite=arguments.overwrite)
        return 0

    from ftfast.engine.run import train

    result = train(resolved.config, argv=words, resume=arguments.resume, overwrite=arguments.overwrite, console=console)
    if arguments.json:
        print(json.dumps(result.as_dict(), indent=2))
    return 0


def _require_one_process() -> None:
    """Refuse a launcher's second process: each would train alone and write into the same folder.

    Raises:
        ConfigError: If WORLD_SIZE is above 1.
    """
    from ftfast.errors import ConfigError

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"WORLD_SIZE is {processes}, but this version trains in one process. "
            "Launch one (--nproc_per_node 1 or --num_gpus 1) and use --accum-freq for a larger batch."
        )


if __name__ == "__main__":
    # A launcher starts this file with its own folder first on the path; ftfast must come from where it is installed.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != here]
    from ftfast.cli import guard

    sys.exit(guard.run(main, sys.argv[1:]))

"""From exceptions to exit codes: 0 ok, 1 runtime error, 2 usage, configuration or data error, 130 interrupted."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ftfast.errors import ConfigError, FtfastError


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command; report what goes wrong in one sentence on standard error.

    Args:
        command: Takes the arguments, returns an exit code (None counts as 0).
        argv: Its arguments; ``--debug`` among them asks for tracebacks.

    Returns:
        The exit code for the process.
    """
    debug = "--debug" in argv
    try:
        return command(argv) or 0
    except SystemExit as stop:  # tyro's help and parsers of other tools
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except FtfastError as error:
        return _report(_sentence(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("interrupted.", 130, debug)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _report(_operating_system(error), 1, debug)
    except Exception as error:
        return _report(_unexpected(error), 1, debug)


def _report(sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(sentence if sentence.startswith("interrupted") else f"error: {sentence}", file=sys.stderr)
    return code


def _sentence(error: FtfastError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        listed = "\n".join(f"  - {problem}" for problem in error.problems)
        return f"{len(error.problems)} problems in the settings:\n{listed}"
    return str(error)


def _operating_system(error: OSError) -> str:
    where = f": '{error.filename}'" if error.filename else ""
    return f"{error.strerror or error}{where}. Run again with --debug for the traceback."


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: {first} Lower --batch-size and raise --accum-freq, or use --precision amp_bf16."
    return f"{type(error).__name__}: {first} (unexpected; run again with --debug for the traceback)"

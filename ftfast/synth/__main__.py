"""``python -m ftfast.synth``: what ``ftfast synth`` does, for launchers that start one process per GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ftfast.cli.guard import run
from ftfast.cli.synth_command import run as command


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script, so that ``torchrun -m ftfast.synth`` starts one process per GPU.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit code.
    """
    return run(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

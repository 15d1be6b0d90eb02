"""``python -m ftfast.data.builtin --describe`` prints the counts of every split."""

from __future__ import annotations

import argparse
import sys

from ftfast.data.builtin import describe
from ftfast.errors import FtfastError


def main() -> int:
    """Print the table, or one sentence on standard error when the data cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m ftfast.data.builtin", description=__doc__)
    parser.add_argument("--describe", action="store_true", help="print images, classes and hands of every split")
    parser.parse_args()
    try:
        print(describe())
    except FtfastError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

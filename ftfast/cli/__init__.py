"""The command line. Only what a command needs is imported, so ``ftfast -h`` answers at once."""

from __future__ import annotations

from ftfast.cli.application import main

__all__ = ["main"]

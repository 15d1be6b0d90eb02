"""Errors a user can meet. Each carries the process exit code the command line returns for it.

Messages follow one form: what is wrong (with the value), where it came from, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class FtfastError(Exception):
    """Base of every error that is reported as one sentence instead of a traceback."""

    exit_code = 1


class ConfigError(FtfastError):
    """One or more problems in the configuration; all of them are reported together.

    Args:
        problems: One sentence per problem, or a single sentence.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(FtfastError):
    """Input data that cannot be used: a missing file, a wrong column, an empty class."""

    exit_code = 2


class ModelError(FtfastError):
    """A model name, weights file or architecture that cannot be used."""

    exit_code = 2


class CheckpointError(FtfastError):
    """A checkpoint or index file that is missing, damaged or belongs to another run."""

    exit_code = 2


class MissingExtraError(FtfastError):
    """An optional dependency is needed for what was asked; the message names the extra to install."""

    exit_code = 2

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. Run: pip install 'ftfast[{extra}]'"
        )


class TrainingError(FtfastError):
    """Training cannot go on, for example because a loss term became NaN."""


class Interrupted(FtfastError):
    """The run was stopped by SIGINT or SIGTERM after saving a checkpoint."""

    exit_code = 130


class ShapeError(FtfastError, ValueError):
    """A tensor has the wrong shape, dtype or device for the operation."""

    exit_code = 2

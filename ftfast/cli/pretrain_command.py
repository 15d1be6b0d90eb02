"""``ftfast pretrain``: make the built-in tiny CLIP again."""

from __future__ import annotations

from collections.abc import Sequence

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.pretrain.settings import PretrainConfig


def run(argv: Sequence[str]) -> int:
    """Train and write the model.

    Args:
        argv: Arguments after ``ftfast pretrain``.

    Returns:
        Exit code.
    """
    config = parse_options(PretrainConfig, argv, "ftfast pretrain")
    from ftfast.pretrain.training import pretrain

    output.emit(str(pretrain(config, output.note)))
    return 0

"""``ftfast doctor``: what this machine uses, and why; ``--self-test`` checks that its kernels are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftfast.cli import output
from ftfast.cli.options import parse_options


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Print versions, devices and what runs each operation; --self-test compares kernels with plain formulas."""

    self_test: bool = False
    """Compare every operation and the search with float64 references on this machine (under 30 seconds)."""
    json: bool = False
    """Print as JSON."""


def run(argv: Sequence[str]) -> int:
    """Report on this machine.

    Args:
        argv: Arguments after ``ftfast doctor``.

    Returns:
        0, or 1 if a self-test fails.
    """
    arguments = parse_options(DoctorArguments, argv, "ftfast doctor")
    from ftfast.doctor import as_text, collect, self_test

    report = collect()
    checks = self_test() if arguments.self_test else []
    if arguments.json:
        output.emit_json({**report, "self_test": [check.as_dict() for check in checks]})
    else:
        output.emit(as_text(report, checks))
    return int(any(not check.passed for check in checks))

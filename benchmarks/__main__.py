"""Dispatch ``python -m benchmarks NAME [options]`` to ``benchmarks.NAME.main``, importing only that module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "losses": "similarity losses: time, peak memory and error beside open_clip and other fused losses",
    "cards": "kernel cards: registers, shared memory, spills and tensor-core instructions of every shipped kernel",
    "topk": "exact top-k search beside faiss and plain PyTorch",
    "weightspace": "Fisher accumulation and the anchored optimizer beside PyTorch loops",
    "continual": "GIFT beside its peers on the built-in tasks: both orders, three seeds",
    "train": "a training step in its parts, stock losses beside ours, by number of processes",
    "zero": "memory of each process under ZeRO, beside what ftfast plan says",
    "plotting": "draw time and memory from the recorded results (also: plot)",
}
ALIASES = {"plot": "plotting"}


def usage() -> str:
    """Return the help text: one line per benchmark."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: python -m benchmarks NAME [options]   (NAME --help lists the options)\n\n" + "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run one benchmark.

    Args:
        argv: The benchmark's name followed by its own options.

    Returns:
        The exit code: 0 on success, 2 for an unknown name.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        print(usage())
        return 0 if argv else 2
    name = ALIASES.get(argv[0], argv[0]).replace("-", "_")
    if name not in COMMANDS and not name.startswith("train_"):
        print(f"There is no benchmark called '{argv[0]}'.\n{usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"benchmarks.{name}":
            raise
        print(f"There is no benchmark called '{argv[0]}'.\n{usage()}", file=sys.stderr)
        return 2
    return int(module.main(list(argv[1:])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One process of a test of several (run by test_deepspeed_*.py): trains each case of a JSON file in turn.

Usage: ranks.py RANK WORLD PORT CASES, with CASES a list of {"argv": [...], "resume": bool}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

RANK, WORLD, PORT, CASES = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
os.environ.update(
    MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT, RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD),
    OMP_NUM_THREADS="1",
)  # fmt: skip

from ftfast.config.arguments import split_arguments  # noqa: E402
from ftfast.config.resolve import find_recipe, resolve  # noqa: E402
from ftfast.engine.processes import join_processes, leave_processes  # noqa: E402
from ftfast.engine.run import train  # noqa: E402
from ftfast.recipes import get_recipe  # noqa: E402


def main() -> None:
    cache = CASES.parent / "cache"
    processes = join_processes("cpu", 120.0, True)
    for case in json.loads(CASES.read_text()):
        words = split_arguments(case["argv"])
        recipe = get_recipe(find_recipe(words.files, words.overrides)[0])
        config = resolve(recipe.options, recipe.preset, words.files, words.overrides).config
        train(config, argv=case["argv"], resume=words.resume, cache_dir=cache, processes=processes)
        if RANK == 0:
            print("done", " ".join(case["argv"][-2:]), flush=True)
    leave_processes()


main()

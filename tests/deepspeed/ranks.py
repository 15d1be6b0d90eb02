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

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ftfast.config.arguments import split_arguments  # noqa: E402
from ftfast.config.resolve import find_recipe, resolve  # noqa: E402
from ftfast.engine.deepspeed_engine import DeepSpeedEngine  # noqa: E402
from ftfast.engine.processes import join_processes, leave_processes  # noqa: E402
from ftfast.engine.run import train  # noqa: E402
from ftfast.recipes import get_recipe  # noqa: E402


def keep_embeddings(folder: Path) -> None:
    """Whenever weights are collected, embed two images with the divided model itself first; the last time counts."""
    collect = getattr(DeepSpeedEngine.full_weights, "collect", DeepSpeedEngine.full_weights)

    @torch.no_grad()
    def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
        size = engine.module.clip.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.linspace(-1, 1, 2 * 3 * height * width).reshape(2, 3, height, width)
        features, _, _ = engine.forward(images, None)
        if RANK == 0:
            save_file({"images": images, "features": features.float().clone()}, folder / "embeddings.safetensors")
        return collect(engine)

    full_weights.collect = collect  # type: ignore[attr-defined]
    DeepSpeedEngine.full_weights = full_weights  # type: ignore[method-assign]


def main() -> None:
    cache = CASES.parent / "cache"
    processes = join_processes("cpu", 120.0, True)
    for case in json.loads(CASES.read_text()):
        words = split_arguments(case["argv"])
        recipe = get_recipe(find_recipe(words.files, words.overrides)[0])
        config = resolve(recipe.options, recipe.preset, words.files, words.overrides).config
        keep_embeddings(Path(config.out))
        train(config, argv=case["argv"], resume=words.resume, cache_dir=cache, processes=processes)
        if RANK == 0:
            print("done", " ".join(case["argv"][-2:]), flush=True)
    leave_processes()


main()

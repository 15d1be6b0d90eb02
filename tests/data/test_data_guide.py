"""The Python blocks of docs/data.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_code_blocks_run_in_order(tmp_path, monkeypatch):
    for label in range(5):
        (tmp_path / "photos" / f"class_{label}").mkdir(parents=True)
        for number in range(20):
            noise = np.random.default_rng([label, number]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "photos" / f"class_{label}" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    assert len(scope["train"].class_names) == 4
    assert (len(scope["base"].class_names), len(scope["new"].class_names)) == (3, 2)
    assert len(scope["sixteen"]) == 48
    assert scope["batch"].images.shape == (64, 3, 224, 224)
    assert scope["state"]["position"] == 1
    scope["loader"].close()

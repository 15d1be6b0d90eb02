"""Two processes, with and without DeepSpeed, take the steps of one process with the same batch of both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from together import assert_same_losses, assert_same_weights, final_weights, logged, run_alone, run_together

from ftfast.config.schema import ModelConfig
from ftfast.models import load_model
from ftfast.models.tiny import builtin_model_folder

pytest.importorskip("deepspeed")

SUITE = """
eval:
  alphas: [1.0]
  suites:
    - {{name: kinds, task: image_retrieval, role: target, data: {{path: "{table}", split: val}}}}
log: {{report_to: []}}
"""
INFUSING = ["--recipe", "infusing", "--data", "builtin:target/train", "--generic", "builtin:pairs/train"]
# A larger eps: Adam moves weights whose gradient is only rounding at full rate, in a direction of its own, and
# twenty such steps are more than 1e-5 of a loss.
CALM = ["--lr", "1e-4", "--optim.eps", "1e-5"]
GIFT = ["--recipe", "gift", "--data", "builtin:target/train", "--generic", "builtin:pairs/train", *CALM]
FLYP = ["--recipe", "flyp", "--data", "builtin:pairs/train", *CALM]
CITE = ["--recipe", "clip-cite", "--data", "builtin:target/train", *CALM]
STEPS = int(os.environ.get("FTFAST_PARITY_STEPS", "0"))
"""Steps of the cases in LONG instead of the few below: FTFAST_PARITY_STEPS=20 is the long form of this test."""
LONG = ("infusing", "gift", "cite")
MANY = ["--accum-freq", "2", "--optim.grad-clip-norm", "0.5"]
CASES = {
    "infusing": (INFUSING, 6, {"plain": [], "zero0": ["--zero", "0"], "zero1": ["--zero", "1"],
                               "zero2": ["--zero", "2"], "zero3": ["--zero", "3"],
                               "built": ["--zero", "3", "--deepspeed.zero-init"],
                               "offload": ["--zero", "3", "--deepspeed.offload-optimizer",
                                           "--deepspeed.offload-param"]}),
    "accumulated": ([*INFUSING, *MANY], 3, {"plain": [], "zero2": ["--zero", "2"],
                                            "zero3": ["--zero", "3"]}),
    "gift": (GIFT, 4, {"plain": [], "zero2": ["--zero", "2"], "zero3": ["--zero", "3"]}),
    "flyp": (FLYP, 4, {"gather": ["--zero", "2"], "ring": ["--zero", "3", "--train.exchange", "ring"]}),
    "cite": (CITE, 4, {"zero2": ["--zero", "2"], "zero3": ["--zero", "3"]}),
}  # fmt: skip
NAMES = [f"{name}-{way}" for name, (_, _, ways) in CASES.items() for way in ways]


def words(recipe: list[str], steps: int, batch: int, out: Path) -> list[str]:
    return [
        *recipe, "--config", str(out.parent / "suite.yaml"), "--max-steps", str(steps), "--batch-size", str(batch),
        "--workers", "0", "--device", "cpu", "--eval.selection", "last", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, class_table: Path) -> Path:
    """All runs: each recipe alone, then every way of dividing it, in one pair of processes."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "suite.yaml").write_text(SUITE.format(table=class_table))
    together = []
    for name, (recipe, few, ways) in CASES.items():
        steps = (name in LONG and STEPS) or few
        run_alone(words(recipe, steps, 16, folder / name), folder / "cache")
        together += [[*words(recipe, steps, 8, folder / f"{name}-{way}"), *flags] for way, flags in ways.items()]
    run_together(together, folder, timeout=400 + 60 * STEPS)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_those_of_one_process(runs: Path, name: str) -> None:
    recipe = name.split("-")[0]
    assert len({row["train/loss"] for row in logged(runs / recipe)}) > 1
    assert_same_losses(runs / name, runs / recipe, rtol=1e-5)
    start = load_model(ModelConfig(name="tiny-clip-v1")).model.state_dict()
    assert_same_weights(runs / name, runs / recipe, start)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-plain")])
def test_consolidated_folder_in_plain_open_clip_embeds_as_the_divided_model(runs: Path, name: str) -> None:
    folder = runs / name / "final"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    weights = final_weights(runs / name)
    assert weights["logit_scale"].shape == ()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    known = load_file(runs / name / "embeddings.safetensors")
    with torch.no_grad():
        found = model.encode_image(known["images"], normalize=True)
    start = open_clip.create_model(f"local-dir:{builtin_model_folder('tiny-clip-v1')}").eval()
    with torch.no_grad():
        before = start.encode_image(known["images"], normalize=True)
    ensembled = name.startswith("cite")  # CLIP-CITE ends with the mean of start and tuned weights
    if not ensembled:
        assert (found - known["features"]).abs().max() <= 1e-5
    assert (before - known["features"]).abs().max() > 1e-4


def test_only_the_first_process_writes_and_prints(runs: Path) -> None:
    said = [(runs / f"rank{rank}.log").read_text() for rank in range(2)]
    assert "report" in said[0]
    assert "model" not in said[1]
    assert not (runs / "gift-zero2" / "checkpoints" / "last" / "shard_00002.pt").exists()
    assert (runs / "gift-zero2" / "checkpoints" / "last" / "shard_00001.pt").is_file()
    assert json.loads((runs / "gift-zero2" / "result.json").read_text())["steps"] == (STEPS or 4)

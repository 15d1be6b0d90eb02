"""The shipped tiny CLIPs, through plain open_clip, and the command that makes them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from ftfast.data.builtin import load_builtin
from ftfast.errors import ConfigError, ModelError
from ftfast.models.speedups import accept_short_texts, trim_padding
from ftfast.models.tiny import BUILTIN_MODELS, TEMPLATES, build_tiny, builtin_model_folder, save_tiny, tiny_config
from ftfast.pretrain.exam import EVALUATION_TEMPLATE
from ftfast.pretrain.training import PretrainConfig, pretrain

PLAIN_OPEN_CLIP = """
import json, sys
sys.modules["ftfast"] = None  # importing it is now an error
import numpy as np, open_clip, torch
from PIL import Image
folder, exam = sys.argv[1:]
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
data = np.load(exam)

@torch.no_grad()
def embed(images):
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    return torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(200)])

with torch.no_grad():
    names = model.encode_text(tokenizer([str(prompt) for prompt in data["prompts"]]), normalize=True)
hits = (embed(data["images"]) @ names.T).argmax(1) == torch.from_numpy(data["labels"])
nearest = (embed(data["query"]) @ embed(data["gallery"]).T).argmax(1)
same = data["gallery_labels"][nearest.numpy()] == data["query_labels"]
print(json.dumps({
    "acc1": 100 * hits.float().mean().item(), "recall": 100 * float(same.mean()),
    "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    "parameters": sum(p.numel() for p in model.parameters()), "size": model.visual.image_size,
}))
"""


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """Held-out drawings and the retrieval test, as arrays that need no ftfast to read."""
    held_out = load_builtin("pairs/heldout")
    query, gallery = load_builtin("target/test-query"), load_builtin("target/test-gallery")
    path = tmp_path_factory.mktemp("exam") / "exam.npz"
    np.savez(
        path,
        images=held_out.images,
        labels=held_out.labels,
        prompts=np.array([EVALUATION_TEMPLATE.format(name) for name in held_out.class_names]),
        query=query.images,
        query_labels=query.labels,
        gallery=gallery.images,
        gallery_labels=gallery.labels,
    )
    return path


def card_figure(folder, row):
    """The number the model card gives."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return float(re.search(rf"^\| {row}.*\| ([0-9.]+) \|$", text, re.MULTILINE).group(1))


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_shipped_weights_in_plain_open_clip_reach_the_card(name, exam):
    folder = builtin_model_folder(name)
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_OPEN_CLIP, str(folder), str(exam)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["acc1"] == pytest.approx(card_figure(folder, "zero-shot top-1"), abs=0.5)
    assert measured["recall"] == pytest.approx(card_figure(folder, "R@1"), abs=0.5)
    assert measured["acc1"] >= 32
    assert measured["dtypes"] == ["torch.float32"]
    assert (folder / "open_clip_model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    for notice in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY 4.0", "OpenMoji", "CC BY-SA 4.0"):
        assert notice in card


def test_both_models_share_tokenizer_and_text_width():
    first, second = (tiny_config(name)["model_cfg"] for name in BUILTIN_MODELS)
    assert first["text_cfg"] == second["text_cfg"]
    assert first["embed_dim"] == second["embed_dim"]
    assert first["vision_cfg"] != second["vision_cfg"]


def test_shipped_configuration_is_that_of_the_code():
    for name in BUILTIN_MODELS:
        stored = json.loads((builtin_model_folder(name) / "open_clip_config.json").read_text())
        assert stored == tiny_config(name)


def test_unknown_builtin_is_refused():
    with pytest.raises(
        ModelError, match=r"^'tiny-clip-v3' is not a built-in model\. There are: tiny-clip-v1, tiny-clip-v2\.$"
    ):
        builtin_model_folder("tiny-clip-v3")


def test_saving_rounds_to_the_stored_precision_and_replaces_whole(tmp_path):
    import open_clip

    torch.manual_seed(1)
    model = build_tiny("tiny-clip-v1")
    folder = save_tiny(tmp_path / "model", "tiny-clip-v1", model.state_dict(), "old card")
    save_tiny(folder, "tiny-clip-v1", model.state_dict(), "new card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (folder / "README.md").read_text() == "new card"
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for (name, stored), original in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        if original.is_floating_point():
            torch.testing.assert_close(stored, original, rtol=2**-10, atol=1e-6, msg=name)
        else:
            assert torch.equal(stored, original)


def test_cut_prompts_equal_the_full_text_tower():
    from open_clip import SimpleTokenizer

    torch.manual_seed(0)
    model = build_tiny("tiny-clip-v1").double().eval()
    tokens = SimpleTokenizer(context_length=24)([template.format("T-Rex") for template in TEMPLATES])
    with torch.no_grad():
        whole = model.encode_text(tokens)
        assert accept_short_texts(model)
        short = trim_padding(model, tokens)
        assert short.shape[1] < tokens.shape[1]
        torch.testing.assert_close(model.encode_text(short), whole, rtol=1e-9, atol=1e-12)


def test_smoke_run_writes_a_model_twice_the_same(tmp_path):
    import open_clip
    from safetensors.torch import load_file

    lines = []
    states = []
    for number in range(2):
        torch.manual_seed(number)  # the run must not depend on the caller's seed
        out = pretrain(
            PretrainConfig(out=str(tmp_path / f"run{number}"), smoke=True, batch_size=24, seed=5), lines.append
        )
        states.append(load_file(out / "open_clip_model.safetensors"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    start = build_tiny("tiny-clip-v1").state_dict()
    assert all(states[0][key].shape == start[key].shape for key in start)
    assert re.search(r"epoch 1/1  loss \d+\.\d{3}  scale .*zero-shot .* people R@1 .* s left", lines[1])
    assert "--seed 5 --batch-size 24 --smoke" in (out / "README.md").read_text()
    open_clip.create_model_and_transforms(f"local-dir:{out}")


def test_training_learns_the_names(tmp_path):
    lines = []
    config = PretrainConfig(out=str(tmp_path / "run"), smoke=True, batch_size=16, epochs=14, log_every=7)
    pretrain(config, lines.append)
    losses = [float(re.search(r"loss ([\d.]+)", line).group(1)) for line in lines if line.startswith("epoch")]
    assert losses[-1] < 0.75 * np.log(16)  # ln 16: what a model that knows nothing scores


def test_every_wrong_setting_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        pretrain(PretrainConfig(out=str(tmp_path), epochs=-1, batch_size=1, lr=0.0, log_every=0))
    assert caught.value.problems == (
        "epochs is -1; it must be 0 (the recipe's) or more.",
        "batch_size is 1; it must be at least 2.",
        "lr is 0.0; it must be positive.",
        "log_every is 0; it must be at least 1.",
        f"{tmp_path} exists. Give another --out, or --overwrite.",
    )


def test_smoke_run_may_not_replace_the_shipped_weights():
    folder = builtin_model_folder("tiny-clip-v1")
    with pytest.raises(ConfigError, match="a smoke run must not replace the shipped weights"):
        pretrain(PretrainConfig(out=str(folder), smoke=True, overwrite=True))

"""``ftfast export --to hf`` against transformers' own CLIPModel, tokenizer and image processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from ftfast.cli import main
from ftfast.errors import ModelError
from ftfast.integrations.huggingface import convert_config, convert_state

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random ViT CLIP as an open_clip folder, and what export made of it."""
    source = tmp_path_factory.mktemp("hf") / "source"
    source.mkdir()
    config = {**CONFIG, "quick_gelu": request.param}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0, where a swapped one would not show
                torch.nn.init.normal_(parameter, std=0.3)
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()}, source / "open_clip_model.safetensors"
    )
    out = source.parent / "exported"
    assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
    return source, out


def test_same_features_from_the_same_pictures_and_words(exported):
    source, out = exported
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{source}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{source}")
    theirs = transformers.CLIPModel.from_pretrained(out)
    words = ["a photo of a cat.", "Größe №1 😀 isn't", "x"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    tokens = transformers.CLIPTokenizer.from_pretrained(out)(
        words, padding="max_length", max_length=16, return_tensors="pt"
    )
    pixels = transformers.CLIPImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], transform(picture), atol=1e-5, rtol=0)
    with torch.no_grad():
        result = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        image = model.eval().encode_image(transform(picture)[None], normalize=True)
        text = model.encode_text(tokenizer(words), normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(result.text_embeds, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.logits_per_image, logits, atol=1e-3, rtol=0)


def test_every_entry_of_the_other_model_is_filled(exported):
    _, out = exported
    theirs = transformers.CLIPModel.from_pretrained(out)
    names = {name for name in theirs.state_dict() if not name.endswith("position_ids")}
    assert set(load_file(out / "model.safetensors")) == names


def test_a_model_of_another_kind_is_refused(tiny_folder, tmp_path, capsys):
    assert main(["export", str(tiny_folder), "--to", "hf", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == (
        "error: Hugging Face's CLIPModel has no ResNet image tower. Use --to open-clip.\n"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [("vision_cfg", "pool_type", "avg"), ("text_cfg", "no_causal_mask", True), ("text_cfg", "hf_model_name", "xlm")],
)
def test_other_computations_are_refused(tower, key, value):
    config = json.loads(json.dumps(CONFIG))
    config[tower][key] = value
    with pytest.raises(ModelError) as caught:
        convert_config(config)
    assert str(caught.value) == (
        f"{tower}.{key} is {value!r}, which Hugging Face's CLIPModel cannot express. Use --to open-clip."
    )


@pytest.mark.parametrize(
    "name", ["logit_bias", "visual.transformer.resblocks.0.ls_1.gamma", "transformer.resblocks.0.x.weight"]
)
def test_entries_without_a_counterpart_are_refused(name):
    with pytest.raises(ModelError) as caught:
        convert_state({name: torch.zeros(1)})
    assert str(caught.value) == (
        f"this model has '{name}', which Hugging Face's CLIPModel has no place for. Use --to open-clip."
    )

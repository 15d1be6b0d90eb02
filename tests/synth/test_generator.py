"""The built-in generator: training that resumes, a pipeline that repeats its images, and ftfast synth with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.data.builtin import load_builtin, synthetic
from ftfast.errors import CheckpointError, ConfigError
from ftfast.models.generator import (
    TinyDiffusionPipeline,
    build_unet,
    conditions,
    embed_prompts,
    fold,
    generator_folder,
    save_pipeline,
    unfold,
)
from ftfast.models.tiny import BUILTIN_MODELS
from ftfast.synth import training as synth_training
from ftfast.synth.exam import judge
from ftfast.synth.generate import synthesize
from ftfast.synth.settings import SynthConfig
from ftfast.synth.training import GeneratorConfig, train_generator, training_data

PROMPTS = ["a drawing of a red apple.", "a drawing of a cat.", "a drawing of a flag of France."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet()
    return save_pipeline(tmp_path_factory.mktemp("generator") / "random", unet, "# random\n")


@pytest.fixture
def config(tmp_path: Path) -> GeneratorConfig:
    return GeneratorConfig(
        out=str(tmp_path / "out"),
        steps=4,
        batch_size=4,
        sketch_steps=3,
        save_every=2,
        sheet_every=0,
        precision="fp32",
        compile=False,
    )


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "unet" / "diffusion_pytorch_model.safetensors")


def seeded(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(config, tmp_path, monkeypatch):
    train_generator(config)
    parts, update = replace(config, out=str(tmp_path / "parts")), synth_training._Run.update

    def stop_in_the_fourth_step(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return update(run)

    monkeypatch.setattr(synth_training._Run, "update", stop_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        train_generator(parts)
    monkeypatch.undo()
    said = []
    with pytest.raises(CheckpointError, match=r"the unfinished run had batch_size 4, not 5"):
        train_generator(replace(parts, batch_size=5))
    train_generator(parts, said.append)
    assert said[0].startswith("going on at step 2")
    whole, pieces = weights(config.out), weights(parts.out)
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert not torch.equal(whole["conv_in.weight"], save_and_load(config))


def save_and_load(config: GeneratorConfig) -> torch.Tensor:
    """The first filters as they were before training."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build_unet().conv_in.weight.half()


def test_training_mistakes(config, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train_generator(replace(config, steps=0, lr=0, ema=1))
    assert len(caught.value.problems) == 3
    Path(config.out).mkdir()
    with pytest.raises(ConfigError, match="exists"):
        train_generator(config)
    partial = Path(f"{tmp_path}/new.partial")
    partial.mkdir()
    (partial / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="damaged"):
        train_generator(replace(config, out=str(tmp_path / "new")))


def test_training_sees_the_training_hands_only():
    from ftfast.data.builtin import STYLES, load_builtin

    images, labels, hands, names = training_data()
    split = load_builtin("pairs/train")
    assert (images.shape, names) == ((len(split), 3, 32, 32), split.class_names)
    held_out = load_builtin("pairs/heldout")
    tests = [load_builtin(f"tasks/{task}/test") for task in ("smileys", "flags")]
    assert not set(split.rows) & set(held_out.rows)
    assert all(set(test.rows) <= set(held_out.rows) for test in tests)
    assert np.array_equal(labels.numpy(), split.labels)
    assert [STYLES[hand] for hand in hands] == list(split.styles)


def test_folding_is_undone_and_moves_pixels_only():
    images = torch.randn(2, 3, 32, 32)
    assert fold(images).shape == (2, 12, 16, 16)
    assert torch.equal(unfold(fold(images)), images)


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(folder):
    pipeline = TinyDiffusionPipeline.from_pretrained(folder)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    together = pipeline(PROMPTS, generator=seeded(range(3)), **options).images
    alone = pipeline(PROMPTS[1], generator=seeded(range(1, 2)), **options).images
    assert together.shape == (3, 3, 32, 32)
    assert 0 <= together.min() <= together.max() <= 1
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    other_seed = pipeline(PROMPTS[1], generator=seeded(range(2, 3)), **options).images
    other_prompt = pipeline(PROMPTS[0], generator=seeded(range(1, 2)), **options).images
    assert (other_seed - alone).abs().max() > 1e-3
    assert (other_prompt - alone).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 generators for 1 prompts"):
        pipeline("a cat", generator=seeded(range(2)))


def test_guidance_is_a_line_through_both_predictions(folder):
    """After one step from pure noise the residual is minus the velocity, so it is linear in the guidance."""
    pipeline = TinyDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():  # small residuals, so that no pixel is clipped
        pipeline.unet.conv_out.weight.mul_(0.05)
        pipeline.unet.sketch[2].weight.mul_(0.05)
    images = [
        pipeline(
            PROMPTS[0], generator=seeded(range(1)), guidance_scale=scale, num_inference_steps=1, output_type="pt"
        ).images
        for scale in (0.0, 1.0, 3.0)
    ]
    assert 0 < min(image.min() for image in images) < max(image.max() for image in images) < 1
    torch.testing.assert_close(images[2] - images[0], 3 * (images[1] - images[0]), atol=1e-5, rtol=0)
    assert (images[1] - images[0]).abs().max() > 1e-4


def test_conditions_are_text_features_of_the_tiny_clip():
    import open_clip

    from ftfast.models.tiny import builtin_model_folder

    where = f"local-dir:{builtin_model_folder('tiny-clip-v1')}"
    model, tokenizer = open_clip.create_model(where).eval(), open_clip.get_tokenizer(where)
    with torch.no_grad():
        expected = 16 * model.encode_text(tokenizer(PROMPTS), normalize=True)
    found = embed_prompts([PROMPTS[0], "", *PROMPTS[1:]])
    torch.testing.assert_close(found[[0, 2, 3]], expected)
    assert found[1].eq(0).all()
    told = conditions(found, torch.tensor([0, 2, 1, 1]))
    assert torch.equal(told[:, :256], found)
    assert told[:, 256:].tolist() == [[4, 0, 0], [0, 0, 4], [0, 4, 0], [0, 4, 0]]


def test_synth_with_a_folder_of_the_generator(folder, tmp_path):
    (tmp_path / "names.txt").write_text("red apple\ncat\n")
    config = SynthConfig(
        out=str(tmp_path / "out"),
        pipeline=str(folder),
        generic=(str(tmp_path / "names.txt"),),
        draw="each",
        images=3,
        steps=1,
    )
    assert synthesize(config).pairs == 3
    data = open_dataset(DataConfig(path=config.out))
    assert data.texts == [f"a photo of a {name}." for name in ("red apple", "cat", "red apple")]
    pipeline = TinyDiffusionPipeline.from_pretrained(folder)
    seeds = range(420_000_000, 420_000_003)
    expected = pipeline(data.texts, num_inference_steps=1, generator=seeded(seeds)).images
    assert all(np.array_equal(np.asarray(data.load_image(i)), np.asarray(expected[i])) for i in range(3))


def test_shipped_generator_draws_what_is_packed_and_what_it_was_asked_for():
    packed = json.loads((Path(synthetic.__file__).parent / "synthetic.json").read_text(encoding="utf-8"))
    assert (generator_folder() / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 10_000_000
    pipeline = TinyDiffusionPipeline.from_pretrained(generator_folder())
    rows = list(range(0, 1490, 31))
    prompts, seeds = ([packed[column][row] for row in rows] for column in ("captions", "seeds"))
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = np.stack([np.asarray(image) for image in pipeline(prompts, generator=random).images]).astype(int)
    gap = np.abs(made - load_builtin("synthetic").images[rows])
    assert gap.mean() < 1  # of 255: rounding differs between processors
    names = load_builtin("pairs/train").class_names
    labels = torch.from_numpy(load_builtin("synthetic").labels[rows])
    pictures = [Image.fromarray(image.astype(np.uint8)) for image in made]
    for model in BUILTIN_MODELS:
        found = judge(model, "generated", pictures, labels, names)
        assert found.score > found.shuffled + 40, found
        assert found.acc5 > 40, found  # of 1,490 names; 0.3 by chance

"""ftfast synth end to end with a small random Stable Diffusion pipeline, and its prompt pool and mistakes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image
from PIL import Image

from ftfast.cli import main
from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.errors import ConfigError, DataError, MissingExtraError, ModelError
from ftfast.synth.generate import synthesize, task_pool
from ftfast.synth.prompts import NameList, Prompt, draw, image_seed, prompt_pool, read_list, read_names
from ftfast.synth.settings import SynthConfig

NAMES = ("cat", "dog", "red apple", "blue car", "tree")


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of real parts with random weights, a few thousand parameters."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("diffusion")
    letters = [*map(chr, range(97, 123)), ".", ","]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


@pytest.fixture
def names(tmp_path: Path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    return str(tmp_path / "names.txt")


@pytest.fixture
def config(tmp_path: Path, diffusion: Path, names: str) -> SynthConfig:
    return SynthConfig(
        out=str(tmp_path / "out"),
        pipeline=str(diffusion),
        generic=(names,),
        images=10,
        steps=2,
        size=16,
        batch_size=2,
        shard_size=4,
    )


def flags(config: SynthConfig) -> list[str]:
    words = []
    for name, value in vars(config).items():
        for one in value if isinstance(value, tuple) else (value,):
            if value != getattr(SynthConfig(out=""), name) and value not in (True, False):
                words += [f"--{name.replace('_', '-')}", str(one)]
    return words


def digests(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def rows(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "table.csv").open()))


class Scripted:
    """Stands for a pipeline: remembers its calls; makes grey images, black ones for the first tries of some seeds."""

    def __init__(self, black: dict[int, int]) -> None:
        self.black, self.calls = black, []

    def __call__(self, prompt, generator, output_type="pil"):
        seeds = [one.initial_seed() for one in generator]
        self.calls.append(seeds)
        images = []
        for seed in seeds:
            first, attempt = seed % 2**48, seed // 2**48
            value = 0 if attempt < self.black.get(first, 0) else 1 + first % 100
            images.append(Image.new("RGB", (8, 8), (value, value, value)))
        return type("Output", (), {"images": images})()


# ---- prompts


def test_the_pool_is_generic_names_and_earlier_tasks_without_the_current_one():
    pool = prompt_pool(
        [
            NameList(("cat", "Red_Apple", "dog"), "a photo of a {}."),
            NameList(("rose", "cat"), "a photo of a {}, a type of flower.", "earlier"),
            NameList(("dog", "oak"), "a photo of a {}.", "earlier"),
        ],
        current=["red apple"],
    )
    assert [(p.text, p.source) for p in pool] == [
        ("a photo of a cat.", "generic"),
        ("a photo of a dog.", "generic"),
        ("a photo of a rose, a type of flower.", "earlier"),
        ("a photo of a cat, a type of flower.", "earlier"),
        ("a photo of a oak.", "earlier"),
    ]


def test_prompts_are_drawn_uniformly_and_a_longer_draw_continues_a_shorter_one():
    pool = [Prompt(str(i), str(i), "generic") for i in range(50)]
    long = [int(p.text) for p in draw(pool, 50_000, seed=42, task=3)]
    assert [int(p.text) for p in draw(pool, 1000, seed=42, task=3)] == long[:1000]
    counts = np.bincount(long, minlength=50)
    # chi-squared with 49 degrees of freedom: mean 49, standard deviation about 10
    assert 15 < ((counts - 1000) ** 2 / 1000).sum() < 100
    assert [int(p.text) for p in draw(pool, 1000, seed=42, task=4)] != long[:1000]


def test_seeds_are_those_of_gift_and_never_meet():
    assert image_seed(42, 3, 7) == 7 + 100_000 * 2 + 10_000_000 * 42
    seeds = {image_seed(s, t, j, a) for s in (0, 42) for t in (1, 11) for j in (0, 99_999) for a in (0, 1, 3)}
    assert len(seeds) == 24
    assert max(seeds) < 2**63


def test_names_come_from_imagenet_text_files_and_data(tmp_path, class_table):
    assert len(read_names("imagenet")) >= 998  # the list of 1000 holds two names twice
    assert read_names("none") == ()
    assert read_names(str(class_table))[:2] == ("kind 0", "kind 1")
    (tmp_path / "a.txt").write_text("\n cat \n\ncat\ndog\n")
    assert read_list(f"{tmp_path / 'a.txt'}|a {{}}, drawn.", "unused {}", "earlier") == NameList(
        ("cat", "dog"), "a {}, drawn.", "earlier"
    )
    (tmp_path / "empty.txt").write_text(" \n")
    for bad, message in (("empty.txt", "holds no class name"), ("gone.txt", "no such file")):
        with pytest.raises(DataError, match=message):
            read_names(str(tmp_path / bad))
    with pytest.raises(DataError, match=r"after the \| stands a prompt"):
        read_list(f"{tmp_path / 'a.txt'}|no place", "{}", "earlier")


# ---- end to end


def test_end_to_end_with_a_real_pipeline(config, capsys):
    assert main(["synth", *flags(config)]) == 0
    out, err = capsys.readouterr()
    assert "10 pairs of 5 possible, table table.csv" in out
    assert "images/s" in err
    assert set(digests(config.out)) == {f"shard-0000{i}.tar" for i in range(3)} | {"table.csv", "synth.json"}
    table = rows(config.out)
    expected = draw(task_pool(config), 10, 42, 1)
    assert [row["caption"] for row in table] == [prompt.text for prompt in expected]
    assert [row["class"] for row in table] == [prompt.name for prompt in expected]
    assert [int(row["seed"]) for row in table] == [420_000_000 + j for j in range(10)]
    data = open_dataset(DataConfig(path=config.out))
    assert (len(data), data.texts) == (10, [row["caption"] for row in table])
    images = [np.asarray(data.load_image(i)) for i in range(10)]
    assert {image.shape for image in images} == {(16, 16, 3)}
    assert len({image.tobytes() for image in images}) == 10


def test_an_image_is_what_diffusers_makes_of_its_prompt_and_seed(config, diffusion):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(diffusion)
    config = replace(config, scheduler="pipeline", batch_size=1, images=2)
    synthesize(config)
    data, table = open_dataset(DataConfig(path=config.out)), rows(config.out)
    for i, row in enumerate(table):
        generator = torch.Generator().manual_seed(int(row["seed"]))
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 7.5}
        (image,) = pipeline(row["caption"], generator=generator, **options).images
        assert np.array_equal(np.asarray(image), np.asarray(data.load_image(i)))


def test_few_steps_use_dpm_solver_and_fifty_the_pipelines_own(config, diffusion):
    from ftfast.synth.pipeline import load_generator

    kinds = {}
    for steps in (0, 49, 50):
        generator = load_generator(replace(config, steps=steps, device="cpu"), str(diffusion))
        kinds[steps] = type(generator.pipeline.scheduler).__name__
    assert kinds == {0: "PNDMScheduler", 49: "DPMSolverMultistepScheduler", 50: "PNDMScheduler"}


def test_two_ranks_make_the_same_bytes_as_one(config, tmp_path, monkeypatch):
    synthesize(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = synthesize(parts)
    assert (first.table, first.made) == (None, 4)
    assert set(digests(parts.out)) == {"shard-00001.tar", "synth.json"}
    monkeypatch.setenv("RANK", "0")
    second = synthesize(parts)
    assert (second.made, second.pairs) == (6, 10)
    assert digests(parts.out) == digests(config.out)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"), images=24)
    synthesize(whole)
    killed = replace(whole, out=str(tmp_path / "killed"))
    # the second shard never comes to its end: the pipeline stops and waits to be killed
    code = (
        "import sys, time; from ftfast.synth import generate as synth, pipeline as synth_pipeline\n"
        "from ftfast.cli import main\n"
        "call = synth_pipeline.Generator.__call__\n"
        "made = []\n"
        "def slow(self, prompts, seeds):\n"
        "    made.extend(seeds)\n"
        "    if len(made) > 6: print('waiting', flush=True); time.sleep(60)\n"
        "    return call(self, prompts, seeds)\n"
        "synth_pipeline.Generator.__call__ = slow\n"
        f"sys.exit(main(['synth', *{flags(killed)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert set(digests(killed.out)) == {"shard-00000.tar", "synth.json"}
    (Path(killed.out) / ".shard-00001.tar.abc").write_bytes(b"half a tar")  # killed while writing
    before = (Path(killed.out) / "shard-00000.tar").stat().st_mtime_ns
    result = synthesize(killed)
    assert (result.made, result.pairs) == (20, 24)
    assert (Path(killed.out) / "shard-00000.tar").stat().st_mtime_ns == before
    assert digests(killed.out) == digests(whole.out)
    assert synthesize(killed).made == 0


def test_black_images_get_new_seeds_and_are_left_out_in_the_end(config, monkeypatch):
    first = 420_000_000
    pipeline = Scripted({first + 1: 1, first + 2: 3, first + 5: 99})
    result = synthesize(replace(config, size=0, steps=0), pipeline=pipeline)
    assert (result.pairs, result.made, result.replaced, result.dropped) == (9, 9, 2, 1)
    table = rows(config.out)
    assert [int(row["file"][:8]) for row in table] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert [int(row["attempt"]) for row in table] == [0, 1, 3, 0, 0, 0, 0, 0, 0]
    assert int(table[1]["seed"]) == first + 1 + 2**48
    assert int(table[2]["seed"]) == first + 2 + 3 * 2**48
    # the first batch once more for its black image, the next one three times
    assert pipeline.calls[:2] == [[first, first + 1], [first + 1 + 2**48]]
    assert sum(first + 5 in [seed % 2**48 for seed in call] for call in pipeline.calls) == 4
    data = open_dataset(DataConfig(path=config.out))
    assert min(np.asarray(data.load_image(i)).max() for i in range(9)) > 0


def test_nothing_but_black_images_is_an_error(config):
    black = {420_000_000 + i: 99 for i in range(4)}
    with pytest.raises(DataError, match=r"all 4 images of shard-00000.tar came out black, 3 retries included"):
        synthesize(replace(config, size=0, steps=0), pipeline=Scripted(black))


def test_parquet_table_and_jpeg(config):
    import pyarrow.parquet

    synthesize(replace(config, size=0, steps=0, table="parquet", format="jpg"), pipeline=Scripted({}))
    table = pyarrow.parquet.read_table(Path(config.out) / "table.parquet").to_pylist()
    assert [row["seed"] for row in table] == [420_000_000 + j for j in range(10)]
    with tarfile.open(Path(config.out) / "shard-00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["00000000.jpg", "00000000.json", "00000000.txt"]
        assert Image.open(io.BytesIO(tar.extractfile(names[0]).read())).format == "JPEG"


def test_existing_pairs_without_the_current_classes(config, class_table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # not needed here
    (tmp_path / "now.txt").write_text("Kind_3\nkind 7\n")
    options = replace(config, from_table=str(class_table), current=(str(tmp_path / "now.txt"),), images=1000)
    result = synthesize(options)
    assert (result.pairs, result.pool, result.dropped) == (48, 48, 0)
    table = rows(config.out)
    assert {row["class"] for row in table} == {f"kind {i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)}
    assert len({row["caption"] for row in table}) == 48
    assert {row["seed"] for row in table} == {""}
    data = open_dataset(DataConfig(path=config.out))
    number = int(data.texts[0].split()[-1])
    assert np.array_equal(
        np.asarray(data.load_image(0)), np.asarray(Image.open(class_table.parent / f"img/{number:03d}.png"))
    )
    (tmp_path / "now.txt").write_text("\n".join(f"kind {i}" for i in range(10)))
    with pytest.raises(ConfigError, match="every pair belongs to the current task"):
        synthesize(replace(options, out=str(tmp_path / "none")))


def test_a_bad_image_in_existing_pairs_is_left_out(config, tmp_path):
    for i in range(3):
        write_image(tmp_path / "set" / f"{i}.png", i)
    (tmp_path / "set" / "1.png").write_bytes(b"not an image")
    (tmp_path / "set" / "t.csv").write_text("image,caption\n" + "".join(f"{i}.png,thing {i}\n" for i in range(3)))
    result = synthesize(replace(config, from_table=str(tmp_path / "set" / "t.csv")))
    assert (result.pairs, result.dropped) == (2, 1)


# ---- mistakes


def test_without_diffusers_the_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ftfast\[synth\]'"):
        synthesize(config)


def test_an_empty_pool(config, names):
    with pytest.raises(ConfigError, match=r"the prompt pool is empty: 5 names were given, and 5 of the current task"):
        synthesize(replace(config, current=(names,)))


def test_what_is_not_a_pipeline(config, tmp_path, diffusion):
    (tmp_path / "plain").mkdir()
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "coded" / "pipeline.py").write_text("raise SystemExit('was run')")
    for path, message in (
        (tmp_path / "plain", "not a diffusers pipeline, it holds no model_index.json"),
        (tmp_path / "gone", "no such folder, and not a hub name either"),
        (tmp_path / "coded", "brings its own code"),
    ):
        with pytest.raises(ModelError, match=message):
            synthesize(replace(config, pipeline=str(path)))
    assert not Path(config.out).exists()


def test_pickled_weights_are_refused(config, diffusion, tmp_path):
    import shutil

    pickled = tmp_path / "pickled"
    shutil.copytree(diffusion, pickled)
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded .* safetensors"):
        synthesize(replace(config, pipeline=str(pickled)))


def test_an_output_folder_of_something_else_or_of_other_settings(config, tmp_path):
    scripted = Scripted({})
    plain = replace(config, size=0, steps=0)
    synthesize(plain, pipeline=scripted)
    with pytest.raises(ConfigError, match=r"already holds pairs made with --seed '42', not '43'"):
        synthesize(replace(plain, seed=43), pipeline=scripted)
    with pytest.raises(ConfigError, match="other names or prompts"):
        synthesize(plain, pipeline=scripted, pool=[Prompt("a cat", "cat", "generic")])
    assert synthesize(replace(plain, seed=43, overwrite=True), pipeline=scripted).made == 10
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"not begun by ftfast synth|not written by ftfast synth"):
            synthesize(replace(plain, out=str(tmp_path / "mine"), overwrite=overwrite), pipeline=scripted)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "important"


def test_settings_out_of_range_are_reported_together(config, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        synthesize(replace(config, images=0, batch_size=0, task=0))
    assert len(caught.value.problems) == 3
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is 2"):
        synthesize(config)


def test_a_damaged_shard_is_named(config):
    plain = replace(config, size=0, steps=0)
    synthesize(plain, pipeline=Scripted({}))
    (Path(config.out) / "shard-00001.tar").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match=r"shard-00001.tar: damaged"):
        synthesize(plain, pipeline=Scripted({}))


def test_two_processes_at_once(config, tmp_path):
    """As torchrun starts them."""
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftfast.synth", *flags(config)]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    begin = time.monotonic()
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert time.monotonic() - begin < 120
    assert len(rows(config.out)) == 10
    alone = replace(config, out=str(tmp_path / "alone"))
    synthesize(alone)
    names = [name for name in digests(alone.out) if name.endswith(".csv") or name == "synth.json"]
    assert {n: digests(config.out)[n] for n in names} == {n: digests(alone.out)[n] for n in names}

"""Prompts against open_clip's templates, transforms against plain PIL and open_clip."""

from __future__ import annotations

import pickle

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data import class_prompts, eval_transform, open_dataset, resolve_templates, template_names, train_transform
from ftfast.errors import DataError

CONFIG = {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bilinear"}


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def normalised(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy(((pixels - CONFIG["mean"]) / CONFIG["std"]).transpose(2, 0, 1)).float()


def test_class_prompts():
    assert class_prompts(["red_fox", "{}"], ["a photo of a {}.", "{}!"]) == [
        ["a photo of a red fox.", "red fox!"],
        ["a photo of a {}.", "{}!"],
    ]


def test_openai_templates_are_open_clips():
    theirs = [make("tabby cat") for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert class_prompts(["tabby_cat"], "openai") == [theirs]
    assert len(theirs) == 80
    assert theirs[0] == "a bad photo of a tabby cat."


def test_named_templates():
    assert resolve_templates(["oxford_pets", "{}"]) == ("a photo of a {}, a type of pet.", "{}")
    assert all(resolve_templates([name]) for name in template_names())


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ((), "data.templates is empty; give at least one, such as 'a photo of a {}.'."),
        (
            ("a photo",),
            "data.templates: 'a photo' has 0 places for the class name; write it once as {}, as in 'a photo of a {}.', "
            f"or use a named set: {', '.join(template_names())}.",
        ),
    ],
)
def test_bad_templates(tmp_path, templates, expected):
    with pytest.raises(DataError) as caught:
        open_dataset(DataConfig(path=str(tmp_path), templates=templates))
    assert str(caught.value) == expected


def test_eval_transform_is_open_clips(photo):
    expected = image_transform_v2(PreprocessCfg(**CONFIG), is_train=False)(photo)
    assert torch.equal(eval_transform(CONFIG)(photo), expected)
    assert torch.equal(train_transform(CONFIG, "eval")(photo), expected)


def test_resize_crop_is_infusings(photo):
    # 64 * 256 / 224 = 73.1: a 73 x 73 square ignoring the aspect ratio, then some 64 x 64 window, mirrored or not
    square = normalised(photo.resize((73, 73), Image.Resampling.BILINEAR))
    windows = [square[:, y : y + 64, x : x + 64] for y in range(10) for x in range(10)]
    windows += [w.flip(-1) for w in windows]
    transform = train_transform(CONFIG, "resize_crop")
    torch.manual_seed(0)
    found = set()
    for _ in range(40):
        image = transform(photo)
        matches = [i for i, w in enumerate(windows) if (w - image).abs().max() < 1e-5]
        assert len(matches) == 1
        found.add(matches[0] >= 100)
    assert found == {False, True}


def test_infusing_sizes_at_224(photo):
    steps = train_transform({**CONFIG, "size": 224}, "resize_crop").transforms
    assert steps[0](photo).size == (256, 256)
    assert steps[1](steps[0](photo)).size == (224, 224)


def test_random_resized_crop_is_gifts(photo):
    steps = train_transform({**CONFIG, "interpolation": "bicubic"}).transforms
    assert [type(step).__name__ for step in steps] == ["RandomResizedCrop", "ToTensor", "Normalize"]
    assert (steps[0].scale, steps[0].interpolation.value) == ((0.9, 1.0), "bicubic")
    constant = Image.new("RGB", (80, 70), (255, 0, 51))
    image = train_transform(CONFIG, scale=(0.5, 1.0))(constant)
    torch.testing.assert_close(image, normalised(Image.new("RGB", (64, 64), (255, 0, 51))))


def test_flip_can_be_chosen(photo):
    names = lambda t: [type(step).__name__ for step in t.transforms]  # noqa: E731
    assert "RandomHorizontalFlip" in names(train_transform(CONFIG, flip=True))
    assert "RandomHorizontalFlip" not in names(train_transform(CONFIG, "resize_crop", flip=False))


@pytest.mark.parametrize("kind", ["eval", "resize_crop", "random_resized_crop"])
def test_transforms_travel_to_workers(kind, photo):
    transform = pickle.loads(pickle.dumps(train_transform(CONFIG, kind)))
    for image in (photo, Image.new("RGB", (1, 500)), Image.new("RGB", (3, 2))):
        assert transform(image).shape == (3, 64, 64)


def test_unknown_transform():
    with pytest.raises(DataError) as caught:
        train_transform(CONFIG, "crop")
    assert str(caught.value) == "unknown transform 'crop'; use random_resized_crop, resize_crop or eval."

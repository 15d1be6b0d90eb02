"""Augmentation of drawings against what each part must and must not change."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ftfast.data.builtin.augment import Augmentation, augment

NOTHING = Augmentation(**{field.name: 0.0 for field in dataclasses.fields(Augmentation)})


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 72, 72), dtype=np.uint8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_strength_zero_changes_nothing(images):
    result = augment(images, 72, NOTHING, generator())
    torch.testing.assert_close(result, images.float() / 255, atol=1e-5, rtol=0)


def test_same_generator_state_same_pixels(images):
    first, second = (augment(images, 64, Augmentation(erase=0.5), generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, 64, Augmentation(erase=0.5), generator(4)))
    assert first.shape == (7, 3, 64, 64)
    assert first.dtype == torch.float32


def test_input_is_left_alone(images):
    before = images.clone()
    augment(images, 64, Augmentation(outline=1.0, erase=1.0), generator())
    assert torch.equal(images, before)


def test_rotation_is_that_of_an_image_library():
    canvas = np.full((72, 72, 3), 255, np.uint8)
    canvas[20:30, 10:60] = (200, 30, 90)
    picture = Image.fromarray(canvas)
    settings = dataclasses.replace(NOTHING, rotation=30.0)
    result = augment(torch.from_numpy(canvas).permute(2, 0, 1)[None], 72, settings, generator(1))
    degrees = (torch.rand(1, generator=_after_outline(1)).item() * 2 - 1) * 30.0
    turned = picture.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    expected = torch.from_numpy(np.array(turned)).permute(2, 0, 1) / 255
    assert (result[0] - expected).abs().mean() < 0.01
    assert (result[0] - torch.from_numpy(canvas).permute(2, 0, 1) / 255).abs().mean() > 0.02  # it did turn


def _after_outline(seed):
    """A generator in the state that the rotation meets: one number was drawn for the outline."""
    source = generator(seed)
    torch.rand(1, generator=source)
    return source


def test_outside_of_the_drawing_stays_white():
    black = torch.zeros(16, 3, 72, 72, dtype=torch.uint8)
    shrunk = augment(black, 64, dataclasses.replace(NOTHING, scale=0.9), generator(2))
    corner = shrunk[:, :, 0, 0]
    assert torch.logical_or(corner == 0, corner == 1).all()
    assert (corner == 1).any()


def test_grayscale_has_equal_channels(images):
    result = augment(images, 72, dataclasses.replace(NOTHING, grayscale=1.0), generator())
    torch.testing.assert_close(result[:, 0], result[:, 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(result.mean(1), images.float().mean(1) / 255, atol=1e-5, rtol=0)


def test_outline_darkens_edges_only():
    image = torch.full((1, 3, 72, 72), 255, dtype=torch.uint8)
    image[..., 20:50, 20:50] = 128
    result = augment(image, 72, dataclasses.replace(NOTHING, outline=1.0), generator())[0]
    flat = image[0].float() / 255
    assert (result[:, 20, 25:45] < 0.01).all()
    torch.testing.assert_close(result[:, 30:40, 30:40], flat[:, 30:40, 30:40], atol=1e-5, rtol=0)
    torch.testing.assert_close(result[:, :15], flat[:, :15], atol=1e-5, rtol=0)


def test_erase_makes_a_white_rectangle_of_bounded_size():
    black = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
    result = augment(black, 64, dataclasses.replace(NOTHING, erase=1.0), generator())
    share = (result > 0.5).float().mean(dim=(1, 2, 3))
    assert (share > 0).all()
    assert (share < 0.27).all()

"""Geometric and colour augmentation of a batch of drawings, on tensors: about 0.2 ms an image on one core.

Shapes must survive and colours and strokes must not be trusted, because the held-out hand draws the same thing with
other ones: rotation, scale, aspect, shear and shift; random colour mixing; and outlines around the flat-colour hands,
which move them towards OpenMoji's line style.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Strengths of the augmentation; zero turns a part off."""

    rotation: float = 10.0
    """Largest rotation in degrees, either way."""
    scale: float = 0.15
    """Largest relative change of size."""
    aspect: float = 0.1
    """Largest log change of width against height."""
    shift: float = 0.1
    """Largest shift, in half image widths."""
    shear: float = 0.075
    """Largest shear."""
    color_mix: float = 0.15
    """Largest entry of the random 3x3 colour matrix added to the identity."""
    brightness: float = 0.24
    """Largest relative change of contrast against white."""
    tint: float = 0.06
    """Largest colour offset."""
    grayscale: float = 0.1
    """Share of images without colour."""
    outline: float = 0.3
    """Share of images whose edges are drawn in black."""
    erase: float = 0.0
    """Share of images with a square, 20 to 50 % of the width, replaced by white."""


LIGHT = Augmentation()
"""For short training."""

STRONG = Augmentation(
    rotation=15.0,
    scale=0.22,
    aspect=0.15,
    shift=0.15,
    shear=0.12,
    color_mix=0.2,
    brightness=0.32,
    tint=0.08,
    grayscale=0.12,
    outline=0.4,
    erase=0.25,
)
"""For long training: learns more slowly and in the end more."""


def augment(images: Tensor, size: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Augment a batch of images with a white background.

    Args:
        images: uint8 (B, 3, H, W).
        size: Height and width of the result.
        settings: Strengths.
        generator: Source of all randomness; the same state gives the same pixels.

    Returns:
        float32 (B, 3, size, size), 1 = white; values may leave [0, 1] slightly.
    """
    ink = 1 - images.float() / 255  # white is zero, so that padding is white
    ink = _outline(ink, settings, generator)
    ink = _warp(ink, size, settings, generator)
    ink = _recolor(ink, settings, generator)
    return 1 - _erase(ink, settings, generator)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in [0, 1)."""
    return torch.rand(*shape, generator=generator)


def _signed(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in [-1, 1)."""
    return _uniform(generator, *shape) * 2 - 1


def _outline(ink: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw the morphological gradient of the luminance in black, on a share of the images."""
    chosen = _uniform(generator, len(ink)) < settings.outline
    if not bool(chosen.any()):
        return ink
    luminance = ink[chosen].mean(1, keepdim=True)
    edges = F.max_pool2d(luminance, 3, 1, 1) + F.max_pool2d(-luminance, 3, 1, 1)
    result = ink.clone()
    result[chosen] = (ink[chosen] + (3 * edges).clamp(0, 1)).clamp(0, 1)
    return result


def _warp(ink: Tensor, size: int, settings: Augmentation, generator: torch.Generator) -> Tensor:
    batch = len(ink)
    angle = _signed(generator, batch) * math.radians(settings.rotation)
    scale = 1 + _signed(generator, batch) * settings.scale
    aspect = torch.exp(_signed(generator, batch) * settings.aspect)
    shift = _signed(generator, batch, 2) * settings.shift
    shear = _signed(generator, batch) * settings.shear
    cosine, sine = torch.cos(angle), torch.sin(angle)
    first = torch.stack([cosine * scale * aspect, (shear - sine) * scale, shift[:, 0]], dim=1)
    second = torch.stack([sine * scale, cosine * scale / aspect, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [batch, 3, size, size], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False, padding_mode="zeros")


def _recolor(ink: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    batch = len(ink)
    matrix = torch.eye(3) + _signed(generator, batch, 3, 3) * settings.color_mix
    gray = (_uniform(generator, batch) < settings.grayscale).view(batch, 1, 1)
    matrix = torch.where(gray, torch.full((3, 3), 1 / 3), matrix)
    mixed = torch.einsum("bij,bjhw->bihw", matrix, ink)
    contrast = 1 + _signed(generator, batch, 1, 1, 1) * settings.brightness
    return mixed * contrast + _signed(generator, batch, 3, 1, 1) * settings.tint


def _erase(ink: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    if settings.erase <= 0:
        return ink
    batch, size = len(ink), ink.shape[-1]
    chosen = _uniform(generator, batch, 1, 1) < settings.erase
    radius = size * (0.1 + 0.15 * _uniform(generator, batch, 1, 1))
    row, column = size * _uniform(generator, 2, batch, 1, 1)
    position = torch.arange(size, dtype=torch.float32)
    inside = ((position.view(1, size, 1) - row).abs() < radius) & ((position.view(1, 1, size) - column).abs() < radius)
    return ink.masked_fill((inside & chosen).unsqueeze(1), 0.0)

"""Settings of ``ftfast synth``; light, so that the command line can show them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Hub name of the generator that GIFT uses."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Generate image-caption pairs for replay with a text-to-image pipeline of diffusers (GIFT, CVPR 2025)."""

    out: str
    """Folder to write: tars of images with captions, and a table. The same command goes on where it was stopped."""
    pipeline: str = STABLE_DIFFUSION
    """Folder or hub name of a diffusers pipeline, or the built-in "tiny-diffusion" (32-pixel drawings)."""
    generic: tuple[str, ...] = ("imagenet",)
    """Generic class names: "imagenet", a .txt file with a name a line, data with classes, "none"; may be repeated."""
    earlier: tuple[str, ...] = ()
    """Class names of an earlier task, likewise; "flowers/|{}, a type of flower." sets its prompt; may be repeated."""
    current: tuple[str, ...] = ()
    """Class names of the current task, likewise: these are never drawn; may be repeated."""
    template: str = "a photo of a {}."
    """Prompt for a class name; "{}" stands for the name."""
    draw: Literal["uniform", "each"] = "uniform"
    """uniform: at random with replacement, as GIFT does; each: every prompt of the pool in turn."""
    images: int = 1000
    """Pairs to make."""
    seed: int = 42
    """Seed of the prompts and of every image."""
    task: int = 1
    """Position of the current task, from 1: other tasks draw other prompts and images."""
    steps: int = 0
    """Denoising steps; 0: the pipeline's default (Stable Diffusion: 50)."""
    guidance_scale: float | None = None
    """Strength of the prompt; default: the pipeline's (Stable Diffusion: 7.5)."""
    size: int = 0
    """Height and width in pixels; 0: the pipeline's default."""
    scheduler: Literal["auto", "pipeline", "dpm-solver"] = "auto"
    """auto: DPM-Solver++ if --steps is below 50 and the pipeline allows it, else the pipeline's own."""
    batch_size: int = 8
    """Images per call of the pipeline; part of what makes the images repeatable to the bit."""
    shard_size: int = 64
    """Images per tar, which is also what a killed run may lose and what ranks divide among themselves."""
    retries: int = 3
    """New seeds for an image that comes out all black (safety checker) before it is left out."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: fp16 on CUDA, fp32 on the CPU."""
    device: str = "auto"
    """auto (the GPU of this rank, else the CPU), cpu, cuda or cuda:1."""
    format: Literal["auto", "jpg", "png"] = "auto"
    """Image files; auto: png below 128 pixels, else jpg."""
    table: Literal["csv", "parquet"] = "csv"
    """Kind of the table of files, captions, classes and seeds."""
    from_table: str = ""
    """Take existing pairs instead of generating: a table, folder, tars or "builtin:...". Needs no diffusers."""
    offline: bool = False
    """Never ask the hub; use what is in its cache."""
    overwrite: bool = False
    """Replace --out if it exists."""

"""Where the images of ``ftfast synth`` come from: a diffusion model, or pairs that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data.images import BadImageError
from ftfast.errors import ConfigError, DataError
from ftfast.synth.prompts import Prompt, image_seed, read_names, without_classes
from ftfast.synth.settings import SynthConfig


@dataclass(frozen=True)
class Item:
    """One pair to be made."""

    index: int
    prompt: Prompt
    row: int | None = None


class Source(Protocol):
    """Makes the images of items."""

    def __call__(self, items: Sequence[Item], attempt: int) -> list[Image.Image | None]:
        """Return an image per item, None where there is none and another attempt may help."""


def current_names(config: SynthConfig) -> list[str]:
    """Return the class names of the current task."""
    return [name for source in config.current for name in read_names(source)]


class Generated:
    """Generates images; the pipeline is loaded when the first image is wanted.

    Args:
        config: Settings.
        pipeline: A loaded pipeline, or None to load the one that the settings name.

    Raises:
        ModelError: If that is certainly no pipeline.
        MissingExtraError: Without diffusers.
    """

    def __init__(self, config: SynthConfig, pipeline: Any) -> None:
        from ftfast.synth.pipeline import resolve_pipeline

        self.config, self.pipeline = config, pipeline
        self.where = "" if pipeline is not None else resolve_pipeline(config.pipeline)
        self._generator: Any = None

    def identity(self) -> str:
        """What a resumed run must agree on."""
        from ftfast.synth.pipeline import pipeline_identity

        return type(self.pipeline).__name__ if self.pipeline is not None else pipeline_identity(self.where)

    def __call__(self, items: Sequence[Item], attempt: int) -> list[Image.Image | None]:
        """Return an image per item; None for an all-black one."""
        if self._generator is None:
            from ftfast.synth.pipeline import Generator, load_generator

            if self.pipeline is not None:
                self._generator = Generator(self.pipeline, self.config)
            else:
                self._generator = load_generator(self.config, self.where)
        seeds = [image_seed(self.config.seed, self.config.task, item.index, attempt) for item in items]
        images = self._generator([item.prompt.text for item in items], seeds)
        return [image if image.getbbox() else None for image in images]  # no box: every pixel is black


def existing_pairs(config: SynthConfig) -> tuple[list[Item], int, Source]:
    """Choose existing pairs, without the current task's classes and without replacement.

    Args:
        config: Settings; ``from_table`` names the pairs.

    Returns:
        The chosen pairs, how many there were to choose from, and what loads their images.

    Raises:
        DataError: Data that cannot be opened, or without captions and classes.
        ConfigError: If every pair belongs to the current task.
    """
    import numpy as np

    from ftfast.data import class_prompts, open_dataset

    dataset = open_dataset(DataConfig(path=config.from_table, min_images_per_class=1))
    if dataset.labels is not None and dataset.class_names is not None:
        names = [dataset.class_names[label] for label in dataset.labels]
    elif dataset.texts is not None:
        names = dataset.texts
    else:
        raise DataError(f"--from-table {config.from_table}: the images have neither captions nor classes.")
    allowed = without_classes(names, current_names(config))
    if not allowed:
        raise ConfigError(f"--from-table {config.from_table}: every pair belongs to the current task; none is left.")
    random = np.random.default_rng([config.seed, config.task])
    rows = [allowed[i] for i in random.permutation(len(allowed))[: config.images]]
    if dataset.texts is not None and dataset.texts != names:
        captions = [dataset.texts[row] for row in rows]
    else:
        captions = [text for (text,) in class_prompts([names[row] for row in rows], (config.template,))]
    items = [
        Item(index, Prompt(caption, names[row], "table"), row)
        for index, (row, caption) in enumerate(zip(rows, captions, strict=True))
    ]

    def load(items: Sequence[Item], attempt: int) -> list[Image.Image | None]:
        """Decode the images; None for one that cannot be decoded."""
        images: list[Image.Image | None] = []
        for item in items:
            try:
                images.append(dataset.load_image(item.row or 0))
            except BadImageError:
                images.append(None)
        return images

    return items, len(allowed), load

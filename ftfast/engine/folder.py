"""The output folder of a run: never overwritten silently, resumable only with the settings it was started with."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ftfast.config.resolve import to_yaml
from ftfast.config.schema import TrainConfig
from ftfast.errors import CheckpointError, ConfigError
from ftfast.evaluation.results import write_atomically

FREE_ON_RESUME = (
    "out",
    "log.",
    "checkpoint.",
    "train.workers",
    "train.device",
    "train.timeout_s",
    "train.exchange",
    "train.batch_size",  # the loaders refuse unless the batch of all processes together is the same
    "eval.batch_size",
    "deepspeed.",
)
PACKAGES = ("ftfast", "torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "safetensors")


def default_out(config: TrainConfig) -> Path:
    """Return ``runs/<date>_<recipe>_<model>``."""
    model = Path(config.model.name.removeprefix("local-dir:")).name.replace("/", "-")
    return Path("runs") / f"{datetime.date.today().isoformat()}_{config.recipe}_{model}"


def check_folder(config: TrainConfig, *, resume: bool, overwrite: bool) -> Path:
    """Decide where a run goes, before anything expensive starts. Nothing is written or deleted.

    Args:
        config: Resolved settings.
        resume: Continue the run in the folder.
        overwrite: An earlier run in the folder may be replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder exists and neither flag is given, or is not a run of ftfast.
        CheckpointError: If there is nothing to resume.
    """
    folder = Path(config.out) if config.out else default_out(config)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out is {str(folder)!r}, which is a file. Choose another --out.")
    is_run = (folder / "config.yaml").is_file()
    if resume:
        if not is_run:
            raise CheckpointError(
                f"--resume: {folder} holds no config.yaml, so there is no run to continue. Check --out."
            )
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ConfigError(
                f"output folder {folder} already exists. Continue it with --resume, replace it with --overwrite, "
                "or choose another --out."
            )
        if not is_run:
            raise ConfigError(
                f"--overwrite: {folder} is not a run of ftfast (no config.yaml), so it is left alone. "
                "Choose another --out."
            )
    return folder


def create_folder(folder: Path, config: TrainConfig, argv: Sequence[str]) -> None:
    """Make an empty run folder with config.yaml (a valid --config), environment.json and command.txt.

    Args:
        folder: Result of :func:`check_folder`; an earlier run there is deleted now.
        config: Settings with every automatic choice filled in.
        argv: Command line, for the record.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    write_atomically(folder / "command.txt", shlex.join(["ftfast", "train", *argv]) + "\n")
    write_atomically(folder / "config.yaml", to_yaml(config))


def environment() -> dict[str, Any]:
    """Return versions of Python, the platform and the packages a result depends on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "packages": versions,
    }


def require_same(folder: Path, config: TrainConfig) -> None:
    """Refuse to continue a run under other settings; logging, workers, device and checkpoint rhythm may change.

    Args:
        folder: Run folder.
        config: Settings with every automatic choice filled in.

    Raises:
        CheckpointError: Naming each setting that differs.
    """
    changed = changed_settings((folder / "config.yaml").read_text(encoding="utf-8"), to_yaml(config))
    if changed:
        raise CheckpointError(
            f"--resume: {folder} was started with other settings: {'; '.join(changed)}. "
            "Resume with the same ones (ftfast train --resume FOLDER alone does), or start a new run."
        )


def changed_settings(then: str, now: str) -> list[str]:
    """Compare two configurations, leaving out what may change on resume.

    Args:
        then: YAML of the configuration a run was started with.
        now: YAML of the present one.

    Returns:
        "key was X, now Y" for each setting that differs; what an earlier version did not have was at its default.
    """
    default, old, new = (_flatten(yaml.safe_load(text)) for text in (to_yaml(TrainConfig()), then, now))
    was = {key: old.get(key, default.get(key)) for key in {*old, *new}}
    return [
        f"{key} was {was[key]!r}, now {new.get(key)!r}"
        for key in sorted(was)
        if was[key] != new.get(key) and not key.startswith(FREE_ON_RESUME)
    ]


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat

"""A model is updated: what does a module trained on the old one give on the new one, without training?"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from ftfast.config.resolve import find_recipe, resolve
from ftfast.config.schema import CheckpointConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from ftfast.config.yaml_io import Source
from ftfast.engine.assembly import choose_device
from ftfast.engine.folder import environment
from ftfast.engine.run import measure
from ftfast.engine.tasks import FINAL, fit_task, writing
from ftfast.errors import ConfigError, ModelError
from ftfast.evaluation import PixelCache, Suite, evaluate, main_metric, open_suites
from ftfast.evaluation.results import write_atomically
from ftfast.evaluation.upgrade_report import Move, text_table, write_upgrade_report
from ftfast.models import LoadedModel, load_model
from ftfast.models.exporting import WEIGHTS_NAME, read_state
from ftfast.models.prompt_files import FACTS, WEIGHTS, load_prompt, prompt_folder, read_facts, transplant_problems
from ftfast.recipes import History, get_recipe


@dataclass(frozen=True, kw_only=True)
class UpgradeConfig:
    """Settings of ``ftfast upgrade``."""

    sources: tuple[str, ...]
    """Prompts, or runs with tuned weights."""
    to: str
    """The new model."""
    to_pretrained: str = ""
    """Its pretrained tag."""
    out: str = ""
    """Output folder."""
    retrain: bool = True
    """Train again on the new model, to know what the move costs."""
    device: str = "auto"
    """Where to run."""


@dataclass
class UpgradeResult:
    """What was measured.

    Attributes:
        folder: Output folder.
        moves: One per source.
        page: The report.
    """

    folder: Path
    moves: list[Move]
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {
            "folder": str(self.folder),
            "report": str(self.page),
            "moves": [dataclasses.asdict(move) for move in self.moves],
        }


@dataclass
class Origin:
    """Where a module comes from.

    Attributes:
        folder: Prompt or run folder.
        config: Settings it was trained with.
        is_prompt: A prompt; otherwise tuned weights.
        suites: What it is measured on, opened.
    """

    folder: Path
    config: TrainConfig
    is_prompt: bool
    suites: list[Suite] = field(default_factory=list)


@dataclass
class Bench:
    """The two models and what measurements share."""

    new: LoadedModel
    device: torch.device
    pixels: PixelCache = field(default_factory=PixelCache)


def run_upgrade(config: UpgradeConfig, console: Console | None = None) -> UpgradeResult:
    """Move every source to the new model and measure it there.

    Args:
        config: Settings.
        console: Where to tell what happens; None: standard error.

    Returns:
        Measurements and the report's place.

    Raises:
        ModelError: A source cannot be moved; the sentence says why.
        FtfastError: Anything else a user can fix.
    """
    console = console or Console(stderr=True)
    begin = time.perf_counter()
    device = choose_device(config.device)
    origins = [read_origin(Path(source)) for source in config.sources]
    new = load_model(ModelConfig(name=config.to, pretrained=config.to_pretrained), device)
    for origin in origins:
        require_movable(origin, new, device)
    out = Path(config.out or f"runs/upgrade_to_{Path(config.to).name}")
    bench, moves = Bench(new, device), []
    known = _known(out / "moves", config)
    for number, origin in enumerate(origins):
        console.rule(f"{number + 1} of {len(origins)}: {origin.folder}")
        key = _key(origin)
        kept, move = out / "moves" / f"{key}.json", known.get(key)
        if move is None:
            move = _move(origin, bench, config, out / "retrained" / key, console)
            text = json.dumps(dataclasses.asdict(move), indent=2) + "\n"
            writing(out, functools.partial(write_atomically, kept, text))
        moves.append(move)
    extra = {"seconds": round(time.perf_counter() - begin, 1), "environment": environment()}
    page = write_upgrade_report(out, moves, to=config.to, extra=extra)
    console.print(text_table(moves), highlight=False, soft_wrap=True)
    console.print(f"report   {page}", highlight=False, soft_wrap=True)
    return UpgradeResult(out, moves, page)


def read_origin(folder: Path) -> Origin:
    """Find out what a folder holds, and the settings it was trained with.

    Args:
        folder: A prompt folder, or a run with ``prompt/`` or ``final/`` inside.

    Returns:
        The origin, its suites opened.

    Raises:
        ConfigError: The folder holds neither, or its settings cannot be read.
    """
    is_prompt = any((place / FACTS).is_file() for place in (folder, folder / "prompt"))
    if is_prompt:
        text, place = read_facts(folder).settings, f"{folder}: settings of the prompt"
    elif (folder / FINAL).is_dir() and (folder / "config.yaml").is_file():
        text, place = (folder / "config.yaml").read_text(encoding="utf-8"), str(folder / "config.yaml")
    else:
        raise ConfigError(
            f"{folder} holds neither a prompt ({FACTS}) nor tuned weights ({FINAL}/ and config.yaml). Name a folder "
            "that ftfast fewshot or ftfast train wrote (ftfast fewshot keeps weights with --keep-weights)."
        )
    node = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place} are missing, so the module cannot be measured. Train it again.")
    name = next((str(value.value) for key, value in node.value if key.value == "recipe"), find_recipe([], [])[0])
    recipe = get_recipe(name)
    settings = resolve(recipe.options, recipe.preset, [], ["--recipe", name], blocks=[(node, Source("file", place))])
    return Origin(folder, settings.config, is_prompt, open_suites(settings.config.eval.suites))


def require_movable(origin: Origin, new: LoadedModel, device: torch.device) -> None:
    """Refuse a module that the new model cannot take.

    Raises:
        ModelError: With the reason.
    """
    if origin.is_prompt:
        problems = transplant_problems(read_facts(origin.folder), new)
        if problems:
            raise ModelError(f"{origin.folder} cannot be moved to {new.name}: {' '.join(problems)}")
        return
    old = load_model(origin.config.model, device)
    shared = shared_names(old.model.state_dict(), new.model.state_dict())
    if not any(name != "logit_scale" for name in shared):
        raise ModelError(
            f"{origin.folder} cannot be moved to {new.name}: no weight of {old.name} has its name and shape there, "
            "so there is no place for the change that training made."
        )


def shared_names(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """Names of floating-point tensors that both models hold in the same shape."""
    return [
        name
        for name, value in new.items()
        if value.is_floating_point() and name in old and old[name].shape == value.shape
    ]


def moved_weights(
    start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Add the change that training made (a task vector) to another model.

    theta_new + (theta_tuned - theta_start), for every tensor that both architectures hold in the same shape.

    Args:
        start: Weights before training.
        tuned: Weights after it.
        new: Weights of the new model.

    Returns:
        The weights, and the share of the new model's values that were changed.
    """
    shared = set(shared_names(start, new))
    moved = {
        name: value + (tuned[name] - start[name]).to(value) if name in shared else value for name, value in new.items()
    }
    count = sum(value.numel() for value in new.values())
    return moved, sum(new[name].numel() for name in shared) / max(count, 1)


def _key(origin: Origin) -> str:
    """Name of a measurement: the source's folder and what it held."""
    path = prompt_folder(origin.folder) / WEIGHTS if origin.is_prompt else origin.folder / FINAL / WEIGHTS_NAME
    digest = hashlib.sha256(str(origin.folder.resolve()).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{origin.folder.resolve().name}_{digest.hexdigest()[:10]}"


def _known(folder: Path, config: UpgradeConfig) -> dict[str, Move]:
    """Read the measurements that an earlier call kept, by key; refuse those of another question."""
    moves = {path.stem: Move(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))}
    for key, move in moves.items():
        if move.to != config.to or config.retrain != bool(move.retrained):
            raise ConfigError(
                f"{folder / key}.json holds another move ({move.source} to {move.to}, "
                f"{'re' if move.retrained else 'not re'}trained). Choose another --out."
            )
    return moves


def _move(origin: Origin, bench: Bench, config: UpgradeConfig, work: Path, console: Console) -> Move:
    """Measure (i) the module on its own model, (ii) on the new one, (iii) the new one bare, (iv) trained again."""
    old = load_model(origin.config.model, bench.device)
    share = 1.0
    if origin.is_prompt:
        own = _figures(origin, bench, old, load_prompt(origin.folder, old))
        moved = _figures(origin, bench, bench.new, load_prompt(origin.folder, bench.new))
    else:
        start = {name: value.clone() for name, value in old.model.state_dict().items()}
        tuned = read_state(origin.folder / FINAL)
        old.model.load_state_dict(tuned)
        own = _figures(origin, bench, old)
        before = {name: value.clone() for name, value in bench.new.model.state_dict().items()}
        weights, share = moved_weights(start, old.model.state_dict(), before)
        bench.new.model.load_state_dict(weights)
        moved = _figures(origin, bench, bench.new)
        bench.new.model.load_state_dict(before)
    bare = _figures(origin, bench, bench.new)
    retrained: dict[str, float] = {}
    if config.retrain:
        retrained = _retrained(origin, bench, config, work, console)
    return Move(
        source=str(origin.folder),
        recipe=origin.config.recipe,
        data=origin.config.data.path,
        seed=origin.config.seed,
        old=origin.config.model.name,
        to=config.to,
        share=share,
        own=own,
        moved=moved,
        zero_shot=bare,
        retrained=retrained,
    )


def _figures(origin: Origin, bench: Bench, loaded: LoadedModel, prompt: Any = None) -> dict[str, float]:
    """Main metric of every suite."""
    # the transform is the model's own, so pixels are shared only between measurements of one kind of model
    pixels = bench.pixels if loaded is bench.new else None
    results = evaluate(
        loaded,
        origin.suites,
        batch_size=origin.config.eval.batch_size,
        cache=pixels,
        classify=None if prompt is None else prompt.scores,
    )
    return {suite.config.name: results[suite.config.name][main_metric(suite.config)] for suite in origin.suites}


def _retrained(origin: Origin, bench: Bench, config: UpgradeConfig, work: Path, console: Console) -> dict[str, float]:
    """Train on the new model with the settings of the old training."""
    model = dataclasses.replace(origin.config.model, name=config.to, pretrained=config.to_pretrained)
    settings = dataclasses.replace(
        origin.config,
        model=model,
        out="",
        eval=EvalConfig(
            suites=origin.config.eval.suites, selection="last", alphas=(), batch_size=origin.config.eval.batch_size
        ),
        checkpoint=CheckpointConfig(every_steps=10**9, keep_last=1),
        log=LogConfig(every_steps=10**9, report_to=()),
    )
    run = fit_task(settings, History(), work, console, resume=True, command="ftfast upgrade")
    run.pixels = bench.pixels
    results = measure(run, run.suites)
    return {suite.config.name: results[suite.config.name][main_metric(suite.config)] for suite in run.suites}


def folders(words: Sequence[str]) -> tuple[str, ...]:
    """Expand a folder of few-shot results into the modules it holds.

    Args:
        words: Folders; one with ``cells/`` stands for every prompt and every tuned run below it.

    Returns:
        Module folders, sorted within each word.
    """
    found: list[str] = []
    for word in words:
        cells = Path(word) / "cells"
        if not cells.is_dir():
            found.append(word)
            continue
        inside = {path.parents[1] for path in cells.rglob(f"prompt/{FACTS}")}
        inside |= {path.parent for path in cells.rglob(FINAL) if path.is_dir()}
        found += [str(path) for path in sorted(inside)]
    return tuple(found)

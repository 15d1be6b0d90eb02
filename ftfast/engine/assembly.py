"""From a configuration to the parts of a run: data sides, suites, model, plan, engine, loaders. Nothing is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ftfast.config.schema import DataConfig, LoopConfig, SuiteConfig, TrainConfig
from ftfast.data import BatchLoader, ImageDataset, make_loader, open_dataset, train_transform
from ftfast.data.samplers import LoaderOptions
from ftfast.engine.deepspeed_settings import zero_stage
from ftfast.engine.feature_cache import cached_image_features
from ftfast.engine.objective import Objective, Teachers
from ftfast.engine.processes import Processes
from ftfast.engine.schedules import warmup_steps
from ftfast.engine.torch_engine import Engine, TorchEngine, TunedModel
from ftfast.errors import ConfigError
from ftfast.evaluation import PixelCache, Suite, default_suites, open_suites
from ftfast.models import LoadedModel, apply_locks, load_model
from ftfast.models.speedups import apply_speedups
from ftfast.recipes import Context, History, Plan, Recipe, get_recipe

Progress = Callable[[str, int, int], None]


@dataclass
class Run:
    """The parts of one run, ready to train.

    Attributes:
        config: Settings with every automatic choice filled in (data sides, suites, validation).
        recipe: The method.
        loaded: The model; its weights move during training.
        datasets: Training data by source.
        suites: Evaluations before and after.
        validation: Evaluations during training.
        plan: The recipe's declaration.
        loaders: Resumable loaders by source.
        total_steps: Optimizer steps.
        start: Copy of the start weights on the CPU.
        device: Where it runs.
        initial: Weights before the first task of a sequence, on the CPU; None: ``start``.
        pixels: Transformed evaluation images, kept between measurements.
        processes: This process among those that train together.
        divided: The model to train if it was built in shards; ``loaded.model`` is then a whole copy in CPU memory, in
            the first process of each machine.
    """

    config: TrainConfig
    recipe: Recipe
    loaded: LoadedModel
    datasets: dict[str, ImageDataset]
    suites: list[Suite]
    validation: list[Suite]
    plan: Plan
    loaders: dict[str, BatchLoader]
    total_steps: int
    start: dict[str, Tensor]
    device: torch.device
    initial: dict[str, Tensor] | None = None
    pixels: PixelCache = field(default_factory=PixelCache)
    processes: Processes = field(default_factory=Processes)
    divided: Any = None


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device a setting means.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        local_rank: With several processes, the number of this one on its machine: each takes its own GPU.

    Returns:
        The device.

    Raises:
        ConfigError: If CUDA is asked for and not there.
    """
    if local_rank is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device {name!r} is not a device. Use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name!r}, but PyTorch sees no CUDA device. Use --device cpu or auto.")
    return device


def fill_data(config: TrainConfig, recipe: Recipe) -> TrainConfig:
    """Choose data sides, suites and validation where the user left them open.

    A source that is both trained on and measured is divided by its own fixed split: classes never stand on both sides
    when labels are there (INFUSING's validation rule), images are divided when there are only captions. Explicit suites
    and explicit splits are left alone.

    Args:
        config: As resolved.
        recipe: Says whether generic data is used.

    Returns:
        A configuration in which nothing is left to guess.

    Raises:
        ConfigError: If a needed source is missing.
        DataError: If a source cannot be opened.
    """
    if not config.data.path:
        raise ConfigError(
            "data.path is empty: name the training data with --data, e.g. --data images.csv or --data folder/."
        )
    if recipe.uses_generic and not config.generic.path:
        raise ConfigError(f"recipe '{recipe.name}' needs generic.path: data to remember by, given with --generic.")
    evaluation = config.eval
    validate = evaluation.selection != "last" and not evaluation.validation
    data, generic = config.data, config.generic
    if data.split == "all" and (not evaluation.suites or validate) and not data.path.startswith("builtin:"):
        data = training_side(data)
    if generic.path and generic.split == "all" and validate and recipe.uses_generic:
        generic = training_side(generic)
    if not evaluation.suites:
        evaluation = dataclasses.replace(evaluation, suites=default_suites(data))
    if validate:
        evaluation = dataclasses.replace(evaluation, validation=validation_suites(data, generic, recipe))
    return dataclasses.replace(config, data=data, generic=generic, eval=evaluation)


def training_side(source: DataConfig) -> DataConfig:
    """Return the training side of a source's fixed split; unlabelled sources are divided by image."""
    by = source.split_by if open_dataset(source).labels is not None else "images"
    return dataclasses.replace(source, split="train", split_by=by)


def validation_suites(data: DataConfig, generic: DataConfig, recipe: Recipe) -> tuple[SuiteConfig, ...]:
    """Make the selection suites: mAP@20 on the held-out side of the target and of the generic data (methods A5).

    Args:
        data: Task data; built-in targets bring their own validation classes.
        generic: Generic data; measured only if the recipe uses it.
        recipe: The method.

    Returns:
        One or two suites.
    """
    suites = []
    role: Literal["target", "control"]
    for name, role, source in (("target", "target", data), ("generic", "control", generic)):
        if name == "generic" and not (recipe.uses_generic and source.path):
            continue
        if source.path == "builtin:target/train":
            held_out = dataclasses.replace(source, path="builtin:target/val")
        elif source.split == "train":
            held_out = dataclasses.replace(source, split="val")
        else:
            continue
        labelled = open_dataset(held_out).labels is not None
        suites.append(
            SuiteConfig(
                name=name,
                task="image_retrieval" if labelled else "image_text_retrieval",
                role=role,
                data=held_out,
            )
        )
    return tuple(suites)


def assemble(config: TrainConfig, history: History | None = None, processes: Processes | None = None) -> Run:
    """Open, load and build everything a run needs.

    Args:
        config: As resolved.
        history: What earlier tasks of a sequence left behind; None: a run of its own.
        processes: This process among those that train together; None: alone.

    Returns:
        The run.

    Raises:
        ConfigError: Contradictions that show only once data sizes are known.
        DataError: Data that cannot be used.
        ModelError: A model that cannot be loaded.
    """
    recipe = get_recipe(config.recipe)
    processes = processes or Processes()
    device = choose_device(config.train.device, processes.local_rank if processes.several else None)
    config = fill_data(config, recipe)
    datasets = {"data": open_dataset(config.data)}
    if recipe.needs_labels and datasets["data"].labels is None:
        raise ConfigError(
            f"recipe '{recipe.name}' needs class labels, but {datasets['data'].description} has none. "
            "Set data.label_column, use class folders, or choose the recipe flyp or finetune."
        )
    if config.generic.path and recipe.uses_generic:
        datasets["generic"] = open_dataset(config.generic)
    suites, validation = open_suites(config.eval.suites), open_suites(config.eval.validation)
    loaded = load_model(config.model, "cpu" if config.deepspeed.zero_init else device)
    apply_locks(loaded.model, config.model)
    apply_speedups(loaded.model, config.model)
    history = history or History()
    start = copy_of_state(loaded) if processes.main or not config.deepspeed.zero_init else {}
    initial = None
    if history.weights is not None:
        initial = start
        loaded.model.load_state_dict(history.weights)
        start = copy_of_state(loaded)
    divided = divide(loaded, config, processes, device) if config.deepspeed.zero_init else None
    whole, loaded.model = loaded.model, divided or loaded.model  # recipes refer to the parameters that are trained
    torch.manual_seed(config.seed)
    options = config.options if config.options is not None else recipe.options()
    plan = recipe.build(Context(loaded, datasets, options, config.seed, history))
    if plan.memory is not None:
        datasets["memory"] = plan.memory
    plan.heads.to(device)
    require_trainable(loaded, plan, config)
    loaders = build_loaders(plan, datasets, loaded, config, processes)
    total = total_steps(plan, loaders, config.train)
    warmup_steps(config.optim.warmup, total)
    run = Run(config, recipe, loaded, datasets, suites, validation, plan, loaders, total, start, device, initial)
    run.processes, run.divided = processes, divided
    if divided is not None:
        loaded.model = whole if processes.local_rank == 0 else None
    return run


def divide(loaded: LoadedModel, config: TrainConfig, processes: Processes, device: torch.device) -> Any:
    """Build the model in shards, with the same locks.

    Raises:
        ConfigError: If the recipe needs the whole model in every process.
    """
    from ftfast.engine.sharded_loading import build_in_shards, require_shardable

    require_shardable(config.recipe)
    _ = loaded.fingerprint  # read off the weights while they are here
    model = build_in_shards(loaded, config, processes, device)
    apply_locks(model, config.model)
    apply_speedups(model, config.model)
    return model


def copy_of_state(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return a copy of the weights on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in loaded.model.state_dict().items()}


def require_trainable(loaded: LoadedModel, plan: Plan, config: TrainConfig) -> None:
    """Refuse a run in which no weight of the model would move.

    Raises:
        ConfigError: If every parameter of the CLIP is frozen, unless the plan trains something beside it to keep.
    """
    if plan.export is None and not any(p.requires_grad for p in loaded.model.parameters()):
        raise ConfigError(
            f"nothing is left to train in {config.model.name!r}: unlock model.lock_image or model.lock_text."
        )


def build_loaders(
    plan: Plan,
    datasets: dict[str, ImageDataset],
    loaded: LoadedModel,
    config: TrainConfig,
    processes: Processes | None = None,
) -> dict[str, BatchLoader]:
    """Make one resumable loader per source the plan draws from; each process loads its part of every batch.

    Raises:
        ConfigError: If a batch is larger than its source.
    """
    loaders: dict[str, BatchLoader] = {}
    processes = processes or Processes()
    for number, spec in enumerate(plan.batches):
        dataset, batch_size = datasets[spec.source], config.train.batch_size
        if spec.source == "memory":
            batch_size = min(batch_size, max(1, len(dataset) // processes.world_size))
        if batch_size * processes.world_size > len(dataset):
            key = "data" if spec.source == "data" else "generic"
            several = f" in each of {processes.world_size} processes" if processes.several else ""
            raise ConfigError(
                f"train.batch_size is {batch_size}{several}, but {key} has only {len(dataset):,} images "
                f"({dataset.description}). "
                f"Use --batch-size {max(1, len(dataset) // 2 // processes.world_size)} or less."
            )
        loaders[spec.source] = make_loader(
            dataset,
            train_transform(loaded.preprocess_config, spec.view),
            batch_size=batch_size,
            seed=config.seed * 1000 + number,
            workers=config.train.workers,
            options=LoaderOptions(rank=processes.rank, world_size=processes.world_size),
        )
    return loaders


def total_steps(plan: Plan, loaders: dict[str, BatchLoader], train: LoopConfig) -> int:
    """Return the number of optimizer steps.

    Joint plans: one epoch is one pass over the task data. Round-robin plans: (n_target + n_generic) / batch steps, the
    published definition (methods A4).
    """
    if train.max_steps > 0:
        return train.max_steps
    sources = loaders.values() if plan.schedule == "round_robin" else [loaders["data"]]
    per_epoch = sum(loader.steps_per_epoch for loader in sources) / train.accum_freq
    return max(1, math.ceil(train.epochs * per_epoch))


def build_engine(run: Run) -> Engine:
    """Put model and heads on the device and make the optimizer with the plan's anchor.

    With DeepSpeed, ``run.loaded.model`` becomes a plain copy of the model that is trained.

    Raises:
        ConfigError: If the recipe or the command cannot be combined with DeepSpeed.
    """
    config, anchor = run.config, run.plan.anchor
    if zero_stage(config) is None:
        module = TunedModel(run.loaded.model, run.plan.heads, config.model.freeze_batch_norm).to(run.device)
        return TorchEngine(module, config.optim, config.train.precision, anchor, run.device, run.processes)
    if run.plan.export is not None:
        raise ConfigError(
            f"recipe '{run.recipe.name}' trains prompts beside a CLIP that stays as it is, so there is nothing for "
            "ZeRO to divide. Leave out --zero."
        )
    if not torch.distributed.is_initialized():
        raise ConfigError(
            "DeepSpeed works with 'ftfast train' and ftfast/train.py only. Leave out deepspeed.zero here."
        )
    from ftfast.engine.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(
        run.loaded,
        run.plan.heads,
        config,
        anchor=anchor,
        processes=run.processes,
        device=run.device,
        divided=run.divided,
    )
    run.divided = None
    return engine


def build_objective(run: Run, engine: Engine, cache_dir: Path | None, on_progress: Progress | None) -> Objective:
    """Prepare teachers (cached features are computed or read here) and the objective."""
    tables: dict[str, Tensor] = {}
    for spec in run.plan.batches:
        if spec.teacher == "cached_image":
            tables[spec.source] = embed_source(run, run.datasets[spec.source], cache_dir, on_progress)
    teachers = Teachers(run.plan, run.loaded, tables, run.device, run.initial)
    return Objective(run.plan, engine, teachers, run.loaded, run.datasets, run.config.train.exchange == "ring")


def embed_source(
    run: Run, dataset: ImageDataset, cache_dir: Path | None, on_progress: Progress | None = None
) -> Tensor:
    """Return the start model's evaluation-view features of a data set, from the cache if it has them."""
    report = None if on_progress is None else (lambda done, total: on_progress("teacher features", done, total))
    return run.processes.in_turn(
        lambda: cached_image_features(
            run.loaded,
            dataset,
            cache_dir,
            batch_size=run.config.eval.batch_size,
            workers=run.config.train.workers,
            on_progress=report,
        )
    )

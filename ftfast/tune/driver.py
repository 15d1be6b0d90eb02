"""Hyper-parameter search on validation data: gain on the target and what is kept count alike."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ftfast.config.resolve import resolve, to_yaml
from ftfast.config.schema import CheckpointConfig, DataConfig, EvalConfig, LogConfig, SuiteConfig, TrainConfig
from ftfast.data import open_dataset, split_classes
from ftfast.engine.assembly import training_side
from ftfast.engine.folder import changed_settings, environment
from ftfast.engine.run import measure
from ftfast.engine.tasks import fit_task
from ftfast.errors import CheckpointError, ConfigError, MissingExtraError, TrainingError
from ftfast.evaluation import PixelCache, Results, main_metric
from ftfast.evaluation.results import write_atomically
from ftfast.evaluation.tune_report import Trial, tell, write_tune_report
from ftfast.recipes import History, Recipe, get_recipe
from ftfast.tune.space import Range, as_flags, read_space, space_file

Objective = Literal["mean", "harmonic", "worst", "target", "generic"]
OBJECTIVES: dict[str, Callable[[float, float], float]] = {
    "mean": lambda target, generic: (target + generic) / 2,
    "harmonic": lambda target, generic: 2 * target * generic / (target + generic) if target + generic else 0.0,
    "worst": min,
    "target": lambda target, generic: target,
    "generic": lambda target, generic: generic,
}
IDENTITY = "tune.json"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings of ``ftfast tune``."""

    recipe: str
    """Method."""
    space: str = ""
    """YAML file of the search space; empty: the recipe's shipped one."""
    trials: int = 20
    """Trials in all, over every process and every resumption."""
    objective: Objective = "mean"
    """mean: equal weights of target and generic validation; harmonic; worst; target or generic alone."""
    task: Literal["image_retrieval", "zero_shot"] = "image_retrieval"
    """What validation measures: mAP@20, or top-1 of class prompts."""
    out: str = ""
    """Output folder; empty: runs/tune_<recipe>."""
    resume: bool = False
    """Go on with the study in the output folder; also how further processes join it."""
    overwrite: bool = False
    """Replace the study in the output folder."""
    seed: int = 0
    """Seed of the search; training keeps the settings' own seed."""
    files: tuple[str, ...] = ()
    """Configuration files."""
    overrides: tuple[str, ...] = ()
    """Flags that set something."""


@dataclass
class TuneResult:
    """What the search found.

    Attributes:
        folder: Output folder.
        trials: Finished trials in order; the first is the shipped default.
        best: The best of them.
        page: The report.
    """

    folder: Path
    trials: list[Trial]
    best: Trial
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {
            "folder": str(self.folder),
            "report": str(self.page),
            "config": str(self.folder / "best.yaml"),
            "best": dataclasses.asdict(self.best),
            "default": dataclasses.asdict(self.trials[0]),
            "trials": len(self.trials),
        }


@dataclass
class Search:
    """A search being run."""

    config: TuneConfig
    recipe: Recipe
    base: TrainConfig
    space: tuple[Range, ...]
    out: Path
    console: Console
    study: Any
    pixels: PixelCache


def run_tune(config: TuneConfig, console: Console | None = None) -> TuneResult:
    """Search until the study has the trials asked for, and write the best configuration.

    Args:
        config: Settings.
        console: Where to tell what happens; None: standard error.

    Returns:
        Trials, the best one and the report's place.

    Raises:
        MissingExtraError: Optuna is not installed.
        FtfastError: Anything else a user can fix.
    """
    console = console or Console(stderr=True)
    optuna = _optuna()
    recipe = get_recipe(config.recipe)
    if config.trials < 1:
        raise ConfigError(f"--trials is {config.trials}; give 1 or more.")
    base = resolve(recipe.options, recipe.preset, config.files, ["--recipe", recipe.name, *config.overrides]).config
    space = read_space(space_file(config.space, recipe), base, recipe)
    sides = validation_sides(base, recipe, config.task)
    out = Path(config.out or f"runs/tune_{recipe.name}")
    _prepare(out, config, sides, space)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(out / 'study.db').resolve()}", engine_kwargs={"connect_args": {"timeout": 120}}
    )
    study = optuna.create_study(
        storage=storage, study_name=recipe.name, direction="maximize", load_if_exists=True, sampler=_sampler(config, 0)
    )
    search = Search(config, recipe, base, space, out, console, study, PixelCache())
    _bury_the_dead(search)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial({item.path: item.default for item in space})
    study.sampler = _sampler(config, len(study.get_trials(deepcopy=False)))
    while _open_places(search):
        _one_trial(search)
    return _finish(search)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "tune", "ftfast tune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(config: TuneConfig, begun: int) -> Any:
    """TPE; a process that joins later draws from a seed of its own, so that it does not repeat the others."""
    import optuna

    return optuna.samplers.TPESampler(seed=config.seed + 1000 * begun, n_startup_trials=6)


def validation_sides(config: TrainConfig, recipe: Recipe, task: Literal["image_retrieval", "zero_shot"]) -> TrainConfig:
    """Choose what trials train on and what they are measured on; test data is not part of the result.

    Target: the built-in target has validation classes of its own. Of other data, the training side of its fixed split
    (80 % of the classes; the rest is for testing) is divided by class once more, 80 to 20: validation classes are
    disjoint from those of training and of testing. Generic: the validation side of the generic data's fixed split.

    Args:
        config: Settings before the search.
        recipe: Says whether generic data is trained on.
        task: What the validation suites measure.

    Returns:
        Settings whose only suites are "target" and "generic" validation.

    Raises:
        ConfigError: If the data has no classes to divide, or there is no generic data.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty: name the training data with --data.")
    data, held_out = _target_sides(config.data)
    generic, held_generic = config.generic, config.generic
    if not generic.path:
        if not config.data.path.startswith("builtin:"):
            raise ConfigError(
                "generic.path is empty: name images that stand for what must be kept with --generic, or search for the "
                "target alone on such data."
            )
        held_generic = DataConfig(path="builtin:pairs/train", templates=config.data.templates)
    side = training_side(dataclasses.replace(held_generic, split="all"))
    generic = side if recipe.uses_generic else generic
    suites = (
        SuiteConfig(name="target", task=task, role="target", data=held_out),
        SuiteConfig(name="generic", task=task, role="control", data=dataclasses.replace(side, split="val")),
    )
    evaluation = EvalConfig(suites=suites, selection="last", alphas=(), batch_size=config.eval.batch_size)
    return dataclasses.replace(
        config,
        data=data,
        generic=generic,
        eval=evaluation,
        out="",
        checkpoint=CheckpointConfig(every_steps=10**9, keep_last=1),
        log=LogConfig(every_steps=10**9, report_to=()),
    )


def _target_sides(data: DataConfig) -> tuple[DataConfig, DataConfig]:
    """Training and validation side of the target, disjoint by class."""
    if data.path.startswith("builtin:target/train"):
        return data, dataclasses.replace(data, path="builtin:target/val")
    source = dataclasses.replace(data, split="train", split_by="classes") if data.split == "all" else data
    dataset = open_dataset(source)
    if dataset.labels is None or len(dataset.class_names or ()) < 4:
        raise ConfigError(
            f"ftfast tune divides the training classes of {dataset.description} into training and validation, which "
            "needs four classes or more. Set data.label_column, or use class folders."
        )
    first, second = split_classes(dataset, 1 - data.val_fraction, data.split_seed + 1)
    bare = dataclasses.replace(source, split="all", classes=())
    return tuple(dataclasses.replace(bare, classes=part.class_names or ()) for part in (first, second))  # type: ignore[return-value]


def _prepare(out: Path, config: TuneConfig, sides: TrainConfig, space: Sequence[Range]) -> None:
    """Make the output folder, or check that it holds this very search."""
    identity = {
        "settings": to_yaml(sides),
        "space": [dataclasses.asdict(item) | {"choices": list(item.choices)} for item in space],
        "objective": config.objective,
    }
    marker = out / IDENTITY
    if out.is_dir() and any(out.iterdir()) and config.overwrite and not config.resume:
        if not marker.is_file():
            raise ConfigError(f"--overwrite: {out} is not a search of ftfast (no {IDENTITY}), so it is left alone.")
        shutil.rmtree(out)
    if out.is_dir() and any(out.iterdir()):
        if not config.resume:
            raise ConfigError(
                f"output folder {out} already exists. Go on with --resume, replace it with --overwrite, or choose "
                "another --out."
            )
        _require_same(marker, identity)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, json.dumps(identity, indent=2) + "\n")


def _require_same(marker: Path, identity: dict[str, Any]) -> None:
    if not marker.is_file():
        raise CheckpointError(f"--resume: {marker.parent} holds no {IDENTITY}, so there is no search to continue.")
    then = json.loads(marker.read_text(encoding="utf-8"))
    changed = changed_settings(then["settings"], identity["settings"])
    changed += [name for name in ("space", "objective") if then[name] != identity[name]]
    if changed:
        raise CheckpointError(
            f"--resume: {marker.parent} was started with another {'; '.join(changed[:3])}. Use another --out."
        )


def _bury_the_dead(search: Search) -> None:
    """Give up trials whose process of this machine is gone, and queue their parameters again."""
    from optuna.trial import TrialState

    for trial in search.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        if owner is None or owner[0] != platform.node() or _alive(int(owner[1])):
            continue
        search.study.tell(trial.number, state=TrialState.FAIL)
        search.study.enqueue_trial(dict(trial.params) or {item.path: item.default for item in search.space})
        search.console.print(f"trial {trial.number} was interrupted; it is run again", highlight=False)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # this process has only just begun: the number was used again
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_places(search: Search) -> bool:
    """Whether another trial may begin: finished and running ones are fewer than asked for."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)
    return len(search.study.get_trials(deepcopy=False, states=states)) < search.config.trials


def _one_trial(search: Search) -> None:
    """Train and measure one point; a training that ends in NaN counts as the worst."""
    from optuna.trial import TrialState

    trial = search.study.ask({item.path: item.distribution() for item in search.space})
    trial.set_user_attr("owner", [platform.node(), os.getpid()])
    shown = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    )
    search.console.rule(f"trial {trial.number}: {shown}")
    folder = search.out / "trials" / f"{trial.number:04d}"
    try:
        results = _measured(search, trial.params, folder)
    except TrainingError as error:
        search.console.print(f"trial {trial.number}: {error}", highlight=False, soft_wrap=True)
        results = {"target": {"worst": 0.0}, "generic": {"worst": 0.0}}
    except BaseException:
        search.study.tell(trial.number, state=TrialState.FAIL)
        search.study.enqueue_trial(dict(trial.params))  # whatever stopped it, the point is still worth a look
        raise
    figures = {name: next(iter(values.values())) for name, values in results.items()}
    score = OBJECTIVES[search.config.objective](figures["target"], figures["generic"])
    for name, value in figures.items():
        trial.set_user_attr(name, value)
    search.study.tell(trial, score)
    shutil.rmtree(folder, ignore_errors=True)
    search.console.print(
        f"target {100 * figures['target']:.1f}  generic {100 * figures['generic']:.1f}  "
        f"{search.config.objective} {100 * score:.1f}",
        highlight=False,
    )


def _measured(search: Search, params: dict[str, Any], folder: Path) -> Results:
    """Train with these parameters and return the main metric of both validation suites."""
    config = with_params(search, params)
    sides = validation_sides(config, search.recipe, search.config.task)
    run = fit_task(sides, History(), folder, search.console, resume=False, command="ftfast tune")
    run.pixels = search.pixels
    results = measure(run, run.suites)
    return {s.config.name: {"value": results[s.config.name][main_metric(s.config)]} for s in run.suites}


def with_params(search: Search, params: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of the user with a trial's parameters on top."""
    flags = ["--recipe", search.recipe.name, *search.config.overrides, *as_flags(params)]
    return resolve(search.recipe.options, search.recipe.preset, search.config.files, flags).config


def _finish(search: Search) -> TuneResult:
    """Write the best configuration and the report."""
    from optuna.trial import TrialState

    done = search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    default = {item.path: item.default for item in search.space}
    trials = [
        Trial(
            t.number, dict(t.params), t.user_attrs["target"], t.user_attrs["generic"], float(t.value), _same(t, default)
        )
        for t in done
    ]
    trials.sort(key=lambda trial: (not trial.is_default, trial.number))
    best = max(trials, key=lambda trial: (trial.score, trial.is_default))
    text = to_yaml(with_params(search, best.params))
    head = (
        f"# Found by ftfast tune: trial {best.number} of {len(trials)}, {search.config.objective} of target "
        f"{100 * best.target:.1f} and generic {100 * best.generic:.1f} on validation data.\n"
    )
    write_atomically(search.out / "best.yaml", head + text)
    extra = {"environment": environment(), "objective": search.config.objective}
    page = write_tune_report(search.out, trials, search.config.objective, search.recipe.name, extra)
    search.console.print(tell(trials, search.config.objective), highlight=False, soft_wrap=True)
    search.console.print(f"best     {search.out / 'best.yaml'}\nreport   {page}", highlight=False, soft_wrap=True)
    return TuneResult(search.out, trials, best, page)


def _same(trial: Any, default: dict[str, Any]) -> bool:
    return all(
        math.isclose(trial.params[name], value, rel_tol=1e-9)
        if isinstance(value, float)
        else trial.params[name] == value
        for name, value in default.items()
    )

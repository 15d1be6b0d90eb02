"""One run from settings to report: measure, train, measure again, save, tell."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ftfast.config.resolve import to_yaml
from ftfast.config.schema import SuiteConfig, TrainConfig
from ftfast.engine.assembly import Run, assemble, build_engine, build_objective, embed_source
from ftfast.engine.checkpoints import CheckpointManager
from ftfast.engine.deepspeed_settings import zero_stage
from ftfast.engine.folder import check_folder, create_folder, require_same
from ftfast.engine.processes import Processes
from ftfast.engine.progress import TrainingProgress
from ftfast.engine.runlog import RunLog, SilentLog
from ftfast.engine.trainer import Trainer
from ftfast.errors import ModelError
from ftfast.evaluation import (
    ReportInfo,
    Results,
    SweepPoint,
    alpha_sweep,
    best_alpha,
    evaluate,
    main_metric,
    model_card,
    print_summary,
    summary_rows,
    sweep_line,
    write_report,
)
from ftfast.evaluation.results import role_mean, write_atomically
from ftfast.models import load_model, save_open_clip_folder


@dataclass
class TrainResult:
    """What a finished run measured and where it lies.

    Attributes:
        folder: Run folder.
        suites: Evaluations.
        before: Metrics of the start model by suite.
        after: Metrics of the final weights by suite.
        sweep: Metrics between start and tuned weights.
        steps: Optimizer steps.
        seconds: Training time, validation included.
    """

    folder: Path
    suites: tuple[SuiteConfig, ...]
    before: Results
    after: Results
    sweep: list[SweepPoint]
    steps: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {
            "folder": str(self.folder),
            "weights": str(self.folder / "final"),
            "before": self.before,
            "after": self.after,
            "sweep": [asdict(point) for point in self.sweep],
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
        }


def train(
    config: TrainConfig,
    *,
    argv: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    cache_dir: Path | None = None,
    before: Results | None = None,
    processes: Processes | None = None,
) -> TrainResult:
    """Run a recipe from start to report.

    Args:
        config: Resolved settings.
        argv: Command line, for the record.
        resume: Continue the run in ``config.out``.
        overwrite: Replace an earlier run there.
        console: Where to tell what happens; None: standard error.
        cache_dir: Teacher-feature cache; None: ``$FTFAST_CACHE`` or ``~/.cache/ftfast``.
        before: Metrics of the start model if they are known already (several runs from one start).
        processes: This process among those that train together; the first one measures, prints and writes.

    Returns:
        Measurements and the run folder; processes other than the first get none.

    Raises:
        FtfastError: Anything a user can fix, and NaN losses and interrupts.
    """
    processes = processes or Processes()
    console = (console or Console(stderr=True)) if processes.main else Console(quiet=True)
    folder = processes.on_main(lambda: check_folder(config, resume=resume, overwrite=overwrite))
    run = assemble(config, processes=processes)

    def open_folder() -> None:
        """Check or make the run's folder."""
        if resume:
            require_same(folder, run.config)
        else:
            create_folder(folder, run.config, argv)

    processes.on_main(open_folder)
    if processes.main:
        describe(run, console)
    known = before
    before = processes.on_main(lambda: known or _measured_before(run, folder, console))
    trainer = build_trainer(run, folder, resume, console, cache_dir)
    begin = time.perf_counter()
    logs = folder if processes.main else None
    with TrainingProgress(console, run.total_steps, trainer.state.step, run.config.log.every_steps, logs) as progress:
        try:
            trainer.fit(progress)
        finally:
            trainer.log.close()
            for loader in run.loaders.values():
                loader.close()
    seconds = time.perf_counter() - begin
    tuned = trainer.selected_weights()
    if not processes.main:
        return TrainResult(folder, run.config.eval.suites, before, {}, [], run.total_steps, seconds)
    run.loaded.model.to(run.device)
    after, sweep = _measure_after(run, tuned, before, console)
    result = TrainResult(folder, run.config.eval.suites, before, after, sweep, run.total_steps, seconds)
    finish(run, trainer, result, console)
    return result


def build_trainer(run: Run, folder: Path, resume: bool, console: Console, cache_dir: Path | None) -> Trainer:
    """Make the trainer of a run, restored to the newest checkpoint when resuming.

    Teachers are prepared before any weight moves, so they are the start model on every resume.
    """
    checkpoints = CheckpointManager(folder / "checkpoints", run.config.checkpoint.keep_last)
    newest = max(checkpoints.steps(), default=0) if resume else 0
    if newest == 0 and run.plan.prepare is not None:  # before DeepSpeed divides the weights it writes to
        run.plan.prepare(lambda dataset: embed_source(run, dataset, cache_dir))
    engine = build_engine(run)
    objective = build_objective(run, engine, cache_dir, None)
    if run.processes.several:
        torch.manual_seed(run.config.seed + run.processes.rank)  # dropout and the like differ between processes
    log: RunLog | SilentLog = SilentLog()
    if run.processes.main:
        log = RunLog(folder, run.config.log.report_to, newest if resume else None)
    trainer = Trainer(
        config=run.config,
        plan=run.plan,
        engine=engine,
        objective=objective,
        loaders=run.loaders,
        total_steps=run.total_steps,
        checkpoints=checkpoints,
        log=log,
        validate=_validation(run) if run.validation else None,
        config_text=to_yaml(run.config),
    )
    step = trainer.resume() if resume else 0
    if step:
        console.print(f"resumed at step {step} of {run.total_steps}", highlight=False, soft_wrap=True)
    return trainer


def _validation(run: Run) -> Any:
    """Return the function that measures validation suites and scores them for selection."""

    def validate() -> tuple[dict[str, float], float]:
        """Evaluate the validation suites and return their main metrics and the selection score."""
        results = measure(run, run.validation)
        suites = [suite.config for suite in run.validation]
        scalars = {f"{s.name}/{main_metric(s)}": results[s.name][main_metric(s)] for s in suites}
        if run.config.eval.selection in ("target", "control"):
            return scalars, role_mean(suites, results, run.config.eval.selection)
        return scalars, sum(scalars.values()) / len(scalars)

    return validate


def measure(run: Run, suites: Sequence[Any], *, tuned: bool = True) -> Results:
    """Measure the model as it is now; its mode is restored.

    Args:
        run: The run.
        suites: What to measure.
        tuned: Whether what was trained beside the model classifies, where the recipe has such a thing.

    Returns:
        Suite name -> metric -> value.
    """
    return evaluate(
        run.loaded,
        suites,
        batch_size=run.config.eval.batch_size,
        device=run.device,
        cache=run.pixels,
        workers=0 if run.device.type == "cpu" else run.config.train.workers,
        classify=run.plan.classify if tuned else None,
    )


def _measured_before(run: Run, folder: Path, console: Console) -> Results:
    """Measure the start model once per run; a resumed run reads the result."""
    path = folder / "before.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    console.print("measuring the start model", highlight=False, soft_wrap=True)
    before = measure(run, run.suites, tuned=False)
    write_atomically(path, json.dumps(before, indent=2) + "\n")
    return before


def _measure_after(
    run: Run, tuned: dict[str, Tensor], before: Results, console: Console
) -> tuple[Results, list[SweepPoint]]:
    """Load the final weights, measure them, and sweep between start and tuned weights."""
    console.print("measuring the tuned model", highlight=False, soft_wrap=True)
    tuned = {name: tensor.cpu() for name, tensor in tuned.items()}
    final = tuned if run.plan.finalize is None else run.plan.finalize(run.start, tuned)
    run.loaded.model.load_state_dict(final)
    after = measure(run, run.suites)
    known = {0.0: before} if run.plan.finalize else {0.0: before, 1.0: after}
    sweep = alpha_sweep(
        run.loaded,
        run.start,
        tuned,
        run.config.eval.alphas,
        run.suites,
        known=known,
        batch_size=run.config.eval.batch_size,
        cache=run.pixels,
    )
    return after, sweep


def finish(run: Run, trainer: Trainer, result: TrainResult, console: Console) -> None:
    """Write final weights, model card and report; print the table and how to load the weights."""
    config, recipe = run.config, run.recipe
    rows = summary_rows(result.suites, result.before, result.after)
    final = result.folder / "final"
    data = run.datasets["data"].description
    info = ReportInfo(
        title=f"{recipe.name} on {run.datasets['data'].name}",
        recipe=recipe.name,
        model=config.model.name,
        pretrained=config.model.pretrained,
        suites=result.suites,
        validation=config.eval.validation,
        data=data,
        weights=str(final),
        config=to_yaml(config),
        facts={
            "steps": f"{result.steps}",
            "training time": f"{result.seconds:.0f} s",
            "seed": str(config.seed),
            "unreadable images": str(sum(loader.bad_images for loader in run.loaders.values())),
            **({"kept step": str(trainer.state.best_step)} if trainer.state.best_step >= 0 else {}),
        },
    )
    card = model_card(info, rows, [f"{paper.title} ({paper.reference})" for paper in recipe.papers])
    save_open_clip_folder(final, run.loaded.model.state_dict(), run.loaded, card)
    check_reload(run, final)
    if run.plan.export is not None:
        run.plan.export(result.folder)
    page = write_report(
        result.folder,
        before=result.before,
        after=result.after,
        history=trainer.log.rows(),
        sweep=result.sweep,
        info=info,
    )
    write_atomically(result.folder / "result.json", json.dumps(result.as_dict(), indent=2) + "\n")
    best = sweep_line(result.suites, best_alpha(result.suites, result.sweep)) if result.sweep else ""
    print_summary(rows, console, best=best, weights=str(final))
    console.print(f"report   {page}\nload with plain open_clip:", highlight=False, soft_wrap=True)
    console.print(
        f'  model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{final}")', highlight=False
    )
    console.print(f'  tokenizer = open_clip.get_tokenizer("local-dir:{final}")', highlight=False, soft_wrap=True)


@torch.no_grad()
def check_reload(run: Run, folder: Path) -> None:
    """Load the written folder afresh and compare one forward pass of both towers with the model in memory.

    Raises:
        ModelError: If the embeddings differ by more than 1e-5.
    """
    import dataclasses

    local = dataclasses.replace(run.config.model, name=f"local-dir:{folder}", pretrained="", grad_checkpointing=False)
    again = load_model(local, run.device)
    size = run.loaded.image_size
    image = torch.linspace(-1, 1, 3 * size * size, device=run.device).reshape(1, 3, size, size)
    tokens = again.tokenizer(["a photo of a cat."]).to(run.device)
    run.loaded.model.eval()
    gap = max(
        float((encode(again.model) - encode(run.loaded.model)).abs().max())
        for encode in (
            lambda model: model.encode_image(image, normalize=True),
            lambda model: model.encode_text(tokens, normalize=True),
        )
    )
    if not gap <= 1e-5:
        raise ModelError(
            f"{folder} does not give the trained model's embeddings when loaded again (largest gap {gap:.2e})."
        )


def describe(run: Run, console: Console) -> None:
    """Print what is about to happen, in a few lines."""
    from ftfast.models import trainable_summary

    config = run.config
    towers = ", ".join(
        f"{tower} {moving / 1e6:.2f} of {total / 1e6:.2f} M"
        for tower, moving, total in trainable_summary(run.loaded.model)
    )
    for name, dataset in run.datasets.items():
        console.print(f"{name:8} {dataset.description}", highlight=False, soft_wrap=True)
    console.print(
        f"model    {config.model.name} {config.model.pretrained}; trainable: {towers}", highlight=False, soft_wrap=True
    )
    console.print(
        f"plan     {run.recipe.name}: {run.total_steps} steps of {config.train.batch_size} x {config.train.accum_freq}"
        f"{f' x {run.processes.world_size}' if run.processes.several else ''} "
        f"images, {config.train.precision}{_zero(config)} on {run.device}, lr {config.optim.lr:.2e}, "
        f"seed {config.seed}",
        highlight=False,
        soft_wrap=True,
    )


def _zero(config: TrainConfig) -> str:
    """Name the ZeRO stage, if there is one."""
    stage = zero_stage(config)
    return "" if stage is None else f", ZeRO {stage}"

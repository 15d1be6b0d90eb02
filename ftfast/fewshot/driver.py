"""Few-shot protocols: train on a few images per class, measure the same classes, new ones, or other data."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ftfast.config.resolve import resolve, to_yaml
from ftfast.config.schema import CheckpointConfig, EvalConfig, LogConfig, SuiteConfig, TrainConfig
from ftfast.config.tasks import TaskFile, read_tasks
from ftfast.continual.checks import check_tasks
from ftfast.data import ImageDataset, classes_short_of, open_dataset
from ftfast.engine.assembly import Run, choose_device
from ftfast.engine.folder import changed_settings, environment
from ftfast.engine.run import measure
from ftfast.engine.tasks import fit_task, writing
from ftfast.errors import CheckpointError, ConfigError, DataError
from ftfast.evaluation import PixelCache, evaluate, main_metric
from ftfast.evaluation.fewshot import Record, as_dict
from ftfast.evaluation.fewshot_report import ReportHead, text_tables, write_fewshot_report
from ftfast.evaluation.results import write_atomically
from ftfast.fewshot.settings import Cell, FewshotConfig, cells, data_file, rooted
from ftfast.models import load_model, save_open_clip_folder
from ftfast.recipes import History, get_recipe

MARKER = "fewshot.json"
ZERO_SHOT = "zero-shot"


@dataclass
class FewshotResult:
    """What the protocol measured.

    Attributes:
        folder: Output folder.
        records: Every training, and the zero-shot model once per training set.
        page: The report.
        seconds: This call only.
    """

    folder: Path
    records: list[Record]
    page: Path
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {
            "folder": str(self.folder),
            "report": str(self.page),
            "records": [as_dict(record) for record in self.records],
            "seconds": self.seconds,
        }


@dataclass
class Protocol:
    """A protocol being run: its settings, data sets and what is kept between trainings."""

    config: FewshotConfig
    file: TaskFile
    out: Path
    console: Console
    pixels: PixelCache = field(default_factory=PixelCache)
    told: set[str] = field(default_factory=set)


def run_fewshot(config: FewshotConfig, console: Console | None = None) -> FewshotResult:
    """Run every training of a protocol that is not measured yet, and write the report.

    Args:
        config: Settings.
        console: Where to tell what happens; None: standard error.

    Returns:
        Records and the report's place.

    Raises:
        FtfastError: Anything a user can fix.
    """
    console = console or Console(stderr=True)
    begin = time.perf_counter()
    config = checked(config)
    file = read_tasks(data_file(config.file))
    file = dataclasses.replace(file, sequence=rooted(file.sequence, config.data_root))
    plan = cells(config, file.sequence)
    trained = {cell.task.name for cell in plan}
    used = tuple(task for task in file.sequence.tasks if task.name in trained)
    check_tasks(dataclasses.replace(file.sequence, tasks=used))
    settings = [cell_settings(config, file, cell) for cell in plan]
    out = Path(config.out) if config.out else default_out(config)
    prepare(out, config)
    protocol = Protocol(config, file, out, console)
    records = zero_shot_records(protocol, plan, settings[0])
    for number, (cell, setting) in enumerate(zip(plan, settings, strict=True)):
        records.append(_one(protocol, cell, setting, f"{number + 1} of {len(plan)}"))
    head = ReportHead(file.sequence.name, config.protocol, settings[0].model.name, config.source)
    extra = {"environment": environment(), "settings": _settings_by_recipe(plan, settings)}
    page = write_fewshot_report(out, records, head, extra)
    result = FewshotResult(out, records, page, round(time.perf_counter() - begin, 1))
    console.print(text_tables(records, head), highlight=False, soft_wrap=True)
    console.print(f"report   {page}", highlight=False, soft_wrap=True)
    return result


def checked(config: FewshotConfig) -> FewshotConfig:
    """Refuse repeated or impossible numbers; write recipe names as they are registered.

    Raises:
        ConfigError: If something is wrong.
    """
    names = tuple(get_recipe(name).name for name in config.recipes)
    for flag, values in (("--recipes", names), ("--shots", config.shots), ("--seeds", config.seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{flag} is {list(values)}; give each value once, and at least one.")
    low = [value for value in (*config.shots, *config.seeds) if value < 0]
    if low:
        raise ConfigError(f"--shots and --seeds must be 0 or more, not {low[0]} (--shots 0 uses every image).")
    return dataclasses.replace(config, recipes=names)


def default_out(config: FewshotConfig) -> Path:
    """Return ``runs/<date>_fewshot_<file>_<protocol>``."""
    return Path("runs") / f"{datetime.date.today().isoformat()}_fewshot_{Path(config.file).stem}_{config.protocol}"


def prepare(out: Path, config: FewshotConfig) -> None:
    """Make the output folder, or accept it for going on.

    Raises:
        ConfigError: It exists and neither --resume nor --overwrite is given, or it is something else.
    """
    ours = (out / MARKER).is_file()
    if out.is_dir() and any(out.iterdir()) and not config.resume:
        if not config.overwrite:
            raise ConfigError(
                f"output folder {out} already exists. Go on with --resume, replace it with --overwrite, or choose "
                "another --out."
            )
        if not ours:
            raise ConfigError(f"--overwrite: {out} is not a few-shot run (no {MARKER}), so it is left alone.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / MARKER, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def cell_settings(config: FewshotConfig, file: TaskFile, cell: Cell) -> TrainConfig:
    """Settings of one training: recipe < file of data sets (all, method, set) < configuration files < flags."""
    recipe = get_recipe(cell.recipe)
    flags = ["--recipe", recipe.name, *config.overrides]
    blocks = file.blocks(recipe.name, cell.task.name)
    settings = resolve(recipe.options, recipe.preset, config.files, flags, blocks=blocks).config
    evaluation = EvalConfig(suites=cell.suites, selection="last", alphas=(), batch_size=settings.eval.batch_size)
    return dataclasses.replace(
        settings,
        data=cell.data,
        seed=cell.seed,
        eval=evaluation,
        checkpoint=CheckpointConfig(every_steps=10**9, keep_last=1),
        log=LogConfig(every_steps=10**9, report_to=()),
    )


def zero_shot_records(protocol: Protocol, plan: list[Cell], settings: TrainConfig) -> list[Record]:
    """Measure the start model on what each training set is measured on."""
    path = protocol.out / "zero_shot.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    needed = {_key(suite, settings): suite for cell in plan for suite in cell.suites}
    missing = {key: suite for key, suite in needed.items() if key not in known}
    if missing:
        protocol.console.print("measuring the start model", highlight=False)
        device = choose_device(settings.train.device)
        loaded = load_model(settings.model, device)
        for key, suite in missing.items():
            found = evaluate(loaded, [suite], batch_size=settings.eval.batch_size, cache=protocol.pixels)
            known[key] = found[suite.name][main_metric(suite)]
        write_atomically(path, json.dumps(known, indent=2) + "\n")
    first = {cell.task.name: cell for cell in reversed(plan)}
    return [
        Record(cell.protocol, ZERO_SHOT, name, 0, 0, {s.name: known[_key(s, settings)] for s in cell.suites})
        for name, cell in reversed(first.items())
    ]


def _key(suite: SuiteConfig, settings: TrainConfig) -> str:
    """What a zero-shot figure depends on."""
    data = suite.data
    parts = (settings.model.name, settings.model.pretrained, data.path, data.half, *data.classes, *data.templates)
    return " | ".join(parts)


def _one(protocol: Protocol, cell: Cell, settings: TrainConfig, place: str) -> Record:
    """Train and measure one cell, unless that is done."""
    folder = protocol.out / cell.folder
    kept = folder / f"result_{cell.protocol}.json"
    dataset = open_dataset(settings.data)
    settings = _fitting(settings, dataset)
    if kept.is_file():
        known = json.loads(kept.read_text(encoding="utf-8"))
        changed = changed_settings(known["settings"], to_yaml(settings))
        if changed:
            raise CheckpointError(
                f"--resume: {folder} was measured with other settings: {'; '.join(changed[:3])}. Use the same ones, or "
                "another --out."
            )
        return Record(cell.protocol, cell.recipe, cell.task.name, cell.shots, cell.seed, known["results"])
    protocol.console.rule(f"{place}: {cell.recipe}, {cell.draw}")
    remember_draw(protocol, cell, dataset)
    begin = time.perf_counter()
    work = folder / cell.protocol
    run = fit_task(settings, History(), work, protocol.console, resume=True, command="ftfast fewshot")
    run.pixels = protocol.pixels
    results = measure(run, run.suites)
    row = {suite.name: results[suite.name][main_metric(suite)] for suite in cell.suites}
    shown = "  ".join(f"{name} {100 * value:.1f}" for name, value in row.items())
    protocol.console.print(f"accuracy: {shown}", highlight=False, soft_wrap=True)
    writing(folder, lambda: _keep(protocol, run, work))
    seconds = round(time.perf_counter() - begin, 2)
    values = {"results": row, "steps": run.total_steps, "seconds": seconds, "settings": to_yaml(settings)}
    writing(folder, lambda: write_atomically(kept, json.dumps(values, indent=2) + "\n"))
    return Record(cell.protocol, cell.recipe, cell.task.name, cell.shots, cell.seed, row)


def _keep(protocol: Protocol, run: Run, work: Path) -> None:
    """Save what the training made; its checkpoints are not needed any more."""
    if run.plan.export is not None:
        run.plan.export(work)
    elif protocol.config.keep_weights:
        card = f"# {run.config.model.name}, tuned with {run.recipe.name} on {run.config.data.shots} images per class\n"
        save_open_clip_folder(work / "final", run.loaded.model.state_dict(), run.loaded, card)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)


def _fitting(settings: TrainConfig, dataset: ImageDataset) -> TrainConfig:
    """Shrink the batch to a draw that is smaller."""
    size = min(settings.train.batch_size, len(dataset))
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=size))


def remember_draw(protocol: Protocol, cell: Cell, dataset: ImageDataset) -> None:
    """Write which images were drawn, or check that they are those of last time; tell of small classes once.

    Raises:
        DataError: The data has changed since the draw was written.
    """
    path = protocol.out / "splits" / f"{cell.draw}.json"
    names = [dataset.image_name(row) for row in range(len(dataset))]
    drawn = {"data": cell.task.train.path, "shots": cell.shots, "seed": cell.seed, "images": names}
    drawn["fingerprint"] = dataset.fingerprint
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != drawn:
            raise DataError(f"{path} holds another draw: {cell.task.train.path} has changed. Use another --out.")
        return
    writing(path.parent, lambda: write_atomically(path, json.dumps(drawn, indent=1) + "\n"))
    short = classes_short_of(dataset, cell.shots)
    note = f"{cell.task.name} {cell.half} {cell.shots}"
    if short and note not in protocol.told:
        protocol.told.add(note)
        protocol.console.print(
            f"{cell.task.name}: {short} of {len(dataset.class_names or ())} classes have fewer than {cell.shots} "
            "training images; all of theirs are used",
            highlight=False,
            soft_wrap=True,
        )


def _settings_by_recipe(plan: list[Cell], settings: list[TrainConfig]) -> Mapping[str, str]:
    """Settings of each method's first training."""
    return {cell.recipe: to_yaml(setting) for cell, setting in reversed(list(zip(plan, settings, strict=True)))}

"""The main job on an embedded default: naive fine-tuning destroys a small CLIP, and a recipe of ftfast does not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ftfast.config.resolve import resolve
from ftfast.config.schema import SuiteConfig, TrainConfig
from ftfast.continual.demo import SequenceDemo, run_sequence_demo
from ftfast.engine.folder import environment
from ftfast.engine.run import TrainResult, train
from ftfast.errors import ConfigError
from ftfast.evaluation import (
    ReportInfo,
    Results,
    RunSummary,
    aggregate,
    main_metric,
    print_comparison,
    summary_rows,
    write_comparison,
)
from ftfast.evaluation.results import write_atomically
from ftfast.recipes import get_recipe

BASELINE = "finetune"
FEWSHOT = "demo-fewshot"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of ``ftfast demo``."""

    recipe: str = "infusing"
    """Method compared with naive fine-tuning."""
    out: str = "runs/demo"
    """Output folder."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; several give a table of means and spreads."""
    model: str = "tiny-clip-v1"
    """Built-in start model."""
    overwrite: bool = False
    """Replace an earlier demo in the output folder."""
    resume: bool = False
    """Keep finished runs in the output folder and continue interrupted ones."""


@dataclass
class DemoResult:
    """What the demo measured.

    Attributes:
        folder: Output folder.
        start: Metrics of the start model by suite.
        runs: For each method, the metrics of each seed.
        verdict: Share of naive's gain reached, and share of naive's loss suffered by control, means over seeds.
    """

    folder: Path
    start: Results
    runs: dict[str, list[Results]]
    verdict: dict[str, Any] = field(default_factory=dict)

    def means(self) -> dict[str, Results]:
        """Return the mean over seeds of every metric, by method."""
        return {
            name: {
                suite: {metric: figure.mean for metric, figure in metrics.items()}
                for suite, metrics in aggregate(runs).items()
            }
            for name, runs in self.runs.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        summary = {
            name: {
                suite: {metric: asdict(figure) for metric, figure in metrics.items()}
                for suite, metrics in aggregate(results).items()
            }
            for name, results in self.runs.items()
        }
        return {
            "folder": str(self.folder),
            "start": self.start,
            "verdict": self.verdict,
            "summary": summary,
            "runs": self.runs,
        }


def run_demo(config: DemoConfig, console: Console | None = None) -> DemoResult | SequenceDemo:
    """Fine-tune the same start model naively and with a recipe, measure both, write one report.

    Recipes of continual learning (those with settings for sequences and none for the demo, such as gift) learn the
    built-in tasks one after the other instead.

    Args:
        config: Settings.
        console: Where to tell what happens; None: standard error.

    Returns:
        Measurements of all seeds.

    Raises:
        ConfigError: If the output folder exists, or the recipe has no demo settings.
        MissingExtraError: If the image packages of the extra ``demo`` are missing.
    """
    console = console or Console(stderr=True)
    begin = time.perf_counter()
    presets = get_recipe(config.recipe).preset_path.parent
    name = get_recipe(config.recipe).name
    if (presets / "continual" / f"{name}.yaml").is_file() and not (presets / "demo" / f"{name}.yaml").is_file():
        return run_sequence_demo(
            name,
            config.out,
            config.seeds,
            config.model,
            overwrite=config.overwrite,
            resume=config.resume,
            console=console,
        )
    folder = _prepare(config)
    runs: dict[str, list[Results]] = {BASELINE: [], config.recipe: []}
    results: dict[str, TrainResult] = {}
    start: Results | None = None
    for seed in config.seeds:
        for name in runs:
            console.rule(f"{name}, seed {seed}")
            results[name] = _one_run(name, seed, folder, config, console, start)
            start = results[name].before
            runs[name].append(results[name].after)
    suites = results[BASELINE].suites
    result = DemoResult(folder, start or {}, runs)
    result.verdict = verdict(suites, result.start, runs[BASELINE], runs[config.recipe])
    page = _report(config, folder, suites, result, results)
    write_atomically(
        folder / "demo.json", json.dumps({**result.as_dict(), **_provenance(config, begin)}, indent=2) + "\n"
    )
    _tell(config, suites, result, page, console)
    return result


def demo_settings(recipe: str, seed: int, out: Path, model: str, compared: str = "") -> TrainConfig:
    """Return the settings of one demo run: the recipe's preset, the demo's preset, then seed, model and folder.

    Args:
        recipe: Method of this run.
        seed: Its seed.
        out: Its folder.
        model: Start model.
        compared: Recipe of the demo that the run belongs to, which decides what is learned; empty: ``recipe``.

    Raises:
        ConfigError: If there is no demo preset for the recipe.
    """
    method, subject = get_recipe(recipe), get_recipe(compared or recipe).name
    presets = method.preset_path.parent
    fewshot = subject != BASELINE and (presets / FEWSHOT / f"{subject}.yaml").is_file()
    preset = presets / (FEWSHOT if fewshot else "demo") / f"{method.name}.yaml"
    if not preset.is_file():
        known = {path.stem for folder in ("demo", FEWSHOT) for path in (presets / folder).glob("*.yaml")}
        shown = ", ".join(sorted(known - {"common"}))
        raise ConfigError(f"the demo has no settings for recipe {recipe!r}. It has: {shown}.")
    files = [str(preset.parent / "common.yaml"), str(preset)] if fewshot else [str(preset)]
    flags = ["--recipe", method.name, "--seed", str(seed), "--out", str(out), "--model", model]
    return resolve(method.options, method.preset, files, flags).config


def verdict(
    suites: Sequence[SuiteConfig], start: Results, naive: Sequence[Results], tuned: Sequence[Results]
) -> dict[str, Any]:
    """Compare gain and loss with naive fine-tuning's, in the mean over seeds.

    Args:
        suites: Target and controls.
        start: Metrics of the start model.
        naive: Metrics of naive fine-tuning, by seed.
        tuned: Metrics of the recipe, by seed.

    Returns:
        "gain": for each target, tuned gain / naive gain; "loss": for each control, tuned loss / naive loss; and the
        same figures in points. A ratio is None where naive did not gain (lose).
    """

    def change(results: Sequence[Results], suite: SuiteConfig) -> float:
        """Return the mean change of a suite's main metric from the start model."""
        metric = main_metric(suite)
        return sum(r[suite.name][metric] for r in results) / len(results) - start[suite.name][metric]

    table: dict[str, Any] = {"gain": {}, "loss": {}}
    for suite in suites:
        sign = 1.0 if suite.role == "target" else -1.0
        reference, own = sign * change(naive, suite), sign * change(tuned, suite)
        table["gain" if suite.role == "target" else "loss"][suite.name] = {
            "naive_points": 100 * reference,
            "points": 100 * own,
            "ratio": own / reference if reference > 0 else None,
        }
    return table


def _prepare(config: DemoConfig) -> Path:
    """Check the output folder; an earlier demo is replaced only when asked for."""
    folder = Path(config.out)
    get_recipe(config.recipe)
    if folder.is_dir() and any(folder.iterdir()) and not config.resume:
        if not config.overwrite:
            raise ConfigError(
                f"output folder {folder} already exists. Replace it with --overwrite, continue with --resume, "
                "or choose another --out."
            )
        if not (folder / "demo.json").is_file() and not any(folder.glob("seed*/*/config.yaml")):
            raise ConfigError(
                f"--overwrite: {folder} is not a demo of ftfast, so it is left alone. Choose another --out."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _one_run(
    name: str, seed: int, folder: Path, config: DemoConfig, console: Console, before: Results | None
) -> TrainResult:
    """Train one method with one seed, or continue it."""
    out = folder / f"seed{seed}" / name
    settings = demo_settings(name, seed, out, config.model, config.recipe)
    if len(config.seeds) > 1:  # the sweep belongs to the single-seed report; many seeds want only the end points
        settings = replace(settings, eval=replace(settings.eval, alphas=()))
    resume = config.resume and (out / "config.yaml").is_file()
    return train(settings, argv=["demo"], resume=resume, console=console, before=before)


def _report(
    config: DemoConfig,
    folder: Path,
    suites: Sequence[SuiteConfig],
    result: DemoResult,
    results: Mapping[str, TrainResult],
) -> Path:
    """Write the comparison page (means over seeds when there are several)."""
    means = result.means()
    shown = [
        RunSummary(
            name=name,
            results=means[name],
            sweep=tuple(results[name].sweep) if len(config.seeds) == 1 else (),
            seeds=tuple(result.runs[name]),
            note=f"{results[name].steps} steps, {results[name].seconds:.0f} s",
        )
        for name in result.runs
    ]
    title = f"Naive fine-tuning and {config.recipe} on people emoji"
    info = ReportInfo(
        title=title,
        recipe=config.recipe,
        model=config.model,
        suites=tuple(suites),
        data="people emoji in a drawing hand that training does not see",
        weights=str(results[config.recipe].folder / "final"),
        facts={"seeds": ", ".join(str(seed) for seed in config.seeds)},
    )
    return write_comparison(folder, shown, start=result.start, suites=suites, info=info)


def _provenance(config: DemoConfig, begin: float) -> dict[str, Any]:
    return {"config": asdict(config), "seconds": round(time.perf_counter() - begin, 1), "environment": environment()}


def _tell(config: DemoConfig, suites: Sequence[SuiteConfig], result: DemoResult, page: Path, console: Console) -> None:
    """Print the table and the verdict in plain words."""
    console.rule("result")
    means = result.means()
    tables = {name: summary_rows(suites, result.start, mean, result.runs[name]) for name, mean in means.items()}
    print_comparison(tables, console)
    for name, row in result.verdict["gain"].items():
        if row["ratio"] is not None:
            console.print(
                f"{config.recipe} reaches {100 * row['ratio']:.0f} % of naive fine-tuning's gain on {name}",
                highlight=False,
            )
    for name, row in result.verdict["loss"].items():
        if row["ratio"] is not None:
            console.print(
                f"{config.recipe} suffers {100 * row['ratio']:.0f} % of its loss on {name} "
                f"({row['points']:.1f} of {row['naive_points']:.1f} points)",
                highlight=False,
            )
    console.print(f"report   {page}", highlight=False, soft_wrap=True)

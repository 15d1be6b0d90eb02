"""The report of a run: one HTML file, PNGs, the CSV behind each plot, results.json and report.md."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftfast.config.schema import SuiteConfig
from ftfast.errors import DataError
from ftfast.evaluation.drawing import DARK, LIGHT, Plot
from ftfast.evaluation.history_plots import learning_rate, loss_terms, validation, validation_path
from ftfast.evaluation.page import Card, Section, comparison_table, figure_html, page, summary_table
from ftfast.evaluation.plots import RunPoints, alpha_sweep, gained_versus_forgotten
from ftfast.evaluation.results import (
    CheckpointResult,
    SummaryRow,
    SweepPoint,
    best_alpha,
    summary_rows,
    write_atomically,
    write_csv,
    write_results,
)
from ftfast.evaluation.suites import Results
from ftfast.evaluation.tables import comparison_markdown, headline, percent, signed, summary_markdown, sweep_line


@dataclass(frozen=True, kw_only=True)
class ReportInfo:
    """Everything in a report that is not a measurement.

    Attributes:
        title: Heading, for example "INFUSING on people emoji".
        recipe: Recipe name.
        model: Model name, as open_clip calls it.
        pretrained: Tag of the start weights.
        suites: Suites of before, after and sweep.
        validation: Suites that were measured during training.
        data: Data summary.
        weights: Where the final weights are, as the reader should type it.
        config: The resolved configuration as YAML.
        facts: Further rows for the "This run" table: steps, time, images per second, seed.
        checkpoints: Results on ``suites`` during training, if they were measured.
    """

    title: str
    recipe: str
    model: str
    pretrained: str = ""
    suites: tuple[SuiteConfig, ...]
    validation: tuple[SuiteConfig, ...] = ()
    data: str = ""
    weights: str = ""
    config: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    checkpoints: tuple[CheckpointResult, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run of a comparison.

    Attributes:
        name: Name in table and plot, for example "naive" or "INFUSING".
        results: Results of the final weights.
        sweep: Interpolations between start and end.
        checkpoints: Results during training.
        note: A short remark for the table, such as the training time.
        seeds: Results of each seed, if ``results`` is their mean; the table then shows the spread.
    """

    name: str
    results: Results
    sweep: tuple[SweepPoint, ...] = ()
    checkpoints: tuple[CheckpointResult, ...] = ()
    note: str = ""
    seeds: tuple[Results, ...] = ()


def write_report(
    folder: Path,
    *,
    before: Results,
    after: Results,
    history: Sequence[Mapping[str, Any]] = (),
    sweep: Sequence[SweepPoint] = (),
    info: ReportInfo,
) -> Path:
    """Write a run's report.

    Args:
        folder: The report goes to ``folder/report``.
        before: Results of the start model on ``info.suites``.
        after: Results of the tuned model on the same.
        history: Log rows: "step", "train/loss", "train/loss/<term>", "train/lr", "eval/<suite>/<metric>".
        sweep: Results between start and tuned weights; alpha 0 is ``before`` if it is missing.
        info: Names, suites and facts.

    Returns:
        Path of ``index.html``.

    Raises:
        DataError: A suite was not measured before or after.
    """
    target = Path(folder) / "report"
    rows = summary_rows(info.suites, before, after)
    points = _from_start(sweep, before)
    run = RunPoints(info.recipe, after, points, info.checkpoints)
    plots = [
        gained_versus_forgotten(info.suites, before, [run]),
        alpha_sweep(info.suites, {info.recipe: points}),
        validation_path(history, info.validation, info.recipe),
        validation(history, info.validation),
        loss_terms(history),
        learning_rate(history),
    ]
    shown = [plot for plot in plots if plot is not None]
    start_tag = info.pretrained or "start"
    write_results(target, info.suites, {start_tag: before, f"{start_tag}+{info.recipe}": after}, model=info.model)
    _write_summary_csv(target, {info.recipe: rows})
    best = sweep_line(info.suites, best_alpha(info.suites, points)) if sweep else ""
    sections = [
        Section(
            "Before and after",
            summary_table(rows) + (f"<p class=note>{html.escape(best)}</p>" if best else ""),
            wide=True,
        ),
        *plot_sections(target, shown),
        Section("This run", _facts_html(info), wide=True),
    ]
    subtitle = " · ".join(part for part in (info.model, info.pretrained, info.data) if part)
    sentence = f"{info.recipe}: {headline(rows)}"
    lines = [f"# {info.title}", "", subtitle, "", sentence, "", summary_markdown(rows), "", best, ""]
    _write_markdown(target, lines, shown)
    return write_atomically(target / "index.html", page(info.title, subtitle, sentence, _cards(rows), sections))


def _from_start(sweep: Sequence[SweepPoint], start: Results) -> tuple[SweepPoint, ...]:
    """The sweep in order of alpha, beginning at the start model.

    Alpha 1 is not filled in: a recipe such as WiSE-FT ends at weights that are not its tuned ones.
    """
    if not sweep:
        return ()
    first = () if any(point.alpha == 0 for point in sweep) else (SweepPoint(0.0, start),)
    return tuple(sorted((*first, *sweep), key=lambda point: point.alpha))


def write_comparison(
    folder: Path, runs: Sequence[RunSummary], *, start: Results, suites: Sequence[SuiteConfig], info: ReportInfo
) -> Path:
    """Write a comparison of several runs from the same start model.

    Args:
        folder: The report goes to ``folder/report``.
        runs: In order of the table; the first is the reference that gains and losses of the others are compared with.
        start: Results of the start model.
        suites: Suites of all results.
        info: Names and facts; its ``recipe`` and ``checkpoints`` are not used.

    Returns:
        Path of ``index.html``.

    Raises:
        DataError: A run lacks a suite, or two runs share a name.
    """
    if len({run.name for run in runs}) < len(runs):
        raise DataError(f"runs are compared by name, but two are alike: {', '.join(run.name for run in runs)}.")
    target = Path(folder) / "report"
    tables = {run.name: summary_rows(suites, start, run.results, run.seeds) for run in runs}
    entries = [
        RunPoints(
            run.name,
            run.results,
            _from_start(run.sweep, start),
            run.checkpoints,
        )
        for run in runs
    ]
    _write_summary_csv(target, tables)
    sweeps = {entry.name: entry.sweep for entry in entries}
    plots = [gained_versus_forgotten(suites, start, entries), alpha_sweep(suites, sweeps)]
    shown = [plot for plot in plots if plot is not None]
    tag = info.pretrained or "start"
    versions = {tag: start, **{f"{tag}+{run.name}": run.results for run in runs}}
    write_results(target, suites, versions, model=info.model)
    sections = [
        Section(
            "The same start, different endings",
            comparison_table(tables, {run.name: run.note for run in runs}),
            wide=True,
        ),
        *plot_sections(target, shown),
        Section("This run", _facts_html(info), wide=True),
    ]
    last = runs[-1]
    sentence = f"{last.name}: {headline(tables[last.name])}"
    subtitle = " · ".join(part for part in (info.model, info.pretrained, info.data) if part)
    lines = [f"# {info.title}", "", subtitle, "", sentence, "", comparison_markdown(tables), ""]
    _write_markdown(target, lines, shown)
    compared = (tables[runs[0].name], runs[0].name) if len(runs) > 1 else ()
    cards = _cards(tables[last.name], *compared)
    return write_atomically(target / "index.html", page(info.title, subtitle, sentence, cards, sections))


def _cards(rows: Sequence[SummaryRow], reference: Sequence[SummaryRow] = (), reference_name: str = "") -> list[Card]:
    """Large figures at the top: what the targets gained, what the controls kept on average and at worst."""
    cards = []
    targets = [row for row in rows if row.role == "target"]
    if targets:
        gain = sum(row.change for row in targets) / len(targets)
        what = targets[0].title if len(targets) == 1 else f"mean of {len(targets)} targets"
        cards.append(Card("Learned", signed(gain), "points", what + _versus(targets, reference, reference_name)))
    controls = [row for row in rows if row.role == "control" and not math.isnan(row.kept)]
    if controls:
        mean = sum(row.kept for row in controls) / len(controls)
        worst = min(controls, key=lambda row: row.kept)
        what = "of the control" if len(controls) == 1 else f"on average over {len(controls)} controls"
        cards.append(Card("Kept", percent(mean), "%", what + _versus(controls, reference, reference_name)))
        if len(controls) > 1:
            detail = f"{worst.title}, {percent(worst.before)} → {percent(worst.after)}"
            cards.append(Card("Kept at worst", percent(worst.kept), "%", detail))
    return cards


def _versus(rows: Sequence[SummaryRow], reference: Sequence[SummaryRow], name: str) -> str:
    """``; naive: +16.7`` or ``; naive: 38.0 %``: the same figure of the reference run, or nothing without one."""
    names = {row.suite for row in rows}
    twins = [row for row in reference if row.suite in names]
    if not twins:
        return ""
    if rows[0].role == "target":
        return f"; {name}: {signed(sum(row.change for row in twins) / len(twins))}"
    return f"; {name}: {percent(sum(row.kept for row in twins) / len(twins))} %"


def plot_sections(folder: Path, plots: Sequence[Plot]) -> list[Section]:
    """Write each plot's PNG and CSV, and return its box of the page."""
    sections = []
    for plot in plots:
        light, dark = plot.png(LIGHT), plot.png(DARK)
        write_atomically(folder / f"{plot.name}.png", light)
        write_csv(folder / f"{plot.name}.csv", plot.columns, plot.rows)
        sections.append(Section(plot.title, figure_html(plot, light, dark), wide=plot.wide))
    return sections


def _write_summary_csv(folder: Path, tables: Mapping[str, Sequence[SummaryRow]]) -> None:
    columns = ("run", "suite", "role", "metric", "before", "after", "spread", "change", "kept")
    cells = [
        (name, r.suite, r.role, r.metric, r.before, r.after, r.spread, r.change, r.kept)
        for name, rows in tables.items()
        for r in rows
    ]
    write_csv(folder / "summary.csv", columns, cells)


def _write_markdown(folder: Path, lines: Sequence[str], plots: Sequence[Plot]) -> None:
    pictures = [
        line
        for plot in plots
        for line in (f"## {plot.title}", "", f"![{plot.title}]({plot.name}.png)", "", plot.caption, "")
    ]
    write_atomically(folder / "report.md", "\n".join([*lines, *pictures]).replace("\n\n\n", "\n\n"))


def _facts_html(info: ReportInfo) -> str:
    facts = {
        "Recipe": info.recipe,
        "Model": " ".join(part for part in (info.model, info.pretrained) if part),
        "Data": info.data,
        "Weights": info.weights,
        **info.facts,
    }
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value
    )
    config = (
        f"<details><summary>Configuration</summary><pre>{html.escape(info.config)}</pre></details>"
        if info.config
        else ""
    )
    files = (
        '<p class=note>Files beside this page: <a href="results.json">results.json</a>, '
        '<a href="results.csv">results.csv</a>, <a href="report.md">report.md</a>, a PNG and a CSV for each plot.</p>'
    )
    return f"<table class=facts>{rows}</table>{config}{files}"

"""What a report writes: tables, plots with their data, records for CLIP_benchmark, one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ftfast.config.schema import SuiteConfig
from ftfast.errors import DataError
from ftfast.evaluation import (
    CheckpointResult,
    ReportInfo,
    RunSummary,
    SummaryRow,
    SweepPoint,
    aggregate,
    best_alpha,
    model_card,
    print_comparison,
    print_summary,
    summary_rows,
    sweep_line,
    write_comparison,
    write_report,
)
from ftfast.evaluation.results import write_atomically

SUITES = (
    SuiteConfig(name="names", task="zero_shot"),
    SuiteConfig(name="pairs", task="image_text_retrieval"),
    SuiteConfig(name="people & <co>", task="image_retrieval", role="target", metric="recall_at_1"),
)


def results(names: float, pairs: float, people: float) -> dict[str, dict[str, float]]:
    return {
        "names": {"acc1": names, "acc5": names + 0.2, "mean_per_class_recall": names},
        "pairs": {"mean_recall_at_1": pairs, "image_to_text_recall_at_1": pairs, "text_to_image_recall_at_1": pairs},
        "people & <co>": {"recall_at_1": people, "map_at_20": people / 2},
    }


BEFORE, AFTER, NAIVE = results(0.327, 0.3, 0.178), results(0.31, 0.297, 0.345), results(0.077, 0.09, 0.35)
SWEEP = [SweepPoint(1.0, AFTER), SweepPoint(0.5, results(0.325, 0.299, 0.3))]
HISTORY = [
    {"step": 1, "train/loss": 3.0, "train/loss/classification": 2.0, "train/loss/embedding": 1.0, "train/lr": 1e-5},
    {"step": 2, "train/loss": 2.0, "train/loss/classification": 1.5, "train/loss/embedding": float("nan")},
    {"step": 2, "eval/generic/acc1": 0.4, "eval/generic/map_at_20": 0.25, "eval/people/recall_at_1": 0.5},
]


def info(**changes) -> ReportInfo:
    fields = {
        "title": "A <run>",
        "recipe": "infusing",
        "model": "ViT-B-16",
        "pretrained": "openai",
        "suites": SUITES,
        "config": "seed: 0\n",
        "facts": {"Steps": "2"},
        "checkpoints": (CheckpointResult(1, results(0.32, 0.3, 0.2)),),
        **changes,
    }
    return ReportInfo(**fields)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Collects what a page refers to, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [values[key] for key in ("src", "srcset") if values.get(key)]
        if tag == "a":
            self.links.append(values["href"])
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    page = write_report(folder, before=BEFORE, after=AFTER, history=HISTORY, sweep=SWEEP, info=info())
    assert page == folder / "report" / "index.html"
    return folder / "report"


def test_rows_put_targets_first_and_know_what_was_kept() -> None:
    rows = summary_rows(SUITES, BEFORE, AFTER)
    assert [row.suite for row in rows] == ["people & <co>", "names", "pairs"]
    assert [row.metric for row in rows] == ["recall_at_1", "acc1", "mean_recall_at_1"]
    assert rows[1].change == pytest.approx(-0.017)
    assert rows[1].kept == pytest.approx(0.31 / 0.327)
    assert np.isnan(SummaryRow("s", "control", "acc1", 0.0, 0.5).kept)
    message = r"^suite 'names' has no result for 'acc1' after training; measured were: none\.$"
    with pytest.raises(DataError, match=message):
        summary_rows(SUITES[:1], BEFORE, {})


def test_printed_summary_is_plain_text_away_from_a_terminal() -> None:
    rows = [
        SummaryRow("pairs", "target", "recall_at_1", 0.412, 0.589),
        SummaryRow("imagenet-100", "control", "acc1", 0.683, 0.679),
        SummaryRow("dead", "control", "acc1", 0.0, 0.0),
    ]
    suites = [
        SuiteConfig(name="pairs", task="image_retrieval", role="target", metric="recall_at_1"),
        SuiteConfig(name="imagenet-100", task="zero_shot"),
    ]
    best = SweepPoint(0.8, {"pairs": {"recall_at_1": 0.576}, "imagenet-100": {"acc1": 0.674}})
    out = io.StringIO()
    console = Console(file=out, width=40)  # a log file keeps long names on one line
    print_summary(rows, console, best=sweep_line(suites, best), weights="runs/a/final")
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "                             before  after  change",
        "target: pairs R@1              41.2   58.9   +17.7",
        "control: imagenet-100 top-1    68.3   67.9    -0.4  kept 99.4 %",
        "control: dead top-1             0.0    0.0    +0.0",
        "best alpha on sweep: 0.8 (target 57.6, control 67.4)   weights: runs/a/final",
    ]


def test_best_alpha_weighs_target_and_control_means_equally() -> None:
    points = [SweepPoint(0.0, BEFORE), SWEEP[1], SweepPoint(1.0, NAIVE)]
    scores = [
        (
            np.mean([p.results["names"]["acc1"], p.results["pairs"]["mean_recall_at_1"]])
            + p.results["people & <co>"]["recall_at_1"]
        )
        / 2
        for p in points
    ]
    assert best_alpha(SUITES, points) is points[int(np.argmax(scores))]
    assert best_alpha(SUITES, []) is None


def test_page_is_self_contained(report: Path) -> None:
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 2 * 5  # a light and a dark picture of five plots
    for source in page.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    for link in page.links:
        assert (report / link).is_file()
    text = " ".join(page.text)
    assert "A <run>" in text
    assert "people & <co> R@1" in text
    for figure in ("17.8", "34.5", "+16.7", "32.7", "31.0", "−1.7", "94.8 %"):
        assert figure in text


def test_every_plot_has_a_picture_and_the_data_behind_it(report: Path) -> None:
    names = {"gained_vs_forgotten", "alpha_sweep", "validation", "loss_terms", "learning_rate"}
    assert {path.stem for path in report.glob("*.png")} == names
    scatter = read_csv(report / "gained_vs_forgotten.csv")
    by_kind = {(row["kind"], row["alpha_or_step"]): row for row in scatter}
    assert float(by_kind["start", ""]["control_percent"]) == pytest.approx((32.7 + 30) / 2)
    assert float(by_kind["end", ""]["target_percent"]) == pytest.approx(34.5)
    assert {key for key in by_kind if key[0] == "alpha"} == {("alpha", "0.0"), ("alpha", "0.5"), ("alpha", "1.0")}
    assert float(by_kind["checkpoint", "1"]["target_percent"]) == pytest.approx(20)
    losses = {(row["step"], row["term"]): float(row["value"]) for row in read_csv(report / "loss_terms.csv")}
    assert losses == {
        ("1", "total"): 3.0,
        ("2", "total"): 2.0,
        ("1", "classification"): 2.0,
        ("2", "classification"): 1.5,
        ("1", "embedding"): 1.0,  # the NaN of step 2 is not a point
    }
    shown = {row["suite"]: float(row["percent"]) for row in read_csv(report / "validation.csv")}
    assert shown == {"generic, top-1": 40.0, "people, R@1": 50.0}
    assert float(read_csv(report / "summary.csv")[0]["change"]) == pytest.approx(0.167)


def test_the_way_of_a_run_is_drawn_from_its_validations(tmp_path: Path) -> None:
    suites = (
        SuiteConfig(name="target", task="image_retrieval", role="target"),
        SuiteConfig(name="generic", task="image_retrieval"),
    )
    history = [
        {"step": step, "eval/target/map_at_20": 0.2 + step / 100, "eval/generic/map_at_20": 0.4 - step / 1000}
        for step in (1, 10, 20)
    ]
    fields = {"suites": SUITES[2:], "validation": suites, "checkpoints": ()}
    write_report(tmp_path, before=BEFORE, after=AFTER, history=history, info=info(**fields))
    rows = read_csv(tmp_path / "report" / "validation_path.csv")
    assert [(row["kind"], row["alpha_or_step"]) for row in rows] == [("start", ""), ("checkpoint", "10"), ("end", "")]
    assert [float(row["control_percent"]) for row in rows] == pytest.approx([39.9, 39.0, 38.0])
    assert [float(row["target_percent"]) for row in rows] == pytest.approx([21, 30, 40])


def test_records_follow_clip_benchmark(report: Path) -> None:
    records = json.loads((report / "results.json").read_text())
    assert len(records) == 6
    for record in records:
        assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    first = next(r for r in records if r["dataset"] == "names" and r["pretrained"] == "openai+infusing")
    assert first["task"] == "zeroshot_classification"
    assert first["metrics"] == {"acc1": 0.31, "acc5": pytest.approx(0.51), "mean_per_class_recall": 0.31}
    pairs = next(r for r in records if r["dataset"] == "pairs")
    assert {"image_retrieval_recall@1", "text_retrieval_recall@1"} < set(pairs["metrics"])
    # what `clip_benchmark build` does with each file
    files = sorted((report / "clip_benchmark").glob("*.json"))
    assert len(files) == 6
    for path in files:
        record = json.loads(path.read_text())
        assert record in records
        assert {**record["metrics"], **record}["model"] + " " + record["pretrained"]
    rows = read_csv(report / "results.csv")
    assert {(row["weights"], row["suite"], row["metric"]): float(row["value"]) for row in rows}[
        "openai", "people & <co>", "map_at_20"
    ] == pytest.approx(0.089)


def test_markdown_names_every_picture(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "| control: names top-1 | 32.7 | 31.0 | -1.7 | 94.8 % |" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 5
    assert all((report / picture).is_file() for picture in pictures)


def test_a_run_without_history_sweep_or_controls_still_has_a_report(tmp_path: Path) -> None:
    page = write_report(tmp_path, before=BEFORE, after=AFTER, info=info(suites=SUITES[2:], checkpoints=(), config=""))
    assert "34.5" in page.read_text(encoding="utf-8")
    assert list((tmp_path / "report").glob("*.png")) == []
    page = write_report(tmp_path / "none", before={}, after={}, info=info(suites=(), checkpoints=()))
    assert "Nothing was measured." in page.read_text(encoding="utf-8")


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / name, before=BEFORE, after=AFTER, info=info()) for name in ("a", "b")]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert (pages[0].parent / "gained_vs_forgotten.png").is_file()


def test_comparison_shows_shares_of_the_first_run(tmp_path: Path) -> None:
    runs = [
        RunSummary(name="naive", results=NAIVE, sweep=(SweepPoint(0.5, results(0.2, 0.2, 0.3)),), note="16 s"),
        RunSummary(name="INFUSING", results=AFTER, sweep=tuple(SWEEP)),
    ]
    page = write_comparison(tmp_path, runs, start=BEFORE, suites=SUITES, info=info(title="demo"))
    text = " ".join(Page(page.read_text(encoding="utf-8")).text)
    assert "97 % of naive’s gain" in text  # 16.7 of 17.2
    assert "7 % of naive’s loss" in text  # 1.7 of 25.0
    assert "1 % of naive’s loss" in text  # 0.3 of 21.0
    with pytest.raises(DataError, match=r"two are alike: naive, naive\.$"):
        write_comparison(tmp_path, [runs[0], runs[0]], start=BEFORE, suites=SUITES, info=info())
    runs_drawn = {row["run"] for row in read_csv(tmp_path / "report" / "gained_vs_forgotten.csv")}
    assert runs_drawn == {"start", "naive", "INFUSING"}
    out = io.StringIO()
    tables = {run.name: summary_rows(SUITES[:1], BEFORE, run.results) for run in runs}
    print_comparison(tables, Console(file=out, width=100))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["pretrained", "naive", "INFUSING"],
        ["control:", "names", "top-1", "32.7", "7.7", "(-25.0)", "31.0", "(-1.7)"],
    ]


def test_several_seeds_show_their_spread(tmp_path: Path) -> None:
    seeds = (results(0.31, 0.3, 0.33), results(0.32, 0.3, 0.35))
    mean = results(0.315, 0.3, 0.34)
    rows = summary_rows(SUITES, BEFORE, mean, seeds)
    assert [row.spread for row in rows] == pytest.approx(
        [np.std([0.33, 0.35], ddof=1), np.std([0.31, 0.32], ddof=1), 0]
    )
    runs = [RunSummary(name="naive", results=NAIVE), RunSummary(name="INFUSING", results=mean, seeds=seeds)]
    page = write_comparison(tmp_path, runs, start=BEFORE, suites=SUITES, info=info(title="demo"))
    assert "34.0 ± 1.4" in page.read_text(encoding="utf-8")
    assert "| 34.0 ± 1.4 (+16.2) |" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    spreads = {(row["run"], row["suite"]): row["spread"] for row in read_csv(tmp_path / "report" / "summary.csv")}
    assert spreads["naive", "names"] == ""
    assert float(spreads["INFUSING", "names"]) == pytest.approx(np.std([0.31, 0.32], ddof=1))


def test_aggregate_gives_mean_and_sample_deviation() -> None:
    values = (0.31, 0.33, 0.38)
    summary = aggregate([results(value, 0.3, 0.2) for value in values])["names"]["acc1"]
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    assert (summary.low, summary.high, summary.seeds) == (0.31, 0.38, 3)
    assert aggregate([BEFORE])["names"]["acc1"].std == 0
    with pytest.raises(DataError, match=r"^run 2 of 2 does not hold the same figures as run 1: names/acc1\. "):
        aggregate([{"names": {"acc1": 0.1}}, {"names": {}}])
    with pytest.raises(DataError, match=r"^there are no runs to aggregate\.$"):
        aggregate([])


def test_model_card_loads_and_leaves_the_licence_open() -> None:
    card = model_card(info(weights="runs/a/final"), summary_rows(SUITES, BEFORE, AFTER), ["Paper (arXiv 1)"])
    assert 'open_clip.create_model_and_transforms("local-dir:runs/a/final")' in card
    assert 'open_clip.get_tokenizer("local-dir:runs/a/final")' in card
    assert "- Paper (arXiv 1)" in card
    assert "| control: names top-1 | 32.7 | 31.0 | -1.7 | 94.8 % |" in card
    assert "```yaml\nseed: 0\n```" in card
    assert "license: # to be filled in by you" in card


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a" / "results.json", "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]

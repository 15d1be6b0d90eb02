"""Does the exact Fisher protect better than squared batch gradients? A study on the built-in data.

``python -m benchmarks.fisher_study`` tunes the built-in tiny CLIP on the target classes with EWC, once per seed,
importance and strength, and measures what was learnt (accuracy on unseen images of the target classes) and what was
kept (zero-shot accuracy on held-out pairs). Importances come from the same training pairs: the exact per-sample Fisher,
squared batch gradients at several batch sizes, and all ones (L2-SP). Each is scaled to mean one over all weights, so
that strengths compare and only the distribution over weights differs. A Fisher's mean is made by few weights and most
are far below it, so L2-SP, which holds every weight alike, is given strengths 1000 times smaller.

The strength is chosen on validation images, separately for every importance and seed, by the harmonic mean of two
shares: learnt over what tuning without an anchor learns, and kept over what the start weights know. Test images are
looked at only with the strength chosen. Finished runs are kept in the results file, so a stopped study goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, format_table, write_result
from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.data import open_dataset, split_images
from ftfast.models import load_model
from ftfast.weightspace import AnchoredAdamW, ContrastiveObjective, estimate_fisher, ewc

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "fisher_study.png"
COLUMNS = ["seed", "importance", "strength", "cosine", "learnt_val", "kept_val", "learnt", "kept"]
SUMMARY = ["importance", "cosine", "strengths", "learnt", "learnt_range", "kept", "kept_range", "score"]
Row = dict[str, Any]
Labelled = tuple[Tensor, Tensor]


def load(source: Any, transform: Any, limit: int, seed: int) -> tuple[Tensor, list[int]]:
    """Decoded images of a random part of a dataset, and their positions."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    return torch.stack([transform(source.load_image(index)) for index in order]), order


def prompts(source: Any, tokenizer: Any) -> Tensor:
    """Token ids of one prompt per class."""
    return tokenizer([source.templates[0].format(name) for name in source.class_names])


class Study:
    """One seed: data, start model, measurements. 60 % of the target images to tune on, 20 % each to choose and test."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.loaded = load_model(ModelConfig(), "cpu")
        tokenizer, transform = self.loaded.tokenizer, self.loaded.eval_transform
        old = open_dataset(DataConfig(path="builtin:pairs/train"))
        kept = open_dataset(DataConfig(path="builtin:pairs/heldout"))
        task = open_dataset(DataConfig(path="builtin:target/train"))
        images, order = load(old, transform, options.pairs, seed)
        self.old = (images, prompts(old, tokenizer)[torch.as_tensor(old.labels)[order]])
        tune, rest = split_images(task, 0.6, seed)
        parts = (tune, *split_images(rest, 0.5, seed))
        self.tune_on, *self.learnt = (self._labelled(part, transform) for part in parts)
        images, labels = self._labelled(kept, transform)
        half = len(images) // 2
        self.kept = [(images[:half], labels[:half]), (images[half:], labels[half:])]
        self.kept_prompts, self.task_prompts = prompts(kept, tokenizer), prompts(task, tokenizer)
        self.start = {name: value.clone() for name, value in self.loaded.model.state_dict().items()}

    def _labelled(self, source: Any, transform: Any) -> Labelled:
        images, order = load(source, transform, len(source), self.seed)
        return images, torch.as_tensor(source.labels)[order]

    def importance(self, kind: str) -> dict[str, Tensor]:
        """Importance by name, scaled to mean one over all weights."""
        model = self.reset()
        if kind == "ones (L2-SP)":
            return {name: torch.ones_like(p) for name, p in model.named_parameters()}
        exact = kind.startswith("exact")
        size = 64 if exact else int(kind.rsplit(" ", 1)[1])
        images, tokens = self.old
        batches = [(images[i : i + size], tokens[i : i + size]) for i in range(0, len(images) - size + 1, size)]
        fisher = estimate_fisher(
            model, batches, kind="empirical" if exact else "squared_batch_gradient", loss=ContrastiveObjective()
        ).values
        scale = sum(float(v.sum()) for v in fisher.values()) / sum(v.numel() for v in fisher.values())
        return {name: value / scale for name, value in fisher.items()}

    def reset(self) -> nn.Module:
        """The model with its start weights."""
        self.loaded.model.load_state_dict(self.start)
        return self.loaded.model.eval()

    def tune(self, importance: dict[str, Tensor] | None, strength: float) -> dict[str, float]:
        """Tune on the task with an anchor; return what was learnt and kept."""
        model = self.reset()
        anchor = None if importance is None else ewc(model.named_parameters(), importance, strength)
        optimizer = AnchoredAdamW(model.parameters(), lr=self.options.lr, anchor=anchor, anchor_mode="proximal")
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = self.tune_on
        for _ in range(self.options.steps):
            picked = torch.randint(len(images), (64,), generator=generator)
            classes = model.encode_text(self.task_prompts, normalize=True)  # type: ignore[operator]
            features = model.encode_image(images[picked], normalize=True)  # type: ignore[operator]
            logits = model.logit_scale.exp() * features @ classes.t()  # type: ignore[operator, union-attr]
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[picked]).backward()
            optimizer.step()
        return self.scores(model)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """What a model has learnt and kept, on validation and on test images."""
        learnt, kept = (
            accuracies(model, parts, tokens)
            for parts, tokens in ((self.learnt, self.task_prompts), (self.kept, self.kept_prompts))
        )
        return {"learnt_val": learnt[0], "kept_val": kept[0], "learnt": learnt[1], "kept": kept[1]}


@torch.no_grad()
def accuracies(model: nn.Module, parts: Sequence[Labelled], tokens: Tensor) -> list[float]:
    """Zero-shot accuracy in percent on several sets of images with the same classes."""
    encode_text: Any = model.encode_text
    encode_image: Any = model.encode_image
    classes = torch.cat([encode_text(part, normalize=True) for part in tokens.split(256)])
    results = []
    for images, labels in parts:
        features = torch.cat([encode_image(part, normalize=True) for part in images.split(256)])
        results.append(100.0 * float(((features @ classes.t()).argmax(1) == labels).float().mean()))
    return results


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Cosine between two importances over all weights: 1 means the same distribution."""
    dot = sum(float((value * other[name]).sum()) for name, value in one.items())
    norms = [sum(float(value.square().sum()) for value in each.values()) ** 0.5 for each in (one, other)]
    return dot / (norms[0] * norms[1])


def score(row: Row, rows: list[Row], suffix: str) -> float:
    """Harmonic mean of the share learnt and the share kept, in percent; see the top of the file."""
    of_seed = {each["importance"]: each for each in rows if each["seed"] == row["seed"]}
    learnt = row[f"learnt{suffix}"] / of_seed["no anchor"][f"learnt{suffix}"]
    kept = row[f"kept{suffix}"] / of_seed["start weights"][f"kept{suffix}"]
    return 100.0 * 2.0 * learnt * kept / (learnt + kept) if learnt + kept > 0.0 else 0.0


def chosen(rows: list[Row], name: str) -> list[Row]:
    """One row per seed: the strength that validation prefers."""
    seeds = dict.fromkeys(row["seed"] for row in rows if row["importance"] == name)
    return [
        max(
            (row for row in rows if row["importance"] == name and row["seed"] == seed),
            key=lambda row: score(row, rows, "_val"),
        )
        for seed in seeds
    ]


def summarize(rows: list[Row]) -> list[Row]:
    """Test figures at the chosen strengths, as mean and range over seeds."""
    lines = []
    for name in dict.fromkeys(row["importance"] for row in rows):
        best = chosen(rows, name)
        line: Row = {"importance": name, "strengths": " ".join(f"{row['strength']:g}" for row in best)}
        for key in ("learnt", "kept"):
            values = [row[key] for row in best]
            line |= {key: round(mean(values), 2), f"{key}_range": f"{min(values):.1f}-{max(values):.1f}"}
        line["cosine"] = round(mean(row["cosine"] for row in best), 3) if best[0]["cosine"] is not None else None
        line["score"] = round(mean(score(row, rows, "") for row in best), 1)
        lines.append(line)
    return lines


def draw(rows: list[Row], target: Path) -> None:
    """Plot kept against learnt over the strengths, and the score at the chosen strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    names = [line["importance"] for line in summarize(rows)]
    for index, name in enumerate(names):
        of_name = [row for row in rows if row["importance"] == name]
        by_strength = [
            [row for row in of_name if row["strength"] == s] for s in sorted({r["strength"] for r in of_name})
        ]
        points = [[mean(r[key] for r in group) for group in by_strength] for key in ("learnt", "kept")]
        marker = "*" if len(points[0]) == 1 else "o"
        left.plot(*points, marker=marker, markersize=10 if marker == "*" else 5, label=name, color=f"C{index}")
        scores = [score(row, rows, "") for row in chosen(rows, name)]
        right.barh(index, mean(scores), color=f"C{index}", alpha=0.6)
        right.plot(scores, [index] * len(scores), "k.", markersize=7)
    left.set(xlabel="learnt: accuracy on target classes (%)", ylabel="kept: zero-shot accuracy on held-out pairs (%)")
    left.set_title("Test images, mean over seeds, one point per strength", fontsize=10)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("score at the strength chosen on validation (%)")
    right.set_title("Harmonic mean of shares learnt and kept; dots: seeds", fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fisher_study", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="tuning steps per run")
    parser.add_argument("--pairs", type=int, default=1024, help="training pairs the importances are estimated on")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 32, 128], help="of the squared gradients")
    strengths = [1e3, 1e4, 1e5, 1e6]
    parser.add_argument("--strengths", type=float, nargs="*", default=strengths, help="EWC strengths to choose from")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="of splits and batches")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after these; run again to go on; 0 never stops"
    )
    parser.add_argument("--smoke", action="store_true", help="two steps, nothing is written")
    options = parser.parse_args(argv)
    if options.smoke:
        options.steps, options.pairs, options.batch_sizes, options.strengths, options.seeds = 2, 64, [32], [1.0], [0]
    return options


def run_seed(options: argparse.Namespace, seed: int, rows: list[Row], save: Any) -> bool:
    """Add the rows of one seed that are missing; False if `save` says to stop."""
    done = {(row["seed"], row["importance"], row["strength"]) for row in rows}
    grid = [("start weights", [0.0]), ("no anchor", [0.0]), ("exact per-sample", options.strengths)]
    grid += [(f"batch gradient {size}", options.strengths) for size in options.batch_sizes]
    grid += [("ones (L2-SP)", [strength / 1000.0 for strength in options.strengths])]
    missing = [(name, [s for s in strengths if (seed, name, s) not in done]) for name, strengths in grid]
    if not any(strengths for _, strengths in missing):
        return True
    study = Study(options, seed)
    exact = study.importance("exact per-sample")
    for name, strengths in missing:
        plain = name in ("start weights", "no anchor")
        importance = study.importance(name) if strengths and not plain else None
        for strength in strengths:
            row: Row = {"seed": seed, "importance": name, "strength": strength}
            row["cosine"] = None if importance is None else cosine(importance, exact)
            scores = study.scores(study.reset()) if name == "start weights" else study.tune(importance, strength)
            rows.append({**row, **scores})
            if not save(rows):
                return False
    return True


def main(argv: Sequence[str]) -> int:
    """Run the study and write its table and figure.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    options = parse(argv)
    settings = {k: v for k, v in vars(options).items() if k not in ("smoke", "minutes")}
    path, began = RESULTS / "fisher_study_cpu.json", time.monotonic()
    rows: list[Row] = []
    if path.is_file() and not options.smoke:
        found = json.loads(path.read_text())
        rows = found["rows"] if found["options"] == settings else []

    def save(rows: list[Row]) -> bool:
        """Print the newest row, write all, and say whether there is time for another."""
        print(format_table(rows[-1:], COLUMNS), flush=True)
        if not options.smoke:
            write_result("fisher_study", {"options": settings, "rows": rows})
        return not options.minutes or time.monotonic() - began < 60.0 * options.minutes

    for seed in options.seeds:
        if not run_seed(options, seed, rows, save):
            print("stopped; run again to go on")
            return 0
    print(format_table(rows, COLUMNS))
    summary = summarize(rows)
    print(format_table(summary, SUMMARY))
    if not options.smoke:
        draw(rows, FIGURE)
        write_result("fisher_study", {"options": settings, "summary": summary, "rows": rows})
        print(f"written: {path.name} and {FIGURE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

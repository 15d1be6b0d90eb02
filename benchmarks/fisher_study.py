"""Does the exact Fisher protect better than squared batch gradients? A study on the built-in data.

``python -m benchmarks.fisher_study`` tunes the built-in tiny CLIP on the target classes with EWC, once per importance
and strength, and records what was learnt (accuracy on held-out images of the target classes) and what was kept
(zero-shot accuracy on the held-out pairs). Importances come from the same training pairs: the exact per-sample Fisher,
squared batch gradients at several batch sizes, and all ones (L2-SP). Each is scaled to mean one over all weights, so
that a strength means the same overall pull and only its distribution over weights differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import format_table, write_result
from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.data import open_dataset, split_images
from ftfast.models import load_model
from ftfast.weightspace import AnchoredAdamW, ContrastiveObjective, estimate_fisher, ewc

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "fisher_study.png"
COLUMNS = ["importance", "strength", "learnt", "kept", "penalty"]


def load(source: Any, transform: Any, limit: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Decoded images of a random part of a dataset, and their positions."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    return torch.stack([transform(source.load_image(index)) for index in order]), order


def prompts(source: Any, tokenizer: Any) -> Tensor:
    """Token ids of one prompt per class."""
    return tokenizer([source.templates[0].format(name) for name in source.class_names])


class Study:
    """Data, start model and measurements, loaded once."""

    def __init__(self, pairs: int, seed: int) -> None:
        self.loaded = load_model(ModelConfig(), "cpu")
        tokenizer, transform = self.loaded.tokenizer, self.loaded.eval_transform
        old = open_dataset(DataConfig(path="builtin:pairs/train"))
        kept = open_dataset(DataConfig(path="builtin:pairs/heldout"))
        task = open_dataset(DataConfig(path="builtin:target/train"))
        task, task_test = split_images(task, 0.2, seed)
        images, order = load(old, transform, pairs, seed)
        self.old = (images, prompts(old, tokenizer)[torch.as_tensor(old.labels)[order]])
        self.kept = self._labelled(kept, transform, len(kept))
        self.task = self._labelled(task, transform, len(task))
        self.task_test = self._labelled(task_test, transform, len(task_test))
        self.kept_prompts, self.task_prompts = prompts(kept, tokenizer), prompts(task, tokenizer)
        self.start = {name: value.clone() for name, value in self.loaded.model.state_dict().items()}

    @staticmethod
    def _labelled(source: Any, transform: Any, limit: int) -> tuple[Tensor, Tensor]:
        images, order = load(source, transform, limit)
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
        mean = sum(float(v.sum()) for v in fisher.values()) / sum(v.numel() for v in fisher.values())
        return {name: value / mean for name, value in fisher.items()}

    def reset(self) -> nn.Module:
        """The model with its start weights."""
        self.loaded.model.load_state_dict(self.start)
        return self.loaded.model.eval()

    def tune(self, importance: dict[str, Tensor] | None, strength: float, steps: int, lr: float) -> dict[str, float]:
        """Tune on the task with an anchor; return what was learnt and kept."""
        model = self.reset()
        anchor = None if importance is None else ewc(model.named_parameters(), importance, strength)
        optimizer = AnchoredAdamW(model.parameters(), lr=lr, anchor=anchor, anchor_mode="proximal")
        generator = torch.Generator().manual_seed(0)
        images, labels = self.task
        for _ in range(steps):
            picked = torch.randint(len(images), (64,), generator=generator)
            classes = model.encode_text(self.task_prompts, normalize=True)  # type: ignore[operator]
            features = model.encode_image(images[picked], normalize=True)  # type: ignore[operator]
            logits = model.logit_scale.exp() * features @ classes.t()  # type: ignore[operator, union-attr]
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[picked]).backward()
            optimizer.step()
        return {
            "learnt": accuracy(model, *self.task_test, self.task_prompts),
            "kept": accuracy(model, *self.kept, self.kept_prompts),
            "penalty": float(optimizer.anchor_penalty),
        }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, tokens: Tensor) -> float:
    """Zero-shot accuracy in percent."""
    encode_text: Any = model.encode_text
    encode_image: Any = model.encode_image
    classes = torch.cat([encode_text(part, normalize=True) for part in tokens.split(256)])
    features = torch.cat([encode_image(part, normalize=True) for part in images.split(256)])
    return 100.0 * float(((features @ classes.t()).argmax(1) == labels).float().mean())


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Plot kept against learnt, one line per importance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    for name in dict.fromkeys(row["importance"] for row in rows):
        line = [row for row in rows if row["importance"] == name]
        marker = "*" if len(line) == 1 else "o"
        axes.plot([r["learnt"] for r in line], [r["kept"] for r in line], marker=marker, label=name)
    axes.set_xlabel("learnt: accuracy on the target classes (%)")
    axes.set_ylabel("kept: zero-shot accuracy on held-out pairs (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """Run the study and write its table and figure.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fisher_study", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="tuning steps per run")
    parser.add_argument("--pairs", type=int, default=1024, help="training pairs the importances are estimated on")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 32, 128], help="of the squared gradients")
    parser.add_argument("--strengths", type=float, nargs="*", default=[30.0, 300.0, 3000.0], help="EWC strengths")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    parser.add_argument("--smoke", action="store_true", help="two steps, nothing is written")
    options = parser.parse_args(argv)
    if options.smoke:
        options.steps, options.pairs, options.batch_sizes, options.strengths = 2, 64, [32], [1.0]
    study = Study(options.pairs, options.seed)
    start = study.reset()
    rows: list[dict[str, Any]] = [
        {
            "importance": "start weights",
            "strength": None,
            "learnt": accuracy(start, *study.task_test, study.task_prompts),
            "kept": accuracy(start, *study.kept, study.kept_prompts),
        },
        {"importance": "no anchor", "strength": 0.0, **study.tune(None, 0.0, options.steps, options.lr)},
    ]
    kinds = ["exact per-sample", *(f"batch gradient {size}" for size in options.batch_sizes), "ones (L2-SP)"]
    for kind in kinds:
        importance = study.importance(kind)
        for strength in options.strengths:
            result = study.tune(importance, strength, options.steps, options.lr)
            rows.append({"importance": kind, "strength": strength, **result})
            print(format_table(rows[-1:], COLUMNS), flush=True)
    print(format_table(rows, COLUMNS))
    if not options.smoke:
        draw(rows, FIGURE)
        payload = {"options": {k: v for k, v in vars(options).items() if k != "smoke"}, "rows": rows}
        print(f"written: {write_result('fisher_study', payload)} and {FIGURE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a tiny CLIP knows about drawings it has not seen, and the model card that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.data.builtin import BuiltinSplit, load_builtin
from ftfast.models.tiny import IMAGE_SIZE

EVALUATION_TEMPLATE = "a drawing of a {}."
"""Prompt of every zero-shot figure of these models."""

FEW_CLASSES = 48
"""Classes of a smoke run."""


@dataclass(frozen=True)
class TinyScores:
    """What a tiny CLIP knows about drawings it has not seen.

    Attributes:
        acc1: Zero-shot top-1 in percent: held-out drawings over all generic names.
        acc5: The same, top-5.
        recall_at_1: R@1 in percent on unseen classes of people: OpenMoji queries, Noto and Twemoji gallery.
        classes: Number of names in the zero-shot task.
    """

    acc1: float
    acc5: float
    recall_at_1: float
    classes: int

    def __str__(self) -> str:
        return f"zero-shot {self.acc1:.1f} / {self.acc5:.1f}  people R@1 {self.recall_at_1:.1f}"


def evaluate_tiny(folder: str | Path, few: bool = False) -> TinyScores:
    """Measure a tiny CLIP through plain open_clip: loading, tokenizer and image transform are open_clip's.

    Args:
        folder: An open_clip folder.
        few: Keep the first classes of every split only.
    """
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return measure(model.eval(), Exam.open(transform, tokenizer, few))


@dataclass(frozen=True)
class Exam:
    """Prepared pixels, labels and tokens of the three splits a tiny CLIP is measured on."""

    held_out: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    gallery: tuple[Tensor, Tensor]
    tokens: Tensor

    @classmethod
    def open(cls, transform: Callable[[Any], Tensor], tokenizer: Callable[[list[str]], Tensor], few: bool) -> Exam:
        """Prepare everything once; ``few`` keeps the first classes only."""

        def prepare(split: BuiltinSplit) -> tuple[Tensor, Tensor]:
            """Load the pixels and labels of a split."""
            rows = [row for row, label in enumerate(split.labels) if not few or label < FEW_CLASSES]
            pixels = torch.stack([transform(split.load_image(row)) for row in rows])
            return pixels, torch.from_numpy(split.labels[rows])

        held_out = load_builtin("pairs/heldout")
        names = held_out.class_names[: FEW_CLASSES if few else None]
        return cls(
            held_out=prepare(held_out),
            query=prepare(load_builtin("target/test-query")),
            gallery=prepare(load_builtin("target/test-gallery")),
            tokens=tokenizer([EVALUATION_TEMPLATE.format(name) for name in names]),
        )


@torch.no_grad()
def measure(model: Any, exam: Exam) -> TinyScores:
    """Zero-shot and retrieval scores.

    Args:
        model: A built-in tiny CLIP in evaluation mode.
        exam: From ``own_exam`` or ``Exam.open``.
    """

    def embed(pixels: Tensor) -> Tensor:
        """Embed images in parts of 256."""
        return torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(256)])

    names = torch.cat([model.encode_text(part, normalize=True) for part in exam.tokens.split(512)])
    hits = (embed(exam.held_out[0]) @ names.T).topk(5, dim=1).indices == exam.held_out[1][:, None]
    nearest = (embed(exam.query[0]) @ embed(exam.gallery[0]).T).argmax(1)
    same = exam.gallery[1][nearest] == exam.query[1]
    return TinyScores(
        acc1=100 * hits[:, 0].float().mean().item(),
        acc5=100 * hits.any(1).float().mean().item(),
        recall_at_1=100 * same.float().mean().item(),
        classes=len(exam.tokens),
    )


def own_exam(model: Any, few: bool) -> Exam:
    """The exam while training: open_clip's transform and tokenizer, as the saved folder will configure them.

    Args:
        model: A built-in tiny CLIP.
        few: Keep the first classes of every split only.
    """
    from open_clip import SimpleTokenizer, image_transform

    length = model.positional_embedding.shape[0]
    half = (0.5, 0.5, 0.5)
    transform = image_transform(
        IMAGE_SIZE, is_train=False, mean=half, std=half, resize_mode="squash", interpolation="bicubic"
    )
    return Exam.open(transform, SimpleTokenizer(context_length=length), few)


def card_text(name: str, command: str, scores: TinyScores | None) -> str:
    """Text of the model card.

    Args:
        name: One of ``BUILTIN_MODELS``.
        command: The command that made the weights.
        scores: Figures of the stored weights; None: not measured.
    """
    figures = "Not measured."
    if scores is not None:
        figures = _FIGURES.format(classes=scores.classes, acc1=scores.acc1, acc5=scores.acc5, r1=scores.recall_at_1)
    return _CARD.format(name=name, command=command, figures=figures, template=EVALUATION_TEMPLATE)


_FIGURES = """\
| what | this model |
| --- | --- |
| zero-shot top-1, held-out drawings over {classes:,} names | {acc1:.1f} |
| zero-shot top-5 | {acc5:.1f} |
| R@1, unseen classes of people, OpenMoji queries, Noto and Twemoji gallery | {r1:.1f} |"""

_CARD = """\
---
library_name: open_clip
license: cc-by-sa-4.0
---

# {name}

A very small CLIP, pretrained from scratch on drawings. It exists to measure forgetting in seconds on a CPU, not to be
useful on photographs. Made by `{command}`.

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

{figures}

Prompt: "{template}" Each held-out drawing is in a hand that the model never saw for that name.

## Training data and attribution

Drawings of about 1,490 named things, two of three hands for each; people are left out. Names are Unicode's.

* Noto Emoji, Google, Apache License 2.0.
* Twemoji, Twitter and other contributors, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
* OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
"""

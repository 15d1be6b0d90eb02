"""The calls that every backend must get right: each loss with its options, on shapes that fit no tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ftfast.kernels import (
    DistillOptions,
    classification_loss,
    clip_and_distillation_loss,
    clip_loss,
    siglip_loss,
    similarity_distillation_loss,
    supervised_contrastive_loss,
)
from kernel_checks import unit
from torch import Tensor

B, C, D = 37, 45, 21  # no multiple of any tile
ROW_IDS, COL_IDS = torch.arange(B) % 5, torch.arange(C) % 7
TEACHER = (unit(B, 19, 11), unit(B, 19, 12))
LABELS = torch.arange(B) % C - 1  # the first row has no class


def supcon(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return supervised_contrastive_loss(x, ROW_IDS, scale, y, **options)


def distill(x: Tensor, y: Tensor, scale: Tensor, backend: str, **options: Any) -> Tensor:
    teacher = [t.to(x.dtype) for t in TEACHER]
    return similarity_distillation_loss(x, y, *teacher, scale, options=DistillOptions(**options), backend=backend)


def distill_logits(x: Tensor, y: Tensor, scale: Tensor, backend: str, **options: Any) -> Tensor:
    logits = 8 * unit(B, 9, 13).to(x.dtype) @ unit(C, 9, 14).to(x.dtype).T
    given = {"teacher_logits": logits, "options": DistillOptions(**options)}
    return similarity_distillation_loss(x, y, None, None, scale, backend=backend, **given)


def both(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    contrastive, distillation = clip_and_distillation_loss(
        x, y, *[t.to(x.dtype) for t in TEACHER], scale, 17.0, **options
    )
    return contrastive + 0.5 * distillation


def single(x: Tensor, scale: Tensor, labels: Tensor = ROW_IDS, **options: Any) -> Tensor:
    return supervised_contrastive_loss(x, labels, scale, **options)


CASES: dict[str, tuple[Callable[..., Tensor], int, bool]] = {  # op, number of columns, whether it takes a bias
    "clip": (clip_loss, B, False),
    "clip smoothed rows": (partial(clip_loss, label_smoothing=0.2, directions="image"), B, False),
    "clip ids smoothed": (partial(clip_loss, labels=ROW_IDS, label_smoothing=0.2), B, False),
    "clip ids rectangular columns": (
        partial(clip_loss, labels=ROW_IDS, text_labels=COL_IDS, directions="text"),
        C,
        False,
    ),
    "clip local rows": (partial(clip_loss, offset=5, directions="image"), C, False),
    "clip offset off the edge": (partial(clip_loss, offset=-9, label_smoothing=0.1), C, False),
    "siglip": (siglip_loss, B, True),
    "siglip ids": (partial(siglip_loss, labels=ROW_IDS, text_labels=COL_IDS), C, True),
    "siglip negatives": (partial(siglip_loss, negative_only=True), C, True),
    "siglip offset": (partial(siglip_loss, offset=3), C, True),
    "supcon two modalities": (supcon, B, False),
    "cite": (partial(supcon, variant="cite"), B, False),
    "cite literal": (partial(supcon, variant="cite_literal"), B, False),
    "classes": (partial(lambda x, y, s, **o: classification_loss(x, y, LABELS, s, **o)), C, False),
    "classes arcface smoothed": (
        partial(
            lambda x, y, s, **o: classification_loss(x, y, LABELS, s, **o),
            margin=0.5,
            margin_type="arcface",
            label_smoothing=0.2,
        ),
        C,
        False,
    ),
    "classes cosface": (
        partial(lambda x, y, s, **o: classification_loss(x, y, LABELS, s, **o), margin=0.35, margin_type="cosface"),
        C,
        False,
    ),
    "distill forward": (partial(distill, kind="forward_kl", temperature=2.0), B, False),
    "distill reverse": (partial(distill, kind="reverse_kl"), B, False),
    "distill soft rows": (partial(distill, kind="soft_cross_entropy", temperature=2.0, directions="image"), B, False),
    "distill logits columns": (partial(distill_logits, kind="forward_kl", directions="text"), C, False),
    "distill logits": (
        partial(distill_logits, kind="reverse_kl", temperature=2.0, temperature_squared=False),
        C,
        False,
    ),
    "clip and distill": (both, B, False),
}


def inputs_of(case: str, dtype: torch.dtype) -> list[Tensor]:
    _, columns, biased = CASES[case]
    scale = torch.tensor(30.0)
    return [unit(B, D, 1, dtype), unit(columns, D, 2, dtype), scale, *([torch.tensor(-4.0)] if biased else [])]

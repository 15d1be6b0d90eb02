"""The three losses of CLIP-CITE, with every reading of its equations that the print leaves open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import kernels
from ftfast.recipes.base import Features, View


@dataclass(frozen=True, kw_only=True)
class ClipCiteOptions:
    """Options of CLIP-CITE. What its paper leaves open is an option; its help says which reading is the default."""

    terms: tuple[Literal["DVA", "SCL", "VLD"], ...] = ("DVA", "SCL", "VLD")
    """Ablation rows: discriminative alignment (eq. 2-3), supervised contrast (eq. 4), distillation (eq. 5)."""
    train: Literal["ALL", "FrozenTC", "FrozenTE"] = "ALL"
    """Ablation: everything; class vectors fixed in DVA; the text tower gets no gradient from SCL."""
    scl_weight: float = 0.7
    """lambda."""
    vld_weight: float = 0.1
    """eta."""
    temperature: Literal["clip", "none"] = "clip"
    """Eq. 2 and 4 print bare cosines, which cannot fit a classifier: "clip" multiplies by CLIP's logit scale."""
    scl_denominator: Literal["with_positive", "others_only"] = "with_positive"
    """Eq. 4 prints other classes only; with the own pair it reduces to FLYP's loss, as the text says it does."""
    scl_sign: Literal["negative", "printed"] = "negative"
    """Eq. 4 prints no minus sign, which would push pairs apart; "printed" keeps it so."""
    vld_first: Literal["student", "teacher"] = "student"
    """First argument of the KL divergence in eq. 5: "student" as printed; "teacher" as in ZSCL and GIFT."""
    vld_axis: Literal["batch", "classes"] = "batch"
    """Softmax of eq. 5 over the batch's texts ("within batch"), or over all classes as in eq. 1."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over a batch: the paper prints sums; the mean keeps the learning rate independent of the batch size."""
    classifier: Literal["text_tower", "weights"] = "text_tower"
    """Who classifies at test: the text tower (eq. 7, any class), or the class vectors if every class has one."""
    alpha: float = 0.5
    """theta = (1 - alpha) theta_start + alpha theta_tuned, both towers (eq. 7); 1: no ensembling."""
    view: View = "random_resized_crop"
    """View of the images; the paper crops at random and does nothing else."""


class ClassVectors(nn.Module):
    """W of eq. 2: one vector per class, starting as the text features of the class prompts.

    Args:
        features: (C, D) unit rows.
        trainable: Whether W learns.
    """

    def __init__(self, features: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer("start", features.clone())
        self.weight = nn.Parameter(features.clone(), requires_grad=trainable)

    def merged(self, alpha: float) -> Tensor:
        """Return (C, D) unit vectors, interpolated like the towers."""
        return F.normalize((1 - alpha) * self.start + alpha * self.weight.detach(), dim=-1)

    def scorer(self, names: Sequence[str], alpha: float) -> Callable[[Tensor, Sequence[str]], Tensor | None]:
        """Return a scorer of images for ``Plan.classify``; it declines class names that have no vector."""
        number = {name: place for place, name in enumerate(names)}

        def scores(images: Tensor, classes: Sequence[str]) -> Tensor | None:
            """Cosine of each image with each class vector."""
            if any(name not in number for name in classes):
                return None
            chosen = self.merged(alpha)[[number[name] for name in classes]]
            return images @ chosen.to(images.device).T

        return scores


def alignment(options: ClipCiteOptions, vectors: ClassVectors) -> Callable[[Features], Tensor]:
    """L_DVA, eq. 2-3: -log softmax_c(tau s(f(x), w_c))_y."""

    def loss(f: Features) -> Tensor:
        """Classify against W."""
        weight = F.normalize(vectors.weight, dim=-1)
        return _count(options, f) * kernels.classification_loss(f.image, weight, f.batch.labels, _scale(options, f))

    return loss


def contrast(options: ClipCiteOptions) -> Callable[[Features], Tensor]:
    """L_SCL, eq. 4: own pair against the batch's pairs of other classes, image to text plus text to image."""
    variant = "cite" if options.scl_denominator == "with_positive" else "cite_literal"
    factor = -2.0 if options.scl_sign == "printed" else 2.0  # the paper adds the directions, the kernel averages them

    def loss(f: Features) -> Tensor:
        """Contrast each image with its class prompt."""
        text = own_texts(options, f, f.text)
        text = text.detach() if options.train == "FrozenTE" else text
        value = kernels.supervised_contrastive_loss(f.image, f.batch.labels, _scale(options, f), text, variant=variant)
        return factor * _count(options, f) * value

    return loss


def distillation(options: ClipCiteOptions, teacher_scale: float) -> Callable[[Features], Tensor]:
    """L_VLD, eq. 5: KL(p, p0) per image between the tuned towers and the frozen ones, both with CLIP's temperature."""
    kind = "reverse_kl" if options.vld_first == "student" else "forward_kl"
    settings = kernels.DistillOptions(kind=kind, directions="image")

    def loss(f: Features) -> Tensor:
        """Compare over the texts of the batch, or over all classes."""
        return _count(options, f) * kernels.similarity_distillation_loss(
            f.image,
            f.text,
            f.teacher_image,
            f.teacher_text,
            f.logit_scale,
            teacher_logit_scale=teacher_scale,
            options=settings,
        )

    return loss


def own_texts(options: ClipCiteOptions, f: Features, text: Tensor | None) -> Tensor:
    """Return (B, D) text features of each image's class prompt.

    Args:
        options: With ``vld_axis`` "batch" the texts of a batch are already one per image, else one per class.
        f: Features of the batch.
        text: Features of its texts.
    """
    table = torch.empty(0) if text is None else text
    return table if options.vld_axis == "batch" else table[f.batch.labels]


def _count(options: ClipCiteOptions, f: Features) -> float:
    return float(len(f.image)) if options.reduction == "sum" else 1.0


def _scale(options: ClipCiteOptions, f: Features) -> Tensor:
    return f.logit_scale if options.temperature == "clip" else torch.ones_like(f.logit_scale)

"""The task term shared by the recipes: what "learn the target" means for the data at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ftfast import kernels
from ftfast.data import ImageDataset
from ftfast.errors import ConfigError
from ftfast.losses import ClipLoss, NormFaceLoss
from ftfast.losses.ring import ring_clip_loss
from ftfast.recipes.base import BatchSpec, Context, Features, Term, View, captions, class_prompts_source

TaskKind = Literal["auto", "normface", "class_prompts", "clip"]


@dataclass(kw_only=True)
class Task:
    """The task's batch, its loss term and the head that loss trains (possibly none)."""

    batch: BatchSpec
    term: Term
    heads: nn.ModuleDict


def build_task(
    context: Context,
    kind: TaskKind = "auto",
    *,
    scale: float = 16.0,
    label_smoothing: float = 0.0,
    view: View = "resize_crop",
    teacher: Literal["", "live"] = "",
) -> Task:
    """Declare the task batch and its loss.

    "normface" trains a cosine classifier beside the image tower, CE(s <f, w_c/|w_c|>, y) (methods A2.1; no text data
    needed). "class_prompts" classifies against the text features of the class prompts, CE(logit_scale I T^T, y).
    "clip" is the symmetric contrastive loss on captions. "auto": captions without labels -> "clip", else "normface".

    Args:
        context: Model and data.
        kind: Which loss.
        scale: Logit multiplier of "normface".
        label_smoothing: Of the cross-entropy.
        view: Training view of the images.
        teacher: "live" lets other terms compare with the start model on the same batch.

    Returns:
        Batch, term and heads.

    Raises:
        ConfigError: If the data lacks the labels or captions the loss needs.
    """
    dataset = context.datasets["data"]
    if kind == "auto":
        kind = "normface" if dataset.labels is not None else "clip"
    if kind != "clip" and dataset.labels is None:
        raise ConfigError(
            f"the task loss {kind!r} needs class labels, but {dataset.description} has none. Set data.label_column."
        )
    if kind == "clip" and dataset.texts is None:
        raise ConfigError(
            f"the task loss 'clip' needs captions, but {dataset.description} has none. Set data.text_column."
        )
    if kind == "clip":
        clip = ClipLoss()
        return Task(
            batch=BatchSpec(name="task", view=view, texts=captions, teacher=teacher),
            term=Term(
                name="clip",
                on="task",
                loss=lambda f: clip(f.image, f.text, f.logit_scale),
                source="Radford et al. 2021",
                ring=lambda f: ring_clip_loss(f.image, cast(Tensor, f.text), f.logit_scale),
            ),
            heads=nn.ModuleDict(),
        )
    if kind == "class_prompts":
        return _class_prompts_task(dataset, label_smoothing, view, teacher)
    head = NormFaceLoss(
        context.loaded.embed_dim, len(dataset.class_names or ()), scale=scale, label_smoothing=label_smoothing
    )
    return Task(
        batch=BatchSpec(name="task", view=view, teacher=teacher),
        term=Term(
            name="classification",
            on="task",
            loss=lambda f: head(f.image, f.batch.labels),
            source="INFUSING, domain classification: CE(16 <f, w/|w|>, y)",
        ),
        heads=nn.ModuleDict({"classifier": head}),
    )


def class_distillation(temperature: float) -> Callable[[Features], Tensor]:
    """Keep the teacher's class probabilities of each image: T^2 CE(softmax(teacher / T), student / T).

    Args:
        temperature: T.

    Returns:
        Loss on a batch with class prompts and a live teacher.
    """
    settings = kernels.DistillOptions(kind="soft_cross_entropy", temperature=temperature, directions="image")

    def distillation(f: Features) -> Tensor:
        """Compare the similarities of the model with those of its teacher."""
        return kernels.similarity_distillation_loss(
            f.image, f.text, f.teacher_image, f.teacher_text, f.logit_scale, options=settings
        )

    return distillation


def _class_prompts_task(
    dataset: ImageDataset, label_smoothing: float, view: View, teacher: Literal["", "live"]
) -> Task:
    def prompts_loss(features: Features) -> Tensor:
        """Classify the images against the text features of the class prompts."""
        return kernels.classification_loss(
            features.image,
            features.text,
            features.batch.labels,
            features.logit_scale,
            label_smoothing=label_smoothing,
        )

    return Task(
        batch=BatchSpec(name="task", view=view, texts=class_prompts_source(dataset), teacher=teacher),
        term=Term(name="classification", on="task", loss=prompts_loss, source="CE over class prompts"),
        heads=nn.ModuleDict(),
    )

"""The measured losses: inputs, float64 truth, our call, open_clip's or PyTorch's call, and other fused losses.

An implementation is a function of the inputs that returns a 0-d loss; its gradients are taken with respect to the
inputs that require grad. Legend: N rows, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ftfast.kernels import reference
from torch import Tensor

from ftfast import kernels, losses

Inputs = tuple[Tensor, ...]
Implementation = Callable[[Inputs], Tensor]

CLASSES = 1000
LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Operation:
    """One loss and those who compute it."""

    name: str
    """Name on the command line and in the records."""
    baseline: str
    """Name of the implementation that ratios refer to."""
    make_inputs: Callable[[int, int, torch.dtype, torch.device], Inputs]
    """(N, D, dtype, device) to the inputs."""
    truth: Implementation
    """Dense definition; called with float64 inputs."""
    implementations: dict[str, Implementation]
    """The baseline and what else needs no extra package; ours is called "ftfast"."""


def unit_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Return (rows, width) random rows of unit length, the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(device, dtype)


def pair_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return pairs that are hard enough for a loss near 1 (at D = 512, N = 8192), and the scale."""
    image = unit_rows(rows, width, torch.float32, device, 1)
    text = F.normalize(image + 5 * unit_rows(rows, width, torch.float32, device, 2), dim=1)
    leaves = (image.to(dtype), text.to(dtype), torch.tensor(LOGIT_SCALE, device=device))
    return tuple(leaf.requires_grad_() for leaf in leaves)


def sigmoid_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return :func:`pair_inputs` and a bias."""
    image, text, _ = pair_inputs(rows, width, dtype, device)
    scale, bias = (torch.tensor(value, device=device).requires_grad_() for value in (10.0, -10.0))
    return image, text, scale, bias


def distill_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return :func:`pair_inputs` of the student, and a frozen teacher near it."""
    image, text, scale = pair_inputs(rows, width, dtype, device)
    teacher = [
        F.normalize(features.detach().float() + 0.5 * unit_rows(rows, width, torch.float32, device, seed), dim=1)
        for features, seed in ((image, 3), (text, 4))
    ]
    return image, text, scale, *(features.to(dtype) for features in teacher), scale.detach().clone()


def class_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return image features, class features, the scale and labels."""
    labels = torch.arange(rows, device=device) % CLASSES
    image, classes = (unit_rows(count, width, dtype, device, seed) for count, seed in ((rows, 1), (CLASSES, 2)))
    return image.requires_grad_(), classes.requires_grad_(), torch.tensor(LOGIT_SCALE, device=device), labels


def supervised_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return features of one modality, the scale and labels (about 8 rows per class)."""
    labels = torch.arange(rows, device=device) % max(1, rows // 8)
    return unit_rows(rows, width, dtype, device, 1).requires_grad_(), torch.tensor(1 / 0.07, device=device), labels


def _stock(name: str) -> Implementation:
    def call(inputs: Inputs) -> Tensor:
        """Apply open_clip's loss and add up its parts."""
        from open_clip import loss

        output = getattr(loss, name)()(*inputs)
        return output[0] + output[1] if isinstance(output, tuple) else output

    return call


def _distill_truth(inputs: Inputs) -> Tensor:
    image, text, scale, *teacher, teacher_scale = inputs
    options = kernels.DistillOptions(kind="soft_cross_entropy")
    return reference.clip_loss_reference(image, text, scale) + reference.similarity_distillation_loss_reference(
        image, text, teacher[0], teacher[1], scale, teacher_logit_scale=teacher_scale, options=options
    )


def _eager_classes(inputs: Inputs) -> Tensor:
    image, classes, scale, labels = inputs
    return F.cross_entropy((scale * image @ classes.T).float(), labels)


def _ours(name: str) -> Implementation:
    loss = getattr(losses, name)()

    def call(inputs: Inputs) -> Tensor:
        """Apply our loss and add up its parts."""
        output = loss(*inputs)
        return output[0] + output[1] if isinstance(output, tuple) else output

    return call


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "clip",
            "open_clip",
            pair_inputs,
            lambda inputs: reference.clip_loss_reference(*inputs),
            {"ftfast": _ours("ClipLoss"), "open_clip": _stock("ClipLoss")},
        ),
        Operation(
            "distill",
            "open_clip",
            distill_inputs,
            _distill_truth,
            {"ftfast": _ours("DistillClipLoss"), "open_clip": _stock("DistillClipLoss")},
        ),
        Operation(
            "siglip",
            "open_clip",
            sigmoid_inputs,
            lambda inputs: reference.siglip_loss_reference(*inputs),
            {"ftfast": _ours("SigLipLoss"), "open_clip": _stock("SigLipLoss")},
        ),
        Operation(
            "classification",
            "pytorch",
            class_inputs,
            lambda inputs: reference.classification_loss_reference(inputs[0], inputs[1], inputs[3], inputs[2]),
            {
                "ftfast": lambda inputs: kernels.classification_loss(inputs[0], inputs[1], inputs[3], inputs[2]),
                "pytorch": _eager_classes,
            },
        ),
        Operation(
            "supcon",
            "pytorch",
            supervised_inputs,
            lambda inputs: reference.supervised_contrastive_loss_reference(inputs[0], inputs[2], inputs[1]),
            {
                "ftfast": lambda inputs: kernels.supervised_contrastive_loss(inputs[0], inputs[2], inputs[1]),
                "pytorch": lambda inputs: reference.supervised_contrastive_loss_reference(
                    inputs[0], inputs[2], inputs[1]
                ),
            },
        ),
    )
}

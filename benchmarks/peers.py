"""Other fused losses, each measured where its package is installed and a GPU is at hand.

Their calls differ from open_clip's; each adapter does what the package's users would do. One-directional losses are
called once per direction. None of them is needed by ftfast.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import Implementation, Inputs, Operation


def compiled(implementation: Implementation) -> Implementation:
    """Return the implementation under ``torch.compile``, compiled anew for every shape."""
    return torch.compile(implementation, dynamic=False)


def _inf_cl(inputs: Inputs) -> Tensor:
    from inf_cl import cal_inf_loss

    image, text, scale = inputs
    return (cal_inf_loss(image, text, scale=scale) + cal_inf_loss(text, image, scale=scale)) / 2


def _memeff(inputs: Inputs) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # Its temperature is a Python number, so logit_scale gets no gradient there.
    return MemoryEfficientCLIPLoss(temperature=0.01, normalized_inputs=True, stable=False)(inputs[0], inputs[1])


def _siglip_kernel(inputs: Inputs) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    image, text, scale, bias = inputs
    return fused_siglip_loss(image, text, scale.log(), bias)


def _both_directions(row_loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Implementation:
    def call(inputs: Inputs) -> Tensor:
        """Return the mean of the row loss over both directions."""
        image, text, scale = inputs
        labels = torch.arange(len(image), device=image.device)
        scale = scale.to(image.dtype)
        return (row_loss(scale * image, text, labels) + row_loss(scale * text, image, labels)) / 2

    return call


def _cut_cross_entropy(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(rows, columns, labels)


def _liger(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(columns, rows, labels)


def _classes(row_loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Implementation:
    def call(inputs: Inputs) -> Tensor:
        """Apply the row loss to images and class features."""
        image, classes, scale, labels = inputs
        return row_loss(scale.to(image.dtype) * image, classes, labels)

    return call


GPU_PEERS: dict[str, dict[str, tuple[str, Implementation]]] = {
    "clip": {
        "inf-cl": ("inf_cl", _inf_cl),
        "memeff": ("memeff", _memeff),
        "cut-cross-entropy": ("cut_cross_entropy", _both_directions(_cut_cross_entropy)),
        "liger-kernel": ("liger_kernel", _both_directions(_liger)),
    },
    "siglip": {"siglip-kernel": ("siglip_kernel", _siglip_kernel)},
    "classification": {
        "cut-cross-entropy": ("cut_cross_entropy", _classes(_cut_cross_entropy)),
        "liger-kernel": ("liger_kernel", _classes(_liger)),
    },
}


def implementations(operation: Operation, device: torch.device, *, compile_baseline: bool) -> dict[str, Implementation]:
    """List who takes part in a measurement.

    Args:
        operation: The loss.
        device: Where it runs; other fused losses take part on CUDA only.
        compile_baseline: Also measure the baseline under torch.compile.

    Returns:
        Name to implementation, ours first.
    """
    found = dict(operation.implementations)
    if compile_baseline:
        found[f"{operation.baseline} compiled"] = compiled(found[operation.baseline])
    if device.type == "cuda":
        for name, (module, implementation) in GPU_PEERS.get(operation.name, {}).items():
            if importlib.util.find_spec(module) is not None:
                found[name] = implementation
    return found

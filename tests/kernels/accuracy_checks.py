"""How accurate a loss of float32 logits can be: its truth in float64, and what rounding every logit once does to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from ftfast.kernels import DistillOptions, clip_and_distillation_loss, clip_loss, similarity_distillation_loss
from kernel_checks import LOSS_TOLERANCE, run, unit
from torch import Tensor

KINDS = ("soft_cross_entropy", "forward_kl", "reverse_kl")
NOISE = {"hard": 5.0, "easy": 2.0, "solved": 1.0}  # of the texts about their images: losses from 10 down to 1e-13
SCALE = 100.0


def features(rows: int, width: int, noise: float, drift: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return student pairs and a teacher that is a drift away."""
    image = unit(rows, width, 1)
    text = F.normalize(image + noise * unit(rows, width, 2))
    teacher = [F.normalize(x + drift * unit(rows, width, seed)) for x, seed in ((image, 3), (text, 4))]
    return [image, text], teacher


def dense(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of two float64 logit matrices, written out."""
    total = student.new_zeros(())
    for s, t in ((student, teacher), (student.T, teacher.T)):
        log_q, log_p = s.log_softmax(1), t.log_softmax(1)
        pair = s.diagonal()[:, None]
        others = (s - pair).masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)
        contrastive = torch.log1p(others.exp().sum(1)).mean()
        ratio = log_q - log_p
        terms = {
            "soft_cross_entropy": -log_p.exp() * log_q,
            "forward_kl": log_p.exp() * (torch.expm1(ratio) - ratio),
            "reverse_kl": log_q.exp() * (torch.expm1(-ratio) + ratio),
        }
        if kind != "clip":
            total = total + terms[kind if kind in terms else "soft_cross_entropy"].sum(1).mean() / 2
        if kind in ("clip", "both"):
            total = total + contrastive / 2
    return total


def call(kind: str, teacher: list[Tensor], backend: str) -> Callable[..., Tensor]:
    """Return the operation as a function of image, text and scale."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        guide = [t.to(image.dtype) for t in teacher]
        if kind == "clip":
            return clip_loss(image, text, scale, backend=backend)
        if kind == "both":
            return sum(clip_and_distillation_loss(image, text, *guide, scale, SCALE, backend=backend))  # type: ignore[return-value]
        options = DistillOptions(kind=kind)
        return similarity_distillation_loss(
            image, text, *guide, scale, teacher_logit_scale=SCALE, options=options, backend=backend
        )

    return loss


def assert_accurate(kind: str, noise: float, drift: float, backend: str, rows: int, width: int) -> None:
    """Hold the loss to 2e-6 beyond what rounding its float32 logits does, the gradients to PyTorch's own error."""
    student, teacher = features(rows, width, noise, drift)
    logits = [(SCALE * a.double() @ b.double().T).requires_grad_() for a, b in (student, teacher)]
    truth = dense(kind, *logits)
    truth.backward()
    # Every logit is off by up to half a unit in its last place for its own rounding, and as much for its factors'.
    rounding = sum(2**-24 * (s.detach().abs() * s.grad.abs()).sum().item() for s in logits if s.grad is not None)
    inputs = [*student, torch.tensor(SCALE)]
    got = run(call(kind, teacher, backend), inputs)
    error = abs(got[0].item() - truth.item())
    assert error <= LOSS_TOLERANCE * truth.item() + 2 * rounding, f"{got[0].item()!r}, truth {truth.item()!r}"
    exact = run(call(kind, teacher, "reference"), [x.double() for x in inputs])
    eager = run(call(kind, teacher, "reference"), inputs)
    for mine, theirs, true in zip(got[1:3], eager[1:3], exact[1:3], strict=True):
        ours, allowed = (mine.double() - true).norm(), (theirs.double() - true).norm()
        # Both are rounding noise: sums in another order, which 25 % and one rounding of the result cover.
        assert ours <= 1.25 * allowed + 2**-23 * true.norm(), f"gradient error {ours:.2e}, PyTorch {allowed:.2e}"

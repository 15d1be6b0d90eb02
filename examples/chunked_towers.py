"""A large contrastive batch on a small device: towers in chunks, the fused loss on cached embeddings (GradCache).

Plain gradient accumulation makes the contrastive batch smaller; this does not. Three passes:

1. embed every chunk without a graph and keep only the embeddings;
2. take the loss of all embeddings at once, and its gradient with respect to them;
3. embed every chunk again with a graph and send that gradient through it.

Memory: activations of one chunk, and O(N·D) for the loss. Gradients equal those of the whole batch. Towers with
dropout need the same random state in passes 1 and 3 (torch.get_rng_state around each chunk).

Run: python examples/chunked_towers.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.losses import ClipLoss


def chunked_step(
    image_tower: nn.Module, text_tower: nn.Module, log_scale: Tensor, images: Tensor, texts: Tensor, chunk: int
) -> Tensor:
    """Accumulate the whole batch's gradients in the towers and ``log_scale``; return the loss."""
    sides = ((image_tower, images), (text_tower, texts))
    with torch.no_grad():
        cached = [
            torch.cat([F.normalize(tower(part), dim=1) for part in inputs.split(chunk)]) for tower, inputs in sides
        ]
    embeddings = [features.requires_grad_() for features in cached]
    loss = ClipLoss()(*embeddings, log_scale.exp())
    loss.backward()
    for (tower, inputs), features in zip(sides, embeddings, strict=True):
        for part, gradient in zip(inputs.split(chunk), features.grad.split(chunk), strict=True):
            F.normalize(tower(part), dim=1).backward(gradient)
    return loss.detach()


def main() -> None:
    """Compare the chunked gradients with those of the whole batch."""
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(2)]
    log_scale = nn.Parameter(torch.tensor(2.0))
    images, texts = torch.randn(1000, 64), torch.randn(1000, 64)
    parameters = [*towers[0].parameters(), *towers[1].parameters(), log_scale]

    chunked = chunked_step(*towers, log_scale, images, texts, chunk=64)
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    features = [F.normalize(tower(inputs), dim=1) for tower, inputs in zip(towers, (images, texts), strict=True)]
    whole = ClipLoss()(*features, log_scale.exp())
    whole.backward()
    error = max(float((ours - p.grad).abs().max()) for ours, p in zip(gradients, parameters, strict=True))
    print(f"loss {chunked:.6f} in chunks, {whole.item():.6f} at once; largest gradient difference {error:.1e}")


if __name__ == "__main__":
    main()

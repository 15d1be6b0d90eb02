"""A plain PyTorch loop with the fused loss: one import changes.

Run: python examples/drop_in_loss.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# from open_clip import ClipLoss      # before
from ftfast.losses import ClipLoss  # after


def main(steps: int = 60, batch: int = 256) -> list[float]:
    """Align two random towers on pairs that share a hidden cause; return the loss of every step."""
    torch.manual_seed(0)
    image_tower, text_tower = nn.Linear(64, 32), nn.Linear(48, 32)
    logit_scale = nn.Parameter(torch.tensor(10.0).log())
    parameters = [*image_tower.parameters(), *text_tower.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    to_image, to_text = torch.randn(16, 64), torch.randn(16, 48)
    loss_function = ClipLoss()
    curve = []
    for _ in range(steps):
        cause = torch.randn(batch, 16)
        image_features = F.normalize(image_tower(cause @ to_image), dim=1)
        text_features = F.normalize(text_tower(cause @ to_text), dim=1)
        loss = loss_function(image_features, text_features, logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


if __name__ == "__main__":
    losses = main()
    print(f"first step {losses[0]:.3f}, last step {losses[-1]:.3f}")

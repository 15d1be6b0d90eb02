"""The example scripts and the Python blocks of docs/losses.md do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss as StockClipLoss
from torch import nn

ROOT = Path(__file__).parents[2]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_towers(width=24):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(32, 1024), nn.GELU(), nn.Linear(1024, width))  # noqa: E731
    return make(), make(), nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("chunk", [7, 50, 128])
def test_chunked_towers_give_the_whole_batch_gradient(chunk):
    """Against open_clip's loss on the whole batch at once."""
    image_tower, text_tower, log_scale = make_towers()
    images, texts = torch.randn(50, 32), torch.randn(50, 32)
    parameters = [*image_tower.parameters(), *text_tower.parameters(), log_scale]
    loss = load_example("chunked_towers").chunked_step(image_tower, text_tower, log_scale, images, texts, chunk)
    ours = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    features = [F.normalize(tower(x), dim=1) for tower, x in ((image_tower, images), (text_tower, texts))]
    whole = StockClipLoss()(*features, log_scale.exp())
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=2e-6, atol=0)
    for our, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(our, parameter.grad, rtol=1e-4, atol=1e-6)


def test_chunked_towers_bound_the_memory_of_towers_and_loss():
    from benchmarks.harness import peak_memory

    step = load_example("chunked_towers").chunked_step
    rows, chunk, hidden = 4096, 128, 1024
    image_tower, text_tower, log_scale = make_towers()
    images, texts = torch.randn(rows, 32), torch.randn(rows, 32)
    step(image_tower, text_tower, log_scale, images[:chunk], texts[:chunk], chunk)  # gradients exist from here on
    peak = peak_memory(lambda: step(image_tower, text_tower, log_scale, images, texts, chunk))
    activations = 4 * rows * hidden * 4  # what two towers keep of a whole batch: input and output of their GELU
    similarities = rows * rows * 4  # one similarity matrix
    assert peak < activations / 2
    assert peak < similarities / 2


def test_chunked_towers_script(capsys):
    load_example("chunked_towers").main()
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5


def test_drop_in_loop_learns():
    curve = load_example("drop_in_loss").main(steps=40)
    assert curve[-1] < 0.5 * curve[0]


def test_documented_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/losses.md", "exec"), names)

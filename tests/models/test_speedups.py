"""Attention backends give open_clip's features and gradients; compiled towers keep their names."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from ftfast.config.schema import ModelConfig
from ftfast.errors import ConfigError, MissingExtraError
from ftfast.models import load_model
from ftfast.models.speedups import (
    apply_speedups,
    native_attention,
    replace_attention,
    trim_padding,
    xformers_attention,
)

TOWERS = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 24},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 24, "heads": 3, "layers": 2},
}


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(**copy.deepcopy(TOWERS)).double()


def features(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 24, 24, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 50, (3, 9), generator=generator)
    found = [model.encode_image(images), model.encode_text(tokens)]
    loss = sum((feature**3).sum() for feature in found)
    _, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*found, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_replaced_attention_is_the_same_function(kind: type[nn.Module]) -> None:
    model = built(kind)
    expected = features(model)
    calls = []

    def counted(query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape)
        return native_attention(query, *rest)

    assert replace_attention(model, counted) == 4
    found = features(copy.deepcopy(model))
    assert len(calls) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_choices_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'tiny' has no torch.nn.MultiheadAttention"):
        apply_speedups(nn.Linear(2, 2), ModelConfig(name="tiny", attention="native"))
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ftfast\[xformers\]'"):
        xformers_attention()


def test_compiled_towers_keep_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(CLIP)
    names = list(model.state_dict())
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    apply_speedups(model, ModelConfig(compile_image=True, compile_text=True))
    assert compiled == ["VisionTransformer", "Transformer"]
    assert list(model.state_dict()) == names


def test_channels_last_reaches_the_convolutions_of_copies_too_and_changes_nothing_stored() -> None:
    model = load_model(ModelConfig(name="tiny-clip-v1")).model.double().eval()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64)
    expected = model.encode_image(images)
    (wanted,) = torch.autograd.grad(expected.pow(3).sum(), model.visual.conv1.weight)
    apply_speedups(model, ModelConfig(channels_last=True))
    other = copy.deepcopy(model)
    orders = []
    other.visual.conv2.register_forward_hook(
        lambda module, inputs, output: orders.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    found = other.encode_image(images)
    (gradient,) = torch.autograd.grad(found.pow(3).sum(), other.visual.conv1.weight)
    assert orders == [True]
    assert all(parameter.is_contiguous() for parameter in other.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_short_texts_give_the_features_and_gradients_of_padded_ones(pool: str) -> None:
    model = built(CLIP)
    model.text_pool_type, model.text_eos_id = pool, 49
    tokens = torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate((1, 4, 5, 2)):
        tokens[row, :length] = torch.arange(1, length + 1)
        tokens[row, length] = 49  # end of text, the highest number
    assert trim_padding(model, tokens).shape == (4, 9)  # not before the model accepts them
    wanted = model.encode_text(tokens, normalize=True)
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("visual", "logit"))]
    expected = torch.autograd.grad(wanted.pow(3).sum(), parameters)
    apply_speedups(model, ModelConfig(trim_text=True))
    other = copy.deepcopy(model)
    short = trim_padding(other, tokens)
    assert short.shape == (4, 6)
    lengths = []
    other.ln_final.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    found = other.encode_text(short, normalize=True)
    assert lengths == [6]  # the copy's own tower ran, not the original's
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), wanted, rtol=1e-9, atol=1e-9)
    parameters = [p for name, p in other.named_parameters() if not name.startswith(("visual", "logit"))]
    torch.testing.assert_close(torch.autograd.grad(found.pow(3).sum(), parameters), expected, rtol=1e-9, atol=1e-9)
    assert trim_padding(other, tokens[:0]).shape == (0, 9)


def test_texts_that_cannot_be_trimmed_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not CLIP's causal one"):
        apply_speedups(built(CustomTextCLIP), ModelConfig(trim_text=True))
    with pytest.raises(ConfigError, match="compiled again and again"):
        apply_speedups(built(CLIP), ModelConfig(trim_text=True, compile_text=True))

"""Who computes attention, in which order pixels are, how long texts are, and which towers are compiled."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from ftfast.config.schema import ModelConfig
from ftfast.errors import ConfigError, MissingExtraError

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Maps queries, keys and values (B, L, H, D) and an additive mask (L, L) or None to (B, L, H, D)."""


def apply_speedups(model: Any, config: ModelConfig) -> None:
    """Choose how an open_clip model computes its features, in place.

    State dicts keep their names. Copies of a compiled model are not compiled.

    Args:
        model: open_clip model.
        config: ``attention``, ``channels_last``, ``trim_text``, ``compile_image`` and ``compile_text``.

    Raises:
        ConfigError: If the model has no attention that can be replaced, xformers does not fit, or texts cannot be
            trimmed.
        MissingExtraError: If xformers is asked for and not installed.
    """
    if config.attention != "sdpa":
        compute = native_attention if config.attention == "native" else xformers_attention()
        if replace_attention(model, compute) == 0:
            raise ConfigError(
                f"model.attention is {config.attention}, but {config.name!r} has no torch.nn.MultiheadAttention to "
                "replace. Leave model.attention at sdpa."
            )
    if config.channels_last:
        model.visual.register_forward_pre_hook(_channels_last)
    if config.trim_text:
        if not accept_short_texts(model):
            raise ConfigError(
                f"model.trim_text is true, but the text tower of {config.name!r} is not CLIP's causal one, which never "
                "looks at padding. Leave model.trim_text at false."
            )
        if config.compile_text:
            raise ConfigError(
                "model.trim_text and model.compile_text are both true: texts of many lengths would be "
                "compiled again and again. Choose one."
            )
    if config.compile_image:
        model.visual.compile()
    if config.compile_text:
        text = getattr(model, "text", None)
        (text if isinstance(text, nn.Module) else model.transformer).compile()


def _channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reorder the pixels; convolutions follow their input. Weights stay as stored, for ZeRO and anchors."""
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def accept_short_texts(model: Any) -> bool:
    """Let an open_clip CLIP encode texts that are shorter than its context, if its text tower allows that.

    The tower must be causal and take its feature at the end-of-text token: no padding behind it then reaches a feature.

    Args:
        model: Any open_clip model; ``encode_text`` is replaced.

    Returns:
        Whether texts may be short now; if not, the model is unchanged.
    """
    if not isinstance(model, CLIP) or model.attn_mask is None or model.text_pool_type not in ("argmax", "eos"):
        return False
    model.encode_text = types.MethodType(_encode_short_text, model)  # type: ignore[method-assign]
    model.accepts_short_texts = True  # type: ignore[assignment]
    return True


def trim_padding(model: Any, tokens: Tensor) -> Tensor:
    """Cut tokens behind the end of the longest text, for a model that ``accept_short_texts`` changed.

    Args:
        model: Any model; tokens of others are returned as they are.
        tokens: (N, context length), better on the CPU: the length is read from the values.

    Returns:
        (N, length), a view.
    """
    if not getattr(model, "accepts_short_texts", False) or len(tokens) == 0:
        return tokens
    ends = tokens if model.text_pool_type == "argmax" else (tokens == model.text_eos_id).int()
    return tokens[:, : int(ends.argmax(dim=-1).max()) + 1]


def _encode_short_text(self: Any, text: Tensor, normalize: bool = False) -> Tensor:
    """``CLIP.encode_text`` for texts of any length up to the context."""
    length, dtype = text.shape[1], self.transformer.get_cast_dtype()
    x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
    x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
    x = text_global_pool(x, text, self.text_pool_type, eos_token_id=getattr(self, "text_eos_id", None))
    if self.text_projection is not None:
        linear = isinstance(self.text_projection, nn.Linear)
        x = self.text_projection(x) if linear else x @ self.text_projection
    return F.normalize(x, dim=-1) if normalize else x


def native_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Plain matrix products and a softmax: softmax(Q K^T / sqrt(D) + M) V, the (L, L) scores held in memory."""
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / math.sqrt(query.shape[-1])
    weights = (scores if mask is None else scores + mask.to(scores)).softmax(dim=-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, value)


def xformers_attention() -> Attention:
    """Return xformers' memory-efficient attention.

    Raises:
        MissingExtraError: If xformers is not installed.
        ConfigError: If its compiled part was built for another PyTorch.
    """
    try:
        import xformers
        from xformers import ops
    except ImportError as error:
        raise MissingExtraError("xformers", "xformers", "model.attention xformers") from error
    if not getattr(xformers, "_has_cpp_library", False):
        raise ConfigError(
            f"model.attention is xformers, but xformers {xformers.__version__} was built for another PyTorch than "
            f"{torch.__version__}. Install the xformers release made for it, or use model.attention sdpa."
        )

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Call xformers; the mask is spread over batch and heads, which it does not do by itself."""
        bias = None
        if mask is not None:
            batch, length, heads, _ = query.shape
            bias = mask.to(query).expand(batch, heads, length, key.shape[1])
        return ops.memory_efficient_attention(query, key, value, attn_bias=bias)

    return attend


def replace_attention(model: nn.Module, compute: Attention) -> int:
    """Let every self-attention of PyTorch's own kind in a model be computed by a function.

    Args:
        model: Any module.
        compute: The attention.

    Returns:
        Number of layers changed.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    for layer in layers:
        layer.compute = compute  # type: ignore[assignment]  # found by the forward below, also in copies
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` without weights, for queries, keys and values from one tensor or three."""
    mask = options.get("attn_mask")
    padded = options.get("key_padding_mask") is not None
    if padded or options.get("need_weights", True) or (mask is not None and mask.ndim != 2):
        return nn.MultiheadAttention.forward(self, query, key, value, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)
    inputs = (query, key, value) if self.batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
    weights = self.in_proj_weight.chunk(3)
    biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    projected = [
        F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1))
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    ]
    mixed = self.out_proj(self.compute(*projected, mask).flatten(-2))
    return (mixed if self.batch_first else mixed.transpose(0, 1)), None

"""Learned prompts before a frozen text tower: CoOp, CoCoOp, KgCoOp and ContCoOp.

A prompt is [SOS] contexts, class name, "." [EOS]; the contexts are trained token embeddings. Whatever belongs to the
CLIP (token embeddings of class names, text tower) is read from the loaded model at every call, so a prompt can be put
before another model whose tokenizer and text width are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.errors import ConfigError, ModelError
from ftfast.models.loading import LoadedModel

Position = Literal["end", "middle", "front"]
PLACEHOLDER = "x"  # one token of CLIP's vocabulary; its embedding is replaced


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """What a prompt is made of.

    Attributes:
        init_text: Words the contexts start from; empty: random contexts, N(0, 0.02).
        context_length: Number of random contexts; with ``init_text`` it has as many as the text has tokens.
        position: Where the class name stands among the contexts.
        class_specific: Own contexts for every class (CoOp's CSC); such a prompt knows no other class.
        image_conditioned: Add a vector computed from the image to every context (CoCoOp).
        attention: Contexts attend to the class name's token embeddings (ContCoOp): P + W_o Attn(W_q P, W_k E, W_v E),
            with W_o = 0 at the start.
        pooled: The attention sees the mean of the class name's embeddings instead of each of them.
        token_mixing: What is trained acts on tokens, not on embedding dimensions: P_c = P + A E_V + g mean(E_c), with
            E_V the embeddings of the training names' tokens, A (M, V) and g (M) zero at the start. Such a prompt can
            be moved between text towers that share nothing but the tokenizer. Needs ``recompute_words``.
        recompute_words: Contexts are the loaded model's embeddings of ``init_text`` plus a trained offset, so the words
            are looked up anew in another model; False: the trained vectors are everything.
    """

    init_text: str = "a photo of a"
    context_length: int = 16
    position: Position = "end"
    class_specific: bool = False
    image_conditioned: bool = False
    attention: bool = False
    pooled: bool = False
    token_mixing: bool = False
    recompute_words: bool = False


class TextPath:
    """A CLIP's text tower, entered at its token embeddings.

    Args:
        loaded: An open_clip model with open_clip's own text tower and CLIP's tokenizer.

    Raises:
        ModelError: If the text tower or the tokenizer is another one.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        owner = loaded.model if hasattr(loaded.model, "token_embedding") else getattr(loaded.model, "text", None)
        self.table: Any = getattr(owner, "token_embedding", None)
        if not isinstance(self.table, nn.Embedding):
            raise ModelError(
                f"{loaded.name!r} has a text tower without a token embedding table, so prompts cannot be learned "
                "before it. Use a model with open_clip's own text tower, such as ViT-B-16 or EVA02-B-16."
            )
        if not (hasattr(self.tokenizer, "sot_token_id") and hasattr(self.tokenizer, "eot_token_id")):
            raise ModelError(
                f"{loaded.name!r} does not use CLIP's tokenizer, so the places of a prompt's contexts are unknown. "
                "Use a model with CLIP's tokenizer, such as ViT-B-16 or EVA02-B-16."
            )

    @property
    def width(self) -> int:
        """Width d of the token embeddings."""
        return int(self.table.weight.shape[1])

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Tokenize to (N, L) int64 on the model's device."""
        return self.tokenizer(list(texts)).to(self.table.weight.device)

    def words(self, text: str) -> Tensor:
        """Tokens of a text without start, end and padding."""
        row = self.tokens([text])[0]
        return row[1 : int((row == self.tokenizer.eot_token_id).nonzero()[0])]

    def encode(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Run the text tower on given token embeddings.

        Args:
            tokens: (N, L) tokens; they say where a text ends.
            embeddings: (N, L, d) in place of the tokens' own.

        Returns:
            (N, D) unit rows, float32; differentiable in ``embeddings``.
        """
        handle = self.table.register_forward_hook(lambda module, inputs, output: embeddings.to(output.dtype))
        try:
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1, eps=1e-12)
        finally:
            handle.remove()


class PromptLearner(nn.Module):
    """Trained contexts, and whatever the method trains beside them. The CLIP is used, not owned.

    Args:
        loaded: Frozen CLIP.
        spec: What the prompt is made of.
        class_names: Classes of training; only class-specific contexts depend on them.

    Raises:
        ConfigError: Contradictory or empty contexts.
        ModelError: Text tower or tokenizer are not CLIP's.
    """

    def __init__(self, loaded: LoadedModel, spec: PromptSpec, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.class_names = tuple(class_names)
        self.path = TextPath(loaded)
        device = self.path.table.weight.device
        if spec.recompute_words and not spec.init_text:
            raise ConfigError("recompute_words needs init_text: words that can be looked up in another model.")
        if spec.token_mixing and (spec.attention or spec.class_specific or not spec.recompute_words):
            raise ConfigError("token_mixing needs recompute_words and excludes attention and class-specific contexts.")
        words = self.path.words(spec.init_text) if spec.init_text else torch.empty(0, dtype=torch.int64)
        self.length = len(words) if spec.init_text else spec.context_length
        if self.length < 1:
            raise ConfigError(f"a prompt needs at least one context, but context_length is {spec.context_length}.")
        self.vocabulary = self._vocabulary(words) if spec.token_mixing else words
        if spec.token_mixing:
            self.mixture = nn.Parameter(torch.zeros(self.length, len(self.vocabulary)))
            self.gain = nn.Parameter(torch.zeros(self.length, 1))
        else:
            start = self._start(words, device)
            start = start.expand(len(self.class_names), -1, -1) if spec.class_specific else start
            self.context = nn.Parameter(start.clone())
        width = self.path.width
        if spec.attention:
            self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
            nn.init.zeros_(self.output.weight)  # at the start the prompt is exactly the hand-written one
        if spec.image_conditioned:
            hidden = max(1, loaded.embed_dim // 16)
            self.meta = nn.Sequential(nn.Linear(loaded.embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.to(device)
        self._known: dict[tuple[str, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def _vocabulary(self, words: Tensor) -> Tensor:
        """Tokens of the words and of all training names, each once, in order."""
        spoken = [self.path.words(name.replace("_", " ")) for name in self.class_names]
        return torch.unique(torch.cat([words, *spoken]))

    def _start(self, words: Tensor, device: torch.device) -> Tensor:
        """(M, d) contexts before training."""
        if self.spec.recompute_words:
            return torch.zeros(self.length, self.path.width, device=device)
        if self.spec.init_text:
            return self.path.table.weight.detach()[words].float()
        return 0.02 * torch.randn(self.length, self.path.width, device=device)

    def class_features(self, names: Sequence[str], images: Tensor | None = None) -> Tensor:
        """Text features of classes.

        Args:
            names: C class names.
            images: (B, D) unit image features; needed by image-conditioned prompts only.

        Returns:
            (C, D) unit rows, or (B, C, D) for image-conditioned prompts.

        Raises:
            ConfigError: Class-specific contexts are asked for other classes.
        """
        tokens, places, name_mask = self._places(tuple(names))
        embeddings = self.path.table.weight[tokens].float()
        contexts = self._contexts(tuple(names), embeddings, name_mask)
        if not self.spec.image_conditioned:
            return self.path.encode(tokens, _put(embeddings, places, contexts))
        if images is None:
            raise ConfigError("image-conditioned prompts need image features; give images.")
        shifts = self.meta(images.to(contexts.device))
        count, classes = len(images), len(tokens)
        shifted = contexts.unsqueeze(0) + shifts[:, None, None, :]
        whole = _put(embeddings.repeat(count, 1, 1), places.repeat(count, 1), shifted.reshape(-1, *shifted.shape[2:]))
        return self.path.encode(tokens.repeat(count, 1), whole).view(count, classes, -1)

    def scores(self, images: Tensor, names: Sequence[str], chunk: int = 32) -> Tensor:
        """Cosine of every image with every class, without gradients.

        Args:
            images: (N, D) unit image features.
            names: C class names.
            chunk: Images at a time for image-conditioned prompts.

        Returns:
            (N, C) float32 on the device of ``images``.
        """
        with torch.no_grad():
            if not self.spec.image_conditioned:
                return images @ self.class_features(names).to(images.device).T
            parts = [
                torch.einsum("bd,bcd->bc", part, self.class_features(names, part).to(images.device))
                for part in images.split(chunk)
            ]
            return torch.cat(parts)

    def _contexts(self, names: tuple[str, ...], embeddings: Tensor, name_mask: Tensor) -> Tensor:
        """(C, M, d) contexts of each class."""
        if self.spec.token_mixing:
            return self._mix(embeddings, name_mask)
        contexts: Tensor = self.context
        if self.spec.class_specific:
            number = {name: place for place, name in enumerate(self.class_names)}
            strange = [name for name in names if name not in number]
            if strange:
                raise ConfigError(
                    f"this prompt has contexts of its own for each of its {len(number)} classes and none for "
                    f"'{strange[0]}'. Class-specific contexts cannot be moved to other classes: train without "
                    "options.class_specific."
                )
            contexts = contexts[[number[name] for name in names]]
        if self.spec.recompute_words:
            contexts = contexts + self._words()
        contexts = contexts.expand(len(names), -1, -1)
        return contexts + self._attend(contexts, embeddings, name_mask) if self.spec.attention else contexts

    def _words(self) -> Tensor:
        """(M, d) the loaded model's embeddings of ``init_text``."""
        return self.path.table.weight.detach()[self.path.words(self.spec.init_text)].float()

    def _mix(self, embeddings: Tensor, name_mask: Tensor) -> Tensor:
        """P + A E_V + g mean(E_c): (C, M, d)."""
        table = self.path.table.weight.detach()[self.vocabulary.to(embeddings.device)].float()
        return self._words() + self.mixture @ table + self.gain * _mean_name(embeddings, name_mask).unsqueeze(1)

    def _attend(self, contexts: Tensor, embeddings: Tensor, name_mask: Tensor) -> Tensor:
        """W_o softmax(Q K^T / sqrt(d)) V over the class name's own tokens."""
        mask = name_mask
        if self.spec.pooled:
            embeddings = _mean_name(embeddings, name_mask).unsqueeze(1)
            mask = torch.ones(len(embeddings), 1, dtype=torch.bool, device=embeddings.device)
        found = F.scaled_dot_product_attention(
            self.query(contexts), self.key(embeddings), self.value(embeddings), attn_mask=mask.unsqueeze(1)
        )
        return self.output(found)

    def _places(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (C, L), where the contexts stand (C, M), and which tokens are the class name's (C, L)."""
        known = self._known.get(names)
        if known is None or known[0].device != self.path.table.weight.device:
            self._known = {names: self._lay_out(names)}
            known = self._known[names]
        return known

    def _lay_out(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        spoken = [name.replace("_", " ") for name in names]
        words = self.spec.init_text.split() if self.spec.init_text else [PLACEHOLDER] * self.length
        per_word = [len(self.path.words(word)) for word in words]
        cut = {"end": len(words), "middle": (len(words) + 1) // 2, "front": 0}[self.spec.position]
        before, after = words[:cut], words[cut:]
        ahead = sum(per_word[:cut])
        tokens = self.path.tokens([" ".join([*before, name, *after]) + "." for name in spoken])
        lengths = torch.tensor([len(self.path.words(name)) for name in spoken], device=tokens.device)
        column = torch.arange(self.length, device=tokens.device).expand(len(names), -1)
        places = 1 + column + torch.where(column < ahead, 0, lengths[:, None])
        inside = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = (inside > ahead) & (inside <= ahead + lengths[:, None]) & (inside < tokens.shape[1] - 1)
        outside = (places.max(1).values >= tokens.shape[1] - 1) | ~mask.any(1)
        if bool(outside.any()):
            raise ConfigError(
                f"{self.length} contexts and the class name '{names[int(outside.nonzero()[0])]}' do not fit the "
                f"{tokens.shape[1]} tokens the model reads. Use fewer contexts, or position end."
            )
        return tokens, places, mask


def _mean_name(embeddings: Tensor, name_mask: Tensor) -> Tensor:
    """(C, d) mean embedding of each class name's tokens."""
    weights = name_mask.float() / name_mask.sum(-1, keepdim=True)
    return torch.einsum("cl,cld->cd", weights, embeddings)


def _put(embeddings: Tensor, places: Tensor, contexts: Tensor) -> Tensor:
    """Replace (N, L, d) at places (N, M) by (N, M, d); every other row stays bitwise what it was."""
    index = places.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])
    return embeddings.scatter(1, index, contexts)

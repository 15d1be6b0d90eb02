"""Make the built-in tiny CLIPs again: ``ftfast pretrain``.

Data: the "pairs/train" split, two drawings of about 1,490 named things, each in two of three hands. Loss: the fused
multi-positive contrastive loss between a batch of images and the names of *all* things, which is the CLIP loss with
every name as a negative: fine differences (twelve clock faces, 258 flags) rarely meet in one batch. Both towers start
from random weights. Everything follows from the seed on one machine and one thread count.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.data.builtin import load_builtin
from ftfast.data.builtin.augment import Augmentation, augment
from ftfast.errors import ConfigError, TrainingError
from ftfast.kernels import clip_loss
from ftfast.models.tiny import BUILTIN_MODELS, IMAGE_SIZE, TEMPLATES, build_tiny, builtin_model_folder, save_tiny
from ftfast.tiny_exam import FEW_CLASSES, card_text, evaluate_tiny, measure, own_exam

PLAIN_SHARE = 0.4
"""Share of steps whose prompt is the bare name; the other steps draw from all of ``TEMPLATES``."""

_BETAS = (0.9, 0.98)
_MAX_LOGIT_SCALE = 100.0
_EPOCHS = {"v1": 60, "v2": 120}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a tiny CLIP from scratch on the built-in drawings; the defaults are the recipe of the shipped weights."""

    out: str
    """Folder to write: an open_clip folder with weights, configuration and model card."""
    version: Literal["v1", "v2"] = "v1"
    """Which of the two architectures."""
    epochs: int = 0
    """Passes over the 2,980 training drawings; 0: the recipe's (v1 60, v2 120)."""
    batch_size: int = 256
    """Images per step."""
    lr: float = 2e-3
    """Highest learning rate of AdamW; linear warm-up over a tenth of the steps, then cosine to zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and filters; token table, norms and biases are left alone."""
    label_smoothing: float = 0.0
    """Weight of the uniform target in the contrastive loss."""
    seed: int = 0
    """Seed of initial weights, order and augmentation."""
    threads: int = 0
    """CPU threads; 0: torch's default. Rounding differs with the number of threads."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """amp_bf16 takes half the time on processors with bfloat16 arithmetic."""
    smoke: bool = False
    """Try everything in seconds: a few names, one epoch."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    log_every: int = 5
    """Epochs between progress lines; each measures the held-out drawings."""


def pretrain(config: PretrainConfig, say: Callable[[str], None] | None = None) -> Path:
    """Train a tiny CLIP and write it as an open_clip folder.

    Args:
        config: Settings.
        say: Receives progress lines; default: standard error.

    Returns:
        The folder.

    Raises:
        ConfigError: If a setting is out of range or the folder exists.
        MissingExtraError: If the drawings' packages are not installed.
        TrainingError: If the loss stops being finite.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    _check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    name = f"tiny-clip-{config.version}"
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_tiny(name)
    model.to(memory_format=torch.channels_last)
    say(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {_plan(config)}")
    _train(model, config, say)
    out, command = Path(config.out), _command(config)
    save_tiny(out, name, model.state_dict(), card_text(name, command, None))
    scores = evaluate_tiny(out, config.smoke)  # as stored: rounding included
    save_tiny(out, name, model.state_dict(), card_text(name, command, scores))
    say(f"{out}: {scores}, {time.monotonic() - started:.0f} s")
    return out


def _check(config: PretrainConfig) -> None:
    problems = [
        f"{name} is {value}; it must be {need}."
        for name, value, need, good in (
            ("epochs", config.epochs, "0 (the recipe's) or more", config.epochs >= 0),
            ("batch_size", config.batch_size, "at least 2", config.batch_size >= 2),
            ("lr", config.lr, "positive", config.lr > 0),
            ("weight_decay", config.weight_decay, "0 or more", config.weight_decay >= 0),
            ("threads", config.threads, "0 (torch's default) or more", config.threads >= 0),
            ("log_every", config.log_every, "at least 1", config.log_every >= 1),
        )
        if not good
    ]
    if f"tiny-clip-{config.version}" not in BUILTIN_MODELS:
        problems.append(f"version is '{config.version}'; it must be v1 or v2.")
    out = Path(config.out)
    if not config.out:
        problems.append("out is empty: name the folder to write.")
    elif out.resolve() in {builtin_model_folder(name).resolve() for name in BUILTIN_MODELS} and config.smoke:
        problems.append(f"out is {out}: a smoke run must not replace the shipped weights.")
    elif out.exists() and not config.overwrite:
        problems.append(f"{out} exists. Give another --out, or --overwrite.")
    if problems:
        raise ConfigError(problems)


def _epochs(config: PretrainConfig) -> int:
    return config.epochs or (1 if config.smoke else _EPOCHS[config.version])


def _plan(config: PretrainConfig) -> str:
    return f"{_epochs(config)} epochs, batch {config.batch_size}, lr {config.lr:.2e}, seed {config.seed}"


def _train(model: Any, config: PretrainConfig, say: Callable[[str], None]) -> None:
    images, labels, names = _training_data(config)
    exam = own_exam(model, config.smoke)
    tokens = _tokens(names)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = _optimizer(model, config)
    batch = min(config.batch_size, len(images))
    steps_per_epoch, epochs = len(images) // batch, _epochs(config)
    started, step = time.monotonic(), 0
    model.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for rows in order[: steps_per_epoch * batch].split(batch):
            rate = config.lr * _schedule(step, epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total += _step(model, optimizer, (images[rows], labels[rows]), tokens, config, generator)
            step += 1
        if not math.isfinite(total):
            raise TrainingError(f"the loss became {total} in epoch {epoch}. Use a lower lr than {config.lr:.2e}.")
        if epoch % config.log_every == 0 or epoch == epochs:
            spent = time.monotonic() - started
            say(
                f"epoch {epoch}/{epochs}  loss {total / steps_per_epoch:.3f}  scale {model.logit_scale.exp():.1f}  "
                f"{measure(model.eval(), exam)}  {spent:.0f} s, {spent / epoch * (epochs - epoch):.0f} s left"
            )
            model.train()


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    tokens: list[Tensor],
    config: PretrainConfig,
    generator: torch.Generator,
) -> float:
    """One update: a batch of augmented images against the names of everything, under one prompt."""
    images, labels = batch
    pixels = (augment(images, IMAGE_SIZE, Augmentation(), generator) - 0.5) / 0.5
    plain = torch.rand((), generator=generator).item() < PLAIN_SHARE
    prompt = 0 if plain else int(torch.randint(len(tokens), (), generator=generator))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "amp_bf16"):
        image_features = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
        text_features = encode_names(model, tokens[prompt])
    loss = clip_loss(
        F.normalize(image_features.float(), dim=-1),
        F.normalize(text_features.float(), dim=-1),
        model.logit_scale.exp(),
        labels=labels,
        text_labels=torch.arange(len(text_features)),
        label_smoothing=config.label_smoothing,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(_MAX_LOGIT_SCALE))
    return loss.item()


def encode_names(model: Any, tokens: Tensor) -> Tensor:
    """Text features of short prompts without computing their padding; equal to ``model.encode_text``.

    The text tower is causal, so what follows the end-of-text token never reaches it. Prompts are encoded in two groups
    by length, each cut to its longest.

    Args:
        model: A built-in tiny CLIP.
        tokens: int64 (N, context length).

    Returns:
        (N, D), not normalised.
    """
    lengths = (tokens > 0).sum(1)
    order = lengths.argsort(stable=True)
    features = []
    for rows in (order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]):
        length = int(lengths[rows].max())
        short = tokens[rows, :length]
        hidden = model.token_embedding(short) + model.positional_embedding[:length]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
        features.append(hidden[torch.arange(len(rows)), short.argmax(1)] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def _training_data(config: PretrainConfig) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    split = load_builtin("pairs/train")
    images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(split.labels)
    if not config.smoke:
        return images, labels, split.class_names
    few = labels < FEW_CLASSES
    return images[few], labels[few], split.class_names[:FEW_CLASSES]


def _tokens(names: tuple[str, ...]) -> list[Tensor]:
    """Tokens of every name under every template: one (N, context length) tensor per template."""
    from open_clip import SimpleTokenizer

    from ftfast.models.tiny import tiny_config

    length = tiny_config(BUILTIN_MODELS[0])["model_cfg"]["text_cfg"]["context_length"]
    tokenizer = SimpleTokenizer(context_length=length)
    return [tokenizer([template.format(name) for name in names]) for template in TEMPLATES]


def _optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=_BETAS, fused=True)


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear over the first tenth, then a half cosine to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _command(config: PretrainConfig) -> str:
    """The command line that repeats this run."""
    defaults = PretrainConfig(out="FOLDER")
    words = ["ftfast pretrain --out FOLDER", f"--version {config.version}", f"--seed {config.seed}"]
    for key, value in vars(replace(config, threads=0, overwrite=False, log_every=defaults.log_every)).items():
        if key not in ("out", "version", "seed") and value != getattr(defaults, key):
            words.append(f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')} {value}")
    return " ".join(words)

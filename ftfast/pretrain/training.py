"""Make the built-in tiny CLIPs again: ``ftfast pretrain``.

Data: the "pairs/train" split, 1,490 named things, each in two of three hands. Loss: the fused multi-positive
contrastive loss between the images of a batch and their names under random prompts; two drawings of one thing in a
batch are positives of both names. The image tower starts from random weights; so does v1's text tower, while v2's
starts from v1's and learns at 0.3 of the rate, so that v2 is an update of v1 as EVA-CLIP is one of CLIP. Everything
follows from the seed, on one machine and with one number of threads.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.data.builtin import load_builtin
from ftfast.data.builtin.augment import LIGHT, STRONG, Augmentation, augment
from ftfast.errors import ConfigError, TrainingError
from ftfast.kernels import clip_loss
from ftfast.models.exporting import read_state
from ftfast.models.speedups import accept_short_texts, trim_padding
from ftfast.models.tiny import BUILTIN_MODELS, IMAGE_SIZE, TEMPLATES, build_tiny, builtin_model_folder, save_tiny
from ftfast.pretrain.exam import FEW_CLASSES, card_text, evaluate_tiny, measure, own_exam
from ftfast.pretrain.settings import AUGMENTATION, EPOCHS, TEXT_FROM, PretrainConfig

_BETAS = (0.9, 0.98)
_MAX_LOGIT_SCALE = 100.0


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
        model: Any = build_tiny(name)
    inherited = _inherit_text(model, config)
    accept_short_texts(model)
    model.to(memory_format=torch.channels_last)
    say(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {_plan(config)}")
    _train(model, config, inherited, say)
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
            ("text_lr", config.text_lr, "positive", config.text_lr > 0),
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
    return config.epochs or (1 if config.smoke else EPOCHS[config.version])


def _strength(config: PretrainConfig) -> Augmentation:
    chosen = AUGMENTATION[config.version] if config.augmentation == "auto" else config.augmentation
    return STRONG if chosen == "strong" else LIGHT


def _plan(config: PretrainConfig) -> str:
    return f"{_epochs(config)} epochs, batch {config.batch_size}, lr {config.lr:.2e}, seed {config.seed}"


def _inherit_text(model: Any, config: PretrainConfig) -> frozenset[str]:
    """Copy the text tower of another tiny CLIP; return the names of the parameters that were copied."""
    source = TEXT_FROM[config.version] if config.text_from == "auto" else config.text_from
    if source == "random" or (config.smoke and config.text_from == "auto"):
        return frozenset()
    state = read_state(builtin_model_folder(source))
    text = {key: value for key, value in state.items() if not key.startswith("visual.") and key != "logit_scale"}
    model.load_state_dict(text, strict=False)
    return frozenset(text)


def _train(model: Any, config: PretrainConfig, inherited: frozenset[str], say: Callable[[str], None]) -> None:
    images, labels, names = _training_data(config)
    exam = own_exam(model, config.smoke)
    tokens = _tokens(names, len(model.positional_embedding))
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = _optimizer(model, config, inherited)
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
                group["lr"] = rate * group["share"]
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
    tokens: Tensor,
    config: PretrainConfig,
    generator: torch.Generator,
) -> float:
    """One update: augmented images against their names, each under a random prompt."""
    images, labels = batch
    pixels = (augment(images, IMAGE_SIZE, _strength(config), generator) - 0.5) / 0.5
    prompts = torch.randint(len(tokens), (len(labels),), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "amp_bf16"):
        image_features = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
    loss = clip_loss(
        F.normalize(image_features.float(), dim=-1),
        model.encode_text(trim_padding(model, tokens[prompts, labels]), normalize=True),
        model.logit_scale.exp(),
        labels=labels,
        label_smoothing=config.label_smoothing,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(_MAX_LOGIT_SCALE))
    return loss.item()


def _training_data(config: PretrainConfig) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    split = load_builtin("pairs/train")
    images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(split.labels)
    if not config.smoke:
        return images, labels, split.class_names
    few = labels < FEW_CLASSES
    return images[few], labels[few], split.class_names[:FEW_CLASSES]


def _tokens(names: tuple[str, ...], context_length: int) -> Tensor:
    """Tokens of every name under every prompt, int64 (prompts, names, context length)."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=context_length)
    return torch.stack([tokenizer([template.format(name) for name in names]) for template in TEMPLATES])


def _optimizer(model: nn.Module, config: PretrainConfig, inherited: frozenset[str]) -> torch.optim.Optimizer:
    """AdamW in groups: decayed or not, and learning at the whole rate or, where inherited, at a share of it."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim < 2 or "embedding" in name else config.weight_decay
        groups.setdefault((decay, config.text_lr if name in inherited else 1.0), []).append(parameter)
    named = [{"params": each, "weight_decay": decay, "share": share} for (decay, share), each in groups.items()]
    return torch.optim.AdamW(named, lr=config.lr, betas=_BETAS, fused=True)


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

"""Words of other tools (open_clip, timm, Hugging Face Trainer, DeepSpeed, wise-ft) and what ftfast calls them.

Used only to make errors helpful: an alias is never accepted silently, since its meaning may differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ftfast.config.settings import SettingsIndex


@dataclass(frozen=True)
class Alias:
    """How another tool names a setting."""

    target: str
    """ftfast's dotted path."""
    source: str
    """Who says it and how, for the message."""
    note: str = ""
    """What to write instead, if not just the other name."""


_OPEN_CLIP = {
    "train_data": "data.path",
    "csv_img_key": "data.image_column",
    "csv_caption_key": "data.text_column",
    "csv_separator": "data.separator",
    "dataset_type": "data.format",
    "wd": "optim.weight_decay",
    "lr_scheduler": "optim.schedule",
    "name": "out",
    "logs": "out",
    "val_frequency": "eval.every_steps",
    "save_frequency": "checkpoint.every_steps",
    "log_every_n_steps": "log.every_steps",
    "lock_image_freeze_bn_stats": "model.freeze_batch_norm",
    "lock_text_unlocked_layers": "model.lock_text_unlocked_layers",
}
_HUGGING_FACE = {
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "train.accum_freq",
    "gradient_checkpointing": "model.grad_checkpointing",
    "output_dir": "out",
    "save_total_limit": "checkpoint.keep_last",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "logging_steps": "log.every_steps",
    "learning_rate": "optim.lr",
    "num_train_epochs": "train.epochs",
    "max_grad_norm": "optim.grad_clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "dataloader_num_workers": "train.workers",
    "metric_for_best_model": "eval.selection",
    "load_best_model_at_end": "eval.selection",
    "model_name_or_path": "model.name",
    "train_file": "data.path",
}
_TIMM = {
    "data_dir": "data.path",
    "sched": "optim.schedule",
    "clip_grad": "optim.grad_clip_norm",
    "opt_eps": "optim.eps",
    "model_ema_decay": "optim.ema_decay",
    "checkpoint_hist": "checkpoint.keep_last",
    "log_interval": "log.every_steps",
    "warmup_epochs": "optim.warmup",
    "output": "out",
    "grad_accum_steps": "train.accum_freq",
}
_DEEPSPEED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_clipping": "optim.grad_clip_norm",
}
_SPECIAL = {
    "warmup_steps": Alias("optim.warmup", "HF Trainer's warmup_steps", "a number of steps, or a fraction below 1"),
    "warmup_ratio": Alias("optim.warmup", "HF Trainer's warmup_ratio", "a fraction below 1, or a number of steps"),
    "bf16": Alias("train.precision", "HF Trainer's and DeepSpeed's bf16", "train.precision: amp_bf16"),
    "fp16": Alias("train.precision", "HF Trainer's and DeepSpeed's fp16", "train.precision: amp_fp16"),
    "amp": Alias("train.precision", "timm's --amp", "train.precision: amp_bf16"),
    "model_ema": Alias("optim.ema_decay", "timm's --model-ema", "optim.ema_decay: 0.999"),
}


def _table() -> dict[str, Alias]:
    table: dict[str, Alias] = {}
    for words, form in (
        (_DEEPSPEED, "DeepSpeed's {}"),
        (_TIMM, "timm's --{}"),
        (_HUGGING_FACE, "HF Trainer's {}"),
        (_OPEN_CLIP, "open_clip's --{}"),
    ):
        for word, target in words.items():
            shown = word.replace("_", "-") if "--" in form else word
            table[word] = Alias(target, form.format(shown))
    return {**table, **_SPECIAL}


ALIASES: dict[str, Alias] = _table()

VALUE_ALIASES: dict[str, str] = {
    "bf16": "amp_bf16",
    "bfloat16": "amp_bf16",
    "fp16": "amp_fp16",
    "float16": "amp_fp16",
    "amp": "amp_fp16",
    "float32": "fp32",
    "linear": "cosine",
    "const": "constant",
    "csv": "table",
    "tsv": "table",
    "wds": "webdataset",
    "best": "all",
    "classification": "zero_shot",
    "retrieval": "image_retrieval",
}


def explain_unknown(path: str, index: SettingsIndex, *, flag: bool = False, also: Iterable[str] = ()) -> str:
    """Say what an unknown key or flag probably means.

    Args:
        path: The unknown dotted name, with underscores.
        index: What exists.
        flag: Write names as command-line flags instead of keys.
        also: Further names that exist, such as short flags.

    Returns:
        One sentence: the ftfast name of another tool's word, the nearest name, or the names that exist there.
    """
    word = path.rsplit(".", 1)[-1].lower().replace("-", "_")
    alias = ALIASES.get(word)
    if alias is not None and alias.target in index.settings:
        sentence = f"ftfast calls this {_quote(alias.target, flag)} ({alias.source})."
        return f"{sentence[:-1]}: {alias.note}." if alias.note else sentence
    blocks = () if flag else (group for group in index.groups if group)
    known = [*also, *index.settings, *blocks]
    nearest = _nearest(path, known)
    if not nearest and (close := nearest_word(word, ALIASES, 0.8)):
        return explain_unknown(close, index, flag=flag)
    if nearest:
        return f"Did you mean {_quote(nearest, flag)}?"
    parent = path.rpartition(".")[0]
    while parent not in index.groups:
        parent = parent.rpartition(".")[0]
    if flag:
        return "See: ftfast train --help-all."
    here = [child.rsplit(".", 1)[-1] for child in index.children(parent)]
    return f"Known keys{f' in {parent!r}' if parent else ''}: {', '.join(here)}."


def nearest_word(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word most like ``word``, or an empty string if none is at least ``cutoff`` alike."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else ""


def _nearest(path: str, known: list[str]) -> str:
    lowered = path.lower().replace("-", "_")
    parent, _, word = lowered.rpartition(".")
    siblings = {name.rsplit(".", 1)[-1]: name for name in known if name.rpartition(".")[0] == parent}
    close = nearest_word(word, siblings)
    if close:
        return siblings[close]
    same_word = [name for name in known if name.rsplit(".", 1)[-1] == word]
    if same_word:
        return same_word[0]
    return nearest_word(lowered, [name for name in known if not lowered.startswith(f"{name}.")], 0.75)


def _quote(path: str, flag: bool) -> str:
    return f"'--{path.replace('_', '-')}'" if flag else f"'{path}'"

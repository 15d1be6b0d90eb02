"""Every setting of a training run, as frozen dataclasses: the single source of YAML keys, flags, help and validation.

The sentence under a field is its help text. Words are open_clip's where open_clip has one. Recipe-specific options
are not here: each recipe declares its own options dataclass, which becomes the ``options`` block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "amp_bf16", "amp_fp16", "pure_bf16", "pure_fp16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which CLIP is tuned, and which parts of it may move."""

    name: str = "tiny-clip-v1"
    """open_clip name ("ViT-B-16"), folder ("local-dir:path") or built-in ("tiny-clip-v1", "tiny-clip-v2")."""
    pretrained: str = ""
    """open_clip pretrained tag ("openai") or a weights file; empty for built-ins and local-dir folders."""
    lock_image: bool = False
    """Freeze the image tower."""
    lock_image_unlocked_groups: int = 0
    """With lock_image: leave the last n layer groups trainable."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = 0
    """With lock_text: leave the last n layer groups trainable."""
    lock_logit_scale: bool = False
    """Keep the temperature at its pretrained value."""
    freeze_batch_norm: bool = True
    """Use stored BatchNorm statistics while training (batch statistics of a small set exaggerate forgetting)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    attention: Literal["sdpa", "xformers", "native"] = "sdpa"
    """PyTorch's fused attention, xformers' (its release must match the installed PyTorch), or plain products."""
    channels_last: bool = False
    """Give the image tower pixels in channels-last order; convolutional towers are faster with them."""
    trim_text: bool = False
    """Leave out the padding behind the longest text of a batch: the same features in less time (CLIP's text tower)."""
    compile_image: bool = False
    """Compile the image tower with torch.compile."""
    compile_text: bool = False
    """Compile the text tower with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One source of images with texts, labels, both or neither."""

    path: str = ""
    """Table (.csv .jsonl .parquet), class folders, images + .txt, tars, builtin:..., torchvision:..., coop:..."""
    format: Literal[
        "auto", "table", "imagefolder", "pairs", "webdataset", "builtin", "torchvision", "coop", "images"
    ] = "auto"
    """How to read path; "auto" infers it and prints what it found."""
    image_column: str = ""
    """Table column holding image paths (relative to the table's folder); empty: filepath, image, img, path, ..."""
    text_column: str = ""
    """Table column holding captions; empty: title, caption, text, ..."""
    label_column: str = ""
    """Table column holding class names; empty: label, class, class_name, ..."""
    separator: str = ""
    """Column separator of a text table; empty: sniffed."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates for class names; "{}" stands for the name."""
    classes: tuple[str, ...] = ()
    """Keep only these classes, in this order (a task of a class-incremental sequence); empty: all."""
    half: Literal["all", "base", "new"] = "all"
    """Base-to-new protocol: keep the first half of the classes in label order (rounded up), or the others."""
    shots: int = 0
    """Few-shot: draw this many images of every class (all of a class that has fewer); 0: use everything."""
    shots_seed: int = 1
    """Seed of the few-shot draw; smaller draws are parts of larger ones."""
    min_images_per_class: int = 2
    """Fewest images a class may have; retrieval and a train/validation split need two."""
    split: Literal["all", "train", "val"] = "all"
    """Use everything, or one side of a fixed split of this source (see split_by, val_fraction, split_seed)."""
    split_by: Literal["classes", "images"] = "classes"
    """How to divide: "classes" puts every class on one side (open-set retrieval), "images" divides images."""
    val_fraction: float = 0.2
    """Share of classes or images on the validation side of the split."""
    split_seed: int = 42
    """Seed of the split."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of images cannot be decoded; below it they are counted and skipped."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer (AdamW), learning rates and their schedule."""

    lr: float = 1e-5
    """Base learning rate."""
    image_lr: float | None = None
    """Learning rate of the image tower; default lr."""
    text_lr: float | None = None
    """Learning rate of the text tower; default lr."""
    head_lr: float | None = None
    """Learning rate of modules a recipe adds, such as a classifier; default lr."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.999
    """AdamW's second decay rate."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to tensors with two or more dimensions."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: cosine to zero, or constant."""
    warmup: float = 0.0
    """Linear warm-up: a fraction of all steps if below 1, else a number of steps."""
    grad_clip_norm: float = 0.0
    """Clip the global gradient norm to this value; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, evaluated and exported instead of them; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, batch size and precision of training."""

    epochs: float = 1.0
    """Passes over the task data; ignored when max_steps is set."""
    max_steps: int = 0
    """Optimizer steps; 0 means "as many as epochs need"."""
    batch_size: int = 128
    """Images per forward pass and per process."""
    accum_freq: int = 1
    """Forward passes per optimizer step."""
    global_batch_size: int = 0
    """If set, must equal batch_size x accum_freq x processes; a guard against mistakes."""
    precision: Precision = "fp32"
    """fp32; mixed in bfloat16 or float16 (amp_*); pure_*: weights in 16 bits, fp32 copies in ZeRO's shards."""
    device: str = "auto"
    """Where to run: "auto" (cuda if present), "cpu" or "cuda:0"."""
    workers: int = 2
    """Data loading processes; 0 loads in the main process."""
    exchange: Literal["gather", "ring"] = "gather"
    """How contrastive losses on pairs meet other processes: gather all features, or pass texts around a ring."""
    timeout_s: float = 1800.0
    """Longest wait for another process inside one exchange; a process that died is noticed within a minute."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Training on several GPUs with DeepSpeed ZeRO."""

    zero: int | None = None
    """What processes divide: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights; none: no DeepSpeed."""
    config: str = ""
    """A DeepSpeed JSON file of your own; contradictions with other settings are refused."""
    offload_optimizer: bool = False
    """Keep optimizer state, anchor and importance in CPU memory (ZeRO 1 to 3)."""
    offload_param: bool = False
    """Keep this process's share of the weights in CPU memory (ZeRO 3)."""
    zero_init: bool = False
    """Build the model in shards, for models that do not fit one GPU; the first process reads the weights (ZeRO 3)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved while training."""

    every_steps: int = 0
    """Save a resumable checkpoint every n steps; 0: at the end of each epoch and when interrupted."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """One evaluation: a task on a data source, either the target or something to keep."""

    name: str
    """Name in tables, plots and logs."""
    task: Literal["zero_shot", "image_text_retrieval", "image_retrieval"]
    """What is measured."""
    role: Literal["target", "control"] = "control"
    """target: what is to be learned; control: what must not be forgotten."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to classify, pairs, or retrieval queries."""
    gallery: DataConfig | None = None
    """Images to search; None: the queries themselves, without self matches."""
    metric: str = ""
    """Metric shown in the summary and used for selection; empty: acc1, mean recall@1 or map_at_20 by task."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during and after training."""

    suites: tuple[SuiteConfig, ...] = ()
    """Evaluations before and after training; empty: made from data and the built-in controls."""
    validation: tuple[SuiteConfig, ...] = ()
    """Smaller suites run during training to select the best weights; empty: made from data by the recipe's rule."""
    every_steps: int = 0
    """Run validation every n steps; 0: at the end of each epoch."""
    selection: Literal["all", "target", "control", "last"] = "last"
    """Best weights by mean validation metric over all suites, targets only, controls only; or simply the last."""
    batch_size: int = 256
    """Images per forward pass while evaluating."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Interpolation points between start (0) and tuned (1) weights in the report; empty: no sweep."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logs."""

    every_steps: int = 10
    """Write a log line every n steps."""
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Extra log writers besides JSONL and CSV."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training run."""

    recipe: str = "infusing"
    """Method; see "ftfast recipes"."""
    out: str = ""
    """Output folder; empty: runs/<date>_<recipe>_<model>."""
    seed: int = 0
    """Seed of initialisation, shuffling and augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The task's training data."""
    generic: DataConfig = field(default_factory=DataConfig)
    """Generic data that methods use to remember (distillation, replay)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Loop."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logs."""
    options: Any = None
    """Options of the recipe (its own dataclass)."""

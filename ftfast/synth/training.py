"""Train the built-in generator: ``python -m ftfast.synth.training --out FOLDER``.

Data: the drawings of "pairs/train" at 32 pixels, each under a random prompt with its name. The held-out hand of every
thing, which all tests of the built-in set use, and all people are left out. A stopped run goes on when the same
command is given again; every step draws from its own seed, so that the randomness of a resumed run is the same.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.data.builtin import STYLES, load_builtin
from ftfast.errors import CheckpointError, ConfigError, MissingExtraError, TrainingError
from ftfast.models.tiny import TEMPLATES

CHECKPOINT = "checkpoint.pt"
_DROP_PROMPT = 0.1


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Train the built-in generator from scratch; the defaults are the recipe of the shipped weights."""

    out: str
    """Folder to write: a diffusers pipeline. Checkpoints and sample sheets lie in FOLDER.partial until it is done."""
    steps: int = 8000
    """Optimizer steps."""
    cpu_minutes: float = 41.0
    """Most processor time, summed over threads; the learning rate reaches zero then, or after the last step."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Highest learning rate of AdamW: linear warm-up over 200 steps, linear to zero over the last 40 %."""
    ema: float = 0.998
    """Decay of the moving average of the weights, which is what is stored."""
    sketch_steps: int = 10000
    """Steps, of 256 cheap regressions each, that fit the sketch of every prompt before training begins."""
    seed: int = 0
    """Seed of initial weights, order, noise and prompts."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    """Arithmetic of the network."""
    compile: bool = True
    """torch.compile the network: twice as fast on two cores, a minute to start, needs a C++ compiler."""
    save_every: int = 200
    """Steps between checkpoints."""
    sheet_every: int = 1000
    """Steps between sample sheets; 0: none."""
    overwrite: bool = False
    """Replace the folder if it exists."""


def train_generator(config: GeneratorConfig, say: Callable[[str], None] | None = None) -> Path:
    """Train and write the pipeline folder.

    Args:
        config: Settings.
        say: Receives progress lines; default: standard error.

    Returns:
        The folder.

    Raises:
        ConfigError: If a setting is out of range or the folder exists.
        MissingExtraError: Without diffusers, or without the drawings' packages.
        CheckpointError: If the unfinished run in FOLDER.partial had other settings.
        TrainingError: If the loss stops being finite.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    _check(config)
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise MissingExtraError("diffusers", "synth", "Training the generator") from None
    if config.threads:
        torch.set_num_threads(config.threads)
    from ftfast.models.generator import save_pipeline

    run = _Run(config, say)
    if not run.resume():
        run.fit_sketch()
    run.train()
    folder = save_pipeline(Path(config.out), run.average, card_text(config, run.step, run.seconds))
    say(f"{folder}: {run.step:,} steps, {run.seconds / 60:.0f} minutes of processor time")
    return folder


def _check(config: GeneratorConfig) -> None:
    problems = [
        f"{name} is {value}; it must be {need}."
        for name, value, need, good in (
            ("steps", config.steps, "at least 1", config.steps >= 1),
            ("cpu_minutes", config.cpu_minutes, "positive", config.cpu_minutes > 0),
            ("batch_size", config.batch_size, "at least 1", config.batch_size >= 1),
            ("lr", config.lr, "positive", config.lr > 0),
            ("ema", config.ema, "in [0, 1)", 0 <= config.ema < 1),
            ("sketch_steps", config.sketch_steps, "0 or more", config.sketch_steps >= 0),
            ("save_every", config.save_every, "at least 1", config.save_every >= 1),
            ("sheet_every", config.sheet_every, "0 or more", config.sheet_every >= 0),
        )
        if not good
    ]
    if not config.out:
        problems.append("out is empty: name the folder to write.")
    elif Path(config.out).exists() and not config.overwrite:
        problems.append(f"{config.out} exists. Give another --out, or --overwrite.")
    if problems:
        raise ConfigError(problems)


def training_data() -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Return the drawings of "pairs/train" at 32 pixels, uint8 (N, 3, 32, 32), labels (N,), hands (N,) and names."""
    from ftfast.models.generator import IMAGE_SIZE

    split = load_builtin("pairs/train")
    large = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).float()
    small = F.interpolate(large, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True, align_corners=False)
    hands = torch.tensor([STYLES.index(style) for style in split.styles])
    return small.round().clamp(0, 255).byte(), torch.from_numpy(split.labels), hands, split.class_names


class _Run:
    """State of one training run: network, average, optimizer, step and processor time spent."""

    def __init__(self, config: GeneratorConfig, say: Callable[[str], None]) -> None:
        from ftfast.models.generator import TEXT_WIDTH, build_scheduler, build_unet, embed_prompts

        self.config, self.say = config, say
        self.folder = Path(f"{config.out.rstrip('/')}.partial")
        self.images, self.labels, self.hands, names = training_data()
        prompts = [template.replace("{}", name) for template in TEMPLATES for name in names]
        self.texts = embed_prompts(prompts).view(len(TEMPLATES), len(names), TEXT_WIDTH)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.unet = build_unet().to(memory_format=torch.channels_last)
            self.average = build_unet().eval().requires_grad_(False)
        self.average.load_state_dict(self.unet.state_dict())
        self.unet.sketch.requires_grad_(False)
        self.forward: Any = torch.compile(self.unet) if config.compile else self.unet
        self.learned = [p for name, p in self.unet.named_parameters() if not name.startswith("sketch.")]
        self.optimizer = torch.optim.AdamW(self.learned, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.signal = build_scheduler().alphas_cumprod.float()
        self.step, self.seconds = 0, 0.0

    def progress(self) -> float:
        """Share of the run that is done, in steps or in time, whichever is more."""
        return min(1.0, max(self.step / self.config.steps, self.seconds / (60 * self.config.cpu_minutes)))

    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * min(1.0, (self.step + 1) / 200, (1 - self.progress()) / 0.4)

    def fit_sketch(self) -> None:
        """Teach the sketch layers what every prompt looks like in every hand; they stay so from then on."""
        from ftfast.models.generator import SKETCH_SIZE

        begin = time.monotonic()
        small = F.interpolate(self.images.float() / 127.5 - 1, size=(SKETCH_SIZE, SKETCH_SIZE), mode="area").flatten(1)
        random = torch.Generator().manual_seed(self.config.seed)
        self.unet.sketch.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.unet.sketch.parameters(), lr=2e-3, weight_decay=1e-3, fused=True)
        steps, batch = self.config.sketch_steps, 256
        for step in range(steps):
            rows = torch.randint(len(small), (batch,), generator=random)
            condition = self._condition(rows, random)
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100, 2 * (1 - step / steps))
            loss = F.mse_loss(self.unet.sketch(condition), small[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 1000 == 0 or step + 1 == steps:
                self.say(f"sketch step {step + 1}/{steps}  loss {loss.item():.4f}  {time.monotonic() - begin:.0f} s")
        self.unet.sketch.requires_grad_(False)
        self.average.sketch.load_state_dict(self.unet.sketch.state_dict())

    def train(self) -> None:
        """Run to the end, with checkpoints and sheets on the way."""
        from ftfast.models.generator import sample_sheet

        self.unet.train()
        total, begin = 0.0, time.process_time()
        while self.progress() < 1.0:
            rate = self.rate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            total += self.update()
            self.step += 1
            now = time.process_time()
            self.seconds, begin = self.seconds + now - begin, now
            last = self.progress() >= 1.0
            if self.step % 50 == 0:
                if not math.isfinite(total):
                    raise TrainingError(f"the loss became {total} at step {self.step}. Use a lower lr than {rate:.1e}.")
                speed = self.step * self.config.batch_size / self.seconds
                self.say(
                    f"step {self.step}/{self.config.steps}  loss {total / 50:.4f}  lr {rate:.1e}  {speed:.0f} img/s  "
                    f"{self.seconds / 60:.1f} min"
                )
                total = 0.0
            if self.step % self.config.save_every == 0 or last:
                self.save()
            if self.config.sheet_every and (self.step % self.config.sheet_every == 0 or last):
                sample_sheet(self.average, self.folder / f"sheet-{self.step:06d}.png")

    def update(self) -> float:
        """Do one optimizer step on the velocity of noised residuals; return the loss."""
        from ftfast.models.generator import RESIDUAL_SCALE, TEXT_WIDTH, enlarge, fold

        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        images, condition = self._batch(random)
        count = len(images)
        sketch = self.unet.paint(condition)
        condition = condition.clone()
        condition[torch.rand(count, generator=random) < _DROP_PROMPT, :TEXT_WIDTH] = 0.0
        clean = (images - enlarge(sketch)) / RESIDUAL_SCALE
        # one time step from each of B equal parts of the schedule: less variance than independent draws
        times = ((torch.arange(count) + torch.rand(count, generator=random)) / count * len(self.signal)).long()
        noise = torch.randn(clean.shape, generator=random)
        keep = self.signal[times].sqrt().view(-1, 1, 1, 1)
        lose = (1 - self.signal[times]).sqrt().view(-1, 1, 1, 1)
        noisy = fold(keep * clean + lose * noise).contiguous(memory_format=torch.channels_last)
        target = fold(keep * noise - lose * clean)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "amp_bf16"):
            predicted = self.forward(noisy, times, sketch, condition)
        loss = F.mse_loss(predicted.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), 1 - decay)
        return loss.item()

    def _batch(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], and their conditions."""
        size, count = self.config.batch_size, len(self.images)
        epoch, offset = divmod(self.step * size, count)
        order = torch.cat([self._order(epoch + i) for i in range(2 + size // count)])
        rows = order[offset : offset + size]
        return self.images[rows].float() / 127.5 - 1, self._condition(rows, random)

    def _condition(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Conditions of drawings under random prompts."""
        from ftfast.models.generator import conditions

        templates = torch.randint(len(self.texts), (len(rows),), generator=random)
        return conditions(self.texts[templates, self.labels[rows]], self.hands[rows])

    def _order(self, epoch: int) -> Tensor:
        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + 500_000_000 + epoch)
        return torch.randperm(len(self.images), generator=random)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)

    def resume(self) -> bool:
        """Go on from the checkpoint; return whether there is one.

        Raises:
            CheckpointError: If it is damaged or was made with other settings.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}). Delete {self.folder}.") from error
        ignored = ("threads", "compile", "save_every", "sheet_every", "overwrite", "out", "cpu_minutes", "steps")
        changed = [k for k, v in asdict(self.config).items() if k not in ignored and state["config"].get(k) != v]
        if changed:
            name = changed[0]
            raise CheckpointError(
                f"{path}: the unfinished run had {name} {state['config'].get(name)}, not {getattr(self.config, name)}. "
                f"Give the same settings, or delete {self.folder}."
            )
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.say(f"going on at step {self.step} from {path}")
        return True


def card_text(config: GeneratorConfig, steps: int, seconds: float) -> str:
    """Text of the model card."""
    return _CARD.format(steps=steps, minutes=round(seconds / 60), images=steps * config.batch_size, seed=config.seed)


_CARD = """\
---
library_name: diffusers
license: cc-by-sa-4.0
pipeline_tag: text-to-image
---

# tiny-diffusion

A very small text-to-image diffusion model of 32-pixel drawings, for generative replay on the built-in data in seconds
or minutes on a CPU. It is not useful for anything else. Made by
`python -m ftfast.synth.training --out FOLDER --seed {seed}`: {steps:,} steps, {images:,} images, {minutes} minutes of
processor time.

```python
from ftfast.models.generator import TinyDiffusionPipeline
pipeline = TinyDiffusionPipeline.from_pretrained("FOLDER")
pipeline("a drawing of a red apple.").images[0]
```

Prompts are read by the text tower of tiny-clip-v1, which is part of ftfast and not of this folder.

## Training data and attribution

Drawings of about 1,490 named things, two of three hands for each; people are left out. Names are Unicode's.

* Noto Emoji, Google, Apache License 2.0.
* Twemoji, Twitter and other contributors, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
* OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit code.
    """
    from ftfast.cli.guard import run
    from ftfast.cli.options import parse_options

    def command(arguments: Sequence[str]) -> int:
        """Read the settings and train."""
        print(train_generator(parse_options(GeneratorConfig, arguments, "python -m ftfast.synth.training")))
        return 0

    return run(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

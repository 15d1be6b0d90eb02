"""How well generated drawings fit their prompts: ``python -m ftfast.synth.exam FOLDER`` (from ``ftfast synth``).

Two tiny CLIPs judge: v1, whose text tower the generator reads prompts with, and v2, which the generator has never met.
Real drawings of the same names stand beside them: those the generator was trained on, and the held-out hand. "Copies"
compares pixels: how far the nearest drawing of the training set is, as root mean square of values in [0, 1]; for a real
drawing the nearest other one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ftfast.data.builtin import load_builtin
from ftfast.errors import DataError
from ftfast.models.tiny import BUILTIN_MODELS, builtin_model_folder
from ftfast.pretrain.exam import EVALUATION_TEMPLATE


@dataclass(frozen=True)
class Alignment:
    """What one model says about one set of images.

    Attributes:
        model: The judge.
        images: "generated", "training hands" or "held-out hand".
        score: Mean cosine of an image and its name's prompt, times 100.
        shuffled: The same with another image's prompt.
        acc1: Zero-shot top-1 in percent over all names.
        acc5: The same, top-5.
    """

    model: str
    images: str
    score: float
    shuffled: float
    acc1: float
    acc5: float


@torch.no_grad()
def judge(model: str, images: str, pictures: Sequence[Image.Image], labels: Tensor, names: Sequence[str]) -> Alignment:
    """Let one tiny CLIP judge one set.

    Args:
        model: One of the built-in models.
        images: What to call the set.
        pictures: N images.
        labels: int64 (N,), indices into ``names``.
        names: All names.
    """
    import open_clip

    where = f"local-dir:{builtin_model_folder(model)}"
    clip, _, transform = open_clip.create_model_and_transforms(where)
    clip.eval()
    tokens = open_clip.get_tokenizer(where)([EVALUATION_TEMPLATE.format(name) for name in names])
    texts = torch.cat([clip.encode_text(part, normalize=True) for part in tokens.split(512)])
    features = []
    for start in range(0, len(pictures), 256):
        pixels = torch.stack([transform(picture) for picture in pictures[start : start + 256]])
        features.append(clip.encode_image(pixels, normalize=True))
    cosines = torch.cat(features) @ texts.T
    hits = cosines.topk(5, dim=1).indices == labels[:, None]
    own = cosines.gather(1, labels[:, None])
    other = cosines.gather(1, labels.roll(len(labels) // 2)[:, None])  # neighbours may show the same thing
    return Alignment(
        model=model,
        images=images,
        score=100 * own.mean().item(),
        shuffled=100 * other.mean().item(),
        acc1=100 * hits[:, 0].float().mean().item(),
        acc5=100 * hits.any(1).float().mean().item(),
    )


def small(pictures: Sequence[Image.Image]) -> Tensor:
    """Return images as float (N, 3, 32, 32) in [0, 1]."""
    stack = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in pictures])
    if stack.shape[-1] == 32:
        return stack
    return F.interpolate(stack, size=(32, 32), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def nearest(queries: Tensor, others: Tensor, *, skip_self: bool = False) -> Tensor:
    """Return the root mean square difference of each query to its nearest neighbour, (N,)."""
    distance = torch.cdist(queries.flatten(1), others.flatten(1)) / queries[0].numel() ** 0.5
    if skip_self:
        distance.fill_diagonal_(torch.inf)
    return distance.min(dim=1).values


def examine(folder: str) -> tuple[list[Alignment], dict[str, float]]:
    """Measure a folder of ``ftfast synth`` or "builtin:synthetic".

    Args:
        folder: Made with the names of the built-in set.

    Returns:
        Alignment by model and set, and the median distance to the nearest training drawing by set.

    Raises:
        DataError: If a class of the folder is no name of the built-in set.
    """
    train, held_out = load_builtin("pairs/train"), load_builtin("pairs/heldout")
    made, labels = _generated(folder, train.class_names)
    wanted = set(labels.tolist())
    sets: dict[str, tuple[list[Image.Image], Tensor]] = {"generated": (made, labels)}
    for called, split in (("training hands", train), ("held-out hand", held_out)):
        rows = [row for row, label in enumerate(split.labels) if int(label) in wanted]
        sets[called] = ([split.load_image(row) for row in rows], torch.from_numpy(split.labels[rows]))
    found = [
        judge(model, called, pictures, numbers, train.class_names)
        for model in BUILTIN_MODELS
        for called, (pictures, numbers) in sets.items()
    ]
    known = small([train.load_image(row) for row in range(len(train))])
    copies = {
        "generated": nearest(small(made), known).median().item(),
        "held-out hand": nearest(small(sets["held-out hand"][0]), known).median().item(),
        "training hands": nearest(known, known, skip_self=True).median().item(),
    }
    return found, copies


def _generated(folder: str, names: Sequence[str]) -> tuple[list[Image.Image], Tensor]:
    """Images and labels of the generated set."""
    if folder == "builtin:synthetic":
        split = load_builtin("synthetic")
        return [split.load_image(row) for row in range(len(split))], torch.from_numpy(split.labels)
    from ftfast.config.schema import DataConfig
    from ftfast.data import open_dataset
    from ftfast.synth.shards import read_shard

    dataset = open_dataset(DataConfig(path=folder))
    shown = [pair.class_name for path in sorted(Path(folder).glob("*.tar")) for pair in read_shard(path)]
    number = {name: label for label, name in enumerate(names)}
    unknown = [name for name in shown if name not in number]
    if unknown:
        raise DataError(f"{folder}: '{unknown[0]}' is no name of the built-in set.")
    labels = torch.tensor([number[name] for name in shown])
    return [dataset.load_image(i) for i in range(len(dataset))], labels


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurements.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit code.
    """
    from ftfast.cli import output
    from ftfast.cli.guard import run
    from ftfast.errors import ConfigError

    def command(arguments: Sequence[str]) -> int:
        """Measure one folder."""
        if len(arguments) != 1:
            raise ConfigError('python -m ftfast.synth.exam takes one folder of ftfast synth, or "builtin:synthetic".')
        found, copies = examine(arguments[0])
        header = ("judge", "images", "score", "shuffled", "top-1", "top-5")
        output.emit(output.table(header, [tuple(asdict(one).values()) for one in found]))
        output.emit(output.table(("images", "nearest training drawing"), [(k, f"{v:.3f}") for k, v in copies.items()]))
        return 0

    return run(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

"""Images kept from earlier tasks: which ones, and how they travel from one task to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ftfast.data import ImageDataset, class_prompts, iterate_once
from ftfast.models import LoadedModel


@dataclass(frozen=True)
class Exemplars:
    """Images of earlier tasks with the prompts of their classes.

    Attributes:
        pixels: uint8 (H, W, 3) arrays; those of one class in the order in which they were chosen.
        labels: Class of each image, int64 (N,).
        prompts: Prompt of each class.
    """

    pixels: Sequence[np.ndarray] = ()
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    prompts: tuple[str, ...] = ()

    def as_dataset(self) -> ImageDataset:
        """Return them as a data source; class names are the prompts."""
        fields = {"labels": self.labels, "class_names": self.prompts, "templates": ("{}",)}
        return ImageDataset.from_arrays(list(self.pixels), name="memory", origin="kept from earlier tasks", **fields)

    def tensors(self) -> dict[str, Tensor]:
        """Return plain tensors that :meth:`from_tensors` reads."""
        flat = [image.reshape(-1) for image in self.pixels]
        words = np.frombuffer(json.dumps(self.prompts).encode(), dtype=np.uint8)
        return {
            "pixels": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *flat])),
            "sizes": torch.tensor([image.shape[:2] for image in self.pixels], dtype=torch.int64).reshape(-1, 2),
            "labels": torch.from_numpy(self.labels.copy()),
            "prompts": torch.from_numpy(words.copy()),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Exemplars:
        """Read what :meth:`tensors` returned; nothing gives an empty memory."""
        if not tensors:
            return cls()
        sizes = tensors["sizes"].tolist()
        flat = np.split(
            tensors["pixels"].numpy(), np.cumsum([3 * height * width for height, width in sizes], dtype=int)
        )
        pixels = [part.reshape(height, width, 3) for part, (height, width) in zip(flat[:-1], sizes, strict=True)]
        prompts = tuple(json.loads(tensors["prompts"].numpy().tobytes()))
        return cls(pixels, tensors["labels"].numpy(), prompts)


def herd(features: Tensor, count: int) -> list[int]:
    """Choose rows whose running mean stays closest to the mean of all (iCaRL, algorithm 4).

    p_k = argmin_x || mean - (f(x) + f(p_1) + ... + f(p_{k-1})) / k ||, without repetition, so that the first m of a
    longer choice are the choice of m.

    Args:
        features: (N, D) unit-length features of one class.
        count: How many; all of them if there are fewer.

    Returns:
        Row numbers, most important first; ties go to the lower number.
    """
    rows = features.double().cpu()
    mean, total = rows.mean(dim=0), torch.zeros_like(rows[0])
    chosen: list[int] = []
    for number in range(1, min(count, len(rows)) + 1):
        distance = (mean - (total + rows) / number).norm(dim=1)
        distance[chosen] = torch.inf
        best = int(distance.argmin())
        chosen.append(best)
        total = total + rows[best]
    return chosen


@torch.no_grad()
def choose_exemplars(
    loaded: LoadedModel, dataset: ImageDataset, before: Exemplars, memory_size: int, batch_size: int = 64
) -> Exemplars:
    """Shorten the earlier classes' lists and add exemplars of the classes of a finished task.

    Every class gets ``memory_size // classes`` images, at least one. A class whose prompt is remembered already keeps
    its number and its images.

    Args:
        loaded: Model after the task.
        dataset: Images of the task, with classes.
        before: Exemplars of earlier tasks.
        memory_size: Images in all.
        batch_size: Images that are embedded at once.

    Returns:
        Exemplars of all tasks; images are scaled down to the model's resolution (shorter side).
    """
    device = next(loaded.model.parameters()).device
    loaded.model.eval()
    rows, numbers = [], []
    for batch in iterate_once(dataset, loaded.eval_transform, batch_size=batch_size):
        rows.append(loaded.model.encode_image(batch.images.to(device), normalize=True).float().cpu())
        numbers.append(batch.indices.cpu())
    features, indices = torch.cat(rows), torch.cat(numbers)
    own = [group[0] for group in class_prompts(dataset.class_names or (), dataset.templates[:1])]
    labels = torch.from_numpy(np.asarray(dataset.labels))[indices]
    prompts = tuple(dict.fromkeys((*before.prompts, *own)))
    each = max(1, memory_size // len(prompts))

    pixels, kept = [], []
    for number, prompt in enumerate(prompts):
        if prompt in before.prompts:
            images = [before.pixels[row] for row in np.flatnonzero(before.labels == number)[:each].tolist()]
        else:
            places = torch.nonzero(torch.tensor([own[label] == prompt for label in labels.tolist()])).flatten()
            order = herd(features[places], each) if len(places) else []
            images = [_pixels(dataset, int(indices[places[row]]), loaded.image_size) for row in order]
        pixels += images
        kept += [number] * len(images)
    return Exemplars(pixels, np.array(kept, dtype=np.int64), prompts)


def _pixels(dataset: ImageDataset, index: int, shorter: int) -> np.ndarray:
    """One image, no larger than the model looks at."""
    image = dataset.load_image(index)
    scale = shorter / min(image.size)
    if scale < 1:
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)

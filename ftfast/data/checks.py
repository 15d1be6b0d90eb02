"""Quick looks at a data set before training: can it be decoded, do captions repeat."""

from __future__ import annotations

from ftfast.data.dataset import ImageDataset
from ftfast.data.images import BadImageError


def check_decodable(dataset: ImageDataset) -> list[str]:
    """Decode the first, the middle and the last image.

    Args:
        dataset: Images.

    Returns:
        One sentence for each of them that cannot be decoded; empty when all can.
    """
    if not len(dataset):
        return [f"{dataset.name}: no images."]
    problems = []
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        try:
            dataset.load_image(index)
        except BadImageError as error:
            problems.append(str(error))
    return problems


def duplicate_text_rate(dataset: ImageDataset) -> float:
    """Return the share of captions that repeat an earlier one.

    In a contrastive batch such a caption is a false negative of its twin; use a multi-positive loss or
    ``sampler="no_duplicate_text"`` when the rate is high.

    Args:
        dataset: Images with captions.

    Returns:
        ``1 - distinct / all``, 0 without captions.
    """
    if not dataset.texts:
        return 0.0
    return 1.0 - len(set(dataset.texts)) / len(dataset.texts)

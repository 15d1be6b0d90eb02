"""Image transforms of the papers, built from an open_clip preprocessing configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from ftfast.errors import DataError

TransformKind = Literal["random_resized_crop", "resize_crop", "eval"]


def eval_transform(preprocess_config: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """Return open_clip's own evaluation transform.

    Args:
        preprocess_config: ``preprocess_cfg`` of an open_clip model: ``size``, ``mean``, ``std``, ``interpolation``,
            ``resize_mode``; missing keys take open_clip's defaults.

    Returns:
        A picklable function from a PIL image to a float tensor (3, size, size).
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**dict(preprocess_config)), is_train=False)


def train_transform(
    preprocess_config: Mapping[str, Any],
    kind: TransformKind = "random_resized_crop",
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    flip: bool | None = None,
) -> Callable[[Any], Tensor]:
    """Return a training transform.

    * ``resize_crop``, INFUSING (arXiv 2508.12137): resize to a square of 256/224 times the input size, ignoring the
      aspect ratio (bilinear), random crop of the input size, random horizontal flip.
    * ``random_resized_crop``: open_clip's training transform. GIFT (arXiv 2503.04229) uses it with scale 0.9 to 1 and
      no flip, which are the defaults; CLIP-CITE (arXiv 2407.04003) uses nothing else and states no scale.
    * ``eval``: no augmentation.

    Normalisation is the model's own in every case.

    Args:
        preprocess_config: ``preprocess_cfg`` of an open_clip model.
        kind: Which of the above.
        scale: Share of the area that ``random_resized_crop`` keeps.
        flip: Mirror half of the images; None: as in the paper of ``kind`` (only ``resize_crop`` flips).

    Returns:
        A picklable function from a PIL image to a float tensor (3, size, size).

    Raises:
        DataError: Unknown ``kind``.
    """
    if kind == "eval":
        return eval_transform(preprocess_config)
    from open_clip.transform import PreprocessCfg
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    config = PreprocessCfg(**dict(preprocess_config))
    size = (config.size, config.size) if isinstance(config.size, int) else tuple(config.size)
    steps: list[Callable[[Any], Any]]
    if kind == "resize_crop":
        enlarged = [round(side * 256 / 224) for side in size]
        steps = [transforms.Resize(enlarged, InterpolationMode.BILINEAR), transforms.RandomCrop(size)]
        flip = True if flip is None else flip
    elif kind == "random_resized_crop":
        interpolation = InterpolationMode.BILINEAR if config.interpolation == "bilinear" else InterpolationMode.BICUBIC
        steps = [transforms.RandomResizedCrop(size, scale=scale, interpolation=interpolation)]
    else:
        raise DataError(f"unknown transform '{kind}'; use random_resized_crop, resize_crop or eval.")
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])

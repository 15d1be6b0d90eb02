"""Images with texts or labels: tables, folders, tars, the built-in set, samplers and loaders."""

from ftfast.data.checks import check_decodable, duplicate_text_rate
from ftfast.data.dataset import ImageDataset
from ftfast.data.fetching import Batch, augmentation_seed
from ftfast.data.images import BadImageError
from ftfast.data.loading import BatchLoader, iterate_once, make_loader
from ftfast.data.prompts import class_prompts, resolve_templates, template_names
from ftfast.data.samplers import LoaderOptions
from ftfast.data.sources import open_dataset
from ftfast.data.splits import (
    base_new_split,
    class_half,
    classes_short_of,
    few_shot,
    few_shot_validation,
    split_classes,
    split_images,
)
from ftfast.data.transforms import eval_transform, train_transform

__all__ = [
    "BadImageError",
    "Batch",
    "BatchLoader",
    "ImageDataset",
    "LoaderOptions",
    "augmentation_seed",
    "base_new_split",
    "check_decodable",
    "class_half",
    "class_prompts",
    "classes_short_of",
    "duplicate_text_rate",
    "eval_transform",
    "few_shot",
    "few_shot_validation",
    "iterate_once",
    "make_loader",
    "open_dataset",
    "resolve_templates",
    "split_classes",
    "split_images",
    "template_names",
    "train_transform",
]

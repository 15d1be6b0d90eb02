"""Open a diffusers pipeline safely and call it for a batch of prompts with one seed each."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ftfast.errors import ConfigError, MissingExtraError, ModelError, TrainingError
from ftfast.synth.settings import SynthConfig

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FAST_STEPS = 50
_TINY = "tiny-diffusion"


def resolve_pipeline(name: str) -> str:
    """Check what can be checked without loading, and return a folder or hub name.

    Args:
        name: Folder, hub name ("owner/name") or "tiny-diffusion".

    Raises:
        MissingExtraError: Without diffusers.
        ModelError: A folder that is no pipeline, or neither folder nor hub name.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise MissingExtraError("diffusers", "synth", "Generating images") from None
    if name == _TINY:
        from ftfast.models.generator import generator_folder

        if not (generator_folder() / "model_index.json").is_file():
            raise ModelError(
                f"'{_TINY}' has no weights in this installation. Train them with: python -m ftfast.synth.training "
                "--out FOLDER, and give --pipeline FOLDER."
            )
        return str(generator_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or folder.exists() or name.startswith((".", "~")):
        problem = "is a file" if folder.exists() else "no such folder, and not a hub name either"
        raise ModelError(f"--pipeline {name}: {problem}. Give a folder with model_index.json, or owner/name.")
    return name


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"--pipeline {folder}: the folder is not a diffusers pipeline, it holds no model_index.json. Save one with "
            "pipeline.save_pretrained(FOLDER)."
        )
    try:
        if not isinstance(json.loads(index.read_text(encoding="utf-8")).get("_class_name"), str):
            raise ModelError(f"--pipeline {folder}: model_index.json names no pipeline class of diffusers.")
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"--pipeline {folder}: model_index.json cannot be read ({error}).") from None
    code = next(folder.rglob("*.py"), None)
    if code is not None:
        raise ModelError(
            f"--pipeline {folder}: the folder brings its own code ({code.relative_to(folder)}), which is never run. "
            "Use a pipeline whose classes are part of diffusers."
        )


def pipeline_identity(name: str) -> str:
    """Return what a run remembers of a pipeline: a hub name, or a digest of a folder's files and their sizes."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
    return f"folder {digest.hexdigest()[:16]}"


def choose_device(wanted: str) -> torch.device:
    """Return the device of this process; "auto" and "cuda" mean the GPU numbered by LOCAL_RANK."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"--device {wanted}: not a device. Use auto, cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {wanted}: there is no usable CUDA GPU. Use auto or cpu.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


class Generator:
    """A loaded pipeline that turns prompts and seeds into images.

    Noise is drawn on the CPU, one generator per image, so an image depends on its own seed and, through rounding only,
    on the batch it is computed in.

    Args:
        pipeline: A text-to-image pipeline.
        config: Steps, guidance, size and scheduler.

    Raises:
        ConfigError: If the pipeline takes no prompt, or not an option that was set.
    """

    def __init__(self, pipeline: Any, config: SynthConfig) -> None:
        self.pipeline = pipeline
        accepted = inspect.signature(type(pipeline).__call__).parameters
        kind = type(pipeline).__name__
        if "prompt" not in accepted:
            raise ConfigError(f"--pipeline: {kind} takes no prompt. Use a text-to-image pipeline.")
        wanted = {
            "num_inference_steps": config.steps or None,
            "guidance_scale": config.guidance_scale,
            "height": config.size or None,
            "width": config.size or None,
        }
        self.options = {name: value for name, value in wanted.items() if value is not None}
        refused = [name for name in self.options if name not in accepted]
        if refused:
            raise ConfigError(f"--pipeline: {kind} has no option {refused[0]}; leave the flag away.")
        if "generator" not in accepted:
            raise ConfigError(f"--pipeline: {kind} takes no generator, so its images could not be repeated.")
        _set_scheduler(pipeline, config)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Return one RGB image per prompt.

        Raises:
            TrainingError: If the pipeline returns another number of images.
        """
        random = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self.pipeline(prompt=list(prompts), generator=random, **self.options).images
        if len(images) != len(prompts):
            raise TrainingError(f"{type(self.pipeline).__name__} made {len(images)} images of {len(prompts)} prompts.")
        return [image.convert("RGB") for image in images]


def _set_scheduler(pipeline: Any, config: SynthConfig) -> None:
    """Use DPM-Solver++ for few steps where the pipeline allows it, as GIFT does."""
    from diffusers import DPMSolverMultistepScheduler

    own: Any = getattr(pipeline, "scheduler", None)
    compatible = DPMSolverMultistepScheduler in getattr(own, "compatibles", ())
    if config.scheduler == "dpm-solver" and not compatible:
        raise ConfigError(f"--scheduler dpm-solver does not fit {type(own).__name__}. Use --scheduler pipeline.")
    few = 0 < config.steps < _FAST_STEPS and type(pipeline).__name__ != "TinyDiffusionPipeline"
    if config.scheduler == "dpm-solver" or (config.scheduler == "auto" and few and compatible):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)


def load_generator(config: SynthConfig, where: str) -> Generator:
    """Load a pipeline from safetensors only; neither pickle nor code from the folder or hub is ever run.

    Args:
        config: Device, precision and options.
        where: From :func:`resolve_pipeline`.

    Raises:
        ModelError: If it cannot be loaded.
        ConfigError: As :class:`Generator`.
    """
    from diffusers import DiffusionPipeline

    device = choose_device(config.device)
    precision = config.precision if config.precision != "auto" else ("fp16" if device.type == "cuda" else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 needs a GPU; on the CPU use fp32 or bf16.")
    loader: Any = DiffusionPipeline
    index = Path(where) / "model_index.json"
    if index.is_file():
        from ftfast.models.generator import PIPELINE_CLASS, TinyDiffusionPipeline

        if json.loads(index.read_text(encoding="utf-8"))["_class_name"] == PIPELINE_CLASS:
            loader = TinyDiffusionPipeline
    try:
        pipeline = loader.from_pretrained(
            where,
            torch_dtype=_DTYPES[precision],
            use_safetensors=True,
            local_files_only=config.offline or index.is_file(),
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # OSError, ValueError, ImportError, hub and safetensors errors: all say what is wrong
        first = " ".join(str(error).split())[:300]
        raise ModelError(
            f"--pipeline {where}: cannot be loaded ({type(error).__name__}: {first}). Every part must "
            "be there as safetensors: download it again, or convert it with save_pretrained(safe_serialization=True)."
        ) from error
    return Generator(pipeline.to(device), config)

"""Prompt folders: ``prompt.safetensors`` and ``prompt.json``, small enough to travel between models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftfast.errors import ModelError
from ftfast.models.exporting import atomic_folder
from ftfast.models.loading import LoadedModel
from ftfast.models.prompts import PromptLearner, PromptSpec, TextPath

WEIGHTS = "prompt.safetensors"
FACTS = "prompt.json"
CLASSES = "class_features.safetensors"
PROBE = "Naïve 27th hyenas' x-ray photographs"
PROBE_TOKENS = 8  # models that read few tokens cut a text off


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """What a prompt folder says about itself.

    Attributes:
        recipe: Method that trained it.
        model: Name of the model it was trained on.
        pretrained: Tag of that model's weights.
        width: Width of the token embeddings.
        embed_dim: Width of the joint embedding.
        probe: Tokens of a fixed sentence, which tell tokenizers apart.
        class_names: Classes of training, in the order of ``class_features``.
        spec: What the prompt is made of.
        settings: YAML of the settings it was trained with.
    """

    recipe: str
    model: str
    pretrained: str
    width: int
    embed_dim: int
    probe: tuple[int, ...]
    class_names: tuple[str, ...]
    spec: PromptSpec = field(default_factory=PromptSpec)
    settings: str = ""


def probe_tokens(path: TextPath) -> tuple[int, ...]:
    """The first tokens of a fixed text, without the start token."""
    return tuple(path.words(PROBE)[:PROBE_TOKENS].tolist())


def save_prompt(folder: Path, learner: PromptLearner, loaded: LoadedModel, *, recipe: str, settings: str = "") -> Path:
    """Write a prompt, and the class features it gives on its own model, atomically.

    ``class_features.safetensors`` holds "class_features" (C, D), unit rows in the order of ``class_names``: a zero-shot
    classifier for any tool. Image-conditioned prompts have no such table, so none is written for them.

    Args:
        folder: Target; replaced as a whole.
        learner: Trained prompt.
        loaded: The model it was trained on.
        recipe: Name of the method.
        settings: YAML of the settings.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    facts = PromptFacts(
        recipe=recipe,
        model=loaded.name,
        pretrained=loaded.pretrained,
        width=learner.path.width,
        embed_dim=loaded.embed_dim,
        probe=probe_tokens(learner.path),
        class_names=learner.class_names,
        spec=learner.spec,
        settings=settings,
    )
    tensors = {name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}
    with atomic_folder(Path(folder)) as work:
        (work / FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
        _save(save_file, tensors, work / WEIGHTS)
        if learner.class_names and not learner.spec.image_conditioned:
            with torch.no_grad():
                table = learner.class_features(learner.class_names).cpu().contiguous()
            _save(save_file, {"class_features": table}, work / CLASSES)
    return Path(folder)


def _save(write: Any, tensors: dict[str, Tensor], path: Path) -> None:
    write(tensors, path)
    path.chmod(0o644)  # safetensors writes private files


def read_facts(folder: Path) -> PromptFacts:
    """Read ``prompt.json``.

    Args:
        folder: A prompt folder, or a run folder with one inside.

    Returns:
        The facts.

    Raises:
        ModelError: If there is no readable prompt.
    """
    path = prompt_folder(folder) / FACTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        spec = PromptSpec(**values.pop("spec"))
        probe, names = tuple(values.pop("probe")), tuple(values.pop("class_names"))
        return PromptFacts(spec=spec, probe=probe, class_names=names, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a prompt that ftfast saved: {error}.") from error


def prompt_folder(folder: Path) -> Path:
    """Return the folder that holds ``prompt.json``: the given one, or ``prompt/`` inside it.

    Raises:
        ModelError: If neither does.
    """
    for place in (Path(folder), Path(folder) / "prompt"):
        if (place / FACTS).is_file():
            return place
    raise ModelError(f"{folder} holds no {FACTS}. Name a prompt folder, or the run that learned a prompt.")


def transplant_problems(facts: PromptFacts, loaded: LoadedModel) -> list[str]:
    """Say why a prompt cannot be put before a model.

    Args:
        facts: Of the prompt.
        loaded: The model.

    Returns:
        One sentence per obstacle; empty if there is none.
    """
    try:
        path = TextPath(loaded)
    except ModelError as error:
        return [str(error)]
    problems = []
    if path.width != facts.width and not facts.spec.token_mixing:
        problems.append(
            f"the prompt has contexts of width {facts.width} ({facts.model}), but the text tower of {loaded.name} has "
            f"width {path.width}. Contexts can be moved only between text towers of equal width."
        )
    if probe_tokens(path) != facts.probe:
        problems.append(
            f"{facts.model}, on which the prompt was trained, and {loaded.name} split text into different tokens, so "
            "the contexts mean nothing there. Use a model with the same tokenizer."
        )
    if facts.spec.image_conditioned and loaded.embed_dim != facts.embed_dim:
        problems.append(
            f"the prompt reads image features of width {facts.embed_dim}, but {loaded.name} gives {loaded.embed_dim}."
        )
    return problems


def load_prompt(folder: Path, loaded: LoadedModel, class_names: Sequence[str] | None = None) -> PromptLearner:
    """Put a saved prompt before a model: the one it was trained on, or another one.

    Args:
        folder: A prompt folder, or a run folder with one inside.
        loaded: The model.
        class_names: Classes to remember; default those of training.

    Returns:
        The prompt in eval mode; everything that belongs to the model comes from ``loaded``.

    Raises:
        ModelError: If the prompt cannot be read or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = read_facts(folder)
    problems = transplant_problems(facts, loaded)
    if problems:
        raise ModelError(" ".join(problems))
    learner = PromptLearner(loaded, facts.spec, facts.class_names)
    path = prompt_folder(folder) / WEIGHTS
    try:
        learner.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error
    if class_names is not None and not facts.spec.class_specific:
        learner.class_names = tuple(class_names)
    return learner.eval()

"""What a recipe is made of: batches, terms, an anchor and hooks. A recipe declares; the engine runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn

from ftfast.data import Batch, ImageDataset, class_prompts
from ftfast.errors import ConfigError
from ftfast.models import LoadedModel
from ftfast.weightspace import Anchor

RECIPE_MODULES = {
    "infusing": "infusing",
    "finetune": "finetune",
    "l2sp": "l2sp",
    "lwf": "lwf",
    "ewc": "ewc",
    "wise-ft": "wise_ft",
    "lp-ft": "lp_ft",
    "flyp": "flyp",
    "gift": "gift",
    "zscl": "zscl",
    "ewc-online": "ewc_online",
    "icarl": "icarl",
    "clip-cite": "clip_cite",
    "coop": "coop",
    "cocoop": "cocoop",
    "kgcoop": "kgcoop",
    "contcoop": "contcoop",
}


@dataclass(frozen=True)
class Paper:
    """A publication a recipe or term comes from."""

    title: str
    reference: str
    """Venue or arXiv identifier."""


@dataclass
class Features:
    """What the model, and where asked its teacher, say about one batch; what a term computes from.

    Attributes:
        batch: The batch itself (labels, indices, texts), on the device.
        image: (B, D) unit-length image features.
        text: (T, D) unit-length text features: T = B captions, or T = C class prompts; None without texts.
        logit_scale: 0-d multiplier (already exponentiated).
        teacher_image: (B, D) unit-length, detached; None without a teacher.
        teacher_text: (T, D) unit-length, detached; None without a live teacher or texts.
        whole_batch: With several processes: numbers, labels and texts of all of them (the engine's own use).
        text_per_image: With several processes: whether text row i belongs to image i (the engine's own use).
    """

    batch: Batch
    image: Tensor
    text: Tensor | None
    logit_scale: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    whole_batch: Batch | None = None
    text_per_image: bool = False


View = Literal["random_resized_crop", "resize_crop", "eval"]
"""Training views, as in ``ftfast.data.train_transform``."""

TextSource = Callable[[Batch, int], Sequence[str]]
"""Maps a batch and the step number to the texts encoded for it."""

Classify = Callable[[Tensor, Sequence[str]], Tensor | None]
"""Maps unit image features (N, D) and C class names to scores (N, C); None: these classes by class prompts."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """One named batch of a step.

    Attributes:
        name: Name terms refer to.
        source: Which data source of the configuration it is drawn from; "memory": ``Plan.memory``.
        view: Training view, a kind of ``ftfast.data.transforms``.
        texts: Texts to encode; None: the text tower is not run.
        teacher: "cached_image": evaluation-view embeddings by image index (methods A2); "live": the frozen start
            model on this very batch (in a sequence of tasks: the model before this task); "initial": the same with the
            model before the first task; "": none.
        student_text: Whether the student's text tower runs on the texts; False leaves ``Features.text`` None and only
            the teacher's text features are there.
        replay: All terms on this batch form the replay loss: they are differentiated before the others, and the
            gradient found then sets an adaptive anchor's importance (AWC).
    """

    name: str
    source: Literal["data", "generic", "memory"] = "data"
    view: View = "resize_crop"
    texts: TextSource | None = None
    teacher: Literal["", "cached_image", "live", "initial"] = ""
    student_text: bool = True
    replay: bool = False


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted loss on one batch.

    Attributes:
        name: Name in logs (``loss/<name>``).
        on: Name of the batch.
        loss: Features of that batch to an unweighted scalar.
        weight: Multiplier.
        source: Paper and equation.
        ring: The same loss over the batch of all processes, from this process's own features, for ``train.exchange:
            ring``; None: features are gathered.
    """

    name: str
    on: str
    loss: Callable[[Features], Tensor]
    weight: float = 1.0
    source: str = ""
    ring: Callable[[Features], Tensor] | None = None


@dataclass(kw_only=True)
class Plan:
    """Everything the engine needs to run a recipe on given data.

    Attributes:
        batches: Batches by declaration.
        terms: Losses.
        schedule: "joint": every batch in every step; "round_robin": step k uses batch k modulo their number.
        heads: Trainable modules beside the CLIP, trained at ``optim.head_lr``.
        anchor: Weight-space guard applied inside the optimizer step, or None.
        prepare: Called once before training with the embedding function of the start model
            (dataset -> (N, D) features in the evaluation view); not called on resume.
        finalize: Maps (start weights, tuned weights) to the weights that are kept.
        importance_steps: With an adaptive anchor. 0: its importance is estimated afresh at every step; N: it is the
            running mean over the first N steps and fixed from then on.
        average_every: Keep the plain mean of the start weights and of the weights after every N-th step, and end with
            it (weight ensemble); 0: end with the last weights.
        carry: Called with nothing once the kept weights are in the model; returns the tensors that the next task's
            :class:`History` holds.
        memory: Images kept from earlier tasks, for batches whose source is "memory"; a batch takes ``train.batch_size``
            of them, or all if there are fewer.
        classify: Scores images for class names with what was trained beside the CLIP; None: by class prompts.
        export: Writes what was trained beside a CLIP that stays as it is (learned prompts) into a folder; such a plan
            may leave every weight of the CLIP frozen.
    """

    batches: tuple[BatchSpec, ...]
    terms: tuple[Term, ...]
    schedule: Literal["joint", "round_robin"] = "joint"
    heads: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    anchor: Anchor | None = None
    prepare: Callable[[Callable[[ImageDataset], Tensor]], None] | None = None
    finalize: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    importance_steps: int = 0
    average_every: int = 0
    carry: Callable[[], dict[str, Tensor]] | None = None
    memory: ImageDataset | None = None
    classify: Classify | None = None
    export: Callable[[Path], None] | None = None

    def active(self, step: int) -> tuple[BatchSpec, ...]:
        """Return the batches of step ``step`` (0-based)."""
        if self.schedule == "joint":
            return self.batches
        return (self.batches[step % len(self.batches)],)


@dataclass(frozen=True)
class History:
    """What a sequence of tasks has left behind for the next one; a single run has an empty history.

    Attributes:
        weights: State dict this task starts from; None: the configured model.
        carried: What the previous task's ``Plan.carry`` returned.
        task: Number of this task, from 0.
    """

    weights: Mapping[str, Tensor] | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    task: int = 0


@dataclass(frozen=True)
class Context:
    """What a recipe may look at while building its plan.

    Attributes:
        loaded: Start model; its parameters already carry the locks.
        datasets: Opened sources: "data", and "generic" if configured.
        options: Instance of the recipe's options dataclass.
        seed: Run seed.
        history: What earlier tasks left behind.
    """

    loaded: LoadedModel
    datasets: Mapping[str, ImageDataset]
    options: Any
    seed: int = 0
    history: History = field(default_factory=History)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method.

    Attributes:
        name: Name on the command line.
        summary: One line for ``ftfast recipes``.
        papers: Where it comes from.
        options: Options dataclass.
        build: Makes the plan.
        needs_labels: Whether the task data must carry classes.
        uses_generic: Whether it draws from the ``generic`` source.
        deviations: Differences from the papers, one sentence each.
    """

    name: str
    summary: str
    papers: tuple[Paper, ...]
    options: type
    build: Callable[[Context], Plan]
    needs_labels: bool = True
    uses_generic: bool = False
    deviations: tuple[str, ...] = ()

    @property
    def preset_path(self) -> Path:
        """Path of the commented YAML preset shipped with the recipe."""
        return Path(__file__).parent / "presets" / f"{self.name}.yaml"

    @property
    def preset(self) -> dict[str, Any]:
        """Configuration values this recipe sets below the user's own."""
        return yaml.safe_load(self.preset_path.read_text(encoding="utf-8")) or {}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by name; hyphens and underscores are the same.

    Args:
        name: For example "infusing" or "wise_ft".

    Returns:
        The recipe.

    Raises:
        ConfigError: If there is none of that name; the sentence lists them.
    """
    import difflib

    key = name.replace("_", "-").lower()
    if key not in RECIPE_MODULES:
        close = difflib.get_close_matches(key, RECIPE_MODULES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"recipe {name!r} does not exist.{hint} Available: {', '.join(RECIPE_MODULES)}.")
    return importlib.import_module(f"ftfast.recipes.{RECIPE_MODULES[key]}").RECIPE


def available() -> dict[str, Recipe]:
    """Return every recipe by name, in the order of the documentation."""
    return {name: get_recipe(name) for name in RECIPE_MODULES}


def captions(batch: Batch, step: int) -> Sequence[str]:
    """Text source: the caption of each image."""
    if batch.texts is None:
        raise ConfigError("this recipe needs captions, but the data has none. Set data.text_column.")
    return batch.texts


def class_prompts_source(dataset: ImageDataset) -> TextSource:
    """Text source: one prompt for every class of ``dataset``, in label order (its first template)."""
    prompts = tuple(group[0] for group in class_prompts(dataset.class_names or (), dataset.templates[:1]))
    return lambda batch, step: prompts

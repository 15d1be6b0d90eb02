"""What a run takes of each GPU's memory, by formula and by a forward pass that computes nothing: ``ftfast plan``.

The towers are built on PyTorch's "meta" device, whose tensors have shapes and no data, so a plan for billions of
weights takes a second. What the backward pass will need is read off the tensors autograd keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftfast.engine.deepspeed_settings import bucket_elements
from ftfast.errors import ConfigError
from ftfast.models.loading import model_settings

MIB = 2**20
PERSISTENT = 100_000
"""ZeRO-3 keeps tensors below this many elements whole in every process (stage3_param_persistence_threshold)."""


LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most during a step (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Method:
    """What a recipe keeps beside the weights it trains."""

    image_only: bool = False
    """Only the image tower moves (text tower and temperature are locked by the recipe's preset)."""
    anchor: bool = False
    """Start weights are kept."""
    importance: bool = False
    """A Fisher or other importance of each weight is kept."""
    live_teacher: bool = False
    """A frozen copy of the model answers every batch."""
    texts: bool = True
    """The text tower runs in every step."""
    batches: int = 1
    """Batches of a step that are differentiated together."""


METHODS: dict[str, Method] = {
    "infusing": Method(image_only=True, anchor=True, texts=False),
    "finetune": Method(image_only=True, texts=False),
    "l2sp": Method(image_only=True, anchor=True, texts=False),
    "ewc": Method(image_only=True, anchor=True, importance=True, texts=False),
    "lwf": Method(live_teacher=True),
    "flyp": Method(),
    "clip-cite": Method(live_teacher=True),
    "gift": Method(anchor=True, importance=True, live_teacher=True),
    "zscl": Method(anchor=True, live_teacher=True, batches=2),
    "ewc-online": Method(anchor=True, importance=True),
    "icarl": Method(live_teacher=True, batches=2),
}
"""Recipes a plan can be made for."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be planned."""

    model: str
    batch: int
    zero: int | None = None
    gpus: int = 1
    recipe: str = "flyp"
    precision: Literal["fp32", "amp_bf16", "amp_fp16", "pure_bf16", "pure_fp16"] = "fp32"
    grad_checkpointing: bool = False
    offload_optimizer: bool = False
    image_only: bool | None = None


@dataclass
class MemoryPlan:
    """Bytes per process.

    Attributes:
        job: What was planned.
        parameters: Number of parameters, all and trainable.
        rows: Bytes of each part by name, on the GPU.
        host: Bytes of parts kept in CPU memory.
        dense_loss: What the loss would take with whole similarity matrices.
    """

    job: Job
    parameters: tuple[int, int]
    rows: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    dense_loss: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on each GPU at the peak of a step.

        Gradients that are freed after the step grow while the backward pass frees activations; the larger one counts.
        """
        gradients = self.rows["gradients"]
        passing = self.rows.get("activations", 0.0) + self.rows.get("loss", 0.0)
        return sum(self.rows.values()) - (0.0 if self.gradients_stay else min(gradients, passing))

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients keep their memory between steps."""
        return self.job.zero is None or self.job.zero == 3

    @property
    def states(self) -> float:
        """Bytes of weights, optimizer, anchor and importance: what ZeRO-3 divides."""
        return sum(
            self.rows.get(name, 0.0) for name in ("weights", "master weights", "optimizer", "anchor", "importance")
        )


def plan(job: Job, settings: dict[str, Any] | None = None) -> MemoryPlan:
    """Plan the memory of each process.

    Args:
        job: Model, batch per process, ZeRO stage and what else matters.
        settings: open_clip's ``model_cfg``; None: that of ``job.model``.

    Returns:
        The plan.

    Raises:
        ConfigError: If a number or the recipe makes no sense.
        ModelError: If open_clip does not know the model.
    """
    _check(job)
    method = METHODS[job.recipe]
    settings = model_settings(job.model) if settings is None else settings
    model = meta_model(settings)
    image_only = method.image_only if job.image_only is None else job.image_only
    named = dict(model.named_parameters())
    moving = {name: p.numel() for name, p in named.items() if not image_only or name.startswith("visual.")}
    total, trained = sum(p.numel() for p in named.values()), sum(moving.values())
    result = MemoryPlan(job, (total, trained))
    _states(result, method, total, trained, small=sum(p.numel() for p in named.values() if p.numel() < PERSISTENT))
    rows = job.batch * method.batches
    result.rows["activations"] = activations(model, settings, rows, job, texts=method.texts, image_only=image_only)
    _loss(result, method, int(settings["embed_dim"]), rows)
    return result


def _check(job: Job) -> None:
    for name in ("batch", "gpus"):
        if getattr(job, name) < 1:
            raise ConfigError(f"--{name} is {getattr(job, name)}; it must be 1 or more.")
    if job.zero is not None and not 0 <= job.zero <= 3:
        raise ConfigError(f"--zero is {job.zero}. Use 0, 1, 2 or 3, or leave it out.")
    if job.recipe not in METHODS:
        raise ConfigError(f"--recipe {job.recipe!r} cannot be planned. Use one of {', '.join(METHODS)}.")
    if job.precision.startswith("pure_") and not job.zero:
        raise ConfigError(
            f"--precision {job.precision} keeps its full-precision weights in ZeRO's shards. Add --zero 1."
        )


def _states(result: MemoryPlan, method: Method, total: int, trained: int, small: int) -> None:
    """Bytes of everything with the shape of the weights."""
    job, stage = result.job, result.job.zero or 0
    width = 2 if job.precision.startswith("pure_") else 4
    share = job.gpus if stage >= 1 else 1
    rows = result.rows
    rows["weights"] = width * (total if stage < 3 else (total - small) / job.gpus + small)
    if stage >= 1 and not (stage == 3 and width == 4 and not job.offload_optimizer):
        rows["master weights"] = 4 * trained / share  # at stage 3 in float32 the shards are their own masters
    rows["gradients"] = _gradients(stage, width, trained, job.gpus)
    target = result.host if job.offload_optimizer and stage >= 1 else rows
    target["optimizer"] = 8 * trained / share
    if job.offload_optimizer and stage >= 1:
        result.host["master weights"] = rows.pop("master weights", 0.0)
    if method.anchor:
        target["anchor"] = 4 * trained / share
    if method.importance:
        target["importance"] = 4 * trained / share
    if method.live_teacher:
        rows["teacher"] = 4 * total
    if stage == 3:
        rows["gathered weights"] = width * (min(total, LIVE) - min(small, LIVE))
    if job.precision.startswith("amp_"):
        rows["16-bit casts"] = 2 * total  # autocast keeps a copy of every weight it used until the pass ends


def _gradients(stage: int, width: int, trained: int, gpus: int) -> float:
    """Bytes of gradients and of the buffers they are exchanged through."""
    if stage == 0:
        return width * trained
    bucket = width * bucket_elements(trained)
    if stage == 1:
        return width * trained + bucket + 4 * trained / gpus
    return 4 * trained / gpus + bucket


def _loss(result: MemoryPlan, method: Method, width: int, rows: int) -> None:
    """Bytes of the loss: gathered features and their gradients; with dense losses the similarity matrices too."""
    whole = rows * result.job.gpus
    sides = 2 if method.texts else 1
    teachers = sides if method.live_teacher else 0
    features = 4.0 * whole * width * (2 * sides + teachers)
    block = 4.0 * min(whole, 1024) * min(whole, 4096)
    result.rows["loss"] = features + (block if method.texts else 0.0)
    matrices = (4 + (4 if method.live_teacher else 0)) if method.texts else 0
    result.dense_loss = features + 4.0 * matrices * whole * whole


def meta_model(settings: dict[str, Any]) -> Any:
    """Build a model without data.

    Args:
        settings: open_clip's ``model_cfg``.

    Returns:
        The model on the "meta" device.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    arguments = json.loads(json.dumps(settings))
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments.get("text_cfg", {})
    with torch.device("meta"):
        model = (CustomTextCLIP if custom else CLIP)(**arguments)
    return model.to("meta")  # what a replaced initializer of another library put elsewhere


def activations(
    model: Any, settings: dict[str, Any], rows: int, job: Job, *, texts: bool = True, image_only: bool = False
) -> float:
    """Bytes autograd keeps for the backward pass of both towers.

    Args:
        model: On the "meta" device.
        settings: Its configuration.
        rows: Images, and as many texts.
        job: Precision and checkpointing.
        texts: Whether the text tower runs.
        image_only: Whether the text tower is frozen, and so keeps nothing.

    Returns:
        Bytes.
    """
    size = settings["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    model = model.to(dtype)
    if job.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.train()
    images = torch.empty(rows, 3, height, width, device="meta", dtype=dtype)
    with _fused_attention(), kept_for_backward(model) as kept:
        outputs = [model.encode_image(images, normalize=True)]
        if texts and not image_only:
            context = settings["text_cfg"].get("context_length", 77)
            outputs.append(
                model.encode_text(torch.zeros(rows, context, dtype=torch.long, device="meta"), normalize=True)
            )
    held = float(sum(kept.values()))
    del outputs
    if not job.grad_checkpointing:
        return held
    model.set_grad_checkpointing(False)
    again = dataclasses.replace(job, grad_checkpointing=False)
    whole = activations(model, settings, rows, again, texts=texts, image_only=image_only)
    blocks = sum(type(module).__name__.endswith("Block") for module in model.modules())
    return held + whole / max(blocks, 1)  # one block at a time is computed again


@contextlib.contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count the storages that autograd keeps, apart from weights; yields bytes by storage."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        """Note a kept tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class _Fused(torch.autograd.Function):
    """The memory of fused attention: keeps queries, keys, values, the output and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the output's shape."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of the inputs' shapes."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention on tensors without data keep what the fused kernels keep; it would keep its scores otherwise."""
    real = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stand in for PyTorch's function."""
        return _Fused.apply(query, key, value)

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real  # type: ignore[assignment]


def as_text(result: MemoryPlan) -> str:
    """Lay a plan out as lines for a terminal.

    Args:
        result: The plan.

    Returns:
        Text without a final line end.
    """
    job = result.job
    stage = "no ZeRO" if job.zero is None else f"ZeRO {job.zero}"
    total, trained = result.parameters
    lines = [
        f"{job.model}: {total / 1e6:,.1f} M weights, {trained / 1e6:,.1f} M trained ({job.recipe})",
        f"{job.batch} images per GPU on {job.gpus} GPU{'s' if job.gpus > 1 else ''}, {stage}, {job.precision}"
        + (", gradient checkpointing" if job.grad_checkpointing else ""),
        "",
        "on each GPU",
        *(f"  {name:<16}{size / MIB:>12,.1f} MiB" for name, size in result.rows.items()),
        f"  {'peak':<16}{result.total / MIB:>12,.1f} MiB"
        + ("" if result.gradients_stay else "  (activations are freed as gradients appear)"),
    ]
    if result.host:
        lines += ["in CPU memory, for each GPU"]
        lines += [f"  {name:<16}{size / MIB:>12,.1f} MiB" for name, size in result.host.items()]
    lines += ["", f"with dense losses the loss would take {result.dense_loss / MIB:,.1f} MiB on each GPU"]
    return "\n".join(lines)


def as_dict(result: MemoryPlan) -> dict[str, Any]:
    """Return a plan as plain containers for JSON."""
    return {
        "model": result.job.model,
        "parameters": result.parameters[0],
        "trained": result.parameters[1],
        "gpu_bytes": {name: int(size) for name, size in result.rows.items()},
        "gpu_total_bytes": int(result.total),
        "cpu_bytes": {name: int(size) for name, size in result.host.items()},
        "dense_loss_bytes": int(result.dense_loss),
    }

"""Diagonal Fisher information of a model, exactly and at the cost of an ordinary training pass."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ftfast.errors import CheckpointError, ConfigError, ModelError
from ftfast.kernels.fisher_ops import accumulate_fisher_
from ftfast.weightspace.capture import PerSampleCapture, trace_sample_axes
from ftfast.weightspace.fisher_sink import FisherSink
from ftfast.weightspace.objectives import PerSampleLoss

__all__ = ["FisherEstimate", "FisherOptions", "estimate_fisher"]

Kind = Literal["empirical", "sampled", "squared_batch_gradient"]
KINDS: tuple[Kind, ...] = ("empirical", "sampled", "squared_batch_gradient")


@dataclass(frozen=True)
class FisherOptions:
    """How a Fisher is estimated.

    Args:
        method: "capture" (per-sample gradients read off one batched pass) or "loop" (one backward pass per sample; for
            any differentiable model, and the oracle of the tests). Ignored for ``squared_batch_gradient``.
        max_samples: Stop after this many samples; 0 uses the whole loader.
        seed: Of the labels drawn for ``sampled``.
        save_path: Write the running estimate here, so that a stopped run resumes from it; empty keeps it in memory.
        save_every: Batches between writes.
        require_full_coverage: Raise if a trainable parameter got no gradient from any sample.
    """

    method: Literal["capture", "loop"] = "capture"
    max_samples: int = 0
    seed: int = 0
    save_path: str = ""
    save_every: int = 50
    require_full_coverage: bool = True


@dataclass
class FisherEstimate:
    """Mean squared gradients by parameter name, and how they came about.

    Args:
        values: Importance F by parameter name, float32, shaped like the parameters.
        kind: "empirical": per sample, true labels. "sampled": per sample, labels drawn from the model (the Fisher
            proper, in expectation). "squared_batch_gradient": square of each batch's mean gradient (what Avalanche's
            EWC and GIFT compute); about 1/batch size of the others, and not proportional to them.
        samples: Samples used.
        batches: Batches used.
        uncovered: Trainable parameters that received no gradient from any sample.
    """

    values: dict[str, Tensor]
    kind: str
    samples: int = 0
    batches: int = 0
    uncovered: tuple[str, ...] = field(default=())

    def coverage(self) -> str:
        """One sentence: parameters and elements with a Fisher, and which have none.

        Returns:
            The sentence.
        """
        total = sum(value.numel() for value in self.values.values())
        missing = f"; none for {', '.join(self.uncovered)}" if self.uncovered else ""
        covered = len(self.values) - len(self.uncovered)
        return (
            f"{self.kind} Fisher of {covered} of {len(self.values)} parameters ({total:,} elements) from "
            f"{self.samples:,} samples{missing}"
        )

    def histogram(self, low: int = -16, high: int = 4) -> dict[str, int]:
        """Counts of elements by decade of F.

        Args:
            low: Smallest exponent of ten kept apart.
            high: Largest exponent of ten.

        Returns:
            Counts by label: "0", "<1e-16", "1e-16", ..., each decade ``[10^e, 10^(e+1))`` under its lower end.
        """
        counts = torch.zeros(high - low + 1, dtype=torch.int64)
        zeros = below = 0
        for value in self.values.values():
            positive = value[value > 0].flatten()
            zeros += value.numel() - positive.numel()
            exponents = positive.log10().floor()
            below += int((exponents < low).sum())
            kept = exponents[exponents >= low].clamp(max=high).long() - low
            counts += torch.bincount(kept.cpu(), minlength=high - low + 1)
        decades = {f"1e{low + i}": int(count) for i, count in enumerate(counts)}
        return {"0": zeros, f"<1e{low}": below, **decades}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically.

        Args:
            path: Target file.
        """
        _save(Path(path), self.values, {"samples": self.samples, "batches": self.batches, "kind": self.kind}, self)

    @classmethod
    def load(cls, path: str | Path) -> FisherEstimate:
        """Read :meth:`save`'s file.

        Args:
            path: The file.

        Returns:
            The estimate, on the CPU.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        values, facts, _ = _load(Path(path))
        if facts.get("partial"):
            raise CheckpointError(f"{path} holds an unfinished Fisher; run the estimate again to finish it")
        return cls(values, facts["kind"], facts["samples"], facts["batches"], tuple(facts.get("uncovered", ())))


def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: Kind = "empirical",
    loss: PerSampleLoss,
    options: FisherOptions | None = None,
) -> FisherEstimate:
    """Diagonal Fisher of every trainable parameter: the mean over samples of squared gradients.

    Works on an unmodified model, attention weights included. ``capture`` costs about one forward and backward pass per
    batch and one extra copy of the trainable weights; no per-sample gradient of a weight matrix is stored. The model
    runs in evaluation mode (dropout off, stored BatchNorm statistics) and is left as it was.

    Args:
        model: The model; parameters that do not require gradients are skipped.
        loader: Batches: tuples of tensors, or objects with ``images``, ``labels`` and ``texts``. To resume from
            ``options.save_path`` it must yield the same batches in the same order.
        kind: See :class:`FisherEstimate`.
        loss: Per-sample loss, such as :class:`~ftfast.weightspace.objectives.ClassificationObjective`.
        options: Method, sample limit, seed, saving.

    Returns:
        The estimate.

    Raises:
        ConfigError: Unknown kind, or an empty loader.
        ModelError: An operation cannot be captured, a parameter got no gradient, or ZeRO stage 3 holds the parameters
            in pieces.
        CheckpointError: The saved state belongs to another estimate.
    """
    options = options or FisherOptions()
    if kind not in KINDS:
        raise ConfigError(f"Fisher kind is '{kind}'; use one of {', '.join(KINDS)}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pieces = [name for name, p in parameters.items() if getattr(p, "ds_numel", p.numel()) != p.numel()]
    if pieces:
        raise ModelError(
            f"'{pieces[0]}' and {len(pieces) - 1} more parameters are partitioned by ZeRO stage 3, so their gradients "
            "cannot be seen here; estimate the Fisher before deepspeed.initialize or inside GatheredParameters"
        )
    run = _Run(model, parameters, loss, kind, options)
    run.resume()
    done = run.batches
    with _evaluating(model):
        for index, batch in enumerate(loader):
            if options.max_samples and run.samples >= options.max_samples:
                break
            if index < done:
                continue
            room = options.max_samples - run.samples if options.max_samples else _size(batch)
            run.add(_take(batch, range(min(room, _size(batch)))))
            if options.save_path and run.batches % options.save_every == 0:
                run.save(partial=True)
    if run.samples == 0:
        raise ConfigError("the Fisher's loader yielded no samples; check its data source")
    return run.finish()


class _Run:
    """State of one estimate while it streams over batches."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        loss: PerSampleLoss,
        kind: Kind,
        options: FisherOptions,
    ) -> None:
        self.model, self.parameters, self.loss = model, parameters, loss
        self.kind, self.options = kind, options
        self.sink = FisherSink(parameters)
        self.samples = self.batches = 0
        self.generator = torch.Generator().manual_seed(options.seed) if kind == "sampled" else None
        self._axes: dict[Any, list[int | None]] = {}

    def add(self, batch: Any) -> None:
        """Add one batch."""
        size = _size(batch)
        if self.kind == "squared_batch_gradient":
            self._add_batch_gradient(batch)
        elif self.options.method == "loop":
            self._add_loop(batch)
        else:
            self._add_captured(batch)
        self.samples += size
        self.batches += 1

    def _add_captured(self, batch: Any) -> None:
        """One batched pass whose backward squares per sample."""
        key = tuple(tuple(item.shape[1:]) for item in _tensors(batch))
        if key not in self._axes:
            trial = None if self.generator is None else torch.Generator().manual_seed(0)

            def run(trial_batch: Any) -> Tensor:
                """Return the per-sample losses of a trial batch."""
                return self.loss(self.model, trial_batch, trial)

            self._axes[key] = trace_sample_axes(run, _take(batch, [0, 0]), _take(batch, [0, 0, 0]))
        self.sink.start_pass()
        with torch.enable_grad():
            with PerSampleCapture(self.parameters, self.sink, self._axes[key]):
                losses = self.loss(self.model, batch, self.generator)
            if losses.shape != (_size(batch),):
                raise ModelError(f"the loss returned shape {tuple(losses.shape)} for {_size(batch)} samples")
            if losses.requires_grad:
                torch.autograd.backward(losses.sum(), inputs=[self.sink.gate])
                self.sink.gate.grad = None
            self.sink.finish_pass()

    def _add_loop(self, batch: Any) -> None:
        """One backward pass per sample."""
        with torch.enable_grad():
            losses = self.loss(self.model, batch, self.generator)
            for index in range(len(losses)):
                keep = index + 1 < len(losses)
                self._square_gradient(losses[index], keep)

    def _add_batch_gradient(self, batch: Any) -> None:
        """Square of the gradient of the batch mean."""
        with torch.enable_grad():
            self._square_gradient(self.loss(self.model, batch, self.generator).mean(), False)

    def _square_gradient(self, value: Tensor, keep_graph: bool) -> None:
        """Add the square of one scalar's gradient."""
        grads = torch.autograd.grad(value, list(self.parameters.values()), retain_graph=keep_graph, allow_unused=True)
        pairs = [(name, grad) for name, grad in zip(self.parameters, grads, strict=True) if grad is not None]
        accumulate_fisher_([self.sink.values[name] for name, _ in pairs], [grad for _, grad in pairs])
        self.sink.reached.update(name for name, _ in pairs)

    def finish(self) -> FisherEstimate:
        """Divide by the count and report."""
        uncovered = tuple(name for name in self.parameters if name not in self.sink.reached)
        if uncovered and self.options.require_full_coverage:
            raise ModelError(
                f"{len(uncovered)} trainable parameters got no gradient from this loss, first '{uncovered[0]}'; freeze "
                f"them, use a loss that reaches them, or set require_full_coverage=False"
            )
        count = self.batches if self.kind == "squared_batch_gradient" else self.samples
        values = {name: value.div_(count) for name, value in self.sink.values.items()}  # in place: one F in memory
        estimate = FisherEstimate(values, self.kind, self.samples, self.batches, uncovered)
        if self.options.save_path:
            estimate.save(self.options.save_path)
        return estimate

    def save(self, partial: bool) -> None:
        """Write sums and position, so that another process can go on."""
        facts: dict[str, Any] = {
            "samples": self.samples,
            "batches": self.batches,
            "kind": self.kind,
            "partial": partial,
        }
        facts |= {"reached": sorted(self.sink.reached), "seed": self.options.seed}
        extra = {} if self.generator is None else {"generator": self.generator.get_state()}
        _save(Path(self.options.save_path), self.sink.values, facts, None, extra)

    def resume(self) -> None:
        """Take up a partial file, if there is one."""
        path = Path(self.options.save_path) if self.options.save_path else None
        if path is None or not path.is_file():
            return
        values, facts, extra = _load(path)
        if not facts.get("partial"):
            return
        same = facts["kind"] == self.kind and facts.get("seed") == self.options.seed
        if not same or {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in self.sink.values.items()}:
            raise CheckpointError(f"{path} holds another model's or another kind's Fisher; delete it or save elsewhere")
        for name, value in values.items():
            self.sink.values[name].copy_(value)
        self.sink.reached.update(facts["reached"])
        self.samples, self.batches = facts["samples"], facts["batches"]
        if self.generator is not None and "generator" in extra:
            self.generator.set_state(extra["generator"])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _tensors(batch: Any) -> list[Tensor]:
    """Tensors of a batch."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, each.name) for each in dataclasses.fields(batch)]
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    return [item for item in items if isinstance(item, Tensor)]


def _size(batch: Any) -> int:
    """Number of samples."""
    tensors = _tensors(batch)
    if not tensors:
        raise ConfigError(f"a Fisher batch must hold tensors, got {type(batch).__name__}")
    return int(tensors[0].shape[0])


def _take(batch: Any, indices: Iterable[int]) -> Any:
    """The samples at some positions, in a batch of the same form."""
    picked = list(indices)

    def pick(item: Any) -> Any:
        """Select the picked samples of one item; leave anything that is no sequence."""
        if isinstance(item, Tensor):
            return item[picked]
        return type(item)(item[i] for i in picked) if isinstance(item, tuple | list) else item

    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{f.name: pick(getattr(batch, f.name)) for f in dataclasses.fields(batch)})
    if isinstance(batch, dict):
        return {key: pick(value) for key, value in batch.items()}
    return type(batch)(pick(item) for item in batch) if isinstance(batch, tuple | list) else pick(batch)


def _save(
    path: Path, values: dict[str, Tensor], facts: dict[str, Any], estimate: FisherEstimate | None,
    extra: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write importances and facts to a safetensors file by way of a temporary name."""
    if estimate is not None:
        facts = {**facts, "uncovered": list(estimate.uncovered)}
    tensors = {f"fisher/{name}": value.detach().cpu().contiguous() for name, value in values.items()}
    tensors |= {f"extra/{name}": value for name, value in (extra or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"ftfast": json.dumps(facts)})
    os.replace(temporary, path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Importances, facts and extra tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["ftfast"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a Fisher file written by ftfast ({error})") from error
    values = {key[len("fisher/") :]: value for key, value in tensors.items() if key.startswith("fisher/")}
    extra = {key[len("extra/") :]: value for key, value in tensors.items() if key.startswith("extra/")}
    return values, facts, extra

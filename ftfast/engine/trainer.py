"""The loop: batches, objective, step, log, validate, save. It knows no paper."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ftfast.config.schema import TrainConfig
from ftfast.data import BatchLoader
from ftfast.engine.averaging import RunningMean
from ftfast.engine.checkpoints import CheckpointManager
from ftfast.engine.objective import Objective
from ftfast.engine.progress import TrainingProgress
from ftfast.engine.runlog import RunLog, SilentLog
from ftfast.engine.schedules import learning_rate_factor
from ftfast.engine.torch_engine import Engine
from ftfast.errors import CheckpointError, Interrupted, TrainingError
from ftfast.recipes import BatchSpec, Plan
from ftfast.weightspace import ExponentialMovingAverage


@dataclass
class TrainerState:
    """Progress of a run; saved in every checkpoint.

    Attributes:
        step: Optimizer steps done.
        best: Best selection score so far, rounded to three decimals; -inf before the first validation.
        best_step: Step of the best score.
    """

    step: int = 0
    best: float = -math.inf
    best_step: int = -1


@dataclass
class Trainer:
    """Runs a plan to its last step, resumably.

    Attributes:
        config: The run's settings.
        plan: The recipe's declaration.
        engine: Owns model, precision and optimizer.
        objective: Batches to loss.
        loaders: Resumable loaders by source ("data", "generic").
        total_steps: Length of training.
        checkpoints: Where state is saved.
        log: Where scalars go.
        validate: Returns (scalars to log, selection score); None: no validation.
        config_text: Resolved configuration as YAML, stored with each checkpoint.
    """

    config: TrainConfig
    plan: Plan
    engine: Engine
    objective: Objective
    loaders: Mapping[str, BatchLoader]
    total_steps: int
    checkpoints: CheckpointManager
    log: RunLog | SilentLog
    validate: Callable[[], tuple[dict[str, float], float]] | None = None
    config_text: str = ""
    state: TrainerState = field(default_factory=TrainerState)
    ema: ExponentialMovingAverage | RunningMean | None = None

    def __post_init__(self) -> None:
        self._pending: list[tuple[int, float, tuple[str, ...], Tensor]] = []
        self._stop_signal = 0
        if self.config.optim.ema_decay > 0:
            self.ema = ExponentialMovingAverage(self.engine.weights, self.config.optim.ema_decay)
        elif self.plan.average_every > 0:
            self.ema = RunningMean(self.engine.weights, self.plan.average_every)

    def fit(self, progress: TrainingProgress) -> None:
        """Train from the current state to ``total_steps``.

        Args:
            progress: Entered progress display.

        Raises:
            TrainingError: If a term is not finite, with the step and the term.
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
        """
        eval_every = self.config.eval.every_steps or self.epoch_steps
        save_every = self.config.checkpoint.every_steps or self.epoch_steps
        with self._signals():
            while self.state.step < self.total_steps:
                self.engine.module.train()
                self._train_step(progress)
                step = self.state.step
                if step % self._flush_every == 0 or step == self.total_steps:
                    self._flush(progress)
                first = step == 1 and self.config.eval.selection != "last"
                if self.validate is not None and (step % eval_every == 0 or step == self.total_steps or first):
                    self._flush(progress)
                    self._validate(progress)
                stop = self.engine.processes.any(self._stop_signal != 0)
                if step % save_every == 0 or step == self.total_steps or stop:
                    self._flush(progress)
                    self.save()
                if stop and step < self.total_steps:
                    name = signal.Signals(self._stop_signal or signal.SIGTERM).name
                    raise Interrupted(f"{name} at step {step}: checkpoint saved. Go on with --resume.")

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of one pass over the task data (both halves of a round-robin pair counted)."""
        per_pass = max(1, self.loaders["data"].steps_per_epoch // self.config.train.accum_freq)
        return per_pass * (len(self.plan.batches) if self.plan.schedule == "round_robin" else 1)

    @property
    def _flush_every(self) -> int:
        """Steps between reads of the loss: each step on a CPU (free), each log line on a GPU (no sync per step)."""
        return 1 if self.engine.device.type == "cpu" else max(1, self.config.log.every_steps)

    def _train_step(self, progress: TrainingProgress) -> None:
        step = self.state.step
        active = self.plan.active(step)
        replay = tuple(spec for spec in active if spec.replay)
        sums: dict[str, Tensor] = {}
        if replay:
            self._accumulate(replay, step, sums, progress)
            self.engine.observe_replay(step, self.plan.importance_steps)
        self._accumulate(tuple(spec for spec in active if not spec.replay), step, sums, progress)
        factor = learning_rate_factor(step, self.total_steps, self.config.optim)
        scalars = self.engine.step(factor)
        if "anchor" in scalars:
            sums["loss"] = sums["loss"] + scalars["anchor"].to(sums["loss"].device)
        sums.update(scalars)
        if self.ema is not None:
            self.ema.update(self.engine.weights)
        values = torch.stack([value.detach().float().reshape(()).to(self.engine.device) for value in sums.values()])
        values = self.engine.processes.mean(values)
        self.state.step += 1
        self._pending.append((self.state.step, factor, tuple(sums), values))

    def _accumulate(
        self, specs: tuple[BatchSpec, ...], step: int, sums: dict[str, Tensor], progress: TrainingProgress
    ) -> None:
        """Add the gradients of the terms on some batches, over all forward passes of the step."""
        accumulate = self.config.train.accum_freq
        for number in range(accumulate):
            begin = time.perf_counter()
            batches = {spec.name: next(self.loaders[spec.source]).to(self.engine.device) for spec in specs}
            waited = time.perf_counter() - begin
            total, terms = self.objective(batches, step)
            self.engine.backward(total / accumulate, last=number == accumulate - 1)
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / accumulate
            images = sum(len(batch.indices) for batch in batches.values()) * self.engine.processes.world_size
            progress.count(images, waited)

    def _flush(self, progress: TrainingProgress) -> None:
        """Read pending losses, stop at the first that is not finite, write the rest to the logs."""
        pending, self._pending = self._pending, []
        for step, factor, names, tensor in pending:
            values = dict(zip(names, tensor.tolist(), strict=True))
            for name in [n for n in names if n != "loss"] + ["loss"]:
                if not math.isfinite(values[name]):
                    raise TrainingError(
                        f"step {step}: term '{name}' is {values[name]}. The last checkpoint is step "
                        f"{max(self.checkpoints.steps(), default=0)}. Lower the learning rate "
                        f"(now {self.config.optim.lr * factor:.2e}), add warm-up, or use precision fp32 or amp_bf16."
                    )
            rate = self.config.optim.lr * factor
            shown = progress.update(step, values, rate)
            row = {"train/loss": values["loss"], "train/lr": rate, **shown}
            row.update({f"train/loss/{n}": v for n, v in values.items() if n not in ("loss", "grad_norm")})
            if "grad_norm" in values:
                row["train/grad_norm"] = values["grad_norm"]
            self.log.write(step, row)

    def _validate(self, progress: TrainingProgress) -> None:
        if self.validate is None:
            return
        with self.averaged_weights() as weights:
            scalars, score = self.engine.processes.on_main(self.validate)
            self.log.write(self.state.step, {f"eval/{name}": value for name, value in scalars.items()})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in scalars.items())
            progress.note(f"validation at step {self.state.step}: {shown}")
            if self.config.eval.selection != "last" and round(score, 3) > self.state.best:
                self.state.best, self.state.best_step = round(score, 3), self.state.step
                best = {"clip": dict(weights)}
                meta = {"step": self.state.step, "score": score, **scalars}
                self.engine.processes.on_main(lambda: self.checkpoints.save_best(best, meta))

    @contextmanager
    def averaged_weights(self) -> Iterator[Mapping[str, Tensor]]:
        """Evaluate with the moving average in place of the weights, if there is one.

        Yields:
            The CLIP's weights that are measured; with DeepSpeed in the first process only.
        """
        if self.ema is None:
            with self.engine.measured() as weights:
                yield weights
            return
        weights = self.engine.weights
        own = {name: tensor.detach().clone() for name, tensor in weights.state_dict().items()}
        self.ema.copy_to(weights)
        try:
            with self.engine.measured() as measured:
                yield measured
        finally:
            weights.load_state_dict(own)

    def selected_weights(self) -> dict[str, Tensor]:
        """Return the CLIP weights the run ends with: the best validated ones, or the last (averaged) ones.

        Every process must call it; with DeepSpeed the result is complete in the first one only.
        """
        if self.config.eval.selection != "last" and self.state.best_step >= 0:
            return dict(self.checkpoints.load("best")["clip"]) if self.engine.processes.main else {}
        with self.averaged_weights() as weights:
            return {name: tensor.detach().clone() for name, tensor in weights.items()}

    def save(self) -> None:
        """Write a checkpoint of everything an exact resume needs."""
        processes = self.engine.processes
        state = {
            "trainer": vars(self.state).copy(),
            "engine": self.engine.state_dict(),
            "loaders": {name: loader.state_dict() for name, loader in self.loaders.items()},
            "ema": None if self.ema is None else self._average_state(),
            "rng": processes.collect(random_state(self.engine.device)),
            "config": self.config_text,
        }
        meta = {"step": self.state.step, "total_steps": self.total_steps, "processes": processes.world_size}
        self.checkpoints.save(
            self.state.step, state, meta, lambda folder: self.engine.save_shards(folder, self._averages()), processes
        )

    def _sharded_average(self) -> bool:
        return self.ema is not None and self.engine.weights is not self.engine.module

    def _averages(self) -> list[Tensor]:
        """Averaged shards, which each process saves for itself."""
        return list(self.ema.average.values()) if self.ema is not None and self._sharded_average() else []

    def _average_state(self) -> dict[str, Any]:
        """State of the average; without the tensors where they are shards."""
        state = dict(self.ema.state_dict()) if self.ema is not None else {}
        return {**state, "average": {}} if self._sharded_average() else state

    def resume(self) -> int:
        """Load the newest checkpoint.

        Returns:
            Its step; 0 when there is none yet, which starts from the beginning.

        Raises:
            CheckpointError: If the checkpoint does not fit this run.
        """
        self.engine.processes.on_main(self.checkpoints.clean)
        steps = self.checkpoints.steps()
        if not steps:
            return 0
        state = self.checkpoints.load(steps[-1])
        try:
            self.engine.load_state_dict(state["engine"])
            self.engine.load_shards(self.checkpoints.path(steps[-1]), self._averages())
            for name, loader in self.loaders.items():
                loader.load_state_dict(state["loaders"][name])
            if self.ema is not None:
                average = {"average": self.ema.average} if self._sharded_average() else {}
                self.ema.load_state_dict({**state["ema"], **average})
            self.state = TrainerState(**state["trainer"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.checkpoints.path(steps[-1])} does not fit this run: {str(error).splitlines()[0]}. "
                "Resume with the model, data and recipe it was made with."
            ) from error
        own = state["rng"] if isinstance(state["rng"], Mapping) else state["rng"][self.engine.processes.rank :][:1]
        for generators in [own] if isinstance(own, Mapping) else own:  # empty for a process that was not there
            set_random_state(generators, self.engine.device)
        return self.state.step

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a save at the end of the step; a second one stops at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            """Remember the first stop signal and interrupt at the second."""
            if self._stop_signal:
                raise KeyboardInterrupt
            self._stop_signal = number

        try:
            previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the host program owns the signals
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return PyTorch's generator states (dropout and other draws outside the data pipeline)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)

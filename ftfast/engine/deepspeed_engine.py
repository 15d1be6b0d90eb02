"""Training with DeepSpeed ZeRO, stages 0 to 3, behind the same protocol as the single-process engine.

The engine trains the parameters that the recipe's anchor and heads refer to; a plain copy of the model, on the CPU
until it is measured, takes their place in ``LoadedModel`` for evaluation, teachers and saving.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.config.schema import OptimConfig, TrainConfig
from ftfast.engine.deepspeed_settings import deepspeed_settings
from ftfast.engine.processes import Processes
from ftfast.engine.shards import Shards
from ftfast.engine.torch_engine import TunedModel, parameter_groups
from ftfast.errors import ConfigError, MissingExtraError
from ftfast.models import LoadedModel
from ftfast.weightspace import Anchor, AnchoredAdamW
from ftfast.weightspace.sharding import observe_replay_gradient


class ShardableModel(TunedModel):
    """A :class:`TunedModel` whose forward pass suits DeepSpeed: it sets its own precision and casts its input.

    Attributes:
        autocast_dtype: Type of automatic mixed precision, or None.
    """

    autocast_dtype: torch.dtype | None = None

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode one batch; see :class:`TunedModel`."""
        images = images.to(self.clip.logit_scale.dtype)
        # DeepSpeed switches an outer autocast off, so it is entered here.
        with torch.autocast(images.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return super().forward(images, tokens)


class ShardWeights:
    """The shards as a state dict, for averages of weights that follow them.

    Args:
        engine: Owner of the shards.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shards by number; not copies."""
        return {f"{number:05d}": shard.detach() for number, shard in enumerate(self.engine.shards.tensors)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the shards and the weights made from them; every process must call it."""
        with torch.no_grad():
            for name, shard in self.state_dict().items():
                shard.copy_(state[name])
        self.engine.refresh()


class DeepSpeedEngine:
    """Forward, backward and step through DeepSpeed.

    Args:
        loaded: The model to train; its ``model`` is replaced by a plain copy.
        heads: Trainable modules beside it.
        config: Settings with a ZeRO stage.
        anchor: Weight-space guard, or None.
        processes: This process among the others.
        device: Where to train.
        divided: The model to train if it was built in shards; ``loaded.model`` is left as it is then.

    Raises:
        ConfigError: Contradictions, and combinations DeepSpeed cannot run.
        MissingExtraError: If DeepSpeed is not installed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        heads: nn.ModuleDict,
        config: TrainConfig,
        *,
        anchor: Anchor | None,
        processes: Processes,
        device: torch.device,
        divided: Any = None,
    ) -> None:
        self.processes, self.device = processes, device
        self.optim: OptimConfig = config.optim
        model = loaded.model if divided is None else divided
        trained = sum(full_size(p) for owner in (model, heads) for p in owner.parameters() if p.requires_grad)
        settings = deepspeed_settings(config, processes.world_size, trained)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.adaptive = anchor is not None and anchor.adaptive
        self._refuse_unsupported(config)
        deepspeed = import_deepspeed(device)
        if divided is None:
            loaded.model = copy.deepcopy(model).cpu()
        self.plain: Any = loaded.model
        module = ShardableModel(model, heads, config.model.freeze_batch_norm)
        module.autocast_dtype = torch.bfloat16 if config.train.precision == "amp_bf16" else None
        self.module: TunedModel = module
        make_vectors(self.module)
        self.optimizer = AnchoredAdamW(
            parameter_groups(self.module, config.optim),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            weight_decay=0.0,
            anchor=anchor,
            anchor_mode="coupled",
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        with contextlib.redirect_stdout(sys.stderr):
            self.runner, *_ = deepspeed.initialize(model=self.module, optimizer=self.optimizer, config=settings)
        if self.stage == 3:
            self._open_root_parameters(deepspeed)
            self._keep_heads_whole()
        self._share_masters(config)
        self.shards = Shards(self.optimizer, self._shard_tensors(), trainable(self.module))
        self.weights = ShardWeights(self)
        self._settle_anchor(anchor)

    def _refuse_unsupported(self, config: TrainConfig) -> None:
        """Refuse what an importance re-estimated inside the step cannot be combined with.

        Raises:
            ConfigError: Clipping, accumulation or loss scaling with an adaptive anchor.
        """
        if not self.adaptive or self.stage == 0:
            return
        for name, value, off in (
            ("optim.grad_clip_norm", config.optim.grad_clip_norm, 0.0),
            ("train.accum_freq", config.train.accum_freq, 1),
        ):
            if value != off:
                raise ConfigError(
                    f"{name} is {value}, but this recipe re-estimates its anchor's importance inside every step, which "
                    f"ZeRO stage {self.stage} cannot combine with it. Set {name} to {off:g}, or use --zero 0."
                )
        if config.train.precision == "pure_fp16":
            raise ConfigError(
                "train.precision is pure_fp16, but this recipe re-estimates its anchor's importance inside every step, "
                "which cannot be combined with loss scaling. Use pure_bf16 or amp_bf16."
            )

    def _open_root_parameters(self, deepspeed: Any) -> None:
        """Let ZeRO-3 gather the CLIP's own tensors (projection, positions, scale) for calls of its encoders.

        ``encode_image`` and ``encode_text`` are methods, not the module's forward pass, so no hook gathers them.
        """
        for parameter in self.module.clip.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(self.module, parameter)

    def _keep_heads_whole(self) -> None:
        """Keep the heads' weights gathered between steps: losses read them outside any module's forward pass.

        DeepSpeed's hooks would let go of them after a head's own forward pass, before the next term reads them.
        """
        for module in self.module.heads.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        persistent = self.inner.persistent_parameters
        heads: list[Any] = list(self.module.heads.parameters())  # DeepSpeed adds attributes to its parameters
        known = {id(parameter) for parameter in persistent}
        for parameter in heads:
            parameter.ds_persist = True
        persistent.extend(parameter for parameter in heads if id(parameter) not in known)
        if heads:
            heads[0].all_gather(heads)

    def _share_masters(self, config: TrainConfig) -> None:
        """Let the weights' shards be the optimizer's own in float32; DeepSpeed keeps two equal copies at stage 3."""
        if self.stage != 3 or config.train.precision.startswith("pure_"):
            return
        for master, weights in zip(
            self.inner.fp32_partitioned_groups_flat, self.inner.fp16_partitioned_groups_flat, strict=True
        ):
            same = weights is not None and weights.dtype == master.dtype and weights.device == master.device
            if same and weights.numel() == master.numel() and not config.deepspeed.offload_optimizer:
                master.data = weights.data

    def _shard_tensors(self) -> list[Tensor]:
        """Return what the optimizer updates: parameters (stage 0) or flat float32 shards."""
        wrapper = self.runner.optimizer
        if self.stage == 3:
            return list(wrapper.fp32_partitioned_groups_flat)
        if self.stage > 0:
            return list(wrapper.single_partition_of_fp32_groups)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _settle_anchor(self, anchor: Anchor | None) -> None:
        """Cut the anchor to the shards now, and let go of its full-size tensors."""
        if anchor is None:
            return
        for tensor in self.shards.tensors:
            self.shards.materialise(tensor)
        if self.stage > 0:
            entries = {name: dataclasses.replace(e, start=None, precision=None) for name, e in anchor.entries.items()}
            anchor.entries.clear()  # type: ignore[attr-defined]  # shared with the recipe's plan, which keeps it alive
            anchor.entries.update(entries)  # type: ignore[attr-defined]

    @property
    def inner(self) -> Any:
        """DeepSpeed's wrapper of the optimizer."""
        return self.runner.optimizer

    def forward(self, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode one batch."""
        return self.runner(images, tokens)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate gradients; they are exchanged at the last pass of a step.

        Args:
            loss: Scalar.
            last: Whether it is the last pass before the step (or before :meth:`observe_replay`).
        """
        if loss.requires_grad:
            self.runner.set_gradient_accumulation_boundary(last)
            self.runner.backward(loss)

    def observe_replay(self, step: int, average_steps: int) -> None:
        """Set an adaptive anchor's importance from the replay gradient; see :meth:`TorchEngine.observe_replay`."""
        if not self.adaptive:
            return
        fixed = 0 < average_steps <= step
        states = [s for s in self.optimizer.state.values() if "anchor_precision" in s]
        keep = fixed or (average_steps > 0 and step > 0)
        before = [s["anchor_precision"].clone() for s in states] if keep else []
        if self.stage > 0:
            observe_replay_gradient(self.inner, self.optimizer, self.processes.patient)
        elif not fixed:
            self.optimizer.observe_replay_gradient()
        for state, mean in zip(states, before, strict=False):
            if fixed:
                state["anchor_precision"].copy_(mean)
            else:
                state["anchor_precision"].sub_(mean).div_(step + 1).add_(mean)

    def step(self, factor: float) -> dict[str, Tensor]:
        """Clip, step and clear; see :meth:`TorchEngine.step`."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.runner.set_gradient_accumulation_boundary(True)
        self.runner.step()
        self._forget_gradients()
        scalars: dict[str, Tensor] = {}
        if self.optim.grad_clip_norm > 0:
            norm = self.runner.get_global_grad_norm()
            if norm is not None:
                scalars["grad_norm"] = torch.as_tensor(float(norm))
        if self.optimizer.anchor is not None:
            penalty = self.optimizer.anchor_penalty.detach().to(self.device, copy=True)
            if self.stage > 0 and self.processes.several:
                torch.distributed.all_reduce(penalty)  # each process knows the share of its shards
            scalars["anchor"] = penalty
        return scalars

    def _forget_gradients(self) -> None:
        """Clear what DeepSpeed keeps of this step's gradients.

        ZeRO-3 (0.19) and offloaded optimizers would use them again in a step that does not reach a weight, as
        INFUSING's classifier in the steps on generic images.
        """
        if self.stage == 3:
            self.inner.grad_partitions_flat_buffer.zero_()
        for shard in self.shards.tensors:
            if shard.grad is not None:
                shard.grad.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the model's weights from the shards again, after the shards were written to."""
        inner = self.inner
        if self.stage in (1, 2):
            inner.update_lp_params()
        elif self.stage == 3:
            inner._partition_all_parameters()
            for number in range(len(inner.fp32_partitioned_groups_flat)):
                inner._reassign_or_swap_out_partitioned_parameters(number)
            if inner.persistent_parameters:
                inner.persistent_parameters[0].all_gather(inner.persistent_parameters)

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Return the CLIP's float32 weights on the CPU in the first process, nothing elsewhere; all must call it."""
        shapes = {name: t.shape for name, t in self.plain.state_dict().items()} if self.processes.main else {}
        full: dict[str, Tensor] = {}
        for name, tensor in self.module.clip.state_dict(keep_vars=True).items():
            value = self._full(tensor) if isinstance(tensor, nn.Parameter) else tensor
            if self.processes.main:
                value = value.detach().cpu()
                value = value.float() if value.is_floating_point() else value
                full[name] = value.reshape(shapes[name]).clone()
        return full

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """Return one whole parameter, in float32 where float32 is kept."""
        import deepspeed

        if parameter.requires_grad and self.stage > 0:
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if value is not None:
                return value
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter

    @contextlib.contextmanager
    def measured(self) -> Iterator[dict[str, Tensor]]:
        """Put the present weights into the plain model of the first process; yields them."""
        self.module.eval()
        full = self.full_weights()
        if self.processes.main:
            self.plain.load_state_dict(full)
            self.plain.to(self.device)
        try:
            yield full
        finally:
            if self.processes.main:
                self.plain.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """Return what is the same in every process; the rest goes into :meth:`save_shards`."""
        buffers = {n: b.detach().cpu().clone() for n, b in self.module.named_buffers()}
        return {"stage": self.stage, "scale": float(getattr(self.inner, "cur_scale", 1.0)), "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state["buffers"][name])
        scaler = getattr(self.inner, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "cur_scale"):
            scaler.cur_scale = state["scale"]

    def save_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Write this process's share of weights, optimizer, anchor and averages into a checkpoint."""
        if self.stage > 0 or self.processes.main:
            self.shards.save(folder, self.processes.rank, averages)

    def load_shards(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Read this process's share from a checkpoint of any number of processes."""
        with torch.no_grad():
            self.shards.load(folder, averages)
        self.refresh()


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, with its messages on standard error.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", "--zero") from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # An optional extension that would be compiled at the first exchange.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def full_size(parameter: nn.Parameter) -> int:
    """Number of elements of the whole parameter, also where only a piece of it is here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def make_vectors(module: nn.Module) -> None:
    """Give 0-d parameters one dimension, in place: DeepSpeed cannot broadcast open_clip's logit_scale otherwise."""
    for parameter in module.parameters():
        if parameter.ndim == 0 and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.reshape(1)


def trainable(module: TunedModel) -> dict[str, nn.Parameter]:
    """Return trainable parameters by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}

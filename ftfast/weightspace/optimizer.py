"""AdamW that holds weights to an anchor inside its own pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftfast.errors import ConfigError
from ftfast.kernels.anchor_ops import MODES, AdamWHyper, AnchorMode, Anchors, adamw_anchored_, anchor_penalty
from ftfast.kernels.fisher_ops import accumulate_fisher_
from ftfast.weightspace.anchors import Anchor
from ftfast.weightspace.sharding import Segment, segments_of

__all__ = ["AnchoredAdamW"]

UNSEEN_PRECISION = 1e-6  # GIFT's constant for tensors the replay loss did not reach


@dataclass
class _Row:
    """One contiguous piece of a parameter with everything the step needs."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    start: Tensor | None
    precision: Tensor | None
    coefficient: float

    def cut(self, segment: Segment) -> _Row:
        """The same row for one stretch of the flattened tensors."""

        def view(tensor: Tensor) -> Tensor:
            """Return the segment's stretch of the flattened tensor."""
            return tensor.view(-1)[segment.offset : segment.end]

        return _Row(
            view(self.param),
            view(self.grad),
            view(self.exp_avg),
            view(self.exp_avg_sq),
            None if self.start is None else view(self.start),
            None if self.precision is None else view(self.precision),
            self.coefficient,
        )


class AnchoredAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) with a quadratic anchor.

    With ``pull = 2 c F (theta - theta*)``, the gradient of the anchor's penalty at the weights before the step:

    * ``coupled``: ``grad + pull`` passes through Adam, as if the penalty were part of the loss;
    * ``decoupled``: ``theta <- theta - lr pull`` beside Adam's update;
    * ``proximal``: ``theta <- (theta + eta theta*) / (1 + eta)`` with ``eta = 2 lr c F`` after Adam's update, the exact
      minimiser, stable for any strength.

    theta* and F are optimizer state of the tensor the optimizer is handed (``anchor_start``, ``anchor_precision``), so
    they follow it to its device, into checkpoints, and onto the flat shards of ZeRO stages 1 to 3. An anchored
    parameter without a gradient is still pulled, as it would be by a penalty in the loss. Clipping gradients before
    ``step`` does not scale the anchor; call :meth:`add_anchor_gradient_` before clipping if it should.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate (per group).
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay (per group).
        anchor: What to hold the weights to; None is plain AdamW.
        anchor_mode: See above.

    Raises:
        ConfigError: A number is out of range, or an anchored parameter is not among ``params``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        anchor: Anchor | None = None,
        anchor_mode: AnchorMode = "coupled",
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ConfigError(f"optimizer {name} is {value:g}; it must be at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"optimizer betas are {betas}; both must be at least 0 and below 1")
        if anchor_mode not in MODES:
            raise ConfigError(f"anchor_mode is '{anchor_mode}'; use one of {', '.join(MODES)}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.anchor = anchor
        self.anchor_mode: AnchorMode = anchor_mode
        self._segments: dict[Tensor, list[Segment]] = {}
        self._penalties: dict[tuple[int, ...], Tensor] = {}
        self._carried: dict[Tensor, Tensor] = {}
        self._pulled = False
        if anchor is not None:
            owned = {id(p) for group in self.param_groups for p in group["params"]}
            stray = [name for name, p in anchor.parameters.items() if id(p) not in owned]
            if stray:
                raise ConfigError(
                    f"{len(stray)} anchored parameters are not given to the optimizer, first '{stray[0]}'; anchor only "
                    f"what is optimized"
                )

    @property
    def anchor_penalty(self) -> Tensor:
        """Penalty at the weights before the last step: a 0-d float32 tensor, not copied to the host.

        Under ZeRO this is the share of the shards on this process; see
        :func:`ftfast.weightspace.sharding.global_penalty`.
        """
        values = list(self._penalties.values())
        return torch.stack(values).sum() if values else torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient or an anchor.

        Args:
            closure: Optional function that recomputes the loss.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for param in group["params"]:
                carried = self._carried.pop(param, None)
                if carried is not None:
                    param.grad = carried if param.grad is None else param.grad.add_(carried)
                if param.grad is None and not self._is_anchored(param):
                    continue
                state = self.state_of(param)
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append(param)
            for step, params in by_step.items():
                self._step_params(group, step, params)
        self._pulled = False
        return loss

    @torch.no_grad()
    def add_anchor_gradient_(self) -> Tensor:
        """Add the anchor's gradient to ``.grad`` now, so that clipping sees it; the next step does not repeat it.

        Returns:
            The penalty at the present weights.

        Raises:
            ConfigError: The mode is not "coupled", where the anchor has no gradient of its own to clip.
        """
        if self.anchor_mode != "coupled":
            raise ConfigError(f"anchor_mode is '{self.anchor_mode}'; only 'coupled' anchors act through gradients")
        for group in self.param_groups:
            params = [p for p in group["params"] if self._is_anchored(p)]
            for param in params:
                self.state_of(param)
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            rows = [row for param in params for row in self._rows(param)]
            penalty = anchor_penalty([row.param for row in rows], _anchors(rows), grads=[row.grad for row in rows])
            self._record(params, penalty)
        self._pulled = True
        return self.anchor_penalty

    @torch.no_grad()
    def observe_replay_gradient(self) -> None:
        """Set an adaptive anchor's importance from the gradients present now (AWC, see ``adaptive_consolidation``).

        ``F = g^2 / mean(g^2)`` per tensor, all tensors in one call of ``accumulate_fisher_``; a tensor without gradient
        gets 1e-6, one whose gradient is all zero gets 0.

        Raises:
            ConfigError: The anchor is not adaptive, or the parameters are shards (use
                :func:`ftfast.weightspace.sharding.observe_replay_gradient`).
        """
        self._require_adaptive()
        precisions: list[Tensor] = []
        gradients: list[Tensor] = []
        for param in (p for group in self.param_groups for p in group["params"] if self._is_anchored(p)):
            layout = self._layout(param)
            if len(layout) != 1 or layout[0].source != 0 or hasattr(param, "ds_numel"):
                raise ConfigError(
                    "observe_replay_gradient was called on an optimizer that holds shards; use "
                    "ftfast.weightspace.sharding.observe_replay_gradient(engine.optimizer, optimizer)"
                )
            precision = self.state_of(param)["anchor_precision"]
            if param.grad is None:
                precision.fill_(UNSEEN_PRECISION)
            else:
                precisions.append(precision)
                gradients.append(param.grad)
        accumulate_fisher_(precisions, gradients, decay=0.0, normalize=True)

    @torch.no_grad()
    def set_adaptive_precision(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        reduce_sums: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Importance of an adaptive anchor from given gradients; the form that sharded training needs.

        Args:
            params: Parameters or shards of this optimizer.
            gradients: Gradient of the replay loss for each, or None.
            reduce_sums: Adds a (tensors,) float64 vector of per-tensor sums over the processes, in place.

        Raises:
            ConfigError: The anchor is not adaptive.
        """
        anchor = self._require_adaptive()
        names = {name: index for index, name in enumerate(anchor.parameters)}
        sums = torch.zeros(len(names), dtype=torch.float64)
        pieces: list[tuple[int, Tensor, Tensor | None]] = []
        for param, gradient in zip(params, gradients, strict=True):
            if not self._is_anchored(param):
                continue
            precision = self.state_of(param)["anchor_precision"].view(-1)
            for segment in self._layout(param):
                if segment.name not in names:
                    continue
                piece = None if gradient is None else gradient.reshape(-1)[segment.offset : segment.end].float()
                index = names[segment.name]
                if piece is not None:
                    sums[index] += piece.square().sum(dtype=torch.float64).cpu()
                pieces.append((index, precision[segment.offset : segment.end], piece))
        if reduce_sums is not None:
            reduce_sums(sums)
        sizes = [getattr(p, "ds_numel", p.numel()) for p in anchor.parameters.values()]
        for index, precision, piece in pieces:
            mean = float(sums[index]) / max(sizes[index], 1)
            if piece is None:
                precision.fill_(UNSEEN_PRECISION)
            elif mean == 0.0:
                precision.zero_()
            else:
                precision.copy_(piece.square().div_(mean))

    def _require_adaptive(self) -> Anchor:
        """The anchor, which must be one whose importance is set every step."""
        if self.anchor is None or not self.anchor.adaptive:
            raise ConfigError("observe_replay_gradient needs an adaptive anchor (adaptive_consolidation)")
        return self.anchor

    def carry_gradients(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add these gradients to ``.grad`` at the next step; for callers whose engine would overwrite them until then.

        Args:
            params: Parameters or shards of this optimizer.
            gradients: One gradient each.
        """
        self._carried.update(zip(params, gradients, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments, step counts, anchors and importances.

        Args:
            state_dict: Result of :meth:`state_dict`.
        """
        super().load_state_dict(state_dict)
        self._penalties.clear()

    def _is_anchored(self, param: Tensor) -> bool:
        """Whether any part of this parameter or shard has an anchor."""
        return self.anchor is not None and any(segment.name is not None for segment in self._layout(param))

    def _layout(self, param: Tensor) -> list[Segment]:
        """Which anchored parameter each stretch of this tensor belongs to."""
        if param not in self._segments:
            self._segments[param] = segments_of(param, {} if self.anchor is None else self.anchor.parameters)
        return self._segments[param]

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """Return the state of a parameter or shard of this optimizer, created on first use."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if self.anchor is not None and "anchor_start" not in state and self._is_anchored(param):
            state.update(self._anchor_state(param))
        return state

    def _anchor_state(self, param: Tensor) -> dict[str, Tensor]:
        """theta* and F cut to this parameter or shard."""
        entries = {} if self.anchor is None else self.anchor.entries
        start = param.detach().clone(memory_format=torch.contiguous_format)
        flat_start = start.view(-1)
        with_precision = any(entry.precision is not None for entry in entries.values())
        adaptive = self.anchor is not None and self.anchor.adaptive
        precision: Tensor | None = None
        if with_precision or adaptive:
            precision = torch.full_like(start, UNSEEN_PRECISION if adaptive else 1.0)
        for segment in self._layout(param):
            if segment.name is None:
                continue
            entry = entries[segment.name]
            source = slice(segment.source, segment.source + segment.length)
            if entry.start is not None:
                flat_start[segment.offset : segment.end] = entry.start.reshape(-1)[source].to(start)
            if entry.precision is not None and precision is not None:
                precision.view(-1)[segment.offset : segment.end] = entry.precision.reshape(-1)[source].to(precision)
        return {"anchor_start": start} if precision is None else {"anchor_start": start, "anchor_precision": precision}

    def _rows(self, param: Tensor) -> list[_Row]:
        """Views of the parameter, its gradient and state, one per stretch with one coefficient."""
        state = self.state_of(param)
        grad = param.grad if param.grad is not None else torch.zeros_like(param)
        start, precision = state.get("anchor_start"), state.get("anchor_precision")
        layout = self._layout(param)
        whole = _Row(param.detach(), grad, state["exp_avg"], state["exp_avg_sq"], start, precision, 0.0)
        rows = [whole] if len(layout) == 1 else [whole.cut(segment) for segment in layout]
        for row, segment in zip(rows, layout, strict=True):
            if self.anchor is None or segment.name is None:
                row.start = row.precision = None
            else:
                row.coefficient = self.anchor.entries[segment.name].coefficient
        return rows

    def _step_params(self, group: dict[str, Any], step: int, params: list[Tensor]) -> None:
        """One fused step over parameters with one step count."""
        rows = [row for param in params for row in self._rows(param)]
        beta1, beta2 = group["betas"]
        hyper = AdamWHyper(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            mode=self.anchor_mode,
        )
        use_anchor = self.anchor is not None and not self._pulled
        penalty = adamw_anchored_(
            [row.param for row in rows],
            [row.grad for row in rows],
            [row.exp_avg for row in rows],
            [row.exp_avg_sq for row in rows],
            hyper,
            _anchors(rows) if use_anchor else None,
        )
        if use_anchor:
            self._record(params, penalty)

    def _record(self, params: list[Tensor], penalty: Tensor) -> None:
        """Keep the penalty of these parameters for logging, replacing what they said before."""
        ids = tuple(id(param) for param in params)
        touched = set(ids)
        self._penalties = {key: value for key, value in self._penalties.items() if touched.isdisjoint(key)}
        if ids:
            self._penalties[ids] = penalty


def _anchors(rows: list[_Row]) -> Anchors:
    """The anchor lists of a list of rows."""
    return Anchors(
        [row.start for row in rows],
        [row.precision for row in rows],
        [row.coefficient for row in rows],
    )

"""Where per-sample gradients end: squared, summed over samples and added to the Fisher of their parameter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ftfast.errors import ModelError
from ftfast.kernels.fisher_ops import per_sample_fisher_

__all__ = ["FisherSink", "leaves_of"]

Pair = tuple[Tensor, Tensor]


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Leaf tensors that a tensor was computed from.

    Args:
        tensor: A leaf, or the result of differentiable operations.

    Returns:
        Every leaf that requires a gradient, once.
    """
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions if following is not None]
    return list(found.values())


class FisherSink:
    """Collects squared per-sample gradients of one batch after another.

    A parameter used once per pass is squared where its gradient appears. One used several times (tied weights, a
    ``logit_scale`` in two directions) has its uses added inside each sample first; parameters seen through other
    operations (``logit_scale.exp()``, a slice, a cast) are pulled back through those at the end of the pass.

    Args:
        parameters: Trainable parameters by name.

    Attributes:
        values: Running sum of squares by name, float32.
        reached: Names whose gradient was seen at least once.
        gate: Scalar through which captured layers hang in the graph. They hide the weights themselves from autograd,
            so that the backward pass neither makes weight gradients nor uses up the graphs of derived weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.values = {
            name: torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            for name, parameter in parameters.items()
        }
        self.reached: set[str] = set()
        device = next((parameter.device for parameter in parameters.values()), None)
        self.gate = torch.zeros((), device=device, requires_grad=True)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._uses: Counter[tuple[str, int]] = Counter()
        self._pairs: dict[tuple[str, int], list[Pair]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}
        self._derived: list[Pair] = []
        self._derived_names: set[str] = set()

    def name_of(self, tensor: Tensor) -> str | None:
        """Name of a parameter, None for anything else.

        Args:
            tensor: Any tensor.

        Returns:
            The name.
        """
        return self._names.get(id(tensor))

    def slot_of(self, weight: Tensor) -> tuple[str, int] | None:
        """Name and first element of a parameter, or of a view of some of its leading rows.

        Args:
            weight: A weight as an operation received it.

        Returns:
            None if it is neither.
        """
        name = self.name_of(weight)
        if name is not None:
            return name, 0
        base = weight._base
        name = None if base is None else self.name_of(base)
        if base is None or name is None or weight.dim() != base.dim() or weight.stride() != base.stride():
            return None
        if weight.shape[1:] != base.shape[1:] or not base.is_contiguous():
            return None
        return name, int(weight.storage_offset()) - int(base.storage_offset())

    def uses(self, slot: tuple[str, int]) -> int:
        """Announced uses of a slot in this pass.

        Args:
            slot: Result of :meth:`slot_of`.

        Returns:
            The count.
        """
        return self._uses[slot]

    def expect(self, weight: Tensor | None, matrix: bool = False) -> None:
        """Announce one use of a weight in the forward pass.

        Args:
            weight: The weight, or None.
            matrix: It will arrive by :meth:`product`, which also takes views of a parameter's rows.
        """
        if weight is None or not weight.requires_grad:
            return
        slot = self.slot_of(weight) if matrix or self.name_of(weight) is not None else None
        if slot is not None:
            self._uses[slot] += 1
        else:
            self._derived_names.update(name for leaf in leaves_of(weight) if (name := self.name_of(leaf)) is not None)

    def product(self, weight: Tensor, activations: Tensor, output_grads: Tensor) -> None:
        """Take one use of a matrix: per-sample gradient ``G_n^T A_n``, reshaped to the weight.

        Args:
            weight: The weight, whose first axis is the output.
            activations: (N, T, in).
            output_grads: (N, T, out).
        """
        slot = self.slot_of(weight)
        if slot is None:
            gradient = torch.einsum("nto,nti->noi", output_grads.float(), activations.float())
            self._derived.append((weight, gradient.view(gradient.shape[0], *weight.shape)))
            return
        self._refuse_mixed_use(slot[0])
        pairs = self._pairs[slot]
        pairs.append((activations, output_grads))
        if len(pairs) < self._uses[slot]:
            return
        # Uses of one matrix in one sample add up before squaring: the same as a longer sequence.
        inputs = pairs[0][0] if len(pairs) == 1 else torch.cat([pair[0] for pair in pairs], dim=1)
        grads = pairs[0][1] if len(pairs) == 1 else torch.cat([pair[1] for pair in pairs], dim=1)
        del self._pairs[slot]
        value = self.values[slot[0]]
        rows = weight.shape[0]
        first = slot[1] // max(value[0].numel(), 1)
        target = value[first : first + rows].view(rows, -1)
        per_sample_fisher_(target, _unit_stride(inputs), _unit_stride(grads))
        self.reached.add(slot[0])

    def samples(self, weight: Tensor | None, gradient: Tensor) -> None:
        """Take one use of any weight by its per-sample gradient.

        Args:
            weight: The weight or an expression of parameters; None is ignored.
            gradient: (N, *weight.shape).
        """
        if weight is None or not weight.requires_grad:
            return
        slot = self.slot_of(weight)
        name = self.name_of(weight)
        if name is None or slot is None:
            self._derived.append((weight, gradient))
            return
        if self._uses[slot] == 1 and name not in self._derived_names:
            self._square(name, gradient)
        else:
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient

    def rows(self, weight: Tensor, indices: Tensor, output_grads: Tensor, padding: int | None) -> None:
        """Take one use of an embedding table: rows looked up twice in a sample add up before squaring.

        Args:
            weight: The (entries, width) table.
            indices: (N, T) entries.
            output_grads: (N, T, width).
            padding: Entry that receives no gradient.

        Raises:
            ModelError: The table is used more than once in a pass.
        """
        name = self.name_of(weight)
        if name is None or self._uses[(name, 0)] != 1 or name in self._derived_names:
            raise ModelError(
                "an embedding table that is also used elsewhere in the model cannot be captured; use method='loop'"
            )
        entries, width = weight.shape
        sample = torch.arange(indices.shape[0], device=indices.device)[:, None]
        keys, inverse = torch.unique((sample * entries + indices).reshape(-1), return_inverse=True)
        sums = torch.zeros(keys.numel(), width, dtype=torch.float32, device=output_grads.device)
        sums.index_add_(0, inverse, output_grads.reshape(-1, width).float())
        looked_up = keys % entries
        if padding is not None:
            sums[looked_up == padding] = 0.0
        self.values[name].index_add_(0, looked_up, sums.square_())
        self.reached.add(name)

    def finish_pass(self) -> None:
        """Square what was waiting for its other uses, and pull derived weights back to their parameters.

        Raises:
            ModelError: A matrix did not see all of its uses in the backward pass.
        """
        incomplete = [slot[0] for slot, pairs in self._pairs.items() if pairs]
        if incomplete:
            raise ModelError(f"'{incomplete[0]}' is used several times, but not every use reached the loss")
        if self._derived:
            outputs, gradients = [weight for weight, _ in self._derived], [grad for _, grad in self._derived]
            leaves = [leaf for leaf in _unique_leaves(outputs) if self.name_of(leaf) is not None]
            pulled = torch.autograd.grad(
                outputs, leaves, gradients, is_grads_batched=True, allow_unused=True, retain_graph=False
            )
            for leaf, gradient in zip(leaves, pulled, strict=True):
                name = self.name_of(leaf)
                if name is not None and gradient is not None:
                    self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        for name, gradient in self._sums.items():
            self._square(name, gradient)
        self.start_pass()

    def start_pass(self) -> None:
        """Forget the uses announced so far."""
        self._uses.clear()
        self._pairs.clear()
        self._sums.clear()
        self._derived.clear()
        self._derived_names.clear()

    def _square(self, name: str, gradient: Tensor) -> None:
        """Add the squares of (N, ...) per-sample gradients."""
        self.values[name].add_(gradient.float().square().sum(0).view_as(self.values[name]))
        self.reached.add(name)

    def _refuse_mixed_use(self, name: str) -> None:
        """A matrix used both as it is and through an expression cannot be squared at its first use."""
        if name in self._derived_names:
            raise ModelError(
                f"'{name}' is used both directly and through another operation in one pass; use method='loop'"
            )


def _unique_leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Leaves of several tensors, each once."""
    return list({id(leaf): leaf for tensor in tensors for leaf in leaves_of(tensor)}.values())


def _unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""The flat float32 shards an optimizer owns: listing, refreshing, and checkpoints that fit any number of processes.

A checkpoint holds, per process and per parameter name, the stretch of the flattened parameter that process owned, with
everything the optimizer keeps for it. Reading cuts whatever stretch is owned now out of whatever was written, so a run
can go on with another number of processes, another ZeRO stage, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.errors import CheckpointError
from ftfast.weightspace import AnchoredAdamW
from ftfast.weightspace.sharding import Segment, segments_of

PATTERN = "shard_{rank:05d}.pt"
WEIGHT = "weight"


class Shards:
    """The tensors an optimizer updates, seen as stretches of named parameters.

    Args:
        optimizer: The optimizer whose groups hold parameters or flat shards.
        tensors: Those parameters or shards.
        parameters: Trainable parameters by name.
    """

    def __init__(
        self, optimizer: AnchoredAdamW, tensors: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.optimizer = optimizer
        self.tensors = list(tensors)
        self.layout: list[list[Segment]] = [segments_of(tensor, parameters) for tensor in self.tensors]
        self.sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in parameters.items()}

    def save(self, folder: Path, rank: int, averages: Sequence[Tensor] = ()) -> None:
        """Write this process's stretches.

        Args:
            folder: Where all processes write.
            rank: This process.
            averages: Averaged weights aligned with the tensors, if an average is kept.
        """
        pieces: list[dict[str, Any]] = []
        for number, tensor in enumerate(self.tensors):
            values = {WEIGHT: tensor.detach(), **self._state(tensor)}
            if averages:
                values["average"] = averages[number]
            for segment in self.layout[number]:
                if segment.name is None:
                    continue
                cut = {k: v.reshape(-1)[segment.offset : segment.end].cpu().clone() for k, v in values.items()}
                pieces.append({"name": segment.name, "start": segment.source, "values": cut})
        steps = [float(self.optimizer.state[t]["step"]) for t in self.tensors if "step" in self.optimizer.state[t]]
        torch.save({"pieces": pieces, "step": max(steps, default=0.0)}, folder / PATTERN.format(rank=rank))

    def load(self, folder: Path, averages: Sequence[Tensor] = ()) -> None:
        """Fill the tensors and the optimizer's state from what any number of processes wrote.

        Args:
            folder: A checkpoint.
            averages: Tensors to fill with averaged weights.

        Raises:
            CheckpointError: If the files do not cover every weight of this run.
        """
        stored = Stored(folder, self.sizes)
        for number, tensor in enumerate(self.tensors):
            state = self.materialise(tensor)
            if stored.step:
                state["step"] = torch.full((), stored.step)
            values = {WEIGHT: tensor.detach(), **self._state(tensor)}
            if averages:
                values["average"] = averages[number]
            for segment in self.layout[number]:
                if segment.name is not None:
                    for key, value in values.items():
                        stored.read(segment, key, value.view(-1)[segment.offset : segment.end])

    def materialise(self, tensor: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of one tensor, made now if it has not stepped yet."""
        return self.optimizer.state_of(tensor)

    def _state(self, tensor: Tensor) -> dict[str, Tensor]:
        """State tensors shaped like the parameter."""
        state = self.materialise(tensor)
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() == tensor.numel() and k != "step"}


class Stored:
    """What the processes of an earlier run wrote.

    Args:
        folder: A checkpoint.
        sizes: Elements of each parameter of this run.

    Raises:
        CheckpointError: If a file is missing, damaged or of another model.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
        self.step = 0.0
        files = sorted(folder.glob("shard_*.pt"))
        if not files:
            raise CheckpointError(
                f"{folder} holds no shards; it was written without DeepSpeed. Resume as it was started."
            )
        for path in files:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises many kinds for a damaged file
                raise CheckpointError(
                    f"{path} is damaged: {str(error).splitlines()[0]}. Remove {folder} to resume from an earlier one."
                ) from error
            self.step = max(self.step, float(content["step"]))
            for piece in content["pieces"]:
                self.pieces.setdefault(piece["name"], []).append((int(piece["start"]), piece["values"]))
        self._check(sizes)

    def _check(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            covered = torch.zeros(size, dtype=torch.bool)
            for start, values in self.pieces.get(name, ()):
                covered[start : start + values[WEIGHT].numel()] = True
            if not bool(covered.all()):
                raise CheckpointError(
                    f"{self.folder} lacks weights of '{name}': a file of another process is missing, or it belongs to "
                    "another model. Resume from another checkpoint."
                )

    def read(self, segment: Segment, key: str, out: Tensor) -> None:
        """Copy the stored values of a stretch.

        Args:
            segment: Which stretch of which parameter.
            key: Which values; absent ones (no average was kept) are taken from the weights.
            out: Filled in place.
        """
        begin, end = segment.source, segment.source + segment.length
        for start, values in self.pieces[segment.name or ""]:
            source = values.get(key, values[WEIGHT] if key == "average" else None)
            if source is None:
                raise CheckpointError(
                    f"{self.folder} has no '{key}' of '{segment.name}': the recipe or its anchor differs."
                )
            low, high = max(begin, start), min(end, start + source.numel())
            if low < high:
                out[low - begin : high - begin].copy_(source[low - start : high - start])

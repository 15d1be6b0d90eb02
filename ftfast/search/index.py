"""`ExactIndex`: a gallery that is kept, grown, searched and saved, with faiss's calling conventions."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftfast.errors import CheckpointError, FtfastError, ShapeError
from ftfast.search.arrays import METRICS, Problem, check_k, check_matrix, result_wrapper, to_tensor
from ftfast.search.native import Certificate, NativeShadow, default_mode, extension, range_native, topk_native
from ftfast.search.operator import solve
from ftfast.search.reference import pair_scores

_FORMAT = "ftfast-exact-index-1"


class ExactIndex:
    """Exact nearest neighbours over rows that stay. `ExactIndex(d)` answers like faiss's `IndexFlatIP(d)`, faster.

    On a CPU with the compiled extension the index keeps a low-precision copy of its rows (int8: a quarter of float32,
    bfloat16: a half) that lets most rows be dropped with proof; the result is exact and follows `ftfast.search.topk`.
    As in faiss, `search` pads with index -1 where there are fewer than k rows, instead of failing.

    Args:
        d: Embedding width.
        metric: "ip", "cosine" or "l2".
        mode: "auto", or "int8", "bf16" to choose the copy, or "fp32" for none.

    Attributes:
        d: Embedding width.
        metric: As given.
        certificate: Work counters of the last search (None without the extension).
        is_trained: Always True; there is nothing to train.
    """

    is_trained = True

    def __init__(self, d: int, metric: str = "ip", *, mode: str = "auto") -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ShapeError(f"d is {d!r}; the width of an index must be a positive integer.")
        if metric not in METRICS:
            raise ShapeError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}.")
        if mode not in ("auto", "int8", "bf16", "fp32"):
            raise ShapeError(f"mode is {mode!r}; choose one of auto, int8, bf16, fp32.")
        self.d, self.metric, self.mode = d, metric, mode
        self.certificate: Certificate | None = None
        self._storage: torch.Tensor | None = None
        self._count = 0
        self._shadow: NativeShadow | None = None

    @property
    def ntotal(self) -> int:
        """Number of rows."""
        return self._count

    @property
    def vectors(self) -> torch.Tensor:
        """(ntotal, d) view of the rows; do not write to it."""
        return torch.empty(0, self.d) if self._storage is None else self._storage[: self._count]

    def __len__(self) -> int:
        return self._count

    def train(self, x: Any) -> None:
        """Does nothing; present because faiss's indexes have it.

        Args:
            x: Ignored.
        """

    def add(self, x: Any) -> None:
        """Appends rows; their indices go on from `ntotal`.

        Args:
            x: (N, d) array of float32, float16, bfloat16 or int8. The first call fixes the dtype and the device.

        Raises:
            ShapeError: If width, dtype or device differ from what is in the index.
        """
        rows = self._checked(x, "x")
        if self._storage is None:
            self._storage, self._count = rows.clone(), rows.shape[0]
        else:
            if rows.dtype != self._storage.dtype or rows.device != self._storage.device:
                raise ShapeError(
                    f"x is {rows.dtype} on {rows.device}, but the index holds {self._storage.dtype} on "
                    f"{self._storage.device}; convert x first."
                )
            self._grow(rows.shape[0])
            self._storage[self._count : self._count + rows.shape[0]] = rows
            self._count += rows.shape[0]
        if self._uses_shadow():
            self._encode(rows)

    def search(self, x: Any, k: int) -> tuple[Any, Any]:
        """The k nearest rows of every query.

        Args:
            x: (Q, d) array.
            k: Neighbours per query; beyond `ntotal` the result is padded.

        Returns:
            Scores (Q, k) float32 and indices (Q, k) int64 in the array library of `x`; -1 pads.

        Raises:
            ShapeError: If x or k cannot be used.
        """
        queries = self._checked(x, "x")
        check_k(k, max(int(k), 1) if isinstance(k, (int, np.integer)) else 1)
        wrap = result_wrapper(x)
        used = min(int(k), self._count)
        worst = torch.inf if self.metric == "l2" else -torch.inf
        scores = torch.full((queries.shape[0], int(k)), worst, device=queries.device)
        indices = torch.full((queries.shape[0], int(k)), -1, dtype=torch.int64, device=queries.device)
        if used:
            found, ids = self._solve(Problem(queries, self.vectors, used, self.metric))
            scores[:, :used], indices[:, :used] = found.float(), ids
        return wrap(scores), wrap(indices)

    def range_search(self, x: Any, radius: float) -> tuple[Any, Any, Any]:
        """Every row with a score above `radius` (l2: a squared distance below it), best first.

        Args:
            x: (Q, d) array.
            radius: The limit, compared in float32.

        Returns:
            lims (Q + 1,) int64, scores (M,) float32 and indices (M,) int64: query i owns [lims[i], lims[i + 1]).
        """
        queries = self._checked(x, "x")
        wrap = result_wrapper(x)
        if self._count == 0:
            sizes = torch.zeros(queries.shape[0], dtype=torch.int64)
            scores, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
        elif self._native(queries):
            problem = Problem(queries, self.vectors, 1, self.metric)
            self._ready()
            mode = default_mode(self.d) if self.mode == "auto" else self.mode
            sizes, ids, scores, self.certificate = range_native(problem, radius, shadow=self._shadow, mode=mode)
        else:
            sizes, ids, scores = self._range_by_blocks(queries, radius)
        lims = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0).cpu()])
        return wrap(lims), wrap(scores), wrap(ids)

    def remove_ids(self, ids: Any) -> int:
        """Removes rows; later rows move up, as in faiss's flat indexes.

        Args:
            ids: Array or list of indices; those that are not there are ignored.

        Returns:
            How many rows were removed.
        """
        wanted = torch.as_tensor(np.asarray(ids, dtype=np.int64).reshape(-1))
        wanted = wanted[(wanted >= 0) & (wanted < self._count)]
        keep = torch.ones(self._count, dtype=torch.bool)
        keep[wanted] = False
        removed = int(self._count - keep.sum())
        if removed:
            self._storage = self.vectors[keep.to(self.vectors.device)]
            self._count -= removed
            self._shadow = None
        return removed

    def reset(self) -> None:
        """Removes all rows."""
        self._storage, self._count, self._shadow, self.certificate = None, 0, None, None

    def reconstruct(self, key: int) -> Any:
        """One stored row, as numpy.

        Args:
            key: Its index.

        Returns:
            (d,) array.

        Raises:
            ShapeError: If there is no such row.
        """
        if not 0 <= key < self._count:
            raise ShapeError(f"key is {key}, but the index has {self._count} rows.")
        return self.vectors[key].cpu().float().numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows and the metric to one safetensors file, atomically.

        The low-precision copy is not saved: it is made again at the first search, because a file could lie about it.

        Args:
            path: Target file.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        from safetensors.torch import save_file

        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                temporary = Path(folder) / "index"
                tensors = {"vectors": self.vectors.cpu().contiguous()} if self._count else {}
                metadata = {"format": _FORMAT, "metric": self.metric, "d": str(self.d)}
                save_file(tensors, temporary, metadata=metadata)
                os.replace(temporary, target)
        except OSError as error:
            raise CheckpointError(f"{target}: the index cannot be written ({error}).") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mode: str = "auto") -> ExactIndex:
        """Opens a saved index; the rows stay in the file and are mapped into memory.

        Args:
            path: A file written by `save`.
            mode: As in the constructor.

        Returns:
            The index.

        Raises:
            CheckpointError: If the file is missing, truncated, or not such an index.
        """
        metadata, vectors = _read(Path(path))
        try:
            index = cls(int(metadata["d"]), metadata["metric"], mode=mode)
            if vectors is not None:
                index._storage = index._checked(vectors, "the stored rows")
                index._count = vectors.shape[0]
        except (FtfastError, ValueError) as error:
            raise CheckpointError(f"{path}: not a usable index: {error}") from error
        return index

    def _checked(self, x: Any, name: str) -> torch.Tensor:
        tensor = check_matrix(to_tensor(x, name), name)
        if tensor.shape[1] != self.d:
            raise ShapeError(f"{name} has width {tensor.shape[1]} but the index has width {self.d}.")
        return tensor

    def _grow(self, extra: int) -> None:
        """Makes room, doubling so that many small additions stay linear."""
        old = self.vectors
        if self._storage is None or self._storage.shape[0] < self._count + extra:
            rows = max(self._count + extra, 2 * self._count)
            self._storage = torch.empty(rows, self.d, dtype=old.dtype, device=old.device)
            self._storage[: self._count] = old

    def _native(self, queries: torch.Tensor) -> bool:
        return extension() is not None and queries.device.type == "cpu" and self.vectors.device.type == "cpu"

    def _uses_shadow(self) -> bool:
        mode = default_mode(self.d) if self.mode == "auto" else self.mode
        return mode != "fp32" and extension() is not None and self.vectors.device.type == "cpu"

    def _encode(self, rows: torch.Tensor) -> None:
        if self._shadow is None:
            self._shadow = NativeShadow(self.metric, default_mode(self.d) if self.mode == "auto" else self.mode, self.d)
            rows = self.vectors
        self._shadow.append(rows)

    def _ready(self) -> None:
        if self._shadow is None and self._uses_shadow():
            self._encode(self.vectors)

    def _solve(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        if problem.queries.device != problem.gallery.device:
            raise ShapeError(f"x is on {problem.queries.device} but the index is on {problem.gallery.device}.")
        if not self._native(problem.queries):
            self.certificate = None
            return solve(problem, "auto")
        self._ready()
        mode = "fp32" if self._shadow is None else self._shadow.mode
        scores, indices, self.certificate = topk_native(problem, shadow=self._shadow, mode=mode)
        return scores, indices

    def _range_by_blocks(self, queries: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Range search without the extension, one query at a time in float64."""
        sizes, ids, scores = [], [], []
        gallery = self.vectors
        for query in queries.double():
            value = torch.cat([pair_scores(query[None], part.double(), self.metric) for part in gallery.split(8192)])
            shown = (-value if self.metric == "l2" else value).float()
            hits = (shown < radius if self.metric == "l2" else shown > radius).nonzero()[:, 0]
            hits = hits[value[hits].argsort(descending=True, stable=True)]
            sizes.append(len(hits))
            ids.append(hits)
            scores.append(shown[hits])
        return torch.tensor(sizes), torch.cat(ids), torch.cat(scores)


def _read(path: Path) -> tuple[dict[str, str], torch.Tensor | None]:
    """Metadata and rows of an index file; every way in which the file can be wrong becomes one error."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if metadata.get("format") != _FORMAT or names not in (["vectors"], []):
                raise CheckpointError(f"{path}: not an index written by ExactIndex.save.")
            if not {"d", "metric"} <= metadata.keys():
                raise CheckpointError(f"{path}: the index does not say its width and metric; write it again.")
            return metadata, file.get_tensor("vectors") if names else None
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such index file.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}); build the index again.") from error

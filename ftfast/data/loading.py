"""Batches: decoding, seeded augmentation, replacement of bad images, workers and exact resuming.

Everything about batch *n* of epoch *e* follows from (seed, e, n): which images, and the random numbers of their
augmentation. The number of workers, where a run was interrupted and what else draws random numbers change nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ftfast.data.dataset import ImageDataset
from ftfast.data.fetching import Batch, BatchKey, Fetched, Fetcher, Transform
from ftfast.data.samplers import BatchPlan, LoaderOptions, SamplerName, SequentialPlan, make_plan
from ftfast.errors import CheckpointError, DataError

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_SAVE = 60


class _Keys:
    """The stream of batch keys from a position on, as a DataLoader sampler."""

    def __init__(self, plan: BatchPlan, options: LoaderOptions, start: int, endless: bool) -> None:
        self.plan, self.options, self.start, self.endless = plan, options, start, endless

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, skip = divmod(self.start, self.plan.steps_per_epoch)
        while self.endless or epoch == 0:
            for batch in self.plan.epoch(epoch)[skip:]:
                yield BatchKey(epoch, np.split(batch, self.options.world_size)[self.options.rank], batch)
            epoch, skip = epoch + 1, 0


def _identity(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The main process saves first and then ends its
    # workers; one that died before would end training with an error, so they outlive a first SIGTERM for a while.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


@contextlib.contextmanager
def _held_back_signals() -> Iterator[None]:
    """Workers inherit the blocked signals, so one that comes before their handlers are set waits for these."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_later(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(_SECONDS_TO_SAVE)


class BatchLoader:
    """Iterator of :class:`Batch`; made by :func:`make_loader`.

    Attributes:
        steps_per_epoch: Batches in one epoch.
        wait_seconds: Time spent waiting for batches so far; divide by wall time for the data-wait share.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        plan: BatchPlan,
        *,
        workers: int,
        max_bad_fraction: float,
        options: LoaderOptions,
        settings: Mapping[str, Any],
    ) -> None:
        self._dataset, self._plan, self._options = dataset, plan, options
        self._max_bad_fraction = max_bad_fraction
        self._allowed = math.floor(max_bad_fraction * len(dataset) + 1e-9)  # 0.29 * 100 is 28.999...
        replace_bad = {"shuffle": "next"}.get(settings["sampler"], settings["sampler"])
        self._fetcher = Fetcher(dataset, transform, settings["seed"], replace_bad, self._allowed)
        self._workers = workers
        self._settings = dict(settings)  # what must be equal when a checkpoint is continued
        self._position = 0
        self._stream: Iterator[Fetched] | None = None
        self._bad: dict[int, str] = {}
        self.wait_seconds = 0.0

    @property
    def dataset(self) -> ImageDataset:
        """The images that are loaded."""
        return self._dataset

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return self._plan.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self._position // self.steps_per_epoch

    @property
    def bad_images(self) -> int:
        """Number of different images that could not be decoded so far."""
        return len(self._bad)

    @property
    def bad_image_messages(self) -> list[str]:
        """One sentence for each image that could not be decoded so far."""
        return list(self._bad.values())

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            while True:
                if self._stream is None:
                    self._stream = self._open_stream()
                fetched = self._next_fetched(self._stream)
                self._position += 1
                self._count_bad(fetched.bad)
                if fetched.batch is not None:
                    return fetched.batch
        finally:
            self.wait_seconds += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it belongs to, as plain values.

        Batches that workers prepared but nobody took are not counted: they will be made again.
        """
        return {**self._identity(), "position": self._position, "bad": {str(i): m for i, m in self._bad.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Args:
            state: What :meth:`state_dict` returned, with the same data and settings.

        Raises:
            CheckpointError: The data, seed, batch size or sampler differ from those of the checkpoint.
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"the checkpoint was written with {key} = {state.get(key)}, but {self._dataset.name} is now loaded "
                    f"with {key} = {mine}, so the order of images cannot be continued. Resume with the same data and "
                    f"settings, or start a new run from the weights."
                )
        self.close()
        self._position = int(state["position"])
        self._bad = {int(i): str(m) for i, m in state["bad"].items()}

    def close(self) -> None:
        """End the workers. The next call of ``next`` starts them again at the same position."""
        self._stream = None

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._dataset.fingerprint,
            "images_per_class": self._options.images_per_class,
            **self._settings,
            # Of all processes together, so that a run can go on with another number of them.
            "batch_size": self._settings["batch_size"] * self._options.world_size,
        }

    def _open_stream(self) -> Iterator[Fetched]:
        keys = _Keys(self._plan, self._options, self._position, self._settings["shuffle"])
        if self._workers == 0:
            return (self._fetcher[key] for key in keys)
        loader: DataLoader[Fetched] = DataLoader(
            self._fetcher,  # type: ignore[arg-type]
            sampler=keys,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_identity,
            num_workers=self._workers,
            prefetch_factor=self._options.prefetch_factor,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that the loader draws nothing from the global one
        )
        with _held_back_signals():
            return iter(loader)

    def _next_fetched(self, stream: Iterator[Fetched]) -> Fetched:
        try:
            return next(stream)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self._dataset.name}: a data loading process died, often because memory ran out ({error}). "
                "Set train.workers to a smaller number, or to 0 to see the cause."
            ) from error

    def _count_bad(self, bad: tuple[tuple[int, str], ...]) -> None:
        self._bad.update(bad)
        first = " ".join(list(self._bad.values())[:3])
        if len(self._bad) == len(self._dataset):
            raise DataError(
                f"{self._dataset.name}: none of its {len(self._bad):,} images can be decoded. First: {first}"
            )
        if len(self._bad) <= self._allowed:
            return
        raise DataError(
            f"{self._dataset.name}: {len(self._bad)} of {len(self._dataset):,} images cannot be decoded, more than "
            f"data.max_bad_fraction {self._max_bad_fraction:g} allows. First: {first} "
            "Repair or remove them, or raise data.max_bad_fraction."
        )


def make_loader(
    dataset: ImageDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    max_bad_fraction: float | None = None,
    sampler: SamplerName = "shuffle",
    options: LoaderOptions | None = None,
) -> BatchLoader:
    """Make a resumable loader of training batches.

    An image that cannot be decoded is counted and replaced by the next one that is not in the batch (class-balanced:
    of the same class; no duplicate captions: with another caption), the same one every time.

    Args:
        dataset: Images with labels, captions, both or neither.
        transform: Turns an RGB image into a float tensor (3, H, W). Its random numbers (torch, random, numpy) are
            seeded for each (seed, epoch, index) and the global states are left as they were.
        batch_size: Images per batch in this process.
        seed: Seed of order and augmentation.
        workers: Loading processes; 0 loads in this one. The batches are the same for any number.
        shuffle: True: endless epochs, each in a new order. False: one pass in order.
        drop_last: Leave out a last, smaller batch of each epoch.
        max_bad_fraction: Share of undecodable images above which loading stops; default the dataset's.
        sampler: ``shuffle``, ``class_balanced`` (P classes x K images) or ``no_duplicate_text``.
        options: Images per class, rank and number of processes, prefetching.

    Returns:
        An iterator of :class:`Batch` with ``state_dict``, ``load_state_dict``, ``bad_images``, ``steps_per_epoch``
        and ``wait_seconds``.

    Raises:
        DataError: The data cannot fill one batch or lacks what the sampler needs; while iterating, too many bad images.
    """
    options = options or LoaderOptions()
    settings = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle, "drop_last": drop_last, "sampler": sampler}
    return BatchLoader(
        dataset,
        transform,
        make_plan(dataset, options=options, **settings),  # type: ignore[arg-type]
        workers=workers,
        max_bad_fraction=dataset.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
        options=options,
        settings=settings,
    )


def iterate_once(
    dataset: ImageDataset, transform: Transform, batch_size: int = 256, workers: int = 0
) -> Iterator[Batch]:
    """Yield every image once, in order, for evaluation.

    Images that cannot be decoded are left out, so use ``batch.indices`` to know which rows came; nothing stands in for
    them, since a stand-in would falsify a metric.

    Args:
        dataset: Images.
        transform: Usually the evaluation transform.
        batch_size: Images per batch.
        workers: Loading processes.

    Yields:
        Batches in dataset order; the last may be smaller.

    Raises:
        DataError: More than ``dataset.max_bad_fraction`` of the images cannot be decoded.
    """
    if len(dataset) == 0:
        return
    loader = BatchLoader(
        dataset,
        transform,
        SequentialPlan(len(dataset), batch_size),
        workers=workers,
        max_bad_fraction=dataset.max_bad_fraction,
        options=LoaderOptions(),
        settings={"seed": 0, "batch_size": batch_size, "shuffle": False, "sampler": "never"},
    )
    try:
        yield from loader
    finally:
        loader.close()

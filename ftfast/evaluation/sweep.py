"""The alpha sweep: results of the weights between start and end (WiSE-FT, Wortsman et al., CVPR 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ftfast.config.schema import SuiteConfig
from ftfast.evaluation.embedding import PixelCache, Progress
from ftfast.evaluation.results import SweepPoint
from ftfast.evaluation.suites import Results, Suite, evaluate, open_suites
from ftfast.models.loading import LoadedModel
from ftfast.weightspace.interpolation import interpolation_sweep


def alpha_sweep(
    loaded: LoadedModel,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alphas: Sequence[float],
    suites: Sequence[SuiteConfig | Suite],
    *,
    known: Mapping[float, Results] | None = None,
    batch_size: int = 256,
    cache: PixelCache | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """Measure ``(1 - alpha) start + alpha end`` for each alpha.

    Args:
        loaded: Model whose architecture, transform and tokenizer are used; its weights are left alone.
        start: State dict at alpha 0.
        end: State dict at alpha 1.
        alphas: Points, in any order.
        suites: What to measure.
        known: Results that exist already, by alpha (0 and 1 usually do).
        batch_size: Images per forward pass.
        cache: Keeps the transformed images between points.
        workers: Decoding processes.
        progress: Progress callback.

    Returns:
        One point per alpha, sorted. Memory: one copy of the model.
    """
    opened = open_suites(suites)
    pixels = cache if cache is not None else PixelCache()
    done = dict(known or {})
    network: nn.Module | None = None
    missing = [alpha for alpha in sorted(set(alphas)) if alpha not in done]
    for alpha, state in interpolation_sweep(start, end, missing):
        network = copy.deepcopy(loaded.model) if network is None else network
        network.load_state_dict(state)
        done[alpha] = evaluate(
            loaded, opened, batch_size=batch_size, model=network, cache=pixels, workers=workers, progress=progress
        )
    return [SweepPoint(alpha, done[alpha]) for alpha in sorted(set(alphas))]

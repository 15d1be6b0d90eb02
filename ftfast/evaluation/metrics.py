"""Metrics of retrieval and zero-shot classification, on feature arrays and labels.

Every ranking comes from :func:`ftfast.search.topk`; the functions here only count. A query's own image is excluded by
its index in the gallery, never by "drop the first result": with duplicate images the first result need not be the
query.

Notation: ``P_q`` is the number of gallery items (the query itself not counted) that share a label with query ``q``;
``rel_q(r)`` is 1 if the item at rank ``r`` does. Every per-query function returns one float64 per query; the reported
figure is their mean, in which a query with ``P_q = 0`` counts as 0.

Definitions follow INFUSING's evaluation (arXiv 2508.12137): R@k, mAP@k and UnED's mMP@k, plus mAP@R of "A Metric
Learning Reality Check" (Musgrave et al., 2020). Deviation: INFUSING's R@1 drops rank 0 unconditionally, here the self
match is removed by index.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftfast.errors import ShapeError
from ftfast.search import topk

Array = Any
"""A numpy array or a torch tensor."""

Labels = Any
"""Class of each item: integers ``(N,)``, or a multi-hot matrix ``(N, C)`` from :func:`multi_hot`."""

QUERY_BLOCK = 4096
"""Queries ranked at a time; bounds the ``(queries, depth)`` arrays."""


@dataclass(frozen=True)
class Ranking:
    """The first results of each query, reduced to what the metrics need.

    Attributes:
        relevant: ``(Q, K)`` bool, whether the item at each rank shares a label with the query.
        positives: ``(Q,)`` int64, ``P_q``.
    """

    relevant: np.ndarray
    positives: np.ndarray


def multi_hot(label_sets: Sequence[Collection[int]], classes: int) -> np.ndarray:
    """Turn one set of labels per item into the multi-hot matrix that the metrics take.

    Args:
        label_sets: Labels of each item; any overlap between two items makes them a match.
        classes: Number of classes.

    Returns:
        ``(N, classes)`` float32 of zeros and ones.
    """
    matrix = np.zeros((len(label_sets), classes), dtype=np.float32)
    for row, labels in enumerate(label_sets):
        matrix[row, list(labels)] = 1.0
    return matrix


def _to_numpy(array: Array) -> np.ndarray:
    if isinstance(array, Tensor):
        return array.detach().cpu().numpy()
    return np.asarray(array)


def _features(array: Array) -> Tensor:
    """Features as float32; half precision would round away the differences that ranks are made of."""
    return torch.as_tensor(array).detach().float()


def _check_labels(query_labels: np.ndarray, gallery_labels: np.ndarray) -> None:
    if query_labels.ndim != gallery_labels.ndim or query_labels.ndim not in (1, 2):
        raise ShapeError(
            f"query labels have shape {query_labels.shape} and gallery labels "
            f"{gallery_labels.shape}: both must be integers (N,) "
            "or multi-hot (N, C)."
        )
    if query_labels.ndim == 2 and query_labels.shape[1] != gallery_labels.shape[1]:
        raise ShapeError(
            f"multi-hot labels have {query_labels.shape[1]} classes for queries and "
            f"{gallery_labels.shape[1]} for the gallery; "
            "both must cover the same classes."
        )


def relevance(query_labels: Labels, gallery_labels: Labels, indices: Array) -> np.ndarray:
    """Whether each ranked gallery item shares a label with its query.

    Args:
        query_labels: ``(Q,)`` integers or ``(Q, C)`` multi-hot.
        gallery_labels: ``(N,)`` integers or ``(N, C)`` multi-hot.
        indices: ``(Q, K)`` gallery indices in rank order; a negative index is an empty place and never relevant.

    Returns:
        ``(Q, K)`` bool.
    """
    queries, gallery, ranked = _to_numpy(query_labels), _to_numpy(gallery_labels), _to_numpy(indices)
    _check_labels(queries, gallery)
    taken = gallery[np.maximum(ranked, 0)]
    if queries.ndim == 1:
        match = taken == queries[:, None]
    else:
        match = np.einsum("qc,qkc->qk", queries.astype(np.float32), taken.astype(np.float32)) > 0
    return match & (ranked >= 0)


def count_positives(query_labels: Labels, gallery_labels: Labels, self_indices: Array | None = None) -> np.ndarray:
    """``P_q``: gallery items sharing a label with each query, the query itself not counted.

    Args:
        query_labels: ``(Q,)`` integers or ``(Q, C)`` multi-hot.
        gallery_labels: ``(N,)`` integers or ``(N, C)`` multi-hot.
        self_indices: ``(Q,)`` gallery index of each query's own entry, negative where it has none; None: no query is in
            the gallery.

    Returns:
        ``(Q,)`` int64.
    """
    queries, gallery = _to_numpy(query_labels), _to_numpy(gallery_labels)
    _check_labels(queries, gallery)
    if queries.ndim == 1:
        values, counts = np.unique(gallery, return_counts=True)
        place = np.searchsorted(values, queries).clip(max=max(len(values) - 1, 0))
        found = values[place] == queries if len(values) else np.zeros(len(queries), dtype=bool)
        positives = np.where(found, counts[place] if len(values) else 0, 0).astype(np.int64)
    else:
        transposed = gallery.astype(np.float32).T
        blocks = (queries[i : i + QUERY_BLOCK].astype(np.float32) for i in range(0, len(queries), QUERY_BLOCK))
        found_in = [((block @ transposed) > 0).sum(axis=1) for block in blocks]
        positives = np.concatenate([np.zeros(0, dtype=np.int64), *found_in]).astype(np.int64)
    if self_indices is not None:
        own = _to_numpy(self_indices).reshape(-1, 1)
        positives = positives - relevance(queries, gallery, own)[:, 0]
    return positives


def rank(
    query_features: Array,
    gallery_features: Array,
    query_labels: Labels,
    gallery_labels: Labels,
    *,
    depth: int,
    self_indices: Array | None = None,
) -> Ranking:
    """Rank the gallery for each query by cosine similarity and mark the relevant items.

    Args:
        query_features: ``(Q, D)``.
        gallery_features: ``(N, D)``.
        query_labels: ``(Q,)`` integers or ``(Q, C)`` multi-hot.
        gallery_labels: ``(N,)`` integers or ``(N, C)`` multi-hot.
        depth: Ranks to keep; clipped to the size of the gallery.
        self_indices: ``(Q,)`` gallery index of each query's own entry, which is excluded; negative: none.

    Returns:
        Ranking with ``K = min(depth, N)``; places that a query cannot fill are not relevant.
    """
    queries, gallery = _features(query_features), _features(gallery_features)
    depth = min(depth, len(gallery))
    positives = count_positives(query_labels, gallery_labels, self_indices)
    if depth == 0 or len(queries) == 0:
        return Ranking(np.zeros((len(queries), depth), dtype=bool), positives)
    own = None if self_indices is None else torch.as_tensor(_to_numpy(self_indices))
    _, indices = topk(queries, gallery, depth, metric="cosine", exclude_self=own)
    return Ranking(relevance(query_labels, gallery_labels, indices), positives)


def recall_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """R@k: 1 if any of the first ``k`` items is relevant. Returns ``(Q,)`` float64."""
    return np.asarray(ranking.relevant[:, :k].any(axis=1), dtype=np.float64)


def precision_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """P@k: relevant items among the first ``k``, divided by ``k`` (whatever ``P_q`` is). Returns ``(Q,)`` float64."""
    return np.asarray(ranking.relevant[:, :k].sum(axis=1) / k)


def _average_precision(relevant: np.ndarray, cut: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """``sum_{r <= cut} Prec(r) rel(r) / denominator``, 0 where the denominator is 0."""
    ranks = np.arange(1, relevant.shape[1] + 1)
    hits = relevant & (ranks[None, :] <= cut[:, None])
    precision = np.cumsum(relevant, axis=1) / ranks[None, :]
    return (precision * hits).sum(axis=1) / np.maximum(denominator, 1)


def map_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """AP@k ``= sum_{r <= k} Prec(r) rel(r) / min(P_q, k)``, 0 if ``P_q = 0``. Returns ``(Q,)`` float64."""
    cut = np.full(len(ranking.positives), k)
    return _average_precision(ranking.relevant, cut, np.minimum(ranking.positives, k))


def map_at_r(ranking: Ranking) -> np.ndarray:
    """AP@R ``= sum_{r <= P_q} Prec(r) rel(r) / P_q``; needs a ranking at least ``max P_q`` deep.

    Returns ``(Q,)`` float64.
    """
    return _average_precision(ranking.relevant, ranking.positives, ranking.positives)


def mmp_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """UnED's modified precision: relevant items in the first ``n = min(P_q, k)``, divided by ``n``; 0 if ``P_q = 0``.

    Unlike P@k it does not punish classes with fewer than ``k`` positives. Returns ``(Q,)`` float64.
    """
    cut = np.minimum(ranking.positives, k)
    ranks = np.arange(1, ranking.relevant.shape[1] + 1)
    return (ranking.relevant & (ranks[None, :] <= cut[:, None])).sum(axis=1) / np.maximum(cut, 1)


RETRIEVAL_METRICS = (
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "precision_at_5",
    "map_at_20",
    "map_at_r",
    "mmp_at_5",
)
"""What :func:`retrieval_metrics` returns."""


def retrieval_metrics(
    query_features: Array,
    query_labels: Labels,
    gallery_features: Array | None = None,
    gallery_labels: Labels | None = None,
    *,
    self_indices: Array | None = None,
) -> dict[str, float]:
    """All image retrieval metrics: R@1/5/10, P@5, mAP@20, mAP@R and mMP@5.

    Args:
        query_features: ``(Q, D)``, any scale.
        query_labels: ``(Q,)`` integers or ``(Q, C)`` multi-hot.
        gallery_features: ``(N, D)``; None: the queries, each without itself.
        gallery_labels: Labels of the gallery, of the same kind; None with ``gallery_features=None``.
        self_indices: ``(Q,)`` gallery index of each query's own entry (negative: none), for a gallery that contains
            queries.

    Returns:
        Name -> mean over the queries, in [0, 1].

    Raises:
        ShapeError: There are no queries, or labels and features disagree in length.
    """
    queries, labels = _features(query_features), _to_numpy(query_labels)
    own: np.ndarray | None
    if gallery_features is None:
        gallery, targets, own = queries, labels, np.arange(len(queries))
    else:
        gallery, targets = _features(gallery_features), _to_numpy(gallery_labels)
        own = None if self_indices is None else _to_numpy(self_indices)
    _check_lengths(len(queries), len(labels), len(gallery), len(targets))
    positives = count_positives(labels, targets, own)
    depth = max(20, int(positives.max()))
    values: dict[str, list[np.ndarray]] = {name: [] for name in RETRIEVAL_METRICS}
    for start in range(0, len(queries), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        ranking = rank(
            queries[part],
            gallery,
            labels[part],
            targets,
            depth=depth,
            self_indices=None if own is None else own[part],
        )
        for k in (1, 5, 10):
            values[f"recall_at_{k}"].append(recall_at_k(ranking, k))
        values["precision_at_5"].append(precision_at_k(ranking, 5))
        values["map_at_20"].append(map_at_k(ranking, 20))
        values["map_at_r"].append(map_at_r(ranking))
        values["mmp_at_5"].append(mmp_at_k(ranking, 5))
    return {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}


def _check_lengths(queries: int, labels: int, gallery: int, targets: int) -> None:
    if queries == 0 or gallery == 0:
        raise ShapeError(f"nothing to rank: {queries} queries and {gallery} gallery items; both must be at least 1.")
    if queries != labels or gallery != targets:
        raise ShapeError(
            f"{queries} query features have {labels} labels and {gallery} gallery features have "
            f"{targets}; the numbers must agree."
        )


def image_text_metrics(
    image_features: Array, text_features: Array, pairs: Array, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k of image -> text and text -> image.

    An image scores if any of its captions is among the first ``k`` texts; a caption, if any image it belongs to (one,
    unless images share a caption) is among the first ``k`` images.

    Args:
        image_features: ``(I, D)``.
        text_features: ``(T, D)``.
        pairs: ``(P, 2)`` integers, the (image, text) pairs that belong together; any number of texts per image.
        ks: Cut-offs.

    Returns:
        ``image_to_text_recall_at_k``, ``text_to_image_recall_at_k`` and their mean ``mean_recall_at_k``, each in [0,
        1].

    Raises:
        ShapeError: There is no image or no text, or ``pairs`` names one that does not exist.
    """
    images, texts, owned = _features(image_features), _features(text_features), _to_numpy(pairs)
    _check_lengths(len(images), len(images), len(texts), len(texts))
    if owned.ndim != 2 or owned.shape[1] != 2 or owned.min(initial=0) < 0 or (owned >= (len(images), len(texts))).any():
        raise ShapeError(
            f"pairs of shape {owned.shape} do not fit {len(images)} images and {len(texts)} texts; "
            "give (image, text) index pairs."
        )
    there = _paired_hits(images, texts, owned, max(ks))
    back = _paired_hits(texts, images, owned[:, ::-1], max(ks))
    result: dict[str, float] = {}
    for k in ks:
        recall = [float(hits[:, :k].any(axis=1).mean()) for hits in (there, back)]
        result[f"image_to_text_recall_at_{k}"], result[f"text_to_image_recall_at_{k}"] = recall
        result[f"mean_recall_at_{k}"] = sum(recall) / 2
    return result


def _paired_hits(queries: Tensor, gallery: Tensor, pairs: np.ndarray, depth: int) -> np.ndarray:
    """``(Q, K)`` bool: whether each result of each query is one of ``pairs``."""
    _, indices = topk(queries, gallery, min(depth, len(gallery)), metric="cosine")
    found = np.arange(len(queries))[:, None] * len(gallery) + _to_numpy(indices)
    return np.isin(found, pairs[:, 0] * len(gallery) + pairs[:, 1]) & (_to_numpy(indices) >= 0)


def ensemble_class_features(prompt_features: Tensor, prompt_classes: Array, classes: int) -> Tensor:
    """Zero-shot classifier weights by prompt ensembling: normalise each prompt, average per class, normalise again.

    Args:
        prompt_features: ``(P, D)`` text features.
        prompt_classes: ``(P,)`` class of each prompt.
        classes: Number of classes ``C``; each needs at least one prompt.

    Returns:
        ``(C, D)`` float32, unit length.
    """
    features = torch.nn.functional.normalize(prompt_features.float(), dim=-1)
    owner = torch.as_tensor(_to_numpy(prompt_classes), dtype=torch.int64, device=features.device)
    total = torch.zeros(classes, features.shape[1], device=features.device).index_add_(0, owner, features)
    return torch.nn.functional.normalize(total, dim=-1)


def classification_metrics(image_features: Array, class_features: Array, labels: Array) -> dict[str, float]:
    """Zero-shot accuracy of the nearest class feature by cosine similarity.

    Args:
        image_features: ``(N, D)``.
        class_features: ``(C, D)`` from :func:`ensemble_class_features`.
        labels: ``(N,)`` true classes.

    Returns:
        ``acc1``, ``mean_per_class_recall`` (over the classes that occur in ``labels``) and, with more than five
        classes, ``acc5``; each in [0, 1].
    """
    images, candidates, truth = _features(image_features), _features(class_features), _to_numpy(labels)
    _check_lengths(len(images), len(truth), len(candidates), len(candidates))
    ranking = rank(images, candidates, truth, np.arange(len(candidates)), depth=5)
    fifth = recall_at_k(ranking, min(5, len(candidates)))
    return _accuracies(recall_at_k(ranking, 1), fifth, truth, len(candidates))


def score_metrics(scores: Array, labels: Array) -> dict[str, float]:
    """Like :func:`classification_metrics`, from scores of any origin; of equal scores the first class wins.

    Args:
        scores: ``(N, C)``.
        labels: ``(N,)`` true classes.

    Returns:
        The same metrics.
    """
    table, truth = _to_numpy(scores), _to_numpy(labels)
    _check_lengths(len(table), len(truth), table.shape[1], table.shape[1])
    order = np.argsort(-table, axis=1, kind="stable")[:, :5]
    hits = order == truth[:, None]
    return _accuracies(hits[:, 0].astype(float), hits.any(axis=1).astype(float), truth, table.shape[1])


def _accuracies(first: np.ndarray, fifth: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, float]:
    _, place, counts = np.unique(truth, return_inverse=True, return_counts=True)
    per_class = np.bincount(place, weights=first) / counts
    result = {"acc1": float(first.mean()), "mean_per_class_recall": float(per_class.mean())}
    if classes > 5:
        result["acc5"] = float(fifth.mean())
    return result

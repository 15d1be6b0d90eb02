"""Metrics against pytorch-metric-learning, scikit-learn, a brute-force ranking and hand-made lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from ftfast.errors import ShapeError
from ftfast.evaluation import metrics
from ftfast.evaluation.continual import continual_metrics, harmonic_mean
from ftfast.evaluation.metrics import Ranking


def problem(
    seed: int, items: int, classes: int, width: int = 16, signal: float = 0.8
) -> tuple[torch.Tensor, np.ndarray]:
    """Noisy class clusters, so that every metric is well inside (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (items,), generator=generator)
    return centres[labels] * signal + torch.randn(items, width, generator=generator), labels.numpy()


def brute_force(queries, query_sets, gallery, gallery_sets, own=None) -> list[tuple[list[bool], int]]:
    """(relevance in rank order, P_q) of each query, by sorting a full float64 similarity row in Python."""
    q = torch.nn.functional.normalize(torch.as_tensor(queries).double(), dim=-1).numpy()
    g = torch.nn.functional.normalize(torch.as_tensor(gallery).double(), dim=-1).numpy()
    result = []
    for i in range(len(q)):
        order = [j for j in sorted(range(len(g)), key=lambda j: (-float(q[i] @ g[j]), j)) if own is None or j != own[i]]
        relevant = [bool(query_sets[i] & gallery_sets[j]) for j in order]
        result.append((relevant, sum(relevant)))
    return result


def slow_metrics(lists: list[tuple[list[bool], int]]) -> dict[str, float]:
    """The definitions, written as loops."""

    def average_precision(relevant, cut, denominator):
        hits, total = 0, 0.0
        for r, good in enumerate(relevant[:cut], start=1):
            hits += good
            total += good * hits / r
        return total / denominator if denominator else 0.0

    rows = []
    for relevant, positives in lists:
        n = min(positives, 5)
        rows.append(
            {
                "recall_at_1": float(any(relevant[:1])),
                "recall_at_5": float(any(relevant[:5])),
                "recall_at_10": float(any(relevant[:10])),
                "precision_at_5": sum(relevant[:5]) / 5,
                "map_at_20": average_precision(relevant, 20, min(positives, 20)),
                "map_at_r": average_precision(relevant, positives, positives),
                "mmp_at_5": sum(relevant[:n]) / n if n else 0.0,
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@pytest.mark.parametrize("seed", [0, 1])
def test_same_set_agrees_with_pytorch_metric_learning(seed: int) -> None:
    features, labels = problem(seed, items=303, classes=11)
    ours = metrics.retrieval_metrics(features, labels)
    unit = torch.nn.functional.normalize(features, dim=-1)
    calculator = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
    theirs = calculator.get_accuracy(unit, torch.as_tensor(labels))
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)
    assert 0.1 < ours["map_at_r"] < 0.9


def test_separate_gallery_agrees_with_pytorch_metric_learning() -> None:
    features, labels = problem(2, items=257, classes=9)
    unit = torch.nn.functional.normalize(features, dim=-1)
    ours = metrics.retrieval_metrics(features[:57], labels[:57], features[57:], labels[57:])
    calculator = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
    theirs = calculator.get_accuracy(unit[:57], torch.as_tensor(labels[:57]), unit[57:], torch.as_tensor(labels[57:]))
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)


def test_full_depth_average_precision_agrees_with_scikit_learn() -> None:
    features, labels = problem(3, items=120, classes=7)
    ranking = metrics.rank(features[:20], features[20:], labels[:20], labels[20:], depth=100)
    ours = metrics.map_at_k(ranking, 100)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    scores = (unit[:20] @ unit[20:].T).numpy()
    theirs = [average_precision_score(labels[20:] == labels[i], scores[i]) for i in range(20)]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("items", [2, 3, 23, 61])
def test_same_set_agrees_with_brute_force(items: int) -> None:
    features, labels = problem(items, items=items, classes=5, width=7)
    sets = [{int(label)} for label in labels]
    truth = slow_metrics(brute_force(features, sets, features, sets, own=range(items)))
    assert metrics.retrieval_metrics(features.numpy(), labels) == pytest.approx(truth, abs=1e-12)


def test_multi_label_sets_match_on_any_overlap() -> None:
    features, first = problem(5, items=70, classes=6)
    second = np.random.default_rng(0).integers(6, size=70)
    sets = [{int(a), int(b)} if i % 3 else set() for i, (a, b) in enumerate(zip(first, second, strict=True))]
    truth = slow_metrics(brute_force(features[:30], sets[:30], features[30:], sets[30:]))
    hot = metrics.multi_hot(sets, classes=6)
    ours = metrics.retrieval_metrics(features[:30], hot[:30], features[30:], hot[30:])
    assert ours == pytest.approx(truth, abs=1e-12)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(6, items=50, classes=4)
    hot = metrics.multi_hot([{int(label)} for label in labels], classes=4)
    whole = metrics.retrieval_metrics(features, labels)
    monkeypatch.setattr(metrics, "QUERY_BLOCK", 7)
    assert metrics.retrieval_metrics(features, labels) == pytest.approx(whole, abs=1e-12)
    assert metrics.retrieval_metrics(features, hot) == pytest.approx(whole, abs=1e-12)


def test_the_query_is_excluded_by_index_even_when_a_twin_ranks_before_it() -> None:
    # rows 0 and 1 are the same picture under two classes; dropping "the first result" of query 1 would drop row 0 and
    # let the query find itself
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1])
    ranking = metrics.rank(features, features, labels, labels, depth=3, self_indices=np.arange(4))
    assert ranking.positives.tolist() == [0, 2, 2, 2]
    assert ranking.relevant[1].tolist() == [False, True, True]  # row 0 first (wrong class), then rows 2 and 3
    # queries 0, 1 and 2 meet a wrong class first (query 2 by the tie between the twins), query 3 finds row 2
    assert metrics.retrieval_metrics(features, labels)["recall_at_1"] == pytest.approx(1 / 4)


def test_only_queries_that_are_in_the_gallery_are_excluded_from_it() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = np.array([0, 1, 0])
    own = np.array([0, -1])
    ranking = metrics.rank(features[:2], features, labels[:2], labels, depth=3, self_indices=own)
    assert ranking.positives.tolist() == [1, 1]
    assert ranking.relevant[0, 1]  # row 2, after row 1
    assert ranking.relevant[1, 0]  # query 1 has no own entry declared and may find row 1


# relevance in rank order, P_q, then AP@20, AP@R, mMP@5, P@5
HAND_MADE = [
    ([1, 0, 1, 0, 0], 2, (1 + 2 / 3) / 2, 1 / 2, 1 / 2, 2 / 5),
    ([0, 0, 0, 0, 0], 3, 0.0, 0.0, 0.0, 0.0),
    ([0, 0, 0, 0, 0], 0, 0.0, 0.0, 0.0, 0.0),
    ([1, 1, 0, 0, 0], 2, 1.0, 1.0, 1.0, 2 / 5),
    ([0, 1, 0, 0, 1], 7, (1 / 2 + 2 / 5) / 7, (1 / 2 + 2 / 5) / 7, 2 / 5, 2 / 5),
    ([1, 0, 0, 0, 1], 1, 1.0 + 2 / 5, 1.0, 1.0, 2 / 5),  # more hits than P_q cannot occur; the formulas still hold
]


@pytest.mark.parametrize(("relevant", "positives", "map20", "mapr", "mmp5", "p5"), HAND_MADE)
def test_hand_made_lists(relevant, positives, map20, mapr, mmp5, p5) -> None:
    ranking = Ranking(np.array([relevant], dtype=bool), np.array([positives]))
    assert metrics.map_at_k(ranking, 20)[0] == pytest.approx(map20)
    assert metrics.map_at_r(ranking)[0] == pytest.approx(mapr)
    assert metrics.mmp_at_k(ranking, 5)[0] == pytest.approx(mmp5)
    assert metrics.precision_at_k(ranking, 5)[0] == pytest.approx(p5)
    assert metrics.recall_at_k(ranking, 2)[0] == float(any(relevant[:2]))


def test_map_cuts_at_k_in_sum_and_denominator() -> None:
    ranking = Ranking(np.array([[1, 0, 1, 1]], dtype=bool), np.array([3]))
    assert metrics.map_at_k(ranking, 2)[0] == pytest.approx(1 / 2)  # min(P_q, k) = 2, one hit at rank 1
    assert metrics.map_at_k(ranking, 3)[0] == pytest.approx((1 + 2 / 3) / 3)


def test_image_text_recall_with_several_captions_agrees_with_brute_force() -> None:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(40, 12, generator=generator)
    owner = torch.randint(40, (130,), generator=generator)
    texts = images[owner] * 0.35 + torch.randn(130, 12, generator=generator)
    pairs = np.stack([owner.numpy(), np.arange(130)], axis=1)
    result = metrics.image_text_metrics(images, texts, pairs)
    image_sets = [{i} for i in range(40)]
    text_sets = [{int(i)} for i in owner]
    there = brute_force(images, image_sets, texts, text_sets)
    back = brute_force(texts, text_sets, images, image_sets)
    for k in (1, 5, 10):
        forward = np.mean([any(relevant[:k]) for relevant, _ in there])
        backward = np.mean([any(relevant[:k]) for relevant, _ in back])
        assert result[f"image_to_text_recall_at_{k}"] == pytest.approx(forward)
        assert result[f"text_to_image_recall_at_{k}"] == pytest.approx(backward)
        assert result[f"mean_recall_at_{k}"] == pytest.approx((forward + backward) / 2)
    assert 0.05 < result["text_to_image_recall_at_1"] < 0.95


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_zero_shot_agrees_with_scikit_learn() -> None:
    features, labels = problem(8, items=400, classes=13)
    labels = np.where(labels == 12, 0, labels)  # a class without images
    centres = torch.stack([features[labels == c].mean(0) if (labels == c).any() else torch.ones(16) for c in range(13)])
    ours = metrics.classification_metrics(features, centres, labels)
    unit = torch.nn.functional.normalize
    scores = (unit(features.double(), dim=-1) @ unit(centres.double(), dim=-1).T).numpy()
    assert ours["acc1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=range(13)))
    assert ours["acc5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(13)))
    assert ours["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert ours["acc1"] < ours["acc5"] < 1


def test_top_five_of_five_classes_is_not_reported() -> None:
    assert "acc5" not in metrics.classification_metrics(torch.eye(5), torch.eye(5), np.arange(5))


def test_prompt_ensemble_normalises_before_and_after_the_mean() -> None:
    prompts = torch.tensor([[10.0, 0.0], [0.0, 0.1], [3.0, 4.0]])
    weights = metrics.ensemble_class_features(prompts, [0, 0, 1], classes=2)
    root = math.sqrt(0.5)
    torch.testing.assert_close(weights, torch.tensor([[root, root], [0.6, 0.8]]))


def test_the_scale_of_features_does_not_matter() -> None:
    features, labels = problem(9, items=60, classes=5)
    scale = torch.logspace(-3, 3, 60)[:, None]
    assert metrics.retrieval_metrics(features * scale, labels) == pytest.approx(
        metrics.retrieval_metrics(features, labels)
    )


def test_features_of_a_diverged_model_score_nothing() -> None:
    features = torch.full((6, 4), float("nan"))
    result = metrics.retrieval_metrics(features, [0, 0, 1, 1, 2, 2])
    assert result == dict.fromkeys(metrics.RETRIEVAL_METRICS, 0.0)
    assert metrics.classification_metrics(features, torch.eye(4), [0, 1, 2, 3, 0, 1])["acc1"] == 0


def test_wrong_shapes_get_a_sentence() -> None:
    with pytest.raises(ShapeError, match=r"^3 query features have 2 labels and 3 gallery features have 2"):
        metrics.retrieval_metrics(torch.eye(3), [0, 1])
    with pytest.raises(ShapeError, match=r"^nothing to rank: 0 queries and 0 gallery items"):
        metrics.retrieval_metrics(torch.zeros(0, 3), [])
    with pytest.raises(ShapeError, match=r"do not fit 2 images and 2 texts"):
        metrics.image_text_metrics(torch.eye(2), torch.eye(2), [(0, 2)])
    with pytest.raises(ShapeError, match=r"multi-hot labels have 2 classes for queries and 3 for the gallery"):
        metrics.relevance(np.eye(2), np.eye(3), np.zeros((2, 1), dtype=int))
    with pytest.raises(ShapeError, match=r"the accuracy matrix has shape \(2, 3\)"):
        continual_metrics(np.zeros((2, 3)))


ZERO_SHOT = {
    "Aircraft": 24.3,
    "Caltech101": 88.4,
    "CIFAR100": 68.2,
    "DTD": 44.6,
    "EuroSAT": 54.9,
    "Flowers": 71.0,
    "Food": 88.5,
    "MNIST": 59.4,
    "OxfordPet": 89.0,
    "StanfordCars": 64.7,
    "SUN397": 65.2,
}
ORDER_ONE = list(ZERO_SHOT)
ORDER_TWO = [ORDER_ONE[i] for i in (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2)]


@pytest.mark.parametrize(("order", "transfer"), [(ORDER_ONE, 69.4), (ORDER_TWO, 65.4)])
def test_zero_shot_clip_on_mtil(order: list[str], transfer: float) -> None:
    row = [ZERO_SHOT[name] for name in order]
    result = continual_metrics([row] * 11)
    assert result.transfer == pytest.approx(transfer, abs=0.051)  # published figures are rounded to one decimal
    assert round(result.average, 1) == round(result.last, 1) == 65.3
    assert result.forgetting == 0


def test_continual_metrics_by_hand() -> None:
    result = continual_metrics([[90, 10, 20], [80, 70, 30], [60, 50, 95]])
    assert result.transfer == pytest.approx((10 + (20 + 30) / 2) / 2)
    assert result.average == pytest.approx(505 / 9)
    assert result.last == pytest.approx(205 / 3)
    assert result.forgetting == pytest.approx(((60 - 90) + (50 - 70) + (95 - 95)) / 2)
    single = continual_metrics([[50.0]])
    assert (single.average, single.last) == (50, 50)
    assert math.isnan(single.transfer)


def test_harmonic_mean_of_published_figures() -> None:
    assert round(harmonic_mean(85.48, 77.08), 2) == 81.06
    assert round(harmonic_mean(78.44, 71.07), 2) == 74.57
    assert harmonic_mean(0, 0) == 0

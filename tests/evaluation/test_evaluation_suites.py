"""Suites on a CLIP whose features can be computed by hand: an image's mean colour, a text's colour word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ftfast.config.schema import DataConfig, SuiteConfig
from ftfast.data import ImageDataset
from ftfast.errors import ConfigError, DataError
from ftfast.evaluation import PixelCache, Suite, alpha_sweep, default_suites, evaluate, main_metric, open_suites
from ftfast.evaluation.embedding import embed_images, embed_texts
from ftfast.models.loading import LoadedModel

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
}
NAMES = tuple(COLOURS)


class ColourClip(nn.Module):
    """Image features are the mean colour times a matrix; text features the colour of the first colour word."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(3))
        self.norm = nn.BatchNorm2d(3)
        self.images_seen = 0
        self.texts_seen = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training, "evaluation must run in eval mode"
        assert not torch.is_grad_enabled(), "evaluation must run without gradients"
        self.images_seen += len(images)
        return images.mean(dim=(2, 3)) @ self.mix

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts_seen += len(tokens)
        table = torch.tensor([COLOURS[name] for name in NAMES], dtype=torch.float32) / 255
        return table[tokens[:, 0]]


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[next(i for i, name in enumerate(NAMES) if name in text)] for text in texts])


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def loaded() -> LoadedModel:
    model = ColourClip().eval()
    config = {"embed_dim": 3, "vision_cfg": {"image_size": 4}}
    return LoadedModel(model, to_tensor, to_tensor, tokenize, config, {"size": 4}, name="colour-clip")


def pixels(names: list[str], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-20, 21, size=(len(names), 4, 4, 3))
    flat = np.array([COLOURS[name] for name in names])[:, None, None, :]
    return np.clip(flat + noise, 0, 255).astype(np.uint8)


def labelled(names: list[str], classes: tuple[str, ...] = NAMES, **fields) -> ImageDataset:
    labels = np.array([classes.index(name) for name in names])
    return ImageDataset.from_arrays(pixels(names), class_names=classes, labels=labels, **fields)


def suite(task: str, queries: ImageDataset, gallery: ImageDataset | None = None, name: str = "s", **config) -> Suite:
    return Suite(SuiteConfig(name=name, task=task, **config), queries, gallery)


def test_zero_shot_counts_right_and_wrong_labels(loaded: LoadedModel) -> None:
    names = ["red", "red", "green", "blue", "yellow", "white"]
    assert evaluate(loaded, [suite("zero_shot", labelled(names))])["s"] == {"acc1": 1.0, "mean_per_class_recall": 1.0}
    data = labelled(names)
    data.labels[1] = NAMES.index("blue")  # a red image that is called blue
    result = evaluate(loaded, [suite("zero_shot", data)])["s"]
    assert result["acc1"] == pytest.approx(5 / 6)
    assert result["mean_per_class_recall"] == pytest.approx((1 + 1 + 1 / 2 + 1 + 1) / 5)


def test_texts_are_embedded_once_per_suite_and_shared_images_once_per_call(loaded: LoadedModel) -> None:
    data = labelled(["red", "green"] * 5, templates=("a {}.", "the {}."), texts=["red", "green"] * 5)
    evaluate(loaded, [suite("zero_shot", data, name="a"), suite("image_text_retrieval", data, name="b")], batch_size=3)
    assert loaded.model.images_seen == 10
    assert loaded.model.texts_seen == len(NAMES) * 2 + 2  # every prompt once; two different captions


def test_modes_of_every_module_are_restored(loaded: LoadedModel) -> None:
    loaded.model.train()
    loaded.model.norm.eval()  # frozen BatchNorm inside a model in training
    evaluate(loaded, [suite("zero_shot", labelled(["red", "green"]))])
    assert loaded.model.training
    assert not loaded.model.norm.training
    assert torch.is_grad_enabled()


def test_features_are_unit_float32_rows_in_order(loaded: LoadedModel) -> None:
    data = labelled(["red", "green", "blue", "white", "red"])
    loaded.model.half()
    found = embed_images(loaded.model, data, to_tensor, batch_size=2)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.features.dtype == torch.float32
    colours = torch.from_numpy(pixels(["red", "green", "blue", "white", "red"])).double().mean(dim=(1, 2))
    expected = torch.nn.functional.normalize(colours, dim=-1).float()
    torch.testing.assert_close(found.features, expected, atol=2e-3, rtol=0)
    texts = embed_texts(loaded.model, tokenize, ["red", "white"], batch_size=1)
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))


def test_gallery_classes_are_matched_by_name_not_by_number(loaded: LoadedModel) -> None:
    queries = labelled(["red", "green", "blue"], classes=("red", "green", "blue"))
    gallery = labelled(["blue", "green", "red", "yellow"], classes=("yellow", "blue", "green", "red"))
    assert evaluate(loaded, [suite("image_retrieval", queries, gallery)])["s"]["recall_at_1"] == 1.0
    swapped = labelled(["blue", "red", "green"], classes=("green", "red", "blue"))
    swapped.labels[:] = [0, 1, 2]  # the blue image is called green and the other way round
    assert evaluate(loaded, [suite("image_retrieval", queries, swapped)])["s"]["recall_at_1"] == pytest.approx(1 / 3)


def test_queries_as_their_own_gallery_never_find_themselves(loaded: LoadedModel) -> None:
    data = labelled(["red", "red", "green", "blue"])
    result = evaluate(loaded, [suite("image_retrieval", data)])["s"]
    assert result["recall_at_1"] == 0.5  # the single green and the single blue image have nothing to find
    assert result == evaluate(loaded, [suite("image_retrieval", data, labelled(["red", "red", "green", "blue"]))])["s"]


def test_identical_captions_are_one_caption(loaded: LoadedModel) -> None:
    names = ["red", "red", "green"]
    data = ImageDataset.from_arrays(pixels(names), texts=["a red card", "a red card", "a green card"])
    result = evaluate(loaded, [suite("image_text_retrieval", data)])["s"]
    assert result["image_to_text_recall_at_1"] == result["text_to_image_recall_at_1"] == result["mean_recall_at_1"] == 1


def test_table_rows_with_one_file_are_captions_of_one_image(loaded: LoadedModel, tmp_path: Path) -> None:
    for name in ("red", "green"):
        Image.fromarray(pixels([name])[0]).save(tmp_path / f"{name}.png")
    table = "image,caption\nred.png,red one\ngreen.png,green one\nred.png,green too\n"
    (tmp_path / "pairs.csv").write_text(table)
    config = SuiteConfig(name="pairs", task="image_text_retrieval", data=DataConfig(path=str(tmp_path / "pairs.csv")))
    result = evaluate(loaded, [config])["pairs"]
    assert loaded.model.images_seen == 2
    assert result["image_to_text_recall_at_1"] == 1.0
    # "green too" belongs to the red image and finds the green one
    assert result["text_to_image_recall_at_1"] == pytest.approx(2 / 3)
    assert loaded.model.texts_seen == 3


def test_images_that_cannot_be_decoded_are_left_out(loaded: LoadedModel, tmp_path: Path) -> None:
    for name in ("red", "green"):
        for copy in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels([name], seed=copy)[0]).save(tmp_path / name / f"{copy}.png")
    (tmp_path / "red" / "1.png").write_bytes(b"not an image")
    data = DataConfig(path=str(tmp_path), max_bad_fraction=0.5)
    result = evaluate(loaded, [SuiteConfig(name="s", task="zero_shot", data=data)])["s"]
    assert loaded.model.images_seen == 5
    assert result["acc1"] == 1.0


def test_pixel_cache_decodes_once_and_keeps_within_its_budget(loaded: LoadedModel) -> None:
    calls = []

    def transform(image: Image.Image) -> torch.Tensor:
        calls.append(1)
        return to_tensor(image)

    data = labelled(["red", "green", "blue"])
    for budget, decoded in ((1 << 20, 3), (100, 6)):
        calls.clear()
        cache = PixelCache(max_bytes=budget)
        first = embed_images(loaded.model, data, transform, batch_size=2, cache=cache)
        again = embed_images(loaded.model, data, transform, batch_size=2, cache=cache)
        assert len(calls) == decoded
        torch.testing.assert_close(first.features, again.features, rtol=0, atol=0)


def test_sweep_measures_the_weights_between(loaded: LoadedModel) -> None:
    start = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    end = {**start, "mix": torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])}  # the tuned model swaps red and green
    suites = [suite("zero_shot", labelled(["red", "green", "blue", "blue"]))]
    points = alpha_sweep(loaded, start, end, (1.0, 0.0, 0.25), suites)
    assert [point.alpha for point in points] == [0.0, 0.25, 1.0]
    assert [point.results["s"]["acc1"] for point in points] == [1.0, 1.0, 0.5]
    torch.testing.assert_close(loaded.model.mix, torch.eye(3), rtol=0, atol=0)
    before = loaded.model.images_seen
    known = {0.0: {"s": {"acc1": 0.125}}}
    assert alpha_sweep(loaded, start, end, (0.0,), suites, known=known)[0].results == known[0.0]
    assert loaded.model.images_seen == before


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        (
            "zero_shot",
            ImageDataset.from_arrays(pixels(["red"]), texts=["red"]),
            "suite 's': task 'zero_shot' needs class labels, but data (1 image, captions, images) has none.",
        ),
        (
            "image_text_retrieval",
            labelled(["red"], classes=("red",)),
            "suite 's': task 'image_text_retrieval' needs a text per image, but data "
            "(1 image, 1 class, images) has none.",
        ),
        (
            "image_retrieval",
            labelled(["red", "green"], classes=("red", "green")),
            "suite 's': every class of 2 images, 2 classes, images has a single image, so no image has a match to "
            "find. Retrieval needs two images per class, or a gallery.",
        ),
    ],
)
def test_data_that_does_not_fit_its_task(loaded: LoadedModel, task: str, data: ImageDataset, message: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(loaded, [suite(task, data)])
    assert str(caught.value) == message


def test_a_gallery_without_a_common_class(loaded: LoadedModel) -> None:
    pair = suite("image_retrieval", labelled(["red"], classes=("red",)), labelled(["green"], classes=("green",)))
    with pytest.raises(DataError, match=r"^suite 's': no class of the queries .* occurs in the gallery"):
        evaluate(loaded, [pair])


def test_a_metric_that_does_not_exist_and_a_name_used_twice() -> None:
    config = SuiteConfig(name="s", task="image_retrieval", metric="map_at_10")
    message = r"does not report metric 'map_at_10'; it reports .* Did you mean 'map_at_20'\?$"
    with pytest.raises(ConfigError, match=message):
        main_metric(config)
    data = labelled(["red", "red"])
    with pytest.raises(ConfigError, match=r"^two suites are called 's'"):
        open_suites([suite("zero_shot", data), suite("image_retrieval", data)])


def test_default_suites_of_a_users_table(tmp_path: Path) -> None:
    Image.fromarray(pixels(["red"])[0]).save(tmp_path / "red.png")
    (tmp_path / "pairs.csv").write_text("image,caption\nred.png,a red card\n")
    suites = default_suites(DataConfig(path=str(tmp_path / "pairs.csv")))
    assert (suites[0].role, suites[0].task) == ("target", "image_text_retrieval")
    assert suites[0].name == "target (training images)"
    assert [suite.role for suite in suites[1:]] == ["control"] * 3
    assert {suite.data.path.split(":")[0] for suite in suites[1:]} == {"builtin"}


def test_default_suites_of_the_builtin_target() -> None:
    suites = default_suites(DataConfig(path="builtin:target/train"))
    assert [(suite.role, suite.data.path) for suite in suites] == [
        ("target", "builtin:target/test-query"),
        ("control", "builtin:pairs/heldout"),
        ("control", "builtin:pairs/heldout"),
        ("control", "builtin:generic/query"),
    ]
    assert suites[0].gallery.path == "builtin:target/test-gallery"
    assert suites[3].gallery.path == "builtin:generic/gallery"

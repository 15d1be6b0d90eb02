"""A folder of images becomes searchable: build, query by text and image, contact sheets, and what can go wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ftfast.config.schema import ModelConfig
from ftfast.errors import CheckpointError, DataError
from ftfast.search_command import build, query


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (220, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 220))):
        (root / name).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 30), tuple(min(255, c + 5 * i) for c in colour)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def index(folder, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "made"
    model = ModelConfig(name=f"local-dir:{tiny_folder}")
    built = build(str(folder), model, str(out), batch_size=4)
    assert (built.images, built.skipped, built.width) == (9, 0, 32)
    with pytest.raises(CheckpointError, match="an index is already there"):
        build(str(folder), model, str(out))
    return out


def test_an_image_finds_itself(index, folder, tmp_path):
    result = query(str(index), images=(str(folder / "green" / "1.png"),), k=3, out=str(tmp_path / "sheet"))
    assert [hit.rank for hit in result.neighbours] == [1, 2, 3]
    assert result.neighbours[0].name == "green"
    assert result.neighbours[0].score == pytest.approx(1.0, abs=1e-5)
    page = result.html.read_text()
    assert page.count("<figure>") == 3
    assert "green" in page
    with Image.open(result.png) as sheet:
        assert sheet.size[0] > 3 * 128


def test_text_and_many_hits(index):
    result = query(str(index), texts=("a red thing", "<b>&"), k=50)
    assert len(result.neighbours) == 18
    scores = [hit.score for hit in result.neighbours[:9]]
    assert scores == sorted(scores, reverse=True)
    assert "&lt;b&gt;&amp;" in result.html.read_text()


def test_errors(index, folder, tiny_folder, tmp_path):
    with pytest.raises(DataError, match="nothing to search for: give --text or --image"):
        query(str(index))
    with pytest.raises(CheckpointError, match="not an index folder"):
        query(str(tmp_path), texts=("x",))
    with pytest.raises(DataError, match=r"images.json: cannot be read as an image"):
        query(str(index), images=(str(index / "images.json"),))
    record = json.loads((index / "images.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "vectors.safetensors").write_bytes((index / "vectors.safetensors").read_bytes())
    for change, message in (
        ({"rows": record["rows"][:-1], "names": record["names"][:-1]}, "9 vectors but 8 images"),
        ({"model_fingerprint": "0"}, "weights changed"),
        ({"fingerprint": "0"}, "changed since the index was built"),
        ({"format": "?"}, "not written by ftfast search build"),
    ):
        (broken / "images.json").write_text(json.dumps(record | change))
        with pytest.raises(CheckpointError, match=message):
            query(str(broken), texts=("x",))
    (broken / "images.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        query(str(broken), texts=("x",))

"""What `ftfast search build` and `query` do: embed a folder of images once, then find by text or image."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.errors import CheckpointError, DataError
from ftfast.search import ExactIndex

_FORMAT = "ftfast-image-index-1"


@dataclass(frozen=True)
class BuiltIndex:
    """An index folder that was just written.

    Attributes:
        folder: Where it is.
        images: Images in it.
        skipped: Images that could not be decoded.
        width: Embedding width.
        search_path: Which search implementation will answer.
    """

    folder: Path
    images: int
    skipped: int
    width: int
    search_path: str


@dataclass(frozen=True)
class Neighbour:
    """One hit of one query.

    Attributes:
        query: The text, or the path of the query image.
        rank: 1 is the best.
        score: Cosine similarity.
        image: Index of the image in the data it was built from.
        name: File name or caption of the image.
    """

    query: str
    rank: int
    score: float
    image: int
    name: str


@dataclass(frozen=True)
class QueryResult:
    """The hits of all queries, and the sheets that show them.

    Attributes:
        neighbours: By query, best first.
        html: Contact sheet as a self-contained page.
        png: Contact sheet as a picture.
    """

    neighbours: tuple[Neighbour, ...]
    html: Path
    png: Path


def build(
    images: str,
    model: ModelConfig,
    out: str,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> BuiltIndex:
    """Embeds images and writes an index folder: `vectors.safetensors`, `images.json`.

    Args:
        images: Anything `--data` accepts: a table, class folders, a folder of images, tars or "builtin:...".
        model: Which model embeds; it is remembered for queries.
        out: Folder to write.
        batch_size: Images per forward pass.
        workers: Decoding processes.
        device: Where the model runs.
        overwrite: Replace an index that is there.

    Returns:
        What was written.

    Raises:
        DataError: If no image can be read.
        CheckpointError: If `out` exists or cannot be written.
    """
    from ftfast.data import open_dataset
    from ftfast.evaluation.embedding import embed_images
    from ftfast.models import load_model
    from ftfast.search.native import describe

    folder = Path(out)
    if (folder / "images.json").exists() and not overwrite:
        raise CheckpointError(f"{folder}: an index is already there. Choose another --out, or pass --overwrite.")
    dataset = open_dataset(DataConfig(path=images))
    loaded = load_model(model, device)
    embedded = embed_images(
        loaded.model, dataset, loaded.eval_transform, batch_size=batch_size, workers=workers, device=device
    )
    index = ExactIndex(embedded.features.shape[1], "cosine")
    index.add(embedded.features.cpu().contiguous())
    index.save(folder / "vectors.safetensors")
    rows = embedded.indices.tolist()
    record = {
        "format": _FORMAT,
        "source": images if images.startswith("builtin:") else str(Path(images).resolve()),
        "fingerprint": dataset.fingerprint,
        "model": asdict(model),
        "model_fingerprint": loaded.fingerprint,
        "rows": rows,
        "names": [_name(dataset, row) for row in rows],
    }
    _write(folder / "images.json", (json.dumps(record) + "\n").encode())
    return BuiltIndex(folder, len(rows), len(dataset) - len(rows), index.d, describe())


def query(
    index: str,
    *,
    texts: tuple[str, ...] = (),
    images: tuple[str, ...] = (),
    k: int = 10,
    device: str = "cpu",
    out: str | None = None,
) -> QueryResult:
    """Finds the nearest images to words and images, and draws a contact sheet.

    Args:
        index: Folder written by `build`.
        texts: Words to search for.
        images: Image files to search with.
        k: Hits per query; at most the number of images is returned.
        device: Where the model runs.
        out: Contact sheet without suffix; default: `hits` in the index folder.

    Returns:
        The hits, and the paths of the HTML and PNG sheets.

    Raises:
        CheckpointError: If the folder is not an index, or the model or the images changed since it was built.
        DataError: If there is no query or a query image cannot be read.
    """
    from ftfast.data import open_dataset
    from ftfast.models import load_model

    if not texts and not images:
        raise DataError("nothing to search for: give --text or --image.")
    folder = Path(index)
    record = _read_record(folder)
    gallery = ExactIndex.load(folder / "vectors.safetensors")
    if gallery.ntotal != len(record["rows"]):
        raise CheckpointError(f"{folder}: {gallery.ntotal} vectors but {len(record['rows'])} images; build it again.")
    dataset = open_dataset(DataConfig(path=record["source"]))
    loaded = load_model(ModelConfig(**record["model"]), device)
    if loaded.fingerprint != record["model_fingerprint"]:
        raise CheckpointError(f"{folder}: the model's weights changed since the index was built; build it again.")
    if dataset.fingerprint != record["fingerprint"]:
        raise CheckpointError(f"{folder}: the images in {record['source']} changed since the index was built; rebuild.")
    features = _embed_queries(loaded, texts, images, device)
    scores, ids = gallery.search(features, min(k, gallery.ntotal))
    names = [*texts, *images]
    hits = [
        Neighbour(name, rank + 1, float(scores[q, rank]), record["rows"][int(row)], record["names"][int(row)])
        for q, name in enumerate(names)
        for rank, row in enumerate(ids[q].tolist())
        if row >= 0
    ]
    target = Path(out) if out is not None else folder / "hits"
    pages = _write_sheets(target, names, hits, dataset)
    return QueryResult(tuple(hits), *pages)


def _embed_queries(loaded: Any, texts: tuple[str, ...], images: tuple[str, ...], device: str) -> torch.Tensor:
    """(Q, D) unit rows: texts first, then images."""
    from PIL import Image, UnidentifiedImageError

    from ftfast.evaluation.embedding import embed_texts, inference_mode_of

    parts = []
    if texts:
        parts.append(embed_texts(loaded.model, loaded.tokenizer, list(texts), device=device))
    for path in images:
        try:
            with Image.open(path) as opened:
                pixels = loaded.eval_transform(opened.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}).") from error
        with inference_mode_of(loaded.model):
            feature = loaded.model.encode_image(pixels[None].to(device)).float().cpu()
        parts.append(torch.nn.functional.normalize(feature, dim=1))
    return torch.cat(parts).contiguous()


def _name(dataset: Any, row: int) -> str:
    """Caption or class of an image, for people."""
    if dataset.texts is not None:
        return str(dataset.texts[row])
    if dataset.labels is not None and dataset.class_names is not None:
        return str(dataset.class_names[int(dataset.labels[row])])
    return f"image {row}"


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "images.json"
    keys = {"format", "source", "fingerprint", "model", "model_fingerprint", "rows", "names"}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not an index folder. Make one with: ftfast search build.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); build the index again.") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not keys <= record.keys():
        raise CheckpointError(f"{path}: not written by ftfast search build; build the index again.")
    if len(record["rows"]) != len(record["names"]):
        raise CheckpointError(f"{path}: its lists differ in length; build the index again.")
    return record


def _write(path: Path, content: bytes) -> None:
    """Writes atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _write_sheets(target: Path, names: list[str], hits: list[Neighbour], dataset: Any) -> tuple[Path, Path]:
    """One row per query: the page embeds its pictures, the PNG shows the same grid."""
    from PIL import Image, ImageDraw

    side, text_height = 128, 34
    columns = max(1, max((hit.rank for hit in hits), default=1))
    sheet = Image.new("RGB", (columns * (side + 8) + 8, len(names) * (side + text_height + 26) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    sections = []
    for line, name in enumerate(names):
        top = 8 + line * (side + text_height + 26)
        draw.text((8, top), name, fill="black")
        figures = []
        for hit in (h for h in hits if h.query == name):
            picture = dataset.load_image(hit.image)
            picture.thumbnail((side, side))
            left = 8 + (hit.rank - 1) * (side + 8)
            sheet.paste(picture, (left, top + 18))
            draw.text((left, top + 20 + side), f"{hit.score:.3f}", fill="black")
            draw.text((left, top + 32 + side), hit.name[:20], fill="gray")
            figures.append(_figure(picture, hit))
        sections.append(f"<h2>{html.escape(name)}</h2><div class=row>{''.join(figures)}</div>")
    style = "body{font:14px sans-serif;margin:2em}.row{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:128px}"
    page = f"<!doctype html><meta charset=utf-8><title>ftfast search</title><style>{style}</style>{''.join(sections)}\n"
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    paths = target.with_name(target.name + ".html"), target.with_name(target.name + ".png")
    _write(paths[0], page.encode())
    _write(paths[1], buffer.getvalue())
    return paths


def _figure(picture: Any, hit: Neighbour) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(hit.name)
    caption = f"<figcaption>{hit.rank}. {hit.score:.3f}<br>{name}</figcaption>"
    return f'<figure><img src="data:image/png;base64,{data}" alt="{name}">{caption}</figure>'

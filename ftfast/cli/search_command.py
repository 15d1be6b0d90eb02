"""``ftfast search``: embed a set of images once, then find the nearest to words or to a picture, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.errors import ConfigError

_OVERVIEW = """usage: ftfast search build IMAGES --out FOLDER     embed images and keep them searchable
       ftfast search query FOLDER --text "..."     find the nearest images to words or to a picture

Each explains itself with -h.
"""


@dataclass(frozen=True, kw_only=True)
class BuildArguments:
    """Embed the images of a table, folder or set of tars, and write an exact index."""

    images: tyro.conf.Positional[str]
    """Table, class folders, folder of images, tars or "builtin:...", as for --data."""
    out: str
    """Folder to write."""
    model: str = "tiny-clip-v1"
    """A run folder, an open_clip folder, a built-in, or an open_clip name with --pretrained."""
    pretrained: str = ""
    """open_clip tag or weights file, if the model is an open_clip name."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 2
    """Decoding processes."""
    device: str = "auto"
    """auto, cpu or cuda:0."""
    overwrite: bool = False
    """Replace --out if it exists."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class QueryArguments:
    """Find the images of an index that are nearest to words or to a picture."""

    index: tyro.conf.Positional[str]
    """Folder written by ftfast search build."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Words to search for; may be repeated."""
    image: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Image file to search with; may be repeated."""
    k: int = 10
    """Neighbours per query."""
    out: str = ""
    """Contact sheet to write, without suffix (.html and .png); empty: hits in the index folder."""
    device: str = "auto"
    """auto, cpu or cuda:0."""
    json: bool = False
    """Print the neighbours as JSON."""


def run(argv: Sequence[str]) -> int:
    """Build or query an index.

    Args:
        argv: Arguments after ``ftfast search``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the first word is neither "build" nor "query".
    """
    words = [word for word in argv if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_OVERVIEW, end="")
        return 0
    if words[0] == "build":
        return _build(parse_options(BuildArguments, words[1:], "ftfast search build"))
    if words[0] == "query":
        return _query(parse_options(QueryArguments, words[1:], "ftfast search query"))
    raise ConfigError(f"ftfast search does not know '{words[0]}'. Use: ftfast search build or ftfast search query.")


def _build(arguments: BuildArguments) -> int:
    from ftfast.cli.weights import model_settings
    from ftfast.engine.assembly import choose_device
    from ftfast.search_command import build

    if Path(arguments.out).exists() and not arguments.overwrite:
        raise ConfigError(f"--out {arguments.out} already exists. Replace it with --overwrite or choose another --out.")
    built = build(
        arguments.images,
        model_settings(arguments.model, pretrained=arguments.pretrained),
        arguments.out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=str(choose_device(arguments.device)),
        overwrite=arguments.overwrite,
    )
    if arguments.json:
        output.emit_json({**dataclasses.asdict(built), "folder": str(built.folder)})
        return 0
    if built.skipped:
        output.note(f"skipped {built.skipped:,} images that cannot be decoded")
    output.note(f"searched by: {built.search_path}")
    output.emit(f'wrote {built.images:,} images to {built.folder}\nftfast search query {built.folder} --text "..."')
    return 0


def _query(arguments: QueryArguments) -> int:
    if not arguments.text and not arguments.image:
        raise ConfigError("ftfast search query needs --text WORDS or --image FILE.")
    if arguments.k < 1:
        raise ConfigError(f"--k is {arguments.k} but must be 1 or more.")
    from ftfast.engine.assembly import choose_device
    from ftfast.search_command import query

    result = query(
        arguments.index,
        texts=arguments.text,
        images=arguments.image,
        k=arguments.k,
        device=str(choose_device(arguments.device)),
        out=arguments.out or None,
    )
    if arguments.json:
        hits = [dataclasses.asdict(hit) for hit in result.neighbours]
        output.emit_json({"hits": hits, "html": str(result.html), "png": str(result.png)})
        return 0
    rows = [(hit.query, hit.rank, f"{hit.score:.4f}", hit.image, hit.name) for hit in result.neighbours]
    output.emit(output.table(("query", "rank", "cosine", "image", "name"), rows))
    output.note(f"wrote {result.html} and {result.png}")
    return 0

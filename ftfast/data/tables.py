"""Tables of images: CSV, TSV, JSONL and Parquet files with a column of paths and columns of captions or classes.

The csv module reads text tables: about a million rows a second, as fast as handing over columns from pyarrow, and one
parser means one behaviour and line numbers in every message.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftfast.errors import DataError, MissingExtraError

IMAGE_COLUMNS = (
    "filepath",
    "image",
    "img",
    "path",
    "image_path",
    "img_path",
    "file_path",
    "file_name",
    "filename",
    "file",
)
TEXT_COLUMNS = ("title", "caption", "text", "captions", "txt", "description", "prompt", "sentence", "alt_text")
LABEL_COLUMNS = ("label", "class", "class_name", "classname", "label_name", "category", "target", "class_id", "species")
SEPARATORS = (",", "\t", ";", "|")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")
_SNIFFED_ROWS = 50


@dataclass(frozen=True)
class Columns:
    """The three columns of a table that matter; empty where there is none.

    Args:
        image: Column of image paths.
        text: Column of captions.
        label: Column of class names.
    """

    image: str = ""
    text: str = ""
    label: str = ""

    def used(self) -> list[str]:
        """Return the names that are not empty, each once."""
        return list(dict.fromkeys(name for name in (self.image, self.text, self.label) if name))


@dataclass(frozen=True)
class Table:
    """The columns that were read.

    Args:
        path: The file.
        kind: What it was read as, for people: ``separator ','`` or ``Parquet``.
        columns: Which columns hold what.
        values: The values of each used column, as strings.
        lines: Line (or row) number of each row in the file.
    """

    path: Path
    kind: str
    columns: Columns
    values: dict[str, list[str]]
    lines: Sequence[int]

    def where(self, row: int) -> str:
        """Return ``name.csv:14`` for row ``row``."""
        return f"{self.path.name}:{self.lines[row]}"


def is_table(path: Path) -> bool:
    """Tell from the name whether a file is a table."""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def separator_name(separator: str) -> str:
    """Return the separator in quotes, with a name for the invisible one."""
    return "tab" if separator == "\t" else f"'{separator}'"


def read_table(path: Path, wanted: Columns, separator: str = "") -> Table:
    """Read the columns of images, captions and classes.

    Args:
        path: .csv, .tsv, .jsonl (also .gz) or .parquet file.
        wanted: Column names that the user set; empty ones are guessed from common names.
        separator: Column separator of a text table; empty: sniffed.

    Returns:
        The table, at least one row long, without blank cells.

    Raises:
        DataError: Missing or empty file, wrong encoding, malformed row, missing column, blank cell.
        MissingExtraError: A Parquet file without pyarrow.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            table = _read_parquet(path, wanted)
        elif name.endswith((".jsonl", ".ndjson", ".jsonl.gz")):
            table = _read_jsonl(path, wanted)
        else:
            table = _read_separated(path, wanted, separator)
    except UnicodeDecodeError as error:
        raise DataError(_encoding_message(path, error)) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check data.path.") from None
    except (IsADirectoryError, PermissionError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if not table.lines:
        raise DataError(f"{path.name}: no rows under the header.")
    _check_blanks(table)
    return table


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _encoding_message(path: Path, error: UnicodeDecodeError) -> str:
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            return f"{path.name}: the file is UTF-16, not UTF-8. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8)."
        file.seek(0)
        for line, content in enumerate(file, start=1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as exact:
                byte = content[exact.start]
                return (
                    f"{path.name}:{line}: byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8, "
                    "for example with: iconv -f LATIN1 -t UTF-8."
                )
    return f"{path.name}: not UTF-8 ({error.reason}). Save the file as UTF-8."


# ---- columns


def choose_columns(where: str, found: Sequence[str], wanted: Columns, kind: str) -> Columns:
    """Match wanted or common column names with those of a table.

    Args:
        where: File name for messages.
        found: Column names of the table.
        wanted: Names that the user set; empty ones are guessed, ignoring case.
        kind: How the table was read, for messages; may be empty.

    Returns:
        Columns that exist; text and label stay empty when nothing fits.

    Raises:
        DataError: A wanted column is missing, or no column of images can be guessed.
    """
    listed = f"Columns found: {', '.join(map(repr, found))}" + (f" ({kind})." if kind else ".")
    guesses = {
        "image": _guess(found, IMAGE_COLUMNS),
        "text": _guess(found, TEXT_COLUMNS),
        "label": _guess(found, LABEL_COLUMNS),
    }
    chosen: dict[str, str] = {}
    for role, guess in guesses.items():
        name = getattr(wanted, role)
        if name and name not in found:
            close = difflib.get_close_matches(name, [f for f in found if f], n=1)
            proposal = guess or (close[0] if close else "")
            advice = f"Set data.{role}_column: {proposal}" if proposal else f"Set data.{role}_column to one of them"
            raise DataError(f"{where}: no column '{name}'. {listed} {advice}, or rename the column.")
        chosen[role] = name or guess
    if not chosen["image"]:
        raise DataError(
            f"{where}: no column of image paths. {listed} "
            "Set data.image_column to one of them, or rename the column to 'filepath'."
        )
    return Columns(**chosen)


def _guess(found: Sequence[str], names: Sequence[str]) -> str:
    by_lower = {name.strip().lower(): name for name in reversed(found)}
    return next((by_lower[name] for name in names if name in by_lower), "")


def _check_header(where: str, header: Sequence[str], kind: str) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"{where}: column '{repeated[0]}' occurs {header.count(repeated[0])} times in the header ({kind}). "
            "Rename one of them."
        )


def _check_blanks(table: Table) -> None:
    roles = (("image path", table.columns.image), ("caption", table.columns.text), ("class", table.columns.label))
    for what, column in roles:
        if not column:
            continue
        blank = [row for row, value in enumerate(table.values[column]) if not value or value.isspace()]
        if blank:
            count = "1 row has" if len(blank) == 1 else f"{len(blank):,} rows have"
            raise DataError(
                f"{table.where(blank[0])}: {count} no {what} in column '{column}'"
                f"{'' if len(blank) == 1 else ' (the first is this one)'}. Fill or remove "
                f"{'it' if len(blank) == 1 else 'them'}."
            )


# ---- separated text


def sniff_separator(lines: Sequence[str], known: Sequence[str] = ()) -> str:
    """Guess the column separator from the first lines of a table.

    A separator is better the more known column names it finds in the header, then the more of the rows have as many
    cells as the header, then the more columns.

    Args:
        lines: The header and some rows.
        known: Further column names to look for.

    Returns:
        One of ``, tab ; |``; a comma when nothing separates.
    """
    names = {*IMAGE_COLUMNS, *TEXT_COLUMNS, *LABEL_COLUMNS, *(name.lower() for name in known if name)}

    def score(separator: str) -> tuple[int, float, int]:
        """Rate a separator by known names, share of fitting rows and number of columns."""
        try:
            rows = [row for row in csv.reader(lines, delimiter=separator) if row]
        except csv.Error:
            return (0, 0.0, 0)
        if not rows or len(rows[0]) < 2:
            return (0, 0.0, 0)
        header = rows[0]
        fitting = sum(len(row) == len(header) for row in rows) / len(rows)
        return (sum(cell.strip().lower() in names for cell in header), fitting, len(header))

    return max(SEPARATORS, key=score)  # the first of equals: a comma


def _read_separated(path: Path, wanted: Columns, separator: str) -> Table:
    with _open_text(path) as file:
        first = [line for _, line in zip(range(_SNIFFED_ROWS), file, strict=False)]
    if not any(line.strip() for line in first):
        raise DataError(f"{path.name}: the file is empty.")
    separator = {"\\t": "\t", "tab": "\t"}.get(separator, separator) or sniff_separator(first, wanted.used())
    if len(separator) != 1 or separator in '"\r\n':
        raise DataError(f"data.separator: '{separator}' must be one character, such as ',' or ';' (or 'tab').")
    kind = f"separator {separator_name(separator)}"
    with _open_text(path) as file:
        rows = _separated_rows(path, file, separator)
        _, header = next(rows)
        header = [name.strip() for name in header]
        _check_header(path.name, header, kind)
        columns = choose_columns(path.name, header, wanted, kind)
        used = [(header.index(name), name) for name in columns.used()]
        values: dict[str, list[str]] = {name: [] for _, name in used}
        lines: list[int] = []
        for line, row in rows:
            if len(row) != len(header):
                raise DataError(
                    f"{path.name}:{line}: {len(row)} fields where the header has {len(header)} ({kind}). "
                    'Put "quotes" around fields that contain the separator, or set data.separator.'
                )
            lines.append(line)
            for position, name in used:
                values[name].append(row[position])
    return Table(path, kind, columns, values, lines)


def _separated_rows(path: Path, file: IO[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, delimiter=separator, strict=True)
    started = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path.name}:{started}: {_quote_problem(str(error))} "
                'Write a quote inside a field as "" and put quotes around the whole field.'
            ) from None
        if row:
            yield started, row
        started = reader.line_num + 1


def _quote_problem(message: str) -> str:
    if "unexpected end" in message or "field larger" in message:
        return "a quote is opened here and never closed."
    if "expected after" in message:
        return "text follows a closing quote."
    return f"{message}."


# ---- JSON lines and Parquet


def _read_jsonl(path: Path, wanted: Columns) -> Table:
    columns: Columns | None = None
    values: dict[str, list[str]] = {}
    lines: list[int] = []
    with _open_text(path) as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            where = f"{path.name}:{line}"
            try:
                record = json.loads(content.strip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON ({error.msg}, column {error.colno}). Write one object a line."
                ) from None
            if not isinstance(record, dict):
                raise DataError(f'{where}: a {type(record).__name__} where an object such as {{"image": ...}} belongs.')
            if columns is None:
                columns = choose_columns(where, list(record), wanted, "")
                values = {name: [] for name in columns.used()}
            lines.append(line)
            for name, column in values.items():
                if name not in record:
                    raise DataError(
                        f"{where}: no key '{name}', which line {lines[0]} has. Keys found: {_quoted(record)}."
                    )
                column.append(_as_text(record[name], where, name))
    if columns is None:
        raise DataError(f"{path.name}: the file is empty.")
    return Table(path, "JSON lines", columns, values, lines)


def _quoted(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas writes integer columns with a gap as floats
    if isinstance(value, (str, int, float)):
        return str(value)
    raise DataError(f"{where}: column '{column}' holds a {type(value).__name__}; text or a number is needed.")


def _read_parquet(path: Path, wanted: Columns) -> Table:
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "Reading a Parquet table") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        header = file.schema_arrow.names
        _check_header(path.name, header, "Parquet")
        columns = choose_columns(path.name, header, wanted, "Parquet")
        content = file.read(columns=columns.used())
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name}: not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    values = {}
    for name in columns.used():
        cells = content[name].to_pylist()
        values[name] = [_as_text(cell, f"{path.name}:{row}", name) for row, cell in enumerate(cells, start=1)]
    return Table(path, "Parquet", columns, values, range(1, content.num_rows + 1))

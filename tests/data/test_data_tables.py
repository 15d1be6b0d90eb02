"""Tables: every separator, quoting, encodings, and one whole sentence for everything that can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.data.tables import SEPARATORS, Columns, read_table, sniff_separator
from ftfast.errors import DataError, MissingExtraError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (8, 8), (number * 50, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def message(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(config)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(folder: Path, content: str | bytes, name: str = "pairs.csv") -> DataConfig:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataConfig(path=str(path))


def test_pairs_and_classes_in_one_table(folder):
    config = write(folder, "filepath,title,label\n0.png,a dog,dog\n1.png,a cat,cat\n2.png,my dog,dog\n3.png,x,cat\n")
    data = open_dataset(config)
    assert data.texts == ["a dog", "a cat", "my dog", "x"]
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.labels.dtype == np.int64
    assert data.name == "pairs"
    assert data.description == "4 images, 2 classes, captions, table pairs.csv (separator ',')"
    assert [data.load_image(i).getpixel((0, 0))[0] for i in range(4)] == [0, 50, 100, 150]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_separator_is_sniffed(folder, separator, name):
    content = f"image{separator}caption\n0.png{separator}a red\n1.png{separator}b blue\n".encode()
    data = open_dataset(write(folder, gzip.compress(content) if name.endswith("gz") else content, name))
    assert data.texts == ["a red", "b blue"]
    assert data.origin.endswith("(separator tab)" if separator == "\t" else f"(separator '{separator}')")


def test_sniffing_prefers_known_columns_over_commas_in_captions():
    assert sniff_separator(["path\ttext\n", "0.png\ta, b, c\n", "1.png\td, e, f\n"]) == "\t"
    assert sniff_separator(["filepath\n", "0.png\n"]) == ","
    assert sniff_separator(["my_file;my_words\n", "0.png;a, b\n"], ["my_file"]) == ";"


def test_quoted_separators_line_breaks_bom_and_blank_lines(folder):
    content = '\ufefffilepath,caption\r\n0.png,"a, ""b"""\r\n\r\n1.png,"two\nlines"\r\n'
    assert open_dataset(write(folder, content)).texts == ['a, "b"', "two\nlines"]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8), separator=st.sampled_from(SEPARATORS))
def test_what_csv_writes_is_what_is_read(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("round") / "t.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("filepath", "title"), *rows])
    table = read_table(path, Columns())
    assert list(zip(table.values["filepath"], table.values["title"], strict=True)) == rows


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_a_table_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "t.csv"
    path.write_bytes(b"filepath,title\n" + content)
    problem, rows = "", 0
    try:
        rows = len(read_table(path, Columns()).values["filepath"])
    except DataError as error:
        problem = str(error)
    assert (rows > 0) != problem.startswith("t.csv")
    assert len(problem) < 400


def test_jsonl_and_parquet(folder):
    rows = [{"img": f"{i}.png", "caption": f"c{i}", "label": i // 2} for i in range(4)]
    data = open_dataset(write(folder, "\n".join(map(json.dumps, rows)) + "\n\n", "t.jsonl"))
    assert data.texts == ["c0", "c1", "c2", "c3"]
    assert data.class_names == ("0", "1")
    assert data.origin == "table t.jsonl (JSON lines)"
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
    other = open_dataset(DataConfig(path=str(folder / "t.parquet")))
    assert (other.texts, other.class_names) == (data.texts, data.class_names)
    np.testing.assert_array_equal(other.labels, data.labels)


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    config = write(folder, b"PAR1", "t.parquet")
    with pytest.raises(MissingExtraError) as caught:
        open_dataset(config)
    assert str(caught.value) == (
        "Reading a Parquet table needs the package 'pyarrow', which is not installed. Run: pip install 'ftfast[data]'"
    )


def test_number_classes_are_sorted_by_value(folder):
    rows = "".join(f"{i % 4}.png,{label}\n" for i, label in enumerate(["10", "2", "10", "2", "1", "1"]))
    data = open_dataset(write(folder, "image,class\n" + rows))
    assert data.class_names == ("1", "2", "10")
    assert data.labels.tolist() == [2, 1, 2, 1, 0, 0]


def test_images_alone_and_a_metadata_table_in_a_folder(folder):
    data = open_dataset(write(folder, "file_name\n0.png\n1.png\n", "metadata.csv"))
    assert (data.texts, data.labels) == (None, None)
    assert open_dataset(DataConfig(path=str(folder))).fingerprint == data.fingerprint


def test_paths_may_be_absolute(folder, tmp_path_factory):
    table = tmp_path_factory.mktemp("elsewhere")
    data = open_dataset(write(table, f"image,text\n{folder / '2.png'},a\n"))
    assert data.load_image(0).getpixel((0, 0)) == (100, 0, 0)


MESSAGES = {
    "wrong column": (
        "image,caption\n0.png,a\n",
        {"image_column": "filepath"},
        "pairs.csv: no column 'filepath'. Columns found: 'image', 'caption' (separator ','). "
        "Set data.image_column: image, or rename the column.",
    ),
    "wrong column, close name": (
        "picture_file,words\n0.png,a\n",
        {"image_column": "picture_file", "text_column": "word"},
        "pairs.csv: no column 'word'. Columns found: 'picture_file', 'words' (separator ','). "
        "Set data.text_column: words, or rename the column.",
    ),
    "wrong column, no idea": (
        "image,caption\n0.png,a\n",
        {"label_column": "zzz"},
        "pairs.csv: no column 'zzz'. Columns found: 'image', 'caption' (separator ','). "
        "Set data.label_column to one of them, or rename the column.",
    ),
    "no header": (
        "0.png,a dog\n1.png,a cat\n",
        {},
        "pairs.csv: no column of image paths. Columns found: '0.png', 'a dog' (separator ','). "
        "Set data.image_column to one of them, or rename the column to 'filepath'.",
    ),
    "wrong separator": (
        "image;caption\n0.png;a\n",
        {"separator": ","},
        "pairs.csv: no column of image paths. Columns found: 'image;caption' (separator ','). "
        "Set data.image_column to one of them, or rename the column to 'filepath'.",
    ),
    "separator too long": (
        "image,caption\n0.png,a\n",
        {"separator": "::"},
        "data.separator: '::' must be one character, such as ',' or ';' (or 'tab').",
    ),
    "empty file": ("\n \n", {}, "pairs.csv: the file is empty."),
    "no rows": ("image,caption\n", {}, "pairs.csv: no rows under the header."),
    "duplicate header": (
        "image,caption,caption\n0.png,a,b\n",
        {},
        "pairs.csv: column 'caption' occurs 2 times in the header (separator ','). Rename one of them.",
    ),
    "unquoted separator": (
        "image,caption\n0.png,a\n1.png,b, c\n",
        {},
        "pairs.csv:3: 3 fields where the header has 2 (separator ','). "
        'Put "quotes" around fields that contain the separator, or set data.separator.',
    ),
    "open quote": (
        'image,caption\n0.png,a\n1.png,"b\n2.png,c\n',
        {},
        "pairs.csv:3: a quote is opened here and never closed. "
        'Write a quote inside a field as "" and put quotes around the whole field.',
    ),
    "text after quote": (
        'image,caption\n0.png,"a" b\n',
        {},
        'pairs.csv:2: text follows a closing quote. Write a quote inside a field as "" and put quotes around the whole '
        "field.",
    ),
    "blank labels": (
        "image,label\n0.png,a\n1.png,\n2.png,a\n3.png, \n",
        {},
        "pairs.csv:3: 2 rows have no class in column 'label' (the first is this one). Fill or remove them.",
    ),
    "blank caption": (
        "image,caption\n0.png,a\n1.png,\n",
        {},
        "pairs.csv:3: 1 row has no caption in column 'caption'. Fill or remove it.",
    ),
    "blank path": (
        "image,caption\n,a\n",
        {},
        "pairs.csv:2: 1 row has no image path in column 'image'. Fill or remove it.",
    ),
    "one image in a class": (
        "image,label\n0.png,cat\n1.png,cat\n2.png,dog\n",
        {},
        "pairs: class 'dog' has 1 image, fewer than data.min_images_per_class 2. Retrieval and a train/validation "
        "split need two: add images, remove the class, or set data.min_images_per_class: 1.",
    ),
    "one image in many classes": (
        "image,label\n0.png,cat\n1.png,cow\n2.png,dog\n",
        {},
        "pairs: class 'cat' has 1 image (and 2 more classes like it), fewer than data.min_images_per_class 2. "
        "Retrieval and a train/validation split need two: add images, remove the class, or set "
        "data.min_images_per_class: 1.",
    ),
    "web addresses": (
        "image,caption\nhttps://a.org/0.png,a\n",
        {},
        "pairs.csv:2: 'https://a.org/0.png' is a web address. Download the images first, for example with img2dataset, "
        "and open what it writes.",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(folder, case):
    content, settings_, expected = MESSAGES[case]
    path = write(folder, content).path
    assert message(DataConfig(path=path, **settings_)) == expected


def test_messages_with_paths(folder):
    config = write(folder, "image,caption\n0.png,a\nnope.png,b\n")
    assert message(config) == (
        "pairs.csv:3: image 'nope.png' does not exist (1 of 2 are missing). "
        f"Paths are relative to the table's folder, {folder}."
    )
    assert message(DataConfig(path=str(folder / "none.csv"))) == f"{folder}/none.csv: no such file. Check data.path."
    assert message(DataConfig(path=str(folder / "none"))) == (
        f"{folder}/none: no such file or folder. Check data.path."
    )
    assert message(write(folder, b"x", "notes.pdf")) == (
        f"{folder}/notes.pdf: unknown kind of file. data.path may be a table (.csv .tsv .jsonl .parquet), a folder of "
        "images, tars, or 'builtin:...'; set data.format if the name misleads."
    )
    assert message(DataConfig()) == ("data.path is empty. Give a table, a folder of images, tars, or a built-in set.")


def test_messages_about_encodings(folder):
    latin = "image,caption\n0.png,a\n1.png,caf\xe9\n".encode("latin1")
    assert message(write(folder, latin)) == (
        "pairs.csv:3: byte 0xe9 is not UTF-8. Save the file as UTF-8, for example with: iconv -f LATIN1 -t UTF-8."
    )
    assert message(write(folder, "image,caption\n0.png,a\n".encode("utf-16"))) == (
        "pairs.csv: the file is UTF-16, not UTF-8. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8)."
    )


JSON_MESSAGES = {
    '{"image": "0.png"}\n{"image": "1.png"\n': "t.jsonl:2: not JSON (Expecting ',' delimiter, column 18). "
    "Write one object a line.",
    '["0.png"]\n': 't.jsonl:1: a list where an object such as {"image": ...} belongs.',
    '{"image": "0.png", "text": "a"}\n{"image": "1.png"}\n': "t.jsonl:2: no key 'text', which line 1 has. "
    "Keys found: 'image'.",
    '{"image": "0.png", "text": ["a", "b"]}\n': "t.jsonl:1: column 'text' holds a list; text or a number is needed.",
    '{"image": "0.png", "text": null}\n': "t.jsonl:1: 1 row has no caption in column 'text'. Fill or remove it.",
    '{"a": 1}\n': "t.jsonl:1: no column of image paths. Columns found: 'a'. "
    "Set data.image_column to one of them, or rename the column to 'filepath'.",
    "\n": "t.jsonl: the file is empty.",
}


@pytest.mark.parametrize("content", JSON_MESSAGES)
def test_jsonl_messages(folder, content):
    assert message(write(folder, content, "t.jsonl")) == JSON_MESSAGES[content]


def test_parquet_messages(folder):
    pytest.importorskip("pyarrow")
    assert message(write(folder, b"PAR1 this is not parquet", "t.parquet")).startswith(
        "t.parquet: not a readable Parquet file ("
    )
    assert message(DataConfig(path=str(folder / "none.parquet"))) == (
        f"{folder}/none.parquet: no such file. Check data.path."
    )


def test_a_few_missing_files_are_tolerated(folder):
    rows = "".join(f"{i % 4}.png,a\n" for i in range(99)) + "gone.png,a\n"
    assert len(open_dataset(write(folder, "image,caption\n" + rows))) == 100


def test_a_long_table_is_read_in_about_a_second_per_million_rows(tmp_path):
    import time

    path = tmp_path / "long.csv"
    path.write_text("filepath,title\n" + "".join(f'images/{i}.jpg,"photo, {i}"\n' for i in range(200_000)))
    started = time.process_time()
    table = read_table(path, Columns())
    assert time.process_time() - started < 3
    assert table.values["title"][-1] == "photo, 199999"
    assert table.where(199_999) == "long.csv:200001"

"""A source's rows with their numbers: files, folders, the Hub; what can't be read is named in a line."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salsa_peft.config.schema import Source
from salsa_peft.data.row_formats import EXPECTED_COLUMNS, has_columns_of
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import describe, one_line, short

SHUFFLE_SEED = 20_241
HF_PREFIX = "hf://datasets/"
"""Begins the Hub's own paths: hf://datasets/NAMESPACE/NAME[@REVISION][/FOLDER or FILE]."""
HF_PATH = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?\Z")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffix of packed files → what opens them."""


def load_rows(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers, from 1, blank lines not counted; with `limit`, the first after a fixed shuffle. Raises
    SalsaError for none.

    Local files are read here: datasets' cache goes by path and time, and its errors name no row.
    """
    check_split(source)
    rows: Any = _rows(source)
    require(len(rows) > 0, f"{source.path}: found no rows, expected at least one")
    places = _sliced(source, len(rows)) if is_single_file(source) else list(range(len(rows)))
    if source.limit is not None and source.limit < len(places):
        random.Random(SHUFFLE_SEED).shuffle(places)
    chosen = ((place + 1, rows[place]) for place in places[: source.limit])
    return [(number, parse_row(row, f"{source.path}, row {number}")) for number, row in chosen]


def is_single_file(source: Source) -> bool:
    """Whether a source is one file, read here and not by datasets."""
    return data_suffix(source.path) is not None and not Path(source.path).is_dir()


def check_split(source: Source) -> None:
    """Raise SalsaError for a split of a single file that is neither train nor a slice: it would have no effect."""
    require(
        not is_single_file(source) or source.split == "train" or "[" in source.split,
        f"{source.path}: split {source.split!r} cannot be found in a single file, whose rows are all read. Take `split` out (train), cut a slice"
        " such as train[:80%], or name the file that holds this split",
    )


def _sliced(source: Source, rows: int) -> list[int]:
    """The places of a file's rows that a slice names, as datasets reads `train[:80%]`; a file is its own split, whatever the name.

    Raises SalsaError for a slice that datasets cannot read, and for one without rows.
    """
    if "[" not in source.split:
        return list(range(rows))
    from datasets import ReadInstruction

    where = f"{source.path}: split {source.split!r}"
    try:
        spec = ReadInstruction.from_spec(source.split)
        names = {part.partition("[")[0].strip() for part in source.split.split("+")}
        parts = spec.to_absolute(dict.fromkeys(names, rows))
    except (ValueError, AssertionError) as error:
        raise SalsaError(
            f"{where} is no slice of {rows} rows ({one_line(error)}); write one such as train[:80%]"
        ) from error
    places = [place for part in parts for place in range(rows)[part.from_ : part.to]]
    require(bool(places), f"{where} names none of the {rows} rows; write one such as train[:80%]")
    return places


def _rows(source: Source) -> Any:
    """The rows of a file, or of what datasets reads."""
    if not is_single_file(source):
        return _LazyRows(_dataset(source))
    return read_file(_fetched(source) if source.path.startswith(HF_PREFIX) else source.path)


class _LazyRows:
    """Rows of a datasets.Dataset, each read when it is asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return without_null_keys(self.dataset[place])


def data_suffix(path: str) -> str | None:
    """The suffix by which a file is read, .jsonl of X.JSONL.gz; None for what is no data file by its name. A pattern (*) is none."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    found = suffixes[-1] if suffixes else ""
    return found if found in READERS and "*" not in path else None


def read_file(path: str) -> list[Any]:
    """The rows of a file, those of jsonl as its lines. Raises SalsaError for what can't be read."""
    kind = data_suffix(path)
    assert kind is not None, path
    try:
        return READERS[kind](Path(path))
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error


def parse_row(row: Any, where: str) -> dict[str, Any]:
    """A line of jsonl, or a row as it is. Raises SalsaError unless it is an object of columns, its text whole characters."""
    try:
        value = json.loads(row) if isinstance(row, str | bytes) else row
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{where}: found {row[:60]!r} ({one_line(error)}), expected one JSON object a line") from error
    require(isinstance(value, dict), f"{where}: found {str(value)[:60]!r}, expected one JSON object a line")
    for name, entry in value.items():
        check_characters(entry, f"{where}, {one_line(name)}")
    return value


def check_characters(value: Any, where: str) -> None:
    """Raise SalsaError for half of a surrogate pair, as JSON cut inside an emoji holds: tokenizers, Arrow and files take none."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SalsaError(
            f"{where}: found {half!r}, half of a character (a lone surrogate), expected whole ones; mend the text"
        ) from error


def without_null_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose objects lack their null keys: Arrow gives each object of a column the keys of all, and templates ask whether one is there.

    As TRL's remove_none_values, which imports torch. The columns themselves stay.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items() if one is not None}
        return value

    return {name: clean(value) for name, value in row.items()}


def open_bytes(path: Path) -> Any:
    """A file to read, unpacked."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _text(path: Path) -> bytes:
    """Unpacked, without a byte order mark. Raises SalsaError for UTF-16, whose lines are none of UTF-8's."""
    try:
        with open_bytes(path) as file:
            text = bytes(file.read())
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise SalsaError(
            f"{path}: cannot be unpacked: {one_line(error)}; copy it again, or unpack it yourself"
        ) from error
    wide = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    require(not wide, f"{path}: found UTF-16, expected UTF-8; save it as that")
    return text.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path) -> list[Any]:
    return [line for line in _text(path).split(b"\n") if line.strip()]


def _json(path: Path) -> list[Any]:
    """A list of objects, one object over several lines, an object that holds such a list alone ({"data": […]}), or an object a line."""
    text = _text(path)
    if not text.lstrip().startswith((b"[", b"{")):
        return _lines(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(b"{"):
            return _lines(path)
        raise SalsaError(f"{path}: found no JSON ({one_line(error)}), expected a list of objects") from error
    return rows_in(found, path)


def rows_in(found: Any, path: Path | str) -> list[Any]:
    """The rows of a JSON file by what it holds: a list's, those of the one list of objects in an object that is no row, or the object."""
    if not isinstance(found, dict) or any(has_columns_of(kind, set(found)) for kind in EXPECTED_COLUMNS):
        return [found] if isinstance(found, dict) else list(found)
    lists = [name for name, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    require(
        len(lists) < 2,
        f"{path}: found one object with the lists {one_line(', '.join(lists))}, expected a list of rows; put the one to read into a file of its own",
    )
    return list(found[lists[0]]) if lists else [found]


def read_table(path: Path, text: Any) -> Iterator[dict[str, Any]]:
    """The rows of csv, or of tsv, whose columns are all text. Raises csv.Error, and SalsaError for a row of more fields than the header has."""
    csv.field_size_limit(2**31 - 1)
    tab = "\t" if data_suffix(str(path)) == ".tsv" else ","
    for number, row in enumerate(csv.DictReader(text, delimiter=tab, strict=True), 1):
        require(
            None not in row,
            f"{path}, row {number}: found more fields than the header's, expected as many; put text with commas in quotes",
        )
        yield row


def _table(path: Path) -> list[Any]:
    try:
        return list(read_table(path, io.StringIO(_text(path).decode(), newline="")))
    except (csv.Error, UnicodeDecodeError) as error:
        raise SalsaError(f"{path}: found no table ({one_line(error)}), expected a header and rows, in UTF-8") from error


def _parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return [without_null_keys(row) for row in parquet.read_table(path).to_pylist()]
    except ArrowInvalid as error:
        raise SalsaError(f"{path}: found no Parquet ({one_line(error)}), expected a table") from error


def _hub_path(source: Source) -> tuple[str, str | None, str]:
    """An hf:// path → repository, revision, what is in it. Raises SalsaError for another form."""
    match = HF_PATH.match(source.path)
    require(
        match is not None,
        f"{source.path}: found {short(source.path)}, expected {HF_PREFIX}NAMESPACE/NAME, with or without a file or folder in it",
    )
    assert match is not None
    return match[1], match[2] or source.revision, match[3] or ""


def _fetched(source: Source) -> str:
    """The local copy of one file of the Hub."""
    from huggingface_hub import hf_hub_download

    from salsa_peft.utils.hub import readable_hub_errors

    repository, revision, file = _hub_path(source)
    with readable_hub_errors(f"datasets/{repository}"):
        return str(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def _dataset(source: Source) -> Any:
    """A folder's or the Hub's, read by datasets. Raises SalsaError with what it says."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    from salsa_peft.utils.hub import explain_hub_error

    folder = Path(source.path)
    check_table_widths(folder)
    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):  # save_to_disk's
            found: Any = load_from_disk(source.path)
        elif source.path.startswith(HF_PREFIX):
            repository, revision, inside = _hub_path(source)
            part = {"data_files": inside} if "*" in inside else {"data_dir": inside or None}
            found = load_dataset(repository, source.name, split=source.split, revision=revision, **part)
        else:
            found = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except DatasetGenerationError as error:
        check_same_columns(folder)
        why = one_line(error.__cause__ or error)
        raise SalsaError(f"{source.path}: found a file that does not parse ({why}), expected rows alike") from error
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        for path in _files(folder):
            read_file(str(path))  # which names the file that can't be read
        line = explain_hub_error(error, f"datasets/{source.path.removeprefix(HF_PREFIX)}")
        raise SalsaError(line or f"{source.path}: cannot be read as {_wanted(source)}: {one_line(error)}") from error
    if isinstance(found, DatasetDict):
        splits = ", ".join(found)
        require(source.split in found, f"{source.path}: found the splits {splits}, expected `split` to be one of them")
        found = found[source.split]
    assert isinstance(found, Dataset)
    read = BUILDER_SUFFIXES.get(str(found.info.builder_name), tuple(READERS))
    for path in _files(folder):
        if data_suffix(str(path)) not in read and path.name != "dataset_infos.json":
            print(f"{path}: not read, since the folder's other files are {read[0]}", file=sys.stderr, flush=True)
    return found


def _files(folder: Path) -> list[Path]:
    """A local folder's data files, those of save_to_disk's none."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and data_suffix(str(path)) is not None]


def check_table_widths(folder: Path) -> None:
    """Raise SalsaError for a row of a folder's csv or tsv that has more fields than the header: pandas takes the first for its name, in silence."""
    for path in _files(folder) if not (folder / "README.md").is_file() else ():  # which may say how its tables are read
        if data_suffix(str(path)) in (".csv", ".tsv"):
            read_file(str(path))


def check_same_columns(folder: Path) -> None:
    """Raise SalsaError that names the file of a local folder which can't be read, or whose first row has other columns or kinds of values."""
    first: Path | None = None
    known: dict[str, Any] = {}
    for path in _files(folder):
        rows = [parse_row(row, f"{path}, row {number}") for number, row in enumerate(read_file(str(path)), 1)]
        if not rows:
            continue
        first, known = first or path, known or rows[0]
        require(
            known.keys() == rows[0].keys(),
            f"{path}: found the columns {one_line(', '.join(rows[0]))}, and {one_line(', '.join(known))} in {first.name}, expected the same in"
            " every file of a folder; name one file, or give each kind of rows a folder",
        )
        for name, value in rows[0].items():
            alike = None in (value, known[name]) or TYPE_NAMES.get(type(value)) == TYPE_NAMES.get(type(known[name]))
            require(
                alike,
                f"{path}, row 1, {one_line(name)}: found {describe(value)}, and {TYPE_NAMES.get(type(known[name]))} in {first.name}, expected values"
                " of one kind in every file of a folder",
            )


def _wanted(source: Source) -> str:
    name = "" if source.name is None else f", name {short(source.name)}"
    return f"a data set (split {short(source.split)}{name})"


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _table,
    ".tsv": _table,
}
TYPE_NAMES = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false"}
"""What JSON holds, in words."""
BUILDER_SUFFIXES = {"json": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""What reads a folder in datasets → the files that it takes, leaving the others out in silence."""
ACCEPTED_SOURCES = (
    "a .jsonl, .json, .parquet, .csv or .tsv file (also .gz, .bz2, .xz), a folder, hf://datasets/… or a Hub id"
)
"""What a source may be, for messages."""

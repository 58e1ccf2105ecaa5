"""Reading the rows of a data source: files, folders, the Hub. Errors name the file and the row."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Source
from salsa_peft.data.row_formats import EXPECTED_COLUMNS, has_columns_of
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import Repository, explain_hub_error, readable_hub_errors
from salsa_peft.utils.messages import describe, one_line, short

SHUFFLE_SEED = 20_241
HF_PREFIX = "hf://datasets/"
"""Start of the path of a dataset on the Hub: hf://datasets/NAMESPACE/NAME[@REVISION][/FOLDER or FILE]."""
HF_PATH = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?\Z")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffix of compressed files → function that opens them."""
ACCEPTED_SOURCES = (
    "a .jsonl, .json, .parquet, .csv or .tsv file (also .gz, .bz2, .xz), a folder, hf://datasets/… or a Hub id"
)
"""Forms of a source, for messages."""


def load_rows(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """Pairs (row number from 1, row) of a source; with `limit`, the first ones after a fixed shuffle.

    Blank lines are not counted. The package datasets does not read local files here, because its cache depends only on
    path and time, and its errors name no row. Raises SalsaError, also for a source without rows.
    """
    check_split(source)
    single = is_single_file(source)
    rows = read_file(_local_file(source)) if single else _dataset(source)
    require(len(rows) > 0, f"{source.path}: has no rows")
    places = _sliced(source, len(rows)) if single else list(range(len(rows)))
    if source.limit is not None and source.limit < len(places):
        random.Random(SHUFFLE_SEED).shuffle(places)
    chosen = ((place + 1, rows[place]) for place in places[: source.limit])
    if not single:
        chosen = ((number, without_null_keys(row)) for number, row in chosen)
    return [(number, parse_row(row, f"{source.path}, row {number}")) for number, row in chosen]


def is_single_file(source: Source) -> bool:
    """Whether a source is one file, which this module reads without the package datasets."""
    return data_suffix(source.path) is not None and not Path(source.path).is_dir()


def check_split(source: Source) -> None:
    """Raise SalsaError for a split of a single file that is neither train nor a slice."""
    require(
        not is_single_file(source) or source.split == "train" or "[" in source.split,
        f"{source.path}: `split: {source.split}` has no meaning for a single file. Remove `split`, use a slice such as"
        " train[:80%], or give the path of the file that holds this split",
    )


def _sliced(source: Source, rows: int) -> list[int]:
    """Indices of a file's rows in a slice such as `train[:80%]`, as datasets reads it.

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
        problem = f"is not a slice of {rows} rows ({one_line(error)}); use one such as train[:80%]"
        raise SalsaError(f"{where} {problem}") from error
    places = [place for part in parts for place in range(rows)[part.from_ : part.to]]
    require(bool(places), f"{where} contains none of the {rows} rows; use a slice such as train[:80%]")
    return places


def data_suffix(path: str) -> str | None:
    """The suffix of a data file, such as .jsonl for X.JSONL.gz; None for other files and patterns (*)."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    found = suffixes[-1] if suffixes else ""
    return found if found in READERS and "*" not in path else None


def read_file(path: str) -> list[Any]:
    """The rows of a file (for jsonl, the unparsed lines). Raises SalsaError for an unreadable file."""
    kind = data_suffix(path)
    assert kind is not None, path
    try:
        return READERS[kind](Path(path))
    except OSError as error:
        raise SalsaError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error


def parse_row(row: Any, where: str) -> dict[str, Any]:
    """Parse a row if it is a line of jsonl. Raises SalsaError unless the row is an object of valid text."""
    try:
        value = json.loads(row) if isinstance(row, str | bytes) else row
    except UnicodeDecodeError as error:
        raise SalsaError(f"{where}: {not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        raise SalsaError(
            f"{where}: {row[:60]!r} is not valid JSON ({one_line(error)}); write one object per line"
        ) from error
    require(
        isinstance(value, dict), f"{where}: must be a JSON object, not {str(value)[:60]!r}; write one object per line"
    )
    for name, entry in value.items():
        check_characters(entry, f"{where}, {one_line(name)}")
    return value


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a file that cannot be decoded, and what to do."""
    return f"is not UTF-8 ({one_line(error)}); save the file as UTF-8"


def check_characters(value: Any, where: str) -> None:
    """Raise SalsaError for a lone surrogate (half an emoji), which tokenizers, Arrow and files reject."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        problem = f"contains {error.object[error.start]!r}, half of a character (a lone surrogate); correct the text"
        raise SalsaError(f"{where}: {problem}") from error


def without_null_keys(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of a row whose nested objects have no keys with value null. Columns that are null stay.

    Arrow gives each object of a column the keys of all others, and templates test whether a key exists. TRL's
    remove_none_values does the same, but TRL imports torch.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items() if entry is not None}
        return value

    return {name: clean(value) for name, value in row.items()}


def open_bytes(path: Path) -> Any:
    """Open a file for reading its decompressed bytes."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _text(path: Path) -> bytes:
    """A file's bytes, decompressed and without byte order mark. Raises SalsaError for UTF-16."""
    try:
        with open_bytes(path) as file:
            text = bytes(file.read())
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise SalsaError(f"{path}: cannot be decompressed: {one_line(error)}; copy it again") from error
    wide = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in text[:4]
    require(not wide, f"{path}: is UTF-16; save it as UTF-8")
    return text.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path) -> list[Any]:
    return [line for line in _text(path).split(b"\n") if line.strip()]


def _json(path: Path) -> list[Any]:
    """Rows of a .json file: a list, one object, {"data": [the rows]}, or one object per line."""
    text = _text(path)
    if not text.lstrip().startswith((b"[", b"{")):
        return _lines(path)
    try:
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise SalsaError(f"{path}: {not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(b"{"):
            return _lines(path)
        raise SalsaError(f"{path}: is not valid JSON ({one_line(error)}); it must be a list of objects") from error
    return rows_in(found, path)


def rows_in(found: Any, path: Path | str) -> list[Any]:
    """The rows of parsed JSON: a list, a list of objects within an object, or a single object."""
    if not isinstance(found, dict) or any(has_columns_of(kind, set(found)) for kind in EXPECTED_COLUMNS):
        return [found] if isinstance(found, dict) else list(found)
    lists = [name for name, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    require(
        len(lists) < 2,
        f"{path}: is an object with the lists {one_line(', '.join(lists))}; put the list to read into its own file",
    )
    return list(found[lists[0]]) if lists else [found]


def read_table(path: Path, text: Any) -> Iterator[dict[str, Any]]:
    """The rows of csv or tsv, all columns as text. Raises csv.Error and SalsaError."""
    csv.field_size_limit(2**31 - 1)
    suffix = data_suffix(str(path))
    separator, word = ("\t", "tab") if suffix == ".tsv" else (",", "comma")
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    header = list(reader.fieldnames or ())
    require(
        len(header) != 1 or not set(header[0]) & {";", "\t", ","},
        f"{path}: its header is one column, {short(''.join(header))}; the separator of a {suffix} file must be a {word}",
    )
    for number, row in enumerate(reader, 1):
        require(
            None not in row, f"{path}, row {number}: has more fields than the header; put text with commas in quotes"
        )
        yield row


def _table(path: Path) -> list[Any]:
    try:
        return list(read_table(path, io.StringIO(_text(path).decode(), newline="")))
    except UnicodeDecodeError as error:
        raise SalsaError(f"{path}: {not_utf8(error)}") from error
    except csv.Error as error:
        raise SalsaError(f"{path}: is not a table ({one_line(error)}); it must have a header and rows") from error


def _parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return [without_null_keys(row) for row in parquet.read_table(path).to_pylist()]
    except ArrowInvalid as error:
        raise SalsaError(f"{path}: is not a Parquet file ({one_line(error)})") from error


def check_hub_path(path: str, where: str) -> re.Match[str]:
    """Match the parts of an hf:// path. Raises a SalsaError that starts with `where` for any other path."""
    match = HF_PATH.match(path)
    if match is None:
        raise SalsaError(f"{where}: {short(path)} must have the form {HF_PREFIX}NAMESPACE/NAME[/FOLDER or FILE]")
    return match


def _hub_path(source: Source) -> tuple[str, str | None, str]:
    """Repository, revision, and path inside the repository, of an hf:// source."""
    match = check_hub_path(source.path, source.path)
    return match[1], match[2] or source.revision, match[3] or ""


def hub_repository(source: Source) -> Repository | None:
    """The repository on the Hub that a source names; None for a local file or folder."""
    if is_local(source.path):
        return None
    if not source.path.startswith(HF_PREFIX):
        return Repository("dataset", source.path, source.revision)
    repository, revision, _ = _hub_path(source)
    return Repository("dataset", repository, revision)


def at_commit(source: Source, commit: str) -> Source:
    """A source on the Hub at a commit."""
    if source.path.startswith(HF_PREFIX):
        repository, _, inside = _hub_path(source)
        return replace(source, path=f"{HF_PREFIX}{repository}" + (f"/{inside}" if inside else ""), revision=commit)
    return replace(source, revision=commit)


def _local_file(source: Source) -> str:
    """The local path of a single file, which is downloaded if it is on the Hub."""
    if not source.path.startswith(HF_PREFIX):
        return source.path
    from huggingface_hub import hf_hub_download

    repository, revision, file = _hub_path(source)
    with readable_hub_errors(f"datasets/{repository}"):
        return str(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def _dataset(source: Source) -> Any:
    """The Dataset of a folder or Hub repository, read by the package datasets. Raises SalsaError."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

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
        raise SalsaError(f"{source.path}: a file cannot be parsed like the others ({why})") from error
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        for path in _files(folder):
            read_file(str(path))  # names the file that cannot be read
        line = explain_hub_error(error, f"datasets/{source.path.removeprefix(HF_PREFIX)}")
        name = "" if source.name is None else f", name {short(source.name)}"
        problem = f"cannot be read as a dataset (split {short(source.split)}{name}): {one_line(error)}"
        raise SalsaError(line or f"{source.path}: {problem}") from error
    if isinstance(found, DatasetDict):
        require(
            source.split in found, f"{source.path}: has no split {short(source.split)}; use one of {', '.join(found)}"
        )
        found = found[source.split]
    assert isinstance(found, Dataset)
    read = BUILDER_SUFFIXES.get(str(found.info.builder_name), tuple(READERS))
    for path in _files(folder):
        if data_suffix(str(path)) not in read and path.name != "dataset_infos.json":
            say(f"{path}: ignored, because the folder's other files are {read[0]}")
    return found


def _files(folder: Path) -> list[Path]:
    """Data files in a local folder. A folder that save_to_disk wrote has none."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and data_suffix(str(path)) is not None]


def check_table_widths(folder: Path) -> None:
    """Raise SalsaError for a row wider than the header: pandas would take its first field as an index."""
    for path in _files(folder) if not (folder / "README.md").is_file() else ():  # README.md may define how to read them
        if data_suffix(str(path)) in (".csv", ".tsv"):
            read_file(str(path))


def check_same_columns(folder: Path) -> None:
    """Raise SalsaError if files of a folder are unreadable or differ in columns or types of the first row."""
    first: Path | None = None
    known: dict[str, Any] = {}
    for path in _files(folder):
        rows = [parse_row(row, f"{path}, row {number}") for number, row in enumerate(read_file(str(path)), 1)]
        if not rows:
            continue
        first, known = first or path, known or rows[0]
        columns, others = one_line(", ".join(rows[0])), one_line(", ".join(known))
        require(
            known.keys() == rows[0].keys(),
            f"{path}: has the columns {columns}, but {first.name} has {others}. All files of a folder must have the"
            " same columns: give one file, or put files with different columns into different folders",
        )
        for name, value in rows[0].items():
            expected = TYPE_NAMES.get(type(known[name]))
            require(
                None in (value, known[name]) or TYPE_NAMES.get(type(value)) == expected,
                f"{path}, row 1, {one_line(name)}: is {describe(value)}, but {expected} in {first.name}; all files of a"
                " folder must have the same types",
            )


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _table,
    ".tsv": _table,
}
"""Suffix → function that reads the rows of a file."""
TYPE_NAMES = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false"}
BUILDER_SUFFIXES = {"json": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""Builder of the package datasets → suffixes of the files that it reads in a folder; others are silently ignored."""

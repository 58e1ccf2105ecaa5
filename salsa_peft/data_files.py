"""A source's rows with their numbers: jsonl, JSON and Parquet files, folders and the Hub; what can't be read is named in a line."""

from __future__ import annotations

import codecs
import json
import random
from pathlib import Path
from typing import Any

from .config import SalsaError, Source, require
from .messages import one_line

SHUFFLE_SEED = 20_241


def load(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a source with their numbers, from 1, blank lines not counted; with `limit`, the first after a fixed shuffle. Raises
    SalsaError for none.

    Local files are read here: datasets' cache goes by path and time, and its errors name no row.
    """
    if Path(source.path).suffix.lower() in FILES:
        try:
            rows = FILES[Path(source.path).suffix.lower()](Path(source.path))
        except OSError as error:
            raise SalsaError(f"{source.path}: cannot be read: {error.strerror or one_line(error)}") from error
    else:
        rows = _dataset(source)
    require(len(rows) > 0, f"{source.path}: found no rows, expected at least one")
    places = list(range(len(rows)))
    if source.limit is not None and source.limit < len(rows):
        random.Random(SHUFFLE_SEED).shuffle(places)
    chosen = ((place + 1, rows[place]) for place in places[: source.limit])
    return [(number, as_row(row, f"{source.path}, row {number}")) for number, row in chosen]


def as_row(row: Any, where: str) -> dict[str, Any]:
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


def _text(path: Path) -> bytes:
    """Without a byte order mark. Raises SalsaError for UTF-16, whose lines are none of UTF-8's."""
    text = path.read_bytes()
    wide = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    require(not wide, f"{path}: found UTF-16, expected UTF-8; save it as that")
    return text.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path) -> list[Any]:
    return [line for line in _text(path).split(b"\n") if line.strip()]


def _json(path: Path) -> list[Any]:
    """A list of objects, or one object after another."""
    if not _text(path).lstrip().startswith(b"["):
        return _lines(path)
    try:
        return list(json.loads(_text(path)))
    except (ValueError, RecursionError) as error:
        raise SalsaError(f"{path}: found no JSON ({one_line(error)}), expected a list of objects") from error


def _parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return list(parquet.read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise SalsaError(f"{path}: found no Parquet ({one_line(error)}), expected a table") from error


def _dataset(source: Source) -> Any:
    """A folder's or the Hub's."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except DatasetGenerationError as error:
        why = one_line(error.__cause__ or error)
        raise SalsaError(f"{source.path}: found a file that does not parse ({why}), expected rows alike") from error


FILES = {".jsonl": _lines, ".json": _json, ".parquet": _parquet}

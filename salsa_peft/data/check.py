"""Local data against the recipe before a stage begins: columns, numbers of rows, and then every row. Imports no torch."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from salsa_peft.config.options.trl import PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import check_hub_id, is_local
from salsa_peft.config.rewards import check_columns
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data import datasets, row_formats
from salsa_peft.data.files import (
    ACCEPTED_SOURCES,
    HF_PATH,
    HF_PREFIX,
    check_split,
    data_suffix,
    load_rows,
    open_bytes,
    read_file,
    read_table,
    rows_in,
)
from salsa_peft.data.questions import questions
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short, short_path

ROW_KINDS = {
    "demonstrations": "demonstrations",
    "preferences": "preferences",
    "prompts": "prompts",
    "held_out": "demonstrations",
}
"""Key of `data` → the kind of its rows."""
MAX_COUNTED_BYTES = 500_000_000
"""Bytes of a file that is read to count its rows; of one JSON list a tenth."""
EXPECTED_ROWS = "expected one JSON object a line"
EXPECTED_DATA = ACCEPTED_SOURCES


def check_local(recipe: Recipe) -> None:
    """Raise SalsaError for local data that can't be read, lacks a column, or has fewer rows than a batch."""
    check_sources(recipe)
    check_rows(recipe)


def sources(recipe: Recipe) -> Iterator[tuple[str, str, Source]]:
    """(key, kind, source) of every dataset that the recipe names."""
    for kind in ROW_KINDS:
        source = getattr(recipe.data, kind)
        if source is not None:
            yield f"data.{kind}", ROW_KINDS[kind], source
    for name, source in recipe.evaluate.prompts.items():
        yield f"evaluate.prompts.{name}", "prompts", source


def check_sources(recipe: Recipe) -> None:
    """Raise SalsaError for a source that is no data file, folder or Hub id, and for a local file whose first row is not of its kind."""
    for key, kind, source in sources(recipe):
        if is_local(source.path) and not os.path.isdir(source.path):
            require(
                os.path.isfile(source.path),
                f"{key}: found {short_path(source.path)}, which is no file or folder, expected {EXPECTED_DATA}",
            )
            require(
                data_suffix(source.path) is not None,
                f"{key}: found {short_path(source.path)}, expected {EXPECTED_DATA}",
            )
            check_split(source)
            _check_columns(key, kind, source.path)
        elif source.path.startswith("hf://"):
            require(
                HF_PATH.match(source.path) is not None,
                f"{key}: found {short_path(source.path)}, expected {HF_PREFIX}NAMESPACE/NAME, with or without a file or folder in it",
            )
        elif not is_local(source.path):
            check_hub_id(key, source.path, EXPECTED_DATA)


def check_rows(recipe: Recipe) -> None:
    """The embedded world's sizes, and rows of local files, against the batches that are cut from them. How many are too long is seen by
    the stage."""
    sft, reward, ppo = recipe.sft, recipe.reward, recipe.ppo
    wanted = {"demonstrations": ("sft", sft), "preferences": ("reward", reward), "prompts": ("ppo", ppo)}
    algorithms = {policy.algorithm for policy in recipe.policies.values()}
    if None not in (recipe.sft.from_ or [None]):
        del wanted["demonstrations"]
    for key, (stage, section) in wanted.items():
        source, toy = getattr(recipe.data, key), recipe.toy
        rows = count_rows(source) if source is not None else None if toy is None else getattr(toy, key)
        used = {"preferences": reward.trained, "prompts": "ppo" in algorithms}.get(key, True)
        if rows is None or not used:
            continue
        share, why = rows, ""
        if key == "demonstrations" and sft.subset < 1:
            share, why = max(1, round(rows * sft.subset)), f" (sft.subset {sft.subset:g})"
        elif key == "preferences":
            share, why = rows - reward.held_out_rows(rows), f" (reward.held_out {reward.held_out:g})"
        found = (
            f"toy.{key}: found {rows}" if source is None else f"data.{key}: found {rows} in {Path(source.path).name}"
        )
        require(
            share >= section.batch_size,
            f"{found}, {share} of them to train on{why}, expected at least {stage}.batch_size = {section.batch_size}; add some or lower"
            f" {stage}.batch_size",
        )
    for algorithm in sorted(algorithms - {"ppo"}):
        key = "preferences" if algorithm in PREFERENCE_ALGORITHMS else "prompts"
        source, section = getattr(recipe.data, key), getattr(recipe, algorithm)
        rows = count_rows(source) if source is not None else None if recipe.toy is None else getattr(recipe.toy, key)
        if rows is not None:
            section.check_rows(rows, algorithm)


def count_rows(source: Source | None) -> int | None:
    """Rows of a local file (at most its limit); None where they are not known before the stage starts, would take long to count (also of a slice), or there
    is no source."""
    if source is None or "[" in source.split or not is_local(source.path) or not os.path.isfile(source.path):
        return None
    status = os.stat(source.path)
    rows = _count(source.path, status.st_size, status.st_mtime_ns)
    return None if rows is None else min(rows, source.limit or rows)


@functools.cache
def _count(path: str, size: int, _: int) -> int | None:
    """Of a file as it is: its size, and when it was changed."""
    try:
        if path.lower().endswith(".parquet"):
            return int(importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows)
        if path.lower().endswith(".json"):
            return None if size > MAX_COUNTED_BYTES // 10 else len(read_file(path))
        if size > MAX_COUNTED_BYTES or not path.lower().endswith((".jsonl", ".ndjson")):
            return None
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except (OSError, ValueError, RecursionError):
        return None  # the check of its columns, or the stage, says what is wrong with it


def _first_row(path: str) -> Any:
    """Of a .jsonl, .json, .csv or .tsv file, also packed; of a .parquet file its columns alone."""
    kind = data_suffix(path)
    if kind == ".parquet":
        return dict.fromkeys(importlib.import_module("pyarrow.parquet").read_schema(path).names)
    with open_bytes(Path(path)) as file:
        if kind in (".csv", ".tsv"):
            return next(read_table(Path(path), io.TextIOWrapper(file, "utf-8-sig", newline="")), None)
        if kind == ".json":
            text = file.read(10_000_000).decode("utf-8-sig", "ignore").strip()
            if text.startswith("{"):
                return _first_of_object(path, text)
            text = text.removeprefix("[").lstrip()
            return json.JSONDecoder().raw_decode(text)[0] if text.strip("]") else None
        line = next((line for line in iter(lambda: file.readline(10_000_000), b"") if line.strip()), b"")
        return json.loads(line) if line else None


def _first_of_object(path: str, text: str) -> Any:
    """Of a .json file that begins with an object: the row that it is, or the first of those in it."""
    try:
        found = json.JSONDecoder().raw_decode(text)[0]
    except ValueError:  # it may be longer than what was read
        first = read_file(path)[0]
        return json.loads(first) if isinstance(first, bytes) else first
    return next(iter(rows_in(found, path)), None)


def _check_columns(where: str, kind: str, path: str) -> None:
    """The first row of a local file is one of its kind; of a .parquet file the columns are."""
    name, form = short(Path(path).name), "JSON" if "json" in str(data_suffix(path)) else str(data_suffix(path))[1:]
    try:
        row = _first_row(path)
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"its first row is not {form}"
        raise SalsaError(f"{where}: {name} cannot be read: {why}; {EXPECTED_ROWS}") from error
    if not isinstance(row, dict):
        raise SalsaError(f"{where}: found {'no rows' if row is None else short(row)} in {name}, {EXPECTED_ROWS}")
    columns = ", ".join(map(str, list(row)[:12])) or "none"
    expected = row_formats.EXPECTED_COLUMNS[kind]
    require(
        row_formats.has_columns_of(kind, set(row)),
        f"{where}: found the columns {columns} in {name}, expected {expected}",
    )
    alone = kind == "preferences" and row_formats.lacks_prompt(row)
    require(not alone, f"{where}: found text in chosen and no `prompt` in {name}, expected one beside it")


MAX_CHECKED_BYTES = 300_000_000
"""Bytes of a file, or of a folder's files, that are read for it: a few seconds."""
STAGE_DATA = {
    "sft": ("demonstrations",), "soup": ("held_out",), "reward": ("preferences",), "dpo": ("preferences",), "kto": ("preferences",), "ppo": ("prompts",),
    "rloo": ("prompts",), "grpo": ("prompts",), "landscape": ("evaluation",), "evaluate": ("evaluation",),
}  # fmt: skip
"""Stage → the data that it reads."""
MAX_HUB_ROWS = 1000
"""Rows of a data set of the Hub that are read, after the fixed shuffle that `limit` has."""
READERS: dict[str, Callable[[Source], Any]] = {
    "demonstrations": datasets.demonstrations,
    "held_out": datasets.demonstrations,
    "preferences": datasets.preferences,
    "prompts": datasets.prompts,
    "evaluation": questions,
}


def check_every_row(recipe: Recipe, stages: Collection[str], hub: bool = False) -> None:
    """Raise SalsaError for the first row, by file, number and column, that one of these stages could not use; with `hub` also for a data
    set of the Hub that cannot be fetched, or has such a row."""
    kinds = {kind for stage in stages for kind in STAGE_DATA.get(stage, ())}
    own = {name: getattr(recipe.data, name) for name in READERS if name != "evaluation"}
    for kind, reader in READERS.items():
        sources = list(recipe.evaluate.prompts.values()) if kind == "evaluation" else [own[kind]]
        for source in sources if kind in kinds else ():
            if source is not None and (not is_local(source.path) if hub else _is_small(source.path)):
                with contextlib.redirect_stderr(io.StringIO()):  # what is odd the stage says
                    part = source if is_local(source.path) else _part(source)
                    rows = reader(part)
                _check_functions(recipe, kind, part)
                for stage in sorted({"rloo", "grpo"} & set(stages)) if kind == "prompts" else ():
                    datasets.check_no_template_options(rows, stage)


def _part(source: Source) -> Source:
    """At most HUB_ROWS of the rows that a stage would read."""
    return dataclasses.replace(source, limit=min(source.limit or MAX_HUB_ROWS, MAX_HUB_ROWS))


def _check_functions(recipe: Recipe, kind: str, source: Source) -> None:
    """Raise SalsaError for a reward function that takes a column which no row of the prompts that it scores has."""
    functions = [part for part in recipe.reward.parts if part.kind == "function"]
    if functions and kind in ("prompts", "evaluation"):
        columns = {name for _, row in load_rows(source) for name in row}
        for part in functions:
            check_columns("reward.model", part.value, columns, source.path)


def _is_small(path: str) -> bool:
    """Whether a path is a local file, or a folder of data, of at most LARGEST bytes."""
    if os.path.isdir(path):
        return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) <= MAX_CHECKED_BYTES
    return data_suffix(path) is not None and os.path.isfile(path) and os.path.getsize(path) <= MAX_CHECKED_BYTES

"""Checks of a recipe's data before a stage starts: columns, numbers of rows, then every row.

Imports no torch.
"""

import codecs
import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from salsa_peft.config.job import recipe_of_policy
from salsa_peft.config.options.synthetic import SYNTHETIC_DATA
from salsa_peft.config.options.trl import PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import check_hub_id, is_local
from salsa_peft.config.rewards import check_columns
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data import datasets, row_formats
from salsa_peft.data.files import (
    ACCEPTED_SOURCES,
    check_hub_path,
    check_split,
    data_suffix,
    load_rows,
    not_utf8,
    open_bytes,
    read_file,
    read_table,
    rows_in,
)
from salsa_peft.data.questions import questions
from salsa_peft.data.splits import prompt_digest, split_by_prompt
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require, run_checks
from salsa_peft.utils.messages import short, short_path

MAX_COUNTED_BYTES = 500_000_000
"""Size of the largest .jsonl file whose rows are counted; for .json files, a tenth of this size."""

SLICE = re.compile(r"train\[(\d*):(\d*)\]\Z")
"""A slice in rows, whose number of rows is known before the file is read."""


def check_local(recipe: Recipe) -> None:
    """Raise SalsaError for missing data, wrong columns in the first row, or fewer rows than a batch."""
    kinds = {key: "demonstrations" if key == "held_out" else key for key in datasets.TOY_FILES}
    named = [(f"data.{key}", kind, getattr(recipe.data, key)) for key, kind in kinds.items()]
    named += [(f"evaluate.prompts.{name}", "prompts", source) for name, source in recipe.evaluate.prompts.items()]
    run_checks(functools.partial(check_source, *entry) for entry in named if entry[2] is not None)
    _check_rows(recipe)


def check_source(key: str, kind: str, source: Source) -> None:
    """Raise SalsaError, which starts with `key`, for a missing file or a first row without the columns of its kind."""
    if is_local(source.path) and not os.path.isdir(source.path):
        path = short_path(source.path)
        require(os.path.isfile(source.path), f"{key}: there is no file or folder {path}; give {ACCEPTED_SOURCES}")
        require(data_suffix(source.path) is not None, f"{key}: {path} is no data file; give {ACCEPTED_SOURCES}")
        check_split(source)
        _check_columns(key, kind, source.path)
    elif source.path.startswith("hf://"):
        check_hub_path(source.path, key)
    elif not is_local(source.path):
        check_hub_id(key, source.path, ACCEPTED_SOURCES)


def _check_rows(recipe: Recipe) -> None:
    """Raise SalsaError if a local file, or the toy data, has fewer rows than a batch."""
    sft, reward = recipe.sft, recipe.reward
    algorithms = {policy.algorithm for policy in recipe.policies.values()}
    for key, stage, used in (
        ("demonstrations", "sft", None in (sft.from_ or [None])),
        ("preferences", "reward", reward.trained),
        ("prompts", "ppo", "ppo" in algorithms),
    ):
        source, batch, of = getattr(recipe.data, key), getattr(recipe, stage).batch_size, f"{stage}.batch_size"
        rows = number_of_rows(recipe, key)
        if rows is None or not used:
            continue
        usable, why = rows, ""
        if key == "demonstrations" and sft.subset < 1:
            usable, why = max(1, round(rows * sft.subset)), f" (sft.subset {sft.subset:g})"
        elif key == "preferences":
            usable, why = rows - reward.held_out_rows(rows), f" (reward.held_out {reward.held_out:g})"
        elif key == "prompts" and recipe.ppo.value == "group":
            batch, of = recipe.ppo.prompts_per_update, f"{of} / num_generations"
        synthetic = recipe.synthetic is not None and key in SYNTHETIC_DATA
        made = f"synthetic: {rows} {key}" if synthetic else f"toy.{key}: {rows} rows"
        found = made if source is None else f"data.{key}: {Path(source.path).name} has {rows} rows"
        require(
            usable >= batch,
            f"{found}, {usable} of them for training{why}, which is less than {of} = {batch}; add rows or lower"
            f" {stage}.batch_size",
        )
    for name in [name for name, policy in recipe.policies.items() if policy.overrides]:
        own = recipe_of_policy(recipe, name)
        rows, batch = number_of_rows(own, "prompts"), own.ppo.prompts_per_update
        require(
            recipe.policies[name].algorithm != "ppo" or rows is None or rows >= batch,
            f"policies.{name}.overrides: there are {rows} prompts, less than an update's {batch}; lower batch_size",
        )
    for algorithm in sorted(algorithms - {"ppo"}):
        rows = number_of_rows(recipe, "preferences" if algorithm in PREFERENCE_ALGORITHMS else "prompts")
        if rows is not None:
            getattr(recipe, algorithm).check_rows(rows, algorithm)


def number_of_rows(recipe: Recipe, key: str) -> int | None:
    """Number of rows of `data.<key>`, or of synthetic or toy data if the key is unset; None if unknown."""
    source, section = getattr(recipe.data, key), recipe.synthetic
    if source is not None:
        return count_rows(source)
    if section is not None and key in SYNTHETIC_DATA:
        prompts = number_of_rows(recipe, "prompts")
        if prompts is None or key == "preferences":  # pairs with equal scores are left out
            return None
        return min(prompts, section.limit or prompts)
    return None if recipe.toy is None else getattr(recipe.toy, key)


def count_rows(source: Source | None) -> int | None:
    """Number of rows of a local file, at most `limit`; None for a large file, other sources, and slices in percent."""
    part = None if source is None else SLICE.match(source.split)
    if (
        source is None
        or not is_local(source.path)
        or not os.path.isfile(source.path)
        or ("[" in source.split and not part)
    ):
        return None
    status = os.stat(source.path)
    rows = _count(source.path, status.st_size, status.st_mtime_ns)
    if rows is not None and part is not None:
        rows = len(range(rows)[slice(*(int(end) if end else None for end in part.groups()))])
    return None if rows is None else min(rows, source.limit or rows)


@functools.cache
def _count(path: str, size: int, _: int) -> int | None:
    """Number of rows of a file, or None. Size and modification time are arguments only for the cache."""
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
        return None  # _check_columns or the stage reports it


def _first_row(path: str) -> Any:
    """The first row of a data file, which may be compressed; for a .parquet file a dict of its columns."""
    kind = data_suffix(path)
    if kind == ".parquet":
        return dict.fromkeys(importlib.import_module("pyarrow.parquet").read_schema(path).names)
    with open_bytes(Path(path)) as file:
        if kind in (".csv", ".tsv"):
            return next(read_table(Path(path), io.TextIOWrapper(file, "utf-8-sig", newline="")), None)
        if kind == ".json":
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(file.read(10_000_000)).strip()
            if text.startswith("{"):
                return _first_of_object(path, text)
            text = text.removeprefix("[").lstrip()
            return json.JSONDecoder().raw_decode(text)[0] if text.strip("]") else None
        line = next((line for line in iter(lambda: file.readline(10_000_000), b"") if line.strip()), b"")
        return json.loads(line) if line else None


def _first_of_object(path: str, text: str) -> Any:
    """The first row of a .json file that starts with an object: this object, or the first row of its list."""
    try:
        found = json.JSONDecoder().raw_decode(text)[0]
    except ValueError:  # the object may be longer than the text
        first = read_file(path)[0]
        return json.loads(first) if isinstance(first, bytes) else first
    return next(iter(rows_in(found, path)), None)


def _check_columns(where: str, kind: str, path: str) -> None:
    """Raise SalsaError if the first row of a local file lacks the columns that its kind of data needs."""
    name, suffix = short(Path(path).name), str(data_suffix(path))
    try:
        row = _first_row(path)
    except UnicodeDecodeError as error:
        raise SalsaError(f"{where}: {name} {not_utf8(error)}") from error
    except SalsaError as error:
        raise SalsaError(f"{where}: {error}") from error
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError) as error:
        form = "JSON" if "json" in suffix else suffix[1:]
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"its first row is not {form}"
        raise SalsaError(f"{where}: {name} cannot be read: {why}") from error
    require(row is not None, f"{where}: {name} has no rows")
    require(isinstance(row, dict), f"{where}: the first row of {name} must be a JSON object, not {short(row)}")
    columns = ", ".join(map(str, list(row)[:12])) or "no columns"
    expected = row_formats.EXPECTED_COLUMNS[kind]
    require(
        row_formats.has_columns_of(kind, set(row)), f"{where}: {name} has the columns {columns}; it needs {expected}"
    )
    require(
        kind != "preferences" or not row_formats.lacks_prompt(row),
        f"{where}: {name} has texts in chosen that do not contain the prompt; add a column `prompt`",
    )


MAX_CHECKED_BYTES = 300_000_000
"""Size of the largest local file or folder whose rows are all checked, which takes a few seconds."""
STAGE_DATA = {
    "synthetic": ("prompts",), "data/demonstrations": ("demonstrations",), "data/preferences": ("preferences",), "reward": ("preferences",), "soup": ("held_out",),
    "reward_quality": ("prompts",), "ppo": ("prompts",), "dpo": ("preferences",), "kto": ("preferences",), "rloo": ("prompts",),
    "grpo": ("prompts",), "landscape": ("evaluation",), "evaluate": ("evaluation",),
}  # fmt: skip
"""Stage or unit → kinds of data that it reads."""
MAX_HUB_ROWS = 1000
"""Number of rows of a Hub dataset that are checked: the first ones after the shuffle that `limit` uses."""
READERS: dict[str, Callable[[Source], Any]] = {
    "demonstrations": datasets.demonstrations,
    "held_out": datasets.demonstrations,
    "preferences": datasets.preferences,
    "prompts": datasets.prompts,
    "evaluation": questions,
}


def check_every_row(recipe: Recipe, stages: Collection[str], hub: bool = False) -> None:
    """Raise SalsaError, with file, row and column, for the first row that one of `stages` (or units) cannot use.

    hub=False checks local data. hub=True checks Hub datasets, and raises SalsaError if one cannot be downloaded.
    """
    kinds = {kind for stage in stages for kind in STAGE_DATA.get(stage, ())}
    for kind, reader in READERS.items():
        named = recipe.evaluate.prompts.values() if kind == "evaluation" else [getattr(recipe.data, kind)]
        for source in named if kind in kinds else ():
            if source is None or not (not is_local(source.path) if hub else _is_small(source.path)):
                continue
            limit = min(source.limit or MAX_HUB_ROWS, MAX_HUB_ROWS)
            part = dataclasses.replace(source, limit=limit) if hub else source
            with contextlib.redirect_stderr(io.StringIO()):  # the stage prints the warnings
                rows = reader(part)
            _check_functions(recipe, kind, part)
            if kind == "preferences" and (not hub or limit == source.limit):  # else these are not all rows
                _check_held_out(recipe, rows, stages)
            for stage in sorted({"rloo", "grpo"} & set(stages)) if kind == "prompts" else ():
                datasets.check_no_template_options(rows, stage)


def _check_held_out(recipe: Recipe, rows: list[dict[str, Any]], stages: Collection[str]) -> None:
    """Raise SalsaError if no prompt can be held out of the pairs, or if too few pairs are left to train on.

    Prints a line if more than twice as many pairs will be held out as the recipe says.
    """
    prompts = [prompt_digest(row) for row in rows]
    for stage in [stage for stage in ("reward", *PREFERENCE_ALGORITHMS) if stage in stages]:
        section = getattr(recipe, stage)
        wanted = section.held_out_rows(len(rows))
        held_out = len(split_by_prompt(prompts, wanted).held_out) if wanted < len(rows) else wanted
        if stage == "reward":
            require(
                len(rows) - held_out >= section.batch_size,
                f"data.preferences: {len(rows)} pairs, {held_out} of them held out (reward.held_out {section.held_out:g}),"
                f" are too few for reward.batch_size = {section.batch_size}; add pairs or lower reward.batch_size",
            )
        else:
            section.check_rows(len(rows), stage, held_out)
        if held_out > 2 * wanted:
            say(
                f"data.preferences: {stage} holds out {held_out} of {len(rows)} pairs ({held_out / len(rows):.0%}) and not"
                f" {wanted} ({stage}.held_out {section.held_out:g}), because all pairs of a prompt stay together and there"
                f" are {len(set(prompts))} prompts; pairs of more prompts bring it nearer"
            )


def _check_functions(recipe: Recipe, kind: str, source: Source) -> None:
    """Raise SalsaError for a function that requires a column which no row of its prompts has."""
    functions = [("reward.model", part.value) for part in recipe.reward.parts if part.kind == "function"]
    if kind == "prompts" and recipe.synthetic is not None:
        functions.append(("synthetic.function", recipe.synthetic.function))
    if functions and kind in ("prompts", "evaluation"):
        columns = {name for _, row in load_rows(source) for name in row}
        for where, value in functions:
            check_columns(where, value, columns, source.path)


def _is_small(path: str) -> bool:
    """Whether a path is a local data file or folder of at most MAX_CHECKED_BYTES."""
    if os.path.isdir(path):
        return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) <= MAX_CHECKED_BYTES
    return data_suffix(path) is not None and os.path.isfile(path) and os.path.getsize(path) <= MAX_CHECKED_BYTES

"""Data, row by row, before a stage begins: a row that can't be used is refused at once, not after the stages before have trained.

Data sets of the Hub are fetched, and a part of their rows is read. Left out: what only a tokenizer can tell (lengths, templates).
Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from salsa_peft import data
from salsa_peft.config.paths import is_local
from salsa_peft.config.rewards import check_columns
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data_files import file_kind, load
from salsa_peft.questions import questions

LARGEST = 300_000_000
"""Bytes of a file, or of a folder's files, that are read for it: a few seconds."""
READ = {
    "sft": ("demonstrations",), "soup": ("held_out",), "reward": ("preferences",), "dpo": ("preferences",), "kto": ("preferences",), "ppo": ("prompts",),
    "rloo": ("prompts",), "grpo": ("prompts",), "landscape": ("evaluation",), "evaluate": ("evaluation",),
}  # fmt: skip
"""Stage → the data that it reads."""
HUB_ROWS = 1000
"""Rows of a data set of the Hub that are read, after the fixed shuffle that `limit` has."""
READERS: dict[str, Callable[[Source], Any]] = {
    "demonstrations": data.demonstrations,
    "held_out": data.demonstrations,
    "preferences": data.preferences,
    "prompts": data.prompts,
    "evaluation": questions,
}


def check(recipe: Recipe, stages: Collection[str], hub: bool = False) -> None:
    """Raise SalsaError for the first row, by file, number and column, that one of these stages could not use; with `hub` also for a data
    set of the Hub that cannot be fetched, or has such a row."""
    kinds = {kind for stage in stages for kind in READ.get(stage, ())}
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
                    data.check_plain(rows, stage)


def _part(source: Source) -> Source:
    """At most HUB_ROWS of the rows that a stage would read."""
    return dataclasses.replace(source, limit=min(source.limit or HUB_ROWS, HUB_ROWS))


def _check_functions(recipe: Recipe, kind: str, source: Source) -> None:
    """Raise SalsaError for a reward function that takes a column which no row of the prompts that it scores has."""
    functions = [part for part in recipe.reward.parts if part.kind == "function"]
    if functions and kind in ("prompts", "evaluation"):
        columns = {name for _, row in load(source) for name in row}
        for part in functions:
            check_columns("reward.model", part.value, columns, source.path)


def _is_small(path: str) -> bool:
    """Whether a path is a local file, or a folder of data, of at most LARGEST bytes."""
    if os.path.isdir(path):
        return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) <= LARGEST
    return file_kind(path) is not None and os.path.isfile(path) and os.path.getsize(path) <= LARGEST

"""Tokenized training data: the data stage writes it once, and the stages that train read it.

A result is a folder of datasets' save_to_disk (Arrow), and the same rows give the same bytes. Nothing is cut or left out
because of its length, so that model.max_length can change without tokenizing again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.config.schema import Source
from salsa_peft.data import datasets
from salsa_peft.data.chat.template_fields import template_options, trained_tokens
from salsa_peft.data.splits import prompt_digest
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROWS = "rows"
"""Name of the folder with the rows inside a result's folder."""
IGNORED = -100
"""Label of a token without loss."""
PAIR_TOKENS = ("chosen_ids", "rejected_ids")
"""The columns of a pair's token ids, as TRL's RewardTrainer names them."""
Progress = Callable[[int, int], object]
"""Called with the number of rows that are tokenized, and the number of all rows."""


def write_demonstrations(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write demonstrations as rows of input_ids and labels, which are −100 outside assistant tokens."""
    rows = tokenized_demonstrations(datasets.demonstrations(source, tokenizer), tokenizer, progress)
    rows.save_to_disk(folder / ROWS)
    return {"rows": len(rows), "tokens": count_tokens(rows, "input_ids")}


def write_preferences(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write preference pairs: their chats, the token ids of both chats, and the digest of their prompt.

    Raises SalsaError if all pairs have the same prompt, since no pairs could be held out.
    """
    rows = tokenized_preferences(datasets.preferences(source, tokenizer), tokenizer, progress)
    prompts = len(set(rows["prompt_digest"]))
    require(
        prompts > 1 or len(rows) == 1,
        f"{source.path}: all {len(rows)} pairs have the same prompt, so no pairs can be held out without training on their"
        " prompt; add pairs of other prompts",
    )
    rows.save_to_disk(folder / ROWS)
    return {"rows": len(rows), "prompts": prompts, "tokens": sum(count_tokens(rows, name) for name in PAIR_TOKENS)}


WRITERS = {"demonstrations": write_demonstrations, "preferences": write_preferences}
"""Kind of data, which is also the unit's name → function that writes it."""


def tokenized_demonstrations(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Dataset:
    """Tokenize rows of `messages` to input_ids and labels."""

    def tokenize(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        ids, mask = trained_tokens(row, tokenizer)
        if progress is not None:
            progress(index + 1, len(rows))
        return {"input_ids": ids, "labels": [token if keep else IGNORED for token, keep in zip(ids, mask, strict=True)]}

    return _with_tokens(datasets.to_dataset(rows), tokenize, "input_ids", "labels", keep=False)


def tokenized_preferences(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Dataset:
    """Add the token ids of both chats, as TRL's RewardTrainer tokenizes them, and the digest of the prompt to pairs."""

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        options: Any = template_options(row) | {"return_dict": True}
        render: Any = partial(tokenizer.apply_chat_template, **options)
        sides = zip(PAIR_TOKENS, (row["chosen"], row["rejected"]), strict=True)
        ids = {name: list(render(chat)["input_ids"]) for name, chat in sides}
        if progress is not None:
            progress(index + 1, len(rows))
        return {**ids, "prompt_digest": prompt_digest(rows[index])}

    return _with_tokens(datasets.to_dataset(rows), tokenize, *PAIR_TOKENS, keep=True)


def _with_tokens(dataset: Dataset, tokenize: Callable[..., dict[str, Any]], *names: str, keep: bool) -> Dataset:
    """Map `tokenize` over the rows. names: columns of token ids (int32). keep: whether the rows' own columns stay."""
    from datasets import Features, List, Value

    features: dict[str, Any] = {name: List(Value("int32")) for name in names}
    if keep:
        features = {**dataset.features, **features, "prompt_digest": Value("string")}
    return dataset.map(
        tokenize,
        with_indices=True,
        remove_columns=None if keep else dataset.column_names,
        features=Features(features),
        new_fingerprint="tokenized",  # datasets would otherwise hash the tokenizer, which takes seconds
    )


def count_tokens(rows: Dataset, column: str) -> int:
    """Number of tokens in a column of token ids."""
    return int(_lengths(rows, column).sum())


def _lengths(rows: Dataset, column: str) -> Any:
    """Length of each list of a column, as a NumPy array."""
    from pyarrow import compute

    return compute.list_value_length(_table(rows)[column]).to_numpy()


def _table(rows: Dataset) -> Any:
    """The rows as an Arrow table, not copied unless rows are selected."""
    return rows.with_format("arrow")[:]


def _of_table(table: Any, rows: Dataset) -> Dataset:
    """A Dataset of an Arrow table with columns of `rows`."""
    from datasets import Dataset, Features
    from datasets.table import InMemoryTable

    info = rows.info.copy()
    info.features = Features({name: rows.features[name] for name in table.column_names})
    return Dataset(InMemoryTable(table), info=info, fingerprint=rows._fingerprint)


def load(folder: Path, *columns: str) -> Dataset:
    """The rows of a result, memory-mapped. columns: the columns to read; none for all.

    The Dataset has no cache files, because map and filter would otherwise write into the finished result.
    """
    from datasets import load_from_disk

    found: Any = load_from_disk(str(folder / ROWS))
    table = found.data.table
    return _of_table(table.select(columns) if columns else table, found)


def cut_demonstrations(rows: Dataset, longest: int) -> Dataset:
    """Demonstrations cut to `longest` tokens, without those that then have no token with loss, as in TRL's SFTTrainer."""
    import numpy as np
    import pyarrow
    from pyarrow import compute

    parts, changed = [], False
    for batch in _table(rows).to_batches(max_chunksize=10_000):
        cut = {name: compute.list_slice(batch.column(name), 0, longest) for name in batch.schema.names}
        labels = cut["labels"]
        places = compute.list_parent_indices(labels).to_numpy()
        trained = np.zeros(len(labels), dtype=bool)
        trained[places[labels.flatten().to_numpy() != IGNORED]] = True
        part = pyarrow.RecordBatch.from_arrays(
            [cut[name].cast(batch.schema.field(name).type) for name in cut], schema=batch.schema
        )
        parts.append(part.filter(pyarrow.array(trained)))
        changed |= not part.equals(batch) or not trained.all()
    return _of_table(pyarrow.Table.from_batches(parts), rows) if changed else rows


def pairs_that_fit(rows: Dataset, longest: int) -> Dataset:
    """The pairs of which neither chat is longer than `longest` tokens."""
    fits = (_lengths(rows, "chosen_ids") <= longest) & (_lengths(rows, "rejected_ids") <= longest)
    return rows if fits.all() else _of_table(_table(rows).filter(fits), rows)

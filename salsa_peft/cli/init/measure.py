"""What `salsa init` reads off the user's files: rows, columns, lengths in tokens, and the model's template and limits.

Imports no torch: tokens are counted by the package tokenizers, or as characters / 4 without the model's tokenizer.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from salsa_peft.config.rewards import has_template
from salsa_peft.config.schema import OWN_TEMPLATE, Source
from salsa_peft.data import datasets, row_formats
from salsa_peft.data.chat.template_fields import message_text
from salsa_peft.data.files import load_rows
from salsa_peft.data.message_formats import Messages
from salsa_peft.data.row_parts import first_column, has_columns
from salsa_peft.models.architectures.checks import longest_sequence, text_part
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.hub import cached_folder

SAMPLE = 2000
"""Maximum number of rows whose lengths are measured."""
CHARACTERS = 4
"""Characters in a token, where the tokenizer is not known."""


@dataclass(frozen=True)
class DataFile:
    """What a data file holds. The lengths are in tokens, of SAMPLE rows or of all."""

    kind: str
    """demonstrations, preferences or prompts."""
    rows: int
    columns: str
    """The columns that are read."""
    chats: Sequence[int]
    """Lengths of whole chats, of both answers of a pair; of the prompts, if there are no answers."""
    prompts: Sequence[int]
    answers: Sequence[int]
    texts: Sequence[str]
    """The prompts as text, to find those that occur twice."""


def quantile(lengths: Sequence[int], share: float) -> int:
    """The length that `share` of the lengths do not exceed; 0 without lengths."""
    return int(np.ceil(np.quantile(lengths, share))) if len(lengths) else 0


class TokenCounter:
    """Counts tokens of chats, each turn with ChatML's marks, whose length is similar in other templates."""

    def __init__(self, folder: Path | None) -> None:
        self.exact = folder is not None and (folder / "tokenizer.json").is_file()
        self._encode: Callable[[list[str]], list[int]] = lambda texts: [-(-len(text) // CHARACTERS) for text in texts]
        if folder is None or not self.exact:
            return
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises plain Exception
            raise SalsaError(f"--model: tokenizer.json cannot be read: {error}; save the tokenizer again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._encode = lambda texts: [
            len(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def count(self, chats: Sequence[Messages]) -> list[int]:
        """Number of tokens of each chat."""
        return self._encode(
            [
                "".join(f"<|im_start|>{turn['role']}\n{message_text(turn)}<|im_end|>\n" for turn in chat)
                for chat in chats
            ]
        )


def measure(kind: str, source: Source, counter: TokenCounter) -> DataFile:
    """Read a source and count its tokens. Raises SalsaError for a row that cannot be read."""
    rows = load_rows(source)
    part = replace(source, limit=SAMPLE)
    columns = _columns(kind, rows[0][1])
    if kind == "demonstrations":
        chats = [row["messages"] for row in datasets.demonstrations(part)]
        prompts, answers = [chat[:-1] for chat in chats], [chat[-1:] for chat in chats]
    elif kind == "preferences":
        pairs = [(row["chosen"], row["rejected"]) for row in datasets.preferences(part)]
        chats = [max(pair, key=lambda chat: sum(len(message_text(turn)) for turn in chat)) for pair in pairs]
        prompts, answers = [chosen[:-1] for chosen, _ in pairs], [chosen[-1:] for chosen, _ in pairs]
    else:
        chats = prompts = [row["prompt"] for row in datasets.prompts(part)]
        answers = []
    texts = [datasets.prompt_text(prompt) for prompt in prompts]
    return DataFile(
        kind, len(rows), columns, counter.count(chats), counter.count(prompts), counter.count(answers), texts
    )


def _columns(kind: str, row: dict[str, Any]) -> str:
    """The columns of a row that are read, as text."""
    if kind == "demonstrations":
        names: Sequence[str] = next(names for names in row_formats.DEMONSTRATIONS if has_columns(row, *names))
    elif kind == "preferences":
        prompt = first_column(row, row_formats.PROMPT_COLUMNS)
        names = [*([prompt] if prompt else []), *row_formats.pair_columns(row)]
    else:
        names = [str(first_column(row, list(row_formats.PROMPTS)))]
    return ", ".join(names)


@dataclass(frozen=True)
class ModelFolder:
    """What a base's folder says, where it is on this machine."""

    folder: Path | None
    """Folder of the base, or of its copy in the Hub's cache. None: it is not on this machine."""
    longest: int | None
    """Maximum number of tokens. None: not known."""
    template: str | None
    """Value for model.chat_template. None: not known."""


def look_at_model(base: str) -> ModelFolder:
    """Look at a folder, or at a Hub id in the cache. Raises SalsaError for an unusable folder."""
    folder = Path(os.path.abspath(base)) if os.path.isdir(base) else cached_folder(base)
    if folder is None:
        return ModelFolder(None, None, None)
    config = read_json(folder / "config.json")
    require(isinstance(config, dict), f"--model: {folder / 'config.json'} does not hold a JSON object")
    longest = longest_sequence(text_part(config))
    if has_template("--model", str(folder)):
        return ModelFolder(folder, longest, OWN_TEMPLATE)
    tokenizer = folder / "tokenizer.json"
    marks = tokenizer.is_file() and "<|im_start|>" in tokenizer.read_text(encoding="utf-8")
    return ModelFolder(folder, longest, "chatml" if marks else "zephyr")

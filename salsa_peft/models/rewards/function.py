"""A Python function as reward, with the signature of TRL's reward functions.

Two arguments of TRL 1.16 are not passed: `log_extra` and `environments`. `trainer_state` is passed by SalsaPPOTrainer only,
because rewards are also used without a trainer.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Set, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salsa_peft.config.rewards import COLUMNS_NOT_PASSED, find_module, split_function
from salsa_peft.models.responses import token_lists
from salsa_peft.models.rewards.base import Reward, Rows
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.models.responses import Responses

RESERVED = re.compile(
    r"(objective|policy|loss|val)/.*|rewards/.*/(mean|truncated)|update|episode|lr|seconds|tokens_per_second|epoch|step|loss|grad_norm|learning_rate"
    r"|score|response_length|empty_share"
)
"""Names of metrics that training logs itself; log_metric rejects them."""
LARGEST = torch.finfo(torch.float32).max
"""The largest score; scores are in float32."""
NOT_PASSED = {"trainer_state", "log_extra", "environments"}
"""Arguments of TRL's reward functions that are not passed, or only by a trainer."""


class FunctionReward(Reward):
    """A `function(prompts, completions, completion_ids, **columns) -> list[float | None]`, as in TRL 1.16.

    The function may be async. It gets by keyword those of the following arguments that its signature has:

    - prompts: as in the data, text or messages.
    - completions: text, or [{role: assistant, content}] if the prompt is messages. Special tokens are kept only with
      `special_tokens`.
    - completion_ids: lists of token ids, including the end token.
    - every other column of the data, by its name: a list of values.
    - log_metric(name, value): a function that logs a metric, averaged over its calls.
    - trainer_state: the trainer's state (global_step, max_steps …), in training.
    - finished (not in TRL): whether each response ended before the length limit.

    A score of None means that the reward does not apply to a response; only a part of a weighted sum may return None.
    """

    def __init__(
        self, function: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False
    ) -> None:
        self.function, self.tokenizer, self.special_tokens = function, tokenizer, special_tokens
        self.name = self.code = function_name(function)
        self.get_trainer_state: Callable[[], Any] | None = None
        """Returns the trainer's state; SalsaPPOTrainer sets it."""
        self._where = f"reward function {self.name}"
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        require(
            not positional,
            f"{self._where}: {', '.join(positional)} can be passed by position only, but reward functions are called by"
            " keyword; remove the / from the function's signature",
        )
        self.keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.needs = {p.name for p in parameters if p.name in self.takes and p.default is p.empty}

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """Return a score for each response, (B,) float32. Raises SalsaError if the function returned a None."""
        scores = self._call(responses, rows)
        missing = scores.count(None)
        require(
            not missing,
            f"{self._where}: it returned None for {missing} of {len(rows)} responses, which only a part of a weighted"
            " sum may do; return a number for each response",
        )
        return torch.tensor(scores, dtype=torch.float32, device=responses.response_ids.device)

    def scores_and_mask(self, responses: Responses, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return scores (B,), float32, and a mask (B,): 0 and False where the function returned None."""
        scores, device = self._call(responses, rows), responses.response_ids.device
        numbers = torch.tensor([score or 0.0 for score in scores], dtype=torch.float32, device=device)
        return numbers, torch.tensor([score is not None for score in scores], device=device)

    def _call(self, responses: Responses, rows: Rows) -> list[float | None]:
        """Call the function; returns its scores as numbers or None."""
        arguments = self._arguments(responses, rows)
        absent = sorted(self.needs - arguments.keys())
        columns = ", ".join(sorted({key for row in rows for key in row})) or "none"
        require(
            not set(absent) & NOT_PASSED,
            f"{self._where}: its argument {', '.join(absent)} is not passed here; give it the default None",
        )
        require(
            not absent,
            f"{self._where}: the data has no column for its argument {', '.join(absent)} (columns: {columns}); rename"
            " the argument, or give it a default",
        )
        taken = {name: value for name, value in arguments.items() if self.keywords or name in self.takes}
        try:
            scores = self.function(**taken)
            if inspect.iscoroutine(scores):  # in a new thread, because in a notebook this thread has an event loop
                with ThreadPoolExecutor(1) as pool:
                    scores = pool.submit(asyncio.run, scores).result()
        except Exception as error:
            messages = not all(isinstance(completion, str) for completion in arguments["completions"])
            form = "lists of one message, because the prompts are messages" if messages else "text"
            error.add_note(f"{self._where}: this was raised in the function, whose completions are {form}")
            raise
        is_list = isinstance(scores, Sized) and not isinstance(scores, str | bytes | Mapping | Set)
        require(is_list, f"{self._where}: it returned {scores!r:.80}; return a list of one score for each response")
        require(
            len(scores) == len(rows),
            f"{self._where}: it returned {len(scores)} scores for {len(rows)} responses; return one score for each"
            " response",
        )
        if isinstance(scores, Tensor):  # (B,) or (B, 1), copied to the CPU at once
            scores = scores.reshape(len(rows), -1).squeeze(-1).tolist()
        scores = list(scores)
        try:
            numbers = [None if score is None else _number(score) for score in scores]
        except (TypeError, ValueError, OverflowError) as error:
            raise SalsaError(f"{self._where}: it returned {scores!r:.80}; return numbers") from error
        for row, number in enumerate(numbers):
            require(
                number is None or abs(number) <= LARGEST,  # False for NaN
                f"{self._where}: it returned {number} for response {row + 1} of {len(rows)}"
                f" ({short(arguments['completions'][row])}, to {short(arguments['prompts'][row])}); return finite numbers,"
                f" at most {LARGEST:.1e}",
            )
        return numbers

    def _arguments(self, responses: Responses, rows: Rows) -> dict[str, Any]:
        """All arguments that a reward function can have in its signature."""
        kept = responses.response_mask if self.special_tokens else responses.content_mask
        texts = decode(self.tokenizer, responses.response_ids, kept, special_tokens=self.special_tokens)
        decoded = decode(self.tokenizer, responses.prompt_ids, responses.prompt_mask)
        prompts = [row.get("prompt", text) for row, text in zip(rows, decoded, strict=True)]
        columns = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS_NOT_PASSED)
        require(
            "finished" not in columns or not (self.keywords or "finished" in self.takes),
            f"{self._where}: the data's column `finished` has the name of an argument of reward functions (whether each"
            " response ended before the length limit); rename the column",
        )
        data = {**{key: [row.get(key) for row in rows] for key in columns}, "prompts": prompts}
        return {
            **copy.deepcopy(data),  # so that a function that changes its arguments does not change the data
            "finished": responses.finished.tolist(),
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ],
            "completion_ids": token_lists(responses.response_ids, responses.response_mask),
            "log_metric": self._log_metric,
            **({} if self.get_trainer_state is None else {"trainer_state": self.get_trainer_state()}),
        }

    def _log_metric(self, name: str, value: float) -> None:
        """Log a metric. Raises SalsaError for a reserved name, and for a value that is not a number."""
        where = f"{self._where}: log_metric"
        require(isinstance(name, str), f"{where}: the name {name!r:.60} is not a string")
        require(not RESERVED.fullmatch(name), f"{where}: training logs a metric {name!r}; use another name")
        try:
            self.add_metric(name, float(value), 1)
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{where}: the value {value!r:.60} of {name!r} is not a number") from error


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function, of the function in a functools.partial, or of a callable's class."""
    while isinstance(function, functools.partial):
        function = function.func
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return "lambda" if name == "<lambda>" else name


def _number(score: Any) -> float:
    if isinstance(score, str | bytes):  # float() would accept "1"
        raise TypeError(score)
    return float(score)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, *, special_tokens: bool = False) -> list[str]:
    """Decode the token ids (B, L) where the mask is True. special_tokens: whether to keep special tokens."""
    return list(tokenizer.batch_decode(token_lists(ids, mask), skip_special_tokens=not special_tokens))


def load_function(value: str) -> Callable[..., Any]:
    """Import the function `[FOLDER/]module:name`.

    Without FOLDER the module is looked up in the current folder and then on Python's path. Raises SalsaError if there
    is no such function, if the module cannot be imported, or if another module of this name is already imported.
    """
    folder, module, name = split_function(value)
    if folder is None and find_module(os.getcwd(), module) is not None:
        folder = os.getcwd()
    file = find_module(folder, module)
    if file is None:
        raise SalsaError(f"{value}: there is no module {module} in {folder or 'Python’s path'}; check its name")
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise SalsaError(f"{value}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    other = str(loaded.__file__)
    require(
        os.path.realpath(other) == os.path.realpath(file),
        f"{value}: another module {module} is already imported, from {other}; rename {file}",
    )
    found: Any = loaded
    for part in name.split("."):
        require(part in dir(found), f"{value}: {file} has no {part}; check the function's name")
        found = getattr(found, part)
    require(callable(found), f"{value}: {name} in {file} is of type {type(found).__name__}, not a function")
    return found

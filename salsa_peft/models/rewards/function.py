"""A Python function as reward, with TRL's reward-function signature; and the text of responses.

Left out of what TRL 1.16 passes: `trainer_state` and `log_extra` (rewards also score where no trainer is), `environments`.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salsa_peft.config.rewards import COLUMNS_NOT_PASSED, find_module, split_function
from salsa_peft.models.rewards.base import Reward, Rows, Tally
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.models.responses import Responses

TAKEN = re.compile(
    r"(objective|policy|loss|val)/.*|rewards/.*/(mean|truncated)|update|episode|lr|seconds|epoch|step|loss|grad_norm|learning_rate"
    r"|score|response_length|empty_share"
)
"""Names of the engine's and Trainer's own figures, which log_metric may not have."""


class FunctionReward(Reward):
    """`function(prompts, completions, completion_ids, **columns) -> list[float | None]`, called by keyword with what it takes.

    As TRL (1.16) calls it: prompts as the data has them, so where they are messages a completion is [{role: assistant, content}];
    text else. completion_ids: lists of token ids, EOS among them. Every other column of the data: a list. `log_metric(name,
    value)`: a figure for the logs, averaged. Ours: `finished`, whether a token ended each response, not the limit. Special tokens are left out of
    completions, unless `special_tokens` keeps them. An async function is awaited. None: the reward does not apply to the
    response, which only a weighted sum allows.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        special_tokens: bool = False,
    ) -> None:
        self.function, self.tokenizer, self.special_tokens = function, tokenizer, special_tokens
        self.name = str(getattr(function, "__name__", type(function).__name__))
        taken = {
            name: p for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_POSITIONAL
        }
        by_place = [name for name, p in taken.items() if p.kind is p.POSITIONAL_ONLY]
        require(
            not by_place,
            f"reward function {self.name}: it takes {', '.join(by_place)} by position only, expected keywords; take the / out",
        )
        self.keywords = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        self.takes = {name for name, p in taken.items() if p.kind is not p.VAR_KEYWORD}
        self.needs = {name for name in self.takes if taken[name].default is inspect.Parameter.empty}
        self.tally = Tally()

    def __call__(self, responses: Responses, rows: Rows) -> Tensor:
        """→ (B,), float32. Raises SalsaError where the function gives None: it must apply to every response."""
        scores, applies = self.scores_and_mask(responses, rows)
        missing = (~applies).nonzero().flatten().tolist()
        require(
            not missing,
            f"reward function {self.name}: found None for {len(missing)} of {len(rows)} responses, expected a number for each:"
            " only a part of a weighted sum may leave some out",
        )
        return scores

    def scores_and_mask(self, responses: Responses, rows: Rows) -> tuple[Tensor, Tensor]:
        """→ scores (B,), float32, 0 where it does not apply, and where it applies (B,), bool."""
        given = self._given(responses, rows)
        absent = sorted(self.needs - given.keys())
        columns = ", ".join(sorted({key for row in rows for key in row})) or "none"
        require(
            not absent,
            f"reward function {self.name}: it takes {', '.join(absent)}, found the columns {columns} in the data, expected one of"
            " that name, or a default",
        )
        scores = self.function(**{name: value for name, value in given.items() if self.keywords or name in self.takes})
        if inspect.iscoroutine(scores):  # in a thread, since a notebook's own loop runs in this one
            with ThreadPoolExecutor(1) as pool:
                scores = pool.submit(asyncio.run, scores).result()
        found = f"reward function {self.name}: found"
        require(
            not isinstance(scores, str | bytes | Mapping | Set),
            f"{found} a {type(scores).__name__}, expected a list of one score for each response",
        )
        require(hasattr(scores, "__len__"), f"{found} {scores!r:.80}, expected a list of one score for each response")
        require(len(scores) == len(rows), f"{found} {len(scores)} scores for {len(rows)} responses, expected one each")
        device, scores = responses.response_ids.device, list(scores)
        applies = torch.tensor([score is not None for score in scores], device=device)
        require(
            not any(isinstance(score, str | bytes) for score in scores), f"{found} {scores!r:.80}, expected numbers"
        )
        try:
            numbers = [0.0 if score is None else float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{found} {scores!r:.80}, expected numbers") from error
        return torch.tensor(numbers, dtype=torch.float32, device=device), applies

    @property
    def code(self) -> str:
        """The function's name."""
        return self.name

    def take_figures(self) -> dict[str, tuple[float, int]]:
        """What the function gave to log_metric."""
        return self.tally.take()

    def _given(self, responses: Responses, rows: Rows) -> dict[str, Any]:
        kept = responses.response_mask if self.special_tokens else responses.content_mask
        texts = decode(self.tokenizer, responses.response_ids, kept, special_tokens=self.special_tokens)
        prompts = row_prompts(self.tokenizer, responses, rows)
        ids = [row[mask].tolist() for row, mask in zip(responses.response_ids, responses.response_mask, strict=True)]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS_NOT_PASSED)
        require(
            "finished" not in columns or not (self.keywords or "finished" in self.takes),
            f"reward function {self.name}: found a column `finished` in the data, which is what PPO calls whether EOS ended a"
            " response; rename the column",
        )
        data = {**{key: [row.get(key) for row in rows] for key in columns}, "prompts": prompts}
        return {
            **copy.deepcopy(data),  # the function's own: what it changes in them, the data's rows must not see
            "finished": responses.finished.tolist(),
            "completions": completions,
            "completion_ids": ids,
            "log_metric": self._log_metric,
        }

    def _log_metric(self, name: str, value: float) -> None:
        """What a function gets as `log_metric`. Raises SalsaError for a name that the engine's own figures have, and for no number."""
        found = f"reward function {self.name}: log_metric: found"
        require(isinstance(name, str), f"{found} the name {name!r:.60}, expected text")
        require(not TAKEN.fullmatch(name), f"{found} the name {name!r}, which is the engine's own, expected another")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise SalsaError(f"{found} {value!r:.60} for {name!r}, expected a number") from error
        self.tally.add(name, number, 1)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, *, special_tokens: bool = False) -> list[str]:
    """Token ids (B, L) where the mask is True → text, special tokens left out or kept."""
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens))


def row_prompts(tokenizer: PreTrainedTokenizerBase, responses: Responses, rows: Rows) -> list[Any]:
    """The rows' prompts, text or messages; decoded where a row has `input_ids` alone."""
    if all("prompt" in row for row in rows):
        return [row["prompt"] for row in rows]
    texts = decode(tokenizer, responses.prompt_ids, responses.prompt_mask)
    return [row.get("prompt", text) for row, text in zip(rows, texts, strict=True)]


def load_function(value: str) -> Callable[..., Any]:
    """[FOLDER/]module:name → the function; a bare module is looked for in the current folder, then on Python's path.

    Raises SalsaError where there is none of that name, it can't be imported, or another module has its name.
    """
    folder, module, name = split_function(value)
    if folder is None and find_module(os.getcwd(), module) is not None:
        folder = os.getcwd()
    file = find_module(folder, module)
    if file is None:
        raise SalsaError(f"{value}: found no module {module} in {folder or 'Python’s path'}, expected one")
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise SalsaError(f"{value}: {file} can't be imported: {type(error).__name__}: {error}") from error
    there = str(loaded.__file__)
    require(
        os.path.realpath(there) == os.path.realpath(file),
        f"{value}: found a module {module} from {there} already, expected {file}; give it another name",
    )
    found: Any = loaded
    for part in name.split("."):
        require(part in dir(found), f"{value}: found no {part} in {file}, expected a function of that name")
        found = getattr(found, part)
    require(callable(found), f"{value}: found {type(found).__name__} in {file}, expected a function")
    return found

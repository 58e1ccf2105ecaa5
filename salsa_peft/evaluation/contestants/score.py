"""Scores of answers by a reward, for a judge of kind reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import nn
from transformers import ByT5Tokenizer
from transformers.utils.logging import disable_progress_bar

from salsa_peft.config.rewards import FUNCTION, check_classifier_folder, check_function, function_with_folder
from salsa_peft.config.schema import Model
from salsa_peft.data.chat.turn_ends import stop_token_ids
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.data.questions import Question
from salsa_peft.evaluation.contestants.find import WITHOUT_WEIGHTS, base_of_adapter
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import device, load_base
from salsa_peft.models.responses import pad_responses
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.reward import as_reward
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import HUB_ID, local_folder

BATCH = 16
"""Number of answers that the reward gets at once."""
FIRST_BYTE, END = 3, 1
"""ByT5's token of the byte 0, and the token that ends a text."""


class AnswerScorer:
    """A reward that scores answers: a function, or a classifier or reward adapter (folder or Hub id).

    Its weights are loaded by the first call. A function gets the texts; as completion_ids it gets their bytes. base: the
    base of a reward adapter; None: the one that the adapter names. Raises SalsaError for a reward that is missing.
    """

    def __init__(self, reward: str, base: str | None) -> None:
        self.reward, self.adapter_base = function_with_folder(reward, os.getcwd()), None
        self.is_function = not os.path.isdir(reward) and FUNCTION.match(reward) is not None
        if self.is_function:
            check_function("--reward", self.reward)
            return
        require(
            os.path.isdir(reward) or ("/" in reward and HUB_ID.match(reward) is not None),
            f"--reward: there is no folder {reward}; give a classifier or reward adapter (folder or Hub id), or"
            " module:name",
        )
        folder = local_folder(reward, patterns=WITHOUT_WEIGHTS)
        if (folder / lora.CONFIG).is_file():
            self.adapter_base = base_of_adapter(folder, reward, base)
        else:
            check_classifier_folder("--reward", str(folder))

    def __call__(
        self, questions: Sequence[Question], answers: Sequence[Sequence[str]], progress: Callable[[int], None]
    ) -> list[list[float]]:
        """The scores of the answers to each turn of each question."""
        tokenizer, reward = self._loaded
        turns = [(index, turn) for index, one in enumerate(questions) for turn in range(len(one.turns))]
        found: list[list[float]] = [[] for _ in questions]
        for start in range(0, len(turns), BATCH):
            part = turns[start : start + BATCH]
            rows = [
                {**questions[index].row, "prompt": questions[index].conversation(list(answers[index][:turn]))}
                for index, turn in part
            ]
            texts = [answers[index][turn] for index, turn in part]
            for (index, _), score in zip(part, self._scores(rows, texts, tokenizer, reward), strict=True):
                found[index].append(score)
            progress(len(part))
        return found

    @cached_property
    def _loaded(self) -> tuple[Any, Reward]:
        """The tokenizer with which texts are encoded, and the reward."""
        disable_progress_bar()  # Transformers' bar for loading weights; the command shows its own
        if self.is_function:
            tokenizer: Any = ByT5Tokenizer()  # of bytes: every text is decoded as it was
            return tokenizer, as_reward(self.reward, nn.Identity(), tokenizer)
        if self.adapter_base is None:
            tokenizer = load_tokenizer(str(local_folder(self.reward)))
            return tokenizer, as_reward(self.reward, nn.Identity(), tokenizer)
        name, revision, _ = self.adapter_base
        base, adapter = local_folder(name, revision=revision), lora.adapter_folder(self.reward)
        own = (adapter / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(str(adapter if own else base))
        model = load_base(str(base), Model(), tokenizer)
        model.name_or_path = name
        return tokenizer, as_reward(self.reward, lora.attach(model, adapter, "start"), tokenizer)

    def _scores(
        self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], tokenizer: Any, reward: Reward
    ) -> list[float]:
        """One score for each text."""
        if self.is_function:
            prompts, end = [[END] for _ in rows], END
            responses = [[byte + FIRST_BYTE for byte in text.encode()] for text in texts]
        else:
            prompts, end = [prompt_tokens(dict(row), tokenizer) for row in rows], stop_token_ids(tokenizer)[0]
            responses = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        ended = [[*response, end] for response in responses]
        made = pad_responses(prompts, ended, int(tokenizer.pad_token_id), (end,), device())
        return [float(score) for score in reward(made, rows).tolist()]

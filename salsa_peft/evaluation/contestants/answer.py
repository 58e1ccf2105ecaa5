"""Answers of the models and adapters that `salsa judge` compares, kept in files batch by batch.

A file's name has a hash of everything that its answers depend on, so that a stopped command goes on where it stopped,
and another question, weight or setting gets a file of its own.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.logging import disable_progress_bar

from salsa_peft.config.schema import Adapter, Evaluate, Generation, Model, Recipe
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.data.questions import Question
from salsa_peft.evaluation.answers import Rows, answer
from salsa_peft.evaluation.contestants.find import Contestant
from salsa_peft.evaluation.evaluate import read_partial
from salsa_peft.evaluation.fastchat import file_stem
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.architectures.checks import POSITIONS, check, text_part
from salsa_peft.models.stage_context import StageContext
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.soup.options import check_family
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import append_checked_lines, read_json
from salsa_peft.utils.fingerprints import canonical_json, fingerprint, read_fingerprint, sha256, tokenizer_files
from salsa_peft.utils.hub import local_folder
from salsa_peft.utils.manifests import versions

OTHERWISE = 0.7
"""Temperature of questions without a category of MT-Bench's (FastChat's default)."""
MAX_NEW_TOKENS = 1024
NO_MAXIMUM = 1_000_000
"""Maximum number of tokens of a model whose configuration sets none."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the models answer."""

    max_new_tokens: int | None = None
    """Maximum number of tokens of an answer. None: 1024 (FastChat's default), or half of what the model reads if that
    is less."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy. None: FastChat's for MT-Bench's categories, and 0.7 for other questions."""
    batch_size: int = 16
    """Number of questions that are answered at once."""
    seed: int = 0
    chat_template: str | None = None
    """Path of a Jinja file. None: the template of each model's own tokenizer."""
    quantization: Literal["nf4", "nf4-double"] | None = None
    """4-bit quantisation of the models, as in QLoRA."""


class AnsweringModel:
    """A model or adapter and the settings with which it answers; its weights are loaded to answer and freed after.

    Raises SalsaError before that for a missing chat template, a base that is not the adapter's, and settings that leave
    no room for a prompt.
    """

    def __init__(self, contestant: Contestant, settings: AnswerSettings) -> None:
        self.contestant, self.settings = contestant, settings
        folder, adapter = Path(str(contestant.folder)), contestant.adapter
        config = text_part(read_json(folder / "config.json"))
        positions = (config.get(key) for key in POSITIONS)
        longest = next((value for value in positions if isinstance(value, int) and value > 0), NO_MAXIMUM)
        self.new_tokens = settings.max_new_tokens or min(MAX_NEW_TOKENS, longest // 2)
        require(
            self.new_tokens < longest,
            f"--max-new-tokens: {self.new_tokens} leaves no room for a question, since {contestant.name} reads at"
            f" most {longest} tokens; set less",
        )
        heat: Any = "category" if settings.temperature is None else settings.temperature
        recipe = Recipe(
            name="judge",
            model=Model(base=str(folder), max_length=longest, quantization=settings.quantization),
            adapter=None if adapter is None else Adapter(),
            generation=Generation(
                max_new_tokens=self.new_tokens, temperature=OTHERWISE, batch_size=settings.batch_size
            ),
            evaluate=Evaluate(temperature=heat, seed=settings.seed),
        )
        check(recipe)
        own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
        self.tokenizer_folder = Path(str(adapter)) if own else folder
        tokenizer = load_tokenizer(str(self.tokenizer_folder), settings.chat_template)
        require(
            tokenizer.chat_template is not None,
            f"--chat-template: {contestant.given} has no chat template; give chatml, zephyr, plain or a Jinja file",
        )
        self.context = StageContext(recipe, folder, contestant.model, tokenizer, "judge")
        if adapter is not None:
            check_family([adapter], folder, False)
            lora.attach(self.context.empty_model(), adapter, "check")  # compares names and shapes

    def too_long(self, questions: Sequence[Question]) -> set[int]:
        """Indices of the questions that leave no room for a full answer."""
        longest = self.context.recipe.model.max_length - self.new_tokens
        rows = ({**one.row, "prompt": one.messages} for one in questions)
        return {index for index, row in enumerate(rows) if len(prompt_tokens(row, self.context.tokenizer)) > longest}

    def answer(self, questions: Sequence[Question], folder: Path, progress: Callable[[int], None]) -> Rows:
        """The rows of all answers, one for each turn. Existing answers in `folder` are used, new ones are added to it.

        progress: called with the number of turns just answered.
        """
        one, context = self.contestant, self.context
        weights = local_folder(one.model, revision=one.revision)  # downloads a Hub model's weights
        if one.adapter is not None and read_fingerprint(one.adapter) is not None:
            bases.require_same_base(one.adapter, bases.fingerprints_of(str(weights)), one.model)
        path = folder / f"{file_stem(one.name)}-{self._key(weights, questions)}.jsonl"
        known = read_partial(path)
        progress(len(known))
        if len(known) == sum(len(question.turns) for question in questions):
            return [known[place] for place in sorted(known)]

        def keep(rows: Rows) -> None:
            append_checked_lines(path, rows)
            progress(len(rows))

        disable_progress_bar()  # Transformers' bar for loading weights; the command shows its own
        model: Any = context.load_base()
        name = None
        if one.adapter is not None:
            name = "answering"
            model = lora.attach(model, one.adapter, name)
        rows = answer(model, name, questions, {}, context, self.settings.seed, known, keep)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        return rows

    def _key(self, weights: Path, questions: Sequence[Question]) -> str:
        """Hash of everything that the answers depend on."""
        one, settings = self.contestant, {**asdict(self.settings), "max_new_tokens": self.new_tokens}
        files = [*tokenizer_files(self.tokenizer_folder)]
        if self.settings.chat_template is not None:
            settings["chat_template"] = sha256(self.settings.chat_template)
        parts = {
            "model": fingerprint(weights),
            "adapter": None if one.adapter is None else fingerprint(one.adapter),
            "tokenizer": [[file.name, sha256(file)] for file in files],
            "settings": settings,
            "questions": [
                [question.category, question.messages, question.turns, question.row] for question in questions
            ],
            "libraries": versions(("torch", "transformers", "peft")),
        }
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:12]

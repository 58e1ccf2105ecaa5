"""Loading the tokenizer of a base, and comparing it with the one that other weights were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from salsa_peft.config.schema import OWN_TEMPLATE
from salsa_peft.data.chat import templates, turn_ends
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import readable_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARED_TOKENIZERS: WeakSet[Any] = WeakSet()
"""Tokenizers that load_tokenizer has returned. SalsaPPOTrainer does not repeat what was printed about them at the start
of a run."""


def load_tokenizer(
    base: str, chat_template: str | None = None, report_as: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer and prepare it and its chat template for training (data/chat/templates.py).

    Its padding token becomes one that no template writes and that does not end a response. chat_template: a Jinja file
    to use instead of the tokenizer's own template. report_as: the base's name; if given, changes and unusual properties
    are printed under it. Raises SalsaError for a tokenizer without an EOS token.
    """
    with readable_hub_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    require(
        tokenizer.eos_token is not None,
        f"{base}: its tokenizer has no eos_token, which ends a response; set one in tokenizer_config.json",
    )
    if chat_template not in (None, OWN_TEMPLATE):
        tokenizer.chat_template = Path(str(chat_template)).read_text(encoding="utf-8")
    changes = templates.prepare_template(tokenizer)
    ends = turn_ends.stop_token_ids(tokenizer, _generation_config(base))
    tokenizer.pad_token = turn_ends.padding_token(tokenizer, ends)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    PREPARED_TOKENIZERS.add(tokenizer)
    for line in [*changes, *turn_ends.tokenizer_notes(tokenizer, ends)] if report_as is not None else []:
        say(f"{report_as}: {line}")
    return tokenizer


def _generation_config(base: str) -> GenerationConfig | None:
    """The generation settings of generation_config.json, else of config.json; None if both are missing."""
    for name in ("generation_config.json", "config.json"):
        with readable_hub_errors(base):
            file = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return GenerationConfig.from_pretrained(Path(file).parent, name)
    return None


def compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> bool:
    """Compare the tokenizer saved beside weights with `tokenizer`, that of the model named `base`.

    Prints a line and returns True if the chat templates differ. Raises SalsaError if a token has another id in the
    saved tokenizer.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return False
    with readable_hub_errors(str(folder)):
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # the same changes of BOS and date as in `tokenizer`, or the templates would differ by them
    templates.prepare_template(own)
    used, saved = tokenizer.get_vocab(), own.get_vocab()
    moved = next((token for token, number in saved.items() if used.get(token, number) != number), None)
    require(
        moved is None,
        f"{folder}: its tokenizer gives {moved!r} the id {saved.get(str(moved))}, and that of {base} gives it"
        f" {used.get(str(moved))}, so that the ids these weights were trained on mean other text here; use the base"
        " and tokenizer that they were trained with",
    )
    differs = own.chat_template is not None and _rendered(own) != _rendered(tokenizer)
    if differs:
        say(
            f"{folder}: its tokenizer has another chat template than the one used here; if these weights were trained"
            " with it, use it too (model.chat_template)"
        )
    return differs


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short chat rendered by a tokenizer's template, or the template itself if it rejects the chat."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError):
        return str(tokenizer.chat_template)

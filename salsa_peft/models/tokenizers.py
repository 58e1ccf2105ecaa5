"""Loading the tokenizer of a base, and comparing it with the tokenizers saved beside other weights."""

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
"""Tokenizers that load_tokenizer has returned. SalsaPPOTrainer prints no notes about these tokenizers, because the run
printed the notes at its start."""


def load_tokenizer(
    base: str, chat_template: str | None = None, report_as: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer and prepare it and its chat template for training (data/chat/templates.py).

    The padding token is set to a token that no template writes and that does not end a response. chat_template: a Jinja
    file to use instead of the tokenizer's own template. report_as: the base's name; if given, changes and unusual
    properties of the tokenizer are printed after this name. Raises SalsaError if the tokenizer has no EOS token.
    """
    with readable_hub_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    require(
        tokenizer.eos_token is not None,
        f"{base}: the tokenizer has no eos_token, which is needed to end responses; set eos_token in"
        " tokenizer_config.json",
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
    """Generation settings in generation_config.json or, without it, in config.json; None without both."""
    for name in ("generation_config.json", "config.json"):
        with readable_hub_errors(base):
            file = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return GenerationConfig.from_pretrained(Path(file).parent, name)
    return None


def compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> bool:
    """Compare the tokenizer saved in `folder` beside weights with `tokenizer`, the tokenizer of `base`.

    Prints a line and returns True if the two chat templates differ. Returns False if they agree or if no tokenizer is
    saved in `folder`. Raises SalsaError if a token has different ids in the two tokenizers.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return False
    with readable_hub_errors(str(folder)):
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # changes BOS and date in this template as in the template of `tokenizer`, so that these do not differ
    templates.prepare_template(own)
    used, saved = tokenizer.get_vocab(), own.get_vocab()
    moved = next((token for token, number in saved.items() if used.get(token, number) != number), None)
    require(
        moved is None,
        f"{folder}: the token {moved!r} has the id {saved.get(str(moved))} in this folder's tokenizer, but"
        f" {used.get(str(moved))} in the tokenizer of {base}, so the weights would read other text than they were"
        " trained on; use the base and the tokenizer that these weights were trained with",
    )
    differs = own.chat_template is not None and _rendered(own) != _rendered(tokenizer)
    if differs:
        say(
            f"{folder}: the chat template of this folder's tokenizer differs from the template used in this run; if"
            " these weights were trained with the folder's template, set model.chat_template to it"
        )
    return differs


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short chat rendered by a tokenizer's template, or the template itself if rendering fails."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError):
        return str(tokenizer.chat_template)

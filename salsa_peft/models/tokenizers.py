"""Loading the tokenizer of a base, and comparing it with the one that other weights were trained with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from salsa_peft.config.schema import OWN_TEMPLATE
from salsa_peft.data.chat import templates, turn_ends
from salsa_peft.utils.errors import require
from salsa_peft.utils.hub import readable_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARED_TOKENIZERS: WeakSet[Any] = WeakSet()
"""Tokenizers of a recipe: what is odd in them is said when its run begins, not by every trainer."""


def load_tokenizer(
    base: str, revision: str | None = None, chat_template: str | None = None, say: str | None = None
) -> PreTrainedTokenizerBase:
    """The base's tokenizer with its own chat template, or that of the file `chat_template`, made ready for training (data/chat/templates.py),
    and with a padding token that no template writes and that ends no response.

    say: the base's name; what is odd in its tokenizer and template is printed under it. Raises SalsaError for a tokenizer without EOS.
    """
    with readable_hub_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
    require(
        tokenizer.eos_token is not None, f"{base}: its tokenizer has no eos_token, expected one to end a response with"
    )
    if chat_template not in (None, OWN_TEMPLATE):
        tokenizer.chat_template = Path(str(chat_template)).read_text(encoding="utf-8")
    changes = templates.prepare_template(tokenizer)
    ends = turn_ends.stop_token_ids(tokenizer, _generation_config(base, revision))
    tokenizer.pad_token = turn_ends.padding_token(tokenizer, ends)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    PREPARED_TOKENIZERS.add(tokenizer)
    for line in [*changes, *turn_ends.tokenizer_notes(tokenizer, ends)] if say is not None else []:
        print(f"{say}: {line}", file=sys.stderr, flush=True)
    return tokenizer


def _generation_config(base: str, revision: str | None) -> GenerationConfig | None:
    """What a folder's generation_config.json says, or without one its config.json; None where there is neither (an adapter's folder)."""
    for name in ("generation_config.json", "config.json"):
        with readable_hub_errors(base):
            file = cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                return GenerationConfig.from_pretrained(Path(file).parent, name)
    return None


def compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> bool:
    """Say where the tokenizer beside weights has another chat template than `tokenizer`, the one that is used; → whether it was said.

    Raises SalsaError where a token has another id there. base: what people call the model that `tokenizer` belongs to.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return False
    with readable_hub_errors(str(folder)):
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    templates.prepare_template(own)  # as the run's own, or its mended BOS and date would be another template
    known, found = tokenizer.get_vocab(), own.get_vocab()
    odd = next((token for token, number in found.items() if known.get(token, number) != number), None)
    require(
        odd is None,
        f"{folder}: its tokenizer has {odd!r} at {found.get(str(odd))}, the one of {base} at {known.get(str(odd))}: the ids that these weights"
        " were trained on mean other text here; use the base and tokenizer that they were trained with",
    )
    differs = own.chat_template is not None and _rendered(own) != _rendered(tokenizer)
    if differs:
        told = (
            f"{folder}: its tokenizer has another chat template than the one used here; if these weights were trained with it, use it too"
            " (model.chat_template)"
        )
        print(told, file=sys.stderr, flush=True)
    return differs


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short chat through a tokenizer's template, or the template where it refuses that chat: two templates are one if these are equal."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError):
        return str(tokenizer.chat_template)

"""The tokens that end a response, and the padding token.

Many templates end a turn with a token other than the tokenizer's EOS (Llama 3's <|eot_id|>, Phi-3's <|end|>, Gemma's
<end_of_turn>). Rendering a turn shows this token. A generation_config may name further tokens.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from salsa_peft.data.chat.templates import (
    ANSWER,
    CHAT,
    cached_per_tokenizer,
    common_prefix_length,
    default_prefix,
    render,
    template_lacks_bos,
    templates_by_name,
)
from salsa_peft.utils.messages import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AssistantTurn(NamedTuple):
    """How the chat template opens and closes a last assistant turn."""

    end: int | None
    """Token that ends the turn. None: there is no template, or it writes no such token (LLaVA)."""
    after: tuple[int, ...]
    """Tokens that the template writes after `end`: Qwen's newline, Phi-3's <|endoftext|>. Reward models score them."""
    opening: str
    """Text of the generation prompt: Qwen's <|im_start|>assistant and a newline."""


@cached_per_tokenizer
def assistant_turn(tokenizer: PreTrainedTokenizerBase) -> AssistantTurn:
    """The form of an assistant turn, found by rendering a conversation."""
    nothing = AssistantTurn(None, (), "")
    if tokenizer.chat_template is None:
        return nothing
    try:
        text = render(CHAT, tokenizer)
        alone, asking = (render(CHAT[:1], tokenizer, add_generation_prompt=flag) for flag in (False, True))
    except (TemplateError, TypeError):
        return nothing
    opening = asking[common_prefix_length(alone, asking) :]
    _, answer, closing = text.rpartition(ANSWER)
    # the closing text is not tokenized alone, because some tokenizers add a blank at the start of a text
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]  # type: ignore[union-attr, arg-type]
    known = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    special = [token for token in tokenizer(closing, add_special_tokens=False)["input_ids"] if token in known]  # type: ignore[union-attr]
    if not answer or not special:
        return AssistantTurn(None, (), opening)
    written = tokenizer.convert_ids_to_tokens(special[0])
    if closing.partition(str(written))[0].strip():  # the turn ends with text, and this token has another purpose
        return AssistantTurn(None, (), opening)
    place = len(ids)
    for token in reversed(special):  # the end of `ids` is these tokens, perhaps with others between them
        place -= 1 + ids[:place][::-1].index(token)
    return AssistantTurn(ids[place], tuple(ids[place + 1 :]), opening)


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any = None, rows: int | None = None
) -> tuple[int, ...]:
    """Ids of the tokens that end a response: the template's end of turn, EOS, and generation_config's.

    rows: number of output embeddings. Ids without a token or without an embedding are left out, since they cannot be
    sampled.
    """
    configured = None if generation_config is None else generation_config.eos_token_id
    found = [
        assistant_turn(tokenizer).end,
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list | tuple) else [configured]),
    ]
    ids = [int(token) for token in found if token is not None and token >= 0]
    return tuple(
        token
        for token in dict.fromkeys(ids)
        if tokenizer.convert_ids_to_tokens(token) is not None and (rows is None or token < rows)
    )


def model_stop_token_ids(tokenizer: PreTrainedTokenizerBase, lm: Any) -> tuple[int, ...]:
    """stop_token_ids for a Transformers causal language model."""
    return stop_token_ids(tokenizer, lm.generation_config, lm.config.get_text_config(decoder=True).vocab_size)


def tokenizer_notes(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> list[str]:
    """Notes for the log about a tokenizer and its template. ends: the ids of stop_token_ids."""
    named = zip(ends, tokenizer.convert_ids_to_tokens(list(ends)), strict=True)
    ended = ", ".join(f"{token} ({number})" for number, token in named)
    prefix, templates = default_prefix(tokenizer), templates_by_name(tokenizer.chat_template).values()
    notes = (
        (ends != (tokenizer.eos_token_id,), f"a response ends at any of {ended}"),
        (
            bool(prefix),
            f"its chat template starts conversations without a system turn with this text: {one_line(prefix)[:120]!r}",
        ),
        (
            any("strftime_now(" in template for template in templates),
            "its chat template writes today's date, so prompts change every day and the run cannot be resumed tomorrow;"
            " write a fixed date into the template",
        ),
        (
            template_lacks_bos(tokenizer),
            f"its tokenizer adds {tokenizer.bos_token} to texts, but its chat template writes none; if the model was"
            " trained with it in chats, put {{ bos_token }} at the start of the template",
        ),
        (
            bool(templates) and assistant_turn(tokenizer).end is None,
            "its chat template writes no end-of-turn token, so SFT teaches none, and responses may reach the maximum"
            " length",
        ),
    )
    return [note for holds, note in notes if holds]


def padding_token(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> str:
    """A padding token that no template writes and that is not in `stop_ids`.

    Candidates, in this order: the tokenizer's own, one with "pad" in its name, a reserved one, unk, other special
    tokens, and last the EOS (GPT-2 has no other). EOS is safe: this package never finds a sequence's end by its
    padding, and the reward stage sets up Transformers' classifiers accordingly.
    """
    used = {*stop_ids, *_written(tokenizer)}
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = [token.content for _, token in sorted(added.items()) if token.special]
    named = sorted(token for token in vocabulary if "pad" in token.lower() and token[0] in "<[")
    reserved = [token for token in special if "reserved" in token.lower() or "unused" in token.lower()]
    for token in [tokenizer.pad_token, *named, *reserved, tokenizer.unk_token, *special]:
        if token is not None and vocabulary.get(str(token)) not in {None, *used}:
            return str(token)
    return str(tokenizer.eos_token)


def _written(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the BOS and of the special tokens that the template may write."""
    texts = [*templates_by_name(tokenizer.chat_template).values()]
    with contextlib.suppress(TemplateError, TypeError):
        texts += [render(CHAT, tokenizer)] if texts else []
    named = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if any(token.content in text for text in texts)
    }
    return named | ({tokenizer.bos_token_id} - {None})

"""The tokens that end a response, and the token that pads.

A turn is rendered by the chat template and looked at: many templates end a turn with another token than the tokenizer's EOS (Llama 3's
<|eot_id|>, Phi-3's <|end|>, Gemma's <end_of_turn>), and a generation_config may name several.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from salsa_peft.data.chat.templates import (
    ANSWER,
    USER,
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


CHAT = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]


class AssistantTurn(NamedTuple):
    """How the chat template opens and closes an assistant's turn that is the last."""

    end: int | None
    """The token that ends it; None: there is no template, or it writes none (LLaVA)."""
    after: tuple[int, ...]
    """What it writes behind that: Qwen's newline, Phi-3's <|endoftext|>. A reward model that TRL trained read it too."""
    opening: str
    """The end of the text that asks for an answer: Qwen's <|im_start|>assistant and a newline."""


@cached_per_tokenizer
def assistant_turn(tokenizer: PreTrainedTokenizerBase) -> AssistantTurn:
    """By a conversation that the template renders."""
    nothing = AssistantTurn(None, (), "")
    if tokenizer.chat_template is None:
        return nothing
    try:
        text = render(CHAT, tokenizer)
        alone, asking = (render(CHAT[:1], tokenizer, add_generation_prompt=flag) for flag in (False, True))
    except TemplateError:
        return nothing
    opening = asking[common_prefix_length(alone, asking) :]
    _, answer, closing = text.rpartition(ANSWER)
    # the closing text alone would do, but some tokenizers put a blank before whatever a text begins with
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]  # type: ignore[union-attr, arg-type]
    known = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    special = [token for token in tokenizer(closing, add_special_tokens=False)["input_ids"] if token in known]  # type: ignore[union-attr]
    if not answer or not special:
        return AssistantTurn(None, (), opening)
    written = tokenizer.convert_ids_to_tokens(special[0])
    if closing.partition(str(written))[0].strip():  # a text ends the turn, and the token is something else
        return AssistantTurn(None, (), opening)
    place = _closing_place(ids, special)
    return AssistantTurn(ids[place], tuple(ids[place + 1 :]), opening)


def _closing_place(ids: list[int], special: list[int]) -> int:
    """Where the first of the last special tokens stands."""
    place = len(ids)
    for token in reversed(special):
        place = len(ids[:place]) - 1 - ids[:place][::-1].index(token)
    return place


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any = None, rows: int | None = None
) -> tuple[int, ...]:
    """The ids that end a response: the template's end of a turn first, the tokenizer's EOS, those that a generation_config names.

    rows: of the output embeddings. An id that is none of the tokenizer's tokens, or has no row, is left out: it can't be sampled.
    """
    said = None if generation_config is None else generation_config.eos_token_id
    found = [
        assistant_turn(tokenizer).end,
        tokenizer.eos_token_id,
        *(said if isinstance(said, list | tuple) else [said]),
    ]
    ids = [int(token) for token in found if token is not None and token >= 0]
    return tuple(
        token
        for token in dict.fromkeys(ids)
        if tokenizer.convert_ids_to_tokens(token) is not None and (rows is None or token < rows)
    )


def model_stop_token_ids(tokenizer: PreTrainedTokenizerBase, lm: Any) -> tuple[int, ...]:
    """The same for a Transformers causal language model, whose generation_config says which others there are."""
    return stop_token_ids(tokenizer, lm.generation_config, lm.config.get_text_config(decoder=True).vocab_size)


def tokenizer_notes(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> list[str]:
    """What is worth telling about a tokenizer, its template and the `ends` of a response, a line each."""
    lines = []
    if ends != (tokenizer.eos_token_id,):
        named = ", ".join(
            f"{token} ({number})"
            for number, token in zip(ends, tokenizer.convert_ids_to_tokens(list(ends)), strict=True)
        )
        lines.append(f"a response ends with any of {named}")
    if tokenizer.chat_template is None:
        return lines
    if text := default_prefix(tokenizer):
        lines.append(
            f"its chat template puts a text before every conversation that brings no system turn: {one_line(text)[:120]!r}"
        )
    if any("strftime_now(" in template for template in templates_by_name(tokenizer.chat_template).values()):
        lines.append("its chat template writes today's date, so that prompts are others tomorrow and a run can't be resumed then;"
                     " write a fixed date into the template")  # fmt: skip
    if template_lacks_bos(tokenizer):
        lines.append(f"its tokenizer begins texts with {tokenizer.bos_token}, and its chat template writes none, so that chats go without;"
                     " put {{ bos_token }} at the template's start where the model was trained with it")  # fmt: skip
    if assistant_turn(tokenizer).end is None:
        lines.append(
            "its chat template writes no token that ends an assistant's turn: SFT teaches none, and responses may run to the limit"
        )
    return lines


def padding_token(tokenizer: PreTrainedTokenizerBase, taken: tuple[int, ...]) -> str:
    """A token that no template writes and that ends no response; `taken`: the ends.

    The tokenizer's own, else one named for padding (<|finetune_right_pad_id|>), a reserved one, unk, any other special one. Where there
    is none (GPT-2 has one special token) the EOS: nothing of ours tells a sequence's end by its padding, and the reward stage sees to it
    that Transformers' classifiers don't either.
    """
    used = {*taken, *_written(tokenizer)}
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = [token.content for _, token in sorted(added.items()) if token.special]
    named = sorted(token for token in vocabulary if "pad" in token.lower() and token[0] in "<[")
    reserved = [token for token in special if "reserved" in token.lower() or "unused" in token.lower()]
    for token in [tokenizer.pad_token, *named, *reserved, tokenizer.unk_token, *special]:
        if token is not None and vocabulary.get(str(token)) not in {None, *used}:
            return str(token)
    return str(tokenizer.eos_token)


def _written(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens that the template may write, and the BOS."""
    texts = [*templates_by_name(tokenizer.chat_template).values()]
    with contextlib.suppress(TemplateError):
        texts += [render(CHAT, tokenizer)] if texts else []
    named = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if any(token.content in text for text in texts)
    }
    return named | ({tokenizer.bos_token_id} - {None})

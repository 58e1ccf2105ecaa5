"""The loss mask of a conversation: which of its tokens are the assistant's."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from salsa_peft.data.chat.templates import (
    Messages,
    common_prefix_length,
    content_for_template,
    has_generation_marks,
    render,
)
from salsa_peft.data.chat.turn_ends import assistant_turn
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def assistant_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and, for each, 1 where it is the assistant's: what an answer holds, and the token that ends it.

    By the template's {% generation %} marks; without them by what the template renders up to each answer; where it renders earlier turns
    otherwise once later ones follow (Qwen3's reasoning), by TRL's own version of that template. Raises SalsaError where none of these
    says it. options: more for the template, such as `tools`.
    """
    chat = content_for_template(messages, tokenizer)
    if has_generation_marks(tokenizer):
        return _marked(chat, tokenizer, None, options)
    require(
        tokenizer.is_fast,
        "tokenizer: it does not tell where its tokens stand in a text. Use a fast tokenizer (tokenizer.json).",
    )
    spans = _spans(chat, tokenizer, options)
    if spans is None:
        return _marked(chat, tokenizer, _of_trl(tokenizer), options)
    text = render(chat, tokenizer, **options)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]  # type: ignore[arg-type]
    added, mask, closing = tokenizer.added_tokens_decoder, [0] * len(ids), assistant_turn(tokenizer).end
    firsts = [first for first, _ in places]  # type: ignore[union-attr]
    for start, end in spans:
        first, last = bisect_left(firsts, start), bisect_left(firsts, end)
        # a token that begins before the answer counts where it holds some of it; special tokens only swallow blanks around them
        if first and places[first - 1][1] > start and ids[first - 1] not in added:  # type: ignore[index]
            first -= 1
        # what the template writes after the token that ends the turn does not count
        stop = next((place for place in reversed(range(first, last)) if ids[place] == closing), last - 1)
        mask[first : stop + 1] = [1] * (stop + 1 - first)
    return ids, mask


def _marked(chat: Messages, tokenizer: PreTrainedTokenizerBase, template: str | None, options: dict[str, Any]) -> Any:
    given = {**options, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded: Any = tokenizer.apply_chat_template(chat, chat_template=template, **given)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def _spans(chat: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> list[tuple[int, int]] | None:
    """Where in the rendered text each answer begins, and where what follows it does; None where the template does not render a
    conversation's beginning as it renders that beginning alone."""
    text, spans = render(chat, tokenizer, **options), []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _before(chat, turn, text, tokenizer, options)
        through = text if turn + 1 == len(chat) else render(chat[: turn + 1], tokenizer, **options)
        end = common_prefix_length(text, through)
        if not text.startswith(before) or end <= len(before):
            return None
        spans.append((len(before), end))
    return spans


def _before(chat: Messages, turn: int, text: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """The text up to an answer; of a conversation that begins with one, up to what opens it."""
    if turn:
        return render(chat[:turn], tokenizer, add_generation_prompt=True, **options)
    opening = assistant_turn(tokenizer).opening
    return "".join(text.partition(opening)[:2]) if opening and opening in text else ""


def _of_trl(tokenizer: PreTrainedTokenizerBase) -> str:
    """TRL's version, with marks, of a template that it knows."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:
        known = ""
    require(
        bool(known),
        "model.chat_template: the template has no {% generation %} marks and renders earlier turns otherwise once later ones follow, so"
        " that the assistant's tokens can't be told. Use chatml, zephyr, or a Jinja file with {% generation %} marks.",
    )
    return known

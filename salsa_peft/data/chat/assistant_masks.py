"""The loss mask of a conversation: which tokens are the assistant's."""

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
from salsa_peft.utils.errors import SalsaError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def assistant_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and a mask: 1 for the tokens of answers and of their ends, else 0.

    The mask comes from the template's {% generation %} marks. Without marks, it comes from rendering the conversation up
    to each answer, or, if the template renders a turn differently once later turns follow (Qwen3's reasoning), from
    TRL's version of the template. Raises SalsaError if TRL has no such version. options: other inputs of the template, such as `tools`.
    """
    chat = content_for_template(messages, tokenizer)
    if has_generation_marks(tokenizer):
        return _marked(chat, tokenizer, None, options)
    require(
        tokenizer.is_fast,
        "tokenizer: this is a slow tokenizer, which gives no character offsets of tokens. Use a fast tokenizer"
        " (tokenizer.json).",
    )
    text = render(chat, tokenizer, **options)
    spans = _spans(chat, text, tokenizer, options)
    if spans is None:
        return _marked(chat, tokenizer, _of_trl(tokenizer), options)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]  # type: ignore[arg-type]
    added, mask, closing = tokenizer.added_tokens_decoder, [0] * len(ids), assistant_turn(tokenizer).end
    firsts = [first for first, _ in places]  # type: ignore[union-attr]
    for start, end in spans:
        first, last = bisect_left(firsts, start), bisect_left(firsts, end)
        # a token that starts before the answer and overlaps it counts; a special token does not, it only absorbs blanks
        if first and places[first - 1][1] > start and ids[first - 1] not in added:  # type: ignore[index]
            first -= 1
        # text that the template writes after the end-of-turn token does not count
        stop = next((place for place in reversed(range(first, last)) if ids[place] == closing), last - 1)
        mask[first : stop + 1] = [1] * (stop + 1 - first)
    return ids, mask


def _marked(chat: Messages, tokenizer: PreTrainedTokenizerBase, template: str | None, options: dict[str, Any]) -> Any:
    given = {**options, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded: Any = tokenizer.apply_chat_template(chat, chat_template=template, **given)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def _spans(
    chat: Messages, text: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> list[tuple[int, int]] | None:
    """Start and end of each answer in `text`, the rendered chat.

    None if the template renders the start of a conversation differently when more turns follow.
    """
    spans = []
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
    """The rendered text before an answer; if the answer is the first turn, up to the end of its opening."""
    if turn:
        return render(chat[:turn], tokenizer, add_generation_prompt=True, **options)
    opening = assistant_turn(tokenizer).opening
    return "".join(text.partition(opening)[:2]) if opening and opening in text else ""


def _of_trl(tokenizer: PreTrainedTokenizerBase) -> str:
    """TRL's version of the template, with {% generation %} marks. Raises SalsaError if TRL has none."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError as error:
        raise SalsaError(
            "model.chat_template: has no {% generation %} marks and renders earlier turns differently once later ones"
            " follow, so the assistant's tokens cannot be found. Use chatml, zephyr, or a Jinja file with"
            " {% generation %} marks."
        ) from error

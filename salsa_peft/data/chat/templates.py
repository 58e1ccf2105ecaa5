"""Chat templates: messages → text → token ids with one BOS, and what a template writes that no message holds.

Transformers renders and tokenises. A template that was not made for training may leave out the BOS, or write today's date: `prepare`
mends that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
USER, ANSWER = "Question", "Answer"
"""Contents that stand for any other where a template is looked at."""
DATE = date(2024, 7, 26)
"""The date that Llama 3.1's own template writes where none is given."""
Result = TypeVar("Result")


def cached_per_tokenizer(
    look: Callable[[PreTrainedTokenizerBase], Result],
) -> Callable[[PreTrainedTokenizerBase], Result]:
    """Keep what was found for a tokenizer until its template, BOS, EOS or size change: rows ask again and again."""
    known: WeakKeyDictionary[Any, tuple[Any, Result]] = WeakKeyDictionary()

    @wraps(look)
    def found(tokenizer: PreTrainedTokenizerBase) -> Result:
        state = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer))
        if tokenizer not in known or known[tokenizer][0] != state:
            known[tokenizer] = (state, look(tokenizer))
        return known[tokenizer][1]

    return found


def templates_by_name(template: str | dict[str, str] | None) -> dict[str, str]:
    """A tokenizer's templates by name: most have one, some have another one for tools."""
    return template if isinstance(template, dict) else {} if template is None else {"default": template}


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether {% generation %} marks in the template say which tokens are the assistant's."""
    template = templates_by_name(tokenizer.chat_template).get("default", "")
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters of two texts, or tokens, are the same from the beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


# ------------------------------------------------------------------ messages → text


def in_parts(messages: Messages) -> Messages:
    """Messages whose content is a list of typed parts, as the templates of multimodal models read them."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


@cached_per_tokenizer
def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders a list of parts, and nothing where the content is a text (LLaVA)."""
    chat = [{"role": "user", "content": USER}]

    def shown(messages: Messages) -> bool:
        try:
            return USER in str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError):
            return False

    return tokenizer.chat_template is not None and not shown(chat) and shown(in_parts(chat))


def content_for_template(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Messages:
    """The messages as the tokenizer's template reads them."""
    return in_parts(messages) if reads_parts(tokenizer) else messages


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The text that the template makes of messages."""
    return str(tokenizer.apply_chat_template(content_for_template(messages, tokenizer), tokenize=False, **options))


# ------------------------------------------------------------------ BOS


@cached_per_tokenizer
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before a text: the model was trained with one."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(USER)["input_ids"][:1] == [bos]  # type: ignore[index]


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text with one BOS, where the tokenizer adds one: a text that a template has rendered begins with its own."""
    ids: list[int] = list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]
    return ids[1:] if adds_bos(tokenizer) and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


@cached_per_tokenizer
def template_lacks_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds a BOS to texts, and its template writes none: Transformers then gives a chat without one."""
    if tokenizer.chat_template is None or not adds_bos(tokenizer):
        return False
    try:
        text = render([{"role": "user", "content": USER}], tokenizer)
    except TemplateError:
        return False
    return tokenizer(text, add_special_tokens=False)["input_ids"][:1] != [tokenizer.bos_token_id]  # type: ignore[index]


# ------------------------------------------------------------------ a template made ready for training


def prepare_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Change the tokenizer's template, in place, where training and use would see other tokens than the base was trained on → what was
    changed, in words.

    It writes the BOS that the tokenizer adds to texts, so that every tool that applies it (TRL's trainers, vLLM) has one; and a fixed
    date instead of today's, so that a run sees the same prompts on every day. The tokenizer is saved so with the results.
    """
    lines, found = [], templates_by_name(tokenizer.chat_template)
    named = {name: fixed_date(template) for name, template in found.items()}
    if named != found:
        tokenizer.chat_template = _as_was(tokenizer, named)
        lines.append(
            f"its chat template writes today's date: it is {DATE:%d %b %Y} for this run, so that prompts stay the same"
        )
    if template_lacks_bos(tokenizer):
        # before a block tag at the start of a line Jinja strips blanks, which it would not do behind the BOS
        named = {name: "{{ bos_token }}" + template.lstrip(" \t") for name, template in named.items()}
        tokenizer.chat_template = _as_was(tokenizer, named)
        lines.append(
            f"the chat template did not write the {tokenizer.bos_token} that its tokenizer begins texts with; now it does"
        )
    return lines


def _as_was(tokenizer: PreTrainedTokenizerBase, named: dict[str, str]) -> Any:
    return named if isinstance(tokenizer.chat_template, dict) else named["default"]


def fixed_date(template: str) -> str:
    """The template with `strftime_now("…")` replaced by DATE in that format."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(DATE.strftime(call[2])), template)


@cached_per_tokenizer
def default_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before the first user turn that no message holds: a default system text, today's date; else ""."""
    chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    if tokenizer.chat_template is None:
        return ""
    try:
        text = render([*chat, {"role": "user", "content": USER}], tokenizer)
    except TemplateError:
        return ""
    before, _, rest = text.partition(USER)
    between = rest.partition(ANSWER)[2].partition(USER)[0]  # the end of a turn, and what opens the user's next one
    ids, opening = (
        [int(token) for token in tokenizer(part, add_special_tokens=False)["input_ids"]]  # type: ignore[union-attr, arg-type]
        for part in (before, between)
    )
    extra = ids[: len(ids) - common_prefix_length(ids[::-1], opening[::-1])]
    bos = extra[:1] == [tokenizer.bos_token_id] and (len(extra) == 1 or adds_bos(tokenizer))
    return str(tokenizer.decode(extra[bos:])).strip()

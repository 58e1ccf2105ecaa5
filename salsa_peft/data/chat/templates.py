"""Chat templates: rendering messages, token ids with one BOS, and text that a template adds by itself.

Transformers renders and tokenizes. Some templates omit the BOS or write today's date; `prepare_template` corrects both
for training.
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
CHAT: Messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
"""Sample contents and a sample conversation for testing what a template does."""
DATE = date(2024, 7, 26)
"""Date that replaces today's date in templates: the default date of Llama 3.1's template."""
Result = TypeVar("Result")


def cached_per_tokenizer(
    look: Callable[[PreTrainedTokenizerBase], Result],
) -> Callable[[PreTrainedTokenizerBase], Result]:
    """Cache a function of a tokenizer until the tokenizer's template, BOS, EOS or size changes."""
    known: WeakKeyDictionary[Any, tuple[Any, Result]] = WeakKeyDictionary()

    @wraps(look)
    def found(tokenizer: PreTrainedTokenizerBase) -> Result:
        state = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, len(tokenizer))
        if tokenizer not in known or known[tokenizer][0] != state:
            known[tokenizer] = (state, look(tokenizer))
        return known[tokenizer][1]

    return found


def templates_by_name(template: str | dict[str, str] | None) -> dict[str, str]:
    """A tokenizer's templates by name. Most tokenizers have only one; some have a second one for tools."""
    return template if isinstance(template, dict) else {} if template is None else {"default": template}


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks the assistant's tokens with {% generation %}."""
    template = templates_by_name(tokenizer.chat_template).get("default", "")
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix of two texts or token lists."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def in_parts(messages: Messages) -> Messages:
    """Messages with each content as a list of typed parts, as multimodal models' templates read them."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def try_render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str | None:
    """Render messages without conversion. Returns None without a template, or if it rejects the messages."""
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError):
        return None


@cached_per_tokenizer
def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders content as a list of parts but not as text (LLaVA)."""

    def shown(messages: Messages) -> bool:
        return USER in (try_render(messages, tokenizer) or "")

    return not shown(CHAT[:1]) and shown(in_parts(CHAT[:1]))


def content_for_template(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Messages:
    """Messages with content as text or parts, whichever the tokenizer's template reads."""
    return in_parts(messages) if reads_parts(tokenizer) else messages


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The text of messages, rendered with the tokenizer's chat template."""
    return str(tokenizer.apply_chat_template(content_for_template(messages, tokenizer), tokenize=False, **options))


@cached_per_tokenizer
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS in front of texts."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(USER)["input_ids"][:1] == [bos]  # type: ignore[index]


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text. If the tokenizer adds a BOS to a text that starts with one, only one is kept."""
    ids: list[int] = list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]
    return ids[1:] if adds_bos(tokenizer) and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


@cached_per_tokenizer
def template_lacks_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds a BOS to texts, but its template writes none in chats."""
    text = try_render(content_for_template(CHAT[:1], tokenizer), tokenizer) if adds_bos(tokenizer) else None
    if text is None:
        return False
    return tokenizer(text, add_special_tokens=False)["input_ids"][:1] != [tokenizer.bos_token_id]  # type: ignore[index]


def prepare_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Correct the tokenizer's template in place for training, and return descriptions of the changes.

    The template then writes the BOS that the tokenizer adds to texts, for every tool that applies it (TRL's trainers,
    vLLM), and a fixed date instead of today's, so that prompts do not change from day to day. Results are saved with
    this tokenizer.
    """
    lines, found = [], templates_by_name(tokenizer.chat_template)
    named = {name: fixed_date(template) for name, template in found.items()}
    if named != found:
        tokenizer.chat_template = _in_original_form(tokenizer, named)
        lines.append(
            f"its chat template writes today's date; this run uses {DATE:%d %b %Y}, so that prompts stay the same"
        )
    if template_lacks_bos(tokenizer):
        # Jinja strips blanks before a block tag at the start of a line, but not after the BOS
        named = {name: "{{ bos_token }}" + template.lstrip(" \t") for name, template in named.items()}
        tokenizer.chat_template = _in_original_form(tokenizer, named)
        lines.append(
            f"its chat template did not write the {tokenizer.bos_token} that its tokenizer adds to texts; now it does"
        )
    return lines


def _in_original_form(tokenizer: PreTrainedTokenizerBase, named: dict[str, str]) -> Any:
    return named if isinstance(tokenizer.chat_template, dict) else named["default"]


def fixed_date(template: str) -> str:
    """The template with `strftime_now("…")` replaced by DATE in that format."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(DATE.strftime(call[2])), template)


@cached_per_tokenizer
def default_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that the template adds before the first user turn (default system prompt, date), or ""."""
    text = try_render(content_for_template([*CHAT, CHAT[0]], tokenizer), tokenizer)
    if text is None:
        return ""
    before, _, rest = text.partition(USER)
    between = rest.partition(ANSWER)[2].partition(USER)[0]  # end of a turn and start of the next user turn
    ids, opening = (
        [int(token) for token in tokenizer(part, add_special_tokens=False)["input_ids"]]  # type: ignore[union-attr, arg-type]
        for part in (before, between)
    )
    extra = ids[: len(ids) - common_prefix_length(ids[::-1], opening[::-1])]
    bos = extra[:1] == [tokenizer.bos_token_id] and (len(extra) == 1 or adds_bos(tokenizer))
    return str(tokenizer.decode(extra[bos:])).strip()

"""Writes a draft as YAML in which every key has a comment: what it sets, and why it has its value."""

import textwrap
from collections.abc import Iterator
from typing import Any

from salsa_peft.cli.init.draft import Draft
from salsa_peft.config.keys.describe import find_key, flow

WIDTH = 118
ONE_LINE = ("policies", "toy", "lora")
"""Sections whose entries are written in one line each, without comments."""


def render(draft: Draft, command: str, file: str) -> str:
    """The recipe file's text. command: the command line that made it. file: the recipe's name for the commands in it."""
    commands = {
        f"salsa run {file} --lora --dry-run": "the plan: stages, batch sizes, memory, disk",
        f"salsa run {file} --lora": "the run",
        "salsa docs ppo.kl_coef": "what a key sets; the keys that are not here have their defaults",
    }
    width = max(map(len, commands))
    lines = [f"# Written by `{command}`.", *(f"#   {words:{width}}   {what}" for words, what in commands.items())]
    for key, value in draft.data.items():
        nested = isinstance(value, dict)
        lines += [""] if nested else []
        lines += _comment(draft, key, "")
        lines += [f"{key}:"] if nested else [f"{key}: {flow(value)}"]
        lines += _section(draft, key, value) if nested else []
    return "\n".join(lines) + "\n"


def _section(draft: Draft, section: str, value: dict[str, Any]) -> Iterator[str]:
    """The lines of a section's keys, each after its comment."""
    for key, entry in value.items():
        if section not in ONE_LINE:
            yield from _comment(draft, f"{section}.{key}", "  ")
        if isinstance(entry, dict) and (section, key) == ("evaluate", "prompts"):
            yield f"  {key}:"
            yield from (f"    {name}: {flow(source)}" for name, source in entry.items())
        else:
            yield f"  {key}: {flow(entry)}"


def _comment(draft: Draft, key: str, indent: str) -> list[str]:
    """The first sentence about a key and the draft's note, as comment lines."""
    known = LORA if key == "lora" else getattr(find_key(key), "text", "")
    sentence, dot, rest = known.partition(". ")
    text = sentence + ("." if dot and rest else "")
    note = draft.notes.get(key, "")
    text = f"{text} Here: {note}." if note else text
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


LORA = "Settings that --lora uses instead of those above: adapters want higher learning rates than full weights."

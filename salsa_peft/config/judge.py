"""The recipe's `evaluate.judge`, and FastChat's files of prompts and reference answers that it may name. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive
from salsa_peft.config.rewards import check_function
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short, short_path

KINDS = ("openai", "local", "reward", "function")
"""The rows of JUDGES in evaluation/judges/registry.py."""


@dataclass(config=STRICT, kw_only=True)
class Judge:
    """A judge and how it is asked. It sees each pair of answers twice, in both orders; a win needs both (FastChat's rule)."""

    kind: Literal["openai", "local", "reward", "function"]
    """openai: any endpoint that speaks OpenAI's chat protocol. local: a chat model in this process. reward: the recipe's reward, its scores
    compared. function: your own, module:name."""
    model: str | None = None
    """openai: the endpoint's name of the model. local: a chat model's folder or Hub id. function: module:name, as in reward.model; its
    signature stands in evaluation/judges/registry.py."""
    base_url: str | None = None
    """openai: where the endpoint is, such as http://localhost:8000/v1. None: the package openai's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key. The key itself is in no recipe, log or file."""
    prompt: Literal["figure7", "fastchat"] = "figure7"
    """figure7: what the paper's judge is told (Figure 7), in our words. fastchat: FastChat's own file of prompts, by turn and category."""
    prompts: str | None = None
    """fastchat: the path of its judge_prompts.jsonl."""
    references: str | None = None
    """fastchat: the path of its reference answers (reference_answer/gpt-4.jsonl) for math, reasoning and coding. None: those that the
    questions bring, and without one the prompt that needs none."""
    temperature: NonNegative = 0.0
    """Of the judge (FastChat: 0)."""
    max_tokens: Count = 2048
    """Of one judgment (FastChat: 2048)."""
    concurrency: Count = 8
    """openai: requests under way at once. local: games judged in one batch. function: games in one call."""
    timeout: Positive = 120.0
    """openai: seconds for one request."""
    retries: Annotated[int, Field(ge=0)] = 6
    """openai: tries after the first, with growing pauses, on 408, 409, 429, 5xx, time-outs and cut connections."""
    ask_again: Annotated[int, Field(ge=0)] = 1
    """Times an answer without a verdict is asked again before it counts as missing."""
    budget: Count | None = None
    """openai: requests that one run may send in all, retries too; what is left over counts as missing and is asked by the next run.
    None: no limit."""
    margin: NonNegative = 0.0
    """reward: a difference of scores up to this is a tie."""

    def check(self, where: str) -> None:
        """Raise SalsaError where the kind lacks what it needs."""
        needs = {"openai": "the endpoint's name of a model", "local": "a chat model's folder or Hub id", "function": "module:name"}  # fmt: skip
        if self.kind in needs:
            require(
                self.model is not None, f"{where}.model: found nothing for {self.kind}, expected {needs[self.kind]}"
            )
        else:
            require(
                self.model is None,
                f"{where}.model: found {short(self.model)}, expected none: the judge reward takes the recipe's",
            )
        require(
            self.prompt != "fastchat" or self.prompts is not None,
            f"{where}.prompts: found nothing, expected the path of FastChat's judge_prompts.jsonl; or set {where}.prompt=figure7",
        )
        if self.base_url is not None:
            _check_address(f"{where}.base_url", self.base_url)
        require(
            self.api_key_env.isidentifier() and self.api_key_env.isascii(),
            f"{where}.api_key_env: expected the name of an environment variable, such as OPENAI_API_KEY, and never the key itself",
        )


def as_judge(value: Any) -> Any:
    """Bare text is the kind."""
    return {"kind": value} if isinstance(value, str) else value


def _check_address(where: str, url: str) -> None:
    """Raise SalsaError for what is no address; one that holds a password is not shown."""
    try:
        parts = urlsplit(url)
        host, secret = parts.hostname, parts.username is not None or bool(parts.query)
    except ValueError as error:
        raise SalsaError(f"{where}: expected an address such as http://localhost:8000/v1") from error
    require(
        not secret,
        f"{where}: found a password or a query in it, expected an address alone: recipes are saved; a key goes into the environment",
    )
    fits = parts.scheme in ("http", "https") and bool(host)
    require(fits, f"{where}: found {short(url)}, expected an address such as http://localhost:8000/v1")


def _read(reader: Callable[[str], Any], path: str, key: str) -> None:
    """An error of a file gets its key in front."""
    try:
        reader(path)
    except SalsaError as error:
        raise SalsaError(f"{key}: {error}") from error


def check(section: Judge, where: str) -> None:
    """What local files show, once their paths are absolute: prompts, references, the function's module, a local model's folder.

    Raises SalsaError. Imports neither torch nor the function's module.
    """
    section.check(where)
    if section.prompt == "fastchat" and section.kind in ("openai", "local"):
        _read(read_prompts, str(section.prompts), f"{where}.prompts")
    if section.references is not None:
        _read(read_references, section.references, f"{where}.references")
    if section.kind == "function":
        check_function(f"{where}.model", str(section.model))
    if section.kind == "local" and os.path.isabs(str(section.model)):
        require(
            (Path(str(section.model)) / "config.json").is_file(),
            f"{where}.model: found no config.json in {short_path(str(section.model))}, expected a chat model's folder or Hub id",
        )


def check_ready(section: Judge, where: str) -> None:
    """Raise SalsaError where this machine lacks what the judge openai needs: the package, or the key of the default endpoint."""
    if section.kind != "openai":
        return
    require(
        importlib.util.find_spec("openai") is not None,
        f"{where}.kind: found openai and no package openai, which it asks through; pip install 'salsa-peft[judge]'",
    )
    own = section.base_url is not None or bool(os.environ.get("OPENAI_BASE_URL"))
    require(
        own or bool(os.environ.get(section.api_key_env, "").strip()),
        f"{where}.api_key_env: found no environment variable {section.api_key_env}, expected the key for OpenAI's endpoint in it;"
        f" export {section.api_key_env}=…, or set {where}.base_url to an endpoint of your own",
    )


FIELDS = {
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-v2-multi-turn": {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
}


def read_prompts(path: str | Path) -> dict[str, dict[str, str]]:
    """FastChat's judge_prompts.jsonl → its four pairwise prompts. Raises SalsaError where one is missing or has other fields."""
    found = {row["name"]: row for row in _rows(path, "judge_prompts.jsonl") if isinstance(row.get("name"), str)}
    lacking = sorted(set(FIELDS) - set(found))
    require(
        not lacking,
        f"{short_path(str(path))}: found no prompt {', '.join(lacking)}, expected FastChat's judge_prompts.jsonl",
    )
    for name, fields in FIELDS.items():
        texts = [found[name].get(key) for key in ("system_prompt", "prompt_template")]
        fits = all(isinstance(text, str) for text in texts) and found[name].get("output_format") == "[[A]]"
        require(
            fits,
            f"{short_path(str(path))}: {name}: expected system_prompt, prompt_template and the output_format [[A]], as FastChat has them",
        )
        there = _fields(str(texts[1]))
        require(
            there == fields,
            f"{short_path(str(path))}: {name}: found the fields {short(sorted(there))}, expected {', '.join(sorted(fields))}",
        )
    return {name: found[name] for name in FIELDS}


def _fields(template: str) -> set[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return set()
    return {name + (spec or "") + (f"!{change}" if change else "") for _, name, spec, change in parts if name is not None}  # fmt: skip


def read_references(path: str | Path) -> dict[str, tuple[str, ...]]:
    """FastChat's reference_answer/<judge>.jsonl → question id, as text → answers by turn."""
    found = {}
    for row in _rows(path, "reference answers"):
        try:
            turns = row["choices"][0]["turns"]
            found[str(row["question_id"])] = tuple(str(turn) for turn in turns)
        except (KeyError, IndexError, TypeError) as error:
            raise SalsaError(
                f"{short_path(str(path))}: found a row without question_id and choices, expected FastChat's reference answers"
            ) from error
    return found


def _rows(path: str | Path, what: str) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise SalsaError(f"{short_path(str(path))}: found no such file, expected FastChat's {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SalsaError(f"{short_path(str(path))}: found no JSON lines, expected one JSON object a line") from error
    require(
        all(isinstance(row, dict) for row in rows),
        f"{short_path(str(path))}: found a line that is no JSON object, expected one a line",
    )
    return rows

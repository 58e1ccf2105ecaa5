"""The recipe's `evaluate.judge`, and FastChat's judge prompts and reference answers. Imports no torch."""

import importlib.util
import json
import os
import string
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, NonNegative, Positive, question_id
from salsa_peft.config.rewards import check_function
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import short, short_path


@dataclass(config=STRICT, kw_only=True)
class Judge:
    """Settings of the judge. To win, an answer must win in both orders of the pair, as in FastChat."""

    # The kinds are the keys of JUDGES in evaluation/judges/registry.py.
    kind: Literal["openai", "local", "reward", "function"]
    """openai: an endpoint with OpenAI's chat API. local: a chat model on this machine. reward: compares the scores of
    the recipe's reward. function: a Python function, module:name."""
    model: str | None = None
    """openai: name of the model at the endpoint. local: folder or Hub id of a chat model. function: module:name, as in
    reward.model; evaluation/judges/registry.py shows the signature."""
    base_url: str | None = None
    """Kind openai: address of the endpoint, such as http://localhost:8000/v1. None: the openai package's default.
    Example: http://localhost:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Kind openai: environment variable with the API key. The key itself is never in a recipe, log or file."""
    prompt: Literal["figure7", "fastchat"] = "figure7"
    """Prompt of the judge. figure7: the paper's Figure 7, reworded. fastchat: FastChat's, by turn and category."""
    prompts: str | None = None
    """Prompt fastchat: path of FastChat's judge_prompts.jsonl. Example: judge_prompts.jsonl."""
    references: str | None = None
    """Prompt fastchat: path of FastChat's reference answers (reference_answer/gpt-4.jsonl) for math, reasoning and
    coding. None: those in the questions' data. A question without reference answers gets a prompt without them.
    Example: reference_answer/gpt-4.jsonl."""
    temperature: NonNegative = 0.0
    """Sampling temperature of the judge. Source: FastChat's default."""
    max_tokens: Count = 2048
    """Maximum number of tokens of a judgment. Source: FastChat's default."""
    concurrency: Count = 8
    """openai: number of simultaneous requests. local: comparisons per batch. function: comparisons per call. Unit:
    requests or comparisons."""
    timeout: Positive = 120.0
    """Kind openai: time until a request is given up. Unit: seconds."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Kind openai: maximum number of retries, with growing pauses, after HTTP 408, 409, 429, 5xx, time-outs and lost
    connections."""
    ask_again: Annotated[int, Field(ge=0)] = 1
    """Number of times that the judge is asked again after a reply without a verdict, before the judgment counts as
    missing."""
    budget: Count | None = None
    """Kind openai: maximum number of requests of a run, including retries. Judgments beyond this number count as
    missing, and the next run requests them. None: no limit. Example: 1000."""
    margin: NonNegative = 0.0
    """Kind reward: largest difference of two scores that counts as a tie. Unit: reward."""

    def check(self, where: str) -> None:
        """Raise SalsaError for bad settings, and for local files or functions that are missing or unusable.

        Paths must be absolute already. Imports neither torch nor the function's module.
        """
        needs = {"openai": "the name of a model at the endpoint", "local": "a chat model's folder or Hub id", "function": "module:name"}  # fmt: skip
        if self.kind in needs:
            require(self.model is not None, f"{where}.model: kind {self.kind} needs {needs[self.kind]}; add it")
        elif self.kind == "reward":
            require(
                self.model is None,
                f"{where}.model: kind reward uses the recipe's reward; remove the model {short(self.model)}",
            )
        require(
            self.prompt != "fastchat" or self.prompts is not None,
            f"{where}.prompts: prompt fastchat needs the path of FastChat's judge_prompts.jsonl; add it, or set"
            f" {where}.prompt=figure7",
        )
        if self.base_url is not None:
            _check_address(f"{where}.base_url", self.base_url)
        require(
            self.api_key_env.isidentifier() and self.api_key_env.isascii(),
            f"{where}.api_key_env: must be the name of an environment variable, such as OPENAI_API_KEY, and never the"
            " key itself",
        )
        fastchat = self.prompt == "fastchat" and self.kind in ("openai", "local")
        for key, path, read in (
            ("prompts", self.prompts if fastchat else None, read_prompts),
            ("references", self.references, read_references),
        ):
            try:
                if path is not None:
                    read(path)
            except SalsaError as error:
                raise SalsaError(f"{where}.{key}: {error}") from error
        model = str(self.model)
        if self.kind == "function":
            check_function(f"{where}.model", model)
        require(
            self.kind != "local" or not os.path.isabs(model) or Path(model, "config.json").is_file(),
            f"{where}.model: {short_path(model)} has no config.json; give a chat model's folder or Hub id",
        )


def as_judge(value: Any) -> Any:
    """Convert a judge that is given as text (its kind) to a mapping. Return other values unchanged."""
    return {"kind": value} if isinstance(value, str) else value


def _check_address(where: str, url: str) -> None:
    """Raise SalsaError for an invalid address, without showing one that may hold a password."""
    try:
        parts = urlsplit(url)
        host, secret = parts.hostname, parts.username is not None or bool(parts.query)
    except ValueError as error:
        raise SalsaError(f"{where}: must be an address such as http://localhost:8000/v1") from error
    require(
        not secret,
        f"{where}: must not contain a password or a query, because recipes are saved; put the key into an environment"
        " variable, and the variable's name into api_key_env",
    )
    fits = parts.scheme in ("http", "https") and bool(host)
    require(fits, f"{where}: must be an address such as http://localhost:8000/v1, not {short(url)}")


def check_ready(judge: Judge, where: str) -> None:
    """Raise SalsaError if kind openai lacks the package openai, or the API key for OpenAI's endpoint."""
    if judge.kind != "openai":
        return
    require(
        importlib.util.find_spec("openai") is not None,
        f"{where}.kind: openai needs the package openai; pip install 'salsa-peft[judge]'",
    )
    own = judge.base_url is not None or bool(os.environ.get("OPENAI_BASE_URL"))
    require(
        own or bool(os.environ.get(judge.api_key_env, "").strip()),
        f"{where}.api_key_env: the environment variable {judge.api_key_env} is not set; put the key for OpenAI's"
        f" endpoint into it (export {judge.api_key_env}=…), or set {where}.base_url to your own endpoint",
    )


ONE_TURN = {"question", "answer_a", "answer_b"}
TWO_TURNS = {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
PROMPT_FIELDS = {
    "pair-v2": ONE_TURN,
    "pair-v2-multi-turn": TWO_TURNS,
    "pair-math-v1": ONE_TURN | {"ref_answer_1"},
    "pair-math-v1-multi-turn": TWO_TURNS | {"ref_answer_1", "ref_answer_2"},
}
"""Name of a pairwise prompt of FastChat → the fields of its template."""


def read_prompts(path: str | Path) -> dict[str, dict[str, str]]:
    """Read FastChat's pairwise prompts from judge_prompts.jsonl. Raises SalsaError for an unusable file."""
    prompts = {row["name"]: row for row in _rows(path, "judge_prompts.jsonl") if isinstance(row.get("name"), str)}
    file, lacking = short_path(str(path)), sorted(set(PROMPT_FIELDS) - set(prompts))
    require(not lacking, f"{file}: has no prompt {', '.join(lacking)}; give FastChat's judge_prompts.jsonl")
    for name, fields in PROMPT_FIELDS.items():
        texts = [prompts[name].get(key) for key in ("system_prompt", "prompt_template")]
        fits = all(isinstance(text, str) for text in texts) and prompts[name].get("output_format") == "[[A]]"
        require(
            fits,
            f"{file}: the prompt {name} must have system_prompt, prompt_template and the output_format [[A]], as in"
            " FastChat",
        )
        found = _fields(str(texts[1]))
        require(
            found == fields,
            f"{file}: the template of {name} has the fields {short(sorted(found))}; it must have"
            f" {', '.join(sorted(fields))}",
        )
    return {name: prompts[name] for name in PROMPT_FIELDS}


def _fields(template: str) -> set[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return set()
    return {name + (spec or "") + (f"!{change}" if change else "") for _, name, spec, change in parts if name is not None}  # fmt: skip


def read_references(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read FastChat's reference answers as {question id as text: answers by turn}. Raises SalsaError."""
    found = {}
    for number, row in enumerate(_rows(path, "reference answers"), 1):
        try:
            turns, given = row["choices"][0]["turns"], row["question_id"]
            identity = question_id(given, f"{short_path(str(path))}, row {number}, question_id")
            found[str(identity)] = tuple(str(turn) for turn in turns)
        except (KeyError, IndexError, TypeError) as error:
            raise SalsaError(
                f"{short_path(str(path))}: a row lacks question_id or choices; give FastChat's reference answers"
            ) from error
    return found


def _rows(path: str | Path, what: str) -> list[dict[str, Any]]:
    file = short_path(str(path))
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise SalsaError(f"{file}: no such file; give the path of FastChat's {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SalsaError(f"{file}: cannot be read as JSON lines (one JSON object per line)") from error
    require(all(isinstance(row, dict) for row in rows), f"{file}: every line must be a JSON object")
    return rows

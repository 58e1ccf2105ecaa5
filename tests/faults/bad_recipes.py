"""Recipes that are bad by construction, from good ones by a fixed draw; and what becomes of each in a process that has no torch.

python tests/faults/bad_recipes.py FOLDER COUNT    writes FOLDER/results.json: for each its kind, and what went wrong, if anything did
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import random
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from bundled_recipes import NEEDED

from salsa_peft.config import yaml as yaml_text
from salsa_peft.config.keys.problems import MOST
from salsa_peft.config.paths import bundled_folder
from salsa_peft.config.schema import Recipe
from salsa_peft.recipe import run as recipe
from salsa_peft.recipe.__main__ import main as salsa_run

SECONDS = 2.0
"""Of CPU time, that a refusal may take."""
LONGEST = 1000
"""Characters of its line."""
CANARY = "canary"
Data = dict[str, Any]


class Bad(NamedTuple):
    """A recipe file, and the words of the command after its name."""

    kind: str
    content: bytes
    words: tuple[str, ...] = ("--lora",)


def good() -> dict[str, str]:
    """The bundled recipes, without those that name files beside them, and a small one."""
    small = "name: tiny\ntoy: {}\npolicies:\n  ppo: {reference: seed-0}\n  salsa: {reference: soup, kl_coef: 2e-2}\n"
    bundled = sorted(bundled_folder("recipes").glob("*.yaml"))
    return {"tiny": small} | {path.stem: path.read_text() for path in bundled if path.stem not in NEEDED}


# what stands beside the recipes: name → content
FILES = {
    "empty.jsonl": b"",
    "list.jsonl": b"[1, 2]\n",
    "cut.jsonl": b'{"messages": [',
    "nested.jsonl": b"[" * 100_000,
    "binary.jsonl": bytes(range(256)),
    "other.jsonl": b'{"text": "a", "label": 1}\n' * 64,
    "few.jsonl": b'{"messages": [], "prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3,
    "cut.parquet": b"PAR1",
    "none.json": b"[]",
    "cut.json": b'[{"prompt": ',
    "module.py": b"def other():\n    pass\n",
    "hollow/nothing.txt": b"",
}


def at(data: Data, key: str, value: Any) -> Data:
    """The data with a value at a dotted key; what stands in the way gives way."""
    inner, parts = data, key.split(".")
    for part in parts[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[parts[-1]] = value
    return data


def leaves(hint: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(key, its type) of every field of the recipe's sections that is no section itself."""
    for field in dataclasses.fields(hint):
        kind, key = (
            typing.get_type_hints(hint, include_extras=True)[field.name],
            f"{where}{field.name}".replace("from_", "from"),
        )
        options = set(kinds(kind))
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if section is None or key in (
            "evaluate.judge",
            "data.demonstrations",
            "data.preferences",
            "data.prompts",
            "data.held_out",
        ):
            yield key, kind
        if section is not None:
            yield from leaves(section, f"{key}.")


def kinds(hint: Any) -> Iterator[Any]:
    """The types that a hint allows, without what narrows them."""
    if typing.get_origin(hint) is typing.Annotated:
        yield from kinds(typing.get_args(hint)[0])
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            yield from kinds(option)
    else:
        yield typing.get_origin(hint) or hint


WRONG: dict[Any, list[Any]] = {
    int: ["three", 1.5, -0.5, "1", [1], {"a": 1}],
    float: ["fast", "1e-5x", [0.1], {"a": 1}],
    str: [3, 2.5, {"a": 1}],
    bool: [0, 1, "yes", "on", [True], {}],
    list: [3, True, {"a": 1}, "a, b"],
    dict: [3, True, [1], "a"],
    typing.Literal: ["nonsense", "", 3, [], {}],
}
LEAVES = [(key, set(kinds(hint))) for key, hint in leaves(Recipe) if typing.Any not in set(kinds(hint))]
SECTIONS = [field.name for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(next(kinds(field.type), None))] or [
    "model", "data", "sft", "reward", "soup", "ppo", "dpo", "kto", "rloo", "grpo", "generation", "evaluate", "hub",
]  # fmt: skip
NUMBERS = [key for key, options in LEAVES if options & {int, float}]
COUNTS = [key for key, options in LEAVES if int in options and key not in ("landscape.line", "landscape.plane")
          and not key.endswith("max_steps")]  # fmt: skip
PLAIN = [
    key
    for key, _ in LEAVES
    if not key.startswith(("search.", "toy.", "landscape.", "adapter.")) and not key.endswith("learning_rate")
]
"""Of sections that every recipe has, and no preset lays something over."""


def only(value: Any, options: set[Any]) -> bool:
    """Whether none of the types has the value."""
    return not any(isinstance(value, option) for option in options if isinstance(option, type))


def wrong_type(rng: random.Random, data: Data) -> Data:
    key, options = rng.choice([leaf for leaf in LEAVES if leaf[0] in PLAIN])
    fitting = [
        value for option in options for value in WRONG.get(option, ["x"] if dataclasses.is_dataclass(option) else [])
    ]
    bad = [
        value for value in fitting if only(value, options) and not (isinstance(value, str) and "path" in str(options))
    ]
    return at(
        data,
        key,
        rng.choice([value for value in bad if not isinstance(value, str) or str not in options] or [{"a": {"b": 1}}]),
    )


def wrong_section(rng: random.Random, data: Data) -> Data:
    return at(data, rng.choice([name for name in SECTIONS if name != "reward"]), rng.choice([3, True, [1], "all"]))


def typo(rng: random.Random, data: Data) -> Data:
    key = rng.choice(PLAIN)
    head, _, name = key.rpartition(".")
    place = rng.randrange(len(name))
    letter = rng.choice("zqxj7")
    wrong = rng.choice(
        [name[:place] + letter + name[place:], name.upper(), f"{name}_{letter}", f"{name} ", name[::-1] + "_"]
    )
    return at(data, f"{head}.{wrong}" if head else wrong, 1)


def unknown_in_named(rng: random.Random, data: Data) -> Data:
    key = rng.choice(["policies.ppo.kl_coeff", "policies.ppo.refernce", "evaluate.prompts.x.pth", "data.prompts.splitt", "lora.ppo.lr",
                      "lora.polices", "reward.modell", "sweep.alfa", "sweep.alpha.valuess", "search.kl_coeff", "hub.psuh"])  # fmt: skip
    return at(data, key, rng.choice([1, "x", [0.5], {"a": 1}]))


def not_finite(rng: random.Random, data: Data) -> Data:
    key = rng.choice([key for key in NUMBERS if key in PLAIN])
    return at(data, key, rng.choice([float("nan"), float("inf"), float("-inf")]))


def negative(rng: random.Random, data: Data) -> Data:
    return at(data, rng.choice([key for key in COUNTS if key in PLAIN]), -rng.choice([1, 2, 7, 10**9, 10**25]))


def zero(rng: random.Random, data: Data) -> Data:
    key = rng.choice(["sft.batch_size", "ppo.batch_size", "ppo.num_mini_batches", "ppo.micro_batch_size", "model.max_length", "threads",
                      "generation.max_new_tokens", "generation.temperature", "ppo.num_train_epochs", "soup.rank",
                      "ppo.cliprange", "ppo.max_ratio", "num_processes", "sft.subset", "reward.held_out", "dpo.kl_coef"])  # fmt: skip
    return at(data, key, 0)


def out_of_range(rng: random.Random, data: Data) -> Data:
    key, value = rng.choice([
        ("sft.subset", 1.1), ("ppo.gamma", 1.0001), ("ppo.lam", -0.1), ("sft.warmup_ratio", 1), ("reward.held_out", 1), ("toy.pretrain_long", 2),
        ("ppo.seed", 2**32), ("evaluate.seed", 10**20), ("sft.seeds", [2**32]), ("grpo.num_generations", 1), ("adapter.lora_dropout", 1.0),
        ("sft.seeds", []), ("reward.seeds", []), ("soup.members", []), ("search", {"kl_coef": []}), ("evaluate.temperature", -1),
    ])  # fmt: skip
    return at(data, f"lora.{key}" if key.startswith("adapter") else key, value)


def batches(rng: random.Random, data: Data) -> Data:
    """No batch that these divide: a prime one."""
    prime, other = rng.choice([7, 13, 31, 127]), rng.choice([2, 3, 4, 5, 6])
    section = rng.choice(["sft", "reward", "ppo", "dpo", "kto", "rloo", "grpo"])
    key = rng.choice(["num_mini_batches", "micro_batch_size"]) if section == "ppo" else "micro_batch_size"
    data.pop("lora", None)
    return at(at(data, f"{section}.batch_size", prime), f"{section}.{key}", other)


def lengths(rng: random.Random, data: Data) -> Data:
    limit = rng.choice([16, 100, 2048])
    at(data, "model.max_length", limit)
    key = rng.choice(["generation.max_new_tokens", "generation.min_new_tokens", "ppo.max_prompt_length"])
    return at(data, key, limit + rng.choice([0, 1, 10**6, 10**20]))


def missing_seed(rng: random.Random, data: Data) -> Data:
    number = rng.choice([9, 99, 10**15])
    key, value = rng.choice([
        ("policies.a.reference", f"seed-{number}"), ("policies.a.reference", {"soup": {"members": [0, number]}}),
        ("policies.a.reference", {"shrunk": {"seed": number, "scale": 0.5}}), ("policies.a.reference", ["seed-0", f"seed-{number}"]),
        ("soup.members", [0, number]), ("landscape", {"line": [0, number]}), ("landscape", {"plane": [0, 1, number]}),
        ("evaluate.models", [f"seed-{number}"]), ("sweep", {"members": {"values": [number]}}), ("sweep", {"scale": {"values": [0.5], "seed": number}}),
        ("sweep", {"alpha": {"values": [0.5], "members": [0, number]}}), ("sweep", {"kl_coef": {"values": [0.5], "reference": f"seed-{number}"}}),
    ])  # fmt: skip
    return at(data, key, value)


def bad_reference(rng: random.Random, data: Data) -> Data:
    value = rng.choice([
        None, 3, "", [], {}, {"sop": {}}, {"soup": 3}, {"soup": {"members": []}}, {"soup": {"members": [-1]}}, {"soup": {"members": [0, 0]}},
        {"soup": {"members": [0, 1], "weights": [0.5, 0.6]}}, {"soup": {"weights": [1]}}, {"soup": {"members": ["a"]}}, {"shrunk": {"seed": 0}},
        {"shrunk": {"scale": True}}, {"shrunk": {"scale": 1e308 * 10}}, {"soup": {}, "shrunk": {}}, "sed-0", "soups", "a b/c", "seed-", "a/b/c",
        {"soup": {"sync_every": 0}}, {"soup": {"sync_every": 1, "mixup_alpha": 2}}, {"soup": {"members": [0] * 5000}}, {"soup": "x" * 5000},
        [["seed-0", "nowhere"]], {"shrunk": {"scale": "x" * 5000}}, "x" * 5000, "../../nowhere", "/nowhere/adapter", "\0", "~nobody/x",
    ])  # fmt: skip
    return at(data, "policies.ppo", {"reference": value})


def bad_reward(rng: random.Random, data: Data) -> Data:
    value = rng.choice([
        3, "", [], {"model": "adapter"}, "adaptor", [{"model": "adapter", "weigth": 1}], ["adapter", "adapter"], [{"model": "adapter", "weight": "x"}],
        "nothere:score", "module:nothere", "module.py:other", "a b:c", "./nowhere", "../nowhere/x", ["adapter", {"name": "x"}], "x" * 5000, [3],
        [{"model": "adapter", "weight": float("inf")}], [{"model": "adapter", "name": "a/b"}], "hollow", "./hollow", [[]], "\0:x",
    ])  # fmt: skip
    return at(data, "reward", {"model": value})


def bad_judge(rng: random.Random, data: Data) -> Data:
    value = rng.choice([
        "opanai", 3, [], {}, {"kind": "gpt"}, {"kind": "openai"}, {"kind": "local"}, {"kind": "function"}, {"kind": "reward", "model": "x"},
        {"kind": "openai", "model": "x", "prompt": "fastchat"}, {"kind": "openai", "model": "x", "base_url": "nowhere"},
        {"kind": "openai", "model": "x", "base_url": "http://user:secret@here/v1"}, {"kind": "openai", "model": "x", "base_url": "http://[/"},
        {"kind": "openai", "model": "x", "api_key_env": "sk-123"}, {"kind": "function", "model": "nothere:judge"}, {"kind": "local", "model": "./hollow"},
        {"kind": "openai", "model": "x", "prompt": "fastchat", "prompts": "../nowhere.jsonl"}, {"kind": "openai", "model": "x", "prompt": "fastchat", "prompts": "cut.jsonl"},
        {"kind": "openai", "model": "x", "references": "binary.jsonl"}, {"kind": "openai", "model": "x", "references": "nested.jsonl"},
        {"kind": "openai", "model": "x", "retries": -1}, {"kind": "openai", "model": "x", "kindd": 1}, {"kind": "openai", "model": "x", "references": "hollow"},
        {"kind": "openai", "model": "x", "prompt": "fastchat", "prompts": "list.jsonl"}, {"kind": "openai", "model": "x", "references": "\0"},
    ])  # fmt: skip
    return at(data, "evaluate.judge", value)


NAMES = [
    "a/b",
    "..",
    ".",
    "",
    "../x",
    "/abs",
    "a\0b",
    "-x",
    "a b",
    "é",
    "x" * 65,
    "a\nb",
    "CON:",
    "~",
    "\x7f",
    "a\\b",
    "‮x",
    "x" * 100_000,
]


def bad_name(rng: random.Random, data: Data) -> Data:
    return {**data, "name": rng.choice(NAMES)}


def bad_policy_name(rng: random.Random, data: Data) -> Data:
    name = rng.choice([*NAMES, "soup", "base", "reward", "seed-0", "seed-77"])
    data.setdefault("policies", {})[name] = {"reference": "seed-0"}
    return data


def bad_prompts_name(rng: random.Random, data: Data) -> Data:
    data.setdefault("evaluate", {}).setdefault("prompts", {})[rng.choice(NAMES)] = "org/prompts"
    return data


def bad_path(rng: random.Random, data: Data) -> Data:
    path = rng.choice(["../nowhere.jsonl", "../../../../nowhere/x.jsonl", "./nowhere", "/nowhere/a", "~/nowhere.jsonl", "a/../../b/c", "~nobody/x.jsonl",
                       "nul\0.jsonl", "/etc/hostname", "x" * 5000 + ".jsonl", "/dev/null", "a b", "a--b/c", "a..b/c", "/proc/self/mem"])  # fmt: skip
    key = rng.choice(
        [
            "data.demonstrations",
            "data.preferences",
            "data.prompts",
            "evaluate.prompts.x",
            "model.base",
            "model.chat_template",
        ]
    )
    inside = {"path": path} if key.startswith(("data", "evaluate")) and rng.random() < 0.5 else path
    data.pop("lora", None)
    return at(data, key, inside)


def bad_file(rng: random.Random, data: Data) -> Data:
    name = rng.choice([name for name in FILES if name.endswith(("jsonl", "json", "parquet")) and name != "few.jsonl"])
    return at(data, rng.choice(["data.demonstrations", "data.preferences", "evaluate.prompts.x"]), name)


def few_rows(rng: random.Random, data: Data) -> Data:
    at(data, "sft.batch_size", 8)
    return at(
        at(data, "sft.micro_batch_size", None),
        "data.demonstrations",
        rng.choice(["few.jsonl", {"path": "few.jsonl", "limit": 2}]),
    )


def bad_evaluate(rng: random.Random, data: Data) -> Data:
    key, value = rng.choice([
        ("pairs", [["ppo"]]), ("pairs", [["ppo", "ppo"]]), ("pairs", [["ppo", "nobody"]]), ("pairs", [[1, 2]]), ("pairs", "ppo"), ("pairs", [[]]),
        ("models", ["nobody"]), ("models", [3]), ("models", [""]), ("models", ["./nowhere"]), ("temperature", "warm"), ("temperature", [1]),
        ("prompts", {"x": {"split": "a"}}), ("prompts", {"x": 3}), ("prompts", {"x": {"path": "org/x", "limit": 0}}), ("pairs", [["ppo", "x" * 10_000]]),
    ])  # fmt: skip
    return at(data, f"evaluate.{key}", value)


def bad_landscape(rng: random.Random, data: Data) -> Data:
    return at(data, "landscape", rng.choice([
        {"line": [0, 0]}, {"line": [0]}, {"line": [-1, 0]}, {"plane": [0, 1]}, {"prompts": "nobody"}, {"resolution": 0}, {"alphas": [0.5, "x"]}, {"line": "ab"},
        {"scales": [float("nan")]}, {"limit": -1}, {"lines": [0, 1]}, 3, [0, 1], {"line": [0, 1] * 1000},
    ]))  # fmt: skip


def bad_sweep(rng: random.Random, data: Data) -> Data:
    key, value = rng.choice([
        ("sweep", 3), ("sweep", [1]), ("sweep", {"alfa": {"values": [1]}}), ("sweep", {"alpha": 3}), ("sweep", {"alpha": {}}), ("sweep", {"alpha": {"values": []}}),
        ("sweep", {"alpha": {"values": ["x"]}}), ("sweep", {"alpha": {"values": [0.5, 0.5]}}), ("sweep", {"alpha": {"values": [0.5], "members": [0]}}),
        ("sweep", {"members": {"values": [0]}}), ("sweep", {"members": {"values": [1.5]}}), ("sweep", {"kl_coef": {"values": [-1]}}),
        ("sweep", {"alpha": {"values": [0.5], "kl_coef": [-1]}}), ("sweep", {"alpha": {"values": [float("inf")]}}), ("sweep", {"kl_coef": {"values": [1], "reference": 3}}),
        ("search", 3), ("search", {"kl_coef": [0.1, 0.1]}), ("search", {"kl_coef": [-1]}), ("search", {"kl_coef": [0.1], "methods": ["nobody"]}),
        ("search", {"kl_coef": [0.1], "by": "luck"}), ("search", {"kl_coef": [0.1], "against": "nobody"}), ("search", {"kl_coef": [0.1], "questions": ["nobody"]}),
        ("search", {}), ("search", {"kl_coef": "x"}), ("search", {"kl_coef": [float("nan")]}),
    ])  # fmt: skip
    return at(data, key, value)


def too_many(rng: random.Random, data: Data) -> Data:
    """A few hundred bytes, or ten thousand, that ask for millions of policies."""
    many = [n / 2000 for n in range(rng.choice([1200, 2000]))]
    value = rng.choice(
        [{"alpha": {"values": many, "kl_coef": many[1:]}}, {"scale": {"values": many, "kl_coef": many[1:]}}]
    )
    return at(data, "sweep", value)


def bad_soup(rng: random.Random, data: Data) -> Data:
    return at(data, "soup", rng.choice([
        {"weights": [0.5, 0.6]}, {"weights": [1]}, {"members": [0, 0]}, {"weights": [float("nan"), 1]}, {"strategy": "gredy"}, {"measure": "nope", "strategy": "greedy"},
        {"strategy": "learned", "measure": "reward"}, {"rank": -1}, {"members": [0.5]}, {"members": "all"}, {"members": [-1, 0]}, {"weights": ["a", "b"]},
    ]))  # fmt: skip


def bad_lora_section(rng: random.Random, data: Data) -> Data:
    return at(data, "lora", rng.choice([
        3, [1], "x", {"adapter": {"rank": 3}}, {"adapter": {"r": 0}}, {"adapter": {"r": "x"}}, {"adapter": {"lora_alpha": -1}}, {"ppo": {"learning_rate": "x"}},
        {"ppo": 3}, {"sft": None}, {"offload": "frozen"}, {"precision": "master"}, {"adapter": {"target_modules": 3}}, {"lora": {}}, {"adapter": None},
        {"adapter": {"use_rslora": 1}}, {"adapter": {"lora_dropout": 1}}, {"model": {"quantization": "int3"}},
    ]))  # fmt: skip


def bad_hub(rng: random.Random, data: Data) -> Data:
    return at(
        data,
        "hub",
        rng.choice(
            [{"push": ["nobody"]}, {"push": 3}, {"pushh": []}, 3, {"push": ["ppo"], "base_model": "a b"}, {"push": [3]}]
        ),
    )


def no_world(rng: random.Random, data: Data) -> Data:
    """Neither the embedded world nor what a recipe without it needs."""
    data.pop("toy", None)
    return at(data, rng.choice(["model.base", "model.chat_template", "data", "evaluate.prompts"]), None)


CHANGES: list[Callable[[random.Random, Data], Data]] = [
    wrong_type, wrong_section, typo, unknown_in_named, not_finite, negative, zero, out_of_range, batches, lengths, missing_seed, bad_reference,
    bad_reward, bad_judge, bad_name, bad_policy_name, bad_prompts_name, bad_path, bad_file, few_rows, bad_evaluate, bad_landscape, bad_sweep, too_many,
    bad_soup, bad_lora_section, bad_hub, no_world,
]  # fmt: skip


def several(rng: random.Random, data: Data) -> Data:
    """Two to five faults at once."""
    for change in rng.sample(
        [change for change in CHANGES if change not in (no_world, bad_lora_section, too_many)], rng.randint(2, 5)
    ):
        change(rng, data) if change is not bad_name else data.update(bad_name(rng, data))
    return data


# of the text


def alias_bomb(rng: random.Random, text: str) -> bytes:
    """A billion laughs, in one form of YAML or another."""
    depth, width = rng.randint(5, 30), rng.randint(2, 10)
    lines = ["a0: &a0 [lol, lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    merges = ["b0: &b0 {x: 1}"] + [
        f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * width)}]}}" for n in range(1, depth)
    ]
    loop = ["a: &a [*a]"]
    return (text + "\n".join(rng.choice([lines, merges, loop])) + "\n").encode()


def nested(rng: random.Random, text: str) -> bytes:
    depth = rng.choice([21, 100, 1000, 100_000])
    deep = rng.choice(["x: " + "[" * depth, "x: " + "{a: " * depth, "x: " + "[" * depth + "]" * depth, "x:\n" + "\n".join(" " * n + "- a:" for n in range(1, min(depth, 1000))),
                       "x: " + "- " * depth, "? " * depth, "x: !!seq " + "[" * depth])  # fmt: skip
    return (text + deep + "\n").encode()


def binary(rng: random.Random, text: str) -> bytes:
    raw = bytearray(text.encode())
    place = rng.randrange(len(raw))
    junk = rng.choice(
        [b"\xff", b"\x00", b"\xfe\xff", b"\xc3\x28", b"\x07", b"\x1b[31m", b"\xed\xa0\x80", rng.randbytes(40) + b"\xff"]
    )
    return rng.choice(
        [
            bytes(raw[:place]) + junk + bytes(raw[place:]),
            rng.randbytes(200) + b"\xff",
            b"\x1f\x8b" + rng.randbytes(80),
            b"\0" * 500,
            b"PK\x03\x04" + rng.randbytes(99),
        ]
    )


def huge_number(rng: random.Random, text: str) -> bytes:
    digits = rng.choice(
        [
            "1e400",
            "-1e400",
            "1" + "0" * 40,
            "9" * 500,
            "9" * 5000,
            "-" + "1" * 31,
            ".inf",
            "1" + "0" * 400 + ".5",
            "1e" + "9" * 400,
        ]
    )
    key = rng.choice(["threads: N", "generation: {temperature: N}", "ppo: {seed: N}", "sft: {seeds: [N]}", "description: N", "toy: {prompts: N}",
                      "policies: {x: {reference: N}}", "soup: {weights: [N, N]}", "N: 1"])  # fmt: skip
    name = key.partition(":")[0]
    kept = "".join(line + "\n" for line in _blocks(text) if not line.startswith(f"{name}:"))
    return (kept + key.replace("N", digits) + "\n").encode()


def _blocks(text: str) -> list[str]:
    """Top-level entries of a recipe, each with the lines that belong to it."""
    return [
        part for part in ("\n" + text).replace("\n ", "\1").split("\n") for part in [part.replace("\1", "\n ")] if part
    ]


def tag(rng: random.Random, text: str) -> bytes:
    command = f"touch {CANARY}"
    value = rng.choice([
        f'!!python/object/apply:os.system ["{command}"]', f'!!python/object/new:os.system ["{command}"]', f"!!python/object/apply:subprocess.check_output [[touch, {CANARY}]]",
        f"!!python/object/apply:builtins.eval [\"__import__('os').system('{command}')\"]", "!!python/name:os.system", "!!python/module:os", "!!binary aGFsbG8=",
        "!!timestamp 2001-01-01", "!!set {a, b}", "!local x", "!!float 1", "!!str 3", "!!omap [a: 1]", "!<tag:yaml.org,2002:python/tuple> [1]", "! 3",
    ])  # fmt: skip
    return (text + f"{rng.choice(['threads', 'x', 'description'])}: {value}\n").encode()


def twice(rng: random.Random, text: str) -> bytes:
    return (
        text
        + rng.choice(["name: again\n", "name: tiny\n", "x: {a: 1, a: 2}\n", "lora: {ppo: {seed: 1}, ppo: {seed: 1}}\n"])
    ).encode()


def documents(rng: random.Random, text: str) -> bytes:
    return rng.choice(
        [text + "---\n" + text, text + "...\n---\nname: b\n", "---\n" + text + "---\n", text + "--- 3\n"]
    ).encode()


def no_mapping(rng: random.Random, text: str) -> bytes:
    return rng.choice([b"", b"\n\n", b"# only a comment\n", b"---\n", b"- a\n- b\n", b"[1, 2]", b"just text\n", b"3\n", b"null\n", b"~", b"true\n", b'"text"', b"\xef\xbb\xbf",
                       b"[" + text.encode().replace(b"\n", b" ")])  # fmt: skip


def broken(rng: random.Random, text: str) -> bytes:
    """No YAML any more."""
    end = rng.choice(
        [
            "x: [",
            "x: {a: 1",
            'x: "open',
            "x: 'open",
            "x: a: b",
            "\tx: 1",
            "x: @a",
            "x: `a",
            "x: %a",
            "x: |a",
            "@x: 1",
            "x: [a: {]",
            ": :\n- x",
            "x: >9x",
            "&a",
            "x: *",
            "? [a]\n: b",
        ]
    )
    return (text + end + "\n").encode()


def odd_key(rng: random.Random, text: str) -> bytes:
    return (text + rng.choice(["1: a", "null: a", "true: a", "1.5: a", "[a]: b", "{a: b}: c", "~: 1", '"": 1', '"a\\nb": 1', '"\\0": 1', '"\\e[31m": 1', "<<: {x: 1}", "x" * 900 + ": 1",
                               '"\\u2028": 1', '"\\ud800": 1'])).encode() + b"\n"  # fmt: skip


def too_large(rng: random.Random, text: str) -> bytes:
    """A megabyte: of comment beyond it, or just below of things that no recipe has."""
    n = rng.choice([3000, 20_000])
    return (text + rng.choice([
        "#" * (yaml_text.MAX_BYTES + 1), "".join(f"k{i}: {i}\n" for i in range(n)), "x: [" + "1, " * (10 * n) + "1]\n", f"x: {'y' * (40 * n)}\n",
        "sft: {seeds: [" + ", ".join(["1"] * (10 * n)) + "]}\n" if "\nsft" not in text else "x: 1\n", "x: {" + ", ".join(f"p{i}: {{reference: base}}" for i in range(n)) + "}\n",
    ])).encode()  # fmt: skip


def many_policies(rng: random.Random, text: str) -> bytes:
    """As many as a megabyte has room for, or fewer, the last one bad."""
    n = rng.choice([500, 900, 900, 1500, 12_000])
    rows = "".join(f"  p{i}: {{reference: seed-0}}\n" for i in range(n)) + rng.choice(
        ["  last: {reference: seed-99}\n", "  last: {refrence: base}\n", "  la/st: {reference: base}\n"]
    )
    return ("name: many\ntoy: {}\npolicies:\n" + rows).encode()


TEXTS: list[Callable[[random.Random, str], bytes]] = [
    alias_bomb, nested, binary, huge_number, tag, twice, documents, no_mapping, broken, odd_key, too_large, many_policies,
]  # fmt: skip


# of the command


def overrides(rng: random.Random, text: str) -> tuple[str, ...]:
    """A good recipe, a bad --set."""
    return ("--lora", "--set", rng.choice([
        "a", "=1", "sft..x=1", ".=1", "name.x=1", "ppo.seed=[", "ppo.seed=*a", "ppo.seed=&a 1", "ppo.seed=!!python/object/apply:os.system [touch canary]", "x=1", "ppo.lr=1",
        "ppo.learning_rate=fast", "ppo.learning_rate=.nan", "ppo.learning_rate=-1", "ppo.seed=" + "9" * 500, "policies.a.reference=seed-99", "policies.a/b.reference=base",
        "policies...reference=base", "name=..", "name=a/b", "data.prompts=../nowhere.jsonl", "sft.seeds=[1,1]", "sft=null", "ppo=" + "[" * 50, "evaluate.judge=opanai", "lora.ppo.seed=1",
        "policies.a.reference." + "x." * 500 + "x=1", "ppo.batch_size=127", "x" * 3000 + "=1", "evaluate.prompts.x=" + "y" * 3000, "name=\udcff", "name=", "sweep.alpha.values=[2,2]",
        "threads=1e400", "soup.weights=[0.5,0.6]", "policies=3", "=", "", "ppo.seed=1\n---\n2", "adapter.rank=1", "adapter.r=0", "reward=3", "reward=nothere:f", "model.base=./nowhere",
    ]))  # fmt: skip


def presets(rng: random.Random, text: str) -> tuple[str, ...]:
    """Unknown presets, stages, forced units, cards; more recipes than one; folders that are files."""
    return rng.choice([
        ("--lora", "qlroa"), ("--lora=nothing",), ("--lora", "../adapters/lora"), ("--lora=",), ("--lora", "--stages", "rewrd"), ("--lora", "--stages=ppo"), ("--lora", "--force", "nobody"),
        ("--lora", "--gpu", "24"), ("--lora", "--dry-run", "--gpu", "x"), ("--lora", "--dry-run", "--gpu", "1e400"), ("--lora", "--dry-run", "--gpu=-1"), ("--lora", "--nothing"),
        ("--lora", "another.yaml", "third.yaml"), ("--lora", "--output-dir", "few.jsonl"), ("--lora", "--output-dir", "few.jsonl/x"), ("--lora", "--set"), ("--lora", "--output-dir"),
        ("--set", "adapter.r=8"), ("--set", "soup.rank=4"), ("--set", "model.quantization=nf4"), ("--set", "ppo.value=adapter"), ("--lora", "--set", "model.quantization=nf4"),
        ("--lora", "--output-dir", "/proc/nothing/x"), ("--lora", "--output-dir", "/dev/null/x"),
    ])  # fmt: skip


WORDS: list[Callable[[random.Random, str], tuple[str, ...]]] = [overrides, presets]
ALL = [change.__name__ for change in [*CHANGES, several, *TEXTS, *WORDS]]


def draw(count: int) -> list[Bad]:
    """So many, every kind in its turn, always the same ones."""
    rng, bases = random.Random(0), good()
    parsed = {name: yaml_text.parse_yaml(text, name) for name, text in bases.items()}
    names, found = list(bases), []
    for number in range(count):
        kind, name = ALL[number % len(ALL)], rng.choice(names)
        words: tuple[str, ...] = rng.choice([("--lora",), ("--lora", "--dry-run"), ("--dry-run", "--lora", "lora")])
        text = bases[name]
        make: Any = globals()[kind]
        if make in WORDS:
            content, words = text.encode(), make(rng, text)
        elif make in TEXTS:
            content = make(rng, text)
            words = rng.choice([words, ()])
        else:
            data = make(rng, copy.deepcopy(parsed[name]))
            content = yaml_text.dump_yaml(data).encode("utf-8", "surrogatepass")
        found.append(Bad(kind, content, words))
    return found


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file and folder, with the size of the files."""
    return sorted(
        (str(path.relative_to(folder)), path.stat().st_size if path.is_file() else -1) for path in folder.rglob("*")
    )


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.system", "os.exec", "os.posix_spawn",
            "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")  # fmt: skip
seen: list[str] = []
"""What the command has written, removed or started, or None while nobody looks."""
watching = [False]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: whatever is opened for writing, made, moved or started, anywhere."""
    if watching[0] and (
        event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
    ):
        seen.append(f"{event} {arguments[0]!r:.200}")


def wrong(bad: Bad, folder: Path, before: list[tuple[str, int]]) -> tuple[str | None, float]:
    """What the command did that it may not, or None; and its seconds of CPU."""
    (folder / "bad.yaml").write_bytes(bad.content)
    out, err = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    seen.clear()
    start = time.process_time()
    try:
        with mock.patch.object(sys, "stdout", out), mock.patch.object(sys, "stderr", err):
            watching[0] = True
            code: Any = salsa_run(["bad.yaml", *bad.words])
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = repr(error)[:300]
    watching[0] = False
    seconds = time.process_time() - start
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    lines = said.removesuffix("\n").split("\n")
    (folder / "bad.yaml").unlink()
    for fault, why in (
        (code != 2, f"its code was {code}"),
        (not all(map(str.strip, lines)) or not said.endswith("\n"), "it said nothing, or an empty line"),
        (not all(map(str.isprintable, lines)), "a line is not printable"),
        (max(map(len, lines)) > LONGEST, f"its longest line has {max(map(len, lines))} characters"),
        (len(lines) > MOST + 1, f"it said {len(lines)} lines"),
        ("Traceback" in said, "a trace"),
        (out.getvalue() != "", "it said something on standard output"),
        (seconds > SECONDS, f"it took {seconds:.1f} s"),
        (bool(seen), f"it changed something: {', '.join(seen[:3])}"),
        (listing(folder) != before, "it left something"),
        ("torch" in sys.modules, "torch was imported"),
    ):
        if fault:
            return f"{why}: {said[:300]}", seconds
    return None, seconds


def run_all(folder: Path, count: int) -> None:
    """Every recipe by `main` in this process."""
    work = folder / "work"
    for name, content in FILES.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    os.chdir(work)
    before = listing(work)
    sys.addaudithook(watch)
    results = []
    with mock.patch.object(recipe, "execute", side_effect=AssertionError("it began to run")):
        for number, bad in enumerate(draw(count)):
            why, seconds = wrong(bad, work, before)
            if why is not None:
                (folder / f"failed-{number}.yaml").write_bytes(bad.content)
                for left in {name.split("/")[0] for name, _ in listing(work)} - {
                    name.split("/")[0] for name, _ in before
                }:
                    shutil.rmtree(work / left, ignore_errors=True)
            results.append(
                {
                    "number": number,
                    "kind": bad.kind,
                    "words": [word[:200] for word in bad.words],
                    "why": why,
                    "seconds": seconds,
                }
            )
    (folder / "results.json").write_text(json.dumps({"results": results, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]).resolve(), int(sys.argv[2]))

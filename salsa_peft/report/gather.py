"""A finished run's folders → what the report is told; which runs are one recipe with other training seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa_peft.config.job import policy_id
from salsa_peft.config.schema import Recipe
from salsa_peft.data.questions import TEMPERATURES
from salsa_peft.evaluation import comparisons
from salsa_peft.utils import manifests as runs
from salsa_peft.utils.files import read_json_lines
from salsa_peft.utils.fingerprints import FINGERPRINT

COSTS = ("key", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb")
MODES = {"full": "full weights", "lora": "LoRA", "qlora": "QLoRA"}
"""What the report calls them."""
NOT_THE_RECIPE = ("name", "description", "threads", "report_to", "landscape", "num_processes", "accelerate")
"""Sections that two replicates may differ in: they change no policy and no answer."""


@dataclass(frozen=True)
class PolicyReport:
    """One policy's training."""

    reference: str
    """In words: "seed-0", "soup", "shrunk: base + 0.6 · seed-0", "seed-0, seed-1", "base"."""
    kl_coef: float
    """β at the start."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    completions: list[dict[str, Any]]
    """Rows of completions.jsonl; the first and the last are shown."""
    algorithm: str = "ppo"
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage of one of TRL's algorithms measured; {} of ppo."""


@dataclass(frozen=True)
class ReportInput:
    """All that the report knows; {} , [] or None where the run has no such stage."""

    name: str
    recipe_yaml: str
    mode: str
    base: str
    versions: dict[str, str]
    units: list[dict[str, Any]]
    """{"unit", "key", "inputs", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb"}; inputs: ids of units; numbers may be None."""
    seeds: dict[str, dict[str, Any]]
    reward: dict[str, Any]
    soup: dict[str, Any]
    policies: dict[str, PolicyReport]
    landscape: dict[str, Any] | None
    evaluation: dict[str, Any]
    """evaluation.json, each set's `pairs` (comparisons.pairs) and what a `search` picked in it."""
    answers: list[dict[str, Any]]
    """The rows of answers.jsonl."""
    verdicts: dict[str, Any] | None = None
    """verdicts.json; None without a judge."""
    judgments: list[dict[str, Any]] = field(default_factory=list)
    """The rows of judgments.jsonl."""
    fingerprint: str | None = None
    """Of the base's files."""
    replicate_of: str = ""
    """The same for runs that differ in their training seeds alone."""
    training_seeds: str = ""
    """What they differ in, in words."""
    temperature: str = "1"
    """Of the answers, in words."""
    samples: int = 20
    """Questions of each set that are shown: its first ones, whatever came of them."""
    limit: int | None = None
    """Tokens of an answer at most: one as long was cut. None: not known."""


def gather(recipe: Recipe, inputs: Mapping[str, Path], recipe_yaml: str) -> ReportInput:
    """Everything that a run's finished folders hold. inputs: unit id → its folder."""

    def in_stage(stage: str) -> dict[str, Path]:
        return {unit.rsplit("/", 1)[-1]: folder for unit, folder in inputs.items() if unit.split("/")[0] == stage}

    manifests = {unit: _json(folder / runs.MANIFEST) for unit, folder in inputs.items()}
    landscape, evaluation, judge = inputs.get("landscape"), inputs["evaluate"], inputs.get("judge")
    base = recipe.model.base or "the embedded world's"
    same, seeds = identity(recipe)
    answers = read_json_lines(evaluation / "answers.jsonl")
    verdicts = _json(judge / "verdicts.json") if judge else None
    return ReportInput(
        name=recipe.name,
        recipe_yaml=recipe_yaml,
        mode=MODES[recipe.mode],
        base=Path(base).name if Path(base).is_dir() else base,
        versions=runs.versions(),
        units=[
            {"unit": unit, "inputs": list(m.get("inputs", {})), **{name: m.get(name) for name in COSTS}}
            for unit, m in manifests.items()
        ],
        seeds={name: _json(folder / "metrics.json") for name, folder in in_stage("sft").items()},
        reward=_reward(recipe, inputs),
        soup=soup_rows(_json(inputs["soup"] / "soup.json")),
        policies={
            name: _policy(inputs[policy_id(recipe, name)])
            for name in recipe.policies
            if policy_id(recipe, name) in inputs
        },
        landscape=_json(landscape / "landscape.json") if landscape else None,
        evaluation=_compared(recipe, _json(evaluation / "evaluation.json"), answers, verdicts),
        answers=answers,
        verdicts=verdicts,
        judgments=read_json_lines(judge / "judgments.jsonl") if judge else [],
        fingerprint=_fingerprint(inputs["soup"]),
        replicate_of=same,
        training_seeds=seeds,
        temperature=_temperature(recipe, answers),
        samples=recipe.evaluate.samples,
        limit=recipe.generation.max_new_tokens,
    )


def _compared(
    recipe: Recipe, evaluation: dict[str, Any], answers: list[dict[str, Any]], verdicts: dict[str, Any] | None
) -> dict[str, Any]:
    """The recipe's pairs by every measure, from the answers."""
    given = comparisons.by_set(answers)
    found = comparisons.searched(recipe, given) or (verdicts or {}).get("search")
    pairs, measures = comparisons.wanted(recipe, found), evaluation["measures"]
    datasets = {
        name: {**data, "pairs": comparisons.pairs(given[name], pairs, measures)}
        for name, data in evaluation["datasets"].items()
    }
    return {**evaluation, "datasets": datasets, "search": found}


def _temperature(recipe: Recipe, answers: list[dict[str, Any]]) -> str:
    """evaluate.temperature, as it was met."""
    chosen, otherwise = recipe.evaluate.temperature, recipe.generation.temperature
    if chosen != "category":
        return f"{chosen:g}"
    by_category = any(row["category"] in TEMPERATURES for row in answers)
    return f"{otherwise:g}" + (", MT-Bench’s categories at FastChat’s" if by_category else "")


def identity(recipe: Recipe) -> tuple[str, str]:
    """A recipe → its id without training seeds, and those seeds in words. Runs of one id are replicates of one another."""
    parts = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in NOT_THE_RECIPE}
    seeds = {
        "sft": parts["sft"].pop("seeds"),
        "reward": parts["reward"].pop("seeds"),
        "ppo": [parts["ppo"].pop("seed")],
    }
    parts["evaluate"].pop("samples")
    parts["counts"] = [len(of) for of in seeds.values()]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12], "; ".join(
        f"{name} {', '.join(map(str, of))}" for name, of in seeds.items()
    )


def _policy(folder: Path) -> PolicyReport:
    facts = _json(folder / "policy.json")
    reference, beta, algorithm = facts["reference"], facts["kl_coef"]["start"], facts.get("algorithm", "ppo")
    if algorithm != "ppo":
        told = {name: value for name, value in facts.items() if name not in ("algorithm", "reference", "kl_coef")}
        return PolicyReport(reference, beta, [], [], algorithm, told)
    rows, completions = (read_json_lines(folder / f"{name}.jsonl") for name in ("metrics", "completions"))
    return PolicyReport(reference, beta, rows, completions)


def soup_rows(soup: dict[str, Any]) -> dict[str, Any]:
    """soup.json → what the report's table says of it."""

    def norm(row: dict[str, Any]) -> str:
        return "" if row["norm"] is None else f", norm of delta {row['norm']:.4g}"

    adapters = "ranks" in soup
    members = {
        m["name"]: f"weight {m['weight']:g}" + (f", rank {m['ranks']}" if adapters else "") + norm(m)
        for m in soup["members"]
    }
    pairs = {
        f"{p['a']} – {p['b']}": f"distance {p['distance']:.4g}"
        + ("" if p["cosine"] is None else f", cosine {p['cosine']:.4f}")
        for p in soup["pairs"]
    }
    size = f"{soup['modules']} modules, rank {soup['ranks']}" if adapters else f"{soup['parameters']:,} parameters"
    return {**members, **pairs, "soup": f"{soup['strategy']}, {size}{norm(soup)}"}


def _reward(recipe: Recipe, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What the reward is made of, unless it is the adapter alone, and what the reward stage measured, where there was one."""
    parts = recipe.reward.parts
    alone = recipe.reward.trained and len(parts) == 1 and parts[0].weight == 1
    told = {} if alone else {part.name: f"{part.weight:g} · {part.kind} {place(part.value)}" for part in parts}
    return {**told, **(_json(inputs["reward"] / "metrics.json") if "reward" in inputs else {})}


def place(value: str) -> str:
    """A path's last part: the report may be shown to others."""
    return Path(value).name if Path(value).is_absolute() else value


def _fingerprint(soup: Path) -> str | None:
    """Of the base that the seeds were trained on, where the soup's folder says it."""
    path = soup / FINGERPRINT
    found: dict[str, str] = _json(path) if path.exists() else {}
    return found.get("base")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""The evaluate stage: responses of seed-0, soup and every policy on held-out prompts, scored and compared pair by pair."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from . import adapters, data
from .config import Evaluate, Recipe, parse_reference
from .generation import respond
from .landscape import measures
from .progress import bar
from .references import attach_reference, mixture, move_to
from .rewards import Reward, decode
from .rollout import Responses
from .runs import Job, write_atomic
from .statistics import compare, mean_interval, paired_difference
from .workbench import Workbench, fitting, seeds_of

Answers = list[dict[str, Any]]


def model_names(recipe: Recipe) -> list[str]:
    """Everything that answers: seed-0, soup, what evaluate.models adds, every policy."""
    return list(dict.fromkeys(["seed-0", "soup", *recipe.evaluate.models, *recipe.policies]))


def pairs(section: Evaluate, policies: list[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: as given, else soup and every policy against seed-0, and every later policy against each
    earlier one."""
    if section.pairs:
        return [(a, b) for a, b in section.pairs]
    return [(name, "seed-0") for name in ["soup", *policies]] + [(b, a) for a, b in itertools.combinations(policies, 2)]


def attach(model: PeftModel, name: str, recipe: Recipe, inputs: Mapping[str, Path]) -> str | None:
    """The adapter that answers as `name`: a policy, or what a reference of that name is."""
    if name in recipe.policies:
        adapters.attach(model, inputs[f"ppo/{name}"], f"model-{len(model.peft_config)}")
        return list(model.peft_config)[-1]
    (reference,) = parse_reference("evaluate.models", name)
    adapter = f"model-{len(model.peft_config)}"
    return attach_reference(model, reference, seeds_of(inputs), inputs.get("soup"), adapter).adapter


def cast(job: Job, bench: Workbench) -> tuple[nn.Module, dict[str, Callable[[], str | None]]]:
    """One model, and for each name that answers what gives it the name's weights: → the adapter to activate, already on the base;
    full weights are read into the model (→ None)."""
    recipe, inputs = job.recipe, job.inputs
    if recipe.adapter is not None:
        shared = adapters.attach(bench.base(), seeds_of(inputs)[0], "start")
        attached = {name: attach(shared, name, recipe, inputs) for name in model_names(recipe)}
        return shared, {name: functools.partial(lambda adapter: adapter, adapter) for name, adapter in attached.items()}
    model = bench.base()

    def read(name: str) -> None:
        if name in recipe.policies:
            return move_to(model, [inputs[f"ppo/{name}"]], [1.0])
        (reference,) = parse_reference("evaluate.models", name)
        return move_to(model, *mixture(bench, reference, inputs))

    return model, {name: functools.partial(read, name) for name in model_names(recipe)}


def answer(model: nn.Module, adapter: str | None, rows: list[dict[str, Any]], rewards: Mapping[str, Reward],
           bench: Workbench, seed: int) -> Answers:  # fmt: skip
    """One response to every prompt, in the prompts' order, with its scores and its length; from `adapter`, or the model's full weights."""
    generation, tokenizer = bench.recipe.generation, bench.tokenizer
    tokens = [data.prompt_tokens(row, tokenizer, number) for number, row in enumerate(rows, 1)]
    answers: Answers = [{} for _ in rows]
    with adapters.active(model, adapter):
        for indices, responses in respond(model, tokens, generation, tokenizer, seed, generation.batch_size):
            asked = [rows[row] for row in indices]
            scores = {name: reward(responses, asked).tolist() for name, reward in rewards.items()}
            for place, row in enumerate(indices):
                answers[row] = _answer(
                    responses, place, {name: values[place] for name, values in scores.items()}, tokenizer
                )
                answers[row] |= {"index": row, "prompt": data.show(rows[row]["prompt"])}
    return answers


def _answer(responses: Responses, place: int, scores: dict[str, float], tokenizer: Any) -> dict[str, Any]:
    ids, mask = responses.response_ids[place : place + 1], responses.response_mask[place : place + 1]
    length, empty = int(responses.lengths[place]), bool(responses.empty[place])
    return {"response": decode(tokenizer, ids, mask)[0], "scores": scores, "length": length, "empty": empty}


def summarize(answers: Mapping[str, Answers], compared: list[tuple[str, str]], names: list[str]) -> dict[str, Any]:
    """One set of prompts: each model's means with intervals, each pair's verdicts by every measure."""

    def scores(model: str, measure: str) -> list[float]:
        return [row["scores"][measure] for row in answers[model]]

    models = {
        model: {
            "scores": {measure: asdict(mean_interval(scores(model, measure))) for measure in names},
            "response_length": asdict(mean_interval([row["length"] for row in rows])),
            "empty_share": sum(row["empty"] for row in rows) / len(rows),
        }
        for model, rows in answers.items()
    }
    verdicts = []
    for (a, b), measure in itertools.product(compared, names):
        x, y = scores(a, measure), scores(b, measure)
        difference = asdict(paired_difference(x, y))
        verdicts.append({"a": a, "b": b, "measure": measure, **asdict(compare(x, y)), "difference": difference})
    return {"n": len(next(iter(answers.values()))), "models": models, "pairs": verdicts}


def run(job: Job) -> dict[str, Any]:
    """Write evaluation.json and answers.jsonl."""
    recipe, section = job.recipe, job.recipe.evaluate
    bench = Workbench.of(job)
    # 1. one model for everything that answers
    others = [name for name in model_names(recipe) if name not in recipe.policies]
    bench.check(job.inputs, [reference for name in others for reference in parse_reference("evaluate.models", name)])
    model, answering = cast(job, bench)
    rewards = measures(job, model, bench)
    # 2. every model answers every set of prompts
    sources, columns = data.evaluation_sources(recipe, job.inputs.get("toy")), recipe.reward.reads_columns
    sets = {name: fitting(job, bench, data.prompts(source, columns=columns)) for name, source in sources.items()}
    answers: dict[str, dict[str, Answers]] = {dataset: {} for dataset in sets}
    with bar(len(sets) * len(answering), job.unit.id) as update:
        for name, take in answering.items():
            adapter = take()
            for dataset, rows in sets.items():
                answers[dataset][name] = answer(model, adapter, rows, rewards, bench, section.seed)
                update(1)
    # 3. means, wins, losses, ties
    compared = pairs(section, list(recipe.policies))
    summary = {dataset: summarize(found, compared, list(rewards)) for dataset, found in answers.items()}
    lines = [
        json.dumps({"dataset": dataset, "model": name, **row}, ensure_ascii=False) + "\n"
        for dataset, found in answers.items()
        for name, rows in found.items()
        for row in rows
    ]
    result = {
        "measures": list(rewards),
        "models": list(answering),
        "temperature": recipe.generation.temperature,
        "datasets": summary,
    }
    write_atomic(job.folder / "answers.jsonl", "".join(lines))
    write_atomic(job.folder / "evaluation.json", json.dumps(result, indent=2))
    return {name: len(rows) for name, rows in sets.items()}

"""The evaluate stage: answers of seed-0, soup and every policy to held-out questions, scored.

Answers are on the disk a batch at a time: a stage that was killed goes on with what is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from salsa_peft.config.job import Job, policy_id
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import Recipe
from salsa_peft.data import datasets
from salsa_peft.data.questions import Question, questions
from salsa_peft.evaluation import fastchat
from salsa_peft.evaluation.answers import Rows, answer, fitting_questions
from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.evaluation.landscape import measures
from salsa_peft.models.adapters import lora
from salsa_peft.models.stage_context import StageContext, seed_folders
from salsa_peft.training.references import attach_reference, checkpoint_sum, load_checkpoint_sum
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.statistics import mean_interval

PARTIAL = "partial"
"""Folder of answers on the way, a file a model and set."""


def model_names(recipe: Recipe) -> list[str]:
    """Everything that answers: seed-0, soup, what evaluate.models adds, every policy."""
    return list(dict.fromkeys(["seed-0", "soup", *recipe.evaluate.models, *recipe.policies]))


def attach(model: PeftModel, name: str, recipe: Recipe, inputs: Mapping[str, Path]) -> str | None:
    """The adapter that answers as `name`: a policy, or what a reference of that name is."""
    if name in recipe.policies:
        lora.attach(model, inputs[policy_id(recipe, name)], f"model-{len(model.peft_config)}")
        return list(model.peft_config)[-1]
    (reference,) = parse_reference("evaluate.models", name)
    adapter = f"model-{len(model.peft_config)}"
    return attach_reference(model, reference, seed_folders(inputs), inputs.get("soup"), adapter).adapter


def cast(job: Job, context: StageContext) -> tuple[nn.Module, dict[str, Callable[[], str | None]]]:
    """One model, and for each name that answers what gives it the name's weights: → the adapter to activate, already on the base;
    full weights are read into the model (→ None)."""
    recipe, inputs = job.recipe, job.inputs
    if recipe.adapter is not None:
        shared = lora.attach(context.load_base(), seed_folders(inputs)[0], "start")
        attached = {name: attach(shared, name, recipe, inputs) for name in model_names(recipe)}
        return shared, {name: functools.partial(lambda adapter: adapter, adapter) for name, adapter in attached.items()}
    model = context.load_base()

    def read(name: str) -> None:
        if name in recipe.policies:
            return load_checkpoint_sum(model, [inputs[policy_id(recipe, name)]], [1.0])
        (reference,) = parse_reference("evaluate.models", name)
        return load_checkpoint_sum(model, *checkpoint_sum(context, reference, inputs))

    return model, {name: functools.partial(read, name) for name in model_names(recipe)}


def summarize(answers: Mapping[str, Rows], names: list[str]) -> dict[str, Any]:
    """One set of questions: each model's means with intervals, over all turns, clustered by question. Pairs: evaluation/comparisons.py."""
    rows = next(iter(answers.values()))
    of = clusters(rows)
    models = {
        model: {
            "scores": {name: asdict(mean_interval([row["scores"][name] for row in found], of)) for name in names},
            "response_length": asdict(mean_interval([row["length"] for row in found], of)),
            "empty_share": sum(row["empty"] for row in found) / len(found),
        }
        for model, found in answers.items()
    }
    turns = max(row["turn"] for row in rows)
    return {"n": len({row["index"] for row in rows}), "turns": turns, "models": models}


def read_partial(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(index, turn) → row, of answers on the way; lines that are not as they were written are left out, and their number is said."""
    found = {}
    lines = [line for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    whole = [row for digest, _, row in (line.partition(b" ") for line in lines) if digest == _digest(row)]
    if len(whole) < len(lines):  # torn by a kill, or damaged: of such a line nothing is known
        told = f"{path}: {len(lines) - len(whole)} of {len(lines)} lines are not whole; what they answered is answered again"
        print(told, file=sys.stderr, flush=True)
    for row in map(json.loads, whole):
        found[row["index"], row["turn"]] = row
    return found


def keep(path: Path, rows: Rows) -> None:
    """Append a batch, so that it outlives a kill, each row after its digest; on a line of its own, whatever a torn one left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row).encode() for row in rows]
    with path.open("ab") as file:
        file.write(b"\n" + b"".join(_digest(line) + b" " + line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


def ask(
    job: Job, context: StageContext, sets: Mapping[str, list[Question]]
) -> tuple[dict[str, dict[str, Rows]], list[str]]:
    """Set of questions → model → its answers, and the names of the measures."""
    recipe = job.recipe
    # 1. one model for everything that answers
    others = [name for name in model_names(recipe) if name not in recipe.policies]
    context.check(job.inputs, [reference for name in others for reference in parse_reference("evaluate.models", name)])
    model, answering = cast(job, context)
    rewards = measures(job, model, context)
    # 2. every model answers every set of questions
    answers: dict[str, dict[str, Rows]] = {dataset: {} for dataset in sets}
    turns = sum(len(question.turns) for questions in sets.values() for question in questions)
    with progress_bar(turns * len(answering), job.unit.id) as bar:
        for number, (name, take) in enumerate(answering.items()):
            paths = {dataset: job.folder / PARTIAL / dataset / f"{number}.jsonl" for dataset in sets}
            known = {dataset: read_partial(path) for dataset, path in paths.items()}
            bar.set_postfix(model=name, refresh=False)
            bar.update(sum(map(len, known.values())))
            adapter = take()
            for dataset, questions in sets.items():

                def kept(rows: Rows, path: Path = paths[dataset]) -> None:
                    keep(path, rows)
                    bar.update(len(rows))

                answers[dataset][name] = answer(
                    model, adapter, questions, rewards, context, recipe.evaluate.seed, known[dataset], kept
                )
    return answers, list(rewards)


def run(job: Job) -> dict[str, Any]:
    """Write evaluation.json, questions.jsonl, answers.jsonl and FastChat's files."""
    recipe, context = job.recipe, StageContext.of_job(job)
    sources, columns = datasets.evaluation_sources(recipe, job.inputs.get("toy")), recipe.reward.reads_columns
    sets = {
        name: fitting_questions(job, context, questions(source, columns=columns, tokenizer=context.tokenizer))
        for name, source in sources.items()
    }
    answers, measured = ask(job, context, sets)
    # 3. means
    result = {
        "measures": measured,
        "models": model_names(recipe),
        "temperature": recipe.generation.temperature,
        "datasets": {dataset: summarize(given, measured) for dataset, given in answers.items()},
    }
    for dataset, given in answers.items():
        fastchat.write_answers(job.folder / "data" / dataset, sets[dataset], given)
    asked = (
        {"dataset": name, "index": index, **_shown(one)} for name, of in sets.items() for index, one in enumerate(of)
    )
    said = (
        {"dataset": name, "model": model, **row}
        for name, given in answers.items()
        for model, rows in given.items()
        for row in rows
    )
    write_atomic(job.folder / "questions.jsonl", fastchat.lines(asked))
    write_atomic(job.folder / "answers.jsonl", fastchat.lines(said))
    write_atomic(job.folder / "evaluation.json", json.dumps(result, indent=2))
    return {name: len(of) for name, of in sets.items()}


def _shown(one: Question) -> dict[str, Any]:
    return {
        "question_id": one.id,
        "category": one.category,
        "messages": one.messages,
        "turns": list(one.turns),
        "reference": one.reference,
    }

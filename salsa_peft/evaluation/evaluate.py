"""The evaluate stage: seed-0, soup and policies answer held-out questions, and the answers are scored.

Answers are saved batch by batch: if the stage is killed, the next run generates only the missing answers.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.config.references import Reference, parse_reference
from salsa_peft.config.schema import Recipe
from salsa_peft.data import datasets
from salsa_peft.data.chat.turn_ends import stop_token_ids
from salsa_peft.data.questions import Question, questions
from salsa_peft.evaluation import fastchat
from salsa_peft.evaluation.answers import Rows, answer, fitting_questions
from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.evaluation.landscape import PARTIAL, measures
from salsa_peft.models.adapters import lora
from salsa_peft.models.rewards.divergence import LogRatio
from salsa_peft.models.stage_context import StageContext, result_folders
from salsa_peft.training.references import attach_reference, load_reference
from salsa_peft.utils.console import progress_bar, say
from salsa_peft.utils.files import append_checked_lines, read_checked_lines, write_atomic
from salsa_peft.utils.statistics import mean_interval

START = "start"
"""Name of the adapter of seed-0 on the shared model."""


def model_names(recipe: Recipe) -> list[str]:
    """Names of the evaluated models: seed-0, all soups, evaluate.models, evaluate.controls, and every policy."""
    section = recipe.evaluate
    return list(dict.fromkeys(["seed-0", "soup", *recipe.soups, *section.models, *section.controls, *recipe.policies]))


def reference_of(recipe: Recipe, name: str) -> Reference:
    """The reference that an evaluated model stands for."""
    controls = recipe.evaluate.controls
    (reference,) = parse_reference("evaluate.controls" if name in controls else "evaluate.models", controls.get(name, name))  # fmt: skip
    return reference


def attach(model: PeftModel, name: str, recipe: Recipe, inputs: Mapping[str, Path]) -> str | None:
    """Attach the model called `name`; returns the adapter's name, or None for the base."""
    adapter = f"model-{len(model.peft_config)}"
    return attach_reference(model, reference_of(recipe, name), result_folders(inputs), adapter).adapter


def adapter_loaders(job: Job, context: StageContext) -> tuple[nn.Module, dict[str, Callable[[], str | None]]]:
    """Return one model that serves all evaluated names, and per name a function that prepares the model.

    With adapters, all are attached here, and the function returns the name of the adapter to activate (None: the base).
    With full weights, the function reads the weights of that name into the model and returns None.
    """
    recipe, inputs, names = job.recipe, job.inputs, model_names(job.recipe)
    if recipe.adapter is not None:
        shared = lora.attach(context.load_base(), inputs["sft/seed-0"], START)
        adapters = {name: attach(shared, name, recipe, inputs) for name in names}
        return shared, {name: functools.partial(adapters.get, name) for name in names}
    model = context.load_base()

    def load(name: str) -> None:
        load_reference(model, reference_of(recipe, name), context, inputs)

    return model, {name: functools.partial(load, name) for name in names}


KL = "kl"
"""Score of an answer whose mean is the KL from seed-0, in a recipe with `warp`; no measure by which models are compared."""


def measures_kl(recipe: Recipe) -> bool:
    """Whether the KL of every model from seed-0 is measured: for WARP with adapters, which share one base."""
    return recipe.warp is not None and recipe.adapter is not None


def log_ratio(model: Any, context: StageContext) -> LogRatio:
    """The score KL, of a model with the adapter "start", which is seed-0."""
    generation = context.recipe.generation
    return LogRatio(
        model,
        START,
        temperature=generation.temperature,
        ends=tuple(stop_token_ids(context.tokenizer)),
        min_new_tokens=generation.min_new_tokens,
        rows=generation.batch_size,
    )


def summarize(answers: Mapping[str, Rows], names: list[str]) -> dict[str, Any]:
    """Means of each model's scores and response lengths on one set of questions, with intervals.

    answers: model → its rows. names: names of the measures; a mean is over the answers to which a measure applies.
    """
    rows = next(iter(answers.values()))
    of = clusters(rows)

    def mean_score(name: str, found: Rows) -> dict[str, Any]:
        return asdict(mean_interval([row["scores"][name] for row in found], clusters(found)))

    scored = {
        model: {name: [row for row in found if name in row["scores"]] for name in names}
        for model, found in answers.items()
    }
    models = {
        model: {
            "scores": {name: mean_score(name, kept) for name, kept in scored[model].items() if kept},
            "response_length": asdict(mean_interval([row["length"] for row in found], of)),
            "empty_share": sum(row["empty"] for row in found) / len(found),
        }
        for model, found in answers.items()
    }
    turns = max(row["turn"] for row in rows)
    return {"n": len({row["index"] for row in rows}), "turns": turns, "models": models}


def read_partial(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Read the answers generated so far as (index, turn) → row; damaged lines are left out and reported."""
    rows, damaged = read_checked_lines(path)
    if damaged is not None:
        say(f"{damaged}; their answers are generated again")
    return {(row["index"], row["turn"]): row for row in rows}


def answer_all(
    job: Job, context: StageContext, sets: Mapping[str, list[Question]]
) -> tuple[dict[str, dict[str, Rows]], list[str]]:
    """Generate all answers; returns set of questions → model → rows, and the names of the measures."""
    recipe = job.recipe
    # 1. one model, on which each name's adapter or weights are activated in turn
    context.check(job.inputs, [reference_of(recipe, name) for name in model_names(recipe)])
    model, loaders = adapter_loaders(job, context)
    rewards = measures(job, model, context)
    scored = {**rewards, KL: log_ratio(model, context)} if measures_kl(recipe) else rewards
    # 2. every model answers every set of questions
    answers: dict[str, dict[str, Rows]] = {dataset: {} for dataset in sets}
    turns = sum(len(question.turns) for questions in sets.values() for question in questions)
    with progress_bar(turns * len(loaders), job.unit.id) as bar:
        for number, (name, load) in enumerate(loaders.items()):
            paths = {dataset: job.folder / PARTIAL / dataset / f"{number}.jsonl" for dataset in sets}
            known = {dataset: read_partial(path) for dataset, path in paths.items()}
            bar.set_postfix(model=name, refresh=False)
            bar.update(sum(map(len, known.values())))
            adapter = load()
            for dataset, questions in sets.items():

                def keep(rows: Rows, path: Path = paths[dataset]) -> None:
                    append_checked_lines(path, rows)
                    bar.update(len(rows))

                answers[dataset][name] = answer(
                    model, adapter, questions, scored, context, recipe.evaluate.seed, known[dataset], keep
                )
    return answers, list(rewards)


def run(job: Job) -> dict[str, Any]:
    """Run the stage: write evaluation.json, questions.jsonl, answers.jsonl and the files for FastChat."""
    recipe, context = job.recipe, StageContext.of_job(job)
    sources, columns = datasets.evaluation_sources(recipe, job.inputs.get("toy")), recipe.reward.reads_columns
    sets = {
        name: fitting_questions(job, context, questions(source, columns=columns, tokenizer=context.tokenizer))
        for name, source in sources.items()
    }
    answers, measured = answer_all(job, context, sets)
    # 3. means
    result = {
        "measures": measured,
        "models": model_names(recipe),
        "temperature": recipe.generation.temperature,
        "datasets": {dataset: summarize(given, [*measured, KL]) for dataset, given in answers.items()},
    }
    for dataset, given in answers.items():
        fastchat.write_answers(job.folder / "data" / dataset, sets[dataset], given)
    question_rows = (one.for_judge(name, index) for name, of in sets.items() for index, one in enumerate(of))
    answer_rows = (
        {"dataset": name, "model": model, **row}
        for name, given in answers.items()
        for model, rows in given.items()
        for row in rows
    )
    write_atomic(job.folder / "questions.jsonl", fastchat.lines(question_rows))
    write_atomic(job.folder / "answers.jsonl", fastchat.lines(answer_rows))
    write_atomic(job.folder / "evaluation.json", json.dumps(result, indent=2))
    return {name: len(of) for name, of in sets.items()}

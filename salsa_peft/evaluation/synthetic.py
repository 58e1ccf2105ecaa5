"""The synthetic stage: the base answers data.prompts several times, and a function judges the answers.

demonstrations.jsonl gets the best answer to each prompt (rejection sampling, as in RAFT, Dong et al., 2023).
preferences.jsonl gets pairs of answers to one prompt: the best and the worst of the first `answers_per_pair` answers,
of the next ones, and so on. Pairs with equal scores are left out.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.config.options.synthetic import SYNTHETIC_DATA
from salsa_peft.data import datasets
from salsa_peft.data.questions import Question
from salsa_peft.evaluation.answers import Rows, answer
from salsa_peft.evaluation.evaluate import read_partial
from salsa_peft.models.rewards.function import FunctionReward, load_function
from salsa_peft.models.stage_context import StageContext, prompts_that_fit
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import append_checked_lines, write_atomic

SCORE = "score"
"""Name of the function's score in an answer's row."""
PARTIAL = "partial"
"""Folder with the answers of an unfinished stage."""


def run(job: Job) -> dict[str, Any]:
    """Run the stage: write demonstrations.jsonl and preferences.jsonl, and return facts about the answers."""
    section = job.recipe.synthetic
    assert section is not None
    # 1. the prompts
    context = StageContext.of_job(job)
    source = datasets.training_sources(job.recipe, job.inputs)["prompts"]
    prompts = datasets.prompts(source, columns=True, tokenizer=context.tokenizer)[: section.limit]
    prompts = prompts_that_fit(job, context, prompts, "data.prompts")
    # 2. the answers and their scores
    n, size = section.num_generations, section.answers_per_pair
    rows = scored_answers(job, context, [prompt for prompt in prompts for _ in range(n)])
    groups = [rows[start : start + n] for start in range(0, len(rows), n)]
    # 3. the data
    demonstrations = [demonstration(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    preferences = [pair for prompt, group in zip(prompts, groups, strict=True) for pair in pairs(prompt, group, size)]
    require(
        bool(preferences),
        f"synthetic.function: {section.function.rpartition(':')[2]} gives all answers to a prompt the same score, so"
        " there is nothing to prefer; use a function that tells answers apart, or raise synthetic.num_generations",
    )
    for name, found in zip(SYNTHETIC_DATA, (demonstrations, preferences), strict=True):
        write_atomic(job.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    scores = [row["scores"][SCORE] for row in rows]
    best = [max(row["scores"][SCORE] for row in group) for group in groups]
    return {
        "prompts": len(prompts),
        "answers": len(rows),
        "mean_score": math.fsum(scores) / len(scores),
        "mean_best_score": math.fsum(best) / len(best),
        "demonstrations": len(demonstrations),
        "preferences": len(preferences),
        "equal_pairs": len(groups) * (n // size) - len(preferences),
    }


def scored_answers(job: Job, context: StageContext, prompts: Sequence[dict[str, Any]]) -> Rows:
    """One answer of the base to each prompt, with its score, in the order of the prompts.

    Answers that a killed stage has left are not sampled again. FunctionReward refuses a score that is not finite.
    """
    section, recipe = job.recipe.synthetic, context.recipe
    assert section is not None
    judge = FunctionReward(load_function(section.function), context.tokenizer)
    evaluate = dataclasses.replace(recipe.evaluate, temperature=recipe.generation.temperature)
    sampling = dataclasses.replace(context, recipe=dataclasses.replace(recipe, evaluate=evaluate))
    partial = job.folder / PARTIAL / "answers.jsonl"
    known, keep = read_partial(partial), functools.partial(append_checked_lines, partial)
    with progress_bar(len(prompts), f"{job.unit.id} sampling answers") as bar:
        bar.update(len(known))

        def keep_and_show(new: Rows) -> None:
            keep(new)
            bar.update(len(new))

        questions = [as_question(number, prompt) for number, prompt in enumerate(prompts)]
        return answer(
            context.load_base(), None, questions, {SCORE: judge}, sampling, section.seed, known, keep_and_show
        )


def as_question(number: int, prompt: dict[str, Any]) -> Question:
    """A prompt as a question of one turn."""
    messages = prompt["prompt"]
    return Question(number, None, messages, (datasets.prompt_text(messages[-1:]),), None, prompt)


def demonstration(prompt: dict[str, Any], answers: Rows) -> dict[str, Any]:
    """A row for SFT: the prompt with the answer of the highest score, the first one of several."""
    best = max(answers, key=lambda row: row["scores"][SCORE])
    return {"messages": [*prompt["prompt"], turn(best)], **_template_inputs(prompt)}


def pairs(prompt: dict[str, Any], answers: Rows, size: int) -> Iterable[dict[str, Any]]:
    """Rows for the reward model: the best and the worst of each `size` successive answers, if their scores differ."""
    for start in range(0, len(answers) - size + 1, size):
        group = answers[start : start + size]
        chosen, rejected = (pick(group, key=lambda row: row["scores"][SCORE]) for pick in (max, min))
        if chosen["scores"][SCORE] > rejected["scores"][SCORE]:
            sides = {"chosen": [turn(chosen)], "rejected": [turn(rejected)]}
            yield {"prompt": prompt["prompt"], **sides, **_template_inputs(prompt)}


def turn(row: dict[str, Any]) -> dict[str, str]:
    """An answer as an assistant turn."""
    return {"role": "assistant", "content": row["response"]}


def _template_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: prompt[name] for name in ("tools", "chat_template_kwargs") if prompt.get(name)}

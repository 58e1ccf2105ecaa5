"""The reward_quality stage: whether RL can learn from the recipe's reward, measured on seed-0's own responses.

seed-0, where every policy starts, gives several responses to some of PPO's prompts. Their scores show how much of the
reward's variance lies between prompts, and, where there is a gold reward, what the best of n responses by the reward
gains. The reward may be of any kind. Held-out pairs are measured by the reward stage (training/reward_model.py).
"""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.data import datasets
from salsa_peft.evaluation.answers import Rewards, Rows, scores_of
from salsa_peft.evaluation.fastchat import lines
from salsa_peft.evaluation.landscape import measures
from salsa_peft.models import precision
from salsa_peft.models.adapters import lora
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.rewards.quality import METRICS, best_of_n, spread
from salsa_peft.models.stage_context import StageContext
from salsa_peft.utils.console import progress_bar, say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic

SEED_0 = "sft/seed-0"


def run(job: Job) -> dict[str, Any]:
    """Run the stage: write samples.jsonl and metrics.json, print the measures, return them for the manifest."""
    context = StageContext.of_job(job)
    context.check(job.inputs)
    # 1. prompts, and seed-0 with the rewards
    prompts = draw_prompts(job, context)
    model, adapter = load_seed(context, job.inputs[SEED_0])
    rewards = measures(job, model, context)
    # 2. several responses to each prompt, with their scores
    samples = sample(job, context, prompts, model, adapter, rewards)
    write_atomic(job.folder / "samples.jsonl", lines(samples))
    # 3. measures
    found = measure(samples, job.recipe.reward.quality_responses)
    write_atomic(job.folder / METRICS, json.dumps(found, indent=2))
    for line in describe(found):
        say(f"{job.unit.id}  {line}")
    return found


def draw_prompts(job: Job, context: StageContext) -> Rows:
    """The rows of reward.quality_prompts prompts of PPO that leave room for a response, drawn at random.

    Raises SalsaError if there are none.
    """
    recipe = job.recipe
    source = datasets.training_sources(recipe, job.inputs)["prompts"]
    rows = datasets.prompts(source, columns=recipe.reward.reads_columns)
    longest = recipe.ppo.max_prompt_length or recipe.model.max_length - recipe.generation.max_new_tokens
    drawn = random.Random(recipe.ppo.seed).sample(rows, len(rows))
    fitting = (row for row in drawn if len(datasets.prompt_tokens(row, context.tokenizer)) <= longest)
    found = list(itertools.islice(fitting, recipe.reward.quality_prompts))
    require(bool(found), f"data.prompts: every prompt is longer than {longest} tokens; raise model.max_length")
    return found


def load_seed(context: StageContext, folder: Path) -> tuple[nn.Module, str | None]:
    """The model with seed-0, and the name of seed-0's adapter, None with full weights."""
    if context.recipe.adapter is not None:
        return lora.attach(context.load_base(), folder, "seed-0"), "seed-0"
    return context.load_base(folder), None


def sample(
    job: Job, context: StageContext, prompts: Rows, model: nn.Module, adapter: str | None, rewards: Rewards
) -> Rows:
    """Sample quality_responses responses to each prompt: a row for each with its prompt, text, scores and length."""
    recipe, tokenizer = job.recipe, context.tokenizer
    asked = [row for row in prompts for _ in range(recipe.reward.quality_responses)]
    tokens = [datasets.prompt_tokens(row, tokenizer) for row in asked]
    found: dict[int, dict[str, Any]] = {}
    with (
        lora.active(model, adapter),
        precision.autocast(model),
        progress_bar(len(asked), job.unit.id) as bar,
    ):
        batches = generate_batches(
            model, tokens, recipe.generation, tokenizer, recipe.ppo.seed, recipe.generation.batch_size
        )
        for places, responses in batches:
            rows = [asked[place] for place in places]
            scores = {name: scores_of(reward, responses, rows) for name, reward in rewards.items()}
            texts = decode(tokenizer, responses.response_ids, responses.content_mask)
            for place, text, length, *own in zip(
                places, texts, responses.lengths.tolist(), *scores.values(), strict=True
            ):
                found[place] = {
                    "index": place // recipe.reward.quality_responses,
                    "prompt": datasets.prompt_text(asked[place]["prompt"]),
                    "response": text,
                    "scores": {name: score for name, score in zip(scores, own, strict=True) if score is not None},
                    "length": length,
                }
            bar.update(len(places))
    samples = [found[place] for place in range(len(asked))]
    broken = sum(not math.isfinite(row["scores"]["reward"]) for row in samples)
    require(
        not broken,
        f"reward: {broken} of {len(samples)} scores of seed-0's responses are NaN or infinite; check the reward's model or"
        " function",
    )
    return samples


def measure(samples: Rows, responses: int) -> dict[str, Any]:
    """The measures of the samples, `responses` of each prompt; the best of n on the prompts with gold for each response."""
    scores, gold = (
        np.array([row["scores"].get(name) for row in samples], dtype=np.float64).reshape(-1, responses)
        for name in ("reward", "gold")
    )
    found = {"prompts": len(scores), "responses": responses, **spread(scores)}
    if (known := np.isfinite(gold).all(axis=1)).any():
        found["best_of_n"] = best_of_n(scores[known], gold[known])
    return found


def describe(found: dict[str, Any]) -> list[str]:
    """The measures in one or two lines."""
    share, best = found["between_prompt_share"], found.get("best_of_n")
    first = (
        f"{found['responses']} responses of seed-0 to each of {found['prompts']} prompts: SD of the score"
        f" {found['score_sd']:.3g} in all, {found['score_sd_within']:.3g} within a prompt"
    )
    if share is not None:
        first += f"; {share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of its variance lies between prompts"
    if best is None:
        return [first]
    gain = best["gain"]
    second = (
        f"best of {best['n']} responses of seed-0: gold {best['best_by_reward']['mean']:.3f} if chosen by the reward,"
        f" {best['one_response']['mean']:.3f} for one response (gain {gain['mean']:+.3f} [{gain['low']:+.3f},"
        f" {gain['high']:+.3f}]), {best['best_by_gold']['mean']:.3f} if chosen by gold"
    )
    return [first, second]

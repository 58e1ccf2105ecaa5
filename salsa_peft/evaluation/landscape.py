"""The landscape stage: mean score along the line between two seeds and on the plane of three (paper, Figure 2).

A point is n scalars on the blocks of one stacked adapter: no adapter is made for it, and the deltas are interpolated exactly. Of full
weights a point is read from the seeds' checkpoints. The control stands beside the line: base + λ·δ of one seed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.config.schema import Landscape
from salsa_peft.data import datasets
from salsa_peft.data.questions import Question, questions
from salsa_peft.evaluation.answers import answer, fitting_questions, means
from salsa_peft.models.adapters import lora
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import Reward, recipe_reward
from salsa_peft.models.stage_context import StageContext, seed_folders
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.files import write_atomic

POINT = "landscape"


def measures(job: Job, model: nn.Module, context: StageContext) -> dict[str, Reward]:
    """What scores responses: the recipe's reward, and in the embedded world its gold reward."""
    recipe = job.recipe
    rewards = {"reward": recipe_reward(recipe, model, job.inputs, context.tokenizer, recipe.generation.batch_size)}
    if recipe.toy is not None:
        from salsa_peft.data.toy_language import gold

        rewards["gold"] = FunctionReward(gold, context.tokenizer, special_tokens=True)
    return rewards


def mean_scores(model: nn.Module, adapter: str | None, questions: Sequence[Question], rewards: Mapping[str, Reward],
                context: StageContext, seed: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """Measure → mean score with its interval over questions, of one answer to each turn from `adapter`, or from the full weights that the
    model has."""
    rows = answer(model, adapter, questions, rewards, context, seed)
    return {name: asdict(means(rows, name)) for name in rewards}


def plane_weights(resolution: int) -> list[tuple[float, float, float]]:
    """Barycentric weights of a triangular grid with `resolution` steps on an edge, one step beyond the triangle."""
    steps = range(-1, resolution + 2)
    points = [(i, j, resolution - i - j) for i, j in itertools.product(steps, steps)]
    return [(i / resolution, j / resolution, k / resolution) for i, j, k in points if -1 <= k <= resolution + 1]


def points(section: Landscape, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Line, control and plane → what each is called and its points: place → weights of the seeds (by position).

    names: what the members are called, by position (default: seed-0, seed-1 …).
    """
    found: dict[str, dict[str, Any]] = {}
    called = lambda position: f"seed-{position}" if names is None else names[position]  # noqa: E731
    if section.line is not None:
        a, b = section.line
        found["line"] = {
            "name": f"{called(a)} – {called(b)}",
            "parameter": "alpha",
            "ends": [called(a), called(b)],
            "kind": "line",
            "points": [(alpha, {a: 1 - alpha, b: alpha}) for alpha in section.alphas],
        }
        if section.scales:
            found["shrunk"] = {
                "name": f"base – {called(a)} (shrunk, the control)",
                "parameter": "scale",
                "ends": ["base", called(a)],
                "kind": "shrunk",
                "points": [(scale, {a: scale}) for scale in section.scales],
            }
    if section.plane is not None:
        grid = plane_weights(section.resolution)
        found["plane"] = {"members": [called(m) for m in section.plane],
                          "points": [(None, dict(zip(section.plane, w, strict=True))) for w in grid]}  # fmt: skip
    return found


def run(job: Job) -> dict[str, Any]:
    """Write landscape.json."""
    section = job.recipe.landscape
    assert section is not None
    context = StageContext.of_job(job)
    # 1. the questions, the same at each point
    sources = datasets.evaluation_sources(job.recipe, job.inputs.get("toy"))
    chosen = section.prompts or next(iter(sources))
    columns = job.recipe.reward.reads_columns
    asked = fitting_questions(
        job, context, questions(sources[chosen], columns=columns, tokenizer=context.tokenizer)[: section.limit]
    )
    # 2. one model that moves between all seeds that a point needs
    context.check(job.inputs)
    seeds = seed_folders(job.inputs)
    model, adapter, move = moving(context, seeds)
    rewards = measures(job, model, context)

    def score(weights: Mapping[int, float]) -> dict[str, dict[str, float]]:
        move([weights.get(position, 0.0) for position in sorted(seeds)])
        return mean_scores(model, adapter, asked, rewards, context, section.seed)

    # 3. every point; one that two of the figures share is measured once
    result = measure_points(points(section), score, job.unit.id)
    result |= {"questions": chosen, "n": len(asked), "sampling_seed": section.seed, "measures": list(rewards)}
    write_atomic(job.folder / "landscape.json", json.dumps(result, indent=2))
    return {"points": sum(len(line["points"]) for line in result["lines"]), "prompts": len(asked)}


def moving(context: StageContext, seeds: Mapping[int, Path]) -> tuple[Any, str | None, Callable[[list[float]], None]]:
    """A model, the adapter to activate (full weights: None), and what moves it to base + Σ w δ of the seeds, by position."""
    positions = sorted(seeds)
    if context.recipe.adapter is None:
        model: Any = context.load_base()
        live = LiveCheckpoints(
            model, [read_checkpoint(folder) for folder in (*(seeds[p] for p in positions), context.folder)]
        )
        return model, None, lambda weights: live.set([*weights, round(1 - math.fsum(weights), 12)])
    stacked = StackedAdapter.load([seeds[position] for position in positions], [f"seed-{p}" for p in positions])
    model = lora.attach(context.load_base(), seeds[positions[0]], "start")
    stacked.attach(model, POINT, [0.0] * len(positions))
    return model, POINT, lambda weights: stacked.set_weights(model, POINT, weights)


def measure_points(
    figures: dict[str, dict[str, Any]], score: Callable[[Mapping[int, float]], Any], what: str
) -> dict[str, Any]:
    """Fill in `points`' scores → {"lines": […], "plane": … or None}."""
    known: dict[tuple[tuple[int, float], ...], Any] = {}
    with progress_bar(sum(len(figure["points"]) for figure in figures.values()), what) as bar:
        for figure in figures.values():
            measured = []
            for place, weights in figure["points"]:
                key = tuple(sorted((seed, round(weight, 9)) for seed, weight in weights.items() if weight))
                if key not in known:
                    known[key] = score(weights)
                at = {} if place is None else {"at": place}
                measured.append({**at, "weights": list(weights.values()), "scores": known[key]})
                bar.update()
            figure["points"] = measured
    lines = [figure for kind, figure in figures.items() if kind != "plane"]
    return {"lines": lines, "plane": figures.get("plane")}

"""The landscape stage: scores on the line between two seeds and the plane of three (paper, Figure 2).

With adapters, each point sets the members' weights in one stacked adapter, which interpolates the deltas exactly. With
full weights, each point is computed from the seeds' checkpoints. The control line averages nothing: its points
are base + λ·δ with the delta δ of one seed. Each point's scores are saved as they come: if the stage is killed, the
next run measures only the points that are left.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from salsa_peft.config.job import Job
from salsa_peft.config.options.soup import named
from salsa_peft.config.references import Reference
from salsa_peft.config.schema import Landscape
from salsa_peft.data import datasets
from salsa_peft.data.questions import Question, questions
from salsa_peft.evaluation.answers import HeldOut, Rewards, answer, fitting_questions
from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.models.adapters import forward, lora
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import WeightedReward, recipe_reward
from salsa_peft.models.stage_context import StageContext, model_folder
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.console import progress_bar, say
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import append_checked_lines, read_checked_lines, write_atomic
from salsa_peft.utils.statistics import mean_interval

POINT = "landscape"
"""Name of the stacked adapter in the model."""
PARTIAL = "partial"
"""Folder of what an unfinished stage has measured so far."""


def measures(job: Job, model: nn.Module, context: StageContext) -> dict[str, Reward | HeldOut]:
    """Name of a measure → its reward: `reward`, each part of weight 0 by its own name, and the toy data's `gold`.

    If a policy has a reward of its own, all parts are measured.
    """
    recipe = job.recipe
    reward = recipe_reward(recipe, model, job.inputs, context.tokenizer, recipe.generation.batch_size)
    rewards: dict[str, Reward | HeldOut] = {"reward": reward}
    if isinstance(reward, WeightedReward) and any(part.weight for part in reward.parts):
        rewards["reward"] = WeightedReward([part for part in reward.parts if part.weight])
        own = [part for part in reward.parts if recipe.measures_parts or not part.weight]
        rewards |= {part.name: HeldOut(part.reward) for part in own}
    if recipe.toy is not None:
        from salsa_peft.data.toy_language import gold

        rewards["gold"] = FunctionReward(gold, context.tokenizer, special_tokens=True)
    forward.install(model)  # as in PPO, so that both compute the same numbers
    return rewards


def mean_scores(
    model: nn.Module,
    adapter: str | None,
    questions: Sequence[Question],
    rewards: Rewards,
    context: StageContext,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Answer every turn once; returns measure → mean score and its interval over questions.

    A measure that does not apply to one of the answers is left out.
    """
    rows = answer(model, adapter, questions, rewards, context, seed)
    of, scored = clusters(rows), [name for name in rewards if all(name in row["scores"] for row in rows)]
    return {name: asdict(mean_interval([row["scores"][name] for row in rows], of)) for name in scored}


def plane_weights(resolution: int) -> list[tuple[float, float, float]]:
    """Barycentric weights of a triangular grid: `resolution` steps per edge and one step beyond the edges."""
    steps = range(-1, resolution + 2)
    points = [(i, j, resolution - i - j) for i, j in itertools.product(steps, steps)]
    return [(i / resolution, j / resolution, k / resolution) for i, j, k in points if -1 <= k <= resolution + 1]


def points(section: Landscape, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Labels and points of each figure: `line`, `shrunk` (the control line) and `plane`.

    A point is a tuple of a position on the x axis (None in the plane) and the weight of each member by its name. names:
    names of the members by position (default: their names in the recipe).
    """
    found: dict[str, dict[str, Any]] = {}
    called = [[names[int(one)] for one in of] for of in (section.line or [], section.plane or [])] if names else None
    line, plane = called or (named(section.line), named(section.plane))
    if line:
        a, b = line
        found["line"] = {
            "name": f"{a} – {b}",
            "parameter": "alpha",
            "ends": [a, b],
            "kind": "line",
            "points": [(alpha, {a: 1 - alpha, b: alpha}) for alpha in section.alphas],
        }
        if section.scales:
            found["shrunk"] = {
                "name": f"base – {a} (shrunk, the control)",
                "parameter": "scale",
                "ends": ["base", a],
                "kind": "shrunk",
                "points": [(scale, {a: scale}) for scale in section.scales],
            }
    if plane:
        grid = [(None, dict(zip(plane, weights, strict=True))) for weights in plane_weights(section.resolution)]
        found["plane"] = {"members": plane, "points": grid}
    return found


def run(job: Job) -> dict[str, Any]:
    """Run the stage: score all points and write landscape.json."""
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
    # 2. one model whose weights are set for each point
    names = section.names
    context.check(job.inputs, [Reference(label="landscape", members=names)])
    folders = [model_folder(job.recipe, job.inputs, name) for name in names]
    model, adapter, set_weights, norm = adjustable_model(context, folders, names)
    rewards = measures(job, model, context)

    def score(weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
        set_weights([weights.get(name, 0.0) for name in names])
        return mean_scores(model, adapter, asked, rewards, context, section.seed)

    # 3. every point; a point that two figures share is measured once
    partial = job.folder / PARTIAL / "points.jsonl"
    rows, damaged = read_checked_lines(partial)
    if damaged is not None:
        say(f"{damaged}; their points are measured again")
    known = {_point(dict(weights)): scores for weights, scores in rows}
    keep = functools.partial(append_checked_lines, partial)
    figures = points(section)
    if section.norm_controls:
        add_norm_controls(figures, section, lambda weights: norm([weights.get(name, 0.0) for name in names]))
    result = measure_points(figures, score, job.unit.id, known, keep)
    measured = [
        point["scores"] for line in [*result["lines"], result["plane"] or {}] for point in line.get("points", [])
    ]
    names = [name for name in rewards if all(name in scores for scores in measured)]
    result |= {"questions": chosen, "n": len(asked), "sampling_seed": section.seed, "measures": names}
    write_atomic(job.folder / "landscape.json", json.dumps(result, indent=2))
    return {"points": sum(len(line["points"]) for line in result["lines"]), "prompts": len(asked)}


def add_norm_controls(
    figures: dict[str, dict[str, Any]], section: Landscape, norm: Callable[[Mapping[str, float]], float]
) -> None:
    """Add the points of `norm_controls`: the line's first model and its midpoint, each with the other's norm.

    norm: the norm of Σ w δ, given model → w. The scaled model joins the control line `shrunk`; the scaled midpoint is
    the only point of the line `stretched`, at its scale.
    """
    if section.line is None:
        return
    a, b = section.names[:2]
    of_seed, of_midpoint = norm({a: 1.0}), norm({a: 0.5, b: 0.5})
    require(
        of_seed > 0 and of_midpoint > 0,
        f"landscape.norm_controls: the delta of {a} or of the midpoint is 0, which no scale changes; set"
        " landscape.norm_controls=false",
    )
    shrink, stretch = of_midpoint / of_seed, of_seed / of_midpoint
    ends = ["base", a]
    shrunk = {"name": f"base – {a} (shrunk, the control)", "parameter": "scale", "ends": ends, "kind": "shrunk"}
    line = figures.setdefault("shrunk", {**shrunk, "points": []})
    line["points"] = sorted([*line["points"], (shrink, {a: shrink})], key=lambda point: point[0])
    line["soup_norm"] = shrink
    figures["stretched"] = {
        "name": f"base – midpoint of {a} and {b} (stretched, a control)",
        "parameter": "scale",
        "ends": ["base", "soup"],
        "kind": "stretched",
        "points": [(stretch, {a: stretch / 2, b: stretch / 2})],
    }


def adjustable_model(
    context: StageContext, folders: list[Path], names: list[str]
) -> tuple[Any, str | None, Callable[[list[float]], None], Callable[[list[float]], float]]:
    """A model, its adapter's name or None, and two functions of the members' weights.

    The first sets the model to base + Σ w δ, the second returns the norm of Σ w δ. folders, names: the members'.
    """
    if context.recipe.adapter is None:
        model: Any = context.load_base()
        live = LiveCheckpoints(model, [read_checkpoint(folder) for folder in (*folders, context.folder)])
        return (
            model,
            None,
            lambda weights: live.set([*weights, round(1 - math.fsum(weights), 12)]),
            lambda weights: live.norm([*weights, -math.fsum(weights)]),
        )
    stacked = StackedAdapter.load(folders, names)
    model = lora.attach(context.load_base(), folders[0], "start")
    stacked.attach(model, POINT, [0.0] * len(folders))
    return model, POINT, lambda weights: stacked.set_weights(model, POINT, weights), stacked.norm


Point = tuple[tuple[Any, float], ...]
"""A point's members and their weights, without members of weight 0."""


def _point(weights: Mapping[Any, float]) -> Point:
    return tuple(sorted((member, round(weight, 9)) for member, weight in weights.items() if weight))


def measure_points(
    figures: dict[str, dict[str, Any]],
    score: Callable[[Mapping[Any, float]], Any],
    description: str,
    known: Mapping[Point, Any] | None = None,
    keep: Callable[[list[Any]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Score all points of the figures that `points` returned; returns {"lines": […], "plane": … or None}.

    known: scores of points that were measured before. keep: called with the weights and scores of each new point.
    """
    found = dict(known or {})
    with progress_bar(sum(len(figure["points"]) for figure in figures.values()), description) as bar:
        for figure in figures.values():
            measured = []
            for position, weights in figure["points"]:
                point = _point(weights)
                if point not in found:
                    found[point] = score(weights)
                    keep([[list(weights.items()), found[point]]])
                at = {} if position is None else {"at": position}
                measured.append({**at, "weights": list(weights.values()), "scores": found[point]})
                bar.update()
            figure["points"] = measured
    lines = [figure for kind, figure in figures.items() if kind != "plane"]
    return {"lines": lines, "plane": figures.get("plane")}

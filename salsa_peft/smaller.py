"""A stage whose memory ran out, once more with less at a time: the micro-batch is halved, the global batch stays.

    sft, reward, dpo, kto, rloo, grpo   micro_batch_size
    ppo                                 micro_batch_size and rollout_batch_size (in one process the engine does it by itself: room.py)
    landscape, evaluate                 generation.batch_size
    judge                               a local judge's concurrency

Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import Recipe
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.oom import lesser


class Smaller(NamedTuple):
    """What to go on with."""

    recipe: Recipe
    changed: dict[str, tuple[int, int]]
    """Key of the recipe → what it was, what it is."""

    def told(self) -> str:
        """For people."""
        return ", ".join(f"{key} {now} (was {was})" for key, (was, now) in self.changed.items())


def smaller(recipe: Recipe, stage: str) -> Smaller | None:
    """The recipe with half as much at a time in that stage, or None where there is nothing to halve."""
    if stage in ("sft", "reward", "ppo", *ALGORITHMS):
        return _training(recipe, stage)
    if stage in ("landscape", "evaluate") and (now := lesser(recipe.generation.batch_size)):
        changed = {"generation.batch_size": (recipe.generation.batch_size, now)}
        return Smaller(replace(recipe, generation=replace(recipe.generation, batch_size=now)), changed)
    judge: Any = recipe.evaluate.judge
    if stage == "judge" and judge is not None and judge.kind == "local" and (now := lesser(judge.concurrency)):
        evaluate = replace(recipe.evaluate, judge=replace(judge, concurrency=now))
        return Smaller(replace(recipe, evaluate=evaluate), {"evaluate.judge.concurrency": (judge.concurrency, now)})  # fmt: skip
    return None


def _training(recipe: Recipe, stage: str) -> Smaller | None:
    section: Any = getattr(recipe, stage)
    processes = 1 if stage in ALGORITHMS else recipe.num_processes
    share = section.batch_size // processes
    was = {"micro_batch_size": section.micro_batch_size or share}
    if stage == "ppo":
        ppo = recipe.ppo
        was["micro_batch_size"] = ppo.micro_batch_size or share // ppo.num_mini_batches
        was["rollout_batch_size"] = min(ppo.rollout_batch_size or share, share)
    now = {key: lesser(rows) or rows for key, rows in was.items()}
    other = replace(section, **now)
    try:
        other.check(stage, processes)
    except SalsaError:  # KTO's two
        return None
    changed = {f"{stage}.{key}": (was[key], now[key]) for key in was if now[key] != was[key]}
    sections: dict[str, Any] = {stage: other}
    return Smaller(replace(recipe, **sections), changed) if changed else None

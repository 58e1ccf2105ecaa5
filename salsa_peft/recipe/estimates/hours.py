"""Tokens and hours of a recipe's units, from the recipe, the sizes of the data and of the base, and a GPU's speed.

seconds = operations / (peak FLOP/s × MFU) + bytes read in decoding / (bandwidth × BANDWIDTH_SHARE)

Loading models, checkpoints and the stages that compute little (soup, judge, report) are left out. Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from salsa_peft.config.job import Unit, recipe_of_unit
from salsa_peft.config.options.training import Training
from salsa_peft.config.options.trl import ALGORITHMS, PREFERENCE_ALGORITHMS
from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data import row_formats
from salsa_peft.data.check import number_of_rows
from salsa_peft.evaluation.judges.costs import CHARACTERS, question_turns
from salsa_peft.models.architectures.sizes import Architecture, architecture_of_base, architecture_of_recipe
from salsa_peft.models.architectures.work import Costs, Work
from salsa_peft.recipe.cache import Plan
from salsa_peft.recipe.estimates.hardware import GPUS, Gpu
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.manifests import read_manifest
from salsa_peft.utils.messages import duration

MFU = 0.35
"""Assumed share of the peak FLOP/s in training and scoring (model FLOPs utilisation, Chowdhery et al., 2022, B). It has
not been measured on a GPU in this project."""
BANDWIDTH_SHARE = 0.5
"""Assumed share of the memory bandwidth in decoding. It has not been measured on a GPU in this project."""
SHARED = ("sft", "reward", "ppo")
"""Stages whose units are divided among the recipe's processes."""
SAMPLE = 200
"""Number of rows, the first of a file, whose length is read."""
ROWS_ON_THE_HUB = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
}
"""(Hub id, split) of the paper's data → number of rows, as the pages of these datasets on the Hub say."""


class Planned(NamedTuple):
    """The work of a unit, and whether it is an upper bound because the lengths of sequences were assumed."""

    work: Work
    at_most: bool


class Rows(NamedTuple):
    """Number of a data set's rows, and mean number of tokens of each of a row's sequences."""

    number: int | None
    tokens: float
    at_most: bool
    """Whether `tokens` is the longest length allowed, because the data is not on this machine."""


def unit_work(recipe: Recipe, unit: Unit) -> Planned | None:
    """The work of a unit; None if its stage computes little, or if sizes or rows are not known."""
    size = architecture_of_recipe(recipe)
    if size is None:
        return None
    units = _Units(recipe_of_unit(recipe, unit), size)
    if unit.stage in ALGORITHMS:
        return units.trl(unit.stage)
    if unit.stage == "sft":
        return units.sft(int(unit.name.removeprefix("seed-")))
    if unit.stage == "ppo":
        return units.ppo(unit.name)
    stages = {
        "synthetic": units.synthetic,
        "reward": units.reward,
        "reward_quality": units.reward_quality,
        "landscape": units.landscape,
        "evaluate": units.evaluate,
    }
    return stages[unit.stage]() if unit.stage in stages else None


def seconds(recipe: Recipe, unit: Unit, gpu: Gpu | None) -> float | None:
    """Planned seconds of a unit; None if they are not known."""
    planned = None if gpu is None or gpu.speed is None else unit_work(recipe, unit)
    if planned is None or gpu is None or gpu.speed is None:
        return None
    flops, bandwidth = gpu.speed
    one = planned.work.operations / (flops * MFU) + planned.work.bytes / (bandwidth * BANDWIDTH_SHARE)
    return one / (recipe.num_processes if unit.stage in SHARED else 1)


def table(recipe: Recipe, plan: Plan, gpu: Gpu | None) -> tuple[list[str], list[list[str]], list[str]]:
    """The plan's table of tokens and hours: header, a row for each stage, and notes.

    A unit that is to do gets the measured seconds of finished units of its stage, in proportion to its operations, if
    there are any; else those that the GPU's speed gives. measured: the seconds in the finished units' manifests.
    """
    found: dict[str, list[_Timed]] = {}
    for planned in plan.values():
        work = unit_work(recipe, planned.unit)
        manifest = read_manifest(planned.folder) if planned.why is None else None
        if work is not None:
            took = None if manifest is None else manifest.get("seconds")
            found.setdefault(planned.unit.stage, []).append(_Timed(work, seconds(recipe, planned.unit, gpu), took))
    rows = []
    for stage, units in found.items():
        total, count = sum((one.planned.work for one in units), Work()), len(units)
        most = "at most " if any(one.planned.at_most for one in units) else "about "
        tokens = [
            f"{most}{_count(number)}" if number else "–" for number in (total.trained, total.scored, total.generated)
        ]
        done = [one.measured for one in units if one.measured is not None]
        measured = _time(sum(done)) + (f" ({len(done)} of {count})" if len(done) < count else "") if done else "–"
        rows.append([f"{stage}, {count} unit{'s' * (count > 1)}", *tokens, _planned(units), measured])
    header = ["time", "trained", "scored", "generated", "planned", "measured"]
    return header, rows, _notes(recipe, found, gpu) if rows else []


class _Timed(NamedTuple):
    """A unit's work, and its seconds as planned by a GPU's speed and as measured; None if they are not known."""

    planned: Planned
    seconds: float | None
    measured: float | None


def _planned(units: list[_Timed]) -> str:
    """Planned hours of a stage's units."""
    done = [one for one in units if one.measured is not None]
    operations = sum(one.planned.work.operations for one in done)
    pace = sum(one.measured or 0.0 for one in done) / operations if operations else None
    if any(one.seconds is None for one in units):
        if pace is None or len(done) == len(units):
            return "–"
        return f"{_time(pace * sum(one.planned.work.operations for one in units))} at the measured pace"
    text = _time(sum(one.seconds or 0.0 for one in units))
    left = [one for one in units if one.measured is None]
    if pace is None or not left:
        return text
    rest = _time(pace * sum(one.planned.work.operations for one in left))
    return f"{text}; at the measured pace {rest} for {len(left)} unfinished unit{'s' * (len(left) > 1)}"


def _notes(recipe: Recipe, found: dict[str, list[_Timed]], gpu: Gpu | None) -> list[str]:
    """What the table assumes, and how to get hours if there are none."""
    notes = []
    if any(one.planned.at_most for units in found.values() for one in units):
        notes.append(
            "at most: every response is counted as generation.max_new_tokens tokens, and every sequence that is not in a"
            " local JSONL file as model.max_length tokens"
        )
    if gpu is not None and gpu.speed is not None:
        flops, bandwidth = gpu.speed
        notes.append(
            f"hours assume {MFU:.0%} of {gpu.name}'s {flops / 1e12:.0f} TFLOP/s (bf16) in training and scoring, and"
            f" {BANDWIDTH_SHARE:.0%} of its {bandwidth / 1e12:.2f} TB/s in decoding; neither share has been measured"
        )
        if recipe.model.quantization is not None:
            notes.append(
                "hours do not include the dequantisation of the 4-bit base, which every forward and backward pass repeats"
            )
    else:
        here = "this machine has no GPU" if gpu is None else f"the speed of {gpu.name} is not known"
        notes.append(f"no hours, because {here}; name a GPU to plan for: --gpu {', '.join(GPUS)}")
    return notes


def _time(number: float) -> str:
    """Seconds as text; from ten hours on whole hours, since a plan is no more exact."""
    return duration(number) if number < 36_000 else f"{number / 3600:.0f} h"


def _count(number: float) -> str:
    """A number of tokens as text, such as 3.1 M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


class _Units:
    """Computes the work of units of each stage."""

    def __init__(self, recipe: Recipe, size: Architecture) -> None:
        self.recipe, self.costs = recipe, Costs(recipe, size)
        self.longest, self.response = recipe.model.max_length, recipe.generation.max_new_tokens

    def synthetic(self) -> Planned | None:
        """The base's answers to the prompts."""
        section, data = self.recipe.synthetic, self._data("prompts")
        if section is None or data.number is None:
            return None
        rows = min(data.number, section.limit or data.number) * section.num_generations
        return Planned(self.costs.generating(rows, self.recipe.generation.batch_size, data.tokens, self.response), True)

    def sft(self, position: int) -> Planned | None:
        """Each demonstration once in every epoch."""
        section, data = self.recipe.sft, self._data("demonstrations")
        if section.existing_seed(position) is not None:
            return Planned(Work(), False)
        rows = _seen(section, None if data.number is None else data.number * section.subset)
        if rows is None:
            return None
        return Planned(self.costs.training(rows * data.tokens, section.gradient_checkpointing), data.at_most)

    def reward(self) -> Planned | None:
        """Both chats of each pair; each held-out pair is scored once."""
        section, data = self.recipe.reward, self._data("preferences")
        held_out = 0 if data.number is None else section.held_out_rows(data.number)
        rows = _seen(section, None if data.number is None else data.number - held_out)
        if rows is None:
            return None
        trained = self.costs.training(2 * rows * data.tokens, section.gradient_checkpointing)
        return Planned((trained + self.costs.scoring(2 * held_out * data.tokens)) * len(section.seeds), data.at_most)

    def reward_quality(self) -> Planned:
        """Several responses to some of the prompts, and their scores."""
        section, data = self.recipe.reward, self._data("prompts")
        asked = section.quality_prompts if data.number is None else min(section.quality_prompts, data.number)
        rows = asked * section.quality_responses
        work = self.costs.generating(rows, self.recipe.generation.batch_size, data.tokens, self.response)
        return Planned(work + self._rewards(rows * (data.tokens + self.response)), True)

    def ppo(self, name: str) -> Planned | None:
        """Each update: sampling; scoring by policy, references and rewards; num_ppo_epochs of training."""
        section, data = self.recipe.ppo, self._data("prompts")
        if section.max_steps > 0:
            updates = section.max_steps // section.steps_per_update
        elif data.number is not None:
            updates = math.ceil(data.number // section.prompts_per_update * section.num_train_epochs)
        else:
            return None
        rows, forwards = updates * section.batch_size, 1 + (section.value == "adapter")
        references = self.recipe.policies[name].references("reference")
        whole = rows * (data.tokens + self.response)
        share = math.ceil(section.batch_size / self.recipe.num_processes)
        batch = min(section.rollout_batch_size or share, share)
        work = self.costs.generating(rows, batch, data.tokens, self.response)
        work += self.costs.scoring(whole * (len(references) + forwards - (section.old_logprobs == "rollout")))
        work += self._rewards(whole)
        trained = self.costs.training(whole * section.num_ppo_epochs, section.gradient_checkpointing)
        return Planned(work + trained * forwards, True)

    def trl(self, algorithm: str) -> Planned | None:
        """Training on pairs or on sampled responses, with one more forward for the reference."""
        section = getattr(self.recipe, algorithm)
        pairs, prompts = self._data("preferences"), self._data("prompts")
        rows = _seen(section, section.rows_per_epoch(pairs.number, prompts.number))
        if rows is None:
            return None
        if algorithm in PREFERENCE_ALGORITHMS:
            tokens, work = rows * pairs.tokens * (2 if algorithm == "dpo" else 1), Work()
        else:
            tokens = rows * (prompts.tokens + self.response)
            batch = section.micro_batch_size or section.batch_size
            work = self.costs.generating(rows, batch, prompts.tokens, self.response) + self._rewards(tokens)
        work += self.costs.scoring(tokens) + self.costs.training(tokens, section.gradient_checkpointing)
        return Planned(work, pairs.at_most or algorithm not in PREFERENCE_ALGORITHMS)

    def landscape(self) -> Planned | None:
        """Answers and scores at each point."""
        section, prompts = self.recipe.landscape, self.recipe.evaluate.prompts
        if section is None or not prompts:
            return None
        controls = len(section.scales) + 2 * section.norm_controls
        points = (len(section.alphas) + controls) * (section.line is not None)
        if section.plane is not None:
            ends = section.resolution + 1
            grid = itertools.product(range(-1, ends + 1), repeat=2)
            points += sum(-1 <= section.resolution - one - two <= ends for one, two in grid)
        asked = question_turns(prompts[section.prompts or next(iter(prompts))])
        return None if asked is None else self._answers(asked[: section.limit], points)

    def evaluate(self) -> Planned | None:
        """Answers and scores of every model."""
        section = self.recipe.evaluate
        own = self.recipe
        models = len({"seed-0", "soup", *own.soups, *section.models, *section.controls, *own.policies})
        asked = [question_turns(source) for source in section.prompts.values()]
        known = [turn for one in asked if one is not None for turn in one]
        return self._answers(known, models) if known and None not in asked else None

    def _answers(self, asked: list[tuple[int, int]], times: int) -> Planned:
        """asked: (turn, tokens of the user's turns up to it) of each answer."""
        prompt = sum(tokens + (turn - 1) * self.response for turn, tokens in asked) / max(1, len(asked))
        batch = self.recipe.generation.batch_size
        work = self.costs.generating(len(asked), batch, prompt, self.response)
        return Planned((work + self._rewards(len(asked) * (prompt + self.response))) * times, True)

    def _rewards(self, tokens: float) -> Work:
        """A forward of each reward that is a model; a classifier has the size that its config.json says."""
        total = Work()
        for part in self.recipe.reward.parts:
            other = architecture_of_base(part.value) if part.kind == "classifier" else None
            if part.kind == "adapter":
                total += self.costs.scoring(tokens)
            elif other is not None:
                total += Work(scored=tokens, operations=2.0 * other.in_linears * tokens)
        return total

    def _data(self, key: str) -> Rows:
        """Rows of `data.<key>`."""
        source, prompts = getattr(self.recipe.data, key), key == "prompts"
        longest = self.longest - self.response if prompts else self.longest
        if prompts and self.recipe.ppo.max_prompt_length is not None:
            longest = self.recipe.ppo.max_prompt_length
        count, lengths = number_of_rows(self.recipe, key), [] if source is None else _lengths(source, key)
        if count is None and source is not None and (source.path, source.split) in ROWS_ON_THE_HUB:
            count = min(ROWS_ON_THE_HUB[source.path, source.split], source.limit or math.inf)  # type: ignore[assignment]
        if not lengths:
            return Rows(count, longest, True)
        return Rows(count, sum(min(one, longest) for one in lengths) / len(lengths), False)


def _seen(section: Training, rows: float | None) -> float | None:
    """Number of rows in all steps of training; None if unknown."""
    if section.max_steps > 0:
        return section.max_steps * section.batch_size
    if rows is None:
        return None
    return math.ceil(math.ceil(rows / section.batch_size) * section.num_train_epochs) * section.batch_size


def _lengths(source: Source, key: str) -> list[float]:
    """Tokens of the sequences in the first rows of a local JSONL file; [] for any other source."""
    if not is_local(source.path) or not source.path.lower().endswith((".jsonl", ".ndjson")):
        return []
    found: list[float] = []
    try:
        with open(source.path, encoding="utf-8", errors="replace") as file:
            for line in itertools.islice(file, SAMPLE):
                found += _sequences(json.loads(line), key) if line.strip() else []
    except (OSError, ValueError, SalsaError):  # reported by the checks of the data, or by the stage
        return []
    return found


def _sequences(row: Any, key: str) -> list[float]:
    """Estimated tokens of a row's sequences: a chat, both chats of a pair, or a prompt."""

    def tokens(messages: Iterable[dict[str, Any]]) -> float:
        return sum(len(str(turn["content"])) for turn in messages) / CHARACTERS

    if key == "demonstrations":
        return [tokens(row_formats.demonstration(row, "").messages)]
    if key == "preferences":
        pair = row_formats.preference(row, "")
        return [tokens(pair.chosen), tokens(pair.rejected)]
    return [tokens(row_formats.prompt(row, "").messages)]

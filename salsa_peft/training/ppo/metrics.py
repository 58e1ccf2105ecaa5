"""Metrics of an update, with TRL's names, and the log files."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salsa_peft.models.responses import Responses, token_lists
from salsa_peft.models.rewards.function import decode
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.guards.measures import between_prompt_share, repetition, variety

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.rollout import Rollout
    from salsa_peft.training.ppo.state import PPOState


METRICS, COMPLETIONS, EVALUATIONS = "metrics.jsonl", "completions.jsonl", "eval_completions.jsonl"
FILES = (METRICS, COMPLETIONS, EVALUATIONS)


def metrics(rollout: Rollout, state: PPOState, batch_size: int) -> dict[str, float]:
    """Metrics of an update, with TRL's names. KL and entropy are in nats per response.

    batch_size: number of responses in an update.
    """
    responses = rollout.responses
    means = torch.stack(
        [
            rollout.kl.sum(-1).mean(),
            rollout.scores.mean(),
            rollout.scores.std(correction=0),
            rollout.entropy.sum(-1).mean(),
            responses.lengths.float().mean(),
            responses.empty.float().mean(),
            responses.finished.float().sum(),
            losses.explained_variance(rollout.values, rollout.returns, responses.response_mask),
        ]
    )
    # one copy from the device for all numbers
    kl, score, spread, entropy, length, empty, finished, explained, *scores = torch.cat(
        [means, rollout.scores]
    ).tolist()
    steps = dict(zip(losses.PPOLoss._fields, zip(*state.totals, strict=True), strict=True))  # of all optimizer steps
    mean = {name: statistics.fmean(numbers) for name, numbers in steps.items()}
    return {
        "update": state.update,
        "episode": state.update * batch_size,
        "objective/scores": score,
        "objective/scores_std": spread,
        "objective/kl": kl,
        "objective/kl_per_token": kl / length,
        "objective/kl_coef": state.kl_coef,
        "objective/entropy": entropy,
        "objective/non_score_reward": -state.kl_coef * kl,
        "objective/rlhf_reward": score - state.kl_coef * kl,
        "objective/response_length": length,
        "objective/empty_share": empty,
        **variety_metrics(responses, scores),
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/skipped_minibatches": state.skipped,
        "loss/policy_avg": mean["policy"],
        "loss/value_avg": mean["value"],
        "val/clipfrac_avg": mean["value_clipfrac"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": statistics.pvariance(steps["ratio"]),
        "val/num_eos_tokens": int(finished),
        "val/explained_variance": explained,
    }


def bonus_metrics(rollout: Rollout, args: SalsaPPOConfig) -> dict[str, float]:
    """Entropy in nats per token, and the bonus in reward per response; {} without entropy_floor."""
    if args.entropy_floor is None:
        return {}
    mask = rollout.responses.response_mask
    bonus = losses.entropy_bonus(rollout.logprobs, rollout.entropy, mask, args.entropy_floor, args.entropy_coef)
    found = torch.stack([losses.mean_entropy(rollout.entropy, mask), bonus.sum(-1).mean()]).tolist()
    return dict(zip(("objective/entropy_per_token", "objective/entropy_bonus"), found, strict=True))


def variety_metrics(responses: Responses, scores: Sequence[float]) -> dict[str, float]:
    """Repetition within responses, shares of distinct and commonest responses, and scores between and within prompts.

    `objective/between_prompt_share` is left out unless the batch has several responses for most of its prompts.
    """
    tokens = token_lists(responses.response_ids, responses.response_mask)
    distinct, commonest = variety(tokens)
    between = between_prompt_share(token_lists(responses.prompt_ids, responses.prompt_mask), scores)
    found = {"repetition": repetition(tokens), "distinct_share": distinct, "commonest_share": commonest}
    found |= {} if between is None else {"between_prompt_share": between}
    return {f"objective/{name}": value for name, value in found.items()}


def sampling_metrics(rollout: Rollout, args: SalsaPPOConfig) -> dict[str, float]:
    """Metrics of the importance weights, with TRL's names; {} without importance_sampling_correction.

    min, mean and max are of the weights; `clipped` is the share whose ratio was outside the bounds. In sequence modes
    each response counts once. Tokens whose log-prob the sampler did not report have no sampling_logp_difference.
    """
    weights, sampled = rollout.importance_weights, rollout.sampling_logprobs
    if weights is None or sampled is None:
        return {}
    mask, mode = rollout.responses.response_mask, args.importance_sampling_mode
    difference = (rollout.logprobs - sampled).abs()
    known = mask & ~difference.isnan()
    difference = difference.masked_fill(~known, 0.0)
    clipped = weights != losses.importance_ratios(rollout.logprobs, sampled, mask, mode)
    if mode.startswith("sequence"):
        weights, clipped, mask = weights[:, :1], clipped[:, :1], mask[:, :1]
    count = mask.sum()
    found = torch.stack([
        weights.masked_fill(~mask, torch.inf).min(), weights.masked_fill(~mask, 0.0).sum() / count,
        weights.masked_fill(~mask, 0.0).max(), (clipped & mask).sum() / count,
        difference.sum() / known.sum().clamp(min=1), difference.max(),
    ])  # fmt: skip
    names = ("ratio/min", "ratio/mean", "ratio/max", "ratio/clipped")
    keys = [f"sampling/importance_sampling_{name}" for name in names]
    keys += [f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")]
    return dict(zip(keys, found.tolist(), strict=True))


def completion_rows(
    responses: Responses, columns: Mapping[str, Tensor], count: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Yield a row for each of the first `count` responses: prompt, response, and values of `columns`."""
    prompts = decode(tokenizer, responses.prompt_ids[:count], responses.prompt_mask[:count])
    answers = decode(tokenizer, responses.response_ids[:count], responses.response_mask[:count])
    numbers = torch.stack(list(columns.values()), dim=1)[:count].tolist()
    for prompt, answer, row in zip(prompts, answers, numbers, strict=True):
        yield {"prompt": prompt, "response": answer, **dict(zip(columns, row, strict=True))}


class LogFiles:
    """The log files in output_dir, to which each update appends. Logs of earlier runs are renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun = folder, False
        self.own: dict[str, int] = {}
        """File name → byte position of this run's first line. Before it are lines of an earlier run, if `begin` has not yet
        renamed them: an evaluation may be logged before training."""

    def begin(self) -> str | None:
        """Start the logs of a run.

        Logs of an earlier run are renamed to metrics.1.jsonl and so on. Returns a message about that, or None.
        """
        if self.begun:
            return None
        self.begun = True
        sizes = {file: self.own.get(file.name, file.stat().st_size) for file in self._existing()}
        earlier = {file: size for file, size in sizes.items() if size}
        if not earlier:
            return None
        number = self._free_number()
        for file, size in earlier.items():
            kept = numbered(file, number)
            file.rename(kept)
            own = kept.read_bytes()[size:]
            if own:
                file.write_bytes(own)
            os.truncate(kept, size)
        return f"{self.folder}: the logs of an earlier run are kept as {numbered(Path(METRICS), number)} and so on"

    def keep(self) -> str:
        """Copy the logs, before `cut` truncates them. Returns a message about the copies."""
        number = self._free_number()
        for file in self._existing():
            shutil.copyfile(file, numbered(file, number))
        return f"{self.folder}: a copy of the logs is kept as {numbered(Path(METRICS), number)} and so on"

    def take(self, folder: Path) -> str | None:
        """Copy the logs from another folder, to continue them here. Logs that are already here are renamed by `begin`.

        Returns the message of `begin`: None if nothing was renamed.
        """
        self.own.clear()
        message = self.begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, self.folder / name)
        return message

    def _existing(self) -> list[Path]:
        return [self.folder / name for name in FILES if (self.folder / name).exists()]

    def _free_number(self) -> int:
        """The smallest number that no renamed log has."""
        taken = {path.name for path in self.folder.glob("*.jsonl")}
        return next(n for n in itertools.count(1) if not any(numbered(Path(name), n).name in taken for name in FILES))

    def write(self, row: dict[str, float], rollout: Rollout, args: SalsaPPOConfig,
              tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:  # fmt: skip
        """Append the metrics of an update and some of its responses. Returns the responses' rows."""
        self._append(METRICS, [row])
        if not args.logged_completions:
            return []
        columns = {"score": rollout.scores, "kl": rollout.kl.sum(-1)}
        samples = completion_rows(rollout.responses, columns, args.logged_completions, tokenizer)
        rows = [{"update": row["update"], **sample} for sample in samples]
        self._append(COMPLETIONS, rows)
        return rows

    def write_evaluation(self, update: int, responses: Responses, scores: Tensor, count: int,
                         tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
        """Append the first `count` responses of an evaluation. update: number of updates made so far."""
        rows = completion_rows(responses, {"score": scores}, count, tokenizer) if count else []
        self._append(EVALUATIONS, [{"update": update, **row} for row in rows])

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            self.own.setdefault(name, file.tell())
            file.writelines(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def sync(self) -> dict[str, int]:
        """Flush the files to the disk and return their sizes in bytes."""
        sizes = {}
        for path in self._existing():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                sizes[path.name] = os.fstat(file.fileno()).st_size
        return sizes

    def cut(self, sizes: Mapping[str, int]) -> list[str]:
        """Truncate each log to its size in `sizes`, or to 0. Returns a message for each log that is shorter."""
        self.begun = True
        lines = [checkpoints.truncate_log(self.folder / name, sizes.get(name, 0)) for name in FILES]
        return [line for line in lines if line is not None]


def numbered(file: Path, number: int) -> Path:
    """The path with a number in its name: metrics.jsonl becomes metrics.1.jsonl."""
    return file.with_name(f"{file.stem}.{number}{file.suffix}")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}

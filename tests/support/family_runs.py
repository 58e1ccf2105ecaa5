"""A whole small run on a tiny model of a real family, compared with plain Transformers and PEFT.

    python tests/support/family_runs.py [FAMILY …]      the table of model × mode (needs ../shared/hub beside the checkout)

The expected numbers come from plain Transformers and PEFT: the folders that the run saved, opened anew.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from paths import SHARED
from peft import PeftModel

from salsa_peft.models.base import classifier_class
from salsa_peft.recipe import processes, worker
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training.ppo.rollout import RolloutMaker

HUB = SHARED / "hub"
MODES = ("lora", "full")
WORDS = ("red", "green", "blue", "tall", "small", "old", "new", "warm", "cold", "quiet", "loud", "round")


class Outcome(NamedTuple):
    """How a run ended, and how far its numbers are from the plain ones."""

    state: str
    """done | refused (by --dry-run) | failed (after something trained)"""
    reason: str = ""
    kl: float = 0.0
    """Largest difference of a token's log-ratio, policy to reference, at PPO's start."""
    soup: float = 0.0
    """Largest difference of a weight of the soup from the float32 mean of the seeds."""
    score: float = 0.0
    """Largest difference of a response's score from the reward model's own forward."""
    size: float = 0.0
    """The largest of those log-ratios: what the differences are to be seen against."""

    @property
    def cell(self) -> str:
        """For a table."""
        numbers = f"KL {self.kl:.1e} of {self.size:.1e}, soup {self.soup:.1e}, score {self.score:.1e}"
        return f"done ({numbers})" if self.state == "done" else f"{self.state}: {self.reason}"


def families() -> list[str]:
    """Of the shared hub."""
    return sorted(path.parent.name for path in (HUB / "models").glob("*/config.json"))


def make_family(name: str, folder: Path) -> Path:
    """Small random weights under a family's own names, with its own configuration and tokenizer."""
    command = [sys.executable, str(HUB / "make_tiny.py"), name, str(folder), "--strict"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def write_rows(folder: Path) -> None:
    """chats.jsonl and pairs.jsonl."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    chats = [
        {"messages": [turn("user", f"What is {word}?"), turn("assistant", f"It is {word} indeed.")]} for word in WORDS
    ]
    pairs = [
        {"prompt": [turn("user", f"Say {word}{' please' * (number % 3)}.")], "chosen": [turn("assistant", f"Yes: {word}.")],
         "rejected": [turn("assistant", f"No {word}, no {word}.")]} for number, word in enumerate(WORDS)
    ]  # fmt: skip
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: Path, base: Path, template: str, **more: Any) -> Path:
    """Two seeds of two steps, a reward model, the soup, one update of PPO against it, an evaluation."""
    write_rows(folder)
    content = {
        "name": "hub", "threads": 1,
        "model": {"base": str(base), "max_length": 128, "chat_template": template},
        "data": {"demonstrations": "chats.jsonl", "preferences": "pairs.jsonl", "prompts": "pairs.jsonl"},
        "sft": {"seeds": [0, 1], "batch_size": 2, "max_steps": 2, "learning_rate": 1e-2},
        "reward": {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2},
        "generation": {"max_new_tokens": 8, "batch_size": 4},
        "ppo": {"batch_size": 4, "num_mini_batches": 1, "num_ppo_epochs": 1, "max_steps": 1},
        "policies": {"salsa": {"reference": "soup"}}, "landscape": None,
        "evaluate": {"prompts": {"mine": {"path": "pairs.jsonl", "limit": 2}}},
    }  # fmt: skip
    for key, value in more.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    path = folder / "recipe.json"
    path.write_text(json.dumps(content))
    return path


PAPER = {"llama-2-7b-hf": "llama2_full", "mistral-7b-v0.1": "mistral_full", "gemma-2b": "gemma_full"}
"""Family → the paper's recipe of it."""


def paper_words(name: str, base: Path, folder: Path) -> list[str]:
    """The paper's recipe of a family on its tiny folder and local rows, cut to a few steps."""
    write_rows(folder)
    chats, pairs = folder / "chats.jsonl", folder / "pairs.jsonl"
    sets = {
        "model.base": str(base), "model.max_length": 128, "model.attn_implementation": "sdpa",
        "data": {"demonstrations": str(chats), "preferences": str(pairs), "prompts": str(pairs)},
        **{f"sft.{key}": value for key, value in {"batch_size": 2, "micro_batch_size": 1, "max_steps": 2, "learning_rate": 1e-2}.items()},
        **{f"reward.{key}": value for key, value in {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}.items()},
        "generation.max_new_tokens": 8, "ppo.batch_size": 4, "ppo.num_mini_batches": 1, "ppo.num_ppo_epochs": 1, "ppo.max_steps": 1,
        "landscape": None, "evaluate.judge": None, "evaluate.prompts": {"mine": {"path": str(pairs), "limit": 2}},
        "evaluate.pairs": [["salsa", "ppo"]],
    }  # fmt: skip
    return [PAPER[name], *(word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}"))]


def run(words: list[str], base: Path, folder: Path, mode: str) -> Outcome:
    """`salsa run WORDS`, its stages in this process."""
    words = [*words, "--output-dir", str(folder), *(["--lora"] if mode == "lora" else [])]
    code, said = _said([*words, "--dry-run"])
    if code:
        return Outcome("refused" if code == 2 else "failed", said)
    with _inline() as rollouts:
        code, said = _said([*words, "--debug"])
    if code:
        return Outcome("failed", said)
    return compare(base, folder, mode, rollouts, auto_class(base))


def _said(words: list[str]) -> tuple[int, str]:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(io.StringIO()):
        code = salsa_run(words)
    lines = [line for line in stream.getvalue().splitlines() if line.strip()]
    return code, lines[-1] if lines else ""


@contextlib.contextmanager
def _inline() -> Iterator[dict[str, Any]]:
    """Within it stages run in this process; → the first rollout of each policy, by its folder."""
    rollouts: dict[str, Any] = {}
    forked, made = processes.run_job, RolloutMaker.__call__

    def in_here(job: Any, log: Path, **_: Any) -> processes.Result:
        report = worker.run_stage(job)
        if "line" in report:
            raise processes.StageError(f"{job.unit.id}: {report['line']}\n{report['trace']}")
        return processes.to_result({0: report}, job.unit.id, log, debug=False)

    def listened(self: Any, *args: Any, **options: Any) -> Any:
        rollout = made(self, *args, **options)
        rollouts.setdefault(Path(self.args.output_dir).parent.name, rollout)
        return rollout

    processes.run_job, RolloutMaker.__call__ = in_here, listened  # type: ignore[method-assign]
    try:
        yield rollouts
    finally:
        processes.run_job, RolloutMaker.__call__ = forked, made  # type: ignore[method-assign]


def unit(folder: Path, name: str) -> Path:
    """The one finished folder of a unit."""
    (found,) = [path.parent for path in (folder / "stages" / name).glob("*/manifest.json")]
    return found


def compare(base: Path, folder: Path, mode: str, rollouts: dict[str, Any], auto: Any) -> Outcome:
    """The run's numbers against plain forwards and sums; of PPO those of the policy whose reference is the soup."""
    rollout = rollouts["salsa"]

    def opened(name: str) -> Any:
        if mode == "full":
            return auto.from_pretrained(unit(folder, name), dtype=torch.float32).eval()
        return PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), unit(folder, name)).eval()

    def merged(name: str) -> dict[str, torch.Tensor]:
        model = opened(name)
        return dict((model.merge_and_unload() if mode == "lora" else model).named_parameters())

    responses = rollout.responses
    ratios = [_logprobs(opened(name), responses) for name in ("sft/seed-0", "soup")]
    kl = ((ratios[0] - ratios[1]) * responses.response_mask - rollout.kl).abs().max().item()
    soup, *seeds = [merged(name) for name in ("soup", "sft/seed-0", "sft/seed-1")]
    means = {name: (seeds[0][name].float() + seeds[1][name].float()) / 2 for name in seeds[0]}
    far = max((soup[name].float() - mean).abs().max().item() for name, mean in means.items())
    score = (_scores(base, unit(folder, "reward"), mode, responses) - rollout.scores).abs().max().item()
    return Outcome("done", "", kl, far, score, rollout.kl.abs().max().item())


@torch.no_grad()
def _logprobs(model: Any, responses: Any) -> torch.Tensor:
    """Log-probs of the responses' tokens (B, T), each row by itself and without padding."""
    found = torch.zeros(responses.response_mask.shape)
    for row, (prompt, response) in enumerate(_rows(responses)):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        found[row, : len(response)] = logits[places, torch.tensor(response)]
    return found


@torch.no_grad()
def _scores(base: Path, reward: Path, mode: str, responses: Any) -> torch.Tensor:
    """The reward model's scores (B,), each row by itself, by the forward that TRL's RewardTrainer trains."""
    auto = classifier_class(transformers.AutoConfig.from_pretrained(base))
    options = {"num_labels": 1, "dtype": torch.float32}
    if mode == "full":
        model: Any = auto.from_pretrained(reward, **options).eval()
    else:
        model = PeftModel.from_pretrained(auto.from_pretrained(base, **options), reward).eval()
    model.config.get_text_config().pad_token_id = None
    for name, module in model.named_modules():
        if name.endswith("score"):  # float32 also over a trunk in 8 bits
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    texts = [torch.tensor([prompt + response]) for prompt, response in _rows(responses)]
    return torch.stack([model(input_ids=ids).logits[0, 0].float() for ids in texts])


def _rows(responses: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (responses.prompt_ids[row][responses.prompt_mask[row]].tolist(),
         responses.response_ids[row][responses.response_mask[row]].tolist())
        for row in range(len(responses.response_ids))
    ]  # fmt: skip


def auto_class(base: Path) -> Any:
    """What Transformers opens a base with."""
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    multimodal = kind.endswith("ForConditionalGeneration")
    return transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM


def run_family(name: str, mode: str, folder: Path) -> Outcome:
    """One cell of the table."""
    base = folder / "base"
    if not base.is_dir():
        make_family(name, base)
    place = folder / mode
    place.mkdir()
    return run([str(write_recipe(place, base, "zephyr"))], base, place / "run", mode)


def run_paper(name: str, mode: str, folder: Path) -> Outcome:
    """The paper's own recipe of a family."""
    base = folder / "base"
    if not base.is_dir():
        make_family(name, base)
    place = folder / f"paper-{mode}"
    place.mkdir()
    return run(paper_words(name, base, place), base, place / "run", mode)


def main(names: list[str]) -> None:
    """Print the table."""
    for name in names or families():
        with tempfile.TemporaryDirectory() as folder:
            rows = [(mode, made) for made in (run_family, *([run_paper] if name in PAPER else [])) for mode in MODES]
            for mode, made in rows:
                started = time.perf_counter()
                cell = made(name, mode, Path(folder)).cell
                what = PAPER[name] if made is run_paper else name
                print(f"| {what} | {mode} | {cell} | {time.perf_counter() - started:.0f} s |", flush=True)


if __name__ == "__main__":
    importlib.import_module("salsa_peft.recipe.preload")
    main(sys.argv[1:])

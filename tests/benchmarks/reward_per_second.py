"""Reward for CPU time: TRL 1.12's PPO, TRL's RLOO and our PPO in turn. Prints one JSON line with the ratios.

    python tests/benchmarks/reward_per_second.py STORIES_FOLDER --peer-python PEER/bin/python [--replicates 4]
                                                 [--tasks stories,world] [--select trl-ppo,ours/default] [--raw FILE]
    python tests/benchmarks/reward_per_second.py FOLDER --run ours/default --tasks world --replicate 0

The second form is one measurement, as the first form starts it. STORIES_FOLDER has a small language model of English
stories (../shared/stories260k beside the repository). The tasks:

- stories: 30 updates of 64 responses of at most 48 tokens to beginnings of stories. The reward is the number of happy
  words minus the number of sad words.
- world: 20 updates of 128 responses of at most 10 tokens to instructions of the embedded world. The reward is the
  world's program `gold`. The base is pre-trained anew, on other data, for each replicate. (After 20 updates the reward
  hardly rises with any of the tools, and the time to a final reward would be that of chance.)

The same for all tools: the base, a new LoRA adapter of rank 8 on all linear layers, the base as reference, β, the
learning rate and its linear decay, 2 epochs × 2 minibatches, temperature 1, float32, one thread. Everything else is
each tool's default, except that TRL does not sample for its logs and that gradient checkpointing, RLOO's default, is
off, and that our guard `collapse` warns instead of stopping. RLOO samples 4 responses to a prompt. `ours/recommended`
sets RECOMMENDED. Each replicate has its own seeds. TRL 1.12's PPO runs in the peer's Python, the others in this one.
Odd replicates run in the reverse order.

Each call of the reward notes the batch's mean score and the CPU seconds since train() began. The final reward is the
mean of the last three batches. `cpu_to_final` is the CPU time after which the mean of our last three batches is first
at least the peer's final reward, divided by the same time of the peer; `n` is the number of replicates in which it is.
Figures over the replicates have a median and a mean with its 95% t-interval.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ppo_vs_trl import ROOT, available_gb, facts

MINIBATCHES, EPOCHS, RANK, GENERATIONS = 2, 2, 8, 4
WINDOW = 3
"""Number of batches whose mean is compared."""
TARGET = 0.4
"""Largest median of cpu_to_final that is aimed at."""
RECOMMENDED: dict[str, Any] = {"value_head_learning_rate": 1e-2, "old_logprobs": "rollout"}
"""Options of `ours/recommended`."""
OPENINGS = (
    "Once upon a time, there was a", "One day, a little girl named Sue", "Tom and his dad went to the",
    "The old cat sat on the", "Mia had a new toy. It was a", "A small bird lived in the", "Max and Lily wanted to",
    "In the garden, there was a big", "The boy looked at the sky and", "One morning, Anna found a",
    "There was a frog who liked to", "Ben was playing with his ball when", "The farmer had a cow and a",
    "It was raining, so the children", "A bear came out of the", "Her mom said that they would",
)  # fmt: skip
HAPPY = re.compile(
    r"\b(happy|happily|smiled?|laugh(ed)?|fun|loved?|hug(ged)?|friends?|play(ed)?|good|nice|kind|great|proud|safe|joy)\b"
)
SAD = re.compile(r"\b(sad|cry|cried|scared|afraid|angry|mad|hurt|pain|lost|broken?|bad|alone|sorry|upset|worried)\b")


def happy_words(prompts: list[str], completions: list[str], finished: list[bool]) -> list[float]:
    """The number of happy words of each completion minus the number of its sad words."""
    texts = [text.lower() for text in completions]
    return [float(len(HAPPY.findall(text)) - len(SAD.findall(text))) for text in texts]


def world_gold(prompts: list[str], completions: list[str], finished: list[bool]) -> list[float]:
    """The embedded world's own reward."""
    from salsa_peft.data.toy_language import gold  # pure Python, so the peer's Python can import it

    return gold(prompts, completions, finished)


class Task(NamedTuple):
    """What is the same for all tools."""

    batch: int
    tokens: int
    """Maximum length of a response."""
    updates: int
    learning_rate: float
    kl_coef: float
    reward: Callable[[list[str], list[str], list[bool]], list[float]]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.updates * MINIBATCHES * EPOCHS


TASKS = {"stories": Task(64, 48, 30, 1e-3, 0.05, happy_words), "world": Task(128, 10, 20, 3e-3, 0.03, world_gold)}


def cpu_s() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Meter:
    """The task's reward, which notes the size, the mean score and the CPU seconds of each batch."""

    def __init__(self, task: Task) -> None:
        self.reward, self.start, self.steps = task.reward, math.nan, 0
        self.batches: list[tuple[int, float, float]] = []

    def __call__(self, prompts: list[str], completions: list[str], finished: list[bool]) -> list[float]:
        """Return the scores."""
        scores = self.reward(prompts, completions, finished)
        self.batches.append((len(scores), statistics.fmean(scores), cpu_s() - self.start))
        return scores

    def count_step(self, *_: Any) -> None:
        """Count an optimizer step."""
        self.steps += 1


class Setup(NamedTuple):
    """What a trainer is made of."""

    task: Task
    folder: str
    tokenizer: Any
    prompts: list[str]
    reward: Meter
    arguments: dict[str, Any]
    """Options of TrainingArguments."""

    @property
    def policy(self) -> dict[str, Any]:
        """Base and configuration of the new adapter."""
        import torch
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM

        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        return {"model": AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32), "peft_config": lora}

    @property
    def tokens(self) -> list[list[int]]:
        """The prompts' token ids."""
        return self.tokenizer(self.prompts)["input_ids"]


def trl_ppo(setup: Setup) -> Any:
    """TRL 1.12's PPOTrainer, whose value model is a copy of the base that is trained in full."""
    import torch
    import trl.experimental.ppo.ppo_trainer as ppo
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    task, tokenizer, reward_of, rewarded = setup.task, setup.tokenizer, ppo.get_reward, torch.nn.Identity()

    def get_reward(model: Any, ids: Any, pad: int, width: int) -> Any:
        """TRL's function, with the task's reward instead of a reward model. width: of the prompts."""
        if model is not rewarded:
            return reward_of(model, ids, pad, width)
        texts = [tokenizer.batch_decode(part, skip_special_tokens=True) for part in ids.tensor_split([width], dim=1)]
        finished = (ids[:, width:] == tokenizer.eos_token_id).any(1).tolist()
        return None, torch.tensor(setup.reward(*texts, finished)), None

    ppo.get_reward = get_reward
    value = AutoModelForSequenceClassification.from_pretrained(setup.folder, num_labels=1, dtype=torch.float32)
    value.config.pad_token_id = tokenizer.pad_token_id
    data = Dataset.from_dict({"input_ids": setup.tokens})
    args = ppo.PPOConfig(
        **setup.arguments, per_device_train_batch_size=task.batch, local_rollout_forward_batch_size=task.batch,
        gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, temperature=1.0,
        total_episodes=task.updates * task.batch, response_length=task.tokens, stop_token="eos", kl_coef=task.kl_coef,
        num_sample_generations=0, logging_steps=1,
    )  # fmt: skip
    return ppo.PPOTrainer(
        args, tokenizer, ref_model=None, reward_model=rewarded, value_model=value, train_dataset=data, eval_dataset=data,
        **setup.policy,
    )  # fmt: skip


def trl_rloo(setup: Setup) -> Any:
    """TRL's RLOOTrainer."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    task, end = setup.task, setup.tokenizer.eos_token_id

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return setup.reward(prompts, completions, [ids[-1] == end for ids in completion_ids])

    args = RLOOConfig(
        **setup.arguments, per_device_train_batch_size=task.batch // MINIBATCHES, gradient_accumulation_steps=1,
        steps_per_generation=MINIBATCHES, num_iterations=EPOCHS, num_generations=GENERATIONS, max_steps=task.steps,
        max_completion_length=task.tokens, beta=task.kl_coef, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": setup.prompts})
    return RLOOTrainer(
        args=args, reward_funcs=reward, train_dataset=data, processing_class=setup.tokenizer, **setup.policy
    )


def ours(setup: Setup, **options: Any) -> Any:
    """SalsaPPOTrainer with these further options."""
    from peft import get_peft_model

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer

    task = setup.task
    args = SalsaPPOConfig(
        **setup.arguments, batch_size=task.batch, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
        max_steps=task.steps, max_new_tokens=task.tokens, kl_coef=task.kl_coef, kl_control="fixed",
        guards={"collapse": "warn"}, **options,
    )  # fmt: skip
    return SalsaPPOTrainer(
        get_peft_model(*setup.policy.values()), args=args, train_dataset=[{"input_ids": ids} for ids in setup.tokens],
        references=["base"], reward_funcs=setup.reward, processing_class=setup.tokenizer,
    )  # fmt: skip


PEERS: dict[str, Callable[[Setup], Any]] = {"trl-ppo": trl_ppo, "trl-rloo": trl_rloo}
OURS: dict[str, Callable[[Setup], Any]] = {
    "ours/default": ours,
    "ours/recommended": functools.partial(ours, **RECOMMENDED),
}
TOOLS = PEERS | OURS


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train with one tool in this process → its figures."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.replicate)
    task, prompts = TASKS[args.tasks], [*OPENINGS] * 20
    if args.tasks == "world":
        prompts = json.loads((Path(args.model) / "prompts.json").read_text())
    tokenizer, meter = AutoTokenizer.from_pretrained(args.model, padding_side="left"), Meter(task)
    with tempfile.TemporaryDirectory() as output:
        arguments = {"output_dir": output, "learning_rate": task.learning_rate, "seed": args.replicate, "use_cpu": True,
                     "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
        setup = Setup(task, args.model, tokenizer, prompts, meter, arguments)
        trainer = TOOLS[args.run](setup)
        adapter = [p for name, p in trainer.model.named_parameters() if ".lora_" in name and p.requires_grad]
        register_optimizer_step_post_hook(meter.count_step)
        meter.start = cpu_s()
        trainer.train()
        seconds = cpu_s() - meter.start
    sizes, scores, cpu = zip(*meter.batches, strict=True)
    return {
        "cpu_s": round(seconds, 2), "scores": [round(score, 4) for score in scores],
        "cpu_at_score": [round(at, 2) for at in cpu], "batch_sizes": sorted(set(sizes)),
        "optimizer_steps": meter.steps, "adapter": sum(parameter.numel() for parameter in adapter),
        "prompts": hashlib.sha256(json.dumps(setup.tokens).encode()).hexdigest()[:12],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def make_world(args: argparse.Namespace) -> dict[str, Any]:
    """Write the embedded world's base, pre-trained with the replicate's seed, and a prompt for each response."""
    import torch

    from salsa_peft.config.options.toy import Toy
    from salsa_peft.data import toy, toy_language

    torch.set_num_threads(args.threads)
    folder, seed, task, tokenizer = Path(args.model), args.replicate, TASKS["world"], toy.make_tokenizer()
    model, loss = toy.pretrain(Toy(seed=seed), tokenizer, lambda *_: None)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    drawn = toy_language.draw_prompts(random.Random(seed), task.updates * task.batch, toy_language.LENGTHS_IN, seed)
    (folder / "prompts.json").write_text(json.dumps([f"<bos><user>{prompt}<assistant>" for prompt in drawn]))
    return {"pretrain_loss": loss}


def measure(name: str, task: str, replicate: int, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process → its figures. Raises RuntimeError with the end of what it wrote where it failed."""
    python = args.peer_python if name == "trl-ppo" else sys.executable
    command = [python, __file__, model, "--run", name, "--tasks", task, "--replicate", str(replicate),
               "--threads", str(args.threads)]  # fmt: skip
    before = {"load": round(os.getloadavg()[0], 2), "available_gb": available_gb()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads),
                   "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return {"run": name, "task": task, "replicate": replicate, "before": before} | json.loads(
        done.stdout.splitlines()[-1]
    )


def measure_all(args: argparse.Namespace, tasks: list[str], names: list[str]) -> list[dict[str, Any]]:
    """All measurements, replicate by replicate."""
    raw = []
    for replicate in range(args.replicate, args.replicate + args.replicates):
        for task in tasks:
            with tempfile.TemporaryDirectory() as world:
                model = world if task == "world" else args.model
                if task == "world":
                    measure("make-world", task, replicate, world, args)
                for name in names if replicate % 2 == 0 else names[::-1]:
                    row = measure(name, task, replicate, model, args)
                    raw.append(row)
                    print(f"{task} {replicate} {name}: {final(row):.3f}, {row['cpu_s']} s of CPU", file=sys.stderr)
                    if args.raw:
                        with args.raw.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
    return raw


def final(row: dict[str, Any]) -> float:
    """The final reward."""
    return statistics.fmean(row["scores"][-WINDOW:])


def seconds_to(row: dict[str, Any], reward: float) -> float | None:
    """CPU seconds after which the mean of the last batches is first at least `reward`; None if it never is."""
    scores, seconds = row["scores"], row["cpu_at_score"]
    ends = range(WINDOW, len(scores) + 1)
    return next((seconds[end - 1] for end in ends if statistics.fmean(scores[end - WINDOW : end]) >= reward), None)


def estimate(values: list[float]) -> dict[str, Any] | None:
    """Median, and mean with its interval; None without values."""
    from salsa_peft.utils.statistics import mean_interval

    if not values:
        return None
    found = mean_interval(values)
    numbers = {"median": statistics.median(values), "mean": found.mean, "low": found.low, "high": found.high}
    return {**{name: round(number, 3) for name, number in numbers.items()}, "n": found.n}


def compare(mine: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against a peer, on the same replicates in the same order."""
    both = list(zip(mine, peers, strict=True))
    times = [(seconds_to(own, final(peer)), seconds_to(peer, final(peer))) for own, peer in both]
    ratios = [own / peer for own, peer in times if own is not None and peer is not None]
    difference, to_final = estimate([final(own) - final(peer) for own, peer in both]), estimate(ratios)
    reached = len(ratios) == len(both) and statistics.median(ratios) <= TARGET
    return {
        "final": estimate([*map(final, mine)]), "final_of_peer": estimate([*map(final, peers)]), "difference": difference,
        "cpu_to_final": to_final, "cpu_in_all": estimate([own["cpu_s"] / peer["cpu_s"] for own, peer in both]),
        "reached": {"reward": statistics.fmean([final(own) - final(peer) for own, peer in both]) >= 0, "cpu": reached},
    }  # fmt: skip


def odd_work(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose batches, optimizer steps, prompts or number of trained LoRA weights are not those of the task."""
    odd = []
    for row in raw:
        task, first = TASKS[row["task"]], next(r for r in raw if all(r[k] == row[k] for k in ("task", "replicate")))
        did = {key: row[key] for key in ("batch_sizes", "optimizer_steps", "prompts", "adapter")}
        expected = {"batch_sizes": [task.batch], "optimizer_steps": task.steps, "prompts": first["prompts"],
                    "adapter": first["adapter"]}  # fmt: skip
        if did != expected or len(row["scores"]) != task.updates:
            odd.append({key: row[key] for key in ("run", "task", "replicate")} | did)
    return odd


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=lambda path: str(Path(path).resolve()), help="folder of the stories' model")
    parser.add_argument("--peer-python", help="of an environment with trl 1.12.0 (../shared/peers/README.md)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names by commas")
    parser.add_argument("--select", default=",".join(TOOLS), help="names by commas")
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--replicate", type=int, default=0, help="number of the first replicate, or that of --run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--raw", type=Path, help="a file to which every measurement is added as it comes")
    parser.add_argument("--cpu", type=int, help="the one core that all processes may use")
    parser.add_argument("--run", choices=[*TOOLS, "make-world"], help="one measurement, in this process")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    sys.path.insert(0, str(ROOT))
    if args.run:
        print(json.dumps(make_world(args) if args.run == "make-world" else train(args)))
        return
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    if not args.peer_python:
        raise SystemExit("--peer-python is required: the Python of an environment with trl 1.12.0")
    tasks, names = args.tasks.split(","), args.select.split(",")
    for option, chosen, known in (("--tasks", tasks, TASKS), ("--select", names, TOOLS)):
        if unknown := set(chosen) - set(known):
            raise SystemExit(f"{option}: {', '.join(sorted(unknown))} is unknown. Choose from {', '.join(known)}")
    machine, raw = facts(args), measure_all(args, tasks, names)
    rows = {
        (task, name): [row for row in raw if (row["task"], row["run"]) == (task, name)]
        for task in tasks
        for name in names
    }
    found = {
        task: {
            peer: {mine: compare(rows[task, mine], rows[task, peer]) for mine in OURS if mine in names}
            for peer in PEERS
            if peer in names
        }
        for task in tasks
    }
    odd = odd_work(raw)
    print(json.dumps({"benchmark": "reward_per_second", "found": found, "odd": odd, "machine": machine, "raw": raw}))
    if odd:
        raise SystemExit(f"unequal work: {odd}")


if __name__ == "__main__":
    main()

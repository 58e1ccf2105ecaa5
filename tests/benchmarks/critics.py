"""PPO with each kind of critic and λ on a small story model, over replicates: reward, KL, CPU seconds and memory.

    python tests/benchmarks/critics.py MODEL OUT.jsonl [--arms "none;head, λ 1"] [--replicates 0,1,2] [--tokens 48] [--updates 30]
    python tests/benchmarks/critics.py --table OUT.jsonl

MODEL: the folder or Hub id of a causal language model that continues stories. The reward of a continuation is its number
of happy words less its number of sad words. A replicate has a LoRA initialisation and a PPO seed of its own. 64 responses
an update, 2 epochs of 2 minibatches, a fixed β of 0.05 against the base, learning rate 1e-3. OUT.jsonl gets a line for each
run; runs that it has are not repeated. docs/ppo.md has the table that this printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

HAPPY = (
    "happy smiled smile laughed love loved fun nice friend friends good great kind hug proud glad best beautiful thank"
    " thanks yummy play played joy safe"
)
SAD = "sad cried cry scared angry mad hurt bad mean afraid lost broke broken fell pain sorry no not upset worried alone"
STARTS = [
    "Once upon a time, there was a", "One day, a little boy named Tim", "Lily and her mom went to the", "There was a big dog who",
    "Ben found a red ball in the", "The little bird wanted to", "Sue had a small cat. The cat", "Tom and Sam saw a",
]  # fmt: skip
FAST = {"value_head_learning_rate": 1e-2}
TRL, SMALL = {"vf_coef": 0.1}, {"vf_coef": 1e-3}
ARMS: dict[str, dict[str, Any]] = {
    "head, λ .95, from 0": {"lam": 0.95, **TRL},
    "head, λ .95": {"lam": 0.95, **TRL},
    "head 1e-2, λ .95": {"lam": 0.95, **TRL, **FAST},
    "head 1e-2, λ .95, unclipped": {"lam": 0.95, "cliprange_value": 1e6, **TRL, **FAST},
    "head 1e-2, λ .95, critic's 1": {"lam": 0.95, "lam_value": 1.0, **TRL, **FAST},
    "head, λ 1": {"lam": 1.0, **TRL},
    "head, λ 1, detached": {"lam": 1.0, **TRL},
    "head 1e-2, λ 1": {"lam": 1.0, **TRL, **FAST},
    "head 1e-2, λ 1, from 0": {"lam": 1.0, **TRL, **FAST},
    "head 1e-2, λ 1, 2 warm-up": {"lam": 1.0, "value_warmup_updates": 2, **TRL, **FAST},
    "head 1e-2, λ by length, critic's 1": {"lam_length_alpha": 1.0, "lam_value": 1.0, **TRL, **FAST},
    "head, λ .95, vf_coef .001": {"lam": 0.95, **SMALL},
    "head, λ 1, vf_coef .001": {"lam": 1.0, **SMALL},
    "head 1e-2, λ 1, vf_coef .001": {"lam": 1.0, **SMALL, **FAST},
    "head, λ by length, critic's 1, vf_coef .001": {"lam_length_alpha": 1.0, "lam_value": 1.0, **SMALL},
    "adapter, λ 1": {"lam": 1.0, "value": "adapter", **SMALL},
    "adapter, λ .95, critic's 1, 2 warm-up": {"lam": 0.95, "lam_value": 1.0, "value": "adapter", "value_warmup_updates": 2},
    "none": {"value": "none"},
    "group of 4": {"value": "group", "num_generations": 4},
}  # fmt: skip
"""Name → options of SalsaPPOConfig. "from 0": the value head's bias starts at zero, as in versions before this table.
"detached": the value loss has no gradient in the policy's trunk."""


def reward(completions: list[str], **_: Any) -> list[float]:
    """Number of happy words less number of sad words."""
    words = [re.findall(r"[a-z']+", text.lower()) for text in completions]
    happy, sad = HAPPY.split(), SAD.split()
    return [float(sum(word in happy for word in one) - sum(word in sad for word in one)) for one in words]


def run(model: str, arm: str, replicate: int, tokens: int, updates: int) -> dict[str, Any]:
    """Train one policy, in a process of its own. Returns its curves, CPU seconds and peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
    from salsa_peft.config.options.guards import DEFAULTS
    from salsa_peft.models.value_head import PolicyWithValueHead
    from salsa_peft.training.ppo.rollout import RolloutMaker

    torch.set_num_threads(1)
    torch.manual_seed(replicate)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        if "from 0" in arm:
            start = mock.patch.object(RolloutMaker, "_start_value_bias", lambda _, values, *__: values)
            patches.enter_context(start)
        if "detached" in arm:
            values = PolicyWithValueHead.values
            detached = mock.patch.object(
                PolicyWithValueHead, "values", lambda model, hidden, *rest: values(model, hidden.detach(), *rest)
            )
            patches.enter_context(detached)
        config = SalsaPPOConfig(
            output_dir=folder, seed=replicate, learning_rate=1e-3, batch_size=64, num_mini_batches=2, num_ppo_epochs=2,
            micro_batch_size=32, max_new_tokens=tokens, kl_coef=0.05, kl_control="fixed", max_steps=4 * updates, use_cpu=True,
            bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, logged_completions=2, shown_every=None,
            guards=dict.fromkeys(DEFAULTS, "off"), **ARMS[arm],
        )  # fmt: skip
        prompts = [{"prompt": start} for start in STARTS * 40]
        trainer = SalsaPPOTrainer(
            policy,
            args=config,
            train_dataset=prompts,
            references=["base"],
            reward_funcs=reward,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.process_time()
        trainer.train()
        seconds = time.process_time() - begun
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    names = {"score": "objective/scores", "kl": "objective/kl", "explained": "val/explained_variance"}
    curves = {name: [round(row[key], 4) for row in rows] for name, key in names.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    settings = {"arm": arm, "replicate": replicate, "tokens": tokens, "updates": updates}
    return settings | {"seconds": seconds, "peak_rss_mb": peak, **curves}


def interval(values: list[float], digits: int = 1) -> str:
    """Mean and half width of the 95% t-interval, as text."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table for each length: means over replicates of the first, middle and last updates."""
    settings: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings[row["tokens"], row["updates"]][row["arm"]].append(row)
    for (tokens, updates), arms in settings.items():
        print(f"\n{tokens} tokens, {updates} updates\n")
        print(
            "| critic | n | mean reward, all updates | last 5 updates | KL, last 5 | explained variance | CPU s | peak MB |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for arm in [name for name in ARMS if name in arms]:
            found = arms[arm]
            columns = [
                interval([statistics.fmean(one["score"]) for one in found]),
                interval([statistics.fmean(one["score"][-5:]) for one in found]),
                interval([statistics.fmean(one["kl"][-5:]) for one in found], 0),
                f"{statistics.fmean(statistics.fmean(one['explained']) for one in found):.2f}",
                f"{statistics.fmean(one['seconds'] for one in found):.0f}",
                f"{statistics.fmean(one['peak_rss_mb'] for one in found):.0f}",
            ]
            print(f"| {arm} | {len(found)} | {' | '.join(columns)} |")


def main() -> None:
    """Run what is missing in OUT.jsonl, replicate by replicate, or print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="MODEL OUT.jsonl")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--arms", default=None, help="names, separated by semicolons (default: all)")
    parser.add_argument("--replicates", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--updates", type=int, default=30)
    given = parser.parse_args()
    out = Path(given.files[-1])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if given.table:
        return table(rows)
    done = {(row["arm"], row["replicate"], row["tokens"], row["updates"]) for row in rows}
    for replicate in map(int, given.replicates.split(",")):
        for arm in given.arms.split(";") if given.arms else ARMS:
            if (arm, replicate, given.tokens, given.updates) in done:
                continue
            with ProcessPoolExecutor(max_workers=1) as process:
                row = process.submit(run, given.files[0], arm, replicate, given.tokens, given.updates).result()
            with out.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(arm, replicate, f"{row['seconds']:.0f} s", row["score"][::6], flush=True)
    return None


if __name__ == "__main__":
    main()

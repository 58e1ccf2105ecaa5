"""Does a long PPO run grow? Resident memory and time of each of 2,000 updates on the embedded world. Prints one JSON line.

    OMP_NUM_THREADS=1 python tests/benchmarks/ppo_memory_slope.py [--updates 2000] [--skip 50] [--drop-history]

One process, one thread, the embedded world's base with the policy, a soup of two seeds as reference and a reward adapter, all of
them random adapters of rank 8: what is learned does not matter here. Each update: 32 responses of other lengths, 2 minibatches of 2
micro-batches, 2 PPO epochs, a row in every log; every tenth a checkpoint, two of which stay. The slope is the least-squares line
through the resident set (kB) of the updates after --skip, `slope_se` its standard error for independent residuals, which they
are not quite (so it is too small). Nothing is collected or trimmed for the measurement. `late_to_early` compares the last tenth of the
updates with the tenth before --early (200), by medians. Machines are shared and their speed drifts by a fifth within minutes, so after each
update a yardstick is measured, forwards of one batch through the base: `per_yard` is an update's seconds in these. The learning rate is
next to 0, so that lengths stay what they are. --drop-history forgets Trainer's log_history, to show what the rest grows by.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

BATCH, EPOCHS, MINIBATCHES, SAVE_EVERY = 32, 2, 2, 10
RANK, SPREAD = 8, 0.05
YARDS = 8


class Sample(NamedTuple):
    """What one update left."""

    rss_kb: float
    open_files: int
    seconds: float
    cpu_seconds: float
    per_yard: float
    """seconds, in those of the yardstick that was measured right after it."""
    length: float
    """Mean of the update's responses, which its time goes by."""


def now_rss_kb() -> float:
    """This process's resident set."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def slope(ys: list[float]) -> tuple[float, float]:
    """Least-squares slope of ys over 0, 1, 2 … and its standard error."""
    n = len(ys)
    xs = [i - (n - 1) / 2 for i in range(n)]
    mean, spread = sum(ys) / n, sum(x * x for x in xs)
    b = sum(x * y for x, y in zip(xs, ys, strict=True)) / spread
    residual = sum((y - mean - b * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return b, (residual / (n - 2) / spread) ** 0.5


def adapter_folders(base: Any, tokenizer: Any, folder: Path) -> dict[str, Path]:
    """Random adapters seed-0, seed-1 and reward (with its score head), and the seeds' soup, as folders."""
    import torch
    from peft import LoraConfig, get_peft_model

    from salsa_peft.models.adapters import lora as adapters
    from salsa_peft.models.adapters.names import SCORE_HEAD
    from salsa_peft.soup.lora.stacked_adapter import StackedAdapter

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model, found = base, {}
    for index, name in enumerate(("seed-0", "seed-1", "reward")):
        if index:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(base, config, adapter_name=name)
        generator = torch.Generator().manual_seed(index)
        for parameter in adapters.parameters(model, name):
            parameter.data.normal_(std=SPREAD, generator=generator)
        head = torch.randn(1, base.config.hidden_size, generator=generator)
        extra = {SCORE_HEAD: head} if name == "reward" else None
        found[name] = folder / name
        adapters.save(model, name, found[name], tokenizer, extra)
    found["soup"] = folder / "soup"
    StackedAdapter.load([found["seed-0"], found["seed-1"]]).save(found["soup"], [0.5, 0.5])
    return found


def train(folder: Path, updates: int, drop_history: bool) -> tuple[list[Sample], Any]:
    """That many updates → a sample after each, and the trainer."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
    from salsa_peft.config.options.toy import Toy
    from salsa_peft.config.schema import Model
    from salsa_peft.data import toy
    from salsa_peft.data.toy_language import MAX_NEW_TOKENS
    from salsa_peft.models.adapters import lora as adapters
    from salsa_peft.models.base import load_base
    from salsa_peft.models.tokenizers import load_tokenizer

    torch.set_num_threads(1)
    world = Toy(pretrain_steps=60, pretrain_examples=1000, demonstrations=64, preferences=128, prompts=updates * BATCH,
                eval_prompts=16)  # fmt: skip
    toy.build(world, folder, lambda *_: None)
    tokenizer = load_tokenizer(str(folder / "base"))
    load = lambda: load_base(str(folder / "base"), Model(dtype="float32"), tokenizer)  # noqa: E731
    made = adapter_folders(load(), tokenizer, folder / "adapters")
    model = adapters.attach(load(), made["seed-0"], "policy", trainable=True)
    steps = EPOCHS * MINIBATCHES
    samples: list[Sample] = []
    other, batch = load(), torch.arange(64 * 24).reshape(64, 24) % len(tokenizer)

    def yardstick() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(YARDS):
                other(input_ids=batch)
        return time.perf_counter() - start

    class Watch(TrainerCallback):
        """Samples after each update."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                files, length = len(os.listdir("/proc/self/fd")), state.log_history[-1]["objective/response_length"]
                if drop_history:
                    state.log_history.clear()
                seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
                samples.append(Sample(now_rss_kb(), files, seconds, cpu, seconds / yardstick(), length))
                self.start, self.cpu = time.perf_counter(), time.process_time()

    args = SalsaPPOConfig(
        output_dir=str(folder / "policy"), batch_size=BATCH, num_mini_batches=MINIBATCHES, micro_batch_size=BATCH // MINIBATCHES // 2,
        num_ppo_epochs=EPOCHS, num_train_epochs=1, max_new_tokens=MAX_NEW_TOKENS, learning_rate=1e-12, kl_coef=0.05,
        save_strategy="steps", save_steps=SAVE_EVERY * steps, save_total_limit=2, report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    trainer = SalsaPPOTrainer(
        model, args=args, train_dataset=rows, references=[made["soup"]], reward_funcs=made["reward"], processing_class=tokenizer, callbacks=[Watch()]
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return samples, trainer


def late_to_early(samples: list[Sample], early: int) -> dict[str, float]:
    """Median of the last tenth of the updates / of as many up to `early`; open files as they are."""
    count = max(1, len(samples) // 10)
    parts = samples[max(0, early - count) : early], samples[-count:]

    def medians(name: str) -> list[float]:
        return [statistics.median(getattr(sample, name) for sample in part) for part in parts]

    return {name: round(late / first, 4) for name in Sample._fields for first, late in [medians(name)]}


def report(samples: list[Sample], skip: int, early: int, output: Path, trainer: Any) -> dict[str, Any]:
    """The samples in figures."""
    rss = [sample.rss_kb for sample in samples]
    b, error = slope(rss[skip:])
    mean = lambda part: round(sum(sample.seconds for sample in part) / len(part), 4)  # noqa: E731
    return {
        "benchmark": "ppo_memory_slope", "machine": platform.processor() or platform.machine(), "updates": len(samples),
        "slope_kb_per_update": round(b, 3), "slope_se": round(error, 3), "slope_of_updates": [skip + 1, len(samples)],
        "rss_mb": {"first": round(rss[0] / 1024, 1), f"update {skip + 1}": round(rss[skip] / 1024, 1),
                   "last": round(rss[-1] / 1024, 1), "largest": round(max(rss) / 1024, 1)},
        "open_files": {"first": samples[0].open_files, "last": samples[-1].open_files,
                       "most": max(sample.open_files for sample in samples)},
        "late_to_early": {"early": early, **late_to_early(samples, early)},
        "seconds_per_update": {"first_20": mean(samples[:20]), "last_20": mean(samples[-20:])},
        "log_bytes": {path.name: path.stat().st_size for path in sorted(output.glob("*.jsonl"))},
        "checkpoints": {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in sorted(output.glob("checkpoint-*"))},
        "log_history": len(trainer.state.log_history),
    }  # fmt: skip


def main() -> None:
    """Train in a folder that goes away, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--skip", type=int, default=50, help="updates at the start that the slope leaves out")
    parser.add_argument("--early", type=int, default=200, help="the update that the last ones are compared with")
    parser.add_argument("--drop-history", action="store_true", help="forget Trainer's log_history after each update")
    parser.add_argument("--series", type=Path, help="a file for every update's sample, JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        samples, trainer = train(Path(scratch), args.updates, args.drop_history)
        line = json.dumps(report(samples, args.skip, args.early, Path(scratch) / "policy", trainer))
    if args.series is not None:
        args.series.write_text(json.dumps([sample._asdict() for sample in samples]), encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()

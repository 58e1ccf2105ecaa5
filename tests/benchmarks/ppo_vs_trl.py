"""PPO on equal work: TRL 1.12, the last release with a PPOTrainer, and ours, in turn. Prints one JSON line with the ratios.

    python tests/benchmarks/ppo_vs_trl.py MODEL_FOLDER --peer-python PEER/bin/python [--lengths mixed] [--rounds 2]
                                          [--select peer/lora,ours/lora-reward-lora/rollout] [--raw FILE]
    python tests/benchmarks/ppo_vs_trl.py MODEL_FOLDER --ours lora [--old-logprobs rollout] [--micro 4] [--profile]

The second form is one measurement of ours, as the first form starts it. The work is the peer script's (../shared/peers beside the
repository, whose prompts and meter ours use too): batches of 16 prompts, responses of exactly 48 tokens, 2 minibatches, 2 PPO epochs,
float32, one thread, LoRA of rank 16 on all linears where there is LoRA, temperature 0.7, 3 updates, each figure the median of updates 2
and 3. Prompts have 64 tokens each (`--lengths fixed`) or 12 to 256, 76 on average (`mixed`). Each measurement is a process of its
own; the peak is its largest resident set from start to end. `--select` names the measurements, by default those that have targets;
`--select all`: every row of ORDER. `--raw FILE` keeps every measurement as it comes. The second round has the reverse order. A round
of the default takes 20 to 30 minutes on an idle machine; with mixed lengths TRL needs 16 GB.

What differs: TRL has a value model of its own, trained in full (`lora`, `full`) or with LoRA (`lora-value-lora`), ours a linear head on
the policy's trunk; both have a reward model of their own in memory, and as the reference the base with the adapter off (LoRA) or a
frozen copy (full). In `lora-reward-lora` ours has its reward as a recipe in LoRA mode has it: an adapter of the same rank and a score head
on the policy's own base, so that the base is held once. TRL always takes old log-probs from generation and old values from a forward; `recompute` and `rollout` are our
two ways. `8`, `4`, `2` are responses in one forward and backward of ours, with the same minibatch of 8; TRL's is 8. `8x512` are at most
8 responses of at most 512 tokens together (`micro_batch_tokens`).

Both processes get the same environment, the caller's and HF_HUB_OFFLINE=1, OMP_NUM_THREADS, and set the same number of threads; ours sets
nothing else (what changes the allocator, as MALLOC_*, is the caller's and stands in the JSON). `cpu_per_s` says how busy the machine was
during each measurement, `before` its load and free memory when it started.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT.parent / "shared" / "peers" / "trl_ppo_bench.py"
BATCH, RESPONSE, MINIBATCHES, EPOCHS, RANK = 16, 48, 2, 2, 16
LENGTHS = {"fixed": 64, "mixed": "mixed"}
"""--lengths → --prompt-length of the peer's script."""
ORDER = (
    "peer/lora", "ours/lora/recompute/8", "ours/lora/rollout/8", "peer/lora-value-lora", "ours/lora/recompute/4",
    "ours/lora/rollout/4", "peer/full", "ours/full/recompute/8", "ours/full/rollout/8", "ours/full/recompute/4",
    "ours/lora/recompute/2", "ours/lora/rollout/2", "ours/full/recompute/2",
    *(f"ours/full/{way}/{micro}" for way in ("recompute", "rollout") for micro in ("8x256", "8x128")),
    *(f"ours/lora-reward-lora/{way}/{micro}" for way in ("recompute", "rollout") for micro in ("8", "8x512", "8x384", "4", "2")),
)  # fmt: skip
CHOSEN = {
    "fixed": "peer/lora,ours/lora-reward-lora/recompute/8x384,ours/lora-reward-lora/rollout/8x384,ours/lora-reward-lora/rollout/4,"
             "peer/full,ours/full/rollout/8x256,ours/full/rollout/8x128",
    "mixed": "peer/lora,ours/lora-reward-lora/recompute/8x512,ours/lora-reward-lora/rollout/8x512",
}  # fmt: skip
"""--lengths → the default of --select."""
FIGURES = {"wall": "wall_s", "cpu": "cpu_s", "peak": "peak_rss_mb"}
TARGETS = {
    ("fixed", "lora-reward-lora", "peer/lora"): (0.50, 0.50, 0.27),
    ("mixed", "lora-reward-lora", "peer/lora"): (0.30, 0.30, 0.18),
    ("fixed", "full", "peer/full"): (0.50, 0.50, 0.50),
}
"""Lengths, mode of ours and peer → the largest ratios that are aimed at, in FIGURES' order."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "PYTORCH_", "TORCH_")


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """PPO as the peer's script does it, with our trainer → its figures under the peer's names."""
    sys.path[:0] = [str(ROOT), str(args.peer_script.parent)]
    import torch
    from meter import Meter, peak_rss_mb, rss_mb
    from transformers import PrinterCallback

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        imports = rss_mb()
        trainer = make_trainer(args, scratch)
        meter = Meter()
        counts = watch(trainer, meter, args.profile)
        trainer.remove_callback(PrinterCallback)
        start = rss_mb()
        trainer.train()
        meter.stop()
        rows = [json.loads(line) for line in (Path(scratch) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    later = meter.updates[1:] or meter.updates
    median = lambda of: round(statistics.median(of(update) for update in later), 3)  # noqa: E731
    phase = lambda name: lambda update: update["phases"].get(name, (0.0, 0.0))[0]  # noqa: E731
    trained = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)  # noqa: E731
    return {
        "peer": "salsa_peft", "mode": args.ours, "old_logprobs": args.old_logprobs, "micro": args.micro, "lengths": args.lengths,
        "wall_s": median(lambda update: update["wall"]), "cpu_s": median(lambda update: update["cpu"]),
        "generation_s": median(phase("generation")),
        "scoring_s": median(lambda update: phase("rollout")(update) - phase("generation")(update)),
        "training_s": median(lambda update: update["wall"] - phase("rollout")(update)),
        "training_forward_s": median(phase("training-forward")),
        **{f"all_{name}_s": [round(u[name], 2) for u in meter.updates] for name in ("wall", "cpu", "others_cpu")},
        "peak_rss_mb": round(peak_rss_mb()), "peak_rss_by_phase_mb": {name: round(mb) for name, mb in meter.rss.items()},
        "rss_imports_mb": round(imports), "rss_before_train_mb": round(start),
        "optimizer_steps": counts["steps"], "trainable": trained(trainer.model),
        "trainable_policy": trained(trainer.model.policy), "parameters": sum(p.numel() for p in trainer.model.policy.parameters()),
        "response_lengths": [row["objective/response_length"] for row in rows],
        "skipped_minibatches": rows[-1]["policy/skipped_minibatches"], "log": rows[-1], **counts["profile"],
    }  # fmt: skip


def make_trainer(args: argparse.Namespace, output: str) -> Any:
    """Ours on the peer's prompts, models and options."""
    import torch
    from peft import LoraConfig, get_peft_model
    from prompts import prompt_ids
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token_id = 0  # the peer's
    lora = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": "all-linear"}
    torch.manual_seed(1)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    reward.config.pad_token_id = tokenizer.pad_token_id
    reward.requires_grad_(False)
    if args.ours == "lora-reward-lora":
        folder = str(Path(output) / "reward")
        get_peft_model(reward, LoraConfig(**lora, task_type="SEQ_CLS")).save_pretrained(folder)
        reward = folder
    policy: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    references: list[Any] = ["base"]
    if args.ours != "full":
        policy = get_peft_model(policy, LoraConfig(**lora, task_type="CAUSAL_LM"))
    else:
        references = [AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False)]
    rows, _, tokens = args.micro.partition("x")
    config = SalsaPPOConfig(
        output_dir=output, batch_size=BATCH, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, micro_batch_size=int(rows),
        micro_batch_tokens=int(tokens) if tokens else None,
                max_new_tokens=RESPONSE, min_new_tokens=RESPONSE, temperature=0.7, kl_coef=0.05, kl_control="fixed", learning_rate=3e-6,
        old_logprobs=args.old_logprobs, use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
        max_steps=args.updates * MINIBATCHES * EPOCHS, seed=0,
    )  # fmt: skip
    data = [{"input_ids": ids} for ids in prompt_ids(tokenizer, LENGTHS[args.lengths], BATCH)]
    return SalsaPPOTrainer(
        policy, args=config, train_dataset=data, references=references, reward_funcs=reward, processing_class=tokenizer
    )


def operator_times(meter: Any) -> Any:
    """A context that adds up CPU seconds by phase and operator. Views and Python's own time are in no operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperatorTimes(TorchDispatchMode):
        """The context; torch.profiler would keep an event of each of a million calls."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: dict[str, Counter[str]] = defaultdict(Counter)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            start = time.process_time()
            out = func(*args, **(kwargs or {}))
            self.seconds[meter.phase_name][func.overloadpacket.__name__] += time.process_time() - start
            return out

        def tables(self) -> dict[str, dict[str, float]]:
            """The ten largest of each phase, and the phase's sum. other: backward passes and the optimizer."""
            return {
                phase: {"sum": round(table.total(), 2), **{key: round(cpu, 2) for key, cpu in table.most_common(10)}}
                for phase, table in self.seconds.items()
            }

    return OperatorTimes()


def watch(trainer: Any, meter: Any, profiled: bool) -> dict[str, Any]:
    """Clock the updates and their phases, count the optimizer's steps, and time update 2's operators if asked to."""
    from transformers import TrainerCallback

    counts: dict[str, Any] = {"steps": 0, "profile": {}}
    profiler = operator_times(meter)
    maker, backend = type(trainer.rollout_maker), type(trainer.rollout_maker.backend)
    maker.__call__ = meter.wrap(maker.__call__, "rollout")
    backend.__call__ = meter.wrap(backend.__call__, "generation")
    trainer.compute_loss = meter.wrap(trainer.compute_loss, "training-forward")

    class Clock(TrainerCallback):
        """An update is EPOCHS × MINIBATCHES optimizer steps."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].optimizer.register_step_post_hook(self.count)  # inside accelerate's
            meter.start_update()

        def count(self, *_: Any) -> None:
            counts["steps"] += 1

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            update, rest = divmod(state.global_step, EPOCHS * MINIBATCHES)
            if rest:
                return
            if profiled and update == 2:
                profiler.__exit__(None, None, None)
                counts["profile"] = {"profile_cpu_s": profiler.tables()}
            meter.end_update()
            if profiled and update == 1:
                profiler.__enter__()

    trainer.add_callback(Clock())
    return counts


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process → its figures. Raises RuntimeError with the end of what it wrote where it failed."""
    side, mode, *options = name.split("/")
    common = ["--threads", str(args.threads), "--updates", str(args.updates)]
    if side == "peer":
        command = [args.peer_python, str(args.peer_script), "--model", args.model, "--mode", mode,
                   "--prompt-length", str(LENGTHS[args.lengths]), *common]  # fmt: skip
    else:
        command = [sys.executable, __file__, args.model, "--peer-script", str(args.peer_script), "--ours", mode,
                   "--old-logprobs", options[0], "--micro", options[1], "--lengths", args.lengths, *common]  # fmt: skip
    before = {"load": round(os.getloadavg()[0], 2), "available_gb": available_gb()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return {"run": name, "before": before, **json.loads(done.stdout.splitlines()[-1])}


def available_gb() -> float:
    """Memory of the machine that a new process can get."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20, 1)


def check_work(raw: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    """What every run did by its own count; `odd`: those that did other work.

    The peer counts trainable weights of policy and value model together: the latter's are the base's and a score head's, or
    as many as its policy's and a score head.
    """
    mine = [row for row in raw if row["run"].startswith("ours")]
    policy = {row["mode"].split("-")[0]: row["trainable_policy"] for row in mine}
    adapters = {"full": 0, "lora": 1, "lora-reward-lora": 2}  # of the policy's size, among its parameters
    base = {row["parameters"] - adapters[row["mode"]] * row["trainable_policy"] for row in mine}
    head = {row["trainable"] - row["trainable_policy"] - 1 for row in mine}  # without the value head's bias
    expected = {"optimizer_steps": updates * EPOCHS * MINIBATCHES, "episodes": updates * BATCH}
    odd = []
    for row in raw:
        did = {"optimizer_steps": row["optimizer_steps"], "episodes": row["log"]["episode"]}
        if row in mine:
            did |= {name: row[name] for name in ("skipped_minibatches", "response_lengths", "trainable_policy")}
            same = did == {**expected, "skipped_minibatches": 0, "response_lengths": [RESPONSE] * updates,
                           "trainable_policy": policy[row["mode"].split("-")[0]]}  # fmt: skip
        elif len(base) == len(head) == 1 and (mode := row["mode"].split("-")[0]) in policy:
            rest = row["trainable"] - sum(head)
            did["trainable_policy"] = rest / 2 if row["mode"] == "lora-value-lora" else rest - sum(base)
            same = did == {**expected, "trainable_policy": policy[mode]}
        else:
            same = did == expected
        if not same:
            odd.append({"run": row["run"], **did})
    return expected | {"tokens_of_each_response": RESPONSE, "trainable_policy": policy, "base": sorted(base),
                       "trainable_of_peer": {r["mode"]: r["trainable"] for r in raw if r not in mine}, "odd": odd}  # fmt: skip


def ratios(raw: list[dict[str, Any]], lengths: str) -> dict[str, Any]:
    """Ours over the peer's, of the medians over the rounds; with a target, whether it is reached."""
    middle: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["run"] for row in raw):
        rows = [row for row in raw if row["run"] == name]
        middle[name] = {figure: statistics.median(row[key] for row in rows) for figure, key in FIGURES.items()}
    found: dict[str, Any] = {}
    for mine in (name for name in middle if name.startswith("ours")):
        for peer in (name for name in middle if name.startswith("peer")):
            if mine.split("/")[1].split("-")[0] != peer.split("/")[1].split("-")[0]:
                continue
            ratio = {figure: round(middle[mine][figure] / middle[peer][figure], 3) for figure in FIGURES}
            targets = dict(zip(FIGURES, TARGETS.get((lengths, mine.split("/")[1], peer), ()), strict=False))
            reached = {"reached": {figure: ratio[figure] <= targets[figure] for figure in targets}} if targets else {}
            found.setdefault(peer, {})[mine] = ratio | reached
    return found


def quiet(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CPU seconds a second, the process's own (1 where nobody took its core) and everybody else's (0 on a quiet machine).

    And the load and the available memory when the process was started.
    """
    share = lambda row, key: round(sum(row[key]) / sum(row["all_wall_s"]), 2)  # noqa: E731
    return [
        {"run": r["run"], "own": share(r, "all_cpu_s"), "others": share(r, "all_others_cpu_s"), **r["before"]}
        for r in raw
    ]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions on both sides, the commit."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: E731
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES!r}}}))"
    peer = subprocess.run([args.peer_python, "-c", code], capture_output=True, text=True, check=True).stdout
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "cores_allowed": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30), "threads": args.threads,
        "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(),
        "versions": {"ours": {name: importlib.metadata.version(name) for name in PACKAGES}, "peer": json.loads(peer)},
        "commit": git("rev-parse", "--short", "HEAD").strip(), "uncommitted": bool(git("status", "--short", "salsa_peft").strip()),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(ALLOCATOR)},
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--peer-python", help="of an environment with trl 1.12.0 (../shared/peers/README.md)")
    parser.add_argument("--peer-script", type=lambda path: Path(path).resolve(), default=PEER)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--select", help=f"all, or names or their first parts, by commas, of {', '.join(ORDER)}")
    parser.add_argument("--raw", type=Path, help="a file to which every measurement is added as it comes")
    parser.add_argument("--cpu", type=int, help="the one core that all processes may use")
    parser.add_argument(
        "--ours", choices=["lora", "lora-reward-lora", "full"], help="one measurement of ours, in this process"
    )
    parser.add_argument("--old-logprobs", choices=["recompute", "rollout"], default="recompute")
    parser.add_argument("--micro", default="8", help="rows of one forward of ours, or rows x tokens as in 8x512")
    parser.add_argument("--lengths", choices=LENGTHS, default="fixed", help="of the prompts")
    parser.add_argument("--profile", action="store_true", help="CPU seconds of update 2 by operator; slows it down")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.ours:
        print(json.dumps(ours(args)))
        return
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    if not args.peer_python:
        raise SystemExit("--peer-python is required: the Python of an environment with trl 1.12.0")
    machine = facts(args)
    asked = (args.select or CHOSEN[args.lengths]).split(",")
    chosen = [name for name in ORDER if asked == ["all"] or any(f"{name}/".startswith(f"{one}/") for one in asked)]
    unknown = [one for one in asked if one != "all" and not any(f"{name}/".startswith(f"{one}/") for name in ORDER)]
    if unknown:
        raise SystemExit(f"--select: no measurement is called {', '.join(unknown)}. Choose from {', '.join(ORDER)}")
    raw = []
    for turn in range(args.rounds):
        for name in chosen if turn % 2 == 0 else chosen[::-1]:
            raw.append(measure(name, args))
            print(f"{name}: {raw[-1]['wall_s']} s, {raw[-1]['peak_rss_mb']} MB", file=sys.stderr)
            if args.raw:
                with args.raw.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(raw[-1]) + "\n")
    work = check_work(raw, args.updates)
    print(json.dumps({"benchmark": "ppo_vs_trl", "lengths": args.lengths, "rounds": args.rounds, "ratios": ratios(raw, args.lengths), "work": work, "cpu_per_s": quiet(raw),
                      "machine": machine, "raw": raw}))  # fmt: skip
    if work["odd"]:
        raise SystemExit(f"unequal work: {work['odd']}")


if __name__ == "__main__":
    main()

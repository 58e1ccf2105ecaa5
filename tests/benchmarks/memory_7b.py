"""Three PPO updates of a 7B model in each mode, on random weights of the real architecture: peak memory, speed, the plan beside them.

    python tests/benchmarks/memory_7b.py [--modes lora,qlora,full] [--cap lora=24,qlora=16,full=80] [--folder DISK]
    python tests/benchmarks/memory_7b.py --config tiny --device cpu        # the script itself, anywhere

Prints one JSON line. A checkpoint of Llama-2-7B's shape is made once (13.5 GB, on the disk of --folder), with random adapters. Each mode is a
process of its own that runs the recipe's ppo stage (policies.run): the policy, the soup of two seeds as the reference, a reward
adapter (full weights: a reward model), 8 responses of 512 tokens to prompts of 512, gradient checkpointing, `precision: stochastic` in
full. A cap in GiB is set by torch.cuda.set_per_process_memory_fraction; a mode that meets it says in which phase, and the others go on.
Bound of decoding: the measured copy bandwidth over the bytes of the weights, read once a token step for all 8 responses; the cache is
not counted, so the share is a little low. Targets: LoRA in 24 GiB, QLoRA in 16, full weights in 80, the plan within 10%, half of the bound.
On a CPU peaks are of the process's resident memory, which a plan for CUDA says nothing of, and no bound is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CAPS = {"lora": 24.0, "qlora": 16.0, "full": 80.0}
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False}  # fmt: skip
BATCH, SHARD = 8, 2 * 10**9


def sizes(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """config.json of the model, and tokens of a prompt and of a response."""
    from salsa_peft.architectures import KNOWN

    if args.config == "tiny":
        return TINY, 24
    known = {"llama2-7b": KNOWN["meta-llama/Llama-2-7b-hf"], "mistral-7b": KNOWN["mistralai/Mistral-7B-v0.1"]}
    return known.get(args.config) or json.loads(Path(args.config).read_text(encoding="utf-8")), 512


def make(args: argparse.Namespace, folder: Path) -> None:
    """Base, seeds, reward, soups of both kinds: a shard in memory at a time. Full weights are links to the base's files."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from salsa_peft.adapters import SCORE_HEAD
    from salsa_peft.toy import make_tokenizer

    given, length = sizes(args)
    config = AutoConfig.for_model(**given, max_position_embeddings=max(64, 2 * length), dtype="bfloat16")
    tokenizer = make_tokenizer()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.architectures = ["LlamaForCausalLM" if given["model_type"] == "llama" else "MistralForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = folder / "base"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    write_shards(base, shapes, torch.bfloat16)
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    with torch.device("meta"):
        peft = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    factors = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(peft).items()}
    for number, name in enumerate(("seed-0", "seed-1", "reward")):
        torch.manual_seed(number)
        tensors = {key: torch.randn(shape) * 0.01 for key, shape in factors.items()}
        if name == "reward":
            tensors[SCORE_HEAD] = torch.randn(1, config.hidden_size) * 0.02
        (folder / "lora" / name).mkdir(parents=True)
        save_file(tensors, folder / "lora" / name / "adapter_model.safetensors", metadata={"format": "pt"})
        peft.peft_config["default"].base_model_name_or_path = str(base)
        peft.peft_config["default"].save_pretrained(folder / "lora" / name)
        full = folder / "full" / name
        full.mkdir(parents=True)
        for file in base.iterdir():  # weights of one base for all: memory and speed do not depend on their values
            (full / file.name).symlink_to(file)
    score(folder / "full" / "reward", config)
    (folder / "full" / "soup").symlink_to(folder / "full" / "seed-1")
    from salsa_peft.averaging import soup

    soup(folder / "lora" / "soup", [folder / "lora" / "seed-0", folder / "lora" / "seed-1"])


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: Any) -> None:
    """Random weights, norms of one, in shards of 2 GB with their index."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    parts: list[list[str]] = [[]]
    room = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        if room + size > SHARD and parts[-1]:
            parts.append([])
            room = 0
        parts[-1].append(name)
        room += size
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: torch.ones(shapes[name], dtype=dtype) if len(shapes[name]) == 1
                   else torch.empty(shapes[name], dtype=dtype).normal_(std=0.02) for name in names}  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def score(folder: Path, config: Any) -> None:
    """The reward model of full weights: the base's files, and a score head in a shard of its own."""
    import torch
    from safetensors.torch import save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["score.weight"] = "model-score.safetensors"
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name != "lm_head.weight"}
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    head = torch.randn(1, config.hidden_size, dtype=torch.bfloat16) * 0.02
    save_file({"score.weight": head}, folder / "model-score.safetensors", metadata={"format": "pt"})
    kind = config.architectures[0].replace("ForCausalLM", "ForSequenceClassification")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [kind], "num_labels": 1, "id2label": {"0": "LABEL_0"},
                                                                       "label2id": {"LABEL_0": 0}}))  # fmt: skip


def recipe_of(args: argparse.Namespace, folder: Path, mode: str) -> Any:
    """A recipe whose ppo stage has the work: 8 responses, each update 4 optimizer steps."""
    from salsa_peft.data import prompt_tokens
    from salsa_peft.parsing import load_recipe
    from salsa_peft.toy import make_tokenizer

    _, length = sizes(args)
    asked = lambda words: {"prompt": [{"role": "user", "content": " ".join(["cat"] * words)}]}  # noqa: E731
    around = len(prompt_tokens(asked(1), make_tokenizer())) - 1  # what the chat template puts around the words
    rows = [asked(length - around)] * (BATCH * args.updates)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "name": "memory", "toy": {}, "model": {"base": str(folder / "base"), "max_length": 2 * length, "dtype": "bfloat16"},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "generation": {"max_new_tokens": length, "min_new_tokens": length}, "precision": args.precision,
        "ppo": {"batch_size": BATCH, "micro_batch_size": args.micro, "num_train_epochs": 1, "gradient_checkpointing": True,
                "rollout_compile": args.compile, "logged_completions": 0, "shown_every": None, "save_steps": 10**6},
        "policies": {"salsa": {"reference": "soup", "kl_coef": 0.01}},
    }  # fmt: skip
    path = folder / f"{mode}.yaml"
    path.write_text(json.dumps(given))
    return load_recipe(str(path), lora=None if mode == "full" else mode, overrides=[]).recipe


class Watch:
    """Seconds and peak bytes of each phase of each update."""

    def __init__(self, device: str) -> None:
        self.cuda, self.phase = device == "cuda", "loading"
        self.seconds: dict[str, list[float]] = {"generation": [], "scoring": [], "update": []}
        self.peaks: dict[str, int] = {}
        self.start = time.perf_counter()

    def enter(self, phase: str) -> None:
        """What was held until now belongs to the phase before."""
        import torch

        from salsa_peft.processes import peak_mb

        if self.cuda:
            torch.cuda.synchronize()
        found = torch.cuda.max_memory_reserved() if self.cuda else int(peak_mb() * 1e6)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), found)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def around(self, name: str, phase: str, then: str, function: Any) -> Any:
        """The function, timed, as a phase of its own."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(phase)
            start = time.perf_counter()
            found = function(*arguments, **options)
            self.enter(then)
            self.seconds[name].append(time.perf_counter() - start)
            return found

        return timed

    def end_update(self, function: Any) -> Any:
        """The update ends here."""

        def ended(*arguments: Any) -> Any:
            found = function(*arguments)
            self.enter("between")
            now = time.perf_counter()
            self.seconds["update"].append(now - self.start)
            self.start = now
            return found

        return ended


def one(args: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    """A mode in this process."""
    import torch

    from salsa_peft import memory, policies
    from salsa_peft.architectures import of_recipe
    from salsa_peft.ppo import SalsaPPOTrainer
    from salsa_peft.rollout_batch import RolloutMaker
    from salsa_peft.runs import Job, Unit

    cuda, cap = args.device == "cuda", args.caps.get(mode)
    recipe = recipe_of(args, folder, mode)
    size = of_recipe(recipe)
    assert size is not None
    if cuda and cap is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * memory.GIB / torch.cuda.mem_get_info()[1]))
    watch = Watch(args.device)
    RolloutMaker._sample = watch.around("generation", "generate", "score", RolloutMaker._sample)  # type: ignore[method-assign]
    RolloutMaker._score = watch.around("scoring", "score", "train", RolloutMaker._score)  # type: ignore[method-assign]
    SalsaPPOTrainer.end_update = watch.end_update(SalsaPPOTrainer.end_update)  # type: ignore[method-assign]
    there = folder / ("full" if mode == "full" else "lora")
    inputs = {
        "sft/seed-0": there / "seed-0",
        "sft/seed-1": there / "seed-1",
        "reward": there / "reward",
        "soup": there / "soup",
    }
    out = folder / f"out-{mode}"
    out.mkdir(exist_ok=True)
    unit = Unit(stage="ppo", name="salsa", run="salsa_peft.policies:run", several=True, inputs=(), slice={}, files=())
    job = Job(recipe=recipe, unit=unit, folder=out, inputs=inputs, recipe_yaml="")
    plan = memory.need(recipe, "ppo", size, None if cap is None else cap * memory.GIB)
    row: dict[str, Any] = {
        "mode": mode,
        "cap_gib": cap,
        "planned_gib": round((plan.total - memory.CONTEXT) / memory.GIB, 2),
        "planned_phase": plan.phase,
    }
    try:
        policies.run(job)
    except torch.OutOfMemoryError as error:
        phase = watch.phase
        watch.enter("ended")
        return row | {"out_of_memory": phase, "said": str(error)[:200], "peaks_gib": gib(watch.peaks)}
    watch.enter("ended")
    return row | figures(args, watch, memory.NF4, recipe, size)


def gib(peaks: dict[str, int]) -> dict[str, float]:
    return {phase: round(peak / 2**30, 3) for phase, peak in peaks.items()}


def figures(args: argparse.Namespace, watch: Watch, nf4: dict[str, float], recipe: Any, size: Any) -> dict[str, Any]:
    """Peaks and speeds of the updates after the first, which warms up."""
    _, length = sizes(args)
    later = {name: values[1:] or values for name, values in watch.seconds.items()}
    median = {name: statistics.median(values) for name, values in later.items()}
    training = median["update"] - median["generation"] - median["scoring"]
    tokens = BATCH * length
    found: dict[str, Any] = {
        "peaks_gib": gib(watch.peaks), "seconds": {name: round(value, 3) for name, value in median.items()} | {"training": round(training, 3)},
        "tokens_per_s": {"generation": round(tokens / median["generation"], 1), "scoring": round(2 * tokens / median["scoring"], 1),
                         "training": round(4 * 2 * tokens / training, 1)},
    }  # fmt: skip
    found["peak_gib"] = max(value for phase, value in found["peaks_gib"].items() if phase not in ("loading", "ended"))
    if args.device == "cuda":
        rest = size.parameters - size.in_linears
        weights = 2 * rest + nf4.get(recipe.model.quantization or "", 2) * size.in_linears
        bandwidth = copy_bandwidth()
        bound = bandwidth / weights * BATCH
        found |= {"copy_gb_per_s": round(bandwidth / 1e9, 1), "bound_tokens_per_s": round(bound, 1)}
        found["share_of_bound"] = round(found["tokens_per_s"]["generation"] / bound, 3)
    return found


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        target.copy_(source)
    torch.cuda.synchronize()
    return 2 * 50 * source.numel() / (time.perf_counter() - start)


def met(row: dict[str, Any]) -> dict[str, bool]:
    """Which targets a mode reached; on a CPU there are none."""
    if "peak_gib" not in row:
        return {"fits": False}
    if "share_of_bound" not in row:
        return {}
    return {"fits": row["cap_gib"] is None or row["peak_gib"] <= row["cap_gib"], "half_of_the_bound": row["share_of_bound"] >= 0.5,
            "plan_within_10_percent": abs(row["planned_gib"] / row["peak_gib"] - 1) <= 0.1}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="lora,qlora,full")
    parser.add_argument("--config", default="llama2-7b", help="llama2-7b, mistral-7b, tiny, or a config.json")
    parser.add_argument("--cap", default=None, help="GiB of each mode: lora=24,qlora=16,full=80 (none: none)")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--micro", type=int, default=1, help="responses of one forward and backward")
    parser.add_argument("--precision", default="stochastic", choices=["stochastic", "master"], help="of full weights")
    parser.add_argument("--compile", action="store_true", help="a static cache and compiled decoding")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--folder", help="where the checkpoint is made (default: the system's)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    caps = CAPS if args.cap is None else dict(pair.split("=") for pair in args.cap.split(",") if "=" in pair)
    args.caps = {} if args.device == "cpu" else {mode: float(size) for mode, size in caps.items()}
    return args


def main() -> int:
    """0, also where a mode did not fit: the line says so."""
    args = parse()
    if args.one is not None:
        mode, folder = args.one.split(":", 1)
        print(json.dumps(one(args, mode, Path(folder))))
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --config tiny --device cpu tries the script alone")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        make(args, Path(scratch))
        rows = []
        for mode in args.modes.split(","):
            words = [sys.executable, __file__, *sys.argv[1:], "--one", f"{mode}:{scratch}"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            row = json.loads(lines[-1]) if done.returncode == 0 else {"mode": mode, "failed": done.stderr[-1500:]}
            rows.append(row | {"met": met(row)})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(json.dumps({"modes": rows, "card": card, "torch": torch.__version__, "commit": commit.stdout.strip(),
                      "config": args.config, "updates": args.updates, "micro_batch_size": args.micro}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Three PPO updates of a 7B model in each mode, on random weights of the real architecture: peak memory, speed, the plan beside them.

    python tests/benchmarks/memory_7b.py [--modes lora,qlora,full] [--cap lora=24,qlora=16,full=80] [--folder DISK] [--json OUT]
    python tests/benchmarks/memory_7b.py --config tiny --device cpu        # the script itself, anywhere

Prints one JSON line. A checkpoint of Llama-2-7B's shape is made once (13.5 GB, and as much again where full weights are trained, on the
disk of --folder), with random adapters. Each mode is a process of its own that runs the recipe's ppo stage (ppo_stage.run): the policy, the
soup of two seeds as the reference, a reward adapter (full weights: a reward model), 8 responses of 512 tokens to prompts of 512, gradient
checkpointing. full: `precision: stochastic`; full-master: float32 masters, with `offload: frozen` where the card has no room without.
Generation is measured plain and with rollout_compile, each in a run of its own.

A cap in GiB is what a card of that size has: torch.cuda.set_per_process_memory_fraction holds the allocator to it less CUDA's own
(memory.CONTEXT). A mode that meets it says in which phase, and the others go on. Peaks: what tensors took (allocated), what the allocator
held (reserved, with blocks kept from earlier phases); `outside`: CUDA's own, paged optimizer states, and whatever else is on the card.
Bound of decoding: the measured copy bandwidth over the bytes that a token step reads for all 8 responses: weights and adapters, without
the cache (`share_of_bound`) and with it at its mean length (`share_with_cache`). The prompts' forward counts as generation.
Targets: LoRA in 24 GiB, QLoRA in 16, full weights in 80, the plan within 10% of reserved + outside, half of the bound.
On a CPU (`memory: resident`) peaks are of the process's resident memory so far, which a plan for CUDA says nothing of: no target is judged.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shutil
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
MODES = {"lora": "auto", "qlora": "auto", "full": "stochastic", "full-master": "master"}
"""Mode → the recipe's `precision`."""
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao", "flash-attn")
BATCH, SHARD = 8, 2 * 10**9


def sizes(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """config.json of the model, and tokens of a prompt and of a response."""
    from salsa_peft.models.architectures.sizes import KNOWN

    if args.config == "tiny":
        return TINY, args.tokens or 24
    known = {"llama2-7b": KNOWN["meta-llama/Llama-2-7b-hf"], "mistral-7b": KNOWN["mistralai/Mistral-7B-v0.1"]}
    return known.get(args.config) or json.loads(Path(args.config).read_text(encoding="utf-8")), args.tokens or 512


def make(args: argparse.Namespace, folder: Path) -> None:
    """Base, seeds, reward, soups of both kinds: a shard in memory at a time. Full weights are links to the base's files."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from salsa_peft.data.toy import make_tokenizer
    from salsa_peft.models.adapters.names import SCORE_HEAD

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
    from salsa_peft.soup.average import soup

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


def recipe_of(args: argparse.Namespace, folder: Path, mode: str, compiled: bool = False, offload: str = "none") -> Any:
    """A recipe whose ppo stage has the work: 8 responses, each update 4 optimizer steps."""
    from salsa_peft.config.load import load_recipe
    from salsa_peft.data.datasets import prompt_tokens
    from salsa_peft.data.toy import make_tokenizer

    _, length = sizes(args)
    asked = lambda words: {"prompt": [{"role": "user", "content": " ".join(["cat"] * words)}]}  # noqa: E731
    around = len(prompt_tokens(asked(1), make_tokenizer())) - 1  # what the chat template puts around the words
    rows = [asked(length - around)] * (BATCH * args.updates)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "name": "memory", "toy": {}, "model": {"base": str(folder / "base"), "max_length": 2 * length, "dtype": "bfloat16"},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "generation": {"max_new_tokens": length, "min_new_tokens": length}, "precision": MODES[mode], "offload": offload,
        "ppo": {"batch_size": BATCH, "micro_batch_size": args.micro, "num_train_epochs": 1, "gradient_checkpointing": True,
                "rollout_compile": compiled, "logged_completions": 0, "shown_every": None, "save_steps": 10**6},
        "policies": {"salsa": {"reference": "soup", "kl_coef": 0.01}},
    }  # fmt: skip
    path = folder / f"{mode}.yaml"
    path.write_text(json.dumps(given))
    return load_recipe(str(path), lora=None if mode.startswith("full") else mode, overrides=[]).recipe


class Watch:
    """Seconds and peak bytes of each phase of each update: (allocated, reserved), or on a CPU what was resident, twice.

    `fails`: a phase in which memory is made out to end.
    """

    def __init__(self, device: str, fails: str | None = None) -> None:
        self.cuda, self.phase, self.fails = device == "cuda", "loading", fails
        self.seconds: dict[str, list[float]] = {"generation": [], "scoring": [], "update": []}
        self.peaks: dict[str, tuple[int, int]] = {}
        self.outside = 0
        self.start = time.perf_counter()

    def enter(self, phase: str) -> None:
        """What was held until now belongs to the phase before."""
        import torch

        from salsa_peft.recipe.worker import peak_mb

        found = (int(peak_mb() * 1e6),) * 2
        if self.cuda:
            torch.cuda.synchronize()
            found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            self.outside = max(self.outside, total - free - torch.cuda.memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        before = self.peaks.get(self.phase, (0, 0))
        self.peaks[self.phase] = max(before[0], found[0]), max(before[1], found[1])
        self.phase = phase
        if phase == self.fails:
            raise torch.OutOfMemoryError(f"out of memory, made up by --fail in {phase}")

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

    def attach(self) -> None:
        """To the engine's classes, for the rest of this process."""
        from salsa_peft.training.ppo.rollout import RolloutMaker
        from salsa_peft.training.ppo.trainer import SalsaPPOTrainer

        RolloutMaker._sample = self.around("generation", "generate", "score", RolloutMaker._sample)  # type: ignore[method-assign]
        RolloutMaker._score = self.around("scoring", "score", "train", RolloutMaker._score)  # type: ignore[method-assign]
        SalsaPPOTrainer.end_update = self.end_update(SalsaPPOTrainer.end_update)  # type: ignore[method-assign]


def planned(args: argparse.Namespace, folder: Path, mode: str, compiled: bool) -> tuple[Any, Any, Any, str | None]:
    """Recipe, its sizes, what memory.py plans for it, and why it is left out: nothing is, but full-master on a card too small."""
    import torch

    from salsa_peft.models.architectures import memory
    from salsa_peft.models.architectures.sizes import architecture_of_recipe

    card = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else None
    recipe = recipe_of(args, folder, mode, compiled)
    size = architecture_of_recipe(recipe)
    assert size is not None
    plan = memory.estimate(recipe, "ppo", size, card)
    if mode != "full-master" or card is None or plan.total <= card:
        return recipe, size, plan, None
    recipe = recipe_of(args, folder, mode, compiled, offload="frozen")
    plan = memory.estimate(recipe, "ppo", size, card)
    why = f"planned {plan.total / memory.GIB:.0f} GiB with offload frozen, the card has {card / memory.GIB:.0f}"
    return recipe, size, plan, None if plan.total <= card else why


def job_of(folder: Path, mode: str, recipe: Any) -> Any:
    """The ppo unit of the recipe's run, its inputs as the stages before it would have left them."""
    from salsa_peft.config.job import Job, Unit, recipe_of_unit

    there = folder / ("full" if mode.startswith("full") else "lora")
    inputs = {"sft/seed-0": there / "seed-0", "sft/seed-1": there / "seed-1", "reward": there / "reward", "soup": there / "soup"}  # fmt: skip
    out = folder / f"out-{mode}"
    out.mkdir(exist_ok=True)
    unit = Unit(
        stage="ppo",
        name="salsa",
        run="salsa_peft.training.ppo_stage:run",
        multi_unit=True,
        inputs=(),
        key_fields={},
        files=(),
    )
    return Job(recipe=recipe_of_unit(recipe, unit), unit=unit, folder=out, inputs=inputs, recipe_yaml="")


def one(args: argparse.Namespace, mode: str, folder: Path, compiled: bool = False) -> dict[str, Any]:
    """A mode in this process."""
    import torch

    from salsa_peft.models.architectures import memory
    from salsa_peft.training import ppo_stage as policies
    from salsa_peft.utils.errors import SalsaError

    cap = args.caps.get(mode)
    recipe, size, plan, why = planned(args, folder, mode, compiled)
    row: dict[str, Any] = {
        "mode": mode, "memory": "CUDA" if args.device == "cuda" else "resident", "cap_gib": cap, "offload": recipe.offload,
        "planned_gib": round(plan.total / memory.GIB, 4), "planned_phase": plan.phase,
    }  # fmt: skip
    if why is not None:
        return row | {"left_out": why}
    if args.device == "cuda" and cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap * memory.GIB - memory.CONTEXT) / total))
    watch = Watch(args.device, dict([args.fail.split(":")]).get(mode) if args.fail else None)
    watch.attach()
    try:
        policies.run(job_of(folder, mode, recipe))
    except SalsaError as error:
        return row | {"refused": str(error)}
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuBLAS and bitsandbytes raise others
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            said in str(error) for said in ("out of memory", "ALLOC_FAILED")
        ):
            raise
        row |= {"out_of_memory": watch.phase, "said": str(error)[:200]}
        watch.fails = None
        watch.enter("ended")
        return row | peaks(watch)
    watch.enter("ended")
    return row | peaks(watch) | ratios(plan, watch) | speeds(args, watch, recipe, size)


def peaks(watch: Watch) -> dict[str, Any]:
    """GiB by phase."""
    found = {name: {phase: round(peak[place] / 2**30, 3) for phase, peak in watch.peaks.items()}
             for place, name in enumerate(("allocated_gib", "reserved_gib"))}  # fmt: skip
    return {**found, "outside_gib": round(watch.outside / 2**30, 3)}


def ratios(plan: Any, watch: Watch) -> dict[str, Any]:
    """The plan over what was measured: all of it, and without CUDA's own and the allocator's waste over what tensors took."""
    from salsa_peft.models.architectures import memory

    allocated, reserved = (max(peak[place] for peak in watch.peaks.values()) for place in (0, 1))
    on_card = reserved + watch.outside
    return {
        "peak_allocated_gib": round(allocated / 2**30, 3), "peak_reserved_gib": round(reserved / 2**30, 3),
        "peak_gib": round(on_card / 2**30, 3), "planned_over_measured": round(plan.total / on_card, 4),
        "planned_over_allocated": round((plan.total - memory.CONTEXT) / memory.MARGIN / allocated, 4),
    }  # fmt: skip


def speeds(args: argparse.Namespace, watch: Watch, recipe: Any, size: Any) -> dict[str, Any]:
    """Of the updates after the first, which warms up and compiles."""
    _, length = sizes(args)
    later = {name: values[1:] or values for name, values in watch.seconds.items()}
    median = {name: statistics.median(values) for name, values in later.items()}
    training = median["update"] - median["generation"] - median["scoring"]
    tokens = BATCH * length
    epochs = recipe.ppo.num_ppo_epochs
    decoded = tokens / median["generation"]
    bandwidth = copy_bandwidth(args.device)
    weights, cache = bytes_read(recipe, size), 2 * size.kv_per_token * BATCH * 1.5 * length
    bounds = [bandwidth / weights * BATCH, bandwidth / (weights + cache) * BATCH]
    return {
        "seconds": {name: round(value, 3) for name, value in [*median.items(), ("training", training)]},
        "tokens_per_s": {"generation": round(decoded, 1), "scoring": round(2 * tokens / median["scoring"], 1),
                         "training": round(epochs * 2 * tokens / training, 1)},
        "copy_gb_per_s": round(bandwidth / 1e9, 1), "weights_read_gb": round(weights / 1e9, 6), "bound_tokens_per_s": round(bounds[0], 1),
        "share_of_bound": round(decoded / bounds[0], 3), "share_with_cache": round(decoded / bounds[1], 3),
    }  # fmt: skip


def bytes_read(recipe: Any, size: Any) -> float:
    """By one token step: linear layers in bf16 or nf4, norms and output embeddings in bf16, the adapter in float32; of the input embeddings
    a few rows."""
    from salsa_peft.models.architectures import memory

    looked_up = 0 if size.tied else size.vocabulary * size.hidden
    linears = memory.NF4.get(recipe.model.quantization or "", 2) * size.in_linears
    lora = recipe.adapter
    adapter = 0 if lora is None else 4 * size.adapter(lora.r, lora.target_modules)
    return linears + 2 * (size.parameters - size.in_linears - looked_up) + adapter


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a large copy on the device, which no cap holds any more."""
    import torch

    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    gc.collect()
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    source = torch.zeros(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    wait()
    start = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    wait()
    return 2 * 20 * source.numel() / (time.perf_counter() - start)


def decoding(row: dict[str, Any]) -> dict[str, Any]:
    """What a run says of generation: its speed, or why there is none."""
    names = ("share_of_bound", "share_with_cache", "refused", "out_of_memory", "failed", "left_out", "peak_gib")
    speed = {"tokens_per_s": row["tokens_per_s"]["generation"]} if "tokens_per_s" in row else {}
    return speed | {name: row[name] for name in names if name in row}


def met(row: dict[str, Any]) -> dict[str, bool]:
    """Which targets a mode reached; on a CPU none is judged, nor of a mode that was left out or broke for another reason than memory."""
    if "out_of_memory" in row:
        return {"fits": False}
    if row.get("memory") != "CUDA" or "peak_gib" not in row:
        return {}
    best = max(way.get("share_of_bound", 0.0) for way in row["generation"].values())
    fits = {} if row["cap_gib"] is None else {"fits": row["peak_gib"] <= row["cap_gib"]}
    return fits | {
        "half_of_the_bound": best >= 0.5,
        "plan_within_10_percent": abs(row["planned_over_measured"] - 1) <= 0.1,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="lora,qlora,full,full-master")
    parser.add_argument("--config", default="llama2-7b", help="llama2-7b, mistral-7b, tiny, or a config.json")
    parser.add_argument("--cap", default=None, help="GiB of each mode: lora=24,qlora=16,full=80 (none: none)")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--micro", type=int, default=1, help="responses of one forward and backward")
    parser.add_argument("--tokens", type=int, help="of a prompt, and of a response (default: 512; tiny: 24)")
    parser.add_argument("--generation", default="plain,compiled", help="plain, compiled (rollout_compile), or both")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--folder", help="where the checkpoint is made (default: the system's)")
    parser.add_argument("--json", type=Path, help="a file for the line, besides")
    parser.add_argument("--fail", help=argparse.SUPPRESS)  # MODE:PHASE, to try what an end of memory gives
    for name in ("--one", "--scratch"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    wrong = [mode for mode in args.modes.split(",") if mode not in MODES]
    if wrong:
        parser.error(f"--modes: found {wrong[0]}, expected some of {', '.join(MODES)}")
    caps = CAPS if args.cap is None else dict(pair.split("=") for pair in args.cap.split(",") if "=" in pair)
    args.caps = {} if args.device == "cpu" else {mode: float(size) for mode, size in caps.items()}
    return args


def child(args: argparse.Namespace, argv: list[str], mode: str, scratch: str, compiled: bool) -> dict[str, Any]:
    """A mode in a process of its own → its row, also where it broke."""
    print(f"{mode}{' compiled' if compiled else ''} …", file=sys.stderr, flush=True)
    words = [sys.executable, __file__, *argv, "--one", mode, "--scratch", scratch, *["--compiled"] * compiled]
    # on a CPU torch would compile the 8-bit optimizer's step for a minute
    environment = {**os.environ, **({"TORCHDYNAMO_DISABLE": "1"} if args.device == "cpu" else {})}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    shutil.rmtree(Path(scratch) / f"out-{mode}", ignore_errors=True)  # a policy of full weights
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = "out of memory" in done.stderr  # Transformers logs what loading met and raises something else
    return {"mode": mode, "exit_code": done.returncode, **({"out_of_memory": "unknown"} if said else {}), "failed": done.stderr[-1500:]}  # fmt: skip


def measure(args: argparse.Namespace, argv: list[str], mode: str, scratch: str) -> dict[str, Any]:
    """A mode's row: the first way of generating makes it, each way is in `generation`."""
    row: dict[str, Any] = {}
    ways: dict[str, Any] = {}
    for way in args.generation.split(","):
        found = child(args, argv, mode, scratch, way == "compiled")
        ways[way], row = decoding(found), row or found
        if "tokens_per_s" not in found and way == "plain":  # what does not run plainly will not run compiled
            break
    row["generation"] = ways
    return row | {"met": met(row)}


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The card, versions, commit."""
    import torch

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = args.device == "cuda"
    card = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "card": platform.machine() if card is None else card.name, "card_gib": None if card is None else round(card.total_memory / 2**30, 2),
        "cuda": torch.version.cuda, "python": platform.python_version(), "versions": versions, "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(git("status", "--short", "salsa_peft")), "config": args.config, "tokens": 2 * sizes(args)[1], "batch_size": BATCH,
        "updates": args.updates, "micro_batch_size": args.micro,
    }  # fmt: skip


def check_disk(args: argparse.Namespace) -> None:
    """Raise SystemExit where the checkpoint, and a policy of full weights, would not find room."""
    from salsa_peft.models.architectures.sizes import Architecture

    copies = 1 + any(mode.startswith("full") for mode in args.modes.split(","))
    needed = 2.1 * copies * Architecture.of(sizes(args)[0]).parameters + 1.5e9 * (args.config != "tiny")
    where = args.folder or tempfile.gettempdir()
    free = shutil.disk_usage(where).free
    if free < needed:
        raise SystemExit(
            f"{where}: found {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f}; name another disk by --folder"
        )


def main() -> int:
    """0, also where a mode did not fit: the line says so."""
    args, argv = parse(), sys.argv[1:]
    if args.one is not None:
        print(json.dumps(one(args, args.one, Path(args.scratch), args.compiled)))
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --config tiny --device cpu tries the script alone")
    check_disk(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        make(args, Path(scratch))
        rows = [measure(args, argv, mode, scratch) for mode in args.modes.split(",")]
    line = json.dumps({"benchmark": "memory_7b", "modes": rows, **facts(args)})
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

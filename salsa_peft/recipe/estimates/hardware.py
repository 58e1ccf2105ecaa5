"""This machine's GPUs, whether a recipe fits them, and smaller batches after out-of-memory errors.

The GPUs are those that nvidia-smi lists; torch is not imported.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from salsa_peft.config.options.trl import ALGORITHMS
from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.memory import CONTEXT, GIB, STAGES, estimate, stages_of
from salsa_peft.models.architectures.sizes import architecture_of_recipe
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.oom import largest_proper_divisor

LARGE = 2_000_000_000
"""A base with at least this many parameters needs a GPU: training on a CPU would take years."""
SIZES = (16, 24, 40, 48, 80, 141, 192)
"""Memory sizes of common GPUs, in GiB."""


class Speed(NamedTuple):
    """A GPU's peak speed."""

    flops: float
    """Floating-point operations a second of bf16 tensor cores with float32 accumulation, without sparsity."""
    bandwidth: float
    """Bytes a second that can be read from the GPU's memory."""


class Gpu(NamedTuple):
    """A GPU: its name, its memory in bytes, and its peak speed if it is known."""

    name: str
    bytes: int
    speed: Speed | None = None


GPUS = {
    "H200": (r"H200", Gpu("H200", 143_771 * 2**20, Speed(989e12, 4.80e12))),
    "H100": (r"H100 80GB HBM3", Gpu("H100", 81_559 * 2**20, Speed(989e12, 3.35e12))),
    "A100-80": (r"A100-SXM4-80GB", Gpu("A100-80", 81_920 * 2**20, Speed(312e12, 2.039e12))),
    "A100-40": (r"A100-(SXM4|PCIE)-40GB", Gpu("A100-40", 40_960 * 2**20, Speed(312e12, 1.555e12))),
    "4090": (r"GeForce RTX 4090", Gpu("4090", 24_564 * 2**20, Speed(165.2e12, 1.008e12))),
    "3090": (r"GeForce RTX 3090", Gpu("3090", 24_576 * 2**20, Speed(71e12, 0.936e12))),
}
"""Name for --gpu → pattern of the name in nvidia-smi, and the GPU.

Speeds are those of NVIDIA's data sheets of H200 SXM, H100 SXM and A100 (half of the FLOP/s that the first two give with
sparsity), and of the white papers of the Ada (RTX 4090) and GA102 (RTX 3090) architectures. Memory is what nvidia-smi
reports.
"""


def speed_of(name: str) -> Speed | None:
    """Speed of a GPU by its name in nvidia-smi, such as "NVIDIA H200"; None if GPUS does not have it."""
    plain = name.removeprefix("NVIDIA ")
    return next((gpu.speed for pattern, gpu in GPUS.values() if re.fullmatch(pattern, plain)), None)


def gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES allows; an empty list if nvidia-smi is missing, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: dict[str, Gpu] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        uuid, _, rest = line.partition(",")
        name, _, size = rest.rpartition(",")
        if size.strip().isdigit():
            found[uuid.strip()] = Gpu(name.strip(), int(size) * 2**20, speed_of(name.strip()))
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(found: dict[str, Gpu], variable: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES names by number or start of a UUID; all GPUs if it is not set.

    A MIG instance is counted as the first whole GPU, since nvidia-smi's list does not tell its size.
    """
    every = list(found.values())
    if variable is None or not every:
        return every
    chosen: list[Gpu] = []
    for word in filter(None, map(str.strip, variable.split(","))):
        if word.startswith("MIG"):
            chosen.append(every[0])
        elif word.isdigit():
            chosen += every[int(word) : int(word) + 1]
        else:
            chosen += [gpu for uuid, gpu in found.items() if uuid.startswith(word)][:1]
    return chosen


def smallest_gpu(size: float) -> int:
    """Memory in GiB of the smallest GPU in SIZES that holds `size` bytes, else `size` rounded up."""
    return next((gib for gib in SIZES if gib * GIB >= size), math.ceil(size / GIB))


def planned_mb(recipe: Recipe, stage: str) -> float | None:
    """Estimated GPU memory of a stage in MB, without CUDA's context; None if it cannot be estimated."""
    size, there = architecture_of_recipe(recipe), gpus()
    if size is None or stage not in stages_of(recipe):
        return None
    found = estimate(recipe, stage, size, there[0].bytes if there else None)
    return round((found.total - CONTEXT) / 1e6, 1)


def check_gpu(recipe: Recipe, there: list[Gpu], stages: Collection[str] = STAGES) -> list[str]:
    """Raise SalsaError if a large base has no GPU; return a warning for each stage that may not fit.

    stages: the stages that will run.
    """
    size = architecture_of_recipe(recipe)
    asked = [stage for stage in stages_of(recipe) if stage in stages]
    if size is None or not asked:
        return []
    memory = float(there[0].bytes) if there else 0.0  # 0 without a GPU: `precision: auto` then needs the least memory
    needs = {stage: estimate(recipe, stage, size, memory) for stage in asked}
    most = max(needs.values(), key=lambda one: one.total)
    require(
        bool(there) or size.parameters < LARGE,
        f"model.base: a model of {size.parameters / 1e9:.1f} B parameters needs a CUDA GPU, and nvidia-smi lists none."
        f" Use a machine with a GPU of at least about {most.total / GIB:.0f} GiB (for {most.stage}); --dry-run --gpu"
        f" {smallest_gpu(most.total)} shows what each stage needs",
    )
    return [
        f"{stage} may not fit the GPU: it needs about {found.total / GIB:.1f} GiB in {found.phase}, and {there[0].name}"
        f" has {there[0].bytes / GIB:.0f} GiB; --dry-run shows options that help"
        for stage, found in needs.items()
        if there and found.total > there[0].bytes
    ]


def check_processes(recipe: Recipe) -> None:
    """Raise SalsaError if this machine cannot run the recipe's number of processes."""
    there, count, backend = len(gpus()), recipe.num_processes, recipe.accelerate
    require(
        there > 0 or backend == "ddp",
        f"accelerate: {backend} needs GPUs, and nvidia-smi lists none; use ddp, which also runs on CPUs",
    )
    require(
        there == 0 or count <= there,
        f"num_processes: {count} processes need a GPU each, but this machine has {there} GPU{'s' * (there > 1)}; lower"
        f" num_processes to {there}",
    )
    require(
        backend != "zero3" or importlib.util.find_spec("deepspeed") is not None,
        "accelerate: zero3 needs DeepSpeed; pip install 'salsa-peft[deepspeed]'",
    )


TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive")
"""Values of report_to that are also the names of the packages that they need."""


def check_packages(recipe: Recipe, stages: Collection[str]) -> None:
    """Raise SalsaError if a package that a later stage needs is not installed; it is not imported here.

    stages: the stages that will run.
    """
    training = [stage for stage in ("sft", "reward", "ppo", *ALGORITHMS) if stage in stages]
    paged = [stage for stage in training if getattr(recipe, stage).optim.startswith("paged") and gpus()]
    wanted = [(f"{stage}.optim: {getattr(recipe, stage).optim}", "bitsandbytes", "qlora") for stage in paged]
    if "ppo" in stages:
        vllm = recipe.ppo.rollout_backend == "vllm"
        wanted += [("ppo.rollout_backend: vllm", "vllm", "vllm")] if vllm else []
        wanted += [(f"report_to: {name}", name, "") for name in recipe.report_to if name in TRACKERS]
    for key, package, extra in wanted:
        install = f"pip install 'salsa-peft[{extra}]'" if extra else f"pip install {package}"
        require(
            importlib.util.find_spec(package) is not None,
            f"{key} needs the package {package}, which is not installed; run {install}, or choose another value",
        )


def check_rollout(recipe: Recipe, stages: Collection[str]) -> None:
    """Raise SalsaError if the ppo stage will sample in a way that needs a GPU, and there is none."""
    ppo = recipe.ppo
    used = {"rollout_backend: vllm": ppo.rollout_backend == "vllm", "rollout_compile: true": ppo.rollout_compile}
    for key in [key for key, is_used in used.items() if is_used and "ppo" in stages]:
        require(
            bool(gpus()),
            f"ppo.{key} needs a CUDA GPU, and nvidia-smi lists none; set ppo.rollout_backend=hf and"
            " ppo.rollout_compile=false, or use a machine with a GPU",
        )


class Halved(NamedTuple):
    """A recipe with smaller batches, or a smaller judge concurrency, in one stage."""

    recipe: Recipe
    changed: dict[str, tuple[int, int]]
    """Recipe key that changed → its value before and after."""


def halve_batches(recipe: Recipe, stage: str) -> Halved | None:
    """The recipe with a stage's next smaller batch size or judge concurrency; None if it cannot be smaller."""
    if stage in ("sft", "reward", "ppo", *ALGORITHMS):
        return _halve_training(recipe, stage)
    rows = recipe.generation.batch_size
    if stage in ("synthetic", "reward_quality", "landscape", "evaluate") and (half := largest_proper_divisor(rows)):
        generation = replace(recipe.generation, batch_size=half)
        return Halved(replace(recipe, generation=generation), {"generation.batch_size": (rows, half)})
    judge = recipe.evaluate.judge
    half = largest_proper_divisor(judge.concurrency) if judge is not None and judge.kind == "local" else None
    if stage == "judge" and judge is not None and half is not None:
        evaluate = replace(recipe.evaluate, judge=replace(judge, concurrency=half))
        return Halved(replace(recipe, evaluate=evaluate), {"evaluate.judge.concurrency": (judge.concurrency, half)})
    return None


def _halve_training(recipe: Recipe, stage: str) -> Halved | None:
    section: Any = getattr(recipe, stage)
    processes = 1 if stage in ALGORITHMS else recipe.num_processes
    share = section.batch_size // processes
    minibatch = share // section.num_mini_batches if stage == "ppo" else share
    before = {"micro_batch_size": section.micro_batch_size or minibatch}
    if stage == "ppo":
        before["rollout_batch_size"] = min(section.rollout_batch_size or share, share)
    after = {key: largest_proper_divisor(rows) or rows for key, rows in before.items()}
    smaller = replace(section, **after)
    try:
        smaller.check(stage, processes)
    except SalsaError:  # KTO needs at least two rows
        return None
    changed = {f"{stage}.{key}": (before[key], after[key]) for key in before if after[key] != before[key]}
    sections: dict[str, Any] = {stage: smaller}
    return Halved(replace(recipe, **sections), changed) if changed else None

"""What replicates that run at the same time get of the machine, and whether its memory is enough for them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from salsa_peft.config.schema import Recipe
from salsa_peft.recipe.estimates.hardware import Gpu
from salsa_peft.utils.manifests import MANIFEST, read_manifest, stages_folder

THREADS = "OMP_NUM_THREADS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
MOST = 0.9
"""Share of a memory from which a warning is printed; the rest is for everything else that runs on the machine."""


class Peak(NamedTuple):
    """Largest memory of a unit of a run, in MB."""

    ram: float
    gpu: float | None
    """None: no unit used a GPU."""


def slots(recipe: Recipe, jobs: int, gpus: Sequence[Gpu]) -> list[dict[str, str]]:
    """Environment variables of each of the replicates that run at the same time.

    Without `threads` in the recipe and OMP_NUM_THREADS in the environment, they share the CPU cores. Where a replicate
    trains in one process and there are several GPUs, they take turns on the GPUs.
    """
    own: dict[str, str] = {}
    if recipe.threads is None and THREADS not in os.environ:
        own[THREADS] = str(max(1, (os.cpu_count() or 1) // (jobs * recipe.num_processes)))
    if recipe.num_processes > 1 or len(gpus) < 2:
        return [own] * jobs
    named = os.environ.get(VISIBLE)
    names = [str(number) for number in range(len(gpus))] if named is None else named.split(",")[: len(gpus)]
    return [{**own, VISIBLE: names[slot % len(names)].strip()} for slot in range(jobs)]


def peak(folders: Sequence[Path]) -> Peak | None:
    """The largest memory of the finished units of some runs; None without such a unit."""
    found = [
        manifest
        for folder in folders
        for path in stages_folder(folder).glob(f"**/{MANIFEST}")
        if (manifest := read_manifest(path.parent)) is not None and manifest.get("peak_mb") is not None
    ]
    if not found:
        return None
    gpu = [one["gpu_peak_mb"] for one in found if one.get("gpu_peak_mb") is not None]
    return Peak(max(one["peak_mb"] for one in found), max(gpu, default=None))


def memory_line(found: Peak, jobs: int, gpus: Sequence[Gpu], ram_mb: float) -> tuple[str, bool]:
    """A line on the memory that `jobs` replicates need at the same time, and whether it may not be enough.

    gpus: those that they share. ram_mb: the machine's memory, in MB.
    """
    parts = [_part(found.ram, jobs, ram_mb, "memory")]
    if found.gpu is not None and gpus:
        each = -(-jobs // len(gpus))
        parts.append(_part(found.gpu, each, min(gpu.bytes for gpu in gpus) / 1e6, "a GPU’s memory"))
    short = any(low for _, low in parts)
    line = f"a replicate needed up to {'; and '.join(text for text, _ in parts)}"
    return line + ("; use a smaller --jobs if a stage is killed or slow" if short else ""), short


def _part(each: float, count: int, there: float, what: str) -> tuple[str, bool]:
    text = f"{each:,.0f} MB of {what}, so {count} at the same time up to {each * count:,.0f} of {there:,.0f} MB"
    return text, each * count > MOST * there


def ram_mb() -> float:
    """The machine's memory, in MB."""
    import psutil

    return float(psutil.virtual_memory().total) / 1e6

"""`salsa doctor`: checks this machine, and a run's results.

    salsa doctor          versions, devices, memory, disk, attention, 4-bit quantisation, the Hub
    salsa doctor RUN      also a run's folder: which process uses it, and which results are complete

Each check is a function in CHECKS. `salsa run RECIPE --dry-run` shows the GPU memory that a recipe needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import salsa_peft
from salsa_peft.models.architectures.memory import GIB
from salsa_peft.recipe import cache
from salsa_peft.recipe.estimates import hardware
from salsa_peft.utils.console import Parser, complain, silence_import_warnings, styled, wrapped
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import existing_parent, lock_holder
from salsa_peft.utils.manifests import MANIFEST, changed_file, read_manifest, stages_folder
from salsa_peft.utils.messages import one_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    "bitsandbytes": ("qlora", "--lora qlora, paged optimizers"),
    "torchao": ("full", "precision: stochastic"),
    "openai": ("judge", "a judge behind an endpoint"),
    "deepspeed": ("deepspeed", "accelerate: zero3"),
    "vllm": ("vllm", "rollout_backend: vllm"),
}
"""Optional package → the extra that installs the package, and what the package is for."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
             "PYTORCH_ALLOC_CONF")  # fmt: skip
"""Environment variables that change what a run does."""
DISKS = {"results": "--output-dir", "Hub's cache": "HF_HOME", "temporary": "TMPDIR"}
"""Kind of files → the option or variable that chooses another folder for them."""
LOW_DISK, LOW_MEMORY, TIMEOUT = 5.0, 2.0, 5.0
"""Free disk space and memory (GiB) below which a problem is reported; timeout for the Hub (seconds)."""


class Finding(NamedTuple):
    """A result of a check: one line of the output."""

    name: str
    found: str
    advice: str | None = None
    """Advice if there is a problem, else None."""


def error_text(error: Exception) -> str:
    """An error's type and message as a short line."""
    return f"{type(error).__name__}: {one_line(str(error))[:200]}"


def versions() -> Iterator[Finding]:
    """Versions of Python, the package and its dependencies, and whether they are supported."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("salsa-peft", f"{salsa_peft.__version__} in {Path(salsa_peft.__file__).parent}")
    for needed in _requirements(""):
        command = f"pip install '{needed.name}{needed.specifier}'"
        yield _version(needed) or Finding(needed.name, "not installed", f"Install it: {command}")


def extras() -> Iterator[Finding]:
    """Versions of optional packages, and whether the installed ones are supported."""
    for name, (extra, use) in EXTRAS.items():
        found = next((_version(needed) for needed in _requirements(extra) if needed.name == name), None)
        yield found or Finding(name, f"not installed ({use}: pip install 'salsa-peft[{extra}]')")


def _requirements(extra: str) -> list[Requirement]:
    """salsa-peft's dependencies, or those of one of its extras; empty if salsa-peft is not installed."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(line) for line in importlib.metadata.requires("salsa-peft") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    own = [needed for needed in every if needed.marker is None or needed.marker.evaluate({"extra": ""})]
    added = [needed for needed in every if needed.marker is not None and needed.marker.evaluate({"extra": extra})]
    return [needed for needed in added if needed not in own] if extra else own


def _version(needed: Requirement) -> Finding | None:
    """Finding about the installed version of a dependency; None if the dependency is not installed."""
    try:
        version: str | None = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    fits = version is not None and needed.specifier.contains(version, prereleases=True)
    command = f"pip install '{needed.name}{needed.specifier}'"
    advice = None if fits else f"The supported versions are {needed.specifier}: {command}"
    return Finding(needed.name, version or "damaged: no version", advice)


def libraries() -> Iterator[Finding]:
    """Whether the libraries can be imported, since the installed versions may not work together."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:  # every error of an import is reported
            advice = "Reinstall this library, or the one that the error names"
            yield Finding(f"import {name}", error_text(error), advice)


def devices() -> Iterator[Finding]:
    """The GPUs that PyTorch sees, and whether each computes correctly."""
    import torch

    if not torch.cuda.is_available():
        names = ", ".join(gpu.name for gpu in hardware.gpus())
        unseen = f"torch {torch.__version__} does not see {names}: install a CUDA build that fits the driver"
        yield Finding("GPU", "none that PyTorch can use: small models only", unseen if names else None)
        return
    yield Finding("CUDA", f"{torch.version.cuda}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")
    for number in range(torch.cuda.device_count()):
        properties, free, advice = torch.cuda.get_device_properties(number), 0, None
        try:
            free = torch.cuda.mem_get_info(number)[0]
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            if not bool((ones @ ones == 64).all()):
                advice = "This GPU computes wrong products; do not use it"
        except RuntimeError as error:
            advice = f"This GPU cannot compute ({error_text(error)}); check the driver, or end other processes on it"
        size = f"{properties.total_memory / GIB:.1f} GiB, {free / GIB:.1f} free"
        compute = f"compute {properties.major}.{properties.minor}"
        yield Finding(f"GPU {number}", f"{properties.name}, {size}, {compute}", advice)


def processor() -> Iterator[Finding]:
    """CPU cores, threads and memory."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield Finding("CPU", f"{cores} cores, PyTorch uses {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    low = memory.available < LOW_MEMORY * GIB
    advice = f"A run needs at least {LOW_MEMORY:.0f} GiB; end other processes" if low else None
    yield Finding("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available", advice)


def disk() -> Iterator[Finding]:
    """Free space and write permission for results, the Hub's cache and temporary files."""
    from huggingface_hub import constants

    folders = (Path("runs"), Path(constants.HF_HUB_CACHE), Path(tempfile.gettempdir()))
    for (name, option), folder in zip(DISKS.items(), map(Path.absolute, folders), strict=True):
        place = existing_parent(folder)
        free, advice = shutil.disk_usage(place).free / GIB, None
        if not os.access(place, os.W_OK):
            advice = f"You are not allowed to write there; choose another folder ({option})"
        elif free < LOW_DISK:
            advice = f"A run needs at least {LOW_DISK:.0f} GiB; free some space. --dry-run shows what a recipe writes"
        yield Finding(f"disk, {name}", f"{free:.1f} GiB free for {folder}", advice)


def attention() -> Iterator[Finding]:
    """The attention implementation that `model.attention: auto` chooses on this machine."""
    from salsa_peft.config.schema import Model
    from salsa_peft.models.base import attention_implementation

    installed = importlib.util.find_spec("flash_attn") is not None
    version = f"flash-attn {importlib.metadata.version('flash_attn')}" if installed else "flash-attn not installed"
    yield Finding("attention", f"auto is {attention_implementation(Model(attn_implementation='auto'))}; {version}")


def four_bits() -> Iterator[Finding]:
    """Whether bitsandbytes quantises and dequantises correctly on the device that a run uses."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import functional

        weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as problem:  # errors of bitsandbytes, or of loading its CUDA library
        yield Finding("4 bits", error_text(problem), "Install a version of bitsandbytes that fits the CUDA version")
        return
    advice = None if error < 0.2 else "The error should be at most 0.2; install another version of bitsandbytes"
    yield Finding("4 bits", f"nf4 works on {device}, largest error {error:.2f} for weights in [-1, 1]", advice)


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, and who is logged in. The token is sent only to the Hub and is not shown."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "not contacted: HF_HUB_OFFLINE is set, so only the local cache is used")
        return
    answer, advice = _hub_answer(constants.ENDPOINT)
    yield Finding("Hub", f"{constants.ENDPOINT} {answer}", advice)
    if get_token() is None:
        gated = "run `hf auth login` or set HF_TOKEN for gated bases and pushes"
        yield Finding("login", f"none: public repositories only; {gated}")
    elif advice is not None:
        yield Finding("login", "there is a token, but it could not be checked")
    else:
        try:
            user = HfApi().whoami()
        except Exception as error:  # errors of huggingface_hub, or of the network
            status = getattr(getattr(error, "response", None), "status_code", None)
            retry = (
                "The Hub does not know this token; run `hf auth login` again" if status == 401 else "Try again later"
            )
            yield Finding("login", f"the Hub answers {status}" if status else type(error).__name__, retry)
            return
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role", "of unknown rights")
        yield Finding("login", f"{user.get('name')}, token {role}{': pulls only' if role == 'read' else ''}")


def _hub_answer(endpoint: str) -> tuple[str, str | None]:
    """The Hub's answer as text, and what to do if there is a problem, else None."""
    from huggingface_hub import get_session

    start = time.perf_counter()
    try:
        status = get_session().head(f"{endpoint}/api/models", timeout=TIMEOUT).status_code
    except Exception as error:  # errors of the HTTP library that huggingface_hub uses
        advice = "Check the network and proxies; if all files are local, set HF_HUB_OFFLINE=1"
        return f"cannot be reached ({type(error).__name__})", advice
    if status >= 500:
        return f"answers {status}", "The Hub has a problem; try again later"
    if status >= 300 and status not in (401, 404, 405):
        return f"answers {status}", "Look for a proxy or login page between this machine and the Hub"
    return f"answers in {1000 * (time.perf_counter() - start):.0f} ms", None


def environment() -> Iterator[Finding]:
    """Environment variables that change what a run does."""
    for name in VARIABLES:
        if name in os.environ:
            yield Finding(name, os.environ[name] or "(empty)")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "extras": extras,
    "libraries": libraries,
    "devices": devices,
    "processor": processor,
    "disk": disk,
    "attention": attention,
    "4 bits": four_bits,
    "Hub": hub,
    "environment": environment,
}


def run_results(run: Path) -> Iterator[Finding]:
    """Who holds a run's lock, and whether each result's files match its manifest. Writes nothing."""
    holder = lock_holder(run)
    yield Finding("lock", holder or "free")
    advice = None if os.access(run, os.W_OK) else "You are not allowed to write there; change the permissions"
    yield Finding("disk, run", f"{shutil.disk_usage(run).free / GIB:.1f} GiB free for {run}", advice)
    stages = stages_folder(run)
    for folder in sorted(path.parent for path in stages.glob(f"*/**/{cache.BEGUN}")):
        if cache.KEY_FOLDER.match(folder.name) and not (folder / MANIFEST).exists():
            state = "in progress" if holder else "unfinished: run the recipe again to finish it"
            yield Finding(folder.relative_to(stages).as_posix(), state)
    for folder in sorted(path.parent for path in stages.glob(f"*/**/{MANIFEST}")):
        if cache.KEY_FOLDER.match(folder.name):
            name, manifest = folder.relative_to(stages), read_manifest(folder)
            damage = f"{MANIFEST} cannot be read" if manifest is None else changed_file(folder, manifest)
            size = sum(entry["size"] for entry in manifest["files"].values()) if manifest is not None else 0
            again = None if damage is None else f"Run the recipe again to replace the result of {name.parent}"
            yield Finding(name.as_posix(), damage or f"complete, {size / 1e6:.1f} MB", again)


def without_logins(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings, without logins in URLs. An error raised by the check is a finding too."""
    hide = partial(re.sub, r"//[^/\s@]+@", "//…@")
    try:
        for finding in check():
            yield Finding(finding.name, hide(finding.found), finding.advice and hide(finding.advice))
    except Exception as error:  # the remaining checks still run
        yield Finding(name, hide(error_text(error)), "This check stopped with this error; correct its cause first")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa doctor`. Returns 0; 1 if there is a problem; 2 if RUN is not a run's folder."""
    parser = Parser(prog="salsa doctor", description="Check whether this machine can run recipes, and report problems.",
                    epilog="Exit code 0: no problems; 1: there are problems.")  # fmt: skip
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, to check its results too")
    run = parser.parse_args(sys.argv[1:] if argv is None else argv).run
    checks = dict(CHECKS)
    if run is not None:
        try:
            require(Path(run).is_dir(), f"{run}: no such folder; name a run's folder, such as runs/quickstart-lora")
            require(
                Path(run, "recipe.yaml").is_file(),
                f"{run}: not a run's folder, since it has no recipe.yaml; check the path",
            )
        except (SalsaError, OSError) as error:
            complain(one_line(str(error)))
            return 2
        checks["run"] = partial(run_results, Path(run))
    silence_import_warnings()
    problems = []
    for name, check in checks.items():
        for finding in without_logins(name, check):
            line = wrapped(f"{'!' if finding.advice else ' '} {finding.name:<18} {finding.found}", sys.stdout, 21)
            print(styled(line, "yellow" if finding.advice else "", sys.stdout), flush=True)
            problems += [finding] if finding.advice else []
    print(f"\n{len(problems)} problem{'s' * (len(problems) > 1)}:" if problems else "\nno problems")
    for finding in problems:
        print(wrapped(f"  {finding.name}: {finding.found}. {finding.advice}", sys.stdout, 4))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

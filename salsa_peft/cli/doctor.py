"""`salsa doctor`: what this machine has for a run, and what is wrong with it.

    salsa doctor          versions, devices, memory, disk, attention, 4 bits, the Hub
    salsa doctor RUN      and a run's folder: who works on it, which results are whole

Each check is a function and a row of CHECKS. Left out: what a recipe needs of a card, which its --dry-run says.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import salsa_peft
from salsa_peft.models.architectures import memory
from salsa_peft.recipe import cache, hardware
from salsa_peft.utils.console import Parser, say, silence_import_warnings
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import lock_holder
from salsa_peft.utils.manifests import MANIFEST, changed_file, read_manifest
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
"""Packages that a run can do without → the extra that brings them, and what they are for."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
"""Of the environment, those that change what happens here."""
LITTLE_DISK, LITTLE_MEMORY, PATIENCE = 5.0, 2.0, 5.0
"""GiB, GiB, seconds."""


class Finding(NamedTuple):
    """A line of the doctor's."""

    name: str
    found: str
    wrong: str | None = None
    """What was expected and what to do, or None: all is well."""


def told(error: Exception) -> str:
    """An error in a short line."""
    return f"{type(error).__name__}: {one_line(str(error))[:200]}"


def versions() -> Iterator[Finding]:
    """Python, the package and what it needs, each against the range that it was made for."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("salsa-peft", f"{salsa_peft.__version__} in {Path(salsa_peft.__file__).parent}")
    for one in _needed(""):
        yield _version(one) or Finding(
            one.name, "not installed", f"expected it; pip install '{one.name}{one.specifier}'"
        )


def extras() -> Iterator[Finding]:
    """What a run can do without; what is there has to be in its range too."""
    for name, (extra, use) in EXTRAS.items():
        found = next((_version(one) for one in _needed(extra) if one.name == name), None)
        yield found or Finding(name, f"not installed ({use}: pip install 'salsa-peft[{extra}]')")


def _needed(extra: str) -> list[Requirement]:
    """What the package itself needs, or an extra of it."""
    from packaging.requirements import Requirement

    try:
        every = [Requirement(line) for line in importlib.metadata.requires("salsa-peft") or ()]
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        return []
    mine = [one for one in every if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in mine if bool(extra) == (one.marker is not None and not one.marker.evaluate({"extra": ""}))]


def _version(one: Requirement) -> Finding | None:
    """A package's version against its range; None where it is not installed."""
    try:
        there: Any = importlib.metadata.version(one.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if there is None:
        return Finding(one.name, "damaged: no version", f"expected {one.specifier}; install it anew")
    fits = one.specifier.contains(there, prereleases=True)
    return Finding(
        one.name, there, None if fits else f"expected {one.specifier}; pip install '{one.name}{one.specifier}'"
    )


def libraries() -> Iterator[Finding]:
    """Whether they can be imported: an installation can be whole and its parts not fit one another."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever an import runs into is what is wrong
            yield Finding(f"import {name}", told(error), "expected that it can be imported; install it anew")


def devices() -> Iterator[Finding]:
    """GPUs as PyTorch sees them, and whether one computes; those that it can't see although the driver does."""
    import torch

    there = hardware.gpus()
    if not torch.cuda.is_available():
        names = ", ".join(card.name for card in there)
        wrong = (
            f"expected PyTorch to see {names}; found torch {torch.__version__}: install a CUDA build that this driver runs"
            if there
            else None
        )
        yield Finding("GPU", "none that PyTorch can use: small models only", wrong)
        return
    yield Finding("CUDA", f"{torch.version.cuda}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        try:
            free = torch.cuda.mem_get_info(number)[0]
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            right = bool((ones @ ones == 64).all())
            wrong = None if right else "expected 64 of a product of ones: this card computes wrongly"
        except RuntimeError as error:
            free, wrong = 0, f"expected that it computes, found {told(error)}"
        size = f"{properties.total_memory / memory.GIB:.1f} GiB, {free / memory.GIB:.1f} free"
        yield Finding(
            f"GPU {number}", f"{properties.name}, {size}, compute {properties.major}.{properties.minor}", wrong
        )


def processor() -> Iterator[Finding]:
    """Cores, threads, memory."""
    import psutil
    import torch

    yield Finding(
        "CPU",
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, PyTorch takes {torch.get_num_threads()} threads",
    )
    there = psutil.virtual_memory()
    free = there.available / memory.GIB
    wrong = f"expected {LITTLE_MEMORY:.0f} GiB at least; end other processes" if free < LITTLE_MEMORY else None
    yield Finding("memory", f"{there.total / memory.GIB:.1f} GiB, {free:.1f} available", wrong)


def disk() -> Iterator[Finding]:
    """Where results, the Hub's files and temporary files go: room, and whether one may write there."""
    from huggingface_hub import constants

    for name, folder in {
        "results": Path("runs"),
        "Hub's cache": Path(constants.HF_HUB_CACHE),
        "temporary": Path(tempfile.gettempdir()),
    }.items():
        folder = folder.absolute()
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / memory.GIB
        wrong = None
        if not os.access(place, os.W_OK):
            wrong = (
                "expected to be allowed to write there; choose another folder"
                + {"results": " (--output-dir)", "Hub's cache": " (HF_HOME)", "temporary": " (TMPDIR)"}[name]
            )
        elif free < LITTLE_DISK:
            wrong = f"expected {LITTLE_DISK:.0f} GiB free at least; --dry-run says what a recipe writes"
        yield Finding(f"disk, {name}", f"{free:.1f} GiB free for {folder}", wrong)


def attention() -> Iterator[Finding]:
    """What `model.attention: auto` takes here."""
    from salsa_peft.config.schema import Model
    from salsa_peft.models.base import attention_implementation

    there = importlib.util.find_spec("flash_attn") is not None
    version = f"flash-attn {importlib.metadata.version('flash_attn')}" if there else "flash-attn not installed"
    yield Finding("attention", f"auto is {attention_implementation(Model(attn_implementation='auto'))}; {version}")


def four_bits() -> Iterator[Finding]:
    """Whether bitsandbytes quantises and comes back, on the device that a run would take."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import functional

        weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as problem:  # its own errors, and the loader's of a library that does not fit
        yield Finding("4 bits", told(problem), "expected nf4 to work; install a bitsandbytes for this CUDA")
        return
    yield Finding(
        "4 bits",
        f"nf4 works on {device}, largest error {error:.2f} of 1",
        None if error < 0.2 else "expected at most 0.2",
    )


def hub() -> Iterator[Finding]:
    """Whether it answers, and as whom one is logged in. The token is sent to it alone, and shown nowhere."""
    from huggingface_hub import HfApi, constants, get_token

    where = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "not asked: HF_HUB_OFFLINE is set, what is in the cache is used")
        return
    answered, wrong = _asked(where)
    yield Finding("Hub", f"{where} {answered}", wrong)
    if get_token() is None:
        yield Finding(
            "login", "none: public repositories only; `hf auth login`, or set HF_TOKEN, for gated bases and pushes"
        )
        return
    if wrong is not None:
        yield Finding("login", "there is a token, which could not be tried")
        return
    try:
        user = HfApi().whoami()
    except Exception as error:  # huggingface_hub's own, or the network's
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status == 401
        yield Finding(
            "login",
            f"the Hub answers {status}" if status else type(error).__name__,
            "expected a token that it knows; `hf auth login` again"
            if refused
            else "expected an answer; try again later",
        )
        return
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role", "of unknown rights")
    yield Finding("login", f"{user.get('name')}, token {role}{': pulls only' if role == 'read' else ''}")


def _asked(where: str) -> tuple[str, str | None]:
    """How the Hub answered, and what is wrong."""
    from huggingface_hub import get_session

    start = time.perf_counter()
    try:
        response = get_session().head(f"{where}/api/models", timeout=PATIENCE)
    except Exception as error:  # of whichever library huggingface_hub speaks with
        return (
            f"cannot be reached ({type(error).__name__})",
            "expected an answer; check the network and proxies, or set HF_HUB_OFFLINE=1 where only local files are used",
        )
    if response.status_code >= 500:
        return f"answers {response.status_code}", "expected 200; it is out of order, try again later"
    if response.status_code >= 300 and response.status_code not in (401, 404, 405):
        return f"answers {response.status_code}", "expected 200; look for a proxy or a login page in between"
    return f"answers in {1000 * (time.perf_counter() - start):.0f} ms", None


def environment() -> Iterator[Finding]:
    """Variables that change what happens here."""
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


def of_run(run: Path) -> Iterator[Finding]:
    """A run's folder: who works on it; every result, held against its manifest's hashes. Reads all of it, writes nothing."""
    busy_with = lock_holder(run)
    yield Finding("lock", busy_with or "free")
    free = shutil.disk_usage(run).free / memory.GIB
    may = None if os.access(run, os.W_OK) else "expected to be allowed to write there"
    yield Finding("disk, run", f"{free:.1f} GiB free for {run}", may)
    for folder in sorted(path.parent for path in run.glob(f"*/**/{cache.BEGUN}")):
        if cache.KEY_FOLDER.match(folder.name) and not (folder / MANIFEST).exists():
            busy = "in work" if busy_with else "unfinished: the same command goes on, or makes it again"
            yield Finding(folder.relative_to(run).as_posix(), busy)
    for file in sorted(run.glob(f"*/**/{MANIFEST}")):
        if not cache.KEY_FOLDER.match(file.parent.name):
            continue
        name = file.parent.relative_to(run)
        manifest = read_manifest(file.parent)
        broken = f"{MANIFEST} cannot be read" if manifest is None else changed_file(file.parent, manifest)
        size = 0 if manifest is None else sum(entry.get("size", 0) for entry in manifest["files"].values())
        redo = f"expected it as it was written; run the recipe again, which makes {name.parent} anew"
        yield Finding(name.as_posix(), broken or f"whole, {size / 1e6:.1f} MB", None if broken is None else redo)


def looked_at(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings, without what a URL may hold of logins; one that fails is a finding."""
    hidden = lambda text: re.sub(r"//[^/\s@]+@", "//…@", text)  # noqa: E731
    try:
        for finding in check():
            yield Finding(finding.name, hidden(finding.found), finding.wrong and hidden(finding.wrong))
    except Exception as error:  # a doctor looks at the rest too
        yield Finding(name, hidden(told(error)), "expected that it can be looked at; mend that first")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 1 where something is wrong; 2 for a folder that is no run."""
    parser = Parser(prog="salsa doctor", description="What this machine has for a run, and what is wrong with it.",
                    epilog="Code 0: nothing is wrong; 1: something is.")  # fmt: skip
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's folder, to hold its results against their hashes too"
    )
    args: argparse.Namespace = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        there = args.run is not None and Path(args.run).is_dir()
        require(
            args.run is None or there,
            f"{args.run}: found no such folder, expected a run's, such as runs/quickstart-lora",
        )
        require(
            args.run is None or (Path(args.run) / "recipe.yaml").is_file(),
            f"{args.run}: found no recipe.yaml, expected a run's folder",
        )
    except (SalsaError, OSError) as error:
        say(one_line(str(error)))
        return 2
    silence_import_warnings()
    checks = dict(CHECKS)
    if args.run is not None:
        checks["run"] = lambda: of_run(Path(args.run))
    found: list[Finding] = []
    for name, check in checks.items():
        for finding in looked_at(name, check):
            found.append(finding)
            print(f"{'!' if finding.wrong else ' '} {finding.name:<18} {finding.found}", flush=True)
    wrong = [finding for finding in found if finding.wrong is not None]
    print("\nnothing is wrong" if not wrong else f"\n{len(wrong)} wrong:")
    for finding in wrong:
        print(f"  {finding.name}: found {finding.found}; {finding.wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

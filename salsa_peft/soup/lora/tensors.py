"""What the tensors of a PEFT adapter folder are, known from their names and headers: LoRA's factors, or values averaged directly.

    lora_A, lora_B               a delta scaling · B · A; of a linear layer, of a convolution (as a matrix: in · kernel columns)
    … of a stack of experts      a delta for each expert: A (r · experts, in), B (out, r · experts), the expert last in B's columns
    … of a grouped convolution   a delta for each group: B (out, r / groups)
    lora_embedding_A, _B         the delta's transpose, of an embedding
    lora_B.bias                  scaling · b, added to what the layer gives (lora_bias)
    anything else                full values of the base's own: modules_to_save, biases, saved embeddings, rows of trained tokens

scaling = alpha / r, with rsLoRA alpha / √r. Refused with file, tensor and reason: what is unknown, alone, of another rank or shape, or
not finite (looked at when a tensor is read).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.models.adapters.names import PREFIX, plain_names
from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import DTYPES, Array
from salsa_peft.soup.lora.layouts import ConvertedFile, in_todays_layout
from salsa_peft.soup.lora.read import CONFIG, CONVERT_PICKLE, PICKLED, WEIGHTS, WHY, check_manifest, read_config
from salsa_peft.soup.lora.targets import (
    EMBEDDINGS,
    WRAPPED,
    is_saved,
    parameter_at,
    parameters_of,
    rank_and_scaling,
    target_rule,
)
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import read_fingerprint
from salsa_peft.utils.safetensors_io import SafetensorsFile

PART = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)"
)
TOKENS = ".token_adapter.trainable_tokens_delta"


class Factors(NamedTuple):
    """Where one member's LoRA of one module or parameter lies in its file.

    Shapes: A (r, in), of an embedding (r, tokens), of a convolution (r, in, *kernel), of experts (experts · r, in);
    B (out, r), of a convolution (out, r / groups, 1, …), of experts (out, r · experts).
    """

    A: str
    B: str
    bias: str | None
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    scaling: float
    embedding: bool = False
    experts: int = 1
    groups: int = 1
    holder: str = ""
    """The module whose wrapper holds the factors."""
    parameter: str | None = None
    """Of target_parameters: the parameter's name in `holder`; "" where the names do not say which it is."""
    owner: str = ""
    """The module that is targeted: of an attention's out_proj the attention."""

    @property
    def rank(self) -> int:
        return self.shape_A[0] // self.experts


@dataclass(frozen=True)
class Member:
    """An adapter folder, its tensors still on the disk."""

    name: str
    folder: Path
    config: dict[str, Any]
    """LoraConfig's fields that a soup reads: DEFAULTS of soup/lora/read.py."""
    fingerprint: str | None
    """SHA-256 of the base it was trained on; None: its folder does not say."""
    file: SafetensorsFile
    factors: dict[str, Factors]
    """By module, or by parameter of target_parameters, in the order of their names."""
    direct: dict[str, str]
    """What is averaged directly: the base's own name (of trained tokens with TOKENS behind the embedding's) → tensor."""
    frozen: frozenset[str] = frozenset()
    """Of `direct`, the weights of layers that have LoRA, which PEFT saves with them: the base's own, not trained."""

    @property
    def ranks(self) -> dict[str, int]:
        return {module: factors.rank for module, factors in self.factors.items()}

    def read(self, key: str) -> Array:
        """A tensor's values, float32 (float64 where the file has that). Raises SalsaError where one is not finite."""
        return self.file.arrays[key] if isinstance(self.file, ConvertedFile) else arrays.read(self.file, key)

    def token_indices(self, name: str) -> list[int]:
        """The rows of the embedding that trained tokens' values replace."""
        given = self.config["trainable_token_indices"]
        module = name.removesuffix(TOKENS)
        if isinstance(given, dict):
            fits = (rows for key, rows in given.items() if module.endswith(key))
            given = next(fits, None)
        return list(given or [])


def read_member(folder: Path, name: str) -> Member:
    """Everything but the values: configuration, fingerprint, names, shapes and dtypes, held against one another."""
    config = read_config(folder)
    path = folder / WEIGHTS
    require(
        path.is_file() or not (folder / PICKLED).exists(),
        f"{folder} holds {PICKLED}, a pickle, which is never read since it can run code: if you trust it, convert it in that folder with "
        + CONVERT_PICKLE,
    )
    require(path.is_file(), f"{path} is missing: a member is a PEFT adapter folder with {CONFIG} and {WEIGHTS}")
    file = SafetensorsFile(path)
    check_manifest(folder)
    require(bool(file.entries), f"{path} holds no tensors: expected lora_A and lora_B of at least one module")
    names = plain_names(file.entries, config, path)
    names, config, file = in_todays_layout(names, config, file, folder)
    parts, direct = sort_tensors(file, names, config)
    require(bool(parts), f"{path} holds no tensors of LoRA: expected lora_A and lora_B of at least one module")
    factors = dict(sorted(read_all_factors(file, parts, config)))
    frozen = frozenset(n for n in direct if is_frozen(n, factors))
    member = Member(name, folder, config, read_fingerprint(folder), file, factors, dict(sorted(direct.items())), frozen)
    check_direct(member)
    return member


def sort_tensors(
    file: SafetensorsFile, names: dict[str, str], config: dict[str, Any]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """{module: {part: tensor}}, and what is averaged directly, as Member has it. names: PEFT's name → the file's."""
    parts: dict[str, dict[str, str]] = {}
    direct: dict[str, str] = {}
    for plain, key in names.items():
        match = PART.fullmatch(plain)
        if match is None:
            reason = why_not(plain, config)
            require(reason is None, f"{file.path}: {key}: {reason}")
            name = base_name(plain)
            require(
                name not in direct,
                f"{file.path}: {key} and {direct.get(name)} are one parameter: save the adapter again",
            )
            direct[name] = key
        else:
            parts.setdefault(match["module"], {})[match["part"]] = key
        entry = file.entries[key]
        require(
            entry.dtype in DTYPES,
            f"{file.path}: {key} is {entry.dtype} of shape {list(entry.shape)}, expected one of {', '.join(DTYPES)}",
        )
    return parts, direct


def base_name(plain: str) -> str:
    """The base's own name of a parameter, without PEFT's wrappers around the modules that it lies in."""
    return plain.removeprefix(PREFIX).replace(f"{WRAPPED}.", ".")


def is_frozen(name: str, factors: dict[str, Factors]) -> bool:
    """Whether it is the weight of a layer that has LoRA itself, as PEFT saves embeddings that are targeted."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module in factors


def why_not(key: str, config: dict[str, Any]) -> str | None:
    """Why a tensor that is no factor of LoRA cannot be averaged directly; None: it can."""
    name = key.removeprefix(PREFIX)
    if "lora_magnitude" in key:
        return WHY["use_dora"]
    if name == key or "lora_" in key:
        return f"unknown tensor, expected {PREFIX}<module>.lora_A.weight or .lora_B.weight"
    if key.endswith(TOKENS):
        return (
            None
            if config["trainable_token_indices"]
            else f"{CONFIG} has no trainable_token_indices, which says whose rows these are: write them into it, or save the adapter again"
        )
    saved = is_saved(name, config)
    if name.endswith(".bias") and config["bias"] == "none" and not saved:
        return f"{CONFIG} has bias 'none', so that PEFT would load this bias though no option trains it: set bias to 'all' or take it out"
    if not saved and not name.endswith((".bias", ".weight")):
        return f"unknown tensor, expected a module of modules_to_save, which is {config['modules_to_save']!r}"
    return None  # also embeddings that PEFT saves because they were resized or are targeted


def read_all_factors(
    file: SafetensorsFile, parts: dict[str, dict[str, str]], config: dict[str, Any]
) -> list[tuple[str, Factors]]:
    """(module or parameter, its factors). Raises SalsaError for a module that PEFT would not put LoRA on."""
    targeted = target_rule(file.path.parent, config)
    levels: dict[str, int] = {}
    for path in parts:
        levels[unnested(path)[0]] = levels.get(unnested(path)[0], 0) + 1
    found = []
    for path, given in parts.items():
        holder, depth = unnested(path)
        owner = holder.partition(f"{WRAPPED}.")[0]
        module = holder.replace(f"{WRAPPED}.", ".")
        if config["target_parameters"] and parameters_of(module, config) and (depth or not targeted(owner)):
            leaf = parameter_at(module, depth, levels[holder], config)
            name = f"{module}.{leaf}" if leaf else path
            found.append((name, read_factors(file, name, given, config, (module, leaf or "", owner))))
            continue
        tied = config["ensure_weight_tying"] and module.rpartition(".")[2] in EMBEDDINGS
        require(
            not depth and (targeted(owner) or tied),
            f"{file.path}: {path} is not among the target_modules or target_parameters of {CONFIG}: PEFT would drop its tensors in silence; "
            "add it there, or save the adapter again",
        )
        found.append((module, read_factors(file, module, given, config, (module, None, owner))))
    return found


def unnested(path: str) -> tuple[str, int]:
    """A module's name without the wrappers around its parameters, and how many these are."""
    depth = 0
    while path.endswith(WRAPPED):
        path, depth = path.removesuffix(WRAPPED), depth + 1
    return path, depth


def read_factors(
    file: SafetensorsFile,
    module: str,
    found: dict[str, str],
    config: dict[str, Any],
    place: tuple[str, str | None, str],
) -> Factors:
    """The parts of one module, of the rank and with the bias that the configuration says. place: holder, parameter, owner."""
    parts = {part.removesuffix(".weight"): key for part, key in found.items()}
    kind = "embedding_" if any(part.startswith("embedding") for part in parts) else ""
    halves = [f"{kind}A", f"{kind}B"]
    shown = " and ".join(f"lora_{half}" for half in halves)
    require(
        set(parts) - {"B.bias"} == set(halves),
        f"{file.path}: {module} has {' and '.join(f'lora_{part}' for part in sorted(parts))} alone, expected {shown}: "
        "save the adapter again",
    )
    A, B = (file.entries[parts[half]].shape for half in halves)
    bias = parts.get("B.bias")
    require(
        (bias is not None) == (config["lora_bias"] and not kind),
        f"{file.path}: {bias or module + '.lora_B.bias'}: {CONFIG} has lora_bias {config['lora_bias']}, and the file "
        f"{'has' if bias else 'has not'} the bias: correct lora_bias there, or save the adapter again",
    )
    matrices = len(A) == len(B) >= 2 and set(B[2:]) <= {1} and (not kind or len(A) == 2)
    shapes = f"lora_A {list(A)} and lora_B {list(B)}"
    require(
        0 not in (*A, *B) and len(A) > 1 < len(B),
        f"{file.path}: {module} has {shapes}: the parts of a sharded model (DeepSpeed ZeRO-3, FSDP) were not gathered when it was saved; "
        "save it again from the gathered model",
    )
    require(
        matrices,
        f"{file.path}: {module} has {shapes}, expected two matrices, or a convolution's with lora_B of kernel 1",
    )
    holder, parameter, owner = place
    r, scaling = rank_and_scaling(file.path.parent, config, owner if parameter is None else module)
    experts = A[0] // r if parameter is not None and A[0] % r == 0 else 1
    groups = A[0] // B[1] if len(A) > 2 and 0 < B[1] < A[0] and A[0] % B[1] == 0 and B[0] % (A[0] // B[1]) == 0 else 1
    require(
        (A[0], B[1] * groups) == (r * experts, r * experts),
        f"{file.path}: {module} has {shapes}, expected rank {r}, which r and rank_pattern of {CONFIG} say: correct them there (PEFT would "
        "refuse to load the file), or save the adapter again",
    )
    require(
        bias is None or file.entries[bias].shape == B[:1],
        f"{file.path}: {bias} has another length than {parts[halves[1]]}: save the adapter again",
    )
    return Factors(
        parts[halves[0]], parts[halves[1]], bias, A, B, scaling, bool(kind), experts, groups, holder, parameter, owner
    )


def check_direct(member: Member) -> None:
    """What the configuration promises beside LoRA is there, a row for each trained token."""
    path, config = member.file.path, member.config
    saved = config["modules_to_save"]
    require(
        not saved or any(is_saved(name, config) for name in member.direct),
        f"{path}: found no tensor of modules_to_save {saved!r}, so that PEFT would not load it: take them out of {CONFIG}, or save the "
        "adapter again",
    )
    tokens = [name for name in member.direct if name.endswith(TOKENS)]
    require(
        bool(tokens) or not config["trainable_token_indices"],
        f"{path}: found no {TOKENS[1:]}, though {CONFIG} has trainable_token_indices: take them out there, or save the adapter again",
    )
    for name in tokens:
        rows, expected = member.file.entries[member.direct[name]].shape[0], len(member.token_indices(name))
        fits = f"expected {expected} from trainable_token_indices: save it again"
        require(rows == expected, f"{path}: {member.direct[name]} has {rows} rows, {fits}")

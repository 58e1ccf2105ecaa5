"""The tensors of a PEFT adapter folder: LoRA factors, and parameters that are averaged directly.

    lora_A, lora_B             delta = scaling · B · A of a linear layer, or of a convolution (in · kernel columns)
    … of a stack of experts    one delta per expert: A (r · experts, in), B (out, r · experts); an expert has
                               consecutive rows of A, and every experts-th column of B
    … of grouped convolutions  one delta per group: B (out, r / groups)
    lora_embedding_A, _B       scaling · B · A is the transposed delta of an embedding
    lora_B.bias                scaling · b is added to the layer's output (lora_bias)
    any other tensor           parameter of the base: modules_to_save, bias, embedding, rows of trained tokens

scaling = alpha / r, or alpha / √r with rsLoRA. SalsaError names the file and the reason if a tensor is unknown, lacks
its counterpart (lora_A without lora_B), has a wrong rank or shape, or, once its values are read, is not finite.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.models.adapters.names import PREFIX, plain_names
from salsa_peft.soup import arrays
from salsa_peft.soup.arrays import DTYPES, Array
from salsa_peft.soup.lora.layouts import TensorsInMemory, to_current_layout
from salsa_peft.soup.lora.read import CONFIG, WHY, open_weights, read_config
from salsa_peft.soup.lora.targets import (
    EMBEDDINGS,
    WRAPPED,
    Shape,
    is_saved,
    parameter_at,
    parameters_of,
    rank_and_scaling,
    read_shape,
    strip_wrappers,
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
    """One member's LoRA factors of a module or parameter: tensor names in the file, scaling and shape."""

    A: str
    B: str
    bias: str | None
    scaling: float
    shape: Shape


@dataclass(frozen=True)
class Member:
    """A LoRA adapter of a soup. The values of its tensors are read by `read`."""

    name: str
    folder: Path
    config: dict[str, Any]
    """Field of LoraConfig → value, for the fields of DEFAULTS in soup/lora/read.py."""
    fingerprint: str | None
    """Fingerprint of the base that the adapter was trained on; None if the folder has no fingerprint.json."""
    file: SafetensorsFile
    factors: dict[str, Factors]
    """Module, or parameter in target_parameters → LoRA factors; sorted by name."""
    non_lora: dict[str, str]
    """Parameters averaged directly: name in the base (+ TOKENS for trained tokens) → name in the file."""
    frozen: frozenset[str] = frozenset()
    """Keys of `non_lora` that name weights of layers with LoRA; PEFT saves some such weights untrained."""

    @property
    def ranks(self) -> dict[str, int]:
        return {module: factors.shape.rank for module, factors in self.factors.items()}

    def read(self, key: str) -> Array:
        """A tensor's values in float32, or float64 if saved so. Raises SalsaError for NaN or infinity."""
        return self.file.arrays[key] if isinstance(self.file, TensorsInMemory) else arrays.read(self.file, key)

    def token_indices(self, name: str) -> list[int]:
        """Ids of the tokens whose rows of an embedding were trained. name: the embedding's key in `non_lora`."""
        given = self.config["trainable_token_indices"]
        if isinstance(given, dict):
            module = name.removesuffix(TOKENS)
            given = next((rows for key, rows in given.items() if module.endswith(key)), None)
        return list(given or [])


def read_member(folder: Path, name: str) -> Member:
    """Read and check an adapter's configuration and header. Values are read only if experts are joined."""
    config = read_config(folder)
    file = open_weights(folder)
    names = plain_names(file.entries, config, file.path)
    names, config, file = to_current_layout(names, config, file, folder)
    return make_member(name, folder, config, file, names)


def make_member(
    name: str, folder: Path, config: dict[str, Any], file: SafetensorsFile, names: dict[str, str]
) -> Member:
    """Check an adapter's tensors against its configuration. names: PEFT's name of a tensor → its name in the file."""
    parts, non_lora = sort_tensors(file, names, config)
    require(bool(parts), f"{file.path} holds no LoRA tensors (lora_A and lora_B); save the adapter again")
    factors = dict(sorted(read_all_factors(file, parts, config)))
    weights = {f"{module}.weight" for module in factors}  # PEFT saves the weight of a targeted embedding too
    frozen = frozenset(weights & non_lora.keys())
    member = Member(
        name, folder, config, read_fingerprint(folder), file, factors, dict(sorted(non_lora.items())), frozen
    )
    check_non_lora(member)
    return member


def sort_tensors(
    file: SafetensorsFile, names: dict[str, str], config: dict[str, Any]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Split tensors into LoRA factors, as module → part → name in the file, and Member.non_lora.

    names: PEFT's name of a tensor → its name in the file.
    """
    parts: dict[str, dict[str, str]] = {}
    non_lora: dict[str, str] = {}
    for plain, key in names.items():
        match = PART.fullmatch(plain)
        if match is None:
            reason = rejection_reason(plain, config)
            require(reason is None, f"{file.path}: {key}: {reason}")
            name = plain.removeprefix(PREFIX).replace(f"{WRAPPED}.", ".")
            require(
                name not in non_lora,
                f"{file.path}: {key} and {non_lora.get(name)} are the same parameter; save the adapter again",
            )
            non_lora[name] = key
        else:
            parts.setdefault(match["module"], {})[match["part"]] = key
        entry = file.entries[key]
        require(
            entry.dtype in DTYPES,
            f"{file.path}: {key} has dtype {entry.dtype} (shape {list(entry.shape)}); save the adapter in one of"
            f" {', '.join(DTYPES)}",
        )
    return parts, non_lora


def rejection_reason(key: str, config: dict[str, Any]) -> str | None:
    """Reason why a tensor that is no LoRA factor cannot be averaged directly; None if it can be."""
    name = key.removeprefix(PREFIX)
    if "lora_magnitude" in key:
        return WHY["use_dora"]
    if name == key or "lora_" in key:
        return f"unknown tensor; save the adapter with PEFT, which names LoRA tensors {PREFIX}<module>.lora_A.weight"
    if key.endswith(TOKENS):
        if config["trainable_token_indices"]:
            return None
        return (
            f"these are rows of trained tokens, but {CONFIG} has no trainable_token_indices; add the indices"
            " there, or save the adapter again"
        )
    saved = is_saved(name, config)
    if name.endswith(".bias") and config["bias"] == "none" and not saved:
        return f"{CONFIG} has bias 'none', but PEFT would load this bias; set bias to 'all' there, or remove the tensor"
    if not saved and not name.endswith((".bias", ".weight")):
        modules = config["modules_to_save"]
        return f"unknown tensor, which belongs to none of modules_to_save ({modules!r}); save the adapter again"
    return None  # also for embeddings, which PEFT saves if they were resized or are targeted


def read_all_factors(
    file: SafetensorsFile, parts: dict[str, dict[str, str]], config: dict[str, Any]
) -> list[tuple[str, Factors]]:
    """Name and factors of each module and parameter with LoRA.

    Raises SalsaError if the file has LoRA tensors of a module that the configuration does not target.
    """
    targeted = target_rule(file.path.parent, config)
    levels = Counter(strip_wrappers(path)[0] for path in parts)
    found = []
    for path, given in parts.items():
        unwrapped, depth = strip_wrappers(path)
        target = unwrapped.partition(f"{WRAPPED}.")[0]
        module = unwrapped.replace(f"{WRAPPED}.", ".")
        if config["target_parameters"] and parameters_of(module, config) and (depth or not targeted(target)):
            leaf = parameter_at(module, depth, levels[unwrapped], config)
            name = f"{module}.{leaf}" if leaf else path
            found.append((name, read_factors(file, name, given, config, (module, leaf or "", target))))
            continue
        tied = config["ensure_weight_tying"] and module.rpartition(".")[2] in EMBEDDINGS
        require(
            not depth and (targeted(target) or tied),
            f"{file.path}: {path} is not among the target_modules or target_parameters of {CONFIG}, so PEFT would"
            " ignore its tensors; add it there, or save the adapter again",
        )
        found.append((module, read_factors(file, module, given, config, (module, None, target))))
    return found


def read_factors(
    file: SafetensorsFile,
    module: str,
    found: dict[str, str],
    config: dict[str, Any],
    place: tuple[str, str | None, str],
) -> Factors:
    """One module's factors, checked against the configuration. place: module, parameter, target of Shape."""
    parts = {part.removesuffix(".weight"): key for part, key in found.items()}
    kind = "embedding_" if any(part.startswith("embedding") for part in parts) else ""
    halves = [f"{kind}A", f"{kind}B"]
    require(
        set(parts) - {"B.bias"} == set(halves),
        f"{file.path}: {module} has {' and '.join(f'lora_{part}' for part in sorted(parts))}, but both"
        f" {' and '.join(f'lora_{half}' for half in halves)} are needed; save the adapter again",
    )
    bias = parts.get("B.bias")
    require(
        (bias is not None) == (config["lora_bias"] and not kind),
        f"{file.path}: {bias or module + '.lora_B.bias'} is {'in' if bias else 'not in'} the file, but {CONFIG} has"
        f" lora_bias {config['lora_bias']}; correct lora_bias there, or save the adapter again",
    )
    A, B = (file.entries[parts[half]].shape for half in halves)
    shape = read_shape(file.path, module, (A, B), config, place, bool(kind))
    require(
        bias is None or file.entries[bias].shape == B[:1],
        f"{file.path}: {bias}: its length is not the number of rows of {parts[halves[1]]}; save the adapter again",
    )
    scaling = rank_and_scaling(file.path.parent, config, shape.target if shape.parameter is None else module)[1]
    return Factors(parts[halves[0]], parts[halves[1]], bias, scaling, shape)


def check_non_lora(member: Member) -> None:
    """Raise SalsaError if the file lacks modules_to_save or trained tokens that its configuration names."""
    path, config = member.file.path, member.config
    saved = config["modules_to_save"]
    require(
        not saved or any(is_saved(name, config) for name in member.non_lora),
        f"{path} has no tensor of modules_to_save {saved!r}, so PEFT would not load the file; remove modules_to_save"
        f" from {CONFIG}, or save the adapter again",
    )
    tokens = [name for name in member.non_lora if name.endswith(TOKENS)]
    require(
        bool(tokens) or not config["trainable_token_indices"],
        f"{path} has no {TOKENS[1:]}, but {CONFIG} has trainable_token_indices; remove the indices there, or save the"
        " adapter again",
    )
    for name in tokens:
        rows, expected = member.file.entries[member.non_lora[name]].shape[0], len(member.token_indices(name))
        require(
            rows == expected,
            f"{path}: {member.non_lora[name]} has {rows} rows, but trainable_token_indices name {expected} tokens; save"
            " the adapter again",
        )

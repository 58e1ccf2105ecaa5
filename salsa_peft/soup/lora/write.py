"""Writing a soup of adapters as an ordinary PEFT adapter folder, module by module, so that memory is bounded by one module's factors."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.arrays import Array
from salsa_peft.soup.checkpoints.write import LOCK
from salsa_peft.soup.lora import direct_parts
from salsa_peft.soup.lora.factors import Shape, Stacks
from salsa_peft.soup.lora.members import Tokenizer, tokenizer_of, write_tokenizer
from salsa_peft.soup.lora.read import CONFIG, DEFAULTS, SUMMARY, TARGETS, WEIGHTS, make_room, remove_remains, write_json
from salsa_peft.soup.lora.svd import moments, recompress, squared_norm
from salsa_peft.soup.lora.targets import EMBEDDINGS, is_saved, parameters_of, target_rule
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.summary import Tally, errors, relative, summarise
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import locked, other_files, sync_folder
from salsa_peft.utils.fingerprints import FINGERPRINT
from salsa_peft.utils.safetensors_io import BITS, NAMES, make_header, safetensors_writer

if TYPE_CHECKING:
    from salsa_peft.soup.lora.tensors import Member


logger = logging.getLogger(__name__)


class Section(NamedTuple):
    """Neighbouring tensors of the file: (name, dtype, shape) of each, and what makes them, in that order."""

    layout: list[tuple[str, str, tuple[int, ...]]]
    make: Callable[[], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a soup's folder is written, besides members and weights."""

    strategy: str
    rank: int | None
    """Recompress modules above it. None: exact."""
    dtype: str | None
    """Of the factors. None: the members'."""
    progress: Callable[..., None] | None
    """Called as console.Update is, once a module."""
    more: Mapping[str, Any]
    """What else the summary says."""


def save(
    members: Sequence[Member], stacks: Stacks, folder: Path, weights: Sequence[float], options: SaveOptions
) -> dict[str, Any]:
    """Write the folder and return the summary, which is its soup.json too.

    Raises SalsaError, and leaves nothing new behind, for what cannot be averaged or written, and for a folder that another process
    writes; an earlier soup in the folder stays until the new weights are there.
    """
    code, ranks = dtype_code(options.dtype, stacks.dtype), kept_ranks(stacks.shapes, options.rank)
    stacks.check_whole()
    check_out(folder, members)
    tokenizer = tokenizer_of(members)
    made = not folder.exists()
    with locked(folder):
        try:
            check_out(folder, members)  # again: until now another process may have written there
            remove_remains(folder)
            return _save(members, stacks, folder, weights, options, code, ranks, tokenizer)
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _save(
    members: Sequence[Member], stacks: Stacks, folder: Path, weights: Sequence[float], options: SaveOptions,
    code: str, ranks: dict[str, int], tokenizer: Tokenizer | None,
) -> dict[str, Any]:  # fmt: skip
    """What `save` does in a folder that is locked."""
    start = time.perf_counter()
    tally = Tally(np.zeros((len(members), len(members))))
    with float_arrays.one_thread():
        write_weights(folder, sections(members, stacks, weights, code, ranks, tally, options.progress))
    summary = summarise(members, weights, tally.gram, ranks)
    rounding = relative(tally.rounding, sum(tally.norms.values()) - sum(tally.lost.values()))
    summary |= {"strategy": options.strategy, "dtype": NAMES[code], "rounding": rounding, "rank": options.rank}
    summary |= {"tokenizer": None if tokenizer is None else tokenizer.said()}
    summary |= {"error": errors(tally) if options.rank else None, **options.more}
    summary |= {"bytes": (folder / WEIGHTS).stat().st_size, "seconds": round(time.perf_counter() - start, 3)}
    write_json(folder / SUMMARY, summary)  # from here on what lies beside the weights is known as ours
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    fingerprints = {member.fingerprint for member in members}
    if len(fingerprints) == 1 and None not in fingerprints:
        write_json(folder / FINGERPRINT, {"base": fingerprints.pop()})
    write_json(folder / CONFIG, config_fields(members, stacks, ranks))
    sync_folder(folder)
    return summary


def dtype_code(asked: str | None, members: str) -> str:
    """A dtype as torch names it → as safetensors does; None: the members'."""
    codes = {NAMES[code]: code for code in float_arrays.DTYPES}
    name = NAMES[members] if asked is None else asked.removeprefix("torch.")
    require(name in codes, f"dtype: found {asked!r}, expected one of {', '.join(codes)}")
    return codes[name]


def kept_ranks(shapes: dict[str, Shape], rank: int | None) -> dict[str, int]:
    """Module → rank in the file: the stacked one where it is not above what was asked for."""
    right = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)
    require(right, f"rank: found {rank!r}, expected a whole number of 1 or more, or none for an exact soup")
    highest = max(shape.rank for shape in shapes.values())
    if rank is not None and rank >= highest:
        logger.warning("warning: rank %d: no module of the soup has more than %d, nothing is cut off", rank, highest)
    return {
        module: shape.rank
        if rank is None or rank >= shape.rank
        else min(max(rank // shape.groups, 1) * shape.groups, shape.limit)
        for module, shape in shapes.items()
    }


def write_weights(folder: Path, parts: list[Section]) -> None:
    header = make_header(entry for part in parts for entry in part.layout)
    with safetensors_writer(folder / WEIGHTS, header) as write:
        for part in parts:
            for (name, code, _), values in zip(part.layout, part.make(), strict=True):
                require(
                    float_arrays.all_finite(float_arrays.widen(values, code)),
                    f"{folder / WEIGHTS}: {name} has values too large for {NAMES[code]}: ask for dtype float32",
                )
                write(float_arrays.as_bytes(values))
        make_room(folder)


def sections(members: Sequence[Member], stacks: Stacks, weights: Sequence[float], code: str, ranks: dict[str, int], tally: Tally,
             progress: Callable[..., None] | None) -> list[Section]:  # fmt: skip
    """Wide dtypes first, so that every tensor lies at a multiple of its values' size."""
    layout = [
        (name, code, shape) for module in stacks.shapes for name, shape in factor_layout(stacks, module, ranks[module])
    ]
    found = [Section(layout, partial(factors, stacks, weights, code, ranks, tally, progress))]
    for name in direct_parts.names(members):
        kept, holder = direct_parts.dtype_of(members, name), direct_parts.holders(members, name)[0]
        entry = (direct_parts.saved_as(name, stacks.wrappers), kept, holder.file.entries[holder.direct[name]].shape)
        found.append(Section([entry], partial(direct, members, name, weights, kept)))
    return sorted(found, key=lambda part: -BITS[part.layout[0][1]])


def direct(members: Sequence[Member], name: str, weights: Sequence[float], code: str) -> Iterator[Array]:
    yield float_arrays.narrow(direct_parts.mean(members, name, weights), code)


def factor_layout(stacks: Stacks, module: str, rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """PEFT's names and shapes of a module's tensors."""
    shape = stacks.shapes[module]
    found = list(zip(stacks.names(module), shape.saved(rank), strict=True))
    return [*found, (found[1][0].removesuffix("weight") + "bias", (shape.out,))] if stacks.with_bias else found


def factors(stacks: Stacks, weights: Sequence[float], code: str, ranks: dict[str, int], tally: Tally,
            progress: Callable[..., None] | None) -> Iterator[Array]:  # fmt: skip
    """A, B and, with lora_bias, the bias of each module in turn, as they go into the file."""
    for module, shape in stacks.shapes.items():
        arrays = stacks.arrays(module)
        given = [moments(A, B) for A, B in arrays.each_block()]
        gram = arrays.gram(given, len(weights))
        tally.gram += gram
        tally.norms[module] = max(float(np.array(weights) @ gram @ np.array(weights)), 0.0)
        if ranks[module] < shape.rank:
            cut = [recompress(block, arrays.coefficients(weights), ranks[module] // shape.groups) for block in given]
            A, B = (
                np.stack(half) if shape.blocks > 1 else half[0] for half in ([c.A for c in cut], [c.B for c in cut])
            )
            tally.lost[module], tally.norms[module] = sum(c.lost for c in cut), sum(c.norm for c in cut)
        else:
            A, B = arrays.A, arrays.weighted_B(weights)
        narrowed = rounded(A, B, code, tally)
        yield narrowed[0].reshape(-1, narrowed[0].shape[-1])
        yield shape.whole_B(narrowed[1])
        if arrays.bias is not None:
            yield float_arrays.narrow(np.array(weights) @ arrays.bias, code)
        if progress is not None:
            progress(1, total=len(stacks.shapes))


def rounded(A: Array, B: Array, code: str, tally: Tally) -> list[Array]:
    """A and B in the file's dtype; what that changes in their product is added up: B̂Â − BA = (B̂ − B)Â + B(Â − A)."""
    narrowed = [float_arrays.narrow(values, code) for values in (A, B)]
    if code not in ("F32", "F64"):
        A_hat, B_hat = (float_arrays.widen(values, code) for values in narrowed)
        change_A, change_B = A_hat - A, B_hat - B
        if change_A.any():
            A_hat, change_B = np.concatenate([A_hat, change_A], axis=-2), np.concatenate([change_B, B], axis=-1)
        pairs = [(A_hat, change_B)] if A_hat.ndim == 2 else zip(A_hat, change_B, strict=True)
        tally.rounding += sum(squared_norm(*pair) for pair in pairs)
    return narrowed


UNCLEAR = "[^.]*"
"""In a pattern, any parameter of a module."""


def config_fields(members: Sequence[Member], stacks: Stacks, ranks: dict[str, int]) -> dict[str, Any]:
    """LoraConfig's fields, JSON-able, for inference. ranks: module or parameter → rank in the soup."""
    configs = [member.config for member in members]
    head = configs[0]
    targeted = {targeted_name(stacks.shapes[name], name): r for name, r in ranks.items()}
    r = Counter(targeted.values()).most_common(1)[0][0]
    pattern = rank_pattern(targeted, r)
    tied = agree(configs, "ensure_weight_tying") and head["ensure_weight_tying"]
    fields: dict[str, Any] = DEFAULTS | {"ensure_weight_tying": tied} | listed_targets(stacks, targeted)
    everywhere = all(member.ranks.keys() == ranks.keys() for member in members)
    if everywhere and agree(configs, *TARGETS, "ensure_weight_tying") and meant(members[0], stacks):
        fields |= {name: ordered(head[name]) for name in TARGETS}
    fields |= {name: head[name] for name in ("fan_in_fan_out", "auto_mapping") if agree(configs, name)}
    return fields | {
        "peft_type": "LORA",
        "task_type": next((config["task_type"] for config in configs if config["task_type"] is not None), None),
        "base_model_name_or_path": head["base_model_name_or_path"],
        "revision": head["revision"],
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": saved_modules(members, tied),
        "bias": bias_of(members),
        "lora_bias": any(config["lora_bias"] for config in configs),
        "trainable_token_indices": head["trainable_token_indices"],
        "alora_invocation_tokens": head["alora_invocation_tokens"],
    }


def targeted_name(shape: Shape, name: str) -> str:
    """What PEFT finds a rank by: the parameter, or the module that is targeted."""
    if shape.parameter == "":
        return f"{shape.holder}.{UNCLEAR}"
    return shape.owner if shape.parameter is None else name


def meant(member: Member, stacks: Stacks) -> bool:
    """Whether a member's own targets mean the soup's modules, under the names that these have in the soup."""
    targeted = target_rule(member.folder, member.config)
    tied = EMBEDDINGS if member.config["ensure_weight_tying"] else ()
    return all(
        bool(parameters_of(shape.holder, member.config))
        if shape.parameter is not None
        else targeted(shape.owner) or name.rpartition(".")[2] in tied
        for name, shape in stacks.shapes.items()
    )


def listed_targets(stacks: Stacks, targeted: dict[str, int]) -> dict[str, Any]:
    """Every module and every parameter by its whole name; parameters as members have them, where their names are not known."""
    parameters = [name for name, shape in stacks.shapes.items() if shape.parameter is not None]
    modules = [name for name in targeted if name not in parameters and not name.endswith(UNCLEAR)]
    unclear = next((m for m in stacks.members for f in m.factors.values() if f.parameter == ""), None)
    listed = parameters if unclear is None else unclear.config["target_parameters"]
    return {"target_modules": sorted(modules), "target_parameters": sorted(listed) or None}


def saved_modules(members: Sequence[Member], tied: bool) -> list[str] | None:
    """modules_to_save: as all members have it, else what any has; with what one saved because it was tied, where not all are."""
    configs = [member.config for member in members]
    if agree(configs, "modules_to_save", "ensure_weight_tying"):
        return configs[0]["modules_to_save"] or None
    found = {module for config in configs for module in config["modules_to_save"] or ()}
    if not tied and found:
        for member in members:
            if member.config["ensure_weight_tying"]:
                found |= {
                    n.rpartition(".")[0] for n in member.direct if n.endswith((".weight",)) and n not in member.frozen
                }
    return sorted(found) or None


def bias_of(members: Sequence[Member]) -> str:
    """Which of the base's biases PEFT takes for trained."""
    configs = [member.config for member in members]
    if agree(configs, "bias"):
        return str(configs[0]["bias"])
    given = direct_parts.names(members)
    biases = [name for name in given if name.endswith(".bias") and not is_saved(name, configs[0])]
    return "all" if biases else "none"


def agree(configs: Sequence[dict[str, Any]], *names: str) -> bool:
    return all(ordered(config[name]) == ordered(configs[0][name]) for config in configs for name in names)


def ordered(value: Any) -> Any:
    """A list's order says nothing in LoraConfig's fields."""
    return sorted(value) if isinstance(value, list) else value


def rank_pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    """PEFT's pattern for the modules of unusual rank: by last name where that says it, by whole name otherwise."""
    by_leaf: dict[str, set[int]] = {}
    for module, r in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(r)
    pattern = {}
    for module, r in ranks.items():
        leaf = module.rpartition(".")[2]
        if r != usual and module.endswith(UNCLEAR):
            pattern[f"^{re.escape(module.removesuffix(UNCLEAR))}{UNCLEAR}"] = r
        elif r != usual:  # PEFT matches (.*\.)?(KEY)$ and takes the first key that fits: these keys exclude one another
            pattern[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(module)}"] = r
    return pattern


def check_out(folder: Path, members: Sequence[Member]) -> None:
    """Refused as the soup's folder: a member, a file, an adapter or a checkpoint that is no soup of adapters."""
    require(
        all(folder.resolve() != member.folder.resolve() for member in members),
        f"{folder} is a member: a soup is never written over one; name another folder",
    )
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file, expected a folder: name another one")
    require(
        not (folder / "config.json").exists(), f"{folder} holds a model: name another folder for the soup's adapter"
    )
    require(
        not (folder / CONFIG).exists() or (folder / SUMMARY).exists(),
        f"{folder} holds an adapter that is not a soup: name another folder (OUT comes first, then the members)",
    )
    if folder.exists() and not (folder / SUMMARY).exists():
        held = other_files(folder, WEIGHTS)  # weights alone: of a write that was killed
        require(not held, f"{folder} holds {held} and no soup: name a new or empty folder, or an earlier soup's")

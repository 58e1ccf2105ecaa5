"""Merges a soup of adapters into their base, as a full checkpoint, one tensor after another.

    W' = W + Σ_i w_i · (PEFT's merge of member i − W)     summed in float32 or float64, rounded once to the base's dtype

PEFT merges each member (adapter_models.py), a few modules at a time, so the mean is exact for all that PEFT merges:
LoRA, DoRA, modules_to_save, trained tokens, experts. Layout, names, dtypes and files are the base's; the tokenizer is
that of a member with all tokens (soup/lora/members.py), else the base's. The layout changes only if training added
tokens, or if output embeddings are untied. For bases in 4 bits see quantised_bases.py. Heads for which the base has no
tensor are not supported.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.alignment import check_tied
from salsa_peft.soup.checkpoints.companions import companion_files, has_vocabulary
from salsa_peft.soup.checkpoints.read import (
    INDEX,
    Checkpoint,
    check_manifest,
    check_plain,
    check_weights,
    read_checkpoint,
)
from salsa_peft.soup.checkpoints.vocabularies import vocabulary
from salsa_peft.soup.checkpoints.write import Output, Progress, byte_counter, open_output
from salsa_peft.soup.lora.members import TEMPLATE, TokenizerSource, template_of, tokenizer_of
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.merge.layout import Layout
from salsa_peft.soup.merge.members import LoadedMembers, load_members, read_members
from salsa_peft.soup.merge.plan import Plan
from salsa_peft.soup.merge.quantised_bases import Dequantised, open_base
from salsa_peft.soup.merge.sums import Figures
from salsa_peft.soup.summary import relative_norm, summarise
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import EMBEDDINGS, FINGERPRINT, base_fingerprints
from salsa_peft.utils.safetensors_io import as_bytes

logger = logging.getLogger(__name__)

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def merge(
    out: Path | str,
    base: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float],
    *,
    names: Sequence[str] | None = None,
    quantized_base: str | None = None,
    same_base: bool = False,
    untie: bool = False,
    strategy: str = "linear",
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write base + Σ w_i δ_i into the folder `out`. Returns the summary, which is also in out/soup.json.

    members: folders of PEFT adapters. weights: may have any sum. quantized_base: nf4 or nf4-double, as in
    quantised_bases.py. same_base: assert that the members were trained on `base`, even if their fingerprints differ. If
    tied embeddings have LoRA, PEFT adds the deltas of input and output embeddings to one tensor; with `untie`, the two
    become separate tensors, so that the result computes what the adapters compute. more: further entries of the
    summary. progress: called with (bytes written, bytes in all). Raises SalsaError naming file and tensor; then nothing
    is written.
    """
    begun = time.perf_counter()
    folders = [Path(member) for member in members]
    numbers = check_weights(weights, len(folders))
    read = read_members(folders, names)
    checkpoint = read_checkpoint(Path(base))
    source = open_base(checkpoint, quantized_base)
    if not isinstance(source, Dequantised):
        check_plain(checkpoint)
        _check_fingerprints(checkpoint, read, same_base)
    check_tied(checkpoint)
    loaded = load_members(read, checkpoint)
    plan = Plan(source, loaded, numbers, untie)
    layout = Layout(plan)
    tokenizer = tokenizer_of(read)
    if tokenizer is not None:
        _check_tokenizer(checkpoint, plan, tokenizer.folder)
    with open_output(Path(out), [checkpoint.folder, *folders], layout.size) as output:
        check_manifest(checkpoint)
        figures = _write_shards(output, plan, layout, progress)
        if (checkpoint.folder / INDEX).is_file():
            output.write(INDEX, layout.index())
        _write_tokenizer(output, checkpoint, tokenizer)
        summary: dict[str, Any] = {"kind": "merged", "strategy": strategy, "base": str(checkpoint.folder)}
        summary |= _summary(read, loaded, numbers, figures) | source.summary
        summary |= {"replaced": plan.replaced(), "rows": loaded.rows, "untied": plan.untied is not None}
        summary |= {"tokenizer": None if tokenizer is None else tokenizer.summary(), "parameters": layout.parameters}
        summary |= {"rounding": relative_norm(figures.lost, figures.delta), "bytes": layout.size}
        summary |= {"shards": len(checkpoint.files), "seconds": round(time.perf_counter() - begun, 3), **(more or {})}
        output.finish(layout.config(), summary)
    return summary


def _summary(
    members: Sequence[Member], loaded: LoadedMembers, weights: list[float], figures: Figures
) -> dict[str, Any]:
    """Ranks, and norms, distances and cosines of the members' changes of the base."""
    ranks = [{name: one.rank for name, one in adapter.wrapped.items() if one.rank} for adapter in loaded.adapters]
    stacked = sum(map(Counter, ranks), Counter[str]())
    found = summarise(members, weights, figures.gram.numpy(), ranks)
    return found | {"modules": len(stacked), "ranks": sorted(set(stacked.values()))}


def _check_fingerprints(checkpoint: Checkpoint, members: Sequence[Member], same_base: bool) -> None:
    """Raise SalsaError if a member's fingerprint says that it was trained on a different base."""
    if same_base:
        return
    known = [member for member in members if member.fingerprint is not None]
    for member in members:
        if member.fingerprint is None:
            logger.warning(
                "warning: %s has no %s, so it was not checked that this adapter was trained on %s; its config names the"
                " base %s",
                member.folder, FINGERPRINT, checkpoint.folder, member.config["base_model_name_or_path"] or "(no name)",
            )  # fmt: skip
    found = base_fingerprints(checkpoint.folder) if known else []
    for member in known:
        require(
            member.fingerprint in found,
            f"{member.folder} was trained on another base than {checkpoint.folder}: its {FINGERPRINT} has"
            f" {str(member.fingerprint)[:12]}…, but this base has {found[0][:12]}…; name the adapter's own base with"
            " --base, or assert with --same-base (same_base=True) that the two bases are the same",
        )


def _check_tokenizer(checkpoint: Checkpoint, plan: Plan, member: Path) -> None:
    """Raise SalsaError if the member's tokenizer has new tokens for which the embeddings have no rows."""
    path, own = member / "tokenizer.json", checkpoint.folder / "tokenizer.json"
    shapes = {name: shape for entries in plan.layout.values() for name, _, shape in entries}
    name = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if name is None or not path.is_file():
        return
    known = vocabulary(own) if own.is_file() else {}  # the base may have more tokens than rows, as in Gemma 3
    rows, tokens = shapes[name][0], {token: n for token, n in vocabulary(path).items() if known.get(token) != n}
    last = max(tokens, key=lambda token: tokens[token], default="")
    require(
        tokens.get(last, 0) < rows,
        f"{path}: token {last!r:.40} has the id {tokens.get(last)}, but {name} in {checkpoint.folder} has only {rows}"
        " rows, and the adapter adds none; resize the base's embeddings as in training and save the base, or remove the"
        " tokenizer from the member",
    )


def _write_tokenizer(output: Output, checkpoint: Checkpoint, tokenizer: TokenizerSource | None) -> None:
    """Write tokenizer, chat template and generation settings: the member's, else the base's."""
    found = companion_files(checkpoint.folder)
    given = {} if tokenizer is None else companion_files(tokenizer.folder)
    complete = has_vocabulary(given)
    if complete:
        found = {name: path for name, path in found.items() if name.endswith("generation_config.json")}
    else:  # tokenizer settings are useless without the vocabulary
        given = {name: path for name, path in given.items() if name not in TOKENIZER_SETTINGS}
    for name, path in sorted((found | given).items()):
        output.write(name, path.read_bytes())
    if tokenizer is not None:
        template = tokenizer.written
        if template is None and not complete:
            template = template_of(tokenizer.folder)  # the template inside the settings, which are not copied
        if template is not None:
            output.write(TEMPLATE, template)


def _write_shards(output: Output, plan: Plan, layout: Layout, progress: Progress | None) -> Figures:
    total, count = Figures(len(plan.weights)), byte_counter(progress, layout.size)
    for file, entries in plan.layout.items():
        figures = Figures(len(plan.weights))
        with output.shard(file, layout.headers[file]) as write:
            count(8 + len(layout.headers[file]))
            for name, _, _ in entries:
                for piece in map(as_bytes, plan.pieces(name, figures)):
                    write(piece)
                    count(len(piece))
        total.add(figures)
    return total

"""A soup of adapters merged into their base, as a full checkpoint: streamed over the base's shards, a few modules at a time.

    W' = W + Σ_i w_i · (PEFT's merge of member i − W)        summed in float32 or float64, rounded once to the base's dtype

Each member is merged by PEFT itself (soup/merge/adapter_models.py), so that whatever PEFT merges has an exact mean: LoRA, DoRA, saved modules,
trained tokens, experts. Layout, names, dtypes and files are the base's, the tokenizer the first member's where it has one. What
changes in the layout: rows of tokens that were added in training, and output embeddings that are no longer the input's. A base in
bitsandbytes' 4 bits is dequantised, and `quantized_base` puts a plain base through 4 bits and back first, since that is what a QLoRA
adapter was trained on (soup/merge/quantised_bases.py); nothing is written in 4 bits. Left out: heads that the base has no tensor for.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.soup.checkpoints.alignment import check_tied
from salsa_peft.soup.checkpoints.read import (
    INDEX,
    Checkpoint,
    check_manifest,
    check_plain,
    check_weights,
    read_checkpoint,
)
from salsa_peft.soup.checkpoints.vocabularies import vocabulary
from salsa_peft.soup.checkpoints.write import Output, Progress, copy_others, counter, has_vocabulary, making, others
from salsa_peft.soup.lora.members import TEMPLATE, TokenizerSource, template_of, tokenizer_of
from salsa_peft.soup.lora.tensors import Member
from salsa_peft.soup.merge.layout import Layout
from salsa_peft.soup.merge.members import Loaded, load_members, read_members
from salsa_peft.soup.merge.plan import ELEMENTS, Figures, Plan
from salsa_peft.soup.merge.quantised_bases import Dequantised, open_base
from salsa_peft.soup.summary import delta_statistics, relative_norm
from salsa_peft.utils.errors import require
from salsa_peft.utils.fingerprints import EMBEDDINGS, FINGERPRINT, base_fingerprints
from salsa_peft.utils.safetensors_io import Buffer, as_bytes

logger = logging.getLogger(__name__)

ARITHMETIC = 2
"""Counted up when the same members would give other bytes."""


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
    """Write base + Σ w_i δ_i into the folder `out` and return the summary, also out/soup.json.

    Members are PEFT adapter folders; weights have any sum. quantized_base: nf4 or nf4-double, see soup/merge/quantised_bases.py. same_base: the
    caller says that `base` is what the members were trained on, whatever their fingerprints say. untie: LoRA on embeddings that are tied
    in the base is merged into input and output embeddings of their own, so that the result computes what the adapters do; else it is
    merged as PEFT does, into the one tensor. Raises SalsaError naming file and
    tensor; then nothing is left behind. A killed call, made again, goes on at the first shard that is not whole. `progress` is told
    (bytes written, bytes in all).
    """
    begun, out = time.perf_counter(), Path(out)
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
    size = sum(map(layout.size_of, checkpoint.files))
    tokenizer = tokenizer_of(read)
    if tokenizer is not None:
        _check_tokenizer(checkpoint, plan, tokenizer.folder)
    identity = _identity(checkpoint, read, numbers, quantized_base) | {"untie": untie}
    with making(out, identity, [checkpoint.folder, *folders], size) as output:
        kept = output.kept
        check_manifest(checkpoint)
        figures = _shards(output, plan, layout, progress, size)
        if (checkpoint.folder / INDEX).is_file():
            output.write(INDEX, layout.index())
        _write_tokenizer(output, checkpoint, tokenizer)
        summary: dict[str, Any] = {"kind": "merged", "strategy": strategy, "base": str(checkpoint.folder)}
        summary |= _summary(read, loaded, numbers, figures) | source.said()
        summary |= {"replaced": plan.replaced(), "rows": loaded.rows, "untied": plan.untied is not None}
        summary |= {"tokenizer": None if tokenizer is None else tokenizer.summary(), "parameters": layout.parameters()}
        summary |= {
            "rounding": relative_norm(figures.lost, figures.delta),
            "bytes": size,
            "shards": len(checkpoint.files),
        }
        summary |= {"shards_kept": kept, "seconds": round(time.perf_counter() - begun, 3)} | dict(more or {})
        output.finish(layout.config(), summary)
    return summary


def _summary(members: Sequence[Member], loaded: Loaded, weights: list[float], figures: Figures) -> dict[str, Any]:
    """What was merged, in figures: norms, distances and cosines of what each member adds to the base."""
    ranks = [{name: one.rank for name, one in adapter.wrapped.items() if one.rank} for adapter in loaded.adapters]
    modules = {module for found in ranks for module in found}
    stacked = {sum(found.get(module, 0) for found in ranks) for module in modules}
    listed = [
        {"ranks": sorted(set(found.values())), "modules": len(found), "rslora": member.config["use_rslora"]}
        for member, found in zip(members, ranks, strict=True)
    ]
    names = [member.name for member in members]
    return delta_statistics(names, weights, figures.gram.numpy(), listed) | {
        "modules": len(modules),
        "ranks": sorted(stacked),
    }


def _identity(
    checkpoint: Checkpoint, members: Sequence[Member], weights: list[float], quantized_base: str | None
) -> dict[str, Any]:
    found = []
    for member in members:
        stat, config = member.file.path.stat(), (member.folder / "adapter_config.json").read_bytes()
        hashes = [hashlib.sha256(part).hexdigest() for part in (member.file.header, config)]
        found.append([str(member.folder.resolve()), stat.st_size, stat.st_mtime_ns, *hashes])
    return {"merged": ARITHMETIC, "weights": weights, "quantized_base": quantized_base, "members": found,
            "base": [str(checkpoint.folder.resolve()), *checkpoint.identity()]}  # fmt: skip


def _check_fingerprints(checkpoint: Checkpoint, members: Sequence[Member], same_base: bool) -> None:
    """Raise SalsaError where a member says that it was trained on another base."""
    known = [member for member in members if member.fingerprint is not None]
    if same_base:
        return
    for member in members:
        if member.fingerprint is None:
            logger.warning(
                "warning: %s has no %s: that it was trained on %s is believed, not checked; it names the base %s", member.folder, FINGERPRINT,
                checkpoint.folder, member.config["base_model_name_or_path"] or "(no name)",
            )  # fmt: skip
    if not known:
        return
    found = base_fingerprints(checkpoint.folder)
    for member in known:
        require(
            member.fingerprint in found,
            f"{member.folder} was trained on another base than {checkpoint.folder}: its {FINGERPRINT} says"
            f" {str(member.fingerprint)[:12]}…, that base has {found[0][:12]}…; name its own with --base, or assert with --same-base"
            " (same_base=True) that they are the same",
        )


def _check_tokenizer(checkpoint: Checkpoint, plan: Plan, member: Path) -> None:
    """Raise SalsaError where the member's tokenizer, which goes with the merge, has new tokens that the merge has no rows for."""
    path, own = member / "tokenizer.json", checkpoint.folder / "tokenizer.json"
    shapes = {name: shape for entries in plan.layout.values() for name, _, shape in entries}
    name = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if name is None or not path.is_file():
        return
    known = vocabulary(own) if own.is_file() else {}  # a base's own may have more than rows: Gemma 3's image token
    rows, tokens = shapes[name][0], {token: n for token, n in vocabulary(path).items() if known.get(token) != n}
    last = max(tokens, key=lambda token: tokens[token], default="")
    require(
        tokens.get(last, 0) < rows,
        f"{path}: token {last!r:.40} has the number {tokens.get(last)}, but {name} in {checkpoint.folder} has {rows} rows and the adapter"
        " brings none of its own: resize the base's embeddings as in training and save it, or remove the tokenizer from the member",
    )


def _write_tokenizer(output: Output, checkpoint: Checkpoint, tokenizer: TokenizerSource | None) -> None:
    """The members' tokenizer and chat template, where they have one, else the base's; settings of generation are the base's."""
    copy_others(output, checkpoint.folder, None if tokenizer is None else tokenizer.folder)
    if tokenizer is None:
        return
    template = tokenizer.written
    if template is None and not has_vocabulary(others(tokenizer.folder)):
        template = template_of(tokenizer.folder)  # its settings, where a template may be inside, are not copied alone
    if template is not None:
        output.write(TEMPLATE, template)


def _shards(output: Output, plan: Plan, layout: Layout, progress: Progress | None, size: int) -> Figures:
    """Write what is not there yet."""
    total, tell = Figures(len(plan.weights)), counter(progress, size)
    for file in plan.layout:

        def make(write: Callable[[Buffer], None], file: str = file) -> dict[str, Any]:
            figures = Figures(len(plan.weights))
            tell(8 + len(layout.header(file)))
            for name in layout.names(file):
                pieces: Iterator[memoryview]
                streamed = plan.streamed(name, figures)
                if streamed is not None:
                    pieces = map(as_bytes, streamed)
                elif plan.changed(name):
                    tensor, measured = plan.tensor(name)
                    figures.add(measured.as_json())
                    pieces = iter([as_bytes(tensor)])
                else:
                    pieces = (as_bytes(piece) for _, piece in plan.source.pieces(name, ELEMENTS))
                for piece in pieces:
                    write(piece)
                    tell(len(piece))
            return figures.as_json()

        if file in output.done:
            tell(layout.size_of(file))
        total.add(output.shard(file, layout.header(file), make))
    return total

"""References: what the KL term looks at: an adapter on the shared base, none (the base itself), or frozen weights of their own.

Every kind is the base plus a weighted sum of seeds' deltas: seed-N one member at 1, the soup its members at weights of sum 1,
`shrunk` one member at a scale, `base` no member. So K references of adapters cost K thin adapters and no copy of the base; of full
weights each is a frozen model, read from checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from salsa_peft.config.references import Reference
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.stage_context import StageContext, reference_folder, seed_folders
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import HUB_ID, readable_hub_errors

EXPECTED = (
    "expected 'base', an adapter's name, an adapter's or a checkpoint's folder or Hub id, or a PreTrainedModel; of a PeftModel pass the"
    " adapter's folder, or merge_and_unload()"
)


class FrozenReference(NamedTuple):
    """A reference: the name of a frozen adapter on the policy's model, None for the base, or a model of its own."""

    label: str
    adapter: str | None
    model: PreTrainedModel | None = None
    """Full weights, frozen; `adapter` is None then."""
    sync_every: int | None = None
    """Updates between two moves towards the policy (training/reference_sync.py). None: it stays."""
    mixup_alpha: float = 0.1
    """How far: θ_ref ← (1 − α) θ_ref + α θ_policy."""


def attach_reference(
    model: PeftModel, reference: Reference, seeds: Mapping[int, Path], soup: Path | None, name: str
) -> FrozenReference:
    """Put one of the recipe's references on the model as adapter `name`, frozen.

    `seeds`: position in sft.seeds → adapter folder; `soup`: the soup stage's folder.
    """
    if reference.sync_every is not None:  # room for the policy's rank, a block of seed-0's that counts nothing
        members = [Path(str(soup))] if reference.soup else [seeds[member] for member in reference.members]
        weights = [1.0] if reference.soup else reference.weights
        StackedAdapter.load([*members, seeds[0]]).attach(model, name, [*weights, 0.0])
        return FrozenReference(reference.label, name, None, reference.sync_every, reference.mixup_alpha)
    if reference.soup:
        require(soup is not None, "reference soup: found no soup, expected the soup stage's result")
        lora.attach(model, Path(str(soup)), name)
    elif reference.path is not None:
        lora.attach(model, lora.local_folder(reference.path), name)
    elif not reference.members:
        return FrozenReference(reference.label, None)
    elif reference.weights == [1.0]:
        lora.attach(model, seeds[reference.members[0]], name)
    else:
        StackedAdapter.load([seeds[member] for member in reference.members]).attach(model, name, reference.weights)
    return FrozenReference(reference.label, name)


def checkpoint_sum(
    context: StageContext, reference: Reference, inputs: Mapping[str, Path]
) -> tuple[list[Path], list[float]]:
    """A recipe's reference of full weights → the checkpoints it is the weighted sum of: base + Σ w δ = (1 − Σ w) θ_base + Σ w θ."""
    if reference.soup:
        return [inputs["soup"]], [1.0]
    if reference.path is not None:
        return [reference_folder(context.recipe, reference.path)], [1.0]
    seeds, weights = seed_folders(inputs), list(reference.weights)
    folders = [seeds[member] for member in reference.members]
    rest = 1 - math.fsum(weights)
    if abs(rest) > 1e-9:
        folders, weights = [*folders, context.folder], [*weights, rest]
    return folders, weights


def load_checkpoint_sum(model: PreTrainedModel, folders: Sequence[Path], weights: Sequence[float]) -> None:
    """Give a model of full weights, in place, the weighted sum of checkpoints. Raises SalsaError for ones that don't fit it."""
    LiveCheckpoints(model, [read_checkpoint(folder) for folder in folders]).set(weights)


def as_references(
    model: PeftModel | PreTrainedModel,
    references: Sequence[str | Path | FrozenReference | PreTrainedModel],
    names: Sequence[str] | None = None,
) -> list[FrozenReference]:
    """What a library user passes → frozen references.

    On a PeftModel: "base", an attached adapter's name, or an adapter's folder or Hub id. With either kind of policy: a model, or
    a checkpoint's folder or Hub id. names: of adapters that are attached for it. Raises SalsaError for an empty list, for what can be no
    reference of this policy, and for weights of another base (by their fingerprint; what has none is said).
    """
    one = repr(str(references)) if isinstance(references, str | Path) else type(references).__name__
    require(
        references is None or isinstance(references, list | tuple),
        f"references: found {one}, expected a list of them",
    )
    require(bool(references), "references: found none, expected at least one ('base' is the model without its adapter)")
    wishes = names or [f"reference-{index}" for index in range(len(references))]
    return [_as_reference(model, reference, wish) for reference, wish in zip(references, wishes, strict=True)]


def _as_reference(model: Any, reference: Any, wish: str) -> FrozenReference:
    if isinstance(reference, FrozenReference):
        known = [None, *model.peft_config] if isinstance(model, PeftModel) else [None]
        require(
            reference.adapter in known,
            f"references: found {reference.adapter!r} in a Frozen, expected an adapter on the model",
        )
        return reference
    if isinstance(reference, PreTrainedModel):
        return freeze(model, reference, reference.name_or_path or wish)
    if not isinstance(reference, str | Path):
        raise SalsaError(f"references: found {type(reference).__name__}, {EXPECTED}")
    name = str(reference)
    folder = Path(name)
    if isinstance(model, PeftModel) and name == "base":
        require(
            name not in model.peft_config,
            "references: found 'base', which is the model without its adapters, and an adapter of that name, expected another name"
            " for it; pass references.FrozenReference('base', 'base') for the adapter, or FrozenReference('base', None)",
        )
        return FrozenReference("base", None)
    if isinstance(model, PeftModel) and (name in model.peft_config or not _is_checkpoint(folder)):
        if name not in model.peft_config:
            name = lora.unused_name(model, wish)
            with readable_hub_errors(str(reference)):
                attached = lora.local_folder(str(reference))
            base = str(causal_lm(model).name_or_path)
            bases.require_same_base(attached, bases.fingerprints_of(base), base)
            lora.attach(model, attached, name)
        lora.set_trainable(model, name, False)
        return FrozenReference(str(reference), name)
    require(
        not (folder / lora.CONFIG).is_file(),
        f"references: {name} is an adapter and the policy has full weights: merge it into its base with"
        f" `salsa soup OUT {name} --merge`, and pass that checkpoint OUT",
    )
    require(
        name != "base",
        "references: found 'base' for a policy of full weights, expected a model, or a checkpoint's folder or Hub id",
    )
    require(
        folder.is_dir() or bool(HUB_ID.match(name)),
        f"{name}: found no such folder, expected a checkpoint's folder or a Hub id",
    )
    with readable_hub_errors(name):
        loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=model.dtype, use_safetensors=True, trust_remote_code=False
        )
    return freeze(model, loaded.to(model.device), name)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / lora.CONFIG).is_file()


def freeze(policy: PeftModel | PreTrainedModel, reference: PreTrainedModel, label: str) -> FrozenReference:
    """A model as a reference: eval mode, no gradients. Raises SalsaError for the policy itself and for another vocabulary."""
    lm = causal_lm(policy)
    require(
        reference is not lm,
        "references: found the policy's own model, expected a frozen copy of it; its KL would be 0 always",
    )
    rows = [m.get_output_embeddings().weight.shape[0] for m in (reference, lm)]
    require(
        rows[0] == rows[1],
        f"references: found a vocabulary of {rows[0]} tokens in {label}, expected the policy's, {rows[1]}",
    )
    check_head(reference)
    reference.requires_grad_(False)
    return FrozenReference(label, None, reference.eval())

"""References of the KL term: adapters on the policy's base, the base itself, or separate models.

A recipe's reference is `base`, a `path`, or the base plus a weighted sum of the seeds' deltas: a seed, the soup, or
`shrunk`, which is one seed with a weight below 1. With `norm_of` the sum is scaled to the norm of another model's
delta: a soup to a seed's norm (`stretched`), or a seed to the soup's. Adapters share one copy of the base; each reference with full weights
is a separate model. training/ppo/rollout.py computes the references' log-probs and the KL to them.

With `offload: frozen`, separate models of references and rewards stay in CPU memory and move to the device, one at a
time, to score. The policy, its optimizer states and adapters, which share the policy's base, are not offloaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from salsa_peft.config.references import Reference
from salsa_peft.models.adapters import bases, lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.logprobs import check_head
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.stage_context import StageContext, reference_folder, result_folders
from salsa_peft.soup.attached import AttachedSoup
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import HUB_ID, local_folder, readable_hub_errors

if TYPE_CHECKING:
    from salsa_peft.training.ppo.config import SalsaPPOConfig


class FrozenReference(NamedTuple):
    """A frozen reference: an adapter on the policy's model, the base (adapter None), or a separate model."""

    label: str
    adapter: str | None
    model: PreTrainedModel | None = None
    """A separate model with full weights; `adapter` is None then."""
    sync_every: int | None = None
    """Number of updates from one sync to the next (training/reference_sync.py). None: never synced."""
    mixup_alpha: float = 0.1
    """α of a sync: θ_ref ← (1 − α) θ_ref + α θ_policy."""
    soup: AttachedSoup | None = None
    """The soup of adapters of the policy's model that `adapter` is, if it is one. A sync renews it instead."""


def attach_reference(
    model: PeftModel, reference: Reference, folders: Mapping[str, Path], name: str, start: Path | None = None
) -> FrozenReference:
    """Attach a recipe's reference to the model as the frozen adapter `name`; `base` needs no adapter.

    folders: name of each model that the reference reads → its adapter's folder. start: where the policy's training
    starts, for a reference that is synced with the policy.
    """
    require(
        "soup" in folders or "soup" not in reference.reads,
        "reference soup: the result of the soup stage is missing. Run that stage first",
    )
    members, weights = members_of(reference, folders)
    if reference.sync_every is not None:
        require(start is not None, f"reference {reference.label}: only a policy's reference can follow the policy")
        # the policy's start, which has weight 0, adds only the policy's rank
        StackedAdapter.load([*members, Path(str(start))]).attach(model, name, [*weights, 0.0])
        return FrozenReference(reference.label, name, None, reference.sync_every, reference.mixup_alpha)
    if reference.norm_of is not None:
        stacked, other = StackedAdapter.load(members), StackedAdapter.load([folders[reference.norm_of]])
        scale = norm_ratio(reference, other.norm([1.0]), stacked.norm(weights))
        stacked.attach(model, name, [scale * weight for weight in weights])
    elif reference.soup:
        lora.attach(model, members[0], name)
    elif reference.path is not None:
        lora.attach(model, lora.adapter_folder(reference.path), name)
    elif not reference.members:
        return FrozenReference(reference.label, None)
    elif weights == [1.0]:
        lora.attach(model, members[0], name)
    else:
        StackedAdapter.load(members).attach(model, name, weights)
    return FrozenReference(reference.label, name)


def members_of(reference: Reference, folders: Mapping[str, Path]) -> tuple[list[Path], list[float]]:
    """The folders whose deltas a reference sums, and their weights; none for `base` and a `path`."""
    if reference.soup:
        return [folders["soup"]], [1.0]
    return [local_folder(member) if "/" in member else folders[member] for member in reference.members], list(
        reference.weights
    )


def norm_ratio(reference: Reference, wanted: float, own: float) -> float:
    """Scale with which a delta of norm `own` gets the norm `wanted`; it is printed. Raises SalsaError for norm 0."""
    require(
        own > 0,
        f"reference {reference.label}: its delta is 0, so it cannot be scaled to the norm of {reference.norm_of}; use"
        " seeds that were trained",
    )
    say(f"reference {reference.label}: scaled by {wanted / own:.4g}")
    return wanted / own


def load_reference(
    model: PreTrainedModel, reference: Reference, context: StageContext, inputs: Mapping[str, Path]
) -> None:
    """Set a model's weights to those of a recipe's reference, a weighted sum of checkpoints.

    Such a reference is base + Σ w δ = (1 − Σ w) θ_base + Σ w θ. Raises SalsaError for a checkpoint that does not fit.
    """
    made = result_folders(inputs)
    folders, weights = members_of(reference, made)
    if reference.path is not None:
        folders, weights = [reference_folder(context.recipe, reference.path)], [1.0]
    if reference.norm_of is not None:
        other = made[reference.norm_of]
        live = LiveCheckpoints(model, [read_checkpoint(folder) for folder in (*folders, other, context.folder)])
        zeros = [0.0] * len(folders)
        own = live.norm([*weights, 0.0, -math.fsum(weights)])
        scale = norm_ratio(reference, live.norm([*zeros, 1.0, -1.0]), own)
        weights = [scale * weight for weight in weights]
        live.set([*weights, 0.0, 1 - math.fsum(weights)])
        return
    rest = 1 - math.fsum(weights)
    if abs(rest) > 1e-9:
        folders, weights = [*folders, context.folder], [*weights, rest]
    LiveCheckpoints(model, [read_checkpoint(folder) for folder in folders]).set(weights)


def as_references(
    model: PeftModel | PreTrainedModel,
    references: Sequence[str | Path | FrozenReference | AttachedSoup | PreTrainedModel],
    names: Sequence[str] | None = None,
) -> list[FrozenReference]:
    """Convert the references that a library user passes to frozen references of the policy `model`.

    Each may be a model or a checkpoint's folder. With a PeftModel it may also be "base", an attached adapter's name, a
    soup that `salsa_peft.soup.attach` returned, or an adapter's folder or Hub id; with full weights, also a
    checkpoint's Hub id. names: names for the adapters attached here. Raises SalsaError for an empty list, for an object
    that cannot be a reference of the model, and for an adapter whose fingerprint is of a base other than the policy's
    (without fingerprint, a line is printed).
    """
    given = repr(str(references)) if isinstance(references, str | Path) else type(references).__name__
    require(
        references is None or isinstance(references, list | tuple), f"references: {given} is not a list; pass a list"
    )
    require(bool(references), "references: the list is empty; pass at least one reference")
    names = names or [f"reference-{index}" for index in range(len(references))]
    return [_as_reference(model, reference, name) for reference, name in zip(references, names, strict=True)]


def _as_reference(model: Any, reference: Any, new_name: str) -> FrozenReference:
    """Convert one reference. An adapter attached here is called `new_name`, or similarly if that is taken."""
    if isinstance(reference, FrozenReference):
        known = [None, *model.peft_config] if isinstance(model, PeftModel) else [None]
        require(reference.adapter in known, f"references: the model has no adapter {reference.adapter!r}; attach it")
        return reference
    if isinstance(reference, AttachedSoup):
        return soup_reference(model, reference)
    if isinstance(reference, PreTrainedModel):
        return freeze(model, reference, reference.name_or_path or new_name)
    if not isinstance(reference, str | Path):
        raise SalsaError(
            f"references: {type(reference).__name__} objects cannot be references. Pass 'base', an adapter's name, the"
            " folder or Hub id of an adapter or checkpoint, or a PreTrainedModel. Instead of a PeftModel, pass its"
            " adapter's folder or the result of its merge_and_unload()"
        )
    name, folder = str(reference), Path(str(reference))
    is_adapter = (folder / lora.CONFIG).is_file()
    is_checkpoint = (folder / "config.json").is_file() and not is_adapter
    if isinstance(model, PeftModel) and name == "base":
        require(
            name not in model.peft_config,
            "references: 'base' means the model without its adapters, but the model has an adapter called 'base'. Pass"
            " FrozenReference('base', 'base') for that adapter, or FrozenReference('base', None) for the base",
        )
        return FrozenReference("base", None)
    if isinstance(model, PeftModel) and (name in model.peft_config or not is_checkpoint):
        if name not in model.peft_config:
            name = lora.unused_name(model, new_name)
            attached = lora.adapter_folder(str(reference))
            base = str(causal_lm(model).name_or_path)
            bases.require_same_base(attached, bases.fingerprints_of(base), base)
            lora.attach(model, attached, name)
        lora.set_trainable(model, name, False)
        return FrozenReference(str(reference), name)
    require(
        not is_adapter,
        f"references: {name} is an adapter, but the policy has full weights. Merge the adapter into its base with"
        f" `salsa soup OUT {name} --merge`, and pass OUT",
    )
    require(
        name != "base",
        "references: 'base' needs a policy with adapters. Pass a model, or a checkpoint's folder or Hub id",
    )
    require(
        folder.is_dir() or bool(HUB_ID.match(name)),
        f"references: {name} is neither a folder nor a Hub id. Pass a checkpoint's folder or Hub id",
    )
    with readable_hub_errors(name):
        loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=model.dtype, use_safetensors=True, trust_remote_code=False
        )
    return freeze(model, loaded.to(model.device), name)


def soup_reference(model: Any, soup: AttachedSoup) -> FrozenReference:
    """Freeze a soup that `salsa_peft.soup.attach` added to the policy's model. With sync_every it follows its members."""
    require(
        soup.model is model,
        f"references: the soup {soup.name!r} is attached to another model than the policy's; attach it to this one",
    )
    lora.set_trainable(soup.model, soup.name, False)
    return FrozenReference(soup.name, soup.name, None, soup.sync_every, soup=soup)


def freeze(policy: PeftModel | PreTrainedModel, reference: PreTrainedModel, label: str) -> FrozenReference:
    """Freeze a model as a reference. Raises SalsaError for the policy's model or a differing vocabulary."""
    lm = causal_lm(policy)
    require(reference is not lm, "references: this is the policy's model, so the KL would always be 0. Pass a copy")
    own, other = (model.get_output_embeddings().weight.shape[0] for model in (lm, reference))
    require(
        own == other,
        f"references: {label} has {other} rows of output embeddings, but the policy has {own}; pass a model with the"
        " policy's vocabulary size",
    )
    check_head(reference)
    reference.requires_grad_(False)
    return FrozenReference(label, None, reference.eval())


DeviceContext = Callable[[], AbstractContextManager[None]]
"""Function that returns a context in which a model is on the device."""


class OffloadedModel:
    """A frozen model in CPU memory (pinned if CUDA is available). `on` copies it to the device.

    Frozen weights do not change, so the copy on the device is simply dropped. Raises SalsaError for trainable weights,
    and for quantised weights, whose quantisation state would not be moved.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        require(
            all(weight.is_floating_point() and not weight.requires_grad for weight in weights),
            f"offload: the {type(model).__name__} is trainable or quantised and cannot be offloaded; set offload: none",
        )
        self.tensors: list[Tensor] = [*weights, *model.buffers()]
        self.cpu_data: list[Tensor] = []
        for tensor in self.tensors:  # one by one, so that at most one tensor is in memory twice
            tensor.data = _pinned(tensor.data)
            self.cpu_data.append(tensor.data)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Context in which the model is on the device. On leaving it, the model is on the CPU again."""
        try:
            for tensor, data in zip(self.tensors, self.cpu_data, strict=True):
                tensor.data = copy_to(data, device)
            yield
        finally:
            for tensor, data in zip(self.tensors, self.cpu_data, strict=True):
                tensor.data = data


def _pinned(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu()
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_pinned() else tensor


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the tensor on the device, made without waiting for the device's running computations."""
    return tensor.to(device, non_blocking=True)


def place_frozen_models(
    references: Sequence[FrozenReference], reward: Reward, args: SalsaPPOConfig
) -> list[DeviceContext]:
    """Offload the models of references and rewards (`offload: frozen`), or move them to the device.

    Returns a DeviceContext for each reference. Raises SalsaError if `offload: frozen` has no such model.
    """
    device: torch.device = args.device  # type: ignore[assignment]
    models = [reference.model for reference in references]
    if args.offload == "none":
        for model in (*models, *(one.frozen_model() for one in reward.components())):
            if model is not None and next(model.parameters()).device != device:
                model.to(device)  # type: ignore[arg-type]
        return [contextlib.nullcontext for _ in models]
    scoring = [(one, frozen) for one in reward.components() if (frozen := one.frozen_model()) is not None]
    require(
        bool(scoring) or any(model is not None for model in models),
        "offload: frozen has nothing to offload, since each reference and reward is a function, an adapter on the"
        " policy's base, or that base. Set offload: none",
    )
    for one, frozen in scoring:
        one.on_device = partial(OffloadedModel(frozen).on, device)
    return [contextlib.nullcontext if model is None else partial(OffloadedModel(model).on, device) for model in models]

"""Syncing references to the policy (EMA, as in TR-DPO), off by default. Every n updates:

θ_ref ← (1 − α) θ_ref + α θ_policy          (TRL's sync_ref_model; TR-DPO, Gorbatovski et al., 2024)

For adapters, the deltas are averaged, as in a soup. The first sync is exact, because the reference's rank is the sum of
the soup's and the policy's. Later syncs give the best approximation of that rank; the error is logged. References
with full weights are float32, since bfloat16 would round small changes away.

A soup of adapters of the policy's model (salsa_peft.soup.attach) is computed again from what its members are now, so
that a soup with the policy as member follows it, while its other members hold it in place.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm
from salsa_peft.soup.lora.svd import moments, recompress
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import require


def check(references: Sequence[FrozenReference], policy: Any, name: str | None, *, sharded: bool = False) -> None:
    """Raise SalsaError for a reference that cannot be synced, or whose sync options are out of range."""
    for one in references:
        if one.sync_every is None:
            continue
        where = f"reference {one.label}"
        require(one.sync_every > 0, f"{where}: sync_every is {one.sync_every}, but must be at least 1")
        require(
            0 < one.mixup_alpha <= 1, f"{where}: mixup_alpha is {one.mixup_alpha:g}, but must be above 0 and at most 1"
        )
        own = one.adapter is not None or one.model is not None
        require(own, f"{where}: the base cannot be synced, because the policy uses it too; remove sync_every")
        require(not sharded, f"{where}: sharded weights cannot be synced; remove sync_every")
        if one.adapter is not None and one.soup is None:
            list(_layers(policy, str(name), one.adapter))


def sync(policy: Any, name: str | None, references: Sequence[FrozenReference], step: int) -> float | None:
    """Sync the references that are due after `step` updates.

    name: the policy's adapter; None for full weights. Returns the largest relative error of the syncs (the share of the
    new delta's norm that is lost), or None if no reference was due.
    """
    due = (one for one in references if one.sync_every is not None and step % one.sync_every == 0)
    return max((_sync(policy, name, one) for one in due), default=None)


def _sync(policy: Any, name: str | None, one: FrozenReference) -> float:
    if one.soup is not None:
        one.soup.refresh()
        return one.soup.error or 0.0
    if one.model is not None:
        return _sync_model(causal_lm(policy), one.model, one.mixup_alpha)
    return _sync_adapter(policy, str(name), str(one.adapter), one.mixup_alpha)


@torch.no_grad()
def _sync_model(policy: nn.Module, reference: nn.Module, alpha: float) -> float:
    trained = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.lerp_(trained[name].detach().to(parameter), alpha)
    return 0.0


def _layers(model: Any, policy: str, reference: str) -> Iterator[Any]:
    """Yield the layers that the reference adapts. Raises SalsaError for a layer that `sync` cannot handle."""
    for layer in lora.tuner_layers(model):
        adapters = [name for name in (policy, reference) if name in (*layer.lora_A, *layer.lora_embedding_A)]
        if not adapters:
            continue
        where = f"reference {reference}: it cannot be synced, because"
        require(reference in adapters, f"{where} the policy adapts a module that the reference does not adapt")
        plain = all(
            name in layer.lora_A and layer.lora_A[name].weight.ndim == 2 and layer.lora_B[name].bias is None
            for name in adapters
        )
        kind = type(layer).__name__
        require(plain, f"{where} sync needs LoRA without bias on linear layers or experts, not on a {kind}")
        yield layer


def _factors(layer: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """Views of an adapter's factors A (r, in) and B (out, r) in a layer: one pair for each expert."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
        return [(A, B)]
    blocks = B.view(len(B), -1, layer.num_experts)  # rank × experts, as in get_delta_weight
    return [(own, blocks[:, :, expert]) for expert, own in enumerate(A.view(layer.num_experts, -1, A.shape[1]))]


@torch.no_grad()
def _sync_adapter(model: Any, policy: str, reference: str, alpha: float) -> float:
    """Set the reference, at its own rank, to the mean weighted by alpha. Returns the relative error."""
    lost = norm = 0.0
    for layer in _layers(model, policy, reference):
        shares = [(reference, 1 - alpha), *([(policy, alpha)] if policy in layer.lora_A else [])]
        for blocks in zip(*(_factors(layer, name) for name, _ in shares), strict=True):
            coefficients = [
                np.full(len(a), share * layer.scaling[name])
                for (name, share), (a, _) in zip(shares, blocks, strict=True)
            ]
            rows, columns = ([block[half].detach().cpu().double().numpy() for block in blocks] for half in (0, 1))
            A, B = blocks[0]
            rank = min(len(A), *B.shape, A.shape[1])
            found = recompress(
                moments(np.concatenate(rows), np.concatenate(columns, 1)), np.concatenate(coefficients), rank
            )
            lost, norm = lost + found.lost, norm + found.norm
            A.zero_()
            B.zero_()
            A[: len(found.A)] = torch.from_numpy(found.A).to(A)
            B[:, : len(found.A)] = torch.from_numpy(found.B / layer.scaling[reference]).to(B)
    return (lost / norm) ** 0.5 if norm else 0.0


def state_dict(model: Any, references: Sequence[FrozenReference]) -> dict[str, Tensor]:
    """The weights of all references with sync_every, for a checkpoint."""
    return {key: weight.detach().cpu().contiguous() for key, weight in _weights(model, references)}


@torch.no_grad()
def load_state_dict(model: Any, references: Sequence[FrozenReference], saved: dict[str, Tensor]) -> None:
    """Load the weights that `state_dict` returned. Raises SalsaError if they are not of these references."""
    weights = dict(_weights(model, references))
    require(
        weights.keys() == saved.keys(),
        "checkpoint: its synced references are not those of this run; pass the references of the run that saved it",
    )
    for key, weight in weights.items():
        weight.copy_(saved[key])


def _weights(model: Any, references: Sequence[FrozenReference]) -> Iterator[tuple[str, Tensor]]:
    for number, one in enumerate(references):
        if one.sync_every is not None:
            found = one.model.parameters() if one.model is not None else lora.parameters(model, str(one.adapter))
            yield from ((f"{number}.{index}", weight) for index, weight in enumerate(found))

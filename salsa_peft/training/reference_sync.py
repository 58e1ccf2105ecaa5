"""A soup reference that moves: every n updates an average of what it was and the policy, off unless it is asked for.

    θ_ref ← (1 − α) θ_ref + α θ_policy          (TRL's sync_ref_model with ref_model_mixup_alpha; TR-DPO, Gorbatovski et al., 2024)

Of adapters the mean is that of deltas, as in a soup: exact while the reference's rank holds it, which is the soup's and the policy's
together, so the first time; after that the best approximation of that rank, and what is lost is logged. A reference of full weights moves in
float32, since bfloat16 would swallow small steps.
"""

from __future__ import annotations

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
    """Raise SalsaError for numbers that can't be, for weights in pieces, and for adapters that `sync` has no rule for."""
    for one in references:
        if one.sync_every is None:
            continue
        require(one.sync_every > 0, f"reference {one.label}: found sync_every {one.sync_every}, expected at least 1")
        require(
            0 < one.mixup_alpha <= 1,
            f"reference {one.label}: found mixup_alpha {one.mixup_alpha:g}, expected more than 0, at most 1",
        )
        require(
            one.adapter is not None or one.model is not None,
            f"reference {one.label}: found sync_every for the base, which all roles share, expected none",
        )
        require(not sharded, f"reference {one.label}: found sync_every with weights cut in pieces, expected none")
        if one.adapter is not None:
            list(_layers(policy, str(name), one.adapter))


def sync(policy: Any, name: str | None, references: Sequence[FrozenReference], step: int) -> float | None:
    """Move the references whose turn it is after `step` updates towards the policy (its adapter `name`; None: its full weights).

    → the share of the new delta's norm that its rank could not hold, of the worst reference; None where none was moved.
    """
    lost = [
        _move_adapter(policy, str(name), str(one.adapter), one.mixup_alpha)
        if one.model is None
        else _move_model(causal_lm(policy), one.model, one.mixup_alpha)
        for one in references
        if one.sync_every is not None and step % one.sync_every == 0
    ]
    return max(lost, default=None)


@torch.no_grad()
def _move_model(policy: nn.Module, reference: nn.Module, alpha: float) -> float:
    """In place, at the reference's own place and precision."""
    trained = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.lerp_(trained[name].detach().to(parameter), alpha)
    return 0.0


def _layers(model: Any, policy: str, reference: str) -> Iterator[Any]:
    """The layers that a reference adapts, plain linear ones and stacks of experts, those of the policy's adapter among them. Raises
    SalsaError for others."""
    for layer in lora.tuner_layers(model):
        held = [name for name in (policy, reference) if name in (*layer.lora_A, *layer.lora_embedding_A)]
        if not held:
            continue
        require(
            reference in held,
            f"reference {reference}: found a module that the policy alone adapts, expected one of its own",
        )
        plain = all(
            name in layer.lora_A and layer.lora_A[name].weight.ndim == 2 and layer.lora_B[name].bias is None
            for name in held
        )
        require(
            plain,
            f"reference {reference}: found LoRA on a {type(layer).__name__}, expected plain linear layers or experts to move",
        )
        yield layer


def _factors(layer: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """An adapter's A (r, in) and B (out, r) of a layer, views of its own; of a stack of experts (PEFT's ParamWrapper) those of each."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not isinstance(layer, ParamWrapper) or layer.num_experts == 1:
        return [(A, B)]
    blocks = B.view(len(B), -1, layer.num_experts)  # as get_delta_weight has them: rank × experts
    return [(own, blocks[:, :, expert]) for expert, own in enumerate(A.view(layer.num_experts, -1, A.shape[1]))]


@torch.no_grad()
def _move_adapter(model: Any, policy: str, reference: str, alpha: float) -> float:
    """Module by module, expert by expert: the factors of both side by side, and back to the reference's rank."""
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
    """The weights of every reference that moves, for a checkpoint."""
    return {key: weight.detach().cpu().contiguous() for key, weight in _weights(model, references)}


@torch.no_grad()
def load_state_dict(model: Any, references: Sequence[FrozenReference], saved: dict[str, Tensor]) -> None:
    """Put them back. Raises SalsaError where they are not these references'."""
    there = dict(_weights(model, references))
    require(
        there.keys() == saved.keys(), "checkpoint: found weights of other moving references, expected those of this run"
    )
    for key, weight in there.items():
        weight.copy_(saved[key])


def _weights(model: Any, references: Sequence[FrozenReference]) -> Iterator[tuple[str, Tensor]]:
    for number, one in enumerate(references):
        if one.sync_every is not None:
            found = one.model.parameters() if one.model is not None else lora.parameters(model, str(one.adapter))
            yield from ((f"{number}.{place}", weight) for place, weight in enumerate(found))

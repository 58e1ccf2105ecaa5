"""Several LoRA adapters of one base as one adapter of rank Σ r_i, whose blocks can be re-weighted in place.

    delta = Σ_i w_i · scaling_i · B_i · A_i        scaling_i = alpha_i / r_i, rsLoRA: alpha_i / √r_i

The mean of products is not the product of means, so the factors are stacked, never averaged: A = [A_0; A_1; …] and
B = [w_0·scaling_0·B_0, w_1·scaling_1·B_1, …] multiply to the weighted delta up to float32 rounding.
Members may differ in rank, alpha, rsLoRA, patterns and modules; a module that a member lacks is a delta of zero.
Left out: recompression to a smaller rank, merging into the base.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.adapter_folders import (
    CONFIG,
    FINGERPRINT,
    SUMMARY,
    TARGETS,
    TOKENIZER,
    WEIGHTS,
    Factors,
    Member,
    check_one_base,
    clear_for_soup,
    read_member,
    write_file,
    write_json,
)
from salsa_peft.config import SalsaError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel


class Stack(NamedTuple):
    """Every member's factors of one module. Shapes, R = Σ r_i: A (R, in), B (out, R), scaling (R,), member (R,)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: torch.Tensor
    member: torch.Tensor

    def weighted_B(self, weights: Sequence[float]) -> torch.Tensor:
        """B with w_i · scaling_i in its columns: (out, R). The n scalars are multiplied in float64."""
        return self.B * (self.scaling * self.scaling.new_tensor(weights)[self.member]).to(self.B)


class StackedAdapter:
    """Several LoRA adapters of one base as ONE adapter of rank Σ r_i: each delta scaling_i · B_i · A_i is a block.

    A point on a line or a plane between the members is n scalars on the blocks of B: nothing is re-made.
    """

    def __init__(self, members: Sequence[Member], stacks: dict[str, Stack]) -> None:
        self.members = tuple(members)
        self.stacks = stacks

    @classmethod
    def load(cls, members: Sequence[Path | str], names: Sequence[str] | None = None) -> StackedAdapter:
        """Members are local PEFT adapter folders; `names` is what summaries call them (default: the folders' names)."""
        if not members:
            raise SalsaError("a soup of no members: expected at least one adapter folder")
        if names is None:
            names = [Path(member).resolve().name for member in members]
            names = names if len(set(names)) == len(names) else [str(member) for member in members]
        if len(names) != len(members):
            raise SalsaError(f"names: found {len(names)}, expected {len(members)}: one for each member")
        read = [read_member(Path(member), name) for member, name in zip(members, names, strict=True)]
        check_one_base([member for member, _ in read])
        return cls([member for member, _ in read], stack_factors(read))

    def state_dict(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """The soup's factors, float32, under the names that PEFT saves them by. Weights of any sum."""
        weights = check_weights(weights, len(self.members))
        tensors = {}
        for module, stack in self.stacks.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = stack.A
            tensors[f"base_model.model.{module}.lora_B.weight"] = stack.weighted_B(weights)
        return tensors

    def config(self) -> LoraConfig:
        """An inference configuration with alpha = r in every module, so that PEFT's scaling is exactly 1.

        What all members agree on is kept as they wrote it; where their modules differ, the modules are listed.
        """
        from peft import LoraConfig

        configs = [member.config for member in self.members]
        ranks = {module: len(stack.A) for module, stack in self.stacks.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        pattern = rank_pattern(ranks, r)
        fields: dict[str, Any] = {"target_modules": sorted(self.stacks)}
        if all(member.ranks.keys() == self.stacks.keys() for member in self.members):
            fields.update({field: getattr(configs[0], field) for field in TARGETS if agree(configs, *TARGETS)})
        for field in ("fan_in_fan_out", "auto_mapping"):
            if agree(configs, field):
                fields[field] = getattr(configs[0], field)
        return LoraConfig(
            **fields,
            task_type=next((config.task_type for config in configs if config.task_type is not None), None),
            base_model_name_or_path=configs[0].base_model_name_or_path,
            revision=configs[0].revision,
            inference_mode=True,
            r=r,
            lora_alpha=r,
            rank_pattern=dict(pattern),
            alpha_pattern=dict(pattern),
        )

    def save(self, folder: Path, weights: Sequence[float], *, strategy: str = "linear") -> dict[str, Any]:
        """Write an ordinary PEFT adapter folder, with the summary as soup.json; adapter_config.json appears last."""
        from safetensors.torch import save_file

        start = time.perf_counter()
        tensors = self.state_dict(weights)
        clear_for_soup(folder, self.members)
        write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        for name in TOKENIZER:
            source = self.members[0].folder / name
            if source.is_file():
                write_file(folder / name, partial(shutil.copyfile, source))
        fingerprints = {member.fingerprint for member in self.members}
        if len(fingerprints) == 1 and None not in fingerprints:
            write_json(folder / FINGERPRINT, {"base": fingerprints.pop()})
        summary = self.summary(weights) | {"strategy": strategy, "bytes": (folder / WEIGHTS).stat().st_size}
        summary["seconds"] = round(time.perf_counter() - start, 3)
        write_json(folder / SUMMARY, summary)
        config = self.config().to_dict()
        write_json(folder / CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(config.items())})
        return summary

    def gram(self) -> torch.Tensor:
        """⟨delta_i, delta_j⟩ summed over modules: (members, members), float64.

        tr((B_i A_i)ᵀ B_j A_j) = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), so that no delta is ever formed.
        """
        import torch

        gram = torch.zeros(len(self.members), len(self.members), dtype=torch.float64)
        for stack in self.stacks.values():
            A, B = stack.A.double(), stack.B.double() * stack.scaling
            owner = torch.nn.functional.one_hot(stack.member, len(self.members)).double()
            gram += owner.T @ ((B.T @ B) * (A @ A.T)) @ owner
        return gram

    def summary(self, weights: Sequence[float]) -> dict[str, Any]:
        """Norms, distances and cosines of the members' deltas, all modules as one vector; a zero one has no cosine."""
        gram = self.gram().tolist()
        norms = [math.sqrt(max(gram[i][i], 0.0)) for i in range(len(gram))]
        total = sum(gram[i][j] * wi * wj for i, wi in enumerate(weights) for j, wj in enumerate(weights))
        members = [
            {
                "name": member.name,
                "weight": float(weight),
                "ranks": sorted(set(member.ranks.values())),
                "modules": len(member.ranks),
            }
            | {"rslora": member.config.use_rslora, "norm": norm}
            for member, weight, norm in zip(self.members, weights, norms, strict=True)
        ]
        pairs = [
            {"a": self.members[i].name, "b": self.members[j].name}
            | {"distance": math.sqrt(max(gram[i][i] + gram[j][j] - 2 * gram[i][j], 0.0))}
            | {"cosine": gram[i][j] / (norms[i] * norms[j]) if norms[i] * norms[j] else None}
            for i, j in combinations(range(len(gram)), 2)
        ]
        ranks = sorted({len(stack.A) for stack in self.stacks.values()})
        soup = {"modules": len(self.stacks), "ranks": ranks, "norm": math.sqrt(max(total, 0.0))}
        return {"weights": [float(w) for w in weights], "members": members, "pairs": pairs, **soup}

    def attach(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Add the soup to a live model as a frozen float32 adapter that is not active.

        Which adapter is active and what requires grad stay as they were, also in layers that had no adapter so far.
        """
        import torch
        from peft.tuners.lora import LoraLayer

        check_weights(weights, len(self.members))
        if adapter_name in model.peft_config:
            raise SalsaError(f"the model has an adapter {adapter_name!r} already: delete it or take another name")
        modules = dict(model.get_base_model().named_modules())
        missing = next((module for module in self.stacks if module not in modules), None)
        if missing is not None:
            raise SalsaError(
                f"{missing} is in {self.members[0].folder} but not in the model: the soup is of another base"
            )
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.add_adapter(adapter_name, self.config())
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                # PEFT leaves a layer that it has just wrapped on "default", even where that is the new adapter's name
                layer.set_adapter(model.active_adapters, inference_mode=True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                layer_of(model, module, adapter_name, stack).lora_A[adapter_name].weight.copy_(stack.A)
        self.set_weights(model, adapter_name, weights)

    def set_weights(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Scale the blocks of an attached soup's lora_B in place: any point of a line or plane, nothing is re-made."""
        import torch

        weights = check_weights(weights, len(self.members))
        with torch.no_grad():
            for module, stack in self.stacks.items():
                layer_of(model, module, adapter_name, stack).lora_B[adapter_name].weight.copy_(
                    stack.weighted_B(weights)
                )


def stack_factors(read: Sequence[tuple[Member, dict[str, Factors]]]) -> dict[str, Stack]:
    import torch

    stacks = {}
    for module in sorted({module for _, factors in read for module in factors}):
        owners = [(i, factors[module]) for i, (_, factors) in enumerate(read) if module in factors]
        i, first = owners[0]
        for j, other in owners[1:]:
            shapes = [f"{f.A.shape[1]} to {f.B.shape[0]} features" for f in (other, first)]
            if shapes[0] != shapes[1]:
                raise SalsaError(
                    f"{read[j][0].folder / WEIGHTS}: {module} maps {shapes[0]}, "
                    f"in {read[i][0].folder / WEIGHTS} {shapes[1]}: a soup needs members of one base"
                )
        stacks[module] = Stack(
            torch.cat([f.A for _, f in owners]),
            torch.cat([f.B for _, f in owners], dim=1),
            torch.tensor([f.scaling for _, f in owners for _ in f.A], dtype=torch.float64),
            torch.tensor([i for i, f in owners for _ in f.A]),
        )
    return stacks


def layer_of(model: PeftModel, module: str, adapter_name: str, stack: Stack) -> Any:
    """The live layer that holds this soup's adapter; refused where it is another adapter, or merged into the base."""
    layer: Any = model.get_base_model().get_submodule(module)
    if adapter_name not in model.peft_config or adapter_name not in layer.lora_B:
        raise SalsaError(f"{module} has no adapter {adapter_name!r}: attach this soup under that name first")
    shapes = [tuple(half[adapter_name].weight.shape) for half in (layer.lora_A, layer.lora_B)]
    if shapes != [tuple(stack.A.shape), tuple(stack.B.shape)]:
        expected = [tuple(stack.A.shape), tuple(stack.B.shape)]
        raise SalsaError(
            f"{module}: adapter {adapter_name!r} has factors {shapes}, expected {expected}: of another soup or base"
        )
    if adapter_name in layer.merged_adapters:
        raise SalsaError(
            f"{module}: adapter {adapter_name!r} is merged into the base: unmerge it, its weights would have no effect"
        )
    return layer


def agree(configs: Sequence[LoraConfig], *fields: str) -> bool:
    return all(getattr(config, field) == getattr(configs[0], field) for config in configs for field in fields)


def rank_pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    """PEFT's pattern for the modules of unusual rank: by last name where that says it, by whole name otherwise."""
    by_leaf: dict[str, set[int]] = {}
    for module, r in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(r)
    pattern = {}
    for module, r in ranks.items():
        leaf = module.rpartition(".")[2]
        if r != usual:  # PEFT matches (.*\.)?(KEY)$ and takes the first key that fits: these keys exclude one another
            pattern[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(module)}"] = r
    return pattern


def check_weights(weights: Sequence[float], members: int, *, sum_to_one: bool = False) -> list[float]:
    """Negative weights extrapolate. A sum of 1 is asked of a soup, not of a shrunk delta or a point of a landscape."""
    shown = ", ".join(str(weight) for weight in weights)
    if len(weights) != members:
        raise SalsaError(f"weights: found {len(weights)} ({shown}), expected {members}: one for each member")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise SalsaError(f"weights: found {shown}, expected finite numbers")
    if sum_to_one and abs(sum(weights) - 1) > 1e-6:
        raise SalsaError(f"weights: {shown} sum to {sum(weights):.9g}, expected 1: change one of them")
    return [float(weight) for weight in weights]

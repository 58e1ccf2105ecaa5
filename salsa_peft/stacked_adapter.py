"""Several LoRA adapters of one base as one adapter of rank Σ r_i, whose blocks can be re-weighted in place.

    delta = Σ_i w_i · scaling_i · B_i · A_i        scaling_i = alpha_i / r_i, rsLoRA: alpha_i / √r_i

The mean of products is not the product of means, so the factors are stacked, never averaged: A = [A_0; A_1; …] and
B = [w_0·scaling_0·B_0, w_1·scaling_1·B_1, …] multiply to the weighted delta up to float32 rounding.
Members may differ in rank, alpha, rsLoRA, patterns and modules; a module that a member lacks is a delta of zero.
What is no delta (modules_to_save, biases, trained tokens) is averaged directly, see direct_parts.py.
Left out: merging into the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import direct_parts, float_arrays
from .adapter_folders import check_one_base
from .adapter_saving import SaveOptions, save
from .adapter_tensors import TOKENS, Member, check_same_direct, read_member
from .checkpoint_folders import check_weights as check_weights
from .checkpoint_folders import default_names
from .errors import SalsaError, require
from .recompression import moments
from .soup_config import config_fields
from .soup_summary import summarise
from .stacks import Stack, Stacks

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel

SCORE_HEAD = "score.weight"


class StackedAdapter:
    """Several LoRA adapters of one base as ONE adapter of rank Σ r_i: each delta scaling_i · B_i · A_i is a block.

    A point on a line or a plane between the members is n scalars on the blocks of B: nothing is re-made.
    """

    def __init__(self, members: Sequence[Member], stacks: Stacks) -> None:
        self.members = tuple(members)
        self.stacks = stacks
        """Module → Stack, read from the files when asked for, until `in_memory`."""

    @classmethod
    def load(cls, members: Sequence[Path | str], names: Sequence[str] | None = None) -> StackedAdapter:
        """Members are local PEFT adapter folders; `names` is what summaries call them (default: the folders' names).

        Only headers are read: values are looked at when they are used. Raises SalsaError for what cannot be averaged.
        """
        require(bool(members), "a soup of no members: expected at least one adapter folder")
        folders = [Path(member) for member in members]
        names = default_names(folders, names)
        read = [read_member(folder, name) for folder, name in zip(folders, names, strict=True)]
        check_one_base(read)
        check_same_direct(read)
        return cls(read, Stacks(read))

    def in_memory(self) -> StackedAdapter:
        """Itself, every factor read and kept: for a model that is moved between weights."""
        self.stacks.hold()
        return self

    def check(self, weights: Sequence[float]) -> list[float]:
        """Weights of any sum; of 1 where something is averaged directly."""
        checked = check_weights(weights, len(self.members))
        direct_parts.check_sum(self.members, checked)
        return checked

    def state_dict(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """The soup's factors, float32, and what is averaged directly, under the names that PEFT saves them by."""
        weights = self.check(weights)
        tensors = {}
        for module, stack in self.stacks.items():
            shape = self.stacks.shapes[module]
            (A, B), saved = shape.names(module), shape.saved(shape.rank)
            tensors[A] = stack.A.reshape(saved[0])
            tensors[B] = stack.weighted_B(weights).reshape(saved[1])
            if stack.bias is not None:
                tensors[B.removesuffix("weight") + "bias"] = stack.weighted_bias(weights).to(stack.B)
        names = {name: direct_parts.saved_as(name, self.stacks.shapes) for name in self.members[0].direct}
        return tensors | {names[name]: self.mean(name, weights) for name in names}

    def mean(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A tensor that is averaged directly, in its members' dtype."""
        values = direct_parts.mean(self.members, name, weights)
        return direct_parts.as_tensor(values, direct_parts.dtype_of(self.members, name))

    def full_tensors(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """What replaces the base's own parameters, under the base's names: modules_to_save, biases, saved embeddings."""
        weights = self.check(weights)
        names = (name for name in self.members[0].direct if not direct_parts.is_tokens(name))
        return {name: self.mean(name, weights) for name in names}

    def token_rows(self, weights: Sequence[float]) -> dict[str, tuple[list[int], torch.Tensor]]:
        """Trained tokens: the base's embedding → which of its rows are replaced, and by what (tokens, features)."""
        weights = self.check(weights)
        head = self.members[0]
        names = [name for name in head.direct if direct_parts.is_tokens(name)]
        rows = {name: (head.token_indices(name), self.mean(name, weights)) for name in names}
        return {f"{name.removesuffix(TOKENS)}.weight": rows[name] for name in names}

    def bias_deltas(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """What lora_bias adds to the base's biases, under the base's names: Σ w_i · scaling_i · b_i, float32."""
        weights = self.check(weights)
        biases = {module: stack for module, stack in self.stacks.items() if stack.bias is not None}
        return {f"{module}.bias": stack.weighted_bias(weights).to(stack.B) for module, stack in biases.items()}

    def config(self) -> LoraConfig:
        """The soup's configuration for inference, as `save` writes it."""
        from peft import LoraConfig

        return LoraConfig(**{name: value for name, value in self._config().items() if name != "peft_type"})

    def _config(self) -> dict[str, Any]:
        return config_fields(self.members, {module: shape.rank for module, shape in self.stacks.shapes.items()})

    def save(self, folder: Path, weights: Sequence[float], *, strategy: str = "linear", rank: int | None = None,
             dtype: str | torch.dtype | None = None, progress: Callable[..., None] | None = None,
             more: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
        """Write an ordinary PEFT adapter folder and return its summary, also soup.json.

        rank: recompress modules above it, which loses what the summary's `error` says. dtype: of the factors (default: the
        members'). progress: called as progress.Update is, once a module. more: what else the summary says.
        """
        options = SaveOptions(
            strategy=strategy,
            rank=rank,
            dtype=None if dtype is None else str(dtype),
            progress=progress,
            more=more or {},
        )
        return save(self.members, self.stacks, Path(folder), self.check(weights), options)

    def gram(self) -> torch.Tensor:
        """⟨delta_i, delta_j⟩ summed over modules: (members, members), float64. What is averaged directly is not in it."""
        import torch

        total = torch.zeros(len(self.members), len(self.members), dtype=torch.float64)
        with float_arrays.one_thread():
            for module in self.stacks:
                arrays = self.stacks.arrays(module)
                total += torch.from_numpy(arrays.gram(moments(arrays.A, arrays.B), len(self.members)))
        return total

    def summary(self, weights: Sequence[float]) -> dict[str, Any]:
        """Norms, distances and cosines of the members' deltas, all modules as one vector; a zero one has no cosine."""
        ranks = {module: shape.rank for module, shape in self.stacks.shapes.items()}
        return summarise(self.members, weights, self.gram().numpy(), ranks)

    def attach(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Add the soup to a live model as a frozen float32 adapter that is not active; its factors stay in memory.

        Which adapter is active and what requires grad stay as they were, also in layers that had no adapter so far.
        A score head is left to adapters.score_head; other full values cannot be on a shared base, and are refused.
        """
        import torch
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        self.check(weights)
        odd = next((name for name in self.members[0].direct if name != SCORE_HEAD), None)
        require(
            odd is None,
            f"{self.members[0].folder} holds {odd}, a value of the base's own: on a base that roles share it would be dropped; "
            "save the soup and open it with PEFT on a base of its own",
        )
        if adapter_name in model.peft_config:
            raise SalsaError(f"the model has an adapter {adapter_name!r} already: delete it or take another name")
        modules = dict(model.get_base_model().named_modules())
        missing = next((module for module in self.stacks if module not in modules), None)
        require(
            missing is None,
            f"{missing} is in {self.members[0].folder} but not in the model: the soup is of another base",
        )
        self.in_memory()
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        fields = self._config() | {"modules_to_save": None, "bias": "none"}
        model.add_adapter(adapter_name, LoraConfig(**{name: fields[name] for name in fields if name != "peft_type"}))
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.r:
                # PEFT leaves a layer that it has just wrapped on "default", even where that is the new adapter's name
                layer.set_adapter(model.active_adapters, inference_mode=True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                A = live_factors(model, module, adapter_name, stack)[0]
                A.copy_(stack.A.reshape(A.shape))
        self.set_weights(model, adapter_name, weights)

    def set_weights(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Scale the blocks of an attached soup's lora_B in place: any point of a line or plane, nothing is re-made."""
        import torch

        weights = self.check(weights)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                _, B, bias = live_factors(model, module, adapter_name, stack)
                B.copy_(stack.weighted_B(weights).reshape(B.shape))
                if bias is not None:
                    bias.copy_(stack.weighted_bias(weights))


def live_factors(model: PeftModel, module: str, adapter_name: str, stack: Stack) -> tuple[Any, Any, Any]:
    """The live parameters A, B and, with lora_bias, B's bias (else None), checked as `layer_of` does."""
    layer = layer_of(model, module, adapter_name, stack)
    if adapter_name in layer.lora_embedding_B:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], None
    B = layer.lora_B[adapter_name]
    return layer.lora_A[adapter_name].weight, B.weight, B.bias


def layer_of(model: PeftModel, module: str, adapter_name: str, stack: Stack) -> Any:
    """The live layer that holds this soup's adapter; refused where it is another adapter, or merged into the base."""
    layer: Any = model.get_base_model().get_submodule(module)
    if adapter_name not in model.peft_config or adapter_name not in layer.r:
        raise SalsaError(f"{module} has no adapter {adapter_name!r}: attach this soup under that name first")
    if adapter_name in layer.lora_embedding_B:
        shapes = [tuple(half[adapter_name].shape) for half in (layer.lora_embedding_A, layer.lora_embedding_B)]
    else:
        shapes = [tuple(half[adapter_name].weight.flatten(1).shape) for half in (layer.lora_A, layer.lora_B)]
    expected = [tuple(stack.A.shape), tuple(stack.B.shape)]
    require(
        shapes == expected,
        f"{module}: adapter {adapter_name!r} has factors {shapes}, expected {expected}: of another soup or base",
    )
    require(
        adapter_name not in layer.merged_adapters,
        f"{module}: adapter {adapter_name!r} is merged into the base: unmerge it, its weights would have no effect",
    )
    return layer

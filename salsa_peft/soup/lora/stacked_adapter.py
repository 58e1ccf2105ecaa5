"""Several LoRA adapters of one base as one adapter of rank Σ r_i, whose blocks can be re-weighted in place.

    delta = Σ_i w_i · scaling_i · B_i · A_i        scaling_i = alpha_i / r_i, rsLoRA: alpha_i / √r_i

The mean of products is not the product of means, so the factors are stacked, never averaged: A = [A_0; A_1; …] and
B = [w_0·scaling_0·B_0, w_1·scaling_1·B_1, …] multiply to the weighted delta up to float32 rounding.
Members may differ in rank, alpha, rsLoRA, patterns and modules; a module that a member lacks is a delta of zero.
What is no delta (modules_to_save, biases, trained tokens) is averaged directly, see soup/lora/direct_parts.py.
Stacks of experts (target_parameters) and grouped convolutions have a delta for each expert and group. Left out: merging into the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.checkpoints.read import check_weights, default_names
from salsa_peft.soup.lora import direct_parts
from salsa_peft.soup.lora.factors import Stacks
from salsa_peft.soup.lora.live_factors import is_there, live_factors, same_parameters
from salsa_peft.soup.lora.members import check_one_base, in_one_layout
from salsa_peft.soup.lora.svd import moments
from salsa_peft.soup.lora.tensors import TOKENS, Member, read_member
from salsa_peft.soup.lora.write import SaveOptions, config_fields, save
from salsa_peft.soup.summary import summarise
from salsa_peft.utils.errors import SalsaError, require

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
    def load(
        cls,
        members: Sequence[Path | str],
        names: Sequence[str] | None = None,
        *,
        same_base: bool = False,
        one_sided: bool = False,
    ) -> StackedAdapter:
        """Members are local PEFT adapter folders; `names` is what summaries call them (default: the folders' names).

        same_base: their bases are the same, whatever fingerprints and names say. one_sided: full values that only some members have are let
        pass, for a caller that has the base's. Only headers are read: values are looked at when they are used. Raises SalsaError for what
        cannot be averaged.
        """
        require(bool(members), "a soup of no members: expected at least one adapter folder")
        folders = [Path(member) for member in members]
        names = default_names(folders, names)
        read = [read_member(folder, name) for folder, name in zip(folders, names, strict=True)]
        read = in_one_layout(read)
        check_one_base(read, same_base)
        if not one_sided:
            direct_parts.check_same(read)
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
        self.stacks.check_whole()
        tensors = {}
        for module, stack in self.stacks.items():
            shape = self.stacks.shapes[module]
            (A, B), saved = self.stacks.names(module), shape.saved(shape.rank)
            tensors[A] = stack.A.reshape(saved[0])
            tensors[B] = shape.whole_B(stack.weighted_B(weights)).reshape(saved[1])
            if stack.bias is not None:
                tensors[B.removesuffix("weight") + "bias"] = stack.weighted_bias(weights).to(stack.B)
        names = {name: direct_parts.saved_as(name, self.stacks.wrappers) for name in direct_parts.names(self.members)}
        return tensors | {names[name]: self.mean(name, weights) for name in names}

    def mean(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A tensor that is averaged directly, in its members' dtype."""
        values = direct_parts.mean(self.members, name, weights)
        return direct_parts.as_tensor(values, direct_parts.dtype_of(self.members, name))

    def full_tensors(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """What replaces the base's own parameters, under the base's names: modules_to_save, biases, saved embeddings."""
        weights = self.check(weights)
        self.stacks.check_everywhere()
        names = (name for name in direct_parts.names(self.members) if not direct_parts.is_tokens(name))
        return {name: self.mean(name, weights) for name in names}

    def token_rows(self, weights: Sequence[float]) -> dict[str, tuple[list[int], torch.Tensor]]:
        """Trained tokens: the base's embedding → which of its rows are replaced, and by what (tokens, features)."""
        weights = self.check(weights)
        head = self.members[0]
        names = [name for name in direct_parts.names(self.members) if direct_parts.is_tokens(name)]
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
        self.stacks.check_whole()
        return config_fields(self.members, self.stacks, {m: shape.rank for m, shape in self.stacks.shapes.items()})

    def save(self, folder: Path, weights: Sequence[float], *, strategy: str = "linear", rank: int | None = None,
             dtype: str | torch.dtype | None = None, progress: Callable[..., None] | None = None,
             more: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
        """Write an ordinary PEFT adapter folder and return its summary, also soup.json.

        rank: recompress modules above it, which loses what the summary's `error` says. dtype: of the factors (default: the
        members'). progress: called as console.Update is, once a module. more: what else the summary says.
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
                given = [moments(A, B) for A, B in arrays.each_block()]
                total += torch.from_numpy(arrays.gram(given, len(self.members)))
        return total

    def summary(self, weights: Sequence[float]) -> dict[str, Any]:
        """Norms, distances and cosines of the members' deltas, all modules as one vector; a zero one has no cosine."""
        ranks = {module: shape.rank for module, shape in self.stacks.shapes.items()}
        return summarise(self.members, weights, self.gram().numpy(), ranks)

    def attach(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Add the soup to a live model as a frozen float32 adapter that is not active; its factors stay in memory.

        Which adapter is active and what requires grad stay as they were, also in layers that had no adapter so far.
        A score head is left to score_head in models/adapters/lora.py; other full values cannot be on a shared base, and are refused.
        """
        import torch
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        self.check(weights)
        self.stacks.check_everywhere()
        self._check_shared(model)
        if adapter_name in model.peft_config:
            raise SalsaError(f"the model has an adapter {adapter_name!r} already: delete it or take another name")
        missing = next((module for module in self.stacks if not is_there(model, self.stacks, module)), None)
        require(
            missing is None,
            f"{missing} is in {self.members[0].folder} but not in the model: the soup is of another base",
        )
        self.in_memory()
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        fields = self._config() | {"modules_to_save": None, "bias": "none"}
        fields["target_parameters"] = same_parameters(model, self.stacks, fields["target_parameters"])
        model.add_adapter(adapter_name, LoraConfig(**{name: fields[name] for name in fields if name != "peft_type"}))
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.r:
                # PEFT leaves a layer that it has just wrapped on "default", even where that is the new adapter's name
                layer.set_adapter(model.active_adapters, inference_mode=True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                A = live_factors(model, self.stacks, module, adapter_name)[0]
                A.copy_(stack.A.reshape(A.shape))
        self.set_weights(model, adapter_name, weights)

    def _check_shared(self, model: PeftModel) -> None:
        """Refuse full values on a base that roles share, but for a score head and for the base's own, which PEFT saves with LoRA."""
        import torch

        own = dict(model.get_base_model().named_parameters())
        for name in direct_parts.names(self.members):
            if name == SCORE_HEAD:
                continue
            module, _, leaf = name.rpartition(".")
            there = own.get(name, own.get(f"{module}.base_layer.{leaf}"))
            same = direct_parts.frozen(self.members, name) and there is not None
            if same and there is not None:
                values = self.mean(name, [1 / len(self.members)] * len(self.members))
                same = values.shape == there.shape and torch.equal(values.to(there), there)
            require(
                same,
                f"{direct_parts.holders(self.members, name)[0].folder} holds {name}, a value of the base's own: on a base that roles share it "
                "would be dropped; save the soup and open it with PEFT on a base of its own",
            )

    def set_weights(self, model: PeftModel, adapter_name: str, weights: Sequence[float]) -> None:
        """Scale the blocks of an attached soup's lora_B in place: any point of a line or plane, nothing is re-made."""
        import torch

        weights = self.check(weights)
        with torch.no_grad():
            for module, stack in self.stacks.items():
                _, B, bias = live_factors(model, self.stacks, module, adapter_name)
                B.copy_(self.stacks.shapes[module].whole_B(stack.weighted_B(weights)).reshape(B.shape))
                if bias is not None:
                    bias.copy_(stack.weighted_bias(weights))

"""A soup, or any other reference, for TRL's own trainers: DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer (TRL 1.16).

    trainer = DPOTrainer(model, args=…, train_dataset=…, processing_class=…)
    use_reference(trainer, "soup-folder-or-Hub-id")
    trainer.train()                                 # also with resume_from_checkpoint: call use_reference first again

TRL takes its reference from an adapter called `ref`, which it makes a copy of the policy's start, or from a model of full weights, which it
loads from the policy's own path. Here the soup takes that place, whatever its rank. Several references are one whose log-probs are the mean
of theirs: log π = mean_k log π_k, so that DPO's, KTO's and RLOO's KL term is the mean of the KLs (paper eq. 5, MKL).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from salsa_peft.models.adapters import lora
from salsa_peft.training import reference_sync
from salsa_peft.training.references import FrozenReference, as_references
from salsa_peft.utils.errors import require

REF = "ref"
"""What TRL's trainers call the adapter that is their reference."""
TRAINERS = (DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer)
AnyReference = str | Path | FrozenReference | PreTrainedModel


def use_reference(trainer: Any, reference: AnyReference | Sequence[AnyReference]) -> list[FrozenReference]:
    """Make the KL term of one of TRL's trainers look at `reference`; → what it looks at now.

    trainer: a DPOTrainer, KTOTrainer, RLOOTrainer or GRPOTrainer, before `train`. reference: as in `references.as_references`, one or a
    list: an adapter's folder or Hub id, the name of one that is attached, "base", or with full weights a checkpoint's folder or Hub id, or
    a model. What the trainer had is dropped. Its checkpoints hold the adapter too (as `ref/`); a model they don't.

    Raises SalsaError for a trainer that would ignore its reference, for several references of GRPO, whose k3 of a mean is not the mean of
    k3, for weights of another base, and for policies that are cut in pieces.
    """
    several = isinstance(reference, list | tuple) and not isinstance(reference, FrozenReference)
    given: list[Any] = list(reference) if several else [reference]  # type: ignore[arg-type]
    check_trainer(trainer, len(given))
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = str(model.active_adapter) if isinstance(model, PeftModel) else None
    require(
        own is None or own not in [one.adapter if isinstance(one, FrozenReference) else one for one in given],
        f"reference: found the policy's own adapter {own!r}, expected a frozen one; its KL would be 0 always",
    )
    check_policy(model, own, given)
    check_synced(model, own, [one for one in given if isinstance(one, FrozenReference)])
    replaced = isinstance(model, PeftModel) and REF in model.peft_config and REF not in given
    with (
        lora.removed(model, REF) if replaced else contextlib.nullcontext()
    ):  # TRL's copy of the start, or what was asked for before
        frozen = as_references(model, given, names=[REF] if len(given) == 1 else None)
    for one in frozen:
        if one.model is not None:
            add_fused_lm_head(one.model, **head_options(trainer))
            trainer.accelerator.prepare_model(one.model, evaluation_mode=True)
    trainer.ref_model = as_ref_model(model, frozen)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SyncRefModelCallback):
            callback.ref_model = trainer.ref_model
    for callback in [one for one in trainer.callback_handler.callbacks if isinstance(one, SyncReferences)]:
        trainer.remove_callback(callback)
    if any(one.sync_every is not None for one in frozen):
        trainer.add_callback(SyncReferences(model, own, frozen))
    return frozen


def as_ref_model(model: Any, frozen: list[FrozenReference]) -> nn.Module | None:
    """What a trainer's `ref_model` must be: None for the adapter `ref` and for the base, which TRL finds on the policy's own model."""
    if len(frozen) == 1 and isinstance(model, PeftModel) and frozen[0].model is None:
        if frozen[0].adapter == REF or (frozen[0].adapter is None and REF not in model.peft_config):
            return None
    elif len(frozen) == 1:
        return frozen[0].model
    return MeanReference(model, frozen)


def check_trainer(trainer: Any, references: int) -> None:
    """Raise SalsaError for a trainer in which a reference would have no effect, or not the one that was asked for."""
    name = type(trainer).__name__
    require(
        isinstance(trainer, TRAINERS),
        f"trainer: found a {name}, which would ignore a reference, expected one of {', '.join(t.__name__ for t in TRAINERS)}"
        " (of PPO: SalsaPPOTrainer(references=…))",
    )
    require(trainer.beta != 0, f"{name}: found beta 0, with which no reference is looked at, expected more than 0")
    if isinstance(trainer, DPOTrainer | KTOTrainer):
        require(
            not trainer.precompute_ref_logps,
            f"{name}: found precompute_ref_log_probs, whose log-probs are of the old reference, expected False",
        )
    if isinstance(trainer, DPOTrainer):
        require(
            set(trainer.loss_types) != {"sft"},
            f"{name}: found loss_type sft, which looks at no reference, expected another one",
        )
    require(
        references == 1 or not isinstance(trainer, GRPOTrainer),
        f"reference: found {references} of them for a {name}, whose KL estimator k3 of a mean is not the mean of k3, expected one, such as"
        " their soup",
    )
    cut = trainer.is_fsdp_enabled or (
        trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    require(not cut, f"{name}: found weights cut in pieces (FSDP, ZeRO-3), expected whole ones in each process")


def check_policy(model: Any, own: str | None, given: Sequence[Any]) -> None:
    """Raise SalsaError for a policy that has trained more than LoRA's factors, where a reference would be read through that: PEFT switches
    such values for the adapter `ref` alone, and trained tokens for none."""
    own_models = all(
        isinstance(one, PreTrainedModel) or (isinstance(one, FrozenReference) and one.model) for one in given
    )
    if own_models or not isinstance(model, PeftModel):
        return
    for field in ("modules_to_save", "trainable_token_indices"):
        found = vars(model.peft_config[str(own)]).get(field)
        folder = len(given) == 1 and isinstance(given[0], str | Path) and str(given[0]) not in model.peft_config
        named = len(given) == 1 and given[0] == REF
        require(
            not found or (field == "modules_to_save" and (folder or named)),
            f"reference: found a policy with {field} {found}, which references of this kind would share, expected "
            + ("one adapter's folder or Hub id" if field == "modules_to_save" else "a policy without them"),
        )


def check_synced(model: Any, own: str | None, frozen: Sequence[FrozenReference]) -> None:
    """Raise SalsaError for what can't move. A model that does would start anew on resume, since TRL saves none; an adapter is saved."""
    for one in frozen:
        require(
            one.sync_every is None or one.model is None,
            f"reference {one.label}: found sync_every for full weights, expected TRL's own sync_ref_model, which moves this reference",
        )
    reference_sync.check(frozen, model, own)


class SyncReferences(TrainerCallback):
    """SyncReferences adapters that are references towards the policy, every so many optimizer steps."""

    def __init__(self, model: Any, policy: str | None, references: Sequence[FrozenReference]) -> None:
        self.model, self.policy, self.references = model, policy, references

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an optimizer step."""
        reference_sync.sync(self.model, self.policy, self.references, state.global_step)


def head_options(trainer: Any) -> dict[str, Any]:
    """How the trainer computes log-probs out of a model: those that sample divide by their temperature."""
    options: dict[str, Any] = {}
    if not isinstance(trainer, DPOTrainer | KTOTrainer):
        options["temperature"] = trainer.temperature
    if isinstance(trainer, GRPOTrainer):
        args: Any = trainer.args
        options["cast_lm_head_to_fp32"] = args.cast_lm_head_to_fp32
    return options


class MeanReference(nn.Module):
    """What TRL calls as `ref_model`: log-probs that are the mean over several references, adapters of the policy's model among them."""

    def __init__(self, policy: nn.Module, references: Sequence[FrozenReference]) -> None:
        super().__init__()
        self.parts: tuple[Callable[..., Any], ...] = tuple(self._part(policy, one) for one in references)

    @staticmethod
    def _part(policy: nn.Module, reference: FrozenReference) -> Callable[..., Any]:
        if reference.model is not None:
            return reference.model.__call__

        def under_adapter(**inputs: Any) -> Any:
            with lora.active(policy, reference.adapter):
                return policy(**inputs)

        return under_adapter

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """As the fused language model's: its output, `log_probs` (B, P + T − 1) the mean."""
        outputs = [part(**inputs) for part in self.parts]
        outputs[0].log_probs = torch.stack([output.log_probs for output in outputs]).mean(0)
        return outputs[0]

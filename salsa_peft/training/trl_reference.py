"""use_reference: sets a soup, or any other reference, in TRL 1.16's DPO, KTO, RLOO and GRPO trainers.

    trainer = DPOTrainer(model, args=…, train_dataset=…, processing_class=…)
    use_reference(trainer, "soup-folder-or-Hub-id")
    trainer.train()                                 # to resume, also call use_reference first

TRL's own reference is an adapter called `ref`, a copy of the initial policy, or a model with full weights that TRL
loads from the policy's path. use_reference replaces it; an adapter may have any rank. Several references are combined
into one, whose log-probs are the mean of theirs: log π = mean_k log π_k. The KL term of DPO, KTO and RLOO is then the
mean of the KLs (paper eq. 5, MKL).
"""

import contextlib
import functools
from collections.abc import Sequence
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
from salsa_peft.models.adapters.merged import merge_fault, merged_parameters
from salsa_peft.soup.attached import AttachedSoup
from salsa_peft.training import reference_sync
from salsa_peft.training.references import FrozenReference, as_references, soup_reference
from salsa_peft.utils.errors import require

REF = "ref"
"""The name of the adapter that TRL's trainers use as reference."""
MERGED_WEIGHTS = "_iter_named_params"
"""The method of TRL's VLLMGeneration that yields the names and weights that are sent to vLLM."""
TRAINERS = (DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer)
AnyReference = str | Path | FrozenReference | AttachedSoup | PreTrainedModel


def use_reference(trainer: Any, reference: AnyReference | Sequence[AnyReference]) -> list[FrozenReference]:
    """Set the reference of a TRL trainer. Returns a FrozenReference for each one given.

    trainer: a DPOTrainer, KTOTrainer, RLOOTrainer or GRPOTrainer, before `train`. reference: one or a list, as in
    `references.as_references`: an adapter's folder or Hub id, an attached adapter's name or soup, "base", or with full weights
    a checkpoint's folder or Hub id, or a model. The trainer's previous reference is dropped. The trainer's checkpoints
    include a reference that is an adapter (as `ref/`), but not a model.

    With `use_vllm`, TRL sends merged weights to vLLM by merging the policy's adapter into the base and unmerging it,
    which in bf16 changes the base a little every time, and with it every reference that shares the base. The trainer
    then gets our way of merging, in copies.

    Raises SalsaError for a trainer that would ignore its reference, for several references with GRPO (k3 of averaged
    log-probs is not the average of k3), for adapters on a base other than the policy's, for sharded policies, and for
    `use_vllm` with an adapter that cannot be merged in copies.
    """
    several = isinstance(reference, list | tuple) and not isinstance(reference, FrozenReference)
    given: list[Any] = list(reference) if several else [reference]  # type: ignore[arg-type]
    check_trainer(trainer, len(given))
    model = trainer.accelerator.unwrap_model(trainer.model)
    given = [soup_reference(model, one) if isinstance(one, AttachedSoup) else one for one in given]
    own = str(model.active_adapter) if isinstance(model, PeftModel) else None
    require(
        own is None or own not in [one.adapter if isinstance(one, FrozenReference) else one for one in given],
        f"reference: {own!r} is the adapter that is trained, so the KL would always be 0. Pass a frozen adapter",
    )
    check_policy(model, own, given)
    check_synced(model, own, [one for one in given if isinstance(one, FrozenReference)])
    merge_in_copies(trainer, model, own)
    replaced = isinstance(model, PeftModel) and REF in model.peft_config and REF not in given
    # `ref` is TRL's copy of the policy, or the reference of an earlier call
    with lora.removed(model, REF) if replaced else contextlib.nullcontext():
        frozen = as_references(model, given, names=[REF] if len(given) == 1 else None)
    for one in frozen:
        if one.model is not None:
            add_fused_lm_head(one.model, **head_options(trainer))
            trainer.accelerator.prepare_model(one.model, evaluation_mode=True)
    trainer.ref_model = as_ref_model(model, frozen)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SyncRefModelCallback):
            callback.ref_model = trainer.ref_model
    trainer.remove_callback(SyncReferences)  # added by an earlier call
    if any(one.sync_every is not None for one in frozen):
        trainer.add_callback(SyncReferences(model, own, frozen))
    return frozen


def as_ref_model(model: Any, frozen: list[FrozenReference]) -> nn.Module | None:
    """The trainer's `ref_model`; None for the adapter `ref` and for the base, which TRL finds itself."""
    if len(frozen) == 1 and isinstance(model, PeftModel) and frozen[0].model is None:
        if frozen[0].adapter == REF or (frozen[0].adapter is None and REF not in model.peft_config):
            return None
    elif len(frozen) == 1:
        return frozen[0].model
    return MeanReference(model, frozen)


def check_trainer(trainer: Any, references: int) -> None:
    """Raise SalsaError for a trainer that would ignore its references, or does not support them."""
    name, known = type(trainer).__name__, ", ".join(trainer.__name__ for trainer in TRAINERS)
    require(
        isinstance(trainer, TRAINERS),
        f"trainer: a {name} would ignore the reference. Use one of {known}; for PPO, SalsaPPOTrainer(references=…)",
    )
    require(trainer.beta != 0, f"{name}: with beta 0 the reference has no effect; set beta above 0")
    if isinstance(trainer, DPOTrainer | KTOTrainer):
        require(
            not trainer.precompute_ref_logps,
            f"{name}: with precompute_ref_log_probs, TRL has used its own reference already; set this option to False",
        )
    if isinstance(trainer, DPOTrainer):
        sft_only = set(trainer.loss_types) == {"sft"}
        require(not sft_only, f"{name}: with loss_type sft alone the reference has no effect; use another loss_type")
    require(
        references == 1 or not isinstance(trainer, GRPOTrainer),
        f"reference: {name} takes one reference, not {references}, because the KL estimator k3 of averaged"
        " log-probs is not the average of k3. Pass one reference, such as the soup of all of them",
    )
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    require(
        not (trainer.is_fsdp_enabled or zero3),
        f"{name}: sharded weights (FSDP, ZeRO-3) are not supported; use DDP or one process",
    )


def check_policy(model: Any, own: str | None, given: Sequence[Any]) -> None:
    """Raise SalsaError if references would share the policy's modules_to_save or trainable tokens.

    TRL lets a reference have its own modules_to_save only as the adapter `ref`, and never its own trainable tokens.
    """
    models = (one.model if isinstance(one, FrozenReference) else one for one in given)
    if not isinstance(model, PeftModel) or all(isinstance(one, PreTrainedModel) for one in models):
        return
    folder = len(given) == 1 and isinstance(given[0], str | Path) and str(given[0]) not in model.peft_config
    named = len(given) == 1 and given[0] == REF
    for field, remedy in (
        ("modules_to_save", "Pass the folder or Hub id of one adapter"),
        ("trainable_token_indices", "Use a policy without trainable tokens"),
    ):
        found = vars(model.peft_config[str(own)]).get(field)
        require(
            not found or (field == "modules_to_save" and (folder or named)),
            f"reference: the policy has {field} {found}, which the references would share. {remedy}",
        )


def check_synced(model: Any, own: str | None, frozen: Sequence[FrozenReference]) -> None:
    """Raise SalsaError for references that cannot be synced, such as models, which TRL does not save."""
    for one in frozen:
        require(
            one.sync_every is None or one.model is None,
            f"reference {one.label}: sync_every works for adapters only; use TRL's sync_ref_model for full weights",
        )
    reference_sync.check(frozen, model, own)


def merge_in_copies(trainer: Any, model: Any, own: str | None) -> None:
    """Make a trainer that uses vLLM send merged copies of the weights, so that the base does not change.

    TRL 1.16 merges and unmerges in place, which rounds in bf16. Raises SalsaError if this cannot be changed.
    """
    if own is None or isinstance(trainer, DPOTrainer | KTOTrainer) or not trainer.use_vllm:
        return
    name = (
        f"{type(trainer).__name__}: use_vllm changes the base's weights, which the reference shares, because TRL merges"
    )
    generation, fault = vars(trainer).get("vllm_generation"), merge_fault(model, own)
    require(
        fault is None, f"{name} the adapter in place, and merged copies are not possible ({fault}). Set use_vllm=False"
    )
    require(
        MERGED_WEIGHTS in dir(generation),
        f"{name} the adapter in place, and this version of TRL has no VLLMGeneration.{MERGED_WEIGHTS} to replace. Set"
        " use_vllm=False, or use TRL 1.16",
    )
    setattr(generation, MERGED_WEIGHTS, functools.partial(merged_parameters, model, own))


class SyncReferences(TrainerCallback):
    """Syncs adapters that are references to the policy, every `sync_every` optimizer steps."""

    def __init__(self, model: Any, policy: str | None, references: Sequence[FrozenReference]) -> None:
        self.model, self.policy, self.references = model, policy, references

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sync the references whose `sync_every` divides the number of steps."""
        reference_sync.sync(self.model, self.policy, self.references, state.global_step)


def head_options(trainer: Any) -> dict[str, Any]:
    """Options of add_fused_lm_head with which a reference computes log-probs as the trainer does."""
    options = {} if isinstance(trainer, DPOTrainer | KTOTrainer) else {"temperature": trainer.temperature}
    is_grpo = isinstance(trainer, GRPOTrainer)
    return options | ({"cast_lm_head_to_fp32": trainer.args.cast_lm_head_to_fp32} if is_grpo else {})


class MeanReference(nn.Module):
    """A `ref_model` for TRL: returns the mean of the references' log-probs. References may be adapters."""

    def __init__(self, policy: nn.Module, references: Sequence[FrozenReference]) -> None:
        super().__init__()
        # a tuple, because torch does not register the modules in one as submodules
        self.parts = tuple((policy if one.model is None else one.model, one.adapter) for one in references)

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """The fused language model's output, with `log_probs` (B, P + T − 1) averaged over the references."""
        outputs = []
        for model, adapter in self.parts:
            with lora.active(model, adapter):
                outputs.append(model(**inputs))
        outputs[0].log_probs = torch.stack([output.log_probs for output in outputs]).mean(0)
        return outputs[0]

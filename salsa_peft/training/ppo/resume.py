"""Resuming PPO: the checkpoints of a run, and the settings that must match when a run is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from salsa_peft.config.options.ppo import LATER_OPTIONS
from salsa_peft.models.adapters import lora
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.reward import Reward, RunningScale
from salsa_peft.training import checkpoints, reference_sync
from salsa_peft.training.ppo.guards.monitor import GuardMonitor
from salsa_peft.training.ppo.metrics import LogFiles
from salsa_peft.training.ppo.mixture.weights import ReferenceWeights
from salsa_peft.training.ppo.rollout import Rollout, on_cpu
from salsa_peft.training.ppo.state import PPOState
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from salsa_peft.training.ppo.config import SalsaPPOConfig
    from salsa_peft.training.ppo.prompts import Prompt

ROLLOUT, REFERENCES = "rollout.safetensors", "references.safetensors"
REQUIRED = (
    "seed", "batch_size", "num_mini_batches", "num_ppo_epochs", "max_new_tokens", "min_new_tokens", "temperature",
    "kl_estimator", "kl_per", "kl_control", "gamma", "lam", "lam_value", "lam_length_alpha", "cliprange",
    "cliprange_value", "vf_coef", "value", "whiten_rewards", "missing_eos_penalty", "score_clip", "normalize_scores",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
"""Options that must match on resume."""
CHANGEABLE = (
    "learning_rate", "value_head_learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "kl_coef",
    "kl_target", "kl_horizon", "kl_coef_min", "kl_coef_max", "max_ratio", "target_kl", "rollout_backend",
    "old_logprobs", "importance_sampling_correction", "importance_sampling_mode", "importance_sampling_clip_max",
    "importance_sampling_clip_min", "bf16",
)  # fmt: skip
"""Options that may change on resume; changes are printed."""
LORA_OPTIONS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Options of the policy's LoraConfig that must match on resume."""
SAMPLE = 4096
"""Number of elements of each weight that `digest` compares."""


@dataclass
class RunCheckpoints:
    """The checkpoints of one run, each complete or absent.

    A checkpoint holds Trainer's files, salsa_state.json, the rollout batch, and the weights of references that are
    synced. A run is resumed only if the REQUIRED options, the prompts and the models match.
    """

    args: SalsaPPOConfig
    accelerator: Accelerator
    policy: Any
    """The policy's model, without the value head."""
    policy_name: str | None
    references: list[FrozenReference]
    reward: Reward
    prompts: Any
    sharding: bool | str
    """How weights are sharded, which must match on resume because the optimizer's files depend on it."""
    state: PPOState
    scale: RunningScale
    weights: ReferenceWeights
    guards: GuardMonitor
    logs: LogFiles
    partial: Path | None = None
    """Folder in which a checkpoint is being written; None between checkpoints."""
    saved_step: int | None = None
    """Step of this run's newest checkpoint in output_dir."""
    remedy: str = checkpoints.NEW_RUN
    """What to do if the run cannot be resumed, for messages."""
    owns_folder: bool = False
    """Whether this run has claimed output_dir, so that the checkpoints in it are its own."""
    identity: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """The folder output_dir, in which checkpoints and logs are written."""
        return Path(str(self.args.output_dir))

    def find(self, resume: str | bool | None) -> Path | None:
        """The checkpoint for train's `resume_from_checkpoint`; True means the newest complete one.

        Raises SalsaError if the checkpoint does not exist or is incomplete.
        """
        if not resume:
            return None
        if resume is not True:
            damage = checkpoints.fault(Path(str(resume)))
            require(
                damage is None,
                f"resume_from_checkpoint: {resume} is not a complete checkpoint ({damage}). Use another checkpoint",
            )
            return Path(str(resume))
        newest, skipped = checkpoints.last_complete(self.folder)
        for line in skipped:
            self._say(line)
        require(
            newest is not None,
            f"resume_from_checkpoint: there is no complete checkpoint in {self.folder}. Train without this option"
            + ", and remove the incomplete checkpoints or choose another output_dir" * bool(skipped),
        )
        return newest

    def claim_folder(self, checkpoint: Path | None) -> None:
        """Raise SalsaError if output_dir has checkpoints of another run, which this run would replace."""
        existing = checkpoints.checkpoints(self.folder)
        require(
            self.owns_folder or self._is_here(checkpoint) or not existing,
            f"output_dir: {self.folder} already has {existing[0].name if existing else ''} of an earlier run."
            " Call train(resume_from_checkpoint=True) to continue that run, or choose another output_dir for a new run",
        )
        self.owns_folder, self.saved_step = True, None

    def settings(self) -> dict[str, Any]:
        """The settings that must match on resume.

        The first call computes digests of the weights, and later calls reuse them; call it before training, which may
        shard the weights.
        """
        if self.identity is None:
            self.identity = identity(self.policy, self.policy_name, self.references, self.reward, self.prompts)
        return {**required_options(self.args), **self.identity, "sharded": self.sharding}

    def state_dict(self) -> dict[str, Any]:
        """The content of salsa_state.json. It includes the sizes of the logs, which are flushed to the disk."""
        return {
            "setting": self.settings(),
            "options": changeable_options(self.args, self.reward),
            **self.state.state_dict(),
            "scale": [self.scale.count, self.scale.mean, self.scale.squares],
            "reference_weights": self.weights.learned,
            "watch": self.guards.state_dict(),
            "logs": self.logs.sync(),
        }

    @contextlib.contextmanager
    def write(self, trainer_state: TrainerState, size: int | None) -> Iterator[None]:
        """Context that writes a checkpoint. Its body saves Trainer's files in the folder `partial`.

        At the end, PPO's files are added and the checkpoint gets its name. size: number of bytes that the body will
        write, if known. Raises SalsaError if the disk is full.
        """
        name = f"{checkpoints.PREFIX}{trainer_state.global_step}"
        try:
            with checkpoints.writing(self.folder, name, size, self.accelerator) as self.partial:
                yield
                self.accelerator.wait_for_everyone()
                self._complete(trainer_state, self.partial)
        finally:
            self.partial = None
        self.saved_step = trainer_state.global_step

    def _complete(self, trainer_state: TrainerState, partial: Path) -> None:
        name, best = f"{checkpoints.PREFIX}{trainer_state.global_step}", trainer_state.best_global_step
        made, target = partial / name, self.folder / name
        is_best = best == trainer_state.global_step
        if is_best:  # Trainer recorded the partial folder
            trainer_state.best_model_checkpoint = str(target)
        if not self.accelerator.is_main_process:
            return
        if is_best:
            trainer_state.save_to_json(str(made / TRAINER_STATE_NAME))
        if self.state.rollout is not None:
            save_file(on_cpu(self.state.rollout.tensors()), made / ROLLOUT)
        if synced := reference_sync.state_dict(self.policy, self.references):
            save_file(synced, made / REFERENCES)
        content = {"saved": checkpoints.next_number(self.folder), **self.state_dict()}
        (made / checkpoints.STATE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        checkpoints.commit(made, target)
        kept = self.folder / f"{checkpoints.PREFIX}{best}" if best else None
        checkpoints.rotate(self.folder, self.args.save_total_limit, kept)

    def restore(self, checkpoint: Path) -> None:
        """Restore PPO's state, synced references and the logs. Trainer loads the policy and the optimizer.

        Raises SalsaError if the checkpoint's settings, prompts or models are not those of this run.
        """
        saved = checkpoints.read_state(checkpoint, self.settings(), self.remedy)
        has_rollout = (checkpoint / ROLLOUT).is_file()
        device = self.accelerator.device
        rollout = Rollout.of(lora.read_tensors(checkpoint / ROLLOUT), device) if has_rollout else None
        self.state.load_state_dict(saved, rollout)
        before, now = saved["options"], changeable_options(self.args, self.reward)
        before = now | before  # a checkpoint from before an option existed lacks it
        changed = [f"{key} {before[key]} → {value}" for key, value in now.items() if before[key] != value]
        if changed:
            self._say(f"{checkpoint.name}: resuming with changed options: {', '.join(changed)}")
        if before["kl_coef"] != self.args.kl_coef:
            self.state.kl_coef = self.args.kl_coef
        if (checkpoint / REFERENCES).is_file():
            reference_sync.load_state_dict(self.policy, self.references, lora.read_tensors(checkpoint / REFERENCES))
        self.scale.count, self.scale.mean, self.scale.squares = saved["scale"]
        self.weights.learned = saved.get("reference_weights", self.weights.learned)  # earlier versions had none
        self.guards.load_state_dict(saved["watch"])
        if self.accelerator.is_main_process:
            self._restore_logs(checkpoint, saved["logs"])
        if self._is_here(checkpoint):
            self.saved_step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step

    def _restore_logs(self, checkpoint: Path, sizes: dict[str, int]) -> None:
        """Truncate the logs to the checkpoint. If there are newer checkpoints, keep a copy of the logs."""
        kept = None
        if not self._is_here(checkpoint):
            kept = self.logs.take(checkpoint.parent)
        elif any(checkpoints.fault(newer) is None for newer in checkpoints.saved_after(checkpoint)):
            kept = self.logs.keep()
        for line in [kept, *self.logs.cut(sizes)]:
            if line is not None:
                self._say(line)

    def _is_here(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            say(line)


def required_options(args: SalsaPPOConfig) -> dict[str, Any]:
    """The REQUIRED options as name → value, and whether value_head_learning_rate is set.

    With that option the value head has its own parameter group in the optimizer's state. Options that older checkpoints
    lack count only where they have an effect.
    """
    own = args.value_head_learning_rate is not None
    found = {key: _as_json(vars(args)[key]) for key in REQUIRED} | {"own value_head_learning_rate": own}
    found["num_generations"] = args.num_generations if args.value == "group" else None
    found["value_warmup_updates"] = args.value_warmup_updates or None
    return found | {
        key: value if (value := vars(args)[key]) != default else None for key, default in LATER_OPTIONS.items()
    }


def changeable_options(args: SalsaPPOConfig, reward: Reward) -> dict[str, Any]:
    """The CHANGEABLE options as name → value, and the names of the reward's functions or classes."""
    code = [one.code for one in reward.components()]
    return {key: _as_json(vars(args)[key]) for key in CHANGEABLE} | {"reward": code}


def identity(
    model: Any, policy: str | None, references: Iterable[FrozenReference], reward: Reward, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """The policy, base, references, reward models and prompts, which must match on resume.

    Models are compared by digests of their weights, so that their paths may change. policy: the name of the policy's
    adapter; None for full weights.
    """
    dtype = str(causal_lm(model).dtype).removeprefix("torch.")
    weights = "weights" if dtype == "float32" else f"weights in {dtype}"
    found: dict[str, Any] = {"policy": weights if policy is None else "adapter"}
    if isinstance(model, PeftModel) and policy is not None:
        config = model.peft_config[policy]
        if isinstance(config, LoraConfig):
            found |= {key: _as_json(vars(config)[key]) for key in LORA_OPTIONS}
        own = {id(weight) for name in model.peft_config for weight in lora.parameters(model, name)}
        base = (weight for weight in model.parameters() if id(weight) not in own)
        # 4-bit weights are left out, because their layout depends on the machine
        found["base"] = digest(weight for weight in base if weight.is_floating_point())
    found["references"] = [_digest_reference(model, one) for one in references]
    moves = [_describe_sync(one) for one in references if one.sync_every is not None]
    found |= {"moving references": moves} if moves else {}
    identified = [one.weights() for one in reward.components()]
    found["reward models"] = [digest(model) for model in identified if model is not None]
    tokens = hashlib.sha256()
    for prompt in prompts:
        tokens.update(array("q", [len(prompt.tokens), *prompt.tokens]).tobytes())
    return found | {"prompts": f"{len(prompts)} ({tokens.hexdigest()[:12]})"}


def digest(weights: Iterable[Tensor]) -> str:
    """12 hex digits that identify weights by their shapes and the first elements of each.

    The elements are converted to float32 first, so that the dtype does not matter.
    """
    found = hashlib.sha256()
    for weight in weights:
        sample = weight.detach().reshape(-1)[:SAMPLE].cpu()
        found.update(str(tuple(weight.shape)).encode())
        found.update((sample.float() if sample.is_floating_point() else sample).contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def _describe_sync(reference: FrozenReference) -> str:
    soup, every = reference.soup, f"every {reference.sync_every}"
    if soup is None:
        return f"{every}, α {reference.mixup_alpha:g}"
    return f"{every}, {' + '.join(f'{w:g} {name}' for w, name in zip(soup.weights, soup.adapters, strict=True))}"


def _digest_reference(model: PeftModel, reference: FrozenReference) -> str:
    name = reference.adapter
    if reference.model is not None or name is None:
        return "base" if reference.model is None else digest(reference.model.parameters())
    layers = [layer for layer in lora.tuner_layers(model) if isinstance(layer, LoraLayer)]
    scaling = [layer.scaling[name] for layer in layers if name in layer.scaling]
    return digest([*lora.parameters(model, name), torch.tensor(scaling)])


def _as_json(value: Any) -> Any:
    """The value of an enum member as text; any other object unchanged."""
    return str(value.value) if isinstance(value, Enum) else value

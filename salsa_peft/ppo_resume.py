"""What of the PPO trainer is about being stopped and going on: checkpoints, SIGTERM, saving and loading the policy."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from . import adapters, checkpoints, sharding
from .config import SalsaError, require
from .guards import Watch
from .models import PolicyWithValueHead, causal_lm, load_weights
from .ppo_config import SalsaPPOConfig
from .ppo_logs import Logs
from .rollout_batch import Interrupted, Rollout, RolloutMaker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALUE_HEAD, VALUE_ADAPTER = "value_head.safetensors", "value"
ROLLOUT = "rollout.safetensors"


class ResumableTrainer(Trainer):
    """A Trainer whose run can be broken off at any moment; SalsaPPOTrainer has the rest."""

    args: SalsaPPOConfig
    model: PolicyWithValueHead  # type: ignore[assignment]
    processing_class: PreTrainedTokenizerBase  # type: ignore[assignment]
    policy_name: str | None
    maker: RolloutMaker
    logs: Logs
    watch: Watch
    update: int
    kl_coef: float
    skipped: int
    stopped_early: bool
    totals: list[list[float]]
    """Of each optimizer step of the update so far."""
    sums: Tensor
    """Of the micro-steps of the next one."""
    figures: dict[str, float]
    rollout: Rollout | None
    order: list[Tensor]
    started: float
    halted: str
    terminated = False
    _aside: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes: a folder aside while a checkpoint is being made."""
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint, the engine's state and the rollout batch that is being trained on; whole, or not there."""
        folder = Path(str(self.args.output_dir))
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        self._aside = folder / checkpoints.PARTIAL
        if self.is_world_process_zero():
            shutil.rmtree(self._aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        made = self._aside / name
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if self.rollout is not None:
                save_file(self.rollout.tensors(), made / ROLLOUT)
            (made / checkpoints.STATE).write_text(json.dumps(self._engine_state(), indent=2), encoding="utf-8")
            checkpoints.commit(made, folder / name)
            checkpoints.rotate(folder, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _setting(self) -> dict[str, Any]:
        """What a run must have kept to go on from a checkpoint; the micro-batch may be another."""
        keys = (
            "seed",
            "batch_size",
            "num_mini_batches",
            "num_ppo_epochs",
            "max_new_tokens",
            "min_new_tokens",
            "temperature",
        )
        prompts: Any = self.train_dataset
        sharded = bool(self.is_fsdp_enabled)  # its optimizer's file is another
        return {**{key: getattr(self.args, key) for key in keys}, "prompts": len(prompts), "sharded": sharded}

    def _engine_state(self) -> dict[str, Any]:
        scale = self.maker.scale
        return {
            "setting": self._setting(),
            "update": self.update,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped,
            "stopped_early": self.stopped_early,
            "totals": self.totals,
            "figures": self.figures,
            "scale": [scale.count, scale.mean, scale.squares],
            "watch": self.watch.state_dict(),
            "logs": self.logs.sync(),
        }

    def _restore(self, checkpoint: Path) -> None:
        """The engine's state; weights and optimizer are Trainer's to load."""
        state = checkpoints.read_state(checkpoint, self._setting())
        for key in ("update", "kl_coef", "skipped", "stopped_early", "totals", "figures"):
            setattr(self, key, state[key])
        scale = self.maker.scale
        scale.count, scale.mean, scale.squares = state["scale"]
        self.watch.load_state_dict(state["watch"])
        if self.is_world_process_zero():
            self.logs.cut(state["logs"])
        self.started, self.order, self.sums = time.perf_counter(), [], torch.zeros_like(self.sums)
        there = (checkpoint / ROLLOUT).is_file()
        self.rollout = Rollout.of(load_file(checkpoint / ROLLOUT), self.accelerator.device) if there else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The policy's weights, the value adapter's and the value head's, in place."""
        folder = Path(resume_from_checkpoint)
        policy = self.model.policy
        if isinstance(policy, PeftModel):
            adapters.load(policy, str(self.policy_name), folder)
            if self.model.value_adapter is not None:
                adapters.load(policy, self.model.value_adapter, folder / VALUE_ADAPTER)
        else:
            load_weights(policy, folder)
        sharding.load(self.model.value_head, load_file(folder / VALUE_HEAD))

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means: True, the newest whole one. Raises SalsaError where there is none."""
        if not resume:
            return None
        if resume is not True:
            why = checkpoints.fault(Path(str(resume)))
            require(
                why is None, f"resume_from_checkpoint: found {resume}, which is not whole ({why}), expected another one"
            )
            return Path(str(resume))
        folder, passed = checkpoints.last_whole(Path(str(self.args.output_dir)))
        for line in passed:
            print(line, file=sys.stderr, flush=True)
        require(
            folder is not None,
            f"resume_from_checkpoint: found no whole checkpoint in {self.args.output_dir}, expected one",
        )
        return folder

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer's; a run that goes on from a checkpoint ends as if it had not been broken off (on a CPU to the bit).

        SIGTERM saves a checkpoint and raises SystemExit(143). A guard whose action is stop saves one too and raises SalsaError.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.update == 0 and self.is_world_process_zero():
            self.logs.cut({})
        result = None
        with self._answering_sigterm():
            try:
                if checkpoint is None or not self._finished(checkpoint):
                    result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            except Interrupted:  # nothing has changed since the last optimizer step
                self.rollout = None
        self.agree()
        if self.terminated:
            if not (Path(str(self.args.output_dir)) / f"{checkpoints.PREFIX}{self.state.global_step}").exists():
                self._save_checkpoint(self.model_wrapped, None)
            raise SystemExit(128 + signal.SIGTERM)
        if self.halted:
            raise SalsaError(f"{self.halted}; checkpoint-{self.state.global_step} is saved in {self.args.output_dir}")
        return result

    def _finished(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is the end of training; then everything is loaded and nothing is left to do. (Trainer itself would
        make one step more.)"""
        step = int(checkpoint.name.removeprefix(checkpoints.PREFIX))
        if step < self.args.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self._load_optimizer_and_scheduler(str(checkpoint))
        self.state = type(self.state).load_from_json(str(checkpoint / "trainer_state.json"))
        return True

    @contextlib.contextmanager
    def _answering_sigterm(self) -> Iterator[None]:
        """Within the context SIGTERM is noted, and answered at the next token or optimizer step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            self.terminated = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _check_terminated(self) -> None:
        """Between two tokens. Raises Interrupted, which the rollout's maker passes on to the other processes."""
        if self.terminated:
            raise Interrupted

    def agree(self) -> None:
        """SIGTERM in one process is one in all."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.terminated), device=self.accelerator.device)
            self.terminated = bool(self.accelerator.reduce(flag, "sum").item())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as an ordinary PEFT adapter or checkpoint with the tokenizer, the value head (and adapter) beside it; no pickles.

        state_dict: all weights, which Trainer gives where they are sharded (in process 0)."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        policy, head = self.model.policy, self.model.value_head.state_dict()
        weights = None
        if state_dict is not None:
            tied = {
                f"policy.{name}" for name in causal_lm(policy).all_tied_weights_keys or ()
            }  # copies of what they are tied to
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
            weights, head = within("policy.", state_dict), within("value_head.", state_dict)
        if isinstance(policy, PeftModel):
            adapters.save(policy, str(self.policy_name), folder, self.processing_class, state_dict=weights)
            if self.model.value_adapter is not None:
                adapters.save(policy, self.model.value_adapter, folder / VALUE_ADAPTER, state_dict=weights)
        else:
            policy.save_pretrained(folder, state_dict=weights)
            self.processing_class.save_pretrained(folder)
        head = {name: tensor.detach().cpu() for name, tensor in head.items()}
        save_file(head, folder / VALUE_HEAD, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's; where the weights are sharded without its second copy of them, frozen ones too, that nothing reads."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


def within(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a part of the model, by their names in it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

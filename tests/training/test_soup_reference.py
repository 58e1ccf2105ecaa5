"""A soup with the policy as member is a reference that follows it: in PPO and in TRL's trainers, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from salsa_peft import soup, use_reference
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.training import reference_sync
from salsa_peft.training.references import as_references
from salsa_peft.utils.errors import SalsaError


def mix(model: Any, sync_every: int | None, policy: str = "policy") -> soup.AttachedSoup:
    return soup.attach(model, ["seed-0", policy], [0.3, 0.7], name="mix", sync_every=sync_every)


def distance(model: Any, policy: str = "policy") -> float:
    """From the soup to the mean of what its members are now, over all layers."""
    found = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            delta = {
                name: layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
                for name in ("seed-0", policy, "mix")
            }
            mean = 0.3 * delta["seed-0"] + 0.7 * delta[policy]
            found = max(found, float((delta["mix"] - mean).abs().max()))
    return found


def weights(model: Any, name: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapters.parameters(model, name)]


def test_ppo_renews_it_every_few_updates(make_trainer: Any) -> None:
    """With sync_every 2 it is the mean after update 2, and still the same after update 3; without, a snapshot."""
    for sync_every, updates, follows in ((2, 2, True), (2, 3, False), (None, 2, False)):
        trainer = make_trainer(lambda model, every=sync_every: [mix(model, every)], max_steps=updates)
        model = trainer.model.policy
        before = weights(model, "mix")
        assert distance(model) < 1e-6
        trainer.train()
        assert (distance(model) < 1e-6) == follows
        unchanged = all(map(torch.equal, weights(model, "mix"), before))
        assert unchanged == (sync_every is None)
        assert model.active_adapters == ["policy"]
        assert not any(parameter.requires_grad for parameter in adapters.parameters(model, "mix"))


def test_a_resumed_run_is_the_same(make_trainer: Any, tmp_path: Path) -> None:
    """The soup of the last renewal is in the checkpoint, which was saved between two."""

    def made(name: str, steps: int) -> Any:
        return make_trainer(
            lambda model: [mix(model, 2)], folder=tmp_path / name, max_steps=steps, save_strategy="steps", save_steps=3,
            lr_scheduler_type="constant",
        )  # fmt: skip

    whole = made("whole", 5)
    whole.train()
    made("broken", 3).train()
    resumed = made("broken", 5)
    resumed.train(resume_from_checkpoint=True)
    for name in ("mix", "policy"):
        assert all(map(torch.equal, weights(resumed.model.policy, name), weights(whole.model.policy, name)))
    changed = make_trainer(lambda model: [mix(model, 3)], folder=tmp_path / "broken", max_steps=6,
                           save_strategy="steps", save_steps=3, lr_scheduler_type="constant")  # fmt: skip
    with pytest.raises(SalsaError, match=r"every 2, 0\.3 seed-0 \+ 0\.7 policy"):
        changed.train(resume_from_checkpoint=True)


def test_dpo_renews_it_every_few_steps(make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_adapter(make_adapter(make_base(), "default", 1), "seed-0", 2)
    model.set_adapter("default")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    pairs = [{"prompt": words[i], "chosen": f" {words[i + 1]}", "rejected": f" {words[i + 2]}"} for i in range(8)]
    args = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2,
                     report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    attached = mix(model, 2, "default")
    (reference,) = use_reference(trainer, attached)
    assert (reference.adapter, reference.sync_every) == ("mix", 2)
    before = weights(model, "default")
    trainer.train()
    assert distance(model, "default") < 1e-6 and not all(map(torch.equal, weights(model, "default"), before))


def test_refusals(make_base: Any, make_adapter: Any) -> None:
    model = make_adapter(make_adapter(make_base(), "policy", 1), "seed-0", 2)
    attached = mix(model, 1)
    other = make_adapter(make_base(), "policy", 1)
    with pytest.raises(SalsaError, match="the soup 'mix' is attached to another model than the policy's"):
        as_references(other, [attached])
    references = as_references(model, [attached])
    reference_sync.check(references, model, "policy")
    with pytest.raises(SalsaError, match="reference mix: sharded weights cannot be synced"):
        reference_sync.check(references, model, "policy", sharded=True)

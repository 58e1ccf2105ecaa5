"""offload: frozen: references and classifiers are on the device one at a time, while they score, and nothing else changes.

On a CPU the device is made up: what is there is a copy, so that a model is seen to be at home or away.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_ppo import length_reward, roll_out
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from salsa_peft.models.rewards.classifier import ClassifierReward
from salsa_peft.models.rewards.reward import Part, WeightedReward
from salsa_peft.training import references
from salsa_peft.training.references import OffloadedModel
from salsa_peft.utils.errors import SalsaError


def make_classifier(tokenizer: Any, seed: int) -> ClassifierReward:
    """A random sequence classifier of the tiny base's shape."""
    import tiny

    config = tiny.make_base(tokenizer).config
    torch.manual_seed(seed)
    config.num_labels = 1
    return ClassifierReward(LlamaForSequenceClassification(config), tokenizer, tokenizer, name=f"rm-{seed}")


class Device:
    """Copies of weights in the place of a GPU: which models are there, and what happens in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.names: dict[int, tuple[str, nn.Module, Tensor]] = {}
        monkeypatch.setattr(references, "copy_to", lambda tensor, device: tensor.clone())

    def watch(self, name: str, model: nn.Module) -> None:
        """Note each forward of a model."""
        weight = next(model.parameters())
        self.names[id(model)] = (name, model, weight.data)
        model.register_forward_pre_hook(lambda *_: self.events.append(f"{name}: {' '.join(self.there())}"))

    def there(self) -> list[str]:
        """The models whose weights are not at home."""
        return [
            name for name, model, home in self.names.values() if next(model.parameters()).data_ptr() != home.data_ptr()
        ]


@pytest.fixture
def make_watched(make_trainer: Any, make_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make_watched(offload) → a trainer of full weights with two references and two classifiers, and its Device."""

    def make(where: str, folder: Any = None, **options: Any) -> tuple[Any, Device]:
        references = [make_base(1), make_base(2)]
        parts = [Part(make_classifier(tokenizer, seed), 0.5, f"rm-{seed}") for seed in (3, 4)]
        trainer = make_trainer(references, WeightedReward(parts), full=True, offload=where, folder=folder, **options)
        device = Device(monkeypatch)
        for name, model in [("reference-0", references[0].model), ("reference-1", references[1].model)]:
            device.watch(name, model)
        for part in parts:
            device.watch(part.reward.name, part.reward.classifier.model)
        device.watch("policy", trainer.model.policy.model)
        return trainer, device

    return make


def test_models_come_one_at_a_time_and_are_back_before_training(make_watched: Any) -> None:
    """The policy generates and trains alone; it stays where it is."""
    trainer, device = make_watched("frozen", rollout_batch_size=4, num_ppo_epochs=2, max_steps=2)
    trainer.train()
    events = [event for event, before in zip(device.events, ["", *device.events], strict=False) if event != before]
    assert events == [
        "policy: ",  # generates, and scores its own responses
        "reference-0: reference-0",
        "reference-1: reference-1",
        "rm-3: rm-3",
        "rm-4: rm-4",
        "policy: ",  # trains
    ]
    assert device.events.count("reference-0: reference-0") == 2 and not device.there()


@pytest.mark.parametrize("estimator", ["k1", "full"])
def test_nothing_else_changes(make_watched: Any, tmp_path: Any, estimator: str) -> None:
    """To the bit: rollouts, and the weights that training ends with."""
    rollouts, weights = [], []
    for where in ("none", "frozen"):
        trainer, _ = make_watched(where, tmp_path / where, rollout_batch_size=4, kl_estimator=estimator)
        rollouts.append(roll_out(trainer).tensors())
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for one, other in (rollouts, weights):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_models_are_back_after_an_error(make_watched: Any) -> None:
    """In the middle of scoring."""
    trainer, device = make_watched("frozen")

    def fail(*_: Any) -> None:
        assert device.there() == ["rm-3"]
        raise RuntimeError("a broken kernel")

    trainer.reward.parts[0].reward.classifier.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        roll_out(trainer)
    assert not device.there()


def test_an_offloaded_model_is_the_one_that_was_given() -> None:
    """Its parameters stay the objects that they were, tied ones tied; buffers go along."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).requires_grad_(False).eval()
    model[2].weight = model[0].weight
    weight, before = model[0].weight, model[0].weight.data.clone()
    offloaded = OffloadedModel(model)
    with offloaded.on(torch.device("cpu")):
        assert model[2].weight is model[0].weight is weight
    assert torch.equal(weight, before) and len(offloaded.tensors) == 3 + 2 + 3


def test_refusals(make_trainer: Any, make_base: Any) -> None:
    """Nothing to offload; weights that train."""
    with pytest.raises(
        SalsaError,
        match="offload: frozen has nothing to offload, since each reference and reward is a function, an adapter",
    ):
        make_trainer(offload="frozen")
    with pytest.raises(SalsaError, match="offload: must be none or frozen, not 'all'"):
        make_trainer(full=True, offload="all")
    with pytest.raises(SalsaError, match="is trainable or quantised and cannot be offloaded"):
        OffloadedModel(make_base())
    trainer = make_trainer([make_base(1)], length_reward, offload="frozen")  # a model of its own beside adapters
    assert roll_out(trainer).kl.abs().max() > 0.1

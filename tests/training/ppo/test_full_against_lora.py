"""Full weights against adapters that stand for the same weights: one network, so one rollout, one loss, and gradients by the chain rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_ppo import loss_of, roll_out

SEEDS = {"policy": 1, "seed-0": 2, "soup": 3}  # of the adapters that make_trainer puts on its base


@pytest.fixture
def make_both(make_trainer: Any, make_base: Any, make_adapter: Any, tmp_path: Any) -> Any:
    """make_both(references) → a trainer of adapters on a base, and one of full weights: those adapters merged into copies of the base."""

    def merged(name: str) -> Any:
        return make_adapter(make_base(), name, SEEDS[name]).merge_and_unload()

    def make(references: list[str], **options: Any) -> tuple[Any, Any]:
        lora = make_trainer(references, folder=tmp_path / "lora", **options)
        own = [make_base() if name == "base" else merged(name) for name in references]
        full = make_trainer(own, folder=tmp_path / "full", full=True, **options)
        full.model.policy.load_state_dict(merged("policy").state_dict())
        for trainer in (lora, full):  # a head of zeros would hide the values
            torch.nn.init.normal_(trainer.model.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(4))
        return lora, full

    return make


@pytest.mark.parametrize("references", [["seed-0"], ["soup", "seed-0", "base"]], ids=["ppo", "mkl"])
@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_the_same_weights_give_the_same_rollout(make_both: Any, references: list[str], estimator: str) -> None:
    """Responses, log-probs, values, KL, scores, advantages, returns."""
    lora, full = make_both(references, kl_estimator=estimator, rollout_batch_size=4)
    one, other = (roll_out(trainer).tensors() for trainer in (lora, full))
    assert torch.equal(one["response_ids"], other["response_ids"]) and one["values"].abs().max() > 0.1
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=1e-4, atol=1e-5, msg=lambda line, name=name: f"{name}: {line}"
        )


def test_the_same_loss_and_its_gradient_by_the_chain_rule(make_both: Any) -> None:
    """W = W₀ + s·B·A: dL/dB = s · dL/dW · Aᵀ and dL/dA = s · Bᵀ · dL/dW for each layer; the value head's are equal. Old log-probs
    and values are moved away, so that both clips bind."""
    lora, full = make_both(["soup"])
    rollout, _ = roll_out(lora), roll_out(full)  # each sets its value head's bias
    noise = 0.4 * torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout = rollout._replace(logprobs=rollout.logprobs + noise, values=rollout.values + noise)
    tokens, rows = int(rollout.responses.lengths.sum()), torch.arange(8)
    found = [loss_of(trainer, rollout, rows, tokens) for trainer in (lora, full)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found[0].clipfrac > 0.1 and found[0].value_clipfrac > 0.1
    for result in found:
        result.loss.backward()
    weights = dict(full.model.policy.named_modules())
    layers = {
        name: layer for name, layer in lora.model.policy.base_model.model.named_modules() if hasattr(layer, "lora_A")
    }
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        A, B, scaling = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight, layer.scaling["policy"]
        gradient = weights[name].weight.grad
        torch.testing.assert_close(B.grad, scaling * gradient @ A.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(A.grad, scaling * B.T @ gradient, rtol=1e-3, atol=1e-5)
        assert A.grad.abs().max() > 1e-4 and B.grad.abs().max() > 1e-4
    heads = [trainer.model.value_head.weight.grad for trainer in (lora, full)]
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)

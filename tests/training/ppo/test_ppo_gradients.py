"""The engine's gradient against the plain formula's: adapters and full weights, with and without accumulation, however padded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, check_gradients, gradients, length_reward, loss_of, plain_logprobs, roll_out
from transformers import AutoConfig, AutoModelForCausalLM

from salsa_peft import SalsaPPOConfig
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.responses import Responses
from salsa_peft.models.value_head import load_policy
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError


@pytest.fixture
def reward_folder(make_base: Any, make_adapter: Any, tmp_path: Path) -> Path:
    """A reward adapter with a score head that is not zero."""
    model = make_adapter(make_base(), "reward", 9)
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(5)) * 0.3
    adapters.save(model, "reward", tmp_path / "reward", extra={SCORE_HEAD: head})
    return tmp_path / "reward"


@pytest.mark.parametrize("micro", [8, 2, 1])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_gradient_is_that_of_the_plain_formula(make_trainer: Any, micro: int, pad_is_eos: bool, full: bool) -> None:
    """With and without accumulation, padded on both sides, pad = eos too."""
    trainer = make_trainer(micro_batch_size=micro, pad_is_eos=pad_is_eos, full=full)
    check_gradients(trainer, micro)
    assert len(gradients(trainer)) == (23 if full else 30)  # 21 weights, or 28 factors, and the value head's two


@pytest.mark.parametrize("value", ["none", "group"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_gradient_without_a_critic(make_trainer: Any, value: str, full: bool) -> None:
    """The policy's term alone; nothing but the policy trains."""
    trainer = make_trainer(micro_batch_size=2, value=value, full=full)
    check_gradients(trainer, 2)
    assert len(gradients(trainer)) == (21 if full else 28) and trainer.model.value_head is None


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 80, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SCALED = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 0.7},
}


def make_scaled(kind: str, seed: int) -> Any:
    """A random model whose logits are scaled or capped, so large that it tells."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SIZES, **SCALED[kind], initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data[2] *= 3  # so that responses end at other lengths
    return model


@pytest.mark.parametrize("kind", sorted(SCALED))
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("options", [{}, {"kl_estimator": "full"}, {"old_logprobs": "rollout"}], ids=str)
def test_logits_that_are_scaled_or_capped(
    kind: str, full: bool, options: dict[str, Any], tokenizer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    """Log-probs, KL and gradients of PPO are those of the model's own logits."""
    model: Any = make_scaled(kind, 0)
    references: list[Any] = [make_scaled(kind, 1)]
    if not full:
        model, references = make_adapter(make_adapter(model, "policy", 1), "soup", 2), ["soup"]
        model.set_adapter("policy")
    args = SalsaPPOConfig(
        output_dir=str(tmp_path), batch_size=8, max_new_tokens=12, report_to="none", use_cpu=True, bf16=False, save_strategy="no", **options
    )  # fmt: skip
    trainer = SalsaPPOTrainer(
        model,
        args=args,
        train_dataset=PROMPTS,
        references=references,
        reward_funcs=length_reward,
        processing_class=tokenizer,
    )
    rollout = roll_out(trainer)
    policy = plain_logprobs(trainer, trainer.model.policy if full else "policy", rollout)
    torch.testing.assert_close(rollout.logprobs, policy.detach(), rtol=1e-5, atol=1e-5)
    if "kl_estimator" not in options:
        expected = policy - plain_logprobs(trainer, references[0], rollout)
        torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-5, atol=1e-5)
    assert rollout.kl.abs().max() > 0.01
    check_gradients(trainer, 4)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tied_embeddings_and_checkpointing(make_trainer: Any, full: bool, checkpointing: bool) -> None:
    """The head is the embedding: in full mode both uses add to one gradient; recomputed activations change nothing."""
    trainer = make_trainer(full=full, base={"tie_word_embeddings": True})
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    check_gradients(trainer, 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_value_adapter_has_a_gradient_of_its_own(make_trainer: Any, reward_folder: Path, checkpointing: bool) -> None:
    """Two trunk forwards, each under its adapter; what is recomputed in the backward runs under the one it ran under."""
    trainer = make_trainer(value="adapter", reward=str(reward_folder))
    start = adapters.score_head(reward_folder).weight
    assert torch.equal(trainer.model.value_head.weight, start)
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    check_gradients(trainer, 4)
    found = set(gradients(trainer))
    assert (
        len([name for name in found if ".policy.weight" in name])
        == len([n for n in found if ".value.weight" in n])
        == 28
    )


def test_a_value_adapter_starts_from_the_reward_and_needs_one(make_trainer: Any, reward_folder: Path) -> None:
    """Its first values at a response's last token are the reward's score of what comes before that token."""
    trainer = make_trainer(value="adapter", reward=str(reward_folder))
    rollout = roll_out(trainer)
    r = rollout.responses
    for row in range(8):
        counted = r.lengths[row]
        cut = r._replace(response_mask=torch.arange(r.response_mask.shape[1]).expand_as(r.response_mask) < counted - 1)
        if counted > 1:
            score = trainer.reward(Responses(*(field[row : row + 1] for field in cut)), [{}])
            torch.testing.assert_close(rollout.values[row, counted - 1], score[0], rtol=1e-4, atol=1e-4)
    trainer.train()
    assert {n.split(".")[-2] for n, p in trainer.model.named_parameters() if p.requires_grad and "lora" in n} == {
        "policy",
        "value",
    }


def test_a_value_adapter_without_a_reward_adapter_starts_from_the_policys(make_trainer: Any, tmp_path: Path) -> None:
    """A copy with a memory of its own, whose head is zero but for its bias; its gradient is that of the plain formula, and it is saved."""
    trainer = make_trainer(value="adapter", learning_rate=1e-2)
    model = trainer.model.policy
    own, copied = (list(adapters.parameters(model, name)) for name in ("policy", "value"))
    assert len(own) == len(copied) == 28
    for one, other in zip(own, copied, strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr() and other.requires_grad
    assert model.active_adapter == "policy" and not any(p.requires_grad for p in adapters.parameters(model, "soup"))
    values = roll_out(trainer).values
    assert values.unique().numel() == 2  # the mean return, and 0 outside the mask
    trainer.model.value_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    check_gradients(trainer, 4)
    trainer.train()
    assert all(not torch.equal(one, other) for one, other in zip(own, copied, strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    again = make_trainer(value="adapter")
    load_policy(again.model, "policy", tmp_path / "saved")
    found = dict(again.model.named_parameters())
    assert all(torch.equal(p, found[n]) for n, p in trainer.model.named_parameters())


def test_the_kl_to_a_model_of_its_own(make_trainer: Any, make_base: Any) -> None:
    """Full weights: the reference's own trunk and its own head; an adapter policy may have such a reference too."""
    other = make_base(1)
    trainer = make_trainer([other], full=True)
    rollout = roll_out(trainer)
    expected = plain_logprobs(trainer, trainer.model.policy, rollout) - plain_logprobs(trainer, other, rollout)
    torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    mixed = make_trainer([other, "soup"])
    rollout = roll_out(mixed)
    policy = plain_logprobs(mixed, "policy", rollout)
    references = torch.stack([plain_logprobs(mixed, which, rollout) for which in (other, "soup")])
    torch.testing.assert_close(rollout.kl, (policy - references).mean(0).detach(), rtol=1e-4, atol=1e-4)
    exact = roll_out(make_trainer([other], full=True, kl_estimator="full"))
    assert exact.kl[exact.responses.response_mask].min() > 0


def test_a_full_policy_trains_is_saved_and_opens_in_plain_transformers(
    make_trainer: Any, make_base: Any, tmp_path: Path
) -> None:
    """Every weight moves, the reference's do not; the checkpoint's folder is the next run's reference."""
    from transformers import AutoModelForCausalLM

    reference = make_base(1)
    trainer = make_trainer([reference], full=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), make_base(1).parameters(), strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    policy = trainer.model.policy.state_dict()
    assert all(torch.equal(tensor, policy[name]) for name, tensor in opened.state_dict().items())
    again = make_trainer([str(tmp_path / "saved")], full=True)
    assert torch.equal(again.references[0].model.lm_head.weight, policy["lm_head.weight"])


def test_references_of_full_weights_that_are_refused(make_trainer: Any, make_base: Any, tmp_path: Path) -> None:
    """One line each."""
    with pytest.raises(SalsaError, match="'base' needs a policy with adapters"):
        make_trainer(["base"], full=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    line = f"references: {tmp_path} is an adapter, but the policy has full weights. Merge the adapter into its base with `salsa soup OUT {tmp_path} --merge`"
    with pytest.raises(SalsaError, match=re.escape(line)):
        make_trainer([str(tmp_path)], full=True)
    with pytest.raises(SalsaError, match=r"references: .* has 10 rows of output embeddings, but the policy has"):
        make_trainer([make_base(vocab_size=10)], full=True)
    with pytest.raises(
        SalsaError,
        match=r"value: adapter needs a policy that is an adapter, .* full weights\. Set value to head, none or group",
    ):
        make_trainer(full=True, value="adapter")


def test_bf16_is_used_in_training_and_in_the_rollout(make_trainer: Any) -> None:
    """Autocast: the states that reach the head are bfloat16 in both, so that the first ratio is 1 up to that rounding."""
    trainer = make_trainer(bf16=True)
    seen: list[torch.dtype] = []
    trunk = trainer.model.policy.get_base_model().model.layers[0].mlp.down_proj
    trunk.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    rollout = roll_out(trainer)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    with trainer.accelerator.autocast():
        loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert set(seen) == {torch.bfloat16} and loss.ratio.item() == pytest.approx(1, abs=1e-3)
    before = trainer.model.value_head.weight.detach().clone()
    trainer.train()
    assert (
        not torch.equal(trainer.model.value_head.weight, before)
        and trainer.model.value_head.weight.dtype == torch.float32
    )

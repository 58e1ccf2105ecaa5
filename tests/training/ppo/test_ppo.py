"""The trainer as a whole: its gradient against the plain formula, what it samples against what it scores, what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, Keeping, length_reward, loss_of, plain_logprobs, roll_out

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.generation import generate, row_seeds
from salsa_peft.models.responses import token_lists
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError


@pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (0.6, 0), (1.0, 3)])
def test_sampled_and_scored_distributions_are_the_same(
    make_trainer: Any, tokenizer: Any, temperature: float, minimum: int
) -> None:
    """Against the scores that generate itself sampled from, and so the first ratio is 1."""
    trainer = make_trainer(temperature=temperature, min_new_tokens=minimum)
    rollout = roll_out(trainer)
    if not minimum:
        torch.testing.assert_close(
            rollout.logprobs, plain_logprobs(trainer, "policy", rollout, temperature), rtol=1e-4, atol=1e-4
        )
    else:
        assert rollout.responses.lengths.min() > minimum
    loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert loss.ratio.item() == pytest.approx(1, abs=1e-4) and loss.approxkl.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("references", [["base"], ["seed-0"], ["soup"], ["seed-0", "soup"], ["seed-0", "soup", "base"]])
def test_the_kl_is_to_the_references_that_were_asked_for(make_trainer: Any, references: list[str]) -> None:
    """k1 to each, averaged over them (paper eq. 5), from each adapter's own full logits."""
    trainer = make_trainer(references)
    rollout = roll_out(trainer)
    policy = plain_logprobs(trainer, "policy", rollout)
    names = [None if name == "base" else name for name in references]
    expected = torch.stack([policy - plain_logprobs(trainer, name, rollout) for name in names]).mean(0)
    torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-4, atol=1e-4)
    assert rollout.kl.abs().max() > 0.1


def test_full_kl_is_exact_and_every_estimator_agrees_with_it_on_average(make_trainer: Any) -> None:
    """KL over the vocabulary, worked out from both adapters' full logits."""
    trainer = make_trainer(kl_estimator="full")
    rollout = roll_out(trainer)
    r, lm = rollout.responses, trainer.model.policy.get_base_model()
    for row in range(8):
        prompt, response = r.prompt_ids[row][r.prompt_mask[row]], r.response_ids[row][r.response_mask[row]]
        tables = []
        for name in ("policy", "soup"):
            with adapters.active(trainer.model.policy, name), torch.no_grad():
                tables.append(lm(torch.cat([prompt, response])[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1])
        expected = (tables[0].exp() * (tables[0] - tables[1])).sum(-1)
        torch.testing.assert_close(rollout.kl[row][r.response_mask[row]], expected, rtol=1e-4, atol=1e-5)


def test_only_policy_and_value_head_train_and_one_base_is_held(make_trainer: Any) -> None:
    """Also after a rollout's toggles; base weights stand in memory once, however many references."""
    trainer = make_trainer(["seed-0", "soup", "base"])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if ".policy.weight" in n or n.startswith("value_head")} and len(trained) == 30
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained
    base = [p for name, p in trainer.model.named_parameters() if "lora_" not in name and "value_head" not in name]
    storages = {p.untyped_storage().data_ptr() for p in base}
    assert len(base) == len(storages) == 2 * 9 + 3  # 2 layers of 7 linears and 2 norms; embeddings, last norm, head


def test_minibatches_are_optimizer_steps_and_the_clip_norm_is_used(make_trainer: Any) -> None:
    """batch 8 = 2 minibatches of 2 micro-batches: 2 PPO epochs × 2 = 4 steps an update, 2 updates of 16 prompts."""
    trainer = make_trainer(
        num_mini_batches=2, micro_batch_size=2, num_ppo_epochs=2, max_grad_norm=1e-9, learning_rate=1.0
    )
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.ppo.update == 2
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [8, 16]
    assert all(row["val/ratio"] == pytest.approx(1, abs=0.5) for row in rows)
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_accumulation_changes_nothing_but_rounding(make_trainer: Any) -> None:
    """Through Trainer's own loop, minibatches of 4 in one forward or four; by SGD, since Adam hides a gradient's scale."""
    weights = []
    for micro in (4, 1):
        trainer = make_trainer(
            num_mini_batches=2, micro_batch_size=micro, num_ppo_epochs=2, learning_rate=0.05, optim="sgd", max_grad_norm=1e9
        )  # fmt: skip
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(make_trainer: Any) -> None:
    """The same weights after training with it."""
    weights = []
    for checkpointing in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        assert trainer.model.policy.get_base_model().is_gradient_checkpointing is checkpointing
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_is_off(make_trainer: Any) -> None:
    """An adapter trained with dropout: in training mode too, the first ratio is 1."""
    trainer = make_trainer(adapter={"lora_dropout": 0.5})
    rollout = roll_out(trainer)
    trainer.model.train()
    loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert loss.approxkl.item() == pytest.approx(0, abs=1e-6)


def test_the_value_head_has_a_rate_of_its_own(make_trainer: Any) -> None:
    """Where it is given; it is still trained once only."""
    trainer = make_trainer(value_head_learning_rate=0.5, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == 30
    assert {rates[id(p)] for p in trainer.model.value_head.parameters()} == {0.5}
    assert {rate for key, rate in rates.items() if rate != 0.5} == {1e-3}


def test_a_wild_minibatch_is_skipped(make_trainer: Any) -> None:
    """A mean ratio above max_ratio drops the step; the weights stay."""
    trainer = make_trainer(max_ratio=0.5)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.ppo.skipped == 2
    before[-1] = trainer.model.value_head.bias  # the first rollout sets it
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{}, {"value": "none"}, {"value": "group", "num_train_epochs": 2}], ids=str)
def test_ppo_learns_what_is_rewarded(make_trainer: Any, options: dict[str, Any]) -> None:
    """Longer responses pay: the mean length grows. (With the advantage's sign swapped it falls.)"""
    settings = {"num_train_epochs": 8, "learning_rate": 1e-2, "num_ppo_epochs": 2, "kl_coef": 0.0, "max_new_tokens": 10}
    trainer = make_trainer(**(settings | options))
    trainer.train()
    lengths = [
        row["objective/response_length"] for row in trainer.state.log_history if "objective/response_length" in row
    ]
    assert sum(lengths[-4:]) / 4 > sum(lengths[:2]) / 2 + 1.5, lengths


def test_a_group_is_a_prompt_answered_several_times(make_trainer: Any, tmp_path: Path) -> None:
    """Batches of 8 responses to 2 prompts: 16 prompts make 8 updates; answers of a prompt differ, each by its own seed."""
    kept: list[Any] = []
    trainer = make_trainer(value="group", save_strategy="steps", save_steps=4)
    maker = trainer.rollout_maker
    trainer.rollout_maker = Keeping(maker, kept)
    trainer.train()
    assert (trainer.ppo.update, len(kept)) == (8, 8)
    asked, several = [], 0
    for rollout in kept:
        prompts = token_lists(rollout.responses.prompt_ids, rollout.responses.prompt_mask)
        assert prompts[:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4
        asked += [prompts[0], prompts[4]]
        answers = token_lists(rollout.responses.response_ids, rollout.responses.response_mask)
        several += len({tuple(tokens) for tokens in answers[:4]}) + len({tuple(tokens) for tokens in answers[4:]})
    assert several > 2 * 2 * len(kept)  # with one seed for a prompt, one answer of each
    assert sorted(asked) == sorted(prompt.tokens for prompt in trainer.train_dataset)
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [8 * update for update in range(1, 9)]
    assert all(row["loss/value_avg"] == row["val/clipfrac_avg"] == 0 for row in rows)
    trainer.save_model(str(tmp_path / "saved"))
    saved = [tmp_path / "saved", Path(trainer.args.output_dir) / "checkpoint-8"]
    assert not any((folder / "value_head.safetensors").exists() for folder in saved)


def test_a_prompts_answers_compare_with_one_another(make_trainer: Any) -> None:
    """A score that only depends on the prompt teaches nothing: all advantages of a group are 0. Without groups some are not."""

    def by_prompt(prompts: list[Any], **_: Any) -> list[float]:
        return [float(len(str(prompt))) for prompt in prompts]

    found = {}
    for value in ("group", "none"):
        trainer = make_trainer(value=value, reward=by_prompt, kl_coef=0.0, max_steps=1)
        rollout = trainer.rollout_maker(next(iter(trainer.get_train_dataloader())), 1, 0.0, lambda: None)
        found[value] = rollout.advantages.abs().max().item()
    assert found["group"] == 0 and found["none"] > 0.1


@pytest.mark.parametrize("value", ["none", "group"])
def test_log_probs_of_generation_without_a_critic(make_trainer: Any, value: str) -> None:
    """Those that a forward pass gives, entropies too."""
    one, other = (roll_out(make_trainer(value=value, old_logprobs=source)) for source in ("recompute", "rollout"))
    for name in ("logprobs", "entropy", "values", "advantages"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-3)


def test_the_kl_pulls_towards_the_reference_that_was_asked_for(make_trainer: Any) -> None:
    """With a reward of zero the policy moves towards its reference, whichever that is."""

    def nothing(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    for reference in ("soup", "base"):
        trainer = make_trainer([reference], reward=nothing, num_train_epochs=8, learning_rate=1e-2, num_ppo_epochs=2, kl_coef=0.5,
                               kl_control="fixed")  # fmt: skip
        trainer.train()
        kl = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row]
        assert sum(kl[-4:]) < 0.8 * sum(kl[:4]), (reference, kl)


def test_a_saved_policy_opens_in_plain_peft_and_generates_the_same(
    make_trainer: Any, make_base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Adapter files at the folder's root, the value head beside them, no pickles."""
    from peft import PeftModel

    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    plain = PeftModel.from_pretrained(make_base(), str(tmp_path / "saved"))
    rows = [trainer.train_dataset[i].tokens for i in range(4)]
    ours, theirs = (
        generate(m, rows, trainer.args, tokenizer, row_seeds(range(4), 5)) for m in (trainer.model.policy, plain)
    )
    assert torch.equal(ours.response_ids, theirs.response_ids)


def test_text_prompts_are_used_as_they_are(make_trainer: Any, tokenizer: Any) -> None:
    """TRL's convention: text is no chat."""
    from salsa_peft.data.datasets import prompt_tokens

    text = tokenizer.apply_chat_template(PROMPTS[0]["prompt"], tokenize=False, add_generation_prompt=True)
    chat = prompt_tokens(PROMPTS[0], tokenizer)
    assert prompt_tokens({"prompt": text}, tokenizer)[-len(chat) :] == chat
    assert prompt_tokens({"input_ids": [5, 6]}, tokenizer) == [5, 6]


def test_refusals(make_trainer: Any, make_base: Any, tokenizer: Any) -> None:
    """One line each: what was found, what was expected."""
    with pytest.raises(SalsaError, match="batch_size: 8 is not a multiple of num_mini_batches 3"):
        make_trainer(num_mini_batches=3)
    with pytest.raises(SalsaError, match="micro_batch_size: 3 must divide 8, the number of responses in a minibatch"):
        make_trainer(micro_batch_size=3)
    with pytest.raises(SalsaError, match=r"train_dataset: 16 prompts .* are fewer than batch_size = 64"):
        make_trainer(batch_size=64)
    with pytest.raises(
        SalsaError, match=r"train_dataset: 16 prompts .* are fewer than batch_size / num_generations = 32"
    ):
        make_trainer(batch_size=64, value="group", num_generations=2)
    with pytest.raises(SalsaError, match="references: 'policy' is the adapter that is trained"):
        make_trainer(["policy"])
    with pytest.raises(SalsaError, match="there is no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(SalsaError, match="reward function lambda: it returned nan for response 1 of 8"):
        make_trainer(reward=lambda completion_ids, **_: [float("nan")] * len(completion_ids)).train()
    with pytest.raises(SalsaError, match=r"model: a Linear cannot be a policy\. Pass a PeftModel"):
        SalsaPPOTrainer(torch.nn.Linear(2, 2), args=SalsaPPOConfig(output_dir="x", use_cpu=True, bf16=False), train_dataset=PROMPTS, references=["base"],
                        reward_funcs=length_reward, processing_class=tokenizer)  # fmt: skip


def test_training_is_whole_updates(make_trainer: Any) -> None:
    """A part of an epoch is rounded up to a rollout batch; max_steps that cut an update are refused."""
    trainer = make_trainer(num_train_epochs=0.6, num_ppo_epochs=2)
    trainer.train()
    assert (trainer.ppo.update, trainer.state.global_step) == (2, 4)
    with pytest.raises(SalsaError, match="max_steps: 3 is not a multiple of 2"):
        make_trainer(max_steps=3, num_ppo_epochs=2)
    trainer = make_trainer(max_steps=2, num_ppo_epochs=2)
    trainer.train()
    assert trainer.ppo.update == 1


def test_two_trainers_on_one_model_share_nothing_by_name(make_trainer: Any, tmp_path: Path) -> None:
    """A reference's folder gets a free name on a model that has one of that name."""
    adapters.save(make_trainer().model.policy, "soup", tmp_path / "a")
    adapters.save(make_trainer().model.policy, "seed-0", tmp_path / "b")
    first = make_trainer([str(tmp_path / "a")])
    model = first.model.policy
    second = SalsaPPOTrainer(model, args=first.args, train_dataset=PROMPTS, references=[str(tmp_path / "b")], reward_funcs=length_reward,
                             processing_class=first.processing_class)  # fmt: skip
    assert [t.references[0].adapter for t in (first, second)] == ["reference-0", "reference-0-2"]
    rollout = roll_out(second)
    expected = plain_logprobs(second, "policy", rollout) - plain_logprobs(second, "seed-0", rollout)
    torch.testing.assert_close(rollout.kl, expected.detach(), rtol=1e-4, atol=1e-4)


def test_more_refusals(make_trainer: Any) -> None:
    """What a library user can get wrong."""
    with pytest.raises(SalsaError, match="references: 'soup/' is not a list"):
        make_trainer("soup/")
    with pytest.raises(SalsaError, match="no such folder, and not a Hub id"):
        make_trainer(["no/such/folder"])
    with pytest.raises(SalsaError, match="min_new_tokens: 9 is more than max_new_tokens = 7"):
        make_trainer(min_new_tokens=9)
    for scores, line in (
        (None, "it returned None; return a list of one score for each response"),
        ([None] * 8, "return a number for each"),
    ):
        with pytest.raises(SalsaError, match=line):
            make_trainer(reward=lambda scores=scores, **_: scores).train()

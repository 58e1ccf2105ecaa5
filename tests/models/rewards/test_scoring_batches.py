"""Forward passes of reward models: how many tokens they compute, that scores are those of single rows, and how often the host waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from mixed_lengths import CPU, PAD, computed, lognormal, made, ultrafeedback
from tiny_classifiers import own_classifier, single
from torch import Tensor

from salsa_peft.data.chat.turn_ends import AssistantTurn
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.responses import Responses, append_turn_end, pad_responses, token_lists
from salsa_peft.models.rewards import classifier as classifiers
from salsa_peft.models.rewards import last_tokens
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.models.rewards.classifier import ClassifierReward
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.training.trl_stages import as_function


@pytest.fixture
def adapter(make_base: Any, make_adapter: Any, tmp_path: Path) -> rewards.AdapterReward:
    """A reward adapter beside a policy on a base for long sequences, 8 rows in a forward pass."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    policy = make_adapter(make_base(max_position_embeddings=8192, num_hidden_layers=1), "policy", 1)
    config = policy.get_base_model().config.__class__(**{**policy.get_base_model().config.to_dict(), "num_labels": 1})
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    trained = get_peft_model(LlamaForSequenceClassification(config), lora)
    generator = torch.Generator().manual_seed(3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
    adapters.save(trained, "default", tmp_path / "reward")
    return rewards.AdapterReward(policy, tmp_path / "reward", 8)


def alone(reward: rewards.AdapterReward, responses: Responses) -> list[float]:
    """The score of each sequence by itself, without padding."""
    with torch.no_grad(), reward.toggle(reward.adapter):
        return [
            reward.head(reward.model.get_base_model().model(torch.tensor([ids]))[0][0, -1]).item()
            for ids in token_lists(responses.input_ids, responses.attention_mask)
        ]


@pytest.mark.usefixtures("of_usual_size")
@pytest.mark.parametrize("source", ["lognormal", "ultrafeedback"])
def test_an_adapter_computes_hardly_more_tokens_than_there_are(
    adapter: rewards.AdapterReward, source: str, request: pytest.FixtureRequest
) -> None:
    """At 8 rows a forward pass at most 5% of padding; scores are those of each sequence alone, in the rows' order."""
    lengths = lognormal(64) if source == "lognormal" else ultrafeedback(request.getfixturevalue("shared"), 64)
    responses, needed = made(lengths), sum(map(sum, lengths))
    with computed(adapter.model.get_base_model().model) as shapes:
        scores = adapter(responses, [{}] * len(lengths))
    assert needed <= sum(rows * longest for rows, longest in shapes) <= 1.05 * needed
    assert max(rows for rows, _ in shapes) <= 8 and sum(rows for rows, _ in shapes) == len(lengths)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(alone(adapter, responses)), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("of_usual_size")
@pytest.mark.parametrize("causal", [True, False])
def test_a_classifier_too(tokenizer: Any, causal: bool, monkeypatch: Any) -> None:
    """Through its decoder and score head, or through the classifier's own forward."""
    monkeypatch.setattr(classifiers, "scores_last_token", lambda _: causal)
    classifier = own_classifier(tokenizer, max_position_embeddings=2048)
    tokenizer = without_limit(tokenizer)
    reward, lengths = ClassifierReward(classifier, tokenizer, tokenizer, 8), lognormal(64)
    responses, needed = made(lengths), sum(map(sum, lengths))
    with computed(classifier.model) as shapes:
        scores = reward(responses, [{"prompt": []}] * 64)
    assert needed <= sum(rows * longest for rows, longest in shapes) <= 1.05 * needed
    assert max(rows for rows, _ in shapes) <= 8
    expected = [single(classifier, ids) for ids in token_lists(responses.input_ids, responses.attention_mask)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "packed adapter", "classifier", "own forward"])
def test_a_forward_pass_has_at_most_so_many_tokens(
    adapter: rewards.AdapterReward, tokenizer: Any, kind: str, monkeypatch: Any
) -> None:
    """Of 150: several rows only if they fit together; scores stay the same."""
    free = without_limit(tokenizer)
    classifier = own_classifier(free, max_position_embeddings=2048)
    reward: Any = adapter if "adapter" in kind else ClassifierReward(classifier, free, free, 8)
    if kind == "own forward":
        monkeypatch.setattr(reward, "causal", False)
    responses, rows = made(lognormal(30)), [{"prompt": []}] * 30
    scores = reward(responses, rows)
    monkeypatch.setattr(last_tokens, "packs_rows", lambda _: kind == "packed adapter")
    reward.micro_batch_tokens = 150
    decoder = adapter.model.get_base_model().model if "adapter" in kind else classifier.model
    with computed(decoder) as shapes:
        torch.testing.assert_close(reward(responses, rows), scores, atol=1e-5, rtol=1e-5)
    longest = max(map(sum, lognormal(30)))
    assert all(count * length <= 150 or (count == 1 and length <= longest) for count, length in shapes)
    assert any(count * length <= 150 for count, length in shapes) and len(shapes) < 30


def test_ppo_sets_the_limit_of_each_part(make_trainer: Any) -> None:
    """Of a sum's rewards as of a reward alone."""
    function = lambda completion_ids: [0.0] * len(completion_ids)  # noqa: E731
    for reward in (function, [(function, 1.0, "a"), (function, 2.0, "b")]):
        trainer = make_trainer(reward=reward, micro_batch_tokens=300)
        assert [part.micro_batch_tokens for part in trainer.reward.components()] in ([300], [300, 300])


def without_limit(tokenizer: Any) -> Any:
    """A copy of the tokenizer for sequences of any length."""
    import copy

    free = copy.deepcopy(tokenizer)
    free.model_max_length = 10**9
    return free


def test_packed_rows_are_scored_as_single_ones(
    adapter: rewards.AdapterReward, tokenizer: Any, monkeypatch: Any
) -> None:
    """As with flash attention on a GPU: no token of padding, by both kinds of reward models."""
    monkeypatch.setattr(last_tokens, "packs_rows", lambda _: True)
    lengths = lognormal(20)
    responses, needed = made(lengths), sum(map(sum, lengths))
    with computed(adapter.model.get_base_model().model) as shapes:
        scores = adapter(responses, [{}] * 20)
    assert [rows for rows, _ in shapes] == [1, 1, 1] and sum(longest for _, longest in shapes) == needed
    torch.testing.assert_close(scores, torch.tensor(alone(adapter, responses)), atol=1e-5, rtol=1e-5)
    classifier, free = own_classifier(tokenizer, max_position_embeddings=2048), without_limit(tokenizer)
    reward = ClassifierReward(classifier, free, free, 8)
    with computed(classifier.model) as shapes:
        found = reward(responses, [{"prompt": []}] * 20)
    assert sum(longest for _, longest in shapes) == needed
    expected = [single(classifier, ids) for ids in token_lists(responses.input_ids, responses.attention_mask)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_which_classifiers_are_called_without_their_head(tokenizer: Any) -> None:
    """Transformers' generic ones. In one whose attention looks ahead, no padding reaches a score either."""
    from transformers import BertConfig, BertForSequenceClassification, GemmaConfig, GemmaForSequenceClassification

    assert classifiers.scores_last_token(own_classifier(tokenizer))
    small: Any = {"vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip
    assert not classifiers.scores_last_token(BertForSequenceClassification(BertConfig(**small)))
    torch.manual_seed(0)
    both_ways = GemmaForSequenceClassification(
        GemmaConfig(**small, head_dim=16, num_key_value_heads=1, use_bidirectional_attention=True)
    ).eval()
    assert not classifiers.scores_last_token(both_ways)
    free, responses = without_limit(tokenizer), made([(3, 2), (5, 9), (6, 12), (4, 4)])
    scores = ClassifierReward(both_ways, free, free, 4)(responses, [{"prompt": []}] * 4)
    expected = [single(both_ways, ids) for ids in token_lists(responses.input_ids, responses.attention_mask)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_end_of_a_turn_is_appended_to_the_rows_that_have_it() -> None:
    """By hand: 7 and 8 after the responses that end with 2 and answer messages; other rows as they are."""
    responses = pad_responses([[5], [5], [5]], [[6, 2], [6, 6, 6], [2]], PAD, [2], CPU)
    rows = [{"prompt": []}, {"prompt": []}, {"prompt": "text"}]
    found = append_turn_end(responses, rows, AssistantTurn(2, (7, 8), ""))
    assert token_lists(found.response_ids, found.response_mask) == [[6, 2, 7, 8], [6, 6, 6], [2]]
    assert found.finished.tolist() == [True, False, True]


def test_token_lists() -> None:
    """By hand; a token of id 0 stays, and a row may be empty."""
    ids = torch.tensor([[0, 3, 4], [5, 0, 6], [7, 8, 9]])
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert token_lists(ids, mask) == [[0, 3], [0, 6], []]


def lengths_of(completion_ids: list[list[int]], log_metric: Any) -> Tensor:
    """A function's reward, as a tensor."""
    log_metric("mean", 1.0)
    return torch.tensor([float(len(ids)) for ids in completion_ids])


def half(finished: list[bool]) -> list[float | None]:
    """A reward that applies to finished responses only."""
    return [1.0 if one else None for one in finished]


@pytest.mark.parametrize("kind", ["adapter", "causal", "encoder", "own tokenizer", "function", "sum"])
def test_the_host_waits_as_often_for_many_rows_as_for_few(
    adapter: rewards.AdapterReward, tokenizer: Any, kind: str
) -> None:
    """6 rows in one forward pass, 60 longer ones in many: one copy for token ids, masks or lengths, however many."""
    from transformers import BertConfig, BertForSequenceClassification

    free, own = without_limit(tokenizer), without_limit(tokenizer)
    own.chat_template += " "  # another template than the policy's, so that texts are tokenized again
    bert = BertConfig(vocab_size=len(free), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                      num_attention_heads=2, num_labels=1, max_position_embeddings=1024)  # fmt: skip
    adapter.tokenizer = free
    function = FunctionReward(lengths_of, free)
    reward: Any = {
        "adapter": adapter,
        "causal": ClassifierReward(own_classifier(free, max_position_embeddings=2048), free, free, 8),
        "encoder": ClassifierReward(BertForSequenceClassification(bert), free, free, 8),
        "own tokenizer": ClassifierReward(own_classifier(own, max_position_embeddings=4096), own, free, 8),
        "function": function,
        "sum": rewards.WeightedReward(
            [(function, 1.0, "length"), (FunctionReward(half, free), 0.5, "half"), (adapter, 1.0, "adapter")]
        ),
    }[kind]
    counts = []
    for lengths in ([(4, 3)] * 6, lognormal(60)):
        with HostSyncs() as syncs:
            reward(made(lengths), [{"prompt": [{"role": "user", "content": "copy"}]}] * len(lengths))
        counts.append(syncs.total)
    assert counts[0] == counts[1] <= 12


def test_a_reward_for_trls_trainers_waits_as_often(adapter: rewards.AdapterReward, tokenizer: Any) -> None:
    """As TRL calls it, with lists of prompts and of token ids."""
    free = without_limit(tokenizer)
    score = as_function(adapter, SimpleNamespace(tokenizer=free), (int(free.eos_token_id),))  # type: ignore[arg-type]
    counts = []
    for lengths in ([(4, 3)] * 6, lognormal(60)):
        responses = made(lengths)
        ids = token_lists(responses.response_ids, responses.response_mask)
        with HostSyncs() as syncs:
            found = score(prompts=[[{"role": "user", "content": "copy"}]] * len(ids), completion_ids=ids)
        assert len(found) == len(ids)
        counts.append(syncs.total)
    assert counts == [2, 2]  # the sequences' lengths, and the scores

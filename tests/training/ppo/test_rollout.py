"""Rollouts: what counts in a response, padding that changes nothing, a seed that decides everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import hidden_states
from salsa_peft.models.generation import generate, generate_batches, row_seeds
from salsa_peft.models.logprobs import head_of
from salsa_peft.models.responses import (
    Responses,
    Sequences,
    last_states,
    pad_tokens,
    response_logprobs,
    response_states,
)
from salsa_peft.training.ppo import losses
from salsa_peft.training.ppo.mixture.kl import ReferenceKL

SAMPLING = Sampling(max_new_tokens=8)
PAD, BOS, EOS = 0, 1, 2


def sample(model: Any, prompts: list[list[int]], sampling: Sampling, tokenizer: Any, seed: int) -> Responses:
    """generate with seeds of a number."""
    return generate(model, prompts, sampling, tokenizer, row_seeds(range(len(prompts)), seed))


def scripted(model: Any, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """model.generate gives these tokens after whatever prompt."""
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor(answers)], 1))


def by_hand() -> Responses:
    """Two rows, padded on both sides: 3 and 2 tokens of prompt, 1 (EOS alone) and 3 (cut at the limit) of response."""
    ids, mask = pad_tokens([[1, 7, 8], [1, 9]], PAD, torch.device("cpu"), "left")
    return Responses(ids, mask, torch.tensor([[EOS, PAD, PAD], [11, 12, 13]]),
                     torch.tensor([[True, False, False], [True, True, True]]), torch.tensor([True, False]))  # fmt: skip


def alone(model: Any, responses: Responses, row: int, temperature: float = 1.0, minimum: int = 0) -> Tensor:
    """log π of one row's response from the full logits of that sequence without padding."""
    prompt = responses.prompt_ids[row][responses.prompt_mask[row]]
    response = responses.response_ids[row][responses.response_mask[row]]
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    logits[:minimum, EOS] = -torch.inf
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


class TestGenerate:
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    def test_a_response_ends_at_its_first_eos(
        self, make_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, pad_is_eos: bool
    ) -> None:
        """EOS counts, nothing after it; EOS alone is empty; at the limit without EOS it is not finished."""
        import copy

        chosen = copy.deepcopy(tokenizer)
        if pad_is_eos:
            chosen.pad_token = chosen.eos_token
        pad = chosen.pad_token_id
        model = make_base()
        answers = [
            [9, 8, EOS, pad, pad],
            [EOS, pad, pad, pad, pad],
            [9, 8, 7, 6, 5],
            [9, 8, 7, 6, EOS],
            [9, EOS, 7, EOS, 6],
        ]
        scripted(model, answers, monkeypatch)
        found = sample(model, [[1, 3]] * 5, SAMPLING, chosen, 0)
        assert found.response_mask.int().tolist() == [
            [1, 1, 1, 0, 0],
            [1, 0, 0, 0, 0],
            [1] * 5,
            [1] * 5,
            [1, 1, 0, 0, 0],
        ]
        assert found.lengths.tolist() == [3, 1, 5, 5, 2]
        assert found.finished.tolist() == [True, True, False, True, True]
        assert found.empty.tolist() == [False, True, False, False, False]
        assert found.response_ids[~found.response_mask].eq(pad).all()
        assert found.response_ids[4].tolist() == [9, EOS, pad, pad, pad]
        assert found.prompt_ids.tolist() == [[1, 3]] * 5

    def test_one_token_without_eos_is_not_empty(
        self, make_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_base()
        scripted(model, [[9], [EOS]], monkeypatch)
        assert sample(model, [[1], [1]], SAMPLING, tokenizer, 0).empty.tolist() == [False, True]

    def test_real_samples_keep_the_rules(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        """Prompts come back whole behind padding; every response ends with its EOS or at the limit; lengths differ."""
        found = sample(make_base(), prompts, SAMPLING, tokenizer, 0)
        assert len(set(found.lengths.tolist())) > 2
        assert 0 < found.finished.sum() < len(prompts)
        for row, prompt in enumerate(prompts):
            assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == prompt
            tokens = found.response_ids[row][found.response_mask[row]].tolist()
            assert (EOS in tokens) is bool(found.finished[row])
            assert tokens[-1] == EOS if found.finished[row] else len(tokens) == 8
            assert EOS not in tokens[:-1]

    def test_the_seed_decides_everything_and_the_random_state_comes_back(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        model = make_base()
        torch.manual_seed(123)
        before = torch.random.get_rng_state()
        first = sample(model, prompts, SAMPLING, tokenizer, 7)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(456)
        again, other = (sample(model, prompts, SAMPLING, tokenizer, seed) for seed in (7, 8))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert other.input_ids.shape != first.input_ids.shape or not torch.equal(other.input_ids, first.input_ids)

    def test_the_models_own_generation_settings_do_not_matter(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """Log-probs are those of the whole distribution at the temperature: penalties and top-p would sample another one."""
        model = make_base()
        expected = sample(model, prompts, SAMPLING, tokenizer, 3)
        model.generation_config.update(
            repetition_penalty=5.0, top_p=0.1, top_k=1, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7]
        )
        kept = model.generation_config
        found = sample(model, prompts, SAMPLING, tokenizer, 3)
        assert torch.equal(found.response_ids, expected.response_ids)
        assert model.generation_config is kept

    def test_min_new_tokens(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        """EOS is no token 1, 2 or 3, and may be the fourth."""
        found = sample(make_base(), prompts * 4, Sampling(max_new_tokens=8, min_new_tokens=3), tokenizer, 0)
        assert found.lengths.min() == 4
        assert sample(make_base(), prompts * 4, SAMPLING, tokenizer, 0).lengths.min() < 4

    def test_the_temperature_is_that_of_sampling(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """Next to 0 the likeliest token is drawn whatever the seed; very hot, almost every token comes."""
        cold, again = (
            sample(make_base(), prompts, Sampling(max_new_tokens=4, temperature=1e-4), tokenizer, seed)
            for seed in (0, 1)
        )
        assert torch.equal(cold.response_ids, again.response_ids)
        hot = sample(make_base(), prompts * 8, Sampling(max_new_tokens=8, temperature=50.0), tokenizer, 0)
        assert len(set(hot.response_ids[hot.response_mask].tolist())) > 0.9 * len(tokenizer)

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_is_off_while_it_samples(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], training: bool
    ) -> None:
        model = make_base(attention_dropout=0.5).train(training)
        found = sample(model, prompts, SAMPLING, tokenizer, 0)
        assert model.training is training
        assert torch.equal(found.response_ids, sample(make_base(), prompts, SAMPLING, tokenizer, 0).response_ids)

    def test_the_active_adapter_samples(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        model = make_adapter(make_adapter(make_base(), "policy", 1), "other", 2)
        with adapters.active(model, "other"):
            found = sample(model, prompts, SAMPLING, tokenizer, 0)
        expected = sample(make_adapter(make_base(), "other", 2), prompts, SAMPLING, tokenizer, 0)
        assert torch.equal(found.response_ids, expected.response_ids)
        with adapters.active(model, None):
            found = sample(model, prompts, SAMPLING, tokenizer, 0)
        assert torch.equal(found.response_ids, sample(make_base(), prompts, SAMPLING, tokenizer, 0).response_ids)


class TestResponses:
    def test_properties_by_hand(self) -> None:
        responses = by_hand()
        assert responses.input_ids.tolist() == [[1, 7, 8, EOS, 0, 0], [0, 1, 9, 11, 12, 13]]
        assert responses.attention_mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
        assert responses.lengths.tolist() == [1, 3]
        assert responses.empty.tolist() == [True, False]

    def test_prompts_are_padded_on_the_left(self) -> None:
        """A pad token inside a prompt counts: the mask comes from lengths."""
        ids, mask = pad_tokens([[1, PAD, 3], [4]], PAD, torch.device("cpu"), "left")
        assert ids.tolist() == [[1, PAD, 3], [PAD, PAD, 4]]
        assert mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]


class TestSequences:
    def test_lengths_by_hand(self) -> None:
        sequences = Sequences(by_hand())
        assert (sequences.prompts, sequences.responses, sequences.lengths) == ([3, 2], [1, 3], [4, 5])

    def test_padded_rows_by_hand(self) -> None:
        """Row 1 first: rows of 5 positions; the responses' tokens stand at 2, 3, 4 and at 5 + 3."""
        batch = Sequences(by_hand()).forward_batch([1, 0])
        assert batch.input_ids.shape == (2, 5) and batch.options == {} and batch.forbidden is None
        assert batch.input_ids[0].tolist() == [1, 9, 11, 12, 13] and batch.input_ids[1, :4].tolist() == [1, 7, 8, EOS]
        assert batch.before.tolist() == [1, 2, 3, 7] and batch.last.tolist() == [4, 8]
        assert batch.cells.tolist() == [3, 4, 5, 0] and batch.labels.tolist() == [11, 12, 13, EOS]

    def test_packed_rows_by_hand(self) -> None:
        """No padding, positions that start again, and the bounds that flash attention asks for."""
        batch = Sequences(by_hand()).forward_batch([1, 0], packed=True)
        assert batch.input_ids.tolist() == [[1, 9, 11, 12, 13, 1, 7, 8, EOS]]
        assert batch.options["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
        for side in "qk":
            bounds = batch.options[f"cu_seq_lens_{side}"]
            assert bounds.tolist() == [0, 5, 9] and bounds.dtype == torch.int32
            assert batch.options[f"max_length_{side}"] == 5
        assert batch.before.tolist() == [1, 2, 3, 7] and batch.last.tolist() == [4, 8]
        assert batch.cells.tolist() == [3, 4, 5, 0] and batch.labels.tolist() == [11, 12, 13, EOS]

    def test_where_eos_is_forbidden(self) -> None:
        assert Sequences(by_hand(), 2).forward_batch([1, 0]).forbidden.tolist() == [True, True, False, True]

    def test_table(self) -> None:
        table = Sequences(by_hand()).table(torch.tensor([3, 4, 5, 0]), torch.tensor([1.0, 2, 3, 4]))
        assert table.tolist() == [[4, 0, 0], [1, 2, 3]]

    def test_batches(self) -> None:
        """By length where padding would be computed, in order where it is not."""
        tokens = torch.arange(200)[None].expand(4, -1)
        mask = torch.arange(200) < torch.tensor([100, 10, 100, 12])[:, None]
        one = torch.ones(4, 1, dtype=torch.bool)
        sequences = Sequences(Responses(tokens[:, :1], one, tokens, mask, torch.ones(4)))
        assert sequences.batches([0, 1, 2, 3], 8, None) == [[1, 3], [0, 2]]
        assert sequences.batches([2, 3, 1], 8, None) == [[1, 3], [2]]
        assert sequences.batches([0, 1, 2, 3], 8, 110) == [[1, 3], [0], [2]]
        assert sequences.batches([0, 1, 2, 3], 8, None, packed=True) == [[0, 1, 2, 3]]
        assert sequences.batches([0, 1, 2, 3], 3, None, packed=True) == [[0, 1, 2], [3]]
        assert sequences.batches([0, 1, 2, 3], 8, 120, packed=True) == [[0, 1], [2, 3]]

    def test_training_and_scoring_of_a_small_model_make_one_pass(self, make_trainer: Any) -> None:
        """64 rows of 8 to 15 tokens, which would be several passes of a model whose tokens cost more than a pass's start."""
        trainer = make_trainer()
        mask = torch.arange(14) < torch.arange(64)[:, None] % 8 + 7
        tokens = torch.zeros_like(mask, dtype=torch.long)
        one = torch.ones(64, 1, dtype=torch.bool)
        sequences = Sequences(Responses(tokens[:, :1], one, tokens, mask, one[:, 0]))
        maker = trainer.rollout_maker
        for limit in (trainer.micro_batch_limit, maker.micro_batch_limit, maker.scoring_limit):
            limit.rows = 64

        def passes() -> tuple[int, int]:
            return len(trainer._forward_batches(sequences, list(range(64)))), len(maker._score_batches(sequences))

        assert maker.pass_tokens > 64 and passes() == (1, 1)
        maker.pass_tokens = 0
        assert min(passes()) > 1

    def test_an_empty_response_has_no_token(self) -> None:
        none = by_hand()._replace(response_mask=torch.tensor([[False] * 3, [True] * 3]))
        batch = Sequences(none).forward_batch([0, 1])
        assert batch.labels.tolist() == [11, 12, 13] and batch.last.tolist() == [2, 9]


class TestLogprobs:
    @pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (0.6, 0), (1.3, 2)])
    @pytest.mark.parametrize("packed", [False, True])
    def test_padding_changes_nothing(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, minimum: int, packed: bool
    ) -> None:
        """Every row against its own sequence without padding, from full logits."""
        model = make_base()
        sampling = Sampling(max_new_tokens=8, temperature=temperature, min_new_tokens=minimum)
        responses = sample(model, prompts, sampling, tokenizer, 0)
        assert (~responses.prompt_mask).any()
        sequences, rows = Sequences(responses, minimum), [7, 3, 11, 0, 1, 2, 5, 4, 6, 9, 8, 10]
        batch = sequences.forward_batch(rows, packed=packed)
        with torch.no_grad():
            head = head_of(model, temperature, (EOS,))
            result = response_logprobs(response_states(model, batch), batch, head, with_entropy=True)
            found, entropy = (sequences.table(batch.cells, values) for values in result)
            for row in rows:
                expected = alone(model, responses, row, temperature, minimum)
                torch.testing.assert_close(found[row][responses.response_mask[row]], expected, rtol=1e-5, atol=1e-5)
            last = last_states(model, batch)
            for place, row in enumerate(rows):
                ids = responses.input_ids[row][responses.attention_mask[row]]
                torch.testing.assert_close(last[place], model.model(ids[None])[0][0, -1], rtol=1e-5, atol=1e-5)
        assert not found[~responses.response_mask].any()
        assert not entropy[~responses.response_mask].any()
        assert entropy[responses.response_mask].min() > 0

    def test_kl_to_a_reference(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """Each estimator as KL_ESTIMATORS has it; `full` is 0 to itself, and more than 0 to another."""
        model = make_adapter(make_adapter(make_base(), "policy", 1), "a", 2)
        responses, head = sample(model, prompts, SAMPLING, tokenizer, 0), head_of(model.get_base_model(), 1.0, (EOS,))
        batch, states = Sequences(responses).forward_batch(range(12)), {}
        for name in ("policy", "a"):
            with torch.no_grad(), adapters.active(model, name):
                states[name] = response_states(model, batch)
        logp = {name: response_logprobs(hidden, batch, head).logprobs for name, hidden in states.items()}

        def kl(name: str, estimator: str) -> Tensor:
            options = PPOOptions(kl_estimator=estimator)  # type: ignore[arg-type]
            with torch.no_grad():
                found = ReferenceKL(options, [1.0], head, logp["policy"], states["policy"])
                found.add(states[name], batch, head, contextlib.nullcontext)
                return found.kl()

        for estimator, estimate in losses.KL_ESTIMATORS.items():
            torch.testing.assert_close(kl("a", estimator), estimate(logp["policy"], logp["a"]))
        assert kl("policy", "full").abs().max() < 1e-5
        assert kl("a", "full").min() > 1e-3


class TestRespond:
    @pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
    def test_every_prompt_once(self, make_base: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int) -> None:
        """The indices say which prompt a row answers; like lengths stand together."""
        seen: list[int] = []
        for indices, responses in generate_batches(make_base(), prompts, SAMPLING, tokenizer, 0, batch_size):
            assert len(indices) == len(responses.finished) <= batch_size
            for place, row in enumerate(indices):
                assert responses.prompt_ids[place][responses.prompt_mask[place]].tolist() == prompts[row]
            seen += indices
        assert sorted(seen) == list(range(12))
        assert [len(prompts[row]) for row in seen] == sorted(map(len, prompts))

    def test_batches_differ_in_their_random_state_and_repeat(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """The same prompt in two batches is answered in two ways; the same call again gives the same."""
        same = [prompts[0]] * 8

        def run(seed: int) -> list[list[int]]:
            return [
                r.response_ids[0].tolist() for _, r in generate_batches(make_base(), same, SAMPLING, tokenizer, seed, 2)
            ]

        first = run(0)
        assert len({tuple(tokens) for tokens in first}) > 1
        assert run(0) == first
        assert run(1) != first


def test_the_trunk_counts_positions_over_real_tokens(make_base: Callable[..., Any], tokenizer: Any) -> None:
    """hidden_states(…) @ the head is the model's logits, whatever stands around the tokens."""
    model, seen = make_base(), []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ids, mask = torch.tensor([[PAD, PAD, 5, 9, 12, PAD]]), torch.tensor([[False, False, True, True, True, False]])
    with torch.no_grad():
        found = model.lm_head(hidden_states(model, ids, mask))[0, 2:5]
        assert seen[0].tolist() == [[0, 0, 0, 1, 2, 2]]
        expected = model(torch.tensor([[5, 9, 12]])).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

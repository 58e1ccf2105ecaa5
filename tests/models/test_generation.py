"""Sampling: the choice of a token, the random numbers of a row, the distribution of whole responses, what generation leaves behind."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from hypothesis import given
from hypothesis import strategies as st
from random_masks import PROPERTY
from scipy import stats
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from salsa_peft.config.options.ppo import Sampling
from salsa_peft.models import generation
from salsa_peft.models.generation import (
    Recording,
    batches_by_length,
    generate,
    generate_batches,
    row_seeds,
    sample_token,
    uniform_numbers,
)
from salsa_peft.models.responses import Responses

PAD, BOS, EOS = 0, 1, 2
BELOW_ONE = 1 - 2**-53


def drawn(probabilities: list[float], uniforms: list[float]) -> list[int]:
    """Tokens of one distribution, float32, at several uniform numbers."""
    table = torch.tensor([probabilities]).expand(len(uniforms), -1)
    return sample_token(table, torch.tensor(uniforms, dtype=torch.float64)).squeeze(-1).tolist()


class TestChoose:
    def test_by_hand(self) -> None:
        """(¼, ½, ¼): token 0 below ¼, token 1 from ¼ to below ¾, token 2 from there."""
        assert drawn([0.25, 0.5, 0.25], [0.0, 0.2499, 0.25, 0.7499, 0.75, BELOW_ONE]) == [0, 0, 1, 1, 2, 2]

    def test_each_row_has_its_own_number(self) -> None:
        table = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
        assert sample_token(table, torch.tensor([0.6, 0.1], dtype=torch.float64)).tolist() == [[1], [1]]
        assert sample_token(table, torch.tensor([0.1, 0.6], dtype=torch.float64)).tolist() == [[0], [2]]

    @PROPERTY
    @given(
        st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 0.1, 1.0, 3.0]), min_size=1, max_size=8).filter(any),
        st.floats(0, BELOW_ONE),
    )
    def test_what_has_no_probability_is_never_drawn(self, weights: list[float], uniform: float) -> None:
        """At the ends too, and where the sum is not 1."""
        probabilities = torch.tensor(weights)
        for table in (probabilities, probabilities / probabilities.sum()):
            for token in drawn(table.tolist(), [0.0, uniform, BELOW_ONE]):
                assert table[token] > 0

    @PROPERTY
    @given(st.lists(st.floats(0.0625, 1), min_size=2, max_size=30), st.integers(500, 3000))
    def test_equal_steps_give_equal_shares(self, weights: list[float], count: int) -> None:
        """At the numbers (i + ½) / n a token of probability p comes n·p times, ± 1."""
        probabilities = (torch.tensor(weights) / sum(weights)).tolist()
        shares = Counter(drawn(probabilities, [(i + 0.5) / count for i in range(count)]))
        for token, probability in enumerate(probabilities):
            assert abs(shares[token] - count * probability / sum(probabilities)) <= 1 + 1e-3

    def test_the_sums_are_double(self) -> None:
        """A last token of 1e-12 is drawn from 1 − 1e-12 on; in float32 its sum would be 1 before it."""
        assert drawn([1.0, 1e-12], [1 - 2e-12, 1 - 0.5e-12]) == [0, 1]
        many = [1e-9] * 1000 + [1.0]  # a thousand steps that float32 would lose beside 1
        assert drawn(many[::-1], [1 / (1 + 1e-6) + 0.5e-6]) == [pytest.approx(501, abs=2)]

    def test_by_chi_square(self) -> None:
        """20,000 numbers of a row's generator against the distribution."""
        probabilities = torch.linspace(1, 9, 20).square().softmax(-1) * 0.5 + 0.025
        uniforms = uniform_numbers([7], 20_000)[0]
        found = torch.bincount(sample_token(probabilities.expand(20_000, -1), uniforms).squeeze(-1), minlength=20)
        assert stats.chisquare(found, (probabilities.double() / probabilities.double().sum() * 20_000)).pvalue > 1e-3

    def test_on_a_device_without_float64_the_cpu_chooses(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: Any
    ) -> None:
        """MPS has none. The uniform numbers stay where they are, and the choice goes back to where the logits are."""
        moved: list[torch.dtype] = []

        class Moves(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function is Tensor.to and args[1:] == (torch.device("cpu"),):
                    moved.append(args[0].dtype)
                return function(*args, **(kwargs or {}))

        found = []
        for kinds in ((), ("cpu",)):
            monkeypatch.setattr(generation, "WITHOUT_FLOAT64", kinds)
            moved.clear()
            with Moves():
                found.append(generate(make_base(), prompts, Sampling(max_new_tokens=2), tokenizer, [1] * len(prompts)))
            assert (torch.float64 in moved) is not bool(kinds)
            assert {torch.float32, torch.int64} <= set(moved)  # probabilities to the numbers, tokens back
        assert torch.equal(found[0].response_ids, found[1].response_ids)


class TestRandomNumbers:
    def test_seeds_of_rows_never_collide(self) -> None:
        """Of 100 rows, 100 updates and 10 runs, 63 bits each."""
        seeds = [seed for run in range(10) for update in range(100) for seed in row_seeds(range(100), run, update)]
        assert len(set(seeds)) == len(seeds) == 100_000
        assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63

    def test_every_part_counts_and_nothing_else(self) -> None:
        """Numbers that are written alike when joined are told apart; a row's seed does not depend on its neighbours."""
        assert row_seeds([3, 8, 5], 1, 2) == [row_seeds([row], 1, 2)[0] for row in (3, 8, 5)]
        variants = [
            ([1], (1, 11)),
            ([1], (11, 1)),
            ([11], (1, 1)),
            ([1], (1, 1)),
            ([1], (1,)),
            ([1], (2, 1)),
            ([2], (1, 1)),
        ]
        assert len({row_seeds(rows, *parts)[0] for rows, parts in variants}) == len(variants)

    def test_seeds_are_the_same_in_every_process(self) -> None:
        """A salted hash() would not be: `printf "1 2 3" | b2sum -l 64`, halved."""
        assert row_seeds([3], 1, 2) == [926643494850814613]

    def test_uniform_numbers(self) -> None:
        """A row is its generator's, whatever the rows beside it; a longer one begins with the shorter; double, in [0, 1)."""
        found = uniform_numbers([5, 6, 5], 1000)
        assert found.dtype == torch.float64 and found.shape == (3, 1000)
        assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
        assert torch.equal(uniform_numbers([6], 10)[0], found[1, :10])
        assert found.min() >= 0 and found.max() < 1
        assert (found * 2**24 % 1).any()  # more digits than float32 has
        assert stats.kstest(found[:2].flatten(), "uniform").pvalue > 1e-3


def tokens_of(found: Responses) -> list[list[int]]:
    """Each row's counted tokens."""
    return [ids[mask].tolist() for ids, mask in zip(found.response_ids, found.response_mask, strict=True)]


class TestRowsAreAlone:
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (1.7, 3)])
    def test_in_every_batch_a_row_is_answered_alike(
        self,
        make_base: Any,
        tokenizer: Any,
        prompts: list[list[int]],
        pad_is_eos: bool,
        temperature: float,
        minimum: int,
    ) -> None:
        """All at once, backwards, by fours, alone, beside a long prompt: the same tokens to each."""
        chosen = with_pad(tokenizer, pad_is_eos)
        model, seeds = make_base(), row_seeds(range(12), 0)
        sampling = Sampling(max_new_tokens=9, temperature=temperature, min_new_tokens=minimum)

        def run(rows: list[int], extra: int = 0) -> list[list[int]]:
            given = [prompts[row] for row in rows] + [[5] * extra] * (extra > 0)
            found = tokens_of(
                generate(model, given, sampling, chosen, [seeds[row] for row in rows] + [1] * (extra > 0))
            )
            return found[: len(rows)]

        expected = run(list(range(12)))
        assert len({len(tokens) for tokens in expected}) > 2
        assert run(list(range(12))[::-1])[::-1] == expected
        assert [tokens for start in (0, 4, 8) for tokens in run(list(range(start, start + 4)))] == expected
        assert [run([row])[0] for row in range(12)] == expected
        assert run(list(range(12)), extra=30) == expected
        assert run([2, 2, 7]) == [expected[2], expected[2], expected[7]]

    def test_the_limit_cuts_and_changes_nothing(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        """With a limit of 4 each response is the beginning of the one with a limit of 9."""
        model, seeds = make_base(), row_seeds(range(12), 0)
        longer, shorter = (
            tokens_of(generate(model, prompts, Sampling(max_new_tokens=limit), tokenizer, seeds)) for limit in (9, 4)
        )
        assert [tokens[:4] for tokens in longer] == shorter

    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize("minimum", [0, 6])
    def test_a_limit_of_each_row_cuts_that_row(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], minimum: int, pad_is_eos: bool
    ) -> None:
        """In one batch each response is what the row gets alone with its own limit, tokens and `finished`."""
        model, seeds, limits = make_base(), row_seeds(range(12), 0), [1 + row % 7 for row in range(12)]
        chosen, sampling = with_pad(tokenizer, pad_is_eos), Sampling(max_new_tokens=20, min_new_tokens=minimum)
        found = generate(model, prompts, sampling, chosen, seeds, limits=limits)
        alone = [
            generate(model, [prompts[row]], Sampling(max_new_tokens=limits[row], min_new_tokens=min(minimum, limits[row])),
                     chosen, [seeds[row]])
            for row in range(12)
        ]  # fmt: skip
        assert tokens_of(found) == [tokens_of(one)[0] for one in alone]
        assert found.finished.tolist() == [bool(one.finished) for one in alone]
        assert found.response_ids.shape[1] <= 7
        assert (found.response_ids[~found.response_mask] == chosen.pad_token_id).all()
        assert minimum or 0 < int(found.finished.sum()) < 12

    def test_generation_ends_where_each_row_has_ended(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """One row ends before its high limit, another reaches its low limit in the same step: there is no further step."""
        model, seeds, steps = make_base(), row_seeds(range(12), 0), itertools.count()
        found = generate(model, prompts, Sampling(max_new_tokens=12), tokenizer, seeds)
        lengths = found.lengths.tolist()
        ends = [row for row in range(12) if found.finished[row] and lengths[row] > 1]
        rows = [min(ends, key=lengths.__getitem__), max(range(12), key=lengths.__getitem__)]
        assert lengths[rows[0]] < lengths[rows[1]]
        generate(
            model, [prompts[row] for row in rows], Sampling(max_new_tokens=12), tokenizer, [seeds[row] for row in rows],
            limits=[12, lengths[rows[0]]], check=lambda: next(steps),
        )  # fmt: skip
        assert next(steps) == lengths[rows[0]]


def syncs(model: Any, prompts: list[list[int]], tokenizer: Any, new_tokens: int, **options: Any) -> int:
    """Times that the host would wait for a GPU while exactly `new_tokens` tokens are generated."""
    sampling = Sampling(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    with HostSyncs() as counted:
        found = generate(model, prompts, sampling, tokenizer, range(len(prompts)), **options)
    assert found.response_mask.all() and found.response_ids.shape[1] == new_tokens
    return counted.total


class TestSyncs:
    @pytest.mark.parametrize("lengths", [(3, 3), (3, 5)], ids=["no padding", "padding"])
    @pytest.mark.parametrize("recorded", [False, True])
    def test_one_a_token(self, make_base: Any, tokenizer: Any, lengths: tuple[int, ...], recorded: bool) -> None:
        """Transformers reads whether all rows have ended; nothing else waits, whatever the number of rows."""
        model = make_base(max_position_embeddings=128)
        few, many = ([[BOS, *range(5, 4 + length)] for length in lengths * times] for times in (1, 8))

        def count(prompts: list[list[int]], new_tokens: int) -> int:
            recording = {"recording": Recording(nn.Linear(32, 1))} if recorded else {}
            return syncs(model, prompts, tokenizer, new_tokens, **recording)

        assert count(few, 48) - count(few, 16) == 32
        assert count(many, 16) == count(few, 16) <= 16 + 8

    def test_two_kinds_of_layers(self, tokenizer: Any) -> None:
        """Gemma 3 has a mask for its sliding layers and one for the others."""
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        model = Gemma3ForCausalLM(config).eval()
        few, many = (syncs(model, [[BOS, 5], [BOS, 6, 7]], tokenizer, count) for count in (8, 16))
        assert many - few == 8

    def test_the_masks_are_the_same(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        """After generation Transformers builds masks as before; during it a mask is built though no row is padded."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

        before = MASKS["sdpa"]
        given = {
            "batch_size": 2, "q_length": 3, "kv_length": 3, "attention_mask": torch.ones(2, 3, dtype=torch.bool),
            "allow_is_causal_skip": True, "device": torch.device("cpu"),
        }  # fmt: skip
        with generation.masks_without_sync(padded=True):
            built = MASKS["sdpa"](**given)
        assert built.shape == (2, 1, 3, 3) and torch.equal(built[1, 0], torch.ones(3, 3).tril().bool())
        assert MASKS["sdpa"] is before and before(**given) is None
        with pytest.raises(Stop):
            generate(make_base(), prompts, Sampling(), tokenizer, range(12), check=raise_stop)
        assert MASKS["sdpa"] is before


def with_pad(tokenizer: Any, pad_is_eos: bool) -> Any:
    """The tokenizer, padding with EOS if asked to."""
    chosen = copy.deepcopy(tokenizer)
    if pad_is_eos:
        chosen.pad_token = chosen.eos_token
    return chosen


def logp_at(model: Any, tokens: list[int], temperature: float, forbid_eos: bool) -> Tensor:
    """log π(· | tokens), (V,), in double, from the full logits of that sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].double() / temperature
    if forbid_eos:
        logits[EOS] = -torch.inf
    return logits.log_softmax(-1)


class TestRecording:
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (0.6, 2)])
    def test_what_falls_out_of_generation_is_what_a_forward_gives(
        self,
        make_base: Any,
        tokenizer: Any,
        prompts: list[list[int]],
        pad_is_eos: bool,
        temperature: float,
        minimum: int,
    ) -> None:
        """Log-prob, entropy and value of every token from its own sequence, without batch or padding; 0 outside the mask."""
        model, head = make_base(), nn.Linear(32, 1)
        recording = Recording(head)
        sampling = Sampling(max_new_tokens=8, temperature=temperature, min_new_tokens=minimum)
        found = generate(
            model, prompts, sampling, with_pad(tokenizer, pad_is_eos), row_seeds(range(12), 0), recording=recording
        )
        logprobs, entropy, values = recording.stacked(found.response_mask)
        assert logprobs.shape == entropy.shape == values.shape == found.response_ids.shape
        assert (~found.response_mask).any() and found.finished.any()
        for row, answer in enumerate(tokens_of(found)):
            for t, token in enumerate(answer):
                before = prompts[row] + answer[:t]
                logp = logp_at(model, before, temperature, t < minimum)
                with torch.no_grad():
                    value = head(model.model(torch.tensor([before]))[0][0, -1])
                expected = [logp[token].item(), -(logp.exp() * logp.clamp(min=-1e9)).sum().item(), value.item()]
                assert [column[row, t].item() for column in (logprobs, entropy, values)] == pytest.approx(
                    expected, rel=1e-4, abs=1e-4
                )
        for column in (logprobs, entropy, values):
            assert column.dtype == torch.float32 and not column[~found.response_mask].any()

    def test_it_changes_no_token(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        model, sampling, seeds = make_base(), Sampling(max_new_tokens=8), row_seeds(range(12), 0)
        recorded = generate(model, prompts, sampling, tokenizer, seeds, recording=Recording(nn.Linear(32, 1)))
        assert tokens_of(recorded) == tokens_of(generate(model, prompts, sampling, tokenizer, seeds))


class Stop(Exception):
    """What a check raises."""


def raise_stop() -> None:
    raise Stop


class TestWhatIsLeft:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("stop_at", [1, 3, None])
    def test_the_models_state_comes_back(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], training: bool, stop_at: int | None
    ) -> None:
        """Also where `check` raises in the middle: mode, generation settings, hooks, and the process's random state."""
        model, head, calls = make_base().train(training), nn.Linear(32, 1), itertools.count(1)
        kept, modes = model.generation_config, []
        before = copy.deepcopy(kept.to_dict())

        def check() -> None:
            modes.append(model.training)
            if next(calls) == stop_at:
                raise Stop

        torch.manual_seed(11)
        random_state = torch.random.get_rng_state()

        def run() -> Responses:
            recording = Recording(head)
            return generate(
                model,
                prompts,
                Sampling(max_new_tokens=5),
                tokenizer,
                row_seeds(range(12), 0),
                recording=recording,
                check=check,
            )

        if stop_at is None:
            run()
        else:
            with pytest.raises(Stop):
                run()
        assert len(modes) == (stop_at or 5) and not any(modes)
        assert model.training is training and all(module.training is training for module in model.modules())
        assert model.generation_config is kept and kept.to_dict() == before
        assert not model.lm_head._forward_pre_hooks
        assert torch.equal(torch.random.get_rng_state(), random_state)

    @pytest.mark.filterwarnings("error::FutureWarning")
    def test_a_cache_is_given_as_transformers_calls_it(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]]
    ) -> None:
        """The same responses as without, and no warning of an old name."""
        model = make_base()
        cache = StaticCache(config=model.config, max_cache_len=32)
        own, given = (
            generate(model, prompts, Sampling(max_new_tokens=6), tokenizer, range(len(prompts)), cache=one)
            for one in (None, cache)
        )
        assert torch.equal(own.response_ids, given.response_ids) and cache.get_seq_length() > 0

    def test_no_graph_is_kept(self, make_base: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
        """Though the model's weights and the value head train."""
        model, recording = make_base().requires_grad_(), Recording(nn.Linear(32, 1))
        generate(model, prompts, Sampling(max_new_tokens=3), tokenizer, row_seeds(range(12), 0), recording=recording)
        assert not any(
            tensor.requires_grad
            for steps in (recording.logprobs, recording.entropy, recording.values)
            for tensor in steps
        )


def walks(
    logp: Callable[[list[int]], Tensor], vocabulary: int, limit: int, before: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every response, and its log-prob: it ends with EOS or at the limit."""
    table = logp(list(before))
    for token in range(vocabulary):
        if table[token] > -torch.inf:
            if token == EOS or len(before) + 1 == limit:
                yield (*before, token), table[token].item()
            else:
                yield from (
                    (walk, table[token].item() + rest)
                    for walk, rest in walks(logp, vocabulary, limit, (*before, token))
                )


class TestWholeResponses:
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize(("temperature", "minimum"), [(1.0, 0), (0.7, 0), (1.5, 1)])
    def test_their_distribution_is_the_models(
        self, make_base: Any, tokenizer: Any, pad_is_eos: bool, temperature: float, minimum: int
    ) -> None:
        """4000 answers of at most 3 tokens from a vocabulary of 5 (its pad token an ordinary one too), by chi-square against the
        probabilities of all of them, to a short prompt that stands beside a longer one."""
        model, sampling = (
            make_base(vocab_size=5),
            Sampling(max_new_tokens=3, temperature=temperature, min_new_tokens=minimum),
        )
        prompt, count = [BOS, 4], 4000
        given = [prompt] * count + [[BOS, 3, 3, 4, 3]]
        found = tokens_of(
            generate(model, given, sampling, with_pad(tokenizer, pad_is_eos), row_seeds(range(count + 1), 3))
        )
        seen = Counter(map(tuple, found[:count]))
        exact = {
            walk: torch.tensor(logp).exp().item()
            for walk, logp in walks(lambda tail: logp_at(model, prompt + tail, temperature, len(tail) < minimum), 5, 3)
        }
        assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and seen.keys() <= exact.keys() and len(seen) > 20
        often = [walk for walk, probability in exact.items() if count * probability >= 5]
        rest = sum(probability for walk, probability in exact.items() if walk not in often)
        expected = [*(count * exact[walk] for walk in often), count * rest]
        observed = [*(seen[walk] for walk in often), count - sum(seen[walk] for walk in often)]
        total = sum(expected)
        assert stats.chisquare(observed, [value * count / total for value in expected]).pvalue > 1e-3


class TestRespond:
    @pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
    def test_the_batch_size_changes_no_answer(
        self, make_base: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int
    ) -> None:
        """What is drawn for a prompt depends on its place and the seed alone."""
        model, sampling = make_base(), Sampling(max_new_tokens=6)
        expected = tokens_of(generate(model, prompts, sampling, tokenizer, row_seeds(range(12), 4)))
        found: dict[int, list[int]] = {}
        for rows, part in generate_batches(model, prompts, sampling, tokenizer, 4, batch_size):
            found |= dict(zip(rows, tokens_of(part), strict=True))
        assert [found[row] for row in range(12)] == expected

    def test_a_batch_of_several_limits_stays_within_the_models_positions(
        self, make_base: Any, tokenizer: Any, monkeypatch: Any
    ) -> None:
        """Of 16 positions: 10 + 6 and 12 + 4 may not share a batch; 8 + 5, 10 + 5 and 11 + 5 may, from either end."""
        model, batches = make_base(max_position_embeddings=16), []
        inner = generation.generate

        def spy(model: Any, prompts: Any, *given: Any, **more: Any) -> Responses:
            batches.append(list(map(len, prompts)))
            return inner(model, prompts, *given, **more)

        monkeypatch.setattr(generation, "generate", spy)
        sampling = Sampling(max_new_tokens=6)

        def run(lengths: list[int], limits: list[int]) -> list[list[int]]:
            batches.clear()
            asked = [[BOS] * length for length in lengths]
            for rows, found in generate_batches(model, asked, sampling, tokenizer, 0, 3, limits=limits):
                assert (found.lengths <= torch.tensor([limits[row] for row in rows])).all()
            return list(batches)

        assert run([12, 10, 11], [4, 6, 5]) == [[10], [11], [12]]
        assert run([11, 8, 10], [5, 5, 5]) == [[8, 10, 11]]
        assert run([8, 9, 10, 10], [6, 3, 6, 1]) == [[8, 9, 10], [10]]
        assert run([12, 14, 13], [6, 6, 6]) == [[12, 13, 14]]  # each is too long by itself
        assert batches_by_length([12, 10, 11], [4, 6, 5], 3, 16, longest_first=True) == [[0], [2], [1]]
        assert batches_by_length([12, 10, 11, 9], [4, 4, 4, 6], 3, 16, longest_first=True) == [[0, 2, 1], [3]]
        assert batches_by_length([12, 10, 11, 9], [4, 4, 4, 6], 3, None) == [[3, 1, 2], [0]]

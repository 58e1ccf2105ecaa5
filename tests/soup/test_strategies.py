"""Soup strategies by numbers worked by hand, live soups and measures against plain recomputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from tiny import make_adapter, make_base

from salsa_peft.config.schema import Generation
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.live import LiveAdapters, LiveCheckpoints
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.measures import FunctionMeasure, RewardScore, SFTLoss
from salsa_peft.soup.strategies import STRATEGIES, StrategyInput
from salsa_peft.utils.errors import SalsaError


class Hill:
    """−‖Σ w_i e_i − target‖²: a measure with a slope, and a count of its calls."""

    def __init__(self, target: Sequence[float]) -> None:
        self.target, self.calls = torch.tensor(target, dtype=torch.float64), 0

    def __call__(self, weights: Sequence[float]) -> float:
        self.calls += 1
        return -float((torch.tensor(weights, dtype=torch.float64) - self.target).square().sum())

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        return self(weights), (-2 * (torch.tensor(weights, dtype=torch.float64) - self.target)).tolist()


def ask(
    strategy: str, weights: list[float], measure: Any = None, gram: list[list[float]] | None = None, steps: int = 200
) -> Any:
    table = torch.tensor(gram, dtype=torch.float64) if gram else None
    return STRATEGIES[strategy](StrategyInput(weights, lambda: table, measure, steps, 0.1))  # type: ignore[arg-type, return-value]


def test_linear_is_what_was_asked_for() -> None:
    assert ask("linear", [1.5, -0.5]).weights == [1.5, -0.5]


def test_slerp_of_orthogonal_deltas_keeps_their_norm() -> None:
    """At 90° and t = ⅓: sin 60° and sin 30°; the norm of two unit vectors stays 1."""
    weights = ask("slerp", [2 / 3, 1 / 3], gram=[[1, 0], [0, 1]]).weights
    assert weights == pytest.approx([math.sin(math.pi / 3), math.sin(math.pi / 6)])
    assert math.hypot(*weights) == pytest.approx(1)


@pytest.mark.parametrize(("t", "expected"), [(0.0, [1, 0]), (1.0, [0, 1])])
def test_slerp_ends_at_its_members(t: float, expected: list[float]) -> None:
    assert ask("slerp", [1 - t, t], gram=[[4, 1], [1, 9]]).weights == pytest.approx(expected, abs=1e-12)


def test_slerp_of_one_direction_is_linear() -> None:
    assert ask("slerp", [0.25, 0.75], gram=[[1, 2], [2, 4]]).weights == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("gram", "weights", "line"),
    [
        ([[1]], [1.0], "strategy slerp: there is 1 member, but slerp needs at least two; use strategy linear"),
        ([[1, 0], [0, 1]], [1.0, -1.0], r"strategy slerp: the first 2 weights, \[1.0, -1.0\], sum to 0"),
        (
            [[0, 0], [0, 1]],
            [0.5, 0.5],
            "strategy slerp: a member equals the base or start, so its change has no direction",
        ),
        ([[1, -1], [-1, 1]], [0.5, 0.5], "strategy slerp: the members change the base or start in opposite directions"),
    ],
)
def test_slerp_refuses(gram: list[list[float]], weights: list[float], line: str) -> None:
    with pytest.raises(SalsaError, match=line):
        ask("slerp", weights, gram=gram)


def test_greedy_adds_what_does_not_hurt() -> None:
    """The best is member 1; with 0 it gets better, 2 would make it worse: ½, ½, 0."""
    choice = ask("greedy", [1 / 3] * 3, Hill([0.45, 0.55, 0.0]))
    assert choice.weights == [0.5, 0.5, 0.0]
    assert [point["weights"] for point in choice.tried] == [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], pytest.approx([1 / 3] * 3)]  # fmt: skip


def test_greedy_takes_a_member_that_changes_nothing() -> None:
    """Wortsman et al.: it is added if the measure does not fall."""
    assert ask("greedy", [0.5, 0.5], lambda weights: 1.0).weights == [0.5, 0.5]


def test_greedy_keeps_the_best_alone() -> None:
    assert ask("greedy", [0.5, 0.5], Hill([0.0, 1.0])).weights == [0.0, 1.0]


def test_learned_climbs_and_gives_the_best_point_it_met() -> None:
    choice = ask("learned", [1 / 3] * 3, Hill([0.7, 0.2, 0.1]))
    assert choice.weights == pytest.approx([0.7, 0.2, 0.1], abs=5e-3) and sum(choice.weights) == pytest.approx(1)
    best = max(point["measure"] for point in choice.tried)
    assert next(p["measure"] for p in choice.tried if p["weights"] == choice.weights) == best
    assert choice.tried[0]["weights"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("strategy", ["greedy", "learned"])
def test_without_a_measure_or_with_nan_it_is_refused(strategy: str) -> None:
    with pytest.raises(SalsaError, match=f"strategy {strategy}: a measure on held-out data is required"):
        ask(strategy, [0.5, 0.5])
    with pytest.raises(
        SalsaError, match=r"measure: the value at the weights .* is nan, but a measure must return finite numbers"
    ):
        ask(strategy, [0.5, 0.5], Hill([math.nan, 0.0]))


def test_learned_starts_inside() -> None:
    with pytest.raises(SalsaError, match=r"strategy learned: the weights to start from, .*, must all be above 0"):
        ask("learned", [1.0, 0.0], Hill([0.5, 0.5]))


# live soups and measures

CHATS = [
    {"messages": [{"role": "user", "content": "sort : d a"}, {"role": "assistant", "content": "a d"}]},
    {"messages": [{"role": "user", "content": "copy : b c e"}, {"role": "assistant", "content": "b c e"}]},
    {"messages": [{"role": "user", "content": "copy : f"}, {"role": "assistant", "content": "f"}]},
]
WEIGHTS = [0.3, 0.6, 0.4]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def members(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Three adapters of one base of different ranks, and the checkpoints that they make of it."""
    folder = tmp_path_factory.mktemp("members")
    adapters, checkpoints = [], []
    for i in range(3):
        model = _adapter(tokenizer, i)
        model.save_pretrained(folder / f"a{i}")
        model.merge_and_unload().save_pretrained(folder / f"c{i}")
        adapters.append(folder / f"a{i}")
        checkpoints.append(folder / f"c{i}")
    return adapters, checkpoints


def _adapter(tokenizer: Any, seed: int) -> Any:
    options = {"r": seed + 1, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
    return make_adapter(make_base(tokenizer), "default", seed, **options).eval()


def live_of(kind: str, members: tuple[list[Path], list[Path]], tokenizer: Any) -> Any:
    adapters, checkpoints = members
    if kind == "checkpoints":
        return LiveCheckpoints(make_base(tokenizer).eval(), [read_checkpoint(folder) for folder in checkpoints])
    start = _adapter(tokenizer, 5)
    return LiveAdapters(start, StackedAdapter.load(adapters))


def mean_logprob(model: Any, tokenizer: Any) -> torch.Tensor:
    """One chat at a time, from full logits: the mean over the assistant's tokens."""
    found = []
    for row in CHATS:
        done = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([done["input_ids"]])
        logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        found += [logp[t - 1, ids[0, t]] for t in range(1, ids.shape[1]) if done["assistant_masks"][t]]
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_the_sft_loss_is_the_plain_one_and_its_slopes_are_its_differences(
    kind: str, members: Any, tokenizer: Any
) -> None:
    live = live_of(kind, members, tokenizer)
    measure = SFTLoss(live, CHATS, tokenizer, 64, 2)
    value, slopes = measure.gradient(WEIGHTS)
    with torch.no_grad(), live.at_point():
        assert value == pytest.approx(mean_logprob(live.model, tokenizer).item(), abs=1e-5)
    assert measure(WEIGHTS) == pytest.approx(value, abs=1e-6)
    for i, slope in enumerate(slopes):
        step = (
            [w + (1e-2 if j == i else 0) for j, w in enumerate(WEIGHTS)],
            [w - (1e-2 if j == i else 0) for j, w in enumerate(WEIGHTS)],
        )
        assert slope == pytest.approx((measure(step[0]) - measure(step[1])) / 2e-2, rel=2e-2, abs=2e-4)
    assert all(parameter.grad is None for parameter in live.model.parameters())


def test_the_sft_loss_computes_hardly_any_padding_and_reads_one_number(members: Any, tokenizer: Any) -> None:
    """Of 30 chats in two orders; with its gradient too; as many reads of the device for 2 forward passes as for 30."""
    chats = [
        {"messages": [{"role": "user", "content": "copy : " + "b " * (1 + 7 * n % 40)}, {"role": "assistant", "content": "b"}]}
        for n in range(30)
    ]  # fmt: skip
    live = live_of("adapters", members, tokenizer)
    shapes, counts = [], []

    def note(_: Any, args: Any, options: Any) -> None:
        shapes.append(options["input_ids"].shape)

    decoder = live.model.get_base_model().model
    for size, rows in ((1, chats), (15, chats), (15, chats[::-1])):
        measure = SFTLoss(live, rows, tokenizer, 64, size)
        needed = sum(len(ids) for ids, _ in measure.chats)
        for ask_value in (measure, measure.gradient):
            shapes.clear()
            with decoder.register_forward_pre_hook(note, with_kwargs=True), HostSyncs() as syncs:
                found = ask_value(WEIGHTS)
            counts.append((syncs.total, found if isinstance(found, float) else found[0]))
            assert needed <= sum(shape.numel() for shape in shapes) <= 1.1 * needed
        assert (len(shapes) < 15) == (size > 1)
    assert counts[0][0] == counts[2][0] == counts[4][0] and counts[1][0] == counts[3][0] == counts[5][0]
    assert [value for _, value in counts] == pytest.approx([counts[0][1]] * 6, abs=1e-6)


def test_adapters_and_their_checkpoints_are_the_same_points(members: Any, tokenizer: Any) -> None:
    """Where the weights sum to 1, base + Σ w_i δ_i is Σ w_i θ_i."""
    weights, found = [0.5, 0.2, 0.3], []
    for kind in ("adapters", "checkpoints"):
        live = live_of(kind, members, tokenizer)
        found.append(SFTLoss(live, CHATS, tokenizer, 64, 3)(weights))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_live_soup_leaves_the_model_as_it_was(members: Any, tokenizer: Any) -> None:
    live = live_of("adapters", members, tokenizer)
    ids = torch.tensor([[3, 4, 5]])
    before = live.model(input_ids=ids).logits
    SFTLoss(live, CHATS, tokenizer, 64, 2).gradient(WEIGHTS)
    assert torch.equal(live.model(input_ids=ids).logits, before)
    trains = [name for name, parameter in live.model.named_parameters() if parameter.requires_grad]
    assert trains and not any(live.name in name for name in trains)


def test_rows_without_an_answer_in_reach_are_refused(members: Any, tokenizer: Any) -> None:
    with pytest.raises(
        SalsaError, match="held-out demonstrations: none of the 3 rows has an assistant token among its first 2 tokens"
    ):
        SFTLoss(live_of("adapters", members, tokenizer), CHATS, tokenizer, 2, 2)


def test_a_reward_is_the_mean_over_prompts_and_repeats(members: Any, tokenizer: Any) -> None:
    live = live_of("adapters", members, tokenizer)
    prompts = [[3, 4, 5], [6, 7], [3, 3, 3, 3]]
    lengths = lambda responses, rows: responses.lengths.float() * torch.tensor([float(row["x"]) for row in rows])  # noqa: E731
    rows = [{"x": 1}, {"x": 10}, {"x": 100}]
    measure = RewardScore(
        live, rows, prompts, lengths, Generation(max_new_tokens=4, min_new_tokens=4, batch_size=2), tokenizer
    )
    assert measure(WEIGHTS) == pytest.approx(4 * 111 / 3) == measure(WEIGHTS)
    with pytest.raises(SalsaError, match="the measure reward has no gradient; use sft_loss"):
        measure.gradient(WEIGHTS)


def test_a_function_sees_the_model_at_the_point(members: Any, tokenizer: Any) -> None:
    live = live_of("adapters", members, tokenizer)
    ids = torch.tensor([[3, 4, 5]])
    measure = FunctionMeasure(live, lambda model: model(input_ids=ids).logits[0, -1, 7], "mine:logit")
    live.set([1.0, 0.0, 0.0])
    with live.at_point():
        expected = live.model(input_ids=ids).logits[0, -1, 7].item()
    assert measure([1.0, 0.0, 0.0]) == pytest.approx(expected) != pytest.approx(measure([0.0, 1.0, 0.0]))
    with pytest.raises(SalsaError, match="measure mine:none: the function returned None, but must return a number"):
        FunctionMeasure(live, lambda model: None, "mine:none")(WEIGHTS)  # type: ignore[arg-type, return-value]

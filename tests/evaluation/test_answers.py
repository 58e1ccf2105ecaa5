"""Answers turn by turn on a tiny model: what each turn sees, how it is sampled, and that a stage that was killed goes on as if it had not been."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from mixed_lengths import computed

from salsa_peft.config.options.ppo import Sampling
from salsa_peft.config.schema import Evaluate, Generation, Model
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.data.questions import Question
from salsa_peft.evaluation import comparisons, evaluate
from salsa_peft.evaluation import fastchat as fastchat_files
from salsa_peft.evaluation.answers import answer
from salsa_peft.evaluation.comparisons import clusters
from salsa_peft.models import generation
from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.generation import generate, row_seeds
from salsa_peft.models.responses import Responses
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.rewards.reward import AdapterReward
from salsa_peft.soup.measures import RewardScore
from salsa_peft.utils.files import append_checked_lines, read_json_lines
from salsa_peft.utils.statistics import mean_interval

WORDS = ["owl", "saw", "fig", "cod", "oak"]


def question(at: int, turns: int = 2, category: str | None = None) -> Question:
    """Its first turn's length goes up and down, so that batches by length change the order."""
    texts = ("copy " + " ".join(WORDS[: 1 + (3 * at) % 5]), *(f"sort {WORDS[at % 5]}" for _ in range(turns - 1)))
    return Question(81 + at, category, [{"role": "user", "content": texts[0]}], texts, None, {})


def bench_of(tokenizer: Any, temperature: Any = "category", max_length: int = 64, **generation: Any) -> Any:
    """What answer takes of a StageContext."""
    sampling = Generation(**({"max_new_tokens": 6, "batch_size": 3} | generation))
    recipe = SimpleNamespace(
        generation=sampling, model=Model(max_length=max_length), evaluate=Evaluate(temperature=temperature)
    )
    return SimpleNamespace(recipe=recipe, tokenizer=tokenizer)


def prompt_length(responses: Responses, rows: Any) -> torch.Tensor:
    """A score that shows what was before the answer."""
    return responses.prompt_mask.sum(-1).float()


@pytest.fixture
def model(make_base: Any, make_adapter: Any) -> Any:
    """A base whose adapter answers."""
    return make_adapter(make_base(), "policy", 1)


REWARDS = {"reward": prompt_length}


def tokens_of(messages: Any, tokenizer: Any) -> list[int]:
    """As a model sees them."""
    return prompt_tokens({"prompt": messages}, tokenizer)


def test_the_second_turn_sees_the_first_answer(model: Any, tokenizer: Any) -> None:
    """Its prompt is question, own answer, question; its seed is its own; a row for each turn, in order."""
    asked, context = [question(at) for at in range(4)], bench_of(tokenizer)
    rows = answer(model, "policy", asked, REWARDS, context, 5)
    assert [(row["index"], row["turn"], row["question_id"]) for row in rows] == [
        (i, t, 81 + i) for i in range(4) for t in (1, 2)
    ]
    for at, one in enumerate(asked):
        first, second = rows[2 * at : 2 * at + 2]
        before = tokens_of(one.conversation([first["response"]]), tokenizer)
        assert first["response"] and second["scores"]["reward"] == len(before) > first["scores"]["reward"]
        alone = generate(model, [before], context.recipe.generation, tokenizer, row_seeds([at], 5, 2))
        expected = alone.response_ids[0][alone.response_mask[0]].tolist()
        assert second["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert second["length"] == len(expected) and second["prompt"] == one.turns[1]


def test_one_turn_is_drawn_as_it_always_was(model: Any, tokenizer: Any) -> None:
    """The first turn's seed is the place's and the run's alone."""
    asked, context = [question(at, 1) for at in range(3)], bench_of(tokenizer)
    rows = answer(model, "policy", asked, REWARDS, context, 5)
    for at, one in enumerate(asked):
        alone = generate(
            model, [tokens_of(one.messages, tokenizer)], context.recipe.generation, tokenizer, row_seeds([at], 5)
        )
        assert rows[at]["response"] == tokenizer.decode(
            alone.response_ids[0][alone.response_mask[0]], skip_special_tokens=True
        )


def test_each_category_has_its_temperature(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one temperature; a question keeps its seed whatever batch it is in."""
    seen: dict[float, set[int]] = {}
    inner = generation.generate

    def spy(model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, seeds: Any, **more: Any) -> Responses:
        seen.setdefault(sampling.temperature, set()).update(seeds)
        return inner(model, prompts, sampling, tokenizer, seeds, **more)

    monkeypatch.setattr(generation, "generate", spy)
    asked = [question(at, 1, name) for at, name in enumerate(["math", "writing", None, "coding", "stem", "writing"])]
    answer(model, "policy", asked, REWARDS, bench_of(tokenizer), 5)
    assert seen == {
        0.0: set(row_seeds([0, 3], 5)), 0.7: set(row_seeds([1, 5], 5)), 1.0: set(row_seeds([2], 5)), 0.1: set(row_seeds([4], 5)),
    }  # fmt: skip
    seen.clear()
    answer(model, "policy", asked, REWARDS, bench_of(tokenizer, temperature=0.3), 5)
    assert list(seen) == [0.3]


def test_temperature_0_takes_the_likeliest_token(model: Any, tokenizer: Any) -> None:
    """Whatever the seed; EOS forbidden where a response is too short."""
    prompt = tokens_of(question(1).messages, tokenizer)
    sampling = Sampling(max_new_tokens=5, min_new_tokens=5, temperature=0.0)
    one, two = (generate(model, [prompt], sampling, tokenizer, [seed]).response_ids[0].tolist() for seed in (1, 2))
    ids = list(prompt)
    for token in one:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        logits[tokenizer.eos_token_id] = -torch.inf
        assert token == int(logits.argmax())
        ids.append(token)
    assert one == two and len(one) == 5


def test_a_conversation_that_leaves_little_room(model: Any, tokenizer: Any) -> None:
    """A later answer gets what is left, or none at all, and then counts as empty."""
    one = question(2, 3)
    first = len(tokens_of(one.messages, tokenizer))
    free = bench_of(tokenizer, min_new_tokens=6)
    told = answer(model, "policy", [one], REWARDS, free, 5)
    before = len(tokens_of(one.conversation([told[0]["response"]]), tokenizer))
    tight = answer(model, "policy", [one], REWARDS, bench_of(tokenizer, max_length=before + 2, min_new_tokens=6), 5)
    assert [row["length"] for row in tight[:2]] == [6, 2] and first + 6 <= before + 2
    assert (tight[2]["length"], tight[2]["empty"], tight[2]["response"]) == (1, True, "")
    assert tight[2]["scores"]["reward"] == before + 1  # cut from the left to what there is room for


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of prompts of each call of generate, appended as they come."""
    calls: list[int] = []
    inner = generation.generate

    def counted(model: Any, prompts: Any, *given: Any, **more: Any) -> Responses:
        calls.append(len(prompts))
        return inner(model, prompts, *given, **more)

    monkeypatch.setattr(generation, "generate", counted)
    return calls


def varied(at: int) -> Question:
    """Two turns; the first is of 1 to 5 words, so that each second turn leaves room for another number of tokens."""
    texts = ("copy " + " ".join(WORDS[: 1 + (3 * at) % 5]), f"sort {' '.join(WORDS[: 1 + at % 3])}")
    return Question(at, None, [{"role": "user", "content": texts[0]}], texts, None, {})


def test_conversations_with_room_for_different_lengths_share_batches(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 second turns of many limits: 3 batches of 4, and each answer is the one that its prompt gets alone."""
    asked, context = [varied(at) for at in range(12)], bench_of(tokenizer, 0.9, max_length=29, max_new_tokens=9, batch_size=4)  # fmt: skip
    calls = counted_calls(monkeypatch)
    rows = answer(model, "policy", asked, REWARDS, context, 5)
    assert calls == [4] * 6
    limits = set()
    for one, first, second in zip(asked, rows[::2], rows[1::2], strict=True):
        tokens = tokens_of(one.conversation([first["response"]]), tokenizer)
        limits.add(min(9, 29 - len(tokens)))
        sampling = Sampling(max_new_tokens=min(9, 29 - len(tokens)), temperature=0.9)
        with lora.active(model, "policy"):
            alone = generate(model, [tokens], sampling, tokenizer, row_seeds([first["index"]], 5, 2))
        assert second["response"] == tokenizer.decode(
            alone.response_ids[0][alone.response_mask[0]], skip_special_tokens=True
        )
        assert (second["length"], second["empty"]) == (int(alone.lengths), bool(alone.empty))
    assert len(limits) >= 4 and min(limits) >= 1


@pytest.mark.parametrize("longest", [29, 20])
def test_no_batch_depends_on_which_answers_exist(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Whatever is known: what is generated or scored is a batch of the whole run, and the rows are the same."""
    asked, context = [varied(at) for at in range(9)], bench_of(tokenizer, 0.9, max_length=longest, max_new_tokens=9)
    seen: list[tuple[Any, ...]] = []

    def reward(responses: Responses, rows: Any) -> torch.Tensor:
        seen.append(tuple(map(tuple, responses.input_ids.tolist())))
        return torch.arange(len(rows)).float()  # depends on the batch

    whole = answer(model, "policy", asked, {"reward": reward}, context, 5)
    batches = set(seen)
    assert (longest == 20) == any(len(batch[0]) == longest and batch[0][-1] == tokenizer.eos_token_id for batch in seen)
    for kept in ([0], [1, 4, 8], [0, 2, 3, 5, 6, 7, 8]):
        seen.clear()
        known = {(row["index"], row["turn"]): row for row in whole if row["index"] in kept}
        assert answer(model, "policy", asked, {"reward": reward}, context, 5, known) == whole
        assert set(seen) <= batches


@pytest.mark.usefixtures("of_usual_size")
@pytest.mark.parametrize("stage", ["evaluate and landscape", "a soup's measure"])
def test_answers_are_scored_without_much_padding(
    make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, stage: str
) -> None:
    """48 answers, 24 in a generation batch and 8 in a reward's forward pass: at most 5% of padding, and few passes."""
    long = {"max_position_embeddings": 512}
    model = make_adapter(make_base(**long), "policy", 1)
    head = {SCORE_HEAD: torch.ones(1, 32)}
    lora.save(make_adapter(make_base(**long), "reward", 9), "reward", tmp_path / "reward", extra=head)
    reward, passes, needed = AdapterReward(model, tmp_path / "reward", 8), [], 0

    def counted(responses: Responses, rows: Any) -> torch.Tensor:
        nonlocal needed
        needed += int(responses.attention_mask.sum())
        with computed(model.get_base_model().model) as shapes:
            scores = reward(responses, rows)
        passes.extend(shapes)
        return scores

    chats = [[{"role": "user", "content": "copy " + "owl " * (3 + 11 * at % 90)}] for at in range(48)]
    sampling = Generation(max_new_tokens=60, batch_size=24)
    if stage == "evaluate and landscape":
        asked = [Question(at, None, chat, (chat[0]["content"],), None, {}) for at, chat in enumerate(chats)]
        context = bench_of(tokenizer, 1.0, max_length=256, max_new_tokens=60, batch_size=24)
        assert len(answer(model, "policy", asked, {"reward": counted}, context, 5)) == 48
    else:
        live = SimpleNamespace(model=model, set=lambda weights: None, at_point=contextlib.nullcontext)
        tokens = [tokens_of(chat, tokenizer) for chat in chats]
        measure = RewardScore(live, [{"prompt": chat} for chat in chats], tokens, counted, sampling, tokenizer)  # type: ignore[arg-type]
        measure([1.0])
    assert needed <= sum(rows * length for rows, length in passes) <= 1.05 * needed
    assert max(rows for rows, _ in passes) <= 8 and len(passes) <= 24


def test_the_host_waits_as_often_for_many_rows_as_for_few(model: Any, tokenizer: Any) -> None:
    """One batch of 3 and one of 12, each of as many tokens: generation, decoding, scores, lengths."""
    rewards = {"reward": prompt_length, "length": FunctionReward(lambda completion_ids: [len(ids) for ids in completion_ids], tokenizer)}  # fmt: skip
    counts = []
    for count in (3, 12):
        context = bench_of(tokenizer, 1.0, min_new_tokens=6, batch_size=12)
        with HostSyncs() as syncs:
            rows = answer(model, "policy", [question(at, 1) for at in range(count)], rewards, context, 5)
        assert len(rows) == count
        counts.append(syncs.total)
    assert counts[0] == counts[1]


def test_a_stage_that_was_killed_goes_on_as_if_it_had_not_been(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whole batches that are there are not asked again, a torn line is; the rows are the same to the bit."""
    asked, context = [question(at, 2, "writing" if at % 2 else None) for at in range(7)], bench_of(tokenizer)
    whole = answer(model, "policy", asked, REWARDS, context, 5)
    path, batches = tmp_path / "partial" / "0.jsonl", 0

    def stops(rows: Any) -> None:
        nonlocal batches
        append_checked_lines(path, rows)
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(model, "policy", asked, REWARDS, context, 5, {}, stops)
    path.write_bytes(path.read_bytes()[:-20])  # the last line is torn
    known = evaluate.read_partial(path)
    assert 3 <= len(known) < 9
    rows: list[Any] = []
    calls = 0
    inner = generation.generate

    def counted(*given: Any, **more: Any) -> Responses:
        nonlocal calls
        calls += 1
        return inner(*given, **more)

    monkeypatch.setattr(generation, "generate", counted)
    again = answer(
        model,
        "policy",
        asked,
        REWARDS,
        context,
        5,
        known,
        lambda part: (rows.extend(part), append_checked_lines(path, part)),
    )
    assert (
        again == whole and calls == 6 - 2
    )  # (2 batches of 4 questions + 1 of 3) of each of two turns, two of them whole
    assert evaluate.read_partial(path) == {(row["index"], row["turn"]): row for row in whole}
    assert (
        answer(
            model,
            "policy",
            asked,
            REWARDS,
            context,
            5,
            evaluate.read_partial(path),
            lambda part: pytest.fail("asked again"),
        )
        == whole
    )


def test_a_batch_that_is_known_in_part_is_asked_whole(model: Any, tokenizer: Any) -> None:
    """Of four questions in batches of three one is known, in either turn."""
    asked, context = [question(at) for at in range(4)], bench_of(tokenizer)
    whole = answer(model, "policy", asked, REWARDS, context, 5)
    for turn in (1, 2):
        known = {
            (row["index"], row["turn"]): row for row in whole if (row["index"], row["turn"]) in ((1, 1), (1, turn))
        }
        assert answer(model, "policy", asked, REWARDS, context, 5, known) == whole


def test_a_reward_sees_the_conversation_and_what_there_was_room_for(model: Any, tokenizer: Any) -> None:
    """Columns: the messages up to the answer. Tokens: the end of a conversation that is too long, not its start. Known ones are not kept again."""
    one, seen = question(2, 3), []

    def reward(responses: Responses, rows: Any) -> torch.Tensor:
        ids = responses.prompt_ids[0][responses.prompt_mask[0]].tolist()
        seen.append((rows[0]["prompt"], ids))
        return torch.zeros(1)

    free = bench_of(tokenizer, min_new_tokens=6)
    told = answer(model, "policy", [one], {"reward": reward}, free, 5)
    for turn, (messages, ids) in enumerate(seen, 1):
        assert messages == one.conversation([row["response"] for row in told[: turn - 1]])
        assert ids == tokens_of(messages, tokenizer)
    seen.clear()
    longest = len(tokens_of(one.conversation([told[0]["response"]]), tokenizer)) + 2
    tight = bench_of(tokenizer, max_length=longest, min_new_tokens=6)
    rows = answer(model, "policy", [one], {"reward": reward}, tight, 5)
    messages, ids = seen[2]
    assert rows[2]["empty"] and ids == tokens_of(messages, tokenizer)[-(longest - 1) :] and len(ids) == longest - 1
    known = {(row["index"], row["turn"]): row for row in rows}
    assert (
        answer(model, "policy", [one], {"reward": reward}, tight, 5, known, lambda part: pytest.fail("kept again"))
        == rows
    )


def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    """What is kept after it stands on a line of its own."""
    path = tmp_path / "0.jsonl"
    append_checked_lines(path, [{"index": 0, "turn": 1}, {"index": 1, "turn": 1}])
    path.write_bytes(path.read_bytes()[:-8])
    append_checked_lines(path, [{"index": 1, "turn": 1, "again": True}])
    assert evaluate.read_partial(path) == {
        (0, 1): {"index": 0, "turn": 1},
        (1, 1): {"index": 1, "turn": 1, "again": True},
    }


def test_fastchats_files(tmp_path: Path) -> None:
    """question.jsonl and model_answer as gen_model_answer.py writes them; a path is no file's name; two of one name don't mix."""
    asked = [question(0), question(1)._replace(reference=["x", "y"])]
    said = [{"question_id": 81 + at, "turn": turn, "response": f"{at}{turn}"} for at in (0, 1) for turn in (1, 2)]
    fastchat_files.write_answers(tmp_path, asked, {"salsa": said, "/a/b/salsa": said[:2]})
    lines = read_json_lines(tmp_path / "model_answer" / "salsa.jsonl")
    assert [(line["question_id"], line["choices"]) for line in lines] == [
        (81, [{"index": 0, "turns": ["01", "02"]}]), (82, [{"index": 0, "turns": ["11", "12"]}]),
    ]  # fmt: skip
    assert (
        lines[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        and lines[0]["model_id"] == "salsa"
    )
    assert len({line["answer_id"] for line in lines}) == 2
    assert len(read_json_lines(tmp_path / "model_answer" / "salsa-2.jsonl")) == 1
    questions = read_json_lines(tmp_path / "question.jsonl")
    assert questions[0] == {"question_id": 81, "category": "general", "turns": list(asked[0].turns)}
    assert questions[1]["reference"] == ["x", "y"]


def test_intervals_are_over_questions() -> None:
    """Two turns of a question are one cluster; of one turn each there is none."""
    rows = [{"index": at, "turn": turn, "scores": {"reward": float(at)}} for at in range(5) for turn in (1, 2)]
    assert clusters(rows) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    one = [row for row in rows if row["turn"] == 1]
    assert clusters(one) is None
    wide, narrow = (
        mean_interval([row["scores"]["reward"] for row in part], clusters(part))  # type: ignore[index]
        for part in (one, rows)
    )
    assert (narrow.mean, narrow.low, narrow.high) == pytest.approx((wide.mean, wide.low, wide.high))


def search_recipe(tmp_path: Path, line: str) -> Any:
    """The embedded world's recipe with a search."""
    from salsa_peft.config.load import load_recipe

    text = "name: s\ntoy: {}\nmodel: {max_length: 32}\ngeneration: {max_new_tokens: 10}\nsft: {batch_size: 32}\n"
    text += "policies: {ppo: {reference: seed-0}, salsa: {reference: soup}}\nevaluate: {pairs: [[salsa, ppo]]"
    (tmp_path / "s.yaml").write_text(f"{text}{', judge: reward' if 'judge' in line else ''}}}\nsearch: {line}\n")
    return load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=[]).recipe


def scored(*values: float) -> list[dict[str, Any]]:
    """Answers to as many questions."""
    return [{"index": at, "turn": 1, "scores": {"reward": value}} for at, value in enumerate(values)]


def test_the_reward_picks_over_all_questions_together(tmp_path: Path) -> None:
    """One set is lost and one is won more clearly; a set that is named alone picks otherwise."""
    given = {
        "in": {"seed-0": scored(0, 0, 0), "salsa-kl-0.1": scored(1, -1, -1), "salsa-kl-0.5": scored(1, 1, -1), "ppo": scored(0, 0, 0)},
        "out": {"seed-0": scored(0, 0, 0), "salsa-kl-0.1": scored(1, 1, 1), "salsa-kl-0.5": scored(1, -1, -1), "ppo": scored(0, 0, 0)},
    }  # fmt: skip
    recipe = search_recipe(tmp_path, "{kl_coef: [0.1, 0.5], methods: [salsa]}")
    found = comparisons.searched(recipe, given)
    assert found is not None and found["methods"]["salsa"]["best"] == "salsa-kl-0.1"
    assert [one["adjusted_win_rate"] for one in found["methods"]["salsa"]["tried"]] == pytest.approx([4 / 6, 3 / 6])
    assert comparisons.wanted(recipe, found) == [
        ("salsa-kl-0.1", "seed-0"),
        ("salsa-kl-0.5", "seed-0"),
        ("salsa-kl-0.1", "ppo"),
    ]
    alone = comparisons.searched(
        search_recipe(tmp_path, "{kl_coef: [0.1, 0.5], methods: [salsa], questions: [in]}"), given
    )
    assert alone is not None and alone["methods"]["salsa"]["best"] == "salsa-kl-0.5"


def test_where_the_judge_picks_scores_do_not(tmp_path: Path) -> None:
    """Its pick stands in the pairs then."""
    given = {"in": {name: scored(0.0) for name in ("seed-0", "salsa-kl-0.1", "salsa-kl-0.5", "ppo")}}
    recipe = search_recipe(tmp_path, "{kl_coef: [0.1, 0.5], methods: [salsa], by: judge}")
    assert comparisons.searched(recipe, given) is None
    by_judge = {"methods": {"salsa": {"best": "salsa-kl-0.5"}}}
    assert comparisons.wanted(recipe, by_judge)[-1] == ("salsa-kl-0.5", "ppo")


def test_pairs_are_clustered_by_question() -> None:
    """Counts over turns, the interval over questions: of two questions whose turns agree as of two judgments each seen twice."""
    rows = {
        name: [
            {"index": at, "turn": turn, "scores": {"reward": value}}
            for turn in (1, 2)
            for at, value in enumerate(values)
        ]
        for name, values in {"a": (1.0, 0.0, 3.0), "b": (0.0, 1.0, 0.0)}.items()
    }
    (pair,) = comparisons.pairs(rows, [("a", "b")], ["reward"])
    assert (pair["wins"], pair["losses"], pair["difference"]["n"]) == (4, 2, 3)
    single = {name: of[:3] for name, of in rows.items()}
    (once,) = comparisons.pairs(single, [("a", "b")], ["reward"])
    assert (once["wins"], once["losses"], once["difference"]["mean"]) == (2, 1, pair["difference"]["mean"])
    assert once["difference"]["low"] == pytest.approx(
        pair["difference"]["low"]
    )  # turns add nothing that questions lack

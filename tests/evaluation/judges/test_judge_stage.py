"""The judge stage over answers made by hand: who wins, what is missing, the files of others' tools, a search by the judge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.job import Job
from salsa_peft.config.load import load_recipe
from salsa_peft.evaluation.judges import stage as judging
from salsa_peft.recipe import units
from salsa_peft.utils.files import read_json_lines

TEXT = """name: j
toy: {}
model: {max_length: 32}
generation: {max_new_tokens: 10}
sft: {batch_size: 32}
policies: {ppo: {reference: seed-0}, salsa: {reference: soup}}
"""
JUDGE = '''
def longer(questions, first, second):
    """The longer answer; "even" ties whatever it stands beside, "biased" makes the judge take what it sees first, "mute" silences it, "shy" when it is
    seen first; "fair" seen first ties."""
    said = []
    for question, a, b in zip(questions, first, second, strict=True):
        both = a + b
        if "mute" in both or "shy" in a:
            said.append(None)
        elif "biased" in both:
            said.append("A")
        elif "even" in both or "fair" in a:
            said.append("C")
        else:
            said.append("A" if len(a) > len(b) else "B" if len(b) > len(a) else "C")
    return said


def by_reference(first, second, references):
    """The answer that is the reference answer to the turn."""
    told = zip(first, second, references, strict=True)
    return ["A" if known and known[-1] == a else "B" if known and known[-1] == b else "C" for a, b, known in told]
'''


def rows(answers: dict[str, list[list[str]]], name: str = "mine") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """model → question → turns: the rows of questions.jsonl and answers.jsonl."""
    asked = [
        {
            "dataset": name,
            "index": index,
            "question_id": 81 + index,
            "category": "writing",
            "messages": [{"role": "user", "content": f"question {index}"}],
            "turns": [f"question {index}", *(f"and {turn}?" for turn in range(2, len(turns) + 1))],
            "reference": None,
        }
        for index, turns in enumerate(next(iter(answers.values())))
    ]
    said = [
        {
            "dataset": name,
            "model": model,
            "index": index,
            "question_id": 81 + index,
            "category": "writing",
            "turn": turn,
            "prompt": "…",
            "response": response,
            "scores": {"reward": float(len(response))},
            "length": len(response),
            "empty": not response,
        }
        for model, questions in answers.items()
        for index, turns in enumerate(questions)
        for turn, response in enumerate(turns, 1)
    ]
    return asked, said


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """judge(answers, more of the recipe, samples) → the stage's folder after it ran with the function above as judge.

    samples: folder of the reward_quality stage; None: the recipe has no such stage."""

    def make(sets: dict[str, dict[str, list[list[str]]]], more: str, samples: Path | None = None) -> Path:
        (tmp_path / "my_judge.py").write_text(JUDGE)
        monkeypatch.delitem(sys.modules, "my_judge", raising=False)
        (tmp_path / "j.yaml").write_text(TEXT + more + ("reward: {quality_prompts: 0}\n" if samples is None else ""))
        recipe = load_recipe(str(tmp_path / "j.yaml"), lora="lora", overrides=[]).recipe
        (unit,) = units.judge_units(recipe, "salsa_peft.evaluation.judges.stage:run")
        evaluated, folder = tmp_path / "run" / "stages" / "evaluate" / "1", tmp_path / "run" / "stages" / "judge" / "2"
        evaluated.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        made = [rows(answers, name) for name, answers in sets.items()]
        for file, place in (("questions.jsonl", 0), ("answers.jsonl", 1)):
            (evaluated / file).write_text("".join(json.dumps(row) + "\n" for pair in made for row in pair[place]))
        inputs = {"evaluate": evaluated} | ({} if samples is None else {"reward_quality": samples})
        assert set(unit.inputs) == set(inputs)
        judging.run(Job(recipe=recipe, unit=unit, folder=folder, inputs=inputs, recipe_yaml=""))
        return folder

    return make


FUNCTION = "judge: {kind: function, model: my_judge:longer}"
ANSWERS = {
    "salsa": [["long answer", "x"], ["even", "short"], ["biased", "a longer one"], ["mute", "y"]],
    "ppo": [["answer", "xy"], ["anything", "long here"], ["other", "brief"], ["z", "z"]],
}


def test_a_win_needs_both_games(judge: Any) -> None:
    """Turns apart; who is preferred for its place alone, or both times differently, ties; no verdict is missing, and is told."""
    folder = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n")
    found = [(row["index"], row["turn"], row["first"], row["second"], row["winner"], row["tie_kind"]) for row in read_json_lines(folder / "judgments.jsonl")]  # fmt: skip
    assert found == [
        (0, 1, "a", "a", "a", None),
        (0, 2, "b", "b", "b", None),
        (1, 1, "tie", "tie", "tie", "agreed"),
        (1, 2, "b", "b", "b", None),
        (2, 1, "a", "b", "tie", "flipped"),
        (2, 2, "a", "a", "a", None),
        (3, 1, "missing", "missing", "missing", None),
        (3, 2, "tie", "tie", "tie", "agreed"),
    ]
    verdicts = json.loads((folder / "verdicts.json").read_text())
    (pair,) = verdicts["datasets"]["mine"]["pairs"]
    assert (pair["a"], pair["b"], pair["wins"], pair["losses"], pair["ties"], pair["missing"]) == (
        "salsa",
        "ppo",
        2,
        2,
        3,
        1,
    )
    assert pair["n"] == 7 and pair["adjusted_win_rate"] == pytest.approx(0.5)
    assert pair["turns"]["1"]["wins"] == 1 and pair["turns"]["2"]["losses"] == 2
    assert pair["p_holm"] >= pair["p_value"] - 1e-12
    assert verdicts["datasets"]["mine"]["questions"] == 4 and verdicts["datasets"]["mine"]["turns"] == 2
    assert verdicts["judge"] == {"kind": "function", "model": verdicts["judge"]["model"], "prompt": "figure7"}


def test_a_game_that_is_missing_and_a_game_that_ties(judge: Any) -> None:
    """One game without a verdict is enough; one tie of two makes half a tie; lengths are the judged turn's."""
    answers = {"salsa": [["shy"], ["fair"], ["one", "three"]], "ppo": [["longer"], ["longer"], ["a", "bb"]]}
    folder = judge({"mine": answers}, f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n")
    found = [(row["first"], row["second"], row["winner"], row["tie_kind"], row["lengths"]) for row in read_json_lines(folder / "judgments.jsonl")]  # fmt: skip
    assert found[:2] == [("missing", "b", "missing", None, [3, 6]), ("tie", "b", "tie", "half", [4, 6])]
    assert [lengths for *_, lengths in found[2:]] == [[3, 1], [5, 2]]
    pair = json.loads((folder / "verdicts.json").read_text())["datasets"]["mine"]["pairs"][0]
    assert pair["missing"] == 1 and pair["tie_kinds"] == {"agreed": 0, "half": 1, "flipped": 0}


def test_lengths_and_answers_keep_their_sides(judge: Any) -> None:
    """a's length first, also where b answered with more."""
    folder = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n")
    first = read_json_lines(folder / "judgments.jsonl")[0]
    assert first["lengths"] == [len("long answer"), len("answer")]
    swapped = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[ppo, salsa]], {FUNCTION}}}\n")
    assert read_json_lines(swapped / "judgments.jsonl")[0]["winner"] == "b"


def test_fastchats_rule_on_its_own_format(judge: Any) -> None:
    """Counted from the file as FastChat's show_result.py counts, wins, losses and ties are ours."""
    folder = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n")
    (file,) = (folder / "data" / "mine" / "model_judgment").iterdir()
    lines = read_json_lines(file)
    assert file.name.endswith("_pair.jsonl") and {line["turn"] for line in lines} == {1, 2}
    kept = [line for line in lines if "error" not in (line["g1_winner"], line["g2_winner"])]
    won = [line["g1_winner"] for line in kept if line["g1_winner"] == line["g2_winner"] != "tie"]
    pair = json.loads((folder / "verdicts.json").read_text())["datasets"]["mine"]["pairs"][0]
    assert (won.count("model_1"), won.count("model_2"), len(kept) - len(won)) == (
        pair["wins"],
        pair["losses"],
        pair["ties"],
    )
    assert {line["model_1"] for line in lines} == {"salsa"} and lines[0]["question_id"] == 81


def test_arena_hards_files(judge: Any) -> None:
    """Its first game has the baseline, our b, as assistant A; only first turns, a missing score where a game has none."""
    folder = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n")
    (file,) = (folder / "arena" / "mine-vs-ppo" / "model_judgment").glob("*/salsa.jsonl")
    scores = [[game["score"] for game in line["games"]] for line in read_json_lines(file)]
    assert scores == [["B>A", "A>B"], ["A=B", "A=B"], ["A>B", "A>B"], [None, None]]
    assert read_json_lines(file)[0]["model"] == "salsa" and read_json_lines(file)[0]["baseline"] == "ppo"


def test_the_reward_as_judge(judge: Any) -> None:
    """Scores of the two answers compared; a margin makes ties."""
    folder = judge({"mine": ANSWERS}, "evaluate: {pairs: [[salsa, ppo]], judge: {kind: reward, margin: 2}}\n")
    assert [row["winner"] for row in read_json_lines(folder / "judgments.jsonl")] == [
        "a", "tie", "b", "b", "tie", "a", "a", "tie",
    ]  # fmt: skip


def test_a_search_by_the_judge_judges_candidates_first(judge: Any) -> None:
    """The candidate with more wins over seed-0 stands for its policy; nothing is judged twice."""
    answers = {
        "seed-0": [["1234"], ["1234"]],
        "salsa-kl-0.01": [["123456"], ["123456"]],
        "salsa-kl-0.2": [["12"], ["123456"]],
        "ppo": [["12345"], ["1234567"]],
    }
    more = f"search: {{kl_coef: [0.2, 0.01], methods: [salsa], by: judge}}\nevaluate: {{pairs: [[salsa, ppo], [salsa, seed-0]], {FUNCTION}}}\n"
    folder = judge({"mine": answers}, more)
    found = json.loads((folder / "verdicts.json").read_text())
    assert found["search"]["methods"]["salsa"]["best"] == "salsa-kl-0.01"
    assert [one["adjusted_win_rate"] for one in found["search"]["methods"]["salsa"]["tried"]] == [0.5, 1.0]
    judged = [(row["a"], row["b"]) for row in read_json_lines(folder / "judgments.jsonl")]
    assert judged == [
        ("salsa-kl-0.2", "seed-0"), ("salsa-kl-0.2", "seed-0"), ("salsa-kl-0.01", "seed-0"), ("salsa-kl-0.01", "seed-0"),
        ("salsa-kl-0.01", "ppo"), ("salsa-kl-0.01", "ppo"),
    ]  # fmt: skip


def test_a_search_by_the_reward_picks_from_the_scores(judge: Any) -> None:
    """And the candidate picked is judged in its policy's place."""
    answers = {"seed-0": [["12"]], "salsa-kl-0.01": [["1"]], "salsa-kl-0.2": [["12345"]], "ppo": [["1"]]}
    more = f"search: {{kl_coef: [0.01, 0.2], methods: [salsa]}}\nevaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\n"
    folder = judge({"mine": answers}, more)
    assert {(row["a"], row["b"]) for row in read_json_lines(folder / "judgments.jsonl")} == {("salsa-kl-0.2", "ppo")}
    assert json.loads((folder / "verdicts.json").read_text())["search"]["methods"]["salsa"]["best"] == "salsa-kl-0.2"


def test_a_conversation_before_the_first_answer_is_shown() -> None:
    """Its roles too."""
    found = judging._opening([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert found == "[system]\nBe brief.\n\n[user]\nHi"
    assert judging._opening([{"role": "user", "content": "Hi"}]) == "Hi"


def test_the_best_of_n_is_judged_against_one_response(judge: Any, tmp_path: Path) -> None:
    """The judge prefers longer answers and the reward does in 2 of 4 prompts; equal responses tie and are not shown."""
    given = [
        [("ab", 0.0), ("abcd", 2.0), ("abc", 1.0)],  # the best is longer than the first
        [("abc", 0.0), ("ab", 3.0), ("a", 1.0)],  # shorter
        [("mute", 5.0), ("x", 0.0), ("y", 0.0)],  # the first itself
        [("a", 0.0), ("b", 0.0), ("abcdef", 1.0)],
    ]
    rows = [
        {"index": index, "prompt": f"p{index}", "response": text, "scores": {"reward": score}, "length": len(text)}
        for index, of in enumerate(given)
        for text, score in of
    ]
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = f"evaluate: {{pairs: [[salsa, ppo]], {FUNCTION}}}\nreward: {{quality_responses: 3}}\n"
    folder = judge({"mine": ANSWERS}, more, samples)
    found = json.loads((folder / "verdicts.json").read_text())
    best = found["best_of_n"]
    assert (best["responses"], best["wins"], best["losses"], best["ties"], best["missing"], best["n"]) == (
        3,
        2,
        1,
        1,
        0,
        4,
    )
    assert best["adjusted_win_rate"] == 0.625
    assert list(found["datasets"]) == ["mine"] and len(read_json_lines(folder / "judgments.jsonl")) == 8


def test_the_judge_gets_the_reference_answers_of_a_file(judge: Any, tmp_path: Path) -> None:
    """By the question's id; a question that the file lacks has none."""
    known = [{"question_id": "81", "choices": [{"turns": ["answer", "x"]}]}, {"question_id": 99, "choices": [{"turns": ["q"]}]}]  # fmt: skip
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    section = "judge: {kind: function, model: my_judge:by_reference, references: known.jsonl}"
    folder = judge({"mine": ANSWERS}, f"evaluate: {{pairs: [[salsa, ppo]], {section}}}\n")
    assert [row["winner"] for row in read_json_lines(folder / "judgments.jsonl")] == ["b", "a", *["tie"] * 6]

"""`salsa judge`: answer files, models, adapters and a run's results, compared without a recipe."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_run import make_run
from hub_server import Repo, hub
from openai_server import Seen, Server, refusal, serving
from paths import ROOT
from tiny import make_adapter, make_base
from tiny_classifiers import own_classifier

from salsa_peft.cli.judge import main
from salsa_peft.config.judge import Judge
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.data.toy_language import LENGTHS_IN, draw_prompts
from salsa_peft.evaluation.judges.words import judge_section
from salsa_peft.models.stage_context import StageContext
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import read_json_lines

FUNCTIONS = """
def longer(first, second):
    return ["A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie" for a, b in zip(first, second)]

def first(questions):
    return ["A"] * len(questions)

def by_reference(first, second, references):
    return ["A" if known and known[-1] == a else "B" if known and known[-1] == b else "C"
            for a, b, known in zip(first, second, references)]

def size(completions, **columns):
    return [len(one[0]["content"]) for one in completions]
"""
Rows = list[dict[str, Any]]


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fastchat(name: str, answers: dict[Any, list[str]]) -> Rows:
    """Rows of FastChat's model_answer."""
    return [
        {"question_id": key, "answer_id": "x", "model_id": name, "choices": [{"index": 0, "turns": turns}], "tstamp": 1.5}
        for key, turns in answers.items()
    ]  # fmt: skip


TURNS = {"gpt-4": {81: ["long answer", "x"], 82: ["aa", "short"], 83: ["b", "c"]},
         "llama": {81: ["answer", "xyz"], 82: ["bb", "a longer one"], 83: ["b", "ccc"]}}  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as FastChat has it, of two models and three questions of two turns; the current folder."""
    questions = [
        {"question_id": key, "category": "writing", "turns": [f"question {key}", "and then?"]} for key in (81, 82, 83)
    ]
    write_lines(tmp_path / "bench" / "question.jsonl", questions)
    for name, answers in TURNS.items():
        write_lines(tmp_path / "bench" / "model_answer" / f"{name}.jsonl", fastchat(name, answers))
    (tmp_path / "judges_of_the_test.py").write_text(FUNCTIONS)
    monkeypatch.delitem(sys.modules, "judges_of_the_test", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def judged(out: Path) -> tuple[Rows, dict[str, Any]]:
    """judgments.jsonl and verdicts.json."""
    return read_json_lines(out / "judgments.jsonl"), json.loads((out / "verdicts.json").read_text())


BENCH = ("--questions", "bench/question.jsonl")
LONGER = ("--judge", "judges_of_the_test.py:longer")


class TestAnswerFiles:
    """Nothing is generated."""

    def test_of_fastchat(self, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Found by the names of the files beside the questions; every turn apart; wins counted by hand."""
        assert main(["gpt-4", "llama", *BENCH, *LONGER]) == 0
        rows, verdicts = judged(bench / "judged")
        assert [(row["question_id"], row["turn"], row["winner"]) for row in rows] == [
            (81, 1, "a"), (81, 2, "b"), (82, 1, "tie"), (82, 2, "b"), (83, 1, "tie"), (83, 2, "b"),
        ]  # fmt: skip
        (pair,) = verdicts["datasets"]["bench"]["pairs"]
        assert (pair["a"], pair["b"], pair["wins"], pair["ties"], pair["losses"]) == ("gpt-4", "llama", 1, 2, 3)
        assert pair["adjusted_win_rate"] == pytest.approx(1 / 3)
        assert pair["mean_length_a"] == pytest.approx(sum(map(len, ["long answer", "x", "aa", "short", "b", "c"])) / 6)
        lines = capsys.readouterr().out.splitlines()
        assert any(line.split()[:6] == ["gpt-4", "–", "llama", "1", "2", "3"] and "33.3" in line for line in lines)
        assert max(map(len, lines)) <= 80

    def test_ids_as_fractions(self, bench: Path) -> None:
        """81.0 is 81 in every file: rows are paired by their ids, in whatever order."""
        rows = fastchat("x", {float(key): list(turns) for key, turns in TURNS["gpt-4"].items()})
        write_lines(bench / "x.jsonl", rows)
        write_lines(bench / "y.jsonl", rows[::-1])
        questions = read_json_lines(bench / "bench" / "question.jsonl")
        write_lines(bench / "q.jsonl", [{**row, "question_id": float(row["question_id"])} for row in questions])
        for file in ("q.jsonl", "bench/question.jsonl"):
            assert main(["x.jsonl", "y.jsonl", "--questions", file, *LONGER, "--output-dir", f"of {file}"[:8]]) == 0
            found, _ = judged(bench / f"of {file}"[:8])
            assert [(row["question_id"], row["winner"]) for row in found] == [
                (key, "tie") for key in (81, 81, 82, 82, 83, 83)
            ]
        game = {"model_1": "x", "model_2": "y", "g1_winner": "tie", "g2_winner": "tie"}
        write_lines(bench / "pair.jsonl", [{"question_id": key, "turn": turn, **game} for key in (81.0, 82.0, 83.0) for turn in (1, 2)])  # fmt: skip
        assert main(["x.jsonl", "y.jsonl", *BENCH, "--judgments", "pair.jsonl", "--output-dir", "ready"]) == 0

    def test_files_that_fastchat_and_arena_hard_read(self, bench: Path) -> None:
        """The answers as they were, and the judgments of both tools."""
        assert main(["gpt-4", "llama", *BENCH, *LONGER]) == 0
        made = bench / "judged" / "data" / "bench"
        (first, *_) = read_json_lines(made / "model_answer" / "gpt-4.jsonl")
        assert (first["question_id"], first["choices"]) == (81, [{"index": 0, "turns": ["long answer", "x"]}])
        (file,) = (made / "model_judgment").glob("*_pair.jsonl")
        assert [(row["g1_winner"], row["g2_winner"]) for row in read_json_lines(file)][:2] == [
            ("model_1", "model_1"),
            ("model_2", "model_2"),
        ]
        (file,) = (bench / "judged" / "arena").glob("bench-vs-llama/model_judgment/*/gpt-4.jsonl")
        assert [game["score"] for game in read_json_lines(file)[0]["games"]] == ["B>A", "A>B"]

    def test_of_arena_hard(self, bench: Path) -> None:
        """Both versions of its answers, and plain rows; ids are found as text."""
        write_lines(
            bench / "hard.jsonl", [{"uid": f"u{n}", "category": "hard", "prompt": f"prompt {n}"} for n in range(2)]
        )
        texts = ["one", "three"]
        write_lines(bench / "v1.jsonl", [{"question_id": f"u{n}", "choices": [{"turns": [{"content": text, "token_len": 1}]}]} for n, text in enumerate(texts)])  # fmt: skip
        write_lines(bench / "v2.jsonl", [{"uid": f"u{n}", "model": "m", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": text + "!"}}]} for n, text in enumerate(texts)])  # fmt: skip
        write_lines(bench / "rows.jsonl", [{"uid": f"u{n}", "output": ""} for n in (1, 0)])
        files = ["v1.jsonl", "v2.jsonl", "plain=rows.jsonl"]
        assert main([*files, "--questions", "hard.jsonl", *LONGER]) == 0
        pairs = judged(bench / "judged")[1]["datasets"]["hard"]["pairs"]
        assert [(one["a"], one["b"], one["wins"], one["losses"]) for one in pairs] == [
            ("v1", "v2", 0, 2), ("v1", "plain", 2, 0), ("v2", "plain", 2, 0),
        ]  # fmt: skip
        assert main([*files, "--questions", "hard.jsonl", *LONGER, "--baseline", "v1"]) == 0
        pairs = judged(bench / "judged")[1]["datasets"]["hard"]["pairs"]
        assert [(one["a"], one["b"], one["wins"]) for one in pairs] == [("v2", "v1", 2), ("plain", "v1", 0)]

    def test_the_position_decides_nothing(self, bench: Path) -> None:
        """A judge that prefers what it sees first gives ties, and the report warns."""
        assert main(["gpt-4", "llama", *BENCH, "--judge", "judges_of_the_test:first"]) == 0
        rows, verdicts = judged(bench / "judged")
        assert {row["tie_kind"] for row in rows} == {"flipped"}
        assert verdicts["datasets"]["bench"]["pairs"][0]["first_position_rate"] == 1.0
        text = (bench / "judged" / "report.md").read_text()
        assert "100% of the verdicts that are no ties went to the answer shown first" in text

    def test_the_report(self, bench: Path) -> None:
        """It has the models, the rates and the answers, in characters; it names no folder of this machine."""
        assert main(["gpt-4", "llama", *BENCH, *LONGER]) == 0
        for name in ("report.html", "report.md"):
            text = (bench / "judged" / name).read_text()
            assert "33.3" in text and "a longer one" in text and "mean characters of an answer" in text
            assert str(bench) not in text
            assert text.index("question 81") < text.index("long answer") < text.index("and then?") < text.index("xyz")
        summary = json.loads((bench / "judged" / "summary.json").read_text())
        assert summary["verdicts"]["datasets"]["bench"]["pairs"][0]["wins"] == 1
        assert (bench / "judged" / "figures" / "judged-bench.png").stat().st_size > 1000

    def test_reference_answers(self, bench: Path) -> None:
        """Of the questions, or of a file that the judge's settings name."""
        write_lines(bench / "known.jsonl", fastchat("gpt-4", {81: ["answer", "x"]}))
        words = ["--judge", "judges_of_the_test:by_reference", "references=known.jsonl"]
        assert main(["gpt-4", "llama", *BENCH, *words]) == 0
        assert [row["winner"] for row in judged(bench / "judged")[0]] == ["b", "a", *["tie"] * 4]

    def test_a_limit(self, bench: Path) -> None:
        assert main(["gpt-4", "llama", *BENCH, *LONGER, "--limit", "2"]) == 0
        rows, verdicts = judged(bench / "judged")
        assert len(rows) == 4 and verdicts["datasets"]["bench"]["questions"] == 2

    def test_real_questions(self, bench: Path, shared: Path) -> None:
        """MT-Bench's 80 questions of two turns and Arena-Hard's 500 of one."""
        for folder, key, count, turns in (("mt_bench", "question_id", 80, 2), ("arena_hard_v0.1", "uid", 500, 1)):
            asked = read_json_lines(shared / "data" / folder / "question.jsonl")
            for name, size in (("a", 2), ("b", 1)):
                write_lines(bench / f"{name}.jsonl", fastchat(name, {row[key]: ["x" * size] * turns for row in asked}))
            words = ["a.jsonl", "b.jsonl", "--questions", str(shared / "data" / folder), *LONGER]
            assert main([*words, "--output-dir", folder]) == 0
            (pair,) = judged(bench / folder)[1]["datasets"][folder]["pairs"]
            assert (pair["wins"], pair["n"]) == (count * turns, count * turns)


class TestMistakes:
    """Exit code 2 and one line; no weights are loaded, nothing is written."""

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["gpt-4", *BENCH, *LONGER], "MODEL: a judge compares two or more, not 1"),
            ([*BENCH, *LONGER], "MODEL: a judge compares two or more, not 0"),
            (["gpt-4", "nobody", *BENCH, *LONGER], "nobody is no file or folder, and there is no bench/model_answer/nobody.jsonl"),
            (["gpt-4", "nobody.jsonl", *BENCH, *LONGER], "there is no file nobody.jsonl"),
            (["gpt-4", "bench/model_answer/gpt-4.jsonl", *BENCH, *LONGER], "2 of them are called gpt-4; give each a name of its own: NAME=gpt-4 NAME=bench/model_answer/gpt-4.jsonl"),
            (["gpt-4", "llama", *LONGER], "--questions: is required"),
            (["gpt-4", "llama", "--questions", "bench/questoin.jsonl", *LONGER], "--questions: there is no file bench/questoin.jsonl"),
            (["gpt-4", "llama", *BENCH], "--judge: is required; give openai, local, reward, function, module:name"),
            (["gpt-4", "llama", *BENCH, "--judge", "opnai"], "--judge: there is no judge 'opnai'; did you mean openai?"),
            (["gpt-4", "llama", *BENCH, "--judge", "gpt"], "--judge: there is no judge 'gpt'; give openai, local"),
            (["gpt-4", "llama", *BENCH, "--judge", "openai"], "--judge.model: kind openai needs the name of a model"),
            (["gpt-4", "llama", *BENCH, "--judge", "openai", "modle=x", "max_token=1"], "--judge: modle: unknown key, did you mean model?; max_token: unknown key, did you mean max_tokens?"),
            (["gpt-4", "llama", *BENCH, "--judge", "openai", "model=x", "timeout=soon"], "--judge: timeout must be a number, not 'soon'"),
            (["gpt-4", "llama", *BENCH, "--judge", "openai", "model=x"], "the environment variable OPENAI_API_KEY is not set"),
            (["gpt-4", "llama", *BENCH, "--judge", "{kind: local, model: ./nowhere}"], "nowhere' has no config.json"),
            (["gpt-4", "llama", *BENCH, "--judge", "judges_of_the_test:shorter"], "has no shorter"),
            (["gpt-4", "llama", *BENCH, "--judge", "nowhere.py:longer"], "--judge: there is no file nowhere.py"),
            (["gpt-4", "llama", *BENCH, "--judge", "judges_of_the_test:size"], "parameter completions is unknown"),
            (["gpt-4", "llama", *BENCH, *LONGER, "--baseline", "lama"], "--baseline: 'lama' is none of the models; did you mean llama?"),
            (["--judge", "judges_of_the_test:longer", "gpt-4", "llama", *BENCH], "--judge: 'gpt-4' is not KEY=VALUE; put the models before the options"),
            (["gpt-4", "llama", *BENCH, "--judge", "reward"], "a judge of kind reward needs a classifier, reward adapter or function; add --reward R"),
            (["gpt-4", "llama", *BENCH, *LONGER, "--reward", "judges_of_the_test:size"], "--reward: works only with a judge of kind reward"),
            (["gpt-4", "llama", *BENCH, "--judge", "reward", "--reward", "judges_of_the_test:shape"], "--reward: the module judges_of_the_test in"),
            (["gpt-4", "llama", *BENCH, "--judge", "reward", "--reward", "./nowhere"], "--reward: there is no folder ./nowhere"),
        ],
    )  # fmt: skip
    def test_in_the_arguments(self, bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str) -> None:  # fmt: skip
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("salsa judge: ") and expected in said and "\n" not in said, said

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            (fastchat("odd", {81: ["a", "b"], 82: ["a", "b"]}), "its question ids do not match the questions: 1 without an answer (83)"),
            (fastchat("odd", {81: ["a", "b"], 82: ["a", "b"], 83: ["a", "b"], 84: ["a", "b"]}), "1 that are no question's (84)"),
            (fastchat("odd", {81: ["a", "b"], 82: ["a"], 83: ["a", "b"]}), "question 82: has answers to 1 turn, but the question has 2"),
            (fastchat("odd", {81: ["a", "b"], 82: ["a", "b", "c"], 83: ["a", "b"]}), "question 82: has answers to 3 turns, but the question has 2"),
            ([*fastchat("odd", {81: ["a", "b"], 82: ["a", "b"], 83: ["a", "b"]}), *fastchat("odd", {82: ["a", "b"]})], "row 4: question '82' is answered twice"),
            (fastchat("odd", {None: ["a", "b"]}), "row 1, question_id: an id must be text or a whole number, not null; give every row its id"),
            (fastchat("odd", {81.5: ["a", "b"]}), "row 1, question_id: an id must be text or a whole number, not the number 81.5"),
            ([{"question_id": 81, "text": "a"}], "row 1: has no answer; a row must have choices"),
            ([{"question_id": 81, "choices": [{"turns": [None, "b"]}]}], "row 1: has no answer"),
            ([], "has no rows"),
        ],
    )  # fmt: skip
    def test_in_a_file_of_answers(
        self, bench: Path, capsys: pytest.CaptureFixture[str], rows: Rows, expected: str
    ) -> None:
        write_lines(bench / "odd.jsonl", rows)
        assert main(["gpt-4", "odd.jsonl", *BENCH, *LONGER]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("salsa judge: odd.jsonl") and expected in said and "\n" not in said, said

    def test_a_run_is_no_place_for_the_results(self, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (bench / "recipe.yaml").write_text("name: x\n")
        assert main(["gpt-4", "llama", *BENCH, *LONGER, "--output-dir", "."]) == 2
        assert "is the folder of a recipe's run; choose another folder" in capsys.readouterr().err


class TestReadyJudgments:
    """Judgments of other tools in place of a judge."""

    def test_of_fastchat(self, bench: Path) -> None:
        """Also where the models stand in the other order; "error" is missing."""
        winners = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "model_2"), ("error", "model_2")]
        turns = [(81, 1), (81, 2), (82, 1), (82, 2), (83, 1), (83, 2)]
        rows = [
            {"question_id": key, "turn": turn, "model_1": "llama", "model_2": "gpt-4", "judge": ["gpt-4", "pair-v2"],
             "g1_winner": first, "g2_winner": second, "g1_judgment": "one", "g2_judgment": "two"}
            for (key, turn), (first, second) in zip(turns, [*winners, *winners[:2]], strict=True)
        ]  # fmt: skip
        write_lines(bench / "gpt-4_pair.jsonl", rows)
        assert main(["gpt-4", "llama", *BENCH, "--judgments", "gpt-4_pair.jsonl"]) == 0
        found, verdicts = judged(bench / "judged")
        # llama is model_1, b here; game 2 showed gpt-4, a here, first
        assert [(row["first"], row["second"], row["winner"]) for row in found[:4]] == [
            ("b", "b", "b"), ("a", "b", "tie"), ("a", "tie", "tie"), ("a", "missing", "missing"),
        ]  # fmt: skip
        assert found[1]["told"] == ["two", "one"]
        assert verdicts["judge"]["kind"] == "ready judgments"
        assert main(["llama", "gpt-4", *BENCH, "--judgments", "gpt-4_pair.jsonl"]) == 0
        assert [(row["first"], row["second"]) for row in judged(bench / "judged")[0][:4]] == [
            ("a", "a"), ("a", "b"), ("tie", "b"), ("missing", "b"),
        ]  # fmt: skip

    def test_what_the_command_wrote_itself(self, bench: Path) -> None:
        """Both tools' files give the same rates again."""
        write_lines(bench / "one.jsonl", [{"question_id": n, "turns": [f"question {n}"]} for n in range(4)])
        for name, sizes in (("a", (5, 1, 2, 3)), ("b", (3, 4, 2, 1))):
            write_lines(bench / f"{name}.jsonl", fastchat(name, {n: ["x" * size] for n, size in enumerate(sizes)}))
        words = ["a.jsonl", "b.jsonl", "--questions", "one.jsonl"]
        assert main([*words, *LONGER]) == 0
        rows = judged(bench / "judged")[0]
        (pair,) = (bench / "judged").glob("data/one/model_judgment/*_pair.jsonl")
        (folder,) = (bench / "judged").glob("arena/one-vs-b/model_judgment/*")
        for number, path in enumerate((pair, folder, folder / "a.jsonl")):
            assert main([*words, "--judgments", str(path), "--output-dir", str(number)]) == 0
            again = judged(bench / str(number))[0]
            assert [(row["first"], row["second"]) for row in again] == [(row["first"], row["second"]) for row in rows]

    def test_of_arena_hard_v01(self, bench: Path) -> None:
        """Its rows do not name the baseline, which the first game shows first."""
        write_lines(bench / "hard.jsonl", [{"question_id": f"u{n}", "turns": [{"content": "q"}]} for n in range(3)])
        for name in ("new", "old"):
            write_lines(bench / f"{name}.jsonl", fastchat(name, {f"u{n}": ["x"] for n in range(3)}))
        scores = [("B>>A", "A>B"), ("A=B", "B>A"), (None, "A>>B")]
        write_lines(bench / "hard" / "new.jsonl", [
            {"question_id": f"u{n}", "model": "new", "judge": "j", "games": [{"user_prompt": "p", "judgment": "t", "score": score} for score in both]}
            for n, both in enumerate(scores)
        ])  # fmt: skip
        words = ["new.jsonl", "old.jsonl", "--questions", "hard.jsonl", "--judgments", "hard"]
        assert main([*words, "--baseline", "old"]) == 0
        assert [(row["first"], row["second"]) for row in judged(bench / "judged")[0]] == [
            ("a", "a"), ("b", "tie"), ("a", "missing"),
        ]  # fmt: skip
        assert main(words) == 2

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"g1_winner": "model_3"}, "row 1: g1_winner is 'model_3'; it must be model_1, model_2, tie, error"),
            ({"model_2": "vicuna"}, "--judgments: has no judgment of gpt-4 – llama; it has gpt-4 – vicuna"),
            ({"turn": 2}, "--judgments: 5 of 6 turns have no judgment"),
            ({"g1_winner": None, "score": 7}, "row 1: g1_winner is None"),
        ],
    )
    def test_mistakes(self, bench: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], expected: str) -> None:  # fmt: skip
        row = {
            "question_id": 81,
            "turn": 1,
            "model_1": "gpt-4",
            "model_2": "llama",
            "g1_winner": "tie",
            "g2_winner": "tie",
        }
        write_lines(bench / "pair.jsonl", [{**row, **change}])
        for given, said in (("pair.jsonl", expected), ("nowhere", "--judgments: there is no file nowhere"),
                            ("bench/question.jsonl", "row 1: is no pairwise judgment")):  # fmt: skip
            assert main(["gpt-4", "llama", *BENCH, "--judgments", given]) == 2
            error = capsys.readouterr().err.strip()
            assert said in error and "\n" not in error, error
        assert main(["gpt-4", "llama", *BENCH, *LONGER, "--judgments", "pair.jsonl"]) == 2
        assert "--judgments: has no effect with --judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["openai", "model=m", "base_url=http://localhost:1/v1"], {"kind": "openai", "model": "m", "base_url": "http://localhost:1/v1"}),
        (["{kind: openai, model: m, base_url: 'http://localhost:1/v1', temperature: 0.5}", "max_tokens=7"],
         {"kind": "openai", "model": "m", "base_url": "http://localhost:1/v1", "temperature": 0.5, "max_tokens": 7}),
        (["kind=reward", "margin=0.1"], {"kind": "reward", "margin": 0.1}),
        (["local", "model=some/model", "ask_again=0"], {"kind": "local", "model": "some/model", "ask_again": 0}),
    ],
)  # fmt: skip
def test_a_judge_is_spelt_as_in_a_recipe(words: list[str], section: dict[str, Any]) -> None:
    assert judge_section(words) == Judge(**section)


def a_better_judge(request: Seen, times: int) -> str:
    """[[A]] if the answer shown first is the longer one."""
    text = request.body["messages"][-1]["content"]
    a, b = (text.split(f"Assistant {who}'s answer ===\n")[1].split("\n===")[0] for who in "AB")
    return f"I compared them. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


class TestEndpoint:
    """A server with OpenAI's API."""

    @pytest.fixture
    def command(self, bench: Path) -> Callable[[Server], int]:
        """The command's exit code; three questions of one turn, so six comparisons, asked one at a time."""
        write_lines(bench / "one.jsonl", [{"question_id": n, "turns": [f"question {n}"]} for n in range(3)])
        for name, size in (("a", 5), ("b", 3)):
            write_lines(bench / f"{name}.jsonl", fastchat(name, {n: [name * size] for n in range(3)}))

        def run(server: Server) -> int:
            judge = ["openai", "model=m", f"base_url={server.url}", "concurrency=1", "retries=0"]
            return main(["a.jsonl", "b.jsonl", "--questions", "one.jsonl", "--judge", *judge])

        return run

    def test_a_stopped_judgment_pays_for_nothing_twice(self, bench: Path, command: Callable[[Server], int]) -> None:
        """The account is empty after four replies; the same command asks for the other two, and a third for none."""
        paid: list[str] = []

        def script(request: Seen, times: int) -> Any:
            if len(paid) == 4 and not refill:
                return refusal(402, "pay")
            paid.append(request.key)
            return a_better_judge(request, times)

        refill: list[bool] = []
        with serving(script) as server:
            assert command(server) == 2 and len(paid) == 4
            refill.append(True)
            assert command(server) == 0 and len(paid) == 6
            assert judged(bench / "judged")[1]["calls"]["cached"] == 4
            assert command(server) == 0 and len(paid) == len(set(paid)) == 6
            assert server.asked_after_an_answer() == []
        (pair,) = judged(bench / "judged")[1]["datasets"]["one"]["pairs"]
        assert (pair["wins"], pair["ties"], pair["losses"]) == (3, 0, 0)

    def test_errors_name_the_option(self, command: Callable[[Server], int], capsys: pytest.CaptureFixture[str]) -> None:
        with serving(lambda request, times: refusal(404, "no such model", "model_not_found")) as server:
            assert command(server) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("salsa judge: --judge: http://127.0.0.1") and "check --judge.model" in said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters a0 and a1 on it, a0 merged as the checkpoint c0, eight questions of two turns, a classifier."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    make_base(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number in range(2):
        model = make_adapter(make_base(tokenizer), "default", number)
        model.peft_config["default"].base_model_name_or_path = "base"  # beside the adapter
        model.save_pretrained(folder / f"a{number}")
    make_adapter(make_base(tokenizer), "default", 0).merge_and_unload().save_pretrained(folder / "c0")
    tokenizer.save_pretrained(folder / "c0")
    own_classifier(tokenizer).save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    texts = draw_prompts(random.Random(1), 9, LENGTHS_IN, 0)
    write_lines(folder / "q.jsonl", [{"question_id": n, "category": "writing", "turns": [texts[n], texts[n + 1]]} for n in range(8)])  # fmt: skip
    return folder


@pytest.fixture
def command(models: Path, bench: Path) -> Callable[..., int]:
    """command(MODEL …, *options) → exit code."""

    def run(*words: str) -> int:
        given = [str(models / word) if (models / word).is_dir() else word for word in words]
        return main([*given, "--questions", str(models / "q.jsonl"), "--max-new-tokens", "8"])

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load_base(*_: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(StageContext, "load_base", load_base)


def answers(out: Path, name: str) -> list[list[str]]:
    return [
        row["choices"][0]["turns"] for row in read_json_lines(out / "data" / "q" / "model_answer" / f"{name}.jsonl")
    ]


class TestModels:
    """Answers are generated."""

    def test_an_adapter_answers_as_its_checkpoint(self, bench: Path, command: Callable[..., int]) -> None:
        """Greedy answers: ties throughout; base and another adapter say something else."""
        assert command("a0", "c0", "a1", "base", *LONGER, "--temperature", "0") == 0
        made = {name: answers(bench / "judged", name) for name in ("a0", "c0", "a1", "base")}
        assert made["a0"] == made["c0"] and made["a0"] != made["base"] and made["a0"] != made["a1"]
        assert all(len(turns) == 2 for turns in made["a0"]) and any(any(turns) for turns in made["a0"])
        pairs = judged(bench / "judged")[1]["datasets"]["q"]["pairs"]
        assert (pairs[0]["a"], pairs[0]["b"], pairs[0]["ties"]) == ("a0", "c0", 16)

    def test_answers_are_kept(self, bench: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        """Sampled answers: a command that was stopped within a model gives what an undisturbed one gives; a second
        command generates nothing, another seed everything."""
        assert command("a0", "base", *LONGER, "--batch-size", "3") == 0
        whole = [answers(bench / "judged", name) for name in ("a0", "base")]
        shutil.rmtree(bench / "judged")
        import salsa_peft.evaluation.contestants.answer as answering

        kept, real = [], answering.append_checked_lines

        def stop_after_two(path: Path, rows: Any) -> None:
            if len(kept) == 2:
                raise KeyboardInterrupt
            kept.append(path)
            real(path, rows)

        with monkeypatch.context() as patch:
            patch.setattr(answering, "append_checked_lines", stop_after_two)
            assert command("a0", "base", *LONGER, "--batch-size", "3") == 130
        assert command("a0", "base", *LONGER, "--batch-size", "3") == 0
        assert [answers(bench / "judged", name) for name in ("a0", "base")] == whole
        with monkeypatch.context() as patch:
            patch.setattr(StageContext, "load_base", lambda self: pytest.fail("weights were loaded"))
            assert command("a0", "base", *LONGER, "--batch-size", "3") == 0
        assert command("a0", "base", *LONGER, "--batch-size", "3", "--seed", "1") == 0
        assert [answers(bench / "judged", name) for name in ("a0", "base")] != whole

    def test_with_a_file(self, bench: Path, command: Callable[..., int], models: Path) -> None:
        """A model against ready answers, in the given order."""
        write_lines(bench / "ready.jsonl", fastchat("x", {n: ["x" * 99, ""] for n in range(8)}))
        assert command("ready.jsonl", "base", *LONGER) == 0
        (pair,) = judged(bench / "judged")[1]["datasets"]["q"]["pairs"]
        assert (pair["a"], pair["b"]) == ("ready", "base") and pair["turns"]["1"]["wins"] == 8

    def test_a_dry_run_answers_nothing(self, bench: Path, command: Callable[..., int], no_weights: None, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
        assert command("a0", "base", *LONGER, "--dry-run") == 0
        said = capsys.readouterr().err
        assert "a0: adapter" in said and "32 comparisons (1 pair, both orders)" in said
        assert not (bench / "judged").exists()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("a0", "base", "--max-new-tokens", "64"), "--max-new-tokens: 64 leaves no room for a question"),
            (("a0", "base", "--temperature", "-1"), "--temperature: must be 0 or more"),
            (("a0", "base", "--chat-template", "chatmal"), "--chat-template: there is no file chatmal"),
            (
                ("a0", "base", "--base", "nowhere"),
                "a0 is an adapter on nowhere: https://huggingface.co/nowhere: not in the local cache",
            ),
            (("a0", "classifier"), "is a classifier, which writes no answers"),
            (("a0", "mixed"), "holds neither an adapter"),
            (("a0", "wide"), "do not match"),
            (("a0", "bare"), "--chat-template: "),
        ],
    )
    def test_mistakes(self, models: Path, command: Callable[..., int], no_weights: None, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str) -> None:  # fmt: skip
        """Seen before weights are loaded."""
        (models / "mixed").mkdir(exist_ok=True)
        if "wide" in words and not (models / "wide").exists():
            make_adapter(make_base(make_tokenizer(), hidden_size=16), "default", 0).save_pretrained(models / "wide")
            config = json.loads((models / "wide" / "adapter_config.json").read_text())
            (models / "wide" / "adapter_config.json").write_text(
                json.dumps({**config, "base_model_name_or_path": "base"})
            )
        if "bare" in words and not (models / "bare").exists():
            shutil.copytree(models / "base", models / "bare")
            (models / "bare" / "chat_template.jinja").unlink()
        given = [str(models / word) if (models / word).is_dir() else word for word in words]
        more = [] if "--max-new-tokens" in words else ["--max-new-tokens", "8"]
        assert main([*given, "--questions", str(models / "q.jsonl"), *LONGER, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("salsa judge: ") and expected in said and "\n" not in said, said

    def test_questions_without_room_are_left_out_for_all(self, bench: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
        words = draw_prompts(random.Random(1), 1, LENGTHS_IN, 0)[0]
        write_lines(bench / "q2.jsonl", [{"question_id": n, "turns": [(words + " ") * (n * 20 + 1)]} for n in range(2)])
        write_lines(bench / "ready.jsonl", fastchat("x", {0: ["x"], 1: ["y"]}))
        options = ["--questions", "q2.jsonl", *LONGER, "--max-new-tokens", "8"]
        assert main(["ready.jsonl", str(models / "base"), *options]) == 0
        assert "base: 1 of 2 questions leave no room for 8 tokens" in capsys.readouterr().err
        assert [row["question_id"] for row in judged(bench / "judged")[0]] == [0]


class TestRewards:
    """A judge of kind reward."""

    def test_a_function(self, bench: Path) -> None:
        """It gets every text as it is."""
        assert main(["gpt-4", "llama", *BENCH, "--judge", "reward", "--reward", "judges_of_the_test.py:size"]) == 0
        assert [row["winner"] for row in judged(bench / "judged")[0]] == ["a", "b", "tie", "b", "tie", "b"]

    def test_a_classifier_and_a_reward_adapter(self, bench: Path, models: Path, tmp_path: Path) -> None:
        """The score that each gives to question and answer by itself."""
        import torch
        from tiny_classifiers import single
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = models / "classifier"
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        asked = read_json_lines(models / "q.jsonl")
        texts = {name: [one["turns"][place] for one in asked] for name, place in (("x", 0), ("y", 1))}
        write_lines(bench / "one.jsonl", [{"question_id": n, "prompt": one["turns"][0]} for n, one in enumerate(asked)])
        for name, of in texts.items():
            write_lines(bench / f"{name}.jsonl", [{"question_id": n, "answer": text} for n, text in enumerate(of)])
        options = ["--questions", "one.jsonl", "--judge", "reward", "--reward", str(folder)]
        assert main(["x.jsonl", "y.jsonl", *options]) == 0

        def score(n: int, text: str) -> float:
            chat = [{"role": "user", "content": asked[n]["turns"][0]}, {"role": "assistant", "content": text}]
            return single(classifier, tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])

        rows = judged(bench / "judged")[0]
        for n, row in enumerate(rows):
            first, second = (score(n, texts[name][n]) for name in ("x", "y"))
            assert row["winner"] == ("a" if first > second else "b" if second > first else "tie")
            assert row["told"][0] == f"scores {first:.4f} and {second:.4f}"


def test_results_of_a_run(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN/NAME is the current result of that name; the run itself, and its reward model, are no models."""
    run = make_run(bench, make_tokenizer(), lambda: make_base(make_tokenizer()), make_adapter)
    texts = draw_prompts(random.Random(1), 3, LENGTHS_IN, 0)
    write_lines(bench / "q.jsonl", [{"prompt": text} for text in texts])
    options = ["--questions", "q.jsonl", *LONGER, "--max-new-tokens", "8"]
    assert main(["run/salsa", "run/seed-0", "run/soup", *options, "--baseline", "seed-0"]) == 0
    pairs = judged(bench / "judged")[1]["datasets"]["q"]["pairs"]
    assert [(one["a"], one["b"]) for one in pairs] == [("salsa", "seed-0"), ("soup", "seed-0")]
    capsys.readouterr()
    for word, expected in (
        ("run", "run is the folder of a whole run; name one of its models, such as run/soup"),
        ("run/reward", "run/reward is the adapter of a classifier (task_type SEQ_CLS), which writes no answers"),
        ("run/sals", "this recipe has no result 'sals'; did you mean salsa?"),
    ):
        assert main([word, "run/soup", *options]) == 2
        assert expected in capsys.readouterr().err
    assert str(run) == str(bench / "run")
    with pytest.raises(SalsaError, match="no judge"):
        judge_section(["nobody"])


@pytest.mark.slow
def test_of_the_hub(models: Path, bench: Path) -> None:
    """A model and an adapter of a Hub; a mistake is found before the base's weights are downloaded."""
    config = json.loads((models / "a0" / "adapter_config.json").read_text())
    with hub() as server:
        for name in ("base", "a0"):
            server.repos[f"tester/{name}"] = repo = Repo()
            repo.commits[-1].files.update({path.name: path.read_bytes() for path in (models / name).iterdir()})
        changed = {**config, "base_model_name_or_path": "tester/base"}
        repo.commits[-1].files["adapter_config.json"] = json.dumps(changed).encode()
        options = ["--questions", str(models / "q.jsonl"), *LONGER, "--max-new-tokens"]

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "salsa_peft.cli.judge", "tester/a0", *words],
                env=server.environment(bench / "home") | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
            )  # fmt: skip

        def weights() -> list[str]:
            return [one.path for one in server.requests if "/tester/base/" in one.path and "safetensors" in one.path]

        for words, expected in ((("tester/nobody", *options, "8"), "tester/nobody: not found"),
                                (("tester/base", *options, "64"), "leaves no room")):  # fmt: skip
            found = run(*words)
            assert (found.returncode, weights()) == (2, []) and expected in found.stderr, found.stderr
        found = run("tester/base", *options, "8", "--temperature", "0")
        assert found.returncode == 0 and weights(), found.stderr
        hub_answers = [answers(bench / "judged", name) for name in ("a0", "base")]
    words = [str(models / "a0"), str(models / "base"), *options, "8", "--temperature", "0", "--output-dir", "local"]
    assert main(words) == 0
    assert [answers(bench / "local", name) for name in ("a0", "base")] == hub_answers


def test_ready_answers_and_an_endpoint_need_no_torch(bench: Path) -> None:
    """A dry run is done before torch or transformers would have been imported."""
    words = ["gpt-4", "llama", *BENCH, "--judge", "openai", "model=m", "base_url=http://localhost:1/v1", "--dry-run"]
    code = f"import sys; from salsa_peft.cli.judge import main; code = main({words!r}); print(code, 'torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == ["0", "False"], found.stderr

"""The judge stage: a judge compares the answers of each pair of models, turn by turn, in both orders.

A model wins a turn only if it wins in both orders (FastChat's rule). Replies are stored in <run>/judge_cache.sqlite as
soon as they arrive: after a killed run no answered request is repeated, and if a pair is added to the recipe, only
the requests of that pair are sent. It also compares seed-0's best of n responses by the reward with one response, which
shows before any RL what the reward is worth.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config import sweeps
from salsa_peft.config.job import Job
from salsa_peft.config.judge import read_references
from salsa_peft.evaluation import comparisons, fastchat
from salsa_peft.evaluation.judge_statistics import Judgment, pair_result
from salsa_peft.evaluation.judges.prompts import Comparison, Verdict
from salsa_peft.evaluation.judges.registry import PairwiseJudge, judge_of
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.files import read_json_lines, write_atomic
from salsa_peft.utils.statistics import holm

CACHE = "judge_cache.sqlite"
SAMPLES, BEST, ONE = "prompts", "best of n", "one response"
"""Names of PPO's prompts as a set of questions, and of seed-0's best response by the reward and first response."""
TIE = Verdict("tie", prompt="", text="", asked=0)
Pairs = list[tuple[str, str]]
BOTH = {"A": ("a", "b"), "B": ("b", "a"), "tie": ("tie", "tie"), None: ("missing", "missing")}
"""Winner of a comparison → (winning model if a's answer was shown first, winning model if b's was)."""


@dataclass(frozen=True)
class Dataset:
    """One set of questions with all models' answers, read from the evaluate stage's files."""

    questions: list[dict[str, Any]]
    answers: dict[tuple[str, int], list[dict[str, Any]]]
    """(model, index of the question) → rows of the model's answers, one for each turn."""


class Match(NamedTuple):
    """One turn of one question, answered by two models."""

    dataset: str
    question: dict[str, Any]
    turn: int
    a: str
    b: str


def read_answers(folder: Path) -> dict[str, Dataset]:
    """Read the evaluate stage's folder; returns name of a set → its questions and answers."""
    found: dict[str, Dataset] = {}
    for row in read_json_lines(folder / "questions.jsonl"):
        found.setdefault(row["dataset"], Dataset([], {})).questions.append(row)
    for row in read_json_lines(folder / "answers.jsonl"):
        found[row["dataset"]].answers.setdefault((row["model"], row["index"]), []).append(row)
    return found


def with_references(datasets: dict[str, Dataset], path: str | None) -> dict[str, Dataset]:
    """Datasets with the reference answers of a file (`judge.references`) in place of the questions' own."""
    if path is None:
        return datasets
    found = read_references(path)
    return {
        name: replace(of, questions=[{**one, "reference": found.get(str(one["question_id"]))} for one in of.questions])
        for name, of in datasets.items()
    }


def matches(datasets: dict[str, Dataset], pairs: Pairs, sets: Iterable[str]) -> list[Match]:
    """The matches of all pairs on all given sets of questions, one for each turn of each question."""
    return [
        Match(name, question, turn, a, b)
        for a, b in pairs
        for name in sets
        for question in datasets[name].questions
        for turn in range(1, len(question["turns"]) + 1)
    ]


def both_orders(match: Match, datasets: dict[str, Dataset]) -> list[Comparison]:
    """The two comparisons of a match: a's answer shown first, then b's."""
    question, turn = match.question, match.turn
    rows = [datasets[match.dataset].answers[model, question["index"]][:turn] for model in (match.a, match.b)]
    answers = [tuple(row["response"] for row in of) for of in rows]
    scores = [of[-1]["scores"].get("reward") for of in rows]
    references = tuple(question["reference"][:turn]) if question["reference"] else None
    turns = (_opening(question["messages"]), *question["turns"][1:turn])
    return [
        Comparison(turns=turns, a=answers[x], b=answers[y], turn=turn, category=question["category"], references=references,
                   scores=None if None in scores else (scores[x], scores[y]))
        for x, y in ((0, 1), (1, 0))
    ]  # fmt: skip


def _opening(messages: Sequence[dict[str, str]]) -> str:
    """The text that the first answer replies to: the only message, or all messages with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def judgment_row(match: Match, datasets: dict[str, Dataset], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """A row of judgments.jsonl: the winner in each order (a, b, tie, missing), and the match's winner."""
    first, second = BOTH[verdicts[0].winner][0], BOTH[verdicts[1].winner][1]
    rows = [datasets[match.dataset].answers[model, match.question["index"]] for model in (match.a, match.b)]
    lengths = [of[match.turn - 1]["length"] for of in rows]
    judgment = Judgment(match.question["index"], match.turn, first, second, *lengths)
    return {
        "dataset": match.dataset,
        **{key: match.question[key] for key in ("question_id", "index", "category")},
        "turn": match.turn,
        "a": match.a,
        "b": match.b,
        "first": first,
        "second": second,
        "winner": judgment.winner,
        "tie_kind": judgment.tie_kind,
        "lengths": lengths,
        "told": [verdict.text for verdict in verdicts],
    }


def statistics(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rates, interval and test of one pair from rows of judgments.jsonl, of one or several sets."""
    judgments = [
        Judgment((row["dataset"], row["index"]), row["turn"], row["first"], row["second"], *row["lengths"])
        for row in rows
    ]
    return asdict(pair_result(judgments))


def results(rows: Sequence[dict[str, Any]], datasets: dict[str, Dataset]) -> dict[str, Any]:
    """Set of questions → results of its pairs; p_holm is corrected over the pairs of the set."""
    found = {}
    for name, dataset in datasets.items():
        of = [row for row in rows if row["dataset"] == name]
        if not of:
            continue
        named = list(dict.fromkeys((row["a"], row["b"]) for row in of))
        pairs = [{"a": a, "b": b} | statistics(row for row in of if (row["a"], row["b"]) == (a, b)) for a, b in named]
        corrected = holm([pair["p_value"] for pair in pairs])
        found[name] = {
            "questions": len(dataset.questions),
            "turns": max(len(question["turns"]) for question in dataset.questions),
            "pairs": [pair | {"p_holm": p} for pair, p in zip(pairs, corrected, strict=True)],
        }
    return found


def read_samples(folder: Path) -> Dataset:
    """Read the reward_quality stage's folder: its prompts, and seed-0's best response by the reward and first response."""
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in read_json_lines(folder / "samples.jsonl"):
        by_prompt.setdefault(row["index"], []).append(row)
    found = Dataset([], {})
    for index, rows in by_prompt.items():
        prompt = rows[0]["prompt"]
        asked = {"messages": [{"role": "user", "content": prompt}], "turns": [prompt], "reference": None}
        found.questions.append({"question_id": index, "index": index, "category": None, **asked})
        found.answers[BEST, index] = [max(rows, key=lambda row: row["scores"]["reward"])]
        found.answers[ONE, index] = rows[:1]
    return found


def judge_best_of_n(job: Job, judge: PairwiseJudge) -> dict[str, Any]:
    """Statistics of seed-0's best of n responses by the reward against one response; equal responses tie unasked."""
    samples = {SAMPLES: read_samples(job.inputs["reward_quality"])}
    different, rows = [], []
    for match in matches(samples, [(BEST, ONE)], samples):
        best, one = (samples[SAMPLES].answers[name, match.question["index"]][0] for name in (BEST, ONE))
        if best["response"] != one["response"]:
            different.append(match)
        else:
            rows.append(judgment_row(match, samples, [TIE, TIE]))
    asked = [comparison for match in different for comparison in both_orders(match, samples)]
    with progress_bar(len(asked), f"{job.unit.id} best of n") as bar:
        verdicts = judge(asked, bar.update)
    for match, *both in zip(different, verdicts[::2], verdicts[1::2], strict=True):
        rows.append(judgment_row(match, samples, both))
    return {"responses": job.recipe.reward.quality_responses, **statistics(rows)}


class Judged(NamedTuple):
    """Matches that a judge has decided."""

    rows: list[dict[str, Any]]
    """Rows of judgments.jsonl."""
    prompts: list[tuple[str, str]]
    """The judge's prompts in both orders, for each row."""


def judge_matches(todo: Sequence[Match], datasets: dict[str, Dataset], judge: PairwiseJudge, title: str) -> Judged:
    """Let the judge decide matches, under a progress bar with this title."""
    asked = [comparison for match in todo for comparison in both_orders(match, datasets)]
    with progress_bar(len(asked), title) as bar:
        verdicts = judge(asked, bar.update)
    orders = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    rows = [judgment_row(match, datasets, both) for match, both in zip(todo, orders, strict=True)]
    return Judged(rows, [(first.prompt, second.prompt) for first, second in orders])


def run(job: Job) -> dict[str, Any]:
    """Run the stage: write judgments.jsonl, verdicts.json and the files for FastChat and arena-hard-auto."""
    recipe, section = job.recipe, job.recipe.evaluate.judge
    assert section is not None
    datasets = with_references(read_answers(job.inputs["evaluate"]), section.references)
    searched = comparisons.searched(
        recipe, comparisons.by_set(read_json_lines(job.inputs["evaluate"] / "answers.jsonl"))
    )
    judge = judge_of(section, cache=job.run_folder / CACHE, say=lambda line: print(f"{job.unit.id}  {line}"))
    rows, prompts = Judged([], [])

    # 1. for a search by the judge: the candidates
    if recipe.search is not None and recipe.search.by == "judge":
        trials = sweeps.candidate_pairs(recipe)
        candidates = matches(datasets, trials, recipe.search.questions or list(datasets))
        rows, prompts = judge_matches(candidates, datasets, judge, job.unit.id)
        rates = {a: statistics(row for row in rows if (row["a"], row["b"]) == (a, b)) for a, b in trials}
        searched = sweeps.pick_candidates(recipe, rates, list(datasets))
    # 2. the recipe's pairs, with the picked candidate in place of a searched policy
    there = {(row["a"], row["b"], row["dataset"]) for row in rows}
    todo = matches(datasets, sweeps.with_picked(sweeps.compared_pairs(recipe), searched), list(datasets))
    todo = [match for match in todo if (match.a, match.b, match.dataset) not in there]
    more = judge_matches(todo, datasets, judge, job.unit.id)
    rows, prompts = [*rows, *more.rows], [*prompts, *more.prompts]
    # 3. the reward, by the responses of seed-0 that it prefers
    best = judge_best_of_n(job, judge) if recipe.judges_best_of_n else None
    # 4. rates, and all files
    fastchat.write_judgments(job.folder, section, rows, prompts)
    result = {
        "judge": {"kind": section.kind, "model": section.model, "prompt": section.prompt},
        "calls": dict(judge.calls),
        "datasets": results(rows, datasets),
        "search": searched,
        "best_of_n": best,
    }
    write_atomic(job.folder / "verdicts.json", json.dumps(result, indent=2))
    return {**judge.calls, "judgments": len(rows), "missing": sum(row["winner"] == "missing" for row in rows)}

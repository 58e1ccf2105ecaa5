"""What `salsa judge` does after its arguments have been checked: answers, verdicts, files and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config.judge import Judge
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.data.questions import Question
from salsa_peft.evaluation import fastchat
from salsa_peft.evaluation.contestants.dataset import as_dataset
from salsa_peft.evaluation.contestants.find import Contestant
from salsa_peft.evaluation.contestants.recorded import Judgments, judged_before
from salsa_peft.evaluation.judges.registry import PairwiseJudge
from salsa_peft.evaluation.judges.stage import judge_matches, matches, results, with_references
from salsa_peft.report.gather import last_part
from salsa_peft.report.sections.judged import report_input, write_judge_report
from salsa_peft.utils.console import progress_bar, say
from salsa_peft.utils.files import write_atomic

if TYPE_CHECKING:
    from salsa_peft.evaluation.contestants.answer import AnsweringModel
    from salsa_peft.evaluation.contestants.score import AnswerScorer

ANSWERS = "answers"
"""Name of the folder with the models' answers, from which a stopped command goes on."""


class Plan(NamedTuple):
    """Everything that a command compares, checked; no weights have been loaded."""

    judge: tuple[Judge, PairwiseJudge] | None
    """The judge's settings and the judge. None: there are ready judgments."""
    judgments: Judgments
    """The ready judgments."""
    name: str
    """Name of the set of questions."""
    questions: list[Question]
    """The questions to judge."""
    contestants: list[Contestant]
    texts: dict[str, list[tuple[str, ...]]]
    """Name → its ready answers, for contestants that are files."""
    models: list[AnsweringModel]
    """The other contestants, which have to answer."""
    scorer: AnswerScorer | None
    pairs: list[tuple[str, str]]

    @property
    def judge_facts(self) -> dict[str, Any]:
        """Kind and model of the judge, as in verdicts.json; the model is a reward for kind reward."""
        if self.judge is None:
            return {"kind": "ready judgments", "model": None, "prompt": None}
        section = self.judge[0]
        model = section.model if self.scorer is None else self.scorer.reward
        return {"kind": section.kind, "model": model, "prompt": section.prompt}


def say_plan(plan: Plan) -> None:
    """Print what is compared, and the number of comparisons."""
    turns, pairs = sum(len(question.turns) for question in plan.questions), len(plan.pairs)
    say(f"questions {plan.name}: {len(plan.questions)}, with {turns} turns in all")
    limits = {one.contestant.name: f", at most {one.new_tokens} tokens an answer" for one in plan.models}
    for one in plan.contestants:
        say(f"  {one.name}: {one.describe()}{limits.get(one.name, '')}")
    judge = " ".join(filter(None, (plan.judge_facts["kind"], plan.judge_facts["model"])))
    say(f"judge: {judge}, {2 * pairs * turns:,} comparisons ({pairs} pair{'s' * (pairs != 1)}, both orders)")


def compare(plan: Plan, out: Path, samples: int) -> dict[str, Any]:
    """Make the answers and verdicts that are missing, write all files and the report; returns verdicts.json."""
    name, questions = plan.name, plan.questions
    # 1. the answers, in the order of the contestants, and a reward's scores of them
    texts: dict[str, Any] = dict.fromkeys(one.name for one in plan.contestants)
    texts |= plan.texts | {one.contestant.name: answers_of(one, questions, out / ANSWERS) for one in plan.models}
    scores = None if plan.scorer is None else {one: scores_of(plan.scorer, questions, texts[one], one) for one in texts}
    references = None if plan.judge is None else plan.judge[0].references
    dataset = with_references({name: as_dataset(name, questions, texts, scores)}, references)
    rows = [row for of in dataset[name].answers.values() for row in of]
    by_model = {one: [row for row in rows if row["model"] == one] for one in texts}
    fastchat.write_answers(out / "data" / name, questions, by_model)
    # 2. the verdicts
    todo, calls, settings = matches(dataset, plan.pairs, [name]), dict[str, int](), dict[str, Any]()
    if plan.judge is None:
        judged = judged_before(todo, dataset, plan.judgments)
        write_atomic(out / "judgments.jsonl", fastchat.lines(judged.rows))
    else:
        section, judge = plan.judge
        judged = judge_matches(todo, dataset, judge, "judge")
        fastchat.write_judgments(out, section, judged.rows, judged.prompts)
        calls, settings = dict(judge.calls), asdict(section)
    verdicts = {"judge": plan.judge_facts, "calls": calls, "datasets": results(judged.rows, dataset)}
    write_atomic(out / "verdicts.json", json.dumps(verdicts, indent=2))
    # 3. the report
    shown = dump_yaml({key: last_part(value) if isinstance(value, str) else value for key, value in settings.items()})
    report = report_input(name, rows, judged.rows, verdicts, shown if settings else "", samples)
    write_judge_report(out, report, {one.name: one.describe(last_part) for one in plan.contestants})
    return verdicts


def answers_of(model: AnsweringModel, chosen: Sequence[Question], folder: Path) -> list[list[str]]:
    """The answers of a model to each turn of each question."""
    turns = sum(len(question.turns) for question in chosen)
    with progress_bar(turns, f"answers of {model.contestant.name}") as bar:
        rows = model.answer(chosen, folder, bar.update)
    found: list[list[str]] = [[] for _ in chosen]
    for row in rows:
        found[row["index"]].append(row["response"])
    return found


def scores_of(
    scorer: AnswerScorer, chosen: Sequence[Question], texts: Sequence[Sequence[str]], name: str
) -> list[list[float]]:
    """The reward's scores of a model's answers."""
    with progress_bar(sum(map(len, texts)), f"scores of {name}") as bar:
        return scorer(chosen, texts, bar.update)

"""`salsa judge`: compares the answers of models, adapters or answer files through a judge, without a recipe.

The answers and the judge's verdicts are kept in the output folder, so that the same command, run again, does only what
is missing.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salsa_peft.config.judge import Judge
from salsa_peft.config.paths import absolute_paths
from salsa_peft.config.schema import Source
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.soup.__main__ import positive_integer, run_command
from salsa_peft.utils.console import Parser, progress_bar, say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import locked, write_atomic
from salsa_peft.utils.messages import did_you_mean, short

if TYPE_CHECKING:
    from salsa_peft.data.questions import Question
    from salsa_peft.evaluation.contestants.answer import AnsweringModel
    from salsa_peft.evaluation.contestants.find import Contestant
    from salsa_peft.evaluation.contestants.score import AnswerScorer
    from salsa_peft.evaluation.judges.registry import PairwiseJudge

CACHE, ANSWERS = "judge_cache.sqlite", "answers"
EPILOG = """MODEL is a model or an adapter (folder or Hub id), RUN/NAME of a recipe's run
(runs/quickstart-lora/salsa), a file of answers (model_answer/*.jsonl of FastChat
or arena-hard-auto), or NAME=MODEL. KIND and KEY=VALUE are those of
`evaluate.judge` in a recipe.

  salsa judge A B --questions FILE --judge openai model=gpt-4-turbo
  salsa judge A B --questions FILE --judge openai model=M base_url=http://…/v1
  salsa judge A B --questions FILE --judge local model=Qwen/Qwen2.5-7B-Instruct
  salsa judge A B --questions FILE --judge my_judge.py:better
  salsa judge A B C --questions FILE --judge reward --reward R --baseline A
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = Parser(prog="salsa judge", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                  description="Compare the answers of two or more models through a judge, in both orders.")  # fmt: skip
    add = made.add_argument
    add("models", metavar="MODEL", nargs="*", help="two or more models, adapters or files of answers")
    add("--questions", metavar="FILE", help="questions or prompts: a file, a folder with question.jsonl, or a Hub id")
    add("--judge", metavar="KIND", nargs="+",
        help="openai, local, reward, module:name or file.py:name, and KEY=VALUE settings")  # fmt: skip
    add("--output-dir", metavar="DIR", type=Path, default=Path("judged"), help="results and cache (default: judged)")
    add("--baseline", metavar="NAME", help="compare all others with this model only (default: all pairs)")
    add(
        "--limit",
        metavar="N",
        type=positive_integer,
        help="number of questions, drawn with a fixed seed (default: all)",
    )
    add("--reward", metavar="R", help="judge reward: classifier or reward adapter (folder or Hub id), or module:name")
    add("--base", metavar="BASE", help="base of the adapters: folder or Hub id (default: the one that each names)")
    add("--chat-template", metavar="T", help="chatml, zephyr, plain or a Jinja file (default: each model's own)")
    add("--max-new-tokens", metavar="N", type=positive_integer, default=1024, help="longest answer (default: 1024)")
    add("--temperature", metavar="T", type=float,
        help="of the answers; 0 is greedy (default: FastChat's for the category, else 0.7)")  # fmt: skip
    add("--batch-size", metavar="N", type=positive_integer, default=16, help="questions answered at once (default: 16)")
    add("--seed", metavar="N", type=int, default=0, help="sampling seed of the answers (default: 0)")
    add("--quantization", choices=["nf4", "nf4-double"], help="load the models in 4 bits, as QLoRA does")
    add("--samples", metavar="N", type=positive_integer, default=20,
        help="number of questions whose answers the report shows (default: 20)")  # fmt: skip
    add("--dry-run", action="store_true", help="check everything and print the plan, without answering or judging")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa judge`. Returns 0, 2 after an error, or 130 after an interruption."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    return run_command("salsa judge", args, judge_and_report)


def question_file(given: str | None) -> tuple[str, str]:
    """The path or Hub id of the questions and the name of the set. Raises SalsaError if there is no such file."""
    if given is None:
        raise SalsaError("--questions: is required; give a file of questions or prompts, such as question.jsonl")
    path = Path(given).expanduser()
    path = path / "question.jsonl" if (path / "question.jsonl").is_file() else path
    local = path.exists()
    require(
        local or (given.count("/") == 1 and "." not in given.rsplit("/", 1)[-1][-8:]),
        f"--questions: there is no file {given}; give a file of questions or prompts",
    )
    from salsa_peft.evaluation.fastchat import file_stem

    place = path.resolve()
    stem = place.parent.name if place.name == "question.jsonl" else place.name.split(".")[0]
    return (str(path) if local else given), file_stem(stem if local else given)


class Plan(NamedTuple):
    """Everything that a command compares, checked; no weights have been loaded."""

    section: Judge
    judge: "PairwiseJudge"
    name: str
    """Name of the set of questions."""
    questions: list["Question"]
    """The questions to judge."""
    contestants: list["Contestant"]
    texts: dict[str, list[tuple[str, ...]]]
    """Name → its ready answers, for contestants that are files."""
    models: list["AnsweringModel"]
    """The other contestants, which have to answer."""
    scorer: "AnswerScorer | None"
    pairs: list[tuple[str, str]]

    @property
    def judge_model(self) -> str | None:
        """The judge's model, function or reward."""
        return self.section.model if self.scorer is None else self.scorer.reward


def judge_and_report(args: argparse.Namespace, accepted: Callable[[], None]) -> None:
    """Check everything, let the models answer, let the judge compare the answers, and write the report."""
    plan = checked(args)
    accepted()
    say_plan(plan)
    if args.dry_run:
        return
    out = args.output_dir
    with locked(out):
        verdicts = compare(plan, out, args.samples)
    from rich.console import Console

    from salsa_peft.report.sections.judged import print_table

    print_table(verdicts, Console(highlight=False))
    print(
        f"\nreport: {out}/report.html and report.md\nfiles for FastChat: {out}/data, for arena-hard-auto: {out}/arena"
    )


def checked(args: argparse.Namespace) -> Plan:
    """The plan of a command. Raises SalsaError for a mistake in its arguments or files."""
    from salsa_peft.evaluation.judges.words import judge_section

    section = judge_section(args.judge)
    path, name = question_file(args.questions)
    require(
        (section.kind == "reward") == (args.reward is not None),
        "--reward: a judge of kind reward needs a classifier, reward adapter or function; add --reward R"
        if args.reward is None
        else f"--reward: has no effect with a judge of kind {section.kind}; leave it out, or use --judge reward",
    )
    out = args.output_dir
    require(
        not (out / "recipe.yaml").exists(),
        f"--output-dir: {out} is the folder of a recipe's run; choose another folder",
    )
    from salsa_peft.data.questions import questions
    from salsa_peft.evaluation.contestants.find import find_contestants
    from salsa_peft.evaluation.fastchat import read_answers
    from salsa_peft.evaluation.judges.registry import judge_of

    contestants = find_contestants(args.models, Path(path), args.base)
    pairs = model_pairs([one.name for one in contestants], args.baseline)
    everything = questions(Source(path=path), columns=args.reward is not None)
    ready = {one.name: read_answers(str(one.file), everything) for one in contestants if one.file is not None}
    cache = None if args.dry_run else out / CACHE
    judge = judge_of(section, cache=cache, say=say, where="--judge")
    models = answering_models(args, contestants)
    scorer = answer_scorer(args)
    asked = chosen_questions(args, everything, models)
    texts = {one: [answers[index] for index in asked] for one, answers in ready.items()}
    chosen = [everything[index] for index in asked]
    return Plan(section, judge, name, chosen, contestants, texts, models, scorer, pairs)


def compare(plan: Plan, out: Path, samples: int) -> dict[str, Any]:
    """Make the answers and verdicts that are missing, write all files and the report; returns verdicts.json."""
    from salsa_peft.evaluation import fastchat
    from salsa_peft.evaluation.contestants.dataset import as_dataset
    from salsa_peft.evaluation.judges.stage import judge_matches, matches, results, with_references
    from salsa_peft.report.gather import last_part
    from salsa_peft.report.sections.judged import report_input, write_judge_report

    section, name, questions = plan.section, plan.name, plan.questions
    # 1. the answers, in the order of the contestants, and a reward's scores of them
    texts: dict[str, Any] = dict.fromkeys(one.name for one in plan.contestants)
    texts |= plan.texts | {one.contestant.name: answers_of(one, questions, out / ANSWERS) for one in plan.models}
    scores = None if plan.scorer is None else {one: scores_of(plan.scorer, questions, texts[one], one) for one in texts}
    # 2. the verdicts
    dataset = with_references({name: as_dataset(name, questions, texts, scores)}, section.references)
    judged = judge_matches(matches(dataset, plan.pairs, [name]), dataset, plan.judge, "judge")
    verdicts = {
        "judge": {"kind": section.kind, "model": plan.judge_model, "prompt": section.prompt},
        "calls": dict(plan.judge.calls),
        "datasets": results(judged.rows, dataset),
        "search": None,
        "best_of_n": None,
    }
    # 3. files and the report
    rows = [row for of in dataset[name].answers.values() for row in of]
    by_model = {one: [row for row in rows if row["model"] == one] for one in texts}
    fastchat.write_answers(out / "data" / name, questions, by_model)
    fastchat.write_judgments(out, section, judged.rows, judged.prompts)
    write_atomic(out / "verdicts.json", json.dumps(verdicts, indent=2))
    settings = {key: last_part(value) if isinstance(value, str) else value for key, value in asdict(section).items()}
    report = report_input(name, rows, judged.rows, verdicts, dump_yaml(settings), samples)
    write_judge_report(out, report, {one.name: one.what for one in plan.contestants})
    return verdicts


def model_pairs(names: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """The pairs to compare: all, or all others with the baseline, which then is the second of each pair."""
    if baseline is None:
        return list(itertools.combinations(names, 2))
    require(
        baseline in names,
        f"--baseline: {short(baseline)} is none of the models; {did_you_mean(baseline, list(names), 'models')}",
    )
    return [(name, baseline) for name in names if name != baseline]


def answering_models(args: argparse.Namespace, contestants: Sequence["Contestant"]) -> list["AnsweringModel"]:
    """The contestants that have to answer, checked, without their weights."""
    template = args.chat_template
    if template is not None:
        template = absolute_paths({"model": {"chat_template": template}}, os.getcwd())["model"]["chat_template"]
        require(
            os.path.isfile(template),
            f"--chat-template: there is no file {template}; use chatml, zephyr, plain or a file",
        )
    require(
        args.temperature is None or (math.isfinite(args.temperature) and args.temperature >= 0),
        f"--temperature: must be 0 or more, not {args.temperature}",
    )
    todo = [one for one in contestants if one.file is None]
    if not todo:
        return []
    from salsa_peft.evaluation.contestants.answer import AnsweringModel, AnswerSettings

    names = [field.name for field in fields(AnswerSettings)]
    settings = AnswerSettings(**{**{name: vars(args)[name] for name in names}, "chat_template": template})
    return [AnsweringModel(one, settings) for one in todo]


def answer_scorer(args: argparse.Namespace) -> "AnswerScorer | None":
    """The reward of a judge of kind reward, without its weights; None for other judges."""
    if args.reward is None:
        return None
    from salsa_peft.evaluation.contestants.score import AnswerScorer

    return AnswerScorer(args.reward, args.base)


def chosen_questions(
    args: argparse.Namespace, everything: Sequence["Question"], models: Sequence["AnsweringModel"]
) -> list[int]:
    """Indices of the questions to judge: at most --limit, without those that are too long for a model.

    Raises SalsaError if no question is left.
    """
    indices = list(range(len(everything)))
    if args.limit is not None and args.limit < len(indices):
        indices = sorted(random.Random(0).sample(indices, args.limit))
    for model in models:
        long = model.too_long([everything[index] for index in indices])
        if long:
            say(
                f"{model.contestant.name}: {len(long)} of {len(indices)} questions leave no room for"
                f" {args.max_new_tokens} tokens (--max-new-tokens); they are left out for all models"
            )
        indices = [index for place, index in enumerate(indices) if place not in long]
    require(bool(indices), "--questions: every question is too long for one of the models; set --max-new-tokens lower")
    return indices


def say_plan(plan: Plan) -> None:
    """Print what is compared, and the number of comparisons."""
    turns, pairs = sum(len(question.turns) for question in plan.questions), len(plan.pairs)
    say(f"questions {plan.name}: {len(plan.questions)}, with {turns} turns in all")
    for one in plan.contestants:
        say(f"  {one.name}: {one.what}")
    judge = " ".join(filter(None, (plan.section.kind, plan.judge_model)))
    say(f"judge {judge}: {2 * pairs * turns:,} comparisons ({pairs} pair{'s' * (pairs != 1)}, both orders)")


def answers_of(model: "AnsweringModel", chosen: Sequence["Question"], folder: Path) -> list[list[str]]:
    """The answers of a model to each turn of each question."""
    turns = sum(len(question.turns) for question in chosen)
    with progress_bar(turns, f"answers of {model.contestant.name}") as bar:
        rows = model.answer(chosen, folder, bar.update)
    found: list[list[str]] = [[] for _ in chosen]
    for row in rows:
        found[row["index"]].append(row["response"])
    return found


def scores_of(
    scorer: "AnswerScorer", chosen: Sequence["Question"], texts: Sequence[Sequence[str]], name: str
) -> list[list[float]]:
    """The reward's scores of a model's answers."""
    with progress_bar(sum(map(len, texts)), f"scores of {name}") as bar:
        return scorer(chosen, texts, bar.update)


if __name__ == "__main__":
    raise SystemExit(main())

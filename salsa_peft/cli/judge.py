"""`salsa judge`: compares the answers of models, adapters or answer files through a judge, without a recipe.

The answers and the judge's verdicts are kept in the output folder, so that the same command, run again, does only what
is missing.
"""

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from salsa_peft.config.judge import Judge
from salsa_peft.config.paths import absolute_paths
from salsa_peft.config.schema import Source
from salsa_peft.soup.__main__ import positive_integer, run_command
from salsa_peft.utils.console import Parser, say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import locked
from salsa_peft.utils.hub import HUB_ID
from salsa_peft.utils.messages import did_you_mean, short

if TYPE_CHECKING:
    from salsa_peft.cli.judging import Plan
    from salsa_peft.data.questions import Question
    from salsa_peft.evaluation.contestants.answer import AnsweringModel
    from salsa_peft.evaluation.contestants.find import Contestant
    from salsa_peft.evaluation.contestants.score import AnswerScorer

CACHE = "judge_cache.sqlite"
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
    add("--judgments", metavar="PATH", type=Path,
        help="in place of --judge: ready judgments, FastChat's …_pair.jsonl or a file or folder of arena-hard-auto's")  # fmt: skip
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
    add("--max-new-tokens", metavar="N", type=positive_integer,
        help="longest answer (default: 1024, or half of what the model reads)")  # fmt: skip
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
    from salsa_peft.data.files import data_suffix
    from salsa_peft.evaluation.fastchat import file_stem

    require(
        local or (data_suffix(given) is None and "/" in given and HUB_ID.match(given) is not None),
        f"--questions: there is no file {given}; give a file of questions or prompts",
    )

    place = path.resolve()
    stem = place.parent.name if place.name == "question.jsonl" else place.name.split(".")[0]
    return (str(path) if local else given), file_stem(stem if local else given)


def judge_and_report(args: argparse.Namespace, accepted: Callable[[], None]) -> None:
    """Check everything, let the models answer, let the judge compare the answers, and write the report."""
    plan = checked(args)
    accepted()
    from salsa_peft.cli.judging import compare, say_plan

    say_plan(plan)
    if args.dry_run:
        return
    out = args.output_dir
    with locked(out):
        verdicts = compare(plan, out, args.samples)
    from rich.console import Console

    from salsa_peft.report.sections.judged import print_table

    print_table(verdicts, Console(highlight=False))
    print(f"\nreport: {out}/report.html and report.md")
    if plan.judge is not None:
        print(f"files for FastChat: {out}/data, for arena-hard-auto: {out}/arena")


def checked(args: argparse.Namespace) -> "Plan":
    """The plan of a command. Raises SalsaError for a mistake in its arguments or files."""
    from salsa_peft.data.questions import questions
    from salsa_peft.evaluation.contestants.find import find_contestants
    from salsa_peft.evaluation.fastchat import read_answers

    section = checked_judge(args)
    path, name = question_file(args.questions)
    contestants = find_contestants(args.models, Path(path), args.base)
    pairs = model_pairs([one.name for one in contestants], args.baseline)
    everything = questions(Source(path=path), columns=args.reward is not None)
    ready = {one.name: read_answers(str(one.file), everything) for one in contestants if one.file is not None}
    judge, judgments = None, {}
    if section is not None:
        from salsa_peft.evaluation.judges.registry import judge_of

        cache = None if args.dry_run else args.output_dir / CACHE
        judge = (section, judge_of(section, cache=cache, say=say, where="--judge"))
    else:
        from salsa_peft.evaluation.contestants.recorded import read_judgments, require_judged

        judgments = read_judgments(args.judgments, args.baseline)
    models = answering_models(args, contestants)
    scorer = answer_scorer(args)
    asked = chosen_questions(args, everything, models)
    texts = {one: [answers[index] for index in asked] for one, answers in ready.items()}
    chosen = [everything[index] for index in asked]
    if judge is None:
        require_judged(judgments, pairs, chosen)
    from salsa_peft.cli.judging import Plan

    return Plan(judge, judgments, name, chosen, contestants, texts, models, scorer, pairs)


def checked_judge(args: argparse.Namespace) -> Judge | None:
    """The judge's settings; None with --judgments. Raises SalsaError for options that do not go together."""
    from salsa_peft.evaluation.judges.words import judge_section

    require(
        args.judge is None or args.judgments is None,
        "--judgments: has no effect with --judge; give one of the two",
    )
    section = None if args.judgments is not None else judge_section(args.judge)
    by_reward = section is not None and section.kind == "reward"
    require(
        args.reward is not None or not by_reward,
        "--reward: a judge of kind reward needs a classifier, reward adapter or function; add --reward R",
    )
    require(
        args.reward is None or by_reward,
        "--reward: works only with a judge of kind reward; leave it out, or use --judge reward",
    )
    out = args.output_dir
    require(
        not (out / "recipe.yaml").exists(),
        f"--output-dir: {out} is the folder of a recipe's run; choose another folder",
    )
    return section


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
                f" {model.new_tokens} tokens (--max-new-tokens); they are left out for all models"
            )
        indices = [index for place, index in enumerate(indices) if place not in long]
    require(bool(indices), "--questions: every question is too long for one of the models; set --max-new-tokens lower")
    return indices


if __name__ == "__main__":
    raise SystemExit(main())

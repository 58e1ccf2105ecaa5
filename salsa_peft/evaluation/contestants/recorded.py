"""Pairwise judgments that FastChat or arena-hard-auto has written, in place of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.schema import Source
from salsa_peft.data.files import load_rows
from salsa_peft.data.questions import Question, row_id
from salsa_peft.evaluation.fastchat import file_stem
from salsa_peft.evaluation.judges.prompts import Verdict
from salsa_peft.evaluation.judges.stage import Dataset, Judged, Match, judgment_row
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import listed, short

OPTION = "--judgments"
PAIRWISE = "give pairwise judgments of FastChat (…_pair.jsonl) or of arena-hard-auto (model_judgment/JUDGE/MODEL.jsonl)"
SCORES = {"A>>B": "A", "A>B": "A", "A=B": "tie", "B=A": "tie", "B>A": "B", "B>>A": "B", None: None}
"""arena-hard-auto's score of a game → the winner."""


Judgments = dict[tuple[str, int, str, str], tuple[Verdict, Verdict]]
"""(question id, turn, a, b), with the models' names as in file names → the verdict with a's answer shown first, and the one with b's shown first."""


def read_judgments(path: Path, baseline: str | None) -> Judgments:
    """The judgments of a file, or of all .jsonl files in a folder. Raises SalsaError for a row that is no judgment.

    baseline: the model against which arena-hard-auto compared, for rows that do not name it.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    require(bool(files) and files[0].is_file(), f"{OPTION}: there is no file {path}; {PAIRWISE}")
    found: Judgments = {}
    for file in files:
        for number, row in load_rows(Source(path=str(file))):
            where = f"{file}, row {number}"
            a, b, verdicts = _read(row, baseline, where)
            identity, turn = str(row_id(row, number, where)[1]), int(row.get("turn", 1))
            a, b = file_stem(a), file_stem(b)
            found[identity, turn, a, b] = verdicts
            found[identity, turn, b, a] = verdicts[::-1]
    return found


def _read(row: dict[str, Any], baseline: str | None, where: str) -> tuple[str, str, tuple[Verdict, Verdict]]:
    """Models a and b of a row, and the verdicts with a, and with b, shown first."""
    if {"model_1", "model_2", "g1_winner", "g2_winner"} <= row.keys():
        names = {"model_1": ("A", "B"), "model_2": ("B", "A"), "tie": ("tie", "tie"), "error": (None, None)}
        games = []
        for place, game in enumerate(("g1", "g2")):
            winner = row[f"{game}_winner"]
            require(winner in names, f"{where}: {game}_winner is {short(winner)}; it must be {', '.join(names)}")
            games.append(_verdict(names[winner][place], row.get(f"{game}_user_prompt"), row.get(f"{game}_judgment")))
        return str(row["model_1"]), str(row["model_2"]), (games[0], games[1])
    games_of = row.get("games")
    if not isinstance(games_of, list) or len(games_of) != 2 or not all(isinstance(one, dict) for one in games_of):
        raise SalsaError(f"{where}: is no pairwise judgment; {PAIRWISE}")
    other = row.get("baseline", baseline)
    if other is None:
        raise SalsaError(
            f"{where}: does not name the model that {row.get('model')} was compared with; add --baseline NAME"
        )
    games = []
    for game in games_of:
        score = game.get("score")
        require(score in SCORES, f"{where}: the score {short(score)} is none of {', '.join(filter(None, SCORES))}")
        text = game.get("judgment")
        text = text.get("answer") if isinstance(text, dict) else text
        games.append(_verdict(SCORES[score], None, text))
    # the first game shows the baseline first, so the second one is the one with the model first
    return str(row.get("model")), str(other), (games[1], games[0])


def _verdict(winner: str | None, prompt: Any, text: Any) -> Verdict:
    prompt, text = (one if isinstance(one, str) else "" for one in (prompt, text))
    return Verdict(winner, prompt, text, 1, "" if winner is not None else "no verdict")


def require_judged(found: Judgments, pairs: Sequence[tuple[str, str]], questions: Sequence[Question]) -> None:
    """Raise SalsaError unless there is a judgment of every turn of all pairs."""
    there, known = {key[2:] for key in found}, dict.fromkeys(f"{a} – {b}" for _, _, a, b in found)
    absent = [f"{a} – {b}" for a, b in pairs if (file_stem(a), file_stem(b)) not in there]
    require(not absent, f"{OPTION}: has no judgment of {listed(absent)}; it has {listed(list(known))}")
    turns = [(str(one.id), turn) for one in questions for turn in range(1, len(one.turns) + 1)]
    missing = [
        f"question {identity}, turn {turn}"
        for a, b in pairs
        for identity, turn in turns
        if (identity, turn, file_stem(a), file_stem(b)) not in found
    ]
    require(
        not missing,
        f"{OPTION}: {len(missing)} of {len(pairs) * len(turns)} turns have no judgment ({listed(missing)}); give the"
        " questions that were judged",
    )


def judged_before(todo: Sequence[Match], datasets: dict[str, Dataset], found: Judgments) -> Judged:
    """The recorded judgments of all matches."""
    both = [found[str(one.question["question_id"]), one.turn, file_stem(one.a), file_stem(one.b)] for one in todo]
    rows = [judgment_row(match, datasets, verdicts) for match, verdicts in zip(todo, both, strict=True)]
    return Judged(rows, [(first.prompt, second.prompt) for first, second in both])

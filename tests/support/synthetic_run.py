"""Numbers of an invented run in the shape of the quickstart's, for the tests of the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from salsa_peft.evaluation.judges import stage as judging
from salsa_peft.report.gather import PolicyReport, ReportInput
from salsa_peft.utils.statistics import compare_scores, mean_interval, paired_difference

SKILL = {"seed-0": 0.76, "base": 0.30, "soup": 0.825, "ppo": 0.81, "salsa": 0.845, "shrunk": 0.85, "mkl": 0.83}
REFERENCES = {"ppo": "seed-0", "salsa": "soup", "shrunk": "shrunk: base + 0.6 · seed-0", "mkl": "seed-0, seed-1"}


def synthetic(
    n: int = 96, policies: tuple[str, ...] = ("ppo", "salsa", "shrunk", "mkl"), gold: bool = True, small: bool = False
) -> ReportInput:
    """`n` prompts a dataset; `small` leaves the second dataset and the landscape out, for a report in a second."""
    rng = np.random.default_rng(0)
    measures = ["reward", "gold"] if gold else ["reward"]
    models = ["seed-0", "base", "soup", *policies]
    answers: list[dict[str, Any]] = []
    datasets = {}
    for dataset, loss in (("in", 0.0), ("out", 0.12))[: 1 if small else 2]:
        hard = rng.normal(0, 0.15, n)
        scores: dict[str, dict[str, np.ndarray]] = {}
        for model in models:
            good = np.clip(np.round(8 * (SKILL[model] - loss + hard + rng.normal(0, 0.2, n))) / 8, -0.5, 1)
            scores[model] = {"reward": 2.5 * good - 0.8 + rng.normal(0, 0.4, n), "gold": good}
            answers += [
                {
                    "dataset": dataset,
                    "index": i,
                    "turn": 1,
                    "prompt": f"list {2 + i % 3} fruit (question {i})",
                    "model": model,
                    "response": " ".join(rng.choice(["mopa", "tiru", "kesh", "lun", "bado"], 2 + i % 3)),
                    "scores": {m: float(scores[model][m][i]) for m in measures},
                    "length": 2 + i % 3,
                }
                for i in range(n)
            ]
        pairs = [
            {
                "a": a,
                "b": b,
                "measure": m,
                **asdict(compare_scores(scores[a][m], scores[b][m], 0.05)),
                "difference": asdict(paired_difference(scores[a][m], scores[b][m])),
            }
            for a, b in (("salsa", "ppo"), ("salsa", "seed-0"), ("ppo", "seed-0"), ("salsa", "shrunk"))
            if {a, b} <= set(models)
            for m in measures
        ]
        datasets[dataset] = {
            "n": n,
            "pairs": pairs,
            "models": {
                model: {
                    "scores": {m: asdict(mean_interval(scores[model][m])) for m in measures},
                    "response_length": asdict(mean_interval(rng.integers(2, 9, n))),
                    "empty_share": 0.0125,
                }
                for model in models
            },
        }
    return ReportInput(
        name="quickstart-lora",
        recipe_yaml="name: quickstart\nsft: {seeds: [0, 1, 2]}\nppo: {learning_rate: 1.0e-3}\n"
        + "# a line of recipe\n" * 60,
        mode="LoRA",
        base="toy (0.10 M parameters)",
        versions={"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"},
        units=[
            {
                "unit": unit,
                "key": f"{7919 * (i + 3):012x}",
                "seconds": 3.7 * i + 2.25,
                "peak_mb": 431.0 + 7 * i,
                "gpu_peak_mb": None,
                "gpu_planned_mb": None,
                "planned_seconds": None,
                "inputs": ["sft/seed-0", "soup"] if i > 5 else [],
            }
            for i, unit in enumerate(
                [
                    "world/base",
                    "sft/seed-0",
                    "sft/seed-1",
                    "sft/seed-2",
                    "reward",
                    "soup",
                    *(f"policy/{p}" for p in policies),
                    "landscape",
                    "evaluate",
                ]
            )
        ],
        seeds={f"seed-{i}": {"train_loss": 0.31 + i / 100, "rows": 256, "epochs": 12.0} for i in range(3)},
        reward={
            "accuracy": {"held_out": {"mean": 0.8125, "low": 0.79, "high": 0.835, "n": 1000}},
            "loss": 0.41,
            "pairs": {"train": 8000, "held_out": 1000},
        },
        soup={"members": ["seed-0", "seed-1"], "weights": [0.5, 0.5], "rank": 16},
        policies={name: policy(name, rng) for name in policies},
        landscape=None if small else landscape(rng, measures),
        evaluation={"measures": measures, "models": models, "temperature": 1.0, "datasets": datasets},
        answers=answers,
    )


def policy(name: str, rng: np.random.Generator, updates: int = 50) -> PolicyReport:
    start = 0.2 if name == "ppo" else 0.01
    rise = 1 - np.exp(-np.arange(updates) / 14)
    metrics = [
        {
            "update": i + 1,
            "episode": 128 * (i + 1),
            "objective/scores": float(0.6 + SKILL[name] * rise[i] + rng.normal(0, 0.06)),
            "objective/kl": float(
                (0.2 if name == "ppo" else 1.1) + 6 * rise[i] * (0.4 if name == "ppo" else 1) + rng.normal(0, 0.15)
            ),
            "objective/kl_coef": float(start * 1.012**i),
            "objective/response_length": float(5 + 0.6 * rise[i] + rng.normal(0, 0.1)),
        }
        for i in range(updates)
    ]
    completions = [
        {"update": u, "prompt": "name mopa tiru", "response": f"fruit tool at {u}", "score": 0.5 + u / 100, "kl": 0.7}
        for u in (1, updates)
    ]
    return PolicyReport(REFERENCES[name], start, metrics, completions)


def landscape(rng: np.random.Generator, measures: list[str]) -> dict[str, Any]:
    def score(height: float) -> dict[str, Any]:
        gold = height + float(rng.normal(0, 0.004))
        both = {"gold": gold, "reward": 2.5 * gold - 0.8}
        return {m: {"mean": both[m], "low": both[m] - 0.016, "high": both[m] + 0.016, "n": 256} for m in measures}

    def line(name: str, kind: str, ends: list[str], peak: float, grid: list[float], curve: float) -> dict[str, Any]:
        points = [{"at": x, "weights": [1 - x, x], "scores": score(0.827 - curve * (x - peak) ** 2)} for x in grid]
        return {
            "name": name,
            "parameter": "scale" if kind == "shrunk" else "alpha",
            "ends": ends,
            "kind": kind,
            "points": points,
        }

    quarter = [i / 4 for i in range(-2, 7)]
    lines = [
        line("seed-0 – seed-1", "line", ["seed-0", "seed-1"], 0.5, quarter, 0.3),
        line("seed-0 – seed-2", "line", ["seed-0", "seed-2"], 0.45, quarter, 0.27),
        line("base – seed-0 (shrunk, the control)", "shrunk", ["base", "seed-0"], 0.6, [i / 5 for i in range(8)], 0.9),
    ]
    steps = [i / 4 for i in range(-1, 6)]
    weights = [[1 - a - b, a, b] for a in steps for b in steps if -0.26 <= 1 - a - b <= 1.26]
    plane = [{"weights": w, "scores": score(0.84 - 0.4 * sum((x - 1 / 3) ** 2 for x in w))} for w in weights]
    return {
        "questions": "in",
        "n": 256,
        "sampling_seed": 0,
        "measures": measures,
        "lines": lines,
        "plane": {"members": ["seed-0", "seed-1", "seed-2"], "points": plane},
    }


JUDGED = (("salsa", "ppo"), ("salsa", "seed-0"), ("ppo", "seed-0"), ("salsa", "shrunk"))


def with_judge(
    run: ReportInput, pairs: tuple[tuple[str, str], ...] = JUDGED, seed: int = 0, words: str = "[[A]]"
) -> ReportInput:
    """The same run with a second turn in its first set and a judge who flips every eighth pair and says nothing of every twentieth."""
    rng = np.random.default_rng(seed)
    first = next(iter(run.evaluation["datasets"]))
    again = [{**row, "turn": 2, "prompt": "and why?"} for row in run.answers if row["dataset"] == first]
    answers = [{**row, "question_id": 81 + row["index"], "category": "writing"} for row in [*run.answers, *again]]
    score = {(row["dataset"], row["index"], row["turn"], row["model"]): row["scores"]["reward"] for row in answers}
    judgments = []
    for dataset, index, turn in dict.fromkeys(key[:3] for key in score):
        for a, b in pairs:
            gap = score[dataset, index, turn, a] - score[dataset, index, turn, b] + rng.normal(0, 0.3)
            won = "a" if gap > 0.2 else "b" if gap < -0.2 else "tie"
            other = {"a": "b", "b": "a", "tie": "a"}[won] if rng.random() < 1 / 8 else won
            games = ("missing", won) if rng.random() < 1 / 20 else (won, other)
            judgments.append(
                {"dataset": dataset, "question_id": 81 + index, "index": index, "category": "writing", "turn": turn, "a": a, "b": b,
                 "first": games[0], "second": games[1],
                 "winner": "missing" if "missing" in games else games[0] if games[0] == games[1] else "tie",
                 "tie_kind": None if "missing" in games or games[0] == games[1] != "tie" else "agreed" if games[0] == games[1] else "half" if "tie" in games else "flipped",
                 "lengths": [3 + int(rng.integers(9)), 3 + int(rng.integers(9))], "told": [f"better: {words}", ""]}
            )  # fmt: skip
    questions = {
        name: judging.Dataset([{"turns": ["?"] * (2 if name == first else 1)}] * data["n"], {})
        for name, data in run.evaluation["datasets"].items()
    }
    verdicts = {
        "judge": {"kind": "local", "model": "/home/somebody/judges/tiny-judge", "prompt": "figure7"},
        "calls": {"asked": 400, "cached": 8, "retried": 0, "prompt_tokens": 61000, "completion_tokens": 4200},
        "datasets": judging.results(judgments, questions),
        "search": None,
    }
    return replace(run, answers=answers, judgments=judgments, verdicts=verdicts, limit=4)


HOSTILE = (
    "<script>alert(1)</script> | a `b`\n```\n# not a heading\n````\n{{ 7 * 7 }} {% raw %} "
    "</pre> &amp; \x00 \ud800 <img src=x>"
)


class Page(HTMLParser):
    """Tags, what they refer to, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.resources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        self.resources += [value or "" for key, value in attrs if key in ("src", "srcset", "href", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [value or "" for key, value in attrs if key in ("src", "srcset", "href", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] not in ("style", "script") else ""

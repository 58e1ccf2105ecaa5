"""A run that never was, in the quickstart's shape: what tests of the report draw and print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from salsa_peft.report import PolicyReport, ReportInput
from salsa_peft.statistics import compare, mean_interval, paired_difference

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
                    "prompt": f"list {2 + i % 3} fruit (question {i})",
                    "model": model,
                    "response": " ".join(rng.choice(["mopa", "tiru", "kesh", "lun", "bado"], 2 + i % 3)),
                    "scores": {m: float(scores[model][m][i]) for m in measures},
                }
                for i in range(n)
            ]
        pairs = [
            {
                "a": a,
                "b": b,
                "measure": m,
                **asdict(compare(scores[a][m], scores[b][m], 0.05)),
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
                "skipped": i < 2,
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

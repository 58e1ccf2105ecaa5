"""Every strategy's soup of three SFT seeds of the embedded world, in replicates: reward and gold against the linear mean.

    python tests/benchmarks/strategies.py WORK [--replicates 8] [--markdown]

WORK: folder of the run; results that are there are not made again. Prints one JSON line: for each soup and measure (mean
over held-out prompts as long as those in training), the mean over replicates, the paired difference from the linear mean
with its 95% t-interval over replicates, and its p-value after Holm's correction over all soups of this measure. With
--markdown also the table of docs/soups.md. The recipe is strategies.yaml beside this file. On 2 CPU cores a replicate
takes about 4 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from salsa_peft.utils.statistics import holm, mean_interval, t_test

HERE = Path(__file__).resolve().parent
LINEAR = "soup"
STAGES = "toy,data,sft,reward,soup,soups,evaluate"


def train(work: Path, replicates: int) -> list[Path]:
    """Run the recipe in `work`. Returns the evaluation of each replicate."""
    command = "import sys; from salsa_peft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    options = ["--lora", "--replicates", str(replicates), "--stages", STAGES]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    subprocess.run(
        [sys.executable, "-c", command, "run", str(HERE / "strategies.yaml"), *options],
        cwd=work, env=environment, stdout=sys.stderr, check=True,
    )  # fmt: skip
    pattern = "runs/strategies-lora/replicate-{}/stages/evaluate/*/evaluation.json"
    found = [
        sorted(work.glob(pattern.format(number)), key=lambda path: path.stat().st_mtime) for number in range(replicates)
    ]
    return [paths[-1] for paths in found]


def scores(evaluation: Path, questions: str) -> dict[str, dict[str, float]]:
    """Measure → model → its mean score in one replicate."""
    rows: dict[str, dict[str, list[float]]] = {}
    for line in (evaluation.parent / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["dataset"] == questions:
            for measure, score in row["scores"].items():
                rows.setdefault(measure, {}).setdefault(row["model"], []).append(score)
    return {measure: {model: sum(found) / len(found) for model, found in of.items()} for measure, of in rows.items()}


def compare(replicates: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Model → its mean, and the difference from the linear mean, over replicates."""
    names = [name for name in replicates[0] if name != LINEAR]
    found: dict[str, dict[str, Any]] = {LINEAR: {"mean": mean_interval([one[LINEAR] for one in replicates]).mean}}
    differences = {name: [one[name] - one[LINEAR] for one in replicates] for name in names}
    adjusted = holm([t_test(differences[name], 0.0) for name in names])
    for name, p in zip(names, adjusted, strict=True):
        interval = mean_interval(differences[name])
        found[name] = {
            "mean": mean_interval([one[name] for one in replicates]).mean,
            "difference": interval.mean, "low": interval.low, "high": interval.high, "holm_p": p,
        }  # fmt: skip
    return found


def markdown(measures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of docs/soups.md: a row for each model, the best gold first."""
    lines = ["| soup | gold | against linear | reward | against linear |", "|---|---|---|---|---|"]
    gold, reward = measures["gold"], measures["reward"]
    for name in sorted(gold, key=lambda name: -gold[name]["mean"]):
        cells = [
            f"{gold[name]['mean']:.3f}",
            _difference(gold[name]),
            f"{reward[name]['mean']:.2f}",
            _difference(reward[name]),
        ]
        lines.append(f"| {name if name != LINEAR else '**linear**'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(row: dict[str, Any]) -> str:
    if "difference" not in row:
        return "–"
    star = "*" if row["holm_p"] < 0.05 else ""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--questions", default="in", help="in: lengths of training; out: longer prompts (default: in)")
    parser.add_argument("--markdown", action="store_true", help="also print the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = [scores(path, args.questions) for path in train(args.work, args.replicates)]
    measures = {measure: compare([one[measure] for one in found]) for measure in ("gold", "reward")}
    recipe = yaml.safe_load((HERE / "strategies.yaml").read_text(encoding="utf-8"))
    print(json.dumps({
        "replicates": args.replicates, "questions": args.questions, "machine": platform.machine(),
        "options": recipe["soups"], **measures,
    }))  # fmt: skip
    if args.markdown:
        print(markdown(measures))


if __name__ == "__main__":
    main()

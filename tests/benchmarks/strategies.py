"""Every strategy's soup of three SFT seeds of the embedded world, in replicates: gold and reward against the linear mean.

    python tests/benchmarks/strategies.py WORK [--replicates 8] [--markdown]

WORK: folder of the run; results that are there are not made again. Prints one JSON line: for prompts as long as those in
training ("in") and longer ones ("out"), each measure and each soup, the mean over replicates, the paired difference from
the linear mean with its 95% t-interval over replicates, and its p-value after Holm's correction over all models; and the
norm of each soup's delta as a share of the linear mean's. --markdown also prints the table of docs/soups.md. The recipe is
strategies.yaml beside this file. A replicate takes about five minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
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


def lengths(evaluations: list[Path]) -> dict[str, float]:
    """Soup → norm of its delta as a share of the linear mean's, averaged over replicates."""
    shares: dict[str, list[float]] = {}
    for evaluation in evaluations:
        stages = evaluation.parents[2]
        files = {LINEAR: next(stages.glob("soup/*/soup.json"))}
        files |= {path.parents[1].name: path for path in stages.glob("soups/*/*/soup.json")}
        norms = {name: json.loads(path.read_text(encoding="utf-8"))["norm"] for name, path in files.items()}
        for name, norm in norms.items():
            shares.setdefault(name, []).append(norm / norms[LINEAR])
    return {name: mean_interval(found).mean for name, found in shares.items()}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/soups.md: a row for each model, the highest gold first."""
    lines = [
        "| soup | length | gold | against linear | gold, longer prompts | against linear | reward | against linear |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gold, longer, reward = results["in"]["gold"], results["out"]["gold"], results["in"]["reward"]
    for name in sorted(gold, key=lambda name: -gold[name]["mean"]):
        length = f"{results['length'][name]:.2f}" if name in results["length"] else "–"
        cells = ["**linear**" if name == LINEAR else name, length]
        for rows, digits in ((gold, 3), (longer, 3), (reward, 2)):
            cells += [f"{rows[name]['mean']:.{digits}f}".replace("-", "−"), _difference(rows[name], digits)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(row: dict[str, Any], digits: int) -> str:
    if "difference" not in row:
        return "–"
    star = "*" if row["holm_p"] < 0.05 else ""
    shown = [f"{row[name]:+.{digits}f}".replace("-", "−") for name in ("difference", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{star}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--markdown", action="store_true", help="also print the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    evaluations = train(args.work, args.replicates)
    results: dict[str, Any] = {"replicates": args.replicates, "length": lengths(evaluations)}
    for questions in ("in", "out"):
        found = [scores(path, questions) for path in evaluations]
        results[questions] = {measure: compare([one[measure] for one in found]) for measure in ("gold", "reward")}
    recipe = yaml.safe_load((HERE / "strategies.yaml").read_text(encoding="utf-8"))
    print(json.dumps(results | {"soups": recipe["soups"]}))
    if args.markdown:
        print(markdown(results))


if __name__ == "__main__":
    main()

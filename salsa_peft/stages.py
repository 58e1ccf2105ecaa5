"""The thin stages: what a job's folders hold → the function of toy.py, soup.py or report.py that does the work.

Those three stand on their own and know nothing of jobs; the stages with loops are functions `run` of their own modules.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from . import runs
from .adapter_folders import FINGERPRINT
from .runs import Job

COSTS = ("key", "seconds", "peak_mb", "gpu_peak_mb", "gpu_planned_mb")
MODES = {"full": "full weights", "lora": "LoRA", "qlora": "QLoRA"}
"""What the report calls them."""


def toy(job: Job) -> dict[str, Any]:
    """The embedded world: base, tokenizer, data."""
    from .progress import bar
    from .toy import build

    assert job.recipe.toy is not None
    with bar(1, job.unit.id) as update:

        def progress(done: int, total: int, what: str) -> None:
            update(done=done, total=total, what=f"{job.unit.id} {what}")

        return build(job.recipe.toy, job.folder, progress)


def soup(job: Job) -> dict[str, Any]:
    """The seeds' soup, an ordinary PEFT adapter, exact unless a rank is asked for, or checkpoint; its weights given or found by a measure."""
    from .averaging import soup as cook
    from .workbench import Workbench

    section = job.recipe.soup
    cooked = job.folder / "cooked"
    names = [f"seed-{member}" for member in section.members]
    folders, measure = [job.inputs[f"sft/{name}"] for name in names], None
    if section.measured:
        from .measures import of_recipe

        measure = of_recipe(job, folders)
    base = None if job.recipe.adapter is not None else Workbench.of(job).folder  # of checkpoints: where deltas begin
    summary = cook(
        cooked, folders, section.resolved, names=names, strategy=section.strategy, measure=measure, steps=section.steps,
        step_size=section.step_size, rank=section.rank, base=base,
    )  # fmt: skip
    signs = {(folder / FINGERPRINT).read_bytes() for folder in folders}
    if job.recipe.adapter is None and len(signs) == 1:  # a soup of adapters has it already
        runs.write_atomic(cooked / FINGERPRINT, signs.pop())
    for file in cooked.iterdir():
        shutil.move(file, job.folder / file.name)
    cooked.rmdir()
    return summary


def _told(soup: dict[str, Any]) -> dict[str, Any]:
    """soup.json → what the report's table says of it."""

    def norm(row: dict[str, Any]) -> str:
        return "" if row["norm"] is None else f", norm of delta {row['norm']:.4g}"

    adapters = "ranks" in soup
    members = {
        m["name"]: f"weight {m['weight']:g}" + (f", rank {m['ranks']}" if adapters else "") + norm(m)
        for m in soup["members"]
    }
    pairs = {
        f"{p['a']} – {p['b']}": f"distance {p['distance']:.4g}"
        + ("" if p["cosine"] is None else f", cosine {p['cosine']:.4f}")
        for p in soup["pairs"]
    }
    size = f"{soup['modules']} modules, rank {soup['ranks']}" if adapters else f"{soup['parameters']:,} parameters"
    return {**members, **pairs, "soup": f"{soup['strategy']}, {size}{norm(soup)}"}


def _reward(job: Job) -> dict[str, Any]:
    """What the reward is made of, unless it is the adapter alone, and what the reward stage measured, where there was one."""
    parts = job.recipe.reward.parts
    alone = job.recipe.reward.trained and len(parts) == 1 and parts[0].weight == 1
    told = {} if alone else {part.name: f"{part.weight:g} · {part.kind} {_place(part.value)}" for part in parts}
    return {**told, **(_json(job.inputs["reward"] / "metrics.json") if "reward" in job.inputs else {})}


def _place(value: str) -> str:
    """A path's last part: the report may be shown to others."""
    return Path(value).name if Path(value).is_absolute() else value


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    # split("\n") and not splitlines(): U+2028 and its like stand unescaped in JSON, and in what people write
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def report(job: Job) -> dict[str, Any]:
    """report.html, report.md, summary.json of everything that the run's folders hold."""
    from .report import PolicyReport, ReportInput, write_report

    def in_stage(stage: str) -> dict[str, Path]:
        return {unit.rsplit("/", 1)[-1]: folder for unit, folder in job.inputs.items() if unit.split("/")[0] == stage}

    def policy(folder: Path) -> PolicyReport:
        facts = _json(folder / "policy.json")
        rows, completions = _lines(folder / "metrics.jsonl"), _lines(folder / "completions.jsonl")
        return PolicyReport(
            reference=facts["reference"], kl_coef=facts["kl_coef"]["start"], metrics=rows, completions=completions
        )

    manifests = {unit: _json(folder / runs.MANIFEST) for unit, folder in job.inputs.items()}
    units = [{"unit": unit, "skipped": False, **{name: m.get(name) for name in COSTS}} for unit, m in manifests.items()]
    landscape, evaluation = job.inputs.get("landscape"), job.inputs["evaluate"]
    base = job.recipe.model.base or "the embedded world's"
    result = ReportInput(
        name=job.recipe.name,
        recipe_yaml=job.recipe_yaml,
        mode=MODES[job.recipe.mode],
        base=Path(base).name if Path(base).is_dir() else base,
        versions=runs.versions(),
        units=units,
        seeds={name: _json(folder / "metrics.json") for name, folder in in_stage("sft").items()},
        reward=_reward(job),
        soup=_told(_json(job.inputs["soup"] / "soup.json")),
        policies={name: policy(folder) for name, folder in in_stage("ppo").items()},
        landscape=_json(landscape / "landscape.json") if landscape else None,
        evaluation=_json(evaluation / "evaluation.json"),
        answers=_lines(evaluation / "answers.jsonl"),
    )
    summary = write_report(job.folder, result)
    return {"numbers": len(json.dumps(summary))}

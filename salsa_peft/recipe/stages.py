"""The stages toy, soup and report, which call functions that know nothing of jobs.

The other stages are functions `run` of their own modules.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.utils import files
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.fingerprints import FINGERPRINT, read_fingerprint


def toy(job: Job) -> dict[str, Any]:
    """Build the embedded world: base, tokenizer and data."""
    from salsa_peft.data.toy import build

    assert job.recipe.toy is not None
    with progress_bar(1, job.unit.id) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(f"{job.unit.id} {what}", refresh=False)
            bar.update(done - bar.n)

        return build(job.recipe.toy, job.folder, progress)


def soup(job: Job) -> dict[str, Any]:
    """Average the seeds to an ordinary PEFT adapter, or to a checkpoint.

    The weights are given, or selected by a measure. The average is exact unless the recipe sets a rank.
    """
    from salsa_peft.models.stage_context import StageContext
    from salsa_peft.soup.average import soup as cook

    section = job.recipe.soup
    cooked = job.folder / "cooked"
    names = [f"seed-{member}" for member in section.members]
    folders, measure = [job.inputs[f"sft/{name}"] for name in names], None
    if section.uses_measure:
        from salsa_peft.soup.measures import recipe_measure

        measure = recipe_measure(job, folders)
    base = (
        None if job.recipe.adapter is not None else StageContext.of_job(job).folder
    )  # of checkpoints: where deltas begin
    summary = cook(
        cooked, folders, section.resolved_weights, names=names, strategy=section.strategy, measure=measure, steps=section.steps,
        step_size=section.step_size, rank=section.rank, base=base,
    )  # fmt: skip
    bases = {read_fingerprint(folder) for folder in folders}
    if job.recipe.adapter is None and len(bases) == 1 and None not in bases:  # a soup of adapters has it already
        files.write_atomic(cooked / FINGERPRINT, json.dumps({"base": bases.pop()}))
    for file in cooked.iterdir():
        shutil.move(file, job.folder / file.name)
    cooked.rmdir()
    return dict(summary)


def report(job: Job) -> dict[str, Any]:
    """Write report.html, report.md, summary.json and the resolved recipe."""
    from salsa_peft.report.gather import gather
    from salsa_peft.report.page import write_report

    summary = write_report(job.folder, gather(job.recipe, job.inputs, job.recipe_yaml))
    files.write_atomic(job.folder / "recipe.yaml", job.recipe_yaml)
    return {"numbers": len(json.dumps(summary))}

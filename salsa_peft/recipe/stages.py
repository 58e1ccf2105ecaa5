"""The thin stages: what a job's folders hold → the function of data/toy.py, soup/__main__.py or cli/report.py that does the work.

Those three stand on their own and know nothing of jobs; the stages with loops are functions `run` of their own modules.
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
    """The embedded world: base, tokenizer, data."""
    from salsa_peft.data.toy import build

    assert job.recipe.toy is not None
    with progress_bar(1, job.unit.id) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(f"{job.unit.id} {what}", refresh=False)
            bar.update(done - bar.n)

        return build(job.recipe.toy, job.folder, progress)


def soup(job: Job) -> dict[str, Any]:
    """The soup of the seeds: a PEFT adapter, or a checkpoint with full weights."""
    from salsa_peft.models.stage_context import StageContext
    from salsa_peft.soup import average

    section = job.recipe.soup
    unfinished = job.folder / "unfinished"
    names = [f"seed-{member}" for member in section.members]
    folders, measure = [job.inputs[f"sft/{name}"] for name in names], None
    if section.uses_measure:
        from salsa_peft.soup.measures import recipe_measure

        measure = recipe_measure(job, folders)
    base = (
        None if job.recipe.adapter is not None else StageContext.of_job(job).folder
    )  # of checkpoints: where deltas begin
    summary = average.soup(
        unfinished, folders, section.resolved_weights, names=names, strategy=section.strategy, measure=measure, steps=section.steps,
        step_size=section.step_size, rank=section.rank, base=base,
    )  # fmt: skip
    bases = {read_fingerprint(folder) for folder in folders}
    if job.recipe.adapter is None and len(bases) == 1 and None not in bases:  # a soup of adapters has it already
        files.write_atomic(unfinished / FINGERPRINT, json.dumps({"base": bases.pop()}))
    for file in unfinished.iterdir():
        shutil.move(file, job.folder / file.name)
    unfinished.rmdir()
    return dict(summary)


def report(job: Job) -> dict[str, Any]:
    """report.html, report.md, summary.json, and the recipe as it ran, of everything that the run's folders hold."""
    from salsa_peft.report.gather import gather
    from salsa_peft.report.page import write_report

    summary = write_report(job.folder, gather(job.recipe, job.inputs, job.recipe_yaml))
    files.write_atomic(job.folder / "recipe.yaml", job.recipe_yaml)
    return {"numbers": len(json.dumps(summary))}

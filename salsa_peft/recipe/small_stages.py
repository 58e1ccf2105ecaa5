"""The stage functions of toy, data, soup and report. The other stages have modules of their own.

The table of all stages is STAGES in recipe/run.py. recipe/cache.py decides which units are skipped, and why.
"""

import json
import shutil
from typing import Any

from salsa_peft.config.job import Job
from salsa_peft.utils.console import progress_bar
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import FINGERPRINT, read_fingerprint


def toy(job: Job) -> dict[str, Any]:
    """Build the generated toy task (the recipe section `toy`): base model, tokenizer and data."""
    from salsa_peft.data.toy import build

    assert job.recipe.toy is not None
    with progress_bar(1, job.unit.id) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(f"{job.unit.id} {what}", refresh=False)
            bar.update(done - bar.n)

        return build(job.recipe.toy, job.folder, progress)


def data(job: Job) -> dict[str, Any]:
    """Read, check, render and tokenize the training data that the unit names, once for all stages that train on it."""
    from salsa_peft.data import tokenized
    from salsa_peft.data.datasets import training_sources
    from salsa_peft.models.stage_context import StageContext

    source = training_sources(job.recipe, job.inputs)[job.unit.name]
    with progress_bar(1, f"{job.unit.id} tokenizing") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return tokenized.WRITERS[job.unit.name](source, StageContext.of_job(job).tokenizer, job.folder, progress)


def soup(job: Job) -> dict[str, Any]:
    """Average the members of the soup that the unit names into one ordinary PEFT adapter or checkpoint."""
    from salsa_peft.models.stage_context import StageContext, model_folder
    from salsa_peft.soup.average import soup as average
    from salsa_peft.soup.measures import recipe_measure

    section, full = job.recipe.soup, job.recipe.adapter is None
    names = section.names
    folders, partial = [model_folder(job.recipe, job.inputs, name) for name in names], job.folder / "partial"
    start = section.start if section.start == "base" else model_folder(job.recipe, job.inputs, section.start)
    summary = average(
        partial,
        folders,
        section.resolved_weights,
        names=names,
        strategy=section.strategy,
        per=section.per,
        start=start,
        scale=section.scale,
        density=section.density,
        drop_seed=section.drop_seed,
        measure=recipe_measure(job, folders) if section.uses_measure else None,
        steps=section.steps,
        step_size=section.step_size,
        rank=section.rank,
        base=StageContext.of_job(job).folder if full and section.start == "base" else None,
    )
    bases = {read_fingerprint(folder) for folder in folders}
    if full and len(bases) == 1 and None not in bases:  # a soup of adapters already has a fingerprint
        write_atomic(partial / FINGERPRINT, json.dumps({"base": bases.pop()}))
    for file in partial.iterdir():
        shutil.move(file, job.folder / file.name)
    partial.rmdir()
    return dict(summary)


def report(job: Job) -> dict[str, Any]:
    """Write report.html, report.md, summary.json and the resolved recipe."""
    from salsa_peft.report.gather import gather
    from salsa_peft.report.page import write_report

    try:
        gathered = gather(job.recipe, job.inputs, job.recipe_yaml)
    except KeyError as error:  # results that `salsa report` takes although they are outdated
        raise SalsaError(
            f"its inputs have no {error}, since an earlier version of salsa_peft made them; run the recipe again"
        ) from error
    summary = write_report(job.folder, gathered)
    write_atomic(job.folder / "recipe.yaml", job.recipe_yaml)
    return {"numbers": len(json.dumps(summary))}

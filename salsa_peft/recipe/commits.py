"""The commits of a run's repositories on the Hub: they are found when the run begins, and kept until it is finished.

They are in the cache keys, so that what changes on the Hub is read again by the next run. torch is not imported.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from salsa_peft.config.paths import is_local
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.data.files import at_commit, hub_repository
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json, write_atomic
from salsa_peft.utils.hub import COMMIT, Repository, resolve_commits
from salsa_peft.utils.messages import did_you_mean, short

COMMITS = "commits.json"
"""Name of a run's file with the commits that it found when it began, and whether all its units are finished since."""


def repositories(recipe: Recipe) -> dict[tuple[str, str], Repository]:
    """The repositories on the Hub that a recipe names: (base, model, data or prompts; name) → repository."""
    from salsa_peft.training.external_models import hub_models

    base, revision = recipe.model.base, recipe.model.revision
    sources = {("data", name): source for name, source in vars(recipe.data).items() if isinstance(source, Source)}
    sources |= {("prompts", name): source for name, source in recipe.evaluate.prompts.items()}
    found = {place: hub_repository(source) for place, source in sources.items()}
    models = {("model", name): Repository("model", name, recipe.revisions.get(name)) for name in hub_models(recipe)}
    bases = {} if base is None or is_local(base) else {("base", ""): Repository("model", base, revision)}
    return bases | models | {place: one for place, one in found.items() if one is not None}


def check_revisions(recipe: Recipe) -> None:
    """Raise SalsaError for a Hub id in `revisions` that is no model of the recipe."""
    named = repositories(recipe)
    models = [one.name for one in named.values() if one.kind == "model"]
    datasets = [one.name for one in named.values() if one.kind == "dataset"]
    for name in recipe.revisions:
        remedy = f"remove the entry or correct the name; {did_you_mean(name, models, 'the models')}"
        if name in datasets:
            remedy = "it is a dataset, whose key `revision` stands beside its `path`"
        require(name in models, f"revisions: no part of the recipe names a model {short(name)}; {remedy}")


def with_commits(recipe: Recipe, *, record: bool, kept: Mapping[Repository, str] | None = None) -> Recipe:
    """The recipe with the commits of its repositories on the Hub in place of branches, tags and missing revisions.

    A revision whose commit is not known stays. record: as in resolve_commits. kept: commits of repositories that the Hub
    is not asked about.
    """
    wanted, commits = repositories(recipe), dict(kept or {})
    asked = [one for one in wanted.values() if one not in commits]
    commits |= resolve_commits(asked, record=record) if asked else {}
    found = {place: commits[one] for place, one in wanted.items() if one in commits}
    data, prompts = recipe.data, recipe.evaluate.prompts
    return replace(
        recipe,
        model=replace(recipe.model, revision=found.get(("base", ""), recipe.model.revision)),
        revisions=recipe.revisions | {name: commit for (kind, name), commit in found.items() if kind == "model"},
        data=replace(
            data, **{name: at_commit(getattr(data, name), found[kind, name]) for kind, name in found if kind == "data"}
        ),
        evaluate=replace(
            recipe.evaluate,
            prompts=prompts
            | {name: at_commit(prompts[name], found[kind, name]) for kind, name in found if kind == "prompts"},
        ),
    )


def unknown_commits(recipe: Recipe) -> list[str]:
    """A line about the repositories on the Hub whose commits with_commits has not found; none if it has found all."""
    unknown = [one.name for one in repositories(recipe).values() if not COMMIT.match(one.revision or "")]
    names = ", ".join(dict.fromkeys(unknown))
    line = (
        f"the commit of {names} is unknown (not on the Hub and not in its local cache): a change there is not noticed"
    )
    return [line] if unknown else []


def found_commits(before: Recipe, after: Recipe) -> dict[Repository, str]:
    """Repository at a branch or tag in the recipe `before` → its commit in `after`, which with_commits returned."""
    now = {place: str(one.revision) for place, one in repositories(after).items()}
    open_ones = {place: one for place, one in repositories(before).items() if not COMMIT.match(one.revision or "")}
    return {one: now[place] for place, one in open_ones.items() if COMMIT.match(now[place])}


def keep_commits(run: Path, commits: Mapping[Repository, str], *, finished: bool) -> None:
    """Write commits.json, if there are commits. finished: whether all units of the run are finished."""
    rows = [[*repository, commit] for repository, commit in commits.items()]
    if rows:
        write_atomic(run / COMMITS, json.dumps({"finished": finished, "commits": rows}, indent=2))


def kept_commits(run: Path, recipe: Recipe, report: bool) -> dict[Repository, str]:
    """The commits that an unfinished run in this folder found when it began, said in one line; of a finished run none.

    report: whether only the report is made again, for which those of a finished run count too. Raises SalsaError if
    commits.json is damaged.
    """
    file = run / COMMITS
    if not file.exists():
        return {}
    saved = read_json(file)
    try:
        finished, rows = bool(saved["finished"]), {Repository(*one): str(commit) for *one, commit in saved["commits"]}
    except (KeyError, TypeError, ValueError) as error:
        raise SalsaError(f"{file}: is damaged; remove it, and the commits are read from the Hub again") from error
    found = {one: rows[one] for one in repositories(recipe).values() if one in rows and (report or not finished)}
    if found and not report:
        named = ", ".join(f"{one.name} {commit[:7]}" for one, commit in found.items())
        say(
            f"commits: {run.name} is not finished, so it keeps those that it found on the Hub when it began ({named}); when"
            " it is finished, the next run asks the Hub again"
        )
    return found

"""A run's results → repositories on the Hub, each in one commit; what fails is tried again, and if that fails too noted as pending.

The token is huggingface_hub's to find (HF_TOKEN, or `hf auth login`) and goes nowhere but its Authorization header.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from salsa_peft.config.job import Job
from salsa_peft.config.options.hub import REPO_EXPECTED, REPO_ID
from salsa_peft.config.schema import Recipe
from salsa_peft.report import model_card
from salsa_peft.report.model_card import Item, published
from salsa_peft.utils import files as runs
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short

PENDING, PUSHED = "hub_pending.json", "hub_pushed.json"
"""In the run's folder."""
WAITS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try; longer where the Hub's Retry-After says so, up to LONGEST."""
LONGEST = 300.0
AGAIN = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """What is to go where."""

    item: str
    to: str
    """namespace/name; /name: of whoever is logged in."""
    private: bool = True
    base_model: str | None = None


def run(job: Job) -> dict[str, Any]:
    """The hub stage: what the recipe's `hub` section names. Raises SalsaError at its end where something could not be pushed; it is pending
    then, and the run whole."""
    section, folder = job.recipe.hub, job.folder.parent.parent
    stem = section.name or folder.name
    wanted = [
        Push(
            item=name,
            to=f"{section.namespace or ''}/{stem}-{name}",
            private=section.private,
            base_model=section.base_model,
        )
        for name in section.push
    ]
    done = push_all(folder, wanted, job.recipe, dict(job.inputs))
    return {"pushed": {one["item"]: one["commit"] for one in done}}


def push_all(run: Path, wanted: Sequence[Push], recipe: Recipe, folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Push results of a run; → what was pushed: {item, to, commit, url, private}.

    All of them are noted as pending first, and each is crossed out when it is on the Hub; what was pending before stays so. Raises SalsaError
    that names what is left.
    """
    queue = [one for one in pending(run) if (one.item, one.to) not in [(two.item, two.to) for two in wanted]] + list(
        wanted
    )
    note(run, queue)
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for one in wanted:
        clash = next((other.item for other in queue if other.to == one.to and other.item != one.item), None)
        try:
            require(
                clash is None,
                f"{one.to}: found {clash} pending for it too, expected a repository of its own; take one out of {run / PENDING}",
            )
            done.append(push(one, item_of(run, recipe, one, folders)))
        except SalsaError as error:
            failed.append(f"{one.item}: {error}")
            say(f"hub  {failed[-1]}")
            continue
        queue.remove(one)
        note(run, queue)
        record(run, done[-1])
        say(f"hub  {one.item} → {done[-1]['url']}{' (private)' if one.private else ''}")
    require(
        not failed,
        f"{len(failed)} of {len(wanted)} not pushed ({'; '.join(failed)}); the run is whole, salsa hub push {run} tries again",
    )
    return done


def item_of(run: Path, recipe: Recipe, wanted: Push, folders: dict[str, Path]) -> Item:
    """The result that is to be pushed; refusals as in `model_card.item`."""
    return model_card.item(run, recipe, wanted.item, wanted.base_model, folders)


def push(wanted: Push, item: Item) -> dict[str, Any]:
    """One result, one commit. Raises SalsaError for what the Hub refuses, and where it can't be reached after several tries."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from salsa_peft.report.model_card import card

    api = HfApi(library_name="salsa_peft")
    repo = address(api, wanted.to)
    files = published(item, card(item, repo, online=True))
    tried(lambda: api.create_repo(repo, private=wanted.private, exist_ok=True), f"creating {repo}")
    there = tried(lambda: api.model_info(repo), repo)
    require(
        there.private or not wanted.private,
        f"{repo}: found a public repository, expected a private one; make it private there, push elsewhere, or say --public (hub.private: false)",
    )

    def commit() -> Any:
        operations = [  # made anew for each try: they keep what they were told
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ]
        title = f"{item.name} of {item.recipe.name}, by salsa_peft"
        return api.create_commit(repo, operations, commit_message=title)

    made = tried(commit, repo)
    return {
        "item": wanted.item,
        "to": repo,
        "commit": made.oid,
        "url": str(made.repo_url.url),
        "private": wanted.private,
    }


def address(api: Any, to: str) -> str:
    """namespace/name, the namespace of whoever is logged in where none is given. Raises SalsaError for names that can be none."""
    repo = f"{tried(api.whoami, 'the login')['name']}{to}" if to.startswith("/") else to
    require(REPO_ID.match(repo) is not None, f"--to: found {short(repo)}, {REPO_EXPECTED}")
    return repo


def tried(call: Callable[[], Result], what: str) -> Result:
    """The call's result, tried again after a while where the Hub is busy or the line broke; SalsaError for anything else it says."""
    from huggingface_hub import errors

    for wait in (*WAITS, None):
        try:
            return call()
        except (
            errors.HTTPError,
            OSError,
            RuntimeError,
            json.JSONDecodeError,
        ) as error:  # the last: a page in the place of an answer
            if is_local(error):
                raise SalsaError(f"{what}: {error}") from error
            status, after = state_of(error)
            passing = status in AGAIN or (status is None and not isinstance(error, errors.OfflineModeIsEnabled))
            if wait is None or not passing:
                raise SalsaError(f"{what}: {words(error, status)}") from error
            seconds = min(max(wait, after), LONGEST)
            say(f"hub  {what}: {words(error, status)}; again in {seconds:.0f} s")
            time.sleep(seconds)
        except UnicodeEncodeError:  # it holds the header: nothing of it is passed on
            raise SalsaError(
                "the login's token: found letters that no token has; log in with `hf auth login`, or set HF_TOKEN"
            ) from None
        except ValueError as error:  # what the Hub says of a card's front matter
            raise SalsaError(f"{what}: {one_line(error)}") from error
    raise AssertionError


def is_local(error: BaseException) -> bool:
    """Whether it is this machine's: a folder, a full disk."""
    return (
        isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    )


def state_of(error: BaseException) -> tuple[int | None, float]:
    """The HTTP status of an error or of what caused it, None where there was no answer; seconds of its Retry-After."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return state_of(error.__cause__)
    if response is None:
        return None, 0.0
    after = response.headers.get("retry-after", "")
    return int(response.status_code), float(after) if after.isdigit() else 0.0


def words(error: BaseException, status: int | None) -> str:
    """An error in a line, with what to do."""
    from huggingface_hub import errors

    help_of = {
        401: "log in with `hf auth login`, or set HF_TOKEN",
        403: "take a namespace that your token may write to",
    }
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"found no login; {help_of[401]}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if status is None:
        return f"no answer from the Hub ({type(error.__cause__ or error).__name__})"
    help_of[404] = f"check the name, or if it is private {help_of[401]}"
    return f"the Hub says {status}" + (f"; {help_of[status]}" if status in help_of else "")


def pending(run: Path) -> list[Push]:
    """What was to be pushed and is not yet. Raises SalsaError where the note can't be read."""
    path = run / PENDING
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())
        found = [Push(**row) for row in rows]
        if isinstance(rows, dict) or not all(
            isinstance(one.item, str) and isinstance(one.to, str) and one.private in (True, False) for one in found
        ):
            raise TypeError
        return found
    except (OSError, ValueError, TypeError) as error:
        raise SalsaError(
            f"{path}: found something else than was noted, expected what is pending; remove it and push by name"
        ) from error


def note(run: Path, queue: Sequence[Push]) -> None:
    """What is pending now; no file where nothing is."""
    if queue:
        runs.write_atomic(run / PENDING, json.dumps([dataclasses.asdict(one) for one in queue], indent=2) + "\n")
    else:
        (run / PENDING).unlink(missing_ok=True)


def record(run: Path, done: dict[str, Any]) -> None:
    """Add to what was pushed."""
    path = run / PUSHED
    try:
        before = json.loads(path.read_bytes()) if path.is_file() else []
    except ValueError:  # it is there for people; what is on the Hub is there
        say(f"hub  {path}: found something that can't be read, kept as {path.name}.old")
        path.rename(path.with_name(f"{path.name}.old"))
        before = []
    runs.write_atomic(path, json.dumps([*before, {**done, "at": runs.timestamp()}], indent=2) + "\n")


def say(line: str) -> None:
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)

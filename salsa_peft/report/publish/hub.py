"""The hub stage: push results of a run to repositories on the Hub, one commit for each result.

Failed requests are repeated; failed pushes stay pending. huggingface_hub finds the token (HF_TOKEN, or `hf auth
login`); the token is sent only in the Authorization header.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from salsa_peft.config.job import Job
from salsa_peft.config.options.hub import REPO_EXPECTED, REPO_ID
from salsa_peft.report.publish.items import Item, Results, find_item
from salsa_peft.report.publish.model_card import published_files, render_card
from salsa_peft.utils.console import say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json, timestamp, write_atomic
from salsa_peft.utils.messages import one_line, short

PENDING, PUSHED = "hub_pending.json", "hub_pushed.json"
"""Files in the run's folder that list the pushes still to do, and the finished pushes."""
WAITS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each retry; a longer Retry-After of the Hub is used instead, up to LONGEST."""
LONGEST = 300.0
RETRIED = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """A result to push, and the repository for it."""

    item: str
    to: str
    """namespace/name, or /name for the namespace of the user who is logged in."""
    private: bool = True
    base_model: str | None = None


def run(job: Job) -> dict[str, Any]:
    """Push the results listed in the recipe's `hub.push`. Raises SalsaError at the end if a push failed."""
    section, folder = job.recipe.hub, job.run_folder
    start = f"{section.namespace or ''}/{section.name or folder.name}"
    wanted = [
        Push(item=name, to=f"{start}-{name}", private=section.private, base_model=section.base_model)
        for name in section.push
    ]
    done = push_all(wanted, Results.of_job(job))
    return {"pushed": {one["item"]: one["commit"] for one in done}}


def push_all(wanted: Sequence[Push], results: Results) -> list[dict[str, Any]]:
    """Push results of a run; returns {item, to, commit, url, private} of each.

    All pushes are listed as pending first, and each is removed from the list once its result is on the Hub. Raises
    a SalsaError that names the failed pushes.
    """
    run, asked = results.run, [(one.item, one.to) for one in wanted]
    queue = [*(one for one in pending(run) if (one.item, one.to) not in asked), *wanted]
    write_pending(run, queue)
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for one in wanted:
        clash = next((other.item for other in queue if other.to == one.to and other.item != one.item), None)
        try:
            require(
                clash is None,
                f"{one.to}: {clash} is pending for the same repository; remove {clash} or {one.item} from"
                f" {run / PENDING}",
            )
            done.append(push(one, find_item(results, one.item, one.base_model)))
        except SalsaError as error:
            failed.append(f"{one.item}: {error}")
            say(f"hub  {failed[-1]}")
            continue
        queue.remove(one)
        write_pending(run, queue)
        record_push(run, done[-1])
        say(f"hub  {one.item} → {done[-1]['url']}{' (private)' if one.private else ''}")
    require(
        not failed,
        f"{len(failed)} of {len(wanted)} results were not pushed ({'; '.join(failed)}). The run itself is complete; to"
        f" push again: salsa hub push {run}",
    )
    return done


def push(wanted: Push, item: Item) -> dict[str, Any]:
    """Push one result in one commit. Raises SalsaError if the Hub refuses or does not answer."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="salsa_peft")
    repo = repository(api, wanted.to)
    files = published_files(item, render_card(item, repo, online=True))
    with_retries(lambda: api.create_repo(repo, private=wanted.private, exist_ok=True), f"creating {repo}")
    there = with_retries(lambda: api.model_info(repo), repo)
    require(
        there.private or not wanted.private,
        f"{repo}: is a public repository, but the push is private; make the repository private on the Hub, push to"
        " another repository, or use --public (hub.private: false)",
    )

    def commit() -> Any:
        operations = [  # created for each try, because an operation keeps the state of its upload
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ]
        of = "" if item.recipe is None else f" of {item.recipe.name}"
        return api.create_commit(repo, operations, commit_message=f"{item.name}{of}, by salsa_peft")

    made = with_retries(commit, repo)
    url = str(made.repo_url.url)
    return {"item": wanted.item, "to": repo, "commit": made.oid, "url": url, "private": wanted.private}


def repository(api: Any, to: str) -> str:
    """Id of the repository; /name gets the user's namespace. Raises SalsaError if the id is invalid."""
    repo = f"{with_retries(api.whoami, 'the login')['name']}{to}" if to.startswith("/") else to
    require(REPO_ID.match(repo) is not None, f"--to: found {short(repo)}, {REPO_EXPECTED}")
    return repo


def with_retries(call: Callable[[], Result], what: str) -> Result:
    """Result of `call`, retried if the Hub is busy or the connection breaks. Raises SalsaError on failure."""
    from huggingface_hub import errors

    for wait in (*WAITS, None):
        try:
            return call()
        except (errors.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:  # last: invalid response
            if is_local(error):
                raise SalsaError(f"{what}: {error}") from error
            status, after = status_of(error)
            passing = status in RETRIED or (status is None and not isinstance(error, errors.OfflineModeIsEnabled))
            if wait is None or not passing:
                raise SalsaError(f"{what}: {error_text(error, status)}") from error
            seconds = min(max(wait, after), LONGEST)
            say(f"hub  {what}: {error_text(error, status)}; next try in {seconds:.0f} s")
            time.sleep(seconds)
        except UnicodeEncodeError:  # the error's text, which contains the token, must not be shown
            raise SalsaError(
                "the Hub token contains invalid characters; log in with `hf auth login`, or set HF_TOKEN"
            ) from None
        except ValueError as error:  # the Hub's validation of the card's front matter
            raise SalsaError(f"{what}: {one_line(error)}") from error
    raise AssertionError


def is_local(error: BaseException) -> bool:
    """Whether an error comes from this machine, such as a full disk."""
    return (
        isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    )


def status_of(error: BaseException) -> tuple[int | None, float]:
    """HTTP status of an error or its cause, and Retry-After in seconds; (None, 0) without a response."""
    response = getattr(error, "response", None)
    if response is None:
        return (None, 0.0) if error.__cause__ is None else status_of(error.__cause__)
    after = response.headers.get("retry-after", "")
    return int(response.status_code), float(after) if after.isdigit() else 0.0


def error_text(error: BaseException, status: int | None) -> str:
    """One line that describes an error of the Hub and says what to do."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no login on this machine; {login}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to use the Hub"
    if status is None:
        return f"no answer from the Hub ({type(error.__cause__ or error).__name__})"
    mend = {
        401: f"; {login}",
        403: "; use a namespace that your token may write to",
        404: f"; check the name; if the repository is private, {login}",
    }
    return f"the Hub answers {status}{mend.get(status, '')}"


def pending(run: Path) -> list[Push]:
    """Pushes that have not succeeded yet. Raises SalsaError if the file cannot be read."""
    path = run / PENDING
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Push]).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise SalsaError(
            f"{path}: is not a list of pending pushes; remove the file, then push again and name the results"
        ) from error


def write_pending(run: Path, queue: Sequence[Push]) -> None:
    """Write the file of pending pushes, or remove the file if no push is pending."""
    if queue:
        write_atomic(run / PENDING, json.dumps([dataclasses.asdict(one) for one in queue], indent=2) + "\n")
    else:
        (run / PENDING).unlink(missing_ok=True)


def record_push(run: Path, done: dict[str, Any]) -> None:
    """Append to the file that lists finished pushes; a damaged file is renamed and a new one begun."""
    path = run / PUSHED
    try:
        before = read_json(path) if path.is_file() else []
    except SalsaError as error:
        say(f"hub  {error}; the file is kept as {path.name}.old")
        path.rename(path.with_name(f"{path.name}.old"))
        before = []
    write_atomic(path, json.dumps([*before, {**done, "at": timestamp()}], indent=2) + "\n")

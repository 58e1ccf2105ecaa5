"""The Hub's refusals as one line with the link that helps: licence, login, a wrong name, no network; and Transformers' of what a
repository or folder holds: code of its own, weights that are pickled, no tokenizer."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from salsa_peft.utils.errors import SalsaError, require

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?\Z")
"""A repository's id on the Hub: NAME or NAMESPACE/NAME."""
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
"""What is downloaded of a model's repository: weights in safetensors, configuration, tokenizer and chat template."""
WEB = "https://huggingface.co/"
UNKNOWN = "the Hub's repository"


def explain_hub_error(error: BaseException, model: str | None = None) -> str | None:
    """What to do about an error that comes from the Hub, also wrapped in Transformers' or datasets' errors; else None.

    `model` is the id to name where the error names none (Transformers' of an offline machine don't).
    """
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import errors

    found = list(_chain(error))
    text = " ".join(str(one) for one in found)
    for one in found:
        if isinstance(one, errors.GatedRepoError):
            where = _page(one, text)
            return f"{where} is gated: {where}: accept the licence there, then `hf auth login`"
    for one in found:
        if isinstance(one, errors.RevisionNotFoundError):
            return f"{_page(one, text)}: no such revision there; check `revision`"
        if isinstance(one, errors.RepositoryNotFoundError):
            return f"{_page(one, text)}: not found: check the name, or if it is private log in with `hf auth login`"
    if code := re.search(r"[Tt]he repository (\S+) (?:contains|references) custom code", text):
        return (
            f"{code[1]}: found code of its own (auto_map), which is never run, expected an architecture and a tokenizer that Transformers"
            " has itself"
        )
    if pickled := re.search(r"no file named model\.safetensors.* found in directory (.+?)\.(?:\s|$)", text):
        return (
            f"{pickled[1]}: found no safetensors file, expected the model's weights in one (other formats are not read)"
            "; load the model with Transformers, if you trust the file, and save it again (save_pretrained writes safetensors)"
        )
    if "Couldn't instantiate the backend tokenizer" in text and model:
        return f"{model}: found no tokenizer that Transformers can open, expected its own beside the weights (tokenizer.json)"
    names = [type(one).__name__ for one in found]
    if "DatasetNotFoundError" in names:
        where = _page(None, text)
        if "gated" in text:
            return f"{where} is gated: {where}: accept the licence there, then `hf auth login`"
        return f"{where}: not found: check the name, or if it is private log in with `hf auth login`"
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if any(isinstance(one, offline) for one in found) or "OfflineModeIsEnabled" in text:
        where = _page(None, text)
        where = WEB + model if model and (where == UNKNOWN or where.startswith(WEB + model)) else where
        return f"{where}: not in the local cache and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
    return None


def local_folder(name: str | Path, *, patterns: Iterable[str] = MODEL_FILES, revision: str | None = None) -> Path:
    """An existing folder as it is; for a Hub id the files that match `patterns`, downloaded to the Hub's cache.

    Raises SalsaError for a name that is neither, and if the Hub refuses or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    require(HUB_ID.match(str(name)) is not None, f"{name}: no such folder, and not a Hub id (namespace/name)")
    from huggingface_hub import snapshot_download

    with readable_hub_errors(str(name)):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a Hub id's files in the Hub's cache; None if config.json is not there, or if `name` is not a Hub id."""
    from huggingface_hub import try_to_load_from_cache

    if HUB_ID.match(name) is None:
        return None
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


@contextlib.contextmanager
def readable_hub_errors(model: str) -> Iterator[None]:
    """Within the context the Hub's refusals of `model` become SalsaErrors of one line; other errors stay."""
    try:
        yield
    except Exception as error:  # its libraries' errors have no class in common
        line = explain_hub_error(error, model)
        if line is None:
            raise
        raise SalsaError(line) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__]


def _page(error: BaseException | None, text: str) -> str:
    """The repository's page, from the error's own facts or else from the URL or name in the messages."""
    name = getattr(error, "repo_id", None) if error is not None else None
    kind = getattr(error, "repo_type", None) if error is not None else None
    if name is None:
        match = re.search(
            r"https?://[^/\s]+/(?!docs/)(?:api/)?(?:(models|datasets)/)?([\w.-]+(?:/[\w.-]+)?)(?:/|\s|$)", text
        )
        match = (
            match
            or re.search(r"(Dataset|Couldn't reach) '([\w./-]+)'", text)
            or re.search(r"()['`\"]([\w.-]+/[\w.-]+)['`\"]", text)
        )
        kind, name = (match[1], match[2]) if match else (None, None)
    prefix = "datasets/" if kind and kind.lower().startswith(("dataset", "couldn't")) else ""
    return f"{WEB}{prefix}{name}" if name else UNKNOWN

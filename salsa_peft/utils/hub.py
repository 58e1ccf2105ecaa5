"""Downloads of Hub repositories, the files to publish, and the errors of the Hub and Transformers as one line each."""

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import read_json
from salsa_peft.utils.safetensors_io import NO_SAFETENSORS

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?\Z")
"""A repository's id on the Hub: NAME or NAMESPACE/NAME."""
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
"""The files of a model: weights in safetensors, configuration, tokenizer and chat template."""
PUBLISHED = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model-*-of-*.safetensors", "model.safetensors.index.json", "fingerprint.json", "soup.json", "metrics.json", "policy.json",
    "value_head.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""Patterns of the file names that are published; no other file of a model's folder is published."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{24,}")
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
TIMEOUT = 5.0
"""Seconds that a question about a repository's commit may take."""
PINNED: dict[str, str] = {}
"""Hub id of a model → the revision that is read where none is asked for. `pinned` sets it."""
WEB = "https://huggingface.co/"
UNKNOWN = "the Hub's repository"
GATED = "{} is gated: accept its licence on that page, then run `hf auth login`"
NOT_FOUND = "{}: not found. Check the name; if the repository is private, log in with `hf auth login`"

NAMED = (
    r"https?://[^/\s]+/(?!docs/)(?:api/)?(?:(models|datasets)/)?([\w.-]+(?:/[\w.-]+)?)(?:/|\s|$)",
    r"(Dataset|Couldn't reach) '([\w./-]+)'",
    r"()['`\"]([\w.-]+/[\w.-]+)['`\"]",
)
"""Patterns of a repository's kind and name in an error message, the most reliable first."""


def local_folder(name: str | Path, *, patterns: Iterable[str] = MODEL_FILES, revision: str | None = None) -> Path:
    """The folder of a model or adapter. A Hub repository is first downloaded to the Hub's cache.

    patterns: the files to download. Raises SalsaError if `name` is neither a folder nor a Hub id, or if the Hub refuses
    or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    require(HUB_ID.match(str(name)) is not None, f"{name}: no such folder, and not a Hub id; use namespace/name")
    from huggingface_hub import snapshot_download

    revision = revision or PINNED.get(str(name))
    with readable_hub_errors(str(name)):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Folder of a Hub id's files in the Hub's cache; None without a cached config.json or a valid Hub id."""
    from huggingface_hub import try_to_load_from_cache

    if HUB_ID.match(name) is None:
        return None
    cached = try_to_load_from_cache(name, "config.json", revision=revision or PINNED.get(name))
    return Path(cached).parent if isinstance(cached, str) else None


@contextlib.contextmanager
def pinned(revisions: Mapping[str, str]) -> Iterator[None]:
    """Within the context, models are read at these revisions (Hub id → revision) where none is asked for."""
    before = dict(PINNED)
    PINNED.update(revisions)
    try:
        yield
    finally:
        PINNED.clear()
        PINNED.update(before)


class Repository(NamedTuple):
    """A repository on the Hub at a branch, tag or commit (None: its main branch)."""

    kind: str
    """model or dataset."""
    name: str
    revision: str | None


def resolve_commits(repositories: Iterable[Repository], *, record: bool) -> dict[Repository, str]:
    """The commit of each repository: on the Hub or, if the Hub does not tell it, in the local cache.

    A repository whose commit is in neither is left out. record: note the commits in the cache's refs, so that they are known
    without the Hub; what is then read must be downloaded at these commits.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    class Api(HfApi):
        """HfApi whose resolve_revision waits for TIMEOUT and not without limit."""

        def repo_info(self, *args: Any, **options: Any) -> Any:
            return super().repo_info(*args, **{**options, "timeout": TIMEOUT})

    api, online, found = Api(), not constants.HF_HUB_OFFLINE, {}
    for one in dict.fromkeys(repositories):
        given: dict[str, Any] = {"repo_id": one.name, "repo_type": one.kind, "revision": one.revision}
        if online:
            try:
                with tempfile.TemporaryDirectory() as empty:  # no cache, which would answer for a Hub out of reach
                    found[one] = api.resolve_revision(**given, cache_dir=empty).resolved
            except RevisionResolutionError:
                online = False
            except HfHubHTTPError:
                pass  # missing or gated: the stage that reads the repository says what to do
        if one not in found:
            with contextlib.suppress(RevisionResolutionError):
                found[one] = api.resolve_revision(**given, local_files_only=True).resolved
        elif record:
            api.resolve_revision(**given)
    return found


def model_files(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """The files of a trained model to publish: name → path, or bytes for JSON whose local paths are cut.

    base: the base's id on the Hub, which an adapter's config names then. Raises SalsaError if the folder has no weights in
    safetensors.
    """
    there = sorted(path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in PUBLISHED))
    files: dict[str, Path | bytes] = {path.name: path for path in there}
    require(
        any(name.endswith(".safetensors") and name != "value_head.safetensors" for name in files),
        f"{folder}: has no weights in safetensors, the only format that is published; delete the folder and run again",
    )
    for path in there:
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
            content = read_json(path)
            require(isinstance(content, dict), f"{path}: must be a JSON object; delete the file and run again")
            named = {} if base is None or path.name != "adapter_config.json" else {"base_model_name_or_path": base}
            clean = without_paths(content | named)
            if clean != content:
                files[path.name] = (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def without_paths(value: Any) -> Any:
    """JSON data with absolute paths replaced by their last part."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def check_secrets(files: dict[str, Path | bytes]) -> None:
    """Raise SalsaError if a text file contains the Hub token in use, or anything that looks like one."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for name, content in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        raw = content if isinstance(content, bytes) else content.read_bytes()
        found = (token and token in raw) or (TOKEN.search(raw) and name != "tokenizer.json")
        require(
            not found, f"{name}: contains a token of the Hub; revoke the token, and remove it from the recipe or data"
        )


def licence(base: str, card: Path | None = None, *, online: bool) -> str | None:
    """The licence in the model card of a base: a local file, or that of its Hub id; None if it is unknown.

    online: whether to ask the Hub if the card is not in the local cache.
    """
    from huggingface_hub import metadata_load, model_info, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError
    from yaml import YAMLError

    cached = try_to_load_from_cache(base, "README.md")
    path = next((path for path in (card, cached) if isinstance(path, str | Path) and Path(path).is_file()), None)
    if path is None and not online:
        return None
    try:
        found: Any = model_info(base).card_data if path is None else metadata_load(path)
    except (HTTPError, OSError, ValueError, YAMLError):  # a push must not fail because of the base's card
        return None
    named = None if found is None else found.get("license")
    return named if isinstance(named, str) else None


@contextlib.contextmanager
def readable_hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the Hub and Transformers about the repository `name` into a SalsaError of one line."""
    try:
        yield
    except Exception as error:  # the libraries' errors have no common class
        line = explain_hub_error(error, name)
        if line is None:
            raise
        raise SalsaError(line) from error


def explain_hub_error(error: BaseException, name: str | None = None) -> str | None:
    """Message for an error of the Hub or Transformers, with advice; None for any other error.

    Transformers or datasets may have wrapped the error in an error of their own. name: the repository, for errors that
    do not name it.
    """
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import errors

    chain = list(_chain(error))
    text = " ".join(map(str, chain))
    for kind, words in (
        (errors.GatedRepoError, GATED),
        (errors.RevisionNotFoundError, "{}: this repository has no such revision; check `revision`"),
        (errors.RepositoryNotFoundError, NOT_FOUND),
    ):
        if found := next((one for one in chain if isinstance(one, kind)), None):
            return words.format(_page(found, text))
    if code := re.search(r"[Tt]he repository (\S+) (?:contains|references) custom code", text):
        return (
            f"{code[1]}: its model or tokenizer needs code from the repository (auto_map), which is never run; use a"
            " model that Transformers supports itself"
        )
    if pickled := re.search(r"no file named model\.safetensors.* found in directory (.+?)\.(?:\s|$)", text):
        return f"{pickled[1]}: {NO_SAFETENSORS}"
    if "Couldn't instantiate the backend tokenizer" in text and name:
        return (
            f"{name}: Transformers cannot load a tokenizer from here; put the model's tokenizer (tokenizer.json)"
            " beside its weights"
        )
    if any(type(one).__name__ == "DatasetNotFoundError" for one in chain):
        return (GATED if "gated" in text else NOT_FOUND).format(_page(None, text))
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if any(isinstance(one, offline) for one in chain) or "OfflineModeIsEnabled" in text:
        where = _page(None, text)
        where = WEB + name if name and (where == UNKNOWN or where.startswith(WEB + name)) else where
        why = "not in the local cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
        return f"{where}: {why}; download it while online"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes and its contexts."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__]


def _page(error: BaseException | None, text: str) -> str:
    """URL of the repository, from the error's attributes, or else from a URL or name in the messages."""
    kind, name = getattr(error, "repo_type", None), getattr(error, "repo_id", None)
    if name is None:
        match = next(filter(None, (re.search(pattern, text) for pattern in NAMED)), None)
        kind, name = (match[1], match[2]) if match else (None, None)
    prefix = "datasets/" if kind and kind.lower().startswith(("dataset", "couldn't")) else ""
    return f"{WEB}{prefix}{name}" if name else UNKNOWN

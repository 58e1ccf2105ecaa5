"""Members of a soup, given as folders or Hub ids: their local folders, kind, and names in summaries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import HUB_ID, local_folder
from salsa_peft.utils.manifests import read_manifest

ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
SINGULAR = {ADAPTERS: "an adapter", CHECKPOINTS: "a full checkpoint"}
CONFIGS = {ADAPTERS: ADAPTER_CONFIG, CHECKPOINTS: "config.json"}


def member_names(members: Sequence[Path | str]) -> list[str]:
    """Names for summaries: the unit of a run's folder (sft/seed-0), else the last part of the path or id.

    If these are not unique, the names are the full paths or ids.
    """
    units = [(read_manifest(Path(member)) or {}).get("unit") for member in members]
    paths = [str(member) for member in members]
    ends = [unit or path.rstrip("/.").rsplit("/", 1)[-1] or path for unit, path in zip(units, paths, strict=True)]
    return ends if len(set(ends)) == len(ends) else paths


def kind_of(folders: Sequence[Path]) -> str:
    """The members' kind: adapters or checkpoints. Raises SalsaError for other folders and for a mixture."""
    kinds = [next((kind for kind, file in CONFIGS.items() if (folder / file).is_file()), "") for folder in folders]
    if "" in kinds:
        folder = folders[kinds.index("")]
        patterns = [f"{depth}/{file}" for file in CONFIGS.values() for depth in ("*", "*/*")]
        inside = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise SalsaError(f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a checkpoint (config.json){hint}")
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
    require(
        odd == 0,
        f"{folders[odd]} is {SINGULAR[kinds[odd]]}, but {folders[0]} is {SINGULAR[kinds[0]]}; members of a soup must be"
        " of one kind, so merge the adapters into their base first (--merge)",
    )
    return kinds[0]


def local_members(members: Sequence[Path | str]) -> list[Path]:
    """The folders of all members. Raises SalsaError that lists every member that is not there."""
    unknown = [str(m) for m in members if not Path(m).is_dir() and not ("/" in str(m) and HUB_ID.match(str(m)))]
    files = [str(member) for member in members if Path(member).is_file()]
    require(
        not files,
        f"not a folder: {', '.join(files)}; a member is the folder that holds the file, or a Hub id (namespace/name)",
    )
    require(
        not unknown,
        f"no such folder: {', '.join(unknown)}; a member is a folder of an adapter or a checkpoint, or a Hub id"
        " (namespace/name)",
    )
    return [local(member) for member in members]


def local(name: Path | str, revision: str | None = None, why: str = "") -> Path:
    """An existing folder, or the snapshot of a Hub id. why: for the error, what names the folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    require(
        HUB_ID.match(str(name)) is not None and not path.exists(),
        f"no such folder: {name}{why or '; name a folder, or a Hub id (namespace/name)'}",
    )
    try:
        return local_folder(name, revision=revision)
    except SalsaError as error:
        raise SalsaError(f"no such folder: {name}{why}; as a Hub id: {error}") from error

"""Finds the local folders of a soup's members, their kind (adapters or checkpoints) and their names."""

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
    """The members' names in summaries: for a member that a run made, its stage and seed (sft/seed-0).

    Any other member is named by the last part of its path or Hub id. If two names are equal, all members are named by
    their full paths or ids.
    """
    units = [(read_manifest(Path(member)) or {}).get("unit") for member in members]
    paths = [str(member) for member in members]
    ends = [unit or path.rstrip("/.").rsplit("/", 1)[-1] or path for unit, path in zip(units, paths, strict=True)]
    return ends if len(set(ends)) == len(ends) else paths


def kind_of(folders: Sequence[Path]) -> str:
    """Whether all members are "adapters" or "checkpoints". Raises SalsaError for a mix, or other folders."""
    kinds = [next((kind for kind, file in CONFIGS.items() if (folder / file).is_file()), "") for folder in folders]
    if "" in kinds:
        folder = folders[kinds.index("")]
        patterns = [f"{depth}/{file}" for file in CONFIGS.values() for depth in ("*", "*/*")]
        inside = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
        hint = f"; did you mean {inside[-1]}?" if inside else "; name the folder of an adapter or a checkpoint"
        raise SalsaError(f"{folder} holds neither an adapter ({ADAPTER_CONFIG}) nor a checkpoint (config.json){hint}")
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
    require(
        odd == 0,
        f"{folders[odd]} is {SINGULAR[kinds[odd]]}, but {folders[0]} is {SINGULAR[kinds[0]]}; a soup cannot mix"
        " adapters and checkpoints: merge the adapters into their base first (--merge)",
    )
    return kinds[0]


def local_members(members: Sequence[Path | str]) -> list[Path]:
    """The members' local folders. Raises SalsaError that lists those that are no folder or Hub id."""
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
    """The local folder of a path or Hub id. why: text for the error, such as the file that names the path."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve() if path.is_symlink() else path  # a run may change the link while the folder is read
    require(
        HUB_ID.match(str(name)) is not None and not path.exists(),
        f"no such folder: {name}{why or '; name a folder, or a Hub id (namespace/name)'}",
    )
    try:
        return local_folder(name, revision=revision)
    except SalsaError as error:
        raise SalsaError(f"no such folder: {name}{why}; as a Hub id: {error}") from error

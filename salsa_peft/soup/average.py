"""Soups: members → their weighted mean. The library call, for adapters and for full checkpoints; the command is soup/__main__.py.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; of adapters the exact weighted mean of their deltas (soup/lora/stacked_adapter.py)

Stands on its own: knows nothing of PPO; its adapters open with plain PEFT, its checkpoints with plain Transformers. How weights
are chosen is in soup/strategies.py, "I want to add a strategy" a row there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from salsa_peft.models.adapters.bases import local_folder, require_same_family
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.soup.checkpoints.read import check_weights, read_checkpoint
from salsa_peft.soup.checkpoints.write import check_free
from salsa_peft.soup.lora.members import check_one_base
from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.lora.write import check_out
from salsa_peft.soup.provenance import provenance
from salsa_peft.soup.result import SoupSummary
from salsa_peft.soup.strategies import STRATEGIES, Ask, Choice, Measure
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.hub import HUB_ID, readable_hub_errors
from salsa_peft.utils.manifests import read_manifest

Progress = Callable[[int, int], None]
ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
ONE = {ADAPTERS: "an adapter", CHECKPOINTS: "a full checkpoint"}
MEMBER_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a soup is made, besides its members and weights."""

    strategy: str = "linear"
    """linear | slerp | greedy | learned"""
    measure: Measure | None = None
    """What greedy and learned go by: weights → a number, higher is better (soup/measures.py)."""
    steps: int = 20
    """learned: steps of Adam."""
    step_size: float = 0.1
    """learned: Adam's learning rate, of the weights' logits."""
    normalize: bool = False
    """Divide the weights by their sum, where that is not 1. Without it adapters give a scaled delta, and checkpoints are refused."""
    rank: int | None = None
    """Adapters: recompress to this rank, which loses what the summary's `error` says. None: exact, rank Σ r_i."""
    dtype: str | None = None
    """Adapters: of the factors. None: the members'."""
    merge: bool = False
    """Adapters: added to `base` and saved as a checkpoint."""
    base: str | Path | None = None
    """The base's folder or Hub id. Checkpoints: what slerp and cosines are taken from. With `merge`; None: what the members name."""
    quantized_base: str | None = None
    """nf4, with `merge`: the base goes through that quantisation first, as the members saw it when they were trained (QLoRA)."""
    same_base: bool = False
    """Adapters: the caller asserts that they are of one base, though it is called differently or fingerprints differ."""
    untie: bool = False
    """With `merge`: LoRA on tied embeddings is merged into input and output embeddings of their own; else as PEFT does, into one tensor."""


def soup(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    strategy: str = "linear",
    measure: Measure | None = None,
    steps: int = 20,
    step_size: float = 0.1,
    normalize: bool = False,
    rank: int | None = None,
    dtype: str | None = None,
    merge: bool = False,
    base: str | Path | None = None,
    quantized_base: str | None = None,
    same_base: bool = False,
    untie: bool = False,
    progress: Progress | None = None,
) -> SoupSummary:
    """Average adapters, or checkpoints, into the folder `out` (weights: uniform unless given); the summary, also out/soup.json.

    Members are folders or Hub ids, all of one kind. `names` are what the summary calls the members (default: the ends of their paths);
    the other arguments are Options' fields. Adapters take weights of any sum where nothing but deltas is averaged, or with `merge`:
    the result is a scaled delta. `progress` is told (done, in all), modules or bytes. Raises SalsaError for what cannot be averaged;
    then nothing is written.
    """
    asked = Options(
        strategy=strategy, measure=measure, steps=steps, step_size=step_size, normalize=normalize, rank=rank, dtype=dtype, merge=merge,
        base=base, quantized_base=quantized_base, same_base=same_base, untie=untie,
    )  # fmt: skip
    require(bool(members), "members: none given, expected at least one adapter or checkpoint")
    folders = local_members(members)
    kind = kind_of(folders)
    given = _weights(weights, len(folders), normalize, kind)
    called_ = list(called(members) if names is None else names)
    require(len(called_) == len(folders), f"names: {len(called_)} given, expected {len(folders)}: one for each member")
    stacked = None if kind == CHECKPOINTS or merge else StackedAdapter.load(folders, called_, same_base=same_base)
    found = check(Path(out), folders, asked, stacked)
    origins = list(zip(called_, members, folders, strict=True))
    more: dict[str, Any] = {"asked": given, "normalized": normalize, "sum": math.fsum(given)}
    job = _Job(Path(out), folders, called_, given, asked, found, more, origins, progress)
    if kind == CHECKPOINTS:
        return cast(SoupSummary, _checkpoints(job))
    return cast(SoupSummary, _merged(job) if merge else _adapters(job, cast(StackedAdapter, stacked)))


class _Job(NamedTuple):
    """A soup that was asked for, its members at hand."""

    out: Path
    folders: list[Path]
    names: list[str]
    weights: list[float]
    asked: Options
    base: Path | None
    more: dict[str, Any]
    """What the summary says besides figures."""
    origins: list[tuple[str, Path | str, Path]]
    """Of each member its name, what was given and the folder."""
    progress: Progress | None

    def choose(self, gram: Callable[[], Any]) -> Choice:
        """The weights by the strategy; the summary gets what was tried, and where the members came from."""
        asked = self.asked
        choice = STRATEGIES[asked.strategy](Ask(self.weights, gram, asked.measure, asked.steps, asked.step_size))
        base = None if self.base is None else (asked.base or self.base, self.base)
        self.more.update({"tried": choice.tried} if choice.tried else {})
        self.more["provenance"] = provenance(self.origins, choice.weights, base)
        return choice


def _weights(weights: Sequence[float] | None, members: int, normalize: bool, kind: str) -> list[float]:
    """One for each member. Raises SalsaError for what is no such list, and for a sum that this kind of member cannot have."""
    given = [1 / members] * members if weights is None else check_weights(weights, members)
    total = math.fsum(given)
    require(
        any(given),
        f"weights: {', '.join(f'{weight:g}' for weight in given)}: all are 0, so that nothing is left of the members",
    )
    if normalize:
        require(total != 0, f"weights: {given} sum to 0 and cannot be normalised: change one of them")
        given = [weight / total for weight in given]
    require(
        kind == ADAPTERS or normalize or abs(total - 1) <= 1e-6,
        f"weights: {', '.join(f'{weight:g}' for weight in given)} sum to {total:.9g}, expected 1, since checkpoints are averaged and not"
        " scaled: change one of them, or divide them by their sum with normalize=True (--normalize)",
    )
    return given


def check(out: Path, folders: Sequence[Path], asked: Options, stacked: StackedAdapter | None = None) -> Path | None:
    """Raise SalsaError for whatever can be refused before weights are looked for; → the base's folder, where one is used.

    stacked: the members, where they are adapters and have been read.
    """
    require(
        asked.strategy in STRATEGIES,
        f"strategy: {asked.strategy!r} is not one of {', '.join(STRATEGIES)}",
    )
    require(asked.steps > 0, f"steps: {asked.steps}, expected at least 1")
    require(asked.step_size > 0, f"step_size: {asked.step_size}, expected more than 0")
    if kind_of(folders) == CHECKPOINTS:
        for name in ("rank", "dtype", "merge", "quantized_base", "same_base", "untie"):
            value = getattr(asked, name)
            require(not value, f"{name}: {value} is for adapters, and the members are checkpoints: leave it out")
        require(
            asked.strategy != "slerp" or asked.base is not None,
            "strategy slerp of checkpoints needs the base that they were trained from (--base): the angle is that of what each added to it",
        )
        check_free(out, folders)
        return None if asked.base is None else local(asked.base)
    require(asked.rank is None or asked.rank > 0, f"rank: {asked.rank}, expected at least 1")
    if not asked.merge:
        for name in ("quantized_base", "untie"):
            value = getattr(asked, name)
            require(
                not value,
                f"{name}: {value} is for a soup that is merged into its base: add merge=True (--merge), or leave it out",
            )
        check_out(out, (stacked or StackedAdapter.load(folders, same_base=asked.same_base)).members)
        return None
    for name, why in (("rank", "is exact and has no rank"), ("dtype", "has the base's")):
        value = getattr(asked, name)
        require(value is None, f"{name}: {value} does not go with merge: a merged soup {why}; leave it out")
    check_free(out, folders)
    base = _merge_base(folders, asked)
    check_family(folders, base, asked.same_base)
    return base


def _merge_base(folders: Sequence[Path], asked: Options) -> Path:
    """The folder of the base that the members are merged into."""
    from salsa_peft.soup.merge.members import read_members

    members = read_members(folders, None)
    if asked.base is None:
        check_one_base(members, asked.same_base, merging=True)
    if asked.base is None and (found := local_folder(members[0].config, folders[0])) is not None:
        return found
    given, revision = base_of(members[0].config, folders[0], asked.base)
    return local(
        given,
        revision,
        why="" if asked.base else f", which {folders[0] / ADAPTER_CONFIG} names as the base; name it with --base",
    )


def check_family(folders: Sequence[Path], base: Path, same_base: bool) -> None:
    """Raise SalsaError where an adapter names a base of another architecture or size than this one, unless the caller asserts the base."""
    config = None if same_base else config_of_base(str(base.absolute()), None)
    if config is not None:
        for folder in folders:
            require_same_family(folder, config, str(base))


def base_of(config: Mapping[str, Any], folder: Path, given: str | Path | None) -> tuple[str | Path, str | None]:
    """The base's folder or Hub id, and its revision: as given, else what an adapter's configuration names. Raises SalsaError for none."""
    if given is not None:
        return given, None
    named = config["base_model_name_or_path"]
    require(bool(named), f"base: {folder / ADAPTER_CONFIG} names none: give the base's folder or Hub id (--base)")
    return named, config["revision"]


def _adapters(job: _Job, stacked: StackedAdapter) -> dict[str, Any]:
    choice = job.choose(stacked.gram)
    used = _used(job, choice)
    if len(used) < len(job.folders):
        stacked = StackedAdapter.load(
            [job.folders[i] for i in used], [job.names[i] for i in used], same_base=job.asked.same_base
        )
    done = 0

    def tell(modules: int, total: int) -> None:
        nonlocal done
        done += modules
        if job.progress is not None:
            job.progress(done, total)

    return stacked.save(
        job.out, [choice.weights[i] for i in used], strategy=job.asked.strategy, rank=job.asked.rank, dtype=job.asked.dtype,
        progress=tell, more=job.more,
    )  # fmt: skip


def _used(job: _Job, choice: Choice) -> list[int]:
    """Members of another weight than 0: a block of zeros would be rank for nothing."""
    used = [i for i, weight in enumerate(choice.weights) if weight]
    if not used:
        return list(range(len(choice.weights)))
    if len(used) < len(choice.weights):
        job.more["left_out"] = [job.names[i] for i in range(len(job.names)) if i not in used]
    return used


def _merged(job: _Job) -> dict[str, Any]:
    from salsa_peft.soup.merge import average as merged_soup

    assert job.base is not None
    asked = job.asked
    read_checkpoint(job.base)  # so that what is wrong with it is said before anything is made of it
    choice = job.choose(lambda: StackedAdapter.load(job.folders, job.names, same_base=asked.same_base).gram())
    used = _used(job, choice)
    return merged_soup.merge(
        job.out, job.base, [job.folders[i] for i in used], [choice.weights[i] for i in used], names=[job.names[i] for i in used],
        strategy=asked.strategy, quantized_base=asked.quantized_base, same_base=asked.same_base, untie=asked.untie,
        progress=job.progress, more=job.more,
    )  # fmt: skip


def _checkpoints(job: _Job) -> dict[str, Any]:
    from salsa_peft.soup.checkpoints import average as checkpoint_soup

    base, asked = job.base, job.asked
    for folder in (*job.folders, *([] if base is None else [base])):
        read_checkpoint(folder)  # so that what is wrong with one is said before anything is made of it

    def gram() -> Any:
        assert base is not None
        return checkpoint_soup.gram(job.folders, base)

    choice = job.choose(gram)
    members, shares, names = list(job.folders), list(choice.weights), list(job.names)
    rest = 1 - sum(shares)  # of the base: Σ w_i δ_i added to it is Σ w_i θ_i + (1 − Σ w_i) θ_base
    if base is not None and abs(rest) > 1e-9:
        members, shares, names = [*members, base], [*shares, rest], [*names, "base"]
    more = {key: value for key, value in job.more.items() if key != "sum"}  # of what is added up, the base included
    return checkpoint_soup.average(
        job.out,
        members,
        shares,
        names=names,
        base=base,
        strategy=asked.strategy,
        progress=job.progress,
        more=more,
    )


def called(members: Sequence[Path | str]) -> list[str]:
    """What a summary calls the members: of a run's folders their units (sft/seed-0), else the ends of their paths or ids, where these differ."""
    ends = [_unit(Path(member)) or str(member).rstrip("/.").rsplit("/", 1)[-1] or str(member) for member in members]
    return ends if len(set(ends)) == len(ends) else [str(member) for member in members]


def _unit(folder: Path) -> str | None:
    """Of a folder that a run finished, what it is there."""
    return (read_manifest(folder) or {}).get("unit")


def kind_of(folders: Sequence[Path]) -> str:
    """adapters | checkpoints. Raises SalsaError for a folder that is neither, and for members of both kinds."""
    kinds = []
    for folder in folders:
        files = {ADAPTERS: ADAPTER_CONFIG, CHECKPOINTS: "config.json"}
        found = next((kind for kind, file in files.items() if (folder / file).is_file()), None)
        if found is None:
            inside = sorted(
                p.parent for file in files.values() for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{file}")
            )
            hint = f"; did you mean {inside[-1]}?" if inside else ""
            raise SalsaError(
                f"{folder} is neither an adapter's folder ({ADAPTER_CONFIG}) nor a checkpoint's (config.json){hint}"
            )
        kinds.append(found)
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    require(
        odd is None,
        f"{folders[odd or 0]} is {ONE[kinds[odd or 0]]}, {folders[0]} is {ONE[kinds[0]]}: members of a soup are of one kind; merge the"
        " adapters into their base first (--merge)",
    )
    return kinds[0]


def local_members(members: Sequence[Path | str]) -> list[Path]:
    """The folders of all members. Raises SalsaError that names every one that is no folder."""
    missing = [str(member) for member in members if not Path(member).is_dir() and not _may_be_hub_id(member)]
    files = [name for name in missing if Path(name).exists()]
    require(
        not files,
        f"not a folder: {', '.join(files)}; a member is the folder that holds the file, or a Hub id (namespace/name)",
    )
    require(
        not missing,
        f"no such folder: {', '.join(missing)}; a member is an adapter's or a checkpoint's folder, or a Hub id (namespace/name)",
    )
    return [local(member) for member in members]


def _may_be_hub_id(name: Path | str) -> bool:
    return "/" in str(name) and HUB_ID.match(str(name)) is not None and not Path(name).exists()


def local(member: Path | str, revision: str | None = None, why: str = "") -> Path:
    """A folder as it is; a Hub id → its files in the Hub's cache. Raises SalsaError for what is neither, or not to be had; `why` says who
    names it."""
    path = Path(member).expanduser()
    if path.is_dir():
        return path
    require(
        HUB_ID.match(str(member)) is not None and not path.exists(),
        f"no such folder: {member}{why or '; expected a folder, or a Hub id (namespace/name)'}",
    )
    from huggingface_hub import snapshot_download

    try:
        with readable_hub_errors(str(member)):
            return Path(snapshot_download(str(member), revision=revision, allow_patterns=MEMBER_FILES))
    except SalsaError as error:
        raise SalsaError(f"no such folder: {member}{why}; as a Hub id: {error}") from error

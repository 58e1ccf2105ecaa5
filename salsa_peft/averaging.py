"""Soups: members → their weighted mean. The library call, for adapters and for full checkpoints; the command is soup.py.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; of adapters the exact weighted mean of their deltas (stacked_adapter.py)

Stands on its own: knows nothing of PPO; its adapters open with plain PEFT, its checkpoints with plain Transformers. How weights
are chosen is in strategies.py, "I want to add a strategy" a row there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.adapter_folders import CONFIG as ADAPTER_CONFIG
from salsa_peft.adapter_folders import check_out
from salsa_peft.config import require
from salsa_peft.hub_errors import said_in_a_line
from salsa_peft.paths import HUB_ID
from salsa_peft.runs import read_manifest
from salsa_peft.stacked_adapter import StackedAdapter, check_weights
from salsa_peft.strategies import STRATEGIES, Ask, Choice, Measure

Progress = Callable[[int, int], None]
ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
MEMBER_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a soup is made, besides its members and weights."""

    strategy: str = "linear"
    """linear | slerp | greedy | learned"""
    measure: Measure | None = None
    """What greedy and learned go by: weights → a number, higher is better (measures.py)."""
    steps: int = 20
    """learned: steps of Adam."""
    step_size: float = 0.1
    """learned: Adam's learning rate, of the weights' logits."""
    normalize: bool = False
    """Divide the weights by their sum, where that is not 1; without it such weights are refused."""
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
    device: str = "cpu"
    """Where checkpoints are added up: cpu or cuda."""


def soup(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Average adapters, or checkpoints, into the folder `out` (weights: uniform unless given); the summary, also out/soup.json.

    Members are folders or Hub ids, all of one kind. `options` are Options' fields; `names` are what the summary calls the members
    (default: the ends of their paths); `progress` is told (done, in all), modules or bytes. Raises SalsaError for what cannot be
    averaged; then nothing is written.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    wrong = next((name for name in options if name not in known), None)
    require(wrong is None, f"{wrong}: found no such option of a soup, expected one of {', '.join(known)}")
    asked = Options(**options)
    require(bool(members), "members: found none, expected at least one adapter or checkpoint")
    folders = [local(member) for member in members]
    given = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    total = sum(check_weights(given, len(folders)))
    if asked.normalize:
        require(total != 0, f"weights: found {given}, which sum to 0 and can't be normalised, expected another sum")
        given = [weight / total for weight in given]
    check_weights(given, len(folders), sum_to_one=True)
    names = called(members) if names is None else names
    if kind_of(folders) == CHECKPOINTS:
        return _checkpoints(Path(out), folders, given, asked, check(Path(out), folders, asked), names, progress)
    stacked = StackedAdapter.load(folders, names)
    return _adapters(Path(out), stacked, given, asked, check(Path(out), folders, asked, stacked), progress)


def check(out: Path, folders: Sequence[Path], asked: Options, stacked: StackedAdapter | None = None) -> Path | None:
    """Raise SalsaError for whatever can be refused before weights are looked for; → the base's folder, where one is used.

    stacked: the members, where they are adapters and have been read.
    """
    require(
        asked.strategy in STRATEGIES,
        f"strategy: found {asked.strategy!r}, expected one of {', '.join(STRATEGIES)}",
    )
    require(asked.steps > 0, f"steps: found {asked.steps}, expected at least 1")
    require(asked.step_size > 0, f"step_size: found {asked.step_size}, expected more than 0")
    if kind_of(folders) == CHECKPOINTS:
        for name in ("rank", "dtype", "merge", "quantized_base"):
            value = getattr(asked, name)
            require(not value, f"{name}: found {value} with checkpoints as members, expected none: it is for adapters")
        require(
            asked.strategy != "slerp" or asked.base is not None,
            "strategy slerp: found checkpoints and no base, expected the base that they were trained from: the angle is that of what"
            " each added to it",
        )
        return None if asked.base is None else local(asked.base)
    require(
        asked.device == "cpu", f"device: found {asked.device}, expected cpu: adapters are small; it is for checkpoints"
    )
    require(asked.rank is None or asked.rank > 0, f"rank: found {asked.rank}, expected at least 1")
    members = (stacked or StackedAdapter.load(folders)).members
    if not asked.merge:
        require(
            asked.quantized_base is None,
            f"quantized_base: found {asked.quantized_base} without merge, expected both: an adapter's soup does not read the base",
        )
        check_out(out, members)
        return None
    for name, why in (("rank", "is exact and has no rank"), ("dtype", "has the base's")):
        value = getattr(asked, name)
        require(value is None, f"{name}: found {value} with merge, expected none: a merged soup {why}")
    return local(*base_of(members[0].config, folders[0], asked.base))


def base_of(config: Mapping[str, Any], folder: Path, given: str | Path | None) -> tuple[str | Path, str | None]:
    """The base's folder or Hub id, and its revision: as given, else what an adapter's configuration names. Raises SalsaError for none."""
    if given is not None:
        return given, None
    named = config["base_model_name_or_path"]
    require(
        bool(named), f"base: found none, and {folder / ADAPTER_CONFIG} names none, expected the base's folder or Hub id"
    )
    return named, config["revision"]


def _choose(asked: Options, weights: list[float], gram: Callable[[], Any]) -> Choice:
    return STRATEGIES[asked.strategy](Ask(weights, gram, asked.measure, asked.steps, asked.step_size))


def _adapters(out: Path, stacked: StackedAdapter, weights: list[float], asked: Options, base: Path | None,
              progress: Progress | None) -> dict[str, Any]:  # fmt: skip
    choice = _choose(asked, weights, stacked.gram)
    more = _chosen(weights, choice, asked)
    used = [i for i, weight in enumerate(choice.weights) if weight]
    members = stacked.members
    if 0 < len(used) < len(members):  # a block of zeros would be rank for nothing
        more["left_out"] = [members[i].name for i in range(len(members)) if i not in used]
        stacked = StackedAdapter.load([members[i].folder for i in used], [members[i].name for i in used])
        choice = Choice([choice.weights[i] for i in used], choice.tried)
    if base is not None:
        from salsa_peft import merged_soup

        return merged_soup.merge(out, base, stacked, choice.weights, strategy=asked.strategy,
                                 quantized_base=asked.quantized_base, progress=progress, more=more)  # fmt: skip
    done = 0

    def tell(modules: int, total: int) -> None:
        nonlocal done
        done += modules
        if progress is not None:
            progress(done, total)

    return stacked.save(
        out, choice.weights, strategy=asked.strategy, rank=asked.rank, dtype=asked.dtype, progress=tell, more=more
    )


def _checkpoints(out: Path, folders: list[Path], weights: list[float], asked: Options, base: Path | None, names: Sequence[str],
                 progress: Progress | None) -> dict[str, Any]:  # fmt: skip
    from salsa_peft import checkpoint_soup

    def gram() -> Any:
        assert base is not None
        return checkpoint_soup.gram(folders, base, device=asked.device)

    choice = _choose(asked, weights, gram)
    members, shares, called = list(folders), list(choice.weights), list(names)
    rest = 1 - sum(shares)  # of the base: Σ w_i δ_i added to it is Σ w_i θ_i + (1 − Σ w_i) θ_base
    if base is not None and abs(rest) > 1e-9:
        members, shares, called = [*members, base], [*shares, rest], [*called, "base"]
    return checkpoint_soup.average(out, members, shares, names=called, device=asked.device, base=base, strategy=asked.strategy,
                                   progress=progress, more=_chosen(weights, choice, asked))  # fmt: skip


def called(members: Sequence[Path | str]) -> list[str]:
    """What a summary calls the members: of a run's folders their units (sft/seed-0), else the ends of their paths or ids, where these differ."""
    ends = [_unit(Path(member)) or str(member).rstrip("/.").rsplit("/", 1)[-1] or str(member) for member in members]
    return ends if len(set(ends)) == len(ends) else [str(member) for member in members]


def _unit(folder: Path) -> str | None:
    """Of a folder that a run finished, what it is there."""
    return (read_manifest(folder) or {}).get("unit")


def _chosen(weights: list[float], choice: Choice, asked: Options) -> dict[str, Any]:
    """What the summary says of how the weights came about."""
    found: dict[str, Any] = {"asked": weights, "normalized": asked.normalize}
    return found | ({"tried": choice.tried} if choice.tried else {})


def kind_of(folders: Sequence[Path]) -> str:
    """adapters | checkpoints. Raises SalsaError for a folder that is neither, and for members of both kinds."""
    kinds = []
    for folder in folders:
        files = {ADAPTERS: ADAPTER_CONFIG, CHECKPOINTS: "config.json"}
        found = next((kind for kind, file in files.items() if (folder / file).is_file()), None)
        require(
            found is not None,
            f"{folder}: found neither {ADAPTER_CONFIG} nor config.json, expected a PEFT adapter's folder or a checkpoint's",
        )
        kinds.append(str(found))
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    require(
        odd is None,
        f"{folders[odd or 0]}: found one of {kinds[odd or 0]}, {folders[0]} is one of {kinds[0]}; expected members of one kind: merge"
        " the adapters into their base first (--merge)",
    )
    return kinds[0]


def local(member: Path | str, revision: str | None = None) -> Path:
    """A folder as it is; a Hub id → its files in the Hub's cache. Raises SalsaError for what is neither, or not to be had."""
    if Path(member).is_dir():
        return Path(member)
    require(
        HUB_ID.match(str(member)) is not None and not Path(member).exists(),
        f"{member}: found no such folder, expected an adapter's or a checkpoint's folder, or a Hub id (namespace/name)",
    )
    from huggingface_hub import snapshot_download

    with said_in_a_line(f"{member} (which is no folder here)"):
        return Path(snapshot_download(str(member), revision=revision, allow_patterns=MEMBER_FILES))

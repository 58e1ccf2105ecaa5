"""Soups: members → their weighted mean. The library call, for adapters and for full checkpoints; the command is soup.py.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; of adapters the exact weighted mean of their deltas (stacked_adapter.py)

Stands on its own: knows nothing of PPO; its adapters open with plain PEFT, its checkpoints with plain Transformers. How weights
are chosen is in strategies.py, "I want to add a strategy" a row there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.adapter_folders import CONFIG as ADAPTER_CONFIG
from salsa_peft.checks import HUB_ID
from salsa_peft.config import require
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
    (default: their folders' names); `progress` is told (done, in all), modules or bytes. Raises SalsaError for what cannot be averaged; then nothing is written.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    wrong = next((name for name in options if name not in known), None)
    require(wrong is None, f"{wrong}: found no such option of a soup, expected one of {', '.join(known)}")
    asked = Options(**options)
    require(
        asked.strategy in STRATEGIES,
        f"strategy: found {asked.strategy!r}, expected one of {', '.join(STRATEGIES)}",
    )
    require(bool(members), "members: found none, expected at least one adapter or checkpoint")
    folders = [local(member) for member in members]
    kind = kind_of(folders)
    given = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    total = sum(check_weights(given, len(folders)))
    if asked.normalize:
        require(total != 0, f"weights: found {given}, which sum to 0 and can't be normalised, expected another sum")
        given = [weight / total for weight in given]
    check_weights(given, len(folders), sum_to_one=True)
    made = _adapters if kind == ADAPTERS else _checkpoints
    return made(Path(out), folders, given, asked, names, progress)


def _choose(asked: Options, weights: list[float], gram: Callable[[], Any]) -> Choice:
    return STRATEGIES[asked.strategy](Ask(weights, gram, asked.measure, asked.steps, asked.step_size))


def _adapters(out: Path, folders: list[Path], weights: list[float], asked: Options, names: Sequence[str] | None,
              progress: Progress | None) -> dict[str, Any]:  # fmt: skip
    stacked = StackedAdapter.load(folders, names)
    require(
        asked.device == "cpu", f"device: found {asked.device}, expected cpu: adapters are small; it is for checkpoints"
    )
    require(
        asked.merge or asked.quantized_base is None,
        f"quantized_base: found {asked.quantized_base} without merge, expected both: an adapter's soup does not read the base",
    )
    choice = _choose(asked, weights, stacked.gram)
    used = [i for i, weight in enumerate(choice.weights) if weight]
    if 0 < len(used) < len(folders):  # a block of zeros would be rank for nothing
        left_out = [stacked.members[i].name for i in range(len(folders)) if i not in used]
        stacked = StackedAdapter.load([folders[i] for i in used], [stacked.members[i].name for i in used])
        choice = Choice([choice.weights[i] for i in used], choice.tried)
    else:
        left_out = []
    done = 0

    def tell(modules: int, total: int) -> None:
        nonlocal done
        done += modules
        if progress is not None:
            progress(done, total)

    more = _chosen(weights, choice, asked) | ({"left_out": left_out} if left_out else {})
    if not asked.merge:
        return stacked.save(
            out, choice.weights, strategy=asked.strategy, rank=asked.rank, dtype=asked.dtype, progress=tell, more=more
        )
    require(
        asked.rank is None,
        f"rank: found {asked.rank} with merge, expected none: a merged soup is exact and has no rank",
    )
    require(asked.dtype is None, f"dtype: found {asked.dtype} with merge, expected none: a merged soup has the base's")
    named = stacked.members[0].config["base_model_name_or_path"]
    base = asked.base if asked.base is not None else named
    require(
        bool(base),
        f"base: found none, and {folders[0] / ADAPTER_CONFIG} names none, expected the base's folder or Hub id",
    )
    from salsa_peft import merged_soup

    return merged_soup.merge(out, local(str(base)), stacked, choice.weights, strategy=asked.strategy,
                             quantized_base=asked.quantized_base, progress=progress, more=more)  # fmt: skip


def _checkpoints(out: Path, folders: list[Path], weights: list[float], asked: Options, names: Sequence[str] | None,
                 progress: Progress | None) -> dict[str, Any]:  # fmt: skip
    from salsa_peft import checkpoint_soup

    for name in ("rank", "dtype", "merge", "quantized_base"):
        value = getattr(asked, name)
        require(not value, f"{name}: found {value} with checkpoints as members, expected none: it is for adapters")
    base = None if asked.base is None else local(str(asked.base))
    require(
        asked.strategy != "slerp" or base is not None,
        "strategy slerp: found checkpoints and no base, expected the base that they were trained from: the angle is that of what each"
        " added to it",
    )

    def gram() -> Any:
        assert base is not None
        return checkpoint_soup.gram(folders, base, device=asked.device)

    choice = _choose(asked, weights, gram)
    rest = 1 - sum(choice.weights)  # of the base: Σ w_i δ_i added to it is Σ w_i θ_i + (1 − Σ w_i) θ_base
    with_base = base is not None and abs(rest) > 1e-9
    return checkpoint_soup.average(
        out, [*folders, *([base] if with_base and base is not None else [])], [*choice.weights, *([rest] if with_base else [])],
        names=None if names is None else [*names, *(["base"] if with_base else [])], device=asked.device, base=base,
        strategy=asked.strategy, progress=progress, more=_chosen(weights, choice, asked),
    )  # fmt: skip


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


def local(member: Path | str) -> Path:
    """A folder as it is; a Hub id → its files in the Hub's cache. Raises SalsaError for what is neither."""
    if Path(member).is_dir():
        return Path(member)
    require(
        HUB_ID.match(str(member)) is not None and not Path(member).exists(),
        f"{member}: found no such folder, expected an adapter's or a checkpoint's folder, or a Hub id (namespace/name)",
    )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(member), allow_patterns=MEMBER_FILES))

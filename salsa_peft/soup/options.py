"""The options of `soup()`, and the checks of options and members before any tensor is read."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.options.soup import GEOMETRIC_STRATEGIES, check_strategy
from salsa_peft.models.adapters.bases import local_base, require_same_family
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.soup.checkpoints.read import check_weights
from salsa_peft.soup.checkpoints.write import check_free
from salsa_peft.soup.lora.members import check_one_base
from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.member_folders import ADAPTERS, CHECKPOINTS, kind_of, local
from salsa_peft.soup.strategies import STRATEGIES, Measure
from salsa_peft.soup.strategies.elementwise import ELEMENTWISE
from salsa_peft.utils.errors import require

BASE = "base"
"""The start of a soup whose task vectors are changes from the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a soup, besides its members and weights."""

    strategy: str = "linear"
    """One of STRATEGIES (soup/strategies)."""
    per: str = "model"
    """slerp, karcher, model_stock: one set of weights for the `model`, or one for each `layer` (module or tensor)."""
    start: str | Path = BASE
    """The model from which task vectors are measured: base, or the folder or Hub id of a model like the members."""
    scale: float = 1.0
    """The soup is start + scale · (merged task vector)."""
    density: float | None = None
    """ties, dare: share of each matrix's elements that is kept, in (0, 1]. None: DENSITY (strategies/elementwise.py)."""
    drop_seed: int | None = None
    """dare: seed of the random choice of the elements that are dropped. None: 0."""
    measure: Measure | None = None
    """The measure that greedy and learned maximize (soup/measures.py)."""
    steps: int = 20
    """Number of Adam steps of the strategy `learned`."""
    step_size: float = 0.1
    """Adam's learning rate for the logits of the weights, in the strategy `learned`."""
    normalize: bool = False
    """Divide the weights by their sum."""
    rank: int | None = None
    """Adapters: rank to which the soup is reduced by SVD. None: the exact soup, of rank Σ r_i."""
    dtype: str | None = None
    """Adapters: dtype of the soup's A and B. None: the dtype of the members."""
    merge: bool = False
    """Adapters: add the soup to `base` and save a checkpoint."""
    base: str | Path | None = None
    """Folder or Hub id of the base; None: the adapters' own. The start of checkpoints, if `start` is base."""
    quantized_base: str | None = None
    """With merge: nf4 or nf4-double, in which the base is first quantised and dequantised."""
    same_base: bool = False
    """Adapters: assert that all have one base, even if they give it different names or fingerprints."""
    untie: bool = False
    """With merge: untie tied embeddings that have LoRA. By default they stay one tensor, as in PEFT."""

    @property
    def start_model(self) -> str | Path | None:
        """Folder or Hub id of the start; None if it is the base."""
        return None if self.start == BASE else self.start


def requested_weights(
    weights: Sequence[float] | None, members: int, normalize: bool = False, kind: str = ADAPTERS
) -> list[float]:
    """One weight per member, by default uniform. Raises SalsaError if a weight or the sum is not allowed."""
    given = [1 / members] * members if weights is None else check_weights(weights, members)
    total = math.fsum(given)
    require(any(given), "weights: all are 0, so no member is left; give at least one member a weight other than 0")
    if normalize:
        require(total != 0, f"weights: {given} sum to 0, so they cannot be normalized; change one of them")
        given = [weight / total for weight in given]
    require(
        kind == ADAPTERS or normalize or abs(total - 1) <= 1e-6,
        f"weights: {', '.join(f'{weight:g}' for weight in given)} sum to {total:.9g}, but the weights of checkpoints"
        " must sum to 1; change one of them, or divide them by their sum with normalize=True (--normalize)",
    )
    return given


def check(out: Path, folders: Sequence[Path], options: Options, stacked: StackedAdapter | None = None) -> Path | None:
    """Check options, output folder and members without reading tensors.

    folders: the members and, if it is not the base, the start. stacked: these, if they are adapters that are already
    loaded. Returns the base's folder if the soup reads a base. Raises SalsaError if an option, the output folder or a
    member is not valid.
    """
    for name in ("steps", "step_size", "rank"):
        value = getattr(options, name)
        require(value is None or value > 0, f"{name}: {value} is not positive; use a number above 0")
    known = (*STRATEGIES, *ELEMENTWISE)
    require(options.strategy in known, f"strategy: {options.strategy!r} is unknown; use one of {', '.join(known)}")
    check_strategy("", options)
    if kind_of(folders) == CHECKPOINTS:
        names = ("rank", "dtype", "merge", "quantized_base", "same_base", "untie")
        _reject(options, names, "has no effect on checkpoints, only on adapters; leave it out")
        of_changes = options.strategy in (*GEOMETRIC_STRATEGIES, *ELEMENTWISE)
        what = f"strategy {options.strategy}" if of_changes else f"scale {options.scale:g}"
        require(
            (not of_changes and options.scale == 1) or options.base is not None or options.start_model is not None,
            f"{what} of checkpoints needs the base that they were trained from, because it works on their changes from"
            " the base; name the base with --base, or another model with --start",
        )
        if options.start_model is not None:
            _reject(options, ("base",), "has no effect on checkpoints beside a start; leave one of them out")
        check_free(out, folders)
        return None if options.base is None else local(options.base)
    if not options.merge:
        why = "has an effect only with merge=True (--merge); add merge, or leave this option out"
        _reject(options, ("quantized_base", "untie"), why)
        if stacked is None:
            StackedAdapter.load(folders, same_base=options.same_base)
        check_free(out, folders, adapter=True)
        return None
    for name, why in (("rank", "is exact"), ("dtype", "has the dtype of the base")):
        _reject(options, (name,), f"has no effect with merge, because a merged soup {why}; leave it out")
    require(
        options.per == "model" and options.strategy not in ELEMENTWISE,
        f"{'per: layer' if options.per == 'layer' else f'strategy {options.strategy}'} cannot be combined with merge; make the soup as an adapter first, then merge this adapter with"
        " `salsa soup OUT SOUP --merge`",
    )
    check_free(out, folders)
    base = _merge_base(folders, options)
    check_family(folders, base, options.same_base)
    return base


def _reject(options: Options, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(options, name)
        require(value in (None, False), f"{name}: {value} {why}")


def _merge_base(folders: Sequence[Path], options: Options) -> Path:
    """The folder of the base that the members are merged into."""
    from salsa_peft.soup.merge.members import read_members

    members = read_members(folders, None)
    why = ""
    if options.base is None:
        check_one_base(members, options.same_base, merging=True)
        if (found := local_base(members[0].config, folders[0])) is not None:
            return found
        why = f", which {folders[0] / ADAPTER_CONFIG} names as the base; give the base's folder with --base"
    return local(*base_of(members[0].config, folders[0], options.base), why=why)


def check_family(folders: Sequence[Path], base: Path, same_base: bool) -> None:
    """Raise SalsaError if an adapter names a base of another architecture or size, unless `same_base`."""
    config = None if same_base else config_of_base(str(base.absolute()), None)
    if config is not None:
        for folder in folders:
            require_same_family(folder, config, str(base))


def base_of(config: Mapping[str, Any], folder: Path, given: str | Path | None) -> tuple[str | Path, str | None]:
    """Folder or Hub id of the base and its revision: `given`, or what the adapter's configuration names."""
    if given is not None:
        return given, None
    named = config["base_model_name_or_path"]
    require(
        bool(named),
        f"base: {folder / ADAPTER_CONFIG} has no base_model_name_or_path; name the base's folder or Hub id (--base)",
    )
    return named, config["revision"]

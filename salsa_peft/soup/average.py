"""`soup()`: the weighted mean of adapters or of full checkpoints. The command is in soup/__main__.py.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; for adapters the exact mean of their deltas (soup/lora/stacked_adapter.py)

PEFT opens a soup of adapters, and Transformers opens a soup of checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from salsa_peft.models.adapters.bases import local_base, require_same_family
from salsa_peft.models.architectures.sizes import config_of_base
from salsa_peft.soup.checkpoints.read import check_weights, read_checkpoint
from salsa_peft.soup.checkpoints.write import check_free
from salsa_peft.soup.lora.members import check_one_base
from salsa_peft.soup.lora.read import CONFIG as ADAPTER_CONFIG
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.member_folders import ADAPTERS, CHECKPOINTS, kind_of, local, local_members, member_names
from salsa_peft.soup.provenance import provenance
from salsa_peft.soup.strategies import STRATEGIES, Measure, StrategyInput
from salsa_peft.soup.summary import SoupSummary
from salsa_peft.utils.errors import require

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a soup, besides its members and weights."""

    strategy: str = "linear"
    """linear, slerp, greedy or learned."""
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
    """Folder or Hub id of the base; None: the adapters' own. Checkpoints need it for slerp and cosines."""
    quantized_base: str | None = None
    """With merge: nf4 or nf4-double, in which the base is first quantised and dequantised."""
    same_base: bool = False
    """Adapters: assert that all have one base, even if they give it different names or fingerprints."""
    untie: bool = False
    """With merge: untie tied embeddings that have LoRA. By default they stay one tensor, as in PEFT."""


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
    """Average adapters or checkpoints into the folder `out`. Returns the summary, as in out/soup.json.

    members: folders or Hub ids, all of adapters or all of checkpoints. weights: one per member, by default uniform;
    they must sum to 1 for checkpoints, and for adapters that train parameters without LoRA. names: names of the members
    in the summary. progress: called with (done, total), in modules or bytes. The other arguments are the fields of
    Options. Raises SalsaError, and writes nothing, for members that cannot be averaged.
    """
    options = Options(
        strategy=strategy, measure=measure, steps=steps, step_size=step_size, normalize=normalize, rank=rank,
        dtype=dtype, merge=merge, base=base, quantized_base=quantized_base, same_base=same_base, untie=untie,
    )  # fmt: skip
    require(bool(members), "members: the list is empty; a soup needs at least one adapter or checkpoint")
    folders = local_members(members)
    kind = kind_of(folders)
    requested = requested_weights(weights, len(folders), normalize, kind)
    labels = list(member_names(members) if names is None else names)
    require(len(labels) == len(folders), f"names: {len(labels)} names for {len(folders)} members; give one per member")
    stacked = None if kind == CHECKPOINTS or merge else StackedAdapter.load(folders, labels, same_base=same_base)
    base_folder = check(Path(out), folders, options, stacked)
    more: dict[str, Any] = {"asked": requested, "normalized": normalize, "sum": math.fsum(requested)}
    request = _Request(Path(out), members, folders, labels, requested, options, base_folder, more, progress)
    if stacked is not None:
        return cast(SoupSummary, _adapters(request, stacked))
    return cast(SoupSummary, _merged(request) if merge else _checkpoints(request))


class _Request(NamedTuple):
    """The checked arguments of `soup`, with the members as local folders."""

    out: Path
    given: Sequence[Path | str]
    """The members' paths or Hub ids, as given to `soup`."""
    folders: list[Path]
    names: list[str]
    weights: list[float]
    options: Options
    base: Path | None
    more: dict[str, Any]
    """Entries of the summary that are not statistics."""
    progress: Progress | None

    def choose(self, gram: Callable[[], Any], keep_zeros: bool = False) -> tuple[list[Path], list[str], list[float]]:
        """Folders, names and weights of the soup's members, after the strategy has chosen the weights.

        Members of weight 0 would only add rank to a stacked adapter. They are left out unless `keep_zeros`.
        """
        options = self.options
        given = StrategyInput(self.weights, gram, options.measure, options.steps, options.step_size)
        weights, tried = STRATEGIES[options.strategy](given)
        base = None if self.base is None else (options.base or self.base, self.base)
        self.more.update({"tried": tried} if tried else {})
        origins = list(zip(self.names, self.given, self.folders, strict=True))
        self.more["provenance"] = provenance(origins, weights, base)
        used = [i for i, weight in enumerate(weights) if weight or keep_zeros] or list(range(len(weights)))
        if len(used) < len(weights):
            self.more["left_out"] = [name for i, name in enumerate(self.names) if i not in used]
        return [self.folders[i] for i in used], [self.names[i] for i in used], [weights[i] for i in used]


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

    stacked: the members, if they are adapters that are already loaded. Returns the base's folder if the soup reads a
    base. Raises SalsaError if an option, the output folder or a member is not valid.
    """
    strategies = ", ".join(STRATEGIES)
    require(options.strategy in STRATEGIES, f"strategy: {options.strategy!r} is unknown; use one of {strategies}")
    for name in ("steps", "step_size", "rank"):
        value = getattr(options, name)
        require(value is None or value > 0, f"{name}: {value} is not positive; use a number above 0")
    if kind_of(folders) == CHECKPOINTS:
        names = ("rank", "dtype", "merge", "quantized_base", "same_base", "untie")
        _reject(options, names, "has no effect on checkpoints, only on adapters; leave it out")
        require(
            options.strategy != "slerp" or options.base is not None,
            "strategy slerp of checkpoints needs the base that they were trained from, because it interpolates between"
            " their changes from the base; name the base with --base",
        )
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


def _adapters(request: _Request, stacked: StackedAdapter) -> dict[str, Any]:
    options = request.options
    folders, names, weights = request.choose(stacked.gram)
    if len(folders) < len(request.folders):
        stacked = StackedAdapter.load(folders, names, same_base=options.same_base)
    return stacked.save(
        request.out, weights, strategy=options.strategy, rank=options.rank, dtype=options.dtype,
        progress=request.progress, more=request.more,
    )  # fmt: skip


def _merged(request: _Request) -> dict[str, Any]:
    from salsa_peft.soup.merge.average import merge

    assert request.base is not None
    options = request.options
    read_checkpoint(request.base)  # reports a damaged base before anything is computed
    folders, names, weights = request.choose(
        lambda: StackedAdapter.load(request.folders, request.names, same_base=options.same_base).gram()
    )
    return merge(
        request.out, request.base, folders, weights, names=names, strategy=options.strategy,
        quantized_base=options.quantized_base, same_base=options.same_base, untie=options.untie,
        progress=request.progress, more=request.more,
    )  # fmt: skip


def _checkpoints(request: _Request) -> dict[str, Any]:
    from salsa_peft.soup.checkpoints import average as checkpoint_soup

    base, options = request.base, request.options
    for folder in (*request.folders, *([] if base is None else [base])):
        read_checkpoint(folder)  # reports a damaged checkpoint before anything is computed

    gram = partial(checkpoint_soup.gram, request.folders, cast(Path, base))  # not called without a base
    members, names, weights = request.choose(gram, keep_zeros=True)
    rest = 1 - sum(weights)  # the base's weight: base + Σ w_i δ_i = Σ w_i θ_i + (1 − Σ w_i) θ_base
    if base is not None and abs(rest) > 1e-9:
        members, weights, names = [*members, base], [*weights, rest], [*names, "base"]
    more = {key: value for key, value in request.more.items() if key != "sum"}
    return checkpoint_soup.average(
        request.out, members, weights, names=names, base=base, strategy=options.strategy,
        progress=request.progress, more=more,
    )  # fmt: skip

"""`soup()`: the weighted mean of adapters or of full checkpoints. The command is in soup/__main__.py.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; for adapters the exact mean of their deltas (soup/lora/stacked_adapter.py)

PEFT opens a soup of adapters, and Transformers opens a soup of checkpoints.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from salsa_peft.soup.arrays import Array
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.member_folders import CHECKPOINTS, kind_of, local, local_members, member_names
from salsa_peft.soup.options import BASE, Options, check, requested_weights
from salsa_peft.soup.provenance import provenance
from salsa_peft.soup.strategies import Choice, Measure
from salsa_peft.soup.strategies.choose import Grams, changes_from_last, choose, scaled
from salsa_peft.soup.strategies.elementwise import DENSITY, ELEMENTWISE, Elementwise
from salsa_peft.soup.summary import SoupSummary
from salsa_peft.utils.errors import require

Progress = Callable[[int, int], None]


def soup(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    strategy: str = "linear",
    per: str = "model",
    start: str | Path = BASE,
    scale: float = 1.0,
    density: float | None = None,
    drop_seed: int | None = None,
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
        strategy=strategy, per=per, start=start, scale=scale, density=density, drop_seed=drop_seed, measure=measure,
        steps=steps, step_size=step_size, normalize=normalize, rank=rank, dtype=dtype, merge=merge, base=base,
        quantized_base=quantized_base, same_base=same_base, untie=untie,
    )  # fmt: skip
    require(bool(members), "members: the list is empty; a soup needs at least one adapter or checkpoint")
    folders = local_members(members)
    origin = [] if options.start_model is None else [local(options.start_model)]
    kind = kind_of([*folders, *origin])
    requested = requested_weights(weights, len(folders), normalize, kind)
    labels = list(member_names(members) if names is None else names)
    require(len(labels) == len(folders), f"names: {len(labels)} names for {len(folders)} members; give one per member")
    stacked = None
    if kind != CHECKPOINTS and not merge:
        stacked = StackedAdapter.load([*folders, *origin], [*labels, *["start"] * len(origin)], same_base=same_base)
    base_folder = check(Path(out), [*folders, *origin], options, stacked)
    last = _Model("start", options.start, origin[0]) if origin else None
    if last is None and kind == CHECKPOINTS and base_folder is not None:
        last = _Model("base", options.base or base_folder, base_folder)
    models = [_Model(*row) for row in zip(labels, members, folders, strict=True)]
    more: dict[str, Any] = {"asked": requested, "normalized": normalize, "sum": math.fsum(requested)}
    request = _Request(Path(out), models, last, requested, options, base_folder, more, progress)
    if stacked is not None:
        return cast(SoupSummary, _adapters(request, stacked))
    return cast(SoupSummary, _merged(request) if merge else _checkpoints(request))


class _Model(NamedTuple):
    """A member or the start: its name in the summary, the path or Hub id as given to `soup`, and the local folder."""

    name: str
    given: Path | str
    folder: Path


class _Chosen(NamedTuple):
    """The models of the sum, with their weights; `layers` has the weights of each layer if they differ."""

    folders: list[Path]
    names: list[str]
    weights: list[float]
    layers: Mapping[str, list[float]] | None
    merge: Elementwise | None
    """An element-wise strategy, which merges the models in place of the weighted sum."""


class _Request(NamedTuple):
    """The checked arguments of `soup`, with the members as local folders."""

    out: Path
    members: list[_Model]
    start: _Model | None
    """The model from which task vectors are measured; None if they are the adapters' own deltas."""
    weights: list[float]
    options: Options
    base: Path | None
    more: dict[str, Any]
    """Entries of the summary that are not statistics."""
    progress: Progress | None

    def choose(self, grams: Grams, checkpoints: bool = False) -> _Chosen:
        """The models of the soup's sum, the start among them, after the strategy has chosen the weights.

        Members of weight 0 would only add rank to a stacked adapter. They are left out unless `checkpoints`, whose
        writer gets the start of an element-wise strategy as its base.
        """
        options, n = self.options, len(self.members)
        choice = scaled(choose(options, self.weights, grams), options.scale, self.start is not None)
        self.more.update(self._options(choice))
        models = [*self.members, *([] if self.start is None else [self.start])]
        origins = models if options.start_model is not None else self.members  # the base has an entry of its own
        base = None if self.base is None else (options.base or self.base, self.base)
        self.more["provenance"] = provenance(origins, choice.weights[: len(origins)], base)
        tables = [choice.weights] if choice.layers is None else list(choice.layers.values())
        used = [i for i in range(len(models)) if any(w[i] for w in tables) or (checkpoints and i < n)] or list(range(n))
        if options.strategy in ELEMENTWISE:
            used = [i for i in range(n) if self.weights[i]] + (
                [n] if self.start is not None and not checkpoints else []
            )
        if left_out := [model.name for i, model in enumerate(self.members) if i not in used]:
            self.more["left_out"] = left_out
        layers = {name: [own[i] for i in used] for name, own in (choice.layers or {}).items()} or None
        self.more.update({"layers": layers} if layers else {})
        folders, names = [models[i].folder for i in used], [models[i].name for i in used]
        merge = self._elementwise([self.weights[i] for i in used if i < n])
        return _Chosen(folders, names, [choice.weights[i] for i in used], layers, merge)

    def _options(self, choice: Choice) -> dict[str, Any]:
        """Entries of the summary: what the strategy tried, and its options that are not at their defaults."""
        options = self.options
        found: dict[str, Any] = {"tried": choice.tried} if choice.tried else {}
        found |= {} if options.per == "model" else {"per": options.per}
        found |= {} if options.start_model is None else {"start": str(options.start)}
        found |= {} if options.scale == 1 else {"scale": options.scale}
        if options.strategy in ELEMENTWISE:
            found |= {"density": options.density or DENSITY[options.strategy]}
        return found | ({"drop_seed": options.drop_seed or 0} if options.strategy == "dare" else {})

    def _elementwise(self, weights: list[float]) -> Elementwise | None:
        options = self.options
        if options.strategy not in ELEMENTWISE:
            return None
        density = options.density or DENSITY[options.strategy]
        return Elementwise(
            options.strategy, weights, options.scale, density, options.drop_seed or 0, self.start is not None
        )

    def of_adapters(self, stacked: StackedAdapter) -> dict[str, Array]:
        """The Gram matrix of each module's task vectors. stacked: the members and, as the last one, the start."""
        grams = stacked.grams()
        return grams if self.start is None else {name: changes_from_last(gram) for name, gram in grams.items()}


def _adapters(request: _Request, stacked: StackedAdapter) -> dict[str, Any]:
    options = request.options
    folders, names, weights, layers, merge = request.choose(partial(request.of_adapters, stacked))
    if len(folders) < len(stacked.members):
        stacked = StackedAdapter.load(folders, names, same_base=options.same_base)
    return stacked.save(
        request.out, weights, layers=layers, merge=merge, strategy=options.strategy, rank=options.rank,
        dtype=options.dtype, progress=request.progress, more=request.more,
    )  # fmt: skip


def _merged(request: _Request) -> dict[str, Any]:
    from salsa_peft.soup.merge.average import merge

    assert request.base is not None
    options = request.options
    read_checkpoint(request.base)  # reports a damaged base before anything is computed
    models = [*request.members, *([] if request.start is None else [request.start])]

    def grams() -> dict[str, Array]:
        stacked = StackedAdapter.load(
            [model.folder for model in models], [model.name for model in models], same_base=options.same_base
        )
        return request.of_adapters(stacked)

    folders, names, weights, *_ = request.choose(grams)
    return merge(
        request.out, request.base, folders, weights, names=names, strategy=options.strategy,
        quantized_base=options.quantized_base, same_base=options.same_base, untie=options.untie,
        progress=request.progress, more=request.more,
    )  # fmt: skip


def _checkpoints(request: _Request) -> dict[str, Any]:
    from salsa_peft.soup.checkpoints import average as checkpoint_soup

    start, options = None if request.start is None else request.start.folder, request.options
    members = [member.folder for member in request.members]
    for folder in (*members, *([] if start is None else [start])):
        read_checkpoint(folder)  # reports a damaged checkpoint before anything is computed
    found: dict[str, Array] = {}

    def grams() -> Mapping[str, Array]:  # not called without a start
        found.update(checkpoint_soup.grams(members, cast(Path, start), by_tensor=options.per == "layer"))
        return found

    folders, names, weights, layers, merge = request.choose(grams, checkpoints=True)
    more = {key: value for key, value in request.more.items() if key != "sum"}
    if layers is not None:
        vectors = {name: np.array(own[: len(members)]) for name, own in layers.items()}
        more["norm"] = math.sqrt(max(sum(float(w @ found[name] @ w) for name, w in vectors.items()), 0.0))
    return checkpoint_soup.average(
        request.out, folders, weights, layers=layers, merge=merge, names=names, base=start, strategy=options.strategy,
        progress=request.progress, more=more,
    )  # fmt: skip

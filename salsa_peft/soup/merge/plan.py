"""What a merge makes of the base's tensors: which change, in what units they are computed, and the shapes of the result.

A unit is a set of parameters that are merged at once: those of one module of PEFT, tied ones, and those that share a tensor of the
base's files (fused or split by Transformers' conversion mapping). It is computed when the first of its tensors is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from salsa_peft.soup.checkpoints.read import FLOATS
from salsa_peft.soup.merge.members import Loaded
from salsa_peft.soup.merge.quantised_bases import PlainBase
from salsa_peft.utils.errors import require
from salsa_peft.utils.safetensors_io import NAMES

logger = logging.getLogger(__name__)

ELEMENTS = 2**20
"""Of a parameter that are summed at once."""


class Unit(NamedTuple):
    """Parameters that are merged at once, and the tensors of the base's files that they are made of."""

    names: list[str]
    sources: list[str]


class Figures:
    """Sums over the parameters that were merged."""

    def __init__(self, members: int) -> None:
        self.lost = self.delta = 0.0
        """‖what rounding lost‖² and ‖Σ w_i δ_i‖²."""
        self.gram = torch.zeros(members, members, dtype=torch.float64)
        """⟨δ_i, δ_j⟩, all parameters as one vector."""

    def add(self, measured: Mapping[str, Any]) -> None:
        """What as_json gave."""
        self.lost, self.delta = self.lost + measured["lost"], self.delta + measured["delta"]
        self.gram += torch.tensor(measured["gram"], dtype=torch.float64)

    def as_json(self) -> dict[str, Any]:
        """For the journal of a soup in the making."""
        return {"lost": self.lost, "delta": self.delta, "gram": self.gram.tolist()}


class Plan:
    """Which tensors of the base change, and what they become. Raises SalsaError for a change that the base's files have no place for."""

    def __init__(self, source: PlainBase, loaded: Loaded, weights: Sequence[float], untie: bool = False) -> None:
        self.source, self.loaded, self.weights, self.untie = source, loaded, list(weights), untie
        self.adapters, self.names, self.shapes = loaded.adapters, loaded.names, loaded.result.shapes
        files = source.checkpoint.files
        shapes = {name: source.shape(name) for file in files for name in source.names(file)}
        self.resolved = loaded.names.resolve(shapes, str(source.checkpoint.folder))
        self.first = self.adapters[0].first
        self.units = self._units()
        self.unit_of = {name: unit for unit in self.units for name in unit.sources}
        self.done: dict[str, tuple[torch.Tensor, Figures]] = {}
        """Tensors that are computed and not yet written."""
        self.untied: str | None = None
        """Output embeddings that are tied in the base and not in the merge."""
        self.layout = {
            file: [(name, source.dtype(name), self._written(name)) for name in source.names(file)] for file in files
        }
        for unit in self.units:
            self._check(unit)
        self._check_rows()
        self._untie()
        self._check_result()

    def _units(self) -> list[Unit]:
        """Parameters that any member touches, in sets that are merged at once, in the order of the model."""
        group = {name: name for name in self.first}

        def top(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        def join(names: Sequence[str]) -> None:
            for name in names[1:]:
                group[top(name)] = top(names[0])

        touched: set[str] = set()
        for adapter in self.adapters:
            for first, others in adapter.touched().items():
                touched.add(first)
                join([first, *others])
        for name, first in self.first.items():
            join([first, name])
        by_source: dict[str, list[str]] = {}
        for name, blocks in self.resolved.blocks.items():
            for block in blocks if name in group else ():
                by_source.setdefault(block.source, []).append(name)
        for names in by_source.values():
            join(names)
        chosen, sets = {top(name) for name in touched}, dict[str, list[str]]()
        for name in self.first:
            if top(name) in chosen:
                sets.setdefault(top(name), []).append(name)
        return [
            Unit(names, list(dict.fromkeys(b.source for name in names for b in self.resolved.blocks.get(name, ()))))
            for names in sets.values()
        ]

    def _check(self, unit: Unit) -> None:
        folder = self.source.checkpoint.folder
        for name in unit.names:
            known = any(self.first[name] == self.first[other] for other in unit.names if other in self.resolved.blocks)
            require(
                known,
                f"{folder}: the base has no tensor {name}, which an adapter changes: average the adapters without --merge, or name the"
                " base that they were trained on with --base",
            )
        for name in unit.sources:
            require(
                self.source.dtype(name) in FLOATS,
                f"{self.source.checkpoint.tensors[name].file.path}: {name} is {self.source.dtype(name)}, expected one of"
                f" {', '.join(FLOATS)} for a delta to be added to: name the base before its quantisation with --base",
            )

    def _check_rows(self) -> None:
        """Embeddings that were resized in training are in every member's file: the base has no values for what was added."""
        for name in self.first:
            shape = self.shapes[name]
            odd = next((a for a in self.adapters if shape != self.names.shapes[name] and not a.replaces(name)), None)
            require(
                odd is None,
                f"{odd and odd.path}: found no {name} of {shape[0] if shape else 1} rows, though the embeddings were resized in training: save"
                " the adapter with save_embedding_layers=True",
            )

    def _check_result(self) -> None:
        """Every parameter of the model has a tensor in the result. Raises SalsaError where it would be initialised at random."""
        folder = self.source.checkpoint.folder
        shapes = {name: shape for entries in self.layout.values() for name, _, shape in entries}
        found = self.loaded.result.resolve(shapes, str(folder))
        for name in found.unknown[:1]:
            logger.warning(
                "warning: %s: %s and %d other tensors have no place in %s: they are copied as they are", folder, name,
                len(found.unknown) - 1, self.names,
            )  # fmt: skip
        there = {self.first[name] for name in found.blocks if name in self.first}
        missing = next((n for n, first in self.first.items() if first not in there and n not in self.names.tied), None)
        require(
            missing is None,
            f"{folder}: the base has no tensor {missing}, which {self.names} has: Transformers would start it at random; save the base again",
        )

    def _written(self, source: str) -> tuple[int, ...]:
        """The shape of a tensor in the result: the base's, but for embeddings that training gave other rows."""
        found = self.source.shape(source)
        unit = self.unit_of.get(source)
        if unit is None or self.loaded.rows is None:
            return found
        names = [name for name in unit.names if source in [b.source for b in self.resolved.blocks.get(name, ())]]
        return self.shapes[names[0]] if len(names) == 1 and len(self.resolved.blocks[names[0]]) == 1 else found

    def _untie(self) -> None:
        """Find out whether tied embeddings are still equal; where not, the output's get a tensor of their own."""
        for head, embeddings in self.names.tied.items():
            unit = next((unit for unit in self.units if head in unit.names), None)
            if unit is None:
                continue
            if not self.untie and any(adapter.tied_deltas(unit.names) for adapter in self.adapters):
                logger.warning(
                    "warning: %s and %s are one tensor in the base and an adapter has LoRA on one of them: as in PEFT's own merge, the"
                    " deltas of both are added to that tensor, which is not what the adapter computes; untie=True (--untie) writes two",
                    head, embeddings,
                )  # fmt: skip
            values, figures = self._computed(unit)
            if torch.equal(values[head], values[embeddings]):
                self._keep(unit, values, figures)
                continue
            self.untied = head
            present = [name for name in (head, embeddings) if name in self.resolved.blocks]
            file = next(f for f, layout in self.layout.items() for n, _, _ in layout if n == unit.sources[0])
            if present == [head]:  # the one tensor is called as the output's
                head, embeddings = embeddings, head
            if len(present) == 1:
                self.layout[file].append((head, self.source.dtype(unit.sources[0]), self.shapes[head]))
            self._keep(unit, values, figures, alone=head if len(present) == 1 else None)

    def tensor(self, name: str) -> tuple[torch.Tensor, Figures]:
        """A changed tensor of the result, and the figures of its unit when it is the first of that to be written."""
        if name not in self.done:
            unit = self.unit_of[name]
            values, figures = self._computed(unit)
            self._keep(unit, values, figures)
        return self.done.pop(name)

    def changed(self, name: str) -> bool:
        """Whether a tensor of the result is another than the base's."""
        return name in self.unit_of or name in self.done

    def replaced(self) -> list[str]:
        """Tensors of the base's files that a member has values of its own for."""
        return sorted({name for unit in self.units for name in unit.sources if self._has_values(unit)})

    def _has_values(self, unit: Unit) -> bool:
        wrapped = [w for a in self.adapters for w in a.wrapped.values() if set(w.parameters) & set(unit.names)]
        return any(one.rank == 0 for one in wrapped) or any(
            adapter.replaced.keys() & set(unit.names) for adapter in self.adapters
        )

    def _keep(self, unit: Unit, values: Mapping[str, torch.Tensor], figures: Figures, alone: str | None = None) -> None:
        """Put a unit's values where its tensors are written from."""
        found: dict[str, torch.Tensor] = {} if alone is None else {alone: values[alone]}
        for name in unit.names:
            blocks = self.resolved.blocks.get(name, ())
            if (
                len(blocks) == 1
                and len(
                    [b for n in unit.names for b in self.resolved.blocks.get(n, ()) if b.source == blocks[0].source]
                )
                == 1
            ):
                found[blocks[0].source] = values[name]
                continue
            at = 0
            for block in blocks:
                if block.source not in found:
                    found[block.source] = self.source.whole(block.source).clone()
                piece = values[name].reshape(-1)[at : at + block.elements]
                found[block.source].view(-1)[block.first : block.first + block.elements] = piece
                at += block.elements
        empty = Figures(len(self.weights))
        for at, (name, tensor) in enumerate(found.items()):
            self.done[name] = (tensor, figures if at == 0 else empty)

    def _computed(self, unit: Unit) -> tuple[dict[str, torch.Tensor], Figures]:
        """The merged parameters of a unit in the base's dtype."""
        given: dict[str, torch.Tensor] = {}

        def read(first: str) -> torch.Tensor:
            if first not in given:
                given[first] = self._base(first)
            return given[first]

        found = [a.values(unit.names, read, self.untie) if a.touches(unit.names) else {} for a in self.adapters]
        figures, values = Figures(len(self.weights)), {}
        counted: set[str] = set()
        for name in unit.names:
            dtype = getattr(torch, NAMES[self.source.dtype(self._sources(name)[0])])
            first = self.first[name]
            merged = [values_.get(name) for values_ in found]
            values[name] = self._sum(name, read(first), merged, dtype, None if first in counted else figures)
            counted.add(first)
        return values, figures

    def _sum(self, name: str, start: torch.Tensor, merged: Sequence[torch.Tensor | None], dtype: torch.dtype,
             figures: Figures | None) -> torch.Tensor:  # fmt: skip
        """start + Σ w_i (merged_i − start) of one parameter in float64, a few rows at a time; None: a member that leaves it as it is."""
        result = torch.empty(start.shape, dtype=dtype)
        flat = [None if value is None else value.reshape(-1) for value in merged]
        for begin in range(0, start.numel(), ELEMENTS):
            piece = slice(begin, begin + ELEMENTS)
            base = start.reshape(-1)[piece].double()
            deltas = [None if value is None else value[piece].double() - base for value in flat]
            total = torch.zeros_like(base)
            for weight, delta in zip(self.weights, deltas, strict=True):
                if delta is not None:
                    total.add_(delta, alpha=weight)
            rounded = self._rounded(name, base, total, dtype, figures)
            result.view(-1)[piece] = rounded
            if figures is not None:
                _add_products(figures.gram, deltas)
        return result

    def _rounded(self, name: str, base: torch.Tensor, total: torch.Tensor, dtype: torch.dtype,
                 figures: Figures | None) -> torch.Tensor:  # fmt: skip
        """base + total in the base's dtype. Raises SalsaError where that is not finite."""
        merged = (base + total).to(dtype)
        lost = float(torch.linalg.vector_norm((merged.to(base.dtype) - base).sub_(total)))
        require(
            math.isfinite(lost),
            f"{self.source.checkpoint.folder}: {name} is not finite once the soup is merged: the base or an adapter has values that"
            f" are not, or that {str(dtype).removeprefix('torch.')} cannot hold",
        )
        if figures is not None:
            figures.lost += lost**2
            figures.delta += float(torch.linalg.vector_norm(total)) ** 2
        return merged

    def streamed(self, source: str, figures: Figures) -> Iterator[torch.Tensor] | None:
        """The pieces of a changed tensor to which LoRA adds a product of low rank and nothing else; None where more is done to it.

        Their figures are added to `figures` on the way.
        """
        unit = self.unit_of.get(source)
        if unit is None or source in self.done or len(unit.names) != 1 or unit.sources != [source]:
            return None
        factors = [a.low_rank(unit.names) if a.touches(unit.names) else () for a in self.adapters]
        if any(pair is None for pair in factors) or self._written(source) != self.source.shape(source):
            return None
        return self._pieces(source, [pair or None for pair in factors], figures)

    def _pieces(
        self, source: str, factors: Sequence[tuple[torch.Tensor, ...] | None], figures: Figures
    ) -> Iterator[torch.Tensor]:
        used = [(i, pair) for i, pair in enumerate(factors) if pair is not None]
        for i, (left, right) in used:
            for j, (other_left, other_right) in used:
                products = (left.T @ other_left).double() * (right @ other_right.T).double()
                figures.gram[i, j] += float(products.sum())
        wide = torch.float64 if self.source.dtype(source) == "F64" else torch.float32
        left = torch.cat([self.weights[i] * pair[0] for i, pair in used], dim=1).to(wide)
        right = torch.cat([pair[1] for _, pair in used]).to(wide)
        for start, given in self.source.pieces(source, ELEMENTS):
            base = given.to(wide)
            yield self._rounded(source, base, left[start : start + len(base)] @ right, given.dtype, figures)

    def _sources(self, name: str) -> list[str]:
        """The tensors that a parameter is made of; of one that has none, those that it is tied to."""
        same = [name, *(other for other in self.first if self.first[other] == self.first[name])]
        found = next(self.resolved.blocks[other] for other in same if other in self.resolved.blocks)
        return [block.source for block in found]

    def _base(self, first: str) -> torch.Tensor:
        """A parameter's value in the base, float32 or float64, with the rows that it has in the result."""
        same = [other for other in self.first if self.first[other] == first]
        blocks = next(self.resolved.blocks[other] for other in same if other in self.resolved.blocks)
        parts = [self.source.whole(b.source).reshape(-1)[b.first : b.first + b.elements] for b in blocks]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole if whole.dtype == torch.float64 else whole.float()
        shape = self.shapes[first]
        wanted = math.prod(shape)
        if whole.numel() < wanted:
            require(
                abs(sum(self.weights) - 1) <= 1e-6,
                f"weights sum to {sum(self.weights):.9g}, expected 1: the tokens that were added in training have no values in the base"
                " that a scaled delta could be added to",
            )
            whole = torch.cat([whole, whole.new_zeros(wanted - whole.numel())])
        return whole[:wanted].reshape(shape)


def _add_products(gram: torch.Tensor, deltas: Sequence[torch.Tensor | None]) -> None:
    """⟨δ_i, δ_j⟩ of a piece."""
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas[: i + 1]):
            if one is not None and other is not None:
                product = float(torch.dot(one, other))
                gram[i, j] += product
                if i != j:
                    gram[j, i] += product

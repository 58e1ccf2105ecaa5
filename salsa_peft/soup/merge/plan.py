"""Plans a merge: which tensors change, which are merged together, and their shapes in the result.

A unit is a set of parameters that must be merged together: the parameters of one module that PEFT wraps, tied
parameters, and parameters that share a tensor in the base's files (which Transformers' conversion mapping fuses or
splits). A unit is computed when the first of its tensors is written.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from salsa_peft.soup.checkpoints.read import FLOATS
from salsa_peft.soup.merge.members import LoadedMembers
from salsa_peft.soup.merge.quantised_bases import PlainBase
from salsa_peft.soup.merge.sums import ELEMENTS, Figures, add_deltas, rounded
from salsa_peft.utils.errors import require
from salsa_peft.utils.safetensors_io import NAMES
from salsa_peft.utils.tensor_names import Block

logger = logging.getLogger(__name__)


class Unit(NamedTuple):
    """Parameters that are merged together, and the tensors of the base's files that hold them."""

    names: list[str]
    sources: list[str]


class Plan:
    """Tensors that a merge writes. Raises SalsaError if an adapter changes a tensor that the base lacks."""

    def __init__(self, source: PlainBase, loaded: LoadedMembers, weights: Sequence[float], untie: bool = False) -> None:
        self.source, self.loaded, self.weights, self.untie = source, loaded, list(weights), untie
        self.adapters, self.names, self.shapes = loaded.adapters, loaded.names, loaded.result.shapes
        files, self._where = source.checkpoint.files, f"{source.checkpoint.folder}: "
        shapes = {name: source.shape(name) for file in files for name in source.names(file)}
        self.resolved = loaded.names.resolve(shapes, str(source.checkpoint.folder))
        self.first = self.adapters[0].first
        self.units = self._units()
        self.unit_of = {name: unit for unit in self.units for name in unit.sources}
        self.done: dict[str, tuple[torch.Tensor, Figures]] = {}
        """Tensors that are computed but not yet written, with the statistics of their unit."""
        self.untied: str | None = None
        """Name of the output embeddings that are tied in the base but not in the result; None if none are."""
        self.layout = {
            file: [(name, source.dtype(name), self._written(name)) for name in source.names(file)] for file in files
        }
        for unit in self.units:
            self._check(unit)
        self._check_rows()
        self._untie()
        self._check_result()

    def _units(self) -> list[Unit]:
        """Group the parameters that any member changes into units, in the order of the model."""
        group = {name: {name} for name in self.first}

        def join(names: Iterable[str]) -> None:
            joined = set().union(*(group[name] for name in names))
            group.update(dict.fromkeys(joined, joined))

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
        sets: dict[int, list[str]] = {}
        for name, joined in group.items():
            if joined & touched:
                sets.setdefault(id(joined), []).append(name)
        return [
            Unit(names, list(dict.fromkeys(b.source for name in names for b in self.resolved.blocks.get(name, ()))))
            for names in sets.values()
        ]

    def _check(self, unit: Unit) -> None:
        """Raise SalsaError if the base's files lack a parameter of a unit, or its dtype is not a float."""
        for name in unit.names:
            known = any(self.first[name] == self.first[other] for other in unit.names if other in self.resolved.blocks)
            require(
                known,
                f"{self.source.checkpoint.folder}: the base has no tensor {name}, which an adapter changes; average the"
                " adapters without --merge, or set --base to the base that they were trained on",
            )
        for name in unit.sources:
            require(
                self.source.dtype(name) in FLOATS,
                f"{self.source.checkpoint.tensors[name].file.path}: {name} is {self.source.dtype(name)}, but a delta"
                f" can only be added to {', '.join(FLOATS)}; name the unquantised base with --base",
            )

    def _check_rows(self) -> None:
        """Raise SalsaError if a member lacks resized embeddings: the base has no values for added rows."""
        for name in self.first:
            shape = self.shapes[name]
            odd = next((a for a in self.adapters if shape != self.names.shapes[name] and not a.replaces(name)), None)
            require(
                odd is None,
                f"{odd and odd.path} has no {name} of {shape[0] if shape else 1} rows, though the embeddings were"
                " resized in training; save the adapter with save_embedding_layers=True",
            )

    def _check_result(self) -> None:
        """Raise SalsaError if the result lacks a parameter, which Transformers would initialise at random."""
        folder = self.source.checkpoint.folder
        shapes = {name: shape for entries in self.layout.values() for name, _, shape in entries}
        found = self.loaded.result.resolve(shapes, str(folder))
        for name in found.unknown[:1]:
            logger.warning(
                "warning: %s: %s and %d other tensors are not part of %s; these tensors are copied unchanged",
                folder, name, len(found.unknown) - 1, self.names,
            )  # fmt: skip
        present = {self.first[name] for name in found.blocks if name in self.first}
        lacking = (n for n, first in self.first.items() if first not in present and n not in self.names.tied)
        missing = next(lacking, None)
        require(
            missing is None,
            f"{folder}: the base has no tensor {missing}, so {self.names} would initialise it at random; save the base"
            " again",
        )

    def _written(self, source: str) -> tuple[int, ...]:
        """The shape of a tensor in the result: the base's, except for embeddings resized in training."""
        found = self.source.shape(source)
        unit = self.unit_of.get(source)
        if unit is None or self.loaded.rows is None:
            return found
        names = [name for name in unit.names if source in [b.source for b in self.resolved.blocks.get(name, ())]]
        return self.shapes[names[0]] if len(names) == 1 and len(self.resolved.blocks[names[0]]) == 1 else found

    def _untie(self) -> None:
        """Give tied output embeddings their own tensor if they differ from the input embeddings after merging."""
        for head, embeddings in self.names.tied.items():
            unit = next((unit for unit in self.units if head in unit.names), None)
            if unit is None:
                continue
            if not self.untie and any(adapter.tied_deltas(unit.names) for adapter in self.adapters):
                logger.warning(
                    "warning: %s and %s are one tensor in the base, and an adapter has LoRA on one of them: as in"
                    " PEFT's own merge, the deltas of both are added to that tensor, so the result differs from the"
                    " adapter; untie=True (--untie) writes two tensors",
                    head, embeddings,
                )  # fmt: skip
            values, figures = self._computed(unit)
            if torch.equal(values[head], values[embeddings]):
                self._keep(unit, values, figures)
                continue
            self.untied = head
            present = [name for name in (head, embeddings) if name in self.resolved.blocks]
            file = next(f for f, layout in self.layout.items() for n, _, _ in layout if n == unit.sources[0])
            if present == [head]:  # the one tensor has the name of the output embeddings
                head, embeddings = embeddings, head
            if len(present) == 1:
                self.layout[file].append((head, self.source.dtype(unit.sources[0]), self.shapes[head]))
            self._keep(unit, values, figures, alone=head if len(present) == 1 else None)

    def pieces(self, name: str, figures: Figures) -> Iterator[torch.Tensor]:
        """The pieces of a tensor of the result. The statistics of the merge are added to `figures`."""
        unit = self.unit_of.get(name)
        if unit is None and name not in self.done:
            return (piece for _, piece in self.source.pieces(name, ELEMENTS))
        factors = self._factors(name)
        if factors:
            return self._add_products(name, factors, figures)
        if name not in self.done:
            self._keep(self.unit_of[name], *self._computed(self.unit_of[name]))
        tensor, measured = self.done.pop(name)
        figures.add(measured)
        return iter([tensor])

    def replaced(self) -> list[str]:
        """Names of the tensors in the base's files that a member replaces with its own values."""
        own = {name for adapter in self.adapters for name in adapter.replaced}
        own |= {name for a in self.adapters for w in a.wrapped.values() if w.rank == 0 for name in w.parameters}
        return sorted({name for unit in self.units if own & set(unit.names) for name in unit.sources})

    def _keep(self, unit: Unit, values: Mapping[str, torch.Tensor], figures: Figures, alone: str | None = None) -> None:
        """Store a unit's values in `done` as tensors of files. alone: a tensor that is not in the base."""
        found: dict[str, torch.Tensor] = {} if alone is None else {alone: values[alone]}
        shares = Counter(block.source for name in unit.names for block in self.resolved.blocks.get(name, ()))
        for name in unit.names:
            blocks = self.resolved.blocks.get(name, ())
            if len(blocks) == 1 and shares[blocks[0].source] == 1:
                found[blocks[0].source] = values[name]
                continue
            at = 0
            for block in blocks:
                if block.source not in found:
                    found[block.source] = self.source.whole(block.source).clone()
                piece = values[name].reshape(-1)[at : at + block.elements]
                found[block.source].view(-1)[block.first : block.first + block.elements] = piece
                at += block.elements
        for name, tensor in found.items():
            self.done[name] = (tensor, figures)
            figures = Figures(len(self.weights))  # a unit's statistics count once

    def _computed(self, unit: Unit) -> tuple[dict[str, torch.Tensor], Figures]:
        """The merged parameters of a unit, in the base's dtype, and the statistics of the merge."""
        read = functools.cache(self._base)
        found = [a.merged_values(unit.names, read, self.untie) if a.touches(unit.names) else {} for a in self.adapters]
        figures, values = Figures(len(self.weights)), {}
        counted: set[str] = set()
        for name in unit.names:
            dtype = getattr(torch, NAMES[self.source.dtype(self._blocks(name)[0].source)])
            first = self.first[name]
            measured = Figures(len(self.weights)) if first in counted else figures  # tied parameters count once
            counted.add(first)
            merged = [given.get(name) for given in found]
            values[name] = add_deltas(read(first), merged, self.weights, dtype, measured, self._where + name)
        return values, figures

    def _factors(self, source: str) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor]]] | None:
        """(member, factors) of each low-rank product that is added to a tensor; None if a merge changes more."""
        unit = self.unit_of.get(source)
        if unit is None or source in self.done or len(unit.names) != 1 or unit.sources != [source]:
            return None
        found = [(i, a.low_rank(unit.names)) for i, a in enumerate(self.adapters) if a.touches(unit.names)]
        if self._written(source) != self.source.shape(source):
            return None
        factors = [(i, pair) for i, pair in found if pair is not None]
        return factors if len(factors) == len(found) else None

    def _add_products(
        self, source: str, factors: Sequence[tuple[int, tuple[torch.Tensor, torch.Tensor]]], figures: Figures
    ) -> Iterator[torch.Tensor]:
        """Yield the pieces of base + Σ w_i left_i · right_i."""
        for i, (left, right) in factors:
            for j, (other_left, other_right) in factors:
                products = (left.T @ other_left).double() * (right @ other_right.T).double()
                figures.gram[i, j] += float(products.sum())
        wide = torch.float64 if self.source.dtype(source) == "F64" else torch.float32
        left = torch.cat([self.weights[i] * pair[0] for i, pair in factors], dim=1).to(wide)
        right = torch.cat([pair[1] for _, pair in factors]).to(wide)
        for start, given in self.source.pieces(source, ELEMENTS):
            base = given.to(wide)
            yield rounded(base, left[start : start + len(base)] @ right, given.dtype, figures, self._where + source)

    def _blocks(self, name: str) -> tuple[Block, ...]:
        """Where a parameter, or a parameter to which it is tied, lies in the base's files."""
        same = [name, *(other for other in self.first if self.first[other] == self.first[name])]
        return next(self.resolved.blocks[other] for other in same if other in self.resolved.blocks)

    def _base(self, first: str) -> torch.Tensor:
        """A parameter's value in the base, in float32 or float64, with as many rows as in the result."""
        parts = [self.source.whole(b.source).reshape(-1)[b.first : b.first + b.elements] for b in self._blocks(first)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole if whole.dtype == torch.float64 else whole.float()
        shape = self.shapes[first]
        wanted = math.prod(shape)
        if whole.numel() < wanted:
            require(
                abs(sum(self.weights) - 1) <= 1e-6,
                f"weights: they sum to {sum(self.weights):.9g}, but must sum to 1, because the base has no values for"
                " the tokens that were added in training, so the learned values cannot be scaled; change the weights",
            )
            whole = torch.cat([whole, whole.new_zeros(wanted - whole.numel())])
        return whole[:wanted].reshape(shape)

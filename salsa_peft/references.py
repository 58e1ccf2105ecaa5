"""References: what the KL term looks at, each an adapter on the shared base (or none: the base itself).

In adapter mode every kind is the base plus a weighted sum of seeds' deltas: seed-N one member at 1, the soup its members
at weights of sum 1, `shrunk` one member at a scale, `base` no member. So K references cost K thin adapters and no copy of
the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import adapters
from .config import Reference, require
from .soup import StackedAdapter

if TYPE_CHECKING:
    from peft import PeftModel


class Frozen(NamedTuple):
    """A reference on the model: the name of a frozen adapter, or None for the base."""

    label: str
    adapter: str | None


def attach_reference(
    model: PeftModel, reference: Reference, seeds: Mapping[int, Path], soup: Path | None, name: str
) -> Frozen:
    """Put one of the recipe's references on the model as adapter `name`, frozen.

    `seeds`: position in sft.seeds → adapter folder; `soup`: the soup stage's folder.
    """
    if reference.soup:
        require(soup is not None, "reference soup: found no soup, expected the soup stage's result")
        adapters.attach(model, Path(str(soup)), name)
    elif reference.path is not None:
        adapters.attach(model, adapters.local_folder(reference.path), name)
    elif not reference.members:
        return Frozen(reference.label, None)
    elif reference.weights == [1.0]:
        adapters.attach(model, seeds[reference.members[0]], name)
    else:
        StackedAdapter.load([seeds[member] for member in reference.members]).attach(model, name, reference.weights)
    return Frozen(reference.label, name)


def as_references(model: PeftModel, references: Sequence[str | Path | Frozen]) -> list[Frozen]:
    """What a library user passes → frozen references: "base", an attached adapter's name, or an adapter's folder or Hub id.

    Raises SalsaError for an empty list.
    """
    require(not isinstance(references, str | Path), f"references: found {str(references)!r}, expected a list of them")
    require(bool(references), "references: found none, expected at least one ('base' is the model without its adapter)")
    frozen = []
    for index, reference in enumerate(references):
        if isinstance(reference, Frozen):
            frozen.append(reference)
        elif str(reference) == "base":
            frozen.append(Frozen("base", None))
        else:
            name = str(reference)
            if name not in model.peft_config:
                name = adapters.free_name(model, f"reference-{index}")
                adapters.attach(model, adapters.local_folder(str(reference)), name)
            adapters.set_trainable(model, name, False)
            frozen.append(Frozen(str(reference), name))
    return frozen

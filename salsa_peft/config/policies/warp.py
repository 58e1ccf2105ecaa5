"""The section `warp`, and the policies and soups that it stands for (WARP, Ramé et al., 2024, arXiv 2406.16768)."""

import dataclasses
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import MAX_POLICIES, STRICT, Count, NonNegative, require_unique
from salsa_peft.utils.errors import require
from salsa_peft.utils.messages import number_in_name

Section = TypeVar("Section")


@dataclass(config=STRICT, kw_only=True)
class Warp:
    """Weight-averaged rewarded policies (WARP): train several policies, merge them, and start again from the merge.

    In each iteration `policies` policies start from one model, each with an EMA of itself as reference. Their changes
    since that start are merged by slerp, and the next iteration starts between the old start and the merge. The policies
    are warp-1-1, warp-1-2 …, the later starts the soups warp-1 …, and the last merge is the soup warp.
    """

    iterations: Count = 2
    """Number of iterations I."""
    policies: Annotated[int, Field(ge=2)] = 2
    """Number of policies M of each iteration, which differ in their seeds of sampling and prompt order."""
    start: str = "seed-0"
    """Model where the first iteration starts, as in a policy's `start`. Example: soup."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the EMA that is a policy's reference, per update. Source: WARP has 0.99 (its μ is 0.01)."""
    interpolation: Annotated[float, Field(gt=0, le=1)] = 0.3
    """η of the step from an iteration's start to its merge, where the next iteration starts (LITI). Source: WARP has
    0.3."""
    per: Literal["model", "layer"] = "layer"
    """Slerp with one angle for each layer, or for the whole model. Source: WARP has layer."""
    rank: Count | None = None
    """Rank to which each merge of adapters is compressed; soup.json records the error. None: adapter.r. Example: 32."""
    sweep: list[Annotated[float, Field(ge=0)]] = dataclasses.field(default_factory=list)
    """Values of η for which θ = (1 − η) θ_start + η θ_warp is evaluated, each as a soup warp-eta-η. Source: WARP's last
    step. Example: [0.25, 0.5, 0.75]."""
    kl_coef: NonNegative | None = None
    """KL coefficient β to the EMA. None: ppo.kl_coef. Example: 0.05."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of these policies alone, as in a policy's `overrides`. seed: that of the first policy; the others have the
    following seeds."""

    def check(self) -> None:
        """Raise SalsaError for repeated values of `sweep`."""
        require_unique("warp.sweep", self.sweep)


def expand_warp(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with the policies and soups of `warp` added. What the settings say of one of them has precedence.

    Raises SalsaError for too many policies. Values of the wrong type are left for the schema to report.
    """
    warp = section_of(data, "warp", Warp)
    if warp is None:
        return data
    count = warp.iterations * warp.policies
    require(
        count <= MAX_POLICIES,
        f"warp: {warp.iterations} iterations × {warp.policies} policies are more than {MAX_POLICIES} policies; use fewer",
    )
    adapter, ppo = data.get("adapter"), data.get("ppo")
    rank = warp.rank or (adapter.get("r", 16) if isinstance(adapter, dict) else None)
    first = warp.overrides.get("seed", ppo.get("seed", 0) if isinstance(ppo, dict) else 0)
    policies, soups, start = dict[str, Any](), dict[str, Any](), warp.start
    for iteration in range(1, warp.iterations + 1):
        names = [f"warp-{iteration}-{number}" for number in range(1, warp.policies + 1)]
        for name in names:
            own = {"seed": first + len(policies)} if isinstance(first, int) else {}
            policies[name] = {
                "start": start,
                "reference": {"ema": {"decay": warp.ema_decay}},
                "kl_coef": warp.kl_coef,
                "overrides": {**warp.overrides, **own},
            }
        last = iteration == warp.iterations
        soups["warp" if last else f"warp-{iteration}"] = {
            "members": names,
            "strategy": "slerp",
            "per": warp.per,
            "start": start,
            "scale": 1.0 if last else warp.interpolation,
            "rank": rank,
        }
        start = f"warp-{iteration}"
    for eta in warp.sweep:
        name = f"warp-eta-{number_in_name(eta)}"
        soups[name] = {"members": [warp.start, "warp"], "weights": [round(1 - eta, 12), eta]}
    return with_settings(data, policies, soups)


def section_of(data: dict[str, Any], key: str, kind: type[Section]) -> Section | None:
    """A section of a recipe's settings; None if there is none, or if a value has the wrong type."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data.get(key)), strict=True)
    except (ValidationError, TypeError, ValueError):
        return None


def with_settings(data: dict[str, Any], policies: dict[str, Any], soups: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with policies and soups that a section stands for. Keys that are there already stay."""
    for kind, made in (("policies", policies), ("soups", soups)):
        known = data.get(kind, {})
        if not isinstance(known, dict):  # the schema reports it
            continue
        given = {name: known.get(name, {}) for name in made}
        both = {name: {**made[name], **own} if isinstance(own, dict) else own for name, own in given.items()}
        data = {**data, kind: {**known, **both}}
    return data

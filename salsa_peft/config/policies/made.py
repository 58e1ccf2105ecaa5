"""Policies and soups that the sections `warp` and `rewarded_soups` stand for: adding them, and leaving them out again."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from salsa_peft.config.options.soup import SoupSection
from salsa_peft.config.policies.policy import Policy
from salsa_peft.config.policies.rewarded_soups import expand_rewarded_soups
from salsa_peft.config.policies.warp import expand_warp

KINDS: dict[str, Callable[..., Any]] = {"policies": Policy, "soups": SoupSection}


def with_made(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings with the policies and soups of its sections added. Raises SalsaError for too many."""
    return expand_rewarded_soups(expand_warp(data))


def without_made(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's full settings without those policies and soups that `with_made` adds, so that a section can be changed."""
    made = with_made({**data, "policies": {}, "soups": {}})
    kept = {
        kind: {
            name: own
            for name, own in data[kind].items()
            if name not in made[kind] or own != asdict(make(**made[kind][name]))
        }
        for kind, make in KINDS.items()
    }
    return {**data, **kept}

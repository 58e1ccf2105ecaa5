"""A recipe's section `soup`: every option reaches `soup()`, and every option that is set changes the cache key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.job import Job
from salsa_peft.config.load import load_recipe
from salsa_peft.recipe import small_stages
from salsa_peft.recipe.units import soup_units
from salsa_peft.soup import average
from salsa_peft.soup.options import Options

SET: dict[str, dict[str, Any]] = {
    "per": {"strategy": "karcher", "per": "layer"},
    "start": {"start": "seed-2"},
    "scale": {"scale": 0.5},
    "density": {"strategy": "ties", "density": 0.3},
    "drop_seed": {"strategy": "dare", "drop_seed": 4},
}
"""Option → a section that sets it."""


def recipe(**section: Any) -> Any:
    overrides = [f"soup.{name}={value}" for name, value in section.items()]
    return load_recipe("quickstart", lora="lora", overrides=overrides).recipe


@pytest.mark.parametrize("name", SET)
def test_an_option_reaches_the_soup(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fake(out: Path, *_: Any, **options: Any) -> dict[str, Any]:
        out.mkdir()
        given.update(options)
        return {}

    monkeypatch.setattr(average, "soup", fake)
    read = recipe(**SET[name])
    (unit,) = soup_units(read, "run")
    inputs = {f"sft/seed-{i}": tmp_path / f"seed-{i}" for i in range(3)}
    (tmp_path / "job").mkdir()
    small_stages.soup(Job(recipe=read, unit=unit, folder=tmp_path / "job", inputs=inputs, recipe_yaml=""))
    wanted = inputs["sft/seed-2"] if name == "start" else SET[name][name]
    assert given[name] == wanted
    shared = {field.name for field in dataclasses.fields(Options)} & {f.name for f in dataclasses.fields(read.soup)}
    assert shared <= given.keys()


def test_an_option_at_its_default_is_in_no_key() -> None:
    """So results of earlier versions stay; set, each changes the key."""
    (plain,) = soup_units(recipe(), "run")
    assert plain.key_fields == {"members": ["sft/seed-0", "sft/seed-1"], "weights": [0.5, 0.5]}
    for name, section in SET.items():
        (unit,) = soup_units(recipe(**section), "run")
        assert unit.key_fields[name] == section[name]
        assert set(unit.inputs) - set(plain.inputs) == ({"sft/seed-2"} if name == "start" else set())

"""`sweep:` becomes policies, and nothing else behind it knows of sweeps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.load import LoadedRecipe, load_recipe
from salsa_peft.recipe import run as recipe
from salsa_peft.utils.errors import SalsaError

TEXT = "name: s\ntoy: {}\nmodel: {max_length: 32}\ngeneration: {max_new_tokens: 10}\nsft: {seeds: [0, 1, 2], batch_size: 32}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """load(sweep, overrides…) → the recipe with that `sweep:` line."""

    def make(sweep: str, *overrides: str, more: str = "") -> LoadedRecipe:
        (tmp_path / "s.yaml").write_text(f"{TEXT}sweep: {sweep}\n{more}")
        return load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=list(overrides))

    return make


def policies(loaded: LoadedRecipe) -> dict[str, tuple[Any, float | None]]:
    """Name → (reference, its β)."""
    return {name: (policy.reference, policy.kl_coef) for name, policy in loaded.recipe.policies.items()}


def test_alpha_is_the_second_members_weight(load: Any) -> None:
    """θ = (1 − α) θ_0 + α θ_1, the ends seeds themselves; β as given."""
    found = policies(load("{alpha: {values: [0, 0.25, 1.0], kl_coef: 0.01}}"))
    assert found == {
        "alpha-0": ("seed-0", 0.01),
        "alpha-0.25": ({"soup": {"members": [0, 1], "weights": [0.75, 0.25]}}, 0.01),
        "alpha-1": ("seed-1", 0.01),
    }
    other = policies(load("{alpha: {values: [0.25, 1], members: [2, 1]}}"))
    assert other["alpha-0.25"] == ({"soup": {"members": [2, 1], "weights": [0.75, 0.25]}}, None)
    assert other["alpha-1"] == ("seed-1", None)


def test_several_coefficients_give_the_product(load: Any) -> None:
    """Each α at each β, β fastest."""
    found = policies(load("{alpha: {values: [0, 0.5], kl_coef: [0.01, 0.05]}}"))
    assert list(found) == ["alpha-0-kl-0.01", "alpha-0-kl-0.05", "alpha-0.5-kl-0.01", "alpha-0.5-kl-0.05"]
    assert [beta for _, beta in found.values()] == [0.01, 0.05, 0.01, 0.05]
    assert found["alpha-0-kl-0.05"][0] == "seed-0"


def test_members_coefficients_and_scales(load: Any) -> None:
    """The other kinds."""
    assert policies(load("{members: {values: [1, 2, 3], kl_coef: 0.01}}")) == {
        "members-1": ("seed-0", 0.01),
        "members-2": ({"soup": {"members": [0, 1]}}, 0.01),
        "members-3": ({"soup": {"members": [0, 1, 2]}}, 0.01),
    }
    assert policies(load("{kl_coef: {values: [0.01, 1e-3], reference: seed-0}}")) == {
        "kl-0.01": ("seed-0", 0.01),
        "kl-0.001": ("seed-0", 0.001),
    }
    assert policies(load("{kl_coef: {values: [1]}}")) == {"kl-1": ("soup", 1.0)}
    assert policies(load("{scale: {values: [0.6], seed: 1}}")) == {
        "scale-0.6": ({"shrunk": {"seed": 1, "scale": 0.6}}, None)
    }


def test_it_stands_beside_policies_and_can_be_set_or_taken_out(load: Any) -> None:
    """The same policy twice is one; another of that name is refused."""
    both = "policies: {ppo: {reference: seed-0}, kl-1: {reference: soup, kl_coef: 1.0}}\n"
    assert list(policies(load("{kl_coef: {values: [1]}}", more=both))) == ["ppo", "kl-1"]
    with pytest.raises(
        SalsaError,
        match=r"sweep\.kl_coef: makes a policy kl-1, but there is a different policy kl-1 already; rename that policy",
    ):
        load("{kl_coef: {values: [1], reference: seed-1}}", more=both)
    assert list(policies(load("{kl_coef: {values: [1]}}", "sweep.kl_coef.values=[2, 3]"))) == ["kl-2", "kl-3"]
    assert policies(load("{kl_coef: {values: [1]}}", "sweep.kl_coef=null")) == {}
    said_by_set = "--set: sweep.kl_coef.values: must be a list of numbers, not 'x'"
    with pytest.raises(SalsaError, match=re.escape(said_by_set)):
        load("{kl_coef: {values: [1]}}", "sweep.kl_coef.values=x")
    loaded = load("{alpha: {values: [0.5]}}", "evaluate.models=[alpha-0.5]", "evaluate.pairs=[[alpha-0.5, seed-0]]")
    assert loaded.recipe.evaluate.models == ["alpha-0.5"]


def test_numbers_in_names_are_short_and_tell_values_apart(load: Any) -> None:
    """%g where that is the number, all digits where not; no + (a policy's name has none); weights without binary dust."""
    found = policies(
        load("{alpha: {values: [-0.5, 0.9, 0.1234567, 0.1234568, 1e-7]}, kl_coef: {values: [1e20, 2.0, -0.0]}}")
    )
    assert list(found) == [
        "alpha--0.5", "alpha-0.9", "alpha-0.1234567", "alpha-0.1234568", "alpha-1e-07", "kl-1e20", "kl-2", "kl-0"
    ]  # fmt: skip
    assert found["alpha-0.9"][0] == {"soup": {"members": [0, 1], "weights": [0.1, 0.9]}}
    assert found["alpha--0.5"][0] == {"soup": {"members": [0, 1], "weights": [1.5, -0.5]}}


def test_paths_of_a_sweeps_reference_are_those_of_its_layer(load: Any, tmp_path: Path) -> None:
    """Relative ones are taken from the recipe's folder, as a policy's are."""
    (tmp_path / "other").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "other" / name).write_text("{}")
    found = policies(load("{kl_coef: {values: [0.1], reference: [./other, seed-0]}}"))
    assert found == {"kl-0.1": ([str(tmp_path / "other"), "seed-0"], 0.1)}


def test_the_recipe_as_it_ran_has_policies_and_no_sweep(load: Any, tmp_path: Path) -> None:
    """It is itself a recipe, and the same one."""
    loaded = load("{alpha: {values: [0, 0.5], kl_coef: [0.01, 0.05]}, members: {values: [3]}}")
    assert loaded.recipe.sweep == {}
    (tmp_path / "again.yaml").write_text(recipe.resolved_yaml(loaded))
    again = load_recipe(str(tmp_path / "again.yaml"), lora=None, overrides=[])
    assert dataclasses.asdict(again.recipe) == dataclasses.asdict(loaded.recipe)


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ("{alhpa: {values: [1]}}", "s.yaml: line 6: sweep.alhpa: unknown sweep; did you mean alpha?"),
        ("{alpha: {value: [1]}}", "sweep.alpha.value: unknown key; did you mean values?"),
        ("{alpha: [1]}", "sweep.alpha: must be a mapping {values: […]}, not [1]"),
        ("{alpha: {}}", "sweep.alpha.values: is required; give a list of numbers"),
        ("{alpha: {values: [a]}}", "sweep.alpha.values: must be a list of numbers, not ['a']"),
        (
            "{alpha: {values: [0.5, 0.5]}}",
            "sweep.alpha.values: [0.5, 0.5] has a repeated entry; give each entry only once",
        ),
        (
            "{alpha: {values: [-0.0, 0]}}",
            "sweep.alpha.values: [0.0, 0.0] has a repeated entry; give each entry only once",
        ),
        ("{alpha: {values: [.nan]}}", "sweep.alpha.values: must be a list of numbers, not [nan]"),
        ("{alpha: {values: [true]}}", "sweep.alpha.values: must be a list of numbers, not [True]"),
        ("{alpha: {values: 0.5}}", "sweep.alpha.values: must be a list of numbers, not 0.5"),
        (
            "{alpha: {values: [0.5], members: [0]}}",
            "sweep.alpha.members: must be two different positions 0 to 2 of sft.seeds, not [0]",
        ),
        (
            "{alpha: {values: [0.5], members: [1, 1]}}",
            "sweep.alpha.members: must be two different positions 0 to 2 of sft.seeds, not [1, 1]",
        ),
        (
            "{alpha: {values: [0.5], members: [0, 7]}}",
            "sweep.alpha.members: must be two different positions 0 to 2 of sft.seeds, not [0, 7]",
        ),
        (
            "{alpha: {values: [0.5], kl_coef: x}}",
            "sweep.alpha.kl_coef: must be a number or a list of numbers, not 'x'",
        ),
        ("{alpha: {values: [0.5], kl_coef: [0.1, -1]}}", "sweep.alpha.kl_coef: must be at least 0, not -1"),
        (
            "{members: {values: [1.5]}}",
            "sweep.members.values: must be whole numbers from 1 to 3, the number of seeds in sft.seeds, not 1.5",
        ),
        (
            "{members: {values: [0]}}",
            "sweep.members.values: must be whole numbers from 1 to 3, the number of seeds in sft.seeds, not 0",
        ),
        (
            "{members: {values: [1000000000]}}",
            "sweep.members.values: must be whole numbers from 1 to 3, the number of seeds in sft.seeds, not 1e+09",
        ),
        ("{kl_coef: {values: [-1]}}", "sweep.kl_coef.values: must be at least 0, not -1"),
        (
            "{kl_coef: {values: [1], reference: [seed-0, seed-3]}}",
            "sweep.kl_coef.reference: there is no seed-3; sft.seeds has seed-0 to seed-2",
        ),
        (
            "{kl_coef: {values: [1], reference: {sop: {}}}}",
            "sweep.kl_coef.reference: must be seed-N, base, soup, a policy, {soup: …}, {shrunk: …}, {stretched: …}, {ema: …}, an adapter's path or a list of these, not {'sop': {}}",
        ),
        ("{kl_coef: {values: [1], kl_coef: 2}}", "sweep.kl_coef.kl_coef: unknown key"),
        ("{scale: {values: [1], seed: x}}", "sweep.scale.seed: must be a position 0 to 2 of sft.seeds, not 'x'"),
        ("{scale: {values: [1], seed: 3}}", "sweep.scale.seed: must be a position 0 to 2 of sft.seeds, not 3"),
        ("[1]", "sweep: must be a mapping such as {alpha: {values: [0, 0.5, 1]}}, not [1]"),
        ("0", "sweep: must be a mapping such as {alpha: {values: [0, 0.5, 1]}}, not 0"),
        ('{"a\\nb": {}}', "sweep.'a\\nb': unknown sweep; sweeps: alpha, members, kl_coef, scale"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(load: Any, sweep: str, line: str) -> None:
    """With its key."""
    with pytest.raises(SalsaError) as caught:
        load(sweep)
    assert line in str(caught.value) and "\n" not in str(caught.value)

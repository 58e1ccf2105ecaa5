"""`search:` becomes candidates among the policies, and the one of highest win rate stands for its policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config import sweeps
from salsa_peft.config.load import load_recipe
from salsa_peft.recipe import units
from salsa_peft.recipe.run import resolved_yaml
from salsa_peft.utils.errors import SalsaError

TEXT = (
    "name: s\ntoy: {}\nmodel: {max_length: 32}\ngeneration: {max_new_tokens: 10}\nsft: {batch_size: 32}\n"
    "policies:\n  ppo: {reference: seed-0, kl_coef: 0.3}\n  salsa: {reference: soup}\n"
)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """load(search, more lines) → the recipe with that `search:` line."""

    def make(line: str, more: str = "") -> Any:
        (tmp_path / "s.yaml").write_text(f"{TEXT}search: {line}\n{more}")
        return load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=[])

    return make


def test_candidates_stand_in_the_place_of_what_is_searched(load: Any) -> None:
    """Each with the policy's reference and a β of the list, whatever β the policy had."""
    recipe = load("{kl_coef: [0.01, 0.2]}").recipe
    assert {name: (policy.reference, policy.kl_coef) for name, policy in recipe.policies.items()} == {
        "ppo-kl-0.01": ("seed-0", 0.01),
        "ppo-kl-0.2": ("seed-0", 0.2),
        "salsa-kl-0.01": ("soup", 0.01),
        "salsa-kl-0.2": ("soup", 0.2),
    }
    some = load("{kl_coef: [0.01, 0.2], methods: [salsa]}").recipe
    assert list(some.policies) == ["ppo", "salsa-kl-0.01", "salsa-kl-0.2"]
    assert some.policies["ppo"].kl_coef == 0.3


def test_a_search_takes_the_policies_of_a_sweep_too(load: Any) -> None:
    """Figure 4a: for each α the best β."""
    recipe = load("{kl_coef: [0.01], methods: [alpha-0.5]}", "sweep: {alpha: {values: [0.5]}}\n").recipe
    assert list(recipe.policies) == ["ppo", "salsa", "alpha-0.5-kl-0.01"]


def test_a_recipe_as_it_ran_is_read_as_it_is(load: Any, tmp_path: Path) -> None:
    """The resolved recipe has candidates and methods, and gives the same units."""
    first = load("{kl_coef: [0.01, 0.2], questions: [in]}")
    (tmp_path / "again.yaml").write_text(resolved_yaml(first))
    again = load_recipe(str(tmp_path / "again.yaml"), lora=None, overrides=[])
    assert again.recipe == first.recipe
    assert units.evaluate_units(again.recipe, "") == units.evaluate_units(first.recipe, "")


@pytest.mark.parametrize(
    ("line", "more", "said"),
    [
        ("{kl_coef: [0.1], methods: [pp0]}", "", "search.methods: there is no policy 'pp0'; did you mean ppo?"),
        ("{kl_coef: [0.1, 0.1]}", "", "search.kl_coef: [0.1, 0.1] has a repeated entry; give each entry only once"),
        ("{kl_coef: []}", "", "search.kl_coef: must have at least 1 entry, not []"),
        ("{kl_coef: [-1]}", "", "search.kl_coef[0]: must be at least 0, not -1"),
        ("{kl_coef: x}", "", "search.kl_coef"),
        ("3", "", "search: must be a mapping {key: value, …}, not 3"),
        ("{kl_coef: [0.1], by: judge}", "", "search.by: judge needs evaluate.judge; add evaluate.judge, or set search.by=reward"),
        ("{kl_coef: [0.1], by: jury}", "", "search.by: must be reward or judge, not 'jury'"),
        ("{kl_coef: [0.1], against: seed-1}", "", "search.against: 'seed-1' is not an evaluated model; did you mean seed-0?"),
        ("{kl_coef: [0.1], against: ppo-kl-0.1}", "", "search.against: 'ppo-kl-0.1' is a candidate of the search; name a model that is not a candidate, such as seed-0"),
        ("{kl_coef: [0.1], questions: [inn]}", "", "search.questions: evaluate.prompts has no 'inn'; its sets are in, out"),
        ("{kl_coef: [0.1]}", "sweep: {kl_coef: {values: [0.1]}}\n", ""),
        ("{kl_coef: [0.1], methods: [kl-0.1]}", "sweep: {kl_coef: {values: [0.1, 1]}}\n", ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(load: Any, line: str, more: str, said: str) -> None:
    """In one line that names the key; the last two are fine."""
    if not said:
        load(line, more)
        return
    with pytest.raises(SalsaError) as found:
        load(line, more)
    assert said in str(found.value) and "\n" not in str(found.value)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    """A policy called like a candidate."""
    (tmp_path / "s.yaml").write_text(
        f"{TEXT}  ppo-kl-0.1: {{reference: base}}\nsearch: {{kl_coef: [0.1], methods: [ppo]}}\n"
    )
    with pytest.raises(
        SalsaError,
        match=r"search: the candidate of ppo with kl_coef 0\.1 gets the name ppo-kl-0\.1, but `policies` has a policy of that name; rename that policy",
    ):
        load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=[])


def rate(value: float) -> dict[str, float]:
    """A win rate against the opponent."""
    return {"adjusted_win_rate": value, "low": value - 0.1, "high": value + 0.1, "n": 9}


def test_the_best_is_picked_and_stands_in_the_pairs(load: Any) -> None:
    """Highest adjusted win rate, of equals the first; pairs between searched policies become pairs of the picked."""
    recipe = load(
        "{kl_coef: [0.01, 0.2]}", "evaluate: {pairs: [[salsa, ppo], [salsa, seed-0], [soup, seed-0]]}\n"
    ).recipe
    assert sweeps.candidate_pairs(recipe) == [
        ("ppo-kl-0.01", "seed-0"), ("ppo-kl-0.2", "seed-0"), ("salsa-kl-0.01", "seed-0"), ("salsa-kl-0.2", "seed-0"),
    ]  # fmt: skip
    rates = {"ppo-kl-0.01": 0.4, "ppo-kl-0.2": 0.6, "salsa-kl-0.01": 0.7, "salsa-kl-0.2": 0.7}
    found = sweeps.pick_candidates(recipe, {name: rate(value) for name, value in rates.items()}, ["in", "out"])
    assert found is not None
    assert {method: told["best"] for method, told in found["methods"].items()} == {
        "ppo": "ppo-kl-0.2",
        "salsa": "salsa-kl-0.01",
    }
    assert found["methods"]["ppo"]["tried"][0] == {
        "policy": "ppo-kl-0.01", "kl_coef": 0.01, "adjusted_win_rate": 0.4, "low": pytest.approx(0.3), "high": 0.5,
    }  # fmt: skip
    assert found["datasets"] == ["in", "out"] and found["against"] == "seed-0" and found["by"] == "reward"
    assert sweeps.with_picked(sweeps.compared_pairs(recipe), found) == [
        ("salsa-kl-0.01", "ppo-kl-0.2"), ("salsa-kl-0.01", "seed-0"), ("soup", "seed-0"),
    ]  # fmt: skip


def test_pairs_without_a_choice_name_policies_once(load: Any) -> None:
    """Soup and every policy against seed-0, later policies against earlier ones; a searched one by its own name."""
    recipe = load("{kl_coef: [0.01, 0.2], methods: [salsa]}").recipe
    assert sweeps.compared_pairs(recipe) == [
        ("soup", "seed-0"),
        ("ppo", "seed-0"),
        ("salsa", "seed-0"),
        ("salsa", "ppo"),
    ]


def test_no_search_no_pick(tmp_path: Path) -> None:
    """Everything as it was."""
    (tmp_path / "s.yaml").write_text(TEXT)
    recipe = load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=[]).recipe
    assert sweeps.candidate_pairs(recipe) == [] and sweeps.pick_candidates(recipe, {}, ["in"]) is None
    assert sweeps.with_picked([("soup", "seed-0")], None) == [("soup", "seed-0")]

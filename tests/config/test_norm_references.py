"""References that are scaled to another model's norm, and controls to evaluate: what a recipe may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.load import load_recipe
from salsa_peft.config.references import parse_reference
from salsa_peft.recipe.run import STAGES
from salsa_peft.utils.errors import SalsaError

RECIPE = """
name: tiny
toy: {}
sft: {seeds: [0, 1, 2]}
policies: {ppo: {reference: seed-0}}
landscape: null
"""


def load(tmp_path: Path, *sets: str) -> Any:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return load_recipe(str(tmp_path / "r.yaml"), lora="lora", overrides=list(sets)).recipe


def units(recipe: Any) -> dict[str, Any]:
    return {unit.id: unit for stage in STAGES.values() for unit in stage.units(recipe, stage.run)}


def test_what_each_kind_reads() -> None:
    (shrunk,) = parse_reference("reference", {"shrunk": {"seed": 1, "scale": "soup-norm"}})
    assert (shrunk.members, shrunk.weights, shrunk.norm_of) == (["seed-1"], [1.0], "soup")
    assert (shrunk.reads, shrunk.soup) == (["seed-1", "soup"], False)
    (stretched,) = parse_reference("reference", {"stretched": {"seed": 2}})
    assert (stretched.soup, stretched.norm_of, stretched.reads) == (True, "seed-2", ["soup", "seed-2"])
    (of,) = parse_reference("reference", {"stretched": {"soup": {"members": [0, 1], "weights": [0.25, 0.75]}}})
    assert (of.members, of.weights, of.norm_of) == (["seed-0", "seed-1"], [0.25, 0.75], "seed-0")
    assert of.reads == ["seed-0", "seed-1"]
    assert len({one.label for one in (shrunk, stretched, of)}) == 3


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("{shrunk: {seed: 0, scale: soup}}", "scale must be a number such as 0.6, or soup-norm, but the value is"),
        ("{stretched: 3}", "stretched: must have the form {soup: {members, weights}, seed: N}"),
        ("{stretched: {seed: -1}}", "stretched: must have the form"),
        ("{stretched: {scale: 2}}", "stretched: must have the form"),
        ("{stretched: {seed: 3}}", "there is no seed-3; sft.seeds has seed-0 to seed-2"),
        ("{stretched: {soup: {weights: [0.5, 0.6]}}}", "sum to 1.1, not 1"),
        ("{stretched: {soup: {sync_every: 2}}}", "sync_every does not work with a soup that is scaled to a norm"),
    ],
)
def test_what_is_refused(tmp_path: Path, reference: str, said: str) -> None:
    with pytest.raises(SalsaError) as error:
        load(tmp_path, f"policies.ppo.reference={reference}")
    assert said in str(error.value) and "policies.ppo.reference" in str(error.value)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("{soup: base}", "evaluate.controls.soup: is the name of another model of the run"),
        ("{ppo: base}", "evaluate.controls.ppo: is the name of another model"),
        ("{seed-1: base}", "evaluate.controls.seed-1: is the name of another model"),
        ("{x: [seed-0, seed-1]}", "evaluate.controls.x: must be one model, not a list of 2"),
        ("{x: seed-7}", "evaluate.controls.x: there is no seed-7"),
        ("{'a b': base}", "evaluate.controls: the name 'a b'"),
        ("[base]", "evaluate.controls: must be"),
    ],
)
def test_controls_that_are_refused(tmp_path: Path, sets: str, said: str) -> None:
    with pytest.raises(SalsaError) as error:
        load(tmp_path, f"evaluate.controls={sets}")
    assert said in str(error.value)


def test_units_read_what_the_norm_needs(tmp_path: Path) -> None:
    """The soup for a seed's scale, the seed for a soup's; the keys of other references stay as they are."""
    plain = units(load(tmp_path))
    assert plain["ppo/ppo"].key_fields["references"] == [
        {"label": None, "members": [0], "weights": [1.0], "soup": False, "path": None}
    ]
    sets = "policies={a: {reference: {shrunk: {seed: 1, scale: soup-norm}}}, b: {reference: {stretched: {seed: 2}}}}"
    found = units(load(tmp_path, sets))
    assert {"sft/seed-1", "soup"} <= set(found["ppo/a"].inputs) and {"sft/seed-2", "soup"} <= set(found["ppo/b"].inputs)
    one, two = (found[f"ppo/{name}"].key_fields["references"][0]["norm_of"] for name in "ab")
    assert (one, two) == ("soup", "seed-2")
    controlled = units(load(tmp_path, "evaluate.controls={wide: {stretched: {seed: 2}}}"))["evaluate"]
    assert "sft/seed-2" in controlled.inputs and controlled.key_fields["controls"]["wide"]["norm_of"] == "seed-2"
    assert "controls" not in plain["evaluate"].key_fields


def test_the_landscapes_key_has_norm_controls_only_if_asked(tmp_path: Path) -> None:
    one, other = (units(load(tmp_path, f"landscape={{norm_controls: {on}}}"))["landscape"] for on in ("false", "true"))
    assert "norm_controls" not in one.key_fields["landscape"] and other.key_fields["landscape"]["norm_controls"] is True

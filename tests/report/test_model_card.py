"""The model card of soups of policies and of policies with a reward of their own, without a Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.report.publish.items import Item
from salsa_peft.report.publish.model_card import data_sources, lineage, render_card

POLICIES = (
    "policies={ppo: {reference: seed-0}, short: {reference: seed-0, reward: {brevity: 1, commas: 0.5}},"
    " held: {reference: seed-0, reward: {brevity: 1, adapter: 0}}, dpo: {reference: seed-0, algorithm: dpo},"
    " next: {reference: soup, start: mix}}"
)
SOUPS = (
    "soups={mix: {members: [ppo, short], strategy: slerp, start: seed-0, scale: 0.5}, weak: {members: [short], scale: 0.3},"
    " plain: {members: [short, held], weights: [0.25, 0.75]}}"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe with a reward model and two reward functions."""
    code = "def brevity(completions, **_):\n    return [0.0 for _ in completions]\n\ncommas = brevity\n"
    (tmp_path / "rewards.py").write_text(code + code[: code.index("\n\n") + 1].replace("brevity", "commas"))
    parts = ", ".join(f"{tmp_path}/rewards.py:{name}" for name in ("brevity", "commas"))
    sets = [
        "toy=null", "model.base=org/base", "model.chat_template=chatml", "data.demonstrations=some/chats",
        "data.preferences=some/pairs", "data.prompts=some/prompts", "evaluate.prompts={in: some/questions}", "sft.seeds=[0, 1]",
        "landscape=null", "evaluate.models=[]", f"reward.model=[adapter, {parts}]", POLICIES, SOUPS,
    ]  # fmt: skip
    return load_recipe("quickstart", lora="lora", overrides=sets).recipe


def item(recipe: Recipe, folder: Path, name: str, **summary: Any) -> Item:
    kind = "policy" if name in recipe.policies else "soup"
    found = {"reference": "seed-0"} if kind == "policy" else {
        "strategy": "linear", "pairs": [], "modules": 1, "ranks": [4], "norm": None,
        "members": [{"name": one, "weight": 0.5, "ranks": [4], "norm": None} for one in ("a", "b")], **summary,
    }  # fmt: skip
    (folder / {"policy": "policy.json", "soup": "soup.json"}[kind]).write_text(json.dumps(found))
    return Item(name=name, kind=kind, folder=folder, recipe=recipe, base="org/base", summary={}, figure=None)


@pytest.mark.parametrize(
    ("name", "reward", "reads"),
    [
        ("ppo", None, {"demonstrations", "preferences", "prompts"}),
        ("short", "1·brevity + 0.5·commas", {"demonstrations", "prompts"}),
        ("held", "1·brevity", {"demonstrations", "prompts"}),
        ("dpo", None, {"demonstrations", "preferences"}),
    ],
)
def test_a_policy_s_reward(recipe: Recipe, tmp_path: Path, name: str, reward: str | None, reads: set[str]) -> None:
    """Its own weights have a row; the reward model and its data only where the policy is trained on its score."""
    one = item(recipe, tmp_path, name)
    rows = dict(lineage(one))
    assert rows.get("reward") == reward and ("reward model" in rows) == (name == "ppo")
    assert set(data_sources(one)) == reads
    assert ("some/pairs" in render_card(one, "me/it").split("## Recipe")[0]) == ("preferences" in reads)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "soup",
            "A model soup: the weight average of SFT seeds, which SALSA takes as the reference of RLHF's KL term.",
        ),
        ("mix", "A model soup: soup of ppo, short (slerp, changes from seed-0, η 0.5)."),
        ("plain", "A model soup: soup of short, held with weights 0.25, 0.75."),
        ("weak", "A model soup: control: short shrunk to 0.3 of its change from the base, averages nothing."),
    ],
)
def test_what_a_soup_is(recipe: Recipe, tmp_path: Path, name: str, text: str) -> None:
    """Only the section `soup` of SFT seeds is called so; the rows say how the policies in it were trained."""
    one = item(recipe, tmp_path, name, **({"scale": 0.5, "start": "seed-0"} if name == "mix" else {}))
    assert text in render_card(one, "me/it")
    rows = dict(lineage(one))
    trained = {"ppo": "PPO from seed-0, reference seed-0", "short": "PPO from seed-0, reference seed-0, reward 1·brevity + 0.5·commas"}  # fmt: skip
    for policy, said in trained.items():
        assert rows.get(policy) == (said if name == "mix" or (policy == "short" and name != "soup") else None)
    assert ("reward model" in rows) == (name == "mix") == ("preferences" in data_sources(one))
    assert ("prompts" in data_sources(one)) == (name != "soup") and "seed-0" in rows
    assert rows["soup"].endswith(", changes from seed-0, η 0.5") == (name == "mix")


def test_a_policy_that_starts_from_a_soup(recipe: Recipe, tmp_path: Path) -> None:
    """The card goes back to the policies that the soup is made of."""
    rows = dict(lineage(item(recipe, tmp_path, "next")))
    assert rows["algorithm"] == "PPO, from mix" and {"ppo", "short", "seed-0", "reward model"} <= rows.keys()


def test_a_soup_without_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    """A soup that `salsa soup` made: a weight average only if it is one."""
    one = item(recipe, tmp_path, "soup")
    alone = Item(**{**vars(one), "recipe": None})
    assert "A model soup: the weight average of 2 LoRA adapters." in render_card(alone, "me/it")
    summary = json.loads((tmp_path / "soup.json").read_text())
    (tmp_path / "soup.json").write_text(
        json.dumps({**summary, "strategy": "slerp", "start": "/home/me/old", "scale": 0.5})
    )
    assert "A model soup: slerp of 2 LoRA adapters, changes from old, η 0.5." in render_card(alone, "me/it")

"""`salsa docs`: every key of the schema is described, from its class, and docs/recipes.md has them all."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from paths import ROOT
from pydantic import ValidationError

from salsa_peft.cli import docs
from salsa_peft.cli.main import main
from salsa_peft.config.keys.describe import all_keys, find_key, type_text
from salsa_peft.config.keys.unknown import split_unknown
from salsa_peft.config.load import RECIPE_TYPE, python_names
from salsa_peft.config.schema import DPO, Generation, Judge, Recipe, Source
from salsa_peft.config.sweeps import SWEEPS

NO_UNIT = {
    "r", "lora_alpha", "lora_dropout", "seed", "seeds", "hidden_size", "learning_rate", "pretrain_learning_rate",
    "value_head_learning_rate", "weight_decay", "max_grad_norm", "center_rewards_coefficient", "members", "weights", "step_size", "rank",
    "importance_sampling_clip_max", "importance_sampling_clip_min", "gamma", "lam", "lam_value", "lam_length_alpha", "cliprange", "vf_coef",
    "max_ratio", "score_length_exponent", "reference_weights", "reference_weights_end", "reference_weights_step", "reference_weights_min", "line", "alphas", "scales", "plane", "temperature", "desirable_weight", "undesirable_weight", "kl_coef",
    "scale", "density", "drop_seed", "ema_decay", "interpolation", "sweep", "scalarized",
}  # fmt: skip
"""Last parts of keys whose numbers have no unit: positions, factors, ratios, rates, seeds."""


def test_the_page_is_up_to_date() -> None:
    """docs/recipes.md is what `salsa docs --markdown` prints."""
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == docs.markdown() + "\n", (
        "run `salsa docs --markdown > docs/recipes.md`"
    )


def test_every_field_of_the_schema_is_on_the_page() -> None:
    """Counted without the code that makes the page: the fields of the classes, with their names."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    full = Recipe(name="x").as_data()
    wanted = [key for key in full if not isinstance(full[key], dict) or not full[key]]
    wanted += [f"{section}.{key}" for section, inner in full.items() if isinstance(inner, dict) for key in inner]
    for where, section in (
        ("data.prompts", Source),
        ("dpo", DPO),
        ("generation", Generation),
        ("evaluate.judge", Judge),
    ):
        wanted += [f"{where}.{field.name}" for field in dataclasses.fields(section)]
    assert len(wanted) > 200
    sections = {f"Key `{name}`:" for name in full}
    assert [key for key in wanted if f"- `{key}` (" not in page and f"Key `{key}`:" not in sections] == []
    assert set(re.findall(r"\n(?:- `|## )([^`\n]+)", page)) - {"Outside sections"} == set(all_keys())


@pytest.mark.parametrize("name", [name for name, key in all_keys().items() if not key.is_section])
def test_each_key_has_text_default_unit_and_an_example_that_is_accepted(name: str) -> None:
    """The example is typed as the schema types it; a number has a unit, or is one of those that have none."""
    key = all_keys()[name]
    assert len(key.text) > 10 and key.type and key.default != ""
    assert "Unit:" not in key.text and "Source:" not in key.text and "Example:" not in key.text
    assert key.unit or not key.numeric or name.split(".")[-1] in NO_UNIT
    assert key.example is not None
    data: dict[str, Any] = python_names({"name": "x", **yaml.safe_load(key.as_yaml)})
    assert split_unknown(data, Recipe) == (data, {})
    kinds: set[str] = set()
    try:
        RECIPE_TYPE.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        kinds = {one["type"] for one in error.errors()}
    assert kinds <= {"missing"}  # an example has one key of its section; others may be required


def test_a_key_is_printed_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """Type, unit, default, source, example: the values of the schema."""
    assert main(["docs", "ppo.kl_target"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "ppo.kl_target",
        "  Target KL of the adaptive controller.",
        "  type      number above 0",
        "  unit      nats per response",
        "  default   6.0",
        "  source    TRL 0.8's default",
        "  example   ppo: {kl_target: 6.0}   in a recipe",
        "            --set 'ppo.kl_target=6.0'   on the command line",
    ]
    assert main(["run", "--help", "ppo.kl_target"]) == 0
    assert capsys.readouterr().out.splitlines() == said
    assert main(["docs", "sft.from", "ppo.batch_size"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "  type      list of (text, or null), or null" in said and "  unit      responses" in said


def test_sections_names_and_unknown_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name stands for NAME; a last part that one section alone has is enough; a wrong key names the nearest."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["docs"]) == 0
    said = capsys.readouterr().out
    assert all(section in said for section in ("\nppo ", "\nevaluate ", "\nhub ", "\nname = required"))
    assert max(map(len, said.splitlines())) <= 80
    assert main(["docs", "ppo"]) == 0
    said = capsys.readouterr().out
    assert "ppo.kl_coef = 0.2" in said and "ppo.gradient_checkpointing = false" in said and "dpo." not in said
    assert {name: getattr(find_key(name), "name", None) for name in
            ("policies.salsa.kl_coef", "evaluate.prompts.arena_v0.1.limit", "max_new_tokens", "ppo.guards.kl.limit", "sweep.alpha.values", "kl_coef", "x")} == {
        "policies.salsa.kl_coef": "policies.NAME.kl_coef", "evaluate.prompts.arena_v0.1.limit": "evaluate.prompts.NAME.limit",
        "max_new_tokens": "generation.max_new_tokens", "ppo.guards.kl.limit": "ppo.guards", "sweep.alpha.values": "sweep", "kl_coef": None, "x": None,
    }  # fmt: skip
    for kind in SWEEPS:
        assert main(["docs", f"sweep.{kind}.values"]) == 0
        assert f"  example   sweep: {{{kind}: {{values: [" in capsys.readouterr().out
    for wrong, near in (
        ("ppo.lerning_rate", "ppo.learning_rate"),
        ("genration", "generation"),
        ("kl_coef", "ppo.kl_coef"),
        ("MAX_LENGTH2", "model.max_length"),
    ):
        assert main(["docs", wrong]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and near in said, said
    assert main(["docs", "zzzzzz"]) == 2
    assert "`salsa docs` lists the sections" in capsys.readouterr().err


def test_types_in_words() -> None:
    """As a user writes the values."""
    hints = {name: all_keys()[name].type for name in
             ("ppo.kl_estimator", "sft.seeds", "evaluate.pairs", "toy.operations", "sft.warmup_ratio", "data.prompts", "revisions")}  # fmt: skip
    assert hints == {
        "ppo.kl_estimator": "k1 | k2 | k3 | abs | full",
        "sft.seeds": "list of whole numbers, at least 0 and below 2³²",
        "evaluate.pairs": "list of lists of texts",
        "toy.operations": "list of (list | copy | repeat | name | kin | some)",
        "sft.warmup_ratio": "number, at least 0 and below 1",
        "data.prompts": "path, or section, or null",
        "revisions": "mapping from names to text",
    }
    assert type_text(int | None) == "whole number, or null"


def test_no_torch() -> None:
    """Nor Transformers, for any form of the command."""
    script = (
        "import sys; from salsa_peft.cli.main import main; main(['docs', 'ppo']); main(['docs', '--markdown'])\n"
        "assert not {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

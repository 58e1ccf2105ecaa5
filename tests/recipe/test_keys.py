"""What stands in the cache keys: the data stage's own settings, and the versions of the libraries that a unit uses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from salsa_peft.config.job import Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.recipe import cache
from salsa_peft.recipe.run import STAGES

POLICIES = {"ppo": {"reference": "seed-0"}, **{name: {"reference": "seed-0", "algorithm": name} for name in ("dpo", "kto", "rloo", "grpo")}}  # fmt: skip
INDEX = "model.safetensors.index.json"
TRAINED = ("sft/seed-0", "sft/seed-1", "reward", "ppo/ppo", "dpo/dpo", "kto/kto", "rloo/rloo", "grpo/grpo")


@pytest.fixture
def units(tmp_path: Path) -> Callable[..., dict[str, Unit]]:
    """A recipe's settings → its units by their ids; the base is a folder, the data are files."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    (base / INDEX).write_text('{"weight_map": {"x": "model.safetensors"}}')
    (base / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    rows = {
        "demonstrations": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "preferences": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "prompts": {"prompt": "q"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {
        "name": "keys", "model": {"base": str(base), "chat_template": "chatml"}, "policies": POLICIES,
        "data": {name: f"{name}.jsonl" for name in rows}, "evaluate": {"prompts": {"in": "prompts.jsonl"}},
    }  # fmt: skip
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(recipe))

    def of(*overrides: str, lora: str | None = "lora") -> dict[str, Unit]:
        loaded = load_recipe(str(tmp_path / "keys.yaml"), lora=lora, overrides=list(overrides)).recipe
        return {unit.id: unit for stage in STAGES.values() for unit in stage.units(loaded, stage.run)}

    return of


def with_library(found: dict[str, Unit], name: str) -> set[str]:
    return {unit for unit, one in found.items() if name in one.libraries}


TEXT = {"data/demonstrations", "data/preferences", "ppo/ppo", "dpo/dpo", "kto/kto", "rloo/rloo", "grpo/grpo", "reward_quality", "landscape", "evaluate"}  # fmt: skip
TRL = {"dpo/dpo", "kto/kto", "rloo/rloo", "grpo/grpo"}
DATA = {"data/demonstrations", "data/preferences"}


@pytest.mark.parametrize(
    ("lora", "sets", "library", "expected"),
    [
        ("lora", (), "tokenizers", TEXT),
        ("lora", (), "jinja2", TEXT),
        ("lora", ("soup.strategy=greedy", "data.held_out=demonstrations.jsonl"), "jinja2", {*TEXT, "soup"}),
        ("lora", ("evaluate.judge={kind: local, model: me/judge}",), "jinja2", {*TEXT, "judge"}),
        ("lora", ("evaluate.judge={kind: function, model: 'judges:j'}",), "jinja2", TEXT),
        ("lora", (), "datasets", {*DATA, *TRL}),
        ("lora", ("data.prompts=me/prompts",), "datasets", {*DATA, *TRL, "reward_quality", "ppo/ppo"}),
        ("lora", ("evaluate.prompts={in: me/prompts}",), "datasets", {*DATA, *TRL, "landscape", "evaluate"}),
        ("lora", (), "accelerate", set(TRAINED)),
        ("lora", ("sft.from=[me/a, null]",), "accelerate", {*TRAINED} - {"sft/seed-0"}),
        ("lora", (), "bitsandbytes", set()),
        ("qlora", (), "bitsandbytes", {*TRAINED, "reward_quality", "landscape", "evaluate"}),
        ("lora", ("reward.optim=paged_adamw_8bit",), "bitsandbytes", {"reward"}),
        ("lora", (), "torchao", set()),
        (None, (), "torchao", set(TRAINED)),
        (None, ("precision=stochastic",), "torchao", set(TRAINED)),
        (None, ("precision=master",), "torchao", set()),
        ("lora", (), "vllm", set()),
        ("lora", ("ppo.rollout_backend=vllm",), "vllm", {"ppo/ppo"}),
    ],
)
def test_a_library_stands_in_the_keys_of_the_units_that_use_it(
    units: Any, tmp_path: Path, lora: str | None, sets: tuple[str, ...], library: str, expected: set[str]
) -> None:
    """And in no other."""
    (tmp_path / "judges.py").write_text("def j(): ...")
    sets = tuple(word.replace("=demonstrations.jsonl", f"={tmp_path}/demonstrations.jsonl").replace("judges:j", f"{tmp_path}/judges:j") for word in sets)  # fmt: skip
    assert with_library(units(*sets, lora=lora), library) == expected


def test_what_a_new_version_makes_again(units: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the units that use the library, and of those that read them."""
    found = list(units().values())
    before = {name: one.key for name, one in cache.plan(found, tmp_path / "run").items()}
    version = importlib.metadata.version
    for library, changed, same in (
        ("datasets", {"data/demonstrations", "sft/seed-0", "reward"}, set()),
        ("accelerate", {"sft/seed-0", "reward", "ppo/ppo"}, DATA),
        ("vllm", set(), set(before)),
        ("bitsandbytes", set(), set(before)),
    ):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, one=library: "99" if name == one else version(name)
        )
        after = {name: one.key for name, one in cache.plan(found, tmp_path / "run").items()}
        differ = {name for name in before if before[name] != after[name]}
        assert changed <= differ and not same & differ, library


def test_guards_stand_in_no_key(units: Any) -> None:
    """A policy that a guard stopped is resumed with other guards, and finished ones stay."""
    before, after = units("ppo.guards={length: stop}"), units("ppo.guards.collapse=warn")
    assert {name for name, one in before.items() if one.key_fields != after[name].key_fields} == set()
    lower = units("ppo.kl_coef=0.01")
    assert {name for name, one in before.items() if one.key_fields != lower[name].key_fields} == {"ppo/ppo"}


class TestWhy:
    """An outdated result is named with the first thing that differs; without a finished result a unit is new."""

    def finish(self, found: dict[str, Unit], run: Path) -> None:
        plan = cache.plan(list(found.values()), run)
        for planned in plan.values():
            planned.folder.mkdir(parents=True, exist_ok=True)
            cache.write_manifest(planned, plan)

    def why(self, found: dict[str, Unit], run: Path, unit: str) -> str | None:
        return cache.plan(list(found.values()), run)[unit].why

    def test_settings_data_and_inputs(self, units: Any, tmp_path: Path) -> None:
        run = tmp_path / "run"
        assert self.why(units(), run, "sft/seed-0") == "new"
        self.finish(units(), run)
        assert self.why(units(), run, "sft/seed-0") is None
        changed = units("sft.learning_rate=0.5")
        assert self.why(changed, run, "data/demonstrations") is None
        assert self.why(changed, run, "sft/seed-0") == "outdated: sft.learning_rate 0.0002 → 0.5"
        assert self.why(changed, run, "reward") == "outdated: its input sft/seed-0 has changed"
        words = units("sft.gradient_checkpointing=true")
        assert self.why(words, run, "sft/seed-0") == "outdated: sft.gradient_checkpointing false → true"
        both = units("sft.learning_rate=0.5", "sft.weight_decay=0.25")
        assert self.why(both, run, "sft/seed-0") == "outdated: sft.learning_rate 0.0002 → 0.5 (and 1 more)"
        with (tmp_path / "demonstrations.jsonl").open("a") as file:
            file.write("\n")
        assert self.why(units(), run, "data/demonstrations") == "outdated: a file or folder that it reads has changed"
        assert self.why(units(), run, "sft/seed-1") == "outdated: its input data/demonstrations has changed"
        assert self.why(units(), run, "data/preferences") is None

    def test_the_newest_finished_result_counts(self, units: Any, tmp_path: Path) -> None:
        run = tmp_path / "run"
        self.finish(units("sft.learning_rate=0.5"), run)
        self.finish(units("sft.learning_rate=0.25"), run)
        assert self.why(units("sft.learning_rate=2"), run, "sft/seed-0") == "outdated: sft.learning_rate 0.25 → 2.0"
        assert self.why(units("sft.learning_rate=0.5"), run, "sft/seed-0") is None

    def test_a_version(self, units: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.finish(units(), tmp_path / "run")
        version = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == "datasets" else version(name))
        why = self.why(units(), tmp_path / "run", "data/demonstrations")
        assert why == f"outdated: datasets {version('datasets')} → 99"

    def test_a_run_of_a_version_that_did_not_write_what_keys_are_made_of(self, units: Any, tmp_path: Path) -> None:
        run = tmp_path / "run"
        (run / "sft" / "seed-0" / "0123456789ab").mkdir(parents=True)
        (run / "sft" / "seed-0" / "0123456789ab" / "manifest.json").write_text('{"key": "0123", "files": {}}')
        said = "outdated: the finished result was made by an earlier version of salsa-peft"
        assert self.why(units(), run, "sft/seed-0") == said
        assert self.why(units(), run, "sft/seed-1") == "new"


class TestData:
    def keys(self, found: dict[str, Unit], run: Path) -> tuple[str, str]:
        plan = cache.plan(list(found.values()), run)
        return plan["data/demonstrations"].key, plan["data/preferences"].key

    @pytest.mark.parametrize(
        "change",
        ["sft.seeds=[4, 5, 6]", "sft.learning_rate=1e-3", "reward.learning_rate=1e-3", "model.max_length=777", "sft.subset=0.5",
         "model.dtype=float32", "reward.held_out=0.5", "adapter.r=4"],
    )  # fmt: skip
    def test_training_does_not_count(self, units: Any, tmp_path: Path, change: str) -> None:
        assert self.keys(units(), tmp_path) == self.keys(units(change), tmp_path)

    def test_the_bases_weights_do_not_count_and_its_tokenizer_does(self, units: Any, tmp_path: Path) -> None:
        first = self.keys(units(), tmp_path)
        (tmp_path / "base" / "model.safetensors").write_bytes(b"\x03\0\0\0\0\0\0\0{ }")
        (tmp_path / "base" / INDEX).write_text('{"metadata": {}, "weight_map": {"x": "model.safetensors"}}')
        assert self.keys(units(), tmp_path) == first
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "config.json",
            "additional_chat_templates/tool_use.jinja",
        ):
            (tmp_path / "base" / name).write_text(f"{{{len(name) * ' '}}}")
            now = self.keys(units(), tmp_path)
            assert now[0] != first[0] and now[1] != first[1], name
            first = now

    def test_each_has_its_own_source(self, units: Any, tmp_path: Path) -> None:
        """Of a file the content, not the path; limit, split and template too."""
        first = self.keys(units(), tmp_path)
        (tmp_path / "moved.jsonl").write_bytes((tmp_path / "demonstrations.jsonl").read_bytes())
        assert self.keys(units(f"data.demonstrations={tmp_path}/moved.jsonl"), tmp_path) == first
        with (tmp_path / "demonstrations.jsonl").open("a") as file:
            file.write("\n")
        now = self.keys(units(), tmp_path)
        assert now[0] != first[0] and now[1] == first[1]
        limited = self.keys(units(f"data.preferences={{path: {tmp_path}/preferences.jsonl, limit: 1}}"), tmp_path)
        assert limited[0] == now[0] and limited[1] != now[1]
        other = self.keys(units("model.chat_template=zephyr"), tmp_path)
        assert other[0] != now[0] and other[1] != now[1]

    def test_only_what_is_trained_on(self, units: Any) -> None:
        """Seeds that exist need no demonstrations, a reward that exists and no dpo no preferences."""
        existing = (
            "sft.from=[me/a, me/b]",
            "reward=me/reward",
            f"policies={json.dumps({'ppo': {'reference': 'seed-0'}})}",
        )
        assert not DATA & set(units(*existing))
        assert "data/demonstrations" in units("sft.from=[me/a, null]")
        assert DATA & set(units(*existing[:2])) == {"data/preferences"}, "for dpo and kto"
        found = units("sft.from=[me/a, null]")
        assert found["sft/seed-0"].inputs == () and found["sft/seed-1"].inputs == ("data/demonstrations",)
        assert found["reward"].inputs == ("data/preferences", "sft/seed-0")
        assert found["kto/kto"].inputs[:2] == ("sft/seed-0", "data/preferences")

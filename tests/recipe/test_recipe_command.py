"""The command: quick help and refusals that load no torch and write nothing, the plan, `--lora` wherever it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundled_recipes import RECIPES

import salsa_peft
from salsa_peft.cli import main as cli
from salsa_peft.config import load as parsing
from salsa_peft.recipe import run as recipe
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.__main__ import parse_args
from salsa_peft.recipe.units import report_units

RECIPE = """
name: tiny
toy: {}
sft: {batch_size: 8, micro_batch_size: 2}
ppo: {batch_size: 16, num_mini_batches: 2, micro_batch_size: 4}
policies:
  ppo: {reference: seed-0}
  mkl: {reference: [seed-0, {shrunk: {seed: 1, scale: 0.5}}]}
  a75: {reference: {soup: {members: [0, 2], weights: [0.25, 0.75]}}}
"""
PACKAGE = Path(recipe.__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with tiny.yaml in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("sft: {", "sft: {seeds: [0, 1, 2], "))
    return tmp_path


def shell(*words: str, module: str = "salsa_peft.recipe") -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command in a process that would say on leaving that it had loaded torch."""
    code = (
        "import runpy, sys, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules))))\n"
        f"sys.argv[1:] = {list(words)!r}\nrunpy.run_module({module!r}, run_name='__main__')\n"
    )
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return done, time.perf_counter() - start


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["tiny.yaml", "--lora", "--dry-run"],
        ["tiny.yaml", "--lora", "--set", "ppo.learning_rate=fast"],
        ["nope"],
        [],
    ],
)
def test_no_torch_quick_and_nothing_written(here, words):
    done, seconds = shell(*words)
    assert "HEAVY []" in done.stdout
    assert seconds < 5
    assert done.returncode == (0 if words and words[-1] in ("--help", "--dry-run") else 2)
    assert done.stderr.count("\n") == (1 if done.returncode else 0)
    assert "Traceback" not in done.stderr
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


def test_the_console_script_is_the_same_commands(here, capsys):
    assert cli.main(["--help"]) == 0
    assert "salsa report" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"{salsa_peft.__version__}\n")
    assert cli.main(["rn"]) == 2
    assert "did you mean run?" in capsys.readouterr().err
    assert cli.main(["run", "tiny.yaml", "--lora", "--dry-run"]) == 0
    first = capsys.readouterr().out
    assert salsa_run(["tiny.yaml", "--lora", "--dry-run"]) == 0
    free = r"[\d.]+ [GM]iB free"  # other processes write meanwhile
    assert re.sub(free, "", capsys.readouterr().out) == re.sub(free, "", first)
    assert cli.main(["report", "tiny.yaml", "--lora"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "report needs results that are not finished: toy (new), data/demonstrations (new), sft/seed-0"
    )
    assert said.endswith("; run the recipe first: salsa run tiny.yaml --lora\n") and "--stages" not in said
    done, _ = shell("run", "tiny.yaml", "--lora", "--dry-run", module="salsa_peft.cli.main")
    assert done.returncode == 0
    assert re.sub(free, "", done.stdout).startswith(re.sub(free, "", first))
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("words", "preset", "path"),
    [
        ("tiny.yaml", None, "tiny.yaml"),
        ("--lora tiny.yaml", "lora", "tiny.yaml"),
        ("--lora lora tiny.yaml", "lora", "tiny.yaml"),
        ("--lora=lora tiny.yaml", "lora", "tiny.yaml"),
        ("tiny.yaml --lora", "lora", "tiny.yaml"),
        ("tiny.yaml --lora lora", "lora", "tiny.yaml"),
        ("tiny.yaml --lora --dry-run", "lora", "tiny.yaml"),
        ("--lora --dry-run tiny.yaml", "lora", "tiny.yaml"),
        ("--dry-run --lora tiny.yaml --set a=1", "lora", "tiny.yaml"),
        ("--set a=1 tiny.yaml --lora --set b=2", "lora", "tiny.yaml"),
        ("--lora qlroa tiny.yaml", "qlroa", "tiny.yaml"),
        ("tiny.yaml --lora qlroa", "qlroa", "tiny.yaml"),
        ("--lora=qlroa tiny.yaml", "qlroa", "tiny.yaml"),
        ("--lora quickstart", "lora", "quickstart"),
    ],
)
def test_lora_never_swallows_the_recipe(words, preset, path):
    args = parse_args(words.split())
    assert (args.lora, args.recipe) == (preset, path)


@pytest.mark.parametrize(
    ("words", "sets"),
    [
        ("tiny.yaml --set a=1 b=2", ["a=1", "b=2"]),
        ("tiny.yaml --set a=1 --set b=2 c=3 --lora", ["a=1", "b=2", "c=3"]),
        ("--set a=1 b=2 tiny.yaml --lora --set c=3", ["a=1", "b=2", "c=3"]),
        ("--set a=1 tiny.yaml b=2", ["a=1", "b=2"]),
        ("--lora --set a=1 b=2 tiny.yaml", ["a=1", "b=2"]),
        ("--set=a=1 tiny.yaml --set=b=", ["a=1", "b="]),
        ("tiny.yaml --set a b=2", ["a", "b=2"]),  # refused when the recipe is read, with all other mistakes
        ("tiny.yaml --set a=1 b", ["a=1", "b"]),
    ],
)
def test_set_takes_several_settings_and_never_the_recipe(words, sets):
    args = parse_args(words.split())
    assert (args.set, args.recipe) == (sets, "tiny.yaml")


@pytest.mark.parametrize(
    "words", ["", "--lora", "a.yaml b.yaml", "--lora lora a.yaml b.yaml", "a.yaml --nope", "a.yaml --set"]
)
def test_wrong_command_lines(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(words.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_plan(here, capsys):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (here / "d.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    assert (
        salsa_run(
            [
                "tiny.yaml",
                "--lora",
                "--dry-run",
                "--set",
                "data.demonstrations=d.jsonl",
                "--set",
                "sft.num_train_epochs=2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    for line in (
        f"results: {here}/runs/tiny-lora",
        "sft, each of 3 seeds          8 rows = 4 micro-batches of 2  about 6 steps (20 rows × 2 epochs)",
        "16 responses = 2 minibatches × 2 micro-batches of 4  about 800 updates (6400 rows × 2 epochs), 4 × 2 optimizer steps per update",
        "ppo.learning_rate             2e-06                         2e-05",
        "adapter.r                     –                             16",
    ):
        assert " ".join(line.split()) in " ".join(out.split()), line  # whatever the columns' widths
    assert out.count("to do") == 15
    assert (
        salsa_run(["tiny.yaml", "--lora", "--dry-run", "--stages", "toy,data,sft/seed-1", "--set", "sft.max_steps=3"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("to do") == 4
    assert out.count("left out") == 11
    assert "3 steps (max_steps)" in out


def test_units_name_what_they_read(here):
    loaded = parsing.load_recipe(
        "tiny.yaml", lora="lora", overrides=["evaluate.models=[base, seed-1]", "landscape.plane=[0,1,2]"]
    )
    units = {unit.id: unit for stage in recipe.STAGES.values() for unit in stage.units(loaded.recipe, stage.run)}
    assert units["reward_quality"].inputs == ("toy", "sft/seed-0", "reward")
    measured = ("toy", "sft/seed-0", "reward", "reward_quality")
    assert units["ppo/ppo"].inputs == measured
    assert units["ppo/mkl"].inputs == (*measured, "sft/seed-1")
    assert units["ppo/a75"].inputs == (*measured, "sft/seed-2")
    assert units["soup"].inputs == ("sft/seed-0", "sft/seed-1")
    assert units["landscape"].inputs == ("toy", "reward", "sft/seed-0", "sft/seed-1", "sft/seed-2")
    assert units["evaluate"].inputs == (
        "toy",
        "sft/seed-0",
        "soup",
        "sft/seed-1",
        "reward",
        "ppo/ppo",
        "ppo/mkl",
        "ppo/a75",
    )
    assert set(units["report"].inputs) == set(units) - {"report"}
    assert [unit.id for unit in report_units(loaded.recipe, "")] == ["report"]


def test_the_plans_updates_are_rollout_batches(here, capsys):
    """max_steps counts optimizer steps; the prompts that don't fill a rollout batch are left out."""
    (here / "p.jsonl").write_text('{"prompt": "a"}\n' * 40)
    plan = ["tiny.yaml", "--lora", "--dry-run", "--set", "data.prompts=p.jsonl"]
    assert salsa_run(plan) == 0
    assert "about 4 updates (40 rows × 2 epochs)" in capsys.readouterr().out
    assert salsa_run([*plan, "--set", "ppo.max_steps=16"]) == 0
    assert "2 updates (max_steps = 16 optimizer steps)" in capsys.readouterr().out
    assert salsa_run([*plan, "--set", "ppo.value=group"]) == 0
    said = capsys.readouterr().out
    assert "16 responses to 4 prompts = 2 minibatches" in said and "about 20 updates (40 rows × 2 epochs)" in said


def test_local_paths_are_in_no_slice(here):
    (here / "d.jsonl").write_text('{"messages": []}\n' * 8)
    (here / "a").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (here / "a" / name).write_text("{}")
    sets = [
        "data.demonstrations=d.jsonl",
        "model.chat_template=chatml",
        "policies.ppo.reference=./a",
        "evaluate.models=[./a]",
    ]
    loaded = parsing.load_recipe("tiny.yaml", lora="lora", overrides=sets)
    units = {unit.id: unit for stage in recipe.STAGES.values() for unit in stage.units(loaded.recipe, stage.run)}
    assert units["data/demonstrations"].files[:1] == (str(here / "d.jsonl"),)
    assert units["sft/seed-0"].files[1:] == ()
    assert units["ppo/ppo"].files[1:] == (str(here / "a"),)
    assert units["evaluate"].files[1:] == (str(here / "a"),)
    assert all(
        str(here) not in json.dumps(unit.key_fields) and str(PACKAGE) not in json.dumps(unit.key_fields)
        for unit in units.values()
    )


def test_output_dir(here, capsys):
    assert salsa_run(["tiny.yaml", "--lora", "--dry-run", "--output-dir", "elsewhere"]) == 0
    assert f"results: {here}/elsewhere\n" in capsys.readouterr().out
    assert salsa_run(["tiny.yaml", "--lora", "--output-dir", "tiny.yaml/x"]) == 2
    assert "tiny.yaml is a file; choose a folder" in capsys.readouterr().err


def test_no_stage_is_imported_by_the_table():
    for stage in recipe.STAGES.values():
        module, name = stage.run.split(":")
        assert module.startswith("salsa_peft.")
        assert name.isidentifier()


def test_lazy_names():
    assert set(salsa_peft.__all__) <= set(dir(salsa_peft))
    with pytest.raises(AttributeError, match="nope"):
        _ = salsa_peft.nope


def test_bundled_recipes_and_presets_parse():
    assert "lora" in parsing.bundled_names("adapters")
    for name in RECIPES:
        for preset in parsing.bundled_names("adapters"):
            assert parsing.load_recipe(name, lora=preset, overrides=[]).recipe.name
        assert parsing.load_recipe(name, lora=None, overrides=[]).recipe.mode == "full"

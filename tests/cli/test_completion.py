"""Tab completion: commands, options, bundled recipes, recipe keys, run folders; in a real shell's environment, with argcomplete."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from salsa_peft.cli import completion
from salsa_peft.cli.main import COMMANDS
from salsa_peft.config.keys.describe import all_keys

LINES = {
    "salsa ": ["run", "soup", "judge", "hub", "init", "docs", "--version"],
    "salsa ru": ["run "],
    "salsa run sto": ["stories "],
    "salsa run my": ["my.yaml "],
    "salsa run my.yaml --dr": ["--dry-run "],
    "salsa run my.yaml --lora q": ["qlora "],
    "salsa run my.yaml --set ppo.kl_t": ["ppo.kl_target="],
    "salsa run my.yaml --set ppo.seed=1 policies.mi": [
        f"policies.mine.{key}=" for key in ("reference", "start", "kl_coef", "algorithm", "reward", "overrides")
    ],
    "salsa run my.yaml --stages data,sof": [],
    "salsa run my.yaml --stages data,sou": ["data,soup", "data,soups"],
    "salsa run my.yaml --force ppo/m": ["ppo/mine "],
    "salsa docs evaluate.judge.k": ["evaluate.judge.kind "],
    "salsa report runs/": ["runs/one-lora "],
    "salsa doctor run": ["runs/one-lora "],
    "salsa hub push runs/one-lora mi": ["mine "],
    "salsa hub pu": ["push", "pull"],
    "salsa init --from q": ["quickstart "],
    "python -m salsa_peft.cli.main so": ["soup "],
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe my.yaml, and the folder of a run of it."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "my.yaml", tmp_path / "runs" / "one-lora" / "recipe.yaml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("name: one\ntoy: {}\npolicies: {mine: {reference: soup}}\n")
    return tmp_path


def test_lines_as_a_shell_sends_them(here: Path) -> None:
    """Each in a fork of one process; no torch is imported."""
    pytest.importorskip("argcomplete")
    script = """
import json, os, sys
from salsa_peft.cli.main import main
found = {}
for line in json.loads(sys.argv[1]):
    os.environ.update(COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE="3" if line.startswith("python") else "1",
                      _ARGCOMPLETE_IFS="|", _ARGCOMPLETE_STDOUT_FILENAME="out")
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 9)
        sys.modules.update(torch=None, transformers=None)  # an import of these would fail
        main()
    assert os.waitpid(child, 0)[1] == 0, line
    found[line] = open("out").read().split("|")
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(LINES))],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for line, wanted in LINES.items():
        if line in ("salsa ", "salsa hub pu"):
            assert set(wanted) <= set(found[line]), line
        else:
            assert [word for word in found[line] if word] == wanted, line


def test_keys_and_values() -> None:
    """Every key that has a value, with the names of the recipe; choices and truth values after the =."""
    args = argparse.Namespace(recipe=["my.yaml"])
    keys = list(completion._settings("", args))
    assert {key.name + "=" for key in all_keys().values() if not key.is_section and "NAME" not in key.name} < set(keys)
    assert "policies.mine.kl_coef=" in keys and not [key for key in keys if "NAME" in key]
    assert completion._settings("ppo.value=", args) == [
        f"ppo.value={word}" for word in ("head", "adapter", "none", "group")
    ]
    assert completion._settings("model.quantization=", args) == [
        "model.quantization=nf4",
        "model.quantization=nf4-double",
    ]
    assert completion._settings("ppo.whiten_rewards=t", args) == ["ppo.whiten_rewards=true", "ppo.whiten_rewards=false"]
    assert completion._settings("ppo.kl_coef=", args) == []
    safe = completion._completer(completion._settings)
    assert safe("ppo", argparse.Namespace(recipe=["half-typed"])) == []


def test_runs_and_recipes(here: Path) -> None:
    """Folders with a recipe.yaml; bundled recipes, files and folders."""
    assert list(completion._runs("", None)) == ["runs/one-lora"]
    assert next(iter(completion._runs("runs/", None))) == "runs/one-lora"
    recipes = list(completion._recipes("", None))
    assert {"quickstart", "studies/world", "my.yaml", "runs/"} <= set(recipes)
    assert str(here / "my.yaml") in list(completion._recipes(f"{here}/m", None))


def test_every_metavar_is_an_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """A name in the table that no command's help has would complete nothing."""
    import importlib

    shown = ""
    for command, module in COMMANDS.items():
        for words in [["--help"], *([["push", "--help"]] if command == "hub" else [])]:
            with contextlib.suppress(SystemExit):
                importlib.import_module(module).main(words)
            shown += capsys.readouterr().out
    assert [name for name in completion.COMPLETERS if name not in shown] == []

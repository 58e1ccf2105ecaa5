"""README's size; every link, command, recipe fragment and Python snippet of README and docs/."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docs_pages
import numpy as np
import pytest
import yaml
from docs_pages import PAGES, Block, Command
from paths import ROOT
from safetensors.numpy import save_file

from salsa_peft.cli.main import COMMANDS
from salsa_peft.cli.main import main as salsa
from salsa_peft.config.load import load_recipe
from salsa_peft.config.options.guards import DEFAULTS

NOT_RUN = {
    "python3 -m venv": "the environment is made by .ci/run",
    "pre-commit install": "changes the checkout",
    "pip install": "done by .ci/run; test_extras checks what it names",
    "ruff": "run by .ci/run",
    "mypy": "run by .ci/run",
    ".ci/run": "runs these tests",
    "mkdocs": "needs the extra docs",
    "accelerate launch": "train.py is the reader's; tests of several processes launch such scripts",
    "vllm serve": "needs a GPU",
}
"""Start of a command → why it is not tried here."""


def test_readme_is_for_five_minutes() -> None:
    """At most 150 lines of 120 characters and 12 KB."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert len(text.encode()) <= 12 * 1024


def test_lines_of_the_docs() -> None:
    """At most 120 characters, except rows of tables, images and what a program printed."""
    for page in PAGES:
        text = re.sub(r"```text\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        long = [line for line in text.splitlines() if len(line) > 120 and not line.lstrip().startswith(("|", "!["))]
        assert (page.name, long) == (page.name, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """To files that exist and headings that they have; pages of docs/ link inside docs/, which is all of the site."""
    for target in docs_pages.links(page):
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.is_file(), f"{page.name} links to {target}, which is missing"
        assert not anchor or anchor in docs_pages.anchors(to), (
            f"{page.name} links to {target}, a heading that is missing"
        )
        assert page.parent.name != "docs" or to.parent == page.parent, f"{target} is outside of docs/"


def test_the_sites_menu_has_every_page() -> None:
    """mkdocs.yml names each page of docs/ once."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_guard_is_described() -> None:
    """With its default limit, and whether it stops or is off."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for name, guard in DEFAULTS.items():
        action = "" if guard.action == "warn" else f"; {guard.action}"
        assert f"| `{name}` ({guard.limit:g}{action}) |" in page


def test_extras() -> None:
    """Every extra that a page installs exists, and the page about the installation lists all."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        assert set(re.findall(r"(?:salsa-peft|\.)\[(\w+)\]", page.read_text(encoding="utf-8"))) <= set(extras), (
            page.name
        )
    listed = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(extras) <= set(listed)


# commands


class ParsedError(Exception):
    """The command line was understood."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader: files and folders that commands and recipes of the pages name."""
    recipe = (ROOT / "recipes" / "smollm2.yaml").read_text(encoding="utf-8")
    (tmp_path / "my.yaml").write_text(recipe.replace("name: smollm2", "name: my"))
    rows = {"chats": '"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}
    rows |= {"pairs": '"prompt": "q#", "chosen": "a", "rejected": "b"', "questions": '"prompt": "q#"'}
    for name, row in rows.items():
        lines = [f"{{{row}}}\n".replace("#", str(number)) for number in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    for name in ("mt_bench/question.jsonl", "arena-hard-v0.1/question.jsonl"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(tmp_path / "questions.jsonl", tmp_path / name)
    (tmp_path / "my_rewards.py").write_text(
        "def score(completions, **_): return [0.0] * len(completions)\ngold = brevity = sentiment = score\n"
    )
    for name in ("seed-0", "seed-1", "soup"):
        adapter = tmp_path / "runs" / "quickstart-lora" / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
        save_file({"x": np.zeros(1, dtype=np.float32)}, adapter / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    return tmp_path


def run_dry(words: list[str]) -> str:
    """What `salsa run … --dry-run` prints."""
    out = io.StringIO()
    words = [word.replace("model.base=FOLDER", "model.base=HuggingFaceTB/SmolLM2-135M-Instruct") for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = salsa([*words, "--dry-run", *([] if "--output-dir" in words else ["--output-dir", "runs/planned"])])
    assert code == 0, out.getvalue()
    return out.getvalue()


def parse_only(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Parse the command line of a command and stop there."""
    if words[0] == "report":  # has no parser
        assert set(words[1:]) & {"--paper", "RUN"} or words[1].startswith("runs/")
        return
    real = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        raise ParsedError

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(ParsedError):
        salsa(words)


def try_salsa(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """`run` as a dry run, `init` and `docs` as they are, the other commands' command lines."""
    if words[0] == "run":
        run_dry(words[1:] and words)
    elif words[0] == "init":
        Path("my.yaml").unlink(missing_ok=True)
        assert salsa(words) == 0
    elif words[0] == "docs":
        assert salsa([word.replace("KEY", "ppo.kl_coef") for word in words]) == 0
    else:
        parse_only(words, patch)


def try_python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """`python -m salsa_peft.…` as the command that it is; of pytest and scripts, whether the files exist."""
    if words[1] == "-m" and words[2].startswith("salsa_peft"):
        command = next(name for name, module in COMMANDS.items() if words[2] in (module, module.rpartition(".")[0]))
        return try_salsa([command, *words[3:]], patch)
    for word in words[1:]:
        assert "/" not in word or word.startswith(("runs/", "-")) or (ROOT / word).exists(), word
    return None


TRY: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "salsa": lambda words, patch: try_salsa(words[1:], patch),
    "python": try_python,
    "pytest": try_python,
}


@pytest.mark.parametrize("command", docs_pages.commands(), ids=lambda command: command.place)
@pytest.mark.usefixtures("folder")
def test_commands(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a bash block is tried, or NOT_RUN says why not."""
    line = shlex.join(command.words)
    if any(line.startswith(start) for start in NOT_RUN):
        return
    TRY[command.words[0]](command.words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands and options of `salsa …` in running text exist."""
    for words in docs_pages.inline_commands(page):
        if words[1].isupper() or words[1].startswith("--"):
            continue
        with contextlib.suppress(SystemExit):
            assert salsa([words[1], "--help"]) == 0
        known = capsys.readouterr().out
        assert [word for word in words[2:] if word.startswith("--") and word not in known] == [], words


@pytest.mark.parametrize("block", docs_pages.blocks("text"), ids=lambda block: block.place)
@pytest.mark.usefixtures("folder")
def test_what_a_plan_prints(block: Block) -> None:
    """A block that begins with `$ salsa run … --dry-run` has what the command prints."""
    command, _, printed = block.text.partition("\n")
    if command.startswith("$ salsa run "):
        words = shlex.split(command)[2:]
        found = {" ".join(line.split()) for line in run_dry([*words[:1], *words[1:]]).splitlines()}
        assert [line for line in printed.splitlines() if " ".join(line.split()) not in found] == []


@pytest.mark.usefixtures("folder")
def test_readmes_table_of_memory_is_the_plans() -> None:
    """The largest stage of each recipe in each mode."""
    rows = re.findall(r"^\| .*\(`(\w+)`\) \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 3
    for name, cells in rows:
        for mode, cell in zip(([], ["--lora"], ["--lora", "qlora"]), cells.split(" | "), strict=True):
            plan = run_dry(["run", name, *mode, "--gpu", "80"])
            totals = [float(total) for total in re.findall(r"([\d.]+) GiB\s+fits", plan)]
            assert cell == f"{max(totals)} GiB", (name, mode)


@pytest.mark.parametrize("block", docs_pages.blocks("yaml"), ids=lambda block: block.place)
def test_recipe_fragments(block: Block, folder: Path) -> None:
    """Each is a part of a recipe: with the rest of smollm2's, it passes the parser."""
    recipe: dict[str, Any] = yaml.safe_load((folder / "my.yaml").read_text())
    for key, value in yaml.safe_load(block.text).items():
        merge = isinstance(value, dict) and isinstance(recipe.get(key), dict)
        recipe[key] = recipe[key] | value if merge else value
    if "synthetic" in recipe:
        recipe["data"] = {"prompts": recipe["data"]["prompts"]}
    (folder / "fragment.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    load_recipe("fragment.yaml", lora="lora", overrides=[])

"""The scripts in examples/: short, listed in their README, and (slow) printing what their docstrings say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "python examples/" in path.read_text(encoding="utf-8"))
FIVE = {"dpo_soup_reference.py", "own_data_recipe.py", "own_judge.py", "ppo_own_reward.py", "soup_of_two.py"}
MOST_LINES = 40
NUMBER = re.compile(r"(?<![\w+−-])[+−-]?\d+(?:\.\d+)?")
"""A number, but not the 0 of seed-0."""


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))) or ""


def printed(name: str) -> list[str]:
    """The lines that a docstring shows as printed: indented, after the word Prints."""
    return [line.strip() for line in docstring(name).partition("Prints")[2].splitlines() if line.startswith("    ")]


def test_each_is_short_and_listed() -> None:
    assert set(SCRIPTS) >= FIVE
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.py)\)", readme)) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    for name in FIVE | {"moving_reference.py"}:
        assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES, name
        assert f"python examples/{name}" in docstring(name) and printed(name), name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the scripts share one embedded world."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(FIVE | {"moving_reference.py"}))
def test_it_prints_what_it_says(name: str, workplace: Path) -> None:
    """The lines of its docstring are among the last that it prints; the numbers differ between machines a little."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "hf"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name)], cwd=workplace, capture_output=True, text=True,
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    shown = ended.stdout + ended.stderr
    lines = [line.strip() for line in shown.splitlines()]
    for line in printed(name):
        alike = [other for other in lines if shape(other) == shape(line)]
        assert alike, f"{name} printed no line like {line!r}:\n{shown[-3000:]}"
        numbers = [[float(found.replace("−", "-")) for found in NUMBER.findall(text)] for text in (line, alike[-1])]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.15, rel=0.5), (line, alike[-1])


def shape(line: str) -> str:
    """A line with its numbers replaced."""
    return re.sub(r"\s+", " ", NUMBER.sub("0", line))

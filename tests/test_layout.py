"""README's tree against the disk, imports against its floors, the wheel against the repository, every recipe against the parser."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from salsa_peft.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "salsa_peft"


def floors() -> dict[str, int]:
    """Module → floor, as README's tree says."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("\nsalsa_peft/\n")[1].split("```")[0]
    found, floor = {}, -1
    for line in tree.splitlines():
        row = re.match(r"  (\d| ) (\w+)\.py\s+\S", line)
        assert row, f"a row of README's tree that says nothing: {line!r}"
        floor = int(row[1]) if row[1].strip() else floor
        found[row[2]] = floor
    return found


def imports(module: str) -> set[str]:
    """Modules of ours that a module imports, also inside functions; not for types alone."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(child) for node in checking for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "") if node.level else (node.module or "").removeprefix("salsa_peft").lstrip(".")
            if node.level or (node.module or "").split(".")[0] == "salsa_peft":
                found |= {path.split(".")[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("salsa_peft.")}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def test_readmes_tree_is_what_is_on_disk() -> None:
    """No file without a row, no row without a file."""
    assert set(floors()) == {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    top = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and path.name not in ("runs", "dist", "build")
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if tracked:
        top = {name.split("/")[0] for name in tracked} - {".gitignore", ".pre-commit-config.yaml", ".ci"}
    assert top == {
        "salsa_peft",
        "adapters",
        "recipes",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CONTRIBUTING.md",
    }


def test_imports_point_down_and_not_in_circles() -> None:
    """To the same floor or below."""
    level = floors()
    wanted = {module: imports(module) for module in level}
    upward = [f"{module} ({level[module]}) imports {other} ({level[other]})" for module in wanted for other in wanted[module]
              if level[other] > level[module]]  # fmt: skip
    assert not upward
    order: list[str] = []
    while len(order) < len(wanted):
        ready = [module for module in wanted if module not in order and wanted[module] <= set(order)]
        assert ready, f"imports in a circle among {sorted(set(wanted) - set(order))}"
        order += ready


def test_readmes_commands_are_what_ci_runs() -> None:
    """One installs and runs the quickstart, one installs and passes the tests."""
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install . && .venv/bin/salsa run quickstart --lora" in readme
    assert "pip install -e '.[test]' && .venv/bin/python -m pytest" in readme
    assert "pip install -q -e '.[test]'" in ci
    assert "python -m pytest" in ci


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_lora_changes_and_is_found_by_name(path: Path) -> None:
    """In every mode it parses: test_recipes.py."""
    loaded = load_recipe(str(path), lora="lora", overrides=[])
    assert loaded.recipe.adapter is not None
    assert {change[0] for change in loaded.changes} >= {"adapter.r", "sft.learning_rate", "ppo.learning_rate"}
    assert load_recipe(path.stem, lora="lora", overrides=[]).recipe == loaded.recipe


def test_the_wheel_carries_recipes_adapters_and_templates(tmp_path: Path) -> None:
    """Everything that a run from an installed wheel reads, and nothing of the tests."""
    pytest.importorskip("hatchling", reason="the build backend, which pip fetches for a build of its own")
    script = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = set(zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).namelist())
    data = {
        f"salsa_peft/_recipes/{path.relative_to(ROOT / 'recipes')}"
        for path in (ROOT / "recipes").rglob("*")
        if path.is_file()
    }
    data |= {f"salsa_peft/_adapters/{path.name}" for path in (ROOT / "adapters").iterdir()}
    data |= {f"salsa_peft/templates/{path.name}" for path in (PACKAGE / "templates").iterdir()}
    code = {f"salsa_peft/{path.name}" for path in PACKAGE.glob("*.py")} | {
        "salsa_peft/py.typed",
        "salsa_peft/paper_tables.json",
    }
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == data | code
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "salsa = salsa_peft.cli:main" in zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).read(entry).decode()

"""The order of the packages against the imports, the wheel against the repository, every recipe against the parser."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bundled_recipes import RECIPES
from paths import ROOT

from salsa_peft.config.load import load_recipe

PACKAGE = ROOT / "salsa_peft"
ORDER = ("utils", "config", "data", "models", "soup", "training", "evaluation", "report", "recipe", "cli")
"""Each package imports those before it, and itself."""
MOST_FILES = 12


def module_name(path: Path, package: Path) -> str:
    """models/base.py is models.base, models/__init__.py is models; the top __init__.py is the empty text."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module → modules of ours that it imports, also inside functions and for types alone."""
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        here = (module if path.name == "__init__.py" else module.rpartition(".")[0]).split(".")
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                up = ["salsa_peft", *filter(None, here)]
                above = ".".join(up[: len(up) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, (above, node.module)))
                named = [f"{source}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in named:
                if name.split(".")[0] == "salsa_peft":
                    inner = name.removeprefix("salsa_peft").lstrip(".")
                    graph[module].add(inner if inner in files else inner.rpartition(".")[0])
    return graph


def faults(package: Path) -> list[str]:
    """What is against the order: a full folder, a stray module, an arrow upwards, a circle."""
    found = [f"{path.name} stands beside __init__.py" for path in package.glob("*.py") if path.name != "__init__.py"]
    folders = {path.parent for path in package.rglob("*.py")}
    for folder in sorted(folders):
        count = len(list(folder.glob("*.py")))
        if count > MOST_FILES:
            found.append(f"{folder.name} holds {count} files, at most {MOST_FILES} are allowed")
    graph = import_graph(package)
    levels = {module: ORDER.index(module.split(".")[0]) for module in graph if module.split(".")[0] in ORDER}
    for module, wanted in graph.items():
        found += [f"{module} imports {other}, which is above it" for other in sorted(wanted) if module in levels and other in levels and levels[other] > levels[module]]  # fmt: skip
    try:
        graphlib.TopologicalSorter({module: wanted - {module} for module, wanted in graph.items()}).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports in a circle: {' → '.join(error.args[1])}")
    return found


def test_imports_point_down_and_not_in_circles() -> None:
    """Nothing stands at the top, no folder is full, no package imports one above it."""
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"utils/a.py": "from salsa_peft.config import b", "config/b.py": ""}, "utils.a imports config.b, which is above it"),
        ({"utils/a.py": "def f():\n    from ..config.b import x", "config/b.py": ""}, "utils.a imports config.b, which is above it"),
        ({"utils/a.py": "if TYPE_CHECKING:\n    import salsa_peft.cli.b", "cli/b.py": ""}, "utils.a imports cli.b, which is above it"),
        ({"soup/a.py": "from .b import x", "soup/b.py": "from salsa_peft.soup import a"}, "imports in a circle: soup.a → soup.b → soup.a"),
        ({"__main__.py": "", "utils/a.py": ""}, "__main__.py stands beside __init__.py"),
        ({f"data/m{n}.py": "" for n in range(12)}, "data holds 13 files, at most 12 are allowed"),
    ],
)  # fmt: skip
def test_a_fault_is_found(files: dict[str, str], fault: str, tmp_path: Path) -> None:
    """In a package of a few lines."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        (path.parent / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    (found,) = faults(tmp_path)
    circle = "imports in a circle: "
    assert set(found.removeprefix(circle).split(" → ")) == set(fault.removeprefix(circle).split(" → "))


def test_quantisation_is_spelt_in_one_way() -> None:
    """As in most of the texts. Names that users or other libraries type stay: model.quantization, quantized_base."""
    american = re.compile(r"(?<![\w.=-])(?:un|de|re)?quantiz[a-z]*(?![\w(=:-])", re.IGNORECASE)
    files = [
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").rglob("*.yaml"),
    ]
    assert [(path.name, word) for path in files for word in american.findall(path.read_text(encoding="utf-8"))] == []
    assert american.findall(
        "a quantized base, model.quantization, `quantized_base`, quantize_4bit, --quantized-base"
    ) == ["quantized"]


def test_the_top_of_the_repository() -> None:
    """No stray folder or file, and docs/architecture.md names every package."""
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in ("runs", "dist", "build")}  # fmt: skip
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if tracked:
        top = {name.split("/")[0] for name in tracked} - {".gitignore", ".pre-commit-config.yaml", ".ci", ".github"}
    assert top == {"salsa_peft", "adapters", "recipes", "examples", "tests", "docs", "mkdocs.yml", "pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "CONTRIBUTING.md"}  # fmt: skip
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in ORDER if f"`{name}/`" not in page] == []


def test_readmes_commands_are_what_ci_runs() -> None:
    """One installs and runs the quickstart, one installs and passes the tests."""
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install . && .venv/bin/salsa run quickstart --lora" in readme
    assert "pip install -e '.[test]' && .venv/bin/python -m pytest" in readme
    assert "pip install -q -e '.[test]'" in ci
    assert "python -m pytest" in ci


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_lora_changes_and_is_found_by_name(name: str) -> None:
    """In every mode it parses: test_recipes.py."""
    loaded = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"), lora="lora", overrides=[])
    assert loaded.recipe.adapter is not None
    assert {change[0] for change in loaded.changes} >= {"adapter.r", "sft.learning_rate", "ppo.learning_rate"}
    assert load_recipe(name, lora="lora", overrides=[]).recipe == loaded.recipe


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
    data |= {f"salsa_peft/examples/{path.name}" for path in (ROOT / "examples").glob("*.*")}  # ../examples of a recipe
    data |= {f"salsa_peft/report/templates/{path.name}" for path in (PACKAGE / "report" / "templates").iterdir()}
    code = {f"salsa_peft/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")} | {
        "salsa_peft/py.typed",
        "salsa_peft/report/paper_tables.json",
    }
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == data | code
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert (
        "salsa = salsa_peft.cli.main:main" in zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).read(entry).decode()
    )

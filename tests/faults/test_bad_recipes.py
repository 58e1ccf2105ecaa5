"""Bad recipes, 2,000 by `main` and 50 by the command: code 2 and a line for each mistake, at once, nothing written, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_recipes
import pytest
from paths import ROOT, SUPPORT

from salsa_peft.recipe.__main__ import main as salsa_run

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)])}
SOME, COUNT, COMMANDS = 400, 2000, 50
SAMPLE = [bad for bad in bad_recipes.draw(4 * len(bad_recipes.ALL)) if len(bad.content) < 200_000]
SAMPLE = [SAMPLE[(number * 37) % len(SAMPLE)] for number in range(len(SAMPLE))]  # over all kinds, also its first ones
CHOSEN = list({bad.kind: bad for bad in SAMPLE}.values())
CHOSEN = [*CHOSEN, *[bad for bad in SAMPLE if bad not in CHOSEN]][:COMMANDS]
FEW = ("alias_bomb", "tag", "overrides", "presets", "too_many", "bad_path", "binary", "batches")
"""Of which the default run has one each."""


@pytest.mark.parametrize("name", list(bad_recipes.good()))
def test_what_the_bad_ones_are_made_from_is_good(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is planned, with adapters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(bad_recipes.good()[name])
    assert salsa_run(["good.yaml", "--lora", "--dry-run"]) == 0
    assert capsys.readouterr().err == "" and [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


@pytest.mark.parametrize("count", [SOME, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_thousands_of_bad_recipes(tmp_path: Path, tally: Callable[..., None], count: int) -> None:
    """In one process: code 2, lines of at most 1,000 characters, below 2 s of CPU each, nothing opened for writing anywhere."""
    environment = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(HERE / "bad_recipes.py"), str(tmp_path), str(count)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    failed = [one for one in found["results"] if one["why"] is not None]
    tally(
        tries=count,
        survived=count - len(failed),
        kinds_of_bad_recipes=len(bad_recipes.ALL),
        slowest_refusal=f"{max(one['seconds'] for one in found['results']):.2f} s",
    )
    shown = "\n".join(
        f"{tmp_path}/failed-{one['number']}.yaml {one['kind']} {one['words']}: {one['why']}" for one in failed[:10]
    )
    assert not failed, f"{len(failed)} of {count}\n{shown}"
    kinds = Counter(one["kind"] for one in found["results"])
    assert len(kinds) == len(bad_recipes.ALL) >= 40 and min(kinds.values()) >= count // len(kinds) - 1
    assert found["torch"] is False


def test_the_watch_sees_what_a_recipe_may_not_do(tmp_path: Path) -> None:
    """A good recipe by the same judge: it is told what began, a file that was written, a trace."""
    made = "import sys, pathlib\nsys.path.insert(0, {here!r})\nimport bad_recipes\nfrom unittest import mock\nfrom salsa_peft.recipe import __main__ as command\nfrom salsa_peft.utils.errors import SalsaError\n{more}"
    more = """
folder = pathlib.Path(sys.argv[1]); import os; os.chdir(folder); sys.addaudithook(bad_recipes.watch)
good = bad_recipes.good()["tiny"].encode()
for effect in (lambda *_, **__: sys.stdout.write("x"), lambda *_, **__: open("x", "w"), lambda *_, **__: os.system("true"), lambda *_, **__: 1 / 0):
    with mock.patch.object(command, "load_recipe", side_effect=effect), mock.patch.object(command, "run_folder", side_effect=SalsaError("no")):
        print(bad_recipes.wrong(bad_recipes.Bad("x", good), folder, [])[0].split("\\n")[0])
"""
    argv = [sys.executable, "-c", made.format(here=str(HERE), more=more), str(tmp_path)]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == 4, done.stderr
    assert said[0].startswith("it said something on standard output")
    assert said[1].startswith("it changed something: open 'x'") and said[2].startswith(
        "it changed something: os.system"
    )
    assert said[3].startswith("its code was ZeroDivisionError")


def marked(bad: bad_recipes.Bad, number: int) -> Any:
    """A case of the default run, or a slow one."""
    marks = [] if bad.kind in FEW and bad == next(one for one in CHOSEN if one.kind == bad.kind) else [pytest.mark.slow]
    return pytest.param(bad, marks=marks, id=f"{number}-{bad.kind}")


@pytest.mark.parametrize("bad", [marked(bad, number) for number, bad in enumerate(CHOSEN)])
def test_a_bad_recipe_by_the_command(bad: bad_recipes.Bad, tmp_path: Path, tally: Callable[..., None]) -> None:
    """Its own process: code 2, a line for each mistake on standard error, none on standard output, below 2 s of CPU, nothing left; where torch would be
    imported stands a file that ends the process."""
    work, home, temporary, path = (tmp_path / name for name in ("work", "home", "temporary", "path"))
    for folder in (work, home, temporary, path):
        folder.mkdir()
    for name, content in bad_recipes.FILES.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(content)
    (work / "bad.yaml").write_bytes(bad.content)
    (path / "torch.py").write_text("import os\nos.write(1, b'torch was imported')\nos._exit(99)\n")
    before = [bad_recipes.listing(folder) for folder in (work, home, temporary)]
    environment = {
        **os.environ, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(path), str(HERE.parents[1])]),
    }  # fmt: skip
    words = [word.encode("utf-8", "surrogateescape").replace(b"\0", b"") for word in bad.words]
    argv = [sys.executable, "-m", "salsa_peft.recipe", "bad.yaml", *words]
    start = time.perf_counter()
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(argv, cwd=work, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
    wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (tmp_path / "err").read_text()
    assert process.returncode == 2 and (tmp_path / "out").read_bytes() == b"", said
    lines = said.removesuffix("\n").split("\n")
    assert said.endswith("\n") and "Traceback" not in said and len(lines) <= bad_recipes.MOST + 1
    assert all(line.isprintable() and 10 < len(line) < bad_recipes.LONGEST for line in lines)
    assert cpu < bad_recipes.SECONDS, f"{cpu:.1f} s of CPU"
    assert [bad_recipes.listing(folder) for folder in (work, home, temporary)] == before
    tally(command=f"{wall:.1f} s, {cpu:.1f} s of CPU")


def test_an_output_folder_whose_name_no_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, as for any other."""
    monkeypatch.chdir(tmp_path)
    assert salsa_run(["quickstart", "--lora", "--dry-run", "--output-dir", "x" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1

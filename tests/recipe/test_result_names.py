"""A run's results under names that stay: links, copies where links cannot be made, kills, foreign folders, the last lines."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stages import FAKE, TINY
from paths import ROOT, SUPPORT

from salsa_peft.config.job import OWN_FILES
from salsa_peft.config.load import load_recipe
from salsa_peft.evaluation.judges.stage import CACHE
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.commits import COMMITS
from salsa_peft.recipe.results import files, names
from salsa_peft.report.publish.hub import PENDING, PUSHED
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.manifests import MANIFEST, named_results, read_manifest

RUN = Path("runs/tiny-lora")
LINKED = {
    "toy": "toy", "seed-0": "sft/seed-0", "seed-1": "sft/seed-1", "reward": "reward", "soup": "soup", "ppo": "ppo/ppo", "salsa": "ppo/salsa", "answers": "evaluate",
}  # fmt: skip
"""Name → unit."""
OTHER = ("--set", "policies.salsa.kl_coef=0.02")
Go = Callable[..., tuple[int, str]]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inline: None) -> Go:
    """go("--set", …) → (code, standard error); runs the tiny recipe with fake stages in tmp_path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)

    def run(*words: str, **actions: str) -> tuple[int, str]:
        said = json.dumps(json.dumps({name.replace("__", "/"): action for name, action in actions.items()}))
        code = salsa_run(["tiny.yaml", "--lora", "--set", f"description={said}", *words], stages=FAKE)
        return code, capsys.readouterr().err

    return run


def targets(run: Path = RUN) -> dict[str, str]:
    """Name → where its link leads to, of all links."""
    return {path.name: os.readlink(path) for path in run.iterdir() if path.is_symlink()}


def check(run: Path = RUN, wanted: dict[str, str] = LINKED) -> None:
    """Every name leads to a finished result of its unit, results.json says the same, and nothing temporary is left."""
    assert targets(run).keys() == wanted.keys()
    for name, unit in wanted.items():
        manifest = read_manifest(run / name)
        assert manifest is not None and manifest["unit"] == unit and targets(run)[name].startswith(f"stages/{unit}/")
    listed = {name: row["folder"] for name, row in json.loads((run / "results.json").read_text()).items()}
    assert {**targets(run), "report": listed["report"]} == listed and (run / listed["report"] / MANIFEST).is_file()
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


class TestLinks:
    def test_a_changed_key_changes_the_names_that_depend_on_it_and_back(self, go: Go) -> None:
        """Relative links, so that the folder may be moved; a result found cached is current again."""
        assert go()[0] == 0
        check()
        first = targets()
        assert go(*OTHER)[0] == 0
        check()
        assert {name for name in first if first[name] != targets()[name]} == {"salsa", "answers"}
        assert go()[0] == 0
        assert targets() == first
        check()
        RUN.rename("elsewhere")
        check(Path("elsewhere"))

    def test_a_name_never_leads_to_an_unfinished_result(self, go: Go) -> None:
        """Made again in its folder: the name is away meanwhile. Of another key: the old result stays until the new one is there."""
        go()
        first = targets()
        assert go("--force", "ppo/salsa", ppo__salsa="refuse")[0] == 2
        assert not os.path.lexists(RUN / "salsa") and "salsa" not in named_results(RUN)
        assert targets() == {name: target for name, target in first.items() if name != "salsa"}
        assert go()[0] == 0 and targets() == first
        assert go(*OTHER, ppo__salsa="refuse")[0] == 2
        assert targets() == first
        check()

    def test_the_folder_of_a_removed_result_is_begun_again(self, go: Go) -> None:
        """The name of what a user deleted does not come to life with an unfinished folder."""
        go()
        shutil.rmtree(RUN / targets()["soup"])
        assert go(soup="refuse")[0] == 2 and not os.path.lexists(RUN / "soup")
        assert go()[0] == 0
        check()

    def test_one_stage(self, go: Go) -> None:
        """Names of what there is; results found cached are current, also those of stages that are not asked for."""
        assert go("--stages", "toy,data,sft")[0] == 0
        assert targets().keys() == {"toy", "seed-0", "seed-1"} == named_results(RUN).keys()
        go()
        first = targets()
        go(*OTHER)
        assert go("--stages", "sft")[0] == 0 and targets() == first

    def test_a_policy_that_the_recipe_no_longer_has_keeps_its_name_until_prune(self, go: Go) -> None:
        """Two recipes in one folder do not take away each other's names."""
        go()
        third = ("--set", "policies.salsa=null", "--set", "policies.third={reference: seed-1}")
        assert go(*third)[0] == 0
        assert targets().keys() == {*LINKED, "third"} and "salsa" in named_results(RUN)
        assert go(*third, "--prune")[0] == 0
        check(wanted={**{name: LINKED[name] for name in LINKED if name != "salsa"}, "third": "ppo/third"})

    def test_a_dry_run_writes_nothing(self, go: Go) -> None:
        go()
        (RUN / "salsa").unlink()
        assert go("--dry-run")[0] == 0 and not os.path.lexists(RUN / "salsa")

    def test_each_replicate_has_its_own(self, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("salsa_peft.recipe.replicates.join", lambda folder: None)
        code, err = go("--replicates", "2")
        assert code == 0
        for number in (0, 1):
            check(RUN / f"replicate-{number}")
        assert targets() == {}
        assert f"\nresults in {RUN}/replicate-0; of the other replicates in replicate-1 …\n" in err
        assert f'("{RUN}/replicate-0/salsa")' in err


KILL = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import fake_stages
from inline_stages import inline_stages
from salsa_peft.recipe.__main__ import main
from salsa_peft.recipe.results import names

def killing(holder, name, when):
    function = getattr(holder, name)
    def call(*args):
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    setattr(holder, name, call)

folder, moment = sys.argv[3:5]
if moment == "before the link":
    killing(names, "_place", lambda run, name, target: name == "salsa" and target != os.readlink(run / name))
if moment == "before the link is in place":
    killing(os, "replace", lambda new, path: path.name == "salsa")
if moment == "before results.json":
    killing(names, "_write", lambda rows, run: rows["salsa"]["folder"] != os.environ["OLD"])
if moment == "after the link was withdrawn":
    killing(names, "_write", lambda rows, run: "salsa" not in rows)
if moment == "in the middle of a copy":
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")
    os.symlink = refuse
    killing(names.shutil, "copytree", lambda source, new: new.name == ".salsa.tmp" and bool(new.mkdir() or True))
if moment == "between two renames of a copy":
    killing(os, "replace", lambda new, path: path.name == "salsa" and names.COPIED in os.listdir(new))
    os.symlink = lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted"))
with inline_stages():
    main(["tiny.yaml", "--lora", *sys.argv[5:]], stages=fake_stages.FAKE)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "before the link",
        "before the link is in place",
        "before results.json",
        "after the link was withdrawn",
        "in the middle of a copy",
        "between two renames of a copy",
    ],
)
def test_a_run_killed_while_a_name_is_renewed_goes_on_rightly(go: Go, tmp_path: Path, moment: str) -> None:
    """kill -9 at this point: no name leads to an unfinished result, and the same command ends as without a kill."""
    go()
    old = targets()["salsa"]
    words = OTHER if moment != "after the link was withdrawn" else ("--force", "ppo/salsa")
    argv = [sys.executable, "-c", KILL, str(SUPPORT), str(ROOT), str(tmp_path), moment, *words]
    environment = {**os.environ, "OLD": old}
    killed = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for name in LINKED:
        place = RUN / name
        assert not place.exists() or read_manifest(place) is not None
    assert all(read_manifest(folder) is not None for _, folder in named_results(RUN).values())
    assert go(*OTHER)[0] == 0
    check()
    assert targets()["salsa"] != old


class TestWithoutLinks:
    @pytest.fixture
    def no_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on exFAT."""

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "symlink", refuse)

    def same(self, name: str) -> bool:
        """Whether a copy has the files of the result that results.json names, and no others but the mark of a copy."""
        source, copy = named_results(RUN)[name][1], RUN / name
        found = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        assert found.pop(Path(names.COPIED)).decode() == source.relative_to(RUN).as_posix()
        return found == {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}

    def test_copies_are_renewed_as_links_are(self, go: Go, no_links: None) -> None:
        """Said with the reason; only what changed is copied again; a result made again has no copy meanwhile."""
        code, err = go()
        assert code == 0 and targets() == {} and all(map(self.same, LINKED))
        assert err.count("because no links can be made") == len(LINKED)
        assert "salsa: copied from stages/ppo/salsa/" in err and "(Operation not permitted)" in err
        before = named_results(RUN)["salsa"]
        code, err = go(*OTHER)
        assert code == 0 and err.count("because no links") == 2 and all(map(self.same, LINKED))
        assert named_results(RUN)["salsa"] != before
        assert go(*OTHER)[1].count("because no links") == 0
        assert go(*OTHER, "--force", "ppo/salsa", ppo__salsa="refuse")[0] == 2 and not (RUN / "salsa").exists()
        assert go()[0] == 0 and all(map(self.same, LINKED))

    def test_links_replace_copies_once_they_can_be_made(self, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
            go()
        assert go(*OTHER)[0] == 0 and set(targets()) == {"salsa", "answers"}, "what is current stays as it is"

    def test_another_error_is_not_taken_for_it(self, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        code, err = go()
        assert code == 1 and "the disk is full" in err


class TestForeignFolders:
    @pytest.mark.parametrize("made", ["folder", "file", "link", "dangling link"])
    def test_what_a_user_put_there_is_refused_and_stays(self, go: Go, made: str) -> None:
        """Before anything is trained."""
        go()
        place = RUN / "salsa"
        place.unlink()
        if made == "folder":
            place.mkdir()
            (place / "mine.txt").write_text("mine")
        elif made == "file":
            place.write_text("mine")
        else:
            place.symlink_to("/nowhere" if made == "dangling link" else Path.cwd())
        before = sorted(str(path) for path in RUN.rglob("*"))
        for words in ((), ("--dry-run",)):
            code, err = go(*OTHER, *words)
            assert (
                code == 2 and f"{place.absolute()}: the run's result of this name goes here, but `salsa run` did" in err
            )
            assert sorted(str(path) for path in RUN.rglob("*")) == before

    def test_a_run_that_was_copied_with_its_links_followed_goes_on(self, go: Go) -> None:
        """As scp -r does: its names are full folders, which become links."""
        go()
        shutil.copytree(RUN, "copied")
        assert targets(Path("copied")) == {}
        code, err = go("--output-dir", "copied")
        assert code == 0 and err.count("cached") == 13
        check(Path("copied"))

    def test_a_soup_is_not_written_over_a_result(self, go: Go, capsys: pytest.CaptureFixture[str]) -> None:
        """`salsa soup runs/NAME/soup …` would write through the link into a finished result."""
        from salsa_peft.soup.checkpoints.write import check_free

        go()
        with pytest.raises(SalsaError, match="soup"):
            check_free(RUN / "soup", [], adapter=True)

    @pytest.mark.parametrize(
        "name",
        ["stages", "logs", "figures", "Figures", "report", "answers", "toy", "report.html", "results.json", "recipe.yaml", "replicate-3", "Soup", "seed-7", "judge_cache.sqlite"],
    )  # fmt: skip
    def test_names_of_the_run_itself_are_no_policies(self, go: Go, name: str) -> None:
        code, err = go("--set", f"policies={{{name}: {{reference: seed-0}}}}")
        assert code == 2 and f"policies.{name}: is the name of " in err and "; rename the policy" in err
        assert not RUN.exists()

    def test_names_of_stages_are(self, go: Go) -> None:
        """Stages have a folder of their own."""
        assert (
            go("--set", "policies={data: {reference: seed-0}, sft: {reference: soup}, evaluate: {reference: base}}")[0]
            == 0
        )
        own = {name: unit for name, unit in LINKED.items() if not unit.startswith("ppo/")}
        check(wanted=own | {name: f"ppo/{name}" for name in ("data", "sft", "evaluate")})

    def test_all_files_of_a_runs_folder_are_known(self, go: Go) -> None:
        """Another one would need a place in OWN_FILES."""
        go()
        assert {path.name for path in RUN.iterdir()} <= {*OWN_FILES, *LINKED, ".lock"}
        assert {COMMITS, PENDING, PUSHED, f"{PUSHED}.old", CACHE, "figures"} <= {*OWN_FILES}


def test_the_results_of_an_earlier_version_are_moved(go: Go) -> None:
    """It had the stages beside the report. Nothing is made again, also after a kill in the middle of the move."""
    go()
    expected = targets()
    for interrupted in (False, True):
        for path in (*map(RUN.joinpath, LINKED), RUN / "results.json"):
            path.unlink()
        for stage in (RUN / "stages").iterdir():
            stage.rename(RUN / stage.name)
        (RUN / "stages").rmdir()
        if interrupted:
            (RUN / names.MOVING).mkdir()
            (RUN / "sft").rename(RUN / names.MOVING / "sft")
        else:
            code, _ = go("--dry-run")
            assert code == 0 and (RUN / "soup").is_dir() and not (RUN / "stages").exists()
        code, err = go()
        assert code == 0 and err.count("cached") == 13 and "were moved to" in err
        assert targets() == expected
        check()


@pytest.mark.parametrize("name", ["salsa", "seed-0", "stages"])
def test_a_users_file_is_refused_before_the_results_of_an_earlier_version_are_moved(go: Go, name: str) -> None:
    """Also by the dry run; afterwards the folder is as it was."""
    go()
    for path in (*map(RUN.joinpath, LINKED), RUN / "results.json"):
        path.unlink()
    for stage in (RUN / "stages").iterdir():
        stage.rename(RUN / stage.name)
    (RUN / "stages").rmdir()
    (RUN / name).write_text("notes")
    before = sorted(str(path) for path in RUN.rglob("*"))
    for words in (("--dry-run",), ()):
        code, err = go(*words)
        assert code == 2 and f"{RUN.absolute() / name}: the run's result" in err, err
        assert sorted(str(path) for path in RUN.rglob("*")) == before
    (RUN / name).unlink()
    assert go()[0] == 0
    check()


def test_a_users_file_called_stages(go: Go) -> None:
    """In a folder without results."""
    RUN.mkdir(parents=True)
    (RUN / "stages").write_text("notes")
    for words in (("--dry-run",), ()):
        code, err = go(*words)
        assert code == 2 and f"{RUN.absolute() / 'stages'}: the run's results go into a folder of this name" in err, err
    assert (RUN / "stages").read_text() == "notes"


def test_a_move_that_was_killed_before_its_last_step_is_ended(tmp_path: Path) -> None:
    """All stages are in the temporary folder already."""
    manifest = tmp_path / names.MOVING / "sft" / "seed-0" / ("0" * 12) / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    names.move_old_stages(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stages"] and list(tmp_path.rglob(MANIFEST))


class TestSearch:
    def test_a_searched_policy_s_name_leads_to_the_candidate_that_was_picked(self, tmp_path: Path) -> None:
        """Candidates have names of their own; without a report nothing is picked."""
        text = TINY + "search: {kl_coef: [0.1, 0.4], by: reward, methods: [salsa]}\n"
        (tmp_path / "s.yaml").write_text(text)
        recipe, run = load_recipe(str(tmp_path / "s.yaml"), lora="lora", overrides=[]).recipe, tmp_path / "run"
        finished = {}
        for unit in ("ppo/salsa-kl-0.1", "ppo/salsa-kl-0.4", "report"):
            finished[unit] = run / "stages" / unit / ("0" * 12)
            finished[unit].mkdir(parents=True)
        summary = finished["report"] / "summary.json"
        policies = {name: finished[name] for name in finished if name != "report"}
        names.update_names(run, recipe, policies)
        assert targets(run).keys() == {"salsa-kl-0.1", "salsa-kl-0.4"}
        for best in ("salsa-kl-0.4", "salsa-kl-0.1"):
            summary.write_text(json.dumps({"search": {"methods": {"salsa": {"best": best}}}}))
            names.update_names(run, recipe, finished)
            assert targets(run)["salsa"] == targets(run)[best]
            assert named_results(run)["salsa"] == (f"ppo/{best}", run / targets(run)[best])

    @pytest.mark.parametrize("name", ["soup", "report"])
    def test_a_searched_policy_cannot_have_the_name_of_another_result(self, go: Go, name: str) -> None:
        """Its candidates have other names than it has."""
        sets = (
            f"policies={{{name}: {{reference: soup}}}}",
            f"search={{kl_coef: [0.1, 0.4], by: reward, methods: [{name}]}}",
        )
        code, err = go("--set", sets[0], "--set", sets[1])
        assert code == 2 and f"{name}: is the name of " in err


class TestReportFiles:
    def report(self, folder: Path, figures: dict[str, bytes]) -> Path:
        (folder / "figures").mkdir(parents=True)
        for name in files.COPIES:
            (folder / name).write_text(f"{folder.name} {name}")
        for name, content in figures.items():
            (folder / "figures" / name).write_bytes(content)
        return folder

    def test_they_lie_beside_one_another(self, tmp_path: Path) -> None:
        """A figure of an earlier report goes; a file that is no figure of ours stays."""
        run = tmp_path / "run"
        files.copy_report(self.report(tmp_path / "a", {"old.png": b"1", "both.png": b"2"}), run)
        (run / "figures" / "mine.txt").write_text("mine")
        files.copy_report(self.report(tmp_path / "b", {"new.png": b"3", "both.png": b"4"}), run)
        assert {name: (run / name).read_text() for name in files.COPIES} == {name: f"b {name}" for name in files.COPIES}
        found = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
        assert found == {"new.png": b"3", "both.png": b"4", "mine.txt": b"mine"}

    def test_damaged_copies_are_made_again(self, go: Go) -> None:
        go()
        (RUN / "summary.json").write_text("damaged")
        assert go()[0] == 0 and (RUN / "summary.json").read_text() == "{}"


class TestLastLines:
    def test_they_say_where_each_result_is_and_what_comes_next(self, go: Go) -> None:
        """Paths as they can be pasted; the model is the policy whose reference is the soup. No line above 80 columns."""
        _, err = go()
        last = err[err.index("\nresults in ") :].splitlines()[1:]
        assert last == [
            "results in runs/tiny-lora",
            "  toy                     the embedded world: base and data",
            "  seed-0, seed-1          SFT seeds",
            "  reward                  reward model",
            "  soup                    soup of the seeds",
            "  ppo, salsa              policies",
            "  answers                 answers of all models, and their scores",
            "  report.html, report.md  the report",
            "  summary.json, figures   its numbers and figures",
            "next",
            "  # open the report",
            f"  {'open' if sys.platform == 'darwin' else 'xdg-open'} runs/tiny-lora/report.html",
            "  # load salsa in Python (from transformers import AutoModelForCausalLM)",
            '  AutoModelForCausalLM.from_pretrained("runs/tiny-lora/salsa")',
            "  # push it to the Hub",
            "  salsa hub push runs/tiny-lora/salsa --to YOU/salsa --base-model YOU/BASE",
        ]
        assert max(map(len, last)) <= 80
        assert go()[1].splitlines()[-len(last) :] == last, "of a run whose units are all cached too"
        assert "results in" not in go("--dry-run")[1]

    def test_of_some_stages_and_of_adapters(self, go: Go) -> None:
        """Only what there is; a folder with an adapter is opened by PEFT."""
        _, err = go("--stages", "toy,data,sft")
        assert 'AutoModelForCausalLM.from_pretrained("runs/tiny-lora/seed-0")' in err and "open the report" not in err
        (RUN / "seed-0" / "adapter_config.json").write_text("{}")
        recipe = load_recipe("tiny.yaml", lora="lora", overrides=[]).recipe
        lines = files.next_commands(RUN, recipe, RUN, ["seed-0"])
        assert 'AutoPeftModelForCausalLM.from_pretrained("runs/tiny-lora/seed-0")' in lines

    def test_many_policies_take_one_line(self, go: Go) -> None:
        _, err = go("--set", "sweep={kl_coef: {values: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}}")
        assert "  ppo, salsa, kl-0, kl-0.1, kl-0.2 and 4 more  policies\n" in err

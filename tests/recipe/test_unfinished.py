"""What an unfinished run goes on with: checkpoints, the seconds so far, the Hub's commits; and stages that are missing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stages import FAKE, TINY
from quick_server import quick_server  # noqa: F401

from salsa_peft.cli import report
from salsa_peft.recipe import cache, commits, small_stages
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.report import gather
from salsa_peft.utils import manifests
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.messages import difference

RUN = Path("runs/tiny-lora")
Go = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Go:
    """go(words) → code, units made, standard error, of the tiny recipe with fake stages; reported: of `salsa report words`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(report, "run_recipe", partial(salsa_run, stages=FAKE))

    def run(*words: str, reported: bool = False) -> tuple[int, list[str], str]:
        code = report.main(words) if reported else salsa_run(["tiny.yaml", "--lora", *words], stages=FAKE)
        err = capsys.readouterr().err
        return code, [line.split(" … ")[0] for line in err.splitlines() if " … done" in line], err

    return run


def unit(name: str) -> Path:
    """The newest finished folder of a unit."""
    return next(cache.finished(RUN / "stages" / name))[0]


def manifest(name: str) -> dict[str, Any]:
    return next(cache.finished(RUN / "stages" / name))[1]


class TestMissingStages:
    def test_all_are_named_at_once_in_order(self, go: Go) -> None:
        """Also those that the missing ones need; none that is there."""
        for asked in ("sft", "sft/seed-1"):
            code, made, err = go("--stages", asked)
            unit = "sft/seed-0" if asked == "sft" else asked
            assert (code, made) == (2, [])
            assert err == (
                f"--stages: {unit} needs results that are not finished: toy (new), data/demonstrations (new); add toy,data\n"
            )
        assert go("--stages", "evaluate")[2].endswith("; add toy,data,sft,reward,reward_quality,soup,ppo\n")
        assert go("--stages", "toy,data,sft,soup")[0] == 0
        assert go("--stages", "evaluate")[2] == (
            "--stages: evaluate needs results that are not finished: reward (new), reward_quality (new), ppo/ppo (new); add"
            " reward,reward_quality,ppo\n"
        )


class TestResuming:
    def interrupt(self, name: str, *, seconds: float, begun: float = 0.0) -> Path:
        """Make a finished unit unfinished: begun `seconds` before now by a process that went on after `begun` seconds."""
        place = unit(name)
        content = {part: manifest(name)[part] for part in ("key", "inputs")}
        (place / "manifest.json").unlink()
        (place / "begun.json").write_text(json.dumps({**content, "seconds": begun}))
        now = (place / "begun.json").stat().st_mtime
        os.utime(place / "begun.json", (now - seconds, now - seconds))
        (place / "left.txt").write_text("of the process before")
        return place

    @pytest.mark.parametrize(
        ("name", "file"),
        [("ppo/salsa", "checkpoint-3/a"), ("reward", "seed-1/checkpoint-3/a"), ("reward", "seed-0/metrics.json"),
         ("landscape", "partial/points.jsonl"), ("evaluate", "partial/in/0.jsonl")],
    )  # fmt: skip
    def test_seconds_add_up(self, go: Go, name: str, file: str) -> None:
        """Those up to the newest checkpoint, and those of the processes before that; not what was lost after it."""
        go()
        place = self.interrupt(name, seconds=70, begun=1000)
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text("")
        saved = (place / "begun.json").stat().st_mtime + 50
        os.utime(place / file, (saved, saved))
        code, made, err = go()
        assert code == 0 and made[0] == name and f"{name} … unfinished: resuming\n" in err
        assert (place / "left.txt").exists()
        assert 1050 <= manifest(name)["seconds"] < 1060, "20 s were lost"

    def test_seconds_of_a_process_that_saved_nothing_do_not_count(self, go: Go) -> None:
        """The checkpoint is older than the process that was killed."""
        go()
        place = self.interrupt("ppo/salsa", seconds=70, begun=1000)
        (place / "checkpoint-3").mkdir()
        (place / "checkpoint-3" / "a").write_text("")
        os.utime(place / "checkpoint-3" / "a", (1e9, 1e9))
        go()
        assert 1000 <= manifest("ppo/salsa")["seconds"] < 1010

    @pytest.mark.parametrize("file", ["log.jsonl", ".partial/checkpoint-3/a", "seed-0/adapter_model.safetensors"])
    def test_without_a_checkpoint_it_starts_again(self, go: Go, file: str) -> None:
        """And says so; of the process before nothing is left."""
        go()
        place = self.interrupt("ppo/salsa", seconds=70)
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("")
        _, made, err = go()
        assert made[0] == "ppo/salsa" and "ppo/salsa … unfinished: starting again\n" in err
        assert not (place / "left.txt").exists() and manifest("ppo/salsa")["seconds"] < 10

    def test_a_begun_file_of_an_earlier_version(self, go: Go) -> None:
        """Without seconds: those before are not known."""
        go()
        place = self.interrupt("ppo/salsa", seconds=0)
        begun = json.loads((place / "begun.json").read_text())
        del begun["seconds"]
        (place / "begun.json").write_text(json.dumps(begun))
        (place / "checkpoint-3").mkdir()
        (place / "checkpoint-3" / "a").write_text("")
        assert "ppo/salsa … unfinished: resuming" in go()[2]


class TestReportOfAnOutdatedRun:
    @pytest.fixture
    def upgraded(self, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
        """A finished run, and another torch since."""
        go()
        real = manifests.versions
        monkeypatch.setattr(cache, "versions", lambda *given: {**real(*given), "torch": "99"})

    def test_it_shows_what_is_there_and_says_so(self, go: Go, upgraded: None) -> None:
        """In one line, with what has changed; `salsa run` makes everything again, and its report is of the new results."""
        before = (RUN / "report.html").stat().st_mtime_ns
        code, made, err = go(str(RUN), reported=True)
        assert (code, made) == (0, ["report"])
        (line,) = [line for line in err.splitlines() if "outdated" in line]
        assert (
            line.startswith("toy and 11 more units are outdated (torch ") and " → 99); the report shows these" in line
        )
        assert (RUN / "report.html").stat().st_mtime_ns > before
        assert manifest("report")["inputs"].keys() >= {"toy", "sft/seed-0", "evaluate"}
        made = go()[1]
        assert made[0] == "toy" and made[-1] == "report" and len(made) == 13
        assert "outdated" not in go(str(RUN), reported=True)[2]

    def test_a_new_option_is_part_of_an_upgrade(self, go: Go, upgraded: None) -> None:
        """It has its default in the saved recipe's results; it is named."""
        file = unit("sft/seed-0") / "manifest.json"
        content = json.loads(file.read_text())
        del content["key_parts"]["slice"]["sft"]["weight_decay"]
        file.write_text(json.dumps(content))
        code, _, err = go(str(RUN), reported=True)
        assert code == 0 and "sft.weight_decay none → " in err

    def test_of_several_results_those_of_the_recipes_settings_are_shown(self, go: Go, upgraded: None) -> None:
        """Though others are newer."""
        first = unit("sft/seed-0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "versions", manifests.versions)
            go("--set", "sft.learning_rate=0.5")
            assert unit("sft/seed-0") != first
        assert go("tiny.yaml", "--lora", reported=True)[:2] == (0, ["report"])
        digest = manifests.content_digest(manifests.read_manifest(first) or {})
        assert manifest("report")["inputs"]["sft/seed-0"] == digest

    def test_results_of_an_earlier_version_that_lack_something(self, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line and not a KeyError."""

        def lacks(*_: Any) -> None:
            raise KeyError("accuracy")

        monkeypatch.setattr(gather, "gather", lacks)
        job = SimpleNamespace(recipe=None, inputs={}, recipe_yaml="")
        with pytest.raises(
            SalsaError, match="its inputs have no 'accuracy', since an earlier version of salsa_peft made"
        ):
            small_stages.report(job)  # type: ignore[arg-type]

    def test_results_of_other_settings_are_not_shown(self, go: Go, upgraded: None) -> None:
        """Nor what is missing; the message says what to run, and nothing of --stages."""
        code, made, err = go("tiny.yaml", "--lora", "--set", "sft.learning_rate=0.5", reported=True)
        assert (code, made) == (2, []) and "sft/seed-0 (outdated: sft.learning_rate " in err
        assert err.endswith("; run the recipe first: salsa run tiny.yaml --lora --set sft.learning_rate=0.5\n")
        (unit("evaluate") / "manifest.json").unlink()
        code, made, err = go(str(RUN), reported=True)
        assert (code, made) == (2, []) and "--stages" not in err
        last = err.splitlines()[-1]
        assert last == (
            f"report needs results that are not finished: evaluate (new); run the recipe first: salsa run {RUN}/recipe.yaml"
            f" --output-dir {RUN}"
        )


class TestDifference:
    def test_long_values_are_shown_where_they_differ(self) -> None:
        """At any place; short ones whole."""
        assert difference("0.1", "0.2") == "0.1 → 0.2"
        start, end = "a" * 100, "z" * 100
        one, other = difference(f"{start}1{end}", f"{start}2{end}").split(" → ")
        assert one == f"…{'a' * 20}1{'z' * 39}…" and other == f"…{'a' * 20}2{'z' * 39}…"
        assert difference(start, start + "b") == f"…{'a' * 20} → …{'a' * 20}b"
        assert difference("b" + end, "c" + end) == f"b{'z' * 59}… → c{'z' * 59}…"

    def test_in_the_plan(self, go: Go) -> None:
        """The last of twenty modules."""
        modules = [f"layers.{number}.q_proj" for number in range(20)]
        go("--set", f"adapter.target_modules={json.dumps(modules)}")
        err = go("--set", f"adapter.target_modules={json.dumps([*modules[:-1], 'layers.19.v_proj'])}")[2]
        assert "adapter.target_modules …q_proj', 'layers.19.q_proj'] → …q_proj', 'layers.19.v_proj']" in err


class TestCommits:
    OLD, NEW = "a" * 40, "b" * 40
    JUDGE = ("--set", "evaluate.judge={kind: local, model: me/judge}")

    @pytest.fixture
    def publish(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """publish(commit): main of me/judge is at this commit, in the Hub's cache."""
        from huggingface_hub import constants

        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(constants, name, str(tmp_path / "hub"))

        def put(commit: str) -> None:
            folder = tmp_path / "hub" / "models--me--judge"
            (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(commit)

        return put

    def revision(self) -> str:
        """The judge's revision in the run's recipe."""
        (commit,) = re.findall(r"me/judge: '?([0-9a-f]{40})", (RUN / "recipe.yaml").read_text())
        return str(commit)

    def test_an_unfinished_run_keeps_them_and_a_finished_one_asks_again(self, go: Go, publish: Any) -> None:
        """In one line, also for the plan; the next run after the last unit reads the Hub's new commit."""
        publish(self.OLD)
        assert go(*self.JUDGE, "--stages", "toy,data,sft")[0] == 0
        publish(self.NEW)
        line = "commits: tiny-lora is not finished, so it keeps those that it found on the Hub when it began (me/judge aaaaaaa)"
        assert go(*self.JUDGE, "--dry-run")[2].count(line) == 1
        code, made, err = go(*self.JUDGE)
        assert code == 0 and "judge" in made and err.count(line) == 1 and self.revision() == self.OLD
        code, made, err = go(*self.JUDGE)
        assert line not in err and self.revision() == self.NEW
        assert made == ["judge", "report"] and "judge.model me/judge@a" in err

    def test_another_revision_is_another_repository(self, go: Go, publish: Any, tmp_path: Path) -> None:
        """Which the run has not found before."""
        publish(self.OLD)
        go(*self.JUDGE, "--stages", "toy")
        (tmp_path / "hub" / "models--me--judge" / "refs" / "v2").write_text(self.NEW)
        (tmp_path / "hub" / "models--me--judge" / "snapshots" / self.NEW).mkdir()
        err = go(*self.JUDGE, "--set", "revisions={me/judge: v2}", "--stages", "toy")[2]
        assert "it keeps" not in err and self.revision() == self.NEW

    def test_a_report_keeps_those_of_the_finished_run(self, go: Go, publish: Any) -> None:
        """By the recipe too, whose run would read the new commit."""
        publish(self.OLD)
        go(*self.JUDGE)
        publish(self.NEW)
        code, made, err = go("tiny.yaml", "--lora", *self.JUDGE, reported=True)
        assert (code, made) == (0, ["report"]) and "it keeps" not in err and self.revision() == self.OLD

    @pytest.mark.parametrize("damage", ["[]", "3", '{"finished": true}', '{"finished": false, "commits": [["model"]]}'])
    def test_a_damaged_file_is_refused(self, go: Go, publish: Any, damage: str) -> None:
        publish(self.OLD)
        go(*self.JUDGE, "--stages", "toy")
        (RUN / commits.COMMITS).write_text(damage)
        code, _, err = go(*self.JUDGE)
        assert code == 2 and "commits.json: is damaged; remove it, and the commits are read from the Hub again\n" in err


class TestRevisions:
    def test_an_id_that_nothing_names_is_refused(self, go: Go) -> None:
        """With the nearest name, or all; a dataset's revision has another place; null removes an entry."""
        judge = ("--set", "evaluate.judge={kind: local, model: me/judge}", "--stages", "toy")
        code, made, err = go(*judge, "--set", "revisions={me/jugde: v1}")
        assert (code, made) == (2, []) and not RUN.exists()
        assert (
            "revisions: no part of the recipe names a model 'me/jugde'; remove the entry or correct the name; did you mean me/judge?\n"
            in err
        )
        assert "; the models: none\n" in go("--set", "revisions={me/jugde: v1}")[2]
        words = ("--set", "evaluate.prompts={in: me/questions}", "--set", "revisions={me/questions: v1}")
        assert "'me/questions'; it is a dataset, whose key `revision` stands beside its `path`\n" in go(*words)[2]
        Path("tiny.yaml").write_text(TINY + "revisions: {me/gone: v1}\n")
        assert go("--stages", "toy")[0] == 2
        assert go("--stages", "toy", "--set", "revisions.me/gone=null")[0] == 0

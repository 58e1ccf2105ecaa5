"""Results of a run by their names that stay, and soups that no run made, on their way to a loopback Hub."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from finished_run import BASE_ID, CANARY, command, files, make_run, publish_base
from hub_server import Hub, hub

from salsa_peft.cli.hub import main
from salsa_peft.cli.landscape import main as landscape
from salsa_peft.report.publish.items import Results, find_item
from salsa_peft.soup.__main__ import main as salsa_soup
from salsa_peft.utils.manifests import RESULTS, named_results

SOUP_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "fingerprint.json", "soup.json", "tokenizer.json",
              "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run of adapters, beside its base."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, tokenizer, functools.partial(tiny.make_base, tokenizer), tiny.make_adapter)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/mine, relative to the current folder: a copy of it with its links."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    return Path("run").rename("runs/mine")


@pytest.fixture
def server() -> Iterator[Hub]:
    """One that knows the canary."""
    with hub(CANARY) as there:
        yield there


def card(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `salsa hub push … --dry-run` prints."""
    assert main(["push", *words, "--to", "a/b", "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


class TestNames:
    def test_a_result_by_its_path_is_the_result_by_its_name(self, run: Path, capsys: Any) -> None:
        """RUN/salsa is RUN salsa; several of one run too."""
        assert card(capsys, "runs/mine/salsa") == card(capsys, "runs/mine", "salsa")
        assert card(capsys, "runs/mine/soup/", "runs/mine/seed-0") == card(capsys, "runs/mine", "soup", "seed-0")

    def test_a_copy_is_as_good_as_a_link(self, run: Path, capsys: Any) -> None:
        """As where no links can be made."""
        expected = card(capsys, "runs/mine/salsa")
        (target,) = [os.readlink(run / "salsa")]
        (run / "salsa").unlink()
        shutil.copytree(run / target, run / "salsa")
        assert card(capsys, "runs/mine/salsa") == expected

    def test_what_is_there_is_pushed_also_when_the_run_has_gone_on_since_its_report(
        self, run: Path, capsys: Any
    ) -> None:
        """A new soup has none of the report's numbers, and the recipe that made it; the others have theirs."""
        assert "## Evaluation" in card(capsys, "runs/mine/soup")
        rows = json.loads((run / RESULTS).read_text())
        old = run / rows["soup"]["folder"]
        new = old.with_name("f" * 12)
        shutil.copytree(old, new)
        manifest = json.loads((new / "manifest.json").read_text())
        (new / "metrics.txt").write_text("another")
        manifest["files"]["metrics.txt"] = {
            "size": 7,
            "sha256": "ae448ac86c4e8e4dec645729708ef41873ae79c6dff84eff73360989487f08e5",
        }
        (new / "manifest.json").write_text(json.dumps(manifest))
        rows["soup"]["folder"] = new.relative_to(run).as_posix()
        (run / RESULTS).write_text(json.dumps(rows))
        (run / "recipe.yaml").write_text(
            (run / "recipe.yaml").read_text().replace("description: ", "description: later ")
        )
        shown = card(capsys, "runs/mine/soup")
        assert "## Evaluation" not in shown and "description: later " in shown
        shown = card(capsys, "runs/mine/salsa")
        assert "## Evaluation" in shown and "description: later " not in shown
        assert find_item(Results.of_run(run), "soup", None).folder == new

    def test_an_older_report_is_current_again_when_the_names_say_so(self, run: Path) -> None:
        """Two recipes in one folder: the run that was last is found all cached, and its report is not the newest file."""
        report = named_results(run)["report"][1]
        shutil.copytree(report, report.with_name("f" * 12))
        os.utime(report.with_name("f" * 12) / "manifest.json", (2e9, 2e9))
        assert Results.of_run(run).folders["report"] == report

    def test_a_run_of_an_earlier_version(self, run: Path, capsys: Any) -> None:
        """Its stages lie beside the report, and it has no names."""
        expected = card(capsys, "runs/mine", "soup", "salsa", "reward")
        for path in [path for path in run.iterdir() if path.is_symlink()]:
            path.unlink()
        (run / RESULTS).unlink()
        for stage in (run / "stages").iterdir():
            stage.rename(run / stage.name)
        (run / "stages").rmdir()
        assert card(capsys, "runs/mine", "soup", "salsa", "reward") == expected
        next(run.glob("report/*/manifest.json")).unlink()
        assert "## Evaluation" not in card(capsys, "runs/mine", "soup")

    @pytest.mark.parametrize("name", ["answers", "toy", "report"])
    def test_results_that_are_no_models_are_refused(self, run: Path, capsys: Any, name: str) -> None:
        """By name and by path."""
        for words in (["runs/mine", name], [f"runs/mine/{name}"]):
            assert main(["push", *words, "--to", "a/b"]) == 2
            said = capsys.readouterr().err
            assert "this recipe has no result" in said or "not a run's folder" in said

    def test_damaged_results_json_is_named(self, run: Path, capsys: Any) -> None:
        for text in ("{", "[]", '{"soup": {"unit": "soup"}}', '{"soup": 3}'):
            (run / RESULTS).write_text(text)
            assert main(["push", "runs/mine", "soup", "--to", "a/b"]) == 2
            said = capsys.readouterr().err
            assert "results.json" in said and said.count("\n") == 1 and "again" in said, said


class TestSoups:
    @pytest.fixture
    def soup(self, run: Path) -> Path:
        """`salsa soup mix runs/mine/seed-0 runs/mine/seed-1`."""
        assert salsa_soup(["mix", "runs/mine/seed-0", "runs/mine/seed-1", "--weights", "0.25", "0.75"]) == 0
        return Path("mix")

    def test_names_are_members_and_no_output(self, soup: Path, run: Path, capsys: Any) -> None:
        """Members are called by stage and seed; the files of a run's result are not overwritten."""
        assert [one["name"] for one in json.loads((soup / "soup.json").read_text())["members"]] == [
            "sft/seed-0",
            "sft/seed-1",
        ]
        before = {path: path.read_bytes() for path in (run / "soup").iterdir()}
        members = ["runs/mine/seed-0", "runs/mine/seed-1"]
        assert salsa_soup(["runs/mine/soup", *members]) == 2
        assert "runs/mine/soup: this folder is a result of a run" in capsys.readouterr().err
        assert landscape(["runs/mine/soup", *members, "--measure", "sft_loss", "--data", "chats.jsonl"]) == 2
        assert "runs/mine/soup: this folder is a result of a run" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in (run / "soup").iterdir()} == before

    def test_a_soup_is_pushed_with_a_card(self, server: Hub, soup: Path, tmp_path: Path) -> None:
        """One private commit of its own files; lineage, members with their hashes, and code to load it; no path of this machine."""
        publish_base(server, tmp_path / "run")
        words = ("push", str(tmp_path / "mix"), "--to", "tester/mix", "--base-model", BASE_ID)
        done = command(server, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{server.url}/tester/mix"
        given = files(server, "tester/mix")
        assert set(given) == SOUP_FILES and server.repos["tester/mix"].private
        assert not any(str(tmp_path).encode() in content for content in given.values())
        assert json.loads(given["adapter_config.json"])["base_model_name_or_path"] == BASE_ID
        assert given["adapter_model.safetensors"] == (soup / "adapter_model.safetensors").read_bytes()
        front, body = given["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
        data = yaml.safe_load(front)
        assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (BASE_ID, "adapter", "peft")
        assert (
            data["license"] == "llama2"
            and {"model-soup", "lora"} <= set(data["tags"])
            and "rlhf" not in data["tags"]
            and "model-index" not in data
        )
        for line in (
            "A model soup: the weight average of 2 LoRA adapters.",
            'AutoPeftModelForCausalLM.from_pretrained("tester/mix")',
            'use_reference(trainer, "tester/mix")',
            "| soup | linear: 0.25·sft/seed-0, 0.75·sft/seed-1 |",
            "| sft/seed-0 | 0.25 | runs/mine/seed-0 | adapter\\_model.safetensors ",
        ):
            assert line in body, line
        assert "## Recipe" not in body and "## Evaluation" not in body
        assert sorted(path.name for path in soup.iterdir()) == sorted(SOUP_FILES - {"README.md"})

    def test_a_failed_push_is_one_line(self, server: Hub, soup: Path, tmp_path: Path) -> None:
        """The Hub's refusal is code 1; nothing is written beside the soup."""
        done = command(
            server, tmp_path / "home", "push", str(tmp_path / "mix"), "--to", "somebody/mix", "--base-model", BASE_ID
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "the Hub answers 403" in done.stderr and "run the same command again" in done.stderr
        assert not list(soup.glob("hub_*"))

    def test_the_base_is_the_one_that_the_adapters_name(self, soup: Path, capsys: Any) -> None:
        """A folder of this machine is no base for others."""
        assert main(["push", "mix", "--to", "a/b", "--dry-run"]) == 2
        assert (
            "base: base exists only on this machine; give the base's id on the Hub: --base-model"
            in capsys.readouterr().err
        )
        config = json.loads((soup / "adapter_config.json").read_text())
        (soup / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
        assert "base_model: org/base" in card(capsys, "mix")

    def test_soups_of_checkpoints(
        self, tmp_path: Path, tokenizer: Any, make_base: Any, make_adapter: Any, capsys: Any
    ) -> None:
        """A merge of its base's finetunes, in Transformers' format."""
        run = make_run(tmp_path, tokenizer, make_base, make_adapter, lora=False)
        out = str(tmp_path / "mix")
        assert salsa_soup([out, str(run / "seed-0"), str(run / "seed-1")]) == 0
        capsys.readouterr()
        assert main(["push", out, "--to", "a/b", "--dry-run"]) == 2
        assert "base: the soup's base exists only on this machine" in capsys.readouterr().err
        shown = card(capsys, out, "--base-model", "org/base")
        assert "the weight average of 2 checkpoints" in shown and "base_model_relation: merge" in shown
        assert 'AutoModelForCausalLM.from_pretrained("a/b")' in shown and "config.json" in shown

    def test_soups_merged_into_their_base(self, soup: Path, run: Path, capsys: Any) -> None:
        """The base that it was merged into; the members are adapters."""
        merged = ["merged", "runs/mine/seed-0", "runs/mine/seed-1", "--merge", "--base", "base"]
        assert salsa_soup(merged) == 0
        capsys.readouterr()
        shown = card(capsys, "merged", "--base-model", "org/base")
        assert "the weight average of 2 LoRA adapters" in shown and "A full checkpoint of [org/base]" in shown

    def test_damage_is_not_published(self, soup: Path, capsys: Any) -> None:
        weights = soup / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        assert main(["push", "mix", "--to", "a/b", "--base-model", "c/d", "--dry-run"]) == 2
        assert "adapter_model.safetensors" in capsys.readouterr().err
        weights.unlink()
        assert main(["push", "mix", "--to", "a/b", "--base-model", "c/d", "--dry-run"]) == 2
        assert "adapter_model.safetensors" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["mix"], "--to: is required with items; add --to namespace/name"),
            (["mix", "other", "--to", "a/b"], "other: a soup has no items; push one soup at a time"),
            (["base", "--to", "a/b"], "base: not a run's folder, since it has no recipe.yaml, nor one of a run's results, nor a soup"),
            (["runs/mine/nobody", "--to", "a/b"], "runs/mine/nobody: not a run's folder, since it has no recipe.yaml, nor"),
        ],
    )  # fmt: skip
    def test_bad_words(self, soup: Path, capsys: Any, words: list[str], message: str) -> None:
        assert main(["push", *words]) == 2
        assert message in capsys.readouterr().err

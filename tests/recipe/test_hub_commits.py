"""Repositories on the Hub without a commit in the recipe: they are read, and stand in the keys, at the commit that they have now."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Commit, Hub, Repo, hub
from paths import ROOT

from salsa_peft.config.load import load_recipe, saved_recipe
from salsa_peft.config.schema import Recipe, Source
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.data.files import at_commit, hub_repository, load_rows
from salsa_peft.recipe import cache, commits
from salsa_peft.recipe.run import STAGES
from salsa_peft.utils import hub as hub_utils
from salsa_peft.utils.hub import Repository, local_folder, pinned

OLD, NEW = "a" * 40, "b" * 40
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """cached("models", "me/base", OLD, {"config.json": "{}"}) puts a snapshot into a cache of the Hub; main is there then."""
    from huggingface_hub import constants

    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "hub"))

    def put(kind: str, name: str, commit: str, files: dict[str, str], ref: str = "main") -> Path:
        folder = tmp_path / "hub" / f"{kind}--{name.replace('/', '--')}"
        for path, text in files.items():
            (folder / "snapshots" / commit / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / commit / path).write_text(text)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        return folder / "snapshots" / commit

    return put


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """One with a repository in every place that may name one."""
    content = {
        "name": "theirs",
        "model": {"base": "me/base", "chat_template": "chatml"},
        "sft": {"from": ["me/seed", None]},
        "reward": [{"model": "me/classifier", "weight": 0.5}, "adapter"],
        "data": {"demonstrations": "me/chats", "preferences": "hf://datasets/me/pairs@v1/train.jsonl", "prompts": {"path": "hf://datasets/me/prompts", "revision": OLD}},
        "policies": {"p": {"reference": ["seed-0", "me/reference"]}},
        "evaluate": {"prompts": {"in": "me/questions"}, "models": ["me/other"], "judge": {"kind": "local", "model": "me/judge"}},
    }  # fmt: skip
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(str(tmp_path / "theirs.yaml"), lora="lora", overrides=[]).recipe


MODELS = ("me/base", "me/seed", "me/classifier", "me/reference", "me/other", "me/judge")
DATASETS = ("me/chats", "me/pairs", "me/prompts", "me/questions")


def fill(cached: Any, commit: str) -> None:
    for name in MODELS:
        cached("models", name, commit, {})
    for name in DATASETS:
        cached("datasets", name, commit, {}, ref="v1" if name == "me/pairs" else "main")


def keys(recipe: Recipe, run: Path) -> dict[str, str]:
    units = [unit for stage in STAGES.values() for unit in stage.units(recipe, stage.run)]
    return {name: planned.key for name, planned in cache.plan(units, run).items()}


class TestOffline:
    def test_every_repository_gets_the_caches_commit(self, recipe: Recipe, cached: Any, tmp_path: Path) -> None:
        """In the resolved recipe, which says the same when it is read again and changes no more."""
        fill(cached, NEW)
        found = commits.with_commits(recipe, record=True)
        assert commits.unknown_commits(found) == []
        assert found.model.revision == NEW
        assert found.revisions == dict.fromkeys(MODELS[1:], NEW) and found.model_revisions == dict.fromkeys(MODELS, NEW)
        assert found.data.demonstrations == Source(path="me/chats", revision=NEW)
        assert found.data.preferences == Source(path="hf://datasets/me/pairs/train.jsonl", revision=NEW)
        assert found.data.prompts == recipe.data.prompts, "a commit stays"
        assert found.evaluate.prompts["in"].revision == NEW
        (tmp_path / "saved.yaml").write_text(dump_yaml(found.as_data()))
        assert saved_recipe(tmp_path / "saved.yaml") == found
        fill(cached, OLD)
        assert commits.with_commits(found, record=True) == found

    @pytest.mark.parametrize(
        ("kind", "name", "first"),
        [("datasets", "me/chats", "data/demonstrations"), ("models", "me/seed", "sft/seed-0"), ("models", "me/reference", "ppo/p"),
         ("models", "me/judge", "judge"), ("models", "me/other", "evaluate"), ("datasets", "me/questions", "landscape"),
         ("datasets", "me/pairs", "data/preferences"), ("models", "me/base", "data/demonstrations")],
    )  # fmt: skip
    def test_another_commit_is_another_key(
        self, recipe: Recipe, cached: Any, tmp_path: Path, kind: str, name: str, first: str
    ) -> None:
        """Of the units that read the repository, and of no unit before them."""
        fill(cached, OLD)
        before = keys(commits.with_commits(recipe, record=True), tmp_path)
        cached(kind, name, NEW, {}, ref="v1" if name == "me/pairs" else "main")
        after = keys(commits.with_commits(recipe, record=True), tmp_path)
        assert next(unit for unit in before if before[unit] != after[unit]) == first

    def test_unknown_commits_are_said_once(self, recipe: Recipe, cached: Any, tmp_path: Path) -> None:
        """The keys have none then."""
        fill(cached, OLD)
        (tmp_path / "hub" / "models--me--seed" / "refs" / "main").unlink()
        (tmp_path / "hub" / "datasets--me--chats" / "refs" / "main").unlink()
        found = commits.with_commits(recipe, record=False)
        assert commits.unknown_commits(found) == [
            "the commit of me/seed, me/chats is unknown (not on the Hub and not in its local cache): a change there is not noticed"
        ]
        assert "me/seed" not in found.revisions and found.data.demonstrations == recipe.data.demonstrations
        assert found.model.revision == OLD

    def test_a_recipe_without_the_hub_asks_nobody(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(commits, "resolve_commits", None)
        local = load_recipe("quickstart", lora="lora", overrides=[]).recipe
        assert commits.with_commits(local, record=True) == local


class TestReading:
    def test_a_model_is_read_at_the_pinned_commit(self, cached: Any) -> None:
        """Not at main, and only within the context; a revision that is asked for goes first."""
        old = cached("models", "me/base", OLD, {"config.json": "{}"})
        new = cached("models", "me/base", NEW, {"config.json": "{}"})
        assert hub_utils.cached_folder("me/base") == local_folder("me/base") == new
        with pinned({"me/base": OLD}):
            assert hub_utils.cached_folder("me/base") == local_folder("me/base") == old
            assert local_folder("me/base", revision=NEW) == new
        assert local_folder("me/base") == new

    @pytest.mark.parametrize("path", ["hf://datasets/me/chats/rows.jsonl", "hf://datasets/me/chats@main/rows.jsonl"])
    def test_rows_are_read_at_the_commit(self, cached: Any, path: str) -> None:
        cached("datasets", "me/chats", OLD, {"rows.jsonl": json.dumps({**CHAT, "at": "old"}) + "\n"})
        cached("datasets", "me/chats", NEW, {"rows.jsonl": json.dumps({**CHAT, "at": "new"}) + "\n"})
        source = Source(path=path)
        assert [row["at"] for _, row in load_rows(source)] == ["new"]
        assert [row["at"] for _, row in load_rows(at_commit(source, OLD))] == ["old"]

    def test_which_repository_a_source_names(self, tmp_path: Path) -> None:
        for path, revision, expected in (
            ("me/chats", None, ("me/chats", None)),
            ("me/chats", "v1", ("me/chats", "v1")),
            ("hf://datasets/me/chats", None, ("me/chats", None)),
            ("hf://datasets/me/chats@refs/convert/parquet/default/train", "v2", ("me/chats", "refs/convert/parquet")),
        ):
            assert hub_repository(Source(path=path, revision=revision)) == Repository("dataset", *expected)
        assert hub_repository(Source(path=str(tmp_path / "rows.jsonl"))) is None


def ask(environment: dict[str, str], *, record: bool, timeout: float = 5.0) -> tuple[dict[str, str], float]:
    """resolve_commits of three models in a process of its own, and its seconds without the imports."""
    code = f"""
import json, sys, time
import huggingface_hub
from salsa_peft.utils import hub
hub.TIMEOUT = {timeout}
start = time.perf_counter()
found = hub.resolve_commits([hub.Repository("model", f"tester/{{n}}", None) for n in "abc"], record={record})
print(json.dumps([{{one.name: commit for one, commit in found.items()}}, time.perf_counter() - start]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found, seconds = json.loads(done.stdout)
    return found, seconds


class TestOnline:
    def publish(self, server: Hub, *names: str) -> dict[str, str]:
        for name in names:
            server.repos.setdefault(name, Repo()).commits.append(Commit(f"{len(server.repos):040x}", {}, "more"))
        return {name: server.repos[name].commits[-1].sha for name in names}

    def test_the_hubs_commit_goes_before_the_caches(self, tmp_path: Path) -> None:
        """A dry run leaves the cache's refs; a run notes them, and finds them without the Hub. What is missing is left out."""
        with hub("token") as server:
            known = self.publish(server, "tester/a", "tester/b")
            refs = tmp_path / "hub" / "models--tester--a" / "refs" / "main"
            refs.parent.mkdir(parents=True)
            refs.write_text(OLD)
            environment = server.environment(tmp_path)
            assert ask(environment, record=False)[0] == known
            assert refs.read_text() == OLD and not (tmp_path / "hub" / "models--tester--b").exists()
            assert ask(environment, record=True)[0] == known
            assert refs.read_text() == known["tester/a"]
        assert ask({**environment, "HF_HUB_OFFLINE": "1"}, record=True)[0] == known
        assert ask(environment, record=True, timeout=1.0)[0] == known, "the server is gone"

    def test_a_hub_that_does_not_answer_costs_one_timeout(self, tmp_path: Path) -> None:
        """Not one for each repository."""
        refs = tmp_path / "hub" / "models--tester--c" / "refs" / "main"
        refs.parent.mkdir(parents=True)
        refs.write_text(OLD)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            environment = Hub("token", f"http://127.0.0.1:{silent.getsockname()[1]}").environment(tmp_path)
            found, seconds = ask(environment, record=False, timeout=1.0)
        assert found == {"tester/c": OLD}
        assert 1 <= seconds < 2.9


def test_a_dry_run_is_quick_without_the_hub(recipe: Recipe, tmp_path: Path) -> None:
    """And says what it does not know."""
    environment = Hub("token", "http://127.0.0.1:9").environment(tmp_path)
    words = [sys.executable, "-m", "salsa_peft.recipe", str(tmp_path / "theirs.yaml"), "--lora", "--dry-run", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "\nthe commit of me/base, me/seed" in done.stdout
    assert time.perf_counter() - start < 10 and not (tmp_path / "run").exists()

"""Files that were damaged: each kind of file by each kind of damage. The bad one is named in a line and never used, what it broke is made
again with the same result, and the rest stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_stages import FAKE, TINY
from safetensors.numpy import save_file

from salsa_peft.config.job import Job
from salsa_peft.config.load import load_recipe
from salsa_peft.evaluation import evaluate
from salsa_peft.evaluation.judges.cache import Cache, Reply
from salsa_peft.recipe import cache as runs
from salsa_peft.recipe import processes
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training import checkpoints
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import append_checked_lines, write_atomic
from salsa_peft.utils.fingerprints import canonical_json, fingerprint
from salsa_peft.utils.manifests import MANIFEST, changed_file

RECIPE = TINY + "evaluate: {judge: reward}\n"
Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_dtype(path: Path) -> None:
    """A whole safetensors file of the same names, of half the precision; of any other file one byte less."""
    if path.suffix == ".safetensors":
        save_file({"weight": np.arange(64, dtype=np.float16)}, path)
    else:
        path.write_bytes(path.read_bytes()[:-1])


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


DAMAGES: dict[str, Damage] = {
    "cut": cut, "bit": flip, "missing": lambda path: path.unlink(), "empty": lambda path: path.write_bytes(b""), "folder": folder,
    "dtype": other_dtype, "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"), "nested": nested,
}  # fmt: skip

# a finished run

UNITS = [
    "toy",
    "data/demonstrations",
    "data/preferences",
    "sft/seed-0",
    "sft/seed-1",
    "reward",
    "reward_quality",
    "soup",
    "ppo/ppo",
    "ppo/salsa",
    "landscape",
    "evaluate",
    "judge",
    "report",
]
AFTER = {
    "toy": UNITS[1:], "data/demonstrations": UNITS[3:], "data/preferences": [*UNITS[5:7], *UNITS[8:]], "sft/seed-0": UNITS[5:], "reward": ["reward_quality", *UNITS[8:]],
    "reward_quality": [*UNITS[8:10], *UNITS[11:]], "soup": ["ppo/salsa", *UNITS[11:]], "ppo/salsa": UNITS[11:], "evaluate": UNITS[12:], "judge": ["report"], "report": [],
}  # fmt: skip
"""Unit → those that hang on it (landscape on the seeds and the reward alone)."""
BEFORE_LANDSCAPE = ("toy", "data/demonstrations", "data/preferences", "sft/seed-0", "reward")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "fingerprint.json")
KEPT = {
    "toy": ("base/model.safetensors", "base/config.json", "demonstrations.jsonl", "preferences.jsonl"),
    "data": ("rows/data-00000-of-00001.arrow", "rows/state.json"), "sft": ADAPTER, "reward": ADAPTER,
    "reward_quality": ("metrics.json", "samples.jsonl"), "soup": (*ADAPTER, "soup.json"), "ppo": (*ADAPTER, "metrics.jsonl"), "landscape": ("landscape.json",), "judge": ("judgments.jsonl", "verdicts.json"),
    "evaluate": ("answers.jsonl", "questions.jsonl", "evaluation.json"), "report": ("report.html", "summary.json", "recipe.yaml"),
}  # fmt: skip
"""Stage → files that it leaves."""


def make(job: Job, *_: Any, **__: Any) -> processes.Result:
    """A stage in this process: files of its stage's names, their content from its slice and from every file of its inputs."""
    digest = hashlib.sha256(canonical_json(job.unit.key_fields).encode() + job.unit.id.encode())
    for place in job.inputs.values():
        for file in sorted(path for path in place.rglob("*") if path.is_file() and path.name != MANIFEST):
            digest.update(file.read_bytes())
    for name in KEPT[job.unit.stage]:
        path = job.folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            numbers = np.frombuffer(digest.digest() * 8, dtype=np.uint8)
            save_file({"weight": numbers.astype(np.float32)[:64]}, path)
        else:
            write_atomic(path, f'{{"of": "{job.unit.id}", "is": "{digest.hexdigest()}"}}\n')
    return processes.Result(facts={}, seconds=0.0, peak_mb=1.0)


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """go(…) → (code, units made, units cached, standard error), in the test's folder."""
    monkeypatch.setattr(processes, "run_job", make)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)

    def run(*words: str) -> tuple[int, list[str], list[str], str]:
        code = salsa_run(["tiny.yaml", "--lora", *words], stages=FAKE)
        lines = capsys.readouterr().err.splitlines()
        said = [line.split(" … ") for line in lines]
        made = [words[0] for words in said if len(words) > 1 and words[1].startswith("done")]
        return code, made, [words[0] for words in said if words[1:] == ["cached"]], "\n".join(lines)

    return run


def contents(run: Path) -> dict[str, str]:
    """Every file of a run's results but the manifests, whose times differ."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in (MANIFEST, ".lock"))
    return {str(path.relative_to(run)): runs.sha256(path) for path in files}


RUN = Path("runs/tiny-lora")
FILES = [(unit, name) for unit in AFTER for name in KEPT[unit.split("/")[0]]]


@pytest.mark.parametrize(
    "damage",
    [name if name in ("cut", "bit", "folder") else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES],
)
def test_every_file_of_a_finished_run_by_every_damage(go: Any, damage: str, tally: Callable[..., None]) -> None:
    """It is named behind its unit, which is made again with all that hangs on it to the same bytes; all else is cached."""
    assert go()[:2] == (0, UNITS)
    expected = contents(RUN)
    for unit, name in FILES:
        [place] = [path.parent for path in (RUN / "stages").glob(f"{unit}/*/{MANIFEST}")]
        DAMAGES[damage](place / name)
        why = "missing" if damage in ("missing", "folder") else "changed"
        first = (
            name == KEPT[unit.split("/")[0]][0]
        )  # of each unit one by the whole command, the others alone: they are quick
        code, made, cached, err = go() if first else go("--stages", unit)
        after = [one for one in AFTER[unit] if one != "landscape" or unit in BEFORE_LANDSCAPE]
        assert (code, made) == (0, [unit, *after] if first else [unit]), (name, err)
        assert cached == ([one for one in UNITS if one not in made] if first else [])
        assert [line for line in err.splitlines() if name in line and " … " in line] == [
            f"{unit} … {why}: {name}: starting again"
        ]
        assert contents(RUN) == expected
    tally(tries=len(FILES), finished_unit_files=len(FILES), damages=len(DAMAGES))


MANIFESTS: dict[str, Any] = {
    "a list": [], "a number": 3, "no files": {}, "files a list": {"files": []}, "an entry a number": {"files": {"a": 3}}, "an entry empty": {"files": {"a": {}}},
    "an entry NaN": {"files": {"a": {"size": float("nan"), "sha256": "x"}}}, "inputs a number": {"files": {}, "inputs": 3}, "an entry more": {"files": {"a": {"size": 1, "sha256": "x", "y": 1}}},
}  # fmt: skip


@pytest.mark.parametrize(
    "damage", [*[name for name in DAMAGES if name not in ("folder", "longer", "bit", "dtype")], *MANIFESTS]
)
def test_a_manifest_that_is_none(go: Any, damage: str) -> None:
    """The unit counts as unfinished and is made again, to the same bytes; so nothing that hangs on it is."""
    go()
    expected = contents(RUN)
    [path] = (RUN / "stages").glob("soup/*/manifest.json")
    if damage in MANIFESTS:
        path.write_text(json.dumps(MANIFESTS[damage]))
    else:
        DAMAGES[damage](path)
    code, made, _, err = go()
    assert code == 0 and made == ["soup", *AFTER["soup"]]
    assert "soup … unfinished: starting again" in err and contents(RUN) == expected
    assert go()[1] == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda found: found.update(key="0" * 64), ""),
        (lambda found: found["files"]["soup.json"].update(size=1), "changed: soup.json"),
        (lambda found: found["files"]["soup.json"].update(sha256="0" * 64), "changed: soup.json"),
        (lambda found: found["files"].update(more={"size": 1, "sha256": "0" * 64}), "missing: more"),
        (lambda found: found["files"].update({"../../x": {"size": 1, "sha256": "0" * 64}}), "missing: ../../x"),
        (lambda found: found["inputs"].update({"sft/seed-0": "0" * 64}), ""),
        (lambda found: found.pop("inputs"), ""),
    ],
    ids=["key", "size", "hash", "a file more", "a file outside", "input", "no inputs"],
)
def test_a_manifest_that_was_edited(go: Any, edit: Callable[[Any], object], said: str) -> None:
    """What it says must be so."""
    go()
    expected = contents(RUN)
    [path] = (RUN / "stages").glob("soup/*/manifest.json")
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    code, made, _, err = go()
    assert code == 0 and made == ["soup", *AFTER["soup"]] and contents(RUN) == expected
    assert f"soup … {said}" in err or not said


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "folder"])
def test_the_runs_own_recipe_and_report(go: Any, damage: str) -> None:
    """Written anew whatever they were: both are copies."""
    go()
    expected = contents(RUN)
    for name in ("recipe.yaml", "report.html"):
        DAMAGES[damage](RUN / name)
    assert go()[:2] == (0, []) and contents(RUN) == expected


@pytest.mark.parametrize("name", ["recipe.yaml", "report.html", ".lock"])
def test_a_folder_in_a_files_place_is_named(go: Any, name: str) -> None:
    """One line, code 2, and what is there stays."""
    go()
    folder(RUN / name)
    code, made, _, err = go()
    assert (
        (code, made) == (2, [])
        and err.splitlines()[-1]
        == f"{(RUN / name).resolve()}: this is a folder, but a file with this name must be written; move or rename the folder"
    )
    (RUN / name).rmdir()
    assert go()[:2] == (0, [])


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "dtype"])
def test_what_an_unfinished_policy_was_begun_from(go: Any, damage: str) -> None:
    """begun.json that can't be read or says something else: nothing in its folder is gone on with."""
    go()
    [place] = [path.parent for path in (RUN / "stages").glob("ppo/salsa/*/manifest.json")]
    expected = contents(RUN)
    for damaged in (False, True):
        (place / "manifest.json").unlink()
        (place / "left.txt").write_text("of a run before")
        step = runs.plan(
            [
                unit
                for stage in FAKE.values()
                for unit in stage.units(load_recipe("tiny.yaml", lora="lora", overrides=[]).recipe, stage.run)
            ],
            RUN.resolve(),
        )
        runs.write_begun(step["ppo/salsa"], step)
        (place / "checkpoint-1").mkdir(exist_ok=True)
        (place / "checkpoint-1" / "weights").write_text("")
        if damaged:
            DAMAGES[damage](place / "begun.json")
        _, made, _, err = go()
        assert made[0] == "ppo/salsa" and ("unfinished: starting again" if damaged else "unfinished: resuming") in err
        assert (place / "left.txt").exists() is not damaged
        if damage != "longer" or not damaged:
            (place / "left.txt").unlink(missing_ok=True)
    assert contents(RUN) == expected


# a base of one's own, and caches


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder of two shards."""
    place = tmp_path / "base"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}')
    for number in (1, 2):
        save_file({f"t{number}": np.arange(64, dtype=np.float32)}, place / f"model-{number}.safetensors")
    index = {"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "folder", "longer", "nested"])
@pytest.mark.parametrize("name", ["model-2.safetensors", "model.safetensors.index.json"])
def test_a_base_that_is_not_whole_is_named_before_anything_runs(base: Path, name: str, damage: str) -> None:
    """Also a shard whose end is cut off, which the first 64 KiB of its tensors would not show."""
    before = fingerprint(base)
    if name.endswith("index.json") and damage == "missing":
        DAMAGES[damage](base / name)
        assert fingerprint(base) != before  # the index is part of what the base is
        return
    if name.endswith("index.json") and damage == "folder":
        DAMAGES[damage](base / name)
        assert fingerprint(base) != before
        return
    DAMAGES[damage](base / name)
    with pytest.raises(SalsaError) as caught:
        fingerprint(base)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_of_another_dtype(base: Path) -> None:
    """Is another base; one whose header alone says so is damaged."""
    before, shard = fingerprint(base), base / "model-1.safetensors"
    raw = shard.read_bytes()
    save_file({"t1": np.arange(64, dtype=np.float16)}, shard)
    assert fingerprint(base) != before
    shard.write_bytes(raw.replace(b"F32", b"F16"))
    with pytest.raises(SalsaError, match=r"model-1.safetensors: damaged: the byte range of t1 does not fit its dtype"):
        fingerprint(base)


def test_a_base_in_a_recipe_is_refused_in_one_line(base: Path, go: Any) -> None:
    """By the command, before a run folder is there."""
    cut(base / "model-1.safetensors")
    code, made, _, err = go("--set", f"model.base={base}")
    assert (
        (code, made) == (2, [])
        and err.count("\n") == 0
        and "model-1.safetensors: truncated or damaged: " in err
        and not Path("runs").exists()
    )


@pytest.mark.parametrize("damage", ["cut", "missing", "folder", "nested", "garbage"])
def test_a_judges_cache(tmp_path: Path, damage: str) -> None:
    """Refused by name; one that is gone is begun anew."""
    path = tmp_path / "judge_cache.sqlite"
    cache = Cache(path)
    cache.put({f"{number}": Reply("a" * 3000, "stop", 1, 1) for number in range(40)})
    cache.file.close()
    if damage == "garbage":
        raw = bytearray(path.read_bytes())
        for page in range(4096, len(raw), 4096):
            raw[page : page + 64] = b"\xff" * 64
        path.write_bytes(raw)
    else:
        DAMAGES[damage](path)
    if damage == "missing":
        assert Cache(path).get("1") is None
        return
    with pytest.raises(SalsaError) as caught:
        all(Cache(path).get(f"{number}") for number in range(40))
    assert "judge_cache.sqlite': cannot use this file as the judge's cache" in str(caught.value) and "\n" not in str(
        caught.value
    )
    path.rmdir() if damage == "folder" else path.unlink()
    assert Cache(path).put({"1": Reply("b", "stop", 1, 1)})["1"].text == "b"
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(
    "line", ["null", "3", "[]", '"a"', "{}", '{"index": 1}', '{"index": 0, "tu', "[" * 100_000, "\0" * 50]
)
def test_answers_on_the_way(tmp_path: Path, line: str) -> None:
    """A line that is no answer is left out, and asked again."""
    rows = [{"index": number, "turn": 1, "response": "r"} for number in range(3)]
    append_checked_lines(tmp_path / "0.jsonl", rows[:2])
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write(line)
    append_checked_lines(tmp_path / "0.jsonl", rows[2:])
    assert evaluate.read_partial(tmp_path / "0.jsonl") == {(row["index"], 1): row for row in rows}


def test_a_flipped_bit_of_an_answer_on_the_way(tmp_path: Path, capsys: Any, tally: Callable[..., None]) -> None:
    """Any bit of it, also one that leaves good JSON: said, left out, and asked again."""
    path = tmp_path / "0.jsonl"
    rows = [{"index": number, "turn": 1, "response": "abc"} for number in range(2)]
    append_checked_lines(path, rows)
    whole = path.read_bytes()
    bits = range(8, 8 * (len(whole) - 1), 7)
    for bit in bits:
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        found = evaluate.read_partial(path)
        assert len(found) < 2 and all(row in rows for row in found.values())
        assert " lines are damaged or incomplete; their answers are generated again" in capsys.readouterr().err
    tally(tries=len(bits))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    """By its rights, or a disk that fails: it is not as it was written, and the others are looked at."""
    (tmp_path / "a.bin").write_bytes(b"1")
    manifest = {"files": {"a.bin": {"size": 1, "sha256": runs.sha256(tmp_path / "a.bin")}}}

    def fails(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("salsa_peft.utils.manifests.sha256", fails)
    assert changed_file(tmp_path, manifest) == "unreadable: a.bin (Permission denied)"


def test_tidying_up_spares_results(tmp_path: Path) -> None:
    """What the manifest lists, whatever it is called; and where a link leads to."""
    write_atomic(tmp_path / "metrics.1.jsonl", "listed")
    write_atomic(tmp_path / "metrics.2.jsonl", "of a run before")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "elsewhere")
    entry = {"size": 6, "sha256": runs.sha256(tmp_path / "metrics.1.jsonl")}
    write_atomic(tmp_path / MANIFEST, json.dumps({"files": {"metrics.1.jsonl": entry}}))
    runs.remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "manifest.json", "metrics.1.jsonl"]


def test_a_flipped_bit_of_a_judges_reply(tmp_path: Path, capsys: Any) -> None:
    """SQLite doesn't notice: the reply is named, forgotten and asked for anew; the others stay."""
    path = tmp_path / "judge_cache.sqlite"
    cache = Cache(path)
    cache.put({"good": Reply("better: A", "stop", 1, 1), "bad": Reply("the verdict is [[A]]", "stop", 1, 1)})
    cache.file.close()
    path.write_bytes(path.read_bytes().replace(b"the verdict is [[A]]", b"the verdict is [[B]]"))
    cache = Cache(path)
    assert cache.get("bad") is None and "the reply bad is damaged; the judge is asked again" in capsys.readouterr().err
    assert cache.put({"bad": Reply("the verdict is [[A]]", "stop", 1, 1)})["bad"].text == "the verdict is [[A]]"
    assert cache.get("good") == Reply("better: A", "stop", 1, 1) and capsys.readouterr().err == ""


# a PPO run that was stopped

OPTIONS: dict[str, Any] = {
    "num_mini_batches": 2,
    "num_ppo_epochs": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
    "num_train_epochs": 2,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, str]:
    """A run's folder with checkpoints 1 to 3 of 4, the last in the middle of an update; and the metrics of the whole."""
    import tiny

    place = tmp_path_factory.mktemp("ppo") / "run"
    tiny.make_trainer(tokenizer, place, **OPTIONS).train()
    metrics = (place / "metrics.jsonl").read_text()
    shutil.rmtree(place / "checkpoint-4")
    assert (place / "checkpoint-3" / "rollout.safetensors").is_file()
    return place, metrics


def checkpoint_files() -> list[str]:
    return ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "salsa_state.json", "rollout.safetensors", "training_args.bin", "checkpoint.json"]  # fmt: skip


def test_every_file_of_a_checkpoint_by_every_damage(stopped: Any, tmp_path: Path, tally: Callable[..., None]) -> None:
    """The checkpoint is passed over for the one before, in a line that names the file."""
    place, _ = stopped
    there = {path.name for path in (place / "checkpoint-3").iterdir() if path.is_file()}
    names = [name for name in checkpoint_files() if name in there]
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "salsa_state.json",
        "rollout.safetensors",
    } <= set(names)
    quiet = []
    for name in [*names, *sorted(there - set(names))]:
        for damage, change in DAMAGES.items():
            copy = tmp_path / "copy"
            shutil.copytree(place, copy)
            change(copy / "checkpoint-3" / name)
            found, passed = checkpoints.last_complete(copy)
            assert found == copy / "checkpoint-2", (name, damage)
            if not passed:
                quiet.append((name, damage))
            else:
                assert (
                    len(passed) == 1
                    and "checkpoint-3: skipped, because it is incomplete" in passed[0]
                    and name in passed[0]
                )
            shutil.rmtree(copy)
    assert {name for name, _ in quiet} <= {"salsa_state.json"}, quiet  # one that says it is older is not looked at
    tally(tries=len(there) * len(DAMAGES), checkpoint_files=len(there))


@pytest.mark.parametrize(
    "state",
    ['{"saved": "x"}', '{"saved": null}', '{"saved": [1]}', '{"saved": NaN}', '{"saved": 1e400}', "[" * 100_000, "3"],
)
def test_a_state_that_does_not_say_when_it_was_saved(stopped: Any, tmp_path: Path, state: str) -> None:
    """Comes first, so that it is said, and is not counted with."""
    copy = tmp_path / "copy"
    shutil.copytree(stopped[0], copy)
    (copy / "checkpoint-3" / "salsa_state.json").write_text(state)
    found, passed = checkpoints.last_complete(copy)
    assert (
        found == copy / "checkpoint-2"
        and "salsa_state.json has changed" in passed[0]
        and checkpoints.next_number(copy) == 3
    )


@pytest.mark.parametrize("listed", [{"salsa_state.json": 3}, {"salsa_state.json": {}}, {"salsa_state.json": None}])
def test_a_checkpoints_manifest_that_says_nothing(stopped: Any, tmp_path: Path, listed: Any) -> None:
    """Named, not a trace."""
    shutil.copytree(stopped[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "checkpoint.json").write_text(json.dumps(listed))
    assert "salsa_state.json" in str(checkpoints.fault(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", "cut"),
        ("rollout.safetensors", "bit"),
        ("rng_state.pth", "missing"),
        ("trainer_state.json", "empty"),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_before(
    stopped: Any, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    """To the same metrics; asked for by its name the damaged one is refused."""
    import tiny

    place, metrics = stopped
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    DAMAGES[damage](copy / "checkpoint-3" / name)
    with pytest.raises(
        SalsaError, match=rf"checkpoint-3 is not a complete checkpoint \({name} (has changed|is missing)\)"
    ):
        tiny.make_trainer(tokenizer, copy, **OPTIONS).train(resume_from_checkpoint=str(copy / "checkpoint-3"))
    tiny.make_trainer(tokenizer, copy, **OPTIONS).train(resume_from_checkpoint=True)
    said = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert len(said) == 1 and "skipped, because it is incomplete" in said[0]
    timeless = [[{k: v for k, v in json.loads(line).items() if "time" not in k and "per_second" not in k} for line in text.splitlines()]
                for text in (metrics, (copy / "metrics.jsonl").read_text())]  # fmt: skip
    assert timeless[0] == timeless[1] and len(timeless[0]) >= 2

"""The run folder: keys, manifests, atomic files, the lock, fingerprints; and stages in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from child_processes import gone
from fake_stages import FAKE, TINY, start
from quick_server import quick_server  # noqa: F401

from salsa_peft.config.job import Unit
from salsa_peft.recipe import cache as runs
from salsa_peft.recipe import processes
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.utils import hub
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.fingerprints import base_fingerprint, fingerprint, sha256

DATA = ["data/demonstrations", "data/preferences"]
UNITS = [
    "toy",
    *DATA,
    "sft/seed-0",
    "sft/seed-1",
    "reward",
    "reward_quality",
    "soup",
    "ppo/ppo",
    "ppo/salsa",
    "landscape",
    "evaluate",
    "report",
]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """go("--set", …) → (code, units made, standard error); runs the tiny recipe with fake stages in tmp_path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)

    def run(*words: str, **actions: str):
        said = [
            f"description={json.dumps(json.dumps({k.replace('__', '/').replace('_', '-'): v for k, v in actions.items()}))}"
        ]
        code = salsa_run(["tiny.yaml", "--lora", "--set", *said, *words], stages=FAKE)
        err = capsys.readouterr().err
        made = [line.split(" … ")[0] for line in err.splitlines() if " … done" in line]
        return code, made, err

    return run


def manifest(unit: str) -> dict:
    [path] = Path("runs/tiny-lora/stages").glob(f"{unit}/*/manifest.json")
    return json.loads(path.read_text())


def test_first_run_makes_everything_second_nothing(go):
    assert go()[:2] == (0, UNITS)
    code, made, err = go()
    assert (code, made) == (0, [])
    assert err.count("cached") == len(UNITS)
    assert err.startswith(f"results: {Path('runs/tiny-lora').resolve()}\nreport:  ")
    assert "loading" not in err


def test_manifest_says_files_seconds_and_memory(go):
    go(sft__seed_1="memory")
    small, large = manifest("sft/seed-0"), manifest("sft/seed-1")
    assert small["unit"] == "sft/seed-0"
    assert small["facts"]["value"] == 1.0
    assert small["versions"]["salsa-peft"]
    assert set(small["files"]) == {"result.txt", "deeper/more.bin"}
    assert small["files"]["deeper/more.bin"]["size"] == 4
    assert large["peak_mb"] - small["peak_mb"] == pytest.approx(300, abs=15)
    assert 0.3 <= large["seconds"] < 5
    assert small["seconds"] < 0.3
    pids = {manifest(unit)["facts"]["pid"] for unit in UNITS}
    assert len(pids) == len(UNITS)
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ("policies.salsa.kl_coef=0.02", ["ppo/salsa", "evaluate", "report"]),
        ("evaluate.seed=5", ["evaluate", "report"]),
        ("evaluate.samples=2", ["report"]),
        ("landscape.seed=5", ["landscape", "report"]),
        ("soup.weights=[0.25, 0.75]", ["soup", "ppo/salsa", "evaluate", "report"]),
        (
            "reward.batch_size=4",
            ["reward", "reward_quality", "ppo/ppo", "ppo/salsa", "landscape", "evaluate", "report"],
        ),
        (
            "sft.seeds=[0, 7]",
            [unit for unit in UNITS if unit not in ("toy", *DATA, "sft/seed-0", "reward", "reward_quality", "ppo/ppo")],
        ),
        ("generation.batch_size=8", ["landscape", "evaluate", "report"]),
        ("threads=1", []),
        ("sft.learning_rate=1e-3", UNITS[3:]),
        ("toy.seed=1", UNITS),
        ("policies.third={reference: [seed-0, seed-1]}", ["ppo/third", "evaluate", "report"]),
    ],
)
def test_a_change_redoes_what_depends_on_it(go, change, made):
    go()
    assert go("--set", change)[:2] == (0, made)
    assert go()[:2] == (0, []), "the old keys are still there"


def test_a_stage_reads_models_at_the_recipes_revisions(go):
    """In its own process; the commands' process has none left afterwards."""
    said = ("--set", "revisions={me/seed: v1}", "--set", "evaluate.models=[me/seed]")
    assert go(*said, "--stages", "toy")[0] == 0
    assert manifest("toy")["facts"]["pinned"] == {"me/seed": "v1"} and hub.PINNED == {}


def test_damage_is_named_and_redone(go):
    go()
    [file] = Path("runs/tiny-lora/stages").glob("soup/*/deeper/more.bin")
    file.write_bytes(b"1235")
    code, made, err = go()
    assert code == 0
    assert made == ["soup", "ppo/salsa", "evaluate", "report"]
    assert "soup … changed: deeper/more.bin" in err
    file.unlink()
    assert "soup … missing: deeper/more.bin" in go()[2]
    [path] = Path("runs/tiny-lora/stages").glob("soup/*/manifest.json")
    path.write_text('{"files": 3}')
    assert "soup … unfinished" in go()[2]
    assert go()[1] == []


def test_an_input_made_anew_by_another_run_is_noticed(go):
    go()
    [file] = Path("runs/tiny-lora/stages").glob("soup/*/manifest.json")
    text = json.loads(file.read_text())
    text["files"]["deeper/more.bin"] = {"size": 4, "sha256": sha256(file)}
    file.write_text(json.dumps(text))
    assert go("--stages", "soup")[1] == ["soup"]  # its manifest was wrong
    text = json.loads(file.read_text())
    (file.parent / "result.txt").write_text("other bits")
    text["files"]["result.txt"] = {"size": 10, "sha256": sha256(file.parent / "result.txt")}
    file.write_text(json.dumps(text))
    assert go()[1] == ["ppo/salsa", "evaluate", "report"]


def test_force_and_what_hangs_on_it(go):
    go()
    assert go("--force", "ppo/salsa")[1] == ["ppo/salsa", "evaluate", "report"]
    assert go("--force", "ppo")[1] == ["ppo/ppo", "ppo/salsa", "evaluate", "report"]
    assert go("--force", "report", "--force", "landscape")[1] == ["landscape", "report"]


def test_stages(go):
    code, made, err = go("--stages", "ppo")
    assert code == 2
    assert made == []
    assert err.count("\n") == 1
    assert "--stages: ppo/ppo needs results that are not finished: toy (new), data/demonstrations (new)" in err
    assert "soup (new); add toy,data,sft,reward,reward_quality,soup\n" in err
    assert not Path("runs").exists()
    assert go("--stages", "toy,data,sft")[1] == UNITS[:5]
    made = ["reward", "reward_quality", "soup", "ppo/salsa"]
    assert go("--stages", ",".join(made))[1] == made
    code, made, err = go("--stages", "rewrd")
    assert code == 2
    assert "did you mean reward?" in err


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("refuse", "reward failed: data.prompts: found nothing, expected something\n"),
        ("crash", "reward failed: RuntimeError: boom and more (add --debug to see the traceback; traceback in "),
        (
            "kill",
            "reward failed: its process was killed by SIGKILL, perhaps for lack of memory; a smaller micro_batch_size needs less memory",
        ),
        ("exit", "reward failed: its process ended with code 3 and without a result\n"),
        ("nan", "reward failed: ValueError: Out of range float values are not JSON compliant"),
    ],
)
def test_a_failed_stage(go, action, said):
    code, made, err = go(reward=action)
    assert (code, made) == (1, UNITS[:5])
    assert said in err
    assert "Traceback" not in err
    log = Path("runs/tiny-lora/logs/reward.log")
    assert log.exists() == (action not in ("kill", "exit"))
    code, made, err = go()
    assert (code, made) == (0, UNITS[5:])
    assert "reward … unfinished" in err


def test_debug_shows_the_trace(go):
    err = go("--debug", reward="crash")[2]
    assert "RuntimeError: boom\nand more\n" in err
    assert "in run" in err
    assert "add --debug" not in err
    assert "in run" in Path("runs/tiny-lora/logs/reward.log").read_text()


def test_prune(go):
    go()
    go("--set", "sft.learning_rate=1e-3", "--set", "policies.abcdef012345={reference: base}")
    assert len(list(Path("runs/tiny-lora/stages").glob("sft/*/*"))) == 4
    go("--set", "policies.abcdef012345={reference: base}", "--prune")
    assert len(list(Path("runs/tiny-lora/stages").glob("sft/*/*"))) == 2
    assert go("--set", "policies.abcdef012345={reference: base}")[1] == []
    go("--prune")
    assert not list(Path("runs/tiny-lora/stages").glob("ppo/abcdef012345/*"))
    assert go()[1] == []


def command(folder: Path, *words: str, **actions: str) -> subprocess.Popen[str]:
    (folder / "tiny.yaml").write_text(TINY)
    said = json.dumps(json.dumps(actions))
    # a shell's background job has SIGINT ignored, and its children with it: this one is as in a terminal, wherever the tests run
    as_in_a_terminal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    words = ("--set", f"description={said}", *words)
    return start(folder, "tiny.yaml", *words, stdout=subprocess.PIPE, preexec_fn=as_in_a_terminal)


def child_pid(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("pid "):
            return int(line.split()[1])
    raise AssertionError("it ended early")


def test_standard_output_is_the_reports_path(tmp_path):
    process = command(tmp_path)
    out, err = process.communicate(timeout=60)
    [path] = out.splitlines()
    assert process.returncode == 0
    assert path.endswith("/report.html")
    assert Path(path) == tmp_path / "runs/tiny-lora/report.html"
    assert Path(path).read_text() == next((tmp_path / "runs/tiny-lora/stages/report").glob("*/report.html")).read_text()
    assert "noise" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_stage_and_give_their_code(tmp_path, number, code):
    process = command(tmp_path, reward="sleep")
    pid = child_pid(process)
    process.send_signal(number)
    assert process.wait(10) == code
    assert gone(pid)
    assert process.stderr.read().count("\n") == 1
    again = command(tmp_path)
    assert "sft/seed-1 … cached" in again.communicate(timeout=60)[1]
    assert again.returncode == 0


def test_a_stage_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    process = command(tmp_path, reward="stubborn")
    pid = child_pid(process)
    process.terminate()
    assert process.wait(processes.GRACE + 10) == 143
    assert gone(pid)


def test_kill_9_takes_the_stage_along_and_frees_the_lock(tmp_path):
    process = command(tmp_path, reward="sleep")
    pid = child_pid(process)
    process.kill()
    process.wait()
    assert gone(pid)
    again = command(tmp_path)
    err = again.communicate(timeout=60)[1]
    assert again.returncode == 0
    assert "sft/seed-1 … cached" in err
    assert "reward … unfinished" in err


def test_the_lock_names_its_holder(tmp_path):
    process = command(tmp_path, reward="sleep")
    child_pid(process)
    second = command(tmp_path)
    err = second.communicate(timeout=30)[1]
    assert second.returncode == 2
    assert err.count("\n") == 1
    assert f"pid {process.pid}, since" in err
    assert "in use by host" in err
    dry = command(tmp_path, "--dry-run")
    assert dry.communicate(timeout=30)[1] == ""
    assert dry.returncode == 0
    process.terminate()
    process.communicate(timeout=30)


def test_write_atomic(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a" / "b.txt", "grüße")
    write_atomic(tmp_path / "a" / "b.txt", b"new")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"new"

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomic(tmp_path / "a" / "b.txt", "lost")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"new"


def tensors(path: Path, **values: bytes) -> None:
    """A safetensors file of float32 vectors, written by hand."""
    header, start = {}, 0
    for name, raw in values.items():
        header[name] = {"dtype": "F32", "shape": [len(raw) // 4], "data_offsets": [start, start + len(raw)]}
        start += len(raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.values()))


def test_base_fingerprint(tmp_path):
    one, other = bytes(range(200)) * 2000, b"12345678"
    tensors(tmp_path / "a" / "model.safetensors", x=one, y=other)
    same = base_fingerprint(tmp_path / "a")
    tensors(tmp_path / "b" / "model-1.safetensors", y=other)
    tensors(tmp_path / "b" / "model-2.safetensors", x=one)
    assert base_fingerprint(tmp_path / "b") == same, "however the tensors are spread"
    (tmp_path / "b" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"y": "model-1.safetensors"}})
    )
    assert base_fingerprint(tmp_path / "b") != same
    tensors(tmp_path / "c" / "model.safetensors", x=one[:-4] + b"zzzz", y=other)
    assert base_fingerprint(tmp_path / "c") == same, "only the first 64 KiB count"
    tensors(tmp_path / "c" / "model.safetensors", x=b"z" + one[1:], y=other)
    assert base_fingerprint(tmp_path / "c") != same
    tensors(tmp_path / "c" / "model.safetensors", x=one, z=other)
    assert base_fingerprint(tmp_path / "c") != same
    for damage in (b"", b"\xff" * 20, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"{}{}"[:2]):
        (tmp_path / "c" / "model.safetensors").write_bytes(damage)
        if damage[8:] != b"{}":
            with pytest.raises(SalsaError, match="not a safetensors file, or damaged"):
                base_fingerprint(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(SalsaError, match="no safetensors file"):
        base_fingerprint(tmp_path / "d")


def test_base_fingerprint_of_a_file_from_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"b": torch.ones(3, 4), "a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    first = base_fingerprint(tmp_path)
    save_file({"b": torch.ones(4, 3), "a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert base_fingerprint(tmp_path) != first


def test_fingerprint_of_a_models_folder(tmp_path):
    tensors(tmp_path / "m" / "model.safetensors", x=b"1234")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "README.md").write_text("one")
    first = fingerprint(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("two")
    assert fingerprint(tmp_path / "m") == first
    (tmp_path / "m" / "config.json").write_text("{ }")
    assert fingerprint(tmp_path / "m") != first


def test_a_data_files_content_counts_its_place_does_not(tmp_path):
    unit = Unit(
        stage="sft", name="seed-0", run="x:y", key_fields={"a": 1}, files=(str(tmp_path / "a.jsonl"),), multi_unit=True
    )
    (tmp_path / "a.jsonl").write_text("1")
    (tmp_path / "b.jsonl").write_text("1")
    first = runs.key(unit, {}, {"torch": "1"}, {})
    moved = dataclasses.replace(unit, files=(str(tmp_path / "b.jsonl"),))
    assert runs.key(moved, {}, {"torch": "1"}, {}) == first
    (tmp_path / "a.jsonl").write_text("2")
    assert runs.key(unit, {}, {"torch": "1"}, {}) != first
    assert runs.key(moved, {}, {"torch": "2"}, {}) != first

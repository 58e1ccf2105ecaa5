"""Stages in two processes by `accelerate launch`: what goes to them and comes back, how they end.
test_shared_stages.py has what they make."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from child_processes import UNIT, environment, gone
from launched_stages import FAKE
from paths import SUPPORT
from small_recipe import read, unit

from salsa_peft.config import job as runs
from salsa_peft.config.load import load_recipe
from salsa_peft.recipe import processes
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates import hardware
from salsa_peft.utils.errors import SalsaError

RECIPE = """
name: tiny
num_processes: 2
toy: {}
policies: {ppo: {reference: seed-0}}
"""


def command(folder: Path, *words: str, **actions: str) -> subprocess.Popen[str]:
    """The tiny recipe with fake stages; actions: what processes 0 and 1 of sft/seed-0 do."""
    (folder / "tiny.yaml").write_text(RECIPE)
    said = json.dumps(json.dumps({f"{UNIT} {name[-1]}": action for name, action in actions.items()}))
    argv = [sys.executable, str(SUPPORT / "launched_stages.py"), "tiny.yaml", "--lora", "--set", f"description={said}"]
    as_in_a_terminal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        [*argv, "--stages", f"toy,data,{UNIT}", *words], cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, preexec_fn=as_in_a_terminal, start_new_session=True,
    )  # fmt: skip


def pids(folder: Path) -> list[int]:
    """Of both processes, once they wait; and of the launcher above them."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        files = list(folder.glob("runs/tiny-lora/stages/sft/seed-0/*/waits-*"))
        if len(files) == 2:
            found = [int(file.read_text()) for file in files]
            above = Path(f"/proc/{found[0]}/stat").read_text().rsplit(")", 1)[1].split()[1]
            return [*found, int(above)]
        time.sleep(0.05)
    raise AssertionError("they never began")


def test_two_processes_do_the_work_once(tmp_path: Path) -> None:
    """The first speaks for both; facts are its own, the memory is both's; other stages stay in one process; nothing is left beside."""
    process = command(tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err.count("said by 0\n") == err.count("error stream of 0\n") == 1 and "of 1" not in err and "by 1" not in err
    before_results = err.partition("\nresults in ")[
        0
    ]  # folder, loading, toy and data: noise and end, two prints, sft's end
    assert out == "" and before_results.count("\n") == 11, err
    run = tmp_path / "runs" / "tiny-lora"
    toy, sft = (read(unit(run, name) / "manifest.json") for name in ("toy", UNIT))
    assert sft["facts"] == {"rank": 0, "inputs": ["data/demonstrations", "toy"], "world": 2} and list(sft["files"]) == [
        "result.txt"
    ]
    assert sft["peak_mb"] > 0 and sft["seconds"] < 2 and toy["facts"]["value"] == 1
    assert list((run / "logs").iterdir()) == []
    again = command(tmp_path, "--set", "num_processes=1")
    assert f"{UNIT} … cached" in again.communicate(timeout=60)[1], "a result does not depend on the number of processes"


@pytest.mark.parametrize(
    ("actions", "line", "logged"),
    [
        ({"_0": "refuse", "_1": "refuse"}, "data.prompts: found nothing, expected something\n", "SalsaError"),
        ({"_0": "late", "_1": "first"}, "RuntimeError: boom and more (add --debug to see the traceback; traceback in ", "process 1:\nTraceback"),
        ({"_0": "wait", "_1": "kill"}, "its process was killed by SIGKILL, perhaps for lack of memory; a smaller micro_batch_size needs less memory", "exitcode  : -9"),
        ({"_0": "exit"}, "its process ended with code 3 and without a result", "exitcode  : 3"),
    ],
    ids=["both refuse", "the second crashes first", "one is killed", "one ends"],
)  # fmt: skip
def test_an_error_of_either_is_one_line(tmp_path: Path, actions: dict[str, str], line: str, logged: str) -> None:
    """The first error, not what it did to the other process; traces of all are in the log."""
    process = command(tmp_path, **actions)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and f"\n{UNIT} failed: {line}" in err and "Traceback" not in err, err
    (log,) = (tmp_path / "runs" / "tiny-lora" / "logs").iterdir()
    assert logged in log.read_text() and log.name == "sft-seed-0.log"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_both_which_may_save(tmp_path: Path, number: int, code: int) -> None:
    """Both get it, once; the command's code is as with one process."""
    process = command(tmp_path, _0="save", _1="save")
    there = pids(tmp_path)
    if number == signal.SIGINT:  # from a terminal, to all of its foreground
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(30) == code
    assert all(gone(pid) for pid in there)
    assert process.stderr is not None and process.stderr.read().endswith("run the same command again to continue\n")
    assert len(list(tmp_path.glob("runs/tiny-lora/stages/sft/seed-0/*/saved-*"))) == 2
    assert list((tmp_path / "runs" / "tiny-lora" / "logs").iterdir()) == []


def test_kill_9_of_the_command_takes_all_along(tmp_path: Path) -> None:
    """Both processes and the launcher; what the command could not remove goes with the next one."""
    process = command(tmp_path, _0="wait", _1="wait")
    there = pids(tmp_path)
    process.kill()
    process.wait()
    assert all(gone(pid, 15) for pid in there)
    again = command(tmp_path)
    assert "sft/seed-0 … done" in again.communicate(timeout=100)[1]
    assert list((tmp_path / "runs" / "tiny-lora" / "logs").iterdir()) == []


@pytest.mark.parametrize("step", ["no socket", "no job", "in the stage"])
def test_a_process_without_its_command_ends_at_once(tmp_path: Path, step: str) -> None:
    """Launched by a command that was killed before it connected, before it got the job, or while the stage function runs."""
    address = str(tmp_path / "socket")
    code = "import sys, time; from salsa_peft.recipe import worker; worker.receive_job(sys.argv[1], 0); time.sleep(60)"
    with socket.socket(socket.AF_UNIX) as server:
        if step != "no socket":
            server.bind(address)
            server.listen()
        process = subprocess.Popen([sys.executable, "-c", code, address], env=environment())
        if step != "no socket":
            with Connection(server.accept()[0].detach()) as connection:
                assert connection.recv() == (0, process.pid)
                if step == "in the stage":
                    connection.send(("job", []))
                    time.sleep(0.5)
                    assert process.poll() is None
        assert process.wait(30) == (-signal.SIGKILL if step == "in the stage" else 1)


def test_a_job_arrives_as_it_was_sent(tmp_path: Path) -> None:
    """Recipe, unit and paths, as a connection carries them."""
    loaded = load_recipe("quickstart", lora="lora", overrides=["num_processes=2", "ppo.guards={length: warn}"])
    for stage in FAKE.values():
        for one in stage.units(loaded.recipe, stage.run):
            job = runs.Job(
                recipe=loaded.recipe, unit=one, folder=tmp_path / "a", inputs={"toy": tmp_path}, recipe_yaml="ä: 1"
            )
            assert pickle.loads(pickle.dumps(job)) == job


def test_memory_is_of_the_machine_and_of_a_gpu(tmp_path: Path) -> None:
    """The sum of the processes', and the largest of the GPUs'."""
    reports = {
        rank: {"facts": {"rank": rank}, "seconds": 1.0, "peak_mb": 10.0 + rank, "gpu_peak_mb": gpu}
        for rank, gpu in ((1, 7.5), (0, 5.0))
    }
    found = processes.to_result(reports, "soup", tmp_path / "a.log", debug=False)
    assert (found.facts, found.peak_mb, found.gpu_peak_mb) == ({"rank": 0}, 21.0, 7.5)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["sft.batch_size=9"], r"sft.batch_size: 9 is not a multiple of num_processes 2; set sft.batch_size=10"),
        (["reward.batch_size=24", "reward.micro_batch_size=8"],
         r"reward.batch_size: 24 is not a multiple of micro_batch_size 8 × num_processes 2; set reward.batch_size=32 or change micro_batch_size"),
        (["ppo.batch_size=6", "ppo.num_mini_batches=2"], r"ppo.batch_size: 6 is not a multiple of num_mini_batches 2 × 2 processes; set ppo.batch_size=8"),
        (["ppo.batch_size=8", "ppo.micro_batch_size=8"], r"ppo.micro_batch_size: 8 must divide 4, the number of responses in a minibatch \(8 / 1 / 2 processes\)"),
        (["ppo.batch_size=12", "ppo.rollout_batch_size=4"], r"ppo.rollout_batch_size: 4 must divide 6, the number of responses that each of 2 processes generates for a rollout batch"),
        (["accelerate=fsdp2", "model.quantization=nf4"], r"model.quantization: nf4 does not work with accelerate fsdp2, .* set model.quantization=null or accelerate=ddp"),
        (["accelerate=zero3", "precision=stochastic"], r"precision: stochastic does not work with accelerate zero3, .* set precision=master or"),
        (["accelerate=fsdp2", "reward.seeds=[0, 1]"], r"reward.seeds: \[0, 1\] does not work with accelerate fsdp2, .* set reward.seeds=\[0\] or"),
        (["accelerate=fsdp2", "ppo.rollout_backend=paged"], r"ppo.rollout_backend: paged does not work with accelerate fsdp2, .* set ppo.rollout_backend=hf or"),
        (["accelerate=fsdp2", "reward.optim=paged_adamw_8bit"], r"reward.optim: paged_adamw_8bit does not work with accelerate fsdp2, .* set reward.optim=adamw_torch_fused or"),
    ],
)  # fmt: skip
def test_what_a_recipe_can_not_share(tmp_path: Path, sets: list[str], message: str) -> None:
    """Refused where it is read; with one process it runs."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    of_mode = {"model.quantization=nf4": "qlora", "precision=stochastic": None}
    preset = next((mode for word, mode in of_mode.items() if word in sets), "lora")
    with pytest.raises(SalsaError, match=message):
        load_recipe(str(tmp_path / "tiny.yaml"), lora=preset, overrides=sets)
    load_recipe(str(tmp_path / "tiny.yaml"), lora=preset, overrides=[*sets, "num_processes=1"])


@pytest.mark.parametrize(
    ("there", "visible", "sets", "message"),
    [
        (0, None, [], None),
        (4, None, ["accelerate=fsdp2"], None),
        (
            4,
            "1",
            [],
            "num_processes: 2 processes need a GPU each, but this machine has 1 GPU; lower num_processes to 1",
        ),
        (
            1,
            None,
            [],
            "num_processes: 2 processes need a GPU each, but this machine has 1 GPU; lower num_processes to 1",
        ),
        (0, None, ["accelerate=fsdp2"], "accelerate: fsdp2 needs GPUs, and nvidia-smi lists none; use ddp"),
    ],
)
def test_what_a_machine_can_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: int,
    visible: str | None,
    sets: list[str],
    message: str | None,
) -> None:
    """By the GPUs that nvidia-smi names, less those that CUDA_VISIBLE_DEVICES hides."""
    listed = "".join(f"GPU-{number}, gpu, 16384\n" for number in range(there))
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listed))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    loaded = load_recipe(str(tmp_path / "tiny.yaml"), lora="lora", overrides=sets)
    if message is None:
        hardware.check_processes(loaded.recipe)
    else:
        with pytest.raises(SalsaError, match=message):
            hardware.check_processes(loaded.recipe)


def test_a_refusal_of_the_machine_comes_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not in a plan, nor where no training stage is to be made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "gpus", list)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = ["tiny.yaml", "--lora", "--set", "accelerate=fsdp2"]
    assert salsa_run(words, stages=FAKE) == 2
    assert (
        capsys.readouterr().err.startswith("accelerate: fsdp2 needs GPUs, and nvidia-smi lists none; use ddp")
        and not Path("runs").exists()
    )
    assert salsa_run([*words, "--dry-run"], stages=FAKE) == 0

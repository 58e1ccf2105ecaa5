"""A run that was broken off goes on to the same end, to the bit: from every checkpoint, after kill -9 at any moment, after SIGTERM."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from plain_ppo import PROMPTS

from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError

LOGS = ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl")
OPTIONS: dict[str, Any] = {
    "num_mini_batches": 2, "micro_batch_size": 2, "num_ppo_epochs": 2, "learning_rate": 1e-2, "num_train_epochs": 2,
    "kl_control": "adaptive", "kl_target": 1.0, "kl_horizon": 100.0, "normalize_scores": True, "save_strategy": "steps",
    "save_steps": 3, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 5,
}  # fmt: skip
STEPS = 2 * 2 * 2 * 2  # 2 epochs of 2 rollout batches, 4 optimizer steps each


def digests(trainer: SalsaPPOTrainer) -> dict[str, str]:
    """Of everything that a run leaves: weights, value head, optimizer, schedule, β and the rest of the engine's state, logs."""

    def digest(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return digest(repr([(key, digest(entry)) for key, entry in value.items()]))
        if isinstance(value, list | tuple):
            return digest(repr([digest(entry) for entry in value]))
        return hashlib.sha256(repr(value).encode()).hexdigest()

    folder = Path(str(trainer.args.output_dir))
    engine = {key: value for key, value in trainer.checkpoints.state_dict().items() if key != "totals"}
    parts = {
        "weights": digest({n: p for n, p in trainer.model.named_parameters() if p.requires_grad}),
        "optimizer": digest(trainer.optimizer.state_dict()),
        "schedule": digest(trainer.lr_scheduler.state_dict()),
        "engine": json.dumps(engine),
    }
    return parts | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in LOGS}


def make_in(tokenizer: Any, folder: Path) -> Callable[..., SalsaPPOTrainer]:
    """make(name, **options): a trainer that saves, evaluates and adapts β, in the folder's folder of that name."""

    def make(name: str, **options: Any) -> SalsaPPOTrainer:
        return tiny.make_trainer(tokenizer, folder / name, eval_dataset=PROMPTS[:3], **(OPTIONS | options))

    return make


@pytest.fixture
def make_run(tokenizer: Any, tmp_path: Path) -> Callable[..., SalsaPPOTrainer]:
    """make_in the test's folder."""
    return make_in(tokenizer, tmp_path)


@pytest.fixture(scope="module")
def unbroken_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing disturbs: its output folder and, beside it, its digests."""
    place = tmp_path_factory.mktemp("unbroken")
    trainer = make_in(tokenizer, place)("run")
    trainer.train()
    assert trainer.state.global_step == STEPS
    (place / "digests.json").write_text(json.dumps(digests(trainer)))
    return place / "run"


@pytest.fixture
def unbroken(unbroken_folder: Path) -> dict[str, str]:
    """The digests of a run that nothing disturbs."""
    return json.loads((unbroken_folder.parent / "digests.json").read_text())


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_every_checkpoint_leads_to_the_same_end(make_run: Any, tmp_path: Path, full: bool) -> None:
    """Also one in the middle of an update, one at an epoch's end, and the last."""
    first = make_run("a", full=full, save_steps=1, save_total_limit=None)
    first.train()
    expected = digests(first)
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "a")] == [
        f"checkpoint-{n}" for n in range(STEPS, 0, -1)
    ]
    for step in (1, 3, 4, 6, 8, 11, 13, 15, 16):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "a", folder)
        for other in range(step + 1, STEPS + 1):
            shutil.rmtree(folder / f"checkpoint-{other}")
        again = make_run(f"from-{step}", full=full, save_strategy="no")
        again.train(resume_from_checkpoint=True)
        assert digests(again) == expected, step


@pytest.mark.parametrize(
    "options",
    [
        {"value": "none"},
        {"value": "group", "num_train_epochs": 0.25},
        {"value_warmup_updates": 1, "num_train_epochs": 1},
        {"value": "adapter", "num_train_epochs": 1},
        {"references": ["seed-0", "soup"], "reference_mean": "geometric", "reference_weights_step": 1.0},
    ],
    ids=str,
)
def test_other_critics_and_references(make_run: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """From within an update and from its end; another size of the groups, and another step of the weights, is refused."""
    first = make_run("a", save_steps=1, save_total_limit=None, **options)
    first.train()
    expected, last = digests(first), first.state.global_step
    for step in (2, 4):
        shutil.copytree(tmp_path / "a", tmp_path / f"from-{step}")
        for other in range(step + 1, last + 1):
            shutil.rmtree(tmp_path / f"from-{step}" / f"checkpoint-{other}")
        again = make_run(f"from-{step}", save_strategy="no", **options)
        again.train(resume_from_checkpoint=True)
        assert digests(again) == expected, step
    if "value_warmup_updates" in options:
        with pytest.raises(
            SalsaError, match="value_warmup_updates was 1 and is None now, so this run cannot be resumed"
        ):
            make_run("a", num_train_epochs=1).train(resume_from_checkpoint=True)
    if options.get("value") == "group":
        with pytest.raises(SalsaError, match="num_generations was 4 and is 2 now, so this run cannot be resumed"):
            make_run("a", **options, num_generations=2).train(resume_from_checkpoint=True)
    if "references" in options:
        with pytest.raises(
            SalsaError, match=r"reference_weights_step was 1\.0 and is 0\.5 now, so this run cannot be resumed"
        ):
            make_run("a", **options | {"reference_weights_step": 0.5}).train(resume_from_checkpoint=True)


def test_another_micro_batch_goes_on_with_the_same_global_batches(
    make_run: Any, tmp_path: Path, unbroken_folder: Path
) -> None:
    """From the middle of update 2; the rollouts of later updates differ by rounding only."""
    make_run("b", save_total_limit=None).train()
    for step in (9, 12, 15, 16):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    make_run("b", micro_batch_size=4).train(resume_from_checkpoint=True)
    rows = [(place / "metrics.jsonl").read_text().splitlines() for place in (unbroken_folder, tmp_path / "b")]
    one, other = (json.loads(lines[-1]) for lines in rows)
    assert one.keys() == other.keys() and len(rows[0]) == len(rows[1]) == 4
    for key, value in one.items():
        assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_a_checkpoint_of_another_setting_is_refused(make_run: Any) -> None:
    """Named with both values; nothing is changed."""
    make_run("c").train()
    with pytest.raises(SalsaError, match="batch_size was 8 and is 16 now, so this run cannot be resumed"):
        make_run("c", batch_size=16, micro_batch_size=None).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "manifest"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    make_run: Any,
    tmp_path: Path,
    unbroken: dict[str, str],
    unbroken_folder: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For the one before, and that is said; the end is the same."""
    shutil.copytree(unbroken_folder, tmp_path / "d")
    newest, before = checkpoints.checkpoints(tmp_path / "d")
    assert (newest.name, before.name) == ("checkpoint-16", "checkpoint-15")
    file = newest / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        os.truncate(newest / "optimizer.pt", 100)
    else:
        (newest / checkpoints.MANIFEST).write_text("{")
    trainer = make_run("d")
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-16: skipped, because it is incomplete" in capsys.readouterr().err
    assert digests(trainer) == unbroken


def _run(make: Callable[[], Any], out: Path, resume: bool, die: Callable[[], None] | None) -> None:
    """In a process of its own: train, leave the digests in `out`."""
    if die is not None:
        die()
    trainer = make()
    found = checkpoints.last_complete(Path(str(trainer.args.output_dir)))[0] if resume else None
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    out.write_text(json.dumps(digests(trainer)))
    os._exit(0)


def start(make: Callable[[], Any], out: Path, resume: bool, die: Callable[[], None] | None = None) -> Any:
    """Fork: the libraries are loaded, and one thread computes."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(make, out, resume, die))
    process.start()
    return process


def die_inside_a_save(call: int, moment: str) -> None:
    """kill -9 at the `call`-th write of a checkpoint's file: before it, in the middle of its bytes, or at the renaming."""
    counted = [0]

    def wrap(function: Any, cut: bool) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] != call:
                return function(*args, **kwargs)
            if moment == "inside" and cut:
                function(*args, **kwargs)
                path = next(Path(str(a)) for a in args if isinstance(a, str | Path))
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return write

    if moment == "renaming":
        Path.rename = wrap(Path.rename, False)  # type: ignore[method-assign]
        return
    torch.save = wrap(torch.save, True)
    import salsa_peft.models.adapters.lora
    import salsa_peft.models.value_head
    import salsa_peft.training.ppo.resume

    salsa_peft.training.ppo.resume.save_file = wrap(salsa_peft.training.ppo.resume.save_file, True)
    salsa_peft.models.value_head.save_file = wrap(salsa_peft.training.ppo.saving.save_file, True)
    salsa_peft.models.adapters.lora.save_file = wrap(salsa_peft.models.adapters.lora.save_file, True)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(make_run: Any, tmp_path: Path, unbroken: dict[str, str]) -> None:
    """kill -9 again and again over one run, 12 times by the clock and 8 inside a save; then the same command ends as if undisturbed."""
    out = tmp_path / "digests.json"
    begun = time.perf_counter()
    process = start(lambda: make_run("timed"), out, False)
    process.join()
    whole = time.perf_counter() - begun
    assert process.exitcode == 0 and json.loads(out.read_text()) == unbroken
    out.unlink()
    rng, kills = random.Random(0), 0
    while kills < 20:
        folder = tmp_path / f"killed-{kills // 5}"  # four runs, each killed five times
        inside = kills % 5 in (1, 3)
        die = None
        if inside:
            call, moment = rng.randint(1, 9), rng.choice(["before", "inside", "renaming"])
            call = rng.randint(1, 3) if moment == "renaming" else call
            die = lambda call=call, moment=moment: die_inside_a_save(call, moment)  # noqa: E731
        process = start(lambda folder=folder: make_run(folder.name), out, True, die)
        process.join(timeout=None if inside else rng.uniform(0.1, 1.0) * whole)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:  # it came to its end before: what it left is right, and the next run starts anew
            assert process.exitcode == 0 and json.loads(out.read_text()) == unbroken
            shutil.rmtree(folder)
        out.unlink(missing_ok=True)
    for number in range(4):
        process = start(lambda number=number: make_run(f"killed-{number}"), out, True)
        process.join()
        assert process.exitcode == 0 and json.loads(out.read_text()) == unbroken
        out.unlink()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_sigterm_saves_and_leaves_with_143(
    make_run: Any, tmp_path: Path, unbroken: dict[str, str], share: float
) -> None:
    """At the next token or optimizer step; nothing of what was done is done again."""
    out = tmp_path / "digests.json"
    process = start(lambda: make_run("term", save_strategy="no"), out, False)
    metrics = tmp_path / "term" / "metrics.jsonl"
    wanted = round(share * 4)
    while process.is_alive() and (not metrics.exists() or metrics.read_text().count("\n") < wanted):
        time.sleep(0.005)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    found, passed = checkpoints.last_complete(tmp_path / "term")
    assert found is not None and not passed
    process = start(lambda: make_run("term"), out, True)
    process.join()
    assert process.exitcode == 0 and json.loads(out.read_text()) == unbroken

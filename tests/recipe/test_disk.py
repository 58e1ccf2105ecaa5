"""What a run writes: counted by hand, held against what runs on a CPU leave, and refused where it can't fit."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paper_models import paper

from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Recipe
from salsa_peft.models.architectures.memory import GIB
from salsa_peft.recipe import cache as runs
from salsa_peft.recipe import run as recipe
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates import disk, hardware

CARD = 80 * GIB  # there full weights of 7B train in bf16
STAGES = ("toy", "data", "sft", "reward", "reward_quality", "soup", "ppo", "dpo")
SMALL = """
name: small
threads: 1
toy: {hidden_size: 256, num_layers: 4, pretrain_steps: 3, pretrain_examples: 100, demonstrations: 64, preferences: 200, prompts: 64,
  eval_prompts: 8, preference_sampled: 0.0}
model: {max_length: 32}
sft: {seeds: [0, 1], max_steps: 4, save_steps: 1}
reward: {max_steps: 4, seeds: [0, 1], save_steps: 1}
dpo: {max_steps: 4, save_steps: 1}
generation: {max_new_tokens: 6}
ppo: {batch_size: 16, max_steps: 16, save_steps: 3}
policies:
  ppo: {reference: seed-0}
  salsa: {reference: soup}
  dpo: {reference: soup, algorithm: dpo}
landscape: null
export: [merged]
"""


def plan(job: Recipe, folder: Path) -> dict[str, runs.PlannedUnit]:
    """All of a recipe's units, in an empty folder."""
    return runs.plan([unit for stage in recipe.STAGES.values() for unit in stage.units(job, stage.run)], folder)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk with so many bytes free, and a card of 80 GiB."""
    found = SimpleNamespace(free=0, total=2**40, used=0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: found)
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.Gpu("X", CARD)])
    return found


def test_full_weights_by_hand(tmp_path: Path) -> None:
    """Three seeds, a soup, three policies and a reward model in bf16; on the way two checkpoints of a policy and a third."""
    job, size = paper()
    found = disk.need(job, plan(job, tmp_path), list(plan(job, tmp_path)), CARD)
    assert found is not None
    model, reward = 2 * size.parameters, 2 * (size.parameters - 32000 * 4096 + 4096)
    assert found.final == 7 * model + reward
    checkpoint = (2 + 2 + 8 / 256) * size.parameters  # bf16 weights, 8-bit states
    assert found.peak == found.final - model + 3 * checkpoint
    master = disk.need(job, plan(job, tmp_path), list(plan(job, tmp_path)), None)
    assert (
        master is not None and master.peak == found.final - model + 3 * 12 * size.parameters
    )  # float32, two float32 states
    one = paper("llama2_full", None, "ppo.max_steps=400")[0]
    assert disk.unit_bytes(one, "ppo", size, CARD) == (
        model,
        checkpoint + model,
    )  # its one checkpoint, and the policy beside it
    several = paper("llama2_full", None, "reward.seeds=[0, 1]")[0]
    assert disk.unit_bytes(several, "reward", size, CARD)[0] == 3 * reward  # two, and their soup


def test_adapters_by_hand() -> None:
    """Float32 factors; a soup of the sum of ranks; a value adapter, and a merged policy in the base's dtype."""
    job, size = paper("llama2_full", "lora")
    rank16 = size.adapter(16, "all-linear")
    assert disk.unit_bytes(job, "sft", size, None)[0] == 4 * rank16
    assert disk.unit_bytes(job, "soup", size, None)[0] == 8 * rank16
    assert disk.unit_bytes(job, "ppo", size, None) == (4 * rank16, 3 * 12 * rank16)
    assert disk.unit_bytes(paper("llama2_full", "lora", "soup.rank=8")[0], "soup", size, None)[0] == 2 * rank16
    both = paper("llama2_full", "lora", "ppo.value=adapter", "export=[merged]", "ppo.optim=paged_adamw_8bit")[0]
    kept = 8 * rank16 + 2 * size.parameters
    assert disk.unit_bytes(both, "ppo", size, None) == (kept, 2 * (4 + 2 + 8 / 256) * 2 * rank16 + kept)


def test_checkpoints_of_the_other_stages_by_hand() -> None:
    """Two at a time, or the last one beside the result; members of a reward soup; none if training is short, or under ZeRO-3."""
    job, size = paper("llama2_full", "lora", "reward.seeds=[0, 1]", "sft.save_steps=10", "reward.save_steps=10", "reward.max_steps=15",
                      "policies={dpo: {algorithm: dpo, reference: soup}}", "dpo.max_steps=500", "export=[merged]", "evaluate.pairs=[[dpo, soup]]")  # fmt: skip
    rank16 = size.adapter(16, "all-linear")
    reward, model = 4 * (rank16 + 4096), 2 * size.parameters
    assert disk.unit_bytes(job, "sft", size, None) == (4 * rank16, 2 * 12 * rank16)
    assert disk.unit_bytes(job, "reward", size, None) == (3 * reward, reward + 2 * 3 * reward)
    kept = 4 * rank16 + model
    assert disk.unit_bytes(job, "dpo", size, None) == (
        kept,
        12 * rank16 + kept,
    )  # the last step's, before it is evaluated
    sharded = ("num_processes=2", "accelerate=zero3", "ppo.batch_size=8", "sft.batch_size=8", "reward.batch_size=8")
    alone, with_zero3 = (paper("llama2_full", None, "sft.save_steps=10", *more)[0] for more in ((), sharded))
    assert disk.unit_bytes(alone, "sft", size, None) == (model, 2 * 12 * size.parameters)
    assert disk.unit_bytes(with_zero3, "sft", size, None) == (model, model)


def test_what_is_there_writes_nothing_more(tmp_path: Path) -> None:
    """Cached units, those that are not asked for; what an unfinished folder holds is free."""
    job, size = paper()
    steps = plan(job, tmp_path)
    model = 2 * size.parameters
    alone = disk.need(job, steps, ["sft/seed-0"], CARD)
    two = 2 * (2 + 2 + 8 / 256) * size.parameters  # checkpoints: the newest stays until the next one is complete
    assert alone is not None and (alone.final, alone.peak, alone.place) == (model, two, tmp_path)
    steps["sft/seed-0"].folder.mkdir(parents=True)
    steps["sft/seed-0"].folder.joinpath("half.bin").write_bytes(bytes(1000))
    begun = disk.need(job, steps, ["sft/seed-0"], CARD)
    assert begun is not None and begun.final == model - 1000
    cached = {
        name: runs.PlannedUnit(unit=step.unit, key=step.key, folder=step.folder, why=None)
        for name, step in steps.items()
    }
    nothing = disk.need(job, cached, list(cached), CARD)
    assert nothing is not None and nothing.final == nothing.peak == 0


def test_a_run_that_cannot_fit_is_refused(
    tmp_path: Path, free: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2, one line with what would do, nothing written; the plan says it too, and does not refuse."""
    words = ["llama2_full", "--set", "evaluate.judge=null", "--output-dir", str(tmp_path / "run")]
    free.free = 120 * GIB
    assert salsa_run(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith(
        f"results: need 163.5 GiB during the run (100.2 GiB when it is finished), but only 120.0 GiB are free on the disk of {tmp_path}"
    )
    assert line.endswith("use --output-dir on a larger disk, or --lora") and not list(tmp_path.iterdir())
    free.free = 145 * GIB
    assert salsa_run(words) == 2
    assert (
        "or --set ppo.save_steps=100000 (one checkpoint per policy, at its end), or --lora" in capsys.readouterr().err
    )
    assert salsa_run([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "disk: 100.2 GiB more when the run is finished, at most 163.5 GiB during the run; 145.0 GiB free" in said
        and ": too little; use" in said
    )
    assert salsa_run([*words, "--lora", "--dry-run"]) == 0
    assert "too little" not in capsys.readouterr().out
    assert salsa_run(["smollm2", "--dry-run"]) == 0
    assert (
        "disk: not known before the config.json of HuggingFaceTB/SmolLM2-135M-Instruct is downloaded"
        in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, "lora"])
def test_it_is_what_a_run_writes(lora: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sum of files on the way and what stays, of a real run: within 5%."""
    monkeypatch.chdir(tmp_path)
    file, folder, most, done = tmp_path / "small.yaml", tmp_path / "run", [0], threading.Event()
    file.write_text(SMALL)
    job = load_recipe(str(file), lora=lora, overrides=[]).recipe
    steps = plan(job, folder)
    asked = [name for name, step in steps.items() if step.unit.stage in STAGES]
    expected = disk.need(job, steps, asked, None)

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], disk.bytes_in(folder))
            time.sleep(0.02)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        stages = ["--stages", ",".join(STAGES), "--output-dir", str(folder)]
        assert salsa_run([str(file), *(["--lora"] if lora else []), *stages]) == 0
    finally:
        done.set()
        watching.join()
    assert expected is not None
    assert disk.bytes_in(folder) == pytest.approx(expected.final, rel=0.05)
    assert most[0] == pytest.approx(expected.peak, rel=0.05)
    shutil.rmtree(folder)

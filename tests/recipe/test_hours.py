"""Tokens and hours in the plan: counted by hand for Llama-2-7B, with and without a GPU, before and after a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paper_models import paper

from salsa_peft.config.job import Unit
from salsa_peft.config.schema import Recipe
from salsa_peft.evaluation.landscape import plane_weights
from salsa_peft.models.architectures.work import Costs, Work
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.cache import PlannedUnit
from salsa_peft.recipe.estimates import hardware, hours
from salsa_peft.recipe.estimates.hardware import GPUS, Gpu, Speed

N = 6_738_415_616 - 32_000 * 4096  # Llama-2-7B without its input embeddings
A = 39_976_960  # an adapter of rank 16 on all linear layers
H100 = GPUS["H100"][1]


def unit(stage: str, name: str = "") -> Unit:
    """A unit of a recipe."""
    return Unit(stage=stage, name=name or stage, run="", multi_unit=bool(name))


def work(recipe: Recipe, stage: str, name: str = "") -> Work:
    """The work of a unit."""
    found = hours.unit_work(recipe, unit(stage, name))
    assert found is not None
    return found.work


def test_operations_of_a_token() -> None:
    """6 N for full weights, 4 N for frozen ones and 6 for each weight of an adapter, 2 N more to recompute, 2 N to score."""
    full, lora = (Costs(*paper("llama2_full", mode)) for mode in (None, "lora"))
    assert full.multiplied == lora.multiplied == N
    assert full.training(1, False) == Work(trained=1, operations=6 * N)
    assert full.training(10, True) == Work(trained=10, operations=80 * N)
    assert lora.training(1, False).operations == 4 * N + 6 * A
    assert lora.training(1, True).operations == 6 * N + 8 * A
    assert full.scoring(3) == Work(scored=3, operations=6 * N)
    assert lora.scoring(1).operations == 2 * (N + A)


def test_bytes_of_decoding() -> None:
    """At each of 512 tokens, weights are read once in every batch, and 512 kB for each token so far of every row."""
    full, lora, quantised = (Costs(*paper("llama2_full", mode)) for mode in (None, "lora", "qlora"))
    assert (full.weights, lora.weights) == (2 * N, 2 * N + 4 * A)
    in_linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert quantised.weights == pytest.approx(0.51587 * in_linears + 2 * (N - in_linears) + 4 * A, rel=1e-4)
    kv = 2 * 2 * 32 * 4096
    found = full.generating(16, 8, 512, 512)
    assert found.bytes == 512 * (2 * (2 * N) + kv * 16 * (512 + 256))
    assert (found.generated, found.scored, found.operations) == (16 * 512, 16 * 512, 2 * N * 16 * 512)
    assert full.generating(4, 64, 512, 512).bytes == 512 * (2 * N + kv * 4 * (512 + 256))


def test_seconds_of_sft() -> None:
    """100 steps of 8 rows of 2,048 tokens, recomputed: 8 N for each of 1.6 M tokens, at 35% of 989 TFLOP/s."""
    recipe, _ = paper("llama2_full", None, "sft.max_steps=100", "sft.batch_size=8")
    assert work(recipe, "sft", "seed-0") == Work(trained=1_638_400, operations=8 * N * 1_638_400)
    expected = 8 * N * 1_638_400 / (0.35 * 989e12)
    assert hours.seconds(recipe, unit("sft", "seed-0"), H100) == pytest.approx(expected) == pytest.approx(250, rel=0.01)
    assert hours.seconds(recipe, unit("sft", "seed-0"), None) is None
    assert hours.seconds(recipe, unit("sft", "seed-0"), Gpu("--gpu", 80 * 2**30)) is None
    assert hours.seconds(recipe, unit("soup"), H100) is None
    two, _ = paper("llama2_full", None, "sft.max_steps=100", "sft.batch_size=8", "num_processes=2")
    assert hours.seconds(two, unit("sft", "seed-0"), H100) == pytest.approx(expected / 2)
    taken, _ = paper("llama2_full", "lora", "sft.from=[someone/adapter, null, null]")
    assert work(taken, "sft", "seed-0") == Work()


def test_work_of_ppo() -> None:
    """One update of 8 responses: prompts, sampling, policy, reference and reward on 2,048 tokens, 4 epochs of training."""
    given = ("ppo.max_steps=4", "ppo.num_ppo_epochs=4", "ppo.batch_size=8", "ppo.num_mini_batches=1")
    recipe, _ = paper("llama2_full", None, *given)
    found, whole = work(recipe, "ppo", "salsa"), 8 * 2048
    assert (found.trained, found.generated, found.scored) == (4 * whole, 8 * 1024, 3 * whole + 8 * 1024)
    assert found.operations == 8 * N * 4 * whole + 2 * N * (3 * whole + 8 * 1024)
    assert found.bytes == 1024 * (2 * N + 524_288 * 8 * (1024 + 512))
    recorded, _ = paper("llama2_full", None, *given, "ppo.old_logprobs=rollout")
    assert found.scored - work(recorded, "ppo", "salsa").scored == whole
    several, _ = paper("llama2_full", None, *given, "policies.salsa.reference=[soup, seed-0]")
    assert work(several, "ppo", "salsa").scored - found.scored == whole
    for value, forwards in (("none", 1), ("group", 1), ("adapter", 2)):
        own = ("ppo.lam=1.0", "ppo.vf_coef=0.001") if forwards == 1 else ()  # TRL's would have no effect
        other, _ = paper("llama2_full", "lora", *given, f"ppo.value={value}", *own)
        head, _ = paper("llama2_full", "lora", *given)
        assert work(other, "ppo", "salsa").trained == forwards * work(head, "ppo", "salsa").trained, value
    small, _ = paper("llama2_full", None, *given, "ppo.rollout_batch_size=2")
    assert work(small, "ppo", "salsa").bytes - found.bytes == 1024 * 3 * 2 * N


def test_rows_and_lengths_of_the_data(tmp_path: Path) -> None:
    """Of a local file: four characters a token, at most max_length. Of the paper's data: rows known, lengths at most."""
    rows = [{"messages": [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * size}]}
            for size in (40, 120, 100_000, 80)]  # fmt: skip
    pairs = [{"prompt": "a" * 40, "chosen": "b" * 40, "rejected": "b" * 80}] * 10
    for name, content in (("chats", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    given = (f"data.demonstrations={tmp_path}/chats.jsonl", f"data.preferences={tmp_path}/pairs.jsonl",
             "sft.batch_size=2", "reward.batch_size=3", "reward.micro_batch_size=1", "sft.num_train_epochs=3")  # fmt: skip
    recipe, _ = paper("llama2_full", None, *given)
    chats = hours.unit_work(recipe, unit("sft", "seed-0"))
    assert chats is not None and not chats.at_most
    assert chats.work.trained == 3 * (20 + 40 + 2048 + 30)
    reward = hours.unit_work(recipe, unit("reward"))
    assert reward is not None and not reward.at_most
    assert (reward.work.trained, reward.work.scored) == (2 * 9 * 25, 2 * 1 * 25)  # one pair is held out
    hub = hours.unit_work(paper("llama2_full")[0], unit("sft", "seed-0"))
    assert hub is not None and hub.at_most and hub.work.trained == 2048 * 8 * 25_984  # 207,865 rows in batches of 8
    unknown, _ = paper("llama2_full", None, "data.demonstrations={path: someone/else, split: train}")
    assert hours.unit_work(unknown, unit("sft", "seed-0")) is None


def test_work_of_answers() -> None:
    """MT-Bench’s 80 questions of two turns for each of five models; for each point of the line, scales and plane; 4 responses to each of 64 prompts."""
    recipe, _ = paper("llama2_full", None, "evaluate.prompts={mt_bench: lighteval/mt-bench}")
    assert work(recipe, "evaluate").generated == 5 * 160 * 1024
    assert len(plane_weights(4)) == 33
    assert work(recipe, "reward_quality").generated == 64 * 4 * 1024
    assert work(recipe, "landscape").generated == (9 + 5 + 33) * 160 * 1024


def test_names_of_gpus() -> None:
    """nvidia-smi's names of the GPUs in the table, and of variants with other speeds, which have none."""
    named = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100-80",
             "NVIDIA A100-PCIE-40GB": "A100-40", "NVIDIA GeForce RTX 4090": "4090", "NVIDIA GeForce RTX 3090": "3090"}  # fmt: skip
    assert {name: hardware.speed_of(name) for name in named} == {
        name: GPUS[key][1].speed for name, key in named.items()
    }
    others = ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "X")
    assert all(hardware.speed_of(name) is None for name in others)


def plan_of(folder: Path, measured: dict[str, float]) -> Any:
    """A plan of three seeds, of which those in `measured` are finished."""
    plan = {}
    for number in range(3):
        seed = unit("sft", f"seed-{number}")
        there = folder / seed.name
        there.mkdir(exist_ok=True)
        done = seed.name in measured
        if done:
            manifest = {"files": {}, "inputs": {}, "seconds": measured[seed.name]}
            (there / "manifest.json").write_text(json.dumps(manifest))
        plan[seed.id] = PlannedUnit(unit=seed, key="", folder=there, why=None if done else "new")
    return plan


def test_the_table_before_and_after_a_run(tmp_path: Path) -> None:
    """Planned by the GPU's speed; what is finished is measured, and gives the pace of the rest."""
    recipe, _ = paper("llama2_full", None, "sft.max_steps=100", "sft.batch_size=8")
    before = hours.table(recipe, plan_of(tmp_path, {}), H100)
    assert before[1] == [["sft, 3 units", "at most 4.92 M", "–", "–", "12:31", "–"]]
    assert "35% of H100's 989 TFLOP/s" in before[2][1] and "50% of its 3.35 TB/s" in before[2][1]
    part = hours.table(recipe, plan_of(tmp_path, {"seed-0": 500.0}), H100)
    assert part[1][0][-2:] == ["12:31; at the measured pace 16:40 for 2 unfinished units", "8:20 (1 of 3)"]
    without = hours.table(recipe, plan_of(tmp_path, {"seed-0": 500.0}), None)
    assert without[1][0][-2:] == ["25:00 at the measured pace", "8:20 (1 of 3)"]
    assert without[2][-1].startswith(
        "no hours, because this machine has no GPU; name a GPU to plan for: --gpu H200, H100"
    )
    done = hours.table(recipe, plan_of(tmp_path, {f"seed-{n}": 300.0 for n in range(3)}), H100)
    assert done[1][0][-2:] == ["12:31", "15:00"]


def test_a_small_models_seconds_have_digits() -> None:
    """A tiny model needs milliseconds: not 0.0 s."""
    assert hours._planned([hours._Timed(hours.Planned(Work(), False), 0.00123, None)] * 2) == "0.0025 s"
    for number, text in (
        (0.0, "0.0 s"),
        (1e-7, "less than 0.0001 s"),
        (0.094, "0.094 s"),
        (0.096, "0.1 s"),
        (12, "12 s"),
    ):
        assert hours._time(number) == text


def test_the_notes_say_that_dequantisation_is_not_counted(tmp_path: Path) -> None:
    """With a base in 4 bits, and with hours."""
    for mode, gpu, said in (("qlora", H100, True), ("lora", H100, False), ("qlora", None, False)):
        recipe, _ = paper("llama2_full", mode, "sft.max_steps=100", "sft.batch_size=8")
        notes = hours.table(recipe, plan_of(tmp_path, {}), gpu)[2]
        assert any("do not include the dequantisation of the 4-bit base" in note for note in notes) is said


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--gpu by name, this machine's GPU, none; a name that is not known exits with 2 and the known ones."""
    monkeypatch.setattr(hardware, "gpus", list)
    assert salsa_run(["llama2_full", "--lora", "--dry-run", "--gpu", "a100-80"]) == 0
    plan = capsys.readouterr().out
    assert "A100-80, 80 GiB" in plan and "35% of A100-80's 312 TFLOP/s" in plan and "sft, 3 units" in plan
    assert salsa_run(["llama2_full", "--dry-run", "--gpu", "24"]) == 0
    assert (
        "no hours, because the speed of --gpu is not known; name a GPU to plan for: --gpu H200"
        in capsys.readouterr().out
    )
    here = Gpu("NVIDIA H200", 140 * 2**30, Speed(989e12, 4.8e12))
    monkeypatch.setattr(hardware, "gpus", lambda: [here])
    assert salsa_run(["llama2_full", "--dry-run"]) == 0
    assert "NVIDIA H200's 989 TFLOP/s" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        salsa_run(["llama2_full", "--dry-run", "--gpu", "B300"])
    assert caught.value.code == 2
    assert "B300 is neither a known GPU (H200, H100, A100-80, A100-40, 4090, 3090)" in capsys.readouterr().err

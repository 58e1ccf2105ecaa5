"""What --dry-run says of memory: the table, and the first change that makes a stage fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from paper_models import paper
from paths import ROOT

from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.memory import GIB, estimate
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.dry_run import advice
from salsa_peft.recipe.estimates import hardware

ONE = ("ppo.gradient_checkpointing=false", "ppo.micro_batch_size=8")
TWO = ("num_processes=2", "ppo.batch_size=36", "ppo.micro_batch_size=18", "sft.batch_size=36", "sft.micro_batch_size=9")
SHARDED = (*TWO, "accelerate=fsdp2")  # where nf4 is refused
PARKED = (*ONE, "offload=frozen", "precision=master")


@pytest.mark.parametrize("card", [6, 12, 16, 24, 40, 80])
@pytest.mark.parametrize(
    ("lora", "given"),
    [
        (None, ONE),
        ("lora", ONE),
        ("qlora", ONE),
        (None, TWO),
        ("lora", TWO),
        (None, SHARDED),
        ("lora", SHARDED),
        (None, PARKED),
    ],
)
def test_the_advice_makes_it_fit(lora: str | None, given: tuple[str, ...], card: int) -> None:
    """What is said, done to the recipe, is a recipe and fits; where nothing is said it fits already."""
    job, size = paper("llama2_full", lora, *given)
    for stage in memory.stages_of(job):
        said = advice(job, [stage], size, card * GIB)
        if said is None:
            assert estimate(job, stage, size, card * GIB).total <= card * GIB
        elif said.startswith("--"):
            words = said.split()
            preset = ("qlora" if "qlora" in words else "lora") if "--lora" in words else lora
            sets = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
            helped, _ = paper("llama2_full", preset, *given, *sets)
            assert estimate(helped, stage, size, card * GIB).total <= card * GIB, (stage, said)
        else:
            assert card < 12 or given is SHARDED, (stage, said)


def test_the_first_change_that_helps_is_said() -> None:
    """In the order of what they cost, the largest size first; several where one is not enough."""
    job, size = paper(
        "llama2_full", "lora", "ppo.gradient_checkpointing=false", "ppo.micro_batch_size=8", "ppo.rollout_batch_size=1"
    )
    both = "--set ppo.gradient_checkpointing=true --set ppo.micro_batch_size=4"
    assert [advice(job, ["ppo"], size, card * GIB) for card in (20, 30, 200)] == [
        both,
        both.split(" --set ppo.micro")[0],
        None,
    ]
    job, _ = paper("llama2_full", "lora", "ppo.micro_batch_size=8", "ppo.rollout_batch_size=1")
    assert advice(job, ["ppo"], size, 16 * GIB) == "--set ppo.micro_batch_size=1"
    job, _ = paper("llama2_full", "lora")
    assert advice(job, ["ppo"], size, 20 * GIB) == "--set ppo.rollout_batch_size=4"
    assert advice(job, ["landscape"], size, 20 * GIB) == "--set generation.batch_size=4"
    job, _ = paper("llama2_full", None, "precision=stochastic")
    assert advice(job, ["ppo"], size, 56 * GIB) == "--set offload=frozen"
    job, _ = paper("llama2_full", None, "precision=master")
    assert advice(job, ["sft"], size, 80 * GIB) == "--set precision=stochastic"
    assert (
        advice(job, ["ppo"], size, 50 * GIB) == "--lora --set precision=auto"
    )  # neither alone; it was given, so it stays
    assert advice(job, ["ppo"], size, 50 * GIB, {"precision"}) == "--lora"  # the recipe's own section takes it back
    job, _ = paper("llama2_full", None, "precision=stochastic", "offload=frozen")
    assert advice(job, ["ppo"], size, 24 * GIB) == "--lora --set offload=none --set precision=auto"
    assert (
        advice(paper("llama2_full", "lora")[0], ["ppo"], size, 8 * GIB) == "--lora qlora --set ppo.rollout_batch_size=2"
    )


def test_several_stages_at_once() -> None:
    """One piece of advice that serves all of them; each setting in it is needed."""
    card = 8 * GIB
    job, size = paper("llama2_full", "qlora")
    stages = list(memory.stages_of(job))
    said = advice(job, stages, size, card)
    assert said is not None
    settings = said.replace("--set ", "").split()
    assert {one.split(".")[0] for one in settings} >= {"ppo", "generation"}
    assert all(
        estimate(paper("llama2_full", "qlora", *settings)[0], stage, size, card).total <= card for stage in stages
    )
    for one in settings:
        fewer = paper("llama2_full", "qlora", *(other for other in settings if other != one))[0]
        assert any(estimate(fewer, stage, size, card).total > card for stage in stages)


def test_the_size_that_is_sold() -> None:
    """GiB, as --gpu takes them."""
    assert [hardware.smallest_gpu(size * GIB) for size in (3, 16, 16.1, 70, 190, 193.5)] == [16, 16, 24, 80, 192, 194]


def test_the_plan_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--gpu, or the card that is there; what does not fit with what would help."""
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.Gpu("NVIDIA X", 80 * GIB)])
    assert salsa_run(["llama2_full", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "NVIDIA X, 80 GiB" in plan and "step (stochastic)" in plan and "67.3 GiB" in plan and "fits" in plan
    assert salsa_run(["llama2_full", "--dry-run", "--gpu", "24"]) == 0
    plan = capsys.readouterr().out
    assert "--gpu, 24 GiB" in plan and "too large; use --lora" in plan and "all stages fit with: --lora\n" in plan
    assert salsa_run(["llama2_full", "--dry-run", "--gpu", "1"]) == 0
    assert "no option makes all stages fit; use a larger GPU" in capsys.readouterr().out
    assert salsa_run(["smollm2", "--lora", "--dry-run"]) == 0
    assert (
        "memory: not known before the config.json of HuggingFaceTB/SmolLM2-135M-Instruct is downloaded"
        in capsys.readouterr().out
    )
    for words, line in (
        (["--gpu", "24"], "--gpu needs --dry-run"),
        (["--dry-run", "--gpu", "big"], "big is neither a known GPU (H200,"),
        (["--dry-run", "--gpu", "5090"], "5090 is neither a known GPU (H200,"),
    ):
        with pytest.raises(SystemExit) as caught:
            salsa_run(["llama2_full", *words])
        assert caught.value.code == 2 and line in capsys.readouterr().err


def test_the_plan_says_what_a_kill_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """The steps between two checkpoints, or all of a short training; all under DeepSpeed, but for PPO; points and batches."""
    sets = [
        "sft.save_steps=20",
        "reward.max_steps=40",
        "policies.salsa={algorithm: rloo, reference: soup}",
        "rloo.save_steps=7",
    ]
    words = [word for one in sets for word in ("--set", one)]
    assert salsa_run(["quickstart", "--dry-run", *words]) == 0
    plan = capsys.readouterr().out
    rest = "evaluate one batch of answers, every other stage all its work"
    assert f"elsewhere a kill costs at most: landscape one point, {rest}\n" in plan

    def cost(stage: str) -> str:
        (line,) = (line for line in plan.splitlines() if line.startswith(stage) and " = " in line)
        return line.rpartition("  ")[2]

    assert [cost(stage) for stage in ("sft, each", "reward", "ppo, each", "rloo, each")] == [
        "20 steps", "all 40 steps (save_steps = 500)", "50 steps", "7 steps"
    ]  # fmt: skip
    words += ["--set", "num_processes=2", "--set", "accelerate=zero3", "--set", "landscape=null"]
    assert salsa_run(["quickstart", "--dry-run", *words]) == 0
    plan = capsys.readouterr().out
    assert f"elsewhere a kill costs at most: {rest}\n" in plan
    assert cost("sft, each") == cost("reward") == "all steps (no checkpoints under DeepSpeed)"
    assert cost("rloo, each") == "7 steps"


@pytest.mark.parametrize(
    "words",
    [
        ["llama2_full", "--gpu", "h100"],
        ["llama2_full", "--gpu", "24"],
        ["llama2_full", "--lora", "qlora", "--gpu", "80"],
        ["smollm2", "--lora"],
        ["quickstart", "--lora", "--replicates", "3"],
    ],
)
def test_the_plan_fits_a_terminal_of_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No line is wider, no word of a table is torn apart, and what does not fit the card is said below the table."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")  # without colours
    monkeypatch.chdir(tmp_path)
    assert salsa_run([*words, "--dry-run"]) == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    paths = [line for line in lines if str(ROOT) in line]
    assert [line for line in lines if len(line) > 80 and line not in paths] == []
    tables = " ".join(lines)
    for word in ("reward_quality", "generate", "landscape", "evaluate", "planned", "measured"):
        assert word in tables.split() or word not in tables, word
    if words[-1] == "24":
        assert re.search(
            r"^ppo +step +37.4 +12.6 +14.2 +– +– +– +67.3  no\n +\(stochastic\)$", "\n".join(lines), re.MULTILINE
        )
        assert "sft, reward, reward_quality, ppo, landscape, evaluate: too large; use --lora" in lines

"""The PPO engine on CUDA against itself on a CPU, which the other tests hold against formulas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, length_reward, roll_out

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer, adapters

FIGURES = ("objective/kl", "objective/scores", "objective/entropy", "loss/policy_avg", "loss/value_avg")


def figures(folder: Path) -> list[dict[str, float]]:
    """The logged updates."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("full", [False, True])
def test_figures_are_a_cpus(make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path, full: bool) -> None:
    """The same responses (random numbers are each row's own) and, in float32, the same losses and KL to 1e-3."""
    rows = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, device in (("cpu", {"use_cpu": True}), ("gpu", on_gpu)):
        make_trainer(full=full, folder=tmp_path / name, max_steps=4, **device).train()
        rows[name] = figures(tmp_path / name)
    for one, other in zip(rows["cpu"], rows["gpu"], strict=True):
        assert one["objective/response_length"] == other["objective/response_length"]
        for figure in FIGURES:
            assert other[figure] == pytest.approx(one[figure], rel=1e-3, abs=1e-4), figure


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_one_under_bf16(
    make_trainer: Any, on_gpu: dict[str, Any], full: bool, checkpointing: bool
) -> None:
    """Old log-probs are computed as training computes them, float32 weights under bf16 autocast."""
    trainer = make_trainer(full=full, bf16=True, gradient_checkpointing=checkpointing, max_steps=1, **on_gpu)
    trainer.train()
    assert trainer.totals == [] and figures(Path(trainer.args.output_dir))[0]["val/ratio"] == pytest.approx(1, abs=1e-4)


def test_compiled_decoding_gives_the_same_responses(
    make_trainer: Any, on_gpu: dict[str, Any], cuda: None, tmp_path: Path
) -> None:
    """A static cache, and the decoding step compiled."""
    responses = [
        roll_out(
            make_trainer(folder=tmp_path / str(compiled), rollout_compile=compiled, max_prompt_length=16, **on_gpu)
        ).responses
        for compiled in (False, True)
    ]
    assert torch.equal(responses[0].response_ids, responses[1].response_ids)


def test_paged_generation_runs(make_trainer: Any, on_gpu: dict[str, Any]) -> None:
    """Transformers' continuous batching."""
    trainer = make_trainer(rollout_backend="paged", max_steps=2, **on_gpu)
    trainer.train()
    assert trainer.update == 2


def test_offloaded_references_change_nothing_and_leave_the_card(
    make_trainer: Any, make_base: Any, on_gpu: dict[str, Any], tmp_path: Path
) -> None:
    """The same figures; with CUDA no weight of theirs stays there."""
    found = {}
    for where in ("none", "frozen"):
        trainer = make_trainer(
            [make_base(1), make_base(2)], full=True, folder=tmp_path / where, offload=where, max_steps=2, **on_gpu
        )
        trainer.train()
        found[where] = figures(tmp_path / where)
        devices = {p.device.type for reference in trainer.references for p in reference.model.parameters()}
        assert devices == ({"cpu"} if where == "frozen" else {trainer.args.device.type})
    assert [row["objective/kl"] for row in found["none"]] == [row["objective/kl"] for row in found["frozen"]]


def test_four_bits_train_adapters_and_no_base(
    make_base: Any, make_adapter: Any, tokenizer: Any, on_gpu: dict[str, Any], tmp_path: Path
) -> None:
    """QLoRA on the card: bf16 arithmetic, float32 adapters, the base's bytes as they were, a run that goes on."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from salsa_peft.config import Model
    from salsa_peft.models import load_base

    make_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def trainer(**options: Any) -> SalsaPPOTrainer:
        model: Any = load_base(str(tmp_path / "base"), Model(quantization="nf4-double", dtype="bfloat16"), tokenizer)
        for seed, name in enumerate(("policy", "soup"), 1):
            model = make_adapter(model, name, seed)
        model.set_adapter("policy")
        args = SalsaPPOConfig(output_dir=str(tmp_path / "run"), batch_size=8, num_ppo_epochs=1, max_new_tokens=7, learning_rate=1e-3,
                              report_to="none", disable_tqdm=True, gradient_checkpointing=True, save_steps=1, **on_gpu, **options)  # fmt: skip
        return SalsaPPOTrainer(
            model, args, PROMPTS, references=["soup", "base"], reward=length_reward, processing_class=tokenizer
        )

    first = trainer(max_steps=2)
    before = {name: tensor.clone() for name, tensor in first.model.named_parameters() if not tensor.requires_grad}
    first.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.model.named_parameters() if name in before)
    assert {p.dtype for p in adapters.parameters(first.model.policy, "policy")} == {torch.float32}
    second = trainer(max_steps=3)
    second.train(resume_from_checkpoint=True)
    assert second.update == 3


@pytest.mark.parametrize("learning_rate", [2e-6, 1e-7])
def test_small_steps_arrive_in_bf16(learning_rate: float, cuda: None) -> None:
    """500 steps of torchao's compiled 8-bit AdamW move bf16 weights as float32's AdamW does, within 5%."""
    optim = pytest.importorskip("torchao.optim", reason="needs torchao")
    torch.manual_seed(0)
    start, sign = 0.02 * torch.randn(65_536, device="cuda"), torch.randint(0, 2, (65_536,), device="cuda") * 2.0 - 1
    moves = []
    for kind, options, dtype in (
        (torch.optim.AdamW, {}, torch.float32),
        (optim.AdamW8bit, {"bf16_stochastic_round": True}, torch.bfloat16),
    ):
        weight = torch.nn.Parameter(start.to(dtype).clone())
        before, optimizer = (
            weight.detach().float().clone(),
            kind([weight], lr=learning_rate, weight_decay=0.0, **options),
        )
        for _ in range(500):
            weight.grad = (1e-3 * sign * (1 + 0.5 * torch.randn_like(start)).abs()).to(dtype)
            optimizer.step()
        moves.append(weight.detach().float() - before)
    assert (moves[1] @ moves[0] / moves[0].square().sum()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_the_whole_recipe(mode: str, tmp_path: Path) -> None:
    """From seeds to report on the card; its peak is in the manifests."""
    from test_pipeline import ENVIRONMENT, ROOT, SMALL, read, unit

    if mode == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    given = SMALL | {"toy.hidden_size": 64, "precision": "master"}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words = [
        sys.executable,
        "-m",
        "salsa_peft.recipe",
        "quickstart",
        *sets,
        "--output-dir",
        str(tmp_path / "run"),
        "--debug",
    ]
    words += [] if mode == "full" else ["--lora", mode]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read(unit(tmp_path / "run", "ppo/salsa") / "manifest.json")
    assert (manifest["gpu_peak_mb"] is not None) == torch.cuda.is_available()


def test_a_soup_of_checkpoints_is_a_cpus(tmp_path: Path) -> None:
    """`--device cuda` against NumPy: equal but for ties, which are one unit in the last place."""
    from made_checkpoints import values, write
    from safetensors.torch import load_file

    from salsa_peft.averaging import soup

    members = [write(tmp_path / name, values(seed)) for seed, name in enumerate("ab")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, where in (("cpu", "cpu"), ("gpu", device)):
        soup(tmp_path / name, members, [0.3, 0.7], device=where)
    for file in (tmp_path / "cpu").glob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "gpu" / file.name)
        for key, tensor in one.items():
            torch.testing.assert_close(other[key].float(), tensor.float(), rtol=2**-7, atol=1e-8)
            assert (other[key] != tensor).float().mean() < 0.02


def test_flash_attention_is_sdpas(make_base: Any, tokenizer: Any, tmp_path: Path, cuda: None) -> None:
    """Left-padded prompts through both."""
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    from salsa_peft.config import Model
    from salsa_peft.models import hidden_states, load_base

    make_base(hidden_size=64).save_pretrained(tmp_path / "base")
    ids = torch.randint(5, len(tokenizer), (3, 12), device="cuda")
    mask = torch.arange(12, device="cuda") >= torch.tensor([[0], [3], [6]], device="cuda")
    states = [
        hidden_states(
            load_base(str(tmp_path / "base"), Model(attn_implementation=name, dtype="bfloat16"), tokenizer), ids, mask
        )[mask]
        for name in ("sdpa", "auto")
    ]
    torch.testing.assert_close(states[0].float(), states[1].float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_two_gpus(how: str, tmp_path: Path) -> None:
    """The recipe in two processes."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if how == "zero3":
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    from test_pipeline import ENVIRONMENT, ROOT, SMALL

    given = SMALL | {"num_processes": 2, "accelerate": how, "toy.hidden_size": 64}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words = [sys.executable, "-m", "salsa_peft.recipe", "quickstart", *sets, "--output-dir", str(tmp_path / "run")]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

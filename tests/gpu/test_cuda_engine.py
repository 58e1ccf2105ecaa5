"""The PPO engine on CUDA against itself on a CPU, which the other tests hold against formulas."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, gradients, length_reward, loss_of, roll_out
from transformers import Trainer, TrainerCallback, TrainingArguments

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models import precision
from salsa_peft.models.adapters import lora as adapters

FIGURES = ("objective/kl", "objective/scores", "objective/entropy", "loss/policy_avg", "loss/value_avg")


def figures(folder: Path) -> list[dict[str, float]]:
    """The logged updates."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """The same responses and, in float32, the same losses and KL to 1e-3."""
    rows = [figures(one), figures(other)]
    assert len(rows[0]) == len(rows[1]) > 0
    for first, second in zip(*rows, strict=True):
        assert first["objective/response_length"] == second["objective/response_length"]
        for figure in FIGURES:
            assert second[figure] == pytest.approx(first[figure], rel=1e-3, abs=1e-4), figure


def words_of(folder: Path, *words: str, **sets: Any) -> list[str]:
    """`python -m salsa_peft.recipe quickstart`, cut small."""
    from small_recipe import SMALL

    given = SMALL | {"toy.hidden_size": 64, "precision": "master"} | sets
    options = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "salsa_peft.recipe", "quickstart", *options, "--output-dir", str(folder), *words]


def launch(words: list[str], **environment: str) -> None:
    """A command that must come to its end."""
    from paths import ROOT
    from small_recipe import ENVIRONMENT

    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=850, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# figures


@pytest.mark.parametrize("options", [{}, {"full": True}, {"gradient_checkpointing": True, "micro_batch_size": 2}],
                         ids=["lora", "full", "checkpointing"])  # fmt: skip
def test_figures_are_a_cpus(make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    """Random numbers are each row's own; a CPU's, plainly, against the GPU's, also with checkpointing."""
    full = {"full": options.get("full", False)}
    torch.backends.cuda.matmul.allow_tf32 = False
    make_trainer(folder=tmp_path / "cpu", max_steps=4, num_train_epochs=2, use_cpu=True, **full).train()
    make_trainer(folder=tmp_path / "gpu", max_steps=4, num_train_epochs=2, **options, **on_gpu).train()
    assert_same(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_one(
    make_trainer: Any, on_gpu: dict[str, Any], full: bool, bf16: bool, checkpointing: bool
) -> None:
    """Old log-probs are computed as training computes them, in float32 and under bf16 autocast."""
    trainer = make_trainer(full=full, bf16=bf16, gradient_checkpointing=checkpointing, max_steps=1, **on_gpu)
    trainer.train()
    close = 1e-3 if bf16 else 1e-4  # CUDA may take another attention kernel where no gradient is wanted
    assert trainer.ppo.totals == []
    assert figures(Path(trainer.args.output_dir))[0]["val/ratio"] == pytest.approx(1, abs=close)


def test_a_bf16_base_holds_float32_adapters(
    make_base: Any, make_adapter: Any, tokenizer: Any, on_gpu: dict[str, Any], tmp_path: Path
) -> None:
    """As a recipe loads it: two updates move float32 adapters and head, and no byte of the base; the first ratio is 1."""
    from salsa_peft.config.schema import Model
    from salsa_peft.models.base import load_base

    make_base().save_pretrained(tmp_path / "base")
    model: Any = load_base(str(tmp_path / "base"), Model(dtype="bfloat16"), tokenizer)
    for seed, name in enumerate(("policy", "soup"), 1):
        model = make_adapter(model, name, seed)
    model.set_adapter("policy")
    args = SalsaPPOConfig(output_dir=str(tmp_path / "run"), batch_size=8, num_ppo_epochs=1, max_new_tokens=7, learning_rate=1e-3, max_steps=2,
                          bf16=True, report_to="none", save_strategy="no", disable_tqdm=True, **on_gpu)  # fmt: skip
    trainer = SalsaPPOTrainer(
        model,
        args=args,
        train_dataset=PROMPTS,
        references=["soup", "base"],
        reward_funcs=length_reward,
        processing_class=tokenizer,
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(tensor, before[name]) is not tensor.requires_grad, name
        assert tensor.dtype == (torch.float32 if "lora_" in name or "value_head" in name else torch.bfloat16), name
    assert figures(tmp_path / "run")[0]["val/ratio"] == pytest.approx(1, abs=1e-3)


def test_master_weights_under_bf16_give_float32s_gradient(
    make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path
) -> None:
    """One rollout's loss and gradient with float32 arithmetic and with bf16's over the same float32 weights."""
    found = []
    rollout = None
    for bf16 in (False, True):
        trainer = make_trainer(full=True, folder=tmp_path / str(bf16), bf16=bf16, vf_coef=1.0, **on_gpu)
        torch.nn.init.constant_(trainer.model.value_head.weight, 0.05)
        rollout = rollout or roll_out(trainer)
        tokens = int(rollout.responses.lengths.sum())
        loss = loss_of(trainer, rollout, torch.arange(8), tokens)
        loss.loss.backward()
        found.append((loss, torch.cat([gradient.flatten() for gradient in gradients(trainer).values()])))
    (exact, one), (mixed, other) = found
    assert one.dtype == other.dtype == torch.float32 and exact.loss.item() != mixed.loss.item()
    assert exact.loss.item() > 0.1 and mixed.loss.item() == pytest.approx(exact.loss.item(), abs=2e-2)
    assert mixed.ratio.item() == pytest.approx(1, abs=2e-2)
    assert torch.nn.functional.cosine_similarity(one, other, dim=0).item() > 0.98


@pytest.mark.parametrize("learning_rate", [2e-6, 1e-7])
def test_small_steps_arrive_in_bf16(learning_rate: float, device: torch.device, tmp_path: Path) -> None:
    """500 steps of torchao's 8-bit AdamW, compiled on CUDA, move bf16 weights as float32's AdamW does, within 5%."""
    pytest.importorskip("torchao", reason="needs torchao")
    torch.manual_seed(0)
    start = 0.02 * torch.randn(65_536, device=device)
    sign = torch.randint(0, 2, start.shape, device=device) * 2.0 - 1
    moves = []
    with torch.compiler.set_stance(
        "default" if device.type == "cuda" else "force_eager"
    ):  # a CPU compiles for a minute
        for chosen in ("master", "stochastic"):
            arguments = precision.arguments(chosen)
            args = TrainingArguments(str(tmp_path), learning_rate=learning_rate, report_to="none", **arguments)
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            weight = torch.nn.Parameter(start.to(precision.PRECISIONS[chosen].weights).clone())
            before = weight.detach().float().clone()
            optimizer = kind([{"params": [weight], "weight_decay": 0.0}], **options)
            for _ in range(500):
                weight.grad = (1e-3 * sign * (1 + 0.5 * torch.randn_like(start)).abs()).to(weight.dtype)
                optimizer.step()
            moves.append(weight.detach().float() - before)
    assert (moves[1] @ moves[0] / moves[0].square().sum()).item() == pytest.approx(1, abs=0.05)


# generation


@pytest.mark.parametrize("full", [False, True])
def test_compiled_decoding_gives_the_same_responses(
    make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static cache, and the decoding step compiled (a CPU takes the cache alone); also the second time, with other weights."""
    from salsa_peft.training.ppo import backends

    responses = []
    for compiled in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "device", lambda: torch.device("cuda"))
            trainer = make_trainer(folder=tmp_path / str(compiled), full=full, rollout_compile=compiled, max_prompt_length=16, **on_gpu)  # fmt: skip
        assert type(trainer.rollout_maker.backend).__name__ == ("CompiledHF" if compiled else "HF")
        first = roll_out(trainer).responses.response_ids
        with torch.no_grad():
            for parameter in trainer.model.policy.parameters():
                parameter.mul_(1.1 if parameter.requires_grad else 1.0)
        responses.append((first, roll_out(trainer, update=2).responses.response_ids))
    assert all(torch.equal(one, other) for one, other in zip(*responses, strict=True))
    assert not torch.equal(*responses[0])


@pytest.mark.parametrize("full", [False, True])
def test_paged_generation(make_trainer: Any, on_gpu: dict[str, Any], full: bool) -> None:
    """Transformers' continuous batching: two updates, the first ratio 1 whatever sampled."""
    trainer = make_trainer(full=full, rollout_backend="paged", max_steps=2, **on_gpu)
    trainer.train()
    rows = figures(Path(trainer.args.output_dir))
    assert len(rows) == 2 and all(0 < row["objective/response_length"] <= 7 for row in rows)
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=1e-4)


def test_vllm(make_base: Any, make_adapter: Any, tokenizer: Any, on_gpu: dict[str, Any], tmp_path: Path) -> None:
    """In this process: two updates of an adapter, its weights merged for vLLM each time."""
    pytest.importorskip("vllm", reason="needs vllm")
    make_base(hidden_size=256, intermediate_size=512, num_key_value_heads=4).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for seed, name in enumerate(("policy", "soup"), 1):
        model = make_adapter(model, name, seed)
    model.set_adapter("policy")
    args = SalsaPPOConfig(output_dir=str(tmp_path / "run"), batch_size=8, num_ppo_epochs=1, max_new_tokens=7, max_steps=2, report_to="none",
                          save_strategy="no", disable_tqdm=True, rollout_backend="vllm", max_prompt_length=16,
                          rollout_options={"gpu_memory_utilization": 0.1}, **on_gpu)  # fmt: skip
    trainer = SalsaPPOTrainer(
        model,
        args=args,
        train_dataset=PROMPTS,
        references=["soup"],
        reward_funcs=length_reward,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.ppo.update == 2 and figures(tmp_path / "run")[0]["val/ratio"] == pytest.approx(1, abs=1e-3)


def test_flash_attention_is_sdpas(make_base: Any, tokenizer: Any, tmp_path: Path, device: torch.device) -> None:
    """Left-padded prompts through both, and rows one after another; on a CPU eager attention is the other."""
    from salsa_peft.config.schema import Model
    from salsa_peft.models.base import hidden_states, load_base, packs_rows
    from salsa_peft.models.responses import Sequences, last_states, pad_responses

    cuda = device.type == "cuda"
    if cuda:
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    make_base(hidden_size=64).save_pretrained(tmp_path / "base")
    ids = torch.randint(5, len(tokenizer), (3, 12), device=device)
    mask = torch.arange(12, device=device) >= torch.tensor([[0], [3], [6]], device=device)
    states, last = [], []
    sequences = Sequences(pad_responses([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14, 15, 16]], 0, (2,), device))
    for name in ("sdpa", "auto" if cuda else "eager"):
        model = load_base(str(tmp_path / "base"), Model(attn_implementation=name, dtype="bfloat16"), tokenizer)
        assert model.config._attn_implementation == ("flash_attention_2" if name == "auto" else name)
        with torch.no_grad():
            states.append(hidden_states(model, ids, mask)[mask].float())
            assert packs_rows(model) == (name == "auto")
            last.append(last_states(model, sequences.forward_batch([1, 0], packed=packs_rows(model))).float())
    for one, other in (states, last):
        assert ((one - other).norm() / one.norm()).item() < 2e-2


def test_an_update_waits_for_the_gpu_once_a_token(
    make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path, card: Any
) -> None:
    """As often with 8 micro-batches as with 64, whose rows are short and long."""
    prompts = [{"input_ids": [1, *range(5, 6 + row % 30)]} for row in range(64)]
    found = {}
    for micro, tokens in ((8, 16), (1, 16), (8, 48)):
        trainer = make_trainer(
            prompts=prompts, batch_size=64, micro_batch_size=micro, min_new_tokens=tokens, max_new_tokens=tokens, max_steps=1,
            base={"max_position_embeddings": 256}, folder=tmp_path / f"{micro}-{tokens}", **on_gpu,
        )  # fmt: skip
        trainer.checkpoints.settings()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if card.counts:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                if card.counts:
                    torch.cuda.set_sync_debug_mode("default")
        found[micro, tokens] = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
    assert found[8, 16] == found[1, 16]
    assert not card.counts or found[8, 48] - found[8, 16] <= 2 * 32


def waits(card: Any, work: Callable[[], Any]) -> int:
    """Times that the host waits for the GPU, after a first call; 0 on a CPU."""
    work()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if card.counts:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            if card.counts:
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


@pytest.mark.parametrize("kind", ["adapter", "classifier"])
def test_a_reward_waits_for_the_gpu_as_often_for_many_rows_as_for_few(
    make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, card: Any, kind: str
) -> None:
    """6 rows in one forward pass, 60 of other lengths in many."""
    from mixed_lengths import lognormal, made
    from tiny_classifiers import own_classifier

    from salsa_peft.models.adapters.names import SCORE_HEAD
    from salsa_peft.models.responses import Responses
    from salsa_peft.models.rewards.classifier import ClassifierReward
    from salsa_peft.models.rewards.reward import AdapterReward

    long = {"max_position_embeddings": 2048}
    if kind == "adapter":
        adapters.save(make_adapter(make_base(**long), "reward", 9), "reward", tmp_path / "reward", extra={SCORE_HEAD: torch.ones(1, 32)})  # fmt: skip
        reward: Any = AdapterReward(make_adapter(make_base(**long).to(card.device), "policy", 1), tmp_path / "reward", 8)  # fmt: skip
    else:
        reward = ClassifierReward(own_classifier(tokenizer, **long).to(card.device), tokenizer, tokenizer, 8)
    found = []
    for lengths in ([(4, 3)] * 6, lognormal(60)):
        responses = Responses(*(tensor.to(card.device) for tensor in made(lengths)))
        rows = [{"prompt": []}] * len(lengths)
        found.append(waits(card, lambda responses=responses, rows=rows: reward(responses, rows)))
    assert found[0] == found[1]


def test_generation_waits_for_the_gpu_once_a_token(make_base: Any, tokenizer: Any, card: Any) -> None:
    """With padding and without, for few rows and for many."""
    from salsa_peft.config.options.ppo import Sampling
    from salsa_peft.models.generation import generate

    model = make_base(max_position_embeddings=256).to(card.device)

    def count(prompts: list[list[int]], tokens: int) -> int:
        sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens)
        return waits(card, lambda: generate(model, prompts, sampling, tokenizer, range(len(prompts))))

    for prompts in ([[1, 5, 6]] * 2, [[1, 5, 6], [1, 7]]):
        few, more, longer = count(prompts, 16), count(prompts * 8, 16), count(prompts, 48)
        assert few == more and longer - few == (32 if card.counts else 0)


# where weights lie, and what four bits leave


def test_offloaded_references_change_nothing_and_leave_the_card(
    make_trainer: Any, make_base: Any, on_gpu: dict[str, Any], tmp_path: Path, card: Any
) -> None:
    """The same figures; between phases no weight of theirs is on the card, and the peak is lower by one of the two at least."""
    peaks, wide = {}, {"hidden_size": 512, "intermediate_size": 1024}
    for where in ("none", "frozen"):
        before = card.start()
        references = [make_base(number, **wide) for number in (1, 2)]
        trainer = make_trainer(
            references, full=True, base=wide, folder=tmp_path / where, offload=where, max_steps=2, **on_gpu
        )
        trainer.train()
        peaks[where] = card.peak() - before
        weights = [weight for reference in trainer.references for weight in reference.model.parameters()]
        assert {weight.device.type for weight in weights} == {"cpu" if where == "frozen" else trainer.args.device.type}
        one = sum(weight.nbytes for weight in references[0].parameters())
        del trainer, references, weights
    assert not card.counts or peaks["frozen"] < peaks["none"] - 0.9 * one
    rows = [figures(tmp_path / where) for where in ("none", "frozen")]
    assert [row["objective/kl"] for row in rows[0]] == pytest.approx([row["objective/kl"] for row in rows[1]], rel=1e-5)


def test_four_bits_train_adapters_and_no_base(
    make_base: Any, make_adapter: Any, tokenizer: Any, on_gpu: dict[str, Any], tmp_path: Path
) -> None:
    """QLoRA: bf16 arithmetic, float32 adapters, the base's bytes and scales as they were, a run that goes on; the optimizer is the paged
    one where there is a card to page."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from salsa_peft.config.schema import Model
    from salsa_peft.models.base import load_base

    make_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    optimizer = "adamw_torch" if on_gpu["use_cpu"] else "paged_adamw_32bit"

    def trainer(**options: Any) -> SalsaPPOTrainer:
        model: Any = load_base(str(tmp_path / "base"), Model(quantization="nf4-double", dtype="bfloat16"), tokenizer)
        for seed, name in enumerate(("policy", "soup"), 1):
            model = make_adapter(model, name, seed)
        model.set_adapter("policy")
        args = SalsaPPOConfig(output_dir=str(tmp_path / "run"), batch_size=8, num_ppo_epochs=1, max_new_tokens=7, learning_rate=1e-3,
                              num_train_epochs=2, report_to="none", disable_tqdm=True, gradient_checkpointing=True, save_steps=1,
                              bf16=True, optim=optimizer, **on_gpu, **options)  # fmt: skip
        return SalsaPPOTrainer(
            model,
            args=args,
            train_dataset=PROMPTS,
            references=["soup", "base"],
            reward_funcs=length_reward,
            processing_class=tokenizer,
        )

    def frozen(of: SalsaPPOTrainer) -> dict[str, torch.Tensor]:
        named = [*of.model.named_parameters(), *of.model.named_buffers()]
        scales = [(f"{name}.scales", tensor.quant_state.absmax) for name, tensor in named if hasattr(tensor, "quant_state")]  # fmt: skip
        assert scales
        return {name: tensor.detach().clone() for name, tensor in [*named, *scales] if not tensor.requires_grad}

    first = trainer(max_steps=2)
    before = frozen(first)
    first.train()
    after = frozen(first)
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {p.dtype for p in adapters.parameters(first.model.policy, "policy")} == {torch.float32}
    assert figures(tmp_path / "run")[0]["val/ratio"] == pytest.approx(
        1, abs=1e-2
    )  # other 4-bit kernels without a gradient
    second = trainer(max_steps=3)
    second.train(resume_from_checkpoint=True)
    assert second.ppo.update == 3 and [row["update"] for row in figures(tmp_path / "run")] == [1, 2, 3]


# runs and soups


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_the_whole_recipe(mode: str, tmp_path: Path, card: Any) -> None:
    """From seeds to report, landscape and merged policy included; its peak on the card is in the manifests."""
    from small_recipe import read, unit

    if mode == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    launch(words_of(tmp_path / "run", "--debug", *([] if mode == "full" else ["--lora", mode])))
    manifest = read(unit(tmp_path / "run", "ppo/salsa") / "manifest.json")
    assert (manifest["gpu_peak_mb"] is not None) == card.counts
    assert read(unit(tmp_path / "run", "landscape") / "landscape.json")["lines"]
    assert (unit(tmp_path / "run", "ppo/salsa") / "merged").is_dir() == (mode != "full")


class Terminate(TrainerCallback):
    """SIGTERM to this process in an optimizer step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("full", [False, True])
def test_sigterm_saves_and_the_run_goes_on(
    make_trainer: Any, on_gpu: dict[str, Any], tmp_path: Path, full: bool
) -> None:
    """The interrupted run's figures are those of one that nothing disturbed."""
    options = {"full": full, "max_steps": 8, "num_ppo_epochs": 2, "num_train_epochs": 2, **on_gpu}
    make_trainer(folder=tmp_path / "whole", **options).train()
    with pytest.raises(SystemExit) as ended:
        make_trainer(folder=tmp_path / "broken", callbacks=[Terminate()], **options).train()
    assert ended.value.code == 143 and len(list((tmp_path / "broken").glob("checkpoint-*"))) == 1
    make_trainer(folder=tmp_path / "broken", **options).train(resume_from_checkpoint=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_an_adapter_merges_as_peft_merges_it(make_base: Any, make_adapter: Any, device: torch.device) -> None:
    """On the card, in bf16: what vLLM is given. The base that all roles share keeps its bytes."""
    from salsa_peft.models.adapters.merged import merged_parameters

    model = make_adapter(make_adapter(make_base().to(device, torch.bfloat16), "policy", 1), "soup", 2)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    found = {name: tensor.clone() for name, tensor in merged_parameters(model, "policy")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    expected = dict(copy.deepcopy(model).merge_and_unload(adapter_names=["policy"]).named_parameters())
    assert list(found) == list(expected) and {tensor.device.type for tensor in found.values()} == {device.type}
    assert all(torch.equal(found[name], expected[name]) for name in found)


MEASURE = """
import torch

def logit(model):
    return model(input_ids=torch.tensor([[3, 4, 5]], device=model.device)).logits[0, -1, 7]
"""


@pytest.mark.parametrize("kind", ["a", "c"], ids=["adapters", "checkpoints"])
def test_a_landscape_is_a_cpus(
    make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, device: torch.device, kind: str
) -> None:
    """`salsa landscape` moves a model on the card to the points that a CPU computes from the members' weights."""
    from salsa_peft.cli import landscape as landscape_command

    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    merged = []
    for seed in range(2):
        model = make_adapter(make_base(), "default", seed)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / f"a{seed}")
        merged.append(model.merge_and_unload())
        merged[-1].save_pretrained(tmp_path / f"c{seed}")
        tokenizer.save_pretrained(tmp_path / f"c{seed}")
    (tmp_path / f"logit_of_{kind}.py").write_text(MEASURE)
    members = [str(tmp_path / f"{kind}{seed}") for seed in range(2)]
    words = [str(tmp_path / "out"), *members, "--measure", f"{tmp_path}/logit_of_{kind}:logit", "--alphas=0,0.25,1"]
    assert landscape_command.main(words) == 0
    points = json.loads((tmp_path / "out" / "landscape.json").read_text())["lines"][0]["points"]
    middle = copy.deepcopy(merged[0])
    tolerance = 1e-4 if device.type == "cpu" else 0.15  # bf16 on CUDA
    for point in points:
        with torch.no_grad():
            for weight, *ends in zip(*(model.parameters() for model in (middle, *merged)), strict=True):
                weight.copy_((1 - point["at"]) * ends[0] + point["at"] * ends[1])
            expected = middle(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1, 7].item()
        assert point["scores"]["logit"]["mean"] == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_two_processes(how: str, tmp_path: Path, gpus: list[str], card: Any) -> None:
    """The recipe by `accelerate launch`, a GPU each; on a CPU ddp alone, by gloo."""
    if card.counts or how != "ddp":
        if len(gpus) < 2:
            pytest.skip("needs two GPUs")
        if how == "zero3":
            pytest.importorskip("deepspeed", reason="needs deepspeed")
    less = {
        "policies": {"salsa": {"reference": "soup"}},
        "landscape.plane": None,
        "sft.seeds": [0, 1],
        "evaluate.models": ["base"],
    }
    words = words_of(tmp_path / "run", num_processes=2, accelerate=how, **less)
    launch(words, CUDA_VISIBLE_DEVICES=",".join(gpus[:2]))
    assert (tmp_path / "run" / "report.html").is_file()

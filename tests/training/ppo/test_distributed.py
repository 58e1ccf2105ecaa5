"""accelerate launch with the configurations of recipes/accelerate on two CPU processes (gloo): the same as one process with the same
global batch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_run
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.checks import check_sharding
from salsa_peft.utils.errors import SalsaError

CONFIGS = ROOT / "recipes" / "accelerate"
PLAIN = {"rollout_backend": "hf", "rollout_compile": False, "micro_batch_tokens": None, "value_warmup_updates": 0}
"""Options that sharded weights allow."""


@contextlib.contextmanager
def launched(config: str, out: Path, *names: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes that make the runs `names` in `out`, under recipes/accelerate/<config>.yaml; ended with the context at the latest.
    DeepSpeed builds an operation of its own for CPUs when it first runs: two minutes."""
    if config == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    distributed_run.write_reference(out)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += [
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(SUPPORT / "distributed_run.py"),
        str(out),
        *names,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it kills the two after 30 s
            process.communicate(timeout=60)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a launch that must come to its end."""
    output, _ = process.communicate(timeout=500)
    errors = [line for line in output.splitlines() if line.startswith("[rank")]
    assert process.returncode == 0, "\n".join(errors[-60:]) or output[-3000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process gives: name → its folder. Made when first asked for."""
    out = tmp_path_factory.mktemp("one")
    distributed_run.write_reference(out)

    def get(name: str) -> Path:
        if not (out / name).exists():
            distributed_run.run(name, out)
        return out / name

    return get


@pytest.fixture(scope="module")
def reward(one: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for two processes that holds a reward adapter, as the one process's does."""
    from tiny import make_adapter, make_base

    out = tmp_path_factory.mktemp("two")
    model = make_adapter(make_base(distributed_run.make_tokenizer()), "reward", 9)
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(5)) * 0.3
    for folder in (out, one("lora").parent):
        adapters.save(model, "reward", folder / "reward", extra={SCORE_HEAD: head})
    return out


def rows(folder: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_equal(one: Path, two: Path, kind: str) -> None:
    """Losses and figures to 1e-5, the very same responses, weights to Adam's amplification of rounding; and that it was two processes."""
    world, alone = (json.loads((folder / "world.json").read_text()) for folder in (two, one))
    weights, expected = load_file(two / "weights.safetensors"), load_file(one / "weights.safetensors")
    assert alone["kind"] == "NO" and world["kind"] == kind and len(world["held"]) == 2
    (whole,) = alone["held"]
    if kind == "MULTI_CPU":
        assert world["held"] == [whole, whole]
    else:  # ZeRO-3 makes the pieces of a weight equally large
        assert sum(world["held"]) == pytest.approx(whole, rel=1e-3) and whole > 1.5 * max(world["held"])
    assert world["pieces"] == (3 if kind == "FSDP" else 0)  # two layers, and what is in none
    assert len(rows(one)) == len(rows(two)) == 2
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for name in ("completions.jsonl", "eval_completions.jsonl"):
        assert (one / name).exists() == (two / name).exists()
        texts = [
            [json.loads(line)["response"] for line in (f / name).read_text().splitlines()]
            for f in (one, two)
            if (f / name).exists()
        ]
        assert texts == [] or (texts[0] == texts[1] and len(texts[0]) > 0)
    assert weights.keys() == expected.keys() and len(weights) > 20
    for name, tensor in expected.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    saved = [checkpoints.checkpoints(folder) for folder in (one, two)]
    assert [path.name for path in saved[0]] == [path.name for path in saved[1]] != []
    assert [checkpoints.fault(path) for path in saved[1]] == [None] * len(saved[1])
    files = [{p.relative_to(f).as_posix() for p in (f / "saved").rglob("*") if p.is_file()} for f in (one, two)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys()
            assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-4) for key in a), name


def check_resumed(out: Path) -> None:
    """A run from the middle of its first update ends as the unbroken one, to the bit; and from its end it is saved as it was."""
    for name in ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl"):
        assert (out / "lora" / name).read_bytes() == (out / "lora+resumed" / name).read_bytes(), name
    a, b = (load_file(out / name / "weights.safetensors") for name in ("lora", "lora+resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in (adapters.WEIGHTS, "value_head.safetensors"):
        a, b = (load_file(out / "lora+resumed" / folder / name) for folder in ("saved", "ended"))
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_give_what_one_gives(one: Any, tmp_path: Path) -> None:
    """DDP and FSDP2, adapters and full weights: accumulation, whitened rewards, scaled scores, checkpointed activations, an eval set,
    recorded log-probs, an update stopped by target_kl; and one once more from the middle of an update. Of FSDP2's two processes each
    holds a part of the weights, of frozen ones too."""
    with launched("fsdp2", tmp_path, "lora", "lora+resumed", "full", "fsdp2/lora", "fsdp2/full") as two:
        expected = {name: one(name) for name in ("lora", "full")}
        finish(two)
    for name, alone in expected.items():
        check_equal(alone, tmp_path / name, "MULTI_CPU")
        check_equal(alone, tmp_path / "fsdp2" / name, "FSDP")
    check_resumed(tmp_path)
    assert rows(expected["full"])[0]["policy/approxkl_avg"] > 1.5 * 2e-3  # or target_kl stopped nothing


@pytest.mark.timeout(600)
def test_zero3_gives_what_one_process_gives(one: Any, tmp_path: Path) -> None:
    """The same of DeepSpeed, where it is installed."""
    with launched("zero3", tmp_path, "zero3/lora", "zero3/lora+resumed", "zero3/full") as two:
        expected = {name: one(name) for name in ("lora", "full")}
        finish(two)
    for name, alone in expected.items():
        check_equal(alone, tmp_path / "zero3" / name, "DEEPSPEED")
    check_resumed(tmp_path / "zero3")
    pieces = [path.stat().st_size for path in (tmp_path / "zero3" / "lora" / "checkpoint-8").rglob("*model_states.pt")]
    assert len(pieces) == 2 and max(pieces) < 80_000  # of the frozen weights none


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("config", "prefix", "kind"),
    [("ddp", "", "MULTI_CPU"), ("fsdp2", "fsdp2/", "FSDP"), ("zero3", "zero3/", "DEEPSPEED")],
)
def test_tied_embeddings_a_value_adapter_and_a_resumed_run(
    one: Any, reward: Path, config: str, prefix: str, kind: str
) -> None:
    """The engine's other kinds, each configuration by itself."""
    with launched(config, reward, *(prefix + name for name in ("tied", "value", "lora", "lora+resumed"))) as two:
        finish(two)
    for name in ("tied", "value", "lora"):
        check_equal(one(name), reward / prefix / name, kind)
    check_resumed(reward / prefix)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_that_make_different_numbers_of_forward_passes(one: Any, tmp_path: Path) -> None:
    """DDP, with the rows of a micro-batch split by tokens: the gradients of all processes are added up once a step. And a run
    without a critic, whose groups two processes sample together; and one whose critic trains first."""
    with launched("ddp", tmp_path, "split", "group", "warmup") as two:
        expected, grouped, warmed = one("split"), one("group"), one("warmup")
        finish(two)
    check_equal(grouped, tmp_path / "group", "MULTI_CPU")
    check_equal(warmed, tmp_path / "warmup", "MULTI_CPU")
    first, second = json.loads((tmp_path / "split" / "world.json").read_text())["forwards"]
    assert first != second and min(first, second) > 0
    check_equal(expected, tmp_path / "split", "MULTI_CPU")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("config", "name", "to"),
    [("ddp", "long", "all"), ("ddp", "long", "one"), ("fsdp2", "fsdp2/long", "one"), ("zero3", "zero3/long", "one")],
)
def test_sigterm_leaves_a_whole_checkpoint(tmp_path: Path, config: str, name: str, to: str) -> None:
    """To the launcher, which hands it on, waits 30 s and ends with 1; or to the second process alone. It comes in a rollout most likely,
    which all processes break off."""
    folder = tmp_path / name
    with launched(config, tmp_path, name) as process:
        while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(rows(folder)) >= 2):
            time.sleep(0.1)
        os.kill(process.pid if to == "all" else int((folder / "pid-1").read_text()), signal.SIGTERM)
        output, _ = process.communicate(timeout=25)
    assert process.returncode == 1, output[-3000:]
    found, passed = checkpoints.last_complete(folder)
    assert found is not None and not passed
    assert to == "all" or "exitcode  : 143" in output


def test_the_configurations_are_accelerates() -> None:
    """No key that it does not know, and eight processes unless told otherwise."""
    found = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    assert {name: config.distributed_type for name, config in found.items()} == {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "zero3": DistributedType.DEEPSPEED,
    }
    for config in found.values():
        assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "no")


def sharded(**options: Any) -> Any:
    """An accelerator with an FSDP plugin, as its `state` shows it."""
    settings = {
        "fsdp_version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "activation_checkpointing": False,
    }
    plugin = FullyShardedDataParallelPlugin(**(settings | options))
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, {}, "fsdp_version: 1 is not supported, only 2"),
        (
            {"state_dict_type": "SHARDED_STATE_DICT"},
            {},
            "fsdp_state_dict_type: SHARDED_STATE_DICT is not supported; set FULL_STATE_DICT",
        ),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading: true is not supported"),
        (
            {"activation_checkpointing": True},
            {},
            "fsdp_activation_checkpointing: .*set it to false, and gradient_checkpointing=True",
        ),
        ({}, {"rollout_backend": "vllm"}, "rollout_backend: vllm does not work with sharded weights"),
        ({}, {"rollout_compile": True}, "rollout_backend: hf, compiled, does not work with sharded weights"),
        ({}, {"value_warmup_updates": 2}, "value_warmup_updates: 2 does not work with sharded weights"),
        ({}, {"micro_batch_tokens": 64}, "micro_batch_tokens: 64 does not work with sharded weights"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, before anything is sharded."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it for Transformers
    given: Any = SimpleNamespace(**(PLAIN | arguments))
    with pytest.raises(SalsaError, match=message):
        check_sharding(sharded(**options), given)


def test_fsdp2_adds_up_gradients_in_float32_and_leaves_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own policy of bf16 would give values in bf16."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    accelerator, given = sharded(), SimpleNamespace(**PLAIN)
    check_sharding(accelerator, given)  # type: ignore[arg-type]
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None
    accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    check_sharding(accelerator, given)  # type: ignore[arg-type]
    assert accelerator.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def deepspeed(precision: str = "no", more: dict[str, Any] | None = None, **options: Any) -> Any:
    """An accelerator with a DeepSpeed plugin, as its `state` shows it. more: of DeepSpeed's own configuration."""
    plugin = DeepSpeedPlugin(**({"zero_stage": 3, "zero3_save_16bit_model": True} | options))
    plugin.set_mixed_precision(precision)
    plugin.deepspeed_config.update(more or {})
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"zero_stage": 2}, {}, "zero_stage: 2 is not supported, only 3"),
        ({"zero3_save_16bit_model": False}, {}, "zero3_save_16bit_model: false is not supported; set it to true"),
        ({"offload_optimizer_device": "cpu"}, {}, "offload_optimizer_device: cpu is not supported"),
        ({"offload_param_device": "cpu"}, {}, "offload_param_device: cpu is not supported"),
        ({"precision": "fp16"}, {}, "fp16: true is not supported with DeepSpeed"),
        ({"more": {"optimizer": {"type": "Adam"}}}, {}, "optimizer: remove it from DeepSpeed's configuration"),
        ({"more": {"scheduler": {"type": "WarmupLR"}}}, {}, "scheduler: remove it from DeepSpeed's configuration"),
        ({}, {"rollout_backend": "vllm"}, "rollout_backend: vllm does not work with sharded weights"),
    ],
)
def test_what_is_refused_of_deepspeed(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    """One line each, before anything is sharded; and what is not adds up gradients in float32."""
    given: Any = SimpleNamespace(**(PLAIN | arguments))
    with pytest.raises(SalsaError, match=message):
        check_sharding(deepspeed(**options), given)
    accelerator = deepspeed("bf16")
    check_sharding(accelerator, SimpleNamespace(**PLAIN))  # type: ignore[arg-type]
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert (config["communication_data_type"], config["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})

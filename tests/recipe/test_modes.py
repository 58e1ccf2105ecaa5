"""The whole recipe in every mode, on a tiny model of each of the paper's architectures: full weights, LoRA, QLoRA."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paper_models import CONFIGS, SIZES, make_base
from safetensors.torch import load_file
from small_recipe import SMALL, read, unit

from salsa_peft.data.toy import make_tokenizer
from salsa_peft.models import stage_context
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.recipe.__main__ import main as salsa_run

LESS = {"toy.pretrain_steps": 1, "toy.pretrain_examples": 64, "landscape.plane": None}


@pytest.fixture
def whole(inline: None, tmp_path: Path) -> Callable[..., Path]:
    """A finished run of the quickstart, cut small, with a base of one's own."""

    def make(kind: str, *words: str) -> Path:
        base, folder = make_base(kind, tmp_path / "base"), tmp_path / "run"
        given = SMALL | LESS | {"model.base": str(base)}
        sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        assert salsa_run(["quickstart", *sets, "--output-dir", str(folder), *words]) == 0
        return folder

    return make


def first_kl(folder: Path, policy: str) -> float:
    """The KL of a policy's first update."""
    return json.loads((unit(folder, f"ppo/{policy}") / "metrics.jsonl").read_text().splitlines()[0])["objective/kl"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], name: str) -> float:
    """Of a tensor in two checkpoints."""
    return (one[name] - other[name]).norm().item()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_what_full_weights_a_reference_and_a_point_have(tmp_path: Path, kind: str) -> None:
    """base + Σ w δ, also where Σ w is not 1: read from checkpoints, for a reference and on the landscape."""
    from transformers import AutoModelForCausalLM

    from salsa_peft.config.references import parse_reference
    from salsa_peft.config.schema import Recipe
    from salsa_peft.evaluation.landscape import adjustable_model
    from salsa_peft.models.stage_context import StageContext
    from salsa_peft.training.references import load_reference

    base = make_base(kind, tmp_path / "base")
    inputs = {f"sft/seed-{number}": tmp_path / f"seed-{number}" for number in (0, 1)}
    for number, folder in enumerate(inputs.values()):
        torch.manual_seed(number + 1)
        model = AutoModelForCausalLM.from_pretrained(base)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    origin, *seeds = (load_file(folder / "model.safetensors") for folder in (base, *inputs.values()))
    inputs["soup"] = inputs["sft/seed-1"]  # whatever the soup stage left there
    context = StageContext(Recipe(name="a"), base, "base", make_tokenizer())
    model = context.load_base()

    def check(weights: list[float]) -> None:
        for name, tensor in model.named_parameters():
            expected = origin[name] + sum(
                w * (seed[name] - origin[name]) for w, seed in zip(weights, seeds, strict=True)
            )
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)

    for said, weights in (
        ("seed-1", [0.0, 1.0]), ("base", [0.0, 0.0]), ({"shrunk": {"seed": 0, "scale": 0.6}}, [0.6, 0.0]),
        ({"soup": {"members": [0, 1], "weights": [0.25, 0.75]}}, [0.25, 0.75]), (str(tmp_path / "seed-0"), [1.0, 0.0]),
        ("soup", [0.0, 1.0]),
    ):  # fmt: skip
        load_reference(model, parse_reference("reference", said)[0], context, inputs)
        check(weights)

    def norm(weights: list[float]) -> float:
        sums = (
            sum(w * (seed[name] - origin[name]).double() for w, seed in zip(weights, seeds, strict=True))
            for name in origin
        )
        return sum(float(total.square().sum()) for total in sums) ** 0.5

    mixed = norm([0.0, 1.0]) / norm([0.25, 0.75])
    for said, weights in (  # the soup's folder holds seed-1
        ({"shrunk": {"seed": 0, "scale": "soup-norm"}}, [norm([0.0, 1.0]) / norm([1.0, 0.0]), 0.0]),
        ({"stretched": {}}, [0.0, norm([1.0, 0.0]) / norm([0.0, 1.0])]),
        ({"stretched": {"soup": {"weights": [0.25, 0.75]}, "seed": 1}}, [0.25 * mixed, 0.75 * mixed]),
    ):  # fmt: skip
        load_reference(model, parse_reference("reference", said)[0], context, inputs)
        check(weights)
    model, adapter, move, measure = adjustable_model(context, [inputs["sft/seed-0"], inputs["sft/seed-1"]], ["a", "b"])
    assert adapter is None
    assert measure([0.5, 0.5]) == pytest.approx(norm([0.5, 0.5]), rel=1e-5)
    assert measure([1.0, 0.0]) == pytest.approx(norm([1.0, 0.0]), rel=1e-5)
    for weights in ([0.6, 0.0], [-0.5, 1.5], [0.5, 0.5]):
        move(weights)
        check(weights)


@pytest.mark.parametrize(
    "kind", ["mistral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS if kind != "mistral")]
)
def test_full_weights(whole: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """From seeds to report: the soup is the average of the seeds' checkpoints, the references are what they are called."""
    folder = whole(kind, "--set", "sft.learning_rate=1e-3", "--set", "ppo.learning_rate=1e-4")
    weights = [load_file(unit(folder, f"sft/seed-{n}") / "model.safetensors") for n in (0, 1)]
    soup, base = (
        load_file(unit(folder, "soup") / "model.safetensors"),
        load_file(tmp_path / "base" / "model.safetensors"),
    )
    assert soup.keys() == weights[0].keys() == base.keys()
    for name, tensor in soup.items():
        exact = (weights[0][name].double() + weights[1][name].double()) / 2
        torch.testing.assert_close(tensor.double(), exact, atol=1e-7, rtol=1e-6)
    moved = {name: (weights[0][name] - base[name]).norm().item() for name in base}
    assert min(moved.values()) > 0, "a weight that no seed trained"
    # the policy starts at seed-0: no KL to it, some to the soup and to several
    assert abs(first_kl(folder, "ppo")) < 1e-4
    assert abs(first_kl(folder, "salsa")) > 1e-3 and abs(first_kl(folder, "mkl")) > 1e-3
    policy = load_file(unit(folder, "ppo/salsa") / "model.safetensors")
    assert any((policy[name] - weights[0][name]).abs().max() > 1e-5 for name in policy)
    assert "full weights" in (unit(folder, "report") / "report.md").read_text()
    # a seed and the soup answer as they do on the landscape's line, where they are read from the seeds' checkpoints
    line = {
        point["at"]: point["scores"]
        for point in read(unit(folder, "landscape") / "landscape.json")["lines"][0]["points"]
    }
    answered = read(unit(folder, "evaluate") / "evaluation.json")["datasets"]["in"]["models"]
    for place, name in ((0.0, "seed-0"), (0.5, "soup"), (1.0, "seed-1")):
        assert line[place]["gold"] == answered[name]["scores"]["gold"]
    assert answered["ppo"] != answered["base"], "the policy answers with the weights that were in the model before"
    reward = load_file(unit(folder, "reward") / "model.safetensors")
    assert reward["score.weight"].shape == (1, SIZES["hidden_size"])
    assert all(
        distance(reward, weights[0], name) < distance(reward, base, name) / 2 for name in reward if "_proj" in name
    )


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistral", "gemma")]
)  # Llama's is test_pipeline.py
def test_lora(whole: Callable[..., Path], kind: str) -> None:
    """The same recipe with adapters."""
    folder = whole(kind, "--lora")
    assert abs(first_kl(folder, "ppo")) < 1e-4
    assert read(unit(folder, "evaluate") / "evaluation.json")["models"]
    assert "LoRA" in (unit(folder, "report") / "report.md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which has the 4-bit base"
)
def test_qlora(whole: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """All roles on one base in 4 bits: adapters in float32 that bf16 does not hold, the paged optimizer said to be another here, and a
    merged policy in the base's own precision."""
    folder = whole("llama", "--lora", "qlora", "--set", "landscape.line=[0, 1]")
    for name in ("sft/seed-0", "reward", "soup", "ppo/salsa"):
        tensors = load_file(unit(folder, name) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert any((tensor != tensor.bfloat16().float()).any() for key, tensor in tensors.items() if "lora_B" in key), (
            name
        )
    assert abs(first_kl(folder, "ppo")) < 1e-4
    assert "needs a CUDA device, which this machine lacks; adamw_torch_fused is used instead" in capsys.readouterr().err
    merged = load_file(unit(folder, "ppo/salsa") / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_the_reward_model_of_qlora_starts_at_seed_0(tmp_path: Path) -> None:
    """To the bit: TRL's cast to bf16, which rounds the adapter that was copied, is undone."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which has the 4-bit base")
    from peft import get_peft_model

    from salsa_peft.config.schema import Adapter, Model
    from salsa_peft.models.base import load_base
    from salsa_peft.models.precision import make_trained_float32
    from salsa_peft.training.reward_model import copy_adapter

    folder = make_base("llama", tmp_path / "base")
    model = load_base(str(folder), Model(quantization="nf4"), make_tokenizer())
    assert (
        type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit" and type(model.lm_head) is torch.nn.Linear
    )
    peft = get_peft_model(model, adapters.lora_config(Adapter(r=4)), adapter_name="default")
    for parameter in adapters.parameters(peft, "default"):
        torch.nn.init.normal_(parameter)
    adapters.save(peft, "default", tmp_path / "seed-0")
    saved = adapters.read(tmp_path / "seed-0")[1]
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    make_trained_float32(peft)
    copy_adapter(peft, tmp_path / "seed-0")
    adapters.save(peft, "default", tmp_path / "again")
    again = adapters.read(tmp_path / "again")[1]
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize(
    "lora",
    [
        "lora",
        pytest.param(
            "qlora", marks=[pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")]
        ),
    ],
)  # fmt: skip
def test_adapters_and_heads_on_a_bf16_base_are_float32(whole: Callable[..., Path], lora: str) -> None:
    """In what every stage saves: factors, score heads, their average and value heads, with digits that bf16 does not hold."""
    policies = {"ppo": {"reference": "seed-0"}, "dpo": {"reference": "soup", "algorithm": "dpo"}}
    given = {"model.dtype": "bfloat16", "reward.seeds": [0, 1], "policies": policies, "landscape": None, "export": []}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    folder = whole("llama", *words, "--lora", lora, "--stages", "toy,data,sft,reward,reward_quality,soup,ppo,dpo")
    assert abs(first_kl(folder, "ppo")) == 0
    files = {
        str(file.relative_to(folder)): load_file(file)
        for stage in ("sft", "reward", "soup", "ppo", "dpo")
        for name in ("adapter_model", "value_head")
        for file in (folder / "stages" / stage).rglob(f"{name}.safetensors")
        if "checkpoint-" not in str(file)
    }
    assert len(files) == 3 + 3 + 1 + 2 + 1, "seeds; two reward models and their average; the soup; PPO's policy; DPO's"
    for where, tensors in files.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32, (where, name)
            if "lora_B" in name or "score" in name:  # A is drawn in bf16, and may have no step with a gradient
                assert (tensor != tensor.bfloat16().float()).any(), (where, name)
    assert sum(name.endswith("score.weight") for tensors in files.values() for name in tensors) == 3


def test_local_fetches_a_checkpoint_with_full_weights_and_an_adapter_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub id as a reference: which of its files come."""
    import huggingface_hub

    from salsa_peft.config.schema import Adapter, Recipe

    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda path, allow_patterns, **_: asked.append(allow_patterns) or "/x"
    )
    stage_context.reference_folder(Recipe(name="a"), "someone/model")
    stage_context.reference_folder(Recipe(name="a", adapter=Adapter()), "someone/adapter")
    assert "*.safetensors" in asked[0] and "adapter_model.safetensors" in asked[1]


def test_full_weights_are_saved_in_the_bases_dtype(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Trained as float32 masters, kept in bf16: seeds, reward model, soup and policies, each moved from what it started from."""
    words = [
        "model.dtype=bfloat16",
        "sft.learning_rate=1e-3",
        "reward.learning_rate=1e-3",
        "ppo.learning_rate=1e-3",
        "landscape=null",
    ]
    stages = ["--stages", "toy,data,sft,reward,reward_quality,soup,ppo/salsa"]
    folder = whole("llama", *(part for word in words for part in ("--set", word)), *stages)
    found = {
        name: load_file(unit(folder, name) / "model.safetensors")
        for name in ("sft/seed-0", "reward", "soup", "ppo/salsa")
    }
    heads = [tensors.pop("score.weight") for name, tensors in found.items() if name == "reward"]
    assert [head.dtype for head in heads] == [torch.float32] and (heads[0] != heads[0].bfloat16().float()).any()
    assert {tensor.dtype for tensors in found.values() for tensor in tensors.values()} == {torch.bfloat16}
    assert read(unit(folder, "ppo/salsa") / "config.json")["dtype"] == "bfloat16"
    assert load_file(unit(folder, "ppo/salsa") / "value_head.safetensors")["weight"].dtype == torch.float32
    name = "model.layers.0.mlp.up_proj.weight"
    base = load_file(tmp_path / "base" / "model.safetensors")[name].bfloat16()
    start = found["sft/seed-0"][name]
    assert (
        (start != base).any() and (found["reward"][name] != start).any() and (found["ppo/salsa"][name] != start).any()
    )

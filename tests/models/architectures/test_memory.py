"""What a recipe needs of a GPU: counted by hand, held against Transformers and PEFT, and the advice that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paper_models import paper
from peft import LoraConfig, get_peft_model

from salsa_peft.config.load import load_recipe
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.memory import GIB, Estimate, choose_precision, estimate
from salsa_peft.models.architectures.sizes import KNOWN, Architecture, architecture_of_recipe

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 70,
}  # fmt: skip
LLAMA, MISTRAL, GEMMA = KNOWN
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{base: (config["model_type"].capitalize(), config) for base, config in KNOWN.items()},
    "llama": ("Llama", SMALL), "llama tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama biases": ("Llama", SMALL | {"attention_bias": True}), "mistral": ("Mistral", SMALL), "gemma": ("Gemma", SMALL | {"head_dim": 32}),
    "qwen2": ("Qwen2", SMALL), "qwen3": ("Qwen3", SMALL | {"head_dim": 32}),
}  # fmt: skip


def meta(name: str) -> tuple[Any, Architecture]:
    """A model of the architecture without memory, and what is counted of its configuration."""
    kind, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{kind}Config")(
        **{key: value for key, value in sizes.items() if key != "model_type"}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model, Architecture.of(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    """All, in linear layers, the largest, the cache of a token."""
    model, size = meta(name)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert size.in_linears == sum(module.weight.numel() for module in linear)
    assert size.head == (0 if model.config.tie_word_embeddings else model.lm_head.weight.numel())
    assert size.largest == max(parameter.numel() for parameter in model.parameters())
    keys = model.model.layers[0].self_attn.k_proj.weight.shape[0]
    assert size.kv_per_token == 2 * len(model.model.layers) * keys


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapters_parameters_are_those_that_peft_makes(modules: Any) -> None:
    """Of every linear layer, or of those named."""
    model, size = meta("gemma")
    with torch.device("meta"):
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    assert size.adapter(4, modules) == sum(p.numel() for p in peft.parameters() if p.requires_grad)


def test_the_papers_bases_need_no_access() -> None:
    """Their sizes are known; a local folder's own config.json goes before, and what is not at hand is said to be so."""
    assert round(paper("llama2_full")[1].parameters / 1e9, 2) == 6.74
    assert round(paper("mistral_full")[1].parameters / 1e9, 2) == 7.24
    assert round(paper("gemma_full")[1].parameters / 1e9, 2) == 2.51
    unknown = load_recipe("llama2_full", lora=None, overrides=["model.base=someone/unknown"]).recipe
    assert architecture_of_recipe(unknown) is None
    small = load_recipe("quickstart", lora=None, overrides=["toy.hidden_size=32"]).recipe
    assert architecture_of_recipe(small).hidden == 32  # type: ignore[union-attr]


def test_weights_of_each_mode_by_hand() -> None:
    """Of ppo with one reference and a reward model of Llama-2-7B: three models; or one base, and adapters of 40.0 M in float32."""
    full, size = paper("llama2_full", None, "precision=stochastic")
    found = estimate(full, "ppo", size)
    assert found.weights == 2 * (3 * size.parameters - size.head)  # a reward model has no output embeddings
    assert found.gradients == 2 * size.parameters and found.phase == "step"
    assert found.optimizer == pytest.approx(size.parameters * (2 + 8 / 256) + 12 * size.largest)
    master = estimate(paper("llama2_full", None, "precision=master")[0], "sft", size)
    # the input embeddings are in no product, so autocast makes no copy of them
    assert master.weights == (4 + 2) * size.parameters - 2 * 32_000 * 4096 and (master.gradients, master.optimizer) == (
        4 * size.parameters,
        8 * size.parameters,
    )
    lora, _ = paper("llama2_full", "lora")
    adapter = size.adapter(16, "all-linear")
    assert adapter == 39_976_960
    one = memory._Stage(lora, "ppo", size, "master").held("train")
    assert one == (
        2 * size.parameters + 4 * adapter * (1 + 2 + 1),
        4 * adapter,
        8 * adapter,
    )  # policy, soup of two, reward
    several, mistral = paper("mistral_mkl")  # beside a soup of two, which is one model
    assert len(memory._Stage(several, "ppo", mistral, "stochastic").roles()[0]) == 2 + 1
    several, _ = paper("mistral_mkl", "lora")
    assert memory._Stage(several, "ppo", size, "master").roles()[1] == 2 * size.parameters, (
        "a second reference, a second base"
    )
    quantised = memory._Stage(paper("llama2_full", "qlora")[0], "ppo", size, "master").base()
    rest = size.parameters - size.in_linears
    assert quantised == pytest.approx(size.in_linears * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * rest)


def test_nf4_takes_what_bitsandbytes_takes() -> None:
    """Bytes of a quantised layer and its scales."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which has the 4-bit base")
    for name, double in (("nf4", False), ("nf4-double", True)):
        packed, state = bnb.functional.quantize_4bit(
            torch.randn(512, 1024), quant_type="nf4", compress_statistics=double
        )
        held = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
        assert held == pytest.approx(memory.NF4[name] * 512 * 1024, rel=1e-3)


def test_activations_are_what_autograd_keeps() -> None:
    """Bytes that a tiny bf16 Llama's forward saves for its backward, weights left out: within 10%, with and without checkpointing."""
    config = transformers.LlamaConfig(**SMALL | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6})
    model = transformers.LlamaForCausalLM(config).bfloat16().train()
    size = Architecture.of(json.loads(config.to_json_string(use_diff=False)))
    full, _ = paper("llama2_full", None, "precision=stochastic")
    stage, tokens = memory._Stage(full, "sft", size, "stochastic"), 4 * 256
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def kept(checkpointing: bool) -> int:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = model.model(input_ids=torch.randint(70, (4, 256)), use_cache=False)[0]
        assert states.requires_grad
        return sum(seen.values())

    for checkpointing in (False, True):
        assert stage.activations(tokens, checkpointing) == pytest.approx(kept(checkpointing), rel=0.1), checkpointing


def test_a_phase_and_an_option_cost_what_they_should() -> None:
    """Generation has the cache and no gradients; checkpointing, smaller batches, offloading and more cards make less."""
    full, size = paper("llama2_full", None, "precision=stochastic")
    phases = {one.phase: one for one in memory._Stage(full, "ppo", size, "stochastic").phases()}
    assert set(phases) == {"generate", "score", "train", "step"}
    assert phases["generate"].kv_cache == 2 * (2 * 32 * 4096) * 8 * 2048 and phases["generate"].gradients == 0
    assert phases["train"].gradients > 0 and phases["train"].kv_cache == 0

    def total(*overrides: str, lora: str | None = None) -> float:
        return estimate(paper("llama2_full", lora, *overrides)[0], "ppo", size).total

    offloaded = memory._Stage(paper("llama2_full", None, "offload=frozen")[0], "ppo", size, "stochastic")
    models = {phase: offloaded.held(phase)[0] / (2 * size.parameters) for phase in ("generate", "score", "train")}
    assert models == {"generate": 1, "score": 2, "train": 1}  # the policy, and one frozen model at a time
    assert total("precision=stochastic", "offload=frozen") < total("precision=stochastic")
    assert total(lora="qlora") < total(lora="lora") < total("precision=stochastic") < total("precision=master")
    more = "ppo.gradient_checkpointing=false"
    assert total(more, "ppo.micro_batch_size=8", lora="lora") > total(more, lora="lora") > total(lora="lora")
    assert total("precision=master", "num_processes=4", "accelerate=fsdp2") < total("precision=master")
    stage = {kind: memory._Stage(full, "ppo", size, kind) for kind in ("master", "stochastic")}
    layers = {kind: one.activations(100, True) for kind, one in stage.items()}
    assert layers["master"] == layers["stochastic"]  # float32 weights, but layers' inputs in bf16
    ddp = memory._Stage(paper("llama2_full", None, "num_processes=2")[0], "ppo", size, "stochastic")
    assert ddp.held("train")[1] == 2 * stage["stochastic"].held("train")[1]  # buckets beside the gradients
    lora = paper("llama2_full", "lora")[0]
    pair, one = (memory._Stage(lora, name, size, "master").phases()[0] for name in ("reward", "sft"))
    assert pair.activations == 2 * (
        one.activations + one.logits
    )  # chosen and rejected; a layer made anew is more than logits
    quantised = memory._Stage(paper("llama2_full", "qlora")[0], "sft", size, "master")
    assert quantised.forward(0) == 2 * 4096 * 11008  # the largest layer out of its 4 bits
    assert memory._Stage(lora, "ppo", size, "master").phases()[0].logits == 8 * 4 * 8 * 32000
    mistral, other = paper("mistral_full", "lora")
    cache = memory._Stage(mistral, "ppo", other, "master").phases()[0].kv_cache
    assert cache * 4 == phases["generate"].kv_cache  # 8 heads of 32


def test_what_the_papers_jobs_need() -> None:
    """7B: LoRA in 24 GiB, QLoRA in 16, full weights with reference and reward in 80, float32 masters not."""
    size = paper()[1]
    for lora, card in (("lora", 24), ("qlora", 16)):
        job = paper("llama2_full", lora, "model.max_length=1024", "generation.max_new_tokens=512")[0]
        assert all(estimate(job, stage, size).total < card * GIB for stage in memory.stages_of(job))
    full = paper()[0]
    assert [choose_precision(full, "ppo", card and card * GIB, size) for card in (None, 80, 141, 192)] == [
        "master", "stochastic", "stochastic", "master",
    ]  # fmt: skip
    assert estimate(full, "ppo", size, 80 * GIB).total < 80 * GIB
    assert choose_precision(full, "sft", 141 * GIB, size) == "master"
    assert choose_precision(paper("llama2_full", None, "precision=master")[0], "ppo", GIB, size) == "master"


def test_what_is_not_the_recipes_own_base_counts_too(tmp_path: Path) -> None:
    """A classifier of the user's as the reward, whole; one whose size is not at hand is named, as vLLM's share is."""
    tmp_path.joinpath("config.json").write_text(json.dumps(KNOWN[MISTRAL] | {"id2label": {"0": "score"}}))
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    plain, size = paper("llama2_full", "lora")
    other = Architecture.of(KNOWN[MISTRAL])
    for mode, stage in (("lora", "ppo"), ("lora", "evaluate"), (None, "landscape")):
        held = () if mode else ("precision=stochastic",)
        both, _ = paper("llama2_full", mode, f"reward.model=[adapter, {tmp_path}]", *held)
        alone, _ = paper("llama2_full", mode, *held)
        more = estimate(both, stage, size).weights - estimate(alone, stage, size).weights
        assert more == 2 * (other.parameters - 32000 * 4096), (mode, stage)
    assert memory.uncounted(plain) == memory.uncounted(both) == []
    unknown, _ = paper("llama2_full", "lora", "reward.model=someone/unknown", "ppo.rollout_backend=vllm")
    assert [line.split(",")[0] for line in memory.uncounted(unknown)] == ["someone/unknown", "vLLM while it samples"]
    awake, _ = paper(
        "llama2_full", "lora", "ppo.rollout_backend=vllm", "ppo.rollout_options={enable_sleep_mode: false}"
    )
    assert memory.uncounted(awake)[-1].startswith("vLLM during ppo, which takes 30% of the GPU")
    judged, _ = paper("llama2_full", "lora", f"evaluate.judge={{kind: local, model: {MISTRAL}}}")
    assert memory.uncounted(judged) == [
        f"the judge {MISTRAL}, in a stage of its own, 13.5 GiB of weights in bf16 and its KV cache (evaluate.judge.concurrency requests per batch)"
    ]


def test_optimizers_and_a_value_adapter() -> None:
    """Eight-bit states, roots that the unfused AdamW takes of all weights at once, an adapter more with a forward of its own."""
    size = paper()[1]

    def states(optim: str, lora: str | None = None) -> Estimate:
        held = () if lora else ("precision=master",)
        found = memory._Stage(paper("llama2_full", lora, f"sft.optim={optim}", *held)[0], "sft", size, "master")
        return found.phases()[-1]

    count = size.parameters
    assert states("adamw_torch_fused").optimizer == states("paged_adamw_32bit").optimizer == 8 * count
    assert states("adamw_torch").optimizer == 12 * count
    assert states("paged_adamw_8bit").optimizer == (2 + 8 / 256) * count
    assert states("paged_adamw_8bit", "lora").optimizer == (2 + 8 / 256) * size.adapter(16, "all-linear")
    assert states("adamw_torch_fused").weights == 4 * count  # autocast's copies are gone by then
    adapter = 4 * size.adapter(16, "all-linear")
    head, own = (
        memory._Stage(paper("llama2_full", "lora", f"ppo.value={value}")[0], "ppo", size, "master")
        for value in ("head", "adapter")
    )
    assert [b - a for a, b in zip(head.held("train"), own.held("train"), strict=True)] == [
        adapter,
        adapter,
        2 * adapter,
    ]
    assert own.activations(7, False) == 2 * head.activations(7, False)
    for value in ("none", "group"):
        other, _ = paper("llama2_full", "lora", f"ppo.value={value}", "ppo.lam=1.0", "ppo.vf_coef=0.001")
        assert estimate(other, "ppo", size) == estimate(paper("llama2_full", "lora")[0], "ppo", size), value


def test_a_limit_of_tokens() -> None:
    """micro_batch_tokens limits forwards of training and scoring; a longer sequence has a forward of its own."""
    size = paper()[1]

    def phases(*overrides: str) -> dict[str, Estimate]:
        recipe = paper("llama2_full", "lora", "ppo.batch_size=8", *overrides)[0]
        return {one.phase: one for one in memory._Stage(recipe, "ppo", size, "master").phases()}

    limited = phases("ppo.micro_batch_size=8", "ppo.micro_batch_tokens=4096")
    assert limited["train"] == phases("ppo.micro_batch_size=2")["train"]
    assert limited["score"].activations == phases("ppo.rollout_batch_size=2")["score"].activations
    assert limited["generate"] == phases()["generate"]
    assert (
        phases("ppo.micro_batch_size=8", "ppo.micro_batch_tokens=100")["train"]
        == phases("ppo.micro_batch_size=1")["train"]
    )


def test_logits_of_scoring() -> None:
    """Three tensors of a chunk's logits where they exceed a layer's activations; four where end tokens are forbidden."""
    size = paper()[1]

    def scored(*overrides: str) -> Estimate:
        recipe = paper("llama2_full", "lora", "model.max_length=64", "generation.max_new_tokens=32", *overrides)[0]
        return memory._Stage(recipe, "ppo", size, "master").phases()[1]

    chunk = 4 * memory.CHUNK * 32_000
    assert (scored("ppo.rollout_batch_size=1").logits, scored("ppo.rollout_batch_size=1").activations) == (3 * chunk, 0)
    assert scored("generation.min_new_tokens=2").logits == 4 * chunk

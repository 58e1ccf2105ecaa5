"""Members that are more than LoRA on linear layers: whatever PEFT makes of the soup's folder is the weighted mean of what it makes of
the members' folders, parameter by parameter, or the soup is refused.

With Σ w = 1 everything an adapter can hold is linear in the base's parameters (θ_i merged by PEFT itself), so one comparison covers it.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from salsa_peft.models.responses import Responses
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import BITS, SafetensorsFile

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "attention_bias": True,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


class Convolutions(nn.Module):
    """(B, 3, 6, 6) → numbers: every kind of layer that PEFT puts LoRA on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 5, 1)
        self.conv1 = nn.Conv1d(5, 4, 3, stride=2)
        self.conv3 = nn.Conv3d(1, 2, (2, 3, 3))
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.conv2(x).tanh()).tanh()
        x = self.conv1(x.flatten(2))[:, None, :, :, None].expand(-1, -1, -1, -1, 4)
        return self.head(self.conv3(x).mean((2, 3, 4)))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": False} | options)).eval()


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, initializer_range=0.3)
    ).eval()


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().eval()


def train(make: Callable[[], nn.Module], folder: Path, seed: int, **options: Any) -> Path:
    """An adapter folder as PEFT writes it; everything that would be trained is random instead."""
    model = get_peft_model(make(), LoraConfig(**{"r": 2, "lora_alpha": 4} | options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(folder)
    (folder / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    return folder


def opened(make: Callable[[], nn.Module], folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make(), folder).eval()


def merged(make: Callable[[], nn.Module], folder: Path) -> dict[str, torch.Tensor]:
    """The base's parameters with the adapter in them, by PEFT's own merge, in float64."""
    return {name: value.double() for name, value in opened(make, folder).merge_and_unload().state_dict().items()}


def check_mean(
    make: Callable[[], nn.Module], folder: Path, members: list[Path], weights: list[float], inputs: Any
) -> None:
    """The soup's folder in plain PEFT: its parameters and its outputs are those of Σ w_i θ_i."""
    soup(folder / "soup", members, weights)
    thetas = [merged(make, member) for member in members]
    found, model = merged(make, folder / "soup"), make()
    expected = {name: sum(w * theta[name] for w, theta in zip(weights, thetas, strict=True)) for name in found}
    base = model.state_dict()
    assert any((found[name] - base[name].double()).abs().max() > 1e-2 for name in found)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-6, rtol=1e-5), name
    model.load_state_dict({name: value.float() for name, value in expected.items()})
    with torch.no_grad():
        outputs = [forward(inputs) for forward in (opened(make, folder / "soup"), model)]
    ours, theirs = (output if isinstance(output, torch.Tensor) else output.logits for output in outputs)
    assert torch.allclose(ours, theirs, atol=5e-5, rtol=1e-5)
    assert (ours - theirs).abs().mean() < 1e-5


LM = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
CONVOLUTIONS = {"target_modules": ["conv1", "conv2", "conv3", "point", "head"]}
ODD: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]], Any]] = {
    "rslora, ranks, alphas": (llama, [LM | {"r": 3, "use_rslora": True}, LM | {"r": 4, "lora_alpha": 1}], IDS),
    "patterns": (llama, [LM | {"rank_pattern": {"q_proj": 5}, "use_rslora": True}, LM | {"alpha_pattern": {"v_proj": 9}}], IDS),
    "modules": (llama, [LM | {"target_modules": ["q_proj"]}, LM | {"target_modules": ["o_proj", "up_proj"]}], IDS),
    "lora_bias": (llama, [LM | {"lora_bias": True}, LM | {"lora_bias": True, "use_rslora": True, "r": 3}], IDS),
    "lora_bias of one": (llama, [LM | {"lora_bias": True}, LM | {"target_modules": ["q_proj", "o_proj"]}], IDS),
    "bias all": (llama, [LM | {"bias": "all"}, LM | {"bias": "all", "r": 3}], IDS),
    "bias all, other modules": (
        llama,
        [LM | {"bias": "all"}, LM | {"bias": "all", "target_modules": ["o_proj"], "lora_bias": True}],
        IDS,
    ),
    "bias lora_only": (llama, [LM | {"bias": "lora_only"}, LM | {"bias": "lora_only"}], IDS),
    "modules_to_save": (llama, [LM | {"modules_to_save": ["lm_head"]}, LM | {"modules_to_save": ["lm_head"], "r": 3}], IDS),
    "tokens": (llama, [LM | {"trainable_token_indices": [3, 1]}, LM | {"trainable_token_indices": [3, 1]}], IDS),
    "tokens by name": (
        llama,
        [LM | {"trainable_token_indices": {"embed_tokens": [2, 9]}}] * 2,
        IDS,
    ),
    "embedding": (llama, [LM | {"target_modules": ["embed_tokens", "q_proj"]}, LM | {"target_modules": ["embed_tokens"]}], IDS),
    "Conv1D of GPT-2": (gpt2, [{"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, {"target_modules": ["c_attn"], "r": 5}], IDS),
    "convolutions": (convolutions, [CONVOLUTIONS, CONVOLUTIONS | {"r": 3, "use_rslora": True}], IMAGES),
    "convolutions, lora_bias": (convolutions, [CONVOLUTIONS | {"lora_bias": True}, CONVOLUTIONS], IMAGES),
    "convolutions, bias, saved": (
        convolutions,
        [{"target_modules": ["conv1", "conv2"], "modules_to_save": ["head"], "bias": "lora_only"}] * 2,
        IMAGES,
    ),
    "reward": (
        classifier,
        [{"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, {"target_modules": "all-linear", "r": 4, "task_type": "SEQ_CLS"}],
        IDS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_the_mean_of_what_peft_makes_of_the_members(case: str, tmp_path: Path) -> None:
    make, options, inputs = ODD[case]
    members = [train(make, tmp_path / str(i), i, **option) for i, option in enumerate(options)]
    check_mean(make, tmp_path, members, [0.3, 0.7], inputs)


ONE = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "lora_alpha": st.integers(1, 8),
        "use_rslora": st.booleans(),
        "lora_bias": st.booleans(),
        "target_modules": st.lists(st.sampled_from(["q_proj", "k_proj", "o_proj"]), min_size=1, unique=True),
    },
    optional={"rank_pattern": st.just({r"layers\.1\..*": 3}), "alpha_pattern": st.just({"q_proj": 7})},
)
SHARED = st.fixed_dictionaries(
    {"bias": st.sampled_from(["none", "all", "lora_only"])},
    optional={
        "modules_to_save": st.sampled_from([["lm_head"], ["lm_head", "layers.0.mlp"]]),
        "trainable_token_indices": st.just([5, 2]),
    },
).filter(lambda options: options["bias"] != "lora_only")
PROPERTY = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@PROPERTY
@given(options=st.lists(ONE, min_size=2, max_size=3), shared=SHARED, a=st.floats(-0.5, 1.5))
def test_random_mixtures(options: list[dict[str, Any]], shared: dict[str, Any], a: float) -> None:
    weights = [a, 1 - a] if len(options) == 2 else [a, 0.5 - a, 0.5]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = [train(llama, folder / str(i), i, **option, **shared) for i, option in enumerate(options)]
        check_mean(llama, folder, members, weights, IDS)


def test_identical_members_are_that_member_to_the_bit_where_averaged_directly(tmp_path: Path) -> None:
    one = train(llama, tmp_path / "one", 0, **LM, modules_to_save=["lm_head"], bias="all", trainable_token_indices=[1])
    soup(tmp_path / "soup", [one, one, one])
    given, found = (load_file(folder / WEIGHTS) for folder in (one, tmp_path / "soup"))
    direct = [key for key in given if "lora_" not in key]
    assert len(direct) > 3 and all(torch.equal(given[key], found[key]) for key in direct)
    other = train(
        llama, tmp_path / "other", 1, **LM, modules_to_save=["lm_head"], bias="all", trainable_token_indices=[1]
    )
    soup(tmp_path / "soup", [other, one], [0, 1])
    found = load_file(tmp_path / "soup" / WEIGHTS)
    assert all(torch.equal(given[key], found[key]) for key in direct)


class TestDirect:
    def test_by_the_bases_own_names_and_in_their_own_dtype(self, tmp_path: Path) -> None:
        """Half factors beside a float32 head: each keeps its dtype, wide ones first, so that plain safetensors reads them."""
        members = []
        for seed in range(2):
            members.append(train(llama, tmp_path / str(seed), seed, **LM, r=3, modules_to_save=["lm_head"]))
            tensors = load_file(members[-1] / WEIGHTS)
            factors = {key: value.bfloat16() for key, value in tensors.items() if "lora_" in key}
            save_file(tensors | factors, members[-1] / WEIGHTS)
        heads = [load_file(member / WEIGHTS)["base_model.model.lm_head.weight"] for member in members]
        expected = 0.25 * heads[0] + 0.75 * heads[1]
        summary = soup(tmp_path / "soup", members, [0.25, 0.75])
        saved = load_file(tmp_path / "soup" / WEIGHTS)
        assert torch.allclose(saved["base_model.model.lm_head.weight"], expected, atol=1e-7)
        assert {value.dtype for key, value in saved.items() if "lora_" in key} == {torch.bfloat16}
        assert summary["averaged"] == ["lm_head.weight"]
        bits = [BITS[entry.dtype] for entry in SafetensorsFile(tmp_path / "soup" / WEIGHTS).entries.values()]
        assert bits == sorted(bits, reverse=True) and len(set(bits)) == 2

    def test_other_sums_are_refused(self, tmp_path: Path) -> None:
        member = train(llama, tmp_path / "one", 0, **LM, modules_to_save=["lm_head"])
        stacked = StackedAdapter.load([member, member])
        line = r"weights: 0.5, 0.1 sum to 0.6, but they must sum to 1: .*one holds lm_head.weight, which is averaged directly"
        for call in (
            lambda weights: stacked.save(tmp_path / "soup", weights),
            lambda weights: stacked.attach(
                get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), "soup", weights
            ),
        ):
            with pytest.raises(SalsaError, match=line):
                call([0.5, 0.1])
        assert not (tmp_path / "soup").exists()

    @pytest.mark.parametrize(
        ("options", "odd"),
        [
            ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
            ({"bias": "lora_only"}, "q_proj.bias"),
            ({"trainable_token_indices": [1]}, "trainable_tokens_delta"),
        ],
    )
    def test_a_live_model_takes_factors_alone(self, tmp_path: Path, options: dict[str, Any], odd: str) -> None:
        stacked = StackedAdapter.load([train(llama, tmp_path / "one", 0, **LM, **options)])
        model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), "policy")
        with pytest.raises(SalsaError, match=rf"holds trained values of .*{odd}, a parameter of the base"):
            stacked.attach(model, "soup", [1])
        assert list(model.peft_config) == ["policy"]

    @pytest.mark.parametrize(
        ("second", "line"),
        [
            (
                LM | {"trainable_token_indices": [1, 2]},
                "trainable_token_indices of model.embed_tokens differ from those of",
            ),
            (
                LM | {"trainable_token_indices": [3]},
                "trainable_token_indices of model.embed_tokens differ from those of",
            ),
            (LM, "has no model.embed_tokens.token_adapter.trainable_tokens_delta, but"),
            (LM | {"modules_to_save": ["lm_head"]}, "has no lm_head.weight, but"),
        ],
    )
    def test_members_that_differ(self, tmp_path: Path, second: dict[str, Any], line: str) -> None:
        members = [
            train(llama, tmp_path / "a", 0, **LM, trainable_token_indices=[3, 1]),
            train(llama, tmp_path / "b", 1, **second),
        ]
        for order in (members, members[::-1]):
            with pytest.raises(SalsaError, match=line):
                soup(tmp_path / "soup", order)
        assert not (tmp_path / "soup").exists()

    def test_nan_in_a_head(self, tmp_path: Path) -> None:
        members = [train(llama, tmp_path / str(seed), seed, **LM, modules_to_save=["lm_head"]) for seed in range(2)]
        tensors = load_file(members[1] / WEIGHTS)
        tensors["base_model.model.lm_head.weight"][3, 3] = math.nan
        save_file(tensors, members[1] / WEIGHTS)
        with pytest.raises(
            SalsaError, match=r"1/adapter_model.safetensors: base_model.model.lm_head.weight has values that"
        ):
            soup(tmp_path / "soup", members)
        assert not (tmp_path / "soup").exists()

    def test_lora_bias_beside_an_embedding(self, tmp_path: Path) -> None:
        members = [
            train(llama, tmp_path / "a", 0, **LM, lora_bias=True),
            train(llama, tmp_path / "b", 0, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        ]
        with pytest.raises(SalsaError, match=r"PEFT has no adapter with lora_bias and LoRA on model.embed_tokens"):
            soup(tmp_path / "soup", members)


class TestLive:
    @pytest.mark.parametrize("case", ["lora_bias of one", "convolutions, lora_bias", "convolutions", "Conv1D of GPT-2"])
    def test_attach_and_set_weights_are_the_saved_soup(self, case: str, tmp_path: Path) -> None:
        make, options, inputs = ODD[case]
        members = [train(make, tmp_path / str(i), i, **option) for i, option in enumerate(options)]
        stacked = StackedAdapter.load(members)
        target = "q_proj" if make is llama else "c_attn" if make is gpt2 else "head"
        model = get_peft_model(make(), LoraConfig(target_modules=[target]), "policy").eval()
        stacked.attach(model, "soup", [1.0, 0.0])
        for member in members:
            (member / WEIGHTS).unlink()  # its factors are in memory
        for weights in ([0.3, 0.7], [0.4, -0.1]):
            stacked.set_weights(model, "soup", weights)
            model.set_adapter("soup", inference_mode=True)
            stacked.save(tmp_path / "soup", weights)
            with torch.no_grad():
                outputs = [forward(inputs) for forward in (model, opened(make, tmp_path / "soup"))]
            ours, theirs = (output if isinstance(output, torch.Tensor) else output.logits for output in outputs)
            assert torch.allclose(ours, theirs, atol=1e-6)

    def test_an_embeddings_lora(self, tmp_path: Path) -> None:
        """PEFT saves the embedding itself beside it, which a shared base has not: without it the soup can be attached."""
        members = []
        for seed in range(2):
            members.append(train(llama, tmp_path / str(seed), seed, target_modules=["embed_tokens"], r=seed + 1))
            tensors = load_file(members[-1] / WEIGHTS)
            save_file({key: value for key, value in tensors.items() if "lora_" in key}, members[-1] / WEIGHTS)
        stacked = StackedAdapter.load(members)
        model = get_peft_model(llama().bfloat16(), LoraConfig(target_modules=["q_proj"]), "policy").eval()
        stacked.attach(model, "soup", [0.5, 0.5])
        stacked.set_weights(model, "soup", [0.3, 0.7])
        layer: Any = model.get_base_model().get_submodule("model.embed_tokens")
        assert layer.lora_embedding_A["soup"].dtype == layer.lora_embedding_B["soup"].dtype == torch.float32
        deltas = [
            opened(llama, member).get_base_model().model.embed_tokens.get_delta_weight("default") for member in members
        ]
        expected = 0.3 * deltas[0] + 0.7 * deltas[1]
        assert torch.allclose(layer.get_delta_weight("soup"), expected, atol=1e-6)
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".soup" in n)


class TestReward:
    def test_a_soup_of_reward_models_scores_with_the_mean_head(self, tmp_path: Path) -> None:
        """WARM: AdapterReward on the soup's folder is a plain classifier with the mean of adapters and heads."""
        options = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
        members = [train(classifier, tmp_path / str(seed), seed, **options, r=seed + 2) for seed in range(2)]
        heads = [load_file(member / WEIGHTS)["base_model.model.score.weight"] for member in members]
        soup(tmp_path / "soup", members, [0.25, 0.75])
        base = llama()
        base.model.load_state_dict(classifier().model.state_dict())
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "policy").eval()
        reward = rewards.AdapterReward(model, tmp_path / "soup")
        assert torch.allclose(reward.head.weight, 0.25 * heads[0] + 0.75 * heads[1], atol=1e-7)
        true = torch.ones_like(IDS, dtype=torch.bool)
        responses = Responses(IDS[:, :3], true[:, :3], IDS[:, 3:], true[:, 3:], torch.ones(2, dtype=torch.bool))
        scores = reward(responses, [{}, {}])
        plain = opened(classifier, tmp_path / "soup")
        with torch.no_grad():
            assert torch.allclose(scores, plain(input_ids=IDS).logits.squeeze(-1), atol=1e-5)
        stacked = StackedAdapter.load(members)
        stacked.attach(model, "soup", [0.25, 0.75])  # the factors; the head is adapters.score_head's
        layers = [
            model.get_base_model().get_submodule("model.layers.0.self_attn.v_proj").lora_B[name]
            for name in ("soup", "reward")
        ]
        assert torch.equal(layers[0].weight, layers[1].weight)

    def test_a_reward_and_a_policy_are_no_soup(self, tmp_path: Path) -> None:
        members = [
            train(classifier, tmp_path / "reward", 0, target_modules=["q_proj"], task_type="SEQ_CLS"),
            train(llama, tmp_path / "seed", 1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        ]
        with pytest.raises(SalsaError, match=r"seed/adapter_model.safetensors has no score.weight, but"):
            soup(tmp_path / "soup", members)


class TestManifest:
    def test_a_flipped_bit_is_named(self, tmp_path: Path) -> None:
        """Against the manifest that a run writes; without one the same bit would be averaged."""
        from salsa_peft.utils.fingerprints import sha256

        members = [train(llama, tmp_path / str(seed), seed, **LM) for seed in range(2)]
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in members[1].iterdir()}
        (members[1] / "manifest.json").write_text(json.dumps({"unit": "sft/seed-1", "files": files}))
        soup(tmp_path / "soup", members)
        for name in (WEIGHTS, "fingerprint.json"):
            whole = (members[1] / name).read_bytes()
            (members[1] / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
            with pytest.raises(
                SalsaError, match=rf"1: differs from its manifest.json in size or SHA-256 \(changed: {name}\)"
            ):
                soup(tmp_path / "other", members)
            (members[1] / name).write_bytes(whole)
        assert not (tmp_path / "other").exists()

    def test_one_that_cannot_be_read_is_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        member = train(llama, tmp_path / "one", 0, **LM)
        (member / "manifest.json").write_text("{")
        soup(tmp_path / "soup", [copy.copy(member)])
        assert caplog.messages == [
            f"warning: {member / 'manifest.json'} cannot be read, so the files beside it are not checked"
        ]

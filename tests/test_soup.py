"""Soups of LoRA adapters: the exact rule, plain PEFT, re-weighting in place, and every refusal's line."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from salsa_peft.adapter_folders import read_member
from salsa_peft.config import SalsaError
from salsa_peft.soup import STRATEGIES, StackedAdapter, main, soup

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
Q0 = "model.layers.0.self_attn.q_proj"
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.3)).eval()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def train(base: LlamaForCausalLM, folder: Path, seed: int, **options: object) -> Path:
    """An adapter folder as PEFT writes it, its factors random instead of trained."""
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    return folder


def open_plain(base: LlamaForCausalLM, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def merged_delta(base: LlamaForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT itself takes an adapter's delta to be: weights after merging minus weights before."""
    merged = open_plain(base, folder).merge_and_unload().state_dict()
    return {name: (merged[name].double() - weight.double()) for name, weight in base.state_dict().items()}


def weighted_base(base: LlamaForCausalLM, members: list[Path], weights: list[float]) -> LlamaForCausalLM:
    """The base with Σ w_i · delta_i merged in."""
    state = {name: weight.double() for name, weight in base.state_dict().items()}
    for member, weight in zip(members, weights, strict=True):
        for name, delta in merged_delta(base, member).items():
            state[name] = state[name] + weight * delta
    model = copy.deepcopy(base)
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


OPTIONS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.integers(1, 8),
        "use_rslora": st.booleans(),
        "target_modules": st.lists(
            st.sampled_from(["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]), min_size=1, unique=True
        ),
    },
    optional={
        "rank_pattern": st.sampled_from([{"q_proj": 3}, {r"layers\.1\..*": 4}, {"^" + Q0: 1, "q_proj": 2}]),
        "alpha_pattern": st.sampled_from([{"v_proj": 5}, {r".*\.0\.self_attn\.q_proj": 7}]),
        "layers_to_transform": st.sampled_from([[0], [1], [0, 1]]),
        "exclude_modules": st.just(["layers.1.self_attn.v_proj"]),
    },
).filter(lambda options: options["target_modules"] != ["v_proj"])
WEIGHTS2 = st.floats(-0.5, 1.5).map(lambda a: [1 - a, a])


class TestExactRule:
    def test_by_hand(self, base: LlamaForCausalLM, folder: Path) -> None:
        """r = 1, alpha 2 (scaling 2) and r = 4, alpha 4, rsLoRA (scaling 4 / √4 = 2): ¼·2·1·3 + ¾·2·(4·1·5) = 31.5."""
        one = train(base, folder / "one", 0, r=1, lora_alpha=2, target_modules=["q_proj"])
        two = train(base, folder / "two", 1, r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj"])
        for member, b, a in ((one, 1.0, 3.0), (two, 1.0, 5.0)):
            fill = lambda t, a=a, b=b: [t[k].fill_(a if "lora_A" in k else b) for k in t]  # noqa: E731
            edit_tensors(member, fill)
        tensors = StackedAdapter.load([one, two]).state_dict([0.25, 0.75])
        A, B = (tensors[f"base_model.model.{Q0}.lora_{half}.weight"] for half in "AB")
        assert A.shape == (5, 16) and B.shape == (16, 5)
        assert A[:, 0].tolist() == [3, 5, 5, 5, 5] and B[0].tolist() == [0.5, 1.5, 1.5, 1.5, 1.5]
        assert torch.equal(B @ A, torch.full((16, 16), 31.5))
        wrong = (0.25 * 1 + 0.75 * 1) * (0.25 * 3 + 0.75 * 5)  # averaging A and B apart
        assert wrong != 31.5

    @PROPERTY
    @given(first=OPTIONS, second=OPTIONS, weights=WEIGHTS2, seed=st.integers(0, 99))
    def test_weighted_mean_of_deltas_and_plain_peft(self, base, first, second, weights, seed) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            members = [train(base, folder / "a", seed, **first), train(base, folder / "b", seed + 1, **second)]
            soup(folder / "soup", members, weights)
            opened = open_plain(base, folder / "soup")
            expected = weighted_base(base, members, weights)
            modules, deltas = dict(opened.named_modules()), dict(expected.named_modules())
            for module in StackedAdapter.load(members).stacks:
                x = torch.randn(3, modules[f"base_model.model.{module}"].in_features)
                got = modules[f"base_model.model.{module}"](x)
                assert torch.allclose(got, deltas[module](x), atol=1e-5, rtol=1e-5)
            assert torch.allclose(logits(opened), logits(expected), atol=1e-4, rtol=1e-5)
            assert (logits(opened) - logits(expected)).abs().mean() < 1e-5

    @PROPERTY
    @given(options=st.lists(OPTIONS, min_size=3, max_size=3), a=st.floats(-0.5, 1.5), b=st.floats(-0.5, 1.5))
    def test_order_of_members_does_not_matter(self, base, options, a, b) -> None:
        weights = [a, b, 1 - a - b]
        with tempfile.TemporaryDirectory() as name:
            members = [train(base, Path(name) / str(i), i, **option) for i, option in enumerate(options)]
            there = StackedAdapter.load(members).state_dict(weights)
            back = StackedAdapter.load(members[::-1]).state_dict(weights[::-1])
        assert there.keys() == back.keys()
        for key in (key for key in there if "lora_A" in key):
            other = key.replace("lora_A", "lora_B")
            assert torch.allclose(there[other] @ there[key], back[other] @ back[key], atol=1e-5)

    @PROPERTY
    @given(first=OPTIONS, second=OPTIONS)
    def test_all_weight_on_one_member_is_that_member(self, base, first, second) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            members = [train(base, folder / "a", 0, **first), train(base, folder / "b", 1, **second)]
            soup(folder / "soup", members, [1, 0])
            difference = logits(open_plain(base, folder / "soup")) - logits(open_plain(base, members[0]))
        assert difference.abs().max() < 1e-5 and difference.abs().mean() < 1e-6

    def test_identical_members_are_that_member_and_pefts_linear_doubles_them(self, base, folder: Path) -> None:
        """PEFT's linear has √(w·scaling) on A and on B and multiplies the sums: two halves give (2·√½)² = 2 deltas."""
        member = train(base, folder / "a", 0)
        soup(folder / "soup", [member, member])
        alone = merged_delta(base, member)
        ours = merged_delta(base, folder / "soup")
        model = open_plain(base, member)
        model.load_adapter(member, "again")
        model.add_weighted_adapter(["default", "again"], [0.5, 0.5], "linear", combination_type="linear")
        model.set_adapter("linear")
        name = f"{Q0}.weight"
        linear = model.merge_and_unload().state_dict()[name].double() - base.state_dict()[name].double()
        assert torch.allclose(ours[name], alone[name], atol=1e-6)
        assert torch.allclose(linear, 2 * alone[name], atol=1e-6)

    def test_bfloat16_members_are_averaged_in_float32(self, base, folder: Path) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        for member in members:
            edit_tensors(member, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        tensors = StackedAdapter.load(members).state_dict([0.3, 0.7])
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        blocks = [
            load_file(member / "adapter_model.safetensors")[f"base_model.model.{Q0}.lora_B.weight"]
            for member in members
        ]
        expected = torch.cat([0.3 * 2 * blocks[0].float(), 0.7 * 2 * blocks[1].float()], dim=1)
        assert torch.allclose(tensors[f"base_model.model.{Q0}.lora_B.weight"], expected, rtol=1e-6)


class TestFolder:
    def test_configuration_stays_readable_where_members_agree(self, base, folder: Path) -> None:
        members = [train(base, folder / str(i), i, rank_pattern={"v_proj": 5}, lora_dropout=0.1) for i in range(2)]
        (members[0] / "chat_template.jinja").write_text("{{ messages }}")
        (members[1] / "tokenizer.json").write_text("{}")
        summary = soup(folder / "soup", members)
        config = json.loads((folder / "soup" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["q_proj", "v_proj"]
        assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 4, 0, False)
        assert config["rank_pattern"] == config["alpha_pattern"] == {"v_proj": 10}
        assert config["inference_mode"] and config["task_type"] == "CAUSAL_LM" and config["init_lora_weights"] is True
        assert json.loads((folder / "soup" / "fingerprint.json").read_text()) == {"base": "5e" * 32}
        assert summary == json.loads((folder / "soup" / "soup.json").read_text())
        expected = "adapter_config.json adapter_model.safetensors chat_template.jinja fingerprint.json soup.json"
        assert sorted(path.name for path in (folder / "soup").iterdir()) == expected.split()

    def test_modules_are_listed_where_members_differ(self, base, folder: Path) -> None:
        one = train(base, folder / "a", 0, target_modules=["q_proj"], layers_to_transform=[0])
        two = train(base, folder / "b", 1, target_modules="all-linear", exclude_modules=["gate_proj"])
        stacked = StackedAdapter.load([one, two])
        config = stacked.config()
        assert (
            config.target_modules == set(stacked.stacks)
            and config.layers_to_transform is config.exclude_modules is None
        )
        assert config.rank_pattern == {r"^model\.layers\.0\.self_attn\.q_proj": 4}

    def test_summary_of_two_orthogonal_deltas(self, base, folder: Path) -> None:
        """One entry each, 2·3·1 = 6 and 2·4·1 = 8, at different places: distance 10, cosine 0, norm of the mean 5."""
        members = [train(base, folder / str(i), i, r=1, lora_alpha=2, target_modules=["q_proj"]) for i in range(2)]
        for i, member in enumerate(members):

            def one_entry(tensors: dict[str, torch.Tensor], i: int = i) -> None:
                for tensor in tensors.values():
                    tensor.zero_()
                tensors[f"base_model.model.{Q0}.lora_A.weight"][0, i] = 1
                tensors[f"base_model.model.{Q0}.lora_B.weight"][0, 0] = 3 + i

            edit_tensors(member, one_entry)
        summary = soup(folder / "soup", members)
        assert [member["norm"] for member in summary["members"]] == [6, 8] and summary["norm"] == 5
        assert summary["pairs"] == [{"a": "0", "b": "1", "distance": 10, "cosine": 0}]
        assert summary["ranks"] == [2] and summary["weights"] == [0.5, 0.5]
        assert summary["bytes"] == (folder / "soup" / "adapter_model.safetensors").stat().st_size

    def test_a_zero_delta_has_no_cosine(self, base, folder: Path) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        edit_tensors(members[1], lambda tensors: [tensor.zero_() for tensor in tensors.values()])
        assert soup(folder / "soup", members)["pairs"][0]["cosine"] is None

    def test_a_soup_is_written_anew_and_another_adapter_never(self, base, folder: Path) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        soup(folder / "soup", members, [1, 0])
        for member in members:
            (member / "fingerprint.json").unlink()
        soup(folder / "soup", members, [0, 1])
        assert torch.allclose(
            logits(open_plain(base, folder / "soup")), logits(open_plain(base, members[1])), atol=1e-5
        )
        assert not (folder / "soup" / "fingerprint.json").exists()
        before = (members[0] / "adapter_model.safetensors").read_bytes()
        with pytest.raises(SalsaError, match="holds an adapter that is not a soup"):
            soup(members[0], [members[1], folder / "soup"])
        with pytest.raises(SalsaError, match="is a member"):
            soup(folder / "soup", [members[1], folder / "soup"])
        assert (members[0] / "adapter_model.safetensors").read_bytes() == before

    def test_configuration_appears_last_and_a_failed_write_leaves_none(self, base, folder: Path, monkeypatch) -> None:
        import safetensors.torch

        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        soup(folder / "soup", members)

        def full_disk(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            soup(folder / "soup", members)
        assert sorted(path.name for path in (folder / "soup").iterdir()) == ["adapter_model.safetensors"]


class TestLive:
    def state(self, model: PeftModel) -> tuple[object, ...]:
        active = [(name, module.active_adapters) for name, module in model.named_modules() if hasattr(module, "lora_A")]
        parameters = {id(p): p.requires_grad for name, p in model.named_parameters() if ".soup." not in name}
        return model.active_adapters, [entry for entry in active if Q0 in entry[0]], parameters, model.training

    @PROPERTY
    @given(first=OPTIONS, second=OPTIONS, weights=st.tuples(st.floats(-1, 2), st.floats(-1, 2)))
    def test_attach_and_set_weights_equal_a_saved_adapter(self, base, first, second, weights) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            members = [train(base, folder / "a", 0, **first), train(base, folder / "b", 1, **second)]
            stacked = StackedAdapter.load(members)
            model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q_proj"]), "policy").train()
            before = self.state(model)
            stacked.attach(model, "soup", [0.5, 0.5])
            assert self.state(model) == before
            attached = [p for name, p in model.named_parameters() if ".soup." in name]
            assert len(attached) == 2 * len(stacked.stacks)
            assert {p.dtype for p in attached} == {torch.float32} and not any(p.requires_grad for p in attached)
            addresses = [p.data_ptr() for p in attached]
            stacked.set_weights(model, "soup", weights)
            assert [p.data_ptr() for p in attached] == addresses
            assert not any(p.requires_grad for p in attached)
            stacked.save(folder / "saved", weights)
            model.eval().set_adapter("soup", inference_mode=True)
            assert torch.equal(logits(model), logits(open_plain(base, folder / "saved")))

    def test_a_layer_that_had_no_adapter_does_not_wake_up(self, base, folder: Path) -> None:
        """PEFT leaves a freshly wrapped layer on "default": an attached soup of that name would act in it at once."""
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["o_proj"]), "policy").eval()
        before = logits(model)
        stacked.attach(model, "default", [1.0])
        assert torch.equal(logits(model), before) and model.active_adapters == ["policy"]

    def test_attach_over_a_bfloat16_base_is_float32(self, base, folder: Path) -> None:
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base).bfloat16(), LoraConfig(target_modules=["q_proj"]), "policy")
        stacked.attach(model, "soup", [0.3])
        layer = model.get_base_model().get_submodule(Q0)
        expected = stacked.state_dict([0.3])[f"base_model.model.{Q0}.lora_B.weight"]
        assert torch.equal(layer.lora_B["soup"].weight, expected) and layer.scaling["soup"] == 1.0

    def test_refusals(self, base, folder: Path) -> None:
        stacked = StackedAdapter.load([train(base, folder / "a", 0)])
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], r=1), "policy")
        with pytest.raises(SalsaError, match="has an adapter 'policy' already"):
            stacked.attach(model, "policy", [1])
        with pytest.raises(SalsaError, match="attach this soup under that name first"):
            stacked.set_weights(model, "soup", [1])
        model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], r=1))
        with pytest.raises(SalsaError, match="of another soup or base"):
            stacked.set_weights(model, "other", [1])
        stacked.attach(model, "soup", [1])
        model.merge_adapter(["soup"])
        with pytest.raises(SalsaError, match="merged into the base"):
            stacked.set_weights(model, "soup", [1])
        wide = LlamaForCausalLM(LlamaConfig(**base.config.to_dict() | {"hidden_size": 32, "head_dim": 16}))
        with pytest.raises(SalsaError, match="of another soup or base"):
            stacked.attach(get_peft_model(wide, LoraConfig(target_modules=["q_proj"])), "soup", [1])
        short = LlamaForCausalLM(LlamaConfig(**base.config.to_dict() | {"num_hidden_layers": 1}))
        with pytest.raises(SalsaError, match=r"model\.layers\.1\.self_attn\.q_proj is in .* but not in the model"):
            stacked.attach(get_peft_model(short, LoraConfig(target_modules=["q_proj"])), "soup", [1])


def drop(key: str) -> Callable[[Path], None]:
    return lambda member: edit_tensors(member, lambda tensors: tensors.pop(f"base_model.model.{key}"))


def put(key: str, shape: tuple[int, ...] = (2, 2), dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda member: edit_tensors(
        member, lambda t: t.update({f"base_model.model.{key}": torch.zeros(shape, dtype=dtype)})
    )


def poison(member: Path) -> None:
    edit_tensors(member, lambda tensors: tensors[f"base_model.model.{Q0}.lora_A.weight"].view(-1)[3:4].fill_(math.nan))


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda member: (member / old).rename(member / new)


def truncate(member: Path) -> None:
    path = member / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def configure(**fields: object) -> Callable[[Path], None]:
    return lambda member: edit(member, **fields)


def other_base(member: Path) -> None:
    edit(member, base_model_name_or_path="org/other")
    (member / "fingerprint.json").unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda member: (member / name).write_text(text)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (configure(use_dora=True), "use_dora is True: DoRA's delta is not linear"),
    "dora tensor": (
        put(f"{Q0}.lora_magnitude_vector.weight", (16,)),
        f"{Q0}.lora_magnitude_vector.weight: DoRA's delta",
    ),
    "lora_bias": (configure(lora_bias=True), "lora_bias is True: biases are not averaged yet"),
    "lora_bias tensor": (put(f"{Q0}.lora_B.bias", (16,)), f"{Q0}.lora_B.bias: biases are not averaged yet"),
    "bias": (configure(bias="lora_only"), "bias is 'lora_only', expected 'none'"),
    "another tuner": (configure(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    "trainable tokens": (configure(trainable_token_indices=[1]), "trained tokens are not averaged yet"),
    "modules_to_save": (
        configure(modules_to_save=["score"]),
        "modules_to_save is ['score']: full weights beside an adapter",
    ),
    "saved embeddings": (put("model.embed_tokens.weight"), "model.embed_tokens.weight: full weights beside an adapter"),
    "embedding lora": (put("model.embed_tokens.lora_embedding_A"), "LoRA on embeddings is not averaged yet"),
    "target_parameters": (configure(target_parameters=["experts.w"]), "LoRA on bare parameters"),
    "layer_replication": (
        configure(layer_replication=[[0, 2], [0, 2]]),
        "layer_replication is [[0, 2], [0, 2]]: it changes",
    ),
    "unknown option": (configure(use_warp=True), "use_warp is True: a soup has no rule for this option"),
    "pissa": (configure(init_lora_weights="pissa"), "'pissa', which changes the base's own weights"),
    "bad option": (configure(layers_pattern="layers", layers_to_transform=None), "is not a LoRA configuration"),
    "alpha": (configure(lora_alpha="x"), f"adapter_config.json: {Q0} has rank 2 and alpha 'x', expected"),
    "not json": (write("adapter_config.json", "{"), "adapter_config.json is not JSON"),
    "list": (write("adapter_config.json", "[]"), "adapter_config.json holds a list, expected a mapping"),
    "deep json": (write("adapter_config.json", "[" * 100_000), "adapter_config.json is not JSON"),
    "no config": (rename("adapter_config.json", "x"), "adapter_config.json is missing"),
    "no weights": (rename("adapter_model.safetensors", "x"), "adapter_model.safetensors is missing"),
    "pickled": (rename("adapter_model.safetensors", "adapter_model.bin"), "which is pickled and never read"),
    "truncated": (truncate, "adapter_model.safetensors cannot be read"),
    "empty": (lambda m: edit_tensors(m, lambda tensors: tensors.clear()), "holds no tensors"),
    "nan": (poison, f"{Q0}.lora_A.weight holds values that are not finite"),
    "half": (drop(f"{Q0}.lora_B.weight"), f"{Q0} has lora_A alone"),
    "conv": (put(f"{Q0}.lora_A.weight", (2, 16, 1, 1)), "of shape [2, 16, 1, 1], expected a matrix of floats"),
    "integers": (put(f"{Q0}.lora_A.weight", (2, 16), torch.int8), "torch.int8 of shape [2, 16], expected a matrix"),
    "rank": (put(f"{Q0}.lora_A.weight", (3, 16)), f"{Q0} has lora_A [3, 16] and lora_B [16, 2], expected rank 2"),
    "width": (put(f"{Q0}.lora_A.weight", (2, 15)), f"{Q0} maps 15 to 16 features"),
    "unknown tensor": (put(f"{Q0}.lora_C.weight"), f"{Q0}.lora_C.weight: unknown tensor"),
    "not targeted": (configure(target_modules=["v_proj"]), f"{Q0} is not among the target_modules"),
    "other base": (other_base, "names the base 'org/other@main'"),
    "other revision": (lambda m: [edit(m, revision="v2"), (m / "fingerprint.json").unlink()], "@v2'"),
    "other fingerprint": (write("fingerprint.json", '{"base": "abc"}'), "was trained on base abc…"),
    "bad fingerprint": (write("fingerprint.json", '{"base": 1}'), "base is 1, expected the SHA-256"),
    "task": (configure(task_type="SEQ_2_SEQ_LM"), "has task_type 'SEQ_2_SEQ_LM'"),
}


class TestRefusals:
    @pytest.fixture(scope="class")
    def pair(self, base, tmp_path_factory) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("pair")
        return train(base, root / "good", 0, target_modules=["q_proj", "v_proj", "o_proj"]), train(
            base, root / "bad", 1
        )

    @pytest.mark.parametrize("case", REFUSALS)
    def test_one_line_that_names_the_folder(self, case, pair, folder, capsys) -> None:
        import shutil

        good, bad = (Path(shutil.copytree(member, folder / member.name)) for member in pair)
        spoil, line = REFUSALS[case]
        spoil(bad)
        assert main([str(folder / "soup"), str(good), str(bad)]) == 2
        captured = capsys.readouterr()
        shown = [text for text in captured.err.splitlines() if not text.startswith("warning: ")]
        assert len(shown) == 1 and shown[0].startswith("salsa soup: ") and line in shown[0] and str(bad) in shown[0]
        assert captured.out == "" and not (folder / "soup").exists()

    def test_reward_adapter_is_refused(self, base, folder: Path) -> None:
        from transformers import LlamaForSequenceClassification

        config = LlamaConfig(**base.config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
        model = get_peft_model(
            LlamaForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        )
        model.save_pretrained(folder / "reward")
        with pytest.raises(SalsaError, match=r"modules_to_save is .*score.* not averaged yet"):
            StackedAdapter.load([folder / "reward"])

    def test_fingerprints_decide_over_names_and_one_that_is_missing_is_warned_of(
        self, base, folder: Path, caplog
    ) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        edit(members[1], base_model_name_or_path="the/same/elsewhere")
        soup(folder / "soup", members)
        assert not caplog.messages
        edit(
            members[1],
            base_model_name_or_path=json.loads((members[0] / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ],
        )
        (members[1] / "fingerprint.json").unlink()
        soup(folder / "soup", members)
        assert caplog.messages == [
            f"warning: {members[1]} has no fingerprint.json: that its base is the others' is believed, not checked"
        ]

    @pytest.mark.parametrize(
        ("weights", "line"),
        [
            ([0.5], "found 1 (0.5), expected 2"),
            ([0.5, 0.3, 0.2], "found 3"),
            ([math.nan, 1], "expected finite numbers"),
            ([math.inf, -math.inf], "expected finite numbers"),
            ([0.5, 0.4], "0.5, 0.4 sum to 0.9, expected 1"),
        ],
    )
    def test_weights(self, base, folder: Path, weights: list[float], line: str) -> None:
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        with pytest.raises(SalsaError) as caught:
            soup(folder / "soup", members, weights)
        assert line in str(caught.value) and not (folder / "soup").exists()
        if not math.isclose(sum(weights), 0.9):
            with pytest.raises(SalsaError):
                StackedAdapter.load(members).state_dict(weights)

    def test_no_members_names_and_strategy(self, base, folder: Path) -> None:
        member = train(base, folder / "a", 0)
        with pytest.raises(SalsaError, match="expected at least one"):
            soup(folder / "soup", [])
        with pytest.raises(SalsaError, match="names: found 2, expected 1"):
            StackedAdapter.load([member], ["a", "b"])
        with pytest.raises(SalsaError, match="found 'slurp', expected one of linear"):
            soup(folder / "soup", [member], strategy="slurp")
        (folder / "file").touch()
        with pytest.raises(SalsaError, match="is a file"):
            soup(folder / "file", [member])


class TestCommand:
    @pytest.mark.parametrize(
        "arguments",
        [
            "OUT A B --weights 0.25,0.75",
            "OUT A B --weights 0.25 0.75",
            "--weights 0.25 0.75 OUT A B",
            "OUT --weights=0.25,0.75 A B --strategy linear",
        ],
    )
    def test_weights_wherever_they_stand(self, base, folder: Path, arguments: str, capsys) -> None:
        for seed, name in enumerate("AB"):
            train(base, folder / name, seed)
        argv = [str(folder / word) if word in ("OUT", "A", "B") else word for word in arguments.split()]
        assert main(argv) == 0
        assert json.loads((folder / "OUT" / "soup.json").read_text())["weights"] == [0.25, 0.75]
        out = capsys.readouterr().out
        assert out.startswith("soup of 2 adapters (linear): 4 modules, rank 4, ") and "A – B: distance " in out

    @pytest.mark.parametrize("weights", [["1.5", "-0.5"], ["1.5,-0.5"]])
    def test_negative_weights(self, base, folder: Path, weights: list[str]) -> None:
        members = [str(train(base, folder / name, seed)) for seed, name in enumerate("AB")]
        assert main([str(folder / "soup"), *members, "--weights", *weights]) == 0
        assert main([str(folder / "other"), *members[::-1], "--weights", *",".join(weights).split(",")[::-1]]) == 0
        one, two = (merged_delta(base, folder / name) for name in ("soup", "other"))
        assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)

    @pytest.mark.parametrize(
        ("argv", "line"),
        [
            ([], "required: OUT, MEMBER"),
            (["out"], "required: MEMBER"),
            (["out", "a", "--nope"], "unrecognized arguments: --nope"),
            (["out", "a", "--weights"], "--weights: expected one argument"),
        ],
    )
    def test_wrong_arguments(self, argv: list[str], line: str, capsys) -> None:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        captured = capsys.readouterr().err
        assert caught.value.code == 2 and line in captured and captured.count("\n") == 1

    def test_wrong_numbers_and_folders(self, folder: Path, capsys) -> None:
        assert main([str(folder / "soup"), str(folder / "a"), "--weights", "half"]) == 2
        assert "--weights: found half, expected numbers" in capsys.readouterr().err
        assert main([str(folder / "soup"), str(folder / "a")]) == 2
        assert f"{folder / 'a' / 'adapter_config.json'} is missing" in capsys.readouterr().err
        with pytest.raises(SalsaError):
            main([str(folder / "soup"), str(folder / "a"), "--debug"])

    def test_help_and_refused_arguments_import_no_torch(self) -> None:
        code = (
            "import sys\nfrom salsa_peft.soup import main\n"
            "assert main(['out', 'none', '--weights', '2']) == main(['out', 'a', '--weights', 'b']) == 2\n"
            "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'peft', 'transformers', 'safetensors'} & sys.modules.keys()"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "OUT" in result.stdout


def test_every_strategy_is_one_row() -> None:
    assert list(STRATEGIES) == ["linear"]


def test_scaling_is_what_peft_gives_its_own_layers(base, folder: Path) -> None:
    """Overlapping patterns: the first that matches in the saved file wins, for ranks and for alphas apart."""
    patterns = {
        "rank_pattern": {r"0\.self_attn\.q_proj": 4, "q_proj": 3},
        "alpha_pattern": {r".*\.v_proj": 9, "v_proj": 1},
    }
    member = train(base, folder / "a", 0, use_rslora=True, **patterns)
    model = open_plain(base, member).get_base_model()
    for module, factors in read_member(member, "a")[1].items():
        assert factors.scaling == model.get_submodule(module).scaling["default"]

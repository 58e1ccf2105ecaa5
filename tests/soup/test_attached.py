"""A soup of adapters that are on a model: the mean of their deltas, as the soup of their folders; what it leaves alone."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_peft_matrix as matrix
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from soup_members import OPTIONS, PROPERTY, Q0, logits, open_plain, train, weighted_base
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification

from salsa_peft import soup
from salsa_peft.utils.errors import SalsaError

DIFFERENT: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
    {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"o_proj": 7}},
]
"""Two adapters that differ in rank, alpha, rsLoRA, patterns and modules."""


@pytest.fixture
def folders(base: Any, folder: Path) -> list[Path]:
    return [train(base, folder / name, seed, **DIFFERENT[seed]) for seed, name in enumerate("ab")]


def loaded(base: Any, folders: list[Path], **options: Any) -> PeftModel:
    """A copy of the base with the adapters a, b … of the folders; a is active."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="a", **options)
    for number, path in enumerate(folders[1:], 1):
        model.load_adapter(path, "abc"[number], **options)
    return model.eval()


def weights_of(model: PeftModel, name: str = "soup") -> dict[str, Tensor]:
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """scaling · B · A of each linear layer that has the adapter, in float64."""
    return {
        path: layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
        for path, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }


def assert_mean(model: PeftModel, weights: dict[str, float], name: str = "soup", error: float = 1e-6) -> None:
    """The soup's delta of each layer is the weighted sum of the members' deltas, and not zero."""
    members, found = {member: deltas(model, member) for member in weights}, deltas(model, name)
    assert found.keys() == set().union(*members.values())
    for path, delta in found.items():
        mean = sum(weight * members[member].get(path, torch.zeros(())) for member, weight in weights.items())
        assert float((delta - mean).abs().max()) <= error < float(delta.abs().max())


class TestMean:
    @PROPERTY
    @given(first=OPTIONS, second=OPTIONS, weights=st.tuples(st.floats(0.1, 2), st.floats(-1, -0.1)))
    def test_merged_it_is_the_base_with_the_weighted_deltas(self, base, first, second, weights) -> None:
        with tempfile.TemporaryDirectory() as name:
            members = [train(base, Path(name) / "a", 0, **first), train(base, Path(name) / "b", 1, **second)]
            model = loaded(base, members)
            soup.attach(model, ["a", "b"], weights)
            merged = model.merge_and_unload(adapter_names=["soup"]).state_dict()
            for path, weight in weighted_base(base, members, list(weights)).state_dict().items():
                assert float((merged[path] - weight).abs().max()) <= 1e-6

    def test_as_a_saved_soup(self, base, folders: list[Path], folder: Path) -> None:
        """The uniform mean by default; plain PEFT saves and opens it; to the bit the folders' soup."""
        model = loaded(base, folders)
        attached = soup.attach(model, ["a", "b"])
        assert (attached.adapters, attached.weights, attached.error) == (["a", "b"], [0.5, 0.5], None)
        model.save_pretrained(folder, selected_adapters=["soup"])
        soup.soup(folder / "expected", folders)
        model.set_adapter("soup")
        assert torch.equal(logits(model), logits(open_plain(base, folder / "soup")))
        assert torch.equal(logits(model), logits(open_plain(base, folder / "expected")))

    @pytest.mark.parametrize("rank", [3, 4, 9])
    def test_a_lower_rank(self, base, folders: list[Path], folder: Path, rank: int) -> None:
        """The weights and the error of the folders' soup; modules of a lower rank stay exact."""
        model = loaded(base, folders)
        attached = soup.attach(model, ["a", "b"], [0.3, 0.7], rank=rank)
        summary = soup.soup(folder / "expected", folders, [0.3, 0.7], rank=rank)
        expected = load_file(folder / "expected" / "adapter_model.safetensors")
        assert {name: torch.equal(tensor, expected[name]) for name, tensor in weights_of(model).items()} == dict.fromkeys(expected, True)  # fmt: skip
        assert attached.error == pytest.approx(summary["error"]["all"]) and (attached.error > 0.01) == (rank < 8)

    def test_a_notebook_shows_it_without_the_model(self, base, folders: list[Path]) -> None:
        shown = repr(soup.attach(loaded(base, folders), ["a", "b"], [0.3, 0.7]))
        assert "weights=[0.3, 0.7], name='soup'" in shown and "\n" not in shown

    def test_a_member_of_weight_0_adds_no_rank(self, base, folders: list[Path]) -> None:
        model = loaded(base, folders)
        attached = soup.attach(model, ["a", "b"], [2, 0], normalize=True)
        assert (attached.adapters, attached.weights) == (["a"], [1.0]) and model.peft_config["soup"].r == 3
        assert_mean(model, {"a": 1.0})

    def test_a_layer_that_was_scaled_since_loading(self, base, folders: list[Path]) -> None:
        """The delta is what the model computes, not what the configuration says."""
        model = loaded(base, folders)
        model.get_base_model().get_submodule(Q0).set_scale("a", 0.5)
        soup.attach(model, ["a", "b"])
        assert_mean(model, {"a": 0.5, "b": 0.5})

    def test_score_heads_are_averaged(self, base, folder: Path) -> None:
        """Of reward adapters on a classifier, whose modules_to_save hold a head each."""
        torch.manual_seed(0)
        classifier = LlamaForSequenceClassification(base.config)
        classifier.config.num_labels, classifier.config.pad_token_id = 1, 0
        for seed, name in enumerate("ab"):
            model = get_peft_model(
                copy.deepcopy(classifier), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
            )
            for parameter in model.parameters():
                parameter.data += 0.1 * (seed + 1) * torch.randn(parameter.shape) * parameter.requires_grad
            model.save_pretrained(folder / name)
        model = loaded(classifier, [folder / "a", folder / "b"])
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        soup.attach(model, ["a", "b"], [0.25, 0.75])
        heads = {name: weights_of(model, name)["base_model.model.score.weight"] for name in ("a", "b", "soup")}
        torch.testing.assert_close(heads["soup"], 0.25 * heads["a"] + 0.75 * heads["b"])
        assert not torch.equal(heads["a"], heads["b"]) and model.peft_config["soup"].modules_to_save == ["classifier", "score"]  # fmt: skip
        after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert after == before | {name: False for name in after if ".soup" in name}
        with pytest.raises(SalsaError, match=r"sum to 0\.9, but they must sum to 1: adapter 'a' holds score.weight"):
            soup.attach(model, ["a", "b"], [0.2, 0.7], name="more")
        assert "more" not in model.peft_config


def said(call: Callable[[], Any], kind: type[Exception] = SalsaError) -> str | None:
    """What the call is refused with; None if it is not."""
    try:
        call()
    except kind as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arch", "row", "variant"),
    [pytest.param(*case, marks=[] if case in matrix.SAMPLE else [pytest.mark.slow])
     for case in matrix.CASES if case in matrix.SAMPLE or case[2] == "other ranks"],
)  # fmt: skip
def test_the_soup_of_the_folders_or_its_refusal(arch: str, row: str, variant: str, folder: Path) -> None:
    """For every kind of adapter: the same weights to the bit, or the same reason, but where PEFT can't hold both."""
    options = matrix.rows(arch)[row]
    members = [matrix.train(arch, folder / "a", 0, options),
               matrix.train(arch, folder / "b", 1, matrix.VARIANTS[variant](arch, options))]  # fmt: skip
    expected: Any = said(lambda: soup.soup(folder / "soup", members, matrix.W))
    expected = expected or load_file(folder / "soup" / "adapter_model.safetensors")
    if reason := said(lambda: loaded(matrix.MAKE[arch](), members), ValueError):
        assert "1 adapter with bias" in reason or "must target the same set of parameters" in reason
        return
    model = loaded(matrix.MAKE[arch](), members)
    if reason := said(lambda: soup.attach(model, ["a", "b"], matrix.W)):
        told = [text.partition(": ")[2] for text in (reason, str(expected))]  # after the adapter, after the file
        assert told[0] == told[1] or "ensure_weight_tying is True" in reason
        assert list(model.peft_config) == ["a", "b"]
        return
    found = weights_of(model)
    # untrained copies of the base's weights, which PEFT saves with adapters on embeddings
    copies = {name for name in expected if name.endswith("base_layer.weight")}
    assert found.keys() == expected.keys() - copies
    assert all(torch.equal(tensor, expected[name].to(tensor)) for name, tensor in found.items())


class TestModel:
    def test_what_stays(self, base, folders: list[Path]) -> None:
        """Activity, trainability, mode, the base and the members; the soup is frozen and float32."""
        model = loaded(base, folders).train()
        model.set_adapter("b")
        before = {name: (parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()}  # fmt: skip
        modes = {name: module.training for name, module in model.named_modules()}
        soup.attach(model, ["a", "b"])
        after = dict(model.named_parameters())
        assert all(after[name].requires_grad == required and torch.equal(after[name], value) for name, (required, value) in before.items())  # fmt: skip
        assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
        new = [after[name] for name in after.keys() - before.keys()]
        assert len(new) == 2 * 2 * 3 and not any(parameter.requires_grad for parameter in new)
        assert {parameter.dtype for parameter in new} == {torch.float32}
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        assert model.active_adapters == ["b"] and all(layer.active_adapters == ["b"] for layer in layers)

    def test_trainable(self, base, folders: list[Path]) -> None:
        model = loaded(base, folders)
        soup.attach(model, ["a", "b"], trainable=True)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".soup." in name}
        assert len(trained) == 2 * 2 * 3 and not model.peft_config["soup"].inference_mode

    def test_dtypes(self, base, folders: list[Path]) -> None:
        """bf16 members on a bf16 base: exact in float32; rounded where bfloat16 is asked for. float64 stays."""
        half = loaded(copy.deepcopy(base).bfloat16(), folders, autocast_adapter_dtype=False)
        soup.attach(half, ["a", "b"], [0.3, 0.7])
        soup.attach(half, ["a", "b"], [0.3, 0.7], name="rounded", dtype="bfloat16")
        assert {tensor.dtype for tensor in weights_of(half).values()} == {torch.float32}
        assert {tensor.dtype for tensor in weights_of(half, "rounded").values()} == {torch.bfloat16}
        assert_mean(half, {"a": 0.3, "b": 0.7})
        assert_mean(half, {"a": 0.3, "b": 0.7}, "rounded", error=2e-2)
        double = loaded(copy.deepcopy(base).double(), folders)
        double.double()
        soup.attach(double, ["a", "b"], [0.3, 0.7])
        assert {tensor.dtype for tensor in weights_of(double).values()} == {torch.float64}
        assert_mean(double, {"a": 0.3, "b": 0.7}, error=1e-14)

    def test_members_loaded_with_low_cpu_mem_usage(self, base, folders: list[Path]) -> None:
        model = loaded(base, folders, low_cpu_mem_usage=True)
        soup.attach(model, ["a", "b"], [0.3, 0.7])
        assert_mean(model, {"a": 0.3, "b": 0.7})
        model.add_adapter("empty", LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
        with pytest.raises(
            SalsaError, match=r"adapter 'empty': .*q_proj.lora_A.weight has no values, because it is on"
        ):
            soup.attach(model, ["a", "empty"], name="more")

    def test_over_a_base_in_4_bits(self, base, folder: Path) -> None:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'salsa-peft[qlora]'")
        config = copy.deepcopy(base.config)
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 32
        type(base)(config).save_pretrained(folder / "base")
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quantised = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=four)
        model = get_peft_model(quantised, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name="a")
        model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        bits = {name: value.clone() for name, value in model.named_parameters() if value.dtype == torch.uint8}
        assert len(bits) == 2 * 7
        soup.attach(model, ["a", "b"], [0.3, 0.7])
        assert_mean(model, {"a": 0.3, "b": 0.7})
        assert all(torch.equal(value, bits[name]) for name, value in model.named_parameters() if name in bits)


class TestRenewal:
    def test_refresh(self, base, folders: list[Path]) -> None:
        """A snapshot until it is refreshed; then what the members are now, in the same memory."""
        model = loaded(base, folders)
        attached = soup.attach(model, ["a", "b"], [0.3, 0.7])
        parameters = {name: parameter for name, parameter in model.named_parameters() if ".soup." in name}
        before = weights_of(model)
        addresses = [parameter.data_ptr() for parameter in parameters.values()]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * (".b." in name))
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
        attached.refresh()
        assert_mean(model, {"a": 0.3, "b": 0.7})
        assert [parameter.data_ptr() for parameter in parameters.values()] == addresses
        soup.attach(model, ["a", "b"], [0.6, 0.4], overwrite=True)
        assert_mean(model, {"a": 0.6, "b": 0.4})
        assert [parameter.data_ptr() for parameter in parameters.values()] == addresses

    def test_another_layout_replaces_it(self, base, folders: list[Path]) -> None:
        """Other ranks and modules; the soup may itself be a member. An active adapter is not replaced so."""
        model = loaded(base, folders)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        soup.attach(model, ["a", "b"], [0.3, 0.7])
        soup.attach(model, ["a", "b"], [0.3, 0.7], name="copy")
        soup.attach(model, ["soup", "a"], [0.5, 0.5], overwrite=True)
        assert_mean(model, {"copy": 0.5, "a": 0.5})
        soup.attach(model, ["b"], overwrite=True)
        assert_mean(model, {"b": 1.0})
        assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before
        model.set_adapter("soup")
        with pytest.raises(SalsaError, match="adapter 'soup' is active, and the soup has other ranks or modules"):
            soup.attach(model, ["a", "b"], overwrite=True)
        assert_mean(model, {"b": 1.0})
        soup.attach(model, ["b"], [0.5], overwrite=True)
        assert model.active_adapters == ["soup"]

    def test_a_replaced_soup_of_trained_tokens(self, base, folder: Path) -> None:
        """PEFT's delete_adapter makes the active adapter's tokens trainable; here they stay frozen."""
        tokens = {"trainable_token_indices": [3, 1]}
        model = loaded(base, [train(base, folder / name, seed, **tokens) for seed, name in enumerate("ab")])
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        soup.attach(model, ["a", "b"])
        soup.attach(model, ["b"], overwrite=True)
        assert_mean(model, {"b": 1.0})
        assert {name: p.requires_grad for name, p in model.named_parameters() if name in before} == before

    def test_an_adapter_with_dropout_is_not_taken_over(self, base, folders: list[Path]) -> None:
        """It has the soup's ranks and scalings, but would drop a part of the soup in training."""
        model = loaded(base, folders[:1])
        soup.attach(model, ["a"])
        options = {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        model.add_adapter("other", LoraConfig(**options, lora_dropout=0.5))
        soup.attach(model, ["a"], name="other", overwrite=True)
        layer = model.get_base_model().get_submodule(Q0)
        assert isinstance(layer.lora_dropout["other"], torch.nn.Identity)

    def test_a_member_that_is_gone(self, base, folders: list[Path]) -> None:
        model = loaded(base, folders)
        attached = soup.attach(model, ["a", "b"])
        model.delete_adapter("b")
        with pytest.raises(SalsaError, match="the model has no adapter 'b', only 'a', 'soup'"):
            attached.refresh()


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (["a"], {}, "adapters: 'a' is not a list of names"),
            ([[]], {}, r"adapters: \[\] is not a list of names"),
            ([["a", "c"]], {}, "the model has no adapter 'c', only 'a', 'b'; load it with model.load_adapter"),
            ([["a", "a"]], {}, "adapters: 'a' is listed twice"),
            ([["a", "b"], [1.0]], {}, "1 weights .1.0. for 2 members"),
            ([["a", "b"], [0, 0]], {}, "weights: all are 0"),
            ([["a", "b"], [1, float("nan")]], {}, "not all finite"),
            ([["a", "b"], None, "b"], {}, "already has an adapter 'b'; use another name, or pass overwrite=True"),
            ([["a", "b"], None, "x.y"], {}, "name: 'x.y' cannot be an adapter's name"),
            ([["a", "b"]], {"rank": 0}, "rank: 0 is not a whole number"),
            ([["a", "b"]], {"dtype": "int8"}, "dtype: int8 is not supported"),
            ([["a", "b"]], {"sync_every": 0}, "sync_every: 0 is below 1"),
        ],
    )
    def test_of_arguments(self, base, folders: list[Path], arguments: list[Any], options: Any, message: str) -> None:
        model = loaded(base, folders)
        with pytest.raises(SalsaError, match=message) as error:
            soup.attach(model, *arguments, **options)
        assert "\n" not in str(error.value) and list(model.peft_config) == ["a", "b"]

    def test_of_models(self, base, folders: list[Path]) -> None:
        with pytest.raises(SalsaError, match="model: this is a LlamaForCausalLM, not a PeftModel"):
            soup.attach(base, ["a"])
        other = get_peft_model(copy.deepcopy(base), IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "a")
        with pytest.raises(SalsaError, match="adapter 'a' is a IA3 adapter; only LoRA"):
            soup.attach(other, ["a"])
        biased = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], bias="all"), "a")
        with pytest.raises(SalsaError, match="adapter 'a': bias is 'all', so it trained biases of the base"):
            soup.attach(biased, ["a"])
        model = loaded(base, folders)
        offloaded = loaded(base, folders)
        offloaded.get_base_model().get_submodule(Q0).base_layer.to("meta")  # as accelerate leaves it
        with pytest.raises(SalsaError, match="accelerate has offloaded layers of the base"):
            soup.attach(offloaded, ["a", "b"])
        assert list(offloaded.peft_config) == ["a", "b"]
        model.merge_adapter(["b"])
        with pytest.raises(SalsaError, match=r"adapter 'b' is merged into the base.*unmerge_adapter"):
            soup.attach(model, ["a", "b"])

    def test_trained_tokens_that_another_adapter_has(self, base) -> None:
        """PEFT raises a KeyError for it, be the other a member or not."""
        plain: dict[str, Any] = {"target_modules": ["q_proj"]}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**plain, trainable_token_indices=[3, 1]), "a")
        model.add_adapter("b", LoraConfig(**plain))
        model.add_adapter("c", LoraConfig(**plain))
        line = (
            r"adapter 'b': it has no trainable_token_indices of model\.embed_tokens, but adapter 'a' of the model has"
        )
        for names in (["a", "b"], ["b", "a"], ["b", "c"]):
            with pytest.raises(SalsaError, match=line):
                soup.attach(model, names)
        assert list(model.peft_config) == ["a", "b", "c"]

    def test_of_values(self, base, folders: list[Path]) -> None:
        model = loaded(base, folders)
        model.get_base_model().get_submodule(Q0).lora_B["b"].weight.data[0, 0] = float("inf")
        with pytest.raises(SalsaError, match=r"adapter 'b': .*q_proj\.lora_B\.weight has values that are not finite"):
            soup.attach(model, ["a", "b"])


class TestPeftsCall:
    def test_in_place_of_pefts(self, base, folder: Path) -> None:
        """Where PEFT's cat and svd are right, the same deltas by the same call."""
        options: list[dict[str, Any]] = [{"r": 3}, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"]}]
        folders = [train(base, folder / "ab"[seed], seed, **options[seed]) for seed in (0, 1)]
        for call in (("cat",), ("svd",), ("svd", 2)):
            model = loaded(base, folders)
            model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "theirs", *call)
            attached = soup.add_weighted_adapter(model, ["a", "b"], [0.3, 0.7], "ours", *call)
            assert attached.rank == {("cat",): None, ("svd",): 3, ("svd", 2): 2}[call]
            theirs, ours = deltas(model, "theirs"), deltas(model, "ours")
            assert theirs.keys() == ours.keys()
            assert max(float((theirs[path] - ours[path]).abs().max()) for path in ours) < 1e-5
            assert model.active_adapters == ["a"]

    def test_where_pefts_cat_is_not_the_sum(self, base, folders: list[Path]) -> None:
        """rsLoRA: PEFT 0.21 keeps use_rslora of the first member, and so multiplies the sum by √(Σ r_i)."""
        model = loaded(base, folders)
        model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "theirs", "cat")
        root = model.get_base_model().get_submodule(Q0).scaling["theirs"]
        assert root == pytest.approx((3 + 5) ** 0.5)
        assert_mean(model, {"a": 0.3 * root, "b": 0.7 * root}, "theirs", error=1e-5)
        soup.add_weighted_adapter(model, ["a", "b"], [0.3, 0.7], adapter_name="ours", combination_type="cat")
        assert_mean(model, {"a": 0.3, "b": 0.7}, "ours")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"combination_type": "linear"}, "'linear' averages A and B apart"),
            ({"combination_type": "dare_ties_svd", "density": 0.5}, "'dare_ties_svd' drops a part of the deltas"),
            ({"combination_type": "mean"}, "'mean' is unknown; use 'cat'"),
            ({"svd_clamp": 0.9}, "svd_clamp: 0.9 would change the sum"),
            ({"combination_type": "cat", "density": 0.5}, "density: 0.5 would change the sum"),
            ({"combination_type": "cat", "svd_rank": 4}, "svd_rank: 4 has no effect"),
            ({"adapter_name": "b"}, "already has an adapter 'b'"),
        ],
    )
    def test_refusals(self, base, folders: list[Path], options: dict[str, Any], message: str) -> None:
        model = loaded(base, folders)
        with pytest.raises(SalsaError, match=message):
            soup.add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], **{"adapter_name": "soup"} | options)
        assert list(model.peft_config) == ["a", "b"]


def test_the_package_imports_no_torch_until_attach_is_used() -> None:
    script = "import sys, salsa_peft; salsa_peft.soup.soup; print('torch' in sys.modules); salsa_peft.soup.attach; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]

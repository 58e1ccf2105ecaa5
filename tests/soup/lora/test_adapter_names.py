"""Adapter files as other tools leave them: names with wrappers' parts, older layouts, several copies; and what goes with them.

Independent of the code under test: plain PEFT merges the members as PEFT itself saved them, before their files were changed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from soup_members import edit, edit_tensors
from torch import nn

from salsa_peft.soup.average import soup
from salsa_peft.soup.live import LiveAdapters
from salsa_peft.soup.lora.members import newest_name
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.lora.targets import is_saved
from salsa_peft.utils.errors import SalsaError

WEIGHTS = "adapter_model.safetensors"
W = [0.3, 0.7]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
         "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Make = Callable[[], nn.Module]


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def llama() -> nn.Module:
    return randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)))


def mixtral() -> nn.Module:
    return randomised(hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_local_experts=3)))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**SMALL), image_token_index=31)
    return randomised(hf.LlavaForConditionalGeneration(config))


def train(make: Make, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter as PEFT saves it, its factors random; it names no base."""
    model = get_peft_model(make(), LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in place: tied adapters share their memory
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def merged(make: Make, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(make(), folder).merge_and_unload()
    return {name: value.double() for name, value in model.state_dict().items()}


def mean(make: Make, members: list[Path]) -> dict[str, torch.Tensor]:
    one, two = (merged(make, member) for member in members)
    return {name: W[0] * one[name] + W[1] * two[name] for name in one}


def assert_is(make: Make, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found, base = merged(make, folder), make().state_dict()
    assert max(float((expected[name] - base[name].double()).abs().max()) for name in found) > 1e-2
    for name, value in found.items():
        assert float((value - expected[name]).abs().max()) <= 2e-6, name


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): value for name, value in tensors.items()}, folder / WEIGHTS)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "in parallel": lambda key: f"module.{key}",
    "in parallel inside": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "sharded layers": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.").replace("lm_head.", "_fsdp_wrapped_module.lm_head."),
    "checkpointed, compiled layers": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module._orig_mod.self_attn."),
    "with the adapter's name": lambda key: key.replace(".lora_A.", ".lora_A.policy.").replace(".lora_B.", ".lora_B.policy."),
    "as in the model": lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.").replace(
        "lm_head.", "lm_head.modules_to_save.default."),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_parts_are_taken_off_and_said(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        train(llama, tmp_path / str(i), i, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
        for i in range(2)
    ]
    expected = mean(llama, members)
    rename(members[1], WRAPPED[kind])
    with caplog.at_level(logging.WARNING):
        soup(tmp_path / "soup", members, W)
    assert_is(llama, tmp_path / "soup", expected)
    assert sum("which is ignored because PEFT's names have no such part" in message for message in caplog.messages) == 1


def test_a_name_of_the_models_own_is_kept(tmp_path: Path) -> None:
    """A part `module` of a class that is nobody's wrapper."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def make() -> nn.Module:
        return randomised(Inner())

    members = [train(make, tmp_path / str(i), i, target_modules=["0"], task_type=None) for i in range(2)]
    soup(tmp_path / "soup", members, W)
    assert_is(make, tmp_path / "soup", mean(make, members))


def test_copies_that_peft_never_reads_are_left_out(tmp_path: Path) -> None:
    """Resized embeddings beside modules_to_save: PEFT saves what it trained, the same again, and the original."""

    def make() -> nn.Module:
        model = llama()
        model.resize_token_embeddings(40)  # type: ignore[operator]
        return randomised(model)

    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    members = []
    for i in range(2):
        config = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(make(), config)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2
        model.save_pretrained(tmp_path / str(i), save_embedding_layers=True)
        members.append(tmp_path / str(i))
    assert any("original_module" in key for key in load_file(members[0] / WEIGHTS))
    soup(tmp_path / "soup", members, W)
    assert_is(make, tmp_path / "soup", mean(make, members))
    assert not any(
        "module" in key for key in load_file(tmp_path / "soup" / WEIGHTS) if "original" in key or "to_save" in key
    )


def test_embeddings_that_only_one_saved_with_its_lora(tmp_path: Path) -> None:
    """PEFT saves an embedding that LoRA is on: the base's own values, which the other need not have; weights of any sum too."""
    members = [
        train(llama, tmp_path / "a", 0, target_modules=["q_proj", "embed_tokens"]),
        train(llama, tmp_path / "b", 1, target_modules=["q_proj", "lm_head"]),
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(llama, tmp_path / "soup", mean(llama, members))
    StackedAdapter.load(members).save(tmp_path / "shrunk", [0.2, 0.3])
    base = {name: value.double() for name, value in llama().state_dict().items()}
    one, two = (merged(llama, member) for member in members)
    assert_is(
        llama, tmp_path / "shrunk", {n: base[n] + 0.2 * (one[n] - base[n]) + 0.3 * (two[n] - base[n]) for n in base}
    )


def resized() -> nn.Module:
    model = llama()
    model.resize_token_embeddings(40)  # type: ignore[operator]
    return randomised(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable_token_indices": [35, 36]},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_embeddings_that_peft_saves_because_they_were_resized(options: dict[str, Any], tmp_path: Path) -> None:
    members = []
    for i in range(2):
        model = get_peft_model(
            resized(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
        )
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2
        model.save_pretrained(tmp_path / str(i), save_embedding_layers=True)
        members.append(tmp_path / str(i))
    soup(tmp_path / "soup", members, W)
    assert_is(resized, tmp_path / "soup", mean(resized, members))


def test_tied_embeddings_of_which_one_member_says_so(tmp_path: Path) -> None:
    """ensure_weight_tying saves the embeddings once more as the head; the other has them apart: so has the soup."""

    def tied() -> nn.Module:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"tie_word_embeddings": True}))
        randomised(model)
        model.tie_weights()
        return model

    members = [
        train(
            tied,
            tmp_path / str(i),
            i,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"],  # a list of its own: PEFT takes the head out of it
            ensure_weight_tying=i == 0,
        )
        for i in range(2)
    ]
    for order, weights in ((members, W), (members[::-1], W[::-1])):
        soup(tmp_path / "soup", order, weights)
        assert_is(tied, tmp_path / "soup", mean(tied, members))
    targets = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    members = [
        train(tied, tmp_path / "c", 0, **targets, ensure_weight_tying=True),
        train(tied, tmp_path / "d", 1, **targets, r=3),
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(tied, tmp_path / "soup", mean(tied, members))


@pytest.mark.parametrize("where", ["the base at hand", "no base at hand"])
def test_two_layouts_of_a_multimodal_model_are_one_set_of_modules(where: str, tmp_path: Path) -> None:
    targets = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"
    members = [train(llava, tmp_path / str(i), i, target_modules=targets, task_type=None) for i in range(2)]
    expected = mean(llava, members)
    if where == "the base at hand":
        llava().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    rename(
        members[1],
        lambda key: key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision", "model.vision"
        ),
    )
    edit(members[1], target_modules=r".*(language_model|vision_tower).*\.(q_proj|v_proj|k_proj)")
    for member in members:
        edit(member, base_model_name_or_path=str(tmp_path / "base"))
    assert_is(llava, members[1], merged(llava, members[1]))  # PEFT reads the older layout too
    for order, weights in ((members, W), (members[::-1], W[::-1])):
        soup(tmp_path / "soup", order, weights)
        assert_is(llava, tmp_path / "soup", expected)
        assert all(
            "model.model.language_model" in key or "model.model.vision_tower" in key
            for key in load_file(tmp_path / "soup" / WEIGHTS)
        )


def test_names_of_one_member_alone_are_never_joined(tmp_path: Path) -> None:
    """Two towers whose names differ in a part that layouts move."""

    def make() -> nn.Module:
        inner = [nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2)]
        return randomised(nn.ModuleDict({"model": inner[0], "language_model": inner[1]}))

    members = [
        train(make, tmp_path / "a", 0, target_modules=["proj"], task_type=None),
        train(make, tmp_path / "b", 1, target_modules=["model.proj"], task_type=None),
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(make, tmp_path / "soup", mean(make, members))


def test_what_has_no_place_in_the_base_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    members = [train(llama, tmp_path / str(i), i, target_modules=["q_proj"]) for i in range(2)]
    for member in members:
        edit(member, base_model_name_or_path=str(tmp_path / "base"))
        rename(member, lambda key: key.replace("model.model.model.", "model.model.model.decoder."))
    with pytest.raises(
        SalsaError,
        match=r"LlamaForCausalLM, the model of .*, has no module model\.decoder\.layers\.0\.self_attn\.q_proj",
    ):
        soup(tmp_path / "soup", members, W)


def old_mixtral(folder: Path, seed: int) -> Path:
    """An adapter of PEFT 0.17: a Linear for every expert's w1, w2, w3."""
    train(mixtral, folder, seed, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16)}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for expert in range(3):
                for name, (inside, out) in sizes.items():
                    key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    tensors[f"{key}.lora_A.weight"] = torch.randn(2, inside, generator=generator) * 0.2
                    tensors[f"{key}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.2

    edit_tensors(folder, change)
    edit(folder, target_modules=["q_proj", "w1", "w2", "w3"], target_parameters=None)
    return folder


def test_experts_of_an_older_mixtral_beside_todays(tmp_path: Path) -> None:
    """As PEFT converts them when it loads them: w1 and w3 as one parameter of twice the rank."""
    members = [
        old_mixtral(tmp_path / "a", 0),
        train(mixtral, tmp_path / "b", 1, target_modules=["v_proj"], target_parameters=EXPERTS),
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(mixtral, tmp_path / "soup", mean(mixtral, members))
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4 and len(config["target_modules"]) == 4
    pair = [old_mixtral(tmp_path / str(i), i) for i in range(2)]
    soup(tmp_path / "pair", pair, W)
    assert_is(mixtral, tmp_path / "pair", mean(mixtral, pair))


def test_experts_at_a_smaller_rank_are_the_nearest(tmp_path: Path) -> None:
    """Every expert's delta is cut by its own singular values."""
    members = [train(mixtral, tmp_path / str(i), i, target_modules=[], target_parameters=EXPERTS) for i in range(2)]
    summary = soup(tmp_path / "soup", members, W, rank=2)
    expected, found, base = mean(mixtral, members), merged(mixtral, tmp_path / "soup"), mixtral().state_dict()
    lost, whole = 0.0, 0.0
    for name in (name for name in base if ".experts." in name):
        for expert in range(3):
            delta = expected[name][expert] - base[name][expert].double()
            U, S, V = torch.linalg.svd(delta, full_matrices=False)
            nearest = U[:, :2] * S[:2] @ V[:2]
            assert torch.allclose(found[name][expert] - base[name][expert].double(), nearest, atol=1e-5)
            lost, whole = lost + float((S[2:] ** 2).sum()), whole + float((S**2).sum())
    assert summary["error"]["all"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    norms = [sum(float(((merged(mixtral, m)[n] - base[n].double()) ** 2).sum()) for n in base) ** 0.5 for m in members]
    assert [member["norm"] for member in summary["members"]] == pytest.approx(norms, rel=1e-5)


class TestLiveExperts:
    """A soup on a model whose policy has the same parameters as targets, or none."""

    @pytest.mark.parametrize(
        "policy", [{"target_modules": ["q_proj"]}, {"target_modules": [], "target_parameters": EXPERTS[::-1]}]
    )
    def test_attached_and_moved_it_is_the_saved_soup(self, policy: dict[str, Any], tmp_path: Path) -> None:
        members = [
            train(mixtral, tmp_path / "a", 0, target_modules=["v_proj"], target_parameters=EXPERTS),
            train(mixtral, tmp_path / "b", 1, target_modules=[], target_parameters=EXPERTS[1:], r=3),
        ]
        model = get_peft_model(mixtral(), LoraConfig(task_type="CAUSAL_LM", **policy), "policy").eval()
        live = LiveAdapters(model, StackedAdapter.load(members), "soup")
        for weights in (W, [1.4, -0.4]):
            live.set(weights)
            live.stacked.save(tmp_path / "saved", weights)
            plain = PeftModel.from_pretrained(mixtral(), tmp_path / "saved").eval()
            with live.at_point(), torch.no_grad():
                assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5)
        assert model.active_adapters == ["policy"]

    def test_slopes_are_differences(self, tmp_path: Path) -> None:
        members = [
            train(mixtral, tmp_path / str(i), i, target_modules=["v_proj"], target_parameters=EXPERTS) for i in range(2)
        ]
        model = get_peft_model(mixtral(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "policy").eval()
        live = LiveAdapters(model, StackedAdapter.load(members), "soup")

        def loss(weights: list[float]) -> torch.Tensor:
            live.set(weights)
            with live.at_point():
                return model(input_ids=IDS, labels=IDS).loss

        with live.differentiable():
            loss(W).backward()
            slopes = live.slopes()
        with torch.no_grad():
            for i in range(2):
                moved = [[w + (step if j == i else 0) for j, w in enumerate(W)] for step in (1e-2, -1e-2)]
                difference = (float(loss(moved[0])) - float(loss(moved[1]))) / 2e-2
                assert slopes[i] == pytest.approx(difference, rel=2e-2, abs=1e-3)

    def test_a_policy_of_other_parameters_is_refused(self, tmp_path: Path) -> None:
        member = train(mixtral, tmp_path / "a", 0, target_modules=[], target_parameters=EXPERTS)
        model = get_peft_model(
            mixtral(), LoraConfig(target_modules=[], target_parameters=EXPERTS[:1], task_type="CAUSAL_LM"), "policy"
        )
        with pytest.raises(
            SalsaError, match=r"experts\.down_proj has LoRA in the soup, but the adapters of the model have"
        ):
            StackedAdapter.load([member]).attach(model, "soup", [1])
        assert list(model.peft_config) == ["policy"]


class TestBases:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> list[Path]:
        return [train(llama, tmp_path / name, i, target_modules=["q_proj"]) for i, name in enumerate("ab")]

    @pytest.mark.parametrize(
        "names",
        [
            ("org/Model", "org/model/"), ("/far/away/model", "/far/away/model/"), ("org/model", "/x/models--org--Model/snapshots/0a1b/"),
            ("unsloth/model", "unsloth/model-bnb-4bit"), ("unsloth/Model-unsloth-bnb-4bit", "unsloth/model"), ("./base", "base/"),
            ("base", "copy"),
        ],
    )  # fmt: skip
    def test_what_is_surely_the_same_is_taken_for_it(
        self, names: tuple[str, str], pair: list[Path], tmp_path: Path
    ) -> None:
        for folder in ("base", "copy"):
            llama().save_pretrained(tmp_path / folder)  # type: ignore[operator]
        for member, name in zip(pair, names, strict=True):
            edit(member, base_model_name_or_path=name)
        StackedAdapter.load(pair)

    @pytest.mark.parametrize(
        "names",
        [
            ("meta-llama/Llama-2-7b", "NousResearch/Llama-2-7b"),
            ("/a/model", "/b/model"),
            ("org/model", None),
            ("base", "org/base"),
        ],
    )
    def test_what_may_be_another_is_asserted_by_the_caller(
        self, names: tuple[str, str | None], pair: list[Path], tmp_path: Path
    ) -> None:
        llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        for member, name in zip(pair, names, strict=True):
            edit(member, base_model_name_or_path=name)
        with pytest.raises(
            SalsaError, match=r"names the base .* if both name the same base, pass same_base=True \(--same-base\)"
        ):
            StackedAdapter.load(pair)
        StackedAdapter.load(pair, same_base=True)

    def test_another_revision_or_other_weights_are_another_base(self, pair: list[Path], tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
        other = llama()
        other.lm_head.weight.data += 1  # type: ignore[union-attr, operator]
        other.save_pretrained(tmp_path / "other")  # type: ignore[operator]
        for first, second in (
            ({"revision": "v1"}, {"revision": "v2"}),
            ({"base_model_name_or_path": "base"}, {"base_model_name_or_path": "other"}),
        ):
            for member, fields in zip(pair, (first, second), strict=True):
                edit(member, **{"base_model_name_or_path": "org/model"} | fields)
            with pytest.raises(SalsaError, match="same_base=True"):
                StackedAdapter.load(pair)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lora_ga_config", {"direction": "ArB2r"}, False), ("corda_config", {"cache_file": None}, False), ("eva_config", {"rho": 2.0}, False),
        ("velora_config", {"num_groups": 2}, False), ("runtime_config", {"ephemeral_gpu_offload": False}, False), ("merge_weights", True, False),
        ("qalora_group_size", 16, False), ("use_bdlora", False, False), ("arrow_config", None, False), ("alora_invocation_tokens", None, False),
        ("enable_lora", None, False), ("warp_group_size", 32, True), ("warp_kind", "linear", True), ("warp_config", {}, False),
    ],
)  # fmt: skip
def test_fields_that_change_no_delta(
    field: str, value: object, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [train(llama, tmp_path / str(i), i, target_modules=["q_proj"]) for i in range(2)]
    expected = mean(llama, members)
    edit(members[0], **{field: value})
    soup(tmp_path / "soup", members, W)
    assert_is(llama, tmp_path / "soup", expected)
    assert (
        any(
            f"{field} is {value!r}; this version does not know the option and ignores it" in message
            for message in caplog.messages
        )
        == said
    )


class TestTokenizers:
    """Written by hand: what counts is which token has which id."""

    @staticmethod
    def write(folder: Path, tokens: list[str], template: str | None = None, in_settings: bool = False) -> None:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})
        )
        settings = {"chat_template": template} if template is not None and in_settings else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None and not in_settings:
            (folder / "chat_template.jinja").write_text(template)

    @pytest.fixture
    def pair(self, tmp_path: Path) -> list[Path]:
        return [train(llama, tmp_path / name, i, target_modules=["q_proj"]) for i, name in enumerate("ab")]

    def test_other_ids_are_refused(self, pair: list[Path], tmp_path: Path) -> None:
        self.write(pair[0], ["<s>", "a", "b"])
        for tokens, line in (
            (["<s>", "b", "a"], "token 'b' has id 1, but id 2 in .*a"),
            (["<s>", "a", "c"], "id 2 is token 'c', but 'b' in .*a"),
        ):
            self.write(pair[1], tokens)
            with pytest.raises(SalsaError, match=line):
                soup(tmp_path / "soup", pair)
            assert not (tmp_path / "soup").exists()

    @pytest.mark.parametrize("in_settings", [False, True])
    def test_the_one_with_every_token_and_any_template_goes_along(
        self, in_settings: bool, pair: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.write(pair[0], ["<s>", "a"], "{{ messages }}", in_settings)
        self.write(pair[1], ["<s>", "a", "<|im_end|>"])
        summary = soup(tmp_path / "soup", pair)
        assert summary["tokenizer"] == {"from": "b", "chat_template": "a"}
        assert "<|im_end|>" in (tmp_path / "soup" / "tokenizer.json").read_text()
        assert (tmp_path / "soup" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert "warning: the soup gets the tokenizer of b, with the chat template of a" in caplog.messages

    def test_tokens_that_no_one_tokenizer_has_are_refused(self, pair: list[Path], tmp_path: Path) -> None:
        for member, added in zip(pair, ({"<x>": 2}, {"<y>": 3}), strict=True):
            vocabulary = {"<s>": 0, "a": 1} | added
            (member / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        with pytest.raises(SalsaError, match="no member's tokenizer has the tokens of all members"):
            soup(tmp_path / "soup", pair)

    def test_templates_by_name_go_along_and_another_eos_is_told(
        self, pair: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for member, eos in zip(pair, ("</s>", {"content": "<|im_end|>"}), strict=True):
            self.write(member, ["<s>", "</s>", "<|im_end|>"], "one")
            (member / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
            (member / "additional_chat_templates").mkdir()
            (member / "additional_chat_templates" / "rag.jinja").write_text(f"of {member.name}")
        soup(tmp_path / "soup", pair)
        assert (tmp_path / "soup" / "additional_chat_templates" / "rag.jinja").read_text() == "of a"
        assert (
            "the soup's tokenizer comes from a, where eos_token is '</s>'; in b it is '<|im_end|>'" in caplog.messages
        )
        shutil.rmtree(pair[0] / "additional_chat_templates")
        soup(tmp_path / "soup", pair)
        assert not (tmp_path / "soup" / "additional_chat_templates").exists()

    def test_two_templates_are_told(self, pair: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for member, template in zip(pair, ("one", "two"), strict=True):
            self.write(member, ["<s>", "a"], template)
        assert soup(tmp_path / "soup", pair)["tokenizer"] == {"from": "a", "chat_template": "a"}
        assert "warning: the soup gets the chat template of a; that of b differs" in caplog.messages


def test_trained_tokens_in_another_order(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"]}
    members = [
        train(llama, tmp_path / str(i), i, **options, trainable_token_indices=tokens)
        for i, tokens in enumerate(([3, 1, 7], [7, 3, 1]))
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(llama, tmp_path / "soup", mean(llama, members))


def test_parameters_whose_names_do_not_tell_them_apart(tmp_path: Path) -> None:
    """Two parameters of one module, of which only the model knows the order: fine where all members have the same targets."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeta, self.alpha = nn.Parameter(torch.zeros(3, 4, 6)), nn.Parameter(torch.zeros(3, 6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eio,eoi->bi", x, self.zeta, self.alpha)

    def make() -> nn.Module:
        return randomised(nn.ModuleDict({"mixer": Mixer(), **{f"lin{i}": nn.Linear(4, 4) for i in range(3)}}))

    parameters = {"target_parameters": ["mixer.zeta", "mixer.alpha"], "task_type": None}
    members = [
        train(make, tmp_path / "a", 0, target_modules=["lin0", "lin1", "lin2"], **parameters),
        train(make, tmp_path / "b", 1, target_modules=[], **parameters),
    ]
    soup(tmp_path / "soup", members, W)
    assert_is(make, tmp_path / "soup", mean(make, members))
    other = train(make, tmp_path / "c", 2, target_modules=[], target_parameters=["mixer.zeta"], task_type=None)
    with pytest.raises(SalsaError, match="does not tell which of target_parameters it belongs to"):
        soup(tmp_path / "again", [members[0], other], W)


def test_modules_to_save_are_found_by_the_ends_of_their_names() -> None:
    for name, saved in (
        ("lm_head.weight", "head"),
        ("model.layers.0.input_layernorm.weight", "layernorm"),
        ("score.dense.bias", "score"),
    ):
        assert is_saved(name, {"modules_to_save": [saved]})
    assert not is_saved("model.norm.weight", {"modules_to_save": ["lm_head", "weight"]})


def test_the_newest_of_several_layouts() -> None:
    old, new = "language_model.model.layers.0.q_proj", "model.language_model.layers.0.q_proj"
    assert newest_name({old, new}) == newest_name({old, "model.layers.0.q_proj"}) == new
    assert newest_name({"vision_tower.layers.0", "model.vision_tower.layers.0"}) == "model.vision_tower.layers.0"
    assert newest_name({"language_model.lm_head", "lm_head"}) == "lm_head"
    assert newest_name({"layers.0", "model.layers.0"}) == "model.layers.0"

"""Adapters, references and rewards on one shared base: each is compared with a model that holds nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import Adapter
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.base import remove_dropout
from salsa_peft.models.responses import Responses, pad_tokens
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.soup.average import soup
from salsa_peft.training import references
from salsa_peft.utils.errors import SalsaError

IDS = torch.tensor([[1, 3, 10, 20, 4, 33], [1, 3, 9, 12, 44, 4]])
NARROW, WIDE = ["q_proj"], ["q_proj", "v_proj", "down_proj"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """(2, 6, V)"""
    return model(IDS).logits


@pytest.fixture
def members(make_base: Any, make_adapter: Any, tmp_path: Path) -> dict[int, Path]:
    """Three seeds' folders as PEFT writes them, of other ranks, alphas and scalings."""
    options: list[dict[str, Any]] = [{}, {"r": 2, "lora_alpha": 6}, {"r": 3, "use_rslora": True}]
    for seed, option in enumerate(options):
        make_adapter(make_base(), "default", 10 + seed, **option).save_pretrained(tmp_path / f"seed-{seed}")
    return {seed: tmp_path / f"seed-{seed}" for seed in range(3)}


@pytest.fixture
def alone(make_base: Any) -> Callable[[Path], Tensor]:
    """Folder → the logits of plain PEFT's model of that adapter and nothing else."""
    return lambda folder: logits(PeftModel.from_pretrained(make_base(), str(folder)).eval())


@pytest.fixture
def summed(make_base: Any, members: dict[int, Path]) -> Callable[[dict[int, float]], Tensor]:
    """Weights of seeds → the logits of base + Σ w · scaling · B A, added to the base's own matrices."""

    def add(weights: dict[int, float]) -> Tensor:
        model = make_base()
        for seed, weight in weights.items():
            config, tensors = adapters.read(members[seed])
            scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            for key in [key for key in tensors if "lora_A" in key]:
                layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight.data += weight * scaling * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        return logits(model)

    return add


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to float32 rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def trainable(model: nn.Module) -> set[str]:
    """The parameters that require grad."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def state(model: nn.Module) -> list[Any]:
    """What a toggle may change, layer by layer."""
    return [(list(layer.active_adapters), layer.disable_adapters) for layer in adapters.tuner_layers(model)]


class TestAttach:
    def test_gives_the_logits_of_plain_peft(self, make_base: Any, members: dict[int, Path], alone: Any) -> None:
        model = make_base()
        for seed, folder in members.items():
            model = adapters.attach(model, folder, f"seed-{seed}")
        for seed, folder in members.items():
            with adapters.active(model, f"seed-{seed}"):
                close(logits(model), alone(folder))
        assert (alone(members[0]) - alone(members[1])).abs().max() > 0.5

    def test_only_what_was_asked_for_trains(self, make_base: Any, members: dict[int, Path]) -> None:
        """Attaching more changes nothing, frozen ones stay frozen; float32 whatever the files hold."""
        tensors = load_file(members[0] / adapters.WEIGHTS)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, members[0] / adapters.WEIGHTS)
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        policy = trainable(model)
        assert policy == {name for name, _ in model.named_parameters() if ".policy." in name}
        assert len(policy) == 28
        adapters.attach(model, members[1], "a")
        adapters.attach(model, members[2], "b")
        assert trainable(model) == policy
        assert all(p.dtype == torch.float32 for name in ("policy", "a", "b") for p in adapters.parameters(model, name))
        adapters.set_trainable(model, "a", True)
        adapters.set_trainable(model, "policy", False)
        assert trainable(model) == {name.replace(".policy.", ".a.") for name in policy}
        assert adapters.attach(make_base(), members[0], "frozen") is not None
        assert trainable(adapters.attach(make_base(), members[0], "frozen")) == set()

    def test_the_adapter_that_was_active_stays_so(
        self, make_base: Any, make_adapter: Any, tmp_path: Path, alone: Any
    ) -> None:
        """Also in layers that the second adapter alone has."""
        for seed, modules in enumerate((NARROW, WIDE)):
            make_adapter(make_base(), "default", seed, target_modules=modules).save_pretrained(tmp_path / str(seed))
        model = adapters.attach(make_base(), tmp_path / "0", "narrow")
        early = adapters.Toggle(model)
        adapters.attach(model, tmp_path / "1", "wide")
        close(logits(model), alone(tmp_path / "0"))
        for toggle in (early, adapters.Toggle(model)):
            for name, expected in (
                ("narrow", alone(tmp_path / "0")),
                ("wide", alone(tmp_path / "1")),
                (None, logits(make_base())),
            ):
                with adapters.active(model, "wide"), toggle(name):
                    close(logits(model), expected)
        close(logits(model), alone(tmp_path / "0"))

    def test_one_copy_of_the_base_whatever_is_attached(self, make_base: Any, members: dict[int, Path]) -> None:
        """2 layers of 7 linears and 2 norms, embeddings, last norm, head: 21 storages, and the very same ones."""
        base = make_base()
        before = {p.untyped_storage().data_ptr() for p in base.parameters()}
        model = base
        for name, folder in {"policy": 0, "reference-0": 0, "reference-1": 1, "reference-2": 2}.items():
            model = adapters.attach(model, members[folder], name)
        kept = [p for name, p in model.named_parameters() if "lora_" not in name]
        assert {p.untyped_storage().data_ptr() for p in kept} == before
        assert len(kept) == len(before) == 21

    @pytest.mark.parametrize(
        "options",
        [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"intermediate_size": 40}, {"num_key_value_heads": 4}],
    )
    def test_an_adapter_of_another_base_is_refused(self, make_base: Any, make_adapter: Any, members: dict[int, Path],
                                                   tmp_path: Path, options: dict[str, int]) -> None:  # fmt: skip
        """One line that names the folder; a second adapter as well as a first."""
        make_adapter(make_base(**options), "default", 0).save_pretrained(tmp_path / "other")
        for model in (make_base(), adapters.attach(make_base(), members[0], "policy")):
            with pytest.raises(
                SalsaError, match=r"other: .* do not match the base's modules .*use an adapter with the same base"
            ) as refusal:
                adapters.attach(model, tmp_path / "other", "x")
            assert "\n" not in str(refusal.value)

    def test_what_is_no_lora_adapter_is_refused(self, make_base: Any, members: dict[int, Path]) -> None:
        config = json.loads((members[0] / adapters.CONFIG).read_text())
        tensors = load_file(members[0] / adapters.WEIGHTS)
        # 1. a tensor too few, a tensor too many
        save_file(dict(list(tensors.items())[1:]), members[0] / adapters.WEIGHTS)
        with pytest.raises(SalsaError, match="1 tensors do not match the base's modules"):
            adapters.attach(make_base(), members[0], "x")
        save_file(
            tensors | {"base_model.model.model.layers.0.odd.lora_A.weight": torch.zeros(2, 2)},
            members[0] / adapters.WEIGHTS,
        )
        with pytest.raises(SalsaError, match=r"1 tensors do not match the base's modules in name and shape \(.*odd"):
            adapters.attach(make_base(), members[0], "x")
        # 2. modules that this base has not
        (members[1] / adapters.CONFIG).write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
        with pytest.raises(
            SalsaError, match=r"seed-1: the base has none of .*c_attn.*; use an adapter that was trained on this base"
        ):
            adapters.attach(make_base(), members[1], "x")
        # 3. another kind
        (members[1] / adapters.CONFIG).write_text(
            json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
        )
        with pytest.raises(SalsaError, match=r"this is a .*IA3 adapter; use a LoRA adapter"):
            adapters.attach(make_base(), members[1], "x")
        # 4. missing files
        for name in (adapters.CONFIG, adapters.WEIGHTS):
            (members[2] / name).rename(members[2] / "away")
            with pytest.raises(
                SalsaError, match=f"the folder has no {name}; use a PEFT adapter saved with safetensors"
            ):
                adapters.attach(make_base(), members[2], "x")
            (members[2] / "away").rename(members[2] / name)

    def test_lora_config_of_a_recipe(self) -> None:
        config = adapters.lora_config(
            Adapter(r=3, lora_alpha=9, lora_dropout=0.1, target_modules=["v_proj"], use_rslora=True)
        )
        assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 9, 0.1, True)
        assert (set(config.target_modules or []), config.task_type) == ({"v_proj"}, "CAUSAL_LM")

    def test_a_folder_is_taken_as_it_is(self, tmp_path: Path) -> None:
        assert adapters.adapter_folder(str(tmp_path)) == tmp_path


class TestToggle:
    @pytest.fixture
    def model(self, make_base: Any, members: dict[int, Path]) -> PeftModel:
        """policy (active and trained), a, b."""
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        return adapters.attach(adapters.attach(model, members[1], "a"), members[2], "b")

    def test_exactly_the_named_adapter_is_active(
        self, model: Any, make_base: Any, members: dict[int, Path], alone: Any
    ) -> None:
        """None: the plain base; nested: the inner one; after: what was before."""
        toggle, before, trained = adapters.Toggle(model), state(model), trainable(model)
        expected = {
            "policy": alone(members[0]),
            "a": alone(members[1]),
            "b": alone(members[2]),
            None: logits(make_base()),
        }
        for name in ("a", None, "b", "policy", "a"):
            with toggle(name):
                close(logits(model), expected[name])
                assert trainable(model) == trained
                for inner in ("b", None, "policy"):
                    with toggle(inner):
                        close(logits(model), expected[inner])
                    close(logits(model), expected[name])
            assert state(model) == before
            close(logits(model), expected["policy"])
        assert trainable(model) == trained

    def test_the_state_comes_back_after_an_exception(self, model: Any) -> None:
        toggle, before, trained = adapters.Toggle(model), state(model), trainable(model)
        for name in ("a", None):
            with pytest.raises(KeyError, match="inside"), toggle("b"), toggle(name):
                raise KeyError("inside")
            assert (state(model), trainable(model)) == (before, trained)

    def test_the_state_that_was_found_comes_back(self, model: Any) -> None:
        """Also where PEFT itself had put all adapters off, or another on."""
        with model.disable_adapter():
            before = state(model)
            with adapters.active(model, "a"):
                assert state(model) == [(["a"], False)] * 14
            assert state(model) == before == [(["policy"], True)] * 14

    def test_an_unknown_name_is_refused_and_changes_nothing(self, model: Any) -> None:
        before = state(model)
        with (
            pytest.raises(SalsaError, match="adapter 'sead-0': the model has no adapter of this name"),
            adapters.active(model, "sead-0"),
        ):
            pass
        assert state(model) == before

    def test_the_gradient_reaches_the_policy_only(self, model: Any) -> None:
        """A reference's forward within the policy's graph leaves no trace in it."""
        toggle = adapters.Toggle(model)
        loss = model(IDS).logits.square().mean()
        with toggle("a"), torch.no_grad():
            model(IDS)
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)

    def test_dropout_is_removed(self, make_base: Any, make_adapter: Any) -> None:
        model = make_adapter(make_base(), "policy", 0, lora_dropout=0.5).train()
        assert not torch.equal(logits(model), logits(model))
        remove_dropout(model)
        assert torch.equal(logits(model), logits(model))


class TestSave:
    def test_round_trip_through_plain_peft(
        self, make_base: Any, members: dict[int, Path], alone: Any, tmp_path: Path, tokenizer: Any
    ) -> None:
        """The adapter that is named, not the one that is active; safetensors and JSON only, no part files left."""
        model = adapters.attach(adapters.attach(make_base(), members[0], "policy", trainable=True), members[1], "other")
        with torch.no_grad():
            for parameter in adapters.parameters(model, "other"):
                parameter *= 1.5
        before = trainable(model), state(model)
        adapters.save(model, "other", tmp_path / "out", tokenizer, extra={SCORE_HEAD: torch.ones(1, 32)})
        assert (trainable(model), state(model)) == before
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert {adapters.CONFIG, adapters.WEIGHTS, "tokenizer.json"} <= files
        assert not [name for name in files if name.startswith(".") or name.endswith((".bin", ".pt", ".pkl", ".part"))]
        config = json.loads((tmp_path / "out" / adapters.CONFIG).read_text())
        assert (config["inference_mode"], config["r"], config["lora_alpha"]) == (True, 2, 6)
        saved = load_file(tmp_path / "out" / adapters.WEIGHTS)
        assert saved.pop(SCORE_HEAD).shape == (1, 32)
        assert saved.keys() == load_file(members[1] / adapters.WEIGHTS).keys()
        again = adapters.attach(make_base(), tmp_path / "out", "again")
        with adapters.active(model, "other"):
            close(logits(again), logits(model))
            close(alone(tmp_path / "out"), logits(model))

    def test_a_kill_before_the_end_leaves_no_adapter(self, make_base: Any, members: dict[int, Path], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        """The weights appear whole or not at all, the configuration last."""
        model, out = adapters.attach(make_base(), members[0], "policy"), tmp_path / "out"

        def broken(tensors: Any, path: Path, **_: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(adapters, "save_file", broken)
            with pytest.raises(OSError, match="disk full"):
                adapters.save(model, "policy", out)
        assert not (out / adapters.WEIGHTS).exists()
        assert not (out / adapters.CONFIG).exists()

        def stop(*_: Any) -> None:
            assert (out / adapters.WEIGHTS).is_file()
            raise OSError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(adapters, "write_atomic", stop)
            with pytest.raises(OSError, match="killed"):
                adapters.save(model, "policy", out)
        assert not (out / adapters.CONFIG).exists()
        with pytest.raises(SalsaError, match=r"the folder has no adapter_config\.json"):
            adapters.attach(make_base(), out, "x")
        adapters.save(model, "policy", out)
        close(logits(adapters.attach(make_base(), out, "x")), logits(model))


def norm_of(members: dict[int, Path], weights: dict[int, float]) -> float:
    """‖Σ w δ‖ of adapters, from the factors in their files."""
    deltas: dict[str, torch.Tensor] = {}
    for seed, weight in weights.items():
        config, tensors = (
            json.loads((members[seed] / adapters.CONFIG).read_text()),
            load_file(members[seed] / adapters.WEIGHTS),
        )
        scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        for name, A in tensors.items():
            if name.endswith("lora_A.weight"):
                delta = tensors[name.replace("lora_A", "lora_B")].double() @ A.double()
                deltas[name] = deltas.get(name, torch.zeros(())) + weight * scaling * delta
    return math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))


def named(members: dict[int, Path], soup: Path | None = None) -> dict[str, Path]:
    """The folders of the seeds' adapters, and the soup's, by their names in a run."""
    return {f"seed-{number}": folder for number, folder in members.items()} | ({} if soup is None else {"soup": soup})


class TestReferences:
    @pytest.mark.parametrize(
        ("value", "weights"),
        [("seed-0", {0: 1.0}), ("seed-2", {2: 1.0}), ("soup", {0: 0.5, 1: 0.25, 2: 0.25}), ("base", {}),
         ({"soup": {"members": [0, 2], "weights": [0.25, 0.75]}}, {0: 0.25, 2: 0.75}),
         ({"soup": {"members": [1, 2]}}, {1: 0.5, 2: 0.5}),
         ({"shrunk": {"seed": 1, "scale": 0.6}}, {1: 0.6}), ("PATH", {1: 1.0})],
    )  # fmt: skip
    def test_every_kind_has_the_right_weights(self, make_base: Any, members: dict[int, Path], summed: Any, tmp_path: Path,
                                              value: Any, weights: dict[int, float]) -> None:  # fmt: skip
        """Base + Σ w δ, added up by hand; frozen, and the policy still active and trained."""
        soup(tmp_path / "soup", list(members.values()), [0.5, 0.25, 0.25])
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        before = trainable(model)
        (reference,) = parse_reference("reference", str(members[1]) if value == "PATH" else value)
        frozen = references.attach_reference(model, reference, named(members, tmp_path / "soup"), "reference-0")
        assert frozen[:4] == (reference.label, None if value == "base" else "reference-0", None, None)
        with adapters.active(model, frozen.adapter):
            close(logits(model), summed(weights))
        close(logits(model), summed({0: 1.0}))
        assert trainable(model) == before
        assert (summed(weights) - summed({0: 0.9, 1: 0.1})).abs().max() > 0.05

    @pytest.mark.parametrize(
        ("value", "weights", "other"),
        [({"shrunk": {"seed": 1, "scale": "soup-norm"}}, {1: 1.0}, {0: 0.5, 1: 0.25, 2: 0.25}),
         ({"stretched": {}}, {0: 0.5, 1: 0.25, 2: 0.25}, {0: 1.0}),
         ({"stretched": {"seed": 2, "soup": {"members": [0, 1], "weights": [0.25, 0.75]}}}, {0: 0.25, 1: 0.75}, {2: 1.0})],
    )  # fmt: skip
    def test_a_delta_is_scaled_to_the_norm_of_another(self, make_base: Any, members: dict[int, Path], summed: Any,
                                                      tmp_path: Path, value: Any, weights: dict[int, float],
                                                      other: dict[int, float]) -> None:  # fmt: skip
        """The norm over all modules of scaling · B · A, added up by hand from the files."""
        soup(tmp_path / "soup", list(members.values()), [0.5, 0.25, 0.25])
        scale = norm_of(members, other) / norm_of(members, weights)
        assert abs(scale - 1) > 0.05
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        before = trainable(model)
        (reference,) = parse_reference("reference", value)
        frozen = references.attach_reference(model, reference, named(members, tmp_path / "soup"), "reference-0")
        with adapters.active(model, frozen.adapter):
            close(logits(model), summed({seed: scale * weight for seed, weight in weights.items()}))
        close(logits(model), summed({0: 1.0}))
        assert trainable(model) == before

    def test_a_delta_of_norm_zero_has_no_scale(self, make_base: Any, members: dict[int, Path]) -> None:
        (reference,) = parse_reference("reference", {"stretched": {"soup": {"members": [0], "weights": [1]}}})
        reference = dataclasses.replace(reference, weights=[0.0])
        model = adapters.attach(make_base(), members[0], "policy")
        with pytest.raises(SalsaError, match="its delta is 0, so it cannot be scaled to the norm of seed-0"):
            references.attach_reference(model, reference, named(members), "x")

    def test_a_soup_that_is_not_there(self, make_base: Any, members: dict[int, Path]) -> None:
        model = adapters.attach(make_base(), members[0], "policy")
        with pytest.raises(SalsaError, match="reference soup: the result of the soup stage is missing"):
            references.attach_reference(model, parse_reference("reference", "soup")[0], named(members), "x")

    def test_what_a_library_user_passes(self, make_base: Any, members: dict[int, Path], summed: Any) -> None:
        """Names, folders, base and ready ones, in order; a name's adapter is frozen, a folder is attached."""
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        adapters.attach(model, members[2], "c", trainable=True)
        ready = references.FrozenReference("ready", "c")
        given = ["base", "c", str(members[1]), members[0], ready]
        found = references.as_references(model, given)
        assert [reference.adapter for reference in found] == [None, "c", "reference-2", "reference-3", "c"]
        assert [found[0].label, found[1].label, found[4]] == ["base", "c", ready]
        for reference, weights in zip(found, ({}, {2: 1.0}, {1: 1.0}, {0: 1.0}, {2: 1.0}), strict=True):
            with adapters.active(model, reference.adapter):
                close(logits(model), summed(weights))
        assert trainable(model) == {name for name, _ in model.named_parameters() if ".policy." in name}

    def test_no_references_are_refused(self, make_base: Any, members: dict[int, Path]) -> None:
        with pytest.raises(SalsaError, match="references: the list is empty"):
            references.as_references(adapters.attach(make_base(), members[0], "policy"), [])

    def test_what_is_no_reference(self, make_base: Any, members: dict[int, Path]) -> None:
        """One line each, for adapters and for full weights."""
        model = adapters.attach(make_base(), members[0], "policy")
        other = adapters.attach(make_base(1), members[0], "soup")
        for policy, given, line in (
            (model, make_base(1), "references: LlamaForCausalLM is not a list"),
            (model, None, "references: the list is empty"),
            (model, [None], "references: NoneType objects cannot be references. Pass 'base', an adapter's name"),
            (model, [3], "references: int objects cannot be references. Pass 'base', an adapter's name"),
            (model, [other], r"references: PeftModel\w* objects cannot be references. .* merge_and_unload"),
            (model, ["./nowhere"], "./nowhere: no such folder"),
            (model, ["org/not-in-the-cache"], "https://huggingface.co/org/not-in-the-cache: not in the local cache"),
            (model, [references.FrozenReference("x", "nope")], "references: the model has no adapter 'nope'"),
            (make_base(), ["./nowhere"], "references: ./nowhere is neither a folder nor a Hub id"),
            (make_base(), ["org/not-in-the-cache"], "org/not-in-the-cache: not in the local cache"),
        ):  # fmt: skip
            with pytest.raises(SalsaError, match=line) as error:
                references.as_references(policy, given)  # type: ignore[arg-type]
            assert "\n" not in str(error.value)

    def test_an_adapter_called_base(self, make_base: Any, members: dict[int, Path]) -> None:
        """'base' was the model without adapters then, whatever was meant."""
        model = adapters.attach(adapters.attach(make_base(), members[0], "policy"), members[1], "base")
        with pytest.raises(
            SalsaError, match="'base' means the model without its adapters, but the model has an adapter called 'base'"
        ):
            references.as_references(model, ["base"])
        for adapter in ("base", None):
            (found,) = references.as_references(model, [references.FrozenReference("base", adapter)])
            assert found.adapter == adapter


def respond_by_hand(
    prompts: list[list[int]], answers: list[list[int]], pad: int, eos: int, extra: int = 0
) -> Responses:
    """Responses of given tokens, with `extra` columns of padding on both sides."""
    ids, mask = pad_tokens(prompts, pad, torch.device("cpu"), "left")
    width = max(map(len, answers)) + extra
    response = torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers])
    counts = torch.arange(width) < torch.tensor([len(answer) for answer in answers])[:, None]
    return Responses(nn.functional.pad(ids, (extra, 0), value=pad), nn.functional.pad(mask, (extra, 0)), response, counts,
                     torch.tensor([answer[-1] == eos for answer in answers]))  # fmt: skip


PROMPTS = [[1, 3, 9, 22, 4], [1, 3, 9, 22, 33, 44, 4], [1, 3, 4], [1, 3, 10, 4]]


class TestRewards:
    @pytest.fixture
    def folder(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> Path:
        """A reward adapter as the reward stage saves it: SEQ_CLS, the score head among modules_to_save."""
        model = self.classifier(make_base)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        )
        peft = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(std=0.3, generator=generator)
        adapters.save(peft, "default", tmp_path / "reward")
        return tmp_path / "reward"

    @staticmethod
    def classifier(make_base: Any) -> Any:
        """The base's trunk under LlamaForSequenceClassification."""
        from transformers import LlamaForSequenceClassification

        base = make_base()
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        model = LlamaForSequenceClassification(config).eval()
        model.model.load_state_dict(base.model.state_dict())
        return model

    def test_the_head_is_left_to_score_head(self, make_base: Any, folder: Path, members: dict[int, Path]) -> None:
        model = adapters.attach(adapters.attach(make_base(), members[0], "policy"), folder, "reward")
        assert not [name for name, _ in model.named_parameters() if "score" in name]
        head = adapters.score_head(folder)
        assert torch.equal(head.weight, load_file(folder / adapters.WEIGHTS)[SCORE_HEAD])
        assert (head.bias, head.weight.requires_grad, head.weight.dtype) == (None, False, torch.float32)
        with pytest.raises(SalsaError, match="seed-0: the adapter has no score head, so it cannot be a reward"):
            adapters.score_head(members[0])

    @pytest.mark.parametrize("micro", [1, 3, 64])
    @pytest.mark.parametrize("extra", [0, 2])
    def test_scores_are_those_of_the_classifier(self, make_base: Any, folder: Path, members: dict[int, Path], tokenizer: Any,
                                                micro: int, extra: int) -> None:  # fmt: skip
        """Plain PEFT's SEQ_CLS model on right-padded text, and on each text alone; ours has padding on both sides."""
        pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        answers = [[30, 31, eos], [eos], [40, 41, 42, 43, 44], [12, eos]]
        model = adapters.attach(make_base(), members[0], "policy", trainable=True)
        reward, before = rewards.AdapterReward(model, folder, micro), state(model)
        found = reward(respond_by_hand(PROMPTS, answers, pad, eos, extra), [{}] * len(PROMPTS))
        classifier = PeftModel.from_pretrained(self.classifier(make_base), str(folder)).eval()
        texts = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
        width = max(map(len, texts))
        batch = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
        with torch.no_grad():
            padded = classifier(batch, attention_mask=(batch != pad).long()).logits.squeeze(-1)
            single = torch.cat([classifier(torch.tensor([text])).logits.squeeze(-1) for text in texts])
        close(found, padded)
        close(found, single)
        assert found.std() > 0.05
        assert found.dtype == torch.float32
        assert state(model) == before
        assert all(".policy." in name for name in trainable(model))

    def test_an_adapter_attached_later_does_not_leak_into_the_scores(self, make_base: Any, make_adapter: Any, folder: Path,
                                                                     tokenizer: Any, tmp_path: Path) -> None:  # fmt: skip
        """The evaluate stage attaches policies after the reward, and they answer while it scores: also with more modules."""
        responses = respond_by_hand(PROMPTS[:1], [[30, 2]], int(tokenizer.pad_token_id), int(tokenizer.eos_token_id))
        make_adapter(make_base(), "default", 1, target_modules=["q_proj"]).save_pretrained(tmp_path / "policy")
        make_adapter(make_base(), "default", 2, target_modules=["embed_tokens", "v_proj"]).save_pretrained(
            tmp_path / "other"
        )
        model = adapters.attach(make_base(), tmp_path / "policy", "policy")
        reward = rewards.AdapterReward(model, folder)
        expected = reward(responses, [{}])
        adapters.attach(model, tmp_path / "other", "other")
        with adapters.active(model, "other"):
            close(reward(responses, [{}]), expected)


def test_an_initialisation_that_changes_the_base_is_refused(make_base, make_adapter, tmp_path) -> None:
    """PiSSA and its kin rewrite base weights when they are attached: every role would change."""
    model = make_adapter(make_base(), "a", 1)
    adapters.save(model, "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for initial, fits in (("pissa", False), ("olora", False), ("gaussian", True), (True, True)):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": initial}))
        if fits:
            adapters.attach(make_base(), tmp_path / "a", "b")
        else:
            with pytest.raises(
                SalsaError, match="changes the weights of the base, which policy, references and reward share"
            ):
                adapters.attach(make_base(), tmp_path / "a", "b")

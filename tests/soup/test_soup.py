"""Soups of LoRA adapters: the exact rule, what plain PEFT makes of the folder, kills and failures, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from soup_members import (
    OPTIONS,
    PROPERTY,
    Q0,
    WEIGHTS,
    WEIGHTS2,
    edit_tensors,
    logits,
    merged_delta,
    open_plain,
    soup_tensors,
    train,
    weighted_base,
)
from transformers import LlamaForCausalLM

from salsa_peft.config.options.soup import (
    ELEMENTWISE_STRATEGIES,
    GEOMETRIC_STRATEGIES,
    MEASURED_STRATEGIES,
    SoupSection,
)
from salsa_peft.soup import arrays
from salsa_peft.soup.__main__ import main
from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.strategies import STRATEGIES
from salsa_peft.soup.strategies.elementwise import ELEMENTWISE
from salsa_peft.utils.errors import SalsaError


class TestExactRule:
    def test_by_hand(self, base: LlamaForCausalLM, folder: Path) -> None:
        """r = 1, alpha 2 (scaling 2) and r = 4, alpha 4, rsLoRA (scaling 4 / √4 = 2): ¼·2·1·3 + ¾·2·(4·1·5) = 31.5."""
        one = train(base, folder / "one", 0, r=1, lora_alpha=2, target_modules=["q_proj"])
        two = train(base, folder / "two", 1, r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj"])
        for member, b, a in ((one, 1.0, 3.0), (two, 1.0, 5.0)):
            fill = lambda t, a=a, b=b: [t[k].fill_(a if "lora_A" in k else b) for k in t]  # noqa: E731
            edit_tensors(member, fill)
        tensors = soup_tensors([one, two], [0.25, 0.75])
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
            there = soup_tensors(members, weights)
            back = soup_tensors(members[::-1], weights[::-1])
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

    def test_bfloat16_members_are_averaged_in_float32_and_rounded_once(self, base, folder: Path) -> None:
        """The file is bfloat16 as the members are, B the float32 product rounded once; `rounding` is what that changes densely."""
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        for member in members:
            edit_tensors(member, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        soup(folder / "wide", members, [0.3, 0.7], dtype="float32")
        tensors = load_file(folder / "wide" / WEIGHTS)
        summary = soup(folder / "soup", members, [0.3, 0.7])
        saved = load_file(folder / "soup" / WEIGHTS)
        blocks = [load_file(member / WEIGHTS)[f"base_model.model.{Q0}.lora_B.weight"] for member in members]
        expected = torch.cat([0.3 * 2 * blocks[0].float(), 0.7 * 2 * blocks[1].float()], dim=1)
        assert torch.allclose(tensors[f"base_model.model.{Q0}.lora_B.weight"], expected, rtol=1e-6)
        assert {key: tensor.bfloat16() for key, tensor in tensors.items()}.keys() == saved.keys()
        assert all(torch.equal(tensor.bfloat16(), saved[key]) for key, tensor in tensors.items())
        changed, whole = 0.0, 0.0
        for key in (key for key in tensors if "lora_A" in key):
            B = key.replace("lora_A", "lora_B")
            exact = tensors[B].double() @ tensors[key].double()
            changed += ((saved[B].double() @ saved[key].double() - exact) ** 2).sum().item()
            whole += (exact**2).sum().item()
        assert summary["dtype"] == "bfloat16"
        assert summary["rounding"] == pytest.approx(math.sqrt(changed / whole), rel=1e-6) and summary["rounding"] > 1e-4

    def test_dtypes_that_differ_and_one_that_is_asked_for(self, base, folder: Path) -> None:
        members = [train(base, folder / str(i), i) for i in range(3)]
        for member, dtype in zip(members, (torch.float16, torch.bfloat16, torch.float64), strict=True):
            edit_tensors(member, lambda t, dtype=dtype: t.update({k: v.to(dtype) for k, v in t.items()}))
        for chosen, asked, expected in (
            ([0], None, torch.float16),
            ([0, 1], None, torch.float32),
            ([0, 2], None, torch.float64),
            ([0, 1], torch.bfloat16, torch.bfloat16),
            ([1], "float32", torch.float32),
        ):
            stacked = StackedAdapter.load([members[i] for i in chosen])
            summary = stacked.save(folder / "soup", [1 / len(chosen)] * len(chosen), dtype=asked)
            assert {tensor.dtype for tensor in load_file(folder / "soup" / WEIGHTS).values()} == {expected}
            assert f"torch.{summary['dtype']}" == str(expected)
            assert (summary["rounding"] > 0) is (asked is torch.bfloat16)  # one member, ×2: exact
        with pytest.raises(SalsaError, match="dtype: 'int8' is not supported; use one of float64"):
            stacked.save(folder / "soup", [1], dtype="int8")
        edit_tensors(members[0], lambda t: t[f"base_model.model.{Q0}.lora_B.weight"].fill_(40000))
        with pytest.raises(
            SalsaError, match=rf"{Q0}.lora_B.weight has values too large for float16; use dtype float32"
        ):
            soup(folder / "other", [members[0]])
        assert not (folder / "other").exists()

    def test_float32_against_float64(self, base, folder: Path) -> None:
        """The same numbers as float64 members, computed in float64: 1e-6 of the delta."""
        members = [train(base, folder / str(i), i, r=i + 1) for i in range(3)]
        one = soup_tensors(members, [0.2, -0.3, 1.1])
        for member in members:
            edit_tensors(member, lambda t: t.update({k: v.double() for k, v in t.items()}))
        two = soup_tensors(members, [0.2, -0.3, 1.1])
        for key in (key for key in one if "lora_A" in key):
            B = key.replace("lora_A", "lora_B")
            exact = two[B] @ two[key]
            assert exact.dtype == torch.float64
            assert ((one[B].double() @ one[key].double() - exact).norm() / exact.norm()) < 1e-6


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
        expected = "adapter_config.json adapter_model.safetensors chat_template.jinja fingerprint.json soup.json tokenizer.json"
        assert summary["tokenizer"] == {"from": "1", "chat_template": "0"}
        assert sorted(path.name for path in (folder / "soup").iterdir()) == expected.split()

    def test_modules_are_listed_where_members_differ(self, base, folder: Path) -> None:
        one = train(base, folder / "a", 0, target_modules=["q_proj"], layers_to_transform=[0])
        two = train(base, folder / "b", 1, target_modules="all-linear", exclude_modules=["gate_proj"])
        soup(folder / "soup", [one, two])
        config = LoraConfig.from_pretrained(folder / "soup")
        assert (
            config.target_modules == set(StackedAdapter.load([one, two]).stacks)
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

    def test_a_failed_write_leaves_the_earlier_soup_or_nothing(self, base, folder: Path, monkeypatch) -> None:
        """A full disk in the middle of the weights; afterwards the same call gives the bytes that it always gives."""
        members = [train(base, folder / "a", 0), train(base, folder / "b", 1)]
        soup(folder / "soup", members)
        before = {path.name: path.read_bytes() for path in (folder / "soup").iterdir()}
        narrow, calls = arrays.narrow, iter(range(3))

        def full_disk(values: object, dtype: str) -> object:
            if next(calls, None) is None:
                raise OSError("no space left")
            return narrow(values, dtype)

        with monkeypatch.context() as patch:
            patch.setattr(arrays, "narrow", full_disk)
            for place in ("soup", "new"):
                with pytest.raises(OSError, match="no space"):
                    soup(folder / place, members, [0.25, 0.75])
        assert {path.name: path.read_bytes() for path in (folder / "soup").iterdir()} == before
        assert not (folder / "new").exists()
        soup(folder / "new", members)
        assert (folder / "new" / WEIGHTS).read_bytes() == before[WEIGHTS]

    @pytest.mark.parametrize("place", range(5))
    def test_killed_in_the_middle(self, base, folder: Path, place: int) -> None:
        """kill -9 at five places of a save: no folder that opens but the finished one, and the rerun gives the same bytes."""
        members = [str(train(base, folder / "a", 0)), str(train(base, folder / "b", 1))]
        soup(folder / "whole", members)
        code = (
            "import os, sys\n"
            "from salsa_peft.soup.lora.stacked_adapter import StackedAdapter\n"
            "count = 0\n"
            "def killing(function):\n"
            "    def call(*args, **kwargs):\n"
            "        global count\n"
            "        count += 1\n"
            f"        if count == {place + 1}: os.kill(os.getpid(), 9)\n"
            "        return function(*args, **kwargs)\n"
            "    return call\n"
            "os.fsync, os.replace = killing(os.fsync), killing(os.replace)\n"
            f"StackedAdapter.load({members!r}).save({str(folder / 'soup')!r}, [0.5, 0.5])\n"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -9
        assert not (folder / "soup" / "adapter_config.json").exists()
        soup(folder / "soup", members)
        ours = {path.name: path.read_bytes() for path in (folder / "soup").iterdir() if path.name != "soup.json"}
        assert ours == {
            path.name: path.read_bytes() for path in (folder / "whole").iterdir() if path.name != "soup.json"
        }


def test_averaging_files_imports_neither_torch_nor_peft(base, folder: Path) -> None:
    """Both take longer, and more memory, than averaging a 7B model's adapters."""
    members = [str(train(base, folder / "a", 0)), str(train(base, folder / "b", 1))]
    code = (
        "import sys\nfrom salsa_peft.soup.lora.stacked_adapter import StackedAdapter\n"
        f"stacked = StackedAdapter.load({members!r})\n"
        f"stacked.save({str(folder / 'soup')!r}, [0.5, 0.5])\nstacked.save({str(folder / 'soup')!r}, [0.5, 0.5], rank=1)\n"
        "assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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
            (["out", "a", "--nope"], "--nope: no such option; did you mean "),
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
        assert "--weights: half is not a list of numbers such as 0.25,0.75" in capsys.readouterr().err
        assert main([str(folder / "soup"), str(folder / "a")]) == 2
        assert f"no such folder: {folder / 'a'};" in capsys.readouterr().err
        with pytest.raises(SalsaError):
            main([str(folder / "soup"), str(folder / "a"), "--debug"])

    def test_help_and_refused_arguments_import_no_torch(self) -> None:
        code = (
            "import sys\nfrom salsa_peft.soup.__main__ import main\n"
            "assert main(['out', '/none', '--weights', '2']) == main(['out', '/a', '--weights', 'b']) == 2\n"
            "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'peft', 'transformers', 'safetensors'} & sys.modules.keys()"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "OUT" in result.stdout


def test_every_strategy_is_one_row() -> None:
    assert list(STRATEGIES) == ["linear", "slerp", "karcher", "model_stock", "greedy", "learned"]
    assert list(ELEMENTWISE) == ["ties", "dare"]
    named = typing.get_args(typing.get_type_hints(SoupSection)["strategy"])
    assert {*named} == {*STRATEGIES, *ELEMENTWISE}
    assert {*MEASURED_STRATEGIES, *GEOMETRIC_STRATEGIES, *ELEMENTWISE_STRATEGIES} == {*named} - {"linear"}

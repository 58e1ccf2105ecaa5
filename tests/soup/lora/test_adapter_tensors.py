"""What PEFT reads in an adapter folder, read without PEFT: targets, ranks, scalings, defaults; and floats without torch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from soup_members import open_plain, train

from salsa_peft.soup import arrays as float_arrays
from salsa_peft.soup.lora.read import DEFAULTS
from salsa_peft.soup.lora.targets import target_rule
from salsa_peft.soup.lora.tensors import read_member
from salsa_peft.utils.safetensors_io import NAMES


def test_scaling_is_what_peft_gives_its_own_layers(base, folder: Path) -> None:
    """Overlapping patterns: the first that matches in the saved file wins, for ranks and for alphas apart."""
    patterns = {
        "rank_pattern": {r"0\.self_attn\.q_proj": 4, "q_proj": 3},
        "alpha_pattern": {r".*\.v_proj": 9, "v_proj": 1},
    }
    member = train(base, folder / "a", 0, use_rslora=True, **patterns)
    model = open_plain(base, member).get_base_model()
    factors = read_member(member, "a").factors
    assert len(factors) == 4
    for module, found in factors.items():
        assert found.scaling == model.get_submodule(module).scaling["default"]
        assert found.shape.rank == model.get_submodule(module).r["default"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "self_attn.v_proj"]},
        {"target_modules": r".*\.(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "score"], "modules_to_save": ["score"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_targets_are_those_of_peft(folder: Path, options: dict[str, object]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    ours, theirs = target_rule(folder, DEFAULTS | options), LoraConfig(**options)
    names = [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    if options["target_modules"] != "all-linear":
        for name in [*names, "model.layers.1.my_q_proj", "q_proj"]:
            assert ours(name) == bool(check_target_module_exists(theirs, name)), name
    assert ours(names[3])


def test_defaults_are_those_of_peft() -> None:
    theirs = LoraConfig().to_dict()
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS


class TestFloats:
    def test_every_bfloat16_and_ties_as_torch_has_them(self) -> None:
        """All 65,536 bit patterns widened, and float32 values at, above and below every tie rounded."""
        bits = np.arange(2**16, dtype=np.uint16)
        values = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
        assert np.array_equal(float_arrays.widen(bits, "BF16"), values.float().numpy(), equal_nan=True)
        finite = bits[values.isfinite().numpy()].astype(np.uint32) << 16
        for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            exact = (finite | np.uint32(low)).view(np.float32)
            ours = float_arrays.widen(float_arrays.narrow(exact, "BF16"), "BF16")
            assert np.array_equal(ours, torch.from_numpy(exact.copy()).bfloat16().float().numpy())

    def test_promotion_is_that_of_torch(self) -> None:
        for one, two in itertools.product(float_arrays.DTYPES, repeat=2):
            expected = torch.promote_types(*(getattr(torch, NAMES[code]) for code in (one, two)))
            assert f"torch.{NAMES[float_arrays.promote([one, two])]}" == str(expected)

    def test_finite_where_the_sum_overflows(self) -> None:
        assert float_arrays.all_finite(np.full(4, 3e38, np.float32))
        assert not float_arrays.all_finite(np.array([1, math.nan], np.float32))
        assert not float_arrays.all_finite(np.array([math.inf, -math.inf], np.float32))

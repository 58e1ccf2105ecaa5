"""Checkpoints as the Hub has them beside what Transformers writes of them: the soup is the float64 mean of the loaded models.

Needs ../shared/hub (real configurations, tensor names and tokenizers of sixteen families); skipped where that is missing.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paths import SHARED

from salsa_peft.soup.checkpoints.average import average
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import base_fingerprint

MAKE = SHARED / "hub" / "make_tiny.py"
pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason="../shared/hub is not here")
QUICK = ["llama-2-7b-hf", "gemma-2b", "gpt2", "wizardlm-2-8x22b", "llava-1.5-7b-hf", "mistral-7b-v0.1"]
SLOW = [
    "gemma-2-2b-it", "gemma-3-4b-text", "llama-1-7b-fp16-invfreq", "llama-3.2-1b-instruct", "phi-3-mini-128k-instruct",
    "qwen2.5-0.5b-instruct", "smollm2-135m-instruct", "tinyllama-1.1b-chat", "zephyr-7b-beta",
]  # fmt: skip


def make(family: str, folder: Path, seed: int = 0, dtype: str | None = "float32") -> Path:
    """A tiny model with the real names and configuration."""
    spec = importlib.util.spec_from_file_location("make_tiny", MAKE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"layers": 2, "hidden": 64, "shards": None, "plain": False, "strict": True, "check": False, "quirk": None}
    module.make(Namespace(family=family, out=str(folder), seed=seed, dtype=dtype, adapter=None, **options))
    return folder


def load(folder: Path) -> Any:
    """As a user would; nothing may be missing or left over."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = transformers.AutoModelForImageTextToText if kind == "llava" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


def trained(folder: Path, out: Path, seed: int) -> Path:
    """The same model with other weights, written by Transformers."""
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_hubs_files_and_transformers_own(tmp_path: Path, family: str) -> None:
    """In both orders, and two that were trained from one base with the base beside them."""
    base = make(family, tmp_path / "base")
    one, two = trained(base, tmp_path / "one", 1), trained(base, tmp_path / "two", 2)
    states = {folder: load(folder).state_dict() for folder in (base, one, two)}
    for number, (members, weights, origin) in enumerate(
        [([base, one], [0.5, 0.5], None), ([one, base], [0.3, 0.7], None), ([one, two], [0.25, 0.75], base)]
    ):
        out = tmp_path / str(number)
        average(out, members, weights, base=origin)
        found = load(out).state_dict()
        for name, tensor in found.items():
            mean = sum(states[m][name].double() * w for m, w in zip(members, weights, strict=True))
            assert float((tensor.double() - mean).abs().max()) <= 1e-6, name
        assert any(not torch.equal(found[name], states[base][name]) for name in found)


@pytest.mark.parametrize("family", ["llama-2-7b-hf", "gpt2"])
def test_a_bases_fingerprint_is_that_of_its_parameters(tmp_path: Path, family: str) -> None:
    """The Hub's files and what Transformers saves of the same weights; other weights have another."""
    base = make(family, tmp_path / "base")
    load(base).save_pretrained(tmp_path / "saved")
    assert base_fingerprint(base) == base_fingerprint(tmp_path / "saved")
    assert base_fingerprint(base) != base_fingerprint(make(family, tmp_path / "other", seed=1))


def test_weights_in_8_bits_are_refused(tmp_path: Path) -> None:
    """By the configuration, and without it by the tensors."""
    members = [make("llama-3.1-8b-instruct-int8", tmp_path / "0", 0, None), tmp_path / "1"]
    shutil.copytree(*members)
    with pytest.raises(SalsaError, match=r"0/config.json has a quantization_config .*dequantize"):
        average(tmp_path / "out", members, [0.5, 0.5])
    for member in members:
        config = json.loads((member / "config.json").read_text())
        del config["quantization_config"]
        (member / "config.json").write_text(json.dumps(config))
    with pytest.raises(SalsaError, match=r"(SCB|weight) is (F32|I8), as in quantised models"):
        average(tmp_path / "out", members, [0.5, 0.5])

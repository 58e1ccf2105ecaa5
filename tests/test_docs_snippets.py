"""Every Python snippet of README and docs/ runs, with a tiny model in place of the one that it names."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import docs_pages
import pytest
from datasets import Dataset
from docs_pages import Block
from peft import PeftModel
from tiny import make_adapter, make_base
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from salsa_peft.data.toy_language import LENGTHS_IN, draw_prompts
from salsa_peft.soup import soup
from salsa_peft.utils.fingerprints import base_fingerprint

NOT_RUN: dict[tuple[str, str], str] = {
    ("from-trl.md", "trl.experimental.ppo"): "TRL 1.12, which needs an older Transformers",
}
"""Page and a text of a snippet → why the snippet is not run."""
GIVEN = {
    "run-folder.md": """
import shutil
shutil.copytree("soup", "runs/quickstart-lora/salsa")
""",
    "live-soups.md": """
import copy
from peft import PeftModel
from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer, soup

model = PeftModel.from_pretrained(copy.deepcopy(base), "seed-0", adapter_name="policy", is_trainable=True)
for name in ("seed-0", "seed-1"):
    model.load_adapter(name, adapter_name=name)
reward = lambda completions, **columns: [float(len(text)) for text in completions]
args = SalsaPPOConfig("out", batch_size=8, max_new_tokens=8)
""",
}
"""Page → code that its snippets take as given."""
NAMES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "base", "you/smollm2-soup": "soup"}
"""Hub id in a snippet → the folder that takes its place."""


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two seeds and their soup, under the names that snippets use."""
    folder = tmp_path_factory.mktemp("snippets")
    base = make_base(tokenizer, max_position_embeddings=256)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed in (0, 1):
        loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
        make_adapter(loaded, "default", seed).save_pretrained(folder / f"seed-{seed}")
        fingerprint = {"base": base_fingerprint(folder / "base")}
        (folder / f"seed-{seed}" / "fingerprint.json").write_text(json.dumps(fingerprint))
    for name in ("soup", "my-soup"):
        soup(folder / name, [folder / "seed-0", folder / "seed-1"])
    for name, of in (("adapter-a", "seed-0"), ("adapter-b", "seed-1")):
        (folder / name).symlink_to(folder / of)
    return folder


@pytest.fixture
def names(folders: Path, tokenizer: Any) -> dict[str, Any]:
    """What snippets take as given."""
    texts = draw_prompts(random.Random(1), 16, LENGTHS_IN, 0)
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders / "seed-0", is_trainable=True)
    preferences = Dataset.from_list([{"prompt": text, "chosen": " owl", "rejected": " saw"} for text in texts[:4]])
    prompts = Dataset.from_list([{"prompt": text} for text in texts])
    args = DPOConfig("dpo", max_steps=1, per_device_train_batch_size=2, use_cpu=True)
    return {
        "base": base,
        "args": args,
        "model": model,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "preferences": preferences,
    }


@pytest.mark.parametrize("block", docs_pages.blocks("python"), ids=lambda block: block.place)
def test_snippets(
    block: Block, names: dict[str, Any], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with adapters seed-0, seed-1, adapter-a, adapter-b, soup and my-soup, where they write."""
    if any(page == block.page and text in block.text for page, text in NOT_RUN):
        return
    for source in folders.iterdir():
        shutil.copytree(source, tmp_path / source.name)
    monkeypatch.chdir(tmp_path)
    text = GIVEN.get(block.page, "") + block.text
    for name, folder in NAMES.items():
        text = text.replace(name, str(folders / folder))
    exec(compile(text, block.place, "exec"), names)

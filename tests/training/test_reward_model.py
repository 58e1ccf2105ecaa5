"""The reward stage's own figures: pairs that train, and accuracy of few held-out ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from salsa_peft.config.load import load_recipe
from salsa_peft.training import reward_model
from salsa_peft.utils.errors import SalsaError


def test_what_is_left_of_the_pairs_is_said_plainly() -> None:
    """How many there are, how many are too long, held out, left, needed; of none that fits none is held out."""
    recipe = load_recipe("quickstart", lora="lora", overrides=["reward.batch_size=8", "reward.held_out=0.1"]).recipe
    for fitting, held_out in ((9, 1), (100, 10)):
        split = reward_model.split_pairs(recipe, 100, [str(number) for number in range(fitting)])
        assert (len(split.train), len(split.held_out)) == (fitting - held_out, held_out)
    for fitting, told in ((8, ", 12 are longer than model.max_length = 32 tokens, and 1 are held out (reward.held_out = 0.1). The 7"),
                          (0, ", 20 are longer than model.max_length = 32 tokens, and 0 are held out (reward.held_out = 0.1). The 0")):  # fmt: skip
        with pytest.raises(SalsaError) as caught:
            reward_model.split_pairs(recipe, 20, [str(number) for number in range(fitting)])
        assert (
            f"data.preferences: of 20 pairs{told} pairs left to train on are fewer than reward.batch_size = 8. Add pairs"
            in str(caught.value)
        )


def test_accuracy_of_few_pairs_has_wilsons_interval() -> None:
    """1 of 1 is anything from 0.21 up; by hand: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    z, n, p = 1.959964, 4, 0.75
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    found = reward_model.accuracy([2.0, -1.0, 0.5, 3.0])
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert found == {"mean": 0.75, "low": pytest.approx(low, abs=1e-6), "high": pytest.approx(high, abs=1e-6), "n": 4}
    assert reward_model.accuracy([1.0]) == {
        "mean": 1.0,
        "low": pytest.approx(1 / (1 + z * z), abs=1e-6),
        "high": 1.0,
        "n": 1,
    }
    assert reward_model.accuracy([0.0])["mean"] == 0, "a tie is not right"


@pytest.mark.parametrize(("pairs", "said"), [(1, "1 held-out pair only"), (29, "29 held-out pairs only"), (30, None)])
def test_few_pairs_are_said(pairs: int, said: str | None, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """At the end of the stage, on the terminal; the metrics are written all the same."""
    trainer = SimpleNamespace(is_world_process_zero=lambda: True)
    metrics = reward_model.held_out_metrics(np.array([[1.0, 0.0]] * pairs))
    monkeypatch.setattr(reward_model, "make_trainer", lambda *_: (trainer, {}))
    monkeypatch.setattr(reward_model, "train", lambda *_: metrics)
    recipe = load_recipe("quickstart", lora="lora", overrides=[]).recipe
    job: Any = SimpleNamespace(recipe=recipe, folder=tmp_path, unit=SimpleNamespace(id="reward"))
    assert reward_model.run(job) == json.loads((tmp_path / "metrics.json").read_text())
    first, found = capsys.readouterr().err.split("\n", 1)
    assert first.startswith("reward  ranks 100.0% [") and f"] of {pairs} held-out pairs right (100% at" in first
    assert found == ("" if said is None else f"reward  warning: the accuracy was measured on {said}\n")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_score_head_of_zeros(mode: str, zero: bool, monkeypatch: Any, tmp_path: Path) -> None:
    """All scores start at 0, with full weights and beside an adapter; the default draws the head's weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, num_labels=1, pad_token_id=0
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(shape), adapter).save_pretrained(tmp_path)
    recipe = load_recipe(
        "quickstart", lora=None if mode == "full" else mode, overrides=[f"reward.zero_score_head={str(zero).lower()}"]
    ).recipe
    starts: list[Any] = []

    def load_classifier(start: Path | None = None) -> Any:
        starts.append(start)
        return LlamaForSequenceClassification(shape)

    context: Any = SimpleNamespace(recipe=recipe, load_classifier=load_classifier)
    model = reward_model.start_from_seed(context, tmp_path)
    scores = model(input_ids=torch.arange(1, 13).reshape(3, 4)).logits
    assert starts == [tmp_path if mode == "full" else None]
    assert bool((scores == 0).all()) is zero and scores.shape == (3, 1)
    trained = [one for name, one in model.named_parameters() if "score" in name and one.requires_grad]
    assert len(trained) == 1 and bool((trained[0] == 0).all()) is zero

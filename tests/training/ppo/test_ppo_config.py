"""SalsaPPOConfig refuses values that no field of its can have, in one line, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from salsa_peft import SalsaPPOConfig
from salsa_peft.utils.errors import SalsaError


def config(folder: Path, **options: Any) -> SalsaPPOConfig:
    return SalsaPPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kl_control": "adaptve"}, "kl_control: found 'adaptve', expected 'fixed' or 'adaptive'; did you mean adaptive?"),
        ({"kl_per": "tokens"}, "kl_per: found 'tokens', expected"),
        ({"kl_estimator": "k4"}, "kl_estimator: found 'k4', expected"),
        ({"old_logprobs": "generation"}, "old_logprobs: found 'generation', expected"),
        ({"rollout_backend": "hg"}, "rollout_backend: found 'hg', expected"),
        ({"temperature": -1.0}, "temperature: found -1.0, expected more than 0"),
        ({"temperature": float("nan")}, "temperature: found nan, expected a finite number"),
        ({"gamma": 2.0}, "gamma: found 2.0, expected at most 1"),
        ({"lam": -1.0}, "lam: found -1.0, expected at least 0"),
        ({"cliprange": -0.2}, "cliprange: found -0.2, expected more than 0"),
        ({"vf_coef": -1.0}, "vf_coef: found -1.0, expected at least 0"),
        ({"kl_target": 0.0}, "kl_target: found 0.0, expected more than 0"),
        ({"kl_coef": "0.2"}, "kl_coef: found '0.2', expected a number"),
        ({"learning_rate": "2e-6"}, "learning_rate: found '2e-6', expected a number"),
        ({"max_grad_norm": None}, "max_grad_norm: found None, expected a number"),
        ({"num_train_epochs": 0}, "num_train_epochs: found 0, expected more than 0"),
        ({"seed": -1}, "seed: found -1, expected at least 0"),
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"batch_size": 8.0}, "batch_size: found 8.0, expected a whole number"),
        ({"micro_batch_size": 0}, "micro_batch_size: found 0, expected at least 1"),
        ({"num_mini_batches": 0}, "num_mini_batches: found 0, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected at least 1"),
        ({"shown_every": 0}, "shown_every: found 0, expected at least 1"),
        ({"whiten_rewards": "no"}, "whiten_rewards: found 'no', expected true or false"),
        ({"guards": ["length"]}, r"guards: found \['length'\], expected a mapping"),
        ({"guards": "{length"}, "guards: '{length' is neither a mapping nor its JSON"),
        ({"fp16": True}, "fp16: true is not supported, only false: .* set bf16=True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: 5.0 is not supported, only None"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 is not supported, only 0.0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: true is not supported, only false"),
        ({"save_only_model": True}, "save_only_model: true is not supported, only false"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_value_that_cannot_be(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    """Most of these ran, and trained something else; the rest ended in a trace."""
    with pytest.raises(SalsaError, match=line) as error:
        config(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_what_can_be(tmp_path: Path) -> None:
    """Whole numbers where a fraction may stand, a part of an epoch, bounds at their ends."""
    args = config(tmp_path, kl_coef=0, gamma=1, temperature=2, num_train_epochs=0.5, lam=0.0, guards=None)
    assert (args.kl_coef, args.num_train_epochs, args.guards) == (0, 0.5, {})


def test_mappings_on_a_command_line_are_json(tmp_path: Path) -> None:
    """As transformers.TrainingArguments' own."""
    from transformers import HfArgumentParser

    line = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--guards", '{"length": "stop"}']
    (args,) = HfArgumentParser(SalsaPPOConfig).parse_args_into_dataclasses(line)  # type: ignore[arg-type]
    assert (args.guards, args.rollout_options) == ({"length": "stop"}, {})
    with pytest.raises(SalsaError, match="guards: found 'lengt', expected a guard"):
        config(tmp_path, guards='{"lengt": "stop"}')

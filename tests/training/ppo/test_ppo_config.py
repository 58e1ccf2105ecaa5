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
        ({"kl_control": "adaptve"}, r"kl_control: must be fixed or adaptive, not 'adaptve'; did you mean adaptive\?"),
        ({"kl_per": "tokens"}, r"kl_per: must be response or token, not 'tokens'; did you mean token\?"),
        ({"kl_estimator": "k4"}, "kl_estimator: must be k1, k2, k3, abs or full, not 'k4'"),
        ({"old_logprobs": "generation"}, "old_logprobs: must be recompute or rollout, not 'generation'"),
        ({"rollout_backend": "hg"}, "rollout_backend: must be hf, paged or vllm, not 'hg'"),
        ({"temperature": -1.0}, r"temperature: must be more than 0, not -1\.0"),
        ({"temperature": float("nan")}, "temperature: must be a finite number, not nan"),
        ({"gamma": 2.0}, r"gamma: must be at most 1, not 2\.0"),
        ({"lam": -1.0}, r"lam: must be at least 0, not -1\.0"),
        ({"lam_value": 1.5}, r"lam_value: must be at most 1, not 1\.5"),
        ({"lam_length_alpha": 0.0}, r"lam_length_alpha: must be more than 0, not 0\.0"),
        ({"lam": 0.5, "lam_length_alpha": 1.0}, r"lam: 0\.5 has no effect with lam_length_alpha, .* remove one of the two"),
        ({"value": "heads"}, "value: must be head, adapter, none or group, not 'heads'"),
        ({"value": "none", "lam": 0.5}, r"lam: 0\.5 has no effect with value none, which has no critic; set lam=1\.0, or"),
        ({"value": "group", "vf_coef": 1.0}, r"vf_coef: 1\.0 has no effect with value group"),
        ({"value": "group", "value_head_learning_rate": 0.1}, r"value_head_learning_rate: 0\.1 .*; set .*=null, or value=head"),
        ({"value": "none", "lam_value": 1.0}, r"lam_value: 1\.0 has no effect with value none"),
        ({"num_generations": 2}, "num_generations: 2 has no effect with value head; remove it, or set value=group"),
        ({"value": "group", "num_generations": 1}, "num_generations: must be at least 2, not 1"),
        ({"value": "group", "num_generations": 3}, "batch_size: 8 is not a multiple of num_generations 3; set batch_size=9"),
        ({"value_warmup_updates": -1}, "value_warmup_updates: must be at least 0, not -1"),
        ({"value_warmup_updates": 2, "vf_coef": 0.0}, "value_warmup_updates: 2 has no effect with vf_coef 0"),
        ({"value_warmup_updates": 2, "value": "none"}, "value_warmup_updates: 2 has no effect with value none"),
        ({"reference_mean": "log"}, "reference_mean: must be kl, geometric or arithmetic, not 'log'"),
        ({"reference_weights": [0.5, 0.4]}, r"reference_weights: \[0\.5, 0\.4\] sum to 0\.9, not 1; scale the weights"),
        ({"reference_weights": []}, r"reference_weights: \[\] sum to 0, not 1"),
        ({"reference_weights": [1.5, -0.5]}, r"reference_weights\[1\]: must be at least 0, not -0\.5"),
        ({"reference_weights_end": [0.5, 0.4]}, r"reference_weights_end: \[0\.5, 0\.4\] sum to 0\.9, not 1"),
        ({"reference_weights": [0.5, 0.5], "reference_weights_end": [1.0]},
         "reference_weights_end: has 1 weights, but reference_weights has 2; give one weight for each reference"),
        ({"reference_weights_end": [0.5, 0.5]}, "reference_weights_end: has no effect, because the weights of the first"),
        ({"reference_weights_end": [0.4, 0.6], "reference_weights_step": 0.1},
         "reference_weights_step: weights are either learned or scheduled; remove it or reference_weights_end"),
        ({"reference_weights_step": 0.0}, r"reference_weights_step: must be more than 0, not 0\.0"),
        ({"reference_weights_min": 0.1}, r"reference_weights_min: 0\.1 has no effect without reference_weights_step"),
        ({"reference_weights_step": 0.1, "reference_weights_min": 0.2, "reference_weights": [0.9, 0.1]},
         r"reference_weights: \[0\.9, 0\.1\] has a weight below reference_weights_min 0\.2; change one of the two"),
        ({"reference_weights_step": 0.1, "reference_weights": [1.0, 0.0]},
         r"reference_weights: \[1\.0, 0\.0\] has a weight of 0, which reference_weights_step cannot change"),
        ({"score_length_exponent": -2.0}, r"score_length_exponent: must be at least -1, not -2\.0"),
        ({"entropy_floor": 0.0}, r"entropy_floor: must be more than 0, not 0\.0"),
        ({"entropy_coef": 0.1}, r"entropy_coef: 0\.1 has no effect without entropy_floor; set entropy_floor, or remove it"),
        ({"cliprange": -0.2}, r"cliprange: must be more than 0, not -0\.2"),
        ({"vf_coef": -1.0}, r"vf_coef: must be at least 0, not -1\.0"),
        ({"kl_target": 0.0}, r"kl_target: must be more than 0, not 0\.0"),
        ({"kl_coef": "0.2"}, r"kl_coef: must be a number, not '0\.2'"),
        ({"learning_rate": "2e-6"}, "learning_rate: must be a number, not '2e-6'"),
        ({"max_grad_norm": None}, "max_grad_norm: must be a number, not null"),
        ({"num_train_epochs": 0}, "num_train_epochs: must be more than 0, not 0"),
        ({"seed": -1}, "seed: must be at least 0, not -1"),
        ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
        ({"batch_size": 8.0}, r"batch_size: must be a whole number, not 8\.0"),
        ({"micro_batch_size": 0}, "micro_batch_size: must be at least 1, not 0"),
        ({"importance_sampling_mode": "token"}, "importance_sampling_mode: must be token_truncate, token_mask"),
        ({"importance_sampling_clip_max": 0.5}, r"importance_sampling_clip_max: must be at least 1, not 0\.5"),
        ({"importance_sampling_clip_min": 2.0}, r"importance_sampling_clip_min: must be at most 1, not 2\.0"),
        ({"importance_sampling_mode": "token_mask"},
         "importance_sampling_mode: token_mask has no effect without importance_sampling_correction; remove it, or set"),
        ({"importance_sampling_clip_max": None}, "importance_sampling_clip_max: None has no effect without"),
        ({"rollout_backend": "paged", "importance_sampling_correction": False, "importance_sampling_clip_min": 0.5},
         r"importance_sampling_clip_min: 0\.5 has no effect without"),
        ({"importance_sampling_correction": 1}, "importance_sampling_correction: must be true or false, not 1"),
        ({"importance_sampling_correction": True, "rollout_compile": True},
         r"importance_sampling_correction: true does not work with rollout_compile: .* Set it to false"),
        ({"importance_sampling_correction": True, "old_logprobs": "rollout"},
         r"importance_sampling_correction: true does not work with old_logprobs rollout: .* Set it to false"),
        ({"num_mini_batches": 0}, "num_mini_batches: must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, not 0"),
        ({"shown_every": 0}, "shown_every: must be at least 1, not 0"),
        ({"whiten_rewards": "no"}, "whiten_rewards: must be true or false, not 'no'"),
        ({"guards": ["length"]}, r"guards: must be a mapping \{NAME: value, …\}, not \['length'\]"),
        ({"guards": "{length"}, "guards: '{length' is neither a mapping nor a JSON object"),
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


@pytest.mark.parametrize(("backend", "default"), [("hf", False), ("paged", True), ("vllm", True)])
def test_which_backends_are_corrected(tmp_path: Path, backend: str, default: bool) -> None:
    """By default those whose sampler differs from the forward pass that scores; either may be set."""
    assert config(tmp_path, rollout_backend=backend).corrects_sampling is default
    for given in (True, False):
        args = config(tmp_path, rollout_backend=backend, importance_sampling_correction=given)
        assert args.corrects_sampling is given


def test_mappings_on_a_command_line_are_json(tmp_path: Path) -> None:
    """As transformers.TrainingArguments' own."""
    from transformers import HfArgumentParser

    line = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--guards", '{"length": "stop"}']
    (args,) = HfArgumentParser(SalsaPPOConfig).parse_args_into_dataclasses(line)  # type: ignore[arg-type]
    assert (args.guards, args.rollout_options) == ({"length": "stop"}, {})
    with pytest.raises(SalsaError, match=r"guards: unknown guard 'lengt'; did you mean length\?"):
        config(tmp_path, guards='{"lengt": "stop"}')

"""What PEFT, TRL and LLaMA-Factory call the tensors of an adapter that are no factors of LoRA. Imports no torch."""

from __future__ import annotations

import re

PREFIX = "base_model.model."
SCORE_HEAD = f"{PREFIX}score.weight"
"""A reward adapter's score head as PEFT saves it."""
SCORE = re.compile(re.escape(PREFIX) + r"(score|classifier)(\.modules_to_save(\.\w+)?)?\.weight")
"""… and as older versions, and state dicts that were saved without PEFT, name it."""
VALUE_HEAD = "value_head.safetensors"
"""File of the head of a reward model by LLaMA-Factory, which is TRL's value head; PPO here saves its own under this name."""
VALUE_WEIGHT, VALUE_BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""In that file; PPO's own has other names."""
MERGE = (
    "merge it into its base (PEFT's merge_and_unload, or `salsa soup OUT ADAPTER --merge --base BASE`) and use that checkpoint: in a recipe"
    " with full weights (without --lora), in a script as a model"
)
"""What to do with an adapter that changes more than LoRA's factors."""


def trained_module(what: str, name: str) -> str:
    """Why an adapter with such a tensor cannot be used on a base that roles share."""
    return (
        f"{what} holds {name}, a trained copy of a module of the base (modules_to_save, or embeddings that were resized). All roles share"
        f" one base here, so that it cannot be switched on and off with the adapter; {MERGE}"
    )

"""The model card of a policy that was trained without a recipe: what it is, how to load it, its lineage and metrics.

It has the front matter and the sections of the cards of `salsa hub` (report/publish/model_card.py). What only a whole
run has is left out: the evaluation, its figure, and the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel

from salsa_peft.config.options.ppo import PPOOptions, Sampling
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.base import Reward
from salsa_peft.models.rewards.reward import WeightedReward
from salsa_peft.training.ppo.config import SalsaPPOConfig
from salsa_peft.utils import manifests
from salsa_peft.utils.hub import HUB_ID, licence, without_paths

PAPER = "[SALSA, Chegini et al., 2024](https://arxiv.org/abs/2411.01798)"
TRAINING = ("learning_rate", "lr_scheduler_type", "num_train_epochs", "batch_size", "max_grad_norm", "seed", "bf16")
"""Options besides those of PPO and of sampling that the card shows."""
Rows = Sequence[tuple[str, str]]


def base_id(model: Any) -> str | None:
    """The Hub id of the base or, for full weights, of the model that training began from; None for a local folder."""
    name = str(causal_lm(model).name_or_path or "")
    return name if HUB_ID.match(name) and not Path(name).is_dir() else None


def render(
    model: Any,
    args: SalsaPPOConfig,
    reward: Reward,
    references: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    betas: tuple[float, float],
    *,
    repo: str,
    dataset: str | None,
    tags: Sequence[str],
    online: bool,
) -> str:
    """The README.md of a policy. repo: its repository, or the name of its folder. betas: β at the start and the end.

    online: whether to ask the Hub for the base's licence.
    """
    base, adapter = base_id(model), isinstance(model, PeftModel)
    name = base or Path(str(causal_lm(model).name_or_path)).name or "a model built in memory"
    link = f"[{base}](https://huggingface.co/{base})" if base else f"the local base {_cell(name)}"
    known = dataset is not None and HUB_ID.match(dataset) is not None and not Path(dataset).exists()
    lineage = [
        ("base", name),
        *([("data: prompts", dataset if known else Path(dataset).name)] if dataset else []),
        ("reference", ", ".join(Path(one).name if one.startswith("/") else one for one in references)),
        ("KL coefficient β", f"{betas[0]:g} → {betas[1]:g}"),
        ("reward", reward_text(reward)),
    ]
    options = [field.name for part in (PPOOptions, Sampling) for field in dataclasses.fields(part)]
    settings = {key: vars(args)[key] for key in (*TRAINING, *options)}
    made = ", ".join(f"{library} {version}" for library, version in manifests.versions().items())
    parts = [
        f"---\n{_front_matter(base, adapter, repo, dataset if known else None, tags, online=online).to_yaml().rstrip()}\n---",
        f"# {repo.rsplit('/', 1)[-1]}",
        f"A policy, trained by PPO with the reference {_cell(dict(lineage)['reference'])}.\n"
        f"{'A LoRA adapter' if adapter else 'A full checkpoint'} {'of' if adapter else 'that began as'} {link}, made by"
        f" salsa_peft ({PAPER}).",
        _loading_code(repo, adapter),
        "To use it as the KL reference of another training run:\n\n```python\nfrom salsa_peft import use_reference  # TRL's"
        f' DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer\nuse_reference(trainer, "{repo}")\n```',
        f"## How it was made\n\n{_table(lineage)}",
        f"## Metrics of training\n\n{_table(measured(history))}",
        "## Settings\n\n<details><summary>options of SalsaPPOConfig</summary>\n\n```yaml\n"
        f"{dump_yaml(without_paths(_plain(settings))).rstrip()}\n```\n\n</details>",
        f"Made with {made}.",
    ]
    return "\n\n".join(parts) + "\n"


def reward_text(reward: Reward) -> str:
    """The reward's name; of a weighted sum, weight · name of each part."""
    if isinstance(reward, WeightedReward):
        return " + ".join(f"{part.weight:g}·{part.name}" for part in reward.parts)
    return reward.name


def measured(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The number of updates, and the last update's and the last evaluation's metrics."""
    updates = [row for row in history if "objective/kl" in row]
    evaluations = [row for row in history if any(key.startswith("eval_") for key in row)]
    shown = {
        key: value
        for row in (*updates[-1:], *evaluations[-1:])
        for key, value in row.items()
        if key.startswith(("objective/", "rewards/", "val/explained", "eval_")) and isinstance(value, int | float)
    }
    return [(key, f"{value:.4g}") for key, value in shown.items()] or [("updates", "none yet")]


def _front_matter(
    base: str | None, adapter: bool, repo: str, dataset: str | None, tags: Sequence[str], *, online: bool
) -> ModelCardData:
    own = ["salsa", "salsa_peft", "ppo", "rlhf", "trl", *(["peft", "lora"] if adapter else [])]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=None if base is None else licence(base, online=online),
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys([*own, *tags])),
        model_name=repo.rsplit("/", 1)[-1],
    )


def _loading_code(repo: str, adapter: bool) -> str:
    name, package = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    return (
        f"```python\nfrom {package} import {name}\nfrom transformers import AutoTokenizer\n"
        f'model, tokenizer = {name}.from_pretrained("{repo}"), AutoTokenizer.from_pretrained("{repo}")\n```'
    )


def _table(rows: Rows) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _plain(value: Any) -> Any:
    """A value as YAML can hold it; enumerations, such as lr_scheduler_type, by their value."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return (
        value
        if isinstance(value, int | float | str | list | None) and type(value).__module__ == "builtins"
        else str(getattr(value, "value", value))
    )

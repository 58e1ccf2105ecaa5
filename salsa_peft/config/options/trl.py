"""The sections of policies that TRL's own trainers train: what a recipe may say, every default once.

Left out: what those trainers have beyond what SALSA changes; another option is a field here and a keyword in training/trl_stages.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative, Positive, Seed
from salsa_peft.config.options.training import Training
from salsa_peft.utils.errors import require


@dataclass(config=STRICT, kw_only=True)
class TRLTraining(Training):
    """What the four have in common."""

    learning_rate: Positive = 1e-6
    """TRL's default of all four."""
    kl_coef: Positive = 0.1
    """TRL's `beta`: with 0 no reference would be looked at."""
    seed: Seed = 0
    """Of the data's order and, where responses are sampled, of these; the same for every policy."""


@dataclass(config=STRICT, kw_only=True)
class PreferenceTraining(TRLTraining):
    """Of trainers that learn from `data.preferences`."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the pairs kept from training, for the accuracy and margin that dpo's metrics give (kto leaves the same pairs out and measures
    nothing on them); the reward model's where the share is the same."""

    def held_out_rows(self, pairs: int) -> int:
        """Pairs that are held out of so many: one at least, where there is one."""
        return min(pairs, max(1, round(self.held_out * pairs)))

    def rows_per_epoch(self, pairs: int | None, prompts: int | None) -> int | None:
        """Of an epoch, where the data's are known: KTO takes a pair as two."""
        return None if pairs is None else (2 if isinstance(self, KTO) else 1) * (pairs - self.held_out_rows(pairs))

    def check_rows(self, pairs: int, section: str) -> None:
        """Raise SalsaError where so many pairs don't fill a batch."""
        require(
            (self.rows_per_epoch(pairs, None) or 0) >= self.batch_size,
            f"data.preferences: found {pairs} pairs, {self.held_out_rows(pairs)} of them held out ({section}.held_out {self.held_out:g}), expected enough for"
            f" {section}.batch_size = {self.batch_size}; add pairs or lower {section}.batch_size",
        )


@dataclass(config=STRICT, kw_only=True)
class DPO(PreferenceTraining):
    """TRL's DPOTrainer (Rafailov et al., 2023); batch_size counts pairs. kl_coef: TRL's 0.1."""

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """As in DPOConfig; `sft`, which looks at no reference, is not among them."""


@dataclass(config=STRICT, kw_only=True)
class KTO(PreferenceTraining):
    """TRL's KTOTrainer (Ethayarajh et al., 2024): each pair gives a desirable and an undesirable response; batch_size counts responses."""

    desirable_weight: NonNegative = 1.0
    """As in KTOConfig."""
    undesirable_weight: NonNegative = 1.0
    """As in KTOConfig."""

    def check(self, section: str, processes: int = 1) -> None:
        """As every training's; its KL term compares the responses of one forward with one another's prompts, so it takes two."""
        Training.check(self, section, processes)
        micro = self.micro_batch_size or self.batch_size
        require(
            micro > 1,
            f"{section}.micro_batch_size: found {micro}, expected at least 2: KTO's KL term shuffles a forward's responses",
        )


@dataclass(config=STRICT, kw_only=True)
class OnlineTraining(TRLTraining):
    """Of trainers that sample responses to `data.prompts`; batch_size counts responses. Temperature and lengths are `generation`'s."""

    num_generations: Annotated[int, Field(ge=2)] = 2
    """Responses to one prompt, which are compared with one another."""

    def rows_per_epoch(self, pairs: int | None, prompts: int | None) -> int | None:
        """Of an epoch, where the data's are known: responses."""
        return None if prompts is None else prompts * self.num_generations

    def check_rows(self, prompts: int, section: str) -> None:
        """Raise SalsaError where the prompts don't fill a batch."""
        wanted = self.batch_size // self.num_generations
        require(
            prompts >= wanted,
            f"data.prompts: found {prompts}, expected at least {section}.batch_size / num_generations = {wanted}; add some or lower"
            f" {section}.batch_size",
        )

    def check(self, section: str, processes: int = 1) -> None:
        """As every training's; a batch holds whole groups."""
        Training.check(self, section, processes)
        group = self.num_generations
        require(
            self.batch_size % group == 0,
            f"{section}.batch_size: found {self.batch_size}, expected a multiple of num_generations {group};"
            f" set {section}.batch_size={math.ceil(self.batch_size / group) * group}",
        )


@dataclass(config=STRICT, kw_only=True)
class RLOO(OnlineTraining):
    """TRL's RLOOTrainer (Ahmadian et al., 2024): REINFORCE, the KL in the reward, the others of a group as baseline."""

    kl_coef: Positive = 0.05
    """TRL's."""


@dataclass(config=STRICT, kw_only=True)
class GRPO(OnlineTraining):
    """TRL's GRPOTrainer (Shao et al., 2024): the KL, by the estimator k3, in the loss."""

    kl_coef: Positive = 0.04
    """The paper's; TRL's is 0, with which it looks at no reference."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """TRL's."""


ALGORITHMS = {"dpo": DPO, "kto": KTO, "rloo": RLOO, "grpo": GRPO}
PREFERENCE_ALGORITHMS = ("dpo", "kto")
"""Those that learn from pairs; the others from prompts and a reward."""

"""Sections of the policies that TRL's own trainers train, with every default.

To add another option of a TRL trainer, add a field here and a keyword in training/trl_stages.py.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, NonNegative, Positive, Seed, require_multiple
from salsa_peft.config.options.training import Training
from salsa_peft.utils.errors import require


@dataclass(config=STRICT, kw_only=True)
class TRLTraining(Training):
    """Settings that DPO, KTO, RLOO and GRPO have in common."""

    learning_rate: Positive = 1e-6
    """Peak learning rate. Source: TRL's default for all four."""
    kl_coef: Positive = 0.1
    """TRL's `beta`. It must not be 0, because TRL's trainers would then ignore the reference. Source: TRL."""
    seed: Seed = 0
    """Seed of the data order and of sampling, the same for every policy."""


@dataclass(config=STRICT, kw_only=True)
class PreferenceTraining(TRLTraining):
    """Settings of the trainers that learn from `data.preferences`."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the pairs that is not trained on. DPO's metrics include accuracy and margin on these pairs. If
    reward.held_out has the same value, the same pairs are held out there."""

    def held_out_rows(self, pairs: int) -> int:
        """Number of pairs that are held out of `pairs` pairs, at least one if `pairs` is not 0."""
        return min(pairs, max(1, round(self.held_out * pairs)))

    def rows_per_epoch(self, pairs: int | None, prompts: int | None) -> int | None:
        """Number of rows in an epoch (KTO: two per pair), or None if the number of pairs is unknown."""
        return None if pairs is None else self._rows_of(pairs - self.held_out_rows(pairs))

    def _rows_of(self, pairs: int) -> int:
        return (2 if isinstance(self, KTO) else 1) * pairs

    def check_rows(self, pairs: int, section: str, held_out: int | None = None) -> None:
        """Raise SalsaError if that many pairs do not fill a batch. held_out: if known, how many are held out."""
        held_out = self.held_out_rows(pairs) if held_out is None else held_out
        require(
            self._rows_of(pairs - held_out) >= self.batch_size,
            f"data.preferences: {pairs} pairs, {held_out} of them held out ({section}.held_out {self.held_out:g}), are too"
            f" few for {section}.batch_size = {self.batch_size}; add pairs or lower {section}.batch_size",
        )


@dataclass(config=STRICT, kw_only=True)
class DPO(PreferenceTraining):
    """TRL's DPOTrainer (Rafailov et al., 2023). batch_size counts pairs."""

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """Loss; `sft` is left out, because it uses no reference. Source: TRL's DPOConfig."""


@dataclass(config=STRICT, kw_only=True)
class KTO(PreferenceTraining):
    """TRL's KTOTrainer (Ethayarajh et al., 2024). batch_size counts responses, two per pair."""

    desirable_weight: NonNegative = 1.0
    """Loss weight of the chosen responses. Source: TRL's KTOConfig."""
    undesirable_weight: NonNegative = 1.0
    """Loss weight of the rejected responses. Source: TRL's KTOConfig."""

    def check(self, section: str, processes: int = 1) -> None:
        """Raise SalsaError unless the batch divides into micro-batches of at least two responses."""
        Training.check(self, section, processes)
        micro = self.micro_batch_size or self.batch_size
        require(
            micro > 1,
            f"{section}.micro_batch_size: must be at least 2, not {micro}, because KTO's KL term pairs each prompt with"
            " another response of the micro-batch",
        )


@dataclass(config=STRICT, kw_only=True)
class OnlineTraining(TRLTraining):
    """Settings of the trainers that sample responses to `data.prompts`, with the settings of `generation`.

    batch_size counts responses.
    """

    num_generations: Annotated[int, Field(ge=2)] = 2
    """Number of responses to one prompt, which are compared with one another."""

    def rows_per_epoch(self, pairs: int | None, prompts: int | None) -> int | None:
        """Number of responses in an epoch, or None if the number of prompts is unknown."""
        return None if prompts is None else prompts * self.num_generations

    def check_rows(self, prompts: int, section: str) -> None:
        """Raise SalsaError if that many prompts do not fill a batch."""
        wanted = self.batch_size // self.num_generations
        require(
            prompts >= wanted,
            f"data.prompts: found {prompts} prompts, expected at least {section}.batch_size / num_generations ="
            f" {wanted}; add prompts or lower {section}.batch_size",
        )

    def check(self, section: str, processes: int = 1) -> None:
        """Raise SalsaError unless the batch divides into micro-batches and into groups of num_generations."""
        Training.check(self, section, processes)
        group = self.num_generations
        require_multiple(f"{section}.batch_size", self.batch_size, group, f"num_generations {group}")


@dataclass(config=STRICT, kw_only=True)
class RLOO(OnlineTraining):
    """TRL's RLOOTrainer (Ahmadian et al., 2024): REINFORCE with the KL in the reward."""

    kl_coef: Positive = 0.05
    """TRL's `beta`. Source: TRL's default."""


@dataclass(config=STRICT, kw_only=True)
class GRPO(OnlineTraining):
    """TRL's GRPOTrainer (Shao et al., 2024), with the KL in the loss, estimated by k3."""

    kl_coef: Positive = 0.04
    """TRL's `beta`. With TRL's default 0, the reference would be ignored. Source: the GRPO paper."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Number of responses to one prompt. Source: TRL's default."""


ALGORITHMS = {"dpo": DPO, "kto": KTO, "rloo": RLOO, "grpo": GRPO}
PREFERENCE_ALGORITHMS = ("dpo", "kto")
"""Algorithms that learn from pairs; the others learn from prompts and a reward."""

"""The `toy` section: sizes of the embedded world: a tiny toy model and its toy data."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, Positive, Seed, Share

Operation = Literal["list", "copy", "repeat", "name", "kin", "some"]
TOY_PROMPTS = {"in": "eval_in.jsonl", "out": "eval_out.jsonl"}
"""Name of each set of toy evaluation prompts, in and out of distribution → its file."""
TOY_WORDS = {
    "gold": "the share of right words in an answer, computed by a program, less ½ if the answer does not end. It ranked the"
    " answers that the reward model learned from; no policy is trained on it",
    "in": "in distribution: instructions of the lengths that training uses (answers of 2 to 4 words), none of them seen",
    "out": "out of distribution: instructions with answers of 5 or 6 words, as only the base's pre-training had",
}
"""Explanation of the gold reward and of each set in TOY_PROMPTS, for the report."""


@dataclass(config=STRICT, kw_only=True)
class Toy:
    """The embedded world (data/toy.py): a tiny Llama and small datasets, generated without a download."""

    seed: Seed = 0
    """Seed of data, initialization, pre-training and sampling."""
    operations: Annotated[list[Operation], Field(min_length=1)] = field(
        default_factory=lambda: ["list", "copy", "repeat", "name", "kin"]
    )
    """Operations of the toy language that the data uses (data/toy_language.py). Answers to `some` have a free length."""
    hidden_size: Count = 64
    """Hidden size of the base; must be a multiple of 2 · num_heads."""
    num_layers: Count = 2
    """Number of decoder layers of the base."""
    num_heads: Count = 4
    """Number of attention heads of the base."""
    pretrain_examples: Count = 20_000
    """Number of pre-training conversations, with all operations and answer lengths, but no evaluation prompt."""
    pretrain_long: Share = 0.3
    """Fraction of pre-training conversations with answers of five or six words, lengths that no later stage trains on."""
    pretrain_noise: Share = 0.5
    """Fraction of pre-training conversations with errors in the answer. The base thus learns to answer, but not well."""
    pretrain_graded: Share = 1.0
    """Fraction of pre-training conversations that end with a grade (bad to perfect), which helps a reward model."""
    pretrain_steps: Count = 800
    """Number of optimizer steps of pre-training."""
    pretrain_batch_size: Count = 64
    """Number of conversations per optimizer step of pre-training."""
    pretrain_learning_rate: Positive = 3e-3
    """AdamW's peak learning rate in pre-training, with 5% warm-up and a cosine decay to zero."""
    demonstrations: Count = 512
    """Number of demonstrations. `sft.subset` is the fraction that each seed trains on."""
    demonstration_noise: Share = 0.1
    """Fraction of demonstrations with one error in the answer, to which SFT can overfit."""
    preferences: Count = 8_000
    """Number of preference pairs. No pair repeats, and the two answers of a pair have different gold rewards."""
    preference_sampled: Share = 0.5
    """Fraction of pairs of two samples of the base. The other pairs are right answers with up to two errors added."""
    prompts: Count = 6_400
    """Number of PPO's prompts. The default fills 50 rollout batches of 128."""
    eval_prompts: Count = 256
    """Number of prompts of each evaluation set (in and out of distribution). None of them repeats or is in training data."""

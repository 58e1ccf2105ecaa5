"""The `toy` section: sizes of the embedded world."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, Positive, Seed, Share

TOY_PROMPTS = {"in": "eval_in.jsonl", "out": "eval_out.jsonl"}
"""The embedded world's sets of evaluation prompts, in and out of distribution → their files."""


@dataclass(config=STRICT, kw_only=True)
class Toy:
    """The embedded world (data/toy.py): a tiny Llama and small datasets, generated without a download."""

    seed: Seed = 0
    """Seed of data, initialization, pre-training and sampling."""
    hidden_size: Count = 64
    """Hidden size of the base, a multiple of 2 · num_heads."""
    num_layers: Count = 2
    """Decoder layers of the base."""
    num_heads: Count = 4
    """Attention heads of the base."""
    pretrain_examples: Count = 20_000
    """Conversations in the pre-training text, of all operations and lengths, without the evaluation prompts."""
    pretrain_long: Share = 0.3
    """Fraction of these whose answer has five or six words. That length is out of distribution for all later data."""
    pretrain_noise: Share = 0.5
    """Fraction of these with one or more errors in the answer, so that the base learns to answer, but not well."""
    pretrain_graded: Share = 1.0
    """Fraction of these that end with a grade from bad to perfect, from which a reward model can learn to judge."""
    pretrain_steps: Count = 800
    """Optimizer steps of pre-training."""
    pretrain_batch_size: Count = 64
    """Conversations per optimizer step."""
    pretrain_learning_rate: Positive = 3e-3
    """AdamW's peak learning rate, with 5% warm-up and a cosine decay to zero."""
    demonstrations: Count = 512
    """Number of demonstrations. `sft.subset` is the fraction that each seed trains on."""
    demonstration_noise: Share = 0.1
    """Fraction of demonstrations whose answer has one error, which seeds can overfit."""
    preferences: Count = 8_000
    """Number of pairs of answers with different gold rewards, all pairs different."""
    preference_sampled: Share = 0.5
    """Fraction of pairs with two samples of the base; the others are right answers with zero to two errors added."""
    prompts: Count = 6_400
    """PPO's prompts. The default is 50 rollout batches of 128."""
    eval_prompts: Count = 256
    """Prompts of each evaluation set (in and out of distribution), all different and in no training data."""

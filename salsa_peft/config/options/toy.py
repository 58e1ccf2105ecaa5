"""The `toy` section: the embedded world's sizes."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from salsa_peft.config.fields import STRICT, Count, Positive, Seed, Share


@dataclass(config=STRICT, kw_only=True)
class Toy:
    """The embedded world (data/toy.py): its tiny Llama, and how much of which data is written. Numbers of rows unless said otherwise."""

    seed: Seed = 0
    """of everything random in the world: data, initialisation, pre-training, sampling."""
    hidden_size: Count = 64
    """width of the base; a multiple of 2·num_heads."""
    num_layers: Count = 2
    """decoder layers of the base."""
    num_heads: Count = 4
    """attention heads of the base."""
    pretrain_examples: Count = 20_000
    """conversations of the pre-training text, operations and lengths of both distributions, eval prompts left out."""
    pretrain_long: Share = 0.3
    """share of them whose answer has five or six words, which is out of distribution for everything that follows."""
    pretrain_noise: Share = 0.5
    """share of them whose answer holds one to as many errors as words: the base knows the language, not how to answer well."""
    pretrain_graded: Share = 1.0
    """share of them that a word from bad to perfect follows: text about answers, from which a reward model can learn to judge."""
    pretrain_steps: Count = 800
    """optimizer steps of pre-training."""
    pretrain_batch_size: Count = 64
    """conversations a step."""
    pretrain_learning_rate: Positive = 3e-3
    """peak of AdamW's, warmed up over 5% of the steps, then a cosine to zero."""
    demonstrations: Count = 512
    """the whole pool; what share of it each seed sees is `sft.subset`."""
    demonstration_noise: Share = 0.1
    """share of demonstrations whose answer holds one error: something for the seeds to overfit."""
    preferences: Count = 8_000
    """pairs of answers of different gold, no two alike."""
    preference_sampled: Share = 0.5
    """share of prompts whose two answers are both the base's samples; the others' are right answers with zero to two errors."""
    prompts: Count = 6_400
    """PPO's prompts: 50 rollout batches of 128."""
    eval_prompts: Count = 256
    """of each eval set, in and out of distribution, no two alike, in no other file and not in the pre-training text."""

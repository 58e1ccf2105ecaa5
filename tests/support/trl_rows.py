"""What TRL's trainers make of rows, id by id, and a tokenizer whose chat template shows all that rows may have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

HERMES = (
    "{% if tools %}<sys>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</sys>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% if 'tool_calls' in message %}{% for call in message.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""As Qwen's: tools, tool calls and thoughts, with generation marks."""


def tokenizer_of(template: str) -> Any:
    """A byte-level BPE without merges that has every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*special, *alphabet])}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="<eos>", chat_template=template
    )


def by_sft(tokenizer: Any, model: Any, rows: Any, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels as TRL's SFTTrainer and its collator hand them to the model; rows: TRL's, or what the sft stage gives it."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        assistant_only_loss="input_ids" not in rows.column_names,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")}])
        found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


def by_reward(tokenizer: Any, model: Any, rows: Any, folder: Path) -> list[dict[str, list[int]]]:
    """Token ids of both chats as TRL's RewardTrainer has them."""
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    settings = copy.deepcopy(model.config)
    settings.num_labels = 1
    config = RewardConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = RewardTrainer(
        LlamaForSequenceClassification(settings), config, train_dataset=rows, processing_class=tokenizer
    )
    return [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in trainer.train_dataset]


def by_dpo(tokenizer: Any, model: Any, rows: Any, folder: Path) -> list[dict[str, list[int]]]:
    """Token ids of prompt and answers as TRL's DPOTrainer has them."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = DPOTrainer(model, copy.deepcopy(model), config, train_dataset=rows, processing_class=tokenizer)
    return [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trainer.train_dataset]

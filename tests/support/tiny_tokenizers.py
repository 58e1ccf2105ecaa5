"""Tokenizers that tests make on the spot, with the special tokens and chat templates of well-known families."""

from __future__ import annotations

from typing import Any

WORDS = [
    "the cat sat on the mat and asked what the answer to this question is\n",
    "user assistant system model be brief",
]
MARKS = ("{% generation %}", "{% endgeneration %}")

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # a base's: turns end with EOS, no BOS
    "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
OPEN = (  # LLaVA's: reads parts, ends turns with nothing
    "{% for m in messages %}{{ m.role | upper + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
FORGETFUL = (  # Qwen3's way: reasoning is left out of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "llama3": {
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>",
                    "<|finetune_right_pad_id|>"],
        "bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|eot_id|>", "adds_bos": True, "template": LLAMA3,
    },
    "qwen": {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"], "eos": "<|im_end|>", "pad": "<|endoftext|>",
             "template": CHATML},
    "phi3": {"special": ["<unk>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], "eos": "<|endoftext|>",
             "pad": "<|endoftext|>", "unk": "<unk>", "template": PHI3},
    "llama2": {"special": ["<unk>", "<s>", "</s>"], "bos": "<s>", "eos": "</s>", "unk": "<unk>", "adds_bos": True, "template": PLAIN},
    "gpt2": {"special": ["<|endoftext|>"], "bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "template": PLAIN},
    "llava": {"special": ["<unk>", "<s>", "</s>", "<pad>"], "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>",
              "adds_bos": True, "template": OPEN},
}  # fmt: skip


def make(kind: str, **options: Any) -> Any:
    """A byte-level BPE of 400 tokens or so, its special tokens at the first ids; options: other values than KINDS has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    said = {"bos": None, "pad": None, "unk": None, "adds_bos": False, **KINDS[kind], **options}
    fast, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = said["special"]
    fast.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    if said["adds_bos"]:
        bos = said["bos"]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=said["bos"], eos_token=said["eos"], pad_token=said["pad"], unk_token=said["unk"],
        chat_template=said["template"],
    )  # fmt: skip

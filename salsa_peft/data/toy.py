"""The embedded world: a tiny Llama, pre-trained on a toy language, and datasets in this language.

data/toy_language.py defines the language and its gold reward. The base is pre-trained on noisy text of all lengths,
some of it followed by a word that grades the answer. Demonstrations, preferences and PPO's prompts have short answers
only (in distribution). Evaluation prompts occur in none of these. Preferences do not depend on the SFT models, as
in UltraFeedback: they compare samples of the base, or right answers with errors added, ranked by `gold`.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from salsa_peft.config.options.toy import Toy
from salsa_peft.data.toy_language import (
    FREE_LENGTH,
    GRADES,
    LENGTHS_IN,
    LENGTHS_OUT,
    MAX_NEW_TOKENS,
    VOCABULARY,
    add_errors,
    draw_answer,
    draw_prompts,
    gold,
    grade,
)

__all__ = ["build", "gold", "make_tokenizer", "world"]

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' }}"
    "{% generation %}{{ message['content'] | trim }}{{ '<eos>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the embedded world knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

Progress = Callable[[int, int, str], None]


def make_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word. Its chat template marks the answer and its <eos> for the loss.

    more: words after those of VOCABULARY.
    """
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*VOCABULARY, *more])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def pretrain(config: Toy, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> tuple[LlamaForCausalLM, float]:
    """The pre-trained base, and its mean loss over the last 50 steps in nats per token.

    The loss excludes the instructions: they are drawn uniformly, so there is nothing to learn in them.
    """
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(shape)
    rng = random.Random(f"{config.seed} pre-training")
    long = round(config.pretrain_examples * config.pretrain_long)
    draw = functools.partial(draw_prompts, operations=config.operations)
    prompts = draw(rng, config.pretrain_examples - long, LENGTHS_IN, config.seed)
    prompts += draw(rng, long, LENGTHS_OUT, config.seed)
    texts = []
    for prompt in prompts:
        answer = _noisy(rng, prompt, config.pretrain_noise)
        grade_word = GRADES[int(grade(prompt, " ".join(answer)) * (len(GRADES) - 1))]
        texts.append(_render(prompt, answer) + (grade_word if rng.random() < config.pretrain_graded else ""))
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    opened = (ids == tokenizer.convert_tokens_to_ids("<assistant>")).cumsum(1) > 0  # the tokens from <assistant> on
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = ids[:, 1:].masked_fill(~(opened[:, :-1] & (mask[:, 1:] == 1)), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.pretrain_learning_rate, weight_decay=0.01)
    warmup = max(1, config.pretrain_steps // 20)
    losses = []
    for step in range(config.pretrain_steps):
        share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.pretrain_steps))
        optimizer.param_groups[0]["lr"] = config.pretrain_learning_rate * share
        batch = torch.randint(len(ids), (config.pretrain_batch_size,))
        width = int(mask[batch].sum(1).max())
        # causal and padded on the right: no attention mask needed
        loss = model(ids[batch, :width], labels=labels[batch, :width]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, config.pretrain_steps, "pre-training")
    return model.eval(), sum(losses[-50:]) / max(1, len(losses[-50:]))


def _render(prompt: str, answer: list[str] | None = None) -> str:
    """Render one turn as CHAT_TEMPLATE does, but faster. Without answer, the text ends after <assistant>."""
    return f"<bos><user>{prompt}<assistant>" + ("" if answer is None else " ".join(answer) + "<eos>")


def _noisy(rng: random.Random, prompt: str, share: float, most: int | None = None) -> list[str]:
    """A right answer, or with probability `share` one with 1 to `most` errors (None: any number)."""
    answer = draw_answer(rng, prompt)
    return add_errors(rng, answer, rng.randint(1, most or len(answer))) if rng.random() < share else answer


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], progress: Progress
) -> list[str]:
    """One answer per prompt, sampled at temperature 1, as text without special tokens."""
    answers: list[str] = []
    for start in range(0, len(prompts), 512):
        batch = tokenizer([_render(p) for p in prompts[start : start + 512]], padding=True, return_tensors="pt")
        out = model.generate(  # type: ignore[misc]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        progress(len(answers), len(prompts), "sampling answers to compare")
    return answers


def draw_preferences(
    config: Toy, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Pairs ranked by `gold`: two samples of the base, or two right answers with up to two errors each.

    Also returns the fraction of the drawn pairs of each kind that is kept.
    """
    rng = random.Random(f"{config.seed} preferences")
    sampled = round(config.preferences * config.preference_sampled)
    wanted = {"sampled": sampled, "damaged": config.preferences - sampled}
    rows: list[dict[str, Any]] = []
    drawn = dict.fromkeys(wanted, 0)
    kept: dict[str, set[tuple[str, str, str]]] = {kind: set() for kind in wanted}
    for kind, n in wanted.items():
        while len(kept[kind]) < n:
            count = max(64, math.ceil(1.3 * (n - len(kept[kind]))))
            prompts = draw_prompts(rng, count, LENGTHS_IN, config.seed, operations=config.operations)
            drawn[kind] += len(prompts)
            if kind == "sampled":
                answers = sample(model, tokenizer, prompts + prompts, progress)
            else:
                answers = [" ".join(add_errors(rng, draw_answer(rng, p), rng.randrange(3))) for p in prompts + prompts]
            for prompt, a, b in zip(prompts, answers, answers[len(prompts) :], strict=False):
                better, worse = (a, b) if grade(prompt, a) > grade(prompt, b) else (b, a)
                pair = (prompt, better, worse)
                if grade(prompt, a) != grade(prompt, b) and pair not in kept[kind] and len(kept[kind]) < n:
                    kept[kind].add(pair)
                    sides = {"chosen": [_turn("assistant", better)], "rejected": [_turn("assistant", worse)]}
                    rows.append({"prompt": [_turn("user", prompt)], **sides})
    rng.shuffle(rows)
    facts = {f"preferences_{kind}_kept": wanted[kind] / max(1, drawn[kind]) for kind in wanted}
    return rows, facts


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def world(folder: str | Path = "runs/world", **options: Any) -> Path:
    """Build the embedded world in `folder`, unless it is there, and return the folder. options: fields of Toy.

    The folder has the base (base/), and demonstrations, held_out, preferences, prompts, eval_in and eval_out (.jsonl).
    """
    folder = Path(folder)
    if not (folder / "eval_out.jsonl").is_file():  # the file that is written last
        folder.mkdir(parents=True, exist_ok=True)
        build(Toy(**options), folder, lambda *_: None)
    return folder


def build(config: Toy, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write base/ and the six jsonl files of toy data to `folder`, and return facts for the manifest.

    The same config gives the same bytes on one machine. Runs on one thread (a second one slows a model this small) and
    restores torch's random state. Files are written directly, so `folder` must not be in use.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return _build(config, folder, progress)
    finally:
        torch.set_num_threads(threads)


def _build(config: Toy, folder: Path, progress: Progress) -> dict[str, Any]:
    # 1. the tokenizer and the pre-trained base
    tokenizer = make_tokenizer([word for word in config.operations if word == FREE_LENGTH])
    model, loss = pretrain(config, tokenizer, progress)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # 2. demonstrations, for training and held out: right answers, some with an error
    demonstrations = draw_demonstrations(config, "demonstrations", config.demonstrations)
    held_out = draw_demonstrations(config, "held_out", config.eval_prompts)
    # 3. preferences, then prompts of PPO and of evaluation
    preferences, facts = draw_preferences(config, model, tokenizer, progress)
    draws: dict[str, tuple[int, tuple[int, ...], bool]] = {
        "prompts": (config.prompts, LENGTHS_IN, False),
        "eval_in": (config.eval_prompts, LENGTHS_IN, True),
        "eval_out": (config.eval_prompts, LENGTHS_OUT, True),
    }
    files: dict[str, list[dict[str, Any]]] = {"preferences": preferences}
    for name, pairs in (("demonstrations", demonstrations), ("held_out", held_out)):
        files[name] = [{"messages": [_turn("user", p), _turn("assistant", " ".join(answer))]} for p, answer in pairs]
    for name, (n, lengths, evaluation) in draws.items():
        rng = random.Random(f"{config.seed} {name}")
        drawn = draw_prompts(rng, n, lengths, config.seed, evaluation, config.operations)
        files[name] = [{"prompt": [_turn("user", p)]} for p in drawn]
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # 4. facts for the manifest
    golds = [grade(p, " ".join(answer)) for p, answer in demonstrations]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "pretrain_loss": loss,
        "demonstrations_gold": sum(golds) / len(golds),
        **facts,
        **{name: len(rows) for name, rows in files.items()},
    }


def draw_demonstrations(config: Toy, name: str, n: int) -> list[tuple[str, list[str]]]:
    """n prompts with answers, some of which have an error. `name` is part of the random seed."""
    rng = random.Random(f"{config.seed} {name}")
    prompts = draw_prompts(rng, n, LENGTHS_IN, config.seed, operations=config.operations)
    return [(p, _noisy(rng, p, config.demonstration_noise, 1)) for p in prompts]

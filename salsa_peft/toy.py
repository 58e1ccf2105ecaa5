"""The embedded world: a small language of instructions whose answers a program can check, and a tiny Llama that half knows it.

Five operations over 36 words of 6 categories:
    list three birds               three different birds; also `list one birds and two tools`
    copy owl saw                   owl saw
    repeat two owl                 owl owl
    name owl saw                   birds tools
    kin owl saw                    another bird, another tool
In distribution an answer has 2–4 words, out of distribution 5–6. The base is pre-trained on noisy text of both; demonstrations,
preferences and PPO's prompts hold the first only; eval prompts are in neither. Preferences exist before any seed, as UltraFeedback's
do: they compare the base's samples and damaged right answers, ranked by `gold`.

Left out: a task of free length (so that no policy can hide from the KL in short answers), several turns, system messages.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .config import SalsaError

if TYPE_CHECKING:
    from .config import Toy

CATEGORIES = {
    "birds": ("owl", "wren", "crow", "finch", "robin", "heron"),
    "fruits": ("apple", "pear", "plum", "fig", "lemon", "mango"),
    "tools": ("saw", "axe", "drill", "rake", "hammer", "spade"),
    "metals": ("tin", "iron", "zinc", "lead", "copper", "nickel"),
    "trees": ("oak", "elm", "ash", "pine", "birch", "maple"),
    "fish": ("cod", "eel", "carp", "trout", "perch", "tuna"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
WORDS = tuple(CATEGORY_OF)
NUMBERS = ("one", "two", "three", "four", "five", "six")
OPERATIONS = ("list", "copy", "repeat", "name", "kin")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>")
GRADES = ("bad", "poor", "fair", "good", "perfect")
VOCABULARY = (*SPECIALS, *OPERATIONS, "and", *NUMBERS, *CATEGORIES, *WORDS, *GRADES)
LENGTHS_IN, LENGTHS_OUT = (2, 3, 4), (5, 6)
MAX_NEW_TOKENS = 10
UNFINISHED = 0.5

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' }}"
    "{% generation %}{{ message['content'] | trim }}{{ '<eos>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the embedded world knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

Progress = Callable[[int, int, str], None]


# --- the language -----------------------------------------------------------------------------------------------------
class Task(NamedTuple):
    """What an instruction asks for: the words allowed at each position of the answer, and whether they must all differ."""

    allowed: tuple[tuple[str, ...], ...]
    distinct: bool


def parse(prompt: str) -> Task:
    """Reads one instruction. Raises SalsaError where it is none of this world."""
    words = [word for word in _split(prompt) if word not in SPECIALS]
    operation, rest = (words[0], words[1:]) if words else ("", [])
    try:
        if operation == "list":
            parts = [rest[:2]] if len(rest) == 2 else [rest[:2], rest[3:]]
            if len(parts) == 2 and (len(rest) != 5 or rest[2] != "and"):
                raise ValueError
            return Task(tuple(CATEGORIES[c] for n, c in parts for _ in range(NUMBERS.index(n) + 1)), True)
        if operation == "repeat":
            number, word = rest
            return Task((_allowed("copy", word),) * (NUMBERS.index(number) + 1), False)
        if operation in OPERATIONS and rest:
            return Task(tuple(_allowed(operation, word) for word in rest), False)
    except (ValueError, KeyError):
        pass
    raise SalsaError(f"prompt {prompt!r}: not an instruction of the embedded world, such as 'list two birds' or 'copy owl saw'")


def _allowed(operation: str, word: str) -> tuple[str, ...]:
    category = CATEGORY_OF[word]
    kin = tuple(other for other in CATEGORIES[category] if other != word)
    return {"copy": (word,), "name": (category,), "kin": kin}[operation]


def gold(prompts: list[Any], completions: list[Any], finished: list[bool] | None = None, **kwargs: Any) -> list[float]:
    """TRL's reward-function signature: the share of right words, (right positions) / max(words asked for, words given) in [0, 1].

    A position is right if its word is allowed there (and, in `list`, has not been given before). A response that no EOS ended
    (`finished` False) loses 0.5, so its score lies in [−0.5, 0.5]; without `finished` all count as finished, since a decoded text
    does not show it. Prompts and completions are texts or lists of messages, of which the last user's and the last count. Special
    tokens in a completion are words, and wrong ones; only one final <eos> is taken off. An empty answer scores 0.
    Further columns and `completion_ids` are ignored.
    """
    ended = finished if finished is not None else [True] * len(completions)
    scores = []
    for prompt, completion, end in zip(prompts, completions, ended, strict=True):
        scores.append(grade(_text(prompt, "user"), _text(completion, "assistant")) - (0.0 if end else UNFINISHED))
    return scores


def grade(prompt: str, answer: str) -> float:
    """`gold` of one finished answer."""
    task, words = parse(prompt), _split(answer)
    words = words[:-1] if words[-1:] == ["<eos>"] else words
    right = 0
    for i, (word, allowed) in enumerate(zip(words, task.allowed, strict=False)):
        right += word in allowed and not (task.distinct and word in words[:i])
    return right / max(len(task.allowed), len(words))


def _split(text: str) -> list[str]:
    for special in SPECIALS:
        text = text.replace(special, f" {special} ")
    return text.split()


def _text(turns: Any, role: str) -> str:
    if isinstance(turns, str):
        return turns
    return next((message["content"] for message in reversed(turns) if message["role"] == role), "")


# --- drawing instructions and answers ----------------------------------------------------------------------------------
def draw_prompt(rng: random.Random, lengths: tuple[int, ...]) -> str:
    """One instruction whose answer has one of `lengths` words; the operation and the length are uniform."""
    operation, n = rng.choice(OPERATIONS), rng.choice(lengths)
    if operation == "list":
        first = rng.choice(range(1, n + 1))
        a, b = rng.sample(list(CATEGORIES), 2)
        return f"list {NUMBERS[first - 1]} {a}" + (f" and {NUMBERS[n - first - 1]} {b}" if first < n else "")
    if operation == "repeat":
        return f"repeat {NUMBERS[n - 1]} {rng.choice(WORDS)}"
    return f"{operation} {' '.join(rng.choice(WORDS) for _ in range(n))}"


def draw_answer(rng: random.Random, prompt: str) -> list[str]:
    """A right answer, all of them equally likely."""
    task, answer = parse(prompt), []
    for allowed in task.allowed:
        answer.append(rng.choice([word for word in allowed if not (task.distinct and word in answer)]))
    return answer


def damage(rng: random.Random, answer: list[str], errors: int) -> list[str]:
    """The kinds of errors that models make here: wrong word, wrong category, missing, extra, repeated word, wrong order."""
    words = list(answer)
    for _ in range(errors):
        kind, i = rng.randrange(6), rng.randrange(len(words) or 1)
        word = words[i] if words else rng.choice(WORDS)
        siblings = CATEGORIES.get(CATEGORY_OF.get(word, ""), tuple(CATEGORIES))
        if kind == 0 or not words:
            words[i : i + 1] = [rng.choice(siblings)]
        elif kind == 1:
            words[i] = rng.choice(WORDS + tuple(CATEGORIES))
        elif kind == 2:
            del words[i]
        elif kind == 3 and len(words) < MAX_NEW_TOKENS - 1:
            words.insert(i, rng.choice(siblings))
        elif kind == 4:
            words[i] = words[i - 1]
        else:
            words[i], words[i - 1] = words[i - 1], words[i]
    return words


def held_out(prompt: str, seed: int) -> bool:
    """A quarter of all instructions, by hash: they serve evaluation alone, and no other text of the world holds them."""
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[0] < 64


def draw_prompts(rng: random.Random, n: int, lengths: tuple[int, ...], seed: int, evaluation: bool = False) -> list[str]:
    """n instructions of the training side (repeats happen), or n different ones of the held-out side."""
    prompts: list[str] = []
    seen: set[str] = set()
    while len(prompts) < n:
        prompt = draw_prompt(rng, lengths)
        if held_out(prompt, seed) == evaluation and not (evaluation and prompt in seen):
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


# --- tokenizer and base ------------------------------------------------------------------------------------------------
def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `<pad>` and `<eos>` are different tokens; `chat_template` marks the answer and its <eos> for the loss."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
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
    """→ the base and its mean loss over the last 50 steps, nats a token of answer and <eos>.

    The loss leaves the instructions out: they are drawn uniformly, so there is nothing to learn in them but noise.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(_llama_config(config, tokenizer))
    rng = random.Random(f"{config.seed} pre-training")
    long = round(config.pretrain_examples * config.pretrain_long)
    prompts = draw_prompts(rng, config.pretrain_examples - long, LENGTHS_IN, config.seed)
    prompts += draw_prompts(rng, long, LENGTHS_OUT, config.seed)
    texts = []
    for prompt in prompts:
        answer = _noisy(rng, prompt, config.pretrain_noise)
        grade_word = GRADES[int(grade(prompt, " ".join(answer)) * (len(GRADES) - 1))]
        texts.append(_render(prompt, answer) + (grade_word if rng.random() < config.pretrain_graded else ""))
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    opened = (ids == tokenizer.convert_tokens_to_ids("<assistant>")).cumsum(1) > 0  # from <assistant> on
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
        loss = model(ids[batch, :width], labels=labels[batch, :width]).loss  # causal, padded on the right: no mask needed
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, config.pretrain_steps, "pre-training")
    return model.eval(), sum(losses[-50:]) / max(1, len(losses[-50:]))


def _llama_config(config: Toy, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
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


def _render(prompt: str, answer: list[str] | None = None) -> str:
    """CHAT_TEMPLATE for one turn, without Jinja's seconds; None leaves the answer open."""
    return f"<bos><user>{prompt}<assistant>" + ("" if answer is None else " ".join(answer) + "<eos>")


def _noisy(rng: random.Random, prompt: str, share: float, most: int | None = None) -> list[str]:
    """A right answer, or (a `share` of them) one with 1 … `most` errors; None: with as many as it has words."""
    answer = draw_answer(rng, prompt)
    return damage(rng, answer, rng.randint(1, most or len(answer))) if rng.random() < share else answer


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], progress: Progress) -> list[str]:
    """One answer a prompt at temperature 1, as text without special tokens."""
    answers: list[str] = []
    for start in range(0, len(prompts), 512):
        batch = tokenizer([_render(p) for p in prompts[start : start + 512]], padding=True, return_tensors="pt")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        progress(len(answers), len(prompts), "sampling answers to compare")
    return answers


# --- the data ----------------------------------------------------------------------------------------------------------
def draw_preferences(
    config: Toy, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Pairs ranked by `gold`: two samples of the base, or two right answers of zero to two errors each; ties are drawn again."""
    rng = random.Random(f"{config.seed} preferences")
    sampled = round(config.preferences * config.preference_sampled)
    wanted = {"sampled": sampled, "damaged": config.preferences - sampled}
    rows: list[dict[str, Any]] = []
    drawn = dict.fromkeys(wanted, 0)
    kept: dict[str, set[tuple[str, str, str]]] = {kind: set() for kind in wanted}
    for kind, n in wanted.items():
        while len(kept[kind]) < n:
            prompts = draw_prompts(rng, max(64, math.ceil(1.3 * (n - len(kept[kind])))), LENGTHS_IN, config.seed)
            drawn[kind] += len(prompts)
            if kind == "sampled":
                answers = sample(model, tokenizer, prompts + prompts, progress)
            else:
                answers = [" ".join(damage(rng, draw_answer(rng, p), rng.randrange(3))) for p in prompts + prompts]
            for prompt, a, b in zip(prompts, answers, answers[len(prompts) :], strict=False):
                better, worse = (a, b) if grade(prompt, a) > grade(prompt, b) else (b, a)
                pair = (prompt, better, worse)
                if grade(prompt, a) != grade(prompt, b) and pair not in kept[kind] and len(kept[kind]) < n:
                    kept[kind].add(pair)
                    rows.append(_preference(*pair))
    rng.shuffle(rows)
    facts = {f"preferences_{kind}_kept": wanted[kind] / max(1, drawn[kind]) for kind in wanted}
    return rows, facts


def _preference(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": [_turn("assistant", chosen)], "rejected": [_turn("assistant", rejected)]}
    return {"prompt": [_turn("user", prompt)], **answers}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def build(config: Toy, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes base/ and the five jsonl files of the world to `folder`: the same bytes for one config on one machine.

    → plain facts for the manifest. Runs on one thread (a model this small is slowed by a second one) and leaves torch's random
    state as it found it. Files are written in place: the caller gives a folder that nobody reads yet.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return _build(config, folder, progress)
    finally:
        torch.set_num_threads(threads)


def _build(config: Toy, folder: Path, progress: Progress) -> dict[str, Any]:
    # 1. the language's tokenizer and a base that half knows it
    tokenizer = make_tokenizer()
    model, loss = pretrain(config, tokenizer, progress)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # 2. demonstrations: right answers, some with an error
    rng = random.Random(f"{config.seed} demonstrations")
    shown = [(p, _noisy(rng, p, config.demonstration_noise, 1)) for p in draw_prompts(rng, config.demonstrations, LENGTHS_IN, config.seed)]
    turns = [[_turn("user", p), _turn("assistant", " ".join(answer))] for p, answer in shown]
    # 3. preferences, then the prompts of PPO and of evaluation
    preferences, facts = draw_preferences(config, model, tokenizer, progress)
    draws = {"prompts": (config.prompts, LENGTHS_IN, False), "eval_in": (config.eval_prompts, LENGTHS_IN, True)}
    draws["eval_out"] = (config.eval_prompts, LENGTHS_OUT, True)
    files: dict[str, list[dict[str, Any]]] = {"demonstrations": [{"messages": t} for t in turns], "preferences": preferences}
    for name, (n, lengths, evaluation) in draws.items():
        drawn = draw_prompts(random.Random(f"{config.seed} {name}"), n, lengths, config.seed, evaluation)
        files[name] = [{"prompt": [_turn("user", p)]} for p in drawn]
    for name, rows in files.items():
        _write(folder / f"{name}.jsonl", rows)
    # 4. facts
    shown_gold = [grade(p, " ".join(answer)) for p, answer in shown]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "pretrain_loss": loss,
        "demonstrations_gold": sum(shown_gold) / len(shown_gold),
        **facts,
        **{name: len(rows) for name, rows in files.items()},
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""The ends of a response, padding, BOS and the loss mask: of tokenizers made on the spot, and of the real ones beside the checkout."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_tokenizers
import torch
from paths import TEMPLATES
from tiny_tokenizers import make

from salsa_peft.config import paths
from salsa_peft.config.options.ppo import Sampling
from salsa_peft.data import datasets
from salsa_peft.data.chat import templates as chat_templates
from salsa_peft.data.chat import turn_ends
from salsa_peft.data.chat.assistant_masks import assistant_tokens
from salsa_peft.data.tokenized import tokenized_demonstrations
from salsa_peft.models import generation
from salsa_peft.models import responses as rollout
from salsa_peft.models.logprobs import Head
from salsa_peft.models.responses import Sequences, ends_turn, response_logprobs, response_states
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.training.ppo.checks import check_tokenizer
from salsa_peft.training.ppo.prompts import PromptEncoder
from salsa_peft.utils.errors import SalsaError

KINDS = list(tiny_tokenizers.KINDS)


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("assistant" if turn % 2 else "user"), "content": text} for turn, text in enumerate(texts)]


CHATS = [said("the cat", "sat"), said("what", "the answer\n is", "and this", "on the mat"), said("q", "", "the", " x ")]


def tokens(tokenizer: Any, ids: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def loss(tokenizer: Any, chat: Any) -> list[str]:
    """The assistant's tokens, one text for each run of them."""
    ids, mask = assistant_tokens(chat, tokenizer)
    runs: list[list[int]] = []
    for place, counts in enumerate(mask):
        if counts and not (place and mask[place - 1]):
            runs.append([])
        if counts:
            runs[-1].append(ids[place])
    return [tokenizer.decode(run) for run in runs]


class TestEnds:
    @pytest.mark.parametrize(
        ("kind", "end", "after"),
        [
            ("llama3", "<|eot_id|>", []),
            ("qwen", "<|im_end|>", ["Ċ"]),
            ("phi3", "<|end|>", ["Ċ", "<|endoftext|>"]),
            ("llama2", "</s>", ["Ċ"]),
            ("gpt2", "<|endoftext|>", ["Ċ"]),
            ("llava", None, []),
        ],
    )
    def test_a_turn_is_rendered_and_looked_at(self, kind: str, end: str | None, after: list[str]) -> None:
        tokenizer = make(kind)
        turn = turn_ends.assistant_turn(tokenizer)
        assert turn.end == (None if end is None else tokenizer.convert_tokens_to_ids(end))
        assert tokens(tokenizer, turn.after) == after
        tokenizer.chat_template = None
        assert turn_ends.assistant_turn(tokenizer) == (None, (), "")

    def test_the_template_may_change(self) -> None:
        """What is remembered of a tokenizer is not remembered too long."""
        tokenizer = make("llama3")
        assert tokens(tokenizer, turn_ends.stop_token_ids(tokenizer)) == ["<|eot_id|>", "<|end_of_text|>"]
        tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
        assert tokens(tokenizer, turn_ends.stop_token_ids(tokenizer)) == ["<|end_of_text|>"]
        tokenizer.eos_token = "<|eom_id|>"
        assert tokens(tokenizer, turn_ends.stop_token_ids(tokenizer)) == ["<|eom_id|>"]

    @pytest.mark.parametrize("eos", [None, 1, [1, 3], (3,), [-1, 3, 10**6], []])
    def test_generation_config_names_others(self, eos: Any) -> None:
        """Llama 3 has three; ids that no token has (fine-tunes of cut vocabularies) end nothing."""
        tokenizer = make("llama3")
        named = [eos] if isinstance(eos, int) else eos or []
        expected = list(dict.fromkeys([2, 1, *(token for token in named if 0 <= token < 100)]))
        assert list(turn_ends.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=eos))) == expected
        assert list(turn_ends.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=eos), rows=2)) == [1]

    def test_text_that_ends_a_turn_is_no_token_of_the_end(self) -> None:
        template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ###' + eos_token }}{% endfor %}"
        assert turn_ends.assistant_turn(make("llama2", template=template)).end is None

    def test_what_is_odd_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer, lm = make("qwen"), Tiny(make("qwen")).lm
        lm.generation_config.eos_token_id = [2, 0]
        check_tokenizer(tokenizer, lm)
        line = "processing_class: its chat template starts conversations without a system turn with this text: "
        assert capsys.readouterr().err.splitlines() == [
            "processing_class: a response ends at any of <|im_end|> (2), <|endoftext|> (0)",
            line + "'<|im_start|>system Be helpful.'",
        ]
        plain = make("llama2")
        check_tokenizer(_padded(plain), Tiny(plain).lm)
        assert (
            "but its chat template writes none; if the model was trained with it in chats, put {{ bos_token }}"
            in capsys.readouterr().err
        )
        dated = make("llama3", template="{{ bos_token + strftime_now('%d %b %Y') }}" + tiny_tokenizers.LLAMA3)
        assert "so prompts change every day and the run cannot be resumed tomorrow" in "".join(
            turn_ends.tokenizer_notes(dated, (2,))
        )
        assert "writes no end-of-turn token, so SFT teaches none" in "".join(
            turn_ends.tokenizer_notes(make("llava"), (2,))
        )

    def test_a_template_that_fails_on_a_plain_conversation(self) -> None:
        """A TypeError in the template counts as a rejection in every look at it; the rows report it in one line."""
        needs_tools = make("llama3", template="{{ tools | length }}" + tiny_tokenizers.LLAMA3)
        assert turn_ends.assistant_turn(needs_tools).end is None and chat_templates.default_prefix(needs_tools) == ""
        assert not chat_templates.template_lacks_bos(needs_tools) and turn_ends.padding_token(needs_tools, ())
        with pytest.raises(SalsaError, match="row 1, prompt: the tokenizer's chat template rejects these messages"):
            datasets.prompt_tokens({"prompt": said("q")}, needs_tools, 1)


def _padded(tokenizer: Any) -> Any:
    tokenizer.pad_token = turn_ends.padding_token(tokenizer, turn_ends.stop_token_ids(tokenizer))
    return tokenizer


class TestPadding:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("llama3", "<|finetune_right_pad_id|>"),  # its own is what turns end with
            ("qwen", "<|fim_pad|>"),  # its own is in generation_config's ends
            ("phi3", "<unk>"),
            ("llama2", "<unk>"),
            ("llava", "<pad>"),
            ("gpt2", "<|endoftext|>"),  # there is no other token
        ],
    )
    def test_no_token_of_the_template_and_no_end(self, kind: str, expected: str) -> None:
        tokenizer = make(kind)
        ends = turn_ends.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[0] if kind == "qwen" else None))
        assert turn_ends.padding_token(tokenizer, ends) == expected

    def test_a_reserved_token_before_one_that_has_a_use(self) -> None:
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|reserved_special_token_0|>"]
        tokenizer = make("qwen", special=special, pad=None)
        assert turn_ends.padding_token(tokenizer, (0, 2)) == "<|reserved_special_token_0|>"
        assert turn_ends.padding_token(make("qwen", special=special[:3], pad=None), (0, 2)) == "<|im_end|>"  # the EOS


class TestBOS:
    @pytest.mark.parametrize("name", ["chatml", "zephyr"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_ours_yield_it_once_where_the_tokenizer_adds_one(self, kind: str, name: str) -> None:
        tokenizer = make(kind, template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
        adds = tiny_tokenizers.KINDS[kind].get("adds_bos", False)
        before = tokenizer.apply_chat_template(CHATS[1], return_dict=True)["input_ids"]
        lines = chat_templates.prepare_template(tokenizer)
        line = (
            f"its chat template did not write the {tokenizer.bos_token} that its tokenizer adds to texts; now it does"
        )
        assert lines == [line] * adds
        assert not chat_templates.prepare_template(tokenizer)
        whole = tokenizer.apply_chat_template(CHATS[1], return_dict=True)["input_ids"]
        assert whole == [tokenizer.bos_token_id] * adds + before
        prompt = datasets.prompt_tokens({"prompt": CHATS[1][:3]}, tokenizer)
        assert prompt == whole[: len(prompt)]
        # the same where somebody renders first
        text = tokenizer.apply_chat_template(CHATS[1][:3], tokenize=False, add_generation_prompt=True)
        assert datasets.prompt_tokens({"prompt": text}, tokenizer) == prompt

    def test_a_text_is_not_given_a_second_one(self) -> None:
        tokenizer = make("llama3")
        assert chat_templates.text_ids("the cat", tokenizer) == tokenizer("the cat")["input_ids"]
        assert chat_templates.text_ids("<|begin_of_text|>the cat", tokenizer) == tokenizer("the cat")["input_ids"]
        other = make("qwen", bos="<|im_start|>")  # SmolLM2's: a BOS that nothing adds
        twice = "<|im_start|><|im_start|>"
        assert chat_templates.text_ids(twice, other) == [1, 1]

    def test_it_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer = make("llama3")
        rows = [{"prompt": "<|begin_of_text|>the cat"}, {"prompt": "the cat"}, {"prompt": said("<|begin_of_text|>")}]
        kept, _ = PromptEncoder(tokenizer, None, 500)(rows, "rows")
        assert kept[0].tokens == kept[1].tokens
        line = "rows: 1 of 3 rows (the first: row 1) begin with <|begin_of_text|> already, so the tokenizer adds none"
        assert capsys.readouterr().err.splitlines() == [line]

    def test_templates_that_start_with_a_block(self) -> None:
        """Jinja strips blanks before a block tag at a line's start, which the BOS must not hinder."""
        tokenizer = make("llama2", template="  " + tiny_tokenizers.PLAIN)
        before = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
        chat_templates.prepare_template(tokenizer)
        assert tokenizer.apply_chat_template(CHATS[0], tokenize=False) == "<s>" + before

    def test_a_date_is_fixed(self) -> None:
        dated = "{% set day = strftime_now('%d %b %Y') %}{{ bos_token + strftime_now(\"%Y\") + day }}"
        tokenizer = make("llama3", template=dated)
        assert (
            "its chat template writes today's date; this run uses 26 Jul 2024, so that prompts stay the same"
            in chat_templates.prepare_template(tokenizer)[0]
        )
        assert tokenizer.apply_chat_template(CHATS[0], tokenize=False) == "<|begin_of_text|>202426 Jul 2024"

    @pytest.mark.parametrize(
        ("kind", "text"), [("qwen", "<|im_start|>system\nBe helpful.<|im_end|>"), ("llama3", ""), ("gpt2", "")]
    )
    def test_forced(self, kind: str, text: str) -> None:
        found = chat_templates.default_prefix(make(kind))
        assert text.startswith(found) and bool(found) is bool(text)


class TestLossMask:
    @pytest.mark.parametrize("chat", CHATS)
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llava"])
    def test_answers_and_the_token_that_ends_them(self, kind: str, chat: Any) -> None:
        """Nothing of what the template writes before or after, and the tokens are TRL's."""
        tokenizer = make(kind)
        end = tokenizer.decode([turn_ends.assistant_turn(tokenizer).end])
        trimmed = (lambda text: text.strip()) if kind == "llama3" else (lambda text: text)
        expected = [trimmed(turn["content"]) + end for turn in chat if turn["role"] == "assistant"]
        assert loss(tokenizer, chat) == expected
        assert (
            assistant_tokens(chat, tokenizer)[0] == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        )

    @pytest.mark.parametrize("chat", CHATS)
    def test_marks_say_the_same(self, chat: Any) -> None:
        """The template of a Llama 3 with the marks that TRL asks for."""
        plain = make("llama3")
        marked = plain.chat_template.replace(
            "{{ m.content | trim }}<|eot_id|>",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
            "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}",
        )
        assert assistant_tokens(chat, plain) == assistant_tokens(chat, make("llama3", template=marked))

    def test_an_end_spelled_out_in_an_answer_is_part_of_it(self) -> None:
        assert loss(make("qwen"), said("q", "a<|im_end|>b")) == ["a<|im_end|>b<|im_end|>"]

    def test_a_conversation_that_the_assistant_begins(self) -> None:
        chat = [{"role": "assistant", "content": "the answer"}, *CHATS[0]]
        assert loss(make("qwen"), chat) == ["the answer<|im_end|>", "sat<|im_end|>"]

    def test_parts_are_read_where_the_template_reads_nothing_else(self) -> None:
        """LLaVA's renders a text as nothing; it ends turns with nothing, so that the whole answer is learned."""
        tokenizer = make("llava")
        assert chat_templates.render(CHATS[0], tokenizer) == "USER: the cat ASSISTANT: sat "
        assert loss(tokenizer, CHATS[0]) == [" sat "]
        assert (
            tokenizer.decode(datasets.prompt_tokens({"prompt": CHATS[0][:1]}, tokenizer)) == "USER: the cat ASSISTANT:"
        )

    def test_a_template_that_forgets(self) -> None:
        """Reasoning that is left out of earlier turns: one answer can be told, two cannot, but for templates that TRL knows."""
        from trl.chat_template_utils import qwen3_chat_template

        tokenizer = make("qwen", template=tiny_tokenizers.FORGETFUL)
        assert loss(tokenizer, CHATS[0]) == ["sat<|im_end|>"]
        with pytest.raises(
            SalsaError,
            match=r"model\.chat_template: has no \{% generation %\} marks and renders earlier turns differently once later ones follow, so the assistant's tokens cannot be found\. Use chatml, zephyr, or a Jinja file with \{% generation %\} marks\.",
        ):
            assistant_tokens(CHATS[1], tokenizer)
        tokenizer.chat_template = qwen3_chat_template
        found = "".join(loss(tokenizer, CHATS[1]))
        assert "the answer\n is<|im_end|>" in found and "on the mat<|im_end|>" in found and "user" not in found

    def test_labels_as_trl_trains_on_them(self) -> None:
        """TRL's own collator takes the rows as they are; with pad = eos no label is lost."""
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        tokenizer = make("gpt2")
        rows = tokenized_demonstrations([{"messages": chat} for chat in CHATS], tokenizer)
        batch = DataCollatorForLanguageModeling(pad_token_id=0)(list(rows))
        for ids, mask, labels, chat in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], CHATS, strict=True
        ):
            own, counts = assistant_tokens(chat, tokenizer)
            assert ids[mask.bool()].tolist() == own
            assert labels.tolist() == [t if c else -100 for t, c in zip(own, counts, strict=True)] + [-100] * int(
                (mask == 0).sum()
            )


class Tiny:
    """A random Llama of a tokenizer's vocabulary, on which every special token is likely."""

    def __init__(self, tokenizer: Any, seed: int = 0, boost: float = 6.0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = LlamaConfig(
            vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=256, **sizes, **ids
        )
        self.lm = LlamaForCausalLM(config).eval()
        for token in range(len(tokenizer.all_special_ids) + 4):
            self.lm.lm_head.weight.data[token] *= boost


class TestGeneration:
    PROMPTS = [[300, 301, 302], [303], [304, 305], [306, 307, 308, 309]] * 8

    @pytest.fixture
    def sampled(self) -> Any:
        """Llama 3's three ends, each of them likely, and min_new_tokens."""
        tokenizer = _padded(make("llama3"))
        lm = Tiny(tokenizer).lm
        lm.generation_config.eos_token_id = [1, 2, 3]
        sampling = Sampling(max_new_tokens=12, min_new_tokens=2, temperature=0.9)
        seeds = generation.row_seeds(range(len(self.PROMPTS)), 7)
        return tokenizer, lm, sampling, generation.generate(lm, self.PROMPTS, sampling, tokenizer, seeds)

    def test_any_of_them_ends_a_response(self, sampled: Any) -> None:
        tokenizer, _, sampling, found = sampled
        ended = set()
        for ids, mask, finished in zip(found.response_ids, found.response_mask, found.finished, strict=True):
            kept = ids[mask].tolist()
            assert not set(kept[:-1]) & {1, 2, 3} and len(kept) > sampling.min_new_tokens
            assert bool(finished) is (kept[-1] in (1, 2, 3)) and (finished or len(kept) == 12)
            assert ids[~mask].tolist() == [tokenizer.pad_token_id] * int((~mask).sum())
            ended |= {kept[-1]} & {1, 2, 3}
        assert len(ended) >= 2, "the model should end with several of them, or the test shows nothing"
        lengths = [len(row) for row in (found.response_ids[i][found.content_mask[i]] for i in range(len(self.PROMPTS)))]
        assert lengths == (found.lengths - found.finished.long()).tolist()

    def test_log_probs_are_those_of_what_was_sampled(self, sampled: Any) -> None:
        """None of the ends has a probability in the first min_new_tokens: by hand, from plain forwards."""
        tokenizer, lm, sampling, found = sampled
        head = Head(lm.lm_head.weight, None, sampling.temperature, turn_ends.model_stop_token_ids(tokenizer, lm))
        sequences = Sequences(found, sampling.min_new_tokens)
        batch = sequences.forward_batch(range(len(self.PROMPTS)))
        found_logprobs = response_logprobs(response_states(lm, batch), batch, head).logprobs
        logprobs = sequences.table(batch.cells, found_logprobs)
        for row in range(len(self.PROMPTS)):
            prompt = self.PROMPTS[row]
            answer = found.response_ids[row][found.response_mask[row]].tolist()
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            logits[: sampling.min_new_tokens, [1, 2, 3]] = -torch.inf
            expected = (logits / sampling.temperature).log_softmax(-1)[range(len(answer)), answer]
            assert logprobs[row, : len(answer)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_trainer(tmp_path: Path) -> None:
    """Messages through a Llama-3-like template, whose turns end with another token than EOS, and a third end: responses, penalty and KL."""
    from peft import LoraConfig, get_peft_model

    from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer

    tokenizer, seen = _padded(make("llama3")), []
    lm = Tiny(tokenizer).lm
    lm.generation_config.eos_token_id = [1, 3]
    model: Any = get_peft_model(
        lm, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2), adapter_name="policy"
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)

    def reward(
        completion_ids: list[list[int]], completions: list[Any], finished: list[bool], **columns: Any
    ) -> list[float]:
        seen.extend(zip(columns["prompts"], completion_ids, completions, finished, strict=True))
        return [1.0] * len(completion_ids)

    quiet = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "shown_every": None,
    }
    sizes = {"batch_size": 8, "max_new_tokens": 9, "num_ppo_epochs": 1, "num_train_epochs": 1, "learning_rate": 0.0}
    args = SalsaPPOConfig(output_dir=str(tmp_path), missing_eos_penalty=1.0, temperature=1.0, **sizes, **quiet)
    rows = [{"prompt": said(text)} for text in ("the cat", "what", "is", "on the mat", "q", "this question", "a", "b")]
    SalsaPPOTrainer(
        model, args=args, train_dataset=rows, references=["base"], reward_funcs=reward, processing_class=tokenizer
    ).train()
    kls, ended = [], 0
    for prompt, ids, completion, finished in seen:
        assert finished is (ids[-1] in (1, 2, 3)) and not set(ids[:-1]) & {1, 2, 3}
        assert not any(token in completion[0]["content"] for token in ("<|eot_id|>", "<|end_of_text|>"))
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert asked.count(0) == 1 and asked[0] == 0  # <|begin_of_text|>
        scored = []
        for reference in (False, True):
            with torch.no_grad(), model.disable_adapter() if reference else contextlib.nullcontext():
                logits = model(input_ids=torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1].double()
            scored.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
        kls.append(scored[0] - scored[1])
        ended += finished
    figures = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < ended < len(seen) == 8, "some should end and some not, or the test shows nothing"
    assert figures["val/num_eos_tokens"] == ended
    assert figures["objective/kl"] == pytest.approx(sum(kls) / 8, abs=1e-5)


class TestRewards:
    """TRL's RewardTrainer and ours look at the same token of the same text."""

    @pytest.fixture(params=["qwen", "phi3", "llama3", "llama2", "gpt2", "gpt2 zephyr", "llava"])
    def trained(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        """A reward adapter under TRL's RewardTrainer, padding as the reward stage has it; its folder; the base."""
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        from salsa_peft.training.reward_model import set_padding_token

        kind, *ours = request.param.split()
        tokenizer = make(kind)
        for name in ours:  # whose sequences end with EOS, which pads
            tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        chat_templates.prepare_template(tokenizer)
        _padded(tokenizer)
        lm = Tiny(tokenizer).lm
        lm.save_pretrained(tmp_path / "base")
        torch.manual_seed(3)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        tuned: Any = get_peft_model(
            classifier, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2, modules_to_save=["score"])
        )
        for name, weight in tuned.named_parameters():
            if weight.requires_grad:
                weight.data.normal_(std=0.3) if "lora" in name else weight.data.normal_()
        pairs = [
            {
                side: chat_templates.content_for_template(chat[:-1] + said("", answer)[1:], tokenizer)
                for side, answer in (("chosen", "the"), ("rejected", "is it"))
            }
            for chat in CHATS
        ]
        settings = RewardConfig(
            output_dir=str(tmp_path / "t"), report_to="none", use_cpu=True, per_device_train_batch_size=3, bf16=False
        )
        trainer = RewardTrainer(
            model=tuned, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
        )
        set_padding_token(trainer)
        tuned.save_pretrained(tmp_path / "reward")
        return tokenizer, lm, trainer, tmp_path / "reward"

    def test_one_score(self, trained: Any) -> None:
        """In a batch of TRL's, and as PPO has it: the prompt's tokens, those that were sampled, the end of the turn."""
        from peft import LoraConfig, get_peft_model

        tokenizer, lm, trainer, folder = trained
        trainer.model.eval()
        rows = list(trainer.train_dataset)
        batch = trainer.data_collator(rows)
        with torch.no_grad():
            expected = trainer.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits.squeeze(-1)
        turn = turn_ends.assistant_turn(tokenizer)
        prompts = [datasets.prompt_tokens({"prompt": chat[:-1]}, tokenizer) for chat in CHATS] * 2
        whole = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        answers = [ids[len(prompt) : len(ids) - len(turn.after)] for prompt, ids in zip(prompts, whole, strict=True)]
        assert all(ids[: len(prompt)] == prompt for prompt, ids in zip(prompts, whole, strict=True))
        asked = [{"prompt": chat[:-1]} for chat in CHATS] * 2
        ends = turn_ends.stop_token_ids(tokenizer)
        model = get_peft_model(copy.deepcopy(lm), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=1))
        reward = rewards.AdapterReward(model, folder, 2, tokenizer)
        for pad in (tokenizer.pad_token_id, 0, 7, ends[0]):  # whatever pads
            responses = rollout.pad_responses(prompts, answers, pad, ends, model.device)
            assert responses.finished.tolist() == [turn.end is not None] * 6
            assert reward(responses, asked).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
        alone = [trainer.model(input_ids=torch.tensor([ids])).logits.item() for ids in whole]
        assert expected.tolist() == pytest.approx(alone, rel=1e-5, abs=1e-5)

    def test_a_response_that_the_limit_cut_is_scored_where_it_ends(self) -> None:
        tokenizer = make("qwen")
        turn = turn_ends.assistant_turn(tokenizer)
        chat, text = {"prompt": CHATS[0][:1]}, {"prompt": "the cat"}
        answers = [[300, 2], [300, 301], [300, 2], [300, 0], [2]]
        responses = rollout.pad_responses([[299]] * 5, answers, 3, (2, 0), torch.device("cpu"))
        assert responses.finished.tolist() == [True, False, True, True, True]
        rendered = {"prompt": chat_templates.render(CHATS[0][:1], tokenizer, add_generation_prompt=True)}
        which = ends_turn(responses, [chat, chat, text, chat, rendered], turn)
        assert which.tolist() == [True, False, False, False, True]
        extended = rollout.append_turn_end(responses, [chat, chat, text, chat, rendered], turn)
        found = [row[mask].tolist() for row, mask in zip(extended.response_ids, extended.response_mask, strict=True)]
        assert found == [[300, 2, *turn.after], [300, 301], [300, 2], [300, 0], [2, *turn.after]]

    def test_an_end_that_is_no_special_token_is_no_text_either(self) -> None:
        """OpenHermes and others added <|im_end|> as an ordinary token."""
        from tokenizers import AddedToken

        tokenizer = make("llama2")
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
        tokenizer.chat_template = tiny_tokenizers.CHATML
        ends = turn_ends.stop_token_ids(tokenizer)
        answer = [*tokenizer("sat", add_special_tokens=False)["input_ids"], ends[0]]
        responses = rollout.pad_responses([[9]], [answer], 0, ends, torch.device("cpu"))
        reward = FunctionReward(lambda completions: [float(len(text)) for text in completions], tokenizer)
        assert reward(responses, [{"prompt": "the"}]).tolist() == [3.0]


class TestLoading:
    def test_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What a recipe's stages get: ends of generation_config kept off the padding, right padding, one line of each fact at the start."""
        tokenizer = make("qwen")
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
        found = load_tokenizer(str(tmp_path), chat_template="tokenizer", report_as="BASE")
        assert (found.pad_token, found.padding_side, found.truncation_side) == ("<|fim_pad|>", "right", "right")
        assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["BASE", "BASE"]
        check_tokenizer(found, Tiny(tokenizer).lm)
        assert capsys.readouterr().err == ""  # a recipe's trainers do not say it again
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 3]}))
        assert load_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"

    def test_a_saved_truncation_cuts_nothing(self, tmp_path: Path) -> None:
        tokenizer = make("qwen")
        tokenizer.backend_tokenizer.enable_truncation(5)
        tokenizer.save_pretrained(tmp_path)
        found = load_tokenizer(str(tmp_path))
        long = said("the cat " * 50, "sat " * 50)
        ids, mask = assistant_tokens(long, found)
        assert len(ids) > 100 and sum(mask) > 40
        assert (
            len(datasets.prompt_tokens({"prompt": long[:1]}, found))
            > 50
            < len(datasets.prompt_tokens({"prompt": "the cat " * 50}, found))
        )

    def test_a_base_without_a_template_of_its_own(self, tmp_path: Path) -> None:
        """Known from the folder, before a run begins; a folder that has one is taken."""
        (tmp_path / "config.json").write_text("{}")
        tokenizer = make("qwen", template=None)
        tokenizer.save_pretrained(tmp_path)
        recipe: Any = SimpleNamespace(model=SimpleNamespace(base=str(tmp_path), chat_template="tokenizer"))
        line = rf"^model.chat_template: '{tmp_path}' has no chat template. Use chatml, zephyr, or the path of a Jinja file.$"
        with pytest.raises(SalsaError, match=line):
            paths.check_template(recipe)
        make("qwen").save_pretrained(tmp_path)
        paths.check_template(recipe)
        recipe.model.chat_template = "tokeniser"
        with pytest.raises(
            SalsaError,
            match=r"Use tokenizer \(the base's template\), the path of a Jinja file, or a bundled template: chatml, plain, zephyr$",
        ):
            paths.check_template(recipe)

"""Rewards: functions as TRL calls them, classifiers against one plain forward a sequence, sums by hand, what a recipe may say."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_recipe import load_checked as load_recipe
from tiny_classifiers import CHAT, own_classifier, single
from torch import Tensor, nn

from salsa_peft.config.rewards import find_module, parse_reward
from salsa_peft.config.schema import Adapter, Recipe, Reward, Source
from salsa_peft.data import datasets
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.responses import Responses, pad_tokens
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.models.rewards.classifier import ClassifierReward, load_classifier_reward
from salsa_peft.models.rewards.function import FunctionReward, load_function
from salsa_peft.recipe import run as recipe
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.cache import plan
from salsa_peft.report import gather as report_input
from salsa_peft.utils.errors import SalsaError

WORDS = ["owl", "saw", "fig", "cod", "oak", "copy", "name", "user", "assistant", "system", "?", "!"]


def made(prompts: list[list[int]], answers: list[list[int]], tokenizer: Any, extra: int = 0) -> Responses:
    """Responses of given tokens, `extra` columns of padding on both sides; what no mask shows is a word's id."""
    pad, eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    ids, mask = pad_tokens(prompts, pad, torch.device("cpu"), "left")
    width = max(map(len, answers)) + extra
    response = torch.tensor([[*answer, *[10] * (width - len(answer))] for answer in answers])
    counts = torch.arange(width) < torch.tensor([len(answer) for answer in answers])[:, None]
    return Responses(nn.functional.pad(ids, (extra, 0), value=10), nn.functional.pad(mask, (extra, 0)), response, counts,
                     torch.tensor([answer[-1] == eos for answer in answers]))  # fmt: skip


@pytest.fixture
def answered(tokenizer: Any) -> tuple[Responses, list[dict[str, Any]]]:
    """Three chats and their answers: two words, one word that the limit cut, none."""
    eos = int(tokenizer.eos_token_id)
    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": text.split()[1], "level": number}
        for number, text in enumerate(["copy owl saw", "name fig", "copy cod"])
    ]
    prompts = [datasets.prompt_tokens(row, tokenizer) for row in rows]
    words = tokenizer("owl saw")["input_ids"]
    return made(prompts, [[*words, eos], words[:1], [eos]], tokenizer, 2), rows


def say(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


class TestFunction:
    def test_a_conversation_as_trl_passes_it(self, answered: Any, tokenizer: Any) -> None:
        """By keyword: messages, one assistant's message, token ids with EOS, every other column as a list."""
        responses, rows = answered
        seen: dict[str, Any] = {}

        def everything(**given: Any) -> list[float]:
            seen.update(given)
            return [1, 2.5, True]

        scores = FunctionReward(everything, tokenizer)(responses, rows)
        assert scores.tolist() == [1.0, 2.5, 1.0]
        assert scores.dtype == torch.float32
        assert seen.keys() == {"prompts", "completions", "completion_ids", "answer", "level", "finished", "log_metric"}
        assert seen["prompts"] == [row["prompt"] for row in rows]
        assert seen["completions"] == [say("owl saw"), say("owl"), say("")]
        words, eos = tokenizer("owl saw")["input_ids"], tokenizer.eos_token_id
        assert seen["completion_ids"] == [[*words, eos], words[:1], [eos]]
        assert (seen["answer"], seen["level"]) == (["owl", "fig", "cod"], [0, 1, 2])
        assert seen["finished"] == [True, False, True]

    def test_the_same_keywords_as_trls_own(self, answered: Any, tokenizer: Any, monkeypatch: Any) -> None:
        """TRL's _calculate_rewards on the same rows gives the same three arguments and columns."""
        from trl.trainer import grpo_trainer

        responses, rows = answered
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        FunctionReward(lambda **given: ours.update(given) or [0.0] * 3, tokenizer)(responses, rows)

        def func(**given: Any) -> list[float]:
            theirs.update(given)
            return [0.0] * 3

        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x), state=None, environments=None, reward_funcs=[func],
            reward_processing_classes=[None], reward_func_names=["func"], _log_completion_extra=None, _log_metric=None,
            args=SimpleNamespace(report_to=[]), _metrics={},
        )  # fmt: skip
        monkeypatch.setattr(grpo_trainer, "gather", lambda x: x)
        monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *_: contextlib.nullcontext())
        ids = [row[mask].tolist() for row, mask in zip(responses.response_ids, responses.response_mask, strict=True)]
        completions = [say(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        prompts = [row["prompt"] for row in rows]
        grpo_trainer.GRPOTrainer._calculate_rewards.__wrapped__(trainer, rows, prompts, completions, ids)
        for name in ("prompts", "completions", "completion_ids", "answer", "level"):
            assert ours[name] == theirs[name]
        assert theirs.keys() - ours.keys() == {"trainer_state", "log_extra"}

    def test_text_prompts_and_token_ids(self, answered: Any, tokenizer: Any) -> None:
        """A text prompt is passed as the data has it; one of token ids alone is decoded; completions are text."""
        responses, _ = answered
        rows = [{"prompt": "as it is"}, {"input_ids": [1, 2]}, {"prompt": "x", "completion": "y"}]
        seen: dict[str, Any] = {}

        def asks(prompts: list[str], completions: list[str], input_ids: list[Any], note: str = "own") -> list[float]:
            seen.update(prompts=prompts, completions=completions, input_ids=input_ids, note=note)
            return [0.0] * 3

        FunctionReward(asks, tokenizer)(responses, rows)
        assert seen == {
            "prompts": ["as it is", "name fig", "x"], "completions": ["owl saw", "owl", ""], "input_ids": [None, [1, 2], None],
            "note": "own",
        }  # fmt: skip
        kept = FunctionReward(lambda completions: seen.update(c=completions) or [0] * 3, tokenizer, special_tokens=True)
        kept(responses, rows)
        assert seen["c"] == ["owl saw <eos>", "owl", "<eos>"]

    def test_its_own_error_says_which_function_and_what_completions_are(self, answered: Any, tokenizer: Any) -> None:
        """A function for text fails on messages with Python's error, to which a note is added."""

        def words(completions: list[str]) -> list[float]:
            return [float(len(text.split())) for text in completions]

        responses, rows = answered
        with pytest.raises(AttributeError, match="has no attribute 'split'") as caught:
            FunctionReward(words, tokenizer)(responses, rows)
        (note,) = caught.value.__notes__
        assert note.startswith("reward function words: ") and note.endswith(
            "completions are lists of one message, because the prompts are messages"
        )
        with pytest.raises(KeyError) as caught_text:
            FunctionReward(lambda completions: {}["x"], tokenizer)(responses, [{"prompt": "x"}] * 3)
        assert caught_text.value.__notes__[0].endswith("completions are text")

    def test_a_column_that_is_not_there_is_named(self, answered: Any, tokenizer: Any) -> None:
        responses, rows = answered
        with pytest.raises(
            SalsaError, match=r"the data has no column for its argument solution \(columns: answer, level, prompt\)"
        ):
            FunctionReward(lambda completions, solution: [0.0] * 3, tokenizer)(responses, rows)

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            ([1.0], "it returned 1 scores for 3 responses"),
            (2.0, "it returned 2.0; return a list of one score for each response"),
            ([1.0, "no", 2.0], "return numbers"),
            ([1.0, None, 2.0], "it returned None for 1 of 3 responses"),
            ("123", "it returned '123'; return a list of one score for each response"),
            ({0: 1.0, 1: 2.0, 2: 3.0}, "it returned {.*}; return a list of one score for each response"),
            ({1.0, 2.0, 3.0}, "it returned {.*}; return a list of one score for each response"),
            (["1", "2", "3"], "return numbers"),
            ([10**400, 1.0, 2.0], "return numbers"),
        ],
    )
    def test_what_is_no_score_is_refused(self, answered: Any, tokenizer: Any, given: Any, line: str) -> None:
        with pytest.raises(SalsaError, match=line):
            FunctionReward(lambda **_: given, tokenizer)(*answered)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
    def test_what_is_not_finite_in_float32_is_refused(self, answered: Any, tokenizer: Any, value: float) -> None:
        """The line names the function, the response and its prompt; a part of a weighted sum is no exception."""
        line = (
            r"reward function strange: it returned \S+ for response 2 of 3 \(.*'owl'.*, to .*\); return finite numbers"
        )

        def strange(**_: Any) -> list[Any]:
            return [1.0, value, None]

        for call in (FunctionReward(strange, tokenizer), FunctionReward(strange, tokenizer).scores_and_mask):
            with pytest.raises(SalsaError, match=line):
                call(*answered)

    def test_tensors_of_any_dtype_and_shape(self, answered: Any, tokenizer: Any) -> None:
        tensor = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
        for given in (tensor, tensor[:, None], tensor.bfloat16().requires_grad_()):
            assert FunctionReward(lambda given=given, **_: given, tokenizer)(*answered).tolist() == [3.0, 4.0, 5.0]

    def test_an_async_function_is_awaited_also_inside_a_loop(self, answered: Any, tokenizer: Any) -> None:
        async def slow(completions: list[Any], **_: Any) -> list[float]:
            await asyncio.sleep(0)
            return [float(len(c[0]["content"])) for c in completions]

        reward = FunctionReward(slow, tokenizer)
        assert reward(*answered).tolist() == [7.0, 3.0, 0.0]

        async def notebook() -> Tensor:
            return reward(*answered)

        assert asyncio.run(notebook()).tolist() == [7.0, 3.0, 0.0]

    def test_log_metric(self, answered: Any, tokenizer: Any) -> None:
        """Averaged until taken: (1 + 2 + 6) / 3; then begun anew."""
        numbers = iter([1, 2, 6, 4])

        def logs(log_metric: Any, **_: Any) -> list[float]:
            log_metric("shape", next(numbers))
            return [0.0] * 3

        reward = FunctionReward(logs, tokenizer)
        for _ in range(3):
            reward(*answered)
        assert reward.take_metrics() == {"shape": (9.0, 3)}
        assert reward.take_metrics() == {}
        reward(*answered)
        assert reward.take_metrics() == {"shape": (4.0, 1)}

    @pytest.mark.parametrize(
        ("name", "value", "line"),
        [
            ("objective/kl", 1.0, "log_metric: training logs a metric 'objective/kl'; use another name"),
            ("score", 1.0, "log_metric: training logs a metric 'score'; use another name"),
            ("rewards/f/mean", 1.0, "training logs a metric 'rewards/f/mean'; use another name"),
            ("x", None, "log_metric: the value None of 'x' is not a number"),
            (3, 1.0, "log_metric: the name 3 is not a string"),
        ],
    )
    def test_what_log_metric_does_not_take(
        self, answered: Any, tokenizer: Any, name: Any, value: Any, line: str
    ) -> None:
        """A figure of the engine's own name took its place in metrics.jsonl, and β followed it."""

        def logs(log_metric: Any, **_: Any) -> list[float]:
            log_metric(name, value)
            return [0.0] * 3

        with pytest.raises(SalsaError, match=line):
            FunctionReward(logs, tokenizer)(*answered)

    def test_no_name_of_the_engines_is_left_to_log_metric(self, make_trainer: Any) -> None:
        """Whatever stands in the logs of an update and of an evaluation."""
        from plain_ppo import PROMPTS

        from salsa_peft.models.rewards.function import RESERVED

        trainer = make_trainer(max_steps=1, eval_dataset=PROMPTS[:2])
        trainer.train()
        names = {name for row in trainer.state.log_history for name in row if not name.startswith("train_")}
        names |= {name.removeprefix("eval_") for name in trainer.evaluate()}
        assert {"objective/kl", "lr", "score", "step"} <= names
        assert not [name for name in names - {"total_flos"} if not RESERVED.fullmatch(name)]

    def test_a_column_called_finished(self, answered: Any, tokenizer: Any) -> None:
        """It took the place of ours. A function that takes neither does not mind."""
        responses, rows = answered
        rows = [{**row, "finished": "no"} for row in rows]
        with pytest.raises(SalsaError, match="the data's column `finished` has the name of an argument"):
            FunctionReward(lambda completions, finished: [0.0] * 3, tokenizer)(responses, rows)
        assert FunctionReward(lambda completions: [1.0] * 3, tokenizer)(responses, rows).tolist() == [1.0] * 3

    def test_the_rows_are_not_the_functions_to_change(self, answered: Any, tokenizer: Any) -> None:
        responses, rows = answered
        rows = [{**row, "tags": ["a"]} for row in rows]
        before = copy.deepcopy(rows)

        def changes(prompts: list[Any], tags: list[Any]) -> list[float]:
            for prompt, tag in zip(prompts, tags, strict=True):
                prompt.append("x")
                tag.clear()
            return [0.0] * 3

        FunctionReward(changes, tokenizer)(responses, rows)
        assert rows == before

    def test_parameters_by_position_only_are_refused(self, tokenizer: Any) -> None:
        def placed(prompts: Any, completions: Any, /) -> list[float]:
            return [0.0] * len(prompts)

        with pytest.raises(
            SalsaError, match="reward function placed: prompts, completions can be passed by position only"
        ):
            FunctionReward(placed, tokenizer)


@pytest.fixture
def module(tmp_path: Path, request: Any) -> Any:
    """write(text) → the name of a module of its own in tmp_path, forgotten afterwards."""
    path, known, names = list(sys.path), set(sys.modules), []

    def write(text: str) -> str:
        name = f"own_{abs(hash(request.node.nodeid)) % 10**9}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if name.startswith("own_"):
            del sys.modules[name]


class TestLoad:
    def test_from_a_folder_the_current_one_or_the_path(self, module: Any, tmp_path: Path, monkeypatch: Any) -> None:
        name = module("def f(completions, **_):\n    return [1.0] * len(completions)\nclass C:\n    g = f\nx = 3\n")
        assert load_function(f"{tmp_path}/{name}:f")([1, 2]) == [1.0, 1.0]
        assert load_function(f"{tmp_path}/{name}:C.g") is load_function(f"{tmp_path}/{name}:f")
        assert load_function("json:dumps") is json.dumps
        with pytest.raises(SalsaError, match=r"\.py has no h; check the function's name"):
            load_function(f"{tmp_path}/{name}:h")
        with pytest.raises(SalsaError, match=r"x in .* is of type int, not a function"):
            load_function(f"{tmp_path}/{name}:x")
        other = module("def f(): pass\n")
        with pytest.raises(SalsaError, match=f"there is no module {other}_x in Python"):
            load_function(f"{other}_x:f")
        monkeypatch.chdir(tmp_path)
        assert load_function(f"{other}:f")() is None

    def test_a_package_in_a_folder(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Dotted, with imports of its own; and looking for it runs none of it."""
        monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
        (tmp_path / "own_pack" / "deep").mkdir(parents=True)
        (tmp_path / "own_pack" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        (tmp_path / "own_pack" / "deep" / "__init__.py").write_text("")
        (tmp_path / "own_pack" / "deep" / "m.py").write_text("from ..base import g\ndef f(): return g()\n")
        (tmp_path / "own_pack" / "base.py").write_text("def g(): return 7\n")
        assert find_module(str(tmp_path), "own_pack.deep.m") == tmp_path / "own_pack" / "deep" / "m.py"
        assert find_module(str(tmp_path), "own_pack.base.m") is None
        assert find_module(str(tmp_path), "own_pack.none") is None
        assert not (tmp_path / "ran").exists()
        assert load_function(f"{tmp_path}/own_pack.deep.m:f")() == 7
        for name in [name for name in sys.modules if name.startswith("own_pack")]:
            del sys.modules[name]

    def test_a_module_that_fails_or_whose_name_is_taken(self, module: Any, tmp_path: Path) -> None:
        name = module("raise KeyError('no')\n")
        with pytest.raises(SalsaError, match=r"cannot be imported: KeyError: 'no'"):
            load_function(f"{tmp_path}/{name}:f")
        (tmp_path / "json.py").write_text("def f(): pass\n")
        with pytest.raises(SalsaError, match=r"another module json is already imported, from .*; rename .*json.py"):
            load_function(f"{tmp_path}/json:f")


def own_tokenizer(pad_is_eos: bool = False, template: str | None = CHAT) -> Any:
    """A word tokenizer that numbers words its own way; its BOS stands before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[end]", "[user]", "[assistant]", "<fill>"]
    words = {word: number for number, word in enumerate([*special, *reversed(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad = "</s>" if pad_is_eos else "<fill>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    fast.add_special_tokens({"additional_special_tokens": ["[end]", "[user]", "[assistant]"]})
    fast.chat_template = template
    return fast


def saved(folder: Path, labels: int = 1, **options: Any) -> Path:
    """A classifier as its authors would save it, with its own tokenizer."""
    keep = {name: options.pop(name) for name in ("pad_is_eos", "template") if name in options}
    tokenizer = own_tokenizer(**keep)
    own_classifier(tokenizer, labels, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestClassifier:
    @pytest.mark.parametrize("pad_is_eos", [False, True])
    @pytest.mark.parametrize("micro", [1, 2, 64])
    def test_scores_are_those_of_one_plain_forward(self, answered: Any, tokenizer: Any, tmp_path: Path, micro: int,
                                                   pad_is_eos: bool) -> None:  # fmt: skip
        """Decoded, put into its own template, encoded by its own tokenizer; batches by length, scores in the rows' order."""
        responses, rows = answered
        reward = load_classifier_reward(str(saved(tmp_path / "rm", pad_is_eos=pad_is_eos)), tokenizer, micro)
        assert not reward.shares_tokenizer
        own, classifier = own_tokenizer(pad_is_eos), own_classifier(own_tokenizer(pad_is_eos))
        texts = [
            "<s> [user] copy owl saw [end] [assistant] owl saw [end]", "<s> [user] name fig [end] [assistant] owl [end]",
            "<s> [user] copy cod [end] [assistant]  [end]",
        ]  # fmt: skip
        expected = [single(classifier, own(text, add_special_tokens=False)["input_ids"]) for text in texts]
        found = reward(responses, rows)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
        assert (found.dtype, found.std() > 0.1) == (torch.float32, True)
        assert not any(p.requires_grad for p in reward.classifier.parameters())
        assert reward.take_metrics() == {"rewards/rm/truncated": (0.0, 3)}

    @pytest.mark.parametrize("pad_is_eos", [False, True])
    def test_the_last_token_that_counts_is_scored_also_where_it_is_the_padding_token(
        self, tokenizer: Any, pad_is_eos: bool
    ) -> None:
        """Text that ends with EOS: with pad = eos Transformers alone would score the token before."""
        own = own_tokenizer(pad_is_eos)
        classifier = own_classifier(own)
        reward = ClassifierReward(classifier, own, tokenizer)
        sequences = [[1, 9, 10, 2], [1, 9, 2], [1, 6], [1, 9, 10, 11, 12, 0]]
        found = reward._forward(sequences)
        assert found.tolist() == pytest.approx([single(classifier, ids) for ids in sequences], abs=1e-5)

    def test_text_prompts(self, tokenizer: Any) -> None:
        """Prompt and response with what the tokenizer puts around a text; a space between that the policy's tokens hold stays."""
        own = own_tokenizer(template=None)
        classifier, eos = own_classifier(own), int(tokenizer.eos_token_id)
        ids = tokenizer("copy owl")["input_ids"]
        ids = ids[:-1] if ids[-1] == eos else ids
        responses = made([ids], [[*tokenizer("saw fig")["input_ids"], eos]], tokenizer)
        reward = ClassifierReward(classifier, own, tokenizer)
        assert own.decode(reward.encode(responses, [{"prompt": "copy owl"}])[0]) == "<s> copy owl saw fig"
        expected = single(classifier, own("copy owl saw fig")["input_ids"])
        assert reward(responses, [{"prompt": "copy owl"}]).item() == pytest.approx(expected, abs=1e-5)
        with pytest.raises(
            SalsaError, match="the prompts are messages, but the classifier's tokenizer has no chat template"
        ):
            reward(responses, [{"prompt": [{"role": "user", "content": "copy owl"}]}])
        with pytest.raises(SalsaError, match="the data has the column input_ids but not `prompt`"):
            reward(responses, [{"input_ids": ids}])

    def test_the_policys_own_tokenizer_means_token_ids_as_they_are(
        self, answered: Any, tokenizer: Any, make_base: Any
    ) -> None:
        """EOS is scored where there is one; nothing is put after a response that the limit cut."""
        classifier = own_classifier(tokenizer)
        reward = ClassifierReward(classifier, tokenizer, tokenizer)
        responses, rows = answered
        ids = [row[mask].tolist() for row, mask in zip(responses.input_ids, responses.attention_mask, strict=True)]
        assert reward.encode(responses, rows) == ids
        assert reward(responses, rows).tolist() == pytest.approx([single(classifier, row) for row in ids], abs=1e-5)
        changed = copy.deepcopy(tokenizer)
        changed.chat_template += " "
        assert not ClassifierReward(classifier, changed, tokenizer).shares_tokenizer

    def test_what_is_too_long_is_cut_and_counted(self, answered: Any, tokenizer: Any, capsys: Any) -> None:
        """Of 10, 8 and 7 tokens, 7 allowed: the first and the last 6. Said once."""
        responses, rows = answered
        own = own_tokenizer()
        classifier = own_classifier(own, max_position_embeddings=7)
        reward = ClassifierReward(classifier, own, tokenizer, name="small")
        whole = reward.encode(responses, rows)
        assert [len(ids) for ids in whole] == [10, 8, 7]
        found = reward(responses, rows)
        cut = [ids if len(ids) <= 7 else [ids[0], *ids[-6:]] for ids in whole]
        assert found.tolist() == pytest.approx([single(classifier, ids) for ids in cut], abs=1e-5)
        reward(responses, rows)
        assert reward.take_metrics() == {"rewards/small/truncated": (4.0, 6)}
        assert capsys.readouterr().err.count("longer than 7 tokens, the classifier's maximum") == 1

    def test_a_foreign_model_is_refused(self, tokenizer: Any, tmp_path: Path, make_base: Any) -> None:
        with pytest.raises(SalsaError, match="the classifier has 3 labels, but a reward needs a single number"):
            load_classifier_reward(str(saved(tmp_path / "three", labels=3)), tokenizer, 4)
        with pytest.raises(SalsaError, match="the classifier has 2 labels, but a reward needs a single number"):
            ClassifierReward(own_classifier(own_tokenizer(), labels=2), own_tokenizer(), tokenizer)
        base = make_base()
        base.config.num_labels = 1
        base.save_pretrained(tmp_path / "lm")
        tokenizer.save_pretrained(tmp_path / "lm")
        with pytest.raises(
            SalsaError, match=r"lm: the weights score.weight are missing; use a trained sequence classifier"
        ):
            load_classifier_reward(str(tmp_path / "lm"), tokenizer, 4)
        folder = saved(tmp_path / "pickled")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(SalsaError, match=r"this folder has no safetensors file"):
            load_classifier_reward(str(folder), tokenizer, 4)
        with pytest.raises(
            SalsaError, match=rf"the tokenizer has {len(tokenizer)} tokens, but the classifier has only 19 embeddings"
        ):
            ClassifierReward(own_classifier(own_tokenizer()), tokenizer, tokenizer)

    def test_a_template_that_refuses(self, answered: Any, tokenizer: Any) -> None:
        own = own_tokenizer(template="{{ raise_exception('no user') }}")
        with pytest.raises(SalsaError, match="the classifier's chat template rejects a conversation: no user"):
            ClassifierReward(own_classifier(own), own, tokenizer)(*answered)

    def test_an_encoder(self, answered: Any, tokenizer: Any) -> None:
        """BERT scores its first token: padding must not reach it, whatever id pads."""
        from transformers import BertConfig, BertForSequenceClassification

        own = own_tokenizer(pad_is_eos=True)
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=len(own), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
            initializer_range=0.4, max_position_embeddings=32,
        )  # fmt: skip
        classifier = BertForSequenceClassification(config).eval()
        reward = ClassifierReward(classifier, own, tokenizer)
        responses, rows = answered
        with torch.no_grad():
            expected = [classifier(torch.tensor([ids])).logits.item() for ids in reward.encode(responses, rows)]
        assert reward(responses, rows).tolist() == pytest.approx(expected, abs=1e-5)


def fixed(*scores: Any) -> Any:
    """A function that always says this."""
    return lambda **_: list(scores)


class TestSum:
    def test_by_hand(self, answered: Any, tokenizer: Any) -> None:
        """2·(1, 2, 3) − ½·(4, None, 8) + 0·(7, 7, 7): (0, 4, 2); means over what applied."""
        one, other = (FunctionReward(fixed(*s), tokenizer) for s in ((1, 2, 3), (4, None, 8)))
        silent = FunctionReward(fixed(7, 7, 7), tokenizer)
        reward = rewards.WeightedReward([(one, 2.0, "one"), (other, -0.5, "other"), (silent, 0.0, "silent")])
        assert reward(*answered).tolist() == [0.0, 4.0, 2.0]
        figures = {"rewards/one/mean": (6.0, 3), "rewards/other/mean": (12.0, 2), "rewards/silent/mean": (21.0, 3)}
        figures["objective/held_out_score"] = (21.0, 3)
        assert reward.take_metrics() == figures
        assert reward.take_metrics() == {}
        reward(*answered)
        reward(*answered)
        assert reward.take_metrics() == {name: (2 * total, 2 * n) for name, (total, n) in figures.items()}

    def test_a_response_to_which_nothing_applies(self, answered: Any, tokenizer: Any) -> None:
        """A part of weight 0 does not save it."""
        none, other = (FunctionReward(fixed(*s), tokenizer) for s in ((None, None, 3), (None, 2, 3)))
        zero = FunctionReward(fixed(7, 7, 7), tokenizer)
        reward = rewards.WeightedReward([(none, 1.0, "a"), (other, 1.0, "b"), (zero, 0.0, "c")])
        with pytest.raises(
            SalsaError, match="1 of 3 responses get no score, because none of the rewards a, b applies to them"
        ):
            reward(*answered)

    def test_names(self, tokenizer: Any) -> None:
        one = FunctionReward(fixed(1), tokenizer)
        with pytest.raises(SalsaError, match="2 rewards have the name a; give each reward a name of its own"):
            rewards.WeightedReward([(one, 1.0, "a"), (one, 1.0, "a")])
        with pytest.raises(SalsaError, match="the weighted sum has no rewards"):
            rewards.WeightedReward([])

    def test_all_weights_are_zero(self, tokenizer: Any) -> None:
        one, other = (FunctionReward(fixed(1), tokenizer) for _ in range(2))
        with pytest.raises(SalsaError, match=r"all weights \(reward_weights\) are 0, so that nothing is optimized"):
            rewards.WeightedReward([(one, 0.0, "a"), (other, 0, "b")])


@pytest.fixture
def reward_folder(make_base: Any, tmp_path: Path) -> Path:
    """A reward adapter as the reward stage saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    config = make_base().config
    config.num_labels = 1
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    adapters.save(get_peft_model(LlamaForSequenceClassification(config), lora), "default", tmp_path / "adapter")
    return tmp_path / "adapter"


class TestAsReward:
    @pytest.fixture
    def model(self, make_base: Any, make_adapter: Any) -> Any:
        return make_adapter(make_base(), "policy", 1)

    def test_every_kind(
        self, model: Any, tokenizer: Any, reward_folder: Path, tmp_path: Path, module: Any, answered: Any
    ) -> None:
        def make(given: Any) -> Any:
            return rewards.as_reward(given, model, tokenizer)

        folder = saved(tmp_path / "rm")
        for given in (reward_folder, str(reward_folder)):
            adapter = make(given)
            assert isinstance(adapter, rewards.AdapterReward)
            assert adapter.folder == reward_folder
        for given in (folder, str(folder)):
            assert isinstance(make(given), ClassifierReward)
        loaded = own_classifier(own_tokenizer())
        with pytest.raises(SalsaError, match="has no name_or_path"):
            make(loaded)
        loaded.name_or_path = str(folder)
        in_memory = make(loaded)
        assert (type(in_memory), in_memory.name, in_memory.classifier is loaded) == (ClassifierReward, "rm", True)
        assert in_memory(*answered).tolist() == pytest.approx(make(folder)(*answered).tolist())
        from peft import LoraConfig, get_peft_model

        tuned = make(get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")))
        assert isinstance(tuned, ClassifierReward)
        assert tuned(*answered).tolist() == pytest.approx(
            make(folder)(*answered).tolist()
        )  # a fresh adapter's delta is 0
        function = make(lambda completions, **_: [0.0] * len(completions))
        assert isinstance(function, FunctionReward)
        name = module("def seven(completions): return [7.0] * len(completions)\n")
        assert make(f"{tmp_path}/{name}:seven")(*answered).tolist() == [7.0] * 3
        for given in (function, adapter, in_memory):
            assert make(given) is given

        class Own:
            def __call__(self, responses: Responses, rows: Any) -> Tensor:
                return torch.tensor([float(row["level"]) for row in rows])

        own = Own()
        assert make(own).function is own
        total = make([own, (f"{tmp_path}/{name}:seven", 0.5), (adapter, 2.0, "judge")])
        assert [(part.weight, part.name) for part in total.parts] == [(1.0, "Own"), (0.5, "seven"), (2.0, "judge")]
        expected = torch.tensor([0.0, 1.0, 2.0]) + 3.5 + 2 * adapter(*answered)
        torch.testing.assert_close(total(*answered), expected)
        assert rewards.adapter_in(total) is adapter
        assert rewards.adapter_in(adapter) is adapter
        assert rewards.adapter_in(function) is None
        assert rewards.adapter_in(make([own, function])) is None
        assert make(own).take_metrics() == {}

    def test_a_sum_within_a_sum_names_all_its_models(self, model: Any, tokenizer: Any, reward_folder: Path) -> None:
        """What a checkpoint identifies and `offload: frozen` moves: rewards one by one, and the parameters of a torch module."""
        adapter = rewards.as_reward(reward_folder, model, tokenizer)
        own = own_tokenizer()
        classifier = ClassifierReward(own_classifier(own), own, tokenizer)

        class Module(torch.nn.Linear):
            def __call__(self, responses: Responses, rows: Any) -> Tensor:
                return torch.zeros(len(rows))

        module = Module(2, 1)
        function = FunctionReward(lambda completions: [0.0] * len(completions), tokenizer)
        total = rewards.as_reward([(adapter, 0.5), ([classifier, function, module], 2.0, "rest")], model, tokenizer)
        found = total.components()
        assert found[:3] == [adapter, classifier, function]
        assert [one.code for one in found] == ["AdapterReward", "ClassifierReward", "lambda", "Module"]
        assert [one.frozen_model() for one in found] == [None, classifier.classifier, None, None]
        expected = [
            [*adapters.parameters(model, adapter.adapter), adapter.head.weight],
            list(classifier.classifier.parameters()),
            [],
            [module.weight, module.bias],
        ]
        for one, weights in zip(found, expected, strict=True):
            held = list(one.weights() or ())
            assert len(held) == len(weights) and all(a is b for a, b in zip(held, weights, strict=True))

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            (3, "reward: an object of type int is not a reward; pass a folder or Hub id, a sequence classifier"),
            ([], "reward: the list is empty; pass"),
            ([("a", 1.0, "n", 2)], "a tuple in the list has 4 entries"),
            ("nowhere_to_be_found:f", "there is no module nowhere_to_be_found"),
            ([(lambda **_: [], "heavy")], "reward: the weight 'heavy' is not a finite number"),
            ([(lambda **_: [], float("nan"))], "reward: the weight nan is not a finite number"),
            ("org/not-in-the-cache", "https://huggingface.co/org/not-in-the-cache: not in the local cache"),
            ("./nowhere", "./nowhere: no such folder"),
        ],
    )
    def test_what_is_no_reward(self, model: Any, tokenizer: Any, given: Any, line: str) -> None:
        with pytest.raises(SalsaError, match=line):
            rewards.as_reward(given, model, tokenizer)

    def test_a_reward_adapter_needs_the_base_under_a_peft_model(
        self, make_base: Any, tokenizer: Any, reward_folder: Path
    ) -> None:
        with pytest.raises(
            SalsaError,
            match="needs a policy that is an adapter on the same base, but the policy is a LlamaForCausalLM with full weights",
        ):
            rewards.as_reward(reward_folder, make_base(), tokenizer)


RECIPE = """
name: tiny
toy: {}
policies:
  ppo: {reference: seed-0}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: Any) -> Any:
    """load(text, …) → the recipe with `text` after it; own_score.py with function f lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own_score.py").write_text("raise RuntimeError\ndef f(completions): return [0.0]\ng = f\n")

    def make(text: str = "", *overrides: str) -> Any:
        (tmp_path / "recipes" / "tiny.yaml").write_text(RECIPE + text)
        return load_recipe("recipes/tiny.yaml", lora="lora", overrides=list(overrides))

    return make


def work(loaded: Any) -> dict[str, Any]:
    """Unit id → unit."""
    return {unit.id: unit for stage in recipe.STAGES.values() for unit in stage.units(loaded.recipe, stage.run)}


class TestRecipe:
    def test_forms(self, load: Any, tmp_path: Path) -> None:
        """Text and a list are the section's `model`; a module is found beside the recipe, and nothing of it is run."""
        place = tmp_path / "recipes"
        assert load().recipe.reward.model == "adapter"
        assert load("reward: adapter\n").recipe.reward.trained
        one = load("reward: own_score:f\n").recipe.reward
        assert (one.model, one.learning_rate, one.trained, one.reads_columns) == (
            f"{place}/own_score:f",
            1e-4,
            False,
            True,
        )
        several = load(
            "reward: {batch_size: 16, model: [adapter, {model: own_score:f, weight: 0.5, name: fit}, org/rm]}\n"
        ).recipe.reward
        assert several.batch_size == 16
        assert [(p.kind, p.weight, p.name) for p in several.parts] == [
            ("adapter", 1.0, "adapter"), ("function", 0.5, "fit"), ("classifier", 1.0, "rm"),
        ]  # fmt: skip
        assert several.parts[1].value == f"{place}/own_score:f"
        assert load("reward: json:JSONEncoder\n").recipe.reward.model == "json:JSONEncoder"

    def test_set_keeps_the_rest_of_the_section(self, load: Any, tmp_path: Path) -> None:
        """Paths of --set are taken from the current folder."""
        found = load("reward: {batch_size: 16}\n", "reward=recipes/own_score:f").recipe.reward
        assert (found.model, found.batch_size, found.learning_rate) == (f"{tmp_path}/recipes/own_score:f", 16, 1e-4)
        found = load("reward: own_score:f\n", "reward=[adapter, org/rm]", "reward.batch_size=4").recipe.reward
        assert (found.model, found.batch_size) == (["adapter", "org/rm"], 4)

    @pytest.mark.parametrize("guard", ["stop", "warn", "{limit: 3}"])
    def test_a_guard_without_its_held_out_reward(self, load: Any, guard: str) -> None:
        """It is refused where the user names it; the default, which only waits for such a reward, is not."""
        named = f"ppo.guards={{over_optimization: {guard}}}"
        for text in ("", "reward: own_score:f\n", "reward: [adapter, {model: own_score:f, weight: 0.5}]\n"):
            with pytest.raises(SalsaError, match=r"ppo\.guards\.over_optimization: never .* no part of weight 0"):
                load(text, named)
            load(text)
            load(text, "ppo.guards={over_optimization: off, length: stop}")
        assert load("reward: [adapter, {model: own_score:f, weight: 0}]\n", named)

    def test_the_resolved_recipe_loads_to_itself(self, load: Any, tmp_path: Path) -> None:
        loaded = load("reward: [adapter, {model: own_score:f, weight: -1}]\n")
        (tmp_path / "again.yaml").write_text(recipe.resolved_yaml(loaded))
        assert load_recipe("again.yaml", lora=None, overrides=[]).recipe == loaded.recipe

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (
                "reward: own_score:g:h",
                r"reward\.model: 'own_score:g:h' is not a function; write module:name, such as my_rewards:score",
            ),
            ("reward: own_score.py:h", r"reward\.model: the module own_score in"),
            ("reward: ':f'", r"reward\.model: ':f' is not a function; write module:name, such as my_rewards:score"),
            (
                "reward: own_score:h",
                r"reward\.model: the module own_score in",
            ),
            (
                "reward: other_score:f",
                r"reward\.model: there is no module other_score in the recipe's folder or on Python's path",
            ),
            ("reward: ./away/own_score:f", r"reward\.model: there is no module own_score in"),
            (
                "reward: adaptor",
                r"reward\.model: must be adapter, module:name \(a function\), or the folder or Hub id \(namespace/name\) of a reward adapter or sequence classifier, not 'adaptor'; did you mean adapter\?",
            ),
            ("reward: ./gone", "recipes/gone'; give the folder or Hub id of a sequence classifier"),
            (
                "reward: []",
                r"reward\.model: must be adapter, module:name \(a function\), the folder or Hub id of a sequence classifier, or a list of these, but this list is empty",
            ),
            (
                "reward: 3",
                r"reward\.model: must be adapter, module:name \(a function\), the folder or Hub id of a sequence classifier, or a list of these, not 3",
            ),
            (
                "reward: {model: {model: adapter}}",
                r"reward\.model: must be adapter, module:name \(a function\), the folder or Hub id of a sequence classifier, or a list of these, not \{'model': 'adapter'\}",
            ),
            (
                "reward: [adapter, 3]",
                r"reward\.model\[1\]: must be adapter, module:name \(a function\), the folder or Hub id of a sequence classifier, or a list of these, not 3",
            ),
            (
                "reward: [{weight: 2}]",
                r"reward\.model\[0\]: must have the key model, and may have weight and name, but it has: weight",
            ),
            (
                "reward: [{model: adapter, weigth: 2}]",
                r"reward\.model\[0\]: must have the key model, and may have weight and name, but it has: model, weigth",
            ),
            (
                "reward: [{model: adapter, weight: x}]",
                r"reward\.model\[0\]\.weight: must be a number \(0: logged, but not part of the sum\), not 'x'",
            ),
            (
                "reward: [{model: adapter, weight: true}]",
                r"weight: must be a number \(0: logged, but not part of the sum\), not True",
            ),
            (
                "reward: [{model: adapter, name: a b}]",
                "name: must consist of letters, digits, dots, - and _, at most 64 characters, not 'a b'",
            ),
            (
                "reward: [org/rm, other/rm]",
                r"reward\.model: 2 parts have the name rm; give each its own name: \{model: …, name: …\}",
            ),
            ("reward: {modl: adapter}", "reward.modl: unknown key; did you mean model"),
            (
                "reward: [{model: adapter, weight: 0}]",
                r"reward\.model: all weights are 0, so that nothing is optimized; give one",
            ),
            (
                "reward: [{model: adapter, weight: 0}, {model: own_score:f, weight: 0}]",
                r"reward\.model: all weights are 0",
            ),
        ],
    )
    def test_refusals(self, load: Any, text: str, line: str) -> None:
        with pytest.raises(SalsaError, match=line) as caught:
            load(text + "\n")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (
                "def f(completions, /): return []",
                r"reward\.model: f has the positional-only arguments completions, but rewards are called by keyword; remove the / from its signature",
            ),
            ("async def f(completions: return []", r"recipes/f_score\.py' is not valid Python: invalid syntax, line 1"),
            (
                "import no_such_package.deep\ndef f(completions): ...",
                "f_score.py' imports no_such_package, which is not",
            ),
            ("from no_such_package import f", "f_score.py' imports no_such_package, which is not installed"),
        ],
    )
    def test_a_function_is_read_before_anything_trains(self, load: Any, tmp_path: Path, text: str, line: str) -> None:
        (tmp_path / "recipes" / "f_score.py").write_text(text + "\n")
        with pytest.raises(SalsaError, match=line) as caught:
            load("reward: f_score:f\n")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            "import sys\nsys.path.append('lib')\nimport no_such_package\ndef f(completions): ...",
            "try:\n    import no_such_package\nexcept ImportError: pass\ndef f(completions): ...",
            "import own_score, torch, time, _io\nfrom . import x\ndef f(completions): ...",
            "from functools import cache\n@cache\ndef f(answer, /): ...",
            "class f:\n    def __init__(self, answer, /): ...",
            "def f(answer, /): ...\nf = print",
        ],
    )
    def test_what_reading_cannot_tell_is_left_to_the_stage(self, load: Any, tmp_path: Path, text: str) -> None:
        (tmp_path / "recipes" / "f_score.py").write_text(text + "\n")
        assert load("reward: f_score:f\n").recipe.reward.parts[0].kind == "function"

    def test_a_local_classifier_is_looked_into(self, load: Any, tmp_path: Path) -> None:
        saved(tmp_path / "recipes" / "rm")
        assert load("reward: ./rm\n").recipe.reward.model == str(tmp_path / "recipes" / "rm")
        saved(tmp_path / "recipes" / "three", labels=3)
        saved(tmp_path / "recipes" / "mute", template=None)
        for name, line in (
            (
                "three",
                r"recipes/three' is a classifier with 3 labels, but a reward is one number \(num_labels 1\)\. Write a Python function that loads the model and returns one score per response \(reward: module:name\), or use a classifier with num_labels 1, such as TRL's RewardTrainer saves",
            ),
            ("mute", "no chat template"),
        ):
            with pytest.raises(SalsaError, match=line):
                load(f"reward: ./{name}\n")
        (tmp_path / "recipes" / "rm" / "config.json").write_text("[")
        with pytest.raises(
            SalsaError,
            match=r"recipes/rm/config\.json: not valid JSON \(Expecting value: line 1 column 2 \(char 1\)\); copy or save the file again",
        ):
            load("reward: ./rm\n")

    def test_the_reward_stage_is_there_where_an_adapter_is_trained(self, load: Any) -> None:
        """Without one, nothing reads it, and preferences are not needed."""
        for text, trained in (("", True), ("reward: [adapter, org/rm]\n", True), ("reward: org/rm\n", False)):
            found = work(load(text))
            assert ("reward" in found) is trained
            for unit in ("ppo/ppo", "landscape", "evaluate", "report"):
                assert ("reward" in found[unit].inputs) is trained
        few = RECIPE.replace("toy: {}", "toy: {preferences: 4}")
        Path("few.yaml").write_text(few)
        with pytest.raises(
            SalsaError,
            match=r"toy\.preferences: 4 rows, 3 of them for training \(reward\.held_out 0\.05\), which is less than reward\.batch_size = 8; add rows or lower reward\.batch_size",
        ):
            load_recipe("few.yaml", lora="lora", overrides=[])
        Path("few.yaml").write_text(f"{few}reward: org/rm\n")
        assert not load_recipe("few.yaml", lora="lora", overrides=[]).recipe.reward.trained
        own = (
            "toy: null\nmodel: {base: org/base, chat_template: chatml}\ndata: {demonstrations: org/d, prompts: org/p}\n"
            "evaluate: {prompts: {x: org/x}}\n"
        )
        text = RECIPE.replace("toy: {}\n", "") + own.replace("toy: null\n", "")
        for reward, fits in (("adapter", False), ("org/rm", True)):
            Path("whole.yaml").write_text(f"{text}reward: {reward}\n")
            if fits:
                load_recipe("whole.yaml", lora="lora", overrides=[])
            else:
                with pytest.raises(
                    SalsaError,
                    match=r"data\.preferences: is required; add it \(or add a `toy` section, which builds a tiny model and toy data\)",
                ):
                    load_recipe("whole.yaml", lora="lora", overrides=[])

    def test_what_a_result_depends_on(self, load: Any, tmp_path: Path) -> None:
        """The file of a function and what is in a classifier's folder, not where they lie; the weights; not the reward model's training."""
        saved(tmp_path / "recipes" / "rm")
        text = "reward: [adapter, {model: own_score:f, weight: 0.5}, ./rm]\n"

        def keys(text: str) -> dict[str, str]:
            loaded = load(text)
            slices = json.dumps([unit.key_fields for unit in work(loaded).values()])
            assert str(tmp_path) not in slices
            return {name: step.key for name, step in plan(list(work(loaded).values()), tmp_path / "run").items()}

        first = keys(text)
        assert keys(text) == first

        def changed(now: dict[str, str]) -> set[str]:
            return {name for name in first if first[name] != now[name]}

        hang = {"reward_quality", "ppo/ppo", "landscape", "evaluate", "report"}
        assert changed(keys(text.replace("0.5", "0.6"))) == hang
        assert changed(keys(text.replace("weight: 0.5", "weight: 0.5, name: other"))) == hang
        assert changed(keys(text.replace(":f", ":g"))) == hang
        assert changed(
            keys("reward: {batch_size: 4, model: [adapter, {model: own_score:f, weight: 0.5}, ./rm]}\n")
        ) == {*hang, "reward"}
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "own_score.py").write_bytes((tmp_path / "recipes" / "own_score.py").read_bytes())
        assert changed(keys(text.replace("own_score:f", "../elsewhere/own_score:f"))) == set()
        with (tmp_path / "recipes" / "own_score.py").open("a") as file:
            file.write("# another\n")
        assert changed(keys(text)) == hang
        (tmp_path / "recipes" / "own_score.py").write_bytes((tmp_path / "elsewhere" / "own_score.py").read_bytes())
        assert keys(text) == first
        settings = tmp_path / "recipes" / "rm" / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("[end]", "[End]"))
        assert changed(keys(text)) == hang

    def test_of_recipe(self, load: Any, make_base: Any, make_adapter: Any, tokenizer: Any, reward_folder: Path, module: Any,
                       tmp_path: Path, answered: Any) -> None:  # fmt: skip
        """One part of weight 1 is itself; a weight makes it a sum; the adapter is the reward stage's."""
        name = module("def level(level): return level\n")
        model, rm = make_adapter(make_base(), "policy", 1), saved(tmp_path / "rm")

        def make(said: Any, inputs: dict[str, Path]) -> Any:
            made_of = Recipe(name="x", adapter=Adapter(), reward=Reward(model=said))
            return rewards.recipe_reward(made_of, model, inputs, tokenizer, 2)

        adapter = make("adapter", {"reward": reward_folder})
        assert isinstance(adapter, rewards.AdapterReward)
        assert isinstance(make(str(rm), {}), ClassifierReward)
        assert make(f"{tmp_path}/{name}:level", {})(*answered).tolist() == [0.0, 1.0, 2.0]
        half = make([{"model": f"{tmp_path}/{name}:level", "weight": 0.5}], {})
        assert half(*answered).tolist() == [0.0, 0.5, 1.0]
        total = make(["adapter", {"model": str(rm), "weight": 2, "name": "judge"}], {"reward": reward_folder})
        expected = adapter(*answered) + 2 * make(str(rm), {})(*answered)
        torch.testing.assert_close(total(*answered), expected)
        assert total.take_metrics().keys() == {
            "rewards/adapter/mean",
            "rewards/judge/mean",
            "rewards/judge/truncated",
        }
        assert rewards.adapter_in(total).folder == reward_folder

    def test_columns_reach_a_function_only(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text(
            '{"prompt": "a", "answer": 7}\n{"messages": [{"role": "user", "content": "b"}]}\n'
        )
        source = Source(path=str(tmp_path / "p.jsonl"))
        asked = [[{"role": "user", "content": text}] for text in "ab"]
        assert datasets.prompts(source) == [{"prompt": prompt} for prompt in asked]
        assert datasets.prompts(source, columns=True) == [
            {"prompt": asked[0], "answer": 7}, {"messages": asked[1], "prompt": asked[1]},
        ]  # fmt: skip

    def test_what_the_report_says_of_it(self, tmp_path: Path) -> None:
        """The adapter alone: what its stage measured. Else what it is made of, without anybody's folders."""
        (tmp_path / "metrics.json").write_text('{"loss": 0.5}')

        def told(said: Any, inputs: dict[str, Path]) -> dict[str, Any]:
            return report_input._reward(Recipe(name="x", reward=Reward(model=said)), inputs)

        assert told("adapter", {"reward": tmp_path}) == {"loss": 0.5}
        assert told("/home/me/own_score:f", {}) == {"f": "1 · function own_score:f"}
        assert told(["adapter", {"model": "org/rm", "weight": -0.5}], {"reward": tmp_path}) == {
            "adapter": "1 · adapter adapter", "rm": "-0.5 · classifier org/rm", "loss": 0.5,
        }  # fmt: skip

    def test_the_plan_names_the_reward_model_where_it_is_trained(self, load: Any, capsys: Any) -> None:
        for text, trained in (("", True), ("reward: org/rm\n", False)):
            load(text)
            assert salsa_run(["recipes/tiny.yaml", "--lora", "--dry-run"]) == 0
            found = re.findall(r"^reward ", capsys.readouterr().out, re.MULTILINE)
            assert bool(found) is trained

    def test_parse_reward_by_itself(self) -> None:
        [part] = parse_reward("here", "/models/Some Model!")
        assert (part.kind, part.name) == ("classifier", "Some_Model_")
        [part] = parse_reward("here", "a.b:C.score")
        assert (part.kind, part.name, part.weight) == ("function", "score", 1.0)

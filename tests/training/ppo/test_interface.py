"""SalsaPPOTrainer called as TRL's GRPOTrainer is: names, peft_config, lists of rewards, streams, its own defaults."""

from __future__ import annotations

import copy
import functools
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from plain_ppo import PROMPTS, length_reward
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models.adapters import lora
from salsa_peft.utils.errors import SalsaError

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def base(make_base: Any, tokenizer: Any, tmp_path: Path) -> str:
    """The folder of a tiny base in bfloat16, with its tokenizer."""
    make_base(max_position_embeddings=256).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """config(**options) → a SalsaPPOConfig of one optimizer step for an update."""

    def make(**options: Any) -> SalsaPPOConfig:
        settings = {
            "batch_size": 8,
            "max_new_tokens": 7,
            "num_ppo_epochs": 1,
            "learning_rate": 1e-2,
            "kl_control": "fixed",
        }
        quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "shown_every": None}
        return SalsaPPOConfig(output_dir=str(tmp_path / "out"), **(settings | quiet | options))  # type: ignore[arg-type]

    return make


def factors(trainer: SalsaPPOTrainer, name: str | None) -> list[torch.Tensor]:
    """Copies of an adapter's weights."""
    return [weight.detach().clone() for weight in lora.parameters(trainer.model.policy, str(name))]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestModels:
    def test_a_name_and_nothing_else(self, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`Trainer(model=NAME, reward_funcs=f, train_dataset=d)`: float32, NAME's tokenizer, NAME-PPO, the start as reference."""
        monkeypatch.chdir(tmp_path)
        trainer = SalsaPPOTrainer(model=base, reward_funcs=length_reward, train_dataset=Dataset.from_list(PROMPTS))
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
        assert trainer.args.output_dir == "base-PPO" and trainer.processing_class.eos_token == "<eos>"
        (reference,) = trainer.references
        assert reference.label == "start" and reference.model is not trainer.model.policy
        own = list(trainer.model.policy.parameters())
        assert reference.model is not None and equal(own, list(reference.model.parameters()))  # type: ignore[arg-type]
        assert not any(weight.requires_grad for weight in reference.model.parameters())

    def test_a_new_adapter_has_the_base_as_reference(self, base: str, config: Any) -> None:
        """The seed of args is that of the factors A."""
        made = [
            SalsaPPOTrainer(
                base, length_reward, config(seed=seed, max_steps=1), PROMPTS, peft_config=LoraConfig(**LORA)
            )
            for seed in (1, 1, 2)
        ]
        assert [reference.adapter for reference in made[0].references] == [None]
        assert equal(factors(made[0], "default"), factors(made[1], "default"))
        assert not equal(factors(made[0], "default"), factors(made[2], "default"))
        made[0].train()
        assert next(row for row in made[0].state.log_history if "objective/kl" in row)["objective/kl"] == 0

    def test_an_adapter_is_copied_at_its_start(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, config: Any
    ) -> None:
        """The copy stays as it was while the policy moves; the KL starts at 0 and does not stay there."""
        model = make_adapter(make_base(), "mine", 1)
        trainer = SalsaPPOTrainer(model, length_reward, config(max_steps=3), PROMPTS, processing_class=tokenizer)
        (reference,) = trainer.references
        start = factors(trainer, "mine")
        assert reference.adapter == "start" and equal(start, factors(trainer, "start"))
        trainer.train()
        kls = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row]
        assert kls[0] == pytest.approx(0, abs=1e-5) and abs(kls[2]) > 1e-3
        assert equal(start, factors(trainer, "start")) and not equal(start, factors(trainer, "mine"))

    def test_a_random_new_adapter_is_copied_too(self, base: str, config: Any) -> None:
        """Its delta is not 0, so the base is not its start."""
        trainer = SalsaPPOTrainer(
            base, length_reward, config(), PROMPTS, peft_config=LoraConfig(**LORA, init_lora_weights=False)
        )
        assert trainer.references[0].adapter == "start"

    def test_an_adapters_folder(
        self, base: str, make_adapter: Any, tmp_path: Path, config: Any, tokenizer: Any
    ) -> None:
        """It is trained on its base, which it names."""
        model = make_adapter(AutoModelForCausalLM.from_pretrained(base), "default", 3)
        lora.save(model, "default", tmp_path / "adapter", tokenizer)
        trainer = SalsaPPOTrainer(tmp_path / "adapter", length_reward, config(max_steps=1), PROMPTS)
        assert equal(factors(trainer, "default"), [weight.detach() for weight in lora.parameters(model, "default")])
        assert trainer.references[0].adapter == "start"
        trainer.train()
        assert not equal(factors(trainer, "default"), factors(trainer, "start"))

    def test_dtypes(self, base: str, config: Any, capsys: Any) -> None:
        """bfloat16 on a CPU without autocast is taken where it is asked for, and said in a line."""
        line = "model: its weights are in bfloat16, which is slow on a CPU without autocast."
        for kwargs, bf16, dtype, told in (
            ({"dtype": "auto"}, False, torch.float32, False),
            ('{"dtype": "bfloat16"}', False, torch.bfloat16, True),
            ({"dtype": torch.bfloat16}, True, torch.bfloat16, False),
            ({"attn_implementation": "eager"}, True, torch.float32, False),
        ):
            args = config(model_init_kwargs=kwargs, bf16=bf16)
            trainer = SalsaPPOTrainer(base, length_reward, args, PROMPTS, peft_config=LoraConfig(**LORA))
            assert trainer.model.policy.get_base_model().dtype == dtype
            assert (capsys.readouterr().err.count(line) == 1) == told

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"model_init_kwargs": {"dtype": "int3"}}, "model_init_kwargs: dtype 'int3' is unknown; use auto, float32"),
            (
                {"model_init_kwargs": {"trust_remote_code": True}},
                "model_init_kwargs: trust_remote_code is not supported",
            ),
        ],
    )
    def test_options_of_loading(self, options: Any, line: str, base: str, config: Any) -> None:
        with pytest.raises(SalsaError, match=line):
            SalsaPPOTrainer(base, length_reward, config(**options), PROMPTS)

    def test_what_a_loaded_model_does_not_take(self, make_base: Any, tokenizer: Any, config: Any) -> None:
        """A peft_config on top of an adapter, and options of loading."""
        adapter = get_peft_model(make_base(), LoraConfig(**LORA))
        for model, args, more, line in (
            (adapter, config(), {"peft_config": LoraConfig(**LORA)}, "peft_config: the model has an adapter already"),
            (make_base(), config(), {"peft_config": {"r": 4}}, "peft_config: a dict is no configuration of PEFT"),
            (make_base(), config(), {"quantization_config": object()}, "quantization_config: has no effect on a model"),
            (
                make_base(),
                config(model_init_kwargs={"dtype": "auto"}),
                {},
                "model_init_kwargs: has no effect on a model",
            ),
        ):
            with pytest.raises(SalsaError, match=line):
                SalsaPPOTrainer(model, length_reward, args, PROMPTS, processing_class=tokenizer, **more)

    def test_ref_model_is_one_reference(self, make_base: Any, make_adapter: Any, tokenizer: Any, config: Any) -> None:
        """As in PPOTrainer of TRL 1.12: a model; and whatever references take."""
        other = make_base(seed=1)
        model = make_adapter(make_adapter(make_base(), "policy", 1), "soup", 2)
        for given in (other, "soup", "base"):
            trainer = SalsaPPOTrainer(
                copy.deepcopy(model), length_reward, config(), PROMPTS, processing_class=tokenizer, ref_model=given
            )
            (reference,) = trainer.references
            assert (reference.model or reference.label) is given or reference.label == given
        with pytest.raises(SalsaError, match="ref_model: references are given too"):
            SalsaPPOTrainer(
                model,
                length_reward,
                config(),
                PROMPTS,
                processing_class=tokenizer,
                ref_model=other,
                references=["soup"],
            )

    def test_the_rate_of_full_weights_for_an_adapter_is_told(self, base: str, config: Any, capsys: Any) -> None:
        line = "is the default, which is for full weights (the paper's). LoRA adapters need about ten times as much"
        for peft_config, rate, times in ((LoraConfig(**LORA), 2e-6, 1), (LoraConfig(**LORA), 2e-5, 0), (None, 2e-6, 0)):
            args = config(learning_rate=rate, max_steps=1)
            SalsaPPOTrainer(base, length_reward, args, PROMPTS, peft_config=peft_config).train()
            assert capsys.readouterr().err.count(line) == times

    def test_the_order_of_earlier_versions_is_told(self, make_base: Any, tokenizer: Any, config: Any) -> None:
        with pytest.raises(SalsaError, match=r"reward_funcs: this is a SalsaPPOConfig\. The order .* Pass args="):
            SalsaPPOTrainer(make_base(), config(), PROMPTS, reward=length_reward, processing_class=tokenizer)
        with pytest.raises(SalsaError, match="args: a dict has no options of PPO; pass a SalsaPPOConfig"):
            SalsaPPOTrainer(make_base(), length_reward, {}, PROMPTS, processing_class=tokenizer)  # type: ignore[arg-type]
        with pytest.raises(SalsaError, match="reward_funcs: pass a reward function, a reward model, or a list"):
            SalsaPPOTrainer(make_base(), args=config(), train_dataset=PROMPTS, processing_class=tokenizer)
        with pytest.raises(SalsaError, match="processing_class: the model was not loaded from a name"):
            SalsaPPOTrainer(make_base(), length_reward, config(), PROMPTS)


def fixed(value: float, completions: list[Any], **_: Any) -> list[float]:
    return [value] * len(completions)


class TestRewards:
    def test_names_and_weights(self, base: str, config: Any) -> None:
        """Lambdas, partials of one function, and a function twice have distinct names; a name that is given stays."""
        functions = [
            lambda completions, **_: [1.0] * len(completions),
            lambda completions, **_: [2.0] * len(completions),
            functools.partial(fixed, 4.0),
            functools.partial(fixed, 8.0),
        ]
        args = config(reward_weights=[1, 0.5, 0.25, 0.125], max_steps=1)
        trainer = SalsaPPOTrainer(base, functions, args, PROMPTS)
        trainer.train()
        row = next(row for row in trainer.state.log_history if "objective/scores" in row)
        means = {key: value for key, value in row.items() if key.startswith("rewards/")}
        assert means == {f"rewards/{name}/mean": value for name, value in (("lambda", 1), ("lambda-2", 2), ("fixed", 4), ("fixed-2", 8))}  # fmt: skip
        assert row["objective/scores"] == 4.0
        assert [one.name for one in trainer.reward.components()] == ["lambda", "lambda-2", "fixed", "fixed-2"]
        named = SalsaPPOTrainer(base, [(functions[2], 1.0, "fixed"), functions[3]], config(), PROMPTS)
        assert [part.name for part in named.reward.parts] == ["fixed", "fixed-2"]  # type: ignore[attr-defined]
        with pytest.raises(SalsaError, match="reward_weights: there are 4 for 2 rewards; give one for each"):
            SalsaPPOTrainer(base, functions[:2], args, PROMPTS)
        with pytest.raises(SalsaError, match="reward_weights: the list of rewards has weights too, in tuples"):
            SalsaPPOTrainer(base, [(functions[0], 1.0)], config(reward_weights=[1.0]), PROMPTS)
        with pytest.raises(SalsaError, match=r"all weights \(reward_weights\) are 0"):
            SalsaPPOTrainer(base, functions[:2], config(reward_weights=[0, 0]), PROMPTS)
        alone = SalsaPPOTrainer(base, functions[0], config(reward_weights=[2.0]), PROMPTS)
        assert [part.weight for part in alone.reward.parts] == [2.0]  # type: ignore[attr-defined]

    def test_a_classifier_with_its_tokenizer(self, base: str, tokenizer: Any, config: Any) -> None:
        """One that was built in memory has no name to load a tokenizer from; TRL: reward_processing_classes."""
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_labels": 1,
        }
        classifier = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes))
        own = copy.deepcopy(tokenizer)
        for funcs, tokenizers in ((classifier, own), ([length_reward, classifier], [None, own])):
            trainer = SalsaPPOTrainer(base, funcs, config(max_steps=1), PROMPTS, reward_processing_classes=tokenizers)
            found = trainer.reward.components()[-1]
            assert found.tokenizer is own and found.name == "classifier"  # type: ignore[attr-defined]
            trainer.train()
        with pytest.raises(SalsaError, match="has no name_or_path from which its tokenizer could be loaded"):
            SalsaPPOTrainer(base, [classifier], config(), PROMPTS)

    def test_arguments_that_trl_passes_and_this_trainer_does_not(self, base: str, config: Any) -> None:
        """One without a default is an error that names it."""

        def wants(completions: Any, log_extra: Any) -> list[float]:
            return [0.0] * len(completions)

        def takes(completions: Any, log_extra: Any = None, trainer_state: Any = None) -> list[float]:
            assert log_extra is None and trainer_state.max_steps == 1
            return [0.0] * len(completions)

        SalsaPPOTrainer(base, takes, config(max_steps=1), PROMPTS).train()
        with pytest.raises(
            SalsaError, match="wants: its argument log_extra is not passed here; give it the default None"
        ):
            SalsaPPOTrainer(base, wants, config(max_steps=1), PROMPTS).train()


class TestData:
    def test_a_stream(self, base: str, config: Any) -> None:
        """Of a stream without end, as many rows as max_steps needs; its columns go to the reward function."""
        read: list[int] = []

        def rows() -> Iterator[dict[str, Any]]:
            number = 0
            while True:
                read.append(number)
                yield {"prompt": PROMPTS[number % len(PROMPTS)]["prompt"], "answer": str(number)}
                number += 1

        def reward(completions: Any, answer: list[str], finished: list[bool]) -> list[float]:
            seen.extend(answer)
            return [float(ended) for ended in finished]

        seen: list[str] = []
        stream = IterableDataset.from_generator(rows)
        args = config(max_steps=4, num_ppo_epochs=2)
        trainer = SalsaPPOTrainer(base, reward, args, stream, eval_dataset=stream.take(3))
        trainer.train()
        assert sorted(map(int, seen)) == list(range(16)) and max(read) <= 16
        assert trainer.evaluate()["eval_response_length"] > 0
        with pytest.raises(SalsaError, match="train_dataset: an IterableDataset has no length; set max_steps"):
            SalsaPPOTrainer(base, reward, config(), stream)

    def test_a_stream_without_end_to_evaluate_on(self, base: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also a generator, and also in evaluate(); a stream that ends is read to its end."""

        def rows() -> Iterator[dict[str, Any]]:
            while True:
                yield PROMPTS[0]

        monkeypatch.setattr("salsa_peft.training.ppo.interface.evaluation.MAX_EVAL_ROWS", 20)
        stream, line = IterableDataset.from_generator(rows), "has no length, and more than 20 rows"
        for endless in (stream, rows(), stream.take(21)):
            with pytest.raises(SalsaError, match=rf"eval_dataset: this \w+ {line}.*eval_dataset\.take\(200\)"):
                SalsaPPOTrainer(base, length_reward, config(), PROMPTS, eval_dataset=endless)
        trainer = SalsaPPOTrainer(base, length_reward, config(), PROMPTS, eval_dataset=stream.take(20))
        assert len(trainer.eval_dataset) == 20  # type: ignore[arg-type]
        with pytest.raises(SalsaError, match=line):
            trainer.evaluate(stream)

    @pytest.mark.parametrize("ids", [[3.0, 4.0], ["3"], "34", 3, None, [[3, 4]], torch.tensor([3.0])])
    def test_input_ids_that_are_no_whole_numbers(self, base: str, config: Any, ids: Any) -> None:
        rows = [{"input_ids": torch.tensor([3, 4])}, {"input_ids": ids}]
        with pytest.raises(SalsaError, match=r"^train_dataset, row 2, input_ids: must be a list of whole numbers, not"):
            SalsaPPOTrainer(base, length_reward, config(), rows)

    def test_text_messages_and_tokens(self, base: str, config: Any) -> None:
        """Completions are text or messages, as prompts are; a list and a Dataset give the same."""
        for rows, kind in (
            ([{"prompt": "kin carp plum"}] * 8, str),
            ([{"prompt": [{"role": "user", "content": "kin carp plum"}]}] * 8, list),
            ([{"input_ids": [5, 6, 7]}] * 8, str),
        ):
            for data in (rows, Dataset.from_list(rows)):  # type: ignore[arg-type]

                def reward(prompts: Any, completions: Any, completion_ids: Any, kind: type = kind) -> list[float]:
                    assert {type(one) for one in (*prompts, *completions)} == {kind}
                    return [float(len(ids)) for ids in completion_ids]

                SalsaPPOTrainer(base, reward, config(max_steps=1), data).train()


def test_an_optimizer_and_a_scheduler_of_the_users(make_base: Any, tokenizer: Any, config: Any) -> None:
    """They train the policy, and the value head, which the user's optimizer could not have."""
    model = make_base()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = SalsaPPOTrainer(
        model, length_reward, config(max_steps=2, vf_coef=1.0), PROMPTS, processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    before = [weight.detach().clone() for weight in trainer.model.policy.parameters()]
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer  # type: ignore[union-attr]
    assert not equal(before, list(trainer.model.policy.parameters()))  # type: ignore[arg-type]
    head = trainer.model.value_head
    assert head is not None and head.weight.abs().sum() > 0
    with pytest.raises(SalsaError, match="value_head_learning_rate: has no effect with an optimizer of your own"):
        SalsaPPOTrainer(
            model, length_reward, config(value_head_learning_rate=1e-3), PROMPTS, processing_class=tokenizer,
            optimizers=(optimizer, None),
        )  # fmt: skip


def test_an_optimizer_of_other_weights(make_base: Any, base: str, tokenizer: Any, config: Any) -> None:
    """Those of another model, those of the base under a new adapter, and one weight of the policy, which is enough."""
    model, line = make_base(), "^optimizers: the optimizer has none of the weights that the policy trains"
    for other in (make_base(), torch.nn.Linear(2, 2)):
        with pytest.raises(SalsaError, match=line):
            SalsaPPOTrainer(
                model, length_reward, config(), PROMPTS, processing_class=tokenizer,
                optimizers=(torch.optim.SGD(other.parameters()), None),
            )  # fmt: skip
    own = torch.optim.SGD(model.parameters())
    with pytest.raises(SalsaError, match=line):
        SalsaPPOTrainer(
            model, length_reward, config(), PROMPTS, processing_class=tokenizer, optimizers=(own, None),
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip
    model = make_base()
    SalsaPPOTrainer(
        model, length_reward, config(), PROMPTS, processing_class=tokenizer,
        optimizers=(torch.optim.SGD([next(model.parameters())]), None),
    )  # fmt: skip


def test_a_reward_that_is_given_twice(base: str, config: Any) -> None:
    with pytest.raises(SalsaError, match=r"^reward: reward_funcs is given too; pass all rewards in one list"):
        SalsaPPOTrainer(base, length_reward, config(), PROMPTS, reward=length_reward)
    SalsaPPOTrainer(base, None, config(), PROMPTS, reward=length_reward)


class TestBestMetric:
    def test_known_before_training(self, base: str, config: Any) -> None:
        """Of one function and of a list, whose means are metrics too; one of weight 0 is held out."""
        three = "eval_score, eval_response_length, eval_empty_share"
        means = ", eval_rewards/length_reward/mean, eval_rewards/same/mean, eval_objective/held_out_score"

        def same(completions: Any, **_: Any) -> list[float]:
            return [1.0 for _ in completions]

        for rewards, weights, known in ((length_reward, None, three), ([length_reward, same], [1, 0], three + means)):
            for metric in ("reward", "eval_reward", "loss", "eval_eval_score"):
                args = config(metric_for_best_model=metric, reward_weights=weights and list(map(float, weights)))
                with pytest.raises(SalsaError, match=rf"metric_for_best_model: evaluation has no .*, but {known} and"):
                    SalsaPPOTrainer(base, rewards, args, PROMPTS)
            for metric in known.split(", "):
                args = config(metric_for_best_model=metric, reward_weights=weights and list(map(float, weights)))
                trainer = SalsaPPOTrainer(base, rewards, args, PROMPTS, eval_dataset=PROMPTS[:2])
                assert metric in trainer.evaluate()

    def test_that_a_function_logs(self, base: str, config: Any) -> None:
        """Known at the first evaluation only."""

        def reward(completions: Any, log_metric: Any) -> list[float]:
            log_metric("mine", 1)
            return [1.0 for _ in completions]

        for metric in ("mine", "eval_mine", "score"):
            args = config(metric_for_best_model=metric)
            assert SalsaPPOTrainer(base, reward, args, PROMPTS, eval_dataset=PROMPTS[:2]).evaluate()["eval_mine"] == 1
        args = config(metric_for_best_model="other", eval_strategy="steps", eval_steps=1, max_steps=2)
        trainer = SalsaPPOTrainer(base, reward, args, PROMPTS, eval_dataset=PROMPTS[:2])
        with pytest.raises(SalsaError, match=r"evaluation has no metric 'other', but eval_score, .*, eval_mine and"):
            trainer.train()


def test_a_push_while_offline(base: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line, at the start with push_to_hub=True, and from push_to_hub()."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = "^push_to_hub: HF_HUB_OFFLINE is set, so nothing can be sent to the Hub; unset it"
    with pytest.raises(SalsaError, match=line):
        SalsaPPOTrainer(base, length_reward, config(push_to_hub=True, hub_model_id="me/x"), PROMPTS)
    trainer = SalsaPPOTrainer(base, length_reward, config(), PROMPTS)
    with pytest.raises(SalsaError, match=line):
        trainer.push_to_hub()
    trainer.hub_model_id = "me/x"  # as a trainer that pushed before
    with pytest.raises(SalsaError, match=line):
        trainer.push_to_hub()


def test_the_example_of_moving_from_trl(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """examples/from_trl_ppo.py with a tiny model: three updates at TRL's values, and an adapter that PEFT opens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["from_trl_ppo.py", base])
    names = runpy.run_path(str(ROOT / "examples" / "from_trl_ppo.py"))
    assert names["trainer"].ppo.update == 3 and "the policy is in from-trl-ppo" in capsys.readouterr().out
    assert (tmp_path / "from-trl-ppo" / "value_head.safetensors").is_file()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "from-trl-ppo")

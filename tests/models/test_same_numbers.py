"""The precision of forwards: one rule for training, PPO, evaluation, landscapes, soup measures and rewards, and the same numbers in all."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paper_models import make_base
from peft import get_peft_model
from plain_ppo import PROMPTS, length_reward, roll_out
from torch import Tensor

from salsa_peft import SalsaPPOTrainer
from salsa_peft.config.load import load_recipe
from salsa_peft.data.chat.turn_ends import model_stop_token_ids
from salsa_peft.data.questions import Question
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.evaluation.answers import answer
from salsa_peft.evaluation.landscape import mean_scores, measures
from salsa_peft.models import precision
from salsa_peft.models.adapters import forward
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import classifier_class, hidden_states, use_float32_head
from salsa_peft.models.logprobs import head_of, token_logprobs
from salsa_peft.models.responses import Responses
from salsa_peft.models.rewards.classifier import load_classifier_reward
from salsa_peft.models.rewards.reward import AdapterReward
from salsa_peft.models.stage_context import StageContext
from salsa_peft.models.weights import cast_weights, save_checkpoint
from salsa_peft.soup.measures import RewardScore, _on_base
from salsa_peft.training.ppo_stage import ppo_config
from salsa_peft.training.reward_model import start_from_seed
from salsa_peft.training.trl_stages import sample_under_autocast
from salsa_peft.utils.errors import SalsaError

ROWS = 8
LENGTH = 5


@pytest.fixture
def make_context(tmp_path: Path) -> Any:
    """make_context(dtype, lora, …) → the StageContext of the ppo stage on a tiny base, on which seed-0 and a reward adapter lie."""
    base = make_base("llama", tmp_path / "base")

    def make(dtype: str, lora: str | None = "lora", **more: Any) -> StageContext:
        settings = {
            "model.base": str(base), "model.dtype": dtype, "generation.max_new_tokens": LENGTH, "generation.min_new_tokens": LENGTH,
            "ppo.batch_size": ROWS, "ppo.num_mini_batches": 1, "policies": {"ppo": {"reference": "base"}}, **more,
        }  # fmt: skip
        recipe = load_recipe("quickstart", lora=lora, overrides=[f"{k}={json.dumps(v)}" for k, v in settings.items()])
        context = StageContext(recipe.recipe, base, "base", make_tokenizer(), "ppo")
        if recipe.recipe.adapter is not None:
            config = adapters.lora_config(recipe.recipe.adapter)
            for seed, name in enumerate(("seed-0", "reward")):
                model = get_peft_model(context.load_base(), config, adapter_name="default")
                generator = torch.Generator().manual_seed(seed)
                for parameter in adapters.parameters(model, "default"):
                    parameter.data.normal_(std=0.2, generator=generator)
                head = torch.randn(1, model.config.hidden_size, generator=generator)
                extra = {} if seed == 0 else {"base_model.model.score.weight": head}
                adapters.save(model, "default", tmp_path / name, extra=extra)
        return context

    return make


class Inside:
    """A reward that computes scores and log-probs of given responses in the context in which it is called."""

    def __init__(self, model: Any, adapter: str, given: Responses, reward: Any, context: StageContext) -> None:
        self.model, self.adapter, self.given, self.reward = model, adapter, given, reward
        self.tokenizer = context.tokenizer

    def __call__(self, responses: Responses, rows: Any) -> Tensor:
        lm, labels = self.model.get_base_model(), self.given.response_ids.flatten()
        forbidden = torch.ones_like(labels, dtype=torch.bool)
        with torch.no_grad(), adapters.active(self.model, self.adapter):
            hidden = hidden_states(self.model, self.given.input_ids, self.given.attention_mask)
            states = hidden[:, -LENGTH - 1 : -1].flatten(0, 1)
            head = head_of(lm, 1.0, model_stop_token_ids(self.tokenizer, lm))
            self.logprobs = token_logprobs(states, labels, forbidden, head).logprobs.view(-1, LENGTH)
        self.scores = self.reward(self.given, [{"prompt": "x"}] * ROWS)
        return torch.zeros(len(rows))


NF4 = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which has the 4-bit base")


TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao, which has the optimizer")


@pytest.mark.parametrize(
    ("dtype", "lora"), [("float32", "lora"), ("bfloat16", "lora"), pytest.param("bfloat16", "qlora", marks=NF4)]
)
def test_ppo_evaluation_landscape_and_measures_compute_the_same_numbers(
    make_context: Any, tmp_path: Path, dtype: str, lora: str
) -> None:
    """Scores and log-probs of the same adapter and the same tokens are equal to the bit."""
    context = make_context(dtype, lora)
    model: Any = adapters.attach(context.load_base(), tmp_path / "seed-0", "policy", trainable=True)
    config = ppo_config(context, tmp_path / "run")
    assert config.bf16 is (dtype == "bfloat16")
    prompts = [{"input_ids": list(range(5 + row, 12 + row))} for row in range(ROWS)]
    reward = AdapterReward(model, tmp_path / "reward")
    trainer = SalsaPPOTrainer(
        model,
        args=config,
        train_dataset=prompts,
        references=["base"],
        reward_funcs=reward,
        processing_class=context.tokenizer,
    )
    rollout = roll_out(trainer, ROWS)
    given = rollout.responses
    assert given.attention_mask.all(), "all rows have one length, so that no batch is padded"

    question = Question(1, None, PROMPTS[0]["prompt"], (PROMPTS[0]["prompt"][0]["content"],), None, {})
    job: Any = SimpleNamespace(recipe=context.recipe, inputs={"reward": tmp_path / "reward"})
    for measured in ("evaluation", "landscape", "soup"):
        if measured == "soup":
            live = _on_base(context.load_base(), [tmp_path / "seed-0"])
            inside = Inside(live.model, live.name, given, AdapterReward(live.model, tmp_path / "reward"), context)
            score: Any = RewardScore(live, [{}], [[5, 6, 7]], inside, context.recipe.generation, context.tokenizer)
            score([1.0])
        else:
            other = adapters.attach(context.load_base(), tmp_path / "seed-0", "other")
            inside = Inside(other, "other", given, measures(job, other, context)["reward"], context)
            function: Any = answer if measured == "evaluation" else mean_scores
            function(other, "other", [question], {"reward": inside}, context, 0)
        assert torch.equal(inside.logprobs, rollout.logprobs), measured
        assert torch.equal(inside.scores, rollout.scores), measured
    assert not torch.equal(rollout.scores, rollout.scores.bfloat16().float()), "the score head is float32"


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
    ("dtype", "chosen"), [("float32", "master"), ("bfloat16", "master"), pytest.param("bfloat16", "stochastic", marks=TORCHAO)]
)  # fmt: skip
def test_trained_full_weights_compute_what_frozen_ones_do(
    make_context: Any, tmp_path: Path, dtype: str, chosen: str, moving: bool
) -> None:
    """Float32 masters under autocast, a reference of the same weights in bf16, and evaluation: equal to the bit, and the KL is 0."""
    context = make_context(dtype, None, precision=chosen)
    reference, base = context.load_moving() if moving else context.load_base(), context.load_base()
    save_checkpoint(base, tmp_path / "seed", context.tokenizer)  # as a seed is saved in `dtype`
    policy = context.load_trainable(tmp_path / "seed")
    assert {weight.dtype for weight in policy.parameters()} == {precision.PRECISIONS[chosen].weights}
    prompts = [{"input_ids": list(range(5 + row, 12 + row))} for row in range(ROWS)]
    trainer = SalsaPPOTrainer(
        policy, args=ppo_config(context, tmp_path / "run"), train_dataset=prompts, references=[reference], reward_funcs=length_reward, processing_class=context.tokenizer
    )  # fmt: skip
    rollout = roll_out(trainer, ROWS)
    assert rollout.kl.abs().max() == 0
    given, labels = rollout.responses, rollout.responses.response_ids.flatten()
    with torch.no_grad(), precision.autocast(base):
        states = hidden_states(base, given.input_ids, given.attention_mask)[:, -LENGTH - 1 : -1].flatten(0, 1)
        head = head_of(base, 1.0, model_stop_token_ids(context.tokenizer, base))
        found = token_logprobs(states, labels, torch.ones_like(labels, dtype=torch.bool), head)
    assert torch.equal(found.logprobs.view(-1, LENGTH), rollout.logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_the_reward_computes_the_scores_that_ppo_sees(make_context: Any, tmp_path: Path, dtype: str) -> None:
    """Under the Trainer's autocast; the score head is float32, over hidden states in any dtype."""
    context = make_context(dtype)
    trained = start_from_seed(context, tmp_path / "seed-0")
    head = trained.base_model.model.score.modules_to_save["default"]
    assert head.weight.dtype == torch.float32 and head.weight.requires_grad
    adapters.save(trained, "default", tmp_path / "trained")
    ids = torch.randint(5, 60, (ROWS, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    use_bf16 = precision.uses_autocast(getattr(torch, dtype), float32_weights=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        scores = trained(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    scores.sum().backward()
    assert scores.dtype == head.weight.grad.dtype == torch.float32
    model = adapters.attach(context.load_base(), tmp_path / "seed-0", "policy")
    reward = AdapterReward(model, tmp_path / "trained")
    forward.install(model)
    whole = mask.bool()
    responses = Responses(ids[:, :6], whole[:, :6], ids[:, 6:], whole[:, 6:], torch.ones(ROWS, dtype=torch.bool))
    torch.testing.assert_close(reward(responses, [{}] * ROWS), scores.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "lora", "weights", "bf16"),
    [
        ("float32", "lora", "auto", False),
        ("bfloat16", "lora", "auto", True),
        ("bfloat16", "qlora", "auto", True),
        ("auto", "lora", "auto", torch.cuda.is_available()),
        ("float32", None, "master", False),
        ("bfloat16", None, "master", True),
        pytest.param("bfloat16", None, "stochastic", False, marks=TORCHAO),
    ],
)  # fmt: skip
def test_the_rule_decides_the_trainers_arguments(
    make_context: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, lora: str | None, weights: str, bf16: bool
) -> None:  # fmt: skip
    """Not whether there is a GPU."""
    monkeypatch.setattr("salsa_peft.models.base.require", lambda *_: None)  # bitsandbytes is not needed for arguments
    context = make_context(dtype, lora and "lora", **({} if lora else {"precision": weights}))
    for section in ("sft", "reward", "ppo", "dpo", "grpo"):
        found = context.arguments(getattr(context.recipe, section), tmp_path, 0)
        assert found["bf16"] is bf16, section


def test_rloo_and_grpo_sample_under_the_autocast_that_they_train_under(make_base: Any, make_adapter: Any) -> None:
    """TRL's own call of a PeftModel's generate is outside of it."""
    model, seen = make_adapter(make_base().bfloat16(), "policy", 0), set()
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    sample_under_autocast(model)
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    assert seen == {True}


def test_a_classifiers_score_head_is_read_as_it_was_saved(make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
    """In float32 beside a body in bf16, and so it scores; a head that was saved in bf16 computes in float32 too."""
    config = make_base().config
    config.num_labels = 1
    model = classifier_class(config)(config)
    use_float32_head(model)
    model.score.weight.data.normal_()
    cast_weights(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    save_checkpoint(model, tmp_path / "rm", tokenizer)
    reward = load_classifier_reward(str(tmp_path / "rm"), tokenizer, 4, dtype="bfloat16")
    loaded: Any = reward.classifier
    assert (
        torch.equal(loaded.score.weight, model.score.weight)
        and loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    )
    assert loaded.config.architectures == ["LlamaForSequenceClassification"]
    scores = reward._forward([[5, 6, 7, 8], [9, 10]])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_float16_is_for_runs_that_train_nothing(make_context: Any) -> None:
    with pytest.raises(SalsaError, match=r"model.dtype: float16 is only for runs that train nothing, .* trains sft"):
        make_context("float16")


def test_a_model_in_bf16_needs_adapters_for_autocast(make_base: Any, make_adapter: Any) -> None:
    """A plain model computes in its own dtype, also within another's autocast; float32 weights follow the caller."""
    wide, narrow = make_base(), make_base().bfloat16()

    def inside(model: Any) -> bool:
        with precision.autocast(model):
            return torch.is_autocast_enabled("cpu")

    assert [inside(wide), inside(narrow)] == [False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert [inside(wide), inside(narrow)] == [True, False]
    assert not inside(make_adapter(wide, "policy", 0)) and inside(make_adapter(narrow, "policy", 0))


def test_library_users_hear_of_arguments_that_do_not_fit(
    make_base: Any, make_adapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters over bf16 without autocast compute other numbers than `salsa run`; fp16 under bf16 is refused."""
    from salsa_peft.training.ppo.checks import check_autocast

    args: Any = SimpleNamespace(bf16=False, process_index=0, device=torch.device("cuda"))
    narrow = make_adapter(make_base().bfloat16(), "policy", 0)
    check_autocast(narrow, args)
    assert "Set bf16=True to train, score and evaluate under bf16 autocast" in capsys.readouterr().err
    check_autocast(make_adapter(make_base(), "policy", 0), args)
    args.bf16 = True
    check_autocast(narrow, args)
    assert capsys.readouterr().err == ""
    with pytest.raises(SalsaError, match="bf16: True does not fit a base in float16"):
        check_autocast(make_base().half(), args)

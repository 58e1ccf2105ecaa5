"""Numbers that are none, or too large, and batches that are too small: finite weights, or one line with nothing saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, length_reward, roll_out
from soup_members import WEIGHTS, edit_tensors
from torch import Tensor

from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm
from salsa_peft.models.rewards.base import CallableReward
from salsa_peft.models.rewards.reward import RunningScale, as_reward
from salsa_peft.models.weights import save_checkpoint
from salsa_peft.soup import average
from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.checks import check_model
from salsa_peft.training.references import as_references
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import sha256

NAN, INF = math.nan, math.inf
Change = Callable[[Any], None]
SCALED = {"whiten_rewards": True, "normalize_scores": True}


def held(trainer: Any) -> dict[str, Tensor]:
    """A copy of all weights, without the value head's bias, which the first rollout batch sets."""
    weights = trainer.model.state_dict().items()
    return {name: tensor.clone() for name, tensor in weights if name != "value_head.bias"}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Also of NaNs."""
    return all(torch.equal(tensor.view(torch.int32), other[name].view(torch.int32)) for name, tensor in one.items())


def is_finite(trainer: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())


def refused(trainer: Any, line: str) -> str:
    """Training ends in one line that matches; no weight of policy, references or value head has changed, none is in a file."""
    before, folder = held(trainer), Path(trainer.args.output_dir)
    with pytest.raises(SalsaError, match=line) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert same_bits(held(trainer), before)
    assert not list(folder.glob("checkpoint-*"))
    assert not (folder / WEIGHTS).exists()
    return str(caught.value)


def trained(trainer: Any) -> Any:
    """The trainer after training, its weights finite and others than before."""
    before = held(trainer)
    trainer.train()
    assert is_finite(trainer)
    assert not same_bits(held(trainer), before)
    return trainer


def factor(name: str, value: float, which: int = -1) -> Change:
    """One number of one of an adapter's factors: its last B, or another (1: its first)."""

    def change(trainer: Any) -> None:
        list(adapters.parameters(trainer.model.policy, name))[which].data.view(-1)[0] = value

    return change


def value_head(value: float) -> Change:
    return lambda trainer: trainer.model.value_head.weight.data[0, :1].fill_(value)


def last_norm(value: float) -> Change:
    """Of the shared base: every role has it."""
    return lambda trainer: causal_lm(trainer.model.policy).model.norm.weight.data[:1].fill_(value)


def say(value: float, rows: slice = slice(None)) -> Callable[..., list[float]]:
    """A reward of `value` for these rows of a batch; the others have their length."""

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = length_reward(prompts, completions, completion_ids)
        scores[rows] = [value] * len(scores[rows])
        return scores

    return reward


@pytest.mark.parametrize("value", [NAN, INF])
class TestWeights:
    """A number in a weight is found before the first step, and said where."""

    @pytest.mark.parametrize(
        "options",
        [{}, {"kl_estimator": "k3", "kl_per": "token"}, {"kl_estimator": "full"}, {"kl_coef": 0.0, "old_logprobs": "rollout"}],
        ids=lambda options: " ".join(map(str, options.values())) or "k1",
    )  # fmt: skip
    def test_in_a_reference(self, make_trainer: Any, value: float, options: dict[str, Any]) -> None:
        """Its KL is no number, also where β is 0; a second reference that is sound does not hide it."""
        trainer = make_trainer(["seed-0", "soup"], **options)
        factor("soup", value)(trainer)
        refused(trainer, r"^KL: PPO computed (nan|-?inf)\. No checkpoint was saved; the batch is in ")

    def test_in_the_policy(self, make_trainer: Any, value: float) -> None:
        trainer = make_trainer()
        factor("policy", value)(trainer)
        refused(
            trainer,
            r"^model: the logits are NaN or infinite for [1-8] of 8 prompts\. Check the model's weights for NaN",
        )

    def test_in_the_base(self, make_trainer: Any, value: float) -> None:
        trainer = make_trainer()
        last_norm(value)(trainer)
        refused(trainer, r"^model: the logits are NaN or infinite for 8 of 8 prompts")

    @pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
    def test_in_the_value_head(self, make_trainer: Any, value: float, old_logprobs: str) -> None:
        trainer = make_trainer(old_logprobs=old_logprobs)
        value_head(value)(trainer)
        refused(trainer, r"^value: PPO computed (nan|-?inf)\. No checkpoint was saved")

    def test_before_the_trainer_is_made(self, make_trainer: Any, make_base: Any, value: float) -> None:
        """A frozen model as reference, and a policy, are looked at when they are given."""
        broken = make_base(1)
        broken.model.norm.weight.data[0] = value
        with pytest.raises(SalsaError, match=r"^llama: the model's logits are NaN or infinite"):
            make_trainer([broken], full=True)
        with pytest.raises(SalsaError, match=r"^llama: the model's logits are NaN or infinite"):
            check_model(broken)

    def test_the_batch_is_kept_for_people(self, make_trainer: Any, value: float) -> None:
        """What the line names is there: the texts, and every tensor by its name."""
        from safetensors.torch import load_file

        trainer = make_trainer()
        factor("soup", value)(trainer)
        folder = Path(refused(trainer, "^KL: PPO computed ").rsplit("the batch is in ", 1)[1])
        rows = [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]
        tensors = load_file(folder / "batch.safetensors")
        assert (len(rows), set(rows[0])) == (8, {"prompt", "response"})
        assert tensors["logprobs"].isfinite().all()
        assert not tensors["kl"].isfinite().all()
        assert tensors["kl"].shape == tensors["response_mask"].shape


class TestScores:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize(
        ("rows", "options"),
        [(slice(None), {}), (slice(3, 4), {"score_clip": 5.0, "normalize_scores": True})],
        ids=["all", "one, scaled and clipped"],
    )
    def test_that_are_none(self, make_trainer: Any, value: float, rows: slice, options: dict[str, Any]) -> None:
        """Said as the reward gave it: a clip would make 5 of infinity."""
        refused(
            make_trainer(reward=say(value, rows), **options),
            rf"^reward function reward: it returned {value} for response \d of 8 \(.*\); return finite numbers",
        )

    def test_of_a_model_that_are_none(self, make_trainer: Any) -> None:
        """A reward that is no function: the batch is saved."""
        reward = CallableReward(lambda responses, rows: torch.tensor([NAN, *[1.0] * (len(rows) - 1)]))
        refused(make_trainer(reward=reward), "^score: PPO computed nan. No checkpoint was saved; the batch is in ")

    @pytest.mark.parametrize(
        ("rows", "options"),
        [(slice(4), {}), (slice(3, 4), {}), (slice(3, 4), {"whiten_rewards": True})],
        ids=["half", "one", "whitened"],
    )  # fmt: skip
    def test_too_large_for_a_loss(self, make_trainer: Any, rows: slice, options: dict[str, Any]) -> None:
        """1e30 squared is infinity in float32: the value loss says so before a step."""
        refused(
            make_trainer(reward=say(1e30, rows), **options), r"^loss: PPO computed (inf|nan)\. No checkpoint was saved"
        )

    @pytest.mark.parametrize("options", [{}, {"normalize_scores": True}], ids=str)
    def test_huge_and_all_alike(self, make_trainer: Any, options: dict[str, Any]) -> None:
        """The value head's bias starts at 1e30, so that no error is left to be squared; no deviation to divide by either."""
        trainer = make_trainer(reward=say(1e30, slice(None)), kl_coef=0.0, kl_control="fixed", **options)
        trainer.train()
        assert is_finite(trainer) and trainer.ppo.update == 2

    def test_a_clip_makes_5_of_1e30(self, make_trainer: Any, tmp_path: Path) -> None:
        """To the bit what a reward of 5 trains."""
        rows = slice(3, 4)
        large = trained(make_trainer(reward=say(1e30, rows), score_clip=5.0, folder=tmp_path / "large"))
        five = trained(make_trainer(reward=say(5.0, rows), score_clip=5.0, folder=tmp_path / "five"))
        assert same_bits(held(large), held(five))

    def test_a_scale_makes_small_ones_of_1e30(self, make_trainer: Any) -> None:
        """Divided by their own deviation, that of one in eight: s / sqrt(s² (1 − 1/8) / 7) = sqrt(8)."""
        trained(make_trainer(reward=say(1e30, slice(3, 4)), normalize_scores=True))
        found = RunningScale()(torch.tensor([0.0] * 7 + [1e30]))
        assert found.tolist() == pytest.approx([0.0] * 7 + [math.sqrt(8)], rel=1e-5)

    def test_all_alike(self, make_trainer: Any) -> None:
        """Without a KL and with λ = 1 every token has the same return: advantages of 0, no NaN from a variance of 0."""
        options = {"kl_coef": 0.0, "lam": 1.0, "gamma": 1.0, "normalize_scores": True, "whiten_rewards": False}
        rollout = roll_out(make_trainer(reward=say(1.0), **options))
        assert rollout.scores.tolist() == [1.0] * 8
        assert torch.equal(rollout.returns[rollout.responses.response_mask].unique(), torch.tensor([1.0]))
        assert torch.equal(rollout.advantages, torch.zeros_like(rollout.advantages))
        trained(make_trainer(reward=say(1.0), **(options | {"whiten_rewards": True})))

    def test_scores_of_zero_whitened(self, make_trainer: Any) -> None:
        """Nothing to whiten: no rewards at all."""
        trainer = make_trainer(reward=say(0.0), kl_coef=0.0, normalize_scores=True, whiten_rewards=True)
        rollout = roll_out(trainer)
        assert torch.equal(rollout.advantages, torch.zeros_like(rollout.advantages))
        trainer.train()
        assert is_finite(trainer)


class TestGradients:
    @pytest.mark.parametrize(("max_grad_norm", "value"), [(1.0, INF), (0.0, NAN)], ids=["clipped", "not clipped"])
    def test_one_that_is_none_makes_no_step(self, make_trainer: Any, max_grad_norm: float, value: float) -> None:
        trainer = make_trainer(max_grad_norm=max_grad_norm)
        next(iter(adapters.parameters(trainer.model.policy, "policy"))).register_hook(lambda gradient: gradient + value)
        refused(trainer, r"^gradient norm: PPO computed (nan|inf)\. No checkpoint was saved")

    def test_that_overflows(self, make_trainer: Any) -> None:
        """A weight of 1e30 behind a normalisation: the loss is a number, its gradient is none."""
        trainer = make_trainer()
        factor("policy", 1e30, 1)(trainer)
        refused(trainer, r"^gradient norm: PPO computed nan")

    def test_a_learning_rate_without_bounds(self, make_trainer: Any) -> None:
        """Weights of 1e30 after the first update: the second one's rollout has no distribution, and nothing is saved."""
        trainer = make_trainer(learning_rate=1e30)
        with pytest.raises(
            SalsaError, match=r"^(model: the logits are|(log-prob|value|KL|loss|gradient norm): PPO computed) "
        ) as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        assert not (Path(trainer.args.output_dir) / WEIGHTS).exists()
        with pytest.raises(SalsaError, match="learning_rate: must be a finite number, not inf"):
            make_trainer(learning_rate=INF)


class TestWhatWasThereBefore:
    def test_the_checkpoint_before_is_whole_and_training_goes_on_from_it(
        self, make_trainer: Any, tmp_path: Path
    ) -> None:
        """The second update's scores are NaN: its checkpoint is not there, the first's is, and a run that goes on from it with a sound
        reward ends to the bit as one that never saw a NaN."""
        calls: list[int] = []

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            calls.append(len(completion_ids))
            return [NAN if len(calls) == 2 else len(ids) / 4 for ids in completion_ids]

        options = {"save_strategy": "steps", "save_steps": 1, "reward": reward}
        broken = make_trainer(folder=tmp_path / "a", **options)
        with pytest.raises(SalsaError, match="reward function reward: it returned nan for response 1 of 8"):
            broken.train()
        there = sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*"))
        assert there == ["checkpoint-1"]
        assert checkpoints.fault(tmp_path / "a" / "checkpoint-1") is None
        _, saved = adapters.read(tmp_path / "a" / "checkpoint-1")
        assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
        again = make_trainer(folder=tmp_path / "a", **options)
        again.train(resume_from_checkpoint=True)
        unbroken = make_trainer(folder=tmp_path / "b", **options)
        unbroken.train()
        assert again.state.global_step == unbroken.state.global_step == 2
        assert same_bits(held(again), held(unbroken))

    @pytest.mark.parametrize(("full", "value"), [(False, NAN), (True, INF)], ids=["adapter", "full weights"])
    def test_weights_that_are_none_are_never_saved(self, make_trainer: Any, full: bool, value: float) -> None:
        """Over a policy that was saved before, or beside it: one line that names the tensor, and every file as it was."""
        trainer = make_trainer(full=full)
        folder = Path(trainer.args.output_dir)
        trainer.save_model(str(folder / "there"))
        before = {path: sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        named = [name for name, parameter in trainer.model.policy.named_parameters() if parameter.requires_grad]
        dict(trainer.model.policy.named_parameters())[named[-1]].data.view(-1)[-1] = value
        for name in ("there", "new"):
            with pytest.raises(
                SalsaError, match=rf"{name} is not saved: \S+ contains NaN or infinite values"
            ) as caught:
                trainer.save_model(str(folder / name))
            assert "\n" not in str(caught.value)
        assert {path: sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()} == before
        if full:
            with pytest.raises(SalsaError, match="contains NaN or infinite values"):
                save_checkpoint(trainer.model.policy, folder / "new", trainer.processing_class)

    def test_a_rate_that_float32_cannot_hold_saves_nothing(self, make_trainer: Any) -> None:
        """1e39 is infinity in float32: the only update's step ruins the weights, and no file has them."""
        trainer = make_trainer(learning_rate=1e39, num_train_epochs=0.5)
        trainer.train()
        assert not is_finite(trainer)
        with pytest.raises(SalsaError, match=r"is not saved: .* contains NaN or infinite values"):
            trainer.save_model()
        assert not (Path(trainer.args.output_dir) / WEIGHTS).exists()


@pytest.mark.parametrize("value", [NAN, INF])
class TestFiles:
    """An adapter's file with one number that is none."""

    @pytest.fixture
    def seeds(self, make_base: Any, make_adapter: Any, tmp_path: Path, value: float) -> list[Path]:
        folders = [tmp_path / "seed-0", tmp_path / "seed-1"]
        for number, folder in enumerate(folders):
            adapters.save(make_adapter(make_base(), "default", number + 1), "default", folder)
        edit_tensors(folders[1], lambda tensors: tensors[max(tensors)].view(-1)[-1:].fill_(value))
        return folders

    def test_a_soups_member(self, seeds: list[Path], tmp_path: Path, value: float) -> None:
        with pytest.raises(SalsaError, match=r"seed-1.*not finite") as caught:
            average.soup(tmp_path / "soup", seeds)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "soup" / WEIGHTS).exists()

    def test_every_entrance_to_the_shared_base(
        self, seeds: list[Path], make_base: Any, make_adapter: Any, tokenizer: Any, value: float
    ) -> None:
        """Named with file and tensor, before it is on the model."""
        line = rf"seed-1/{WEIGHTS}: base_model\S+ contains NaN or infinite values"
        model = make_adapter(make_base(), "policy", 3)
        for enter in (
            lambda: adapters.attach(model, seeds[1], "seed"),
            lambda: as_references(model, [seeds[1]]),
            lambda: as_reward(seeds[1], model, tokenizer),
            lambda: adapters.score_head(seeds[1]),
        ):
            with pytest.raises(SalsaError, match=line):
                enter()
        assert list(model.peft_config) == ["policy"]
        assert list(adapters.attach(model, seeds[0], "seed").peft_config) == ["policy", "seed"]

    def test_a_checkpoint(self, make_trainer: Any, tmp_path: Path, value: float) -> None:
        """One whose manifest says that it is whole."""
        options = {"save_strategy": "steps", "save_steps": 1}
        make_trainer(**options).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        edit_tensors(checkpoint, lambda tensors: tensors[max(tensors)].view(-1)[-1:].fill_(value))
        sign(checkpoint)
        trainer = make_trainer(**options)
        before = held(trainer)
        with pytest.raises(SalsaError, match=rf"checkpoint-1/{WEIGHTS}: base_model\S+ contains NaN or infinite values"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert same_bits(held(trainer), before)


def sign(checkpoint: Path) -> None:
    """The manifest as of the files that are there now."""
    path = checkpoint / checkpoints.MANIFEST
    listed = {name: checkpoint / name for name in json.loads(path.read_text())}
    path.write_text(
        json.dumps({name: {"size": file.stat().st_size, "sha256": sha256(file)} for name, file in listed.items()})
    )


def ends_at_once(trainer: Any) -> None:
    """The policy's EOS far above all other tokens: a component that all embeddings share, and that it alone reads."""
    lm = causal_lm(trainer.model.policy)
    lm.lm_head.weight.data.zero_()
    lm.model.embed_tokens.weight.data[:, 0] = 100.0
    lm.lm_head.weight.data[trainer.processing_class.eos_token_id, 0] = 50.0


class TestEmptyResponses:
    def test_train_to_finite_weights_and_are_said(self, make_trainer: Any, capsys: Any) -> None:
        """EOS alone, with certainty: one token that counts, a KL and an entropy of 0."""
        trainer = make_trainer(kl_control="adaptive", **SCALED)
        ends_at_once(trainer)
        rollout = roll_out(trainer)
        assert rollout.responses.lengths.tolist() == [1] * 8
        assert rollout.kl.abs().max() < 1e-4
        trainer.train()
        assert is_finite(trainer)
        folder = Path(trainer.args.output_dir)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["objective/empty_share"] for row in rows] == [1.0, 1.0]
        assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())
        assert "guards.empty: update 1: 100% of the responses are empty" in capsys.readouterr().err

    def test_a_guard_that_stops_leaves_a_whole_checkpoint(self, make_trainer: Any) -> None:
        trainer = make_trainer(guards={"empty": "stop"})
        ends_at_once(trainer)
        with pytest.raises(SalsaError, match=r"guards.empty: update 1: 100% .*; checkpoint-1 is saved in ") as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
        assert checkpoints.fault(checkpoint) is None
        assert all(bool(tensor.isfinite().all()) for tensor in adapters.read(checkpoint)[1].values())

    def test_min_new_tokens_forbids_them(self, make_trainer: Any) -> None:
        trainer = make_trainer(min_new_tokens=3)
        ends_at_once(trainer)
        rollout = roll_out(trainer)
        assert rollout.responses.lengths.tolist() == [4] * 8
        assert rollout.logprobs.isfinite().all()
        trainer.train()
        assert is_finite(trainer)


class TestSmallBatches:
    def test_one_response_of_one_token(self, make_trainer: Any) -> None:
        """Nothing to take a variance of: whitening takes off the mean alone, so that the advantage is 0 and the return the reward."""
        trainer = make_trainer(batch_size=1, max_new_tokens=1, reward=say(3.0), **SCALED)
        rollout = roll_out(trainer, rows=1)
        assert rollout.responses.response_mask.tolist() == [[True]]
        assert rollout.advantages.tolist() == [[0.0]]
        expected = 3.0 - trainer.ppo.kl_coef * rollout.kl.item()
        assert rollout.returns.item() == pytest.approx(expected, rel=1e-5)
        trained(trainer)

    @pytest.mark.parametrize(
        "options",
        [{"batch_size": 1, "kl_per": "token", "kl_estimator": "full"}, {"num_mini_batches": 8, "max_new_tokens": 1}],
        ids=["one response, KL by token", "minibatches of one token"],
    )  # fmt: skip
    def test_train_to_finite_weights(self, make_trainer: Any, options: dict[str, Any]) -> None:
        trainer = trained(make_trainer(prompts=PROMPTS[:8], **SCALED, **options))
        assert trainer.ppo.update == 8 // options.get("batch_size", 8)

    def test_one_prompt(self, make_trainer: Any) -> None:
        """A batch of it, or a refusal before anything is written."""
        trainer = trained(make_trainer(batch_size=1, prompts=PROMPTS[:1], **SCALED))
        assert (trainer.ppo.update, trainer.state.global_step) == (1, 1)

    @pytest.mark.parametrize("prompts", [0, 7])
    def test_a_batch_larger_than_the_data_is_refused(self, make_trainer: Any, tmp_path: Path, prompts: int) -> None:
        with pytest.raises(SalsaError, match=rf"^train_dataset: {prompts} prompts .* batch_size = 8\. ") as caught:
            make_trainer(prompts=PROMPTS[:prompts])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

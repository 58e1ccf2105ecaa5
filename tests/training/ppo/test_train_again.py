"""train() in a folder that is not empty, train() again, going on with other options or elsewhere: no run is lost, nothing is silent."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS
from transformers import TrainerCallback

from salsa_peft.training import checkpoints
from salsa_peft.training.ppo.metrics import finite
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError

OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "shown_every": None,
}  # 4 updates of a step


@pytest.fixture
def make(make_trainer: Any, tmp_path: Path) -> Callable[..., SalsaPPOTrainer]:
    """A trainer of 4 updates of one step that saves after each, in folder `name` of the test's."""

    def make(name: str = "run", *args: Any, **options: Any) -> SalsaPPOTrainer:
        return make_trainer(*args, folder=tmp_path / name, **(OPTIONS | options))

    return make


def updates(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    """Which updates a log has lines of."""
    return [json.loads(line)["update"] for line in (folder / name).read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """Of the checkpoints, the newest first."""
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints.checkpoints(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(trainer: SalsaPPOTrainer) -> list[torch.Tensor]:
    """What was trained."""
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


class Break(TrainerCallback):
    """Ctrl-C at the beginning of the n-th step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def broken_off(trainer: SalsaPPOTrainer, at: int, **options: Any) -> None:
    """train() that is broken off before its step `at`."""
    stop = Break(at)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(**options)
    trainer.remove_callback(stop)


class TestFolder:
    def test_of_another_run_is_refused_and_left_as_it_is(self, make: Any, tmp_path: Path) -> None:
        """In one line that offers to go on; which still works, to the same end. Also where the other is to go on there."""
        broken_off(make(max_steps=2), 2)
        before = contents(tmp_path / "run")
        with pytest.raises(SalsaError, match=r"output_dir: .*/run already has checkpoint-1 of an earlier run"):
            make().train()
        make("other", max_steps=2).train()
        with pytest.raises(SalsaError, match="or choose another output_dir for a new run"):
            make().train(resume_from_checkpoint=tmp_path / "other" / "checkpoint-2")
        assert contents(tmp_path / "run") == before
        make(max_steps=2).train(resume_from_checkpoint=True)
        assert updates(tmp_path / "run") == [1, 2]
        assert contents(tmp_path / "run")["metrics.jsonl"] == contents(tmp_path / "other")["metrics.jsonl"]

    def test_logs_of_a_run_without_checkpoints_are_kept(
        self, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Under a number, each time another; an evaluation before training is the new run's own."""
        for time in range(3):
            trainer = make(save_strategy="no", max_steps=1 + time, eval_dataset=PROMPTS[:3])
            trainer.evaluate()
            trainer.train()
            assert updates(tmp_path / "run") == list(range(1, 2 + time))
            assert updates(tmp_path / "run", "eval_completions.jsonl") == [0, 0, 0]
        assert updates(tmp_path / "run", "metrics.1.jsonl") == [1]
        assert updates(tmp_path / "run", "metrics.2.jsonl") == [1, 2]
        assert updates(tmp_path / "run", "eval_completions.2.jsonl") == [0, 0, 0]
        assert "run: the logs of an earlier run are kept as metrics.2.jsonl" in capsys.readouterr().err

    def test_going_on_in_another(self, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With the logs so far; where they are lost that is said, and the run goes on."""
        whole = make()
        whole.train()
        moved = make("moved")
        moved.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert (tmp_path / "moved" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(moved), strict=True))
        assert steps(tmp_path / "moved") == [4, 3] and steps(tmp_path / "run") == [4, 3, 2, 1]
        (tmp_path / "run" / "metrics.jsonl").unlink()
        make("third").train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")
        assert updates(tmp_path / "third") == [4]
        assert (
            "metrics.jsonl: lines from before the checkpoint are missing: the file has 0 bytes, but had"
            in capsys.readouterr().err
        )

    def test_going_on_from_an_earlier_checkpoint_keeps_the_later_lines(
        self, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And the later checkpoints, until the run comes to their steps; broken off before it saved, they still lead on."""
        make().train()
        broken_off(make(), 1, resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
        assert updates(tmp_path / "run") == [1] and updates(tmp_path / "run", "metrics.1.jsonl") == [1, 2, 3, 4]
        assert "a copy of the logs is kept as metrics.1.jsonl" in capsys.readouterr().err
        broken_off(make(), 2, resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
        assert steps(tmp_path / "run") == [2, 4, 3, 1]
        again = make()
        again.train(resume_from_checkpoint=True)
        assert steps(tmp_path / "run") == [4, 3, 2, 1] and updates(tmp_path / "run") == [1, 2, 3, 4]

    def test_a_renamed_checkpoint_and_a_finished_run(self, make: Any, tmp_path: Path) -> None:
        """Give what a script then reads: `result.metrics`."""
        make().train()
        shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "best")
        trainer = make()
        result = trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "best"))
        assert result.global_step == 4 and trainer.ppo.update == 4
        trainer = make()
        result = trainer.train(resume_from_checkpoint=True)
        trainer.log_metrics("train", result.metrics)
        assert result.global_step == 4 and result.metrics["train_loss"] == 0 and result.metrics["epoch"] == 2


class TestSameTrainer:
    def test_a_second_training_goes_on_and_can_be_resumed(self, make: Any, tmp_path: Path) -> None:
        """Its own checkpoints are kept, its own are taken."""
        trainer = make(save_total_limit=1)
        trainer.train()
        broken_off(trainer, 3)
        assert steps(tmp_path / "run") == [2] and updates(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
        again = make(save_total_limit=1)
        assert again.train(resume_from_checkpoint=True).global_step == 4
        assert (
            again.ppo.update == 8 and updates(tmp_path / "run") == list(range(1, 9)) and steps(tmp_path / "run") == [4]
        )

    def test_broken_off_between_micro_batches(self, make: Any, tmp_path: Path) -> None:
        """Resumed, to the bit; or begun anew: the update that was cut has no number."""
        options: dict[str, Any] = {"micro_batch_size": 2, "num_ppo_epochs": 2, "num_train_epochs": 1}
        whole = make("whole", **options)
        whole.train()
        for name, at in (("resumed", 10), ("anew", 2)):  # 4 micro-steps make a step, 2 steps an update
            trainer = make(name, **options)
            ordinary, left = trainer.micro_batch_loss, [at]

            def breaking(*args: Any, ordinary: Any = ordinary, left: list[int] = left) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return ordinary(*args)

            trainer.micro_batch_loss = breaking
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert trainer.ppo.micro_step != 0
            trainer.train(resume_from_checkpoint=name == "resumed")
            assert updates(tmp_path / name) == [1, 2]
            assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(trainer), strict=True))

    def test_a_guard_that_stopped_it_is_asked_anew(self, make: Any) -> None:
        """Its word of the run before doesn't count."""
        trainer = make(guards={"kl": {"action": "stop", "limit": 1e-6}})
        with pytest.raises(SalsaError, match=r"guards.kl: update 1: .*; checkpoint-1 is saved in"):
            trainer.train()
        trainer.guards.settings["kl"] = trainer.guards.settings["kl"]._replace(action="off")
        trainer.train(resume_from_checkpoint=True)
        assert trainer.ppo.update == 4


class TestOptions:
    @pytest.mark.parametrize(
        ("now", "line"),
        [
            (
                {"kl_estimator": "k3"},
                "kl_estimator was k1 and is k3 now, so this run cannot be resumed. Start a new run",
            ),
            ({"gamma": 0.5}, r"gamma was 1.0 and is 0.5 now"),
            ({"references": ["seed-0"]}, r"references was \['\w{12}'\] and is \['\w{12}'\] now"),
            ({"references": ["base"]}, r"references was \['\w{12}'\] and is \['base'\] now"),
            ({"prompts": PROMPTS[::-1]}, r"prompts was 16 \(\w{12}\) and is 16 \(\w{12}\) now"),
            ({"adapter": {"lora_alpha": 64}}, "lora_alpha was 8 and is 64 now"),
            ({"base": {"seed": 1}}, r"base was \w{12} and is \w{12} now"),
            ({"optim": "sgd"}, "optim was adamw_torch_fused and is sgd now"),
            ({"value_head_learning_rate": 1e-2}, "own value_head_learning_rate was False and is True now"),
        ],
    )
    def test_what_may_not_change_is_named(self, ended: Path, make_trainer: Any, now: dict[str, Any], line: str) -> None:
        before = contents(ended)
        trainer = make_trainer(folder=ended, **(OPTIONS | {"max_steps": 2} | now))
        with pytest.raises(SalsaError, match=line):
            trainer.train(resume_from_checkpoint=True)
        assert contents(ended) == before

    @pytest.fixture(scope="class")
    def ended(self, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run of one update."""
        import tiny

        folder = tmp_path_factory.mktemp("ended") / "run"
        tiny.make_trainer(tokenizer, folder, **(OPTIONS | {"max_steps": 1})).train()
        return folder

    def test_what_may_change_holds_and_is_said(
        self, make: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """β, and the learning rates where they stand in their schedules: (4 − step) / 4 of the new ones."""
        broken_off(make(value_head_learning_rate=1e-2), 2)
        assert capsys.readouterr().err == ""
        trainer = make(
            learning_rate=2e-3, value_head_learning_rate=4e-2, kl_coef=0.9, kl_control="adaptive", micro_batch_size=2
        )
        trainer.train(resume_from_checkpoint=True)
        said = capsys.readouterr().err
        assert (
            "checkpoint-1: resuming with changed options: learning_rate 0.001 → 0.002, value_head_learning_rate 0.01 → 0.04"
            in said
        )
        assert "kl_coef 0.1 → 0.9" in said and said.count("→") == 3
        rows = [row for row in trainer.state.log_history if "objective/kl" in row][1:]
        assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4, 0])
        assert rows[0]["objective/kl_coef"] == 0.9
        broken_off(make("b", value_head_learning_rate=1e-2), 2)
        trainer = make("b", value_head_learning_rate=4e-2)
        broken_off(trainer, 1, resume_from_checkpoint=True)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([7.5e-4, 7.5e-4, 3e-2])

    def test_a_config_serves_more_than_one_trainer(self, make: Any) -> None:
        """What a trainer works out stays its own."""
        first = make("a")
        args = dataclasses.replace(first.args, max_steps=-1)
        for prompts, expected in ((PROMPTS, 4), (PROMPTS * 2, 8)):
            trainer = SalsaPPOTrainer(
                first.model.policy, args=args, train_dataset=prompts, references=["soup"], reward_funcs=first.reward, processing_class=first.processing_class
            )  # fmt: skip
            assert trainer.args.max_steps == expected
        assert args.max_steps == -1

    def test_the_token_is_in_no_file(self, make: Any, tmp_path: Path) -> None:
        """Pushing: test_push.py."""
        trainer = make(hub_token="hf_secret_of_this_test", max_steps=1)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card()
        found = contents(tmp_path)
        assert "run/checkpoint-1/adapter_model.safetensors" in found
        assert not [
            name for name, content in found.items() if b"hf_secret" in content or name.endswith("training_args.bin")
        ]


class StopAt(TrainerCallback):
    """Asks for an end at an event of a step, in a way."""

    def __init__(self, event: str, step: int, wish: str) -> None:
        def ask(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                setattr(control, wish, True)

        setattr(self, event, ask)


class TestStops:
    @pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end", "on_save"])
    def test_a_callback_is_heard_at_the_updates_end(self, make: Any, tmp_path: Path, event: str) -> None:
        """Every update that was begun is in the log, with all its steps."""
        trainer = make(num_ppo_epochs=2, num_mini_batches=2, micro_batch_size=2)
        trainer.add_callback(StopAt(event, 5, "should_training_stop"))
        trainer.train()
        assert (trainer.state.global_step, trainer.ppo.update) == (8, 2) and updates(tmp_path / "run") == [1, 2]

    def test_an_epoch_ends_with_an_update(self, make: Any, tmp_path: Path) -> None:
        """Of 2 epochs of 2 updates the first ends after its first; the next update begins with prompts of its own."""
        trainer = make(num_ppo_epochs=2, num_mini_batches=2)
        trainer.add_callback(StopAt("on_step_end", 2, "should_epoch_stop"))
        trainer.train()
        assert trainer.state.global_step == 12 and updates(tmp_path / "run") == [1, 2, 3]

    @pytest.mark.parametrize(("limit", "left"), [(1, [4, 2]), (2, [4, 2]), (3, [4, 3, 2])])
    def test_the_best_checkpoint_is_kept_and_found(
        self, make: Any, tmp_path: Path, limit: int, left: list[int]
    ) -> None:
        """Beside the newest, which goes on; by its own path, not the one it was made under."""
        scores = iter([0.0, 5.0, 1.0, 2.0])
        trainer = make(
            eval_dataset=PROMPTS[:3], eval_strategy="steps", eval_steps=1, metric_for_best_model="score", greater_is_better=True,
            save_total_limit=limit,
        )  # fmt: skip
        trainer.evaluate = scored(trainer, scores)  # type: ignore[method-assign]
        trainer.train()
        assert steps(tmp_path / "run") == left
        best = str(tmp_path / "run" / "checkpoint-2")
        assert trainer.state.best_model_checkpoint == best
        for step in left:
            state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
            assert state["best_model_checkpoint"] == best
            assert checkpoints.fault(tmp_path / "run" / f"checkpoint-{step}") is None

    def test_only_the_best_are_saved(self, make: Any, tmp_path: Path) -> None:
        """save_strategy best, with a limit."""
        trainer = make(
            eval_dataset=PROMPTS[:3], eval_strategy="steps", eval_steps=1, metric_for_best_model="score", greater_is_better=True,
            save_strategy="best", save_total_limit=1,
        )  # fmt: skip
        trainer.evaluate = scored(trainer, iter([0.0, 5.0, 1.0, 2.0]))  # type: ignore[method-assign]
        trainer.train()
        assert steps(tmp_path / "run") == [2]
        assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")

    @pytest.mark.parametrize("training", [False, True])
    def test_an_evaluation_leaves_the_mode_it_found(self, make: Any, training: bool) -> None:
        """Also where the reward raises."""

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            if fails:
                raise ValueError("no score")
            return [1.0] * len(completion_ids)

        trainer = make(reward=reward, eval_dataset=PROMPTS[:3])
        trainer.model.train(training)
        fails = False
        trainer.evaluate()
        assert trainer.model.training is training
        fails = True
        with pytest.raises(ValueError, match="no score"):
            trainer.evaluate()
        assert trainer.model.training is training


def scored(trainer: SalsaPPOTrainer, scores: Any) -> Callable[..., dict[str, float]]:
    """An evaluate() that gives these scores."""

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        found = {"eval_score": next(scores)}
        trainer.log(dict(found))
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, found)
        return found

    return evaluate


def test_logs_are_json() -> None:
    """Which has no NaN: null."""
    row = {"a": float("nan"), "b": -float("inf"), "c": 1.5, "d": "nan", "e": 2}
    assert finite(row) == {"a": None, "b": None, "c": 1.5, "d": "nan", "e": 2}


def test_a_number_that_is_none_is_null_in_the_file(make: Any, tmp_path: Path) -> None:
    """As strict readers of JSON want it."""

    def reward(completion_ids: list[list[int]], log_metric: Any, **_: Any) -> list[float]:
        log_metric("odd", float("nan"))
        return [1.0] * len(completion_ids)

    make(reward=reward, max_steps=1).train()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["odd"] is None

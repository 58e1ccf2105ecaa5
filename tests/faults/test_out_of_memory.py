"""Memory that runs out: less at a time, the same global batches, and it is said. A card of few rows is simulated on a CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_stages
import pytest
import torch

from salsa_peft.config.load import load_recipe
from salsa_peft.models.base import causal_lm
from salsa_peft.recipe import processes
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.recipe.estimates.hardware import halve_batches
from salsa_peft.training.ppo.backends import CompiledHF
from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.oom import MicroBatchLimit, is_out_of_memory, largest_proper_divisor

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
OPTIONS: dict[str, Any] = {
    "num_mini_batches": 1,
    "micro_batch_size": 8,
    "learning_rate": 1e-2,
    "num_ppo_epochs": 2,
    "lam": 0.95,
    "vf_coef": 0.1,
}
"""lam and vf_coef are TRL's: with PPO's own, some gradients of the value head are so small that Adam shows their rounding."""


def small_card(trainer: Any, rows: int, when: Callable[[], bool]) -> list[int]:
    """From now on the trainer's base holds so many rows of a forward, as long as `when()` → rows of the forwards that it refused."""
    refused: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        if found > rows and when():
            refused.append(found)
            raise torch.OutOfMemoryError(FULL)

    causal_lm(trainer.model.policy).model.register_forward_pre_hook(hook, with_kwargs=True)
    return refused


def small_for_gradients(trainer: Any, rows: int) -> list[int]:
    """As small_card, for backwards, which end in their middle: what they left in the gradients stays there."""
    refused: list[int] = []
    layer = causal_lm(trainer.model.policy).model.layers[1]

    def hook(module: Any, _: Any, grads: Any) -> None:
        if len(grads[0]) > rows:
            refused.append(len(grads[0]))
            raise torch.OutOfMemoryError(FULL)

    layer.register_full_backward_hook(hook)
    return refused


def trained(trainer: Any) -> dict[str, Any]:
    """Train → the weights, and the rows of metrics.jsonl."""
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {"weights": weights, "metrics": [json.loads(line) for line in lines]}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To rounding: the batches are the same, their pieces are not."""
    for name, weight in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert len(one["metrics"]) == len(other["metrics"]) > 1
    for row, there in zip(one["metrics"], other["metrics"], strict=True):
        assert there == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in row.items()}


class TestEngine:
    @pytest.fixture
    def make(self, make_trainer: Any, tmp_path: Path) -> Callable[..., Any]:
        def make(name: str, **options: Any) -> Any:
            return make_trainer(folder=tmp_path / name, **(OPTIONS | options))

        return make

    @pytest.fixture
    def whole(self, make: Any) -> dict[str, Any]:
        """What a run leaves that had room enough."""
        return trained(make("whole"))

    def test_a_forward_too_large_is_halved_until_it_fits(self, make: Any, whole: Any, capsys: Any) -> None:
        """8 rows, 4, then 2; the run's end is that of one with room enough."""
        trainer = make("small")
        refused = small_card(trainer, 3, torch.is_grad_enabled)
        same(whole, trained(trainer))
        assert (
            refused == [8, 4] and trainer.micro_batch_limit.rows == 2 and trainer.args.per_device_train_batch_size == 8
        )
        said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
        assert said == [
            f"micro_batch_size: out of memory with {rows} rows; continuing with {rows // 2} rows; the batch size stays the same"
            for rows in (8, 4)
        ]

    def test_a_backward_that_was_cut_off_leaves_nothing(self, make: Any, whole: Any) -> None:
        """In the middle of an optimizer step: what earlier micro-steps had added is made again, what the broken one added is not kept."""
        trainer = make("small", micro_batch_size=4)
        refused = small_for_gradients(trainer, 4)
        place = trainer.training_step
        calls: list[int] = []

        def second_micro_step_is_larger(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:  # the card has lost half of what it had
                refused.extend(small_for_gradients(trainer, 2))
            return place(*args, **kwargs)

        trainer.training_step = second_micro_step_is_larger
        same(whole, trained(trainer))
        assert trainer.micro_batch_limit.rows == 2

    def test_a_rollout_too_large_is_halved(self, make: Any, whole: Any, capsys: Any) -> None:
        """Each row has random numbers of its own, so the responses are the same."""
        trainer = make("small")
        refused = small_card(trainer, 4, lambda: not torch.is_grad_enabled())
        same(whole, trained(trainer))
        assert (
            refused == [8] and trainer.rollout_maker.micro_batch_limit.rows == 4 and trainer.micro_batch_limit.rows == 8
        )
        assert "rollout_batch_size: out of memory with 8 rows; continuing with 4" in capsys.readouterr().err

    def test_a_reward_adapter_scores_the_rest_in_halves(
        self, make_trainer: Any, make_base: Any, tmp_path: Path
    ) -> None:
        """The scores are the same."""
        from tiny import make_adapter

        from salsa_peft.models.adapters import lora as adapters
        from salsa_peft.models.adapters.names import SCORE_HEAD
        from salsa_peft.models.rewards.reward import AdapterReward

        source = make_adapter(make_base(), "reward", 7)
        folder = tmp_path / "reward"
        adapters.save(source, "reward", folder, None, {SCORE_HEAD: torch.ones(1, 32)})
        trainer = make_trainer()
        reward = AdapterReward(trainer.model.policy, folder, 8)
        rollout: Rollout = trainer.rollout_maker([trainer.train_dataset[i] for i in range(8)], 1, 0.1, lambda: None)
        before = reward(rollout.responses, [{}] * 8)
        refused = small_card(trainer, 2, lambda: True)
        torch.testing.assert_close(reward(rollout.responses, [{}] * 8), before, rtol=1e-4, atol=1e-5)
        assert refused == [8, 4] and reward.micro_batch.rows == 2

    def test_a_compiled_rollout_gets_a_smaller_cache(self, make: Any, whole: Any) -> None:
        """Its static cache is of as many rows as its largest call yet, which was the one that did not fit."""
        trainer = make("small")
        trainer.rollout_maker.backend = CompiledHF(
            trainer.rollout_maker.backend.model, trainer.args, trainer.processing_class, None
        )
        refused = small_card(trainer, 4, lambda: not torch.is_grad_enabled())
        same(whole, trained(trainer))
        assert refused == [8] and trainer.rollout_maker.backend.rows == 4

    def test_one_row_too_many_is_one_line(self, make: Any, tmp_path: Path) -> None:
        """And no checkpoint of what it was in the middle of."""
        trainer = make("small", save_strategy="steps", save_steps=1)
        small_card(trainer, 0, torch.is_grad_enabled)
        with pytest.raises(
            SalsaError, match="micro_batch_size: out of memory with one row at a time; shorten"
        ) as refusal:
            trainer.train()
        assert "\n" not in str(refusal.value) and not list((tmp_path / "small").glob("checkpoint-*"))

    def test_goes_on_from_a_checkpoint_with_another_micro_batch(self, make: Any, tmp_path: Path) -> None:
        """A run that had to halve is the same run to those that go on from it: by now there may be more room, or less."""
        saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        whole = trained(make("whole", **saving))
        first = make("small", **saving, save_total_limit=None)
        small_card(first, 4, torch.is_grad_enabled)
        first.train()
        assert first.micro_batch_limit.rows == 4
        for step in (6, 8):
            shutil.rmtree(tmp_path / "small" / f"checkpoint-{step}")
        again = make("small", **saving, micro_batch_size=2)
        again.train(resume_from_checkpoint=True)
        lines = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
        weights = {name: p.detach() for name, p in again.model.named_parameters() if p.requires_grad}
        same(whole, {"weights": weights, "metrics": [json.loads(line) for line in lines]})


class TestRoom:
    def test_another_error_is_none_of_its_business(self) -> None:
        """It comes through, at the first time."""
        times: list[int] = []

        def work() -> None:
            times.append(1)
            raise RuntimeError("shape mismatch")

        with pytest.raises(RuntimeError, match="shape mismatch"):
            MicroBatchLimit(8, "rows").run(work)
        assert len(times) == 1

    def test_where_others_wait_the_error_comes_through(self) -> None:
        """They would wait for ever for the pieces that this process makes again."""
        limit = MicroBatchLimit(8, "rows", single_process=False)
        with pytest.raises(torch.OutOfMemoryError):
            limit.run(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(FULL)))
        assert limit.rows == 8

    @pytest.mark.parametrize(
        ("error", "is_memory"),
        [
            (torch.OutOfMemoryError(FULL), True),
            (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
            (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input"), False),
            (MemoryError(), True),
            (ValueError("out of memory"), False),
        ],
    )  # fmt: skip
    def test_what_is_for_want_of_memory(self, error: Exception, is_memory: bool) -> None:
        assert is_out_of_memory(error) == is_memory

    def test_the_cpus_own_words(self) -> None:
        """A CPU's allocator says it otherwise."""
        limit = MicroBatchLimit(6, "rows")

        def work() -> int:
            if limit.rows > 2:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
                )
            return limit.rows

        assert limit.run(work) == 1


class TestStages:
    @pytest.mark.parametrize(
        ("stage", "sets", "changed"),
        [
            ("sft", {"sft.batch_size": 16, "sft.micro_batch_size": 8}, {"sft.micro_batch_size": (8, 4)}),
            ("sft", {"sft.batch_size": 16}, {"sft.micro_batch_size": (16, 8)}),
            ("sft", {"sft.batch_size": 18, "sft.micro_batch_size": 9}, {"sft.micro_batch_size": (9, 3)}),
            ("reward", {"reward.batch_size": 7}, {"reward.micro_batch_size": (7, 1)}),
            ("reward", {"reward.batch_size": 7, "reward.micro_batch_size": 1}, None),
            ("ppo", {"ppo.micro_batch_size": 16}, {"ppo.micro_batch_size": (16, 8), "ppo.rollout_batch_size": (128, 64)}),
            ("ppo", {}, {"ppo.micro_batch_size": (64, 32), "ppo.rollout_batch_size": (128, 64)}),
            ("ppo", {"ppo.micro_batch_size": 1, "ppo.rollout_batch_size": 1}, None),
            ("dpo", {"dpo.batch_size": 4}, {"dpo.micro_batch_size": (4, 2)}),
            ("kto", {"kto.batch_size": 4, "kto.micro_batch_size": 2}, None),
            ("dpo", {"dpo.batch_size": 16, "num_processes": 2}, {"dpo.micro_batch_size": (16, 8)}),  # it has one process
            ("ppo", {"ppo.micro_batch_size": 64, "ppo.rollout_batch_size": 512},
             {"ppo.micro_batch_size": (64, 32), "ppo.rollout_batch_size": (128, 64)}),
            ("landscape", {"generation.batch_size": 12}, {"generation.batch_size": (12, 6)}),
            ("evaluate", {"generation.batch_size": 1}, None),
            ("soup", {}, None),
        ],
    )  # fmt: skip
    def test_what_is_halved(self, stage: str, sets: dict[str, Any], changed: dict[str, Any] | None) -> None:
        """The global batches stay, and everything still divides."""
        found = load_recipe(
            "quickstart", lora="lora", overrides=[f"{key}={value}" for key, value in sets.items()]
        ).recipe
        less = halve_batches(found, stage)
        assert (None if less is None else less.changed) == changed
        if less is not None and stage not in ("landscape", "evaluate"):
            assert getattr(less.recipe, stage).batch_size == getattr(found, stage).batch_size
            getattr(less.recipe, stage).check(stage)

    def test_divisors(self) -> None:
        """Of 1 there is none."""
        assert [largest_proper_divisor(rows) for rows in (1, 2, 3, 6, 9, 16, 128)] == [None, 1, 1, 3, 3, 8, 64]

    def test_a_local_judge_asks_fewer_at_once(self) -> None:
        """An endpoint's memory is its own."""
        judge = {"kind": "local", "model": "some/judge", "concurrency": 8}
        words = f"evaluate.judge={json.dumps(judge)}"
        less = halve_batches(load_recipe("quickstart", lora="lora", overrides=[words]).recipe, "judge")
        assert less is not None and less.changed == {"evaluate.judge.concurrency": (8, 4)}

    @pytest.fixture
    def go(self, tmp_path: Path, capfd: Any, monkeypatch: Any) -> Callable[[int, int], tuple[int, list[str]]]:
        """go(rows that there is room for, batch) → code and lines of a run whose seed-0 needs them."""
        monkeypatch.setattr(processes, "PRELOAD", ["fake_stages"])

        def run(room: int, batch: int) -> tuple[int, list[str]]:
            actions = json.dumps({"sft/seed-0": f"memory-{room}"})
            path = tmp_path / "x.yaml"
            path.write_text(
                f"name: x\ndescription: '{actions}'\ntoy: {{}}\nsft: {{batch_size: {batch}}}\npolicies: {{}}\nlandscape: null\n"
            )
            words = [str(path), "--lora", "--output-dir", str(tmp_path / "run"), "--stages", "toy,data,sft"]
            return salsa_run(words, stages=fake_stages.FAKE), capfd.readouterr().err.splitlines()

        return run

    def test_a_stage_is_made_again_with_less(self, go: Any, tmp_path: Path) -> None:
        """In a process of its own each time; the manifest says what it took, the key is the recipe's: a second run finds it."""
        code, said = go(4, 16)
        again = [line for line in said if "starting again with" in line]
        assert code == 0 and again == [
            "sft/seed-0 … starting again with sft.micro_batch_size 8 (was 16); the global batch stays the same",
            "sft/seed-0 … starting again with sft.micro_batch_size 4 (was 8); the global batch stays the same",
        ]
        (manifest,) = (tmp_path / "run" / "stages" / "sft" / "seed-0").glob("*/manifest.json")
        assert json.loads(manifest.read_text())["halved"] == {"sft.micro_batch_size": 4}
        code, said = go(4, 16)
        assert code == 0 and "sft/seed-0 … cached" in said

    def test_nothing_left_to_halve_ends_with_the_error(self, go: Any) -> None:
        """Code 1, as for any stage that failed."""
        code, said = go(0, 2)
        assert code == 1 and sum("starting again with" in line for line in said) == 1
        assert said[-1].startswith("sft/seed-0 failed: MemoryError")

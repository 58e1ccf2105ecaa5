"""What full weights are held in: steps of 2e-6 and 1e-7 arrive, runs go on to the bit, and no weight is cast again for each token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_ppo import PROMPTS, length_reward, loss_of, roll_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer
from salsa_peft.models import precision
from salsa_peft.utils.errors import SalsaError

torchao = pytest.mark.skipif(not precision.find_spec("torchao"), reason="needs torchao: pip install 'salsa-peft[full]'")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its optimizer's step, for a minute on a CPU: run as it is written instead."""
    with torch.compiler.set_stance("force_eager"):
        yield


def moved(name: str, learning_rate: float, folder: Path, *, weights: torch.dtype | None = None) -> Tensor:
    """What 500 steps of the optimizer of `name` add to 20,480 weights from N(0, 0.02); gradients of constant sign, with noise."""
    args = TrainingArguments(
        str(folder), learning_rate=learning_rate, use_cpu=True, report_to="none", **precision.arguments(name)
    )
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args)
    torch.manual_seed(0)  # stochastic rounding draws from it
    random = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(20_480, generator=random)
    sign = torch.randint(0, 2, start.shape, generator=random) * 2.0 - 1
    weight = torch.nn.Parameter(start.to(weights or precision.PRECISIONS[name].weights))
    before = weight.detach().float().clone()
    taking = optimizer([{"params": [weight], "weight_decay": 0.0}], **options)  # as Trainer groups them
    for _ in range(500):
        noise = 0.5 * torch.randn(start.shape, generator=random)
        weight.grad = (1e-3 * sign * (1 + noise).abs()).to(weight.dtype)
        taking.step()
    return weight.detach().float() - before


@torchao
@pytest.mark.parametrize("learning_rate", [2e-6, 1e-7])
def test_small_steps_arrive(learning_rate: float, tmp_path: Path) -> None:
    """500 updates move bf16 weights as far as float32 ones, within 5%; rounded to nearest, bf16 keeps next to nothing of them."""
    exact = moved("master", learning_rate, tmp_path)
    distance = exact.square().sum()
    assert 300 * learning_rate < exact.abs().mean() < 500 * learning_rate
    assert moved("stochastic", learning_rate, tmp_path) @ exact / distance == pytest.approx(1, abs=0.05)
    nearest = moved("master", learning_rate, tmp_path, weights=torch.bfloat16)
    assert abs(nearest @ exact / distance) < 0.05


@pytest.fixture
def make_full(make_base: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """make_full(name, precision) → a trainer of full weights and a reference of its own, in a folder of the test's."""

    def make(
        name: str, chosen: str = "stochastic", dtype: torch.dtype | None = None, **options: Any
    ) -> SalsaPPOTrainer:
        wide = {"hidden_size": 64, "intermediate_size": 96}  # some layers' moments are in 8 bits then
        dtype = dtype or precision.PRECISIONS[chosen].weights
        settings: dict[str, Any] = {
            "batch_size": 8, "num_mini_batches": 2, "micro_batch_size": 2, "num_ppo_epochs": 1, "num_train_epochs": 2, "kl_coef": 0.1,
            "max_new_tokens": 7, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "steps", "save_steps": 1, **precision.arguments(chosen),
        }  # fmt: skip
        args = SalsaPPOConfig(output_dir=str(tmp_path / name), **(settings | options))
        return SalsaPPOTrainer(
            make_base(**wide).to(dtype), args=args, train_dataset=PROMPTS, references=[make_base(seed=1, **wide).to(dtype)],
            reward_funcs=length_reward, processing_class=tokenizer,
        )  # fmt: skip

    return make


def left(folder: Path, step: int, to: Path) -> None:
    """A copy of a run's folder as it was at a step."""
    shutil.copytree(folder, to)
    for path in to.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@torchao
def test_a_run_in_bf16_goes_on_to_the_bit(make_full: Any, tmp_path: Path) -> None:
    """From the middle of an update, an epoch's end and another; the random state that rounding draws from is in the checkpoint."""
    whole = make_full("whole")
    start = [weight.detach().clone() for weight in whole.model.parameters()]
    whole.train()
    kinds = {type(state["exp_avg"]).__name__ for state in whole.optimizer.state.values()}
    assert kinds == {"Tensor", "OptimState8bit"} and whole.state.global_step == 8
    assert {weight.dtype for weight in whole.model.policy.parameters()} == {torch.bfloat16}
    assert whole.model.value_head.weight.dtype == torch.float32
    assert not any(torch.equal(a, b) for a, b in zip(whole.model.parameters(), start, strict=True))
    for step in (3, 4, 7, 8):
        left(tmp_path / "whole", step, tmp_path / f"from-{step}")
        again = make_full(f"from-{step}")
        again.train(resume_from_checkpoint=True)
        for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, other), step


@torchao
def test_a_run_goes_on_in_its_own_precision_alone(make_full: Any, tmp_path: Path) -> None:
    """Refused in a line; another learning rate is taken up, which torchao's optimizers hold in a tensor."""
    make_full("run", max_steps=2, learning_rate=0.0, value_head_learning_rate=1e-3).train()
    options = {"max_steps": 4, "value_head_learning_rate": 1e-3}
    with pytest.raises(SalsaError, match="optim was adamw_torch_8bit and is adamw_torch_fused now"):
        make_full("run", "master", **options).train(resume_from_checkpoint=True)
    with pytest.raises(SalsaError, match="policy was weights in bfloat16 and is weights now"):
        make_full("run", dtype=torch.float32, **options).train(resume_from_checkpoint=True)
    again = make_full("run", learning_rate=1e-3, **options)
    before = again.model.policy.lm_head.weight.detach().clone()
    again.train(resume_from_checkpoint=True)
    assert not torch.equal(again.model.policy.lm_head.weight, before)


@torchao
def test_bf16_weights_need_an_optimizer_that_rounds_at_random(make_full: Any) -> None:
    """And fp16 ones are refused with any."""
    make_full("a")
    for optim in ({"optim_args": "bf16_stochastic_round=False"}, {"optim_args": None}, {"optim": "adamw_torch"}):
        with pytest.raises(
            SalsaError, match=r"in bfloat16, which rounds small updates away.* optim_args='bf16_stochastic_round=True'"
        ):
            make_full("a", **optim)
    with pytest.raises(SalsaError, match="in float16, which rounds small updates away"):
        make_full("a", dtype=torch.float16)


def test_torchao_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the recipe's stage begins to work out its arguments."""
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    assert precision.arguments("master") == {}, "an optimizer, where any AdamW will do"
    with pytest.raises(SalsaError, match=r"stochastic needs torchao.*pip install 'salsa-peft\[full\]'"):
        precision.arguments("stochastic")


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_the_first_ratio_is_1_under_autocast(make_trainer: Any, full: bool) -> None:
    """Float32 weights, bf16 arithmetic: the update's head is the rollout's too. (Outside of autocast approxkl was 2e-5.)"""
    trainer = make_trainer(full=full, bf16=True)
    trainer.accelerator.prepare(trainer.model)
    rollout = roll_out(trainer)
    loss = loss_of(trainer, rollout, torch.arange(8), int(rollout.responses.lengths.sum()))
    assert loss.ratio.item() == pytest.approx(1, abs=1e-6) and loss.approxkl.item() < 1e-9


class Casts(TorchDispatchMode):
    """Counts the copies to bf16 of each of some tensors."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_generation_casts_float32_weights_once(make_trainer: Any) -> None:
    """Not once for each of the tokens. (On a CPU, 67M weights: 26 ms a token, 32 without; bf16 weights 25.)"""
    trainer = make_trainer(full=True, bf16=True, min_new_tokens=7)
    lm = trainer.model.policy
    linear = [module.weight for module in lm.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad(), Casts(linear) as casts:
        responses, _ = trainer.rollout_maker._sample([trainer.train_dataset[i] for i in range(8)], 1, lambda: None)
    assert responses.lengths.min() == 7 and set(casts.counts.values()) == {1}

"""References that move towards the policy: the mean of deltas, what a rank can't hold, resume, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salsa_peft.config.load import load_recipe
from salsa_peft.config.references import parse_reference
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm
from salsa_peft.recipe import units
from salsa_peft.training import reference_sync
from salsa_peft.training.references import FrozenReference, attach_reference
from salsa_peft.training.trl_reference import use_reference
from salsa_peft.utils import fingerprints as runs
from salsa_peft.utils.errors import SalsaError


def deltas(model: Any, name: str) -> dict[int, Tensor]:
    """scaling · B · A of every layer."""
    return {
        place: layer.scaling[name]
        * layer.lora_B[name].weight.detach().double()
        @ layer.lora_A[name].weight.detach().double()
        for place, layer in enumerate(adapters.tuner_layers(model))
    }


@pytest.fixture
def policy(tmp_path: Path, make_base: Any, make_adapter: Any) -> Any:
    """A policy on a base, and a moving soup of two seeds of other ranks."""
    for number, rank in ((0, 4), (1, 2)):
        made = make_adapter(make_base(), "default", number + 1, r=rank, lora_alpha=8)
        adapters.save(made, "default", tmp_path / f"seed-{number}")
    model = make_adapter(make_base(), "policy", 3, lora_alpha=6)
    seeds = {name: tmp_path / name for name in ("seed-0", "seed-1")}
    (reference,) = parse_reference(
        "r", {"soup": {"members": [0, 1], "weights": [0.3, 0.7], "sync_every": 2, "mixup_alpha": 0.25}}
    )
    return model, attach_reference(model, reference, seeds, "moving", seeds["seed-0"])


def test_the_first_move_is_exact_and_later_ones_say_what_they_lose(policy: Any) -> None:
    """Against dense deltas; every second update alone."""
    model, frozen = policy
    assert (frozen.sync_every, frozen.mixup_alpha) == (2, 0.25)
    before, towards = deltas(model, "moving"), deltas(model, "policy")
    assert reference_sync.sync(model, "policy", [frozen], 1) is None
    assert all(value.equal(before[place]) for place, value in deltas(model, "moving").items())
    assert reference_sync.sync(model, "policy", [frozen], 2) == pytest.approx(0, abs=1e-6)
    after = deltas(model, "moving")
    for place, value in after.items():
        torch.testing.assert_close(value, 0.75 * before[place] + 0.25 * towards[place], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in adapters.parameters(model, "moving"))
    with torch.no_grad():  # the policy goes on, in directions of its own
        for parameter in adapters.parameters(model, "policy"):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    towards = deltas(model, "policy")
    told = reference_sync.sync(model, "policy", [frozen], 4)
    wanted = {place: 0.75 * after[place] + 0.25 * towards[place] for place in after}
    missing = {place: (wanted[place] - value).norm() ** 2 for place, value in deltas(model, "moving").items()}
    best = {place: (torch.linalg.svdvals(value)[10:] ** 2).sum() for place, value in wanted.items()}
    assert sum(missing.values()) == pytest.approx(float(sum(best.values())), rel=1e-3)
    assert told == pytest.approx(
        float((sum(missing.values()) / sum(value.norm() ** 2 for value in wanted.values())) ** 0.5), rel=1e-3
    )
    assert told > 0.01


def test_an_ema_follows_the_policy_by_its_decay(make_base: Any, make_adapter: Any, tmp_path: Path) -> None:
    """ref ← decay · ref + (1 − decay) · policy after every update: full weights, and an adapter's dense deltas."""
    (ema,) = parse_reference("p", {"ema": {"decay": 0.9}})
    assert (ema.of_policy("salsa").members, ema.sync_every) == (["salsa"], 1)
    model, reference = make_base(), make_base()
    wanted = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    frozen = FrozenReference(ema.label, None, reference, ema.sync_every, ema.mixup_alpha)
    for update in (1, 2, 3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(update))
                wanted[name] = 0.9 * wanted[name] + 0.1 * parameter
        reference_sync.sync(model, None, [frozen], update)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-5)

    adapters.save(make_adapter(make_base(), "default", 1, r=4), "default", tmp_path / "start")
    policy = adapters.attach(make_base(), tmp_path / "start", "policy", trainable=True)
    moving = attach_reference(policy, ema.of_policy("start"), {"start": tmp_path / "start"}, "ema", tmp_path / "start")
    start = deltas(policy, "policy")
    with torch.no_grad():
        for parameter in adapters.parameters(policy, "policy"):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    assert reference_sync.sync(policy, "policy", [moving], 1) == pytest.approx(0, abs=1e-6)
    ended = deltas(policy, "policy")
    for place, value in deltas(policy, "ema").items():
        torch.testing.assert_close(value, 0.9 * start[place] + 0.1 * ended[place], rtol=0, atol=1e-5)


def test_full_weights_move_in_place(make_base: Any) -> None:
    """θ_ref ← (1 − α) θ_ref + α θ_policy."""
    model, reference = make_base(), make_base(1)
    before = {name: parameter.clone() for name, parameter in reference.named_parameters()}
    reference_sync.sync(model, None, [FrozenReference("soup", None, reference, 1, 0.25)], 5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * model.get_parameter(name))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_ppo_moves_it_and_a_resumed_run_is_the_same(
    make_trainer: Any, make_base: Any, tmp_path: Path, full: bool
) -> None:
    """The reference's weights are in the checkpoint: the rest of the run is as if it had not been broken off."""

    def made(name: str, steps: int) -> Any:
        one = (
            FrozenReference("soup", None, make_base(1).requires_grad_(False), 1, 0.5)
            if full
            else FrozenReference("soup", "soup", None, 1, 0.5)
        )
        return make_trainer(
            [one],
            full=full,
            folder=tmp_path / name,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="constant",
        )

    def weights(trainer: Any) -> list[Tensor]:
        (one,) = trainer.references
        return [
            weight.detach().clone()
            for weight in (one.model.parameters() if full else adapters.parameters(trainer.model.policy, "soup"))
        ]

    whole = made("whole", 4)
    start = weights(whole)
    whole.train()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["reference/error"] >= 0 for row in rows)
    assert any(not a.equal(b) for a, b in zip(start, weights(whole), strict=True))
    part = made("part", 2)
    part.train()
    again = made("part", 4)
    again.train(resume_from_checkpoint=True)
    for a, b in zip(weights(whole), weights(again), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [
        json.loads(line)["objective/kl"] for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()
    ] == [row["objective/kl"] for row in rows]
    other = make_trainer(["soup"] if not full else [make_base(1)], full=full, folder=tmp_path / "part", max_steps=5, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")  # fmt: skip
    with pytest.raises(SalsaError, match="its synced references are not those of this run"):
        other.train(resume_from_checkpoint=True)


def test_in_trl_an_adapter_moves_and_a_model_is_left_to_trl(
    tokenizer: Any, tmp_path: Path, make_base: Any, make_adapter: Any
) -> None:
    """Every optimizer step; only once, however often it is asked for."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rows = [{"prompt": words[i], "chosen": f" {words[i + 1]}", "rejected": f" {words[i + 2]}"} for i in range(8)]
    model = make_adapter(make_adapter(make_base(), "default", 1), "soup", 2)
    model.set_adapter("default")
    args = DPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    one = FrozenReference("soup", "soup", None, 1, 0.5)
    use_reference(trainer, one)
    use_reference(trainer, one)
    before = deltas(model, "soup")
    trainer.train()
    towards = deltas(model, "default")
    mixed = {place: 0.5 * before[place] + 0.5 * towards[place] for place in before}
    gone = sum((mixed[place] - value).norm() ** 2 for place, value in deltas(model, "soup").items())
    best = sum((torch.linalg.svdvals(value)[4:] ** 2).sum() for value in mixed.values())
    assert float(gone) == pytest.approx(float(best), rel=1e-3), "moved once, as far as its rank allows"
    with pytest.raises(SalsaError, match="use TRL's sync_ref_model for full weights"):
        use_reference(trainer, FrozenReference("soup", None, make_base(1), 1, 0.5))
    assert causal_lm(trainer.model) is causal_lm(model)


def test_a_recipe_says_how_a_soup_moves() -> None:
    """The recipe's own soup, or one of its own; a soup that stays has the key that it had."""
    (one,) = parse_reference("p", {"soup": {"sync_every": 10, "mixup_alpha": 0.2}})
    assert (one.soup, one.sync_every, one.mixup_alpha) == (True, 10, 0.2) and "moving (every 10, α 0.2)" in one.label
    (own,) = parse_reference("p", {"soup": {"members": [0, 2], "sync_every": 5}})
    assert (own.members, own.weights, own.sync_every, own.mixup_alpha) == (["seed-0", "seed-2"], [0.5, 0.5], 5, 0.1)

    def sliced(reference: str) -> str:
        recipe = load_recipe(
            "quickstart", lora="lora", overrides=[f"policies={{a: {{reference: {reference}}}}}"]
        ).recipe
        return runs.canonical_json(units.POLICY_UNITS["ppo"](recipe, "")[0].key_fields["references"])

    assert sliced("soup") == '[{"label":null,"members":[],"path":null,"soup":true,"weights":[]}]'
    assert "sync_every" in sliced("{soup: {sync_every: 3}}")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"soup": {"sync_every": 0}}, "p.soup.sync_every: must be a whole number of updates of at least 1, not 0"),
        (
            {"soup": {"mixup_alpha": 0.5}},
            "p.soup.sync_every: must be a whole number of updates of at least 1, not None",
        ),
        (
            {"soup": {"sync_every": 2, "mixup_alpha": 1.5}},
            "p.soup.mixup_alpha: must be a number above 0 and at most 1, not 1.5",
        ),
        (
            {"soup": {"sync_every": 2, "mixup_alpha": 0}},
            "p.soup.mixup_alpha: must be a number above 0 and at most 1, not 0",
        ),
        ({"shrunk": {"seed": 0, "scale": 0.5, "sync_every": 2}}, "must have the form {seed: N, scale: λ}"),
    ],
)
def test_bad_numbers_are_refused(reference: Any, message: str) -> None:
    """With the recipe."""
    with pytest.raises(SalsaError) as error:
        parse_reference("p", reference)
    assert message in str(error.value)


def test_what_can_not_move_is_refused(make_trainer: Any, make_base: Any, make_adapter: Any) -> None:
    """Before training: the base is every role's, embeddings have no rule, a policy's own modules no place; TRL's full weights have TRL's own."""
    for options, message in (
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "sync needs LoRA without bias on linear layers or experts, not on a Embedding",
        ),
        ({"target_modules": ["q_proj"]}, "the policy adapts a module that the reference does not adapt"),
    ):
        model = make_adapter(make_adapter(make_base(), "policy", 1), "soup", 2, **options)
        with pytest.raises(SalsaError, match=message):
            reference_sync.check([FrozenReference("soup", "soup", None, 1, 0.5)], model, "policy")
    with pytest.raises(SalsaError, match="the base cannot be synced"):
        make_trainer([FrozenReference("base", None, None, 2, 0.5)])
    policies = "policies={a: {algorithm: dpo, reference: {soup: {sync_every: 2}}}}"
    with pytest.raises(SalsaError, match="with full weights, sync_every works with algorithm ppo only, not dpo"):
        load_recipe("quickstart", lora=None, overrides=[policies])
    load_recipe("quickstart", lora="lora", overrides=[policies])

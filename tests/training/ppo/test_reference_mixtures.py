"""Several references: their means against dense plain PyTorch, their weights by hand, through a run, and refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_ppo import Keeping, plain_logprobs, roll_out
from torch import Tensor

from salsa_peft.config.load import load_recipe
from salsa_peft.models import logprobs
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.base import causal_lm
from salsa_peft.training.ppo.losses import KL_ESTIMATORS
from salsa_peft.training.ppo.mixture import kl as mixture
from salsa_peft.training.ppo.mixture.weights import bounded, metric_names, score_gradient, step
from salsa_peft.training.ppo.rollout import Rollout
from salsa_peft.training.ppo.trainer import SalsaPPOTrainer
from salsa_peft.utils.errors import SalsaError

REFERENCES = ["seed-0", "soup", "base"]
WEIGHTS = [0.6, 0.3, 0.1]
ESTIMATORS = (*KL_ESTIMATORS, "full")


def distributions(trainer: SalsaPPOTrainer, which: Any, rollout: Rollout) -> list[Tensor]:
    """Log-probs (t, V) at each response's tokens, from one sequence's full logits at a time, in double precision."""
    args, r, policy = trainer.args, rollout.responses, trainer.model.policy
    own = isinstance(which, torch.nn.Module)
    found = []
    with torch.no_grad(), contextlib.nullcontext() if own else adapters.active(policy, which):
        for row in range(len(r.finished)):
            prompt, response = r.prompt_ids[row][r.prompt_mask[row]], r.response_ids[row][r.response_mask[row]]
            lm = which if own else causal_lm(policy)
            logits = lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].double() / args.temperature
            logits[: args.min_new_tokens, trainer.processing_class.eos_token_id] = -torch.inf
            found.append(logits.log_softmax(-1))
    return found


def dense_kl(mean: str, estimator: str, weights: list[float], policy: Tensor, references: Tensor, tokens: Tensor) -> Tensor:  # fmt: skip
    """The KL (t,) of one response. policy: log-probs (t, V). references: (K, t, V). tokens: (t,)."""
    w = torch.tensor(weights, dtype=torch.double)[:, None, None]

    def kl(reference: Tensor) -> Tensor:
        if estimator == "full":
            return torch.where(policy.isinf(), 0.0, policy.exp() * (policy - reference)).sum(-1)
        chosen = [table.gather(-1, tokens[:, None])[:, 0] for table in (policy, reference)]
        return KL_ESTIMATORS[estimator](*chosen)

    if mean == "kl":
        return (w[..., 0] * torch.stack([kl(reference) for reference in references])).sum(0)
    if mean == "arithmetic":
        return kl((w * references.exp()).sum(0).log())
    mixed = torch.where(w > 0, w * references, 0.0).sum(0).exp()  # forbidden tokens have a log-prob of −∞
    return kl((mixed / mixed.sum(-1, keepdim=True)).log())


def check_all_means(trainer: SalsaPPOTrainer, names: list[Any]) -> None:
    """Every mean with every estimator, of the same sampled responses, which have different lengths."""
    weights, policy = trainer.rollout_maker.weights.at(1), "policy" if trainer.policy_name else trainer.model.policy
    sampled = roll_out(trainer)
    r = sampled.responses
    assert len(set(r.lengths.tolist())) > 1 and len(set(r.prompt_mask.sum(-1).tolist())) > 1
    tables = [distributions(trainer, name, sampled) for name in (policy, *names)]
    for mean in ("kl", *mixture.MEANS):
        for estimator in ESTIMATORS:
            trainer.args.reference_mean, trainer.args.kl_estimator = mean, estimator  # type: ignore[assignment]
            found = roll_out(trainer)
            assert torch.equal(found.responses.response_ids, r.response_ids)
            assert not found.kl[~r.response_mask].any()
            for row in range(len(r.finished)):
                own, *others = (table[row] for table in tables)
                tokens = r.response_ids[row][r.response_mask[row]]
                expected = dense_kl(mean, estimator, weights, own, torch.stack(others), tokens)
                torch.testing.assert_close(
                    found.kl[row][r.response_mask[row]].double(), expected, rtol=1e-5, atol=1e-5,
                    msg=lambda text, case=(mean, estimator): f"{case}: {text}",
                )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "min_new_tokens": 3}, {"reference_weights_step": 0.5}], ids=str
)
def test_every_mean_with_every_estimator(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Adapters and the base on one base, in chunks of 5 tokens, in which responses begin and end."""
    monkeypatch.setattr(logprobs, "CHUNK", 5)
    monkeypatch.setattr(mixture, "CHUNK", 5)
    trainer = make_trainer(REFERENCES, reference_weights=WEIGHTS, micro_batch_size=2, **options)
    check_all_means(trainer, ["seed-0", "soup", None])


def test_references_with_full_weights(make_trainer: Any, make_base: Any) -> None:
    """Separate models with heads of their own, one of them of weight 0."""
    references = [make_base(seed) for seed in (1, 2, 3)]
    trainer = make_trainer(references, full=True, reference_weights=[0.5, 0.5, 0.0], min_new_tokens=2)
    check_all_means(trainer, references)


def test_an_offloaded_model_is_not_read_after_it_has_scored(make_trainer: Any, make_base: Any) -> None:
    """Its weights are NaN whenever it is not its turn; what the mean needs later has been kept."""
    references = [make_base(seed) for seed in (1, 2)]
    trainer = make_trainer(references, full=True, reference_mean="geometric")
    expected = roll_out(trainer).kl

    def on(model: torch.nn.Module) -> Any:
        here = [parameter.data for parameter in model.parameters()]

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            for parameter, data in zip(model.parameters(), here, strict=True):
                parameter.data = data.clone()
            yield
            for parameter in model.parameters():
                parameter.data = torch.full_like(parameter.data, torch.nan)

        return context

    trainer.rollout_maker.device_contexts = [on(model) for model in references]
    assert torch.equal(roll_out(trainer).kl, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_weights_are_the_plain_average(make_trainer: Any, estimator: str) -> None:
    """The same bits as the sum of the KLs over their number, with and without the weights written out."""
    kls = []
    for weights in (None, [1 / 3] * 3):
        trainer = make_trainer(REFERENCES, reference_weights=weights, kl_estimator=estimator)
        kls.append(roll_out(trainer).kl)
    singles = [roll_out(make_trainer([name], kl_estimator=estimator)).kl for name in REFERENCES]
    average = (torch.zeros_like(kls[0]) + singles[0] + singles[1] + singles[2]) / 3
    assert torch.equal(kls[0], average) and torch.equal(kls[1], average)


def test_a_mean_of_one_reference_with_itself_is_that_reference(make_trainer: Any) -> None:
    single = roll_out(make_trainer(["soup"])).kl
    for mean in ("kl", *mixture.MEANS):
        found = roll_out(make_trainer(["soup", "soup"], reference_mean=mean, reference_weights=[0.2, 0.8])).kl
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


def test_the_geometric_mean_is_log_z_below_the_mean_of_kls(make_trainer: Any) -> None:
    """KL(π ‖ r) = Σ w_i KL(π ‖ r_i) + log Z with log Z < 0 where the references differ, for k1 as for the exact KL."""
    for estimator in ("k1", "full"):
        found = {}
        for mean in ("kl", "geometric"):
            rollout = roll_out(make_trainer(REFERENCES, reference_mean=mean, kl_estimator=estimator))
            found[mean] = rollout.kl[rollout.responses.response_mask]
        log_z = found["geometric"] - found["kl"]
        assert log_z.max() < 0 and log_z.min() < -0.1
        if estimator == "k1":
            first = log_z
    torch.testing.assert_close(log_z, first, rtol=1e-4, atol=1e-4)  # Z is of the prefix, not of the estimator


class TestWeights:
    def test_the_gradient_by_hand(self) -> None:
        """z = ±1; log r_0 − mean = ±½, log r_1 − mean = ∓½, σ = ½: g = (1, −1), whatever the scores' unit."""
        mask = torch.tensor([[True, True], [True, False]])
        table = torch.tensor([[[-0.5, -0.5], [-2.0, 9]], [[-1.0, -1.0], [-1.0, 7]]])
        for scores in ([3.0, 1.0], [300.0, 100.0]):
            assert score_gradient(torch.tensor(scores), table, mask).tolist() == pytest.approx([1, -1])
        assert score_gradient(torch.tensor([1.0, 3.0]), table, mask).tolist() == pytest.approx([-1, 1])

    def test_nothing_to_learn_from_is_a_gradient_of_zero(self) -> None:
        mask = torch.ones(2, 1, dtype=torch.bool)
        same, other = torch.zeros(2, 2, 1), torch.tensor([[[0.0], [1.0]], [[1.0], [0.0]]])
        assert score_gradient(torch.tensor([1.0, 2.0]), same, mask).tolist() == [0, 0]
        assert score_gradient(torch.tensor([2.0, 2.0]), other, mask).tolist() == [0, 0]

    def test_groups_are_compared_within_each_prompt(self) -> None:
        """Both prompts' better response is likelier under reference 0; between the prompts it is the other way round."""
        table = torch.tensor([[[1.0], [0.0], [11.0], [10.0]], [[0.0], [0.0], [0.0], [0.0]]])
        scores, mask = torch.tensor([101.0, 100.0, 1.0, 0.0]), torch.ones(4, 1, dtype=torch.bool)
        assert score_gradient(scores, table, mask, 2).tolist() == pytest.approx([1, -1])
        assert score_gradient(scores, table, mask)[0] < -0.9

    def test_a_step_by_hand(self) -> None:
        """η = ½ ln 3 and g = (1, −1): √3 : 1/√3 = 3 : 1, from equal weights; from 1 : 3 back to equal ones."""
        size = math.log(3) / 2
        assert step([0.5, 0.5], [1, -1], size, 0) == pytest.approx([0.75, 0.25])
        assert step([0.25, 0.75], [1, -1], size, 0) == pytest.approx([0.5, 0.5])
        assert step([0.5, 0.5], [1, -1], size, 0.3) == pytest.approx([0.7, 0.3])
        assert step([0.5, 0.5], [1, -1], 1e6, 0)[1] > 0  # from 0 no step would lead back

    def test_bounds_by_hand(self) -> None:
        """The others keep their ratio; a weight that falls below the bound by that is raised too."""
        assert bounded([6, 3, 1], 0.0) == pytest.approx([0.6, 0.3, 0.1])
        assert bounded([0.6, 0.3, 0.1], 0.2) == pytest.approx([0.8 * 6 / 9, 0.8 * 3 / 9, 0.2])
        assert bounded([0.7, 0.21, 0.09], 0.2) == pytest.approx([0.6, 0.2, 0.2])

    @given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), st.floats(0, 0.99))
    def test_bounds_hold_for_any_weights(self, weights: list[float], share: float) -> None:
        least = share / len(weights)
        found = bounded(weights, least)
        assert sum(found) == pytest.approx(1) and min(found) >= least
        order = sorted(range(len(weights)), key=weights.__getitem__)
        assert all(found[a] <= found[b] + 1e-12 for a, b in itertools.pairwise(order))

    def test_names(self) -> None:
        assert metric_names(["seed-0", "/some/where/soup/", "soup", "base"]) == ["seed-0", "soup-1", "soup-2", "base"]


def rows_of(trainer: SalsaPPOTrainer) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (Path(str(trainer.args.output_dir)) / "metrics.jsonl").read_text().splitlines()
    ]


def test_learned_weights_of_a_run(make_trainer: Any) -> None:
    """Each update's gradient from plain log-probs, and each row's weights from the row before."""
    trainer = make_trainer(
        ["seed-0", "soup"], reference_mean="geometric", reference_weights_step=0.3, reference_weights_min=0.4, num_train_epochs=2
    )  # fmt: skip
    rollouts: list[Rollout] = []
    trainer.rollout_maker = Keeping(trainer.rollout_maker, rollouts)
    trainer.train()
    weights = [0.5, 0.5]
    assert len(rollouts) == 4
    for row, rollout in zip(rows_of(trainer), rollouts, strict=True):
        assert [row["reference_weight/seed-0"], row["reference_weight/soup"]] == pytest.approx(weights, abs=1e-6)
        z = (rollout.scores - rollout.scores.mean()) / rollout.scores.std(correction=0)
        sums = torch.stack([plain_logprobs(trainer, name, rollout).detach().sum(-1) for name in ("seed-0", "soup")])
        ratio = sums[0] - sums[1]
        g = (z * (ratio - ratio.mean()) / ratio.std(correction=0)).mean().item()  # the correlation of score and ratio
        assert [row["reference_gradient/seed-0"], row["reference_gradient/soup"]] == pytest.approx([g, -g], abs=1e-4)
        powers = [weights[0] * math.exp(0.3 * g), weights[1] * math.exp(-0.3 * g)]
        share = min(max(powers[0] / sum(powers), 0.4), 0.6)
        weights = [share, 1 - share]
    assert trainer.rollout_maker.weights.learned == pytest.approx(weights, abs=1e-6)
    assert weights != [0.5, 0.5]


def test_scheduled_weights_of_a_run(make_trainer: Any) -> None:
    """Linear over the updates: the first has the start, the last the end; the KL is weighted by them."""
    trainer = make_trainer(
        ["seed-0", "soup"], reference_weights=[1.0, 0.0], reference_weights_end=[0.4, 0.6], num_train_epochs=2
    )
    rollouts: list[Rollout] = []
    trainer.rollout_maker = Keeping(trainer.rollout_maker, rollouts)
    trainer.train()
    rows = rows_of(trainer)
    assert [row["reference_weight/soup"] for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6])
    only_soup = rollouts[0].logprobs - plain_logprobs(trainer, "seed-0", rollouts[0])
    torch.testing.assert_close(rollouts[0].kl, only_soup.detach(), rtol=1e-4, atol=1e-4)
    logp = [plain_logprobs(trainer, name, rollouts[3]).detach() for name in ("seed-0", "soup")]
    expected = rollouts[3].logprobs - (0.4 * logp[0] + 0.6 * logp[1])
    torch.testing.assert_close(rollouts[3].kl, expected, rtol=1e-4, atol=1e-4)


def test_weights_by_default_are_not_logged(make_trainer: Any) -> None:
    trainer = make_trainer(["seed-0", "soup"])
    trainer.train()
    assert not any(key.startswith("reference_") for row in rows_of(trainer) for key in row)


def test_no_weight_is_learned_while_only_the_critic_is(make_trainer: Any) -> None:
    trainer = make_trainer(["seed-0", "soup"], reference_weights_step=1.0, value_warmup_updates=1)
    trainer.train()
    assert [row["reference_weight/soup"] for row in rows_of(trainer)] == [0.5, 0.5]
    assert trainer.rollout_maker.weights.learned != [0.5, 0.5]


FOR_TWO = [
    ({"reference_weights": [0.5, 0.25, 0.25]}, "reference_weights: has 3 weights for 2 references; give one weight for each"),
    ({"reference_weights_end": [0.6, 0.3, 0.1]}, "reference_weights_end: has 3 weights for 2 references"),
    ({"reference_weights_step": 1.0, "reference_weights_min": 0.5}, "reference_weights_min: 0.5 must be below 1/2, because"),
]  # fmt: skip
FOR_ONE = [
    ({"reference_mean": "geometric"}, "reference_mean: geometric has no effect with one reference"),
    ({"reference_weights": [1.0]}, r"reference_weights: \[1.0\] has no effect with one reference"),
    ({"reference_weights_end": [0.1, 0.9]}, r"reference_weights_end: \[0.1, 0.9\] has no effect with one reference"),
    ({"reference_weights_step": 0.1}, "reference_weights_step: 0.1 has no effect with one reference"),
]


@pytest.mark.parametrize(("options", "line"), [*FOR_TWO, *FOR_ONE])
def test_options_that_do_not_fit_the_references(
    make_trainer: Any, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    """Refused by the trainer, and by a recipe before any model is loaded, with the policy's name."""
    references = ["seed-0", "soup"] if (options, line) in FOR_TWO else ["soup"]
    with pytest.raises(SalsaError, match=f"^{line}"):
        make_trainer(references, **options)
    recipe = {"name": "x", "toy": {}, "ppo": options, "policies": {"mkl": {"reference": references}}}
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SalsaError, match=rf"policies\.mkl: ppo\.{line}") as error:
        load_recipe(str(tmp_path / "x.yaml"), lora="lora", overrides=[])
    assert "\n" not in str(error.value)

"""Landscape and evaluation: their points, their pairs and their sums, on numbers made by hand and on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from salsa_peft.config.schema import Evaluate, Generation, Landscape, Model, Policy, Recipe
from salsa_peft.data.datasets import prompt_tokens
from salsa_peft.data.questions import Question
from salsa_peft.evaluation import comparisons, evaluate, landscape
from salsa_peft.evaluation.answers import answer
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.generation import generate_batches
from salsa_peft.models.responses import Responses
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.utils.errors import SalsaError


class TestPlane:
    @pytest.mark.parametrize("resolution", [1, 2, 3, 4, 6])
    def test_every_point_has_weights_of_sum_one(self, resolution: int) -> None:
        """One step beyond each edge: (r+5)(r+4)/2 points of the larger triangle, less its three far corners."""
        found = landscape.plane_weights(resolution)
        assert len(found) == len(set(found)) == (resolution + 5) * (resolution + 4) // 2 - 3
        for weights in found:
            assert sum(weights) == pytest.approx(1, abs=1e-12)
            assert min(weights) >= -1 / resolution - 1e-12
        for vertex in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            assert vertex in found

    @pytest.mark.parametrize(("resolution", "middle"), [(3, True), (6, True), (4, False)])
    def test_the_centre_is_a_point_where_three_divides(self, resolution: int, middle: bool) -> None:
        assert (any(max(w) - min(w) < 1e-12 for w in landscape.plane_weights(resolution))) is middle

    def test_both_sides_of_every_edge(self) -> None:
        """The grid is the same under any renaming of the members."""
        found = {tuple(round(w, 9) for w in weights) for weights in landscape.plane_weights(4)}
        assert {(b, c, a) for a, b, c in found} == found == {(b, a, c) for a, b, c in found}
        assert any(min(weights) < 0 for weights in found)


class TestPoints:
    def test_line_and_control(self) -> None:
        """θ = (1 − α) θ_a + α θ_b; the control is the line's first seed alone."""
        found = landscape.points(Landscape(line=[2, 0], alphas=[-0.5, 0.0, 0.25, 1.0], scales=[0.0, 0.6]))
        assert list(found) == ["line", "shrunk"]
        assert found["line"]["points"] == [
            (-0.5, {"seed-2": 1.5, "seed-0": -0.5}),
            (0.0, {"seed-2": 1.0, "seed-0": 0.0}),
            (0.25, {"seed-2": 0.75, "seed-0": 0.25}),
            (1.0, {"seed-2": 0.0, "seed-0": 1.0}),
        ]
        assert found["shrunk"]["points"] == [(0.0, {"seed-2": 0.0}), (0.6, {"seed-2": 0.6})]
        assert (found["line"]["ends"], found["line"]["parameter"]) == (["seed-2", "seed-0"], "alpha")
        assert (found["shrunk"]["ends"], found["shrunk"]["parameter"]) == (["base", "seed-2"], "scale")

    def test_plane(self) -> None:
        found = landscape.points(Landscape(line=None, plane=[2, 0, 1], resolution=3))
        assert list(found) == ["plane"]
        assert found["plane"]["members"] == ["seed-2", "seed-0", "seed-1"]
        weights = [weights for _, weights in found["plane"]["points"]]
        assert [tuple(w[m] for m in ("seed-2", "seed-0", "seed-1")) for w in weights] == landscape.plane_weights(3)

    def test_controls_of_the_same_norm(self) -> None:
        """The seed with the midpoint's norm stands among the control's points, the stretched midpoint on its own line."""
        section = Landscape(line=[2, 0], scales=[0.0, 0.6, 0.8], norm_controls=True)
        figures, norms = landscape.points(section), {("seed-2", 1.0): 4.0, ("seed-2", 0.5): 3.0}
        landscape.add_norm_controls(figures, section, lambda weights: norms[next(iter(weights.items()))])
        assert figures["shrunk"]["points"] == [
            (0.0, {"seed-2": 0.0}),
            (0.6, {"seed-2": 0.6}),
            (0.75, {"seed-2": 0.75}),
            (0.8, {"seed-2": 0.8}),
        ]
        assert figures["shrunk"]["soup_norm"] == 0.75
        assert figures["stretched"]["points"] == [(4 / 3, {"seed-2": 2 / 3, "seed-0": 2 / 3})]
        alone = landscape.points(Landscape(line=[2, 0], scales=[], norm_controls=True))
        landscape.add_norm_controls(alone, section, lambda weights: norms[next(iter(weights.items()))])
        assert alone["shrunk"]["points"] == [(0.75, {"seed-2": 0.75})] and alone["shrunk"]["ends"] == ["base", "seed-2"]
        with pytest.raises(SalsaError, match="the delta of seed-2 or of the midpoint is 0"):
            landscape.add_norm_controls(figures, section, lambda weights: 0.0)
        plane: dict[str, Any] = {}
        landscape.add_norm_controls(plane, Landscape(line=None, norm_controls=True), lambda weights: 1.0)
        assert plane == {}

    def test_what_is_not_asked_for_is_left_out(self) -> None:
        assert landscape.points(Landscape(line=None)) == {}
        assert list(landscape.points(Landscape(scales=[]))) == ["line"]


class TestMeasure:
    def test_shared_points_are_measured_once(self) -> None:
        """α = 0 is the control at 1 and a vertex of the plane; α = 1 another vertex. Each place keeps its own weights."""
        section = Landscape(line=[0, 1], alphas=[0.0, 0.5, 1.0], scales=[0.0, 1.0], plane=[0, 1, 2], resolution=3)
        measured: list[dict[str, float]] = []

        def score(weights: Mapping[str, float]) -> float:
            measured.append({seed: round(w, 6) for seed, w in weights.items() if w})
            return sum(10.0 ** int(seed[5:]) * w for seed, w in weights.items())

        result = landscape.measure_points(landscape.points(section), score, "landscape")
        keys = [tuple(sorted(weights.items())) for weights in measured]
        assert len(keys) == len(set(keys)) == 3 + 1 + 25 - 2
        line, shrunk, plane = *result["lines"], result["plane"]
        assert line["points"] == [
            {"at": 0.0, "weights": [1.0, 0.0], "scores": 1.0},
            {"at": 0.5, "weights": [0.5, 0.5], "scores": 5.5},
            {"at": 1.0, "weights": [0.0, 1.0], "scores": 10.0},
        ]
        assert shrunk["points"] == [
            {"at": 0.0, "weights": [0.0], "scores": 0.0},
            {"at": 1.0, "weights": [1.0], "scores": 1.0},
        ]
        for point in plane["points"]:
            assert point.keys() == {"weights", "scores"}
            assert point["scores"] == pytest.approx(
                sum(10.0**seed * w for seed, w in enumerate(point["weights"])), abs=1e-6
            )
        json.dumps(result, allow_nan=False)

    def test_without_a_plane(self) -> None:
        result = landscape.measure_points(landscape.points(Landscape(scales=[])), lambda weights: {}, "landscape")
        assert (result["plane"], len(result["lines"]), len(result["lines"][0]["points"])) == (None, 1, 9)


def bench_of(tokenizer: Any) -> Any:
    """What mean_scores and answer take of a StageContext."""
    recipe = SimpleNamespace(
        generation=Generation(max_new_tokens=8, batch_size=3), model=Model(max_length=64), evaluate=Evaluate()
    )
    return SimpleNamespace(recipe=recipe, tokenizer=tokenizer)


def token_sum(responses: Responses, rows: Any) -> torch.Tensor:
    """A score that shows which tokens were given."""
    return (responses.response_ids * responses.response_mask).sum(-1).float()


def place_of(responses: Responses, rows: Any) -> torch.Tensor:
    """A score that shows which rows were given: each its own prompt's."""
    for row, ids, mask in zip(rows, responses.prompt_ids, responses.prompt_mask, strict=True):
        assert ids[mask].tolist() == row["ids"]
    return torch.tensor([float(row["place"]) for row in rows])


def asked(rows: list[dict[str, Any]]) -> list[Question]:
    """Questions of one turn, the rows' other columns kept."""
    return [
        Question(number, None, row["prompt"], (row["prompt"][-1]["content"],), None, row)
        for number, row in enumerate(rows)
    ]


def chats(count: int) -> list[dict[str, Any]]:
    """Prompts whose lengths go up and down, so that batches by length change their order."""
    words = ["owl", "saw", "fig", "cod", "oak"]
    return [
        {"prompt": [{"role": "user", "content": "copy " + " ".join(words[: 1 + (3 * i) % 5])}]} for i in range(count)
    ]


class TestOnAModel:
    def test_a_point_of_the_line_is_the_soup_of_those_weights(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        """set_weights and mean_scores give what a saved soup of the same weights gives, prompts and seed being the same."""
        for seed in (0, 1):
            make_adapter(make_base(), "default", seed, r=2 + seed).save_pretrained(tmp_path / f"seed-{seed}")
        stacked = StackedAdapter.load([tmp_path / "seed-0", tmp_path / "seed-1"])
        model = adapters.attach(make_base(), tmp_path / "seed-0", "start")
        stacked.attach(model, "landscape", [0.0, 0.0])
        rows = [{**row, "ids": prompt_tokens(row, tokenizer), "place": at} for at, row in enumerate(chats(4))]
        questions = asked(rows)
        measures, found = {"sum": token_sum, "place": place_of}, {}
        for weights in ([1.0, 0.0], [0.25, 0.75], [0.0, 0.0]):
            stacked.set_weights(model, "landscape", weights)
            found[weights[0]] = landscape.mean_scores(model, "landscape", questions, measures, bench_of(tokenizer), 5)
            stacked.save(tmp_path / "soup", weights)
            plain = adapters.attach(make_base(), tmp_path / "soup", "soup")
            expected = landscape.mean_scores(plain, "soup", questions, measures, bench_of(tokenizer), 5)
            assert found[weights[0]]["sum"] == pytest.approx(expected["sum"])
            assert expected["sum"]["n"] == 4
            assert expected["place"]["mean"] == 1.5
        assert found[0.0] == landscape.mean_scores(model, None, questions, measures, bench_of(tokenizer), 5)
        assert len({round(score["sum"]["mean"], 3) for score in found.values()}) == 3

    def test_answers_stand_in_the_prompts_order(self, make_base: Any, make_adapter: Any, tokenizer: Any) -> None:
        """Each with its own response, length and score, though batches go by length."""
        model = make_adapter(make_adapter(make_base(), "policy", 1), "other", 2)
        rows, context, expected = chats(8), bench_of(tokenizer), {}
        tokens = [prompt_tokens(row, tokenizer) for row in rows]
        for indices, responses in generate_batches(
            make_adapter(make_base(), "other", 2), tokens, context.recipe.generation, tokenizer, 3, 3
        ):
            for place, row in enumerate(indices):
                expected[row] = responses.response_ids[place][responses.response_mask[place]].tolist()
        assert len(set(map(len, tokens))) > 2
        rows = [
            {**row, "ids": ids, "place": number} for number, (row, ids) in enumerate(zip(rows, tokens, strict=True))
        ]
        answers = answer(model, "other", asked(rows), {"sum": token_sum, "place": place_of}, context, 3)
        assert [entry["index"] for entry in answers] == list(range(8))
        for row, entry in enumerate(answers):
            assert entry["prompt"] == rows[row]["prompt"][0]["content"]
            assert entry["scores"] == {"sum": sum(expected[row]), "place": row}
            assert entry["length"] == len(expected[row])
            assert entry["empty"] is (expected[row] == [2])
            assert entry["response"] == tokenizer.decode(expected[row], skip_special_tokens=True)


def answers_of(scores: list[float], lengths: list[int], empty: list[bool] | None = None) -> list[dict[str, Any]]:
    """What evaluate.answer gives, made by hand."""
    empties = empty or [False] * len(scores)
    return [
        {"index": at, "turn": 1, "scores": {"reward": s, "gold": -s}, "length": n, "empty": e}
        for at, (s, n, e) in enumerate(zip(scores, lengths, empties, strict=True))
    ]


class TestEvaluate:
    def test_summarize_by_hand(self) -> None:
        """a against b by reward: 3 > 1, 2 = 2, 0 < 4, 5 > 1: two wins, one loss, one tie; by −reward the other way round."""
        answers = {
            "a": answers_of([3, 2, 0, 5], [2, 4, 6, 8], [True, False, False, False]),
            "b": answers_of([1, 2, 4, 1], [1, 1, 1, 1]),
        }
        found = evaluate.summarize(answers, ["reward", "gold"])
        assert found["n"] == 4
        assert list(found["models"]) == ["a", "b"]
        a, b = found["models"]["a"], found["models"]["b"]
        assert (a["scores"]["reward"]["mean"], a["scores"]["gold"]["mean"], b["scores"]["reward"]["mean"]) == (
            2.5,
            -2.5,
            2.0,
        )
        assert (a["response_length"]["mean"], a["empty_share"], b["response_length"]["low"], b["empty_share"]) == (
            5,
            0.25,
            1,
            0,
        )
        by_reward, by_gold = comparisons.pairs(answers, [("a", "b")], ["reward", "gold"])
        assert (by_reward["a"], by_reward["b"], by_reward["measure"], by_gold["measure"]) == (
            "a",
            "b",
            "reward",
            "gold",
        )
        assert (by_reward["wins"], by_reward["losses"], by_reward["ties"]) == (2, 1, 1)
        assert (by_gold["wins"], by_gold["losses"], by_gold["ties"]) == (1, 2, 1)
        assert (by_reward["win_rate"], by_reward["adjusted_win_rate"], by_gold["adjusted_win_rate"]) == (
            0.5,
            0.625,
            0.375,
        )
        # differences 2, 0, −4, 4: mean ½
        assert (by_reward["difference"]["mean"], by_gold["difference"]["mean"]) == (0.5, -0.5)
        json.dumps(found, allow_nan=False)

    def test_who_answers(self) -> None:
        """Everything once, in the report's order."""
        policies = {"ppo": Policy(reference="seed-0"), "salsa": Policy(reference="soup")}
        recipe = Recipe(name="x", policies=policies, evaluate=Evaluate(models=["base", "soup"]))
        assert evaluate.model_names(recipe) == ["seed-0", "soup", "base", "ppo", "salsa"]

    def test_each_name_gets_its_own_weights(self, make_base: Any, make_adapter: Any, tmp_path: Path) -> None:
        """seed-N, soup and policies by their folders, base without any; two in a row don't mix."""
        inputs = {}
        for seed, name in enumerate(["sft/seed-0", "sft/seed-1", "soup", "ppo/salsa"]):
            make_adapter(make_base(), "default", seed).save_pretrained(tmp_path / str(seed))
            inputs[name] = tmp_path / str(seed)
        recipe = Recipe(name="x", policies={"salsa": Policy(reference="soup")})
        model = adapters.attach(make_base(), inputs["sft/seed-0"], "start")
        names = {"seed-0": "sft/seed-0", "seed-1": "sft/seed-1", "soup": "soup", "salsa": "ppo/salsa"}
        found = {name: evaluate.attach(model, name, recipe, inputs) for name in [*names, "base"]}
        assert len(set(found.values())) == 5
        assert found["base"] is None
        ids = torch.tensor([[1, 3, 10, 20, 4]])
        for name, unit in names.items():
            expected = adapters.attach(make_base(), inputs[unit], "alone")
            with torch.no_grad(), adapters.active(model, found[name]), adapters.active(expected, "alone"):
                torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)

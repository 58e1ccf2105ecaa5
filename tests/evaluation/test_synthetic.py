"""Data that the base writes and a function judges: the rows by hand, the stage on the embedded world, keys and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_recipe import SMALL, load_checked, unit

from salsa_peft.config.load import load_recipe
from salsa_peft.data.check import check_every_row, check_local
from salsa_peft.evaluation import synthetic
from salsa_peft.recipe.run import STAGES, run
from salsa_peft.utils.errors import SalsaError

LONGEST = "def longest(completions, **_):\n    return [float(len(text['content'])) for (text,) in completions]\n"
"""A judge that prefers long answers."""
PROMPT = {"prompt": [{"role": "user", "content": "Once"}], "level": 3, "tools": [{"name": "t"}]}


def answers(*scores: float) -> list[dict[str, Any]]:
    return [{"response": f"answer {place}", "scores": {"score": score}} for place, score in enumerate(scores)]


def said(row: dict[str, Any], side: str) -> str:
    return row[side][-1]["content"]


class TestRows:
    def test_the_best_answer_is_the_demonstration(self) -> None:
        """The first of equal ones, after the prompt; of the data's other columns only the template's inputs."""
        row = synthetic.demonstration(PROMPT, answers(0.5, 2.0, 2.0, -1.0))
        assert row == {
            "messages": [*PROMPT["prompt"], {"role": "assistant", "content": "answer 1"}],
            "tools": PROMPT["tools"],
        }

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            (2, [(1, 0), (4, 5)]),  # 2 and 3 have equal scores, and 6 is left over
            (3, [(2, 0), (3, 5)]),
            (4, [(2, 0)]),
            (7, [(6, 5)]),
        ],
    )
    def test_the_best_and_the_worst_of_each_group_are_a_pair(self, size: int, expected: list[tuple[int, int]]) -> None:
        """Each answer is in one group only; equal scores make no pair."""
        rows = list(synthetic.pairs(PROMPT, answers(1.0, 2.0, 5.0, 5.0, 0.5, -3.0, 9.0), size))
        found = [tuple(int(said(row, side).split()[1]) for side in ("chosen", "rejected")) for row in rows]
        assert found == expected
        assert all(row["prompt"] == PROMPT["prompt"] and row["tools"] == PROMPT["tools"] for row in rows)
        assert all("level" not in row for row in rows)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of the quickstart, cut small, with data that its base writes; and a folder for the runs."""
    small = {key: value for key, value in SMALL.items() if not key.startswith("policies")}
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "own_judge.py").write_text(LONGEST)
    section = {"function": f"{folder}/own_judge:longest", "num_generations": 5, "answers_per_pair": 2, "limit": 12}
    return {"sets": {**small, "synthetic": section, "sft.batch_size": 4}, "folder": folder}


def load(settings: dict[str, Any], **changes: Any) -> Any:
    sets = {**settings["sets"], **changes}
    return load_checked("quickstart", lora="lora", overrides=[f"{key}={json.dumps(v)}" for key, v in sets.items()])


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


ONLY = ["toy", "synthetic", "data"]


@pytest.fixture(scope="module")
def made(settings: dict[str, Any]) -> Path:
    """A run's folder with the results of the stages in ONLY."""
    from inline_stages import inline_stages

    with inline_stages():
        run(load(settings), settings["folder"] / "run", only=ONLY)
    return settings["folder"] / "run"


class TestStage:
    def test_the_data_is_the_bases_own_and_judged_by_the_function(self, made: Path) -> None:
        """Each prompt's longest answer, and pairs of a longer and a shorter one; the manifest's figures are theirs."""
        folder = unit(made, "synthetic")
        facts = json.loads((folder / "manifest.json").read_text())["facts"]
        demonstrations, pairs = rows_of(folder, "demonstrations"), rows_of(folder, "preferences")
        prompts = [row["prompt"] for row in rows_of(unit(made, "toy"), "prompts")[:12]]
        assert [row["messages"][:-1] for row in demonstrations] == prompts
        assert (facts["prompts"], facts["answers"], facts["demonstrations"]) == (12, 60, 12)
        assert facts["preferences"] == len(pairs) == 24 - facts["equal_pairs"] > 0
        best = {json.dumps(row["messages"][:-1]): len(said(row, "messages")) for row in demonstrations}
        for pair in pairs:
            longest = best[json.dumps(pair["prompt"])]
            assert longest >= len(said(pair, "chosen")) > len(said(pair, "rejected"))
        assert facts["mean_best_score"] == pytest.approx(sum(best.values()) / 12)
        assert facts["mean_best_score"] > facts["mean_score"] > 0

    def test_the_data_stage_tokenizes_it(self, made: Path) -> None:
        """In place of the toy data's demonstrations and preferences."""
        from salsa_peft.data import tokenized

        folder = unit(made, "synthetic")
        for kind in ("demonstrations", "preferences"):
            assert len(tokenized.load(unit(made, f"data/{kind}"))) == len(rows_of(folder, kind))

    def test_the_same_bytes_again_and_others_with_another_seed(
        self, settings: dict[str, Any], made: Path, inline: None
    ) -> None:
        """Whatever the batch size; and the seed of sampling is in the key."""
        before = (unit(made, "synthetic") / "demonstrations.jsonl").read_bytes()
        again, other = settings["folder"] / "again", settings["folder"] / "other"
        run(load(settings, **{"generation.batch_size": 7}), again, only=ONLY[:2])
        assert unit(again, "synthetic").name == unit(made, "synthetic").name
        assert (unit(again, "synthetic") / "demonstrations.jsonl").read_bytes() == before
        run(load(settings, **{"synthetic.seed": 1}), other, only=ONLY[:2])
        assert unit(other, "synthetic").name != unit(made, "synthetic").name
        assert (unit(other, "synthetic") / "demonstrations.jsonl").read_bytes() != before

    def test_a_finished_result_is_cached_and_an_unfinished_one_keeps_its_answers(
        self, settings: dict[str, Any], made: Path, inline: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A second run samples nothing; after a kill only the missing answers are sampled."""
        run(load(settings), made, only=ONLY)
        assert "synthetic … cached" in capsys.readouterr().err
        sampled, killed = [], settings["folder"] / "killed"
        keep = synthetic.append_checked_lines

        def kill(path: Path, rows: list[dict[str, Any]]) -> None:
            keep(path, rows)
            sampled.append(len(rows))
            if len(sampled) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(synthetic, "append_checked_lines", kill)
        small = load(settings, **{"generation.batch_size": 7})
        with pytest.raises(KeyboardInterrupt):
            run(small, killed, only=ONLY[:2])
        run(small, killed, only=ONLY[:2])
        assert sum(sampled) == 60 and len(sampled) > 2
        for name in ("demonstrations", "preferences"):
            expected = (unit(made, "synthetic") / f"{name}.jsonl").read_bytes()
            assert (unit(killed, "synthetic") / f"{name}.jsonl").read_bytes() == expected
        assert not (unit(killed, "synthetic") / synthetic.PARTIAL).exists()

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("[1.0] * len(completions)", "f gives all answers to a prompt the same score"),
            ("[float('nan')] * len(completions)", "reward function f: it returned nan for response 1 of 60"),
            ("[None] * len(completions)", "it returned None for 60 of 60 responses"),
        ],
    )
    def test_a_function_that_cannot_judge(
        self, settings: dict[str, Any], made: Path, inline: None, tmp_path: Path, body: str, message: str
    ) -> None:
        name = f"judge_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(f"def f(completions, **_):\n    return {body}\n")
        with pytest.raises(SalsaError, match=message):
            run(load(settings, **{"synthetic.function": f"{tmp_path}/{name}:f"}), made, only=ONLY[:2])


RECIPE = """
name: own
model: {{base: {base}, chat_template: plain}}
data: {{prompts: prompts.jsonl}}
synthetic: {{function: "judge:f"}}
policies: {{ppo: {{reference: seed-0}}}}
evaluate: {{prompts: {{mine: prompts.jsonl}}}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """own(words of --set) → the recipe in a folder with judge.py."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    (base / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n' * 9)
    (tmp_path / "judge.py").write_text("def f(completions, **_): return [0.0] * len(completions)\ndef g(level): ...\n")
    (tmp_path / "own.yaml").write_text(RECIPE.format(base=base))

    def make(*overrides: str) -> Any:
        return load_recipe(str(tmp_path / "own.yaml"), lora="lora", overrides=list(overrides), more=(check_local,))

    return make


def units_of(recipe: Any) -> dict[str, Any]:
    return {one.id: one for stage in STAGES.values() for one in stage.units(recipe, stage.run)}


class TestRecipe:
    def test_it_stands_in_for_demonstrations_and_preferences(self, own: Any, tmp_path: Path) -> None:
        """Data that the recipe names are read instead; both together leave the section without effect."""
        found = units_of(own().recipe)
        assert list(found)[:3] == ["synthetic", "data/demonstrations", "data/preferences"]
        assert found["data/demonstrations"].inputs == found["data/preferences"].inputs == ("synthetic",)
        assert found["synthetic"].inputs == ()
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 12)
        pairs = f"data.preferences={tmp_path}/pairs.jsonl"
        found = units_of(own(pairs).recipe)
        assert found["data/preferences"].inputs == () and found["data/demonstrations"].inputs == ("synthetic",)
        with pytest.raises(SalsaError, match=r"synthetic: has no effect, because data\.demonstrations and"):
            own(pairs, f"data.demonstrations={tmp_path}/pairs.jsonl")

    def test_what_its_key_depends_on(self, own: Any, tmp_path: Path) -> None:
        """The function's file, the prompts, what is sampled and how; neither the rewards nor the training."""

        def fields(*overrides: str) -> Any:
            return units_of(own(*overrides).recipe)["synthetic"]

        plain = fields()
        assert str(tmp_path / "judge.py") in plain.files and str(tmp_path / "prompts.jsonl") in plain.files
        for same in ("sft.learning_rate=0.1", "generation.batch_size=3", "reward.batch_size=4", "ppo.kl_coef=1"):
            assert fields(same).key_fields == plain.key_fields
        for other in ("synthetic.seed=1", "generation.temperature=0.5", "synthetic.limit=8", "model.dtype=bfloat16"):
            assert fields(other).key_fields != plain.key_fields

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["synthetic.function=judge"], "synthetic.function: 'judge' is not a function; write module:name"),
            (["synthetic.function=gone:f"], "synthetic.function: there is no module gone"),
            (["synthetic.num_generations=1"], "synthetic.num_generations: "),
            (["synthetic.num_generations=3"], "answers_per_pair: 4 must be at most num_generations 3"),
            (["sft.batch_size=16"], r"synthetic: 9 demonstrations, 9 of them for training, which is less than sft"),
            (["synthetic.limit=4"], r"synthetic: 4 demonstrations, 4 of them for training, which is less than sft"),
            (["data={}"], "data.prompts: is required"),
        ],
    )
    def test_refusals(self, own: Any, overrides: list[str], message: str) -> None:
        with pytest.raises(SalsaError, match=message):
            own(*overrides)

    def test_a_function_whose_columns_the_prompts_lack(self, own: Any, tmp_path: Path) -> None:
        recipe = own(f"synthetic.function={tmp_path}/judge:g").recipe
        with pytest.raises(SalsaError, match=r"synthetic\.function: g requires level, which is neither a column"):
            check_every_row(recipe, {"synthetic"})

    def test_a_measure_cannot_have_the_name_of_another(self, own: Any, tmp_path: Path) -> None:
        """A part of weight 0 is measured in the evaluation under its own name."""
        part = f"{{model: '{tmp_path}/judge:f', weight: 0, name: reward}}"
        with pytest.raises(SalsaError, match=r"reward\.model: this part is a measure of its own"):
            own(f"reward=[adapter, {part}]")
        assert own(f"reward=[adapter, {part.replace('name: reward', 'name: gold')}]")
        named_kl = own(
            f"reward=[adapter, {part.replace('name: reward', 'name: kl')}]", "policies={ppo: {reference: seed-0}}"
        )
        assert named_kl.recipe.warp is None
        for weight in ("0", "1"):  # WARP measures the KL from seed-0, and a policy's own reward all parts
            named = part.replace("name: reward", "name: kl").replace("weight: 0", f"weight: {weight}")
            with pytest.raises(SalsaError, match=r"another measure named kl; give the part another name"):
                own(
                    f"reward=[adapter, {named}]", "warp={}", "policies={ppo: {reference: seed-0, reward: {adapter: 1}}}"
                )
        with pytest.raises(SalsaError, match="another measure named gold"):
            load_recipe("quickstart", lora="lora", overrides=[f"reward=[adapter, {part.replace('reward', 'gold')}]"])

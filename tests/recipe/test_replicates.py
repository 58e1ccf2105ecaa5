"""Replicates of a recipe: their seeds, folders, cache, cost and joined report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_stages import FAKE, TINY
from small_recipe import SMALL, read, unit

from salsa_peft.cli import report
from salsa_peft.config.load import load_recipe, saved_recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.recipe import commits, replicates
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.report.gather import identity
from salsa_peft.utils.hub import Repository
from salsa_peft.utils.manifests import replicate_folders
from salsa_peft.utils.statistics import mean_interval

RECIPE = """
name: seeds
replicates: 3
toy: {seed: 5}
sft: {seeds: [0, 7, 2]}
reward: {seeds: [1, 3]}
ppo: {seed: 4}
policies: {ppo: {reference: seed-0}, dpo: {reference: seed-0, algorithm: dpo}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with seeds.yaml and tiny.yaml in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeds.yaml").write_text(RECIPE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def load(*sets: str) -> Any:
    return load_recipe("seeds.yaml", lora="lora", overrides=list(sets)).recipe


class TestSeeds:
    def test_every_seed_is_another(self, here: Path) -> None:
        """Replicate 0 has the recipe's own. No seed of the same role occurs twice."""
        recipe = load()
        assert replicates.replicate(recipe, 0) == replace(recipe, replicates=1)
        two = replicates.replicate(recipe, 2)
        assert (two.toy.seed, two.sft.seeds, two.reward.seeds, two.ppo.seed, two.dpo.seed) == (
            2005, [2000, 2007, 2002], [2001, 2003], 2004, 2000,
        )  # fmt: skip
        large = replicates.replicate(load("sft.seeds=[0, 1000, 2]"), 1)
        assert large.sft.seeds == [2000, 3000, 2002]
        assert replicates.replicate(load("ppo.seed=4294967295"), 1).ppo.seed < 2**32

    def test_only_the_seeds_differ(self, here: Path) -> None:
        recipe = load()
        one, two = (replicates.replicate(recipe, number) for number in (0, 1))
        same = replace(
            two, toy=one.toy, sft=one.sft, reward=one.reward, ppo=one.ppo, dpo=one.dpo, kto=one.kto, rloo=one.rloo, grpo=one.grpo
        )  # fmt: skip
        assert same == one
        assert identity(one)[0] == identity(two)[0] == identity(recipe)[0]
        assert identity(two)[1] == "sft 1000, 1007, 1002; reward 1001, 1003; ppo 1004; toy 1005; dpo 1000"

    @pytest.mark.parametrize("overrides", [{}, {"seed": 9}])
    def test_policies_with_seeds_of_their_own(self, here: Path, overrides: dict[str, int]) -> None:
        """Those of WARP: replicates stay one recipe, and the recipe that a replicate saves reads as it was."""
        recipe = load(f"warp={json.dumps({'policies': 2, 'iterations': 1, 'overrides': overrides})}", "ppo.seed=4")
        one, two = (replicates.replicate(recipe, number) for number in (0, 1))
        own = [
            [policy.overrides["seed"] for name, policy in of.policies.items() if "warp" in name] for of in (one, two)
        ]
        assert own == ([[4, 5], [1004, 1005]] if not overrides else [[9, 10], [1009, 1010]])
        assert identity(one)[0] == identity(two)[0]
        assert f"ppo 1004, {own[1][0]}, {own[1][1]}" in identity(two)[1]
        (here / "saved.yaml").write_text(dump_yaml(two.as_data()))
        assert saved_recipe(here / "saved.yaml") == two

    def test_synthetic_data_is_sampled_anew(self, here: Path) -> None:
        (here / "judge.py").write_text("def score(completions, **_): return [0.0] * len(completions)\n")
        recipe = load("synthetic={function: 'judge:score', seed: 3}")
        one, two = (replicates.replicate(recipe, number) for number in (0, 1))
        assert (one.synthetic.seed, two.synthetic.seed) == (3, 1003)
        assert identity(one)[0] == identity(two)[0]

    def test_what_is_refused(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for words, said in (
            (["--replicates", "0"], "replicates: must be"),
            (
                ["--set", "hub.push=[soup]", "--set", "hub.base_model=me/base"],
                "hub.push: does not work with replicates 3",
            ),
        ):
            assert salsa_run(["seeds.yaml", "--lora", *words]) == 2
            assert said in capsys.readouterr().err


def test_each_replicate_is_a_run_with_a_cache_of_its_own(
    here: Path, inline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call finds the work done; more replicates are added; one can be run again alone."""
    words = ["tiny.yaml", "--lora", "--output-dir", "run", "--stages", "toy,data,sft"]
    assert salsa_run([*words, "--replicates", "2"], stages=FAKE) == 0
    run = here / "run"
    assert [path.name for path in replicate_folders(run)] == ["replicate-0", "replicate-1"]
    assert saved_recipe(run / "recipe.yaml").replicates == 2
    assert saved_recipe(run / "replicate-1" / "recipe.yaml").sft.seeds == [1000, 1001]
    results = [(unit(folder, "sft/seed-0") / "result.txt").read_text() for folder in replicate_folders(run)]
    assert len(set(results)) == 2
    capsys.readouterr()
    assert salsa_run([*words, "--set", "replicates=3"], stages=FAKE) == 0
    said = capsys.readouterr().err
    assert said.count("sft/seed-0 … cached") == 2 and said.count("sft/seed-0 … done") == 1
    assert [line for line in said.splitlines() if line.startswith("replicate ")] == [
        f"replicate {number} of 3" for number in (1, 2, 3)
    ]
    alone = ["run/replicate-1/recipe.yaml", "--output-dir", "run/replicate-1", "--stages", "toy,data,sft"]
    assert salsa_run(alone, stages=FAKE) == 0
    assert "done" not in capsys.readouterr().err


def test_commits_of_the_hub_are_kept_until_all_replicates_are_finished(here: Path) -> None:
    """Those of the first replicate, although it is finished itself; then the Hub is asked again."""
    recipe = load("data.prompts=org/prompts", "replicates=2")
    found = {Repository("dataset", "org/prompts", None): "a" * 40}
    for number in (0, 1):
        assert replicates.kept_commits(here / "run", recipe, False) == (found if number else {})
        folder = here / "run" / f"replicate-{number}" / "report" / "key"
        folder.mkdir(parents=True)
        commits.keep_commits(folder.parents[1], found, finished=True)
        assert replicates.kept_commits(here / "run", recipe, False) == found
        (folder / "manifest.json").write_text('{"files": {}}')
    assert replicates.kept_commits(here / "run", recipe, False) == {}
    assert replicates.kept_commits(here / "run", recipe, True) == found


def test_the_plan_says_the_cost(here: Path, inline: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Core hours of all replicates, by the seconds that finished units took."""
    words = ["tiny.yaml", "--lora", "--output-dir", "run", "--replicates", "4", "--set", "threads=2"]
    assert salsa_run([*words, "--dry-run"], stages=FAKE) == 0
    said = capsys.readouterr().out
    assert "replicates: 4 runs like this one, of which 0 are finished; their cost is known when" in said
    assert not (here / "run").exists()
    assert salsa_run([*words[:4], "--replicates", "1", "--output-dir", "run/replicate-0"], stages=FAKE) == 0
    for manifest in (here / "run").rglob("manifest.json"):
        manifest.write_text(json.dumps({**read(manifest), "seconds": 100.0}))
    units = len(list((here / "run").rglob("manifest.json")))
    capsys.readouterr()
    assert salsa_run([*words, "--dry-run"], stages=FAKE) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("replicates:")]
    hours = units * 100 * 2 / 3600
    assert "of which 1 are finished" in line and " each on 2 cores: " in line
    assert f"{4 * hours:.2g} core hours in all, {3 * hours:.2g} of them left" in line


MORE: dict[str, Any] = {
    "landscape.plane": None, "landscape.norm_controls": True, "export": [], "evaluate.models": ["seed-1"],
    "evaluate.controls": {"shrunk": {"shrunk": {"seed": 0, "scale": "soup-norm"}}, "wide": {"stretched": {}}},
    "policies": {"ppo": {"reference": "seed-0"}, "salsa": {"reference": "soup"}, "ppo-base": None, "mkl": None, "ppo-shrunk": None,
                 "norm": {"reference": {"shrunk": {"seed": 0, "scale": "soup-norm"}}}, "stretched": {"reference": {"stretched": {}}}},
}  # fmt: skip


def test_two_replicates_from_seeds_to_the_joined_report(
    here: Path, inline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the controls of equal norm: as references, on the landscape and evaluated; then the claims."""
    sets = [word for key, value in (SMALL | MORE).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert salsa_run(["quickstart", "--lora", *sets, "--replicates", "2", "--output-dir", "run"]) == 0
    run = here / "run"
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    found = read(run / "summary.json")["replicates"]
    assert [(group["n"], group["measure"]) for group in found] == [(2, "gold")]
    each = [read(unit(folder, "evaluate") / "evaluation.json")["datasets"] for folder in replicate_folders(run)]
    for data in found[0]["datasets"]:
        rows = {row["model"]: row for row in data["models"]}
        assert {"seed-0", "soup", "seed-1", "shrunk", "wide", "ppo", "salsa", "norm", "stretched"} == rows.keys()
        for model, row in rows.items():
            scores = [one[data["dataset"]]["models"][model]["scores"]["gold"]["mean"] for one in each]
            assert row["mean"] == pytest.approx(mean_interval(scores).mean) and row["n"] == 2
            assert row["high"] == pytest.approx(mean_interval(scores).high)
        (pair,) = [pair for pair in data["pairs"] if (pair["a"], pair["b"]) == ("salsa", "ppo")]
        assert pair["mean"] == pytest.approx(rows["salsa"]["mean"] - rows["ppo"]["mean"])
    for folder in replicate_folders(run):
        lines = {line["kind"]: line for line in read(unit(folder, "landscape") / "landscape.json")["lines"]}
        scale = lines["shrunk"]["soup_norm"]
        norms = read(unit(folder, "soup") / "soup.json")
        assert scale == pytest.approx(norms["norm"] / norms["members"][0]["norm"], rel=1e-5)
        (stretched,) = lines["stretched"]["points"]
        assert stretched["at"] == pytest.approx(1 / scale)
        models = read(unit(folder, "evaluate") / "evaluation.json")["datasets"]["in"]["models"]
        by_scale = {point["at"]: point["scores"] for point in lines["shrunk"]["points"]}
        assert by_scale[scale]["gold"] == models["shrunk"]["scores"]["gold"], "the same model in both stages"
        assert stretched["scores"]["gold"] == models["wide"]["scores"]["gold"]
    assert report.main(["run", "--claims"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("## quickstart: 2 replicates\n") and "soup − mean of its two seeds" in said
    assert "SALSA − PPO with reference shrunk seed-0 with the norm of the soup" in said
    before = (run / "report.html").read_bytes()
    assert report.main(["run"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_bytes() == before
    (unit(run / "replicate-1", "report") / "manifest.json").unlink()
    assert report.main(["run", "--claims"]) == 0
    both = capsys.readouterr()
    assert "left out, because it is not finished: replicate-1" in both.err and "one replicate" in both.out

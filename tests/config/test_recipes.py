"""Every recipe that comes along, in every mode, and the paper's numbers (Appendix A) in those that are the paper's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundled_recipes import RECIPES
from paths import ROOT

from salsa_peft.config.load import bundled_names, load_recipe
from salsa_peft.config.yaml import dump_yaml, read_yaml
from salsa_peft.recipe.run import STAGES, resolved_yaml
from salsa_peft.utils.errors import SalsaError

PAPER = {
    "llama2": ("meta-llama/Llama-2-7b-hf", 8, 2e-6), "mistral": ("mistralai/Mistral-7B-v0.1", 8, 2e-6),
    "gemma": ("google/gemma-2b", 16, 1e-7),
}  # fmt: skip
PAPERS = [name for name in bundled_names("recipes") if name.split("_")[0] in PAPER]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preset", [None, "lora", "qlora"])
def test_it_parses_in_every_mode(name: str, preset: str | None) -> None:
    """Full weights without --lora."""
    found = load_recipe(name, lora=preset, overrides=[]).recipe
    assert found.mode == (preset or "full") and found.policies and found.sweep == {}
    if preset is not None:
        assert found.sft.learning_rate > 5e-5 and found.ppo.learning_rate >= 1e-6, (
            "rates of full weights under an adapter"
        )


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_hyperparameters(name: str) -> None:
    """A.1 to A.3."""
    found, (base, batch, rate) = load_recipe(name, lora=None, overrides=[]).recipe, PAPER[name.split("_")[0]]
    assert (found.model.base, found.model.max_length) == (base, 2048)
    sft, reward, ppo = found.sft, found.reward, found.ppo
    assert (sft.learning_rate, sft.warmup_ratio, sft.batch_size) == (2.5e-5, 0.03, batch)
    assert (reward.learning_rate, reward.batch_size, reward.weight_decay, reward.lr_scheduler_type) == (
        2e-5,
        8,
        0.001,
        "linear",
    )
    assert (ppo.learning_rate, ppo.batch_size, ppo.num_train_epochs, ppo.kl_control) == (rate, 8, 2, "adaptive")
    assert (ppo.lam, ppo.vf_coef, ppo.gamma, ppo.value) == (0.95, 0.1, 1, "head")  # TRL's; the paper names none
    assert found.data.demonstrations.path == "HuggingFaceH4/ultrachat_200k"  # type: ignore[union-attr]
    assert {found.data.preferences.path, found.data.prompts.path} == {"HuggingFaceH4/ultrafeedback_binarized"}  # type: ignore[union-attr]
    betas = {name: policy.kl_coef for name, policy in found.policies.items()}
    assert betas.get("ppo", 0.2) == 0.2 and betas.get("salsa", 0.01) == 0.01 and betas.get("mkl", 0.2) == 0.2


def test_the_ablations() -> None:
    """What each recipe of a figure trains."""
    policies = {name: list(load_recipe(name, lora=None, overrides=[]).recipe.policies) for name in PAPERS}
    for name in ("llama2_full", "mistral_full", "gemma_full"):
        assert policies[name] == ["ppo", "salsa", "ppo-shrunk"]
    assert policies["llama2_members"] == ["ppo", "members-2", "members-3"]
    assert policies["mistral_mkl"] == ["ppo", "salsa", "mkl"]
    assert len(policies["mistral_alpha"]) == 11 and "alpha-0.25-kl-0.05" in policies["mistral_alpha"]
    assert policies["llama2_low_kl"] == ["salsa", "salsa-high", "kl-0.01", "kl-0.05", "kl-0.2"]
    found = load_recipe("llama2_members", lora=None, overrides=[]).recipe
    assert [one.references("x")[0].weights for one in found.policies.values()] == [[1.0], [1 / 2] * 2, [1 / 3] * 3]
    assert [one.kl_coef for one in found.policies.values()] == [0.2, 0.01, 0.01]
    found = load_recipe("mistral_alpha", lora=None, overrides=[]).recipe
    assert found.policies["alpha-0.25-kl-0.05"].references("x")[0].weights == [0.75, 0.25]
    assert found.policies["alpha-1-kl-0.01"].reference == "seed-1" and found.policies["ppo"].kl_coef == 0.2
    found = load_recipe("llama2_low_kl", lora=None, overrides=[]).recipe
    assert {name: (one.reference, one.kl_coef) for name, one in found.policies.items()} == {
        "salsa": ("soup", 0.01), "salsa-high": ("soup", 0.2),
        "kl-0.01": ("seed-0", 0.01), "kl-0.05": ("seed-0", 0.05), "kl-0.2": ("seed-0", 0.2),
    }  # fmt: skip
    assert load_recipe("mistral_mkl", lora=None, overrides=[]).recipe.policies["mkl"].reference == ["seed-0", "seed-1"]


SETS = {  # of Table 5 and Figure 4b, Figure 4a, and A.4; the others: Tables 1 to 4 and Figure 5
    "mistral_mkl": ["mt_bench", "arena_hard_v0.1"],
    "mistral_alpha": ["arena_hard_v0.1"],
    "llama2_low_kl": ["mt_bench", "arena_hard_v0.1"],
}


def test_the_best_beta_of_each_alpha() -> None:
    """Figure 4a: every α at each β, the judge picks by wins over PPO."""
    found = load_recipe("mistral_alpha", lora=None, overrides=[]).recipe
    assert found.search is not None and (found.search.by, found.search.against) == ("judge", "ppo")
    assert [a for a, b in found.evaluate.pairs if b == "ppo"] == found.search.methods
    assert len(found.policies) == 1 + 2 * 5


def test_the_papers_landscapes_and_prompts() -> None:
    """Figure 2 is on MT-Bench: the line of Gemma, line and plane of Llama2; every table and figure has the sets that the paper judges, whole."""
    for name, plane in (("llama2_full", [0, 1, 2]), ("gemma_full", None)):
        landscape = load_recipe(name, lora=None, overrides=[]).recipe.landscape
        assert landscape is not None
        assert (landscape.line, landscape.plane, landscape.prompts, landscape.limit) == (
            [0, 1],
            plane,
            "mt_bench",
            None,
        )
    for name in PAPERS:
        found = load_recipe(name, lora=None, overrides=[]).recipe
        sets = found.evaluate.prompts
        assert list(sets) == SETS.get(name, ["mt_bench", "arena_hard_v0.1", "ultrafeedback"])
        assert {source.limit for source in sets.values()} == {None} and found.soup.resolved_weights == [0.5, 0.5]
        assert "ultrafeedback" not in sets or sets["ultrafeedback"].split == "test_prefs"
        judge = found.evaluate.judge
        assert judge is not None and (judge.kind, judge.model, judge.prompt) == ("openai", "gpt-4-turbo", "figure7")
        assert len(found.sft.seeds) == (3 if name in ("llama2_full", "llama2_members") else 2)


@pytest.mark.parametrize("preset", [None, "lora", "qlora"])
@pytest.mark.parametrize("name", ["llama2_members", "llama2_low_kl", "mistral_alpha", "mistral_mkl"])
def test_an_ablation_in_the_main_recipes_folder_finds_its_work_done(name: str, preset: str | None) -> None:
    """The same slices: seeds, reward model, and policies of the same name; so `--output-dir runs/llama2_full` trains only what is new."""
    main, ablation = (
        {unit.id: unit for stage in STAGES.values() for unit in stage.units(loaded.recipe, stage.run)}
        for loaded in (load_recipe(one, lora=preset, overrides=[]) for one in (f"{name.split('_')[0]}_full", name))
    )
    shared = [id for id in ablation if id in main and id.split("/")[0] in ("sft", "reward", "soup", "ppo")]
    assert {"sft/seed-0", "sft/seed-1", "reward", "soup"} < set(shared)
    assert [id for id in shared if ablation[id] != main[id]] == []


@pytest.mark.parametrize("preset", [None, "lora", "qlora"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_as_it_ran_is_itself_a_recipe(name: str, preset: str | None, tmp_path: Path) -> None:
    """The file that a run saves gives the same recipe without --lora."""
    loaded = load_recipe(name, lora=preset, overrides=[])
    (tmp_path / "again.yaml").write_text(resolved_yaml(loaded))
    assert load_recipe(str(tmp_path / "again.yaml"), lora=None, overrides=[]).recipe == loaded.recipe


def leaves(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(mapping, key) of everything that a recipe says, from the inside out."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value)
        yield data, key


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_state_departures_only(name: str, tmp_path: Path) -> None:
    """Without any one of its lines a recipe is another one, or none."""
    written = read_yaml(str(ROOT / "recipes" / f"{name}.yaml"))
    own = written.pop("lora", {})
    whole = load_recipe(name, lora=None, overrides=[]).recipe
    idle = []
    for mapping, key in list(leaves(written)):
        value = mapping.pop(key)
        (tmp_path / "less.yaml").write_text(dump_yaml(written))
        try:
            same = load_recipe(str(tmp_path / "less.yaml"), lora=None, overrides=[]).recipe == whole
        except SalsaError:
            same = False
        idle += [key] if same else []
        mapping[key] = value
    assert not idle
    assert not own or load_recipe(name, lora="lora", overrides=[]).changes


def test_qlora_is_lora_on_four_bits() -> None:
    """The same adapters at the same rates; the base in nf4 with its scales quantised, pages for the optimizer, checkpointing."""
    lora, qlora = (load_recipe("llama2_full", lora=preset, overrides=[]).recipe for preset in ("lora", "qlora"))
    assert (lora.model.quantization, qlora.model.quantization) == (None, "nf4-double")
    assert lora.adapter == qlora.adapter and lora.adapter is not None and lora.adapter.target_modules == "all-linear"
    for section in ("sft", "reward", "ppo"):
        one, other = getattr(lora, section), getattr(qlora, section)
        assert one.learning_rate == other.learning_rate
        assert other.optim == "paged_adamw_32bit" and other.gradient_checkpointing
    assert (qlora.sft.learning_rate, qlora.reward.learning_rate, qlora.ppo.learning_rate) == (2e-4, 1e-4, 2e-5)
    for preset in ("lora", "qlora"):
        assert load_recipe("gemma_full", lora=preset, overrides=[]).recipe.ppo.learning_rate == 1e-6


@pytest.mark.parametrize("mode", [[], ["--lora"], ["--lora", "qlora"]])
def test_a_7b_recipes_dry_run_takes_two_seconds_and_no_torch(mode: list[str], tmp_path: Path) -> None:
    """The plan is made of headers and arithmetic."""
    script = (
        "import sys; from salsa_peft.recipe.__main__ import main; code = main(sys.argv[1:]);"
        " assert not {'torch', 'transformers'} & set(sys.modules); raise SystemExit(code)"
    )
    start = time.perf_counter()
    words = [sys.executable, "-c", script, "llama2_full", *mode, "--dry-run", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 4  # 2 on a machine of its own
    assert "ppo/salsa" in done.stdout and not (tmp_path / "run").exists()

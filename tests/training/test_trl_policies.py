"""Policies by TRL's algorithms in a recipe: what they train against, what they leave, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_stages import inline_stages
from peft import PeftModel
from small_recipe import SMALL, read, unit
from small_recipe import load_checked as load_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from salsa_peft.data import tokenized
from salsa_peft.data.splits import split_by_prompt
from salsa_peft.models.rewards.function import FunctionReward
from salsa_peft.recipe import units
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.training import trl_stages as trl_policies
from salsa_peft.utils import fingerprints as runs
from salsa_peft.utils.errors import SalsaError

ALGORITHMS = ("dpo", "kto", "rloo", "grpo")
POLICIES = {
    f"{name}-{algorithm}": {"algorithm": algorithm, "reference": reference}
    for algorithm in ALGORITHMS
    for name, reference in (("plain", "seed-0"), ("salsa", "soup"))
} | {"mkl-dpo": {"algorithm": "dpo", "reference": ["seed-0", {"shrunk": {"seed": 1, "scale": 0.5}}], "kl_coef": 0.5}}
STILL = {"learning_rate": 1e-30, "max_steps": 1, "batch_size": 8}  # the policy stays where it starts: at seed-0


def command(folder: Path, *words: str, lora: bool = True) -> int:
    """A cut quickstart with policies of TRL's algorithms alone; its exit code."""
    sets = SMALL | {"policies": POLICIES, "sft.seeds": [0, 1], "landscape": None, "export": [], "evaluate.models": []}
    sets = {key: value for key, value in sets.items() if not key.startswith("landscape.")}
    sets |= {f"{algorithm}.{key}": value for algorithm in ALGORITHMS for key, value in STILL.items()}
    sets["grpo.num_generations"] = 4
    overrides = [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return salsa_run(["quickstart", *["--lora"] * lora, *overrides, "--output-dir", str(folder), *words])


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / request.param
    with inline_stages():
        assert command(folder, lora=request.param == "lora") == 0
    return folder


def opened(run: Path, name: str) -> Any:
    """A unit's weights, by PEFT or Transformers alone."""
    folder, base = unit(run, name), unit(run, "toy") / "base"
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def logprob(model: Any, tokenizer: Any, messages: Any) -> float:
    """log π of the answer, given what is before it."""
    whole = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    logp = model(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]
    return logp[len(before) - 1 :].sum().item()


def test_the_kl_term_looks_at_the_reference_that_the_recipe_names(run: Path) -> None:
    """The policy did not move: against seed-0 nothing differs, against the soup what plain models say."""
    for algorithm in ALGORITHMS:
        facts = {
            name: read(unit(run, f"{algorithm}/{name}-{algorithm}") / "policy.json") for name in ("plain", "salsa")
        }
        key = "kl" if algorithm in ("rloo", "grpo") else "rewards/chosen"
        assert facts["plain"][key] == pytest.approx(0, abs=1e-5), algorithm
        assert abs(facts["salsa"][key]) > 1e-4, algorithm
        assert facts["salsa"]["algorithm"] == algorithm and facts["salsa"]["reference"] == "soup"
    rows = tokenized.load(unit(run, "data/preferences"))
    held_out = rows.select(split_by_prompt(rows["prompt_digest"][:], 6).held_out)
    tokenizer = AutoTokenizer.from_pretrained(unit(run, "sft/seed-0"))
    start, soup = opened(run, "sft/seed-0"), opened(run, "soup")
    ratios = [
        [logprob(start, tokenizer, row[side]) - logprob(soup, tokenizer, row[side]) for side in ("chosen", "rejected")]
        for row in held_out
    ]
    found = read(unit(run, "dpo/salsa-dpo") / "policy.json")
    assert found["margin"]["held_out"]["mean"] == pytest.approx(sum(0.1 * (a - b) for a, b in ratios) / 6, abs=1e-5)
    assert found["pairs"] == {"train": 122, "held_out": 6}


def test_policies_are_ordinary_and_stand_in_evaluation_and_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """seed-0's weights, since none moved; named with their algorithm; nothing else in their adapters."""
    for name in ("kto/salsa-kto", "grpo/salsa-grpo"):
        folder, seed = unit(run, name), opened(run, "sft/seed-0").state_dict()
        assert not (folder / "ref").exists()
        for key, value in opened(run, name).state_dict().items():
            torch.testing.assert_close(value, seed[key], rtol=0, atol=1e-6)
    evaluation = read(unit(run, "evaluate") / "evaluation.json")
    assert evaluation["models"] == ["seed-0", "soup", *POLICIES]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "DPO from seed-0, reference soup, β 0.1" in report and "GRPO from seed-0, reference seed-0, β 0.04" in report
    assert "DPO from seed-0, reference seed-0, shrunk 0.5·seed-1, β 0.5" in report
    summary = read(unit(run, "report") / "summary.json")
    assert {(one["a"], one["b"]) for one in summary["comparisons"]} == {("soup", "seed-0")} | {
        (f"salsa-{algorithm}", other) for algorithm in ALGORITHMS for other in (f"plain-{algorithm}", "seed-0")
    }
    assert summary["policies"]["salsa-dpo"]["facts"]["margin"]["held_out"]["n"] == 6
    assert command(run, "--dry-run", lora=(unit(run, "soup") / "adapter_config.json").exists()) == 0
    assert "cached" in capsys.readouterr().out


def test_a_reward_of_ours_is_called_as_trl_calls_one(tokenizer: Any) -> None:
    """Its tokens are the policy's own, columns come along, TRL's own arguments don't."""
    seen: list[Any] = []

    def reward(
        prompts: list[Any], completion_ids: list[list[int]], colour: list[str], finished: list[bool]
    ) -> list[float]:
        seen.append((prompts, completion_ids, colour, finished))
        return [float(len(ids)) for ids in completion_ids]

    context: Any = type("Bench", (), {"tokenizer": tokenizer})
    score = trl_policies.as_function(FunctionReward(reward, tokenizer), context, (tokenizer.eos_token_id,))
    prompts = [[{"role": "user", "content": "kin pear"}], [{"role": "user", "content": "kin"}]]
    ids = [[7, 8, tokenizer.eos_token_id], [9]]
    found = score(prompts=prompts, completions=["", ""], completion_ids=ids, colour=["red", "blue"], trainer_state=None)
    assert found == [3.0, 1.0]
    assert seen == [(prompts, ids, ["red", "blue"], [True, False])]


def recipe_of(*sets: str) -> Any:
    return load_recipe("quickstart", lora="lora", overrides=list(sets)).recipe


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["policies.ppo.algorithm=dpoo"], "did you mean dpo?"),
        (["policies.mkl.algorithm=grpo"], "policies.mkl.reference: grpo supports one reference, not 2, because the k3 estimate"),
        (["policies.salsa={algorithm: dpo, reference: soup, kl_coef: 0}"], "kl_coef: must be more than 0, because with 0 TRL's dpo trainer ignores the reference"),
        (["dpo.kl_coef=0"], "dpo.kl_coef: must be more than 0, not 0"),
        (["grpo.batch_size=12"], "grpo.batch_size: 12 is not a multiple of num_generations 8; set grpo.batch_size=16"),
        (["policies.salsa={algorithm: rloo, reference: soup}", "generation.min_new_tokens=1"], "generation.min_new_tokens: must be 0 with a policy of algorithm rloo, not 1"),
        (["kto.micro_batch_size=1"], "kto.micro_batch_size: must be at least 2, not 1"),
        (["policies.salsa={algorithm: dpo, reference: soup}", "dpo.batch_size=9000"], "data.preferences: 8000 pairs, 400 of them held out (dpo.held_out 0.05), are too few for dpo.batch_size = 9000"),
        (["policies.salsa={algorithm: rloo, reference: soup}", "rloo.batch_size=20000"], "data.prompts: found 6400 prompts, expected at least"),
        (["dpo.loss_type=sft"], "dpo.loss_type: must be sigmoid, hinge, ipo, exo_pair, nca_pair,"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_recipe(sets: list[str], message: str) -> None:
    """In one line."""
    with pytest.raises(SalsaError) as error:
        recipe_of(*sets)
    assert message in str(error.value)


def test_a_policy_hangs_on_what_its_algorithm_reads() -> None:
    """Pairs or prompts, and the section of its own."""
    policies = "{a: {algorithm: dpo, reference: soup}, b: {algorithm: rloo, reference: soup}, ppo: {reference: seed-0}}"

    def keys(*sets: str) -> dict[str, Any]:
        recipe = recipe_of(f"policies={policies}", *sets)
        made = [unit for make in units.POLICY_UNITS.values() for unit in make(recipe, "run")]
        return {unit.id: runs.canonical_json([unit.key_fields, list(unit.inputs)]) for unit in made}

    before = keys()
    assert list(before) == ["ppo/ppo", "dpo/a", "rloo/b"]
    changed = {
        "dpo.learning_rate=1e-3": {"dpo/a"},
        "rloo.num_generations=4": {"rloo/b"},
        "generation.temperature=0.5": {"ppo/ppo", "rloo/b"},
        "ppo.lam=0.9": {"ppo/ppo"},
        "grpo.learning_rate=1e-3": set(),
        "policies.a.kl_coef=0.2": {"dpo/a"},
        "model.max_length=40": {"ppo/ppo", "dpo/a", "rloo/b"},
    }
    for text, expected in changed.items():
        after = keys(text)
        assert {name for name in before if before[name] != after[name]} == expected, text

"""Every mistake of a recipe is reported at once, each in a line with its place and the nearest right spelling."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import load_checked

from salsa_peft.config.keys.problems import MOST
from salsa_peft.config.yaml import line_of, node_tree
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.utils.errors import SalsaError

MISTAKES = """name: tiny
toy: {demonstration_nose: 0.5}
modle: {max_length: 32}
model:
  max_length: 2k
sft:
  seeds: [0, 1.5]
  batch-size: 8
  lr: 1
ppo: {kl_control: Adaptive, rollout_backend: HF, max_new_tokens: 3, max_grad_norm: -1}
policies:
  salsa: {refrence: soup}
evaluate: {judge: {kind: openia}, prompts: {v0.1: {path: x.jsonl, limt: 3}}}
lora:
  ppo: {learning_rate: quick}
sweep: {alfa: {values: [1]}}
"""
SAID = [
    "bad.yaml: line 2: toy.demonstration_nose: unknown key; did you mean demonstration_noise?",
    "bad.yaml: line 3: modle: unknown key; did you mean model?",
    "bad.yaml: line 5: model.max_length: must be a whole number, not '2k'",
    "bad.yaml: line 7: sft.seeds[1]: must be a whole number, not 1.5",
    "bad.yaml: line 8: sft.batch-size: unknown key; did you mean batch_size?",
    "bad.yaml: line 9: sft.lr: unknown key; did you mean learning_rate?",
    "bad.yaml: line 10: ppo.kl_control: must be fixed or adaptive, not 'Adaptive'; did you mean adaptive?",
    "bad.yaml: line 10: ppo.rollout_backend: must be hf, paged or vllm, not 'HF'; did you mean hf?",
    "bad.yaml: line 10: ppo.max_grad_norm: must be more than 0, not -1",
    "bad.yaml: line 10: ppo.max_new_tokens: unknown key; did you mean generation.max_new_tokens?",
    "bad.yaml: line 12: policies.salsa.refrence: unknown key; did you mean reference?",
    "bad.yaml: line 13: evaluate.judge.kind: must be openai, local, reward or function, not 'openia'; did you mean openai?",
    "bad.yaml: line 13: evaluate.prompts.v0.1.limt: unknown key; did you mean limit?",
    "bad.yaml: line 15: lora: ppo.learning_rate: must be a number, not 'quick'",
    "bad.yaml: line 16: sweep.alfa: unknown sweep; did you mean alpha?",
    "--set ppo: must be key=value, such as ppo.learning_rate=1e-6",
    "--set: dpo.kl_coef: must be more than 0, not 0",
    "--set: grpo.num_generation: unknown key; did you mean num_generations?",
]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The lines that the command prints about a recipe's text and overrides."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str) -> list[str]:
        (tmp_path / "bad.yaml").write_text(text)
        assert salsa_run(["bad.yaml", "--lora", "--dry-run", *(["--set", *overrides] if overrides else [])]) == 2
        said = capsys.readouterr()
        assert said.out == "" and [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]
        return said.err.splitlines()

    return run


def test_wrong_keys_types_and_values_of_all_layers(refused) -> None:
    """Nothing hides another one; a misspelt required key is one mistake, not two."""
    lines = refused(MISTAKES, "grpo.num_generation=2", "dpo.kl_coef=0", "ppo")
    assert sorted(lines) == sorted(SAID)
    places = [int(line.split("line ")[1].split(":")[0]) for line in lines if "line " in line]
    assert places[:-2] == sorted(places[:-2])  # the section lora is a layer of its own


def test_settings_that_contradict_others_and_missing_files(refused) -> None:
    """From all sections, policies and sources."""
    lines = refused("""name: tiny
sft: {batch_size: 7, micro_batch_size: 2, from: [a/b]}
ppo: {batch_size: 7, num_mini_batches: 2, eval_prompts: x}
policies:
  a: {reference: seed-9}
  b: {reference: suop}
data: {demonstrations: none.jsonl, preferences: nothing.jsonl}
landscape: {line: [0, 7]}
""")
    starts = ["line 2: sft.batch_size", "line 3: ppo.batch_size", "line 3: ppo.eval_prompts", "line 5: policies.a.reference", "line 6: policies.b.reference",
              "line 7: data.demonstrations: there is no", "line 7: data.preferences: there is no", "line 7: data.prompts: is required",
              "line 8: landscape.line", "model.base: is required", "model.chat_template: is required", "evaluate.prompts: is required"]  # fmt: skip
    for start in starts:
        assert len([line for line in lines if line.startswith(f"bad.yaml: {start}")]) == 1, (start, lines)
    assert len(lines) == len(starts)


def test_one_mistake_is_one_line(refused) -> None:
    """Also of a search, whose coefficients are copied into the policies."""
    toy = "name: tiny\ntoy: {}\npolicies: {salsa: {reference: soup}}\n"
    assert refused(toy + "search: {kl_coef: [-1]}\n") == [
        "bad.yaml: line 4: search.kl_coef[0]: must be at least 0, not -1"
    ]
    assert refused(toy + "policies2: {}\n") == ["bad.yaml: line 4: policies2: unknown key; did you mean policies?"]


def test_a_wrong_value_that_another_layer_replaces(refused) -> None:
    """By --lora's preset, by the section lora, and by --set."""
    text = "name: tiny\ntoy: {}\nsft: {learning_rate: '2e-5'}\nppo: {batch_size: x}\npolicies: {salsa: {reference: soup}}\nlora: {dpo: {seed: a}}\n"
    assert refused(text, "ppo.batch_size=8", "dpo.seed=1") == [
        "bad.yaml: line 3: sft.learning_rate: must be a number, not '2e-5'",
        "bad.yaml: line 4: ppo.batch_size: must be a whole number, not 'x'",
        "bad.yaml: line 6: lora: dpo.seed: must be a whole number, not 'a'",
    ]


def test_a_recipe_of_nothing_but_mistakes(refused) -> None:
    """The first MOST are shown, and how many there are more."""
    lines = refused("name: x\n" + "".join(f"zz{n}: 1\n" for n in range(MOST + 7)))
    assert len(lines) == MOST + 1 and lines[-1] == "7 more mistakes are not shown"


def test_lines_of_keys(tmp_path: Path) -> None:
    """The innermost part that the file has; names may contain dots; entries of lists have lines too."""
    path = tmp_path / "a.yaml"
    path.write_text("a:\n  b.c: 1\n  b:\n    - x\n    -\n      y: 2\n'd': {e: 1}\n")
    wanted = {"a": 1, "a.b.c": 2, "a.b": 3, "a.b[0]": 4, "a.b[1].y": 6, "a.b[9]": 3, "a.z": 1, "d.e.f": 7, "x": None}
    assert {key: line_of(node_tree(path), key) for key in wanted} == wanted


def test_the_error_in_python_has_every_line(tmp_path: Path) -> None:
    """`problems` of the exception."""
    path = tmp_path / "bad.yaml"
    path.write_text("nam: x\ntoy: {seeed: 1}\n")
    with pytest.raises(SalsaError) as caught:
        load_checked(str(path), lora=None, overrides=[])
    assert [line.split(": ")[2] for line in caught.value.problems] == ["nam", "toy.seeed"]
    assert str(caught.value) == "\n".join(caught.value.problems)

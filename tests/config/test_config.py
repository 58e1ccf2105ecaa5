"""Recipes: layers, numbers, paths, and every refusal, one line each."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_recipe import load_checked as load_recipe

from salsa_peft.config import load as parsing
from salsa_peft.config.fields import UNSUPPORTED_LORA_FIELDS
from salsa_peft.config.references import parse_reference
from salsa_peft.config.schema import Adapter, Recipe
from salsa_peft.config.yaml import MAX_BYTES, dump_yaml, parse_yaml
from salsa_peft.utils.errors import SalsaError

RECIPE = """
name: tiny
toy: {}
policies:
  ppo: {reference: seed-0}
  salsa: {reference: soup, kl_coef: 2e-2}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load("key=value", …, text=, lora=) → what load_recipe makes of the recipe text and overrides."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, text: str = RECIPE, lora: str | None = "lora"):
        (tmp_path / "tiny.yaml").write_text(text)
        return load_recipe("tiny.yaml", lora=lora, overrides=list(overrides))

    return make


def said(load, *overrides: str, **options: Any) -> str:
    with pytest.raises(SalsaError) as caught:
        load(*overrides, **options)
    for line in caught.value.problems:
        assert "\n" not in line
        assert len(line) < 900
    return str(caught.value)


def test_layers_in_their_order(load):
    text = (
        RECIPE
        + "ppo: {learning_rate: 1e-6, batch_size: 4}\nsft: {learning_rate: 3e-5}\nlora: {ppo: {learning_rate: 3e-4}}\n"
    )
    recipe = load(text=text).recipe
    assert recipe.ppo.learning_rate == 3e-4
    assert recipe.ppo.batch_size == 4
    assert recipe.sft.learning_rate == 2e-4
    assert recipe.adapter is not None
    assert recipe.adapter.r == 16
    assert recipe.policies["salsa"].kl_coef == 0.02
    assert load("ppo.learning_rate=5e-4", "ppo.learning_rate=6e-4", text=text).recipe.ppo.learning_rate == 6e-4


def test_what_lora_changed(load):
    changes = load(
        text=RECIPE + "sft: {learning_rate: 2.0e-4}\nlora: {ppo: {learning_rate: 3e-4}, adapter: {r: 4}}\n"
    ).changes
    assert ("ppo.learning_rate", 2e-6, 3e-4) in changes
    assert ("adapter.r", None, 4) in changes
    assert "sft.learning_rate" not in [key for key, _, _ in changes]


def test_numbers(load):
    recipe = load("ppo.learning_rate=2e-6", "ppo.kl_target=1", "reward.weight_decay=.5", "sft.seeds=[3, 4]").recipe
    assert recipe.ppo.learning_rate == 2e-6
    assert recipe.ppo.kl_target == 1
    assert recipe.reward.weight_decay == 0.5
    assert parse_yaml("[2e-6, 2E6, -1.5, 1, +3, 010, 1e400, no, true, ~, 2026-11-22, 1:30, '2e-6', 0x10]", "x") == [
        2e-6, 2e6, -1.5, 1, 3, 10, float("inf"), "no", True, None, "2026-11-22", "1:30", "2e-6", "0x10",
    ]  # fmt: skip


REFUSED = [
    # the key, found, expected: an override, the words that its line must hold
    ("ppo.learning_rate=fast", ["--set: ppo.learning_rate: must be a number, not 'fast'"]),
    ("ppo.learning_rat=1e-6", ["ppo.learning_rat: unknown key", "did you mean learning_rate?"]),
    ("polices.x=1", ["polices: unknown key", "did you mean policies?"]),
    ("adapter.rank=3", ["adapter.rank: unknown key; did you mean r?"]),
    (
        "adapter.use_dora=true",
        [
            "adapter.use_dora: unknown key; only r, lora_alpha, lora_dropout, target_modules, use_rslora of PEFT's LoraConfig are supported; write them in `adapter`"
        ],
    ),
    (
        "adapter.lora={r: 8}",
        [
            "adapter.lora: unknown key; only r, lora_alpha, lora_dropout, target_modules, use_rslora of PEFT's LoraConfig are supported; write them in `adapter`, not under `lora`"
        ],
    ),
    ("adapter.alpha=3", ["adapter.alpha: unknown key; did you mean lora_alpha?"]),
    ("lora_dropout=0.1", ["lora_dropout: unknown key; did you mean adapter.lora_dropout?"]),
    ("max_length=8", ["max_length: unknown key; did you mean model.max_length?"]),
    (
        "data.demonstrations=[a.jsonl, b.jsonl]",
        [
            "--set: data.demonstrations: must be one source, not a list. Put the files into one folder and give its path, or join them into one file"
        ],
    ),
    (
        "evaluate.prompts={x: [a.jsonl]}",
        [
            "--set: evaluate.prompts.x: must be one source, not a list. Put the files into one folder and give its path, or join them into one file"
        ],
    ),
    ("evaluate.prompts=a.jsonl", ["evaluate.prompts: must be a mapping {NAME: value, …}, not 'a.jsonl'"]),
    ("sft.seeds=3", ["--set: sft.seeds: must be a list, not 3; write [3]"]),
    ("evaluate.models=base", ["evaluate.models: must be a list, not 'base'; write [base]"]),
    ("data.demonstrations.splitt=a", ["data.demonstrations.splitt: unknown key", "split?"]),
    ("policies.salsa.kl_coeff=1", ["policies.salsa.kl_coeff: unknown key", "kl_coef?"]),
    ("policies.new.kl_coef=1", ["policies.new.reference: is required; add it"]),
    (
        "sft.batch_size=7 & sft.micro_batch_size=2",
        ["sft.batch_size: 7 is not a multiple of micro_batch_size 2; set sft.batch_size=8 or change micro_batch_size"],
    ),
    (
        "ppo.batch_size=7 & ppo.num_mini_batches=2",
        ["ppo.batch_size: 7 is not a multiple of num_mini_batches 2; set ppo.batch_size=8"],
    ),
    (
        "ppo.batch_size=8 & ppo.micro_batch_size=3",
        ["ppo.micro_batch_size: 3 must divide 8, the number of responses in a minibatch (8 / 1)"],
    ),
    ("soup.weights=[0.5,0.6]", ["soup.weights: [0.5, 0.6] sum to 1.1, not 1; scale the weights"]),
    ("soup.weights=[1]", ["soup.weights: found 1 weights for 2 members"]),
    ("soup.weights=[.nan,1]", ["soup.weights[0]: must be a finite number, not nan"]),
    ("soup.per=layer", ["soup.per: layer has no effect with strategy linear; leave it out, or use one of slerp,"]),
    ("soup.scale=.inf", ["soup.scale: must be a finite number, not inf"]),
    ("soup={strategy: ties, density: 0}", ["soup.density: 0.0 is not a share above 0 and at most 1; use one such as"]),
    ("soup.drop_seed=3", ["soup.drop_seed: 3 has no effect with strategy linear; leave it out, or use dare"]),
    ("soup.start=seed-7", ["soup.start: there is no seed-7; sft.seeds has seed-0 to seed-1"]),
    (
        "soup.start=nowhere",
        [
            "soup.start: must be seed-N, soup, a soup of `soups`, a policy, or the folder or Hub id (namespace/name) of a LoRA adapter, not 'nowhere'"
        ],
    ),
    ("soup={strategy: greedy, scale: 0.5}", ["soup.scale: 0.5 has no effect with strategy greedy, which measures"]),
    ("soup={strategy: slerp, members: [0]}", ["soup.strategy: slerp needs at least two members, but there is one"]),
    (
        "soup={strategy: model_stock, weights: [0.4, 0.6]}",
        ["soup.weights: strategy model_stock chooses the weights itself; remove the weights [0.4, 0.6]"],
    ),
    ("soup.members=[0,2]", ["soup.members: there is no seed-2; sft.seeds has seed-0 to seed-1"]),
    ("soup.members=[0,0]", ["soup.members: ['seed-0', 'seed-0'] has a repeated entry; give each entry only once"]),
    ("policies.a.reference=seed-2", ["policies.a.reference: there is no seed-2; sft.seeds has seed-0 to seed-1"]),
    ("policies.a.reference=[]", ["policies.a.reference: is an empty list; name at least one reference"]),
    (
        "policies.a.reference={soup: {members: [0, 1], weights: [0.5, 0.6]}}",
        ["policies.a.reference.soup.weights", "sum to 1.1"],
    ),
    (
        "policies.a.reference={soup: {members: [0, 3]}}",
        ["policies.a.reference: there is no seed-3; sft.seeds has seed-0 to seed-1"],
    ),
    (
        "policies.a.reference={soup: {members: []}}",
        ["policies.a.reference.soup: must have the form {members: [0, 1], weights: [0.5, 0.5]}, not {'members': []}"],
    ),
    ("policies.a.reference={soup: {weights: []}}", ["policies.a.reference.soup.weights: found 0 weights for 2"]),
    (
        "policies.a.reference={soup: {members: [-1, 0]}}",
        [
            "policies.a.reference.soup: must have the form {members: [0, 1], weights: [0.5, 0.5]}, not {'members': [-1, 0]}"
        ],
    ),
    (
        "policies.a.reference={shrunk: {seed: 0}}",
        ["policies.a.reference.shrunk: scale must be a number such as 0.6, or soup-norm, but the value is {'seed': 0}"],
    ),
    (
        "policies.a.reference={shrunk: {seed: 5, scale: 0.6}}",
        ["policies.a.reference: there is no seed-5; sft.seeds has seed-0 to seed-1"],
    ),
    (
        "policies.a.reference=./nowhere",
        ["policies.a.reference: there is no folder ", "/nowhere'; give the folder or Hub id of a LoRA adapter"],
    ),
    (
        "policies.a.reference=a b",
        [
            "policies.a.reference: must be seed-N, base, soup, a policy, {soup: …}, {shrunk: …}, {stretched: …}, {ema: …}, or the folder or Hub id (namespace/name) of a LoRA adapter, not 'a b'"
        ],
    ),
    ("policies.soup.reference=base", ["policies.soup: is the name of another model of the run; rename the policy"]),
    (
        "policies.seed-1.reference=base",
        ["policies.seed-1: is the name of another model of the run; rename the policy"],
    ),
    (
        "policies.-x.reference=base",
        [
            "policies: the name '-x' must consist of letters, digits, dots, - and _, start with a letter or digit, and have at most 64 characters"
        ],
    ),
    (
        "name=a/b",
        [
            "name: the name 'a/b' must consist of letters, digits, dots, - and _, start with a letter or digit, and have at most 64 characters"
        ],
    ),
    ("name=2e6", ["name: must be text, not 2000000.0"]),
    (
        "name=..",
        [
            "name: the name '..' must consist of letters, digits, dots, - and _, start with a letter or digit, and have at most 64 characters"
        ],
    ),
    ("sft.seeds=[]", ["sft.seeds: must have at least 1 entry, not []"]),
    ("sft.seeds=[1,1]", ["sft.seeds: [1, 1] has a repeated entry; give each entry only once"]),
    ("sft.seeds=[1.5]", ["sft.seeds[0]: must be a whole number, not 1.5"]),
    ("sft.batch_size=0", ["sft.batch_size: must be at least 1, not 0"]),
    ("sft.gradient_checkpointing=yes", ["sft.gradient_checkpointing: must be true or false, not 'yes'"]),
    ("ppo.kl_estimator=k4", ["ppo.kl_estimator: must be k1, k2, k3, abs or full, not 'k4'"]),
    (
        "ppo.kl_control=adaptiv",
        ["ppo.kl_control: must be fixed or adaptive, not 'adaptiv'; did you mean adaptive?"],
    ),
    ("adapter.target_modules=3", ["adapter.target_modules: must be text, not 3"]),
    ("soup=3", ["soup: must be a mapping {key: value, …}, not 3"]),
    ("sft=null", ["sft: must be a mapping {key: value, …}, not null"]),
    (
        "landscape.line=[0,0]",
        ["landscape.line: must be 2 different models: positions 0 to 1 of sft.seeds, or names, not [0, 0]"],
    ),
    (
        "landscape.plane=[0,1,2]",
        ["landscape.plane: must be 3 different models: positions 0 to 1 of sft.seeds, or names, not [0, 1, 2]"],
    ),
    ("landscape.prompts=inn", ["landscape.prompts: evaluate.prompts has no 'inn'; its sets are in, out"]),
    ("evaluate.temperature=cat", ["evaluate.temperature: must be category, not 'cat'"]),
    (
        "evaluate.judge={kind: openai, model: x, prompt: fastchat, prompts: /nowhere}",
        ["evaluate.judge.prompts: '/nowhere': no such file; give the path of FastChat's judge_prompts.jsonl"],
    ),
    (
        "evaluate.pairs=[[salsa,pp]]",
        ["evaluate.pairs[0]: 'pp' is not one of seed-0, soup, ppo, salsa; did you mean ppo?"],
    ),
    ("evaluate.pairs=[[salsa]]", ["evaluate.pairs[0]: must be two different names, not ['salsa']"]),
    ("evaluate.models=[seed-9]", ["evaluate.models[0]: there is no seed-9; sft.seeds has seed-0 to seed-1"]),
    (
        "generation.max_new_tokens=1024",
        ["generation.max_new_tokens: 1024 must be less than model.max_length 1024, which includes the prompt"],
    ),
    ("generation.min_new_tokens=500", ["generation.min_new_tokens: 500 must be at most max_new_tokens 128"]),
    (
        "ppo.max_prompt_length=1000",
        [
            "ppo.max_prompt_length: 1000 must be at most 896, which is model.max_length 1024 less generation.max_new_tokens 128"
        ],
    ),
    (
        "data.demonstrations=x.jsonl",
        [
            "data.demonstrations: there is no file or folder '",
            "x.jsonl'; give a .jsonl, .json, .parquet, .csv or .tsv file (also .gz, .bz2, .xz), a folder, hf://datasets/… or a Hub id",
        ],
    ),
    (
        "data.demonstrations=/etc/hostname",
        [
            "data.demonstrations: '/etc/hostname' is no data file; give a .jsonl, .json, .parquet, .csv or .tsv file (also .gz, .bz2, .xz), a folder, hf://datasets/… or a Hub id"
        ],
    ),
    (
        "evaluate.prompts.x=not an id",
        [
            "evaluate.prompts.x: 'not an id' is no file, folder or Hub id; give a .jsonl, .json, .parquet, .csv or .tsv file (also .gz, .bz2, .xz), a folder, hf://datasets/… or a Hub id"
        ],
    ),
    ("model.base=./nowhere", ["model.base: there is no folder ", "/nowhere'; give the folder or Hub id of a model"]),
    (
        "model.chat_template=chatm",
        [
            "model.chat_template: 'chatm' is no file. Use tokenizer (the base's template), the path of a Jinja file, or a bundled template: chatml, plain, zephyr"
        ],
    ),
    (
        "model.chat_template=x.jinja",
        [
            "model.chat_template: ",
            "/x.jinja' is no file. Use tokenizer (the base's template), the path of a Jinja file, or a bundled template: chatml, plain, zephyr",
        ],
    ),
    ("toy=null", ["model.base: is required; add it (or add a `toy` section, which builds a tiny model and toy data)"]),
    ("a", ["--set a: must be key=value, such as ppo.learning_rate=1e-6"]),
    ("=1", ["--set =1: must be key=value with a key such as ppo.learning_rate"]),
    ("sft..x=1", ["--set sft..x=1: must be key=value with a key such as ppo.learning_rate"]),
    ("name.x=1", ["--set name.x=1: name is 'tiny', which has no settings inside; set name itself"]),
    (
        "ppo.seed=[",
        ["--set ppo.seed=[: line 2 is not valid YAML: while parsing a flow node, did not find expected node content"],
    ),
    ("ppo.seed=*a", ["aliases (*) are not allowed"]),
    ("ppo.seed=" + "9" * 5000, ["line 1: a number of 5000 digits is too long"]),
    ("policies.a.reference." + "x." * 5000 + "x=1", ["a key has at most 8 parts, not 5004"]),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[override[:60] for override, _ in REFUSED])
def test_refusals(load, override, words):
    line = said(load, *(override.split(" & ")))
    for word in words:
        assert word in line


def test_the_fields_of_pefts_configuration():
    """Each is a key of `adapter`, or one that a recipe is known not to take: none is mistaken for a misspelt one."""
    from peft import LoraConfig, PeftConfig

    ours = {field.name for field in dataclasses.fields(Adapter)}
    common = {field.name for field in dataclasses.fields(PeftConfig)} - {"task_type"}
    assert {field.name for field in dataclasses.fields(LoraConfig)} - ours - common == set(UNSUPPORTED_LORA_FIELDS)


def test_one_seed_that_is_taken_needs_no_brackets(load, tmp_path):
    """In a file and by --set; a folder's path is made absolute as in a list."""
    for taken, path in (("org/seed", "org/seed"), ("./mine/seed", str(tmp_path / "mine" / "seed"))):
        if taken[0] == ".":
            (tmp_path / "mine" / "seed").mkdir(parents=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (tmp_path / "mine" / "seed" / name).write_text("{}")
        for found in (load(f"sft.from={taken}"), load(text=RECIPE + f"sft: {{from: {taken}}}\n")):
            assert (found.recipe.sft.from_, found.recipe.sft.seeds, found.recipe.soup.members) == ([path], [0], [0])
    assert said(load, "sft.from=3") == "--set: sft.from: must be a list, not 3; write [3]"


def test_the_layer_that_said_it_is_named(load):
    assert said(load, text=RECIPE + "ppo: {learning_rate: fast}\n", lora=None).startswith(
        "tiny.yaml: line 7: ppo.learning_rate: must be a number, not 'fast'"
    )
    assert said(load, text=RECIPE + "lora: {ppo: {learning_rate: fast}}\n").startswith(
        "tiny.yaml: line 7: lora: ppo.learning_rate: must be a number, not 'fast'"
    )
    assert said(load, text=RECIPE + "lora: {ppo: {lr: 1}}\n", lora=None).startswith(
        "tiny.yaml: line 7: lora: ppo.lr: unknown key; did you mean learning_rate?"
    )
    assert said(load, text=RECIPE + "lora: 3\n").startswith("tiny.yaml: lora: must be a mapping of settings, not 3")


def test_what_a_rollout_backend_cannot_do_is_refused(load):
    vllm, server = "ppo.rollout_backend=vllm", "ppo.rollout_options={mode: server}"
    line = said(load, vllm, server, lora="lora")
    assert "ppo.rollout_options.server_base_url: is required with mode server; give the address of `vllm serve`" in line
    address = "ppo.rollout_options={mode: server, server_base_url: http://localhost:8000}"
    assert load(vllm, address, lora="lora").recipe.ppo.rollout_backend == "vllm"
    two = ("num_processes=2", "sft.batch_size=8", "reward.batch_size=8", "ppo.batch_size=8")
    line = said(load, vllm, address, *two, lora="lora")
    assert "ppo.rollout_options.mode: server works with one process only, not with 2; use colocate" in line
    line = said(load, vllm, "generation.temperature=2.5", lora="lora")
    assert "generation.temperature: 2.5 does not work with ppo.rollout_backend vllm, which needs 0.01 to 2" in line
    line = said(load, "ppo.rollout_backend=paged", "generation.min_new_tokens=3", lora="lora")
    assert "generation.min_new_tokens: 3 does not work with ppo.rollout_backend paged, which ignores it" in line
    for accelerate in ("fsdp2", "zero3"):
        line = said(load, *two, f"accelerate={accelerate}", "ppo.micro_batch_tokens=4096", lora=None)
        assert f"ppo.micro_batch_tokens: 4096 does not work with accelerate {accelerate}" in line and "=null" in line
    assert load(*two, "ppo.micro_batch_tokens=4096", lora="lora").recipe.ppo.micro_batch_tokens == 4096


def test_what_adapters_alone_have_is_refused_for_full_weights_and_unknown_presets(load):
    assert load(lora=None).recipe.mode == "full"
    for key, value in (("model.quantization", "nf4"), ("soup.rank", "4"), ("ppo.value", "adapter")):
        line = said(load, f"{key}={value}", lora=None)
        assert f"{key}: {value} needs adapters; add --lora, or set {key}=" in line
        preset = "qlora" if key == "model.quantization" else "lora"
        assert load(f"{key}={value}", lora=preset).recipe.mode == preset
    vllm, adapter = "ppo.rollout_backend=vllm", "ppo.rollout_options={sync: adapter}"
    line = said(load, vllm, adapter, lora=None)
    assert (
        "ppo.rollout_options.sync: adapter needs adapters; add --lora, or set ppo.rollout_options.sync=merged" in line
    )
    line = said(load, vllm, adapter, "adapter.r=513", lora="lora")
    assert "adapter.r: 513 is more than 512, the highest rank that vLLM loads" in line
    assert "rollout_options.sync: merged does not work with model.quantization nf4" in said(load, vllm, lora="qlora")
    for lora in ("lora", "qlora"):
        assert load(vllm, adapter, lora=lora).recipe.ppo.corrects_sampling
    line = said(load, "model.quantization=nf4")
    assert (
        "--lora lora: model.quantization is nf4, as in a qlora run; use --lora qlora, or remove model.quantization"
        in line
    )
    line = said(load, "model.quantization=null", lora="qlora")
    assert (
        "--lora qlora: model.quantization is null, as in a lora run; use --lora lora, or remove model.quantization"
        in line
    )
    assert "--set adapter.r=8: this run uses full weights, without an adapter; add --lora" in said(
        load, "adapter.r=8", lora=None
    )
    assert (
        "offload: frozen has no effect with adapters: references share the base, so there is nothing to offload. Set offload=none"
        in said(load, "offload=frozen")
    )
    assert (
        "precision: master has no effect with adapters: adapters are always trained in float32. Set precision=auto"
        in said(load, "precision=master")
    )
    assert load("offload=frozen", lora=None).recipe.offload == "frozen"
    assert "--lora qlroa: unknown preset" in said(load, lora="qlroa")


def test_recipes_by_name(load, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text(RECIPE)
    real = parsing.bundled_folder
    monkeypatch.setattr(parsing, "bundled_folder", lambda kind: folder if kind == "recipes" else real(kind))
    for name in ("quickstart", "quickstart.yaml"):
        assert load_recipe(name, lora="lora", overrides=[]).path == folder / "quickstart.yaml"
    with pytest.raises(SalsaError, match=r"quickstrat: no such recipe file; did you mean quickstart\?"):
        load_recipe("quickstrat", lora=None, overrides=[])
    for name in ("", "\0", "x" * 5000, "~nobody/x", str(folder), "/dev/null", "nul\udcff"):
        with pytest.raises(SalsaError):
            load_recipe(name, lora=None, overrides=[])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must contain `key: value` lines, but is empty"),
        ("- a", "must contain `key: value` lines, but is a list"),
        ("name: [", "line 2 is not valid YAML: while parsing a flow node, did not find expected node content"),
        ("name: a\nname: b", "line 2: the key 'name' occurs twice"),
        ("a: &x 1", "anchors (&) are not allowed"),
        ("a: *x", "aliases (*) are not allowed"),
        ("a: !!python/object:os.system x", "tags (!) are not allowed"),
        ("a: !!timestamp 2001-01-01", "tags (!) are not allowed"),
        ("1: a", "line 1: the key 1 is not text; quote it"),
        ("? [a]\n: b", "line 1: the key ['a'] is not text; quote it"),
        (
            "a: 1\n---\nb: 2",
            "line 2 is not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: " + "[" * 100_000, "nested deeper than 20"),
        ("a: " + "{a: " * 100, "nested deeper than 20"),
        ("\n".join(" " * depth + "a:" for depth in range(1000)), "nested deeper than 20"),
        (
            "name: a\x07",
            'is not valid YAML: unacceptable character #x0007: control characters are not allowed in "<unicode string>", position 7',
        ),
        ("#" * (MAX_BYTES + 1), "more than 1000000 bytes"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "anchors"),
    ],
)
def test_hostile_yaml(load, text, words):
    line = said(load, text=text)
    assert line.startswith(("tiny.yaml", "/"))
    assert words in line


def test_binary_files(tmp_path):
    path = tmp_path / "x.yaml"
    for raw in (b"\xff\xfe\x00", b"name: \xe9", bytes(range(256))):
        path.write_bytes(raw)
        with pytest.raises(SalsaError, match=r"UTF-8|not YAML"):
            load_recipe(str(path), lora=None, overrides=[])


def rows(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_columns(load, tmp_path):
    wrong = rows(tmp_path / "wrong.jsonl", {"text": "a", "label": 1})
    for key, expected in (
        ("demonstrations", "messages, conversations, prompt and completion or instruction and output"),
        ("preferences", "chosen and rejected"),
        ("prompts", "prompt, messages, conversations, instruction, question or turns"),
    ):
        line = said(load, f"data.{key}={wrong}")
        assert line.startswith(f"--set: data.{key}: 'wrong.jsonl' has the columns text, label; it needs {expected}")
    for content, words in (
        ("", "'wrong.jsonl' has no rows"),
        ("[1]\n", "the first row of 'wrong.jsonl' must be a JSON object, not [1]"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
    ):
        (tmp_path / "wrong.jsonl").write_text(content)
        assert words in said(load, f"data.prompts={wrong}")
    rows(tmp_path / "p.jsonl", *[{"turns": ["a"]}] * 8)
    recipe = load("data.prompts=p.jsonl", "evaluate.prompts.mine=p.jsonl", "evaluate.prompts.mine.limit=3").recipe
    assert recipe.data.prompts is not None
    assert recipe.data.prompts.path == str(tmp_path / "p.jsonl")
    assert recipe.evaluate.prompts["mine"].limit == 3


def test_paths_are_taken_from_the_recipes_folder_or_for_set_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    for folder in ("there", "here"):
        rows(tmp_path / folder / "d.jsonl", *[{"messages": []}] * 8)
        (tmp_path / folder / "base").mkdir()
        (tmp_path / folder / "base" / "config.json").write_text("{}")
    (tmp_path / "there" / "r.yaml").write_text(
        RECIPE + "data: {demonstrations: {path: d.jsonl, split: 'train[:80%]'}}\nmodel: {base: base}\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe("../there/r.yaml", lora="lora", overrides=[]).recipe
    assert recipe.data.demonstrations.path == str(tmp_path / "there" / "d.jsonl")
    assert recipe.data.demonstrations.split == "train[:80%]"
    assert recipe.model.base == str(tmp_path / "there" / "base")
    recipe = load_recipe(
        "../there/r.yaml", lora="lora", overrides=["data.demonstrations=d.jsonl", "model.base=./base"]
    ).recipe
    assert recipe.data.demonstrations.path == str(tmp_path / "here" / "d.jsonl")
    assert recipe.data.demonstrations.split == "train"
    assert recipe.model.base == str(tmp_path / "here" / "base")
    recipe = load_recipe(
        "../there/r.yaml", lora="lora", overrides=["data.demonstrations.path=d.jsonl", "model.base=org/model"]
    ).recipe
    assert recipe.data.demonstrations.path == str(tmp_path / "here" / "d.jsonl")
    assert recipe.data.demonstrations.split == "train[:80%]"
    assert recipe.model.base == "org/model"
    os.remove(tmp_path / "there" / "base" / "config.json")
    with pytest.raises(SalsaError, match=r"there/base' has no config\.json; give the folder or Hub id of a model"):
        load_recipe("../there/r.yaml", lora="lora", overrides=[])


def test_set_and_layers_replace_and_merge(load):
    text = (
        RECIPE
        + "data: {prompts: org/prompts}\nlora: {policies: {ppo: {reference: {shrunk: {scale: 0.5}}}, salsa: null}}\n"
    )
    loaded = load("data.prompts.limit=5", text=text)
    assert loaded.recipe.data.prompts.path == "org/prompts"
    assert loaded.recipe.data.prompts.limit == 5
    assert list(loaded.recipe.policies) == ["ppo"]
    assert loaded.recipe.policies["ppo"].references("x")[0].weights == [0.5]
    text = RECIPE.replace("reference: soup", "reference: {soup: {members: [0, 1]}}")
    text += "lora: {policies: {salsa: {reference: {shrunk: {scale: 0.5}}}}}\n"
    assert load(text=text).recipe.policies["salsa"].reference == {"shrunk": {"scale": 0.5}}
    dotted = RECIPE + "evaluate: {prompts: {v0.1: org/x}}\n"
    assert load("evaluate.prompts.v0.1.limit=2", text=dotted).recipe.evaluate.prompts["v0.1"].limit == 2
    assert load("policies.salsa.reference.shrunk.scale=0.3", "landscape=null",
                text=RECIPE.replace("reference: soup", "reference: {shrunk: {scale: 1}}")).recipe.landscape is None  # fmt: skip


def test_chat_templates_by_name(load):
    assert Path(load("model.chat_template=chatml").recipe.model.chat_template).is_file()


def test_the_resolved_recipe_loads_to_itself(load, tmp_path):
    loaded = load(
        "name='123'", "description='2e-6'", "ppo.learning_rate=1e-6", "policies.m={reference: [seed-0, base]}"
    )
    (tmp_path / "again.yaml").write_text(dump_yaml(dataclasses.asdict(loaded.recipe)))
    again = load_recipe("again.yaml", lora=None, overrides=[])
    assert again.recipe == loaded.recipe
    assert again.recipe.description == "2e-6"
    (tmp_path / "departures.yaml").write_text(dump_yaml(loaded.data))
    assert load_recipe("departures.yaml", lora=None, overrides=[]).recipe == loaded.recipe


def test_references():
    assert [r.label for r in parse_reference("x", ["seed-0", "base", "soup", "org/adapter"])] == [
        "seed-0",
        "base",
        "soup",
        "adapter",
    ]
    [soup] = parse_reference("x", {"soup": {"members": [0, 2], "weights": [0.25, 0.75]}})
    assert soup.members == ["seed-0", "seed-2"]
    assert soup.weights == [0.25, 0.75]
    assert not soup.soup
    for wrong in (
        None,
        3,
        "",
        {},
        {"sop": {}},
        {"soup": 3},
        {"shrunk": {"scale": True}},
        {"shrunk": {"scale": 10**400}},
    ):
        with pytest.raises(SalsaError, match=r"^x"):
            parse_reference("x", wrong)


def every_key(hint: type = Recipe) -> list[str]:
    return sorted({field.name for field in dataclasses.fields(hint)})


KEYS = st.sampled_from(
    [*every_key(), "learning_rate", "batch_size", "path", "members", "weights", "reference", "lora", "shrunk", "scale"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(10**20, 10**25), st.sampled_from(
        ["seed-0", "seed-99999999999999999999", "soup", "base", "./x", "a/b/c", "~", "~x", "x.jsonl", "\0", "\x7f", "chatml", "all-linear", "1e400"]
    ),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.dictionaries(KEYS, VALUES, max_size=5), toy=st.booleans(), lora=st.sampled_from([None, "lora"]))
def test_a_bad_recipe_is_never_a_trace(tmp_path, data, toy, lora):
    path = tmp_path / "x.yaml"
    path.write_text(
        dump_yaml({"name": "x", **({"toy": {}} if toy else {}), **data}), encoding="utf-8", errors="surrogatepass"
    )
    attempt(str(path), lora, [])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    section=st.sampled_from(["sft", "soup", "ppo", "policies", "policies.ppo", "policies.ppo.reference", "landscape", "evaluate", "model", "data"]),
    key=st.sampled_from(["learning_rate", "weights", "members", "x", "line", "plane", "pairs", "models", "prompts", "soup", "shrunk", "base", "seeds"]),
    value=VALUES,
)  # fmt: skip
def test_a_bad_override_is_never_a_trace(tmp_path, section, key, value):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    attempt(str(path), "lora", [f"{section}.{key}={dump_yaml(value)}"])
    attempt(str(path), "lora", [f"{section}={dump_yaml({key: value})}"])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    raw=st.binary(max_size=60) | st.text(alphabet="abn:{}[]&*!#|>-'\" \n\t?,%@`~0.e\\u", max_size=60).map(str.encode)
)
def test_any_bytes_are_never_a_trace(tmp_path, raw):
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    attempt(str(path), None, [])
    attempt(str(path), None, [raw.decode("utf-8", "surrogateescape")])


def attempt(path: str, lora: str | None, overrides: list[str]) -> None:
    """A recipe, or a SalsaError with a message; nothing else."""
    try:
        assert isinstance(load_recipe(path, lora=lora, overrides=overrides).recipe, Recipe)
    except SalsaError as error:
        said = str(error)
    else:
        said = "a recipe"
    assert said


def test_columns_of_other_files(load, tmp_path):
    """A .json list or objects, a .parquet file; what cannot be read as one is one line too."""
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "wrong.parquet")
    pandas.DataFrame({"prompt": ["a"] * 8}).to_parquet(tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "wrong.json").write_text('[\n  {"text": "a"}]')
    (tmp_path / "good.json").write_text(json.dumps([{"prompt": "a"}] * 8))
    (tmp_path / "cut.json").write_text('[{"prompt": ')
    (tmp_path / "none.json").write_text("[]")
    for file in ("good.json", "good.parquet"):
        assert load(f"data.prompts={file}").recipe.data.prompts.path == str(tmp_path / file)
    for file, expected in (
        ("wrong.json", "has the columns text; it needs"), ("wrong.parquet", "has the columns text; it needs"),
        ("cut.json", "not JSON"), ("cut.parquet", "not parquet"), ("none.json", "no rows"),
    ):  # fmt: skip
        with pytest.raises(SalsaError, match=f"data.prompts: .*{expected}"):
            load(f"data.prompts={file}")


def test_rows_that_fill_no_batch_are_refused_at_once(load, tmp_path):
    """Of local files all rows are counted, less what no seed or reward model trains on; a limit, and files that nothing reads."""
    row = {"messages": [], "prompt": "q", "chosen": "a", "rejected": "b"}
    pandas = pytest.importorskip("pandas")
    rows(tmp_path / "9.jsonl", *[row] * 9)
    (tmp_path / "list.json").write_text(json.dumps([row] * 9, indent=1))
    pandas.DataFrame({key: [value] * 9 for key, value in row.items()}).to_parquet(tmp_path / "9.parquet")
    (tmp_path / "one a line.json").write_text("\n".join(["", *[json.dumps(row)] * 9, ""]))
    for file in ("9.jsonl", "list.json", "9.parquet", "one a line.json"):
        given = [f"data.{kind}={file}" for kind in ("demonstrations", "preferences", "prompts")]
        assert load(*given).recipe.data.prompts.path.endswith(file)
        for more, line in (
            (
                "sft.batch_size=10",
                f"data.demonstrations: {file} has 9 rows, 9 of them for training, which is less than sft.batch_size = 10",
            ),
            (
                "sft.subset=0.5",
                f"{file} has 9 rows, 4 of them for training (sft.subset 0.5), which is less than sft.batch_size = 8; add rows or lower",
            ),
            (
                "reward.batch_size=9",
                f"{file} has 9 rows, 8 of them for training (reward.held_out 0.05), which is less than reward.batch_size = 9",
            ),
            (
                "ppo.batch_size=16",
                f"data.prompts: {file} has 9 rows, 9 of them for training, which is less than ppo.batch_size = 16",
            ),
            (
                "ppo={value: group, batch_size: 40}",
                "less than ppo.batch_size / num_generations = 10; add rows or lower ppo.batch_size",
            ),
            ("data.preferences.limit=8", f"data.preferences: {file} has 8 rows"),
        ):
            assert line in said(load, *given, more), (file, more)
    assert load("data.prompts=9.jsonl", "ppo.batch_size=16", "policies.ppo=null", "policies.salsa=null")
    assert load("data.preferences=9.jsonl", "reward.batch_size=16", "reward.model=org/classifier")


def test_text_pairs_need_a_prompt(load, tmp_path):
    """Chosen and rejected as text don't hold it: seen here, not after the seeds are trained."""
    rows(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "b"})
    with pytest.raises(
        SalsaError,
        match=r"data\.preferences: 'p\.jsonl' has texts in chosen that do not contain the prompt; add a column `prompt`",
    ):
        load("data.preferences=p.jsonl")


def test_adapters_among_the_answering_models(load, tmp_path, monkeypatch):
    """Folders of evaluate.models are made absolute, so that their content counts; a policy's name stays a name."""
    for name in ("sub/a", "salsa"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(
            SalsaError, match=rf"evaluate.models\[0\]: .* has no {name}; give the folder or Hub id of a LoRA adapter"
        ):
            load("evaluate.models=[sub/a]")
        (tmp_path / "sub" / "a" / name).write_text("{}")
    evaluate = load(
        "policies.salsa.reference=soup", "evaluate.models=[sub/a, salsa]", "evaluate.pairs=[[sub/a, salsa]]"
    ).recipe.evaluate
    assert evaluate.models == [str(tmp_path / "sub" / "a"), "salsa"]
    assert evaluate.pairs == [[str(tmp_path / "sub" / "a"), "salsa"]]


def test_max_steps_of_ppo_are_whole_updates(load):
    """A cut update would be in no log."""
    assert load("ppo.max_steps=8").recipe.ppo.max_steps == 8
    with pytest.raises(
        SalsaError,
        match=r"ppo\.max_steps: 6 is not a multiple of 4, the number of optimizer steps in one update \(num_ppo_epochs × num_mini_batches\); set ppo\.max_steps=8",
    ):
        load("ppo.max_steps=6")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "toy.prompts=100",
            "toy.prompts: 100 rows, 100 of them for training, which is less than ppo.batch_size = 128; add rows or lower ppo.batch_size",
        ),
        (
            "toy.demonstrations=40",
            "toy.demonstrations: 40 rows, 20 of them for training (sft.subset 0.5), which is less than sft.batch_size = 32; add rows or lower sft.batch_size",
        ),
        (
            "policies.a25={reference: soups}",
            "policies.a25.reference: must be seed-N, base, soup, a policy, {soup: …}, {shrunk: …}, {stretched: …}, {ema: …}, or the folder or Hub id (namespace/name) of a LoRA adapter, not 'soups'; did you mean soup?",
        ),
    ],
)
def test_what_would_fail_after_minutes_fails_at_once(setting: str, line: str) -> None:
    """Sizes of the embedded world against the batches; a bare word that is no reference."""
    with pytest.raises(SalsaError, match=re.escape(line)):
        load_recipe("quickstart", lora="lora", overrides=[setting])


@pytest.mark.parametrize("lora", ["lora", None])
@pytest.mark.parametrize("missing", [["preferences"], ["demonstrations"], ["prompts"], ["preferences", "prompts"]])
def test_a_dry_run_without_data_that_nothing_reads(tmp_path, monkeypatch, capsys, lora, missing):
    """A reward that is a function needs no preferences, seeds that are taken no demonstrations, DPO no prompts: the plan is printed."""
    from safetensors.numpy import save_file

    from salsa_peft.recipe.__main__ import main as salsa_run

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows(tmp_path / "d.jsonl", *[{"messages": chat}] * 40)
    rows(tmp_path / "p.jsonl", *[{"prompt": f"q{n}", "chosen": "+", "rejected": "-"} for n in range(40)])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": np.zeros(1, dtype="float32")}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "m.py").write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    recipe: dict[str, Any] = {
        "name": "x", "model": {"base": "base", "chat_template": "chatml"}, "sft": {"batch_size": 2}, "reward": {"batch_size": 2}, "ppo": {"batch_size": 2},
        "data": {"demonstrations": "d.jsonl", "preferences": "p.jsonl", "prompts": "p.jsonl"}, "policies": {"one": {"reference": "seed-0"}},
        "dpo": {"batch_size": 2}, "evaluate": {"prompts": {"mine": "p.jsonl"}},
    }  # fmt: skip
    if "demonstrations" in missing:
        recipe["sft"]["from"] = ["me/seed-0", "me/seed-1"]
    if "preferences" in missing:
        recipe["reward"] = "m:f"
    if "prompts" in missing:
        recipe["policies"] = {} if "preferences" in missing else {"one": {"reference": "seed-0", "algorithm": "dpo"}}
    for kind in missing:
        del recipe["data"][kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    assert salsa_run(["x.yaml", *(["--lora"] if lora else []), "--dry-run"]) == 0
    assert "sft" in capsys.readouterr().out

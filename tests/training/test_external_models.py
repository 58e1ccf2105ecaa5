"""Seeds, references and rewards of PEFT, unsloth, axolotl, LLaMA-Factory and TRL: used as plain PEFT reads them, or refused by the plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import third_party_folders as elsewhere
import torch
from paper_models import make_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_recipe import read, unit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Adapter
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.bases import require_same_family
from salsa_peft.models.architectures import checks as base_checks
from salsa_peft.models.rewards import reward as rewards
from salsa_peft.recipe.__main__ import main as salsa_run
from salsa_peft.soup.checkpoints.read import read_checkpoint
from salsa_peft.training import external_models, sft
from salsa_peft.training.references import as_references
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import base_fingerprint, fingerprint

IDS = torch.tensor([[3, 9, 22, 4, 17, 5, 8, 30], [6, 2, 11, 40, 7, 7, 19, 12]])
RECIPE = """name: small
threads: 1
toy: {pretrain_steps: 1, pretrain_examples: 64, demonstrations: 64, preferences: 128, prompts: 32, eval_prompts: 4, hidden_size: 32}
model: {max_length: 32}
sft: {subset: 0.5, max_steps: 2, batch_size: 32}
reward: {batch_size: 16, max_steps: 2, held_out: 0.1}
generation: {max_new_tokens: 6, batch_size: 256}
ppo: {batch_size: 16, num_mini_batches: 1, num_ppo_epochs: 1, max_steps: 1, kl_control: fixed, kl_coef: 0.3, shown_every: null}
dpo: {max_steps: 1, batch_size: 4}
lora: {adapter: {r: 4, lora_alpha: 8}}
"""
MODULE = "def longer(completions, **_):\n    return [float(len(str(one))) for one in completions]\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def salsa(base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`salsa run` of the small recipe on the base: (settings, words) → exit code and what it said."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def run(given: dict[str, Any], *words: str) -> tuple[int, str]:
        given = {"model.base": str(base), "policies": {"salsa": {"reference": "soup"}}, **given}
        sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        capsys.readouterr()
        code = salsa_run([str(tmp_path / "small.yaml"), *sets, "--output-dir", str(tmp_path / "run"), *words])
        said = capsys.readouterr()
        return code, said.err

    return run


def plan(salsa: Callable[..., tuple[int, str]], given: dict[str, Any], *words: str) -> str:
    """What --dry-run refuses it with, in one line."""
    code, said = salsa(given, "--dry-run", *words)
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line]
    return line


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("maker", elsewhere.MAKERS)
def test_a_reference_is_plain_pefts(maker: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    """Beside another adapter on a shared base, whatever files lie beside it; that its base cannot be checked is said once."""
    folder = elsewhere.adapter_by(maker, base, tmp_path / "theirs", 1, scale=0.3)
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    (frozen,) = as_references(shared, [folder])
    assert capsys.readouterr().err.count("no fingerprint.json") == 1
    with adapters.active(shared, frozen.adapter):
        found = logits(shared)
    expected = logits(PeftModel.from_pretrained(loaded(base), folder))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - logits(loaded(base))).abs().max() > 0.01


def take(recipe_file: Path, base: Path, folder: Path, out: Path, *, lora: str | None = "lora") -> Path:
    """The sft stage of `sft: {from: [folder]}`."""
    from salsa_peft.config.job import Job, Unit
    from salsa_peft.training import sft

    template = recipe_file.parent / "toy.jinja"
    template.write_text(str(make_tokenizer().chat_template))
    given = {
        "model.base": str(base),
        "sft.from": [str(folder)],
        "reward": "some/reward",
        "model.chat_template": str(template),
        "landscape": None,
    }
    resolved = load_recipe(
        str(recipe_file), lora=lora, overrides=[f"{key}={json.dumps(value)}" for key, value in given.items()]
    ).recipe
    out.mkdir()
    unit = Unit(stage="sft", name="seed-0", run="salsa_peft.training.sft:run")
    sft.run(Job(recipe=resolved, unit=unit, folder=out, inputs={}, recipe_yaml=""))
    return out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


@pytest.mark.parametrize("maker", elsewhere.MAKERS)
def test_a_seed_that_is_taken_is_one_of_this_run(
    maker: str, base: Path, small: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its factors unchanged, this run's base by name and fingerprint, and nothing else of the folder."""
    folder = elsewhere.adapter_by(maker, base, tmp_path / "theirs", 1)
    out = take(small, base, folder, tmp_path / "out")
    ours, theirs = (load_file(path / adapters.WEIGHTS) for path in (out, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read(out / adapters.CONFIG)["base_model_name_or_path"] == str(base)
    told = read(out / "fingerprint.json")
    assert told["base"] == base_fingerprint(base) and told["checked"] is False
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".jinja"} and not (
        out / "config.json"
    ).exists()
    assert not (out / "all_results.json").exists() and not (out / "trainer_state.json").exists()
    said = capsys.readouterr().err
    assert said.count("has no fingerprint.json, so its base cannot be checked") == 1
    assert ("It names unsloth/tiny-bnb-4bit as its base" in said) == (maker == "unsloth")
    assert ("the chat template of this folder's tokenizer differs" in said) == (maker == "trl")


def test_a_base_named_by_a_relative_path_is_no_other(
    base: Path, small: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    folder = elsewhere.adapter_by("peft", base, tmp_path / "theirs", 1)
    for named, other in ((f"./{base.name}/", False), (f"./{base.name}-other", True)):
        config = read(folder / adapters.CONFIG) | {"base_model_name_or_path": named}
        (folder / adapters.CONFIG).write_text(json.dumps(config))
        take(small, base, folder, tmp_path / f"out-{other}")
        assert ("It names ./base-other as its base" in capsys.readouterr().err) == other


@pytest.mark.parametrize("maker", ["peft", "axolotl", "llama-factory", "trl"])
def test_a_checkpoint_that_is_taken(maker: str, base: Path, small: Path, tmp_path: Path) -> None:
    """Weights, configuration, tokenizer; no states, no logs, no checkpoints inside."""
    folder = elsewhere.checkpoint_by(maker, base, tmp_path / "theirs", 1)
    out = take(small, base, folder, tmp_path / "out", lora=None)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "fingerprint.json", "generation_config.json", "metrics.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("wrapper", ["compiled", "named", "parallel"])
def test_names_of_wrappers_are_no_part_of_a_seed(wrapper: str, base: Path, small: Path, tmp_path: Path) -> None:
    """Saved from a compiled model, from its own state dict, from under DistributedDataParallel: as seed and as reference."""
    change: dict[str, Callable[[str], str]] = {
        "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        "named": lambda name: name.replace(".weight", ".default.weight"),
        "parallel": lambda name: f"module.{name}",
    }
    plain = elsewhere.adapter(base, tmp_path / "plain", 1, scale=0.3)
    folder = elsewhere.renamed(elsewhere.adapter(base, tmp_path / "theirs", 1, scale=0.3), change[wrapper])
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    (frozen,) = as_references(shared, [folder])
    with adapters.active(shared, frozen.adapter):
        torch.testing.assert_close(
            logits(shared), logits(PeftModel.from_pretrained(loaded(base), plain)), atol=1e-5, rtol=0
        )
    taken = load_file(take(small, base, folder, tmp_path / "out") / adapters.WEIGHTS)
    expected = load_file(plain / adapters.WEIGHTS)
    assert taken.keys() == expected.keys() and all(torch.equal(taken[name], expected[name]) for name in expected)


def test_the_landscape_of_adapters_that_name_their_base_differently(base: Path, tmp_path: Path, capsys: Any) -> None:
    """--same-base says that it is one; so does a soup that goes by a measure."""
    from salsa_peft.cli.landscape import main as landscape
    from salsa_peft.soup.__main__ import main as soup

    members = [str(elsewhere.adapter_by(maker, base, tmp_path / maker, 1)) for maker in ("unsloth", "trl")]
    chats = [{"role": "user", "content": "name"}, {"role": "assistant", "content": "owl"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chats}) + "\n")
    measure = ["--measure", "sft_loss", "--data", str(tmp_path / "chats.jsonl"), "--base", str(base)]
    given = [str(tmp_path / "out"), *members, *measure]
    assert landscape([*given, "--alphas", "0,1"]) == 2 and "--same-base" in capsys.readouterr().err
    assert landscape([*given, "--alphas", "0,1", "--same-base"]) == 0
    assert soup([str(tmp_path / "soup"), *members, *measure, "--strategy", "greedy", "--same-base"]) == 0


def test_a_checkpoint_of_several_shards(base: Path, small: Path, tmp_path: Path) -> None:
    """Each is copied, and the index; other safetensors files are not."""
    folder = elsewhere.checkpoint(base, tmp_path / "theirs", 1, shards="100KB")
    save_file({"v_head.summary.weight": torch.ones(1, 64)}, folder / "value_head.safetensors")
    out = take(small, base, folder, tmp_path / "out", lora=None)
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1 and {path.name for path in out.glob("*.safetensors")} == shards
    expected, found = (loaded(path).state_dict() for path in (folder, out))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tokenizer_of_other_ids_is_refused(base: Path, small: Path, tmp_path: Path) -> None:
    folder = elsewhere.adapter_by("axolotl", base, tmp_path / "theirs", 1)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content))
    with pytest.raises(
        SalsaError, match=r"theirs: the token .* so the weights would read other text than they were trained on"
    ):
        take(small, base, folder, tmp_path / "out")


def test_embeddings_that_peft_saved_by_itself_are_the_bases(
    base: Path, small: Path, tmp_path: Path, salsa: Any
) -> None:
    """LoRA on embeddings: PEFT saves the frozen embeddings too. The same values are left out, others are refused."""
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1, target_modules=["q_proj", "embed_tokens"])
    saved = "base_model.model.model.embed_tokens.base_layer.weight"
    assert saved in load_file(folder / adapters.WEIGHTS)
    out = take(small, base, folder, tmp_path / "out")
    assert saved not in load_file(out / adapters.WEIGHTS)
    shared = adapters.attach(loaded(base), out, "policy")
    before = logits_of_base(shared)
    with adapters.active(shared, "policy"):
        torch.testing.assert_close(
            logits(shared), logits(PeftModel.from_pretrained(loaded(base), folder)), atol=1e-5, rtol=0
        )
    tensors = load_file(folder / adapters.WEIGHTS)
    tensors[saved][3] += 1
    save_file(tensors, folder / adapters.WEIGHTS, metadata={"format": "pt"})
    line = "embed_tokens.base_layer.weight, a trained copy of a module of the base"
    assert line in plan(salsa, {"sft.from": [str(folder)]}, "--lora")
    with pytest.raises(SalsaError, match=line):
        as_references(shared, [folder])
    assert torch.equal(before, logits_of_base(shared))


def logits_of_base(model: Any) -> torch.Tensor:
    with adapters.active(model, None):
        return logits(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head.weight, a trained copy of a module of the base"),
    "dora": (
        {"use_dora": True},
        "use_dora: True, and the average of DoRA adapters is not an adapter; merge the adapter into its base",
    ),
    "bias": ({"bias": "all"}, "bias: 'all', which changes the base that all roles share"),
    "tokens": (
        {"trainable_token_indices": [5]},
        "trainable_token_indices: [5], which changes the base that all roles share",
    ),
    "reward": ({"task_type": "SEQ_CLS"}, "is a reward adapter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_seed_that_a_shared_base_cannot_switch_is_refused_by_the_plan(
    kind: str, base: Path, tmp_path: Path, salsa: Any
) -> None:
    options, line = REFUSED[kind]
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1, **options)
    said = plan(salsa, {"sft.from": [None, str(folder)]}, "--lora")
    assert "sft.from[1]: " in said and line in said
    assert "without --lora" in said or kind == "reward"


def named(key: str, path: Path) -> Any:
    """A folder as a seed, or as a reference."""
    return [None, str(path)] if key == "sft.from" else str(path)


def test_other_kinds_are_refused_by_the_plan(base: Path, tmp_path: Path, salsa: Any) -> None:
    """An adapter for full weights, a checkpoint for adapters, pickles, other sizes, other tuners, as seed and as reference."""
    lora = elsewhere.adapter_by("axolotl", base, tmp_path / "lora", 1)
    full = elsewhere.checkpoint(base, tmp_path / "full", 1)
    for given in ("sft.from", "policies.salsa.reference"):
        assert "lora is a LoRA adapter, but this run uses full weights. Add --lora" in plan(
            salsa, {given: named(given, lora)}
        )
        assert "full is a full checkpoint, but this run uses LoRA adapters. Run without --lora" in plan(
            salsa, {given: named(given, full)}, "--lora"
        )
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    assert "adapter_model.bin, a pickle, which is never loaded" in plan(salsa, {"sft.from": [str(lora)]}, "--lora")
    other = make_base("gemma", tmp_path / "other")
    wide = elsewhere.adapter(other, tmp_path / "wide", 1)
    said = plan(salsa, {"policies.salsa.reference": str(wide)}, "--lora")
    assert (
        "policies.salsa.reference: " in said
        and "with a delta of 128 × 64" in said
        and "so the adapter was trained on another base" in said
    )
    assert "has model_type gemma, but the recipe's base has llama" in plan(salsa, {"sft.from": [str(other)]})
    elsewhere.edit(full / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "has quantised weights (bitsandbytes)" in plan(salsa, {"sft.from": [str(full)]})
    elsewhere.edit(wide / "adapter_config.json", peft_type="IA3")
    assert "has peft_type IA3. Use a LoRA adapter" in plan(salsa, {"policies.salsa.reference": str(wide)}, "--lora")


def test_a_dora_adapter_can_be_a_reference(base: Path, tmp_path: Path, salsa: Any) -> None:
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1, use_dora=True)
    assert salsa({"policies.salsa.reference": str(folder)}, "--lora", "--dry-run")[0] == 0


def test_what_lies_beside_an_adapter_is_not_read(base: Path, tmp_path: Path) -> None:
    """Optimizers and checkpoints of its training are no part of what a result depends on."""
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1)
    before = fingerprint(folder)
    elsewhere.axolotl(folder, base)
    (folder / "optimizer.pt").write_bytes(b"gigabytes")
    assert fingerprint(folder) == before
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder / adapters.WEIGHTS, metadata={"format": "pt"}
    )
    assert fingerprint(folder) != before


@torch.no_grad()
def plain_scores(model: Any) -> torch.Tensor:
    """Of sequences without padding, by the classifier itself."""
    model.config.pad_token_id = None
    return torch.cat([model(input_ids=row[None]).logits[:, 0] for row in IDS])


def responses() -> Any:
    from salsa_peft.models.responses import pad_responses

    tokenizer = make_tokenizer()
    prompts, answers = [row[:3].tolist() for row in IDS], [row[3:].tolist() for row in IDS]
    return pad_responses(prompts, answers, tokenizer.pad_token_id, [tokenizer.eos_token_id], torch.device("cpu"))


REWARDS: dict[str, Callable[[Path], Path]] = {
    "peft": lambda folder: folder,
    "state dict": lambda folder: elsewhere.renamed(
        folder, lambda name: name.replace("score.", "score.modules_to_save.default.")
    ),
    "older": lambda folder: elsewhere.renamed(folder, lambda name: name.replace("score.", "score.modules_to_save.")),
}


@pytest.mark.parametrize("naming", REWARDS)
def test_a_reward_adapter_scores_as_plain_peft(naming: str, base: Path, tmp_path: Path) -> None:
    """Whatever its score head is called, on a base that it shares with the policy."""
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1, scale=0.3, task_type="SEQ_CLS")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    expected = plain_scores(PeftModel.from_pretrained(classifier, folder).eval())
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    reward = rewards.as_reward(str(REWARDS[naming](folder)), shared, make_tokenizer())
    torch.testing.assert_close(reward(responses(), [{}, {}]), expected, atol=1e-5, rtol=0)


def test_trls_reward_trainer_with_an_adapter(base: Path, tmp_path: Path) -> None:
    """Trained one step and saved by TRL: the score of the same tokens is the trainer's own."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    def chat(*said: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]

    rows = [{"chosen": chat("name three birds", "owl"), "rejected": chat("name three birds", "no")}] * 4
    trainer: Any = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1),
        args=RewardConfig(
            str(tmp_path / "rm"),
            max_steps=1,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            learning_rate=0.1,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    expected = plain_scores(trainer.model.eval())
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    reward = rewards.as_reward(str(tmp_path / "rm"), shared, make_tokenizer())
    torch.testing.assert_close(reward(responses(), [{}, {}]), expected, atol=1e-5, rtol=0)


def test_llama_factorys_reward_model(base: Path, tmp_path: Path) -> None:
    """A causal model's adapter, and TRL's value head with its bias in a file of its own."""
    folder = elsewhere.adapter_by("llama-factory", base, tmp_path / "theirs", 1, scale=0.3)
    head = {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.tensor([0.7])}
    save_file(head, folder / "value_head.safetensors")
    plain = PeftModel.from_pretrained(loaded(base), folder).eval()
    with torch.no_grad():
        states = plain(input_ids=IDS, output_hidden_states=True).hidden_states[-1][:, -1]
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    found = rewards.as_reward(str(folder), shared, make_tokenizer())(responses(), [{}, {}])
    torch.testing.assert_close(found, (states @ head["v_head.summary.weight"].T + 0.7)[:, 0], atol=1e-5, rtol=0)


def test_rewards_that_score_nothing_are_refused_by_the_plan(base: Path, tmp_path: Path, salsa: Any) -> None:
    adapter = elsewhere.adapter(base, tmp_path / "plain", 1)
    assert "must have one score head, but has 0" in plan(salsa, {"reward": str(adapter)}, "--lora")
    assert "uses full weights" not in plan(salsa, {"reward": str(adapter)}, "--lora")
    two = elsewhere.adapter(base, tmp_path / "two", 1, task_type="SEQ_CLS", num_labels=2)
    assert "a score head with 2 labels" in plan(salsa, {"reward": str(two)}, "--lora")
    save_file({"weight": torch.ones(1, 64)}, adapter / "value_head.safetensors")
    assert "so it is PPO's value head" in plan(salsa, {"reward": str(adapter)}, "--lora")
    for words in ((), ("--lora",)):
        several = elsewhere.classifier(base, tmp_path / f"several{len(words)}", 1, labels=2)
        assert "is a classifier with 2 labels, but a reward is one number" in plan(
            salsa, {"reward": str(several)}, *words
        )
        causal = elsewhere.checkpoint(base, tmp_path / f"causal{len(words)}", 1)
        assert "is a LlamaForCausalLM, which Transformers does not load as a sequence classifier" in plan(
            salsa, {"reward": str(causal)}, *words
        )


def test_what_the_hub_holds_is_refused_before_a_seed_is_trained(
    base: Path, tmp_path: Path, salsa: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward of two labels, an adapter that is no LoRA, ids out of reach; a stage that does not read them fetches nothing."""
    import huggingface_hub

    hub = {
        "me/several": elsewhere.classifier(base, tmp_path / "several", 1, labels=2),
        "me/wide": elsewhere.adapter(make_base("gemma", tmp_path / "other"), tmp_path / "wide", 1),
        "me/lora": elsewhere.adapter(base, tmp_path / "lora", 1),
    }
    real, asked = huggingface_hub.snapshot_download, []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(hub[name]) if name in hub else real(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for given, words, line in (
        ({"reward": "me/several"}, ("--lora",), "is a classifier with 2 labels, but a reward is one number"),
        ({"reward": "me/several"}, (), "is a classifier with 2 labels, but a reward is one number"),
        (
            {"reward": "me/gone"},
            (),
            "reward.model: https://huggingface.co/me/gone: not in the local cache, and the Hub",
        ),
        ({"policies.salsa.reference": "me/wide"}, ("--lora",), "so the adapter was trained on another base"),
        ({"policies.salsa.reference": "me/lora"}, (), "me/lora has no config.json"),
    ):
        assert salsa(given, "--dry-run", *words)[0] == 0 and not asked, "a plan fetches nothing"
        code, said = salsa(given, *words)
        assert code == 2 and line in said and not (tmp_path / "run").exists(), said
        assert ("adapter_model.safetensors" in asked[0][1]) == bool(words)
        asked.clear()
    load = load_recipe(str(tmp_path / "small.yaml"), lora="lora", overrides=["reward=me/gone"]).recipe
    external_models.check(load, {"sft", "soup"}, hub=True)
    assert not asked


@pytest.mark.parametrize("maker", elsewhere.MAKERS)
def test_use_reference_of_another_tools_adapter(maker: str, base: Path, tmp_path: Path) -> None:
    """DPO's reference log-probs are plain PEFT's."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from salsa_peft import use_reference

    folder = elsewhere.adapter_by(maker, base, tmp_path / "theirs", 1, scale=0.3)
    policy = PeftModel.from_pretrained(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), is_trainable=True)
    trainer: Any = DPOTrainer(
        policy,
        args=DPOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=1, report_to="none", use_cpu=True, max_steps=1
        ),
        train_dataset=Dataset.from_list([{"prompt": "name", "chosen": " owl", "rejected": " no"}] * 2),
        processing_class=make_tokenizer(),
    )
    (frozen,) = use_reference(trainer, str(folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    with adapters.active(model, frozen.adapter):
        found = logits(model.eval())
    torch.testing.assert_close(found, logits(PeftModel.from_pretrained(loaded(base), folder)), atol=1e-5, rtol=0)
    trainer.train()


def both_kinds(maker: str, base: Path, out: Path, seed: int, lora: bool) -> Path:
    return elsewhere.adapter_by(maker, base, out, seed) if lora else elsewhere.checkpoint_by(maker, base, out, seed)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--lora",), ()], ids=["lora", "full"])
def test_a_whole_run_of_seeds_from_elsewhere(
    words: tuple[str, ...], inline: None, base: Path, tmp_path: Path, salsa: Any
) -> None:
    """One seed of each tool: soup, references, rewards, landscape, evaluation, report; the soup is the mean of what PEFT merges."""
    folders = [
        both_kinds(maker, base, tmp_path / maker, seed, bool(words)) for seed, maker in enumerate(elsewhere.MAKERS)
    ]
    policies = {
        "salsa": {"reference": "soup"}, "theirs": {"reference": str(folders[2])}, "inner": {"reference": {"soup": {"members": [1, 2, 4]}}},
        "shrunk": {"reference": {"shrunk": {"seed": 1, "scale": 0.6}}}, "dpo": {"algorithm": "dpo", "reference": str(folders[1])},
    }  # fmt: skip
    given = {
        "sft.from": [str(folder) for folder in folders], "soup.members": [0, 1, 2, 3, 4], "policies": policies,
        "reward": f"{tmp_path}/mine:longer", "evaluate.models": ["base", str(folders[3])], "landscape.alphas": [0.0, 1.0],
    }  # fmt: skip
    code, said = salsa(given, *words)
    assert code == 0, said
    soup = unit(tmp_path / "run", "soup")
    merged = [
        (PeftModel.from_pretrained(loaded(base), folder).merge_and_unload() if words else loaded(folder)).state_dict()
        for folder in [*folders, soup]
    ]
    for name, tensor in merged[-1].items():
        mean = torch.stack([one[name].double() for one in merged[:-1]]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-5 if words else 2e-3, rtol=0)
    assert said.count("has no fingerprint.json, so its base cannot be checked") == 5


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--lora",), ()], ids=["lora", "full"])
@pytest.mark.parametrize("taken", [False, True], ids=["trained", "taken"])
def test_one_seed_alone_is_a_run(
    words: tuple[str, ...], taken: bool, inline: None, base: Path, tmp_path: Path, salsa: Any
) -> None:
    """With no soup section: the soup is the seed, there is no line between two; with a reward stage, and every kind of reference."""
    policies = {
        "ppo": {"reference": "seed-0"}, "salsa": {"reference": "soup"}, "plain": {"reference": "base"},
        "shrunk": {"reference": {"shrunk": {"seed": 0, "scale": 0.6}}},
    }  # fmt: skip
    given: dict[str, Any] = {"policies": policies, "evaluate.models": ["base"]}
    given |= (
        {"sft.from": [str(both_kinds("unsloth", base, tmp_path / "theirs", 1, bool(words)))]}
        if taken
        else {"sft.seeds": [3]}
    )
    code, said = salsa(given, *words)
    assert code == 0, said
    run = tmp_path / "run"
    assert [member["weight"] for member in read(unit(run, "soup") / "soup.json")["members"]] == [1.0]
    assert not (run / "stages" / "landscape").exists()
    scores = {
        name: told["scores"]
        for name, told in read(unit(run, "evaluate") / "evaluation.json")["datasets"]["in"]["models"].items()
    }
    assert scores["soup"] == scores["seed-0"] and {*scores} == {"seed-0", "soup", "base", *policies}


def test_one_seed_has_a_soup_of_one_by_default(small: Path) -> None:
    """Unless the recipe says something else, which is then looked at."""
    made = load_recipe(str(small), lora="lora", overrides=["sft.seeds=[7]"]).recipe
    assert made.soup.members == [0] and made.landscape is not None and made.landscape.line is None
    assert load_recipe(str(small), lora="lora", overrides=["sft.from=[a/b]"]).recipe.soup.members == [0]
    assert load_recipe(str(small), lora="lora", overrides=[]).recipe.soup.members == [0, 1]
    with pytest.raises(SalsaError, match=r"soup.members: there is no seed-1"):
        load_recipe(str(small), lora="lora", overrides=["sft.seeds=[7]", "soup.members=[0, 1]"])


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "checkpoint"])
def test_a_soup_of_one_member(lora: bool, base: Path, tmp_path: Path) -> None:
    """`salsa soup OUT A` is A."""
    from salsa_peft.soup.__main__ import main

    folder = both_kinds("trl", base, tmp_path / "one", 1, lora)
    assert main([str(tmp_path / "soup"), str(folder)]) == 0
    given, made = (
        (PeftModel.from_pretrained(loaded(base), path).merge_and_unload() if lora else loaded(path)).state_dict()
        for path in (folder, tmp_path / "soup")
    )
    for name, tensor in given.items():
        torch.testing.assert_close(made[name], tensor, atol=1e-6, rtol=0)


def naming(folder: Path, base: str) -> Path:
    """The adapter in `folder`, as if it had been trained on `base`."""
    content = read(folder / adapters.CONFIG) | {"base_model_name_or_path": base}
    (folder / adapters.CONFIG).write_text(json.dumps(content))
    return folder


OTHER_FAMILY: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "mistral"}, "a mistral model, but the recipe's base {base} is a llama model. Use {other} as the base"),
    "size": ({"num_hidden_layers": 7}, "which has num_hidden_layers 7, but the recipe's base {base} has num_hidden_layers 2. Use {other} as the base"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["sft.from", "policies.salsa.reference", "evaluate.models", "reward.model"])
@pytest.mark.parametrize("kind", OTHER_FAMILY)
def test_an_adapter_of_another_family_is_refused_though_its_shapes_fit(
    kind: str, key: str, base: Path, tmp_path: Path, salsa: Any
) -> None:
    """As those of Mistral-7B and Llama-3-8B do. The folder of its base tells them apart."""
    changes, line = OTHER_FAMILY[kind]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(read(base / "config.json") | changes))
    options: dict[str, Any] = {"task_type": "SEQ_CLS"} if key == "reward.model" else {}
    folder = naming(elsewhere.adapter(base, tmp_path / "theirs", 1, **options), str(other))
    value = [str(folder)] if key == "evaluate.models" else named(key, folder)
    said = plan(salsa, {key: value}, "--lora")
    assert f"{folder} was trained on {other}, {line.format(base=base, other=other)}" in said
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    shared.get_base_model().name_or_path = str(base)
    with pytest.raises(SalsaError, match="was trained on"):
        as_references(shared, [folder])
    (folder / "fingerprint.json").write_text(json.dumps({"base": base_fingerprint(base)}))
    as_references(shared, [folder])  # its fingerprint says that the name is wrong


def test_one_architecture_by_two_configurations_is_one_family(base: Path, tmp_path: Path) -> None:
    """A multimodal model and its language model, a file of version 4 without its text part's own type, other embeddings."""
    text = {"model_type": "gemma3_text", "hidden_size": 8, "vocab_size": 10}
    pairs = [
        (text, {"model_type": "gemma3", "text_config": text | {"vocab_size": 12}}),
        (text | {"model_type": "qwen2_5_vl"}, {"model_type": "qwen2_5_vl", "text_config": text | {"model_type": "qwen2_5_vl_text"}}),
        ({"hidden_size": 8}, text),
    ]  # fmt: skip
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1)
    other = tmp_path / "other"
    other.mkdir()
    naming(folder, str(other))
    for one, two in pairs:
        for own, used in ((one, two), (two, one)):
            (other / "config.json").write_text(json.dumps(own))
            assert require_same_family(folder, used, "it") is None
    (other / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": "llama"}}))
    with pytest.raises(SalsaError, match="a llama model, but it is a mistral model"):
        require_same_family(folder, {"model_type": "llava", "text_config": {"model_type": "mistral"}}, "it")
    assert require_same_family(naming(folder, "someone/of-the-hub"), text, "it") == "someone/of-the-hub"
    with pytest.raises(SalsaError, match=r"mistralai/Mistral-7B-v0\.1, a mistral model, but it is a llama model"):
        require_same_family(naming(folder, "mistralai/Mistral-7B-v0.1"), {"model_type": "llama"}, "it")


def test_a_reference_whose_base_is_not_at_hand_is_said_with_both_names(base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = naming(elsewhere.adapter(base, tmp_path / "theirs", 1), "someone/of-the-hub")
    shared = adapters.attach(loaded(base), elsewhere.adapter(base, tmp_path / "ours", 2), "policy")
    shared.get_base_model().name_or_path = str(base)
    as_references(shared, [folder])
    assert f"the adapter names the base someone/of-the-hub, but is used on {base}" in capsys.readouterr().err


def keyed(folder: Path, change: Callable[[str], str]) -> Path:
    """The adapter in `folder`, its tensors under other names."""
    return elsewhere.renamed(folder, change)


@pytest.mark.parametrize("kind", ["AutoModel", "twice"])
def test_names_that_no_module_of_the_base_has_are_refused_by_the_plan(
    kind: str, base: Path, tmp_path: Path, salsa: Any
) -> None:
    """Saved from AutoModel instead of the language model, or with PEFT's prefix twice."""
    change: dict[str, Callable[[str], str]] = {
        "AutoModel": lambda name: name.replace("base_model.model.model.", "base_model.model."),
        "twice": lambda name: f"base_model.model.{name}",
    }
    folder = keyed(elsewhere.adapter(base, tmp_path / "theirs", 1), change[kind])
    said = plan(salsa, {"sft.from": [None, str(folder)]}, "--lora")
    assert f"sft.from[1]: {folder} adapts " in said and "has no such module" in said


def test_adapters_on_other_parameters_are_refused_by_the_plan(base: Path, tmp_path: Path, salsa: Any) -> None:
    """PEFT can't hold them side by side, which PPO would say."""
    folders = [elsewhere.adapter(base, tmp_path / f"theirs-{n}", n) for n in (1, 2)]
    for folder, parameters in zip(folders, (["mlp.gate"], ["mlp.up"]), strict=True):
        content = read(folder / adapters.CONFIG) | {"target_parameters": parameters}
        (folder / adapters.CONFIG).write_text(json.dumps(content))
    said = plan(salsa, {"sft.from": [str(folders[0]), None], "policies.salsa.reference": str(folders[1])}, "--lora")
    assert f"policies.salsa.reference: {folders[1]} has target_parameters mlp.up, and sft.from[0]" in said


@pytest.mark.parametrize("kind", ["path", "copy"])
@pytest.mark.parametrize("lora", ["--lora", None])
def test_a_seed_that_is_given_twice_is_said(
    kind: str, lora: str | None, base: Path, small: Path, tmp_path: Path, capsys: Any
) -> None:
    """By its path, or by its bytes under another."""
    make = elsewhere.checkpoint if lora is None else elsewhere.adapter
    first, third = make(base, tmp_path / "one", 1), make(base, tmp_path / "three", 3)
    second = first if kind == "path" else make(base, tmp_path / "two", 1)

    def found(*seeds: Path) -> str:
        given = [
            f"sft.from={json.dumps(list(map(str, seeds)))}",
            f"sft.seeds={list(range(len(seeds)))}",
            f"model.base={base}",
            "model.chat_template=chatml",
        ]
        loaded_recipe = load_recipe(str(small), lora=None if lora is None else "lora", overrides=given)
        external_models.check(loaded_recipe.recipe, {"sft"})
        return str(capsys.readouterr().err)

    assert f"sft.from: seeds 0 and 1 have the same weights ({second})" in found(first, second, third)
    assert "same weights" not in found(first, third)


def test_hub_ids_that_are_not_at_hand_are_told_before_a_run_begins(
    base: Path, small: Path, tmp_path: Path, capsys: Any
) -> None:
    """With HF_HUB_OFFLINE; --dry-run plans without them."""
    out = ["--output-dir", str(tmp_path / "out")]
    for key, value in (("model.base", "some/base"), ("sft.from", '["some/one", null]')):
        given = [
            str(small),
            "--lora",
            "--set",
            f"{key}={value}",
            "--set",
            "sft.seeds=[0, 1]",
            "--set",
            "model.chat_template=chatml",
            *out,
        ]
        assert salsa_run(given) == 2
        said = capsys.readouterr().err
        assert (
            {
                "sft.from": "sft.from[0]: https://huggingface.co/some/one: not in",
                "model.base": "model.base: some/base is",
            }[key]
            in said
            and "HF_HUB_OFFLINE is set" in said
            and not (tmp_path / "out").exists()
        )


def test_target_modules_that_the_base_lacks(base: Path, tmp_path: Path, salsa: Any) -> None:
    """By the plan where its files' headers say it; by the stage for a regular expression. PEFT would leave one out in silence."""
    said = plan(salsa, {"adapter.target_modules": ["q_porj", "v_proj"]}, "--lora")
    assert (
        "adapter.target_modules: the base has no module q_porj. Use all-linear, or some of the base's modules: " in said
        and " o_proj, q_proj, " in said
    )
    model = loaded(base)
    sft.check_targets(Adapter(target_modules=["q_proj", "self_attn.v_proj", "layers.0.mlp.up_proj"]), model)
    sft.check_targets(Adapter(target_modules=r".*\.(q|v)_proj"), model)
    sft.check_targets(Adapter(), model)
    with pytest.raises(SalsaError, match="no module of the base matches the regular expression"):
        sft.check_targets(Adapter(target_modules="q_proj|v_proj"), model)
    with pytest.raises(SalsaError, match="has no module up_porj"):
        sft.check_targets(Adapter(target_modules=["up_porj", "q_proj"]), model)


def test_the_head_is_looked_at_where_all_seeds_are_taken(
    base: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the reward model trains, as a seed that is trained does."""
    folder = elsewhere.adapter(base, tmp_path / "theirs", 1)
    seen: list[Any] = []
    monkeypatch.setattr(sft, "check_head", seen.append)
    monkeypatch.setattr(base_checks, "needs_logprobs", lambda recipe: bool(recipe.sft.from_))  # as with a policy by PPO
    take(small, base, folder, tmp_path / "out")
    assert len(seen) == 1 and not next(seen[0].parameters()).is_meta


def test_lora_on_the_output_embeddings_is_refused_before_anything_trains(
    base: Path, tmp_path: Path, salsa: Any
) -> None:
    """Of a seed and of a reference, also where tied embeddings carry it over; a run without PPO takes it."""
    plain = elsewhere.adapter(base, tmp_path / "plain", 1)
    head = elsewhere.adapter(base, tmp_path / "head", 2, target_modules=["q_proj", "lm_head"])
    seeds = {"sft.from": [str(head), str(plain)], "sft.seeds": [0, 1]}
    for given, key in (
        (seeds, "sft.from[0]"),
        ({"policies": {"salsa": {"reference": str(head)}}}, "policies.salsa.reference"),
    ):
        said = plan(salsa, given, "--lora")
        assert (
            f"{key}: {head} has LoRA on lm_head, the output embeddings" in said
            and "salsa soup OUT ADAPTER --merge" in said
        )
    external_models.check_adapter("sft.from", head, external_models.SEED, None, head=False)
    options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    tied = make_base("gemma", tmp_path / "gemma")
    own, carried = (
        elsewhere.adapter(base, tmp_path / "own", 3, **options),
        elsewhere.adapter(tied, tmp_path / "tied", 3, **options),
    )
    external_models.check_adapter(
        "sft.from", own, external_models.SEED, read_checkpoint(base)
    )  # untied: the flag does nothing
    with pytest.raises(
        SalsaError, match=r"LoRA on lm_head, the output embeddings \(put there by ensure_weight_tying\)"
    ):
        external_models.check_adapter("sft.from", carried, external_models.SEED, read_checkpoint(tied))


def test_seeds_that_have_no_soup_are_refused_before_anything_trains(base: Path, tmp_path: Path, salsa: Any) -> None:
    """PEFT has no adapter with lora_bias and LoRA on embeddings; a soup of one of the two is one."""
    biased = elsewhere.adapter(base, tmp_path / "biased", 1)
    config = biased / "adapter_config.json"
    config.write_text(json.dumps({**read(config), "lora_bias": True}))
    tokens = elsewhere.adapter(base, tmp_path / "tokens", 2, target_modules=["q_proj", "embed_tokens"])
    given = ["sft.seeds=[0, 1]", f"sft.from={json.dumps([str(biased), str(tokens)])}", "landscape=null"]
    load = load_recipe("quickstart", lora="lora", overrides=given)
    with pytest.raises(SalsaError, match=r"sft\.from: .*biased has lora_bias, and .*tokens has LoRA on embeddings"):
        external_models._check_soup(load.recipe)
    alone = load_recipe("quickstart", lora="lora", overrides=[*given, "soup.members=[1]"])
    external_models._check_soup(alone.recipe)

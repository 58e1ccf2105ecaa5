"""Models that do not fit one another, or hold more than weights: refused in one line, or right; what a folder brings along is never run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_ppo import PROMPTS, length_reward, plain_logprobs, roll_out
from safetensors.torch import load_file, save_file
from soup_members import WEIGHTS
from tiny_classifiers import CHAT, own_classifier, single
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from salsa_peft import SalsaPPOConfig, SalsaPPOTrainer, use_reference
from salsa_peft.config.job import Job, Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Model
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.base import causal_lm, load_base, load_classifier
from salsa_peft.models.rewards.function import decode
from salsa_peft.models.rewards.reward import as_reward
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.soup import average
from salsa_peft.soup.__main__ import main as soup_command
from salsa_peft.training import sft
from salsa_peft.training.checkpoints import MANIFEST
from salsa_peft.training.references import as_references
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import FINGERPRINT, base_fingerprint, sha256


def one_line(act: Callable[[], Any], line: str) -> None:
    """A SalsaError that matches, without a line break."""
    with pytest.raises(SalsaError, match=line) as caught:
        act()
    assert "\n" not in str(caught.value)


def to_folder(model: Any, tokenizer: Any, folder: Path) -> Path:
    """An ordinary Transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(model: Any, tokenizer: Any, folder: Path, references: list[Any], **options: Any) -> SalsaPPOTrainer:
    """On a model as it is."""
    settings: dict[str, Any] = {
        "batch_size": 8, "max_new_tokens": 7, "learning_rate": 1e-3, "num_train_epochs": 0.5, "report_to": "none", "use_cpu": True,
        "bf16": False, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return SalsaPPOTrainer(
        model, args=SalsaPPOConfig(output_dir=str(folder), **(settings | options)), train_dataset=PROMPTS, references=references,
        reward_funcs=length_reward, processing_class=tokenizer,
    )  # fmt: skip


def policy_on(base: Any, make_adapter: Any, **options: Any) -> PeftModel:
    """A base with a policy that is active."""
    model = make_adapter(base, "policy", 1, **options)
    model.set_adapter("policy")
    return model


def adapter_of(base: Any, folder: Path, **options: Any) -> Path:
    """An adapter as plain PEFT saves it, everything that trains drawn at random."""
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def logits_of(model: PeftModel) -> list[torch.Tensor]:
    """Under the policy, and of the base alone."""
    found = []
    for name in ("policy", None):
        with torch.no_grad(), adapters.active(model, name):
            found.append(model(input_ids=torch.arange(20)[None]).logits)
    return found


class TestAnotherTokenizersClassifier:
    """The policy's text is what the classifier reads, through its own tokenizer."""

    @staticmethod
    def other(tokenizer: Any) -> PreTrainedTokenizerFast:
        """The same words under other numbers, and a BOS of its own before a text."""
        from tokenizers import Tokenizer, pre_tokenizers, processors
        from tokenizers.models import WordLevel

        words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
        special = ["<unk>", "<s>", "</s>", "[end]", "[user]", "[assistant]", "<fill>"]
        made = Tokenizer(WordLevel({word: n for n, word in enumerate([*special, *reversed(words)])}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<fill>"
        )
        fast.add_special_tokens({"additional_special_tokens": ["[end]", "[user]", "[assistant]"]})
        fast.chat_template = CHAT
        return fast

    def test_scores_in_ppo_are_the_plain_classifiers_of_the_text(
        self, make_trainer: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        """Of what the policy sampled, one conversation at a time."""
        other = self.other(tokenizer)
        classifier = own_classifier(other)
        folder = to_folder(classifier, other, tmp_path / "rm")
        rollout = roll_out(make_trainer(reward=str(folder)))
        responses = rollout.responses
        answers = decode(tokenizer, responses.response_ids, responses.response_mask)
        chats = [
            [*row["prompt"], {"role": "assistant", "content": answer}]
            for row, answer in zip(PROMPTS[:8], answers, strict=True)
        ]
        expected = [
            single(classifier, other.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats
        ]
        assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-4)
        assert rollout.scores.std() > 0.01
        as_they_are = [
            single(classifier, row[mask].clamp(max=len(other) - 1).tolist())
            for row, mask in zip(responses.input_ids, responses.attention_mask, strict=True)
        ]
        assert rollout.scores.tolist() != pytest.approx(as_they_are, abs=1e-2)

    def test_without_its_tokenizer_it_is_refused(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
        """Never the policy's in its place."""
        own_classifier(self.other(tokenizer)).save_pretrained(tmp_path / "rm")
        one_line(
            lambda: as_reward(str(tmp_path / "rm"), make_base(), tokenizer),
            r"rm: Transformers cannot load a tokenizer from here",
        )
        in_memory = LlamaForSequenceClassification.from_pretrained(tmp_path / "rm")
        one_line(
            lambda: as_reward(in_memory, make_base(), tokenizer), r"rm: Transformers cannot load a tokenizer from here"
        )


class TestVocabulary:
    def test_more_rows_than_tokens_is_right(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        """A padded vocabulary: rows without a token may be sampled, and count in log-probs and KL as in the full logits."""
        model = policy_on(make_base(vocab_size=len(tokenizer) + 7), make_adapter)
        trainer = trainer_of(model, tokenizer, tmp_path / "out", ["base"], kl_estimator="k1")
        rollout = roll_out(trainer)
        expected = plain_logprobs(trainer, "policy", rollout).detach()
        torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-4)
        kl = expected - plain_logprobs(trainer, None, rollout).detach()
        torch.testing.assert_close(rollout.kl, kl, rtol=1e-4, atol=1e-4)
        trainer.train()
        assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())

    @pytest.mark.parametrize("full", [False, True], ids=["adapter", "full weights"])
    def test_fewer_rows_than_tokens_is_refused(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, full: bool
    ) -> None:
        """Before training: of a prompt with such a token in PPO, of any such tokenizer where a stage opens the base."""
        base = make_base()
        base.resize_token_embeddings(len(tokenizer) - 10, mean_resizing=False)
        folder = to_folder(base, tokenizer, tmp_path / "base")
        line = (
            rf"base: the tokenizer has {len(tokenizer)} tokens, but the model has only {len(tokenizer) - 10} embeddings"
        )
        one_line(lambda: load_base(str(folder), Model(), tokenizer), line)
        policy = base if full else policy_on(base, make_adapter)
        references = [AutoModelForCausalLM.from_pretrained(folder)] if full else ["base"]
        line = (
            rf"train_dataset, row \d+: token id \[\d+\] has no embedding; ids must be from 0 to {len(tokenizer) - 11}"
        )
        one_line(lambda: trainer_of(policy, tokenizer, tmp_path / "out", references), line)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"target_modules": ["q_proj", "embed_tokens"]}, r"seed: the adapter holds .*embed_tokens.base_layer.weight, a trained copy of a module of the base"),
            ({"modules_to_save": ["embed_tokens", "lm_head"]}, r"seed: the adapter holds .*lm_head.weight, a trained copy of a module of the base"),
            ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "trainable_token_indices is .*, so the adapter holds trained weights of the base"),
        ],
        ids=["LoRA on embeddings", "modules_to_save", "trained tokens"],
    )  # fmt: skip
    def test_an_adapter_of_a_resized_base(
        self, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any], line: str
    ) -> None:
        """Of three more tokens: refused wherever it would come onto the base, which stays as it was."""
        larger = make_base()
        larger.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
        seed = adapter_of(larger, tmp_path / "seed", **options)
        model = policy_on(make_base(), make_adapter)
        before = logits_of(model)
        one_line(lambda: as_references(model, [seed]), line)
        one_line(lambda: as_reward(str(seed), policy_on(make_base(), make_adapter), tokenizer), line)
        assert all(torch.equal(*pair) for pair in zip(before, logits_of(model), strict=True))

    def test_a_soup_of_two_sizes_is_refused(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
        """Embeddings beside LoRA's factors, of 65 and of 68 rows."""
        for name, more in (("a", 0), ("b", 3)):
            base = make_base()
            base.resize_token_embeddings(len(tokenizer) + more, mean_resizing=False)
            adapter_of(base, tmp_path / name, modules_to_save=["embed_tokens"])
            (tmp_path / name / FINGERPRINT).write_text('{"base": "5e"}')
        one_line(lambda: average.soup(tmp_path / "soup", [tmp_path / "a", tmp_path / "b"]), "shape|of shape")
        assert not (tmp_path / "soup" / WEIGHTS).exists()

    def test_a_reference_of_another_vocabulary_is_refused(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
        rows = len(tokenizer)
        folder = to_folder(make_base(1, vocab_size=rows + 3), tokenizer, tmp_path / "large")
        line = rf"references: .*large has {rows + 3} rows of output embeddings, but the policy has {rows}; pass a model with"
        one_line(lambda: as_references(make_base(), [folder]), line)


class TestOutsideTheFactors:
    """What of an adapter would lie in the base that all roles share."""

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_a_reference_with_biases_leaves_the_base_alone(
        self, make_adapter: Any, tokenizer: Any, tmp_path: Path, bias: str
    ) -> None:
        """PEFT loads them over the base's own, under the policy too."""

        def base() -> Any:
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer))).eval()

        seed = adapter_of(base(), tmp_path / "seed", bias=bias)
        assert any(name.endswith("bias") for name in load_file(seed / WEIGHTS))
        model = policy_on(base(), make_adapter)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        one_line(
            lambda: as_references(model, [seed]),
            f"seed: bias is '{bias}', so the adapter holds trained weights of the base",
        )
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())

    @pytest.mark.parametrize(
        "options",
        [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}],
        ids=["DoRA", "rsLoRA", "embeddings"],
    )
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_what_lies_inside_has_plain_pefts_kl(
        self, make_base: Any, make_trainer: Any, tmp_path: Path, options: dict[str, Any], tied: bool
    ) -> None:
        """As PEFT opens the folder on a base of its own."""
        seed = adapter_of(make_base(tie_word_embeddings=tied), tmp_path / "seed", **options)
        trainer = make_trainer([str(seed)], base={"tie_word_embeddings": tied})
        rollout = roll_out(trainer)
        plain = PeftModel.from_pretrained(make_base(tie_word_embeddings=tied), seed).eval()
        expected = (plain_logprobs(trainer, "policy", rollout) - plain_logprobs(trainer, plain, rollout)).detach()
        torch.testing.assert_close(rollout.kl, expected, rtol=1e-3, atol=1e-3)


def test_a_seed_that_is_taken_is_looked_at(tokenizer: Any, make_base: Any, make_adapter: Any, tmp_path: Path) -> None:
    """Before a stage copies it: what lies outside the factors, and what is not finite."""
    world = World(tmp_path, tokenizer, make_base, make_adapter)
    config = json.loads((world.seeds[1] / "adapter_config.json").read_text())
    (world.seeds[1] / "adapter_config.json").write_text(json.dumps(config | {"bias": "lora_only"}))
    one_line(lambda: world.take(world.seeds[1]), r"sft.from: .*seed-1 has bias: 'lora_only', which changes the base")
    (tmp_path / "taken").rmdir()
    tensors = load_file(world.seeds[0] / WEIGHTS)
    tensors[max(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, world.seeds[0] / WEIGHTS, metadata={"format": "pt"})
    one_line(
        lambda: world.take(world.seeds[0]), r"seed-0/adapter_model.safetensors: .* contains NaN or infinite values"
    )
    assert not any((tmp_path / "taken").iterdir())


class TestTiedEmbeddings:
    TIED: dict[str, Any] = {"tie_word_embeddings": True}  # noqa: RUF012

    def test_full_weights_stay_tied_also_over_a_checkpoint(self, make_trainer: Any, make_base: Any, tmp_path: Path) -> None:  # fmt: skip
        """Trained, saved once, opened by Transformers alone, and gone on from: to the bit one that was not broken off."""
        options: dict[str, Any] = {"full": True, "base": self.TIED, "save_strategy": "steps", "save_steps": 1}
        references = [make_base(1, **self.TIED)]
        whole = make_trainer(references, folder=tmp_path / "whole", **options)
        whole.train()
        policy = whole.model.policy.eval()
        assert policy.lm_head.weight is policy.model.embed_tokens.weight
        saved = tmp_path / "whole" / "checkpoint-2"
        assert "lm_head.weight" not in load_file(saved / "model.safetensors")
        ids = torch.tensor([[1, 3, 9, 22, 4]])
        with torch.no_grad():
            assert torch.equal(AutoModelForCausalLM.from_pretrained(saved).eval()(ids).logits, policy(ids).logits)
        shutil.copytree(tmp_path / "whole", tmp_path / "part")
        shutil.rmtree(tmp_path / "part" / "checkpoint-2")
        again = make_trainer([make_base(1, **self.TIED)], folder=tmp_path / "part", **options)
        again.train(resume_from_checkpoint=True)
        assert again.model.policy.lm_head.weight is again.model.policy.model.embed_tokens.weight
        assert all(
            torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items()
        )

    def test_a_soup_of_tied_checkpoints(self, make_base: Any, tokenizer: Any, tmp_path: Path) -> None:
        """One of them saved with the copy that it is tied to: the mean of the embeddings, and heads that are tied to it. With another head
        beside the embeddings, which Transformers then loads untied: the mean of what it loads."""
        seeds = [make_base(number, **self.TIED) for number in (1, 2)]
        folders = [to_folder(seed, tokenizer, tmp_path / f"seed-{n}") for n, seed in enumerate(seeds)]
        tensors = load_file(folders[1] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
        for folder in folders:
            (folder / FINGERPRINT).write_text('{"base": "5e"}')
        average.soup(tmp_path / "soup", folders)
        soup = AutoModelForCausalLM.from_pretrained(tmp_path / "soup").eval()
        rows = [seed.model.embed_tokens.weight for seed in seeds]
        torch.testing.assert_close(soup.model.embed_tokens.weight, (rows[0] + rows[1]) / 2)
        assert soup.lm_head.weight is soup.model.embed_tokens.weight
        tensors["lm_head.weight"] += 1
        save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
        average.soup(tmp_path / "soup2", folders)
        untied = AutoModelForCausalLM.from_pretrained(tmp_path / "soup2")
        heads = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
        torch.testing.assert_close(untied.model.embed_tokens.weight, (rows[0] + rows[1]) / 2)
        torch.testing.assert_close(untied.lm_head.weight, (heads[0] + heads[1]) / 2)
        assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)

    def test_lora_and_value_head_on_a_tied_base(self, make_trainer: Any, make_base: Any, make_adapter: Any, tokenizer: Any, tmp_path: Path) -> None:  # fmt: skip
        """The base stays as it was and tied; an adapter on the output embeddings alone is refused."""
        trainer = make_trainer(base=self.TIED)
        lm = causal_lm(trainer.model.policy)
        before = lm.model.embed_tokens.weight.clone()
        rollout = roll_out(trainer)
        expected = plain_logprobs(trainer, "policy", rollout).detach()
        torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-4)
        trainer.train()
        assert trainer.model.value_head.weight.abs().max() > 0
        assert torch.equal(lm.model.embed_tokens.weight, before)
        assert lm.lm_head.weight is lm.model.embed_tokens.weight
        policy = policy_on(make_base(**self.TIED), make_adapter, target_modules=["q_proj", "lm_head"])
        line = "the adapter is on the output embeddings, which policy and references share"
        one_line(lambda: trainer_of(policy, tokenizer, tmp_path / "out", ["base"]), line)


class World:
    """A base and two seeds of it in folders that say so."""

    def __init__(self, folder: Path, tokenizer: Any, make_base: Any, make_adapter: Any) -> None:
        self.folder, self.tokenizer, self.make_adapter = folder, tokenizer, make_adapter
        self.base = to_folder(make_base(), tokenizer, folder / "base")
        self.seeds = [self.seed(number) for number in (0, 1)]

    def seed(self, number: int) -> Path:
        """Made of the base as it is now."""
        model = get_peft_model(
            self.load(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="default"
        )
        folder = self.folder / f"seed-{number}"
        head = {SCORE_HEAD: torch.ones(1, 32)}
        adapters.save(model, "default", folder, extra=head if number == 0 else None)
        (folder / FINGERPRINT).write_text(json.dumps({"base": base_fingerprint(self.base)}))
        return folder

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def policy(self) -> PeftModel:
        return policy_on(self.load(), self.make_adapter)

    def take(self, path: Path) -> Path:
        """`sft: {from: [path]}`, done."""
        recipe = self.folder / "r.yaml"
        (self.folder / "p.jsonl").write_text('{"prompt": "name three birds"}\n' * 8)
        (self.folder / "t.jinja").write_text(self.tokenizer.chat_template)
        recipe.write_text(
            f"name: r\nmodel: {{base: {self.base}, max_length: 32, chat_template: t.jinja}}\nsft: {{from: [{path}]}}\n"
            "reward: some/reward\ndata: {prompts: p.jsonl}\nppo: {batch_size: 8}\ngeneration: {max_new_tokens: 6}\n"
            "soup: {members: [0]}\npolicies: {ppo: {reference: seed-0}}\nlandscape: null\nevaluate: {prompts: {in: p.jsonl}}\n"
        )
        resolved = load_recipe(str(recipe), lora="lora", overrides=[]).recipe
        out = self.folder / "taken"
        out.mkdir()
        unit = Unit(stage="sft", name="seed-0", run="salsa_peft.training.sft:run")
        sft.import_seed(Job(recipe=resolved, unit=unit, folder=out, inputs={}, recipe_yaml=""), str(path))
        return out


@pytest.fixture
def world(tmp_path: Path, tokenizer: Any, make_base: Any, make_adapter: Any) -> World:
    return World(tmp_path, tokenizer, make_base, make_adapter)


class TestAnotherBase:
    """One row of the base changed after the seeds were trained: shapes agree, fingerprints do not."""

    def change(self, world: World) -> None:
        path = world.base / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"][0] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})

    def test_every_entrance_refuses_its_seeds(self, world: World) -> None:
        fine = world.policy()
        assert as_references(fine, [world.seeds[1]])[0].adapter == "reference-0"
        as_reward(str(world.seeds[0]), fine, world.tokenizer)
        assert (world.take(world.seeds[1]) / WEIGHTS).read_bytes() == (world.seeds[1] / WEIGHTS).read_bytes()
        shutil.rmtree(world.folder / "taken")
        self.change(world)
        line = r"seed-\d: these weights were trained on a base with the fingerprint \w{12} …, but .*base has \w{12} …"
        model = world.policy()
        for enter in (
            lambda: as_references(model, [world.seeds[1]]),
            lambda: as_reward(str(world.seeds[0]), model, world.tokenizer),
            lambda: trainer_of(model, world.tokenizer, world.folder / "out", [str(world.seeds[1])]),
            lambda: world.take(world.seeds[1]),
        ):
            one_line(enter, line)
        assert list(model.peft_config) == ["policy"]
        assert not any((world.folder / "taken").iterdir())
        newer = world.seed(2)
        one_line(
            lambda: average.soup(world.folder / "soup", [world.seeds[1], newer]), "a soup needs members of one base"
        )

    def test_trls_trainer_too(self, world: World) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        pairs = Dataset.from_list([{"prompt": "name", "chosen": " owl", "rejected": " fig"}] * 4)
        self.change(world)
        args = DPOConfig(output_dir=str(world.folder / "dpo"), report_to="none", use_cpu=True, bf16=False, beta=0.1)
        policy = get_peft_model(world.load(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        trainer = DPOTrainer(policy, args=args, train_dataset=pairs, processing_class=world.tokenizer)
        before = dict(trainer.model.peft_config)
        one_line(
            lambda: use_reference(trainer, world.seeds[1]), "these weights were trained on a base with the fingerprint"
        )
        assert trainer.model.peft_config.keys() == before.keys()

    def test_the_same_base_in_other_shards_is_the_same(self, world: World, capsys: Any) -> None:
        before = base_fingerprint(world.base)
        model = world.load()
        (world.base / "model.safetensors").unlink()
        model.save_pretrained(world.base, max_shard_size="20KB")
        assert len(list(world.base.glob("*.safetensors"))) > 1
        assert base_fingerprint(world.base) == before
        assert as_references(world.policy(), [world.seeds[1]])[0].adapter == "reference-0"
        assert "cannot be checked" not in capsys.readouterr().err


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is there once something of a folder was run: looked for at the test's end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


class Bomb:
    """Writes the canary when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def pickled(path: Path, canary: Path, instead_of: str | None = None) -> Path:
    """A pickle in a folder, which takes the place of a file."""
    torch.save({"state": Bomb(canary)}, path)
    if instead_of is not None:
        (path.parent / instead_of).unlink()
    return path.parent


def test_the_canary_sings(tmp_path: Path) -> None:
    """Or none of these tests would say anything."""
    torch.save({"state": Bomb(tmp_path / "canary")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)["state"].close()
    assert (tmp_path / "canary").exists()


class TestPickles:
    """Never loaded: refused, or left where they are."""

    def test_of_a_base(self, world: World, canary: Path, capsys: Any) -> None:
        folder = pickled(world.base / "pytorch_model.bin", canary, "model.safetensors")
        line = r"base: this folder has no safetensors file, and weights in other formats are not read. If you trust the weights, load the model"
        one_line(lambda: load_base(str(folder), Model(), world.tokenizer), line)
        planned = r"model.base: .*base' has its weights only in pytorch_model.bin, a pickle, which is never loaded"
        one_line(lambda: world.take(world.seeds[0]), planned)

    def test_of_a_seed(self, world: World, canary: Path, capsys: Any) -> None:
        """As member of a soup, reference, reward, `sft.from`."""
        folder = pickled(world.seeds[0] / "adapter_model.bin", canary, WEIGHTS)
        model = world.policy()
        line = "seed-0: the folder has no adapter_model.safetensors; use a PEFT adapter saved with safetensors"
        one_line(lambda: adapters.attach(model, folder, "seed"), line)
        one_line(lambda: as_references(model, [folder]), line)
        one_line(lambda: as_reward(str(folder), model, world.tokenizer), line)
        one_line(lambda: world.take(folder), "adapter_model.safetensors")
        assert soup_command([str(world.folder / "soup"), str(folder), str(world.seeds[1])]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert "seed-0 holds adapter_model.bin, a pickle, which is never read" in said[-1]

    def test_under_the_name_of_safetensors(self, world: World, canary: Path) -> None:
        torch.save({"state": Bomb(canary)}, world.seeds[0] / WEIGHTS)
        line = rf"seed-0/{WEIGHTS}: not a valid safetensors file"
        one_line(lambda: as_references(world.policy(), [world.seeds[0]]), line)
        one_line(lambda: average.soup(world.folder / "soup", world.seeds), WEIGHTS)

    def test_beside_safetensors_they_are_left_alone(self, world: World, canary: Path) -> None:
        pickled(world.seeds[0] / "adapter_model.bin", canary)
        pickled(world.seeds[0] / "training_args.bin", canary)
        pickled(world.base / "pytorch_model.bin", canary)
        model = world.policy()
        assert as_references(model, [world.seeds[0]])[0].adapter == "reference-0"
        taken = world.take(world.seeds[0])
        assert not list(taken.glob("*.bin"))

    def test_of_full_weights(self, make_base: Any, tokenizer: Any, tmp_path: Path, canary: Path, capsys: Any) -> None:
        """A reference's, a soup's member, a reward classifier's."""
        folder, other = (to_folder(make_base(number), tokenizer, tmp_path / f"seed-{number}") for number in (1, 2))
        pickled(folder / "pytorch_model.bin", canary, "model.safetensors")
        one_line(lambda: as_references(make_base(), [folder]), "seed-1: this folder has no safetensors file")
        assert soup_command([str(tmp_path / "soup"), str(folder), str(other)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert "it holds pytorch_model.bin, which is a pickle, and pickles are never read" in said[-1]
        classifier = to_folder(own_classifier(tokenizer), tokenizer, tmp_path / "rm")
        pickled(classifier / "pytorch_model.bin", canary, "model.safetensors")
        one_line(lambda: as_reward(str(classifier), make_base(), tokenizer), "rm: this folder has no safetensors file")

    @pytest.fixture(scope="class")
    def stopped(self, tmp_path_factory: Any, tokenizer: Any) -> Path:
        """A run of two updates, broken off after the first."""
        import tiny

        folder = tmp_path_factory.mktemp("run")
        tiny.make_trainer(tokenizer, folder, save_strategy="steps", save_steps=1).train()
        shutil.rmtree(folder / "checkpoint-2")
        return folder

    @pytest.mark.parametrize("signed", [False, True], ids=["manifest as it was", "manifest by whoever changed it"])
    @pytest.mark.parametrize(
        "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "value_head.safetensors", WEIGHTS]
    )
    def test_in_a_checkpoint(
        self, stopped: Path, make_trainer: Any, tmp_path: Path, canary: Path, name: str, signed: bool
    ) -> None:
        """transformers.Trainer opens its own with weights_only, which runs nothing; the manifest tells of a change before that."""
        run = tmp_path / "run"
        shutil.copytree(stopped, run)
        checkpoint = pickled(run / "checkpoint-1" / name, canary)
        line = rf"checkpoint-1 is not a complete checkpoint \({name} has changed\)"
        if signed:
            listed = json.loads((checkpoint / MANIFEST).read_text())
            listed[name] = {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
            (checkpoint / MANIFEST).write_text(json.dumps(listed))
            line = r"checkpoint-1: .* holds more than tensors and numbers, .* so the file was not loaded"
            line = rf"checkpoint-1/{name}: not a valid safetensors file" if name.endswith(".safetensors") else line
        trainer = make_trainer(folder=run, save_strategy="steps", save_steps=1)
        one_line(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)), line)
        assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1"}

    def test_beside_a_checkpoints_own_files(
        self, stopped: Path, make_trainer: Any, tmp_path: Path, canary: Path
    ) -> None:
        """What the manifest does not list is not opened: the run goes on to its end."""
        run = tmp_path / "run"
        shutil.copytree(stopped, run)
        for name in (
            "pytorch_model.bin",
            "adapter_model.bin",
            "training_args.bin",
            "rng_state_0.pth",
            "value_head.bin",
        ):
            pickled(run / "checkpoint-1" / name, canary)
        trainer = make_trainer(folder=run, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2


CODE = """
open({canary!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "theirs"
class Model(LlamaForCausalLM): config_class = Config
class Classifier(LlamaForSequenceClassification): config_class = Config
class Words(PreTrainedTokenizerFast): pass
"""
MAP = {
    "AutoConfig": "theirs.Config",
    "AutoModelForCausalLM": "theirs.Model",
    "AutoModelForSequenceClassification": "theirs.Classifier",
}


def with_code(folder: Path, canary: Path, file: str, **fields: Any) -> Path:
    """The folder with a module of its own that its configuration asks for."""
    (folder / "theirs.py").write_text(CODE.format(canary=str(canary)))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who says yes to whatever Transformers asks."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))


@pytest.mark.usefixtures("eager")
class TestCode:
    """A folder that brings a Python module along (auto_map): it is never imported, and nobody is asked whether it may be."""

    LINE = "its model or tokenizer needs code from the repository .auto_map., which is never run"

    def test_an_architecture_of_its_own(self, make_base: Any, tokenizer: Any, tmp_path: Path, canary: Path) -> None:
        """As base, as reference, as reward."""
        folder = to_folder(make_base(), tokenizer, tmp_path / "theirs")
        with_code(folder, canary, "config.json", auto_map=MAP, model_type="theirs")
        one_line(lambda: load_base(str(folder), Model(), tokenizer), f"theirs: {self.LINE}")
        one_line(lambda: load_classifier(str(folder), Model(), tokenizer), f"theirs: {self.LINE}")
        one_line(lambda: as_references(make_base(), [folder]), f"theirs: {self.LINE}")
        one_line(lambda: as_reward(str(folder), make_base(), tokenizer), f"theirs: {self.LINE}")
        assert type(load_tokenizer(str(folder))).__module__.startswith("transformers.")

    def test_a_known_architecture_is_transformers_own(
        self, make_base: Any, tokenizer: Any, tmp_path: Path, canary: Path
    ) -> None:
        """Its auto_map is passed over."""
        folder = with_code(to_folder(make_base(), tokenizer, tmp_path / "m"), canary, "config.json", auto_map=MAP)
        loaded = load_base(str(folder), Model(), tokenizer)
        assert type(loaded) is LlamaForCausalLM
        reference = as_references(make_base(), [folder])[0].model
        assert type(reference) is LlamaForCausalLM and type(reference.config) is LlamaConfig

    def test_a_tokenizer_of_its_own(self, make_base: Any, tokenizer: Any, tmp_path: Path, canary: Path) -> None:
        """The base's, and a reward classifier's in a folder and in memory."""
        asked = {"auto_map": {"AutoTokenizer": [None, "theirs.Words"]}, "tokenizer_class": "Words"}
        base = with_code(to_folder(make_base(), tokenizer, tmp_path / "m"), canary, "tokenizer_config.json", **asked)
        one_line(lambda: load_tokenizer(str(base)), f"m: {self.LINE}")
        classifier = to_folder(own_classifier(tokenizer), tokenizer, tmp_path / "rm")
        with_code(classifier, canary, "tokenizer_config.json", **asked)
        one_line(lambda: as_reward(str(classifier), make_base(), tokenizer), f"rm: {self.LINE}")
        in_memory = LlamaForSequenceClassification.from_pretrained(classifier)
        one_line(lambda: as_reward(in_memory, make_base(), tokenizer), f"rm: {self.LINE}")

"""What TRL's trainers take as reference after use_reference: from the figures that they log, against plain models of soup, base and start."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

import salsa_peft
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.soup import average
from salsa_peft.training.references import FrozenReference
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import base_fingerprint

TRAINERS = {"dpo": DPOTrainer, "kto": KTOTrainer, "rloo": RLOOTrainer, "grpo": GRPOTrainer}
CONFIGS: dict[str, Any] = {"dpo": DPOConfig, "kto": KTOConfig, "rloo": RLOOConfig, "grpo": GRPOConfig}
BETA, TEMPERATURE = 0.3, 0.7
use_reference: Any = salsa_peft.use_reference


class World:
    """A base, two seeds and their soup in folders, as adapters or as checkpoints; the soup has twice the policy's rank."""

    def __init__(self, folder: Path, tokenizer: Any, make_base: Any, make_adapter: Any, kind: str) -> None:
        self.folder, self.tokenizer, self.kind = folder, tokenizer, kind
        make_base().save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        for number in (0, 1):
            seed = folder / f"seed-{number}"
            if kind == "lora":
                adapters.save(make_adapter(self.load("base"), "default", number + 1), "default", seed)
            else:
                make_base(number + 1).save_pretrained(seed)
                tokenizer.save_pretrained(seed)
            (seed / "fingerprint.json").write_text(json.dumps({"base": base_fingerprint(folder / "base")}))
        average.soup(folder / "soup", [folder / "seed-0", folder / "seed-1"])
        words = [word for word in tokenizer.get_vocab() if word.isalpha()]
        self.pairs = [
            {"prompt": " ".join(words[i : i + 2]), "chosen": " " + " ".join(words[i + 2 : i + 5]), "rejected": f" {words[i + 6]}"}
            for i in range(8)
        ]  # fmt: skip

    def load(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / name).eval()

    def plain(self, name: str) -> Any:
        """A model of its own, opened by PEFT or Transformers alone."""
        if self.kind == "full" or name == "base":
            return self.load(name)
        return PeftModel.from_pretrained(self.load("base"), self.folder / name).eval()

    def policy(self) -> Any:
        """To train: a copy of seed-0."""
        if self.kind == "full":
            return self.load("seed-0")
        model = adapters.attach(self.load("base"), self.folder / "seed-0", "default", trainable=True)
        model.set_adapter("default")
        return model

    def trainer(self, algorithm: str, steps: int = 2, **options: Any) -> Any:
        rows: list[dict[str, Any]] = list(self.pairs)
        if algorithm == "kto":
            rows = [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in self.pairs
                for side in ("chosen", "rejected")
            ]
        held_out = rows[: {"dpo": 1, "kto": 2}.get(algorithm, 8)]  # sampled ones are many: few tokens may say little
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": len(held_out),
            "max_steps": steps,
        }
        more: dict[str, Any] = {}
        if algorithm in ("rloo", "grpo"):
            settings |= {
                "max_completion_length": 5,
                "num_generations": 2,
                "temperature": TEMPERATURE,
                "per_device_eval_batch_size": 16,
            }
            more["reward_funcs"] = lambda completions, **_: [float(sum(map(ord, text)) % 17) for text in completions]
        settings |= {
            "output_dir": str(self.folder / algorithm), "beta": BETA, "report_to": "none", "use_cpu": True, "bf16": False,
            "logging_steps": 1, "save_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2, **options,
        }  # fmt: skip
        return TRAINERS[algorithm](
            self.policy(), args=CONFIGS[algorithm](**settings), train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out), processing_class=self.tokenizer, **more,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, tokenizer: Any, make_base: Any, make_adapter: Any, request: Any) -> World:
    """Of adapters unless the test says otherwise."""
    return World(tmp_path, tokenizer, make_base, make_adapter, getattr(request, "param", "lora"))


@torch.no_grad()
def logprobs(model: Any, ids: Tensor, last: int, temperature: float = 1.0) -> Tensor:
    """log π of the last tokens of one sequence, from its full logits."""
    logits = model(input_ids=ids[None]).logits[0].float() / temperature
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[-last:, 0]


def expected(trainer: Any, policy: Any, references: list[Any]) -> dict[str, float]:
    """What the trainer's evaluation must log where its reference has the mean of these models' log-probs."""

    def ratio(ids: Tensor, last: int, temperature: float = 1.0) -> Tensor:
        others = torch.stack([logprobs(model, ids, last, temperature) for model in references]).mean(0)
        return logprobs(policy, ids, last, temperature) - others

    if isinstance(trainer, RLOOTrainer | GRPOTrainer):
        rows = [ratio(ids[mask.bool()], int(mask[-last:].sum()), TEMPERATURE) for ids, mask, last in trainer.seen]
        tokens = torch.cat(rows)
        return {"eval_kl": (tokens if isinstance(trainer, RLOOTrainer) else (-tokens).exp() + tokens - 1).mean().item()}
    found = {}
    for row in trainer.eval_dataset:
        sides = ("chosen", "rejected") if "chosen_ids" in row else ("completion",)
        for side in sides:
            name = side if "chosen_ids" in row else "chosen" if row["label"] else "rejected"
            ids = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
            found[f"eval_rewards/{name}"] = BETA * ratio(ids, len(row[f"{side}_ids"])).sum().item()
    return found


def evaluate(trainer: Any, seed: int = 0) -> dict[str, float]:
    """Its own evaluation; what it sampled is then in trainer.seen: ids, mask, tokens of the response."""
    trainer.seen = []
    if isinstance(trainer, RLOOTrainer | GRPOTrainer):
        inner = trainer._get_per_token_logps_and_entropies

        def spy(model: Any, ids: Tensor, mask: Tensor, last: int, *args: Any, **options: Any) -> Any:
            trainer.seen = [(ids[row], mask[row], last) for row in range(len(ids))]
            return inner(model, ids, mask, last, *args, **options)

        trainer._get_per_token_logps_and_entropies = spy
    torch.manual_seed(seed)  # RLOO and GRPO sample completions
    found = trainer.evaluate()
    vars(trainer).pop("_get_per_token_logps_and_entropies", None)
    return found


def assert_reference(trainer: Any, world: World, *names: str) -> None:
    """The figures are those of the references named, and not those of the base or of the policy's start.

    A draw of few and short completions may have the same figures for two references: then there is another draw.
    """
    others = {"base", "seed-0"} - set(names)
    for seed in range(8):
        found = evaluate(trainer, seed)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        assert not isinstance(model, PeftModel) or model.active_adapters == ["default"]
        right = expected(trainer, model, [world.plain(name) for name in names])
        for key, value in right.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        for other in sorted(others):
            wrong = expected(trainer, model, [world.plain(other)])
            if any(abs(found[key] - value) > 0.01 for key, value in wrong.items()):
                others.remove(other)
        if not others:
            return
    pytest.fail(f"the figures are also those of {others}")


@pytest.mark.parametrize("algorithm", TRAINERS)
@pytest.mark.parametrize("world", ["lora", "full"], indirect=True)
def test_the_soup_is_the_reference_at_step_0_after_training_and_after_resume(world: World, algorithm: str) -> None:
    """What trains is the policy alone; a new trainer goes on from the checkpoint."""
    trainer = world.trainer(algorithm)
    use_reference(trainer, world.folder / "soup")
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert world.kind == "full" or (trained and all(".default." in name for name in trained))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    assert_reference(trainer, world, "soup")
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert moved and moved <= trained
    assert_reference(trainer, world, "soup")

    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    again = world.trainer(algorithm, steps=4)
    use_reference(again, world.folder / "soup")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    moved = {name for name, parameter in again.model.named_parameters() if not parameter.equal(before[name])}
    assert moved and moved <= trained
    assert_reference(again, world, "soup")


@pytest.mark.parametrize("world", ["lora", "full"], indirect=True)
def test_without_it_the_reference_is_another(world: World) -> None:
    """So that the tests above say something: TRL takes the policy's start."""
    trainer = world.trainer("dpo")
    with pytest.raises(AssertionError):
        assert_reference(trainer, world, "soup")
    assert_reference(trainer, world, "seed-0")


def test_a_checkpoint_of_trl_holds_the_soup(world: World) -> None:
    """So a run that goes on without use_reference stops at the soup's rank, or has it, but never goes on in silence with another."""
    trainer = world.trainer("dpo")
    use_reference(trainer, world.folder / "soup")
    trainer.train()
    saved = world.folder / "dpo" / "checkpoint-2" / "ref"
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 8
    with pytest.raises(RuntimeError, match="size mismatch"):
        world.trainer("dpo", steps=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "rloo"])
@pytest.mark.parametrize("world", ["lora", "full"], indirect=True)
def test_several_references_have_the_mean_of_their_log_probs(world: World, algorithm: str) -> None:
    """MKL: the mean of the KLs is the KL to the mean log-probs."""
    trainer = world.trainer(algorithm)
    use_reference(trainer, [world.folder / "seed-0", world.folder / "seed-1"])
    assert_reference(trainer, world, "seed-0", "seed-1")
    trainer.train()
    assert_reference(trainer, world, "seed-0", "seed-1")


def test_base_an_attached_adapter_a_checkpoint_and_one_after_the_other(world: World, tmp_path: Path) -> None:
    """Whatever was there before is dropped."""
    trainer = world.trainer("dpo")
    use_reference(trainer, "base")
    assert_reference(trainer, world, "base")
    use_reference(trainer, world.folder / "seed-1")
    assert_reference(trainer, world, "seed-1")
    adapters.attach(trainer.model, world.folder / "soup", "mine")
    use_reference(trainer, "mine")
    assert_reference(trainer, world, "soup")
    assert "ref" not in trainer.model.peft_config
    world.plain("soup").merge_and_unload().save_pretrained(tmp_path / "merged")
    use_reference(trainer, tmp_path / "merged")
    assert_reference(trainer, world, "soup")
    assert use_reference(trainer, world.folder / "soup")[0].adapter == "ref"
    assert_reference(trainer, world, "soup")


def test_a_policy_whose_adapter_trl_made_itself(world: World) -> None:
    """With peft_config TRL has no adapter `ref`."""
    rows = Dataset.from_list(world.pairs)
    args = DPOConfig(
        output_dir=str(world.folder / "own"),
        per_device_eval_batch_size=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        beta=BETA,
    )
    config = adapters.read(world.folder / "seed-0")[0]
    config.inference_mode = False
    trainer = DPOTrainer(
        str(world.folder / "base"), args=args, train_dataset=rows, eval_dataset=rows.select([0]), processing_class=world.tokenizer,
        peft_config=config,
    )  # fmt: skip
    use_reference(trainer, world.folder / "soup")
    assert_reference(trainer, world, "soup")


@pytest.mark.parametrize("world", ["full"], indirect=True)
def test_trl_s_own_moving_reference_starts_from_the_soup(world: World) -> None:
    """sync_ref_model with full weights: π_ref ← α π + (1 − α) π_ref (TR-DPO), of the model that is looked at."""
    trainer = world.trainer("dpo", steps=1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25)
    use_reference(trainer, world.folder / "soup")
    trainer.train()
    key = "model.layers.0.mlp.up_proj.weight"
    soup, now = world.load("soup").state_dict()[key], trainer.model.state_dict()[key]
    torch.testing.assert_close(trainer.ref_model.state_dict()[key], 0.75 * soup + 0.25 * now)


def test_what_would_be_ignored_or_wrong_is_refused(world: World, make_base: Any) -> None:
    """In one line; the trainer has the reference that it had."""
    soup = world.folder / "soup"
    rows = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in world.pairs
    ]
    config = RewardConfig(output_dir=str(world.folder / "r"), report_to="none", use_cpu=True, bf16=False)
    other = RewardTrainer(
        str(world.folder / "base"), args=config, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer
    )
    with pytest.raises(SalsaError, match=r"a RewardTrainer would ignore the reference\. Use one of DPOTrainer"):
        use_reference(other, soup)
    for options, message in (
        ({"precompute_ref_log_probs": True}, "with precompute_ref_log_probs, TRL has used its own reference already"),
        ({"loss_type": ["sft"]}, "with loss_type sft alone the reference has no effect"),
        ({"beta": 0.0}, "with beta 0 the reference has no effect"),
    ):
        with pytest.raises(SalsaError, match=message):
            use_reference(world.trainer("dpo", **options), soup)
    with pytest.raises(SalsaError, match="with beta 0 the reference has no effect"):
        use_reference(world.trainer("grpo", beta=0.0), soup)
    with pytest.raises(SalsaError, match="GRPOTrainer takes one reference, not 2"):
        use_reference(world.trainer("grpo"), [soup, world.folder / "seed-1"])
    trainer = world.trainer("dpo")
    with pytest.raises(SalsaError, match="reference: 'default' is the adapter that is trained"):
        use_reference(trainer, "default")
    assert trainer.model.get_parameter(
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    ).requires_grad
    with pytest.raises(SalsaError, match="use TRL's sync_ref_model for full weights"):
        use_reference(trainer, FrozenReference("moving", None, world.load("base"), 1, 0.5))
    with pytest.raises(SalsaError, match="no such folder"):
        use_reference(trainer, world.folder / "nothing")
    assert_reference(trainer, world, "seed-0")
    (soup / "fingerprint.json").write_text(json.dumps({"base": "0" * 64}))
    with pytest.raises(SalsaError, match="these weights were trained on a base with the fingerprint"):
        use_reference(trainer, soup)
    assert_reference(trainer, world, "seed-0")


def test_without_a_fingerprint_it_is_said(world: World, capsys: Any) -> None:
    """And the reference is taken."""
    (world.folder / "soup" / "fingerprint.json").unlink()
    trainer = world.trainer("dpo")
    use_reference(trainer, world.folder / "soup")
    assert "soup: no fingerprint.json, so the base of" in capsys.readouterr().err
    assert_reference(trainer, world, "soup")


@pytest.mark.parametrize("world", ["full"], indirect=True)
def test_an_adapter_is_no_reference_of_full_weights(world: World, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        SalsaError,
        match=r"is an adapter, but the policy has full weights. Merge the adapter into its base with `salsa soup OUT",
    ):
        use_reference(world.trainer("dpo"), tmp_path)


def test_a_policy_that_trained_more_than_factors(world: World) -> None:
    """PEFT gives `ref` the base's own modules; several references would be read through the policy's, and are refused."""

    def policy(**options: Any) -> Any:
        return lambda: get_peft_model(
            world.load("base"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        )

    world.policy = policy(modules_to_save=["lm_head"])  # type: ignore[method-assign]
    trainer = world.trainer("dpo")
    with torch.no_grad():
        trainer.model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(1.5)
    use_reference(trainer, world.folder / "soup")
    assert_reference(trainer, world, "soup")
    adapters.attach(trainer.model, world.folder / "seed-1", "mine")
    for reference in ([world.folder / "soup", world.folder / "seed-1"], "mine"):
        with pytest.raises(SalsaError, match="the policy has modules_to_save"):
            use_reference(trainer, reference)
    assert_reference(trainer, world, "soup")


class FakeLLM:
    """Stands in for vllm.LLM: keeps the weights of the last sync."""

    def __init__(self, **_: Any) -> None:
        self.weights: dict[str, Tensor] = {}
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self._load)))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def _load(self, pairs: list[tuple[str, Tensor]]) -> None:
        self.weights.update((name, tensor.clone()) for name, tensor in pairs)

    def reset_prefix_cache(self) -> None: ...


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's VLLMGeneration in this process, with FakeLLM."""
    import trl.generation.vllm_generation as generation

    monkeypatch.setattr(generation, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(generation, "LLM", FakeLLM, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them; monkeypatch takes back what it has seen
        monkeypatch.delenv(name)


def bf16_policy(world: World, **options: Any) -> Any:
    """An adapter that is not zero, on a bf16 base."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(world.load("base").bfloat16(), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters(model, "default"):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_with_vllm_the_base_has_the_same_bits_after_1000_syncs(world: World, algorithm: str, with_vllm: None) -> None:
    """TRL's own merging in place moves a bf16 base, and a reference on it; after use_reference neither moves.

    What vLLM gets is the same.
    """
    world.policy = lambda: bf16_policy(world)  # type: ignore[method-assign]
    ids, moved, changed, sent = torch.arange(3, 12), [], [], []
    for repaired in (False, True):
        trainer = world.trainer(algorithm, use_vllm=True, vllm_mode="colocate")
        if repaired:
            use_reference(trainer, "base")
        model = trainer.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
        with adapters.active(model, None):
            reference = logprobs(model, ids, 8)
        trainer.vllm_generation.sync_weights()
        sent.append(dict(trainer.vllm_generation.llm.weights))
        for _ in range(999):
            trainer.vllm_generation.sync_weights()
        with adapters.active(model, None):
            changed.append((logprobs(model, ids, 8) - reference).abs().max().item())
        after = model.state_dict()
        same_bits = {
            name: torch.equal(after[name].view(torch.int16), tensor.view(torch.int16))
            for name, tensor in before.items()
        }
        moved.append(sorted(name.split(".")[-3] for name, same in same_bits.items() if not same))
    assert set(moved[0]) == {"q_proj", "v_proj"}
    assert changed[0] > 0.05
    assert moved[1] == []
    assert changed[1] == 0.0
    assert list(sent[0]) == list(sent[1])
    assert all(torch.equal(sent[0][name], sent[1][name]) for name in sent[0])
    assert sorted(sent[1]) == sorted(world.load("base").state_dict())


def test_what_cannot_be_merged_in_copies_is_refused_with_vllm(
    world: World, with_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained copy of a layer; a TRL whose engine has no such method. Without vLLM both are fine."""
    import trl.generation.vllm_generation as generation

    options = {"use_vllm": True, "vllm_mode": "colocate"}
    world.policy = lambda: bf16_policy(world, modules_to_save=["o_proj"])  # type: ignore[method-assign]
    with pytest.raises(
        SalsaError, match=r"GRPOTrainer: use_vllm changes the base's .* trained copy, .* Set use_vllm=False"
    ):
        use_reference(world.trainer("grpo", **options), "base")
    world.policy = lambda: bf16_policy(world)  # type: ignore[method-assign]
    trainer = world.trainer("rloo", **options)
    monkeypatch.delattr(generation.VLLMGeneration, "_iter_named_params")
    with pytest.raises(
        SalsaError, match=r"RLOOTrainer: use_vllm .* this version of TRL has no VLLMGeneration\._iter_named_params"
    ):
        use_reference(trainer, "base")
    use_reference(world.trainer("grpo"), "base")

"""The recipe's stages on fake weights of a large model's shapes: only reading and writing weights is replaced.

What runs is the stage's own code, with Transformers', TRL's, PEFT's and torchao's, on fake tensors on the CPU, under
the autocast that the stage asks for on CUDA. Where a CPU would need temporary tensors that CUDA does not (TRL's Triton
kernels, torchao's compiled step), these are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from fake_tensors import Peaks, fake_tensors
from peft import LoraConfig
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.quantization_config import QuantizationMethod
from trl.kernels import chunked_logprob

from salsa_peft.config.job import Job, Unit, recipe_of_unit
from salsa_peft.config.load import load_recipe
from salsa_peft.config.schema import Model, Recipe
from salsa_peft.data import tokenized
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.evaluation import evaluate
from salsa_peft.models import base, logprobs, stage_context
from salsa_peft.models.adapters import lora
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.models.architectures import memory
from salsa_peft.models.architectures.sizes import KNOWN, Architecture, architecture_of_recipe
from salsa_peft.models.responses import pad_responses
from salsa_peft.models.rewards import classifier
from salsa_peft.models.stage_context import StageContext
from salsa_peft.models.tokenizers import load_tokenizer
from salsa_peft.training import ppo_stage, reward_model, sft, train
from salsa_peft.training.ppo import backends, checks, resume, rollout, trainer

LLAMA2 = "meta-llama/Llama-2-7b-hf"
FULL = ("master", "stochastic")
COMMON = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 2, "gradient_checkpointing": True}
"""Settings of every section that trains."""


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes where only the tensors' devices matter."""


def write_base(folder: Path, layers: int, **sizes: int) -> Path:
    """config.json of Llama-2-7B with some of its layers or other sizes, and the embedded world's tokenizer."""
    tokenizer = make_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    given = KNOWN[LLAMA2] | special | {"num_hidden_layers": layers, "max_position_embeddings": 4096} | sizes
    config = AutoConfig.for_model(**given)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_classifier(folder: Path, layers: int, **sizes: int) -> Path:
    """config.json of a sequence classifier, and a tokenizer."""
    write_base(folder, layers, **sizes)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(folder)
    return folder


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A local data set; returns its path."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def words(count: int, first: str = "owl") -> str:
    """A text of so many words, each of them a token."""
    return " ".join([first, *["owl"] * (count - 1)])


def recipe_of(
    folder: Path, layers: int, mode: str, length: int, sizes: dict[str, int] | None = None, more: Any = None, **ppo: Any
) -> Recipe:
    """A recipe of Llama-2-7B whose sequences all have `length` tokens, in micro-batches of one, two for a step.

    mode: lora, qlora, master or stochastic. sizes: other sizes of the base. more: further sections. ppo: further
    options of that section.
    """
    ask, answer = {"role": "user", "content": words(length // 2 - 16)}, {"role": "assistant", "content": words(length)}
    pairs = [
        {"prompt": words(length // 2, first), "chosen": words(length // 2 - 20), "rejected": words(length // 2 - 21)}
        for first in list(make_tokenizer().get_vocab())[10:18]
    ]
    data = {
        "demonstrations": write_rows(folder, "chats", [{"messages": [ask, answer]}] * 4),
        "preferences": write_rows(folder, "pairs", pairs),
        "prompts": write_rows(folder, "prompts", [{"prompt": [ask]}] * 8),
    }
    given = {
        "name": "rehearsal", "data": data, "precision": mode if mode in FULL else "auto",
        "model": {"base": str(write_base(folder / "base", layers, **(sizes or {}))), "max_length": length, "dtype": "bfloat16",
                  "chat_template": "zephyr"},
        "sft": {"seeds": [0, 1], **COMMON}, "reward": COMMON, "generation": {"max_new_tokens": length // 2},
        "ppo": {**COMMON, "num_ppo_epochs": 1, "logged_completions": 0, "shown_every": None, **ppo},
        "policies": {"salsa": {"reference": "soup", "kl_coef": 0.01}}, "evaluate": {"prompts": {"asked": data["prompts"]}}, **(more or {}),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given))
    return load_recipe(str(path), lora=None if mode in FULL else mode, overrides=[]).recipe


def write_inputs(folder: Path, recipe: Recipe, size: Architecture) -> dict[str, Path]:
    """The results of earlier stages: tokenized data, and adapters' configurations with their tensors' shapes."""
    tokenizer = load_tokenizer(str(folder / "base"), chat_template=recipe.model.chat_template)
    found = {}
    for kind, write in tokenized.WRITERS.items():
        found[f"data/{kind}"] = folder / kind
        source = getattr(recipe.data, kind)
        write(source, tokenizer, folder / kind, lambda *_: None)
    for name, rank in (("sft/seed-0", 1), ("sft/seed-1", 1), ("soup", 2), ("reward", 1), ("ppo/salsa", 1)):
        there = folder / name.replace("/", "-")
        there.mkdir()
        found[name] = there
        if recipe.adapter is None:
            AutoConfig.from_pretrained(folder / "base").save_pretrained(there)
            tokenizer.save_pretrained(there)
            continue
        r = recipe.adapter.r * rank
        config = LoraConfig(**{**dataclasses.asdict(recipe.adapter), "r": r}, task_type="CAUSAL_LM")
        config.save_pretrained(there)
        shapes = {SCORE_HEAD: [1, size.hidden]} if name == "reward" else {}
        for layer in range(size.layers):
            for one in size.linears:
                part = "mlp" if one.name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                module = f"base_model.model.model.layers.{layer}.{part}.{one.name}"
                shapes |= {f"{module}.lora_A.weight": [r, one.inputs], f"{module}.lora_B.weight": [one.outputs, r]}
        (there / "shapes.json").write_text(json.dumps(shapes))
    return found


def make_fake(
    auto_class: Callable[[Any], Any], folder: str, model: Any, trained: torch.dtype | None, **options: Any
) -> Any:
    """In place of models.base._load: the same model with made-up weights."""
    options.pop("quantization_config", None)
    config = AutoConfig.from_pretrained(folder)
    for name, value in options.items():
        setattr(config, name, value)
    dtype = trained or base.resolve_dtype(model.dtype)
    kind = auto_class(config)
    build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    made = build(config, dtype=dtype, attn_implementation="sdpa").eval().to(base.device())
    if model.quantization is not None:
        quantise(made, base._quantization_config(model, dtype))
    return made.requires_grad_(trained is not None)


def quantise(model: Any, config: Any) -> None:
    """Turn the layers' linear modules into bitsandbytes', with a plain tensor in place of the class Params4bit."""
    kind = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear or name in config.llm_int8_skip_modules:
            continue
        packed, state = quantize_4bit(module.weight.detach(), **kind)
        weight: Any = torch.nn.Parameter(packed, requires_grad=False)
        vars(weight).update(kind, quant_state=state, quant_storage=torch.uint8)
        module.__class__ = Linear4bit
        module.weight, module.quant_state, module.compute_dtype = weight, state, config.bnb_4bit_compute_dtype
        module.compute_type_is_set, module.support_avx512bf16_for_cpu = True, False
    model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = config


class FakeClassifiers:
    """In place of classifier_class, which chooses the class whose from_pretrained loads a classifier reward."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def from_pretrained(self, folder: str, dtype: torch.dtype, **_: Any) -> tuple[Any, dict[str, list[str]]]:
        made = make_fake(
            base.classifier_class, folder, Model(dtype=str(dtype).removeprefix("torch.")), None, num_labels=1
        )
        return made, {"missing_keys": []}


def read_fake(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """In place of lora.read."""
    shapes = json.loads((folder / "shapes.json").read_text())
    return LoraConfig.from_pretrained(str(folder)), {name: torch.empty(shape) for name, shape in shapes.items()}


def replace_files(patch: pytest.MonkeyPatch) -> None:
    """Weights are made up in place of being read, and nothing is saved or compared by content."""
    patch.setattr(base, "_load", make_fake)
    patch.setattr(lora, "read", read_fake)
    patch.setattr(classifier, "classifier_class", FakeClassifiers)
    for module in (ppo_stage, evaluate):
        patch.setattr(module, "load_reference", lambda model, reference, context, inputs: None)
    patch.setattr(StageContext, "save", lambda *_: None)
    patch.setattr(StageContext, "check", lambda *_: None)
    patch.setattr(train.Resumable, "_save_checkpoint", lambda *_: None)
    patch.setattr(StageContext, "write_fingerprint", lambda *_: None)
    for saving in ("save_model", "_save_checkpoint"):
        patch.setattr(trainer.SalsaPPOTrainer, saving, lambda *_: None)
    patch.setattr(resume, "digest", lambda weights: "")
    patch.setattr(logprobs, "_require_same_logits", lambda *_: None)  # made-up logits are compared otherwise


def place_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """Everything is placed on a GPU: models, and what Trainer and accelerate place on their device."""
    cuda = torch.device("cuda", 0)
    for module in (base, stage_context, classifier, backends):
        patch.setattr(module, "device", lambda: cuda)
    patch.setattr(TrainingArguments, "device", property(lambda self: cuda))
    patch.setattr(Accelerator, "device", property(lambda self: cuda))
    patch.setattr(checks, "check_noise", lambda model: None)  # keeps CUDA's random state


def compute_as_cuda(patch: pytest.MonkeyPatch) -> None:
    """Leave out temporary tensors that only a CPU needs."""
    patch.setattr(torch, "compile", lambda function, **_: lambda *_: None)  # the step of torchao's optimizer
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # Triton's kernels work in place
        patch.setattr(chunked_logprob, name, lambda *_, **__: None)


def watch_phases(patch: pytest.MonkeyPatch, peaks: Peaks) -> None:
    """Split a stage into phases: generate, score, train (forward and backward) and step (of the optimizer)."""
    step = Trainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        peaks.track(model)
        peaks.enter("train")
        try:
            return step(self, model, *args, **kwargs)
        finally:
            peaks.enter("step")

    def sample(self: Any, prompts: Any, seeds: Any, **_: Any) -> Any:
        """In place of generation, where each token takes a forward: responses of the longest length."""
        peaks.enter("score")
        answers = [[9] * self.args.max_new_tokens] * len(prompts)
        device = next(self.model.parameters()).device
        return pad_responses(prompts, answers, self.tokenizer.pad_token_id, self.ends, device)

    make = rollout.RolloutMaker.__call__

    def make_rollout(self: Any, *args: Any) -> Any:
        frozen = [reference.model for reference in self.references] + [self.reward.frozen_model()]
        peaks.track(self.model, *(model for model in frozen if model is not None))
        return make(self, *args)

    scores = reward_model.held_out_scores

    def held_out_scores(trainer: Any) -> Any:
        peaks.enter("evaluate")
        return scores(trainer)

    patch.setattr(reward_model, "held_out_scores", held_out_scores)
    patch.setattr(rollout.RolloutMaker, "__call__", make_rollout)
    patch.setattr(Trainer, "training_step", training_step)
    patch.setattr(backends.HF, "__call__", sample)


STAGES = {"sft": sft, "reward": reward_model, "ppo": ppo_stage}


class Phase(NamedTuple):
    """A phase's peak by kind, measured on fake tensors, and what `--dry-run` plans for it; both in bytes."""

    name: str
    measured: dict[str, int]
    planned: memory.Estimate

    @property
    def ratio(self) -> float:
        """The plan over what was measured, of the sums of all tensors, without CUDA's context and fragmentation."""
        return tensors(self.planned) / self.measured["total"]


def tensors(planned: memory.Estimate) -> float:
    """Bytes of all tensors in a phase."""
    return (planned.total - memory.CONTEXT) / memory.MARGIN


def rehearse(folder: Path, mode: str, stage: str, layers: int, length: int) -> list[Phase]:
    """Run a stage of Llama-2-7B with that many layers on fake tensors, and compare its peaks with the plan's.

    The temporary tensors of torchao's compiled step, which is left out, are taken off the plan.
    """
    recipe = recipe_of(folder, layers, mode, length)
    size = architecture_of_recipe(recipe)
    assert size is not None
    inputs, peaks = write_inputs(folder, recipe, size), Peaks()
    with pytest.MonkeyPatch.context() as patch:
        replace_files(patch)
        compute_as_cuda(patch)
        watch_phases(patch, peaks)
        with fake_tensors(), peaks:
            STAGES[stage].run(job_of(recipe, stage, folder, inputs))
    precision: Any = mode if mode in FULL else "master"
    found = []
    for planned in memory._Stage(recipe, stage, size, precision).phases():
        if planned.phase == "step" and precision == "stochastic":
            planned = planned._replace(optimizer=planned.optimizer - 12 * size.largest)
        if planned.phase in peaks.phases:
            found.append(Phase(planned.phase, peaks.phases[planned.phase], planned))
    return found


def job_of(recipe: Recipe, stage: str, folder: Path, inputs: dict[str, Path]) -> Job:
    """The stage's first unit."""
    name = {"sft": "seed-0", "ppo": "salsa"}.get(stage, stage)
    unit = Unit(stage=stage, name=name, run="", multi_unit=stage != "reward")
    out = folder / "out"
    out.mkdir()
    return Job(recipe=recipe_of_unit(recipe, unit), unit=unit, folder=out, inputs=inputs, recipe_yaml="")

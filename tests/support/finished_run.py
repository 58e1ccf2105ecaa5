"""The folder of a finished run, made in a second: tiny adapters or checkpoints, a report of invented numbers, manifests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import synthetic_run
import torch
from hub_server import Hub, Repo
from paths import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from salsa_peft.config.job import Unit
from salsa_peft.config.load import load_recipe
from salsa_peft.config.yaml import dump_yaml
from salsa_peft.models.adapters import lora as adapters
from salsa_peft.models.adapters.names import SCORE_HEAD
from salsa_peft.recipe import cache as runs
from salsa_peft.recipe.results.names import update_names
from salsa_peft.recipe.units import POLICY_UNITS, report_units, reward_units, sft_units, soup_units
from salsa_peft.report.page import write_report
from salsa_peft.soup import average
from salsa_peft.utils.fingerprints import base_fingerprint

BASE_ID = "tester/tiny-base"


def make_run(
    folder: Path, tokenizer: Any, make_base: Any, make_adapter: Any, *, lora: bool = True, base: str = BASE_ID
) -> Path:
    """folder/base, folder/run; the recipe's base is `base`."""
    place, run = folder / "base", folder / "run"
    make_base().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "README.md").write_text("---\nlicense: llama2\n---\n# a base\n")
    (folder / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "kin"}, {"role": "assistant", "content": "pear"}]}) + "\n"
    )
    sets = [
        "toy=null", f"model.base={base}", "model.chat_template=chatml", f"data.demonstrations={folder / 'chats.jsonl'}", "data.preferences=some/pairs",
        "data.prompts=some/prompts", "evaluate.prompts={in: some/questions, out: some/others}", "sft.seeds=[0, 1]", "sft.batch_size=1",
        "landscape=null", "policies={salsa: {reference: soup}, ppo: {reference: seed-0}}", "evaluate.models=[]",
    ]  # fmt: skip
    loaded = load_recipe("quickstart", lora="lora" if lora else None, overrides=sets)
    recipe = loaded.recipe
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_yaml(recipe.as_data()))
    work = [
        *sft_units(recipe, ""),
        *reward_units(recipe, ""),
        *soup_units(recipe, ""),
        *POLICY_UNITS["ppo"](recipe, ""),
        *report_units(recipe, ""),
    ]
    there = {unit.id for unit in work}
    steps: dict[str, runs.PlannedUnit] = {}
    sign = json.dumps({"base": base_fingerprint(place)})
    for number, unit in enumerate(work):
        unit = Unit(**{**vars(unit), "inputs": tuple(name for name in unit.inputs if name in there)})
        step = runs.PlannedUnit(
            unit=unit, key=f"{number:012x}" + "0" * 52, folder=run / "stages" / unit.id / f"{number:012x}", why=None
        )
        steps[unit.id] = step
        step.folder.mkdir(parents=True)
        if unit.stage == "report":
            write_report(step.folder, synthetic_run.synthetic())
            (step.folder / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
        elif unit.stage == "soup":
            average.soup(
                step.folder, [steps["sft/seed-0"].folder, steps["sft/seed-1"].folder], names=["seed-0", "seed-1"]
            )
        else:
            _weights(step.folder, place, make_adapter, number, lora, unit.stage == "reward")
            tokenizer.save_pretrained(step.folder)
            facts = {"reference": "soup", "kl_coef": {"start": 0.3, "end": 0.4}}
            name = "policy.json" if unit.stage == "ppo" else "metrics.json"
            (step.folder / name).write_text(json.dumps(facts if unit.stage == "ppo" else {"loss": 0.5}))
            (step.folder / "completions.jsonl").write_text('{"prompt": "of-the-users"}\n')
        (step.folder / "fingerprint.json").write_text(sign)
        runs.write_manifest(step, steps)
    update_names(run, recipe, {name: step.folder for name, step in steps.items()})
    return run


def _weights(folder: Path, base: Path, make_adapter: Any, seed: int, lora: bool, reward: bool) -> None:
    if lora and not reward:
        model = make_adapter(AutoModelForCausalLM.from_pretrained(base), "default", seed + 1)
        model.peft_config["default"].base_model_name_or_path = str(base)
        adapters.save(model, "default", folder)
        return
    torch.manual_seed(seed)
    if not lora:
        made = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model = made.from_pretrained(base, **({"num_labels": 1} if reward else {}))
        for weight in model.parameters():
            weight.data += torch.randn_like(weight) / 50
        model.save_pretrained(folder)
        return
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / adapters.WEIGHTS).items()}
    assert SCORE_HEAD in tensors
    save_file(tensors, folder / adapters.WEIGHTS)


CANARY = "hf_canary" + "Z" * 28


def command(server: Hub, home: Path, *words: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m salsa_peft.cli.hub …` of a user whose Hub is the server; waits of a hundredth."""
    script = "import sys; from salsa_peft.cli import hub; from salsa_peft.report.publish import hub as hub_push; hub_push.WAITS = tuple(w / 100 for w in hub_push.WAITS); sys.exit(hub.main())"
    environment = {**server.environment(home), "HF_TOKEN": CANARY if token is None else token, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def files(server: Hub, repo: str) -> dict[str, bytes]:
    """Of the newest commit, but what the Hub itself put there."""
    return {name: content for name, content in server.repos[repo].commits[-1].files.items() if name != ".gitattributes"}


def publish_base(server: Hub, run: Path) -> None:
    """The base that the run names."""
    there = Repo()
    there.commits[-1].files.update({path.name: path.read_bytes() for path in (run.parent / "base").iterdir()})
    server.repos[BASE_ID] = there


def assert_canary_in_the_header_alone(server: Hub, *places: Path, said: str = "") -> None:
    """In no file, no request's body or address, nothing that was printed."""
    raw = CANARY.encode()
    assert any(CANARY in request.headers.get("authorization", "") for request in server.requests)
    for request in server.requests:
        assert raw not in request.body and CANARY not in request.path
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert CANARY not in str(others)
    for place in places:
        for path in place.rglob("*"):
            assert not path.is_file() or raw not in path.read_bytes(), path
    for repo in server.repos.values():
        assert all(raw not in content for commit in repo.commits for content in commit.files.values())
    assert CANARY not in said

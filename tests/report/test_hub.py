"""Results to a loopback Hub and back: one commit each, what the card says, what fails and is made up for, where the token goes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from finished_run import BASE_ID, CANARY, assert_canary_in_the_header_alone, command, files, make_run, publish_base
from hub_server import Fault, Hub, Repo, hub
from paths import ROOT
from safetensors.torch import load_file

import salsa_peft
from salsa_peft.cli.hub import main
from salsa_peft.config.load import load_recipe
from salsa_peft.report.publish import hub as hub_push
from salsa_peft.utils import files as runs
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.fingerprints import sha256

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "fingerprint.json", "recipe.yaml", "tokenizer.json",
           "tokenizer_config.json", "chat_template.jinja", "figure.png"}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Hub]:
    """One that knows the canary."""
    with hub(CANARY) as there:
        yield there


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run of adapters, beside its base."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, tokenizer, functools.partial(tiny.make_base, tokenizer), tiny.make_adapter)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def python(server: Hub, home: Path, script: str, *words: str) -> str:
    """A script of the user's; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env=server.environment(home),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_results_are_pushed_each_in_one_private_commit_with_its_files_alone(
    server: Hub, run: Path, tmp_path: Path
) -> None:
    """No log, no manifest, no data, no path of this machine; the token in the header alone."""
    publish_base(server, run)
    done = command(
        server, tmp_path / "home", "push", str(run), "soup", "salsa", "reward", "seed-0", "--to", "tester/tiny"
    )
    assert done.returncode == 0, done.stderr
    expected = {"soup": ADAPTER | {"soup.json"}, "salsa": ADAPTER | {"policy.json"}, "reward": ADAPTER | {"metrics.json"},
                "seed-0": ADAPTER | {"metrics.json"}}  # fmt: skip
    assert done.stdout.split() == [f"{server.url}/tester/tiny-{name}" for name in expected]
    for name, names in expected.items():
        repo = server.repos[f"tester/tiny-{name}"]
        assert repo.private and len(repo.commits) == 2, "the Hub's own first commit and one"
        assert set(files(server, f"tester/tiny-{name}")) == names
        for file, content in files(server, f"tester/tiny-{name}").items():
            assert str(tmp_path).encode() not in content, file
            assert b"of-the-users" not in content, file
    config = json.loads(files(server, "tester/tiny-soup")["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE_ID
    (folder,) = [path.parent for path in run.glob("stages/soup/*/manifest.json")]
    assert (
        files(server, "tester/tiny-soup")["adapter_model.safetensors"]
        == (folder / "adapter_model.safetensors").read_bytes()
    )
    assert not (run / hub_push.PENDING).exists()
    pushed = json.loads((run / hub_push.PUSHED).read_text())
    assert [(one["item"], one["to"]) for one in pushed] == [(name, f"tester/tiny-{name}") for name in expected]
    assert pushed[0]["commit"] == server.repos["tester/tiny-soup"].commits[-1].sha
    assert_canary_in_the_header_alone(server, run, tmp_path / "home", said=done.stdout + done.stderr)
    again = command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/tiny-soup")
    assert again.returncode == 0 and len(server.repos["tester/tiny-soup"].commits) == 2, "nothing new, no commit"


def test_the_card_says_where_it_comes_from_and_what_was_measured(server: Hub, run: Path, tmp_path: Path) -> None:
    """Front matter that the Hub's search goes by; numbers of the report; a recipe that can be read."""
    publish_base(server, run)
    assert command(server, tmp_path / "home", "push", str(run), "salsa", "soup", "--to", "tester/tiny").returncode == 0
    text = files(server, "tester/tiny-salsa")["README.md"].decode()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (BASE_ID, "adapter", "peft")
    assert data["license"] == "llama2", "asked of the Hub"
    assert {"salsa", "ppo", "peft", "lora"} <= set(data["tags"])
    assert data["datasets"] == ["some/pairs", "some/prompts"]
    summary = json.loads(next(run.glob("stages/report/*/summary.json")).read_text())
    score = summary["evaluation"]["datasets"]["in"]["models"]["salsa"]["scores"]["gold"]
    metrics = [one["value"] for result in data["model-index"][0]["results"] for one in result["metrics"]]
    assert round(score["mean"], 4) in metrics
    assert f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in body
    for line in (
        "| reference | soup |",
        "| KL coefficient β | 0.3 → 0.4 |",
        f"| base | {BASE_ID}, revision main |",
        "| seed-1 | SFT, random seed 1",
    ):
        assert line in body, line
    assert "salsa – ppo" in body and "![headline-start](figure.png)" in body
    parts = ("## Load it", "## Evaluation", "## How it was made", "## Recipe")
    assert sorted(parts, key=body.index) == list(parts)
    for sentence in summary["screen"]["sentences"].values():
        assert sentence in body.replace("\\", "")
    assert all(f"**{name}**" in body for name in ("gold reward", "soup", "seed-0"))
    saved = yaml.safe_load(files(server, "tester/tiny-salsa")["recipe.yaml"])
    assert (
        saved["data"]["demonstrations"]["path"] == "chats.jsonl" and saved["policies"]["salsa"]["reference"] == "soup"
    )
    assert f"```yaml\n{files(server, 'tester/tiny-salsa')['recipe.yaml'].decode()}" in body
    soup = files(server, "tester/tiny-soup")["README.md"].decode()
    assert "model-soup" in soup and "| soup | linear: 0.5·seed-0, 0.5·seed-1 |" in soup
    assert "## Members" not in body
    for path in run.glob("stages/sft/seed-*/*/adapter_model.safetensors"):
        own = [path.parent.parent.name, "0.5", path.parent.name, f"adapter\\_model.safetensors {sha256(path)[:16]}…"]
        of_base = json.loads((path.parent / "fingerprint.json").read_text())["base"]
        assert "| " + " | ".join([*own, f"{of_base[:16]}…"]) + " |" in soup
    assert f"Averaged by salsa_peft {salsa_peft.__version__};" in soup and str(run) not in soup


@pytest.mark.slow
def test_a_user_loads_what_was_pushed_with_the_three_lines_of_the_card(server: Hub, run: Path, tmp_path: Path) -> None:
    """Plain PEFT, a home of its own: the same logits as the run's own files."""
    publish_base(server, run)
    assert command(server, tmp_path / "home", "push", str(run), "soup", "reward", "--to", "tester/tiny").returncode == 0
    for name, head in (("soup", "logits"), ("reward", "logits")):
        code = re.findall(
            r"```python\n(.*?)```", files(server, f"tester/tiny-{name}")["README.md"].decode(), re.DOTALL
        )[0]
        assert len(code.strip().splitlines()) == 3
        (folder,) = [path.parent for path in run.glob(f"stages/{name}/*/manifest.json")]
        more = f"""
import torch
ids = torch.tensor([tokenizer("kin pear zinc")["input_ids"]])
with torch.no_grad():
    theirs = model.eval()(input_ids=ids).{head}
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
made = AutoModelForSequenceClassification if "{name}" == "reward" else AutoModelForCausalLM
base = made.from_pretrained({str(run.parent / "base")!r}, **({{"num_labels": 1}} if "{name}" == "reward" else {{}}))
with torch.no_grad():
    own = PeftModel.from_pretrained(base, {str(folder)!r}).eval()(input_ids=ids).{head}
assert theirs.shape == own.shape and torch.equal(theirs, own), (theirs - own).abs().max()
print("same", float(theirs.abs().max()))
"""
        assert "same" in python(server, tmp_path / f"user-{name}", code + more)


@pytest.mark.slow
def test_what_was_pushed_is_somebody_s_reference_and_is_pulled(
    server: Hub, run: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """By its id alone; safetensors only; of another base it is refused."""
    publish_base(server, run)
    assert command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/soup").returncode == 0
    server.repos["tester/soup"].commits[-1].files["evil.bin"] = b"pickled"
    pulled = command(server, tmp_path / "user", "pull", "tester/soup", str(tmp_path / "pulled"))
    assert pulled.returncode == 0, pulled.stderr
    there = {path.name for path in (tmp_path / "pulled").iterdir() if path.is_file()}
    assert there == ADAPTER | {"soup.json"}
    script = """
import json, sys
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from salsa_peft import use_reference
from salsa_peft.utils.errors import SalsaError
rows = Dataset.from_list([{"prompt": "kin pear", "chosen": " zinc", "rejected": " owl perch"}] * 4)
args = DPOConfig(output_dir=sys.argv[1], report_to="none", use_cpu=True, bf16=False, per_device_eval_batch_size=1, beta=1.0)
trainer = DPOTrainer("tester/tiny-base", args=args, train_dataset=rows, eval_dataset=rows.select([0]), processing_class=AutoTokenizer.from_pretrained("tester/tiny-base"),
                     peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
use_reference(trainer, "tester/soup")
found = trainer.evaluate()["eval_rewards/chosen"]
import torch
row = trainer.eval_dataset[0]
ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
def logprob(model):
    with torch.no_grad():
        logp = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return logp[len(row["prompt_ids"]) - 1 :].sum().item()
base = AutoModelForCausalLM.from_pretrained("tester/tiny-base")
start = logprob(base)
soup = logprob(PeftModel.from_pretrained(base, "tester/soup"))
assert abs(found - (start - soup)) < 1e-3 and abs(found) > 0.05, (found, start, soup)
print("the soup's")
"""
    assert "the soup's" in python(server, tmp_path / "user", script, str(tmp_path / "out"))
    server.repos["tester/soup"].commits[-1].files["fingerprint.json"] = json.dumps({"base": "0" * 64}).encode()
    refused = script.replace('use_reference(trainer, "tester/soup")', """
try:
    use_reference(trainer, "tester/soup")
except SalsaError as error:
    print(error)
    sys.exit()
""")  # fmt: skip
    assert "these weights were trained on a base with the fingerprint" in python(
        server, tmp_path / "other", refused, str(tmp_path / "out")
    )


@pytest.mark.parametrize(
    "faults",
    [
        [
            Fault("POST", "/commit/", 503, times=2),
            Fault("POST", "/api/repos/create", 429, headers={"Retry-After": "0"}),
        ],
        [Fault("POST", "/commit/", 0)],
        [Fault("PUT", "/", 0), Fault("POST", "/preupload/", 503)],
        [Fault("POST", "/api/validate-yaml", 503, body=b"<html>busy</html>")],
    ],
    ids=["busy", "cut at the commit", "cut at the upload", "busy with a page"],
)
def test_a_busy_hub_is_asked_again(server: Hub, run: Path, tmp_path: Path, faults: list[Fault]) -> None:
    """503, 429 and a cut line in the middle; still one commit."""
    publish_base(server, run)
    server.faults += faults
    done = command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/soup")
    assert done.returncode == 0, done.stderr
    assert not any(fault.times for fault in server.faults), "all were met"
    assert len(server.repos["tester/soup"].commits) == 2 and set(files(server, "tester/soup")) == ADAPTER | {
        "soup.json"
    }
    assert not (run / hub_push.PENDING).exists()


def test_a_push_that_fails_is_pending_and_made_up_for(server: Hub, run: Path, tmp_path: Path) -> None:
    """The run is as it was; others are pushed; a later push without items makes up for it."""
    publish_base(server, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    server.faults.append(Fault("POST", "tester/tiny-soup/commit/", 503, times=99))
    done = command(server, tmp_path / "home", "push", str(run), "soup", "salsa", "--to", "tester/tiny")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("1 of 2 results were not pushed (soup: tester/tiny-soup: the Hub answers 503)")
        and "to push again: salsa hub push" in last
    )
    assert done.stderr.count("next try in") == len(hub_push.WAITS)
    assert len(server.repos["tester/tiny-soup"].commits) == 1 and len(server.repos["tester/tiny-salsa"].commits) == 2
    (left,) = json.loads((run / hub_push.PENDING).read_text())
    assert left == {"item": "soup", "to": "tester/tiny-soup", "private": True, "base_model": None}
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != ".lock")
    server.faults.clear()
    other = command(server, tmp_path / "home", "push", str(run), "seed-0", "--to", "tester/seed")
    assert other.returncode == 0 and json.loads((run / hub_push.PENDING).read_text()) == [left], (
        "what is pending stays so"
    )
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("salsa:", "other:"))  # a later recipe's
    made_up = command(server, tmp_path / "home", "push", str(run))
    assert made_up.returncode == 0, made_up.stderr
    assert len(server.repos["tester/tiny-soup"].commits) == 2 and not (run / hub_push.PENDING).exists()
    assert "no results are pending" in command(server, tmp_path / "home", "push", str(run)).stderr


def test_no_login_a_wrong_token_and_another_s_namespace_are_said_at_once(
    server: Hub, run: Path, tmp_path: Path
) -> None:
    """Not tried again; pending; one line without the token."""
    publish_base(server, run)
    wrong = "hf_" + "w" * 34
    for token, to, message in (
        (wrong, "tester/soup", "the Hub answers 401; log in with `hf auth login`, or set HF_TOKEN"),
        (CANARY, "somebody/soup", "the Hub answers 403; use a namespace that your token may write to"),
    ):
        done = command(server, tmp_path / "home", "push", str(run), "soup", "--to", to, token=token)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "next try in" not in done.stderr and "Traceback" not in done.stderr and token not in done.stderr
        (run / hub_push.PENDING).unlink()
    done = command(server, tmp_path / "home", "pull", "tester/none")
    assert done.returncode == 1 and "tester/none: the Hub answers 404; check the name" in done.stderr
    server.repos["tester/open"] = Repo(private=False)
    done = command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/open")
    assert done.returncode == 1 and "tester/open: is a public repository, but the push is private" in done.stderr
    assert len(server.repos["tester/open"].commits) == 1
    (run / hub_push.PENDING).unlink()
    assert (
        command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/open", "--public").returncode == 0
    )


def test_dry_run_shows_card_and_files_and_asks_nobody(server: Hub, run: Path, tmp_path: Path) -> None:
    """Nothing is written either."""
    before = sorted(path for path in run.rglob("*"))
    done = command(server, tmp_path / "home", "push", str(run), "soup", "--to", "tester/soup", "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in (
        "soup → tester/soup (private), one commit of 10 files",
        "adapter_model.safetensors",
        f"base_model: {BASE_ID}",
        "## How it was made",
    ):
        assert part in done.stdout
    assert not server.requests and sorted(path for path in run.rglob("*")) == before


def test_full_weights_are_pushed_as_checkpoints(
    server: Hub, tmp_path: Path, tokenizer: Any, make_base: Any, make_adapter: Any
) -> None:
    """A soup is a merge of its base's finetunes."""
    run = make_run(tmp_path, tokenizer, make_base, make_adapter, lora=False)
    publish_base(server, run)
    done = command(server, tmp_path / "home", "push", str(run), "soup", "salsa", "--to", "tester/full")
    assert done.returncode == 0, done.stderr
    for name, relation in (("soup", "merge"), ("salsa", "finetune")):
        given = files(server, f"tester/full-{name}")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(given)
        front = yaml.safe_load(given["README.md"].decode().split("---\n")[1])
        assert (front["base_model_relation"], front["library_name"]) == (relation, "transformers")
        assert str(tmp_path).encode() not in given["config.json"]
    (tmp_path / "w.safetensors").write_bytes(files(server, "tester/full-soup")["model.safetensors"])
    (folder,) = [path.parent for path in run.glob("stages/soup/*/manifest.json")]
    own = load_file(folder / "model.safetensors")
    assert all(value.equal(own[name]) for name, value in load_file(tmp_path / "w.safetensors").items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "RUN", "soup"], "--to: is required with items; add --to namespace/name"),
        (
            ["push", "RUN", "soup", "--to", "../../etc"],
            "--to: found '../../etc', which is no repository id; give namespace/name",
        ),
        (["push", "RUN", "soup", "--to", "name"], "--to: found 'name', which is no repository id; give namespace/name"),
        (
            ["push", "RUN", "salas", "--to", "a/b"],
            "this recipe has no result 'salas'; did you mean salsa?",
        ),
        (["push", "RUN", "seed-7", "--to", "a/b"], "this recipe has no result 'seed-7'"),
        (["push", "RUN", "soup", "soup", "--to", "a/b"], "soup soup: name each item once"),
        (["push", "RUN", "soup", "--to", "a/b", "--base-model", "/tmp/x"], "--base-model: found '/tmp/x'"),
        (["push", "nowhere", "soup", "--to", "a/b"], "nowhere: not a run's folder, since it has no recipe.yaml"),
        (
            ["push", "RUN", "soup", "--to", "a/b--c"],
            "--to: found 'a/b--c', which is no repository id; give namespace/name",
        ),
        (["push", "RUN", "soup", "--to", "a/b.git"], "--to: found 'a/b.git'"),
        (["push", "RUN", "soup", "--to", "a/b", "--base-model", "a/b..c"], "--base-model: found 'a/b..c'"),
        (["push", "RUN", "soup", "salsa", "--to", "a/" + "x" * 93], "which is no repository id; give namespace/name"),
        (["push", "RUN", "--public"], "--public, --base-model: work only with items and --to"),
        (["pull", "a/b", "RUN"], "this folder is not empty (it has "),
        (["pull", "a/b", ""], "a/b: FOLDER and --revision must not be empty"),
        (["pull", "a"], "ID: found 'a', which is no repository id; give namespace/name"),
        (["pull", "a/b", "RUN/recipe.yaml"], "recipe.yaml: this is a file; choose a folder"),
    ],
)
def test_bad_words_are_one_line(run: Path, capsys: Any, words: list[str], message: str) -> None:
    """Code 2, nothing sent."""
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert not (run / hub_push.PENDING).exists()


def test_what_is_broken_secret_or_of_this_machine_alone_is_not_published(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, tokenizer: Any, make_base: Any, make_adapter: Any) -> None:  # fmt: skip
    """A changed file, a token in the recipe, pickled weights, a base that nobody else has."""

    next(run.glob("stages/report/*/manifest.json")).unlink()  # without a report the recipe is the run's

    def write(text: str) -> None:
        (run / "recipe.yaml").write_text(text)

    def said(*words: str) -> str:
        assert main(["push", str(run), *words, "--to", "a/b", "--dry-run"]) == 2
        return str(capsys.readouterr().err)

    recipe = (run / "recipe.yaml").read_text()
    write(recipe.replace("description: ", f"description: {CANARY} "))
    assert "recipe.yaml: contains a token of the Hub" in said("soup")
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    write(recipe.replace("description: ", "description: a-token-of-another-form "))
    assert "contains a token of the Hub" in said("soup")
    write(recipe.replace(f"base: {BASE_ID}", f"base: {tmp_path / 'base'}"))
    assert "base: base exists only on this machine; give the base's id" in said("soup")
    write(recipe)
    weights = next(run.glob("stages/soup/*/adapter_model.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "so it is not published" in said("soup")
    weights = next(run.glob("stages/ppo/salsa/*/adapter_model.safetensors"))
    weights.rename(weights.with_name("adapter_model.bin"))
    manifest = json.loads((weights.parent / "manifest.json").read_text())
    manifest["files"]["adapter_model.bin"] = manifest["files"].pop("adapter_model.safetensors")
    (weights.parent / "manifest.json").write_text(json.dumps(manifest))
    assert "has no weights in safetensors" in said("salsa")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["hub.push=[salas]"], "hub.push: this recipe has no result 'salas'; did you mean salsa?"),
        (
            ["hub.push=[soup]"],
            "hub.base_model: is required, because the base is the toy model; give the base's Hub id",
        ),
        (
            ["hub={push: [soup], base_model: nobody}"],
            "hub.base_model: found 'nobody', which is no repository id; give namespace/name",
        ),
        (
            ["hub={push: [soup], base_model: a/b, namespace: ../x}"],
            "hub.namespace: must consist of letters, digits and single dots, - and _ between them, at most 64 characters, not '../x'",
        ),
        (
            ["hub={push: [soup, soup], base_model: a/b}"],
            "hub.push: ['soup', 'soup'] has a repeated entry; give each entry only once",
        ),
        (["hub.token=hf_secret"], "hub.token: unknown key"),
    ],
)
def test_a_recipe_says_what_is_pushed_and_no_token(sets: list[str], message: str) -> None:
    """Refused before anything runs."""
    with pytest.raises(SalsaError) as error:
        load_recipe("quickstart", lora="lora", overrides=sets)
    assert message in str(error.value) and "hf_secret" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[{]", "{}", '[{"item": 3, "to": 4}]', '[{"item": "soup", "to": "a/b", "private": "no"}]']
)
def test_pending_that_can_not_be_read_is_said(tmp_path: Path, text: str) -> None:
    """Never dropped in silence."""
    runs.write_atomic(tmp_path / hub_push.PENDING, text)
    with pytest.raises(SalsaError, match="is not a list of pending pushes; remove the file"):
        hub_push.pending(tmp_path)


def test_one_pending_item_that_is_gone_stops_no_other(server: Hub, run: Path, tmp_path: Path) -> None:
    """It is named; two for one repository are not mixed; a list of what was pushed that can't be read is kept aside."""
    publish_base(server, run)
    rows = [
        {"item": item, "to": to}
        for item, to in (("gone", "tester/g"), ("soup", "tester/s"), ("salsa", "tester/t"), ("seed-0", "tester/t"))
    ]
    runs.write_atomic(run / hub_push.PENDING, json.dumps(rows))
    (run / hub_push.PUSHED).write_text("{bad")
    done = command(server, tmp_path / "home", "push", str(run))
    assert (
        done.returncode == 1
        and "this recipe has no result 'gone'" in done.stderr
        and "seed-0 is pending for the same repository" in done.stderr
    )
    assert set(server.repos) == {BASE_ID, "tester/s"}
    assert [row["item"] for row in json.loads((run / hub_push.PENDING).read_text())] == ["gone", "salsa", "seed-0"]
    assert [row["item"] for row in json.loads((run / hub_push.PUSHED).read_text())] == ["soup"]
    assert (
        "Traceback (most recent call last)"
        in command(server, tmp_path / "home", "push", str(run), "salas", "--to", "a/b", "--debug").stderr
    )


def test_a_run_that_is_half_there_is_one_line(run: Path, capsys: Any) -> None:
    """Also the report's files are held against its manifest."""
    report = next(run.glob("stages/report/*/summary.json"))
    whole = report.read_bytes()
    for text in (b"{}", b"[", None):
        report.unlink() if text is None else report.write_bytes(text)
        assert main(["push", str(run), "soup", "--to", "a/b", "--dry-run"]) == 2
        assert "so it is not published" in capsys.readouterr().err
        report.write_bytes(whole)
    (run.parent / "base" / "README.md").write_text("---\nlicense: [a\n---\n")
    report.with_name("manifest.json").unlink()
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace(f"base: {BASE_ID}", f"base: {run.parent / 'base'}")
    )
    assert main(["push", str(run), "soup", "--to", "a/b", "--dry-run", "--base-model", "a/b"]) == 0
    assert "license" not in capsys.readouterr().out.split("# b")[0]

"""The whole recipe by its command, small: every stage in its own process, then again, then pieces of what it left."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from small_recipe import ENVIRONMENT, SMALL, read, unit


def words_of(folder: Path, *words: str) -> list[str]:
    """`python -m salsa_peft.recipe quickstart --lora`, cut small."""
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    start = [sys.executable, "-m", "salsa_peft.recipe", "quickstart", "--lora"]
    return [*start, *sets, "--output-dir", str(folder), *words]


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, waited for."""
    argv = words_of(folder, *words)
    return subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("run") / "small"
    done = command(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.splitlines()[0] == f"results: {folder}"
    assert done.stdout.strip() == str(folder / "report.html")
    headline = read(unit(folder, "report") / "summary.json")["console"]
    assert {"gold reward", "in", "out", "salsa"} <= {re.split(":|  ", line)[0] for line in headline}
    before, _, last = done.stderr.partition("\nresults in ")
    assert before.splitlines()[-len(headline) :] == headline and f'from_pretrained("{folder}/salsa")' in last
    return folder


def test_every_stage_left_what_it_should(run: Path) -> None:
    """Files, and figures that are figures."""
    report = unit(run, "report")
    assert {"report.html", "report.md", "summary.json", "figures"} <= {path.name for path in report.iterdir()}
    for name in ("report.html", "report.md", "summary.json"):
        assert (run / name).read_bytes() == (report / name).read_bytes()
    shown = re.findall(r'src="(figures/[^"]+)"', (run / "report.md").read_text(encoding="utf-8"))
    assert shown and all((run / name).is_file() for name in shown), "the figures of report.md lie beside it"
    names = {
        "soup": "soup",
        "seed-2": "sft/seed-2",
        "mkl": "ppo/mkl",
        "reward": "reward",
        "answers": "evaluate",
        "toy": "toy",
    }
    assert all((run / name).resolve() == unit(run, of).resolve() for name, of in names.items())
    reward = read(unit(run, "reward") / "metrics.json")
    assert 0 <= reward["accuracy"]["held_out"]["mean"] <= 1
    assert reward["pairs"] == {"train": 115, "held_out": 13}
    for name in ("ppo", "salsa", "mkl"):
        rows = [json.loads(line) for line in (unit(run, f"ppo/{name}") / "metrics.jsonl").read_text().splitlines()]
        assert [row["update"] for row in rows] == [1, 2]
    assert rows[0]["objective/kl"] > 0
    first = [
        json.loads((unit(run, f"ppo/{name}") / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("ppo", "salsa")
    ]
    assert first[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(first[1]["objective/kl"]) > 1e-4, "with a soup as reference the KL is not zero at the start"
    landscape = read(unit(run, "landscape") / "landscape.json")
    line, control = landscape["lines"]
    assert [point["at"] for point in line["points"]] == [0, 0.5, 1]
    assert [point["weights"] for point in control["points"]] == [[0.6]]
    assert landscape["plane"]["members"] == ["seed-0", "seed-1", "seed-2"]
    evaluation = read(unit(run, "evaluate") / "evaluation.json")
    assert evaluation["models"] == ["seed-0", "soup", "seed-1", "base", "ppo", "salsa", "mkl"]
    assert set(evaluation["datasets"]) == {"in", "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        {"strategy": "greedy", "measure": "reward", "members": [0, 1, 2], "limit": 8},
        {"strategy": "learned", "steps": 2, "limit": 8, "rank": 4},
    ],
    ids=["greedy", "learned"],
)
def test_soups_whose_weights_are_found(run: Path, sets: dict[str, Any]) -> None:
    """From the seeds of the run, in a folder of its own; the run's own soup stays."""
    words = [word for key, value in sets.items() for word in ("--set", f"soup.{key}={json.dumps(value)}")]
    before = {path.parent for path in (run / "stages" / "soup").glob("*/manifest.json")}
    done = command(run, *words, "--stages", "soup")
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = {path.parent for path in (run / "stages" / "soup").glob("*/manifest.json")} - before
    found = read(made / "soup.json")
    shutil.rmtree(made)
    assert found["strategy"] == sets["strategy"] and sum(found["weights"]) == pytest.approx(1)
    best = max(found["tried"], key=lambda point: point["measure"])
    if sets["strategy"] == "greedy":
        assert len(found["tried"]) >= 4 and {round(w, 6) for w in found["weights"]} <= {1.0, 0.5, round(1 / 3, 6)}
    else:
        assert found["weights"] == pytest.approx(best["weights"]) != [0.5, 0.5]
        assert found["ranks"] == [4] and 0 < found["error"]["all"] < 1


@pytest.mark.slow
def test_a_reward_of_two_seeds_is_their_soup(run: Path) -> None:
    """WARM: one start, two orders of the data; head and deltas are the means, and the soup is measured on the same pairs."""
    import torch
    from safetensors.torch import load_file

    before = {path.parent for path in (run / "stages" / "reward").glob("*/manifest.json")}
    done = command(run, "--set", "reward.seeds=[0, 1]", "--stages", "reward")
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = {path.parent for path in (run / "stages" / "reward").glob("*/manifest.json")} - before
    figures = read(made / "metrics.json")
    assert [member["seed"] for member in figures["members"]] == [0, 1]
    assert figures["accuracy"]["held_out"]["n"] == figures["members"][0]["accuracy"]["held_out"]["n"]
    head = "base_model.model.score.weight"
    soup, *seeds = (
        load_file(folder / "adapter_model.safetensors") for folder in (made, made / "seed-0", made / "seed-1")
    )
    torch.testing.assert_close(soup[head], (seeds[0][head] + seeds[1][head]) / 2)
    shutil.rmtree(made)


def test_seeds_differ_and_the_policy_starts_at_seed_0(run: Path) -> None:
    """Other data order, other initialisation; the reward adapter and the policy move away from seed-0, of the same shapes."""
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(unit(run, f"sft/seed-{n}") / "adapter_model.safetensors") for n in (0, 1))
    assert a.keys() == b.keys()
    assert all(not torch.equal(a[key], b[key]) for key in a)
    policy, reward = (load_file(unit(run, name) / "adapter_model.safetensors") for name in ("ppo/salsa", "reward"))
    assert policy.keys() == a.keys()
    assert reward.keys() == a.keys() | {"base_model.model.score.weight"}
    distance = {
        name: sum(float((x[key] - a[key]).norm() ** 2) for key in a) for name, x in (("policy", policy), ("seed-1", b))
    }
    assert 0 < distance["policy"] < 0.2 * distance["seed-1"]


def test_the_landscapes_ends_are_the_seeds_and_its_middle_the_soup(run: Path) -> None:
    """The same prompts, seed and adapter give the same number, whether interpolated or loaded from the stage's files."""
    from salsa_peft.config.load import load_recipe
    from salsa_peft.config.schema import Generation, Source
    from salsa_peft.data import datasets
    from salsa_peft.models.adapters import lora as adapters
    from salsa_peft.models.base import load_base
    from salsa_peft.models.generation import generate_batches
    from salsa_peft.models.rewards.reward import AdapterReward
    from salsa_peft.models.tokenizers import load_tokenizer

    recipe = load_recipe(str(run / "recipe.yaml"), lora=None, overrides=[]).recipe
    toy = unit(run, "toy")
    tokenizer = load_tokenizer(str(toy / "base"))
    model = adapters.attach(load_base(str(toy / "base"), recipe.model, tokenizer), unit(run, "sft/seed-1"), "seed-1")
    adapters.attach(model, unit(run, "soup"), "soup")
    reward = AdapterReward(model, unit(run, "reward"))
    rows = datasets.prompts(Source(path=str(toy / "eval_in.jsonl")))
    tokens = [datasets.prompt_tokens(row, tokenizer) for row in rows]
    sampling: Generation = recipe.generation
    points = read(unit(run, "landscape") / "landscape.json")["lines"][0]["points"]
    for name, point in (("seed-1", points[2]), ("soup", points[1])):
        with adapters.active(model, name):
            batches = list(
                generate_batches(model, tokens, sampling, tokenizer, recipe.landscape.seed, sampling.batch_size)
            )
        scores = [score for indices, found in batches for score in reward(found, [rows[i] for i in indices]).tolist()]
        assert sum(scores) / len(scores) == pytest.approx(point["scores"]["reward"]["mean"], abs=1e-4)


def test_the_reward_model_scores_as_trls_trainer_does(run: Path) -> None:
    """One adapter on the shared base and a head, against the sequence classifier that was trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from salsa_peft.config.schema import Model
    from salsa_peft.models.adapters import lora as adapters
    from salsa_peft.models.base import load_base
    from salsa_peft.models.responses import Responses
    from salsa_peft.models.rewards.reward import AdapterReward
    from salsa_peft.models.tokenizers import load_tokenizer

    base, folder = unit(run, "toy") / "base", unit(run, "reward")
    tokenizer = load_tokenizer(str(base))
    pair = json.loads((unit(run, "toy") / "preferences.jsonl").read_text().splitlines()[0])
    prompt = list(
        tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    whole = list(tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], return_dict=True)["input_ids"])
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    expected = PeftModel.from_pretrained(classifier, str(folder)).eval()(torch.tensor([whole])).logits.item()
    model = adapters.attach(load_base(str(base), Model(dtype="float32"), tokenizer), folder, "reward")
    pad = tokenizer.pad_token_id
    response = torch.tensor([[*whole[len(prompt) :], pad, pad]])
    ids = torch.tensor([[pad, *prompt]])
    found = AdapterReward(model, folder)(
        Responses(ids, ids != pad, response, response != pad, torch.tensor([True])), [{}]
    )
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_a_merged_policy_generates_what_its_adapter_does(run: Path) -> None:
    """export: merged, a plain Transformers checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, policy = unit(run, "toy") / "base", unit(run, "ppo/salsa")
    tokenizer = AutoTokenizer.from_pretrained(policy / "merged")
    merged = AutoModelForCausalLM.from_pretrained(policy / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(policy))
    for line in (unit(run, "toy") / "eval_in.jsonl").read_text().splitlines()[:8]:
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        texts = [model.generate(**prompt, do_sample=False, max_new_tokens=10) for model in (merged, adapted)]
        assert torch.equal(*texts)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(merged.parameters(), AutoModelForCausalLM.from_pretrained(base).parameters(), strict=True)
    )


def test_a_second_run_skips_everything_and_a_damaged_file_is_redone(run: Path) -> None:
    """Within 15 s, without the libraries being loaded; a flipped bit is named."""
    start = time.perf_counter()
    again = command(run)
    seconds = time.perf_counter() - start
    assert again.returncode == 0
    lines = [line for line in again.stderr.splitlines() if "…" in line]
    assert len(lines) == 15
    assert all(line.endswith("… cached") for line in lines)
    assert seconds < 15
    weights = unit(run, "soup") / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    plan = command(run, "--dry-run")
    assert "soup" in plan.stdout
    assert "adapter_model.safetensors" in plan.stdout
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "adapter_model.safetensors" not in command(run, "--dry-run").stdout


@pytest.mark.slow
def test_a_judge_later_and_two_runs_in_one_report(run: Path, tmp_path: Path) -> None:
    """Only what is new is made; the runs' own numbers stand in the joined page; one run twice is refused."""
    other = tmp_path / "judged"
    shutil.copytree(run, other)
    done = command(
        other,
        "--set",
        "evaluate.judge=reward",
        "--set",
        'evaluate.pairs=[["salsa", "ppo"]]',
        "--stages",
        "judge,report",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [line for line in done.stderr.splitlines() if "… done" in line]
    assert [line.split(" …")[0] for line in made][-2:] == ["judge", "report"]
    (pair,) = read(unit(other, "judge") / "verdicts.json")["datasets"]["in"]["pairs"]
    rate = f"{100 * pair['adjusted_win_rate']:.1f} [{100 * pair['low']:.1f}, {100 * pair['high']:.1f}]"
    page = (other / "report.html").read_text("utf-8")
    assert "What the judge says" in page and rate.split()[0] in page and rate.split(" ", 1)[1] in page
    report = [
        sys.executable,
        "-m",
        "salsa_peft.cli.report",
        str(run),
        str(other),
        "--output-dir",
        str(tmp_path / "joined"),
    ]
    done = subprocess.run(report, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "joined" / "report.html")), done.stderr
    cells = read(tmp_path / "joined" / "summary.json")["cells"]
    (mine,) = [cell for cell in cells if cell["by"] == "reward" and cell["dataset"] == "in"]
    assert [mine[key] for key in ("wins", "losses", "ties", "low", "high")] == [
        pair[key] for key in ("wins", "losses", "ties", "low", "high")
    ]
    (gold,) = [
        cell
        for cell in cells
        if (cell["by"], cell["dataset"], cell["a"], cell["b"]) == ("gold reward", "in", "salsa", "ppo")
    ]
    known = next(
        one
        for one in read(unit(run, "report") / "summary.json")["evaluation"]["datasets"]["in"]["pairs"]
        if (one["a"], one["b"], one["measure"]) == ("salsa", "ppo", "gold")
    )
    counts = ("wins", "losses", "ties", "low", "high")
    assert [gold[key] for key in counts] == pytest.approx([known[key] for key in counts])
    twice = subprocess.run(
        [*report[:-2], str(run)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert twice.returncode == 2 and "again" in twice.stderr


def test_an_adapter_of_another_base_is_refused_and_one_without_fingerprint_noted(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    """By the fingerprint that every stage writes beside its adapter."""
    import shutil

    from salsa_peft.config.load import load_recipe
    from salsa_peft.config.references import Reference
    from salsa_peft.models.stage_context import StageContext
    from salsa_peft.models.tokenizers import load_tokenizer
    from salsa_peft.utils.errors import SalsaError
    from salsa_peft.utils.fingerprints import base_fingerprint

    base = unit(run, "toy") / "base"
    context = StageContext(load_recipe(str(run / "recipe.yaml"), lora=None, overrides=[]).recipe, base, "base", None)  # type: ignore[arg-type]
    for name in ("sft/seed-0", "reward", "soup", "ppo/salsa"):
        assert read(unit(run, name) / "fingerprint.json") == {"base": base_fingerprint(base)}
    shutil.copytree(unit(run, "soup"), tmp_path / "soup")
    context.check({"soup": tmp_path / "soup"})
    (tmp_path / "soup" / "fingerprint.json").write_text('{"base": "00"}')
    with pytest.raises(SalsaError, match="these weights were trained on a base with the fingerprint"):
        context.check({"soup": tmp_path / "soup"})
    (tmp_path / "soup" / "fingerprint.json").unlink()
    context.check({"soup": tmp_path / "soup"})  # of seeds without one, which was noted when they were taken
    assert "no fingerprint.json" not in capsys.readouterr().err
    context = replace(context, tokenizer=load_tokenizer(str(base), chat_template=str(base / "chat_template.jinja")))
    context.check({}, [Reference(label="soup", path=str(tmp_path / "soup"))])
    assert "no fingerprint.json" in capsys.readouterr().err


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The same command, not waited for."""
    return subprocess.Popen(words_of(folder, *words), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Wait for a file of the run."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_policy_that_was_killed_goes_on_and_ends_the_same(run: Path, tmp_path: Path) -> None:
    """kill -9 of the command in one policy, SIGTERM in the next; the same command then leaves the same bytes."""
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    for name in ("ppo/salsa", "ppo/mkl"):
        shutil.rmtree(unit(folder, name))
    often = ("--set", "ppo.save_steps=1", "--stages", "ppo")
    process = start(folder, *often)
    until(process, folder, "stages/ppo/salsa/*/checkpoint-2")
    process.kill()
    process.communicate()
    process = start(folder, *often)
    until(process, folder, "stages/ppo/mkl/*/checkpoint-1")
    process.terminate()
    said = process.communicate()[1]
    assert (
        process.returncode == 143 and "unfinished: resuming" in said and "ppo/salsa  resuming from checkpoint-" in said
    )
    assert "; the same command continues from it\n" in said and "resume_from_checkpoint" not in said
    assert "terminated; run the same command again to continue" in said
    done = command(folder, *often)
    assert done.returncode == 0 and "ppo/mkl  resuming from checkpoint-" in done.stderr, done.stderr
    for name in ("ppo/salsa", "ppo/mkl"):
        one, other = (read(unit(place, name) / "manifest.json")["files"] for place in (run, folder))
        assert one.keys() == other.keys() and not list(unit(folder, name).glob("checkpoint-*"))
        differing = {file for file in one if one[file] != other[file]}
        times = {"log.jsonl", "adapter_config.json", "merged/soup.json"}  # and the base's path in this folder
        assert differing <= times

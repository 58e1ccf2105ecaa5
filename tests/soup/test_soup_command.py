"""`salsa soup` as users type it: what a wrong command line is told, weights of another sum, and where the members came from (soup.json)."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from soup_members import make_llama, train
from tiny import make_base
from transformers import PreTrainedTokenizerFast

import salsa_peft
from salsa_peft.soup.__main__ import main, parser
from salsa_peft.soup.average import Options, soup
from salsa_peft.soup.summary import SoupSummary
from salsa_peft.utils.fingerprints import base_fingerprint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a0 and a1 of `base`, `saved` with a trained head, `dora`, checkpoints c0 and c1, a folder of a run."""
    folder, base = tmp_path_factory.mktemp("made"), make_llama()
    base.save_pretrained(folder / "base")
    for name, options in (
        ("a0", {}), ("a1", {"r": 3}), ("dora", {"use_dora": True}), ("saved", {"modules_to_save": ["lm_head"]}),
    ):  # fmt: skip
        member = train(base, folder / name, len(name), **options)
        (member / "fingerprint.json").write_text(json.dumps({"base": base_fingerprint(folder / "base")}))
    for name, named in (("nameless", None), ("elsewhere", "/home/someone/models/llama"), ("hub", "someone/llama")):
        shutil.copytree(folder / "a0", folder / name)
        config = json.loads((folder / "a0" / "adapter_config.json").read_text())
        (folder / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
    for name in ("c0", "c1"):
        for parameter in base.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        base.save_pretrained(folder / name)
    shutil.copytree(folder / "a0", folder / "run" / "sft" / "seed-0")
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    for name in "abcd":
        (folder / "notes" / f"{name}.txt").write_text("of the users")
    (folder / "other").mkdir()
    of_base = json.loads((folder / "base" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(of_base | {"model_type": "mistral"}))
    for name, named in (("mistral", "other"), ("nowhere-known", "someone/llama")):
        shutil.copytree(folder / "a0", folder / name)
        config = json.loads((folder / "a0" / "adapter_config.json").read_text())
        (folder / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        (folder / name / "fingerprint.json").unlink()
    return folder


WRONG = {
    "OUT nodir1 nodir2": "no such folder: nodir1, nodir2; a member is a folder of an adapter or a checkpoint, or a Hub id",
    "OUT a0 runs/x/seed-0": "no such folder: runs/x/seed-0;",
    "OUT a0 some/one": "no such folder: some/one; as a Hub id: https://huggingface.co/some/one: not in the local cache",
    "OUT a0/adapter_model.safetensors a1": "not a folder: a0/adapter_model.safetensors; a member is the folder that holds the file",
    "OUT run a0": "run holds neither an adapter (adapter_config.json) nor a checkpoint (config.json); did you mean run/sft/seed-0?",
    "OUT empty a0": "empty holds neither an adapter (adapter_config.json) nor a checkpoint (config.json)",
    "OUT a0 c1": "c1 is a full checkpoint, but a0 is an adapter; a soup cannot mix adapters and checkpoints",
    "OUT": "the following arguments are required: MEMBER",
    "OUT a0 a1 --weights 1": "weights: 1 weights (1.0) for 2 members; give one for each member",
    "OUT a0 a1 --weights 0,0": "all are 0",
    "OUT a0 a1 --weights a,b": "--weights: a,b is not a list of numbers such as 0.25,0.75",
    "OUT a0 a1 --weights 0.3 abc": "abc: unexpected argument; put positional arguments before the options",
    "OUT a0 a1 --weights=0.3 abc": "abc: unexpected argument; put positional arguments before the options",
    "OUT a0 --merge a1": "a1: unexpected argument; put positional arguments before the options",
    "OUT a0 a1 --weight 0.3 0.7": "--weight: no such option; did you mean --weights?",
    "OUT a0 a1 --rank x": "--rank: x is not a whole number of at least 1",
    "OUT a0 a1 --rank 0": "--rank: 0 is not a whole number of at least 1",
    "OUT a0 a1 --steps 1.5": "--steps: 1.5 is not a whole number of at least 1",
    "OUT a0 a1 --step-size ten": "--step-size: invalid float value: 'ten'",
    "OUT a0 a1 --strategy mean": "--strategy: invalid choice: 'mean' (choose from ",
    "notes a0 a1": "notes: this folder holds a.txt, b.txt, c.txt and 1 more but no soup.json, so it is not overwritten; choose an empty folder or one of an earlier soup",
    "notes c0 c1": "notes: this folder holds a.txt, b.txt, c.txt and 1 more but no soup.json, so it is not overwritten; choose an empty folder or one of an earlier soup",
    "notes a0 a1 --merge --base base": "notes: this folder holds a.txt, b.txt, c.txt and 1 more but no soup.json, so it is not overwritten",
    "OUT mistral mistral --merge --base base": "mistral was trained on other, a mistral model, but base is a llama model",
    "OUT mistral mistral --strategy greedy --measure json:dumps --base base": "mistral was trained on other, a mistral model, but base is",
    "OUT nowhere-known elsewhere": "elsewhere names the base '/home/someone/models/llama@main', but nowhere-known names 'someone/llama@main'",
    "OUT a0 a1 --weights 1 -1 --normalize": "sum to 0, so they cannot be normalized",
    "OUT c0 c1 --weights .5,.6": "sum to 1.1, but the weights of checkpoints must sum to 1",
    "OUT saved saved --weights .5,.6": "sum to 1.1, but they must sum to 1",
    "OUT c0 c1 --merge": "merge: True has no effect on checkpoints, only on adapters",
    "OUT c0 c1 --strategy slerp": "needs the base that they were trained from, because it works on their changes from the base",
    "OUT a0 a1 --scale nan": "scale: nan is not a finite number; use one such as 0.5",
    "OUT a0 a1 --per layer": "per: layer has no effect with strategy linear; leave it out, or use one of slerp, karcher, model_stock",
    "OUT a0 a1 --strategy ties --density 0": "density: 0.0 is not a share above 0 and at most 1; use one such as 0.2",
    "OUT a0 a1 --drop-seed 1": "drop_seed: 1 has no effect with strategy linear; leave it out, or use dare",
    "OUT a0 a1 --start c0": "c0 is a full checkpoint, but a0 is an adapter; a soup cannot mix adapters and checkpoints",
    "OUT a0 a1 --start nowhere": "no such folder: nowhere; as a Hub id: https://huggingface.co/nowhere: not in",
    "OUT a0 a1 --strategy slerp --start a0": "strategy slerp: a member equals the base or start, so its change has no direction",
    "OUT c0 c1 --scale .5": "scale 0.5 of checkpoints needs the base that they were trained from",
    "OUT c0 c1 --base base --start c0": "base: base has no effect on checkpoints beside a start; leave one of them out",
    "OUT a0 a1 --merge --rank 4": "rank: 4 has no effect with merge, because a merged soup is exact",
    "OUT a0 a1 --untie": "untie: True has an effect only with merge=True (--merge)",
    "OUT a0 a1 --quantized-base nf4": "quantized_base: nf4 has an effect only with merge=True",
    "OUT nameless a0 --merge": "has no base_model_name_or_path; name the base's folder or Hub id (--base)",
    "OUT elsewhere elsewhere --merge": "no such folder: /home/someone/models/llama, which elsewhere/adapter_config.json names as the base; "
    "give the base's folder with --base",
    "OUT hub hub --merge": "no such folder: someone/llama, which hub/adapter_config.json names as the base; give the base's folder with --base; as a Hub id",
    "OUT a0 a1 --merge --base nowhere": "no such folder: nowhere; as a Hub id: https://huggingface.co/nowhere: not in",
    "a0 a0 a1": "a0: this folder is a member or the base of the soup; choose another folder for the soup",
    "OUT dora a1": "a DoRA delta is not linear",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_told_in_one_line(
    words: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        code = main(words.split())
    except SystemExit as end:  # argparse's own
        code = end.code
    found = capsys.readouterr().err.strip()
    assert code == 2 and found.startswith("salsa soup: ") and "\n" not in found
    assert WRONG[words] in found
    assert not (made / "OUT").exists()
    assert sorted(path.name for path in (made / "notes").iterdir() if path.suffix != ".txt") == []


def shell(made: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where libraries are imported anew."""
    command = [sys.executable, "-m", "salsa_peft.soup", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{Path(salsa_peft.__file__).parents[1]}:{made}"}
    done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_merge_says_its_warnings_once_and_nothing_of_the_libraries(made: Path, tmp_path: Path) -> None:
    """Each member without a fingerprint once, with the base that it names; what a checkpoint is."""
    done = shell(made, str(tmp_path / "out"), "nowhere-known", "a1", "--merge", "--base", "base")
    bar = re.compile(r"soup:? +\d.*")
    lines = [line for line in done.stderr.splitlines() if not bar.match(line)]
    assert lines == [
        "warning: nowhere-known has no fingerprint.json, so it was not checked that this adapter was trained on base; its config names the base someone/llama"
    ]
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert done.stdout.startswith(
        f"soup of 2 adapters merged into base (linear): a checkpoint of {numbers:,} parameters, LoRA in 4 modules, "
    )


def test_greedy_says_each_warning_once(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Members are read several times: for the check, the measure, the soup and the one that greedy chose. Transformers has no bar."""
    base = make_base(tokenizer)
    for place in (base, tokenizer):
        place.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("xy"):
        (train(base, tmp_path / name, seed) / "fingerprint.json").unlink()
    (tmp_path / "of_mine.py").write_text("def size(model):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # as in a new process
    words = ["--strategy", "greedy", "--measure", "of_mine:size", "--base", "base"]
    capfd.readouterr()
    assert main(["out", "x", "y", *words]) == 0
    bar = re.compile(r"soup:? +\d.*")
    lines = [line for line in capfd.readouterr().err.splitlines() if not bar.match(line)]
    said = "warning: {} has no fingerprint.json, so its base cannot be compared with those of the other members"
    assert lines == [said.format("x"), said.format("y")]


def test_weights_of_another_sum_scale_what_was_learned(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half the weights: half the delta, as an adapter and merged; the summary and the command say so."""
    assert main([str(tmp_path / "half"), str(made / "a0"), str(made / "a1"), "--weights", "0.25,0.25"]) == 0
    assert "the weights sum to 0.5, so the soup is a scaled delta, not a mean" in capsys.readouterr().out
    mean = soup(tmp_path / "mean", [made / "a0", made / "a1"])
    assert soup(tmp_path / "half", [made / "a0", made / "a1"], [0.25, 0.25])["sum"] == 0.5
    one, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mean", "half"))
    for name, tensor in one.items():
        assert half[name].allclose(tensor * (0.5 if "lora_B" in name else 1)), name
    merged = soup(tmp_path / "merged", [made / "a0", made / "a1"], [0.25, 0.25], merge=True, base=made / "base")
    assert merged["norm"] == pytest.approx(0.5 * (mean["norm"] or 0), rel=1e-5)
    assert "sum to" not in capsys.readouterr().out


@pytest.mark.parametrize("merge", [False, True])
def test_soup_json_says_where_the_members_came_from(merge: bool, made: Path, tmp_path: Path) -> None:
    """Paths as given, hashes, base, versions; nothing that depends on the time, so that the same soup says the same."""
    given = [made / "a0", str(made / "a1")]
    options = {"base": made / "base"} if merge else {}
    summary = soup(tmp_path / "out", given, [0.25, 0.75], merge=merge, **options)
    written = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert written["provenance"] == summary["provenance"]
    found = summary["provenance"]
    assert found["salsa_peft"] == salsa_peft.__version__
    for folder, weight, member in zip(given, (0.25, 0.75), found["members"], strict=True):
        assert (member["source"], member["weight"], member["revision"]) == (str(folder), weight, None)
        assert member["base_fingerprint"] == base_fingerprint(made / "base")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert member["peft_version"] == config["peft_version"]
        for name, file in member["files"].items():
            content = (Path(folder) / name).read_bytes()
            assert file == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert set(member["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    base = found["base"]
    assert (base is not None) == merge
    if base is not None:
        assert base["fingerprint"] == base_fingerprint(made / "base")
    shutil.rmtree(tmp_path / "out")
    assert soup(tmp_path / "out", given, [0.25, 0.75], merge=merge, **options)["provenance"] == found


def test_a_checkpoints_hash_is_given_where_it_is_known(made: Path, tmp_path: Path) -> None:
    """Whole files are not hashed: the Hub's cache names a blob by its SHA-256, the path says repository and commit."""
    snapshot = tmp_path / "models--some--one" / "snapshots" / ("5e" * 20)
    shutil.copytree(made / "c0", snapshot)
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    blobs = tmp_path / "models--some--one" / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "model.safetensors", blobs / digest)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    cached, local = soup(tmp_path / "out", [snapshot, made / "c1"])["provenance"]["members"]
    assert (cached["repository"], cached["revision"]) == ("some/one", "5e" * 20)
    assert cached["files"]["model.safetensors"]["sha256"] == digest
    assert local["files"]["model.safetensors"]["sha256"] is None
    assert local["fingerprint"] == base_fingerprint(made / "c1")
    assert (
        local["files"]["config.json"]["sha256"]
        == hashlib.sha256((made / "c1" / "config.json").read_bytes()).hexdigest()
    )


def test_arguments_and_results_are_typed() -> None:
    """soup()'s keyword arguments are Options' fields with the same defaults; the command has each but the function `measure`."""
    given = inspect.signature(soup).parameters
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in given.values())
    for name, field in Options.__dataclass_fields__.items():
        assert given[name].default == field.default, name
        assert f"--{name.replace('_', '-')}" in parser().format_help()
    assert typing.get_type_hints(soup)["return"] is SoupSummary


@pytest.mark.parametrize("kind", ["adapters", "merged", "checkpoints"])
def test_a_summary_has_no_key_without_a_type(kind: str, made: Path, tmp_path: Path) -> None:
    members = [made / name for name in (("c0", "c1") if kind == "checkpoints" else ("a0", "a1"))]
    summary = soup(tmp_path / "out", members, merge=kind == "merged", base=made / "base" if kind == "merged" else None)
    assert summary.keys() <= SoupSummary.__annotations__.keys()
    json.dumps(summary, allow_nan=False)


def test_same_base_asserts_what_names_do_not_say(made: Path, tmp_path: Path) -> None:
    for name in ("a0", "elsewhere"):
        shutil.copytree(made / name, tmp_path / name)
        (tmp_path / name / "fingerprint.json").unlink()
    words = [str(tmp_path / "out"), str(tmp_path / "a0"), str(tmp_path / "elsewhere")]
    assert main(words) == 2
    assert main([*words, "--same-base"]) == 0
    merged = [str(tmp_path / "merged"), *words[1:], "--merge", "--base", str(made / "base")]
    assert main(merged) == 0  # the base is named, and its fingerprint is what members are held against

"""`salsa landscape`: a function of the model on the line and the plane, of adapters and of the checkpoints that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter, make_base

from salsa_peft.cli import landscape as landscape_command
from salsa_peft.data.toy import make_tokenizer
from salsa_peft.soup.__main__ import main as soup

FUNCTION = """
import torch

def logit(model):
    return model(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1, 7]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters a0 … a2, checkpoints c0 … c2, and a measure."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), make_tokenizer()
    make_base(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for i in range(3):
        model = make_adapter(make_base(tokenizer), "default", i)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / f"a{i}")
        model.merge_and_unload().save_pretrained(folder / f"c{i}")
        tokenizer.save_pretrained(folder / f"c{i}")
    (folder / "my_measure.py").write_text(FUNCTION)
    return folder


def run(made: Path, out: Path, members: list[str], *words: str) -> dict[str, Any]:
    """landscape.json of the command."""
    folders = [str(made / member) for member in members]
    code = landscape_command.main([str(out), *folders, "--measure", f"{made}/my_measure:logit", *words])
    assert code == 0
    return json.loads((out / "landscape.json").read_text())


@torch.no_grad()
def logit(made: Path, weights: list[float]) -> float:
    """The measure of a soup that `salsa soup` merges into the base."""
    from transformers import AutoModelForCausalLM

    out, used = made / "merged", [i for i, weight in enumerate(weights) if weight]
    words = [str(made / f"a{i}") for i in used] + ["--weights=" + ",".join(str(weights[i]) for i in used)]
    assert soup([str(out), *words, "--merge", "--base", str(made / "base")]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return float(model(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1, 7])


def test_line_and_plane_of_adapters_are_those_of_their_checkpoints(made: Path, tmp_path: Path) -> None:
    """And a point of the line is what the merged soup gives."""
    words = ("--alphas", "-0.5", "0.25", "1", "--resolution", "1")
    adapters = run(made, tmp_path / "a", ["a0", "a1", "a2"], *words, "--scales", "0.5")
    checkpoints = run(made, tmp_path / "c", ["c0", "c1", "c2"], *words)
    line, control = adapters["lines"]
    assert control["name"] == "base – a0 (shrunk, the control)" and len(control["points"]) == 1
    for one, other in zip(
        [*line["points"], *adapters["plane"]["points"]],
        [*checkpoints["lines"][0]["points"], *checkpoints["plane"]["points"]],
        strict=True,
    ):
        assert one["weights"] == other["weights"]
        assert one["scores"]["logit"]["mean"] == pytest.approx(other["scores"]["logit"]["mean"], abs=1e-4)
    assert line["points"][1]["scores"]["logit"]["mean"] == pytest.approx(logit(made, [0.75, 0.25]), abs=1e-4)
    assert len({round(point["scores"]["logit"]["mean"], 6) for point in line["points"]}) == 3
    assert adapters["plane"]["members"] == ["a0", "a1", "a2"]
    figures = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"line-logit.svg", "line-logit.png", "shrunk-logit.svg", "plane-logit.svg"} <= figures


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a0"], "MEMBER: give two (a line) or three (a plane, and the line of the first two), not 1"),
        (["a0", "a1", "--alphas", "0,nan"], "--alphas: the numbers must be finite, not 0,nan"),
        (["c0", "c1", "--scales", "0.5"], "--scales: works only with adapters, since a checkpoint's base is not known"),
        (["a0", "c1"], "a soup cannot mix adapters and checkpoints: merge the adapters into their base first"),
        (["a0", "nowhere/at/all"], "no such folder: nowhere/at/all"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(made: Path, tmp_path: Path, words: list[str], line: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    members = [str(made / word) if word[1:].isdigit() else word for word in words]
    assert landscape_command.main([str(tmp_path / "out"), *members, "--measure", f"{made}/my_measure:logit"]) == 2
    found = capsys.readouterr().err.strip()
    assert line in found and found.startswith("salsa landscape: ") and "\n" not in found
    assert not (tmp_path / "out").exists()

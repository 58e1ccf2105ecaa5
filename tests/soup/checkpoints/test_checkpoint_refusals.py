"""What a soup of full checkpoints refuses: each with one line that names file and tensor, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    Change,
    Tensors,
    again,
    files,
    parameters,
    read,
    values,
    write,
)

from salsa_peft.soup.checkpoints import streams as weight_streams
from salsa_peft.soup.checkpoints.average import average
from salsa_peft.soup.checkpoints.read import CONFIG, INDEX, SINGLE
from salsa_peft.utils.errors import SalsaError


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny tensor is several pieces and blocks, none of which ends where a tensor does."""
    monkeypatch.setattr(weight_streams, "PIECE", 200)
    monkeypatch.setattr(weight_streams, "BLOCK", 7)


def edit_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        given = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(given | changes))

    return change


def poison(value: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = value

    return again(change)


def truncate(folder: Path) -> None:
    file = folder / SINGLE
    os.truncate(file, file.stat().st_size - 5)


def lose_shard(folder: Path) -> None:
    again(lambda tensors: None, 2)(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def rename_in_index(folder: Path) -> None:
    again(lambda tensors: None, 2)(folder)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("model.norm.weight", "model.norm.bias"))


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def escape(folder: Path) -> None:
    again(lambda tensors: None, 2)(folder)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("model-00001", "../model-00001"))


def tokens(folder: Path) -> None:
    for place, vocabulary in ((folder, {"a": 0, "b": 2}), (folder.parent / "a", {"a": 0, "b": 1})):
        (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def renamed_token(folder: Path) -> None:
    for place, vocabulary in ((folder, {"a": 0, "c": 1}), (folder.parent / "a", {"a": 0, "b": 1})):
        (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def other_rope(folder: Path) -> None:
    edit_config(rope_theta=10000.0, rope_scaling=None)(folder)
    edit_config(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})(folder.parent / "a")


REFUSED = {
    "other key": (again(lambda t: t.update(extra=t.pop("scale"))), r"/model.safetensors: (scale|extra) has no place in LlamaForCausalLM"),
    "other shape": (again(lambda t: t.update({"model.norm.weight": torch.zeros(2).bfloat16()})), r"b: model.norm.weight has shape \[2\], but .* has \[16\] according to config.json"),
    "other kind": (again(lambda t: t.update({"model.norm.weight": torch.ones(16).long()})), r"b/model.safetensors: model.norm.weight has dtype I64, but BF16"),
    "architecture": (edit_config(model_type="qwen2"), r"b/config.json: model_type is 'qwen2', but 'llama' in .*a/config.json"),
    "heads": (edit_config(num_attention_heads=4), r"b/config.json: num_attention_heads is 4, but 2 in"),
    "vocabulary": (edit_config(vocab_size=41), r"b/config.json: vocab_size is 41, but 40 in .*resize_token_embeddings"),
    "tokens": (tokens, r"b/tokenizer.json: the id of token 'b' is 2, but 1 in .*a/tokenizer.json"),
    "a number's token": (renamed_token, r"b/tokenizer.json: the token of id 1 is 'c', but 'b' in"),
    "rotary embeddings": (other_rope, r"b/config.json: rope_parameters is {'rope_theta': 10000.0, .*}, but {'rope_theta': 500000.0"),
    "quantised": (edit_config(quantization_config={"quant_method": "awq"}), r"b/config.json has a quantization_config \(awq\): .*dequantize"),
    "FP8": (again(lambda t: t.update(scale=t["scale"].float().to(torch.float8_e4m3fn))), r"scale is F8_E4M3, as in quantised models"),
    "packed": (again(lambda t: t.update(w=torch.zeros(4, 1, dtype=torch.uint8))), r"b/model.safetensors: w is U8, as in quantised models"),
    "NaN": (poison(math.nan), r"b/model.safetensors: model.layers.1.mlp.up_proj.weight has a value that is not finite"),
    "infinity": (poison(-math.inf), r"b/model.safetensors: model.layers.1.mlp.up_proj.weight has a value that is not finite"),
    "truncated": (truncate, r"b/model.safetensors: truncated or damaged: it has \d+ bytes, not \d+"),
    "missing shard": (lose_shard, r"b/model-00002-of-00002.safetensors: cannot be read \(No such file or directory\); copy or download the weights again"),
    "index": (rename_in_index, r"model.safetensors.index.json: model.norm.bias is in none of the shards that the index names; save"),
    "escape": (escape, r"b/model.safetensors.index.json: weight_map is missing, empty or has values other than file names"),
    "pickled": (pickled, r"b: this folder has neither model.safetensors nor .*; it holds pytorch_model.bin, which is a pickle, and pickles are never read"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), r"b: this folder has neither model.safetensors nor model.safetensors.index.json; load"),
    "two layouts": (lambda folder: (folder / INDEX).write_text("{}"), r"b: this folder holds both model.safetensors and model.safetensors.index.json"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"b/config.json: no such file"),
    "bad config": (lambda folder: (folder / CONFIG).write_text("[1]"), r"b/config.json: the JSON is a list, but must be a mapping"),
    "adapter": (lambda folder: (folder / CONFIG).rename(folder / "adapter_config.json"), r"b: this is a PEFT adapter, not a full checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_names_file_and_tensor_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    change, line = REFUSED[name]
    start = parameters if name in ("other shape", "other kind") else values
    a, b = (write(tmp_path / folder, start(seed)) for seed, folder in enumerate("ab"))
    change(b)
    with pytest.raises(SalsaError, match=line) as caught:
        average(tmp_path / "out", [a, b], [0.5, 0.5])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ([1.0], r"weights: 1 weights \(1.0\) for 2 members; give one for each member"),
        ([0.5, math.nan], "weights: 0.5, nan are not all finite numbers"),
        ([0.0, 0.0], "weights: all of them are 0; give at least one member a weight other than 0"),
        ([], r"weights: 0 weights \(\) for 2 members"),
    ],
)
def test_weights_are_checked(tmp_path: Path, weights: list[float], line: str) -> None:
    with pytest.raises(SalsaError, match=line):
        average(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], weights)


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    """Members are finite, the extrapolated soup is not."""
    folders = [
        write(tmp_path / name, {"w": torch.full((9,), value).half()}) for name, value in (("a", 6e4), ("b", -6e4))
    ]
    with pytest.raises(
        SalsaError, match=r"w: the weighted sum \(weights 2.0, -1.0\) has values that float16 cannot hold"
    ):
        average(tmp_path / "out", folders, [2, -1])


def test_a_manifest_tells_a_flipped_bit(tmp_path: Path) -> None:
    """As cache.write_manifest writes it; another tool's manifest.json is not looked at."""
    a, b = write(tmp_path / "a", values(0)), write(tmp_path / "b", values(1))
    listed = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in b.iterdir()
    }
    (b / "manifest.json").write_text(json.dumps({"files": listed}))
    (a / "manifest.json").write_text(json.dumps({"files": ["of another tool"]}))
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    raw = bytearray((b / SINGLE).read_bytes())
    raw[-100] ^= 1
    (b / SINGLE).write_bytes(raw)
    with pytest.raises(
        SalsaError,
        match=r"b/model.safetensors: the file changed: it has \d+ bytes and SHA-256 .*; copy or make the checkpoint again",
    ):
        average(tmp_path / "none", [a, b], [0.5, 0.5])
    listed[CONFIG]["size"] = 1
    (b / "manifest.json").write_text(json.dumps({"files": listed}))
    with pytest.raises(
        SalsaError,
        match=r"b/config.json: the file changed: it has \d+ bytes and SHA-256 .*, but manifest.json lists 1 bytes and .*; copy or make the checkpoint again",
    ):
        average(tmp_path / "none", [a, b], [0.5, 0.5])
    assert not (tmp_path / "none").exists()


def test_only_a_soup_is_written_over(tmp_path: Path) -> None:
    """Nor is a member, a file, an adapter or somebody's model; an earlier soup of more shards leaves none of them."""
    a, b = write(tmp_path / "a", values(0), 3), write(tmp_path / "b", values(1))
    os.symlink(a, tmp_path / "link")
    for out, line in (
        (a, "this folder is a member or the base of the soup; choose another folder"),
        (tmp_path / "link", "this folder is a member or the base of the soup; choose another folder"),
    ):
        with pytest.raises(SalsaError, match=line):
            average(out, [a, b], [0.5, 0.5])
    foreign = write(tmp_path / "foreign", values(2))
    before = files(foreign)
    with pytest.raises(
        SalsaError,
        match=r"foreign: this folder holds config.json, model.safetensors but no soup.json, so it is not overwritten",
    ):
        average(foreign, [a, b], [0.5, 0.5])
    assert files(foreign) == before
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, line in (
        ("adapter", "adapter: this folder holds an adapter, which Transformers would add to the soup"),
        ("file", "file: this is a file; choose a folder"),
    ):
        with pytest.raises(SalsaError, match=line):
            average(tmp_path / name, [a, b], [0.5, 0.5])
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    average(tmp_path / "out", [b, a], [0.5, 0.5])
    average(tmp_path / "fresh", [b, a], [0.5, 0.5])
    assert files(tmp_path / "out", ("soup.json", "notes.txt")) == files(tmp_path / "fresh")
    assert (tmp_path / "out" / "notes.txt").exists()


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a", values(0)), write(tmp_path / "b", values(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (10**9, 10**9 - 10, 10))
    with pytest.raises(SalsaError, match=r"out: the soup: .* free on the disk of"):
        average(tmp_path / "out", [a, b], [0.5, 0.5])


def test_the_same_rotary_embeddings_of_two_versions(tmp_path: Path) -> None:
    """Transformers 4's fields against 5's."""
    a, b = write(tmp_path / "a", values(0)), write(tmp_path / "b", values(1))
    edit_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 8.0})(a)
    edit_config(rope_parameters={"rope_theta": 500000, "rope_type": "linear", "factor": 8})(b)
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    assert (tmp_path / "out" / CONFIG).read_bytes() == (a / CONFIG).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_sum_that_its_dtype_cannot_hold_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    """Finite members, the second tensor of a block; weights are to blame, not a training."""
    large = torch.finfo(dtype).max * 0.9
    folders = [
        write(tmp_path / name, {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1, value, 1], dtype=dtype)})
        for name, value in (("one", large), ("two", -large))
    ]
    line = rf"b: the weighted sum \(weights 1.5, -0.5\) has values that {str(dtype)[6:]} cannot hold"
    with pytest.raises(SalsaError, match=line) as caught:
        average(tmp_path / "out", folders, [1.5, -0.5])
    assert "train" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_figures_that_float64_cannot_hold_are_null(tmp_path: Path) -> None:
    """2^600 squared; and in bf16 a difference that float32 cannot hold, of a mean that it can."""
    for name, dtype, pair, mean in (
        ("wide", torch.float64, (2.0**600, 3 * 2.0**600), 2.0**601),
        ("narrow", torch.bfloat16, (2.0**127, -(2.0**127)), 0.0),
    ):
        folders = [write(tmp_path / name / str(i), {"w": torch.full((9,), x, dtype=dtype)}) for i, x in enumerate(pair)]
        summary = average(tmp_path / name / "out", folders, [0.5, 0.5])
        assert torch.equal(read(tmp_path / name / "out")["w"], torch.full((9,), mean, dtype=dtype))
        distance = summary["pairs"][0]["distance"]
        assert distance is None if name == "wide" else distance == 3 * 2.0**128


def test_a_refusal_leaves_an_earlier_soup_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a later shard, no room for both, a member whose manifest says other bytes; and then one that is whole replaces it."""
    a, b, c = (write(tmp_path / name, values(i), 3) for i, name in enumerate("abc"))
    poison(math.nan)(d := write(tmp_path / "d", values(3)))
    out = tmp_path / "out"
    average(out, [a, b], [0.5, 0.5])
    before = files(out, ())
    with pytest.raises(SalsaError, match="not finite"):
        average(out, [a, d], [0.5, 0.5])
    assert files(out, ()) == before
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: (10**9, 10**9 - 10, 10))
        with pytest.raises(SalsaError, match=r"out: the soup beside the earlier soup: .* free on the disk of"):
            average(out, [a, c], [0.5, 0.5])
    assert files(out, ()) == before
    average(out, [a, c], [0.5, 0.5])
    average(tmp_path / "fresh", [a, c], [0.5, 0.5])
    assert files(out) == files(tmp_path / "fresh")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "fresh").iterdir()}

"""Soups of full checkpoints: float64's mean to the last bit but for ties, member 0's files, and kills that change nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    PLAIN,
    SHAPES,
    SIZES,
    assert_rounded,
    files,
    parameters,
    read,
    values,
    write,
)

from salsa_peft.soup.checkpoints import streams as weight_streams
from salsa_peft.soup.checkpoints.average import average, grams
from salsa_peft.soup.checkpoints.read import CONFIG, SINGLE
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import as_bytes, make_header, safetensors_dtype, safetensors_writer


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny tensor is several pieces and blocks, none of which ends where a tensor does."""
    monkeypatch.setattr(weight_streams, "PIECE", 200)
    monkeypatch.setattr(weight_streams, "BLOCK", 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "weights", [[0.3, 0.7], [1.5, -0.5], [0.2, 0.3, 0.5], [0.25] * 4, [0.4, 0.4], [1.0, -1.0]], ids=str
)
def test_the_sum_is_float64s_rounded_once(tmp_path: Path, dtype: torch.dtype, weights: list[float]) -> None:
    """Two to four members, extrapolated, and sums that are not 1."""
    members = [values(seed, dtype) for seed in range(len(weights))]
    folders = [write(tmp_path / str(i), tensors) for i, tensors in enumerate(members)]
    average(tmp_path / "out", folders, weights)
    found = read(tmp_path / "out")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (dtype, tensor.shape) for name, tensor in members[0].items()
    }
    assert_rounded(found, members, weights)


def test_members_may_be_cut_and_typed_otherwise(tmp_path: Path) -> None:
    """Two shards, one file and three shards; bf16, float32, float16: the layout and the dtype are member 0's."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    members = [values(seed, dtype) for seed, dtype in enumerate(dtypes)]
    folders = [
        write(tmp_path / str(i), tensors, shards, reverse=i == 2)
        for i, (tensors, shards) in enumerate(zip(members, (2, 1, 3), strict=True))
    ]
    weights = [0.5, 0.25, 0.25]
    summary = average(tmp_path / "out", folders, weights)
    assert_rounded(read(tmp_path / "out"), members, weights)
    for path in folders[0].iterdir():
        if path.suffix == ".safetensors":
            first, ours = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
            length = 8 + int.from_bytes(first[:8], "little")
            assert (ours[:length], len(ours)) == (first[:length], len(first))
        else:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (summary["shards"], summary["dtypes"], summary["tensors"]) == (2, {"BF16": 6}, 6)


@pytest.mark.parametrize("odd", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], [0.0, 0.4, 0.6]], ids=str)
def test_a_tensor_of_another_dtype_ends_a_run(tmp_path: Path, odd: tuple[int, ...], weights: list[float]) -> None:
    """Norms in float32 amid bf16, in some members, all with the same order of bytes; also where the first one is not read."""
    members = [values(i) for i in range(3)]
    for i in odd:
        members[i]["model.norm.weight"] = members[i]["model.norm.weight"].float() / 3
    folders = [write(tmp_path / str(i), tensors) for i, tensors in enumerate(members)]
    for folder, tensors in zip(folders, members, strict=True):  # safetensors' own writer sorts by dtype
        layout = [(name, safetensors_dtype(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]
        with safetensors_writer(folder / SINGLE, make_header(layout)) as write_next:
            for tensor in tensors.values():
                write_next(as_bytes(tensor))
    average(tmp_path / "out", folders, weights)
    found = read(tmp_path / "out")
    assert found["model.norm.weight"].dtype == members[0]["model.norm.weight"].dtype
    assert_rounded(found, members, weights)


def test_runs_are_as_long_as_the_files_allow(tmp_path: Path) -> None:
    """Equal layouts are one flat stream; a member in another order is cut where it must be."""
    from salsa_peft.soup.checkpoints.read import read_checkpoint

    one = read_checkpoint(write(tmp_path / "a", values(0)))
    two = read_checkpoint(write(tmp_path / "b", values(1), 2))
    names, plans = list(one.tensors), [weight_streams.SumPlan(2, [0.5, 0.5], 0) for _ in one.tensors]
    same, own = [plans[0]] * len(names), plans
    assert len(weight_streams.runs_of(names, [one.tensors, one.tensors], one.tensors, same)) == 1
    assert len(weight_streams.runs_of(names, [one.tensors, two.tensors], one.tensors, same)) == len(names)
    assert len(weight_streams.runs_of(names, [one.tensors, one.tensors], one.tensors, own)) == len(names)


def test_the_one_weight_and_equal_members_are_to_the_bit(tmp_path: Path) -> None:
    """−0.0 and subnormals included."""
    tensors = values(0)
    tensors["model.norm.weight"][:4] = torch.tensor([-0.0, 1e-40, -1e-40, 3e38], dtype=torch.bfloat16)
    a, b = write(tmp_path / "a", tensors), write(tmp_path / "b", values(1))
    same = write(tmp_path / "same", tensors, 2)
    for name, members, weights in (
        ("one", [a, b], [1.0, 0.0]),
        ("last", [b, a], [0.0, 1.0]),
        ("equal", [a, same, a], [0.2, 0.3, 0.5]),
    ):
        average(tmp_path / name, members, weights)
        assert (tmp_path / name / SINGLE).read_bytes() == (a / SINGLE).read_bytes(), name


def test_small_differences_whose_square_vanishes_still_count(tmp_path: Path) -> None:
    """1e-30 squared is 0 in float32; and 1e30 squared infinite."""
    members = [{"w": torch.full((64,), number, dtype=torch.bfloat16)} for number in (1e-30, 3e-30)]
    large = [{"w": torch.full((64,), number, dtype=torch.bfloat16)} for number in (1e30, 3e30)]
    for name, pair in (("small", members), ("large", large)):
        folders = [write(tmp_path / name / str(i), tensors) for i, tensors in enumerate(pair)]
        summary = average(tmp_path / name / "out", folders, [0.5, 0.5])
        assert_rounded(read(tmp_path / name / "out"), pair, [0.5, 0.5])
        distance = float((pair[0]["w"].double() - pair[1]["w"].double()).norm())
        assert name == "small" or math.isclose(summary["pairs"][0]["distance"], distance, rel_tol=1e-6)


def test_members_permuted_with_their_weights_give_the_same(tmp_path: Path) -> None:
    """The pivot is the member of the largest weight, whatever its place; the order of the sum may move a tie."""
    folders = [write(tmp_path / str(i), values(i, torch.float32)) for i in range(3)]
    weights, order = [0.2, 0.5, 0.3], [2, 0, 1]
    average(tmp_path / "one", folders, weights)
    average(tmp_path / "two", [folders[i] for i in order], [weights[i] for i in order])
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-7) for name in one)


def test_distances_norms_and_cosines(tmp_path: Path) -> None:
    """Against float64, all tensors as one vector; with a base also of what each adds to it; a member of weight 0 has none."""
    members = [values(seed, torch.float32) for seed in range(4)]
    folders = [write(tmp_path / str(i), tensors, i % 2 + 1) for i, tensors in enumerate(members)]
    flat = [torch.cat([tensors[name].double().flatten() for name in SHAPES]) for tensors in members]
    summary = average(tmp_path / "plain", folders[:3], [0.5, 0.5, 0.0])
    (pair,) = summary["pairs"]
    assert pair == {
        "a": "0",
        "b": "1",
        "distance": pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-6),
        "cosine": None,
    }
    assert [member["read"] for member in summary["members"]] == [True, True, False]
    summary = average(
        tmp_path / "based", folders[:3], [0.5, 0.75, -0.25], base=folders[3], names=["x", "y", "z"], more={"asked": 1}
    )
    assert summary["asked"] == 1
    deltas = [vector - flat[3] for vector in flat[:3]]
    assert [member["norm"] for member in summary["members"]] == pytest.approx(
        [float(d.norm()) for d in deltas], rel=1e-6
    )
    for pair, (i, j) in zip(summary["pairs"], [(0, 1), (0, 2), (1, 2)], strict=True):
        assert pair["a"] + pair["b"] == "xyz"[i] + "xyz"[j]
        assert pair["distance"] == pytest.approx(float((flat[i] - flat[j]).norm()), rel=1e-6)
        cosine = float(deltas[i] @ deltas[j] / deltas[i].norm() / deltas[j].norm())
        assert pair["cosine"] == pytest.approx(cosine, abs=1e-6)
    total = 0.5 * deltas[0] + 0.75 * deltas[1] - 0.25 * deltas[2]
    assert summary["norm"] == pytest.approx(float(total.norm()), rel=1e-6)
    (found,) = grams(folders[:3], folders[3]).values()
    expected = torch.stack(deltas) @ torch.stack(deltas).T
    assert (found.dtype, found.shape) == ("float64", (3, 3))
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-6, atol=1e-4)
    assert {name: json.loads((tmp_path / "based" / "soup.json").read_text())[name] for name in summary} == summary


def test_what_goes_with_it_and_what_does_not(tmp_path: Path) -> None:
    """Member 0's configuration and tokenizer; no card, no training state, no pickle, no code; nothing of ours beside soup.json."""
    a, b = write(tmp_path / "a", values(0)), write(tmp_path / "b", values(1))
    kept = ("generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "vocab.txt")
    for name in (
        *kept,
        "README.md",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "modeling_x.py",
        "merges.bin",
    ):
        (a / name).write_text("{}")
    (a / "additional_chat_templates").mkdir()
    (a / "additional_chat_templates" / "tool.jinja").write_text("x")
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    assert files(tmp_path / "out", ()).keys() == {*kept, "tool.jinja", CONFIG, SINGLE, "soup.json"}
    assert (tmp_path / "out" / CONFIG).read_bytes() == (a / CONFIG).read_bytes()


def test_whole_numbers_must_agree(tmp_path: Path) -> None:
    """An integer or bool tensor is taken over; one that differs is named."""
    buffers = {"ids": torch.arange(300), "mask": torch.arange(9) % 2 == 0}
    a, b = write(tmp_path / "a", values(0) | buffers), write(tmp_path / "b", values(1) | buffers)
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    found = read(tmp_path / "out")
    assert torch.equal(found["ids"], buffers["ids"]) and torch.equal(found["mask"], buffers["mask"])
    wrong = buffers["ids"].clone()
    wrong[299] = 0
    c = write(tmp_path / "c", values(1) | buffers | {"ids": wrong})
    with pytest.raises(SalsaError, match=r"c/model\.safetensors: the integers in ids differ from those in"):
        average(tmp_path / "none", [a, c], [0.5, 0.5])
    average(tmp_path / "out", [a, c], [1, 0])  # not read


def test_tied_embeddings_may_be_saved_twice(tmp_path: Path) -> None:
    """Member 0 decides whether a tied head is written. A head of its own in any member is kept: the result is then untied."""
    tied = PLAIN | {"tie_word_embeddings": True}
    single = [{name: t for name, t in parameters(i).items() if name != "lm_head.weight"} for i in (0, 1)]
    both = [tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} for tensors in single]
    a, b = write(tmp_path / "a", single[0], config=tied), write(tmp_path / "b", both[1], config=tied)
    average(tmp_path / "out", [a, b], [0.5, 0.5])
    assert_rounded(read(tmp_path / "out"), single, [0.5, 0.5])
    average(tmp_path / "turned", [b, a], [0.5, 0.5])
    found = read(tmp_path / "turned")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    odd = both[1] | {"lm_head.weight": both[1]["lm_head.weight"].clone()}
    odd["lm_head.weight"][-1, -1] += 1
    c, d = write(tmp_path / "c", odd, config=tied), write(tmp_path / "d", odd, config=PLAIN)
    for out, members in {"ac": [a, c], "ca": [c, a], "ad": [a, d], "da": [d, a]}.items():
        average(tmp_path / out, members, [0.5, 0.5])
        assert_rounded(read(tmp_path / out), [both[0], odd], [0.5, 0.5])
        assert json.loads((tmp_path / out / CONFIG).read_text())["tie_word_embeddings"] is False
    alone = dict(single[1])
    alone["lm_head.weight"] = alone.pop("model.embed_tokens.weight")
    average(tmp_path / "alone", [a, write(tmp_path / "head", alone, config=tied)], [0.5, 0.5])
    assert files(tmp_path / "alone") == files(tmp_path / "out")
    silent = {key: value for key, value in PLAIN.items() if key != "tie_word_embeddings"}  # not tied by Llama's default
    e, f = write(tmp_path / "e", single[0], config=silent), write(tmp_path / "f", odd, config=silent)
    with pytest.raises(
        SalsaError, match=r"/e: its model \(LlamaForCausalLM\) has no lm_head.weight, which is in .*/f/model.*"
    ):
        average(tmp_path / "none", [e, f], [0.5, 0.5])


STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "pwrite", "fsync", "posix_fallocate")
"""The functions of os that change files."""


def killed(moment: int, work: Callable[[], object]) -> bool:
    """Do the work in a fork that kill -9 ends before its n-th step; whether it came to that."""
    child = os.fork()
    if child == 0:
        numbers = itertools.count(1)

        def step(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*given: Any, **options: Any) -> Any:
                if next(numbers) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **options)

            return counted

        try:
            for name in STEPS:
                setattr(os, name, step(getattr(os, name)))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def visible(folder: Path) -> dict[str, bytes]:
    """Path → content of the files that are not hidden; soup.json, which says how long it took, without its content."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): b"" if name.name == "soup.json" else path.read_bytes()
        for name, path in paths.items()
        if not name.parts[0].startswith(".")
    }


@pytest.mark.parametrize("over_another", [False, True])
def test_killed_anywhere_no_half_is_taken_for_a_soup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_another: bool
) -> None:
    """Before every step: no config.json, or the earlier soup, or the whole new one. The next run, of this soup or of another, ends with the
    bytes of one that nothing disturbed, and with no other files."""
    monkeypatch.setattr(weight_streams, "PIECE", 2000)
    monkeypatch.setattr(weight_streams, "BLOCK", 1000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a step like the others, without its time
    a, b, c = (write(tmp_path / name, values(i), i % 2 + 1) for i, name in enumerate("abc", 1))
    (a / "tokenizer.json").write_text("{}")
    (b / "additional_chat_templates").mkdir()
    (b / "additional_chat_templates" / "tool.jinja").write_text("x")
    soups = [([a, b], [0.25, 0.75]), ([b, a], [0.5, 0.5]), ([c, a], [0.5, 0.5])]
    fresh = [tmp_path / f"fresh{i}" for i in range(len(soups))]
    for folder, (members, weights) in zip(fresh, soups, strict=True):
        average(folder, members, weights)
    expected = [visible(folder) for folder in fresh]
    whole = [expected[0], *([expected[1]] if over_another else [])]
    for moment in itertools.count(1):
        out = tmp_path / str(moment)
        if over_another:
            shutil.copytree(fresh[1], out)
        if not killed(moment, lambda out=out: average(out, *soups[0])):  # type: ignore[misc]
            break
        assert not (out / CONFIG).exists() or visible(out) in whole
        then = 2 if moment % 2 else 0
        average(out, *soups[then])
        assert visible(out) == expected[then]
        assert not any(path.name.startswith(".") for path in out.iterdir())
        shutil.rmtree(out)
    assert moment > 35
    assert visible(out) == expected[0]


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", values(0), 2), write(tmp_path / "b", values(1))
    told: list[tuple[int, int]] = []
    average(tmp_path / "out", [a, b], [0.5, 0.5], progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in values(0).values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_plain_transformers_opens_it_with_the_mean_models_logits(tmp_path: Path) -> None:
    """Two tiny Llamas, one of them in shards, tied; float32, 1e-5."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    models, folders = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3)
        models.append(LlamaForCausalLM(config).eval())
        folders.append(tmp_path / str(seed))
        models[-1].save_pretrained(folders[-1], max_shard_size="4KB" if seed else "1GB")
    average(tmp_path / "out", folders, [0.3, 0.7])
    average(tmp_path / "sharded", folders[::-1], [0.7, 0.3])
    for other, mine in zip(models[1].parameters(), models[0].parameters(), strict=True):
        mine.data.mul_(0.3).add_(other.data, alpha=0.7)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        for name in ("out", "sharded"):
            opened = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            assert torch.allclose(opened(ids).logits, models[0](ids).logits, rtol=0, atol=1e-5)

"""Soups of full checkpoints: float64's mean to the last bit but for ties, member 0's files, and kills that change nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    PLAIN,
    SHAPES,
    SIZES,
    again,
    assert_rounded,
    files,
    parameters,
    read,
    values,
    write,
)
from paths import ROOT

from salsa_peft.soup.checkpoints import streams as weight_streams
from salsa_peft.soup.checkpoints import write as checkpoint_output
from salsa_peft.soup.checkpoints.average import average, gram, main
from salsa_peft.soup.checkpoints.read import CONFIG, SINGLE
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import as_bytes, make_header, safetensors_dtype, safetensors_writer


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny tensor is several pieces and blocks, none of which ends where a tensor does."""
    monkeypatch.setitem(weight_streams.PIECE, "cpu", 200)
    monkeypatch.setitem(weight_streams.BLOCK, "cpu", 7)


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
    names = list(one.tensors)
    assert len(weight_streams.runs_of(names, [one.tensors, one.tensors], one.tensors)) == 1
    assert len(weight_streams.runs_of(names, [one.tensors, two.tensors], one.tensors)) == len(names)


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
    found = gram(folders[:3], folders[3])
    expected = torch.stack(deltas) @ torch.stack(deltas).T
    assert (found.dtype, found.shape) == (torch.float64, (3, 3))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-4)
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
    with pytest.raises(SalsaError, match=r"c/model\.safetensors: ids: found other whole numbers"):
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
    with pytest.raises(SalsaError, match=r"/e: LlamaForCausalLM there has no lm_head.weight, which is in .*/f/model"):
        average(tmp_path / "none", [e, f], [0.5, 0.5])


KILLED = """
import os, sys
from salsa_peft.soup.checkpoints import streams as weight_streams
from salsa_peft.soup.checkpoints.average import average
weight_streams.PIECE["cpu"] = 200
out, a, b, moment = *sys.argv[1:4], int(sys.argv[4])
replace, count = os.replace, 0
def kill(source, target):
    global count
    count += 1
    if count == moment:
        assert not {"peft", "transformers", "trl"} & set(sys.modules)  # they would cost more memory than the soup does
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = kill
average(out, [a, b], [0.25, 0.75])
print(count)
"""


def kill(out: Path, a: Path, b: Path, moment: int) -> subprocess.CompletedProcess[str]:
    """Make the soup in a process that is killed before its n-th rename."""
    command = [sys.executable, "-c", KILLED, str(out), str(a), str(b), str(moment)]
    root = ROOT
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every rename (raised there; once killed for good): no config.json yet, and whole shards are kept."""
    a, b = write(tmp_path / "a", values(0), 3), write(tmp_path / "b", values(1), 2)
    (a / "tokenizer.json").write_text("{}")
    average(tmp_path / "whole", [a, b], [0.25, 0.75])
    expected, replace = files(tmp_path / "whole"), os.replace
    kept = []
    for moment in range(1, 100):
        out, count = tmp_path / str(moment), 0

        def stop(source: Any, target: Any, moment: int = moment) -> None:
            nonlocal count
            count += 1
            if count == moment:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        try:
            average(out, [a, b], [0.25, 0.75])
            break
        except KeyboardInterrupt:
            assert not (out / CONFIG).exists()
        monkeypatch.setattr(os, "replace", replace)
        kept.append(average(out, [a, b], [0.25, 0.75])["shards_kept"])
        assert files(out) == expected
    assert kept[:9] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    killed = kill(tmp_path / "killed", a, b, 4)
    assert killed.returncode == -9, killed.stderr
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert any(re.fullmatch(r"\.model-0000\d-of-00003\.safetensors\.\d+\.tmp", name) for name in left), left
    monkeypatch.setattr(os, "replace", replace)
    assert average(tmp_path / "killed", [a, b], [0.25, 0.75])["shards_kept"] == 1
    assert files(tmp_path / "killed") == expected


def test_another_soups_remains_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, another member, or a member that was saved again since."""
    a, b, c = (write(tmp_path / name, values(i), 2) for i, name in enumerate("abc"))

    def half(out: Path) -> None:
        note = checkpoint_output.Output.note

        def stop(self: checkpoint_output.Output) -> None:
            note(self)
            if len(self.done) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_output.Output, "note", stop)
            with pytest.raises(KeyboardInterrupt):
                average(out, [a, b], [0.25, 0.75])

    for name, members, weights in (("w", [a, b], [0.5, 0.5]), ("m", [a, c], [0.25, 0.75]), ("t", [a, b], [0.25, 0.75])):
        half(tmp_path / name)
        if name == "t":
            again(lambda t: t["model.norm.weight"].add_(1), 2)(b)
        summary = average(tmp_path / name, members, weights)
        average(tmp_path / f"{name}-fresh", members, weights)
        assert summary["shards_kept"] == 0
        assert files(tmp_path / name) == files(tmp_path / f"{name}-fresh")


def test_killed_while_it_makes_room_it_is_still_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier soup's files go one by one: after any of them the next run takes the folder, and config.json went first."""
    a, b = write(tmp_path / "a", values(0), 3), write(tmp_path / "b", values(1), 2)
    average(tmp_path / "whole", [b, a], [0.5, 0.5])
    unlink = Path.unlink
    for moment in range(1, 12):
        out, count = tmp_path / str(moment), 0
        average(out, [a, b], [0.5, 0.5])

        def stop(path: Path, missing_ok: bool = False, moment: int = moment, out: Path = out) -> None:
            nonlocal count
            if path.parent == out and path.exists() and not path.name.startswith("."):
                count += 1
                if count == moment:
                    raise KeyboardInterrupt
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", stop)
            try:
                average(out, [b, a], [0.5, 0.5])
            except KeyboardInterrupt:
                assert moment == 1 or not (out / CONFIG).exists()
        average(out, [b, a], [0.5, 0.5])
        assert files(out) == files(tmp_path / "whole")
        if count < moment:
            break
    assert moment > 4


def test_config_that_outlived_a_kill_goes_before_another_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between config.json and the journal's end; then another soup is begun there and killed too: nothing opens."""
    a, b = write(tmp_path / "a", values(0), 3), write(tmp_path / "b", values(1), 3)
    unlink, note, out = Path.unlink, checkpoint_output.Output.note, tmp_path / "out"

    def stop_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == checkpoint_output.JOURNAL:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    def stop_note(self: checkpoint_output.Output) -> None:
        note(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_unlink)
        with pytest.raises(KeyboardInterrupt):
            average(out, [a, b], [0.5, 0.5])
    assert (out / CONFIG).exists()
    (out / "soup.json").unlink()  # so that the journal alone says what is there
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_output.Output, "note", stop_note)
        with pytest.raises(KeyboardInterrupt):
            average(out, [a, b], [0.25, 0.75])
    assert not (out / CONFIG).exists()


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


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and the summary, or 2 and one line."""
    a, b = write(tmp_path / "a", values(0)), write(tmp_path / "b", values(1))
    assert main([str(tmp_path / "out"), str(a), str(b), "--weights", "0.25,0.75"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.25, 0.75]
    assert main([str(tmp_path / "x"), str(a), str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_killed_while_it_takes_an_earlier_soups_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every rename: the earlier soup is whole, or config.json is gone; the next run ends with the same bytes."""
    a, b = write(tmp_path / "a", values(0), 3), write(tmp_path / "b", values(1), 2)
    average(tmp_path / "whole", [a, b], [0.25, 0.75])
    average(tmp_path / "earlier", [b, a], [0.5, 0.5])
    expected, earlier, replace = files(tmp_path / "whole"), files(tmp_path / "earlier"), os.replace
    kept = []
    for moment in range(1, 100):
        out, count = tmp_path / str(moment), 0
        shutil.copytree(tmp_path / "earlier", out)

        def stop(source: Any, target: Any, moment: int = moment) -> None:
            nonlocal count
            count += 1
            if count == moment:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        try:
            average(out, [a, b], [0.25, 0.75])
            break
        except KeyboardInterrupt:
            there = {path.name for path in out.iterdir() if path.is_file()}
            assert CONFIG not in there or earlier.keys() <= there
        finally:
            monkeypatch.setattr(os, "replace", replace)
        kept.append(average(out, [a, b], [0.25, 0.75])["shards_kept"])
        assert files(out) == expected
    assert kept[:8] == [0, 0, 0, 1, 1, 2, 2, 3] and kept[-1] == 3

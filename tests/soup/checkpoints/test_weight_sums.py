"""The blocks of a soup on a CPU: bfloat16 in halves, ties to even, edges of blocks and rows, and the same bytes whoever is faster."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import Tensors, assert_rounded, files, read, values, write
from paths import ROOT

from salsa_peft.soup.arrays import narrow
from salsa_peft.soup.checkpoints import streams as weight_streams
from salsa_peft.soup.checkpoints.arithmetic import ROW, BlockDtypes, BlockSums, NotFinite, SumPlan
from salsa_peft.soup.checkpoints.average import average
from salsa_peft.soup.checkpoints.read import CONFIG, SINGLE
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.safetensors_io import as_bytes as bytes_of
from salsa_peft.utils.safetensors_io import make_header, safetensors_dtype, safetensors_writer

BF16 = torch.bfloat16
EDGES = [1, 2, 7, ROW - 1, ROW, ROW + 1, 2 * ROW + 5]


def bits(*numbers: int) -> torch.Tensor:
    """bfloat16 by its 16 bits."""
    return torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(BF16)


def add(
    sums: BlockSums, members: list[torch.Tensor], out: torch.dtype = BF16, write: bool = True
) -> tuple[torch.Tensor, list[float]]:
    """A block's sum and products; what lies behind the block's values is left as it was."""
    for row, member in zip(sums.raw, members, strict=True):
        row[: member.nbytes] = bytes_of(member)
    dtypes = BlockDtypes(tuple(safetensors_dtype(member.dtype) for member in members), safetensors_dtype(out))
    products, found = sums.add(dtypes, len(members[0]), write)
    return torch.frombuffer(bytearray(found), dtype=out) if write else torch.empty(0), products


def made(weights: list[float], block: int = 3 * ROW) -> BlockSums:
    """Sums whose buffers hold the NaN of an earlier block."""
    sums = BlockSums(SumPlan(len(weights), weights, weights.index(max(weights, key=abs))), block)
    for row in sums.raw:
        row[:] = b"\xff" * len(row)
    return sums


@pytest.mark.parametrize("count", EDGES)
@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.5, -0.5], [0.2, 0.3, 0.5], [0.5, 0.5], [1.0, -1.0], [1.0]], ids=str)
def test_edges_of_blocks_rows_and_pairs(count: int, weights: list[float]) -> None:
    """Odd counts included; each element in its place, and none of the NaN that lies behind."""
    generator = torch.Generator().manual_seed(count)
    members = [torch.randn(count, generator=generator).to(BF16) for _ in weights]
    sums = made(weights)
    found, products = add(sums, members)
    assert_rounded({"w": found}, [{"w": member} for member in members], weights)
    table = sums.plan.table(products)
    pivot = members[sums.plan.pivot].double()
    expected = torch.stack([pivot - member.double() for member in members])
    assert np.allclose(table, expected @ expected.T, rtol=1e-6, atol=1e-9)


def test_ties_go_to_even_in_both_halves_and_both_signs() -> None:
    """Midway between neighbours at ½ and ½: up and down in turn, as torch rounds; 1 + 2⁻⁸ is 1, 1 + 3·2⁻⁸ is 1 + 2⁻⁶."""
    one = bits(*range(0x3F80, 0x3F90))
    other = bits(*range(0x3F81, 0x3F91))
    for sign in (1, -1):
        members = [(sign * member).to(BF16) for member in (one, other)]
        found, _ = add(made([0.5, 0.5]), members)
        assert found[:3].tolist() == [sign * number for number in (1, 1 + 2**-6, 1 + 2**-6)]
        assert torch.equal(found, ((members[0].double() + members[1].double()) / 2).float().to(BF16))
    moved = (found.double() - (members[0].double() + members[1].double()) / 2).sum()
    assert float(moved) == 0  # no drift: as many up as down


def test_every_exponent() -> None:
    """All finite bit patterns against a reversed copy of themselves: subnormals, and differences beyond float32."""
    every = [pattern for pattern in range(2**16) if pattern & 0x7F80 != 0x7F80]
    one, other = bits(*every), bits(*every[::-1])
    found, products = add(made([0.25, 0.75], 2**16), [one, other])
    exact = 0.25 * one.double() + 0.75 * other.double()
    assert torch.equal(found.double(), torch.from_numpy(widened(narrow(exact.numpy(), "BF16"))).double())
    distance = float((one.double() - other.double()).square().sum())
    assert math.isclose(products[0], distance, rel_tol=1e-6)


def widened(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def test_zeros_keep_their_sign() -> None:
    """−0.0 in all members amid others that differ."""
    one, other = torch.tensor([-0.0, 1.0, 0.0, -0.0]).to(BF16), torch.tensor([-0.0, 2.0, -0.0, 0.0]).to(BF16)
    for weights in ([0.3, 0.7], [0.7, 0.3]):
        found, _ = add(made(weights), [one, other])
        assert found.view(torch.int16)[[0, 2, 3]].tolist() == [-(2**15), 0, 0]


def test_equal_members_are_to_the_bit_beyond_the_mean_too() -> None:
    """−0.0 − (−0.5 · 0.0) would be 0.0."""
    member = torch.tensor([-0.0, 1e-40, 3e38, 0.0]).to(BF16)
    for weights in ([1.5, -0.5], [0.3, 1.2, -0.5]):
        found, products = add(made(weights), [member] * len(weights))
        assert torch.equal(found.view(torch.int16), member.view(torch.int16)) and not any(products)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "weights",
    [[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [1 / 3] * 3, [0.5, 0.25, 0.25], [2.0, -1.0], [3.0, -2.5, 0.5]],
    ids=str,
)
def test_huge_values_that_cancel_leave_the_small_ones(dtype: torch.dtype, weights: list[float]) -> None:
    """Members that are nearly equal, equal, or of opposite signs, and huge beside what remains: the float64 sum, rounded once."""
    generator = torch.Generator().manual_seed(0)
    count, huge = 3001, {torch.float16: 2e3}.get(dtype, 1e9)
    near = torch.randn(count, generator=generator, dtype=torch.float64) * huge
    small = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = 1 + torch.randint(-2, 3, (count,), generator=generator) * torch.finfo(dtype).eps
    sign = torch.where(torch.arange(count) % 3 == 0, -1.0, 1.0).double()
    members = [value.to(dtype) for value in (near, near * noise * sign, small)][: len(weights)]
    exact = sum(
        (member.double() * weight for member, weight in zip(members, weights, strict=True)), torch.zeros(()).double()
    )
    found = add(made(weights), members, dtype)[0].double()
    scale = torch.stack([(m.double() * w).abs() for m, w in zip(members, weights, strict=True)]).amax(0)
    half = (
        0.5 * torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp(min=torch.finfo(dtype).smallest_normal).log2().floor()
    )
    assert bool(((found - exact).abs() <= half + scale * 2.0**-52).all())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_is_found_whoever_has_it(dtype: torch.dtype, wrong: float) -> None:
    """Also in all members alike, in the pivot alone, in one member without others; the element is the first."""
    for n in (1, 2, 3):
        for owners in [(i,) for i in range(n)] + [tuple(range(n))]:
            members = [torch.ones(9, dtype=dtype) for _ in range(n)]
            for i in owners:
                members[i][[4, 7]] = wrong
            for write_it in (True, False):
                with pytest.raises(NotFinite) as caught:
                    add(made([1 / n] * n), members, dtype, write_it)
                assert (caught.value.member, caught.value.element) == (owners[0], 4)


def test_float64_is_rounded_to_bfloat16_once() -> None:
    """A hair beyond a tie: float32 would call it one, and even is the other way."""
    hair, tie = 2.0**-40, 1 + 2.0**-8
    given = np.array([tie + hair, tie, tie + 2**-7 - hair, -tie - hair, 1e300, -1e300, 1e-300, 0.0])
    found = widened(narrow(given, "BF16"))
    assert found.tolist() == [1 + 2**-7, 1, 1 + 2**-7, -1 - 2**-7, math.inf, -math.inf, 0, 0]


@pytest.mark.parametrize("out", [BF16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.5, -0.5], [0.2, 0.3, 0.5], [0.4, 0.4]], ids=str)
def test_members_of_mixed_dtypes(out: torch.dtype, weights: list[float]) -> None:
    """The sum, the products with and without it, the element that is not finite, and a sum that overflows."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1001, generator=generator) for _ in weights]
    for dtypes in ([out] * 3, [BF16, torch.float32, torch.float16]):
        members = [value.to(dtype) for value, dtype in zip(given, dtypes, strict=False)]
        sums = made(weights)
        found, products = add(sums, members, out)
        assert_rounded({"w": found}, [{"w": member} for member in members], weights)
        pivot = members[sums.plan.pivot].double()
        differences = torch.stack([pivot - member.double() for member in members])
        assert np.allclose(sums.plan.table(products), differences @ differences.T, rtol=1e-6, atol=1e-9)
        assert add(sums, members, out, False)[1] == products
        members[1] = members[1].clone()
        members[1][5] = math.nan
        with pytest.raises(NotFinite) as caught:
            add(sums, members, out)
        assert (caught.value.member, caught.value.element) == (1, 5)
    large = [torch.full((9,), sign * torch.finfo(out).max * 0.9, dtype=out) for sign in (1, -1)]
    with pytest.raises(NotFinite) as caught:
        add(made([1.5, -0.5]), large, out)
    assert (caught.value.member, caught.value.element) == (None, 0)


def odd_tensors(seed: int) -> Tensors:
    """One element, odd counts, several rows and pieces."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (1,), "b": (3, 5), "c": (ROW + 3,), "d": (7,), "e": (3, 2**18 + 1), "f": (2**20 - 1,)}
    return {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in shapes.items()}


def write_raw(folder: Path, tensors: Tensors, order: str, pad: int = 0) -> Path:
    """In this order of bytes, behind a header of `pad` more bytes, so that tensors begin anywhere."""
    write(folder, tensors)
    header = make_header((name, safetensors_dtype(tensors[name].dtype), tensors[name].shape) for name in order)
    with safetensors_writer(folder / SINGLE, header + b" " * pad) as write_next:
        for name in order:
            write_next(bytes_of(tensors[name]))
    return folder


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_tensors_that_begin_anywhere(tmp_path: Path, dtype: torch.dtype) -> None:
    """At odd bytes and odd elements, in another order in each member: the pieces and blocks that are shipped."""
    members = [{name: tensor.to(dtype) for name, tensor in odd_tensors(seed).items()} for seed in range(3)]
    folders = [
        write_raw(tmp_path / str(i), members[i], order, pad)
        for i, (order, pad) in enumerate((("abcdef", 0), ("abcdef", 1), ("fdbeca", 3)))
    ]
    for weights in ([0.3, 0.7], [0.2, 0.3, 0.5]):
        out = tmp_path / f"of{len(weights)}"
        average(out, folders[: len(weights)], weights)
        assert_rounded(read(out), members, [*weights, 0.0][:3])


def test_the_same_bytes_and_figures_whoever_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that sleep at random; products are added up in the pieces' order."""
    folders = [write(tmp_path / str(i), odd_tensors(i), 2) for i in range(3)]
    monkeypatch.setattr(weight_streams, "PIECE", 2**16)
    monkeypatch.setattr(weight_streams, "BLOCK", 2**13)
    whole, chance = weight_streams._add_piece, random.Random(0)

    def late(*given: Any) -> list[float]:
        time.sleep(chance.random() / 500)
        return whole(*given)

    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(weight_streams, "THREADS", threads)
        summary = average(tmp_path / f"out{threads}", folders, [0.2, 0.3, 0.5])
        found.append((files(tmp_path / f"out{threads}"), summary["pairs"]))
        monkeypatch.setattr(weight_streams, "_add_piece", late)
    assert found[0] == found[1] == found[2]


def test_of_several_faults_the_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another thread found a later one before; nothing is left, and no thread."""
    a, tensors = write(tmp_path / "a", values(0)), values(1)
    for name in sorted(tensors)[1:]:
        tensors[name].view(-1)[0] = math.nan
    b = write(tmp_path / "b", tensors)
    monkeypatch.setattr(weight_streams, "PIECE", 200)
    whole, begun = weight_streams._add_piece, []

    def first_one_late(piece: weight_streams.Piece, *given: Any) -> list[float]:
        begun.append(piece)
        time.sleep(0.3 if 1200 <= piece.place < 1400 else 0)  # the first with a fault
        return whole(piece, *given)

    monkeypatch.setattr(weight_streams, "_add_piece", first_one_late)
    first = min(tensors, key=lambda name: (name == "lm_head.weight", name))
    with pytest.raises(SalsaError, match=f"{first} has a value that is not finite"):
        average(tmp_path / "out", [a, b], [0.5, 0.5])
    assert not (tmp_path / "out").exists()
    assert len(begun) < 30  # of 40: those behind the fault are not begun


@pytest.mark.parametrize("count", [3, 5])
def test_a_file_of_more_or_fewer_bytes_than_its_header_says(tmp_path: Path, count: int) -> None:
    """Room was taken for all of them, so its size says nothing; no file is left."""
    with (
        pytest.raises(SalsaError, match=f"{count} bytes were written instead of 4"),
        safetensors_writer(tmp_path / SINGLE, make_header([("w", "BF16", (2,))])) as write_next,
    ):
        write_next(b"x" * count)
    assert not list(tmp_path.iterdir())


ALONE = """
import json, sys
from salsa_peft.soup.checkpoints.average import average
out, base, *members = sys.argv[1:]
average(out, members, [1.5, -1, 0.5], base=base)
print(json.dumps(sorted(sys.modules)))
"""


def test_a_whole_soup_imports_no_torch(tmp_path: Path) -> None:
    """Nor what else is slow to import; three members of mixed dtypes, weights beyond [0, 1], a base."""
    dtypes = (BF16, torch.float16, torch.float32, BF16)
    folders = [write(tmp_path / str(i), values(i, dtype), i % 2 + 1) for i, dtype in enumerate(dtypes)]
    given = [str(tmp_path / "out"), str(folders[3]), *map(str, folders[:3])]
    root = ROOT
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, *given], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / CONFIG).exists()
    loaded = set(json.loads(ended.stdout.splitlines()[-1]))
    assert "numpy" in loaded
    assert not loaded & {
        "torch",
        "yaml",
        "scipy",
        "threadpoolctl",
        "transformers",
        "peft",
    }
    assert_rounded(read(tmp_path / "out"), [values(i, dtype) for i, dtype in enumerate(dtypes[:3])], [1.5, -1, 0.5])

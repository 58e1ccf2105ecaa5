"""TIES and DARE against a plain dense implementation: adapters at full and at lower rank, checkpoints, refusals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_members import make_llama, merged_delta, train
from torch import Tensor

from salsa_peft.soup.__main__ import main
from salsa_peft.soup.average import soup
from salsa_peft.utils.errors import SalsaError

FULL = 16
"""The highest rank of a module of the tiny model."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start and two members of ranks 1 and 4: adapters a…, merged checkpoints c…."""
    folder, base = tmp_path_factory.mktemp("made"), make_llama()
    base.save_pretrained(folder / "cbase")
    for seed, (name, rank) in enumerate({"start": 3, "0": 1, "1": 4}.items()):
        train(base, folder / f"a{name}", seed, r=rank)
        model, deltas = copy.deepcopy(base), merged_delta(base, folder / f"a{name}")
        model.load_state_dict({key: (value.double() + deltas[key]).float() for key, value in base.state_dict().items()})
        model.save_pretrained(folder / f"c{name}")
    return folder


def changes(made: Path, start: str) -> list[dict[str, Tensor]]:
    """The two members' changes from the start, in float64."""
    read = [load_file(made / f"c{name}" / "model.safetensors") for name in ("0", "1", start)]
    return [{key: read[i][key].double() - read[2][key].double() for key in read[2]} for i in (0, 1)]


def plain_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    kept = []
    for delta in deltas:
        flat = delta.flatten().clone()
        order = flat.abs().argsort(descending=True)
        flat[order[int(density * len(flat)) :]] = 0
        kept.append(flat.view_as(delta))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)  # type: ignore[arg-type, operator]
    agree = [delta.sign() == sign for delta in kept]
    total = sum(len(deltas) * w * one * yes for w, one, yes in zip(weights, kept, agree, strict=True))
    return total / sum(yes.double() for yes in agree).clamp(min=1)  # type: ignore[union-attr, no-any-return]


def result(made: Path, kind: str, out: Path, start: str) -> dict[str, Tensor]:
    """The soup's change from the start."""
    origin = {key: value.double() for key, value in load_file(made / f"c{start}" / "model.safetensors").items()}
    if kind == "checkpoints":
        found = {key: value.double() for key, value in load_file(out / "model.safetensors").items()}
    else:
        deltas, base = merged_delta(make_llama(), out), load_file(made / "cbase" / "model.safetensors")
        found = {key: value.double() + deltas[key] for key, value in base.items()}
    return {key: found[key] - origin[key] for key in origin}


def make(made: Path, kind: str, out: Path, start: str, **options: Any) -> Any:
    letter = "c" if kind == "checkpoints" else "a"
    if start != "base":
        options["start"] = made / f"{letter}{start}"
    elif kind == "checkpoints":
        options["base"] = made / "cbase"
    if kind == "adapters":
        options = {"rank": FULL, "dtype": "float32"} | options
    return soup(out, [made / f"{letter}0", made / f"{letter}1"], **options)


@pytest.mark.parametrize("start", ["base", "start"])
@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
@pytest.mark.parametrize(
    ("weights", "density", "scale"), [([0.5, 0.5], None, 1.0), ([0.3, 0.7], 0.5, 0.6), (None, 1.0, 1.0)]
)
def test_ties_is_the_plain_one(
    kind: str, start: str, weights: Any, density: Any, scale: float, made: Path, tmp_path: Path
) -> None:
    summary = make(made, kind, tmp_path / "out", start, strategy="ties", weights=weights, density=density, scale=scale)
    found, deltas = result(made, kind, tmp_path / "out", start), changes(made, start)
    for key, value in found.items():
        want = scale * plain_ties([one[key] for one in deltas], weights or [0.5, 0.5], density or 0.2)
        assert torch.allclose(value, want, atol=1e-5, rtol=0), key
    assert summary["density"] == (density or 0.2) and "drop_seed" not in summary
    if kind == "adapters":
        assert summary["error"]["all"] < 1e-6


@pytest.mark.parametrize("start", ["base", "start"])
@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_dare_drops_at_random_and_scales_up(kind: str, start: str, made: Path, tmp_path: Path) -> None:
    """Every element is w_0 δ_0 m_0 / d + w_1 δ_1 m_1 / d with m in {0, 1}, about d of which are 1."""
    options: Any = {"strategy": "dare", "density": 0.4, "weights": [0.25, 0.75], "scale": 0.8}
    summary = make(made, kind, tmp_path / "out", start, drop_seed=3, **options)
    found, deltas = result(made, kind, tmp_path / "out", start), changes(made, start)
    parts = [
        torch.cat([0.8 * w / 0.4 * one[key].flatten() for key in found if one[key].any()])
        for w, one in zip((0.25, 0.75), deltas, strict=True)
    ]
    whole = torch.cat([found[key].flatten() for key in found if deltas[0][key].any()])
    masks = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    distance = (masks @ torch.stack(parts) - whole).abs()
    assert distance.min(0).values.max() < 1e-5
    kept = masks[distance.argmin(0)].mean(0)
    assert kept.tolist() == pytest.approx([0.4, 0.4], abs=4 * math.sqrt(0.24 / len(whole)))
    assert (summary["density"], summary["drop_seed"]) == (0.4, 3)
    make(made, kind, tmp_path / "same", start, drop_seed=3, **options)
    make(made, kind, tmp_path / "other", start, **options)
    file = "adapter_model.safetensors" if kind == "adapters" else "model.safetensors"
    read = [(tmp_path / name / file).read_bytes() for name in ("out", "same", "other")]
    assert read[0] == read[1] != read[2]
    layers = [
        found[key][:8] != 0 for key in found if key.endswith(("0.self_attn.q_proj.weight", "1.self_attn.q_proj.weight"))
    ]
    assert not torch.equal(*layers)  # each layer draws anew


def test_a_rank_is_the_best_approximation_of_the_dense_soup(made: Path, tmp_path: Path) -> None:
    """By default Σ r_i, here of members and start: the SVD's first values, and soup.json has the error."""
    for rank, expected in ((None, 8), (5, 5)):
        out = tmp_path / str(rank)
        summary = make(made, "adapters", out, "start", strategy="ties", density=0.3, rank=rank)
        assert summary["ranks"] == [expected] and json.loads((out / "adapter_config.json").read_text())["r"] == expected
        start, kept = merged_delta(make_llama(), made / "astart"), merged_delta(make_llama(), out)
        deltas, lost, norm = changes(made, "start"), 0.0, 0.0
        for key in (key for key in kept if key.endswith(("q_proj.weight", "v_proj.weight"))):
            dense = start[key] + plain_ties([one[key] for one in deltas], [0.5, 0.5], 0.3)
            U, S, V = torch.linalg.svd(dense, full_matrices=False)
            assert torch.allclose(kept[key], U[:, :expected] * S[:expected] @ V[:expected], atol=1e-5)
            lost, norm = lost + float(S[expected:].square().sum()), norm + float(S.square().sum())
        assert summary["error"]["all"] == pytest.approx(math.sqrt(lost / norm), abs=1e-6)
        assert summary["norm"] == pytest.approx(math.sqrt(norm), rel=1e-5)


def test_grouped_convolutions_and_experts_keep_their_blocks() -> None:
    """Every block is factorized alone, and the dense soup is that of all blocks."""
    import numpy as np

    from salsa_peft.soup.lora.factors import Stack
    from salsa_peft.soup.lora.targets import Shape
    from salsa_peft.soup.lora.write import merged
    from salsa_peft.soup.strategies.elementwise import Elementwise

    rng = np.random.default_rng(0)
    stack = Stack(
        rng.normal(size=(3, 4, 6)),
        rng.normal(size=(3, 5, 4)),
        np.array([2.0, 2, 0.5, 0.5]),
        np.array([0, 0, 1, 1]),
        None,
    )
    shape = Shape(4, (6,), 5, False, 3, 1, "experts", "gate_up_proj", "experts")
    deltas = [stack.B[..., :2] * 2 @ stack.A[:, :2], stack.B[..., 2:] * 0.5 @ stack.A[:, 2:]]
    assert np.allclose(stack.delta(1), deltas[1])
    A, B, lost, norm = merged("x", stack, shape, Elementwise("ties", [0.5, 0.5], 1.0, 1.0, 0, False), 5)
    want = plain_ties([torch.from_numpy(delta) for delta in deltas], [0.5, 0.5], 1.0).numpy()
    assert A.shape == (3, 5, 6) and B.shape == (3, 5, 5) and lost < 1e-20
    assert np.allclose(B @ A, want) and norm == pytest.approx((want**2).sum())


def test_a_member_of_weight_zero_has_no_vote(made: Path, tmp_path: Path) -> None:
    for kind, file in (("adapters", "adapter_model.safetensors"), ("checkpoints", "model.safetensors")):
        summary = make(made, kind, tmp_path / kind, "start", strategy="ties", weights=[0.0, 1.0])
        letter = "a" if kind == "adapters" else "c"
        options: Any = {"rank": FULL, "dtype": "float32"} if kind == "adapters" else {}
        soup(tmp_path / f"one-{kind}", [made / f"{letter}1"], start=made / f"{letter}start", strategy="ties", **options)
        assert summary["left_out"] == [f"{letter}0"]
        assert (tmp_path / kind / file).read_bytes() == (tmp_path / f"one-{kind}" / file).read_bytes()


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, math.nan])
def test_a_density_is_a_share_above_zero(density: float, made: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SalsaError, match=rf"density: {density} is not a share above 0 and at most 1; use one such as 0.2"
    ):
        make(made, "adapters", tmp_path / "out", "base", strategy="ties", density=density)


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("adapters", {"density": 0.5}, "density: 0.5 has no effect with strategy linear; leave it out, or use ties or"),
        ("adapters", {"strategy": "ties", "drop_seed": 1}, "drop_seed: 1 has no effect with strategy ties"),
        ("adapters", {"strategy": "ties", "scale": 0.0}, "scale: 0 leaves nothing of what strategy ties merges; use"),
        ("adapters", {"strategy": "dare", "per": "layer"}, "per: layer has no effect with strategy dare"),
        ("adapters", {"strategy": "ties", "merge": True, "rank": None, "dtype": None},
         "strategy ties cannot be combined with merge; make the soup as an adapter first"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(
    kind: str, options: dict[str, Any], line: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(SalsaError, match=line):
        make(made, kind, tmp_path / "out", "base", **options)


def test_checkpoints_need_a_start(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SalsaError, match="strategy dare of checkpoints needs the base that they were trained from"):
        soup(tmp_path / "out", [made / "c0", made / "c1"], strategy="dare")


def test_a_trained_head_and_biases_are_refused(tmp_path: Path) -> None:
    base = make_llama()
    saved = [train(base, tmp_path / name, i, modules_to_save=["lm_head"]) for i, name in enumerate("ab")]
    with pytest.raises(SalsaError, match=r"strategy ties works on LoRA deltas, but .* also trained lm_head.weight"):
        soup(tmp_path / "out", saved, strategy="ties")
    biased = [train(base, tmp_path / name, i, lora_bias=True) for i, name in enumerate("cd")]
    with pytest.raises(SalsaError, match=r"strategy dare merges weight matrices, but .* has lora_bias; use linear"):
        soup(tmp_path / "out", biased, strategy="dare")


def test_values_that_are_not_finite_and_other_integers_are_refused(made: Path, tmp_path: Path) -> None:
    for name in ("c0", "c1"):
        (tmp_path / name).mkdir()
        tensors = load_file(made / name / "model.safetensors")
        tensors["steps"] = torch.tensor([1 if name == "c0" else 2])
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_bytes((made / name / "config.json").read_bytes())
    with pytest.raises(SalsaError, match=r"c1/model.safetensors: the integers in steps differ"):
        soup(tmp_path / "out", [tmp_path / "c0", tmp_path / "c1"], strategy="ties", start=tmp_path / "c0")
    tensors = load_file(made / "c1" / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "c1" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SalsaError, match=r"model.norm.weight is not finite after the merge"):
        soup(tmp_path / "out", [made / "c0", tmp_path / "c1"], strategy="ties", start=made / "cstart")
    assert not (tmp_path / "out").exists()


def test_the_command_shows_the_error(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [tmp_path / "out", made / "a0", made / "a1", "--strategy", "dare", "--density", "0.5", "--drop-seed", "2"]
    assert main([*map(str, words), "--start", str(made / "astart"), "--scale", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "soup of 3 adapters (dare): 4 modules, rank 8" in shown
    assert "recompressed to rank 8: relative error 0." in shown

"""Soups of task vectors against plain PyTorch on merged weights: start, scale, slerp, karcher, model stock, per layer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_members import edit_tensors, make_llama, merged_delta, train
from torch import Tensor

from salsa_peft.soup.average import soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.strategies import STRATEGIES, StrategyInput
from salsa_peft.soup.strategies.choose import changes_from_last
from salsa_peft.utils.errors import SalsaError

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start and three members of ranks 1 to 4, some without LoRA on v_proj: adapters a…, merged checkpoints c…."""
    folder, base = tmp_path_factory.mktemp("made"), make_llama()
    base.save_pretrained(folder / "cbase")
    for seed, (name, options) in enumerate(
        {
            "start": {"r": 3},
            "0": {"r": 1},
            "1": {"r": 4, "use_rslora": True},
            "2": {"target_modules": ["q_proj"]},
        }.items()
    ):
        train(base, folder / f"a{name}", seed, **options)
        model = copy.deepcopy(base)
        deltas = merged_delta(base, folder / f"a{name}")
        model.load_state_dict({key: (value.double() + deltas[key]).float() for key, value in base.state_dict().items()})
        model.save_pretrained(folder / f"c{name}")
    return folder


def changes(made: Path, names: str, start: str) -> list[Weights]:
    """Each member's change from the start, in float64, of the weights that any of the models changes."""
    base = load_file(made / "cbase" / "model.safetensors")
    read = {n: load_file(made / f"c{n}" / "model.safetensors") for n in {*names, start}}
    changed = [key for key in base if any(not torch.equal(one[key], base[key]) for one in read.values())]
    return [{key: read[n][key].double() - read[start][key].double() for key in changed} for n in names]


def plain_slerp(deltas: list[Tensor]) -> Tensor:
    """WARP's: one vector after the other, λ = 1/m."""
    merged = deltas[0]
    for m, delta in enumerate(deltas[1:], 2):
        if not (merged.norm() > 0 and delta.norm() > 0):
            return sum(deltas) / len(deltas)  # type: ignore[return-value]
        omega = torch.acos((merged @ delta) / (merged.norm() * delta.norm()))
        merged = (torch.sin((1 - 1 / m) * omega) * merged + torch.sin(omega / m) * delta) / torch.sin(omega)
    return merged


def plain_model_stock(deltas: list[Tensor]) -> Tensor:
    n, mean = len(deltas), sum(deltas) / len(deltas)
    if not all(delta.norm() > 0 for delta in deltas):
        return mean  # type: ignore[return-value]
    cosines = [a @ b / (a.norm() * b.norm()) for i, a in enumerate(deltas) for b in deltas[:i]]
    cosine = (sum(cosines) / len(cosines)).clamp(min=0)  # type: ignore[union-attr]
    return n * cosine / (1 + (n - 1) * cosine) * mean  # type: ignore[no-any-return]


def plain_karcher(deltas: list[Tensor]) -> Tensor:
    """Gradient descent on Σ ω_i² in dense vectors."""
    if not all(delta.norm() > 0 for delta in deltas):
        return sum(deltas) / len(deltas)  # type: ignore[return-value]
    points = [delta / delta.norm() for delta in deltas]
    mean = sum(points) / sum(points).norm()  # type: ignore[union-attr]
    for _ in range(200):
        step = torch.zeros_like(mean)
        for point in points:
            omega = torch.acos((mean @ point).clamp(-1, 1))
            step += omega / torch.sin(omega) * (point - torch.cos(omega) * mean) / len(points)
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm().clamp(min=1e-30)
    return mean * sum(delta.norm() for delta in deltas) / len(deltas)


PLAIN: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "linear": lambda deltas: sum(deltas) / len(deltas),  # type: ignore[dict-item, return-value]
    "slerp": plain_slerp,
    "karcher": plain_karcher,
    "model_stock": plain_model_stock,
}


def expected(strategy: str, per: str, deltas: list[Weights]) -> Weights:
    """The merged change, of the whole model as one vector or of each weight matrix alone."""
    plain = PLAIN[strategy]
    if per == "layer":
        return {key: plain([one[key].flatten() for one in deltas]).view_as(deltas[0][key]) for key in deltas[0]}
    flat = plain([torch.cat([value.flatten() for value in one.values()]) for one in deltas])
    sizes = [value.numel() for value in deltas[0].values()]
    return {key: part.view_as(deltas[0][key]) for key, part in zip(deltas[0], flat.split(sizes), strict=True)}


def result(made: Path, out: Path) -> Weights:
    """A soup's full weights: of a checkpoint's files, of an adapter after PEFT's merge."""
    base = {key: value.double() for key, value in load_file(made / "cbase" / "model.safetensors").items()}
    if (out / "model.safetensors").is_file():
        return {key: value.double() for key, value in load_file(out / "model.safetensors").items()}
    deltas = merged_delta(make_llama(), out)
    return {key: value + deltas[key] for key, value in base.items()}


def make(made: Path, kind: str, out: Path, names: str, start: str, **options: Any) -> Any:
    members = [made / f"{'c' if kind == 'checkpoints' else 'a'}{name}" for name in names]
    if start != "base":
        options["start"] = made / f"{'c' if kind == 'checkpoints' else 'a'}{start}"
    elif kind == "checkpoints":
        options["base"] = made / "cbase"
    if kind == "merged":
        options |= {"merge": True, "base": made / "cbase", "same_base": True}
    return soup(out, members, **options)


CASES = [
    (kind, per, strategy)
    for kind, per in (("adapters", "model"), ("adapters", "layer"), ("checkpoints", "model"), ("checkpoints", "layer"),
                      ("merged", "model"))
    for strategy in PLAIN
    if (strategy, per) != ("linear", "layer")
]  # fmt: skip


@pytest.mark.parametrize("start", ["base", "start"])
@pytest.mark.parametrize("names", ["01", "012"])
@pytest.mark.parametrize(("kind", "per", "strategy"), CASES)
def test_the_soup_is_the_plain_formula_on_merged_weights(
    kind: str, per: str, strategy: str, names: str, start: str, made: Path, tmp_path: Path
) -> None:
    """θ_start + η · merged(θ_i − θ_start). Member 2 has no delta in v_proj: from the base, the mean is taken there."""
    scale = 0.4
    summary = make(made, kind, tmp_path / "out", names, start, strategy=strategy, per=per, scale=scale)
    found, merged = result(made, tmp_path / "out"), expected(strategy, per, changes(made, names, start))
    origin = load_file(made / f"c{start}" / "model.safetensors")
    for key, value in found.items():
        want = origin[key].double() + (scale * merged[key] if key in merged else 0)
        assert torch.allclose(value, want, atol=1e-5, rtol=0), key
    if kind == "checkpoints" or start == "base":
        norm = math.sqrt(sum(float(value.square().sum()) for value in merged.values()))
        assert summary["norm"] == pytest.approx(scale * norm, rel=1e-4)
    if per == "layer" and names == "012" and start == "base" and kind == "adapters":
        assert [len(row["averaged_linearly"]) for row in summary["tried"]] == [2]
        assert all("v_proj" in name for name in summary["tried"][0]["averaged_linearly"])


def test_angles_differ_between_layers(made: Path, tmp_path: Path) -> None:
    """So per: layer is another soup than per: model."""
    for per in ("model", "layer"):
        make(made, "adapters", tmp_path / per, "01", "start", strategy="slerp", per=per)
    one, other = (merged_delta(make_llama(), tmp_path / per) for per in ("model", "layer"))
    assert any(not torch.allclose(one[key], other[key], atol=1e-3) for key in one)


def test_the_start_is_a_member_with_the_rest_of_the_weight(made: Path, tmp_path: Path) -> None:
    summary = make(made, "adapters", tmp_path / "out", "01", "start", weights=[0.25, 0.75], scale=0.6)
    assert [(m["name"], m["weight"]) for m in summary["members"]] == [
        ("a0", pytest.approx(0.15)), ("a1", pytest.approx(0.45)), ("start", pytest.approx(0.4)),
    ]  # fmt: skip
    assert (summary["start"], summary["scale"], summary["ranks"]) == (str(made / "astart"), 0.6, [8])
    assert summary["provenance"]["members"][2]["source"] == str(made / "astart")
    zero = make(made, "adapters", tmp_path / "zero", "01", "start", scale=0.0)
    assert zero["left_out"] == ["a0", "a1"] and [m["weight"] for m in zero["members"]] == [1.0]


@pytest.mark.parametrize("kind", ["adapters", "checkpoints"])
def test_a_scale_of_one_and_weights_of_sum_one_need_no_start(kind: str, made: Path, tmp_path: Path) -> None:
    """To the bit: the start's weight is 0, and it is not read."""
    make(made, kind, tmp_path / "started", "01", "start")
    make(made, kind, tmp_path / "plain", "01", "base")
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "started" / file.name).read_bytes()


def test_the_rank_stays_bounded_over_five_iterations(made: Path, tmp_path: Path) -> None:
    """start → members → soup → start: rank 4 each time, with the error of each recompression against the exact soup."""
    base, start, errors = make_llama(), made / "astart", []
    for iteration in range(5):
        members = []
        for i in range(2):
            member = train(base, tmp_path / f"{iteration}-{i}", 10 * iteration + i, r=4, lora_alpha=4)
            summary = soup(tmp_path / f"{iteration}-{i}-on-start", [start, member], [1.0, 0.3], rank=6)
            members.append(tmp_path / f"{iteration}-{i}-on-start")
        out, exact = tmp_path / f"soup-{iteration}", tmp_path / f"exact-{iteration}"
        options: Any = {"strategy": "slerp", "per": "layer", "start": start, "scale": 0.7}
        summary = soup(out, members, rank=4, **options)
        soup(exact, members, **options)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["r"] == 4 and not config["rank_pattern"] and summary["ranks"] == [4]
        whole, kept = merged_delta(base, exact), merged_delta(base, out)
        lost = math.sqrt(sum(float((whole[key] - kept[key]).square().sum()) for key in whole))
        norm = math.sqrt(sum(float(value.square().sum()) for value in whole.values()))
        assert summary["error"]["all"] == pytest.approx(lost / norm, abs=1e-5)  # type: ignore[index]
        errors.append(lost / norm)
        start = out
    assert all(0 < error < 1 for error in errors)


def gram_of(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


def ask(strategy: str, vectors: Tensor, weights: list[float] | None = None) -> Any:
    n = len(vectors)
    return STRATEGIES[strategy](StrategyInput(weights or [1 / n] * n, lambda: gram_of(vectors), None, 1, 0.1))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("weights", [False, True])
def test_the_karcher_mean_is_a_fixed_point(n: int, weights: bool) -> None:
    """Σ w_i log_m(u_i) = 0 in dense vectors, and its norm is the mean norm."""
    generator = torch.Generator().manual_seed(n)
    vectors = torch.randn(n, 40, generator=generator, dtype=torch.float64) * torch.arange(1, n + 1).unsqueeze(1) + 0.3
    shares = torch.arange(1, n + 1, dtype=torch.float64) if weights else torch.ones(n, dtype=torch.float64)
    shares /= shares.sum()
    found = torch.tensor(ask("karcher", vectors, shares.tolist()).weights, dtype=torch.float64) @ vectors
    norms = vectors.norm(dim=1)
    assert found.norm().item() == pytest.approx((shares @ norms).item(), rel=1e-10)
    mean, points = found / found.norm(), vectors / norms.unsqueeze(1)
    omega = torch.acos(points @ mean)
    pull = shares * omega / torch.sin(omega)
    assert (pull @ points - (pull @ torch.cos(omega)) * mean).norm() < 1e-7
    assert (pull @ points).norm() > 0.1


def test_the_karcher_mean_of_two_is_their_slerp_if_the_norms_are_equal() -> None:
    vectors = torch.tensor([[3.0, 0, 0], [0, 1.8, 2.4]], dtype=torch.float64)
    for t in (0.2, 0.5):
        assert ask("karcher", vectors, [1 - t, t]).weights == pytest.approx(ask("slerp", vectors, [1 - t, t]).weights)


def test_model_stock_by_hand() -> None:
    """60°: t = 2·½ / (1 + ½) = ⅔. Orthogonal or worse: the start."""
    vectors = torch.tensor([[1.0, 0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert ask("model_stock", vectors).weights == pytest.approx([1 / 3, 1 / 3])
    assert ask("model_stock", torch.eye(3, dtype=torch.float64)).weights == [0.0, 0.0, 0.0]
    assert ask("model_stock", torch.tensor([[1.0, 0], [-0.5, 1]])).weights == [0.0, 0.0]


@pytest.mark.parametrize(
    ("strategy", "vectors", "weights", "line"),
    [
        ("karcher", [[1, 0], [0, 0]], None, "strategy karcher: a member equals the base or start"),
        ("karcher", [[1, 0], [-1, 0]], None, "strategy karcher: the members' changes have no unique mean direction"),
        ("karcher", [[1, 0], [0, 1]], [1.5, -0.5], r"strategy karcher: the weights \[1.5, -0.5\] must be at least 0"),
        ("model_stock", [[1, 0], [0, 0]], None, "strategy model_stock: a member equals the base or start"),
        ("model_stock", [[1, 0], [0, 1]], [0.4, 0.6], "strategy model_stock chooses the weights itself"),
        ("model_stock", [[1, 0]], None, "strategy model_stock: there is 1 member, but model_stock needs at least two"),
        ("slerp", [[1, 0], [-1, 0], [0, 1]], None, "strategy slerp: the members change the base or start in opposite"),
    ],
)
def test_what_has_no_direction_is_refused(strategy: str, vectors: Any, weights: Any, line: str) -> None:
    with pytest.raises(SalsaError, match=line):
        ask(strategy, torch.tensor(vectors, dtype=torch.float64), weights)


@pytest.mark.parametrize("strategy", ["slerp", "karcher", "model_stock"])
def test_a_layer_that_a_member_left_at_the_start_is_averaged(strategy: str, made: Path, tmp_path: Path) -> None:
    """Its change there is zero up to rounding, which has no direction; the other layers keep their angles."""
    same = tmp_path / "same"
    train(make_llama(), same, 7, r=3)
    source = load_file(made / "astart" / "adapter_model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    edit_tensors(same, lambda t: t.update({key: value for key, value in source.items() if layer in key}))
    summary = soup(
        tmp_path / "out", [made / "a1", same], start=made / "astart", strategy=strategy, per="layer", scale=0.5
    )
    assert summary["tried"] == [{"averaged_linearly": [layer]}]
    assert summary["layers"][layer] == pytest.approx([0.25, 0.25, 0.5])
    assert summary["layers"]["model.layers.1.self_attn.q_proj"] != pytest.approx([0.25, 0.25, 0.5], abs=1e-3)


def test_a_change_of_the_size_of_rounding_is_zero() -> None:
    """A member whose factors multiply to the start's delta up to float32 rounding has no direction there."""
    start, other = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = changes_from_last(gram_of(torch.stack([start * (1 + 3e-8), start + other, start])).numpy())
    assert found[0].tolist() == [0, 0] == [found[0, 0], found[1, 0]]
    assert found[1, 1] == pytest.approx(float(other @ other))


def test_one_number_in_a_tensor_has_opposite_directions(made: Path, tmp_path: Path) -> None:
    """A scalar of two checkpoints that changed up and down: slerp takes the mean there."""
    names = {}
    for name, value in (("start", 1.0), ("0", 1.5), ("1", 0.25)):
        (tmp_path / name).mkdir()
        tensors = load_file(made / f"c{name}" / "model.safetensors")
        save_file(
            tensors | {"model.norm.weight": torch.full((16,), value)},
            tmp_path / name / "model.safetensors",
            {"format": "pt"},
        )
        (tmp_path / name / "config.json").write_bytes((made / "cbase" / "config.json").read_bytes())
        names[name] = tmp_path / name
    summary = soup(tmp_path / "out", [names["0"], names["1"]], start=names["start"], strategy="slerp", per="layer")
    assert "model.norm.weight" in summary["tried"][0]["averaged_linearly"]
    found = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert found.tolist() == pytest.approx([0.875] * 16)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "per without angles": ({"per": "layer"}, "per: layer has no effect with strategy linear; leave it out, or use one"),
    "unknown per": ({"per": "head"}, "per: 'head' is unknown; use model or layer"),
    "nan": ({"scale": math.nan}, "scale: nan is not a finite number; use one such as 0.5"),
    "inf": ({"scale": math.inf, "start": "astart"}, "scale: inf is not a finite number"),
    "measured": ({"strategy": "greedy", "scale": 0.5}, "scale: 0.5 has no effect with strategy greedy"),
    "measured start": (
        {"strategy": "learned", "start": "astart"},
        "start: .*astart has no effect with strategy learned",
    ),
    "no start": ({"start": "nowhere"}, "no such folder: .*nowhere"),
    "mixed": ({"start": "cstart"}, "cstart is a full checkpoint, but .*a0 is an adapter"),
    "merge": (
        {"strategy": "slerp", "per": "layer", "merge": True, "base": "cbase"},
        "per: layer cannot be combined with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_without_effect_are_refused(case: str, made: Path, tmp_path: Path) -> None:
    options, line = WRONG[case]
    paths = {name: made / value for name, value in options.items() if name in ("start", "base")}
    with pytest.raises(SalsaError, match=line):
        soup(tmp_path / "out", [made / "a0", made / "a1"], **(options | paths))
    assert not (tmp_path / "out").exists()


def test_a_start_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    other = train(make_llama(), tmp_path / "other", 3)
    (other / "fingerprint.json").write_text(json.dumps({"base": "0f" * 32}))
    with pytest.raises(
        SalsaError, match=r"other was trained on base 0f0f0f0f0f0f…, .*a soup needs members of one base"
    ):
        soup(tmp_path / "out", [made / "a0", made / "a1"], start=other)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scale": 0.5}, "scale 0.5 of checkpoints needs the base that they were trained from"),
        ({"strategy": "karcher"}, "strategy karcher of checkpoints needs the base that they were trained from"),
        ({"start": "cstart", "base": "cbase"}, "base: .*cbase has no effect on checkpoints beside a start"),
    ],
)
def test_checkpoints_need_one_start(options: dict[str, Any], line: str, made: Path, tmp_path: Path) -> None:
    paths = {name: made / value for name, value in options.items() if name in ("start", "base")}
    with pytest.raises(SalsaError, match=line):
        soup(tmp_path / "out", [made / "c0", made / "c1"], **(options | paths))


def test_a_trained_head_has_no_layer_of_its_own(tmp_path: Path) -> None:
    """modules_to_save are averaged directly; with a start their weights sum to 1, so that a scale is exact."""
    base = make_llama()
    folders = [train(base, tmp_path / name, i, modules_to_save=["lm_head"]) for i, name in enumerate("sab")]
    for i, folder in enumerate(folders):
        edit_tensors(folder, lambda t, i=i: t["base_model.model.lm_head.weight"].fill_(float(i)))
    soup(tmp_path / "out", folders[1:], start=folders[0], scale=0.5)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.lm_head.weight"
    ].unique().tolist() == [0.75]
    with pytest.raises(SalsaError, match=r"per: layer works on LoRA deltas, but .* also trained lm_head.weight"):
        soup(tmp_path / "layers", folders[1:], start=folders[0], strategy="slerp", per="layer")


def test_the_gram_matrices_of_the_modules_add_up(made: Path) -> None:
    stacked = StackedAdapter.load([made / "a0", made / "a1", made / "a2"])
    dense = [merged_delta(make_llama(), made / f"a{i}") for i in range(3)]
    for module, gram in stacked.grams().items():
        rows = np.stack([one[f"{module}.weight"].numpy().ravel() for one in dense])
        assert np.allclose(gram, rows @ rows.T, atol=1e-4)
    assert np.allclose(stacked.gram().numpy(), sum(stacked.grams().values()))

"""Recompression of a soup to a smaller rank: against the truncated SVD of the dense delta in float64, layer by layer and in files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from salsa_peft.soup.lora import svd as recompression
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.lora.svd import moments, recompress, squared_norm
from salsa_peft.utils.errors import SalsaError

WEIGHTS = "adapter_model.safetensors"
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def dense_best(delta: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The truncated SVD and the norm of its error."""
    U, S, V = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank], math.sqrt((S[rank:] ** 2).sum())


class TestOneLayer:
    def test_by_hand(self) -> None:
        """Two orthogonal directions, 6 and 8 at weights ½: 3 and 4. Rank 1 keeps 4 and loses 3 of 5; both factors get √4."""
        A, B = np.eye(2, 5), np.eye(4, 2) * [6, 8]
        found = recompress(moments(A, B), np.array([0.5, 0.5]), 1)
        assert (found.lost, found.norm) == (pytest.approx(9), pytest.approx(25))
        assert np.allclose(found.B @ found.A, np.eye(4, 5) * [[0], [4], [0], [0]])
        assert np.allclose(np.linalg.norm(found.A), 2) and np.allclose(np.linalg.norm(found.B), 2)
        assert squared_norm(A, B) == 100

    @PROPERTY
    @given(
        sizes=st.tuples(st.integers(4, 40), st.integers(4, 40)),
        ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        rank=st.integers(1, 8),
        seed=st.integers(0, 999),
        decay=st.floats(0, 3),
        same=st.booleans(),
    )
    def test_is_the_truncated_svd_of_the_dense_delta(
        self, sizes: tuple[int, int], ranks: list[int], rank: int, seed: int, decay: float, same: bool
    ) -> None:
        """float32 factors with spectra that fall by up to 10³, negative and zero weights, and members that share an A to the bit."""
        random = np.random.default_rng(seed)
        inner, out = sizes
        A = np.concatenate([random.normal(size=(r, inner)) for r in ranks]).astype(np.float32)
        if same:
            A[: len(A) // 2] = A[len(A) - len(A) // 2 :]
        B = (random.normal(size=(out, sum(ranks))) * np.logspace(0, -decay, sum(ranks))).astype(np.float32)
        weights = np.repeat(random.choice([-0.5, 0.0, 0.3, 1.5], size=len(ranks)), ranks)
        rank = min(rank, sum(ranks), *sizes)
        delta = (B.astype(np.float64) * weights) @ A
        _, error = dense_best(delta, rank)
        found = recompress(moments(A, B), weights, rank)
        assert found.A.shape == (rank, inner) and found.B.shape == (out, rank)
        norm = np.linalg.norm(delta)
        assert math.isclose(math.sqrt(found.norm), norm, rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(math.sqrt(found.lost), error, rel_tol=1e-6, abs_tol=1e-7 * norm)
        assert np.linalg.norm(found.B @ found.A - delta) <= error * (1 + 1e-6) + 1e-7 * norm
        assert np.allclose(np.linalg.norm(found.A, axis=1), np.linalg.norm(found.B, axis=0), atol=1e-6)

    @pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
    def test_both_ways_to_a_basis_agree(self, condition: float) -> None:
        """Cholesky where the factors are far from rank deficiency, Householder beyond: Q is orthonormal and Q·R gives X back."""
        random = np.random.default_rng(0)
        X = np.linalg.qr(random.normal(size=(300, 8)))[0] * np.logspace(0, -math.log10(condition), 8)
        X = X @ np.linalg.qr(random.normal(size=(8, 8)))[0]
        R, along = recompression.basis(X, X.T @ X)
        Q = along(np.eye(8))
        assert np.abs(Q.T @ Q - np.eye(8)).max() < 1e-6
        assert np.abs(Q @ R - X).max() < 1e-12

    def test_well_conditioned_factors_need_no_householder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The speed rests on it."""
        monkeypatch.setattr(recompression, "by_householder", lambda X: pytest.fail("a QR"))
        random = np.random.default_rng(0)
        found = recompress(moments(random.normal(size=(8, 50)), random.normal(size=(60, 8))), np.ones(8), 4)
        assert found.A.shape == (4, 50) and found.B.shape == (60, 4) and 0 < found.lost < found.norm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 9, 3, padding=1)
        self.wide, self.narrow = nn.Linear(9, 20), nn.Linear(20, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)).tanh())


def train(folder: Path, seed: int, **options: Any) -> Path:
    targets = ["embed", "conv", "wide", "narrow"]
    model = get_peft_model(Net(), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets} | options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder)
    (folder / "fingerprint.json").write_text(json.dumps({"base": "5e" * 32}))
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module → delta (rows, the rest) in float64, by PEFT's own get_delta_weight."""
    model: Any = PeftModel.from_pretrained(Net(), folder)
    names = ("embed", "conv", "wide", "narrow")
    return {
        name: model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double().flatten(1)
        for name in names
    }


class TestFiles:
    def test_each_layer_is_the_best_of_its_rank_and_plain_peft_opens_it(self, tmp_path: Path) -> None:
        """Linear, convolution and embedding; `narrow` can have no more than rank 3, `wide` is left exact by a pattern."""
        members = [train(tmp_path / str(i), i, rank_pattern={"wide": 2}, use_rslora=bool(i)) for i in range(2)]
        weights = [0.3, 0.9]
        summary = StackedAdapter.load(members).save(tmp_path / "soup", weights, rank=4)
        assert summary == json.loads((tmp_path / "soup" / "soup.json").read_text())
        both = [deltas(member) for member in members]
        whole = {name: weights[0] * both[0][name] + weights[1] * both[1][name] for name in both[0]}
        found = deltas(tmp_path / "soup")
        expected, lost = {}, 0.0
        for name, delta in whole.items():
            best, error = dense_best(delta.numpy(), 4)
            expected[name] = error / delta.norm().item()
            lost += error**2
            assert torch.allclose(found[name], torch.from_numpy(best), atol=2e-6)
        assert summary["error"]["layers"] == {
            name: pytest.approx(error, rel=1e-6, abs=1e-7) for name, error in expected.items()
        }
        assert min(expected["conv"], expected["embed"]) > 0.05
        assert summary["error"]["layers"]["wide"] == 0.0 and expected["narrow"] < 1e-7
        norm = math.sqrt(sum(delta.norm().item() ** 2 for delta in whole.values()))
        assert summary["error"]["all"] == pytest.approx(math.sqrt(lost) / norm, rel=1e-6)
        worst = max(expected, key=lambda name: expected[name])
        assert summary["error"]["worst"] == {"module": worst, "error": summary["error"]["layers"][worst]}
        assert summary["norm"] == pytest.approx(norm, rel=1e-6) and summary["ranks"] == [3, 4] and summary["rank"] == 4
        shapes = {key: list(value.shape) for key, value in load_file(tmp_path / "soup" / WEIGHTS).items()}
        assert shapes["base_model.model.conv.lora_A.weight"] == [4, 6, 3]
        assert shapes["base_model.model.conv.lora_B.weight"] == [9, 4, 1]
        assert shapes["base_model.model.embed.lora_embedding_A"] == [4, 11]
        assert shapes["base_model.model.narrow.lora_A.weight"] == [3, 20]

    def test_without_a_rank_nothing_is_lost(self, tmp_path: Path) -> None:
        stacked = StackedAdapter.load([train(tmp_path / str(i), i) for i in range(2)])
        summary = stacked.save(tmp_path / "soup", [0.5, 0.5])
        assert (summary["rank"], summary["error"], summary["rounding"]) == (None, None, 0.0)

    def test_identical_members_recompress_to_the_member_itself(self, tmp_path: Path) -> None:
        """Their stacked factors have exactly half of the rank that they seem to have."""
        member = train(tmp_path / "one", 0)
        summary = StackedAdapter.load([member, member]).save(tmp_path / "soup", [0.25, 0.75], rank=3)
        assert summary["error"]["all"] < 1e-7
        one, soup = deltas(member), deltas(tmp_path / "soup")
        assert all(torch.allclose(one[name], soup[name], atol=2e-6) for name in one)

    def test_a_delta_of_zero(self, tmp_path: Path) -> None:
        members = [train(tmp_path / str(i), i) for i in range(2)]
        for member in members:
            tensors = load_file(member / WEIGHTS)
            save_file({key: value * ("_A" in key) for key, value in tensors.items()}, member / WEIGHTS)
        summary = StackedAdapter.load(members).save(tmp_path / "soup", [0.5, 0.5], rank=2)
        assert summary["error"]["all"] == summary["norm"] == 0.0
        assert all(not delta.any() for delta in deltas(tmp_path / "soup").values())

    def test_in_bfloat16_the_rounding_of_both_factors_is_said(self, tmp_path: Path) -> None:
        members = [train(tmp_path / str(i), i) for i in range(2)]
        stacked = StackedAdapter.load(members)
        fine = stacked.save(tmp_path / "fine", [0.5, 0.5], rank=2)
        coarse = stacked.save(tmp_path / "coarse", [0.5, 0.5], rank=2, dtype=torch.bfloat16)
        assert coarse["error"] == fine["error"] and coarse["dtype"] == "bfloat16"
        tensors = load_file(tmp_path / "coarse" / WEIGHTS)
        assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
        save_file({key: value.float() for key, value in tensors.items()}, tmp_path / "coarse" / WEIGHTS)
        one, other = deltas(tmp_path / "fine"), deltas(tmp_path / "coarse")
        changed = math.sqrt(sum((one[name] - other[name]).norm().item() ** 2 for name in one))
        kept = math.sqrt(sum(delta.norm().item() ** 2 for delta in one.values()))
        assert coarse["rounding"] == pytest.approx(changed / kept, rel=1e-3)

    def test_a_higher_rank_than_any_is_said_and_exact(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        stacked = StackedAdapter.load([train(tmp_path / str(i), i) for i in range(2)])
        summary = stacked.save(tmp_path / "soup", [0.5, 0.5], rank=6)
        assert caplog.messages == ["warning: rank 6 has no effect, because no module of the soup has a rank above 6"]
        assert summary["error"]["all"] == 0.0 and summary["ranks"] == [6]

    @pytest.mark.parametrize("rank", [0, -1, 2.5, True, "8"])
    def test_ranks_that_are_none(self, tmp_path: Path, rank: Any) -> None:
        stacked = StackedAdapter.load([train(tmp_path / "one", 0)])
        with pytest.raises(
            SalsaError, match=r"rank: .* is not a whole number of at least 1; leave it out for an exact soup"
        ):
            stacked.save(tmp_path / "soup", [1], rank=rank)
        assert not (tmp_path / "soup").exists()

    def test_threads_are_given_back(self, tmp_path: Path) -> None:
        from threadpoolctl import threadpool_info, threadpool_limits

        stacked = StackedAdapter.load([train(tmp_path / str(i), i) for i in range(2)])
        seen: list[int] = []
        with threadpool_limits(2):
            stacked.save(
                tmp_path / "soup", [0.5, 0.5], rank=2,
                progress=lambda n, total: seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"),
            )  # fmt: skip
            after = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        assert set(seen) == {1} and after == {2}

"""The paper's tables from their counts, against those recomputed independently; what is flagged; which of a run's pairs they stand beside."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from paths import SHARED
from rich.console import Console

from salsa_peft.report import paper

PAPER = SHARED / "data" / "paper_tables.json"


@pytest.fixture(scope="module")
def recomputed() -> Any:
    if not PAPER.exists():
        pytest.skip(f"no {PAPER}: the tables recomputed elsewhere")
    return json.loads(PAPER.read_text(encoding="utf-8"))


def test_every_cell_as_recomputed_elsewhere(recomputed: Any) -> None:
    """Counts, rates, Tango's intervals to 0.1 point, p-values, missing judgments, the sets that the labels should name; both directions."""
    of = {
        (int(row["table"]), row["model"], row["dataset_corrected"], row["a"], row["b"]): row
        for row in recomputed["rows"]
    }
    both = [*paper.cells(), *(cell.swapped() for cell in paper.cells())]
    assert len(both) == len(of) == 58
    for cell in both:
        row, found = of[cell.table, cell.model, cell.dataset, cell.a, cell.b], cell.rates
        assert (found.wins, found.losses, found.ties, cell.missing) == (
            row["wins"],
            row["losses"],
            row["ties"],
            row["n_missing"],
        )
        assert cell.labelled == row["dataset_printed"]
        assert 100 * found.win_rate == pytest.approx(row["recomputed_win_rate"], abs=1e-3)
        assert 100 * found.adjusted_win_rate == pytest.approx(row["recomputed_adjusted"], abs=1e-3)
        assert [100 * found.low, 100 * found.high] == pytest.approx(row["adjusted_ci95_tango"], abs=0.1)
        assert found.p_value == pytest.approx(row["sign_test_p"], rel=1e-9)
        if row["sign_test_p_holm9"] is not None:
            assert cell.p_holm == pytest.approx(row["sign_test_p_holm9"], rel=1e-9)
        wrong = "MISMATCH" in (row["win_rate_check"], row["adjusted_check"])
        assert wrong == any(flag.startswith(f"{cell.a} over {cell.b}:") for flag in cell.flags)


def test_table_1_is_the_appendix(recomputed: Any) -> None:
    """All 18 cells, their intervals, what the paper prints."""
    assert len(paper.table1()) == len(recomputed["table1"]) == 18
    for (cell, printed), row in zip(paper.table1(), recomputed["table1"], strict=True):
        assert (cell.model, cell.dataset, cell.a, cell.b) == (row["model"], row["dataset"], row["a"], row["b"])
        assert printed == row["printed_adjusted"]
        assert [100 * cell.rates.low, 100 * cell.rates.high] == pytest.approx(row["ci95"], abs=0.1)


def test_what_does_not_agree() -> None:
    """The four cells, and nothing that rounding explains."""
    assert paper.flags() == [
        "Table 3, Mistral-7B, UltraFeedback, PPO over SFT: adjusted win rate printed 50.65, the counts give 50.12 (the same as Llama2-7B's in Table 2)",
        "Table 3, Mistral-7B, UltraFeedback, SFT over PPO: win rate printed 20.89, the counts give 22.50; adjusted win rate printed 49.35, the counts give 49.88"
        " (the same as Llama2-7B's in Table 2)",
        "Table 5, Mistral-7B, labelled MT-Bench: 494 judgments where MT-Bench has 160; the labels of Table 5 are swapped",
        "Table 5, Mistral-7B, labelled Arena-Hard: 160 judgments are those of another set; the labels of Table 5 are swapped",
    ]


def test_facts_alone_are_shipped() -> None:
    """Counts and prints, with their source; nothing that was computed."""
    facts = paper._facts()
    assert "2411.01798" in facts["source"] and len(facts["tables"]) == 29
    assert {key for row in facts["tables"] for key in row} == {
        "table",
        "model",
        "dataset",
        "a",
        "b",
        "wins",
        "losses",
        "ties",
        "printed",
    }


@pytest.mark.parametrize(
    ("base", "dataset", "a", "b", "counts"),
    [
        ("meta-llama/Llama-2-7b-hf", "mt_bench", "salsa", "ppo", (29, 21, 110)),
        ("Llama-2-7b-hf", "mt_bench", "ppo", "salsa", (21, 29, 110)),
        ("mistralai/Mistral-7B-v0.1", "arena_hard_v0.1", "mkl", "ppo", (69, 85, 340)),  # Table 5, by its true label
        ("google/gemma-2b", "ultrafeedback", "salsa", "seed-0", (300, 129, 1548)),
        ("google/gemma-7b", "ultrafeedback", "salsa", "seed-0", None),
        ("google/gemma-2b", "ultrachat", "salsa", "seed-0", None),
        ("google/gemma-2b", "mt_bench", "salsa", "ppo-shrunk", None),
        ("google/gemma-2b", "mt_bench", "alpha-1", "alpha-0", None),
    ],
)  # fmt: skip
def test_beside_a_runs_pair(base: str, dataset: str, a: str, b: str, counts: tuple[int, int, int] | None) -> None:
    """By the base's name and the recipe's; either way round."""
    cell = paper.beside(base, dataset, a, b)
    assert counts == (None if cell is None else (cell.rates.wins, cell.rates.losses, cell.rates.ties))


def test_what_is_printed() -> None:
    """All tables, the flags, how many intervals exclude 50%."""
    console = Console(file=io.StringIO(), width=190)
    paper.show(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"Table {number}, " in text for number in (1, 2, 3, 4, 5)) and "arXiv 2411.01798" in text
    assert all(flag in " ".join(text.split()) for flag in paper.flags())
    assert "SALSA over PPO: 5 of 9 intervals lie above 50%, 4 of 9 with p < 0.05 after Holm's correction." in text
    row = next(line for line in text.splitlines() if line.startswith("UltraFeedback*"))
    assert (
        " ".join(row.split())
        == "UltraFeedback* PPO – SFT 455 450 1095 0 22.75 22.75 50.65 50.12 [48.7, 51.6] 0.894 1.000"
    )

"""The paper's Tables 1 to 5 (arXiv 2411.01798) recomputed from the paper's counts, with intervals.

paper_tables.json contains only the counts and rates that the paper prints. Intervals are over judgments, which are
treated as independent and are from one training seed.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from salsa_peft.report.format import p_value, percent, rate_of
from salsa_peft.utils.statistics import WinRates, holm, win_rates

ROUNDING = 0.01 + 1e-9
"""Largest difference in percentage points between a printed rate and the rate of its counts that rounding or
truncation of the last digit explains."""
BASES = {"llama27b": "Llama2-7B", "mistral7b": "Mistral-7B", "gemma2b": "Gemma-2B"}
"""Beginning of a base's name (lower case, only letters and digits) → the paper's name of the base."""
SETS = {"mtbench": "MT-Bench", "arenahard": "Arena-Hard", "ultrafeedback": "UltraFeedback"}
MODELS = {"salsa": "SALSA", "ppo": "PPO", "seed-0": "SFT", "mkl": "MKL"}
"""Name of a model in a recipe → its name in the paper."""


@dataclass(frozen=True)
class Cell:
    """The paper's result for one pair, a over b, on one set of questions."""

    table: int
    model: str
    dataset: str
    """The set of questions to which the numbers of wins, losses and ties belong."""
    labelled: str
    """The set of questions that the paper prints; differs from `dataset` where two labels are swapped."""
    a: str
    b: str
    rates: WinRates
    missing: int
    """Number of judgments that the table lacks (FastChat drops judgments without a verdict)."""
    p_holm: float
    """P-value with Holm's correction over all cells of the pair: nine in Tables 2 to 4, two in Table 5."""
    printed: tuple[str, str]
    """Win rate and adjusted win rate as the paper prints them, in %."""
    flags: tuple[str, ...]
    """Descriptions of printed labels and rates that are inconsistent with the counts."""

    def swapped(self) -> Cell:
        """The result for b over a, without printed rates; `flags` already names the errors in those."""
        counts = self.rates
        return replace(
            self, a=self.b, b=self.a, rates=win_rates(counts.losses, counts.wins, counts.ties), printed=("", "")
        )

    def adjusted_rate(self) -> dict[str, Any]:
        """The adjusted win rate and its interval, as in summary.json."""
        return rate_of(asdict(self.rates))


@cache
def _facts() -> Any:
    return json.loads(files("salsa_peft.report").joinpath("paper_tables.json").read_text(encoding="utf-8"))


@cache
def cells() -> tuple[Cell, ...]:
    """The cells of Tables 2 to 5 in the paper's order; b over a is not repeated."""
    facts = _facts()
    rows, possible = facts["tables"], facts["judgments"]
    found = []
    for row in rows:
        rates = win_rates(row["wins"], row["losses"], row["ties"])
        dataset = _dataset(row, rows, possible)
        flags = [_swapped_label(row, possible)] * (dataset != row["dataset"])
        flags += [flag for flag in (_wrong_rate(row, turn, rows) for turn in (0, 1)) if flag]
        printed = row["printed"]
        found.append(
            Cell(row["table"], row["model"], dataset, row["dataset"], row["a"], row["b"], rates, possible[dataset] - rates.n, 1.0,
                 (printed["win_rate"][0], printed["adjusted_win_rate"][0]), tuple(flags))
        )  # fmt: skip
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for at, cell in enumerate(found):
        groups.setdefault((cell.a, cell.b, cell.table == 5), []).append(at)
    for places in groups.values():
        for at, p in zip(places, holm([found[at].rates.p_value for at in places]), strict=True):
            found[at] = replace(found[at], p_holm=p)
    return tuple(found)


def _count(row: dict[str, Any]) -> int:
    return int(row["wins"] + row["losses"] + row["ties"])


def _dataset(row: dict[str, Any], rows: list[dict[str, Any]], possible: dict[str, int]) -> str:
    """The set of questions that a row's counts fit: the printed one, or the one it was swapped with."""
    same = [one for one in rows if all(one[key] == row[key] for key in ("table", "model", "a", "b"))]
    if all(_count(one) <= possible[one["dataset"]] for one in same):
        return str(row["dataset"])
    order = sorted((one["dataset"] for one in same), key=lambda name: possible[name])
    return str(dict(zip(sorted(map(_count, same)), order, strict=True))[_count(row)])


def _swapped_label(row: dict[str, Any], possible: dict[str, int]) -> str:
    total, most = _count(row), possible[row["dataset"]]
    why = f"where {row['dataset']} has {most}" if total > most else "are those of another set"
    return f"labelled {row['dataset']}: {total} judgments {why}; the labels of Table {row['table']} are swapped"


def _wrong_rate(row: dict[str, Any], turn: int, rows: list[dict[str, Any]]) -> str:
    """Description of printed rates of a over b (turn 0) or b over a (turn 1) that the counts do not give."""
    step = -1 if turn else 1
    a, b = (row["a"], row["b"])[::step]
    wins, losses = (row["wins"], row["losses"])[::step]
    rates = win_rates(wins, losses, row["ties"])
    computed = {"win_rate": 100 * rates.win_rate, "adjusted_win_rate": 100 * rates.adjusted_win_rate}
    printed = {key: row["printed"][key][turn] for key in computed}
    off = [key for key in computed if abs(float(printed[key]) - computed[key]) > ROUNDING]
    if not off:
        return ""
    twin = next((other for other in rows if other is not row and (other["a"], other["b"]) == (row["a"], row["b"])
                 and all(other["printed"][key][turn] == printed[key] for key in off)), None)  # fmt: skip
    wrong = [f"{key.replace('_', ' ')} printed {printed[key]}, the counts give {computed[key]:.2f}" for key in off]
    same = f" (the same as {twin['model']}'s in Table {twin['table']})" if twin else ""
    return f"{a} over {b}: {'; '.join(wrong)}{same}"


def table1() -> list[tuple[Cell, str]]:
    """The cells in Table 1, with the adjusted win rates that Table 1 prints."""
    return [
        (next(cell for cell in cells() if cell.table < 5 and (cell.model, cell.dataset, cell.a, cell.b)
              == (row["model"], row["dataset"], row["a"], row["b"])), row["printed"])
        for row in _facts()["table1"]
    ]  # fmt: skip


def beside(base: str, dataset: str, a: str, b: str) -> Cell | None:
    """The paper's result for a run's pair, a over b, or None. base: Hub id or name of a local folder."""

    def known(names: dict[str, str], name: str) -> str | None:
        letters = re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
        return next((of for start, of in names.items() if letters.startswith(start)), None)

    wanted, pair = (known(BASES, base), known(SETS, dataset)), (MODELS.get(a), MODELS.get(b))
    same = [cell for cell in cells() if (cell.model, cell.dataset) == wanted]
    return next((cell for one in same for cell in (one, one.swapped()) if (cell.a, cell.b) == pair), None)


def flags() -> list[str]:
    """Descriptions of all inconsistencies between the paper's tables and their counts."""
    found = [
        f"Table {cell.table}, {cell.model}, {'' if flag.startswith('labelled') else cell.labelled + ', '}{flag}"
        for cell in cells()
        for flag in cell.flags
    ]
    return found + [
        f"Table 1, {cell.model}, {cell.dataset}, {cell.a} over {cell.b}: printed {printed}, the counts give"
        f" {percent(cell.rates.adjusted_win_rate)}"
        for cell, printed in table1()
        if abs(float(printed) - 100 * cell.rates.adjusted_win_rate) > ROUNDING
    ]


def show(console: Console, *, narrow: bool = False) -> None:
    """Print every table recomputed from its counts, for `salsa report --paper`.

    narrow: for 80 columns, with less in Tables 2 to 5: no missing answers, unadjusted win rates and p-values.
    """
    left_out = ("missing", "win rate, printed", "counts", "p", "p, Holm") if narrow else ()
    console.print(Text(f"{_facts()['source']}.\nIntervals: Tango's (1998) score interval of W − L over N, as a win rate; p: exact sign test without ties;"
                       " p, Holm: corrected over the cells of the same pair. Judgments are of one training seed and are treated as independent."))  # fmt: skip
    one = _table("Table 1, adjusted win rate, %", "model", "questions", "pair", "printed", "counts [95%]", "p, Holm")
    for cell, printed in table1():
        one.add_row(cell.model, cell.dataset, f"{cell.a} – {cell.b}", printed, _interval(cell), p_value(cell.p_holm))
    console.print(one)
    for number in (2, 3, 4, 5):
        of = [cell for cell in cells() if cell.table == number]
        title = f"Table {number}, {of[0].model}"
        header = ("questions", "pair", "win", "loss", "tie", "missing", "win rate, printed", "counts", "adjusted, printed", "counts [95%]", "p", "p, Holm")  # fmt: skip
        table = _table(title, *(name for name in header if name not in left_out))
        for cell in of:
            v = cell.rates
            texts = (cell.dataset + ("*" if cell.flags else ""), f"{cell.a} – {cell.b}", str(v.wins), str(v.losses), str(v.ties), str(cell.missing), cell.printed[0],
                     f"{100 * v.win_rate:.2f}", cell.printed[1], _interval(cell), p_value(v.p_value), p_value(cell.p_holm))  # fmt: skip
            table.add_row(*(text for name, text in zip(header, texts, strict=True) if name not in left_out))
        console.print(table)
    console.print(Text("* Contradicted by its counts:" if flags() else "All printed numbers agree with their counts."))
    for flag in flags():
        console.print(Text(f"  {flag}"))
    for a, b in (("SALSA", "PPO"), ("SALSA", "SFT")):
        of = [cell for cell, _ in table1() if (cell.a, cell.b) == (a, b)]
        above = sum(cell.rates.low > 0.5 for cell in of)
        significant = sum(cell.p_holm < 0.05 and cell.rates.adjusted_win_rate > 0.5 for cell in of)
        text = f"{significant} of {len(of)} with p < 0.05 after Holm's correction."
        console.print(Text(f"{a} over {b}: {above} of {len(of)} intervals lie above 50%, {text}"))


def _table(title: str, *header: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
    left = ("model", "questions", "pair")
    for name in header:
        table.add_column(Text(name), justify="left" if name in left else "right", no_wrap=name in left)
    return table


def _interval(cell: Cell) -> str:
    v = cell.rates
    return f"{100 * v.adjusted_win_rate:.2f} [{percent(v.low)}, {percent(v.high)}]"

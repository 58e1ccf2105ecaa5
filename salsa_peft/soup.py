"""Soups: members → their weighted mean. The strategies, the library call and the command.

    θ_soup = Σ_i w_i · θ_i, Σ w_i = 1; of adapters the exact weighted mean of their deltas (stacked_adapter.py)

Stands on its own: knows nothing of PPO, and what it writes opens with plain PEFT.
Left out: full checkpoints and Hub ids.
"I want to add a strategy" is a function here and a row in STRATEGIES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from salsa_peft.config import SalsaError
from salsa_peft.stacked_adapter import StackedAdapter, check_weights

__all__ = ["STRATEGIES", "StackedAdapter", "linear", "main", "soup"]


def linear(members: StackedAdapter, weights: list[float]) -> list[float]:
    """The weighted mean: the weights that were asked for."""
    return weights


STRATEGIES: dict[str, Callable[[StackedAdapter, list[float]], list[float]]] = {"linear": linear}
"""name → (members, the weights asked for) → the weights of the blocks."""


def soup(
    out: Path | str,
    members: Sequence[Path | str],
    weights: Sequence[float] | None = None,
    *,
    strategy: str = "linear",
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Average adapter folders into `out` (weights: uniform unless given) and return the summary, also out/soup.json.

    `names` are what the summary calls the members (default: their folders' names).
    """
    if strategy not in STRATEGIES:
        raise SalsaError(f"strategy: found {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if not members:
        raise SalsaError("a soup of no members: expected at least one adapter folder")
    asked = [1 / len(members) for _ in members] if weights is None else weights
    asked = check_weights(asked, len(members), sum_to_one=True)
    stacked = StackedAdapter.load(members, names)
    return stacked.save(Path(out), STRATEGIES[strategy](stacked, asked), strategy=strategy)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def join_weights(argv: Sequence[str]) -> list[str]:
    """`--weights 1.5 -0.5` as one argument: argparse takes -0.5,1.5 for an option, folders for numbers."""
    rest, joined = list(argv), []
    while rest:
        token = rest.pop(0)
        if token == "--weights" and rest:
            numbers = [rest.pop(0)]
            while rest and re.fullmatch(r"[-+.,\deE]*\d[-+.,\deE]*", rest[0]):
                numbers.append(rest.pop(0))
            token = f"--weights={','.join(numbers)}"
        joined.append(token)
    return joined


def parse_weights(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise SalsaError(f"--weights: found {text}, expected numbers such as 0.25,0.75") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m salsa_peft.soup OUT MEMBER MEMBER … [--weights 0.25,0.75]`: 0, or 2 and one line on stderr."""
    parser = Parser(
        prog="salsa soup", description="Average LoRA adapters of one base into one ordinary PEFT adapter, exactly."
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the soup")
    parser.add_argument(
        "members",
        metavar="MEMBER",
        nargs="+",
        help="local PEFT adapter folders",
    )
    parser.add_argument(
        "--weights",
        metavar="W,W",
        help="one number a member, sum 1: 0.25,0.75 or 0.25 0.75 (default: uniform)",
    )
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="linear", help="how the members are weighted (default: linear)"
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    args = parser.parse_args(join_weights(sys.argv[1:] if argv is None else argv))
    try:
        weights = None if args.weights is None else parse_weights(args.weights)
        summary = soup(args.out, args.members, weights, strategy=args.strategy)
    except SalsaError as error:
        if args.debug:
            raise
        print(f"salsa soup: {error}", file=sys.stderr)
        return 2
    print_summary(summary)
    print(f"written to {args.out}")
    return 0


def print_summary(summary: dict[str, Any]) -> None:
    print(
        f"soup of {len(summary['members'])} adapters ({summary['strategy']}): {summary['modules']} modules, "
        f"rank {show(summary['ranks'])}, {summary['bytes']:,} bytes, {summary['seconds']} s"
    )
    for member in summary["members"]:
        print(
            f"  {member['name']}: weight {member['weight']:g}, rank {show(member['ranks'])}, "
            f"norm of delta {member['norm']:.4g}"
        )
    for pair in summary["pairs"]:
        cosine = "undefined" if pair["cosine"] is None else f"{pair['cosine']:.4f}"
        print(f"  {pair['a']} – {pair['b']}: distance {pair['distance']:.4g}, cosine {cosine}")
    print(f"  soup: norm of delta {summary['norm']:.4g}")


def show(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


if __name__ == "__main__":
    raise SystemExit(main())

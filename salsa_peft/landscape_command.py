"""`salsa landscape OUT A B [C]`: a measure along the line of two members, on the plane of three, as JSON and figures.

Members are adapters of one base, or checkpoints; the paper's Figure 2 without a recipe. Between points of adapters n scalars change;
of checkpoints the model's weights are written anew. The recipe's landscape stage (landscape.py) has intervals over prompts besides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config import Landscape, SalsaError, require
from salsa_peft.runs import write_atomic
from salsa_peft.soup import Parser, add_measure, names

EPILOG = """  salsa landscape OUT SEED_0 SEED_1 --measure sft_loss --data held_out.jsonl
  salsa landscape OUT SEED_0 SEED_1 SEED_2 --measure reward --reward REWARD --data prompts.jsonl --resolution 6
"""
RESULT = "landscape.json"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = Parser(prog="salsa landscape", description="A measure along the line of two members, and on the plane of three.",
                  epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("out", metavar="OUT", type=Path, help=f"folder of {RESULT} and the figures")
    made.add_argument(
        "members", metavar="MEMBER", nargs="+", help="two or three adapters, or checkpoints: folders or Hub ids"
    )
    made.add_argument("--alphas", type=float, nargs="+", help="points of the line (default: -0.5 to 1.5 by 0.25)")
    made.add_argument(
        "--scales", type=float, nargs="*", help="adapters: points of the control, base + λ · the first member's delta"
    )
    made.add_argument(
        "--resolution", type=int, default=4, help="steps along an edge of the plane's triangle (default: 4)"
    )
    made.add_argument("--base", metavar="BASE", help="the base's folder or Hub id (default: what the adapters name)")
    add_measure(made)
    made.add_argument("--debug", action="store_true", help="show the trace of an error")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 and one line on stderr."""
    args = parser().parse_args(argv)
    try:
        found = measured(args)
    except SalsaError as error:
        if args.debug:
            raise
        print(f"salsa landscape: {error}", file=sys.stderr)
        return 2
    for line in found["lines"]:
        print(f"{line['name']}")
        for point in line["points"]:
            print(f"  {point['at']:g}: {point['scores'][found['measures'][0]]['mean']:.5g}")
    print(f"written to {args.out}")
    return 0


def section_of(args: argparse.Namespace, kind: str) -> Landscape:
    """Which points are measured. Raises SalsaError for other than two or three members."""
    n = len(args.members)
    require(n in (2, 3), f"members: found {n}, expected two (a line) or three (a plane, and the line of the first two)")
    require(args.measure is not None, "--measure: found none, expected sft_loss, reward or module:name")
    require(args.resolution > 0, f"--resolution: found {args.resolution}, expected at least 1")
    require(
        not args.scales or kind == "adapters",
        "--scales: found checkpoints as members, expected adapters: what a checkpoint added to its base is not known here",
    )
    chosen: dict[str, Any] = {"line": [0, 1], "plane": [0, 1, 2] if n == 3 else None, "resolution": args.resolution}
    chosen |= {} if args.alphas is None else {"alphas": args.alphas}
    if kind != "adapters" or args.scales is not None:
        chosen["scales"] = args.scales or []
    return Landscape(**chosen)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every point; write landscape.json, line-….svg and .png, plane-…."""
    from salsa_peft.averaging import kind_of, local

    folders = [local(member) for member in args.members]
    kind = kind_of(folders)
    section, called = section_of(args, kind), names(args.members)
    from salsa_peft.landscape import measure_points, points
    from salsa_peft.measures import of_command

    measure, name = of_command(args, folders, kind), args.measure.rsplit(":", 1)[-1]

    def score(weights: Mapping[int, float]) -> dict[str, dict[str, float]]:
        value = measure([weights.get(position, 0.0) for position in range(len(folders))])
        return {name: {"mean": value, "low": value, "high": value}}  # one number: no interval

    found = measure_points(points(section, called), score, "landscape")
    found |= {"measures": [name], "members": called, "kind": kind, "data": args.data}
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / RESULT, json.dumps(found, indent=2))
    draw(found, args.out)
    return found


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """The figures, each as SVG and PNG."""
    from salsa_peft.panels import looks
    from salsa_peft.report import draw_landscape

    ends = [end for line in found["lines"] for end in line["ends"]]
    for panel in draw_landscape(found, looks([*ends, "soup"])):
        write_atomic(folder / f"{panel.name}.svg", panel.svg)
        write_atomic(folder / f"{panel.name}.png", panel.png)


if __name__ == "__main__":
    raise SystemExit(main())

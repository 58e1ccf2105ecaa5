"""`salsa landscape`: computes a measure on the line through two members or the plane through three.

This makes the paper's Figure 2 without a recipe. Members are adapters of one base, or checkpoints. Adapters are loaded
once and get new scales at each point; checkpoints are averaged again at each point. The landscape stage of a recipe
(evaluation/landscape.py) also gives confidence intervals over prompts.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.schema import Landscape
from salsa_peft.soup.__main__ import add_measure, join_weights, parse_weights, positive_integer, run_command
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.member_folders import ADAPTERS, kind_of, local, member_names
from salsa_peft.utils.console import Parser
from salsa_peft.utils.errors import require
from salsa_peft.utils.files import write_atomic
from salsa_peft.utils.manifests import MANIFEST

EPILOG = """  salsa landscape OUT SEED_0 SEED_1 --measure sft_loss --data held_out.jsonl
  salsa landscape OUT SEED_0 SEED_1 SEED_2 --measure reward --reward REWARD --data prompts.jsonl --resolution 6
"""
RESULT = "landscape.json"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = Parser(prog="salsa landscape", description="Compute a measure along the line through two members, and on the"
                                                      " plane through three.",
                  epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = made.add_argument
    add("out", metavar="OUT", type=Path, help=f"folder for {RESULT} and the figures")
    add("members", metavar="MEMBER", nargs="+", help="two or three adapters, or checkpoints: folders or Hub ids")
    add("--alphas", metavar="α,α", help="points of the line: 0 and 1 are the members (default: -0.5 to 1.5, step 0.25)")
    add("--scales", metavar="λ,λ", help="adapters only: also measure the base plus λ times the first member's update")
    steps = "number of grid steps along an edge of the three members' triangle (default: 4)"
    add("--resolution", type=positive_integer, default=4, help=steps)
    add("--base", metavar="BASE", help="the base's folder or Hub id (default: the base that the adapters name)")
    add("--same-base", action="store_true", help="treat the adapters' bases as the same, even if their names differ")
    add_measure(made)
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa landscape`. Returns 0, or 2 after an error."""
    args = parser().parse_args(join_weights(sys.argv[1:] if argv is None else argv, ("--alphas", "--scales")))
    return run_command("salsa landscape", args, measure_and_print)


def measure_and_print(args: argparse.Namespace, accepted: Callable[[], None]) -> None:
    """Measure all points, and print the values on the lines."""
    found = measure_all(args, accepted)
    for line in found["lines"]:
        print(f"{line['name']}")
        for point in line["points"]:
            print(f"  {point['at']:g}: {point['scores'][found['measures'][0]]['mean']:.5g}")
    print(f"written to {args.out}")


def landscape_section(args: argparse.Namespace, kind: str, shrinks: bool) -> Landscape:
    """Settings of the points to measure.

    shrinks: whether the members can be scaled. If so, and without --scales, the default control points are included.

    Raises SalsaError for a wrong number of members, and for options that are missing or invalid.
    """
    n = len(args.members)
    require(n in (2, 3), f"MEMBER: give two (a line) or three (a plane, and the line of the first two), not {n}")
    require(args.measure is not None, "--measure: is required; use sft_loss, reward or module:name")
    require(
        not args.scales or kind == ADAPTERS,
        "--scales: works only with adapters, since a checkpoint's base is not known here; leave --scales out",
    )
    chosen: dict[str, Any] = {"line": [0, 1], "plane": [0, 1, 2] if n == 3 else None, "resolution": args.resolution}
    for option, text in (("alphas", args.alphas), ("scales", args.scales)):
        if text is not None:
            chosen[option] = parse_weights(text, f"--{option}")
            require(all(map(math.isfinite, chosen[option])), f"--{option}: the numbers must be finite, not {text}")
    if args.scales is None and not shrinks:
        chosen["scales"] = []
    return Landscape(**chosen)


def measure_all(args: argparse.Namespace, accepted: Callable[[], None]) -> dict[str, Any]:
    """Measure all points; write landscape.json and the figures line-… and plane-… as SVG and PNG."""
    folders = [local(member) for member in args.members]
    kind, names = kind_of(folders), member_names(args.members)
    require(
        args.out.resolve() not in [folder.resolve() for folder in folders],
        f"{args.out}: this folder is a member; choose another folder for OUT",
    )
    require(
        not (args.out / MANIFEST).exists(),
        f"{args.out}: this folder is a result of a run; choose another folder for OUT",
    )
    # weights that are averaged without a base (a score head) cannot be scaled
    shrinks = kind == ADAPTERS and not StackedAdapter.load(folders, same_base=args.same_base).members[0].non_lora
    section = landscape_section(args, kind, shrinks)
    args.out.mkdir(parents=True, exist_ok=True)
    from salsa_peft.evaluation.landscape import measure_points, points
    from salsa_peft.soup.measures import command_measure

    measure, name = command_measure(args, folders, kind), args.measure.rsplit(":", 1)[-1]
    accepted()

    def score(weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
        value = measure([weights.get(member, 0.0) for member in names])
        return {name: {"mean": value, "low": value, "high": value}}  # a measure gives one number without an interval

    found = measure_points(points(section, names), score, "landscape")
    found |= {"measures": [name], "members": names, "kind": kind, "data": args.data}
    write_atomic(args.out / RESULT, json.dumps(found, indent=2))
    draw(found, args.out)
    return found


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Write the figures as SVG and PNG."""
    from salsa_peft.report.plots import draw_landscape
    from salsa_peft.report.style import looks

    ends = [end for line in found["lines"] for end in line["ends"]]
    for panel in draw_landscape(found, looks([*ends, "soup"])):
        write_atomic(folder / f"{panel.name}.svg", panel.svg)
        write_atomic(folder / f"{panel.name}.png", panel.png)


if __name__ == "__main__":
    raise SystemExit(main())

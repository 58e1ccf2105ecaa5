"""The command `salsa soup OUT MEMBER MEMBER …`. In Python, call `salsa_peft.soup.soup`."""

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.options.soup import MEASURED_STRATEGIES
from salsa_peft.soup.average import soup
from salsa_peft.soup.member_folders import kind_of, local_members, member_names
from salsa_peft.soup.options import BASE, Options, check
from salsa_peft.soup.strategies import STRATEGIES
from salsa_peft.soup.strategies.elementwise import ELEMENTWISE
from salsa_peft.soup.summary import SoupSummary
from salsa_peft.utils.console import (
    Parser,
    complain,
    no_echo_of_control_characters,
    progress_bar,
    say,
    silence_import_warnings,
    wrapped,
)
from salsa_peft.utils.errors import SalsaError, require

EPILOG = """members are folders or Hub ids of LoRA adapters of one base, or of full checkpoints of one architecture.

  salsa soup OUT SEED_0 SEED_1                       the exact mean of two adapters, as an ordinary PEFT adapter
  salsa soup OUT SEED_0 SEED_1 --weights 1.5 -0.5    extrapolation
  salsa soup OUT SEED_0 SEED_1 --rank 16             reduced to rank 16; soup.json has the relative error
  salsa soup OUT SEED_0 SEED_1 --merge --base BASE   added to the base, as a full checkpoint
  salsa soup OUT CHECKPOINT_0 CHECKPOINT_1           the mean of two checkpoints
  salsa soup OUT A B --start SFT --scale 0.5         half way from SFT to the mean of A and B, trained from SFT
  salsa soup OUT A B C --strategy slerp --per layer --start SFT
  salsa soup OUT A B C --strategy greedy --measure sft_loss --data held_out.jsonl
  salsa soup OUT A B C --strategy greedy --measure reward --reward REWARD --data prompts.jsonl
"""


def join_weights(argv: Sequence[str], options: Collection[str] = ("--weights",)) -> list[str]:
    """Join `--weights 1.5 -0.5` into one argument, because argparse takes -0.5 for an option."""
    rest, joined = list(argv), []
    while rest:
        token = rest.pop(0)
        option, _, value = token.partition("=")
        if option in options and (value or rest):
            numbers = [value or rest.pop(0)]
            while rest and re.fullmatch(r"[-+.,\deE]*\d[-+.,\deE]*", rest[0]):
                numbers.append(rest.pop(0))
            token = f"{option}={','.join(numbers)}"
        joined.append(token)
    return joined


def parse_weights(text: str, option: str = "--weights") -> list[float]:
    """Parse comma-separated numbers. Raises SalsaError, which names the option, for anything else."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SalsaError(f"{option}: {text} is not a list of numbers such as 0.25,0.75") from None


def positive_integer(text: str) -> int:
    """An argument type of argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The argument parser of `salsa soup`."""
    made = Parser(
        prog="salsa soup", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Average LoRA adapters of one base, or full checkpoints of one architecture, exactly.",
    )  # fmt: skip
    add = made.add_argument
    add("out", metavar="OUT", type=Path, help="output folder of the soup")
    add("members", metavar="MEMBER", nargs="+", help="adapters, or checkpoints: folders or Hub ids")
    add("--weights", metavar="W,W", help="one number per member: 0.25,0.75 or 0.25 0.75 (default: uniform)")
    add("--normalize", action="store_true", help="divide the weights by their sum")
    add(
        "--strategy",
        choices=[*STRATEGIES, *ELEMENTWISE],
        default="linear",
        help="how the weights are chosen (default: linear)",
    )
    add("--per", choices=["model", "layer"], default="model",
        help="slerp, karcher, model_stock: weights for the whole model, or for each layer (default: model)")  # fmt: skip
    add("--start", metavar="START", default=BASE,
        help="measure the members' changes from this model (folder or Hub id; default: base)")  # fmt: skip
    add("--scale", type=float, default=1.0, metavar="ETA",
        help="the soup is the start + ETA times the merged change (default: 1)")  # fmt: skip
    add("--density", type=float, metavar="SHARE",
        help="ties, dare: share of the elements that is kept (default: 0.2 and 0.1)")  # fmt: skip
    add("--drop-seed", type=int, metavar="N", help="dare: seed of the random choice (default: 0)")
    add("--rank", type=positive_integer, help="adapters: reduce to this rank (default: the sum of the members' ranks)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the soup (default: the adapters')")
    add("--merge", action="store_true", help="adapters: add the soup to the base and save a checkpoint")
    add("--base", metavar="BASE", help="folder or Hub id of the base (default: the one that the adapters name)")
    add("--quantized-base", choices=["nf4", "nf4-double"],
        help="--merge: first quantise and dequantise the base, as in QLoRA")  # fmt: skip
    add("--same-base", action="store_true", help="adapters: assert that all have one base, even if named differently")
    add("--untie", action="store_true", help="--merge: untie tied embeddings that have LoRA")
    add_measure(made)
    add("--steps", type=positive_integer, default=20, help="number of Adam steps of strategy learned (default: 20)")
    add("--step-size", type=float, default=0.1, help="Adam's learning rate in strategy learned (default: 0.1)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measure on held-out data, from --measure to --max-new-tokens."""
    add = parser.add_argument
    add("--measure", metavar="M", help="sft_loss, reward, or module:name (a function of the model)")
    add("--data", metavar="FILE", help="chats (sft_loss) or prompts (reward): jsonl, json, parquet or a Hub id")
    add("--reward", metavar="REWARD", help="measure reward: folder or Hub id of a reward adapter or classifier")
    add("--limit", type=positive_integer, default=128, help="use the first LIMIT rows of --data (default: 128)")
    add("--max-length", type=positive_integer, default=1024, help="maximum tokens of a chat (default: 1024)")
    add("--max-new-tokens", type=positive_integer, default=128,
        help="measure reward: maximum tokens of a response (default: 128)")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `salsa soup`. Returns the exit code."""
    args = parser().parse_args(join_weights(sys.argv[1:] if argv is None else argv))
    return run_command("salsa soup", args, make_soup)


def run_command(
    prog: str, args: argparse.Namespace, work: Callable[[argparse.Namespace, Callable[[], None]], None]
) -> int:
    """Run `work`. Returns 0, or 2 after an error (printed in one line), or 130 after an interruption.

    `work` is called with the arguments and with a function that it calls once the arguments are accepted. Warnings are
    printed only from that call on, so that for a rejected argument only the error is printed.
    """
    silence_import_warnings()
    warnings, package = DeferredWarnings(logging.WARNING), logging.getLogger("salsa_peft")
    package.addHandler(warnings)
    try:
        with no_echo_of_control_characters():
            work(args, warnings.show)
        warnings.show()
    except (SalsaError, OSError) as error:
        if args.debug or isinstance(error, OSError):
            warnings.show()
        if args.debug:
            raise
        complain(f"{prog}: {error}")
        return 2
    except KeyboardInterrupt:
        complain(f"{prog}: interrupted; run the same command again")
        return 130
    finally:
        package.removeHandler(warnings)
    return 0


class DeferredWarnings(logging.Handler):
    """A log handler that prints each warning once, but no warning before `show` is called."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []
        self.shown = False

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)
            if self.shown:
                say(line)

    def show(self) -> None:
        """Print the warnings so far. Later warnings are printed at once."""
        if not self.shown:
            self.shown = True
            for line in self.lines:
                say(line)


def make_soup(args: argparse.Namespace, accepted: Callable[[], None]) -> None:
    """Make the soup and print its summary. accepted: called once the arguments and members are accepted."""
    weights = None if args.weights is None else parse_weights(args.weights)
    strategy, measured = args.strategy, args.strategy in MEASURED_STRATEGIES
    require(
        not measured or args.measure is not None,
        f"--measure: strategy {strategy} needs a measure; add --measure sft_loss, reward or module:name",
    )
    require(
        measured or (args.measure is None and args.data is None and args.reward is None),
        f"--measure, --data and --reward have no effect with strategy {strategy}; leave them out, or use strategy"
        " greedy or learned",
    )
    require(strategy != "greedy" or weights is None, "--weights: strategy greedy chooses the weights; omit --weights")
    options: dict[str, Any] = {field.name: vars(args).get(field.name) for field in dataclasses.fields(Options)} | {
        "measure": None
    }
    folders = local_members(args.members)
    if measured:
        check(args.out, folders, Options(**options))  # before a model is loaded
        from salsa_peft.soup.measures import command_measure

        options["measure"] = command_measure(args, folders, kind_of(folders))
        accepted()
    with progress_bar(1, "soup") as bar:

        def progress(done: int, total: int) -> None:
            accepted()
            bar.total = total
            bar.update(done - bar.n)

        summary = soup(args.out, args.members, weights, names=member_names(args.members), progress=progress, **options)
    print_summary(summary)
    print(f"written to {args.out}")


def print_summary(summary: SoupSummary) -> None:
    """Print the soup's size, the members' weights and distances, and the weights that were tried."""
    kind = summary.get("kind", "adapters")
    if kind == "adapters":
        size = f"{summary['modules']} modules, rank {rank_range(summary['ranks'])}"
    else:
        size = f"a checkpoint of {summary['parameters']:,} parameters"
    if kind == "merged":
        kind, size = f"adapters merged into {summary['base']}", f"{size}, LoRA in {summary['modules']} modules"
    title = f"soup of {len(summary['members'])} {kind} ({summary['strategy']})"
    _show(f"{title}: {size}, {summary['bytes']:,} bytes, {summary['seconds']} s")
    for member in summary["members"]:
        rank = f", rank {rank_range(member['ranks'])}" if "ranks" in member else ""
        norm = "" if member["norm"] is None else f", norm of delta {member['norm']:.4g}"
        _show(f"  {member['name']}: weight {member['weight']:g}{rank}{norm}")
    for pair in summary["pairs"]:
        cosine = "" if pair["cosine"] is None else f", cosine {pair['cosine']:.4f}"
        distance = "too large for float64" if pair["distance"] is None else f"{pair['distance']:.4g}"
        _show(f"  {pair['a']} – {pair['b']}: distance {distance}{cosine}")
    if abs(summary.get("sum", 1.0) - 1) > 1e-6 and summary.get("kind") != "checkpoints":
        _show(f"  the weights sum to {summary['sum']:g}, so the soup is a scaled delta, not a mean")
    if summary["norm"] is not None:
        _show(f"  soup: norm of delta {summary['norm']:.4g}")
    if error := summary.get("error"):
        worst = f"{error['worst']['error']:.3g} in {error['worst']['module']}"
        rank = str(summary["rank"] or rank_range(summary["ranks"]))
        _show(f"  recompressed to rank {rank}: relative error {error['all']:.3g} overall, at most {worst}")
    for point in summary.get("tried", []):
        if "measure" in point:
            _show(f"  tried {', '.join(f'{w:.3f}' for w in point['weights'])}: {point['measure']:.5g}")


def _show(line: str) -> None:
    print(wrapped(line, sys.stdout, 4))


def rank_range(ranks: Sequence[int]) -> str:
    """Text for ranks in ascending order: `8` for one rank, `4 to 8` for several."""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


if __name__ == "__main__":
    raise SystemExit(main())

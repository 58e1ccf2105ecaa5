"""`salsa soup OUT MEMBER MEMBER …`: the command, its options, its bar and what it prints. The call is `salsa_peft.soup.soup`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from salsa_peft.config.references import MEASURED_STRATEGIES
from salsa_peft.soup.average import Options, called, check, kind_of, local_members, soup
from salsa_peft.soup.lora.stacked_adapter import StackedAdapter
from salsa_peft.soup.result import SoupSummary
from salsa_peft.soup.strategies import STRATEGIES
from salsa_peft.utils.console import progress_bar, silence_import_warnings
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import did_you_mean, one_line

__all__ = ["STRATEGIES", "StackedAdapter", "main", "soup"]

EPILOG = """members are folders or Hub ids of LoRA adapters of one base, or of full checkpoints of one architecture.

  salsa soup OUT SEED_0 SEED_1                                       the mean of two adapters, exact, an ordinary PEFT adapter
  salsa soup OUT SEED_0 SEED_1 --weights 1.5 -0.5                    extrapolation
  salsa soup OUT SEED_0 SEED_1 --rank 16                             recompressed; soup.json says what was lost
  salsa soup OUT SEED_0 SEED_1 --merge --base BASE                   added to the base, a checkpoint
  salsa soup OUT CHECKPOINT_0 CHECKPOINT_1                           the mean of two checkpoints, streamed
  salsa soup OUT A B C --strategy greedy --measure sft_loss --data held_out.jsonl
  salsa soup OUT A B C --strategy greedy --measure reward --reward REWARD --data prompts.jsonl
"""


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one plain line; options are written out, since join_weights looks for them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message).removeprefix('argument ')}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises SystemExit, after a line that says what is wrong, for arguments that have no place."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            word = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(
                f"{word}: no such option; {did_you_mean(word, known, 'options')}"
                if word.startswith("-")
                else f"{word}: found after an option, expected a member before the options, or a number such as 0.25 where it is a weight"
            )
        return found


def join_weights(argv: Sequence[str], options: Collection[str] = ("--weights",)) -> list[str]:
    """`--weights 1.5 -0.5` as one argument: argparse takes -0.5,1.5 for an option, folders for numbers."""
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
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SalsaError(f"{option}: found {text}, expected numbers such as 0.25,0.75") from None


def whole(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return int(text)


def number(text: str) -> float:
    """A number, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number") from None


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = Parser(
        prog="salsa soup", description="Average LoRA adapters of one base, or full checkpoints of one architecture, exactly.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("out", metavar="OUT", type=Path, help="folder of the soup")
    add("members", metavar="MEMBER", nargs="+", help="adapters, or checkpoints: folders or Hub ids")
    add("--weights", metavar="W,W", help="one number a member: 0.25,0.75 or 0.25 0.75 (default: uniform)")
    add("--normalize", action="store_true", help="divide the weights by their sum")
    add("--strategy", choices=STRATEGIES, default="linear", help="how the members are weighted (default: linear)")
    add("--rank", type=whole, help="adapters: recompress to this rank (default: exact, the sum of the members' ranks)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="adapters: of the factors (default: the members')")
    add("--merge", action="store_true", help="adapters: add the soup to the base and save a checkpoint")
    add("--base", metavar="BASE", help="the base's folder or Hub id (default: what the adapters name)")
    add("--quantized-base", choices=["nf4", "nf4-double"], help="with --merge: the base as a QLoRA adapter saw it")
    add(
        "--same-base",
        action="store_true",
        help="adapters: they are of one base, whatever they call it (asserted by you)",
    )
    add("--untie", action="store_true", help="with --merge: LoRA on tied embeddings gives input and output their own")
    add_measure(made)
    add("--steps", type=whole, default=20, help="learned: steps of Adam (default: 20)")
    add("--step-size", type=number, default=0.1, help="learned: Adam's learning rate (default: 0.1)")
    add("--debug", action="store_true", help="show the trace of an error")
    return made


def add_measure(parser: argparse.ArgumentParser) -> None:
    """The options of measures.of_command."""
    add = parser.add_argument
    add("--measure", metavar="M", help="sft_loss | reward | module:name, a function of the model")
    add(
        "--data", metavar="FILE", help="held-out chats (sft_loss) or prompts (reward): jsonl, json, parquet or a Hub id"
    )
    add(
        "--reward",
        metavar="REWARD",
        help="measure reward: a reward adapter's or a sequence classifier's folder or Hub id",
    )
    add("--limit", type=whole, default=128, help="rows of --data, the first (default: 128)")
    add("--max-length", type=whole, default=1024, help="tokens of a chat (default: 1024)")
    add("--max-new-tokens", type=whole, default=128, help="measure reward: tokens of a response (default: 128)")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 and one line on stderr."""
    args = parser().parse_args(join_weights(sys.argv[1:] if argv is None else argv))
    return in_a_line("salsa soup", args, cook)


Work = Callable[[argparse.Namespace, Callable[[], None]], None]
"""Given the arguments and what to call when they are accepted."""


def in_a_line(prog: str, args: argparse.Namespace, work: Work) -> int:
    """Do it: 0; 2 and one line for what a user can mend, files and disks among it; 130 where it was interrupted.

    Warnings are held back until `work` calls its second argument, so that a refusal before that stands alone.
    """
    silence_import_warnings()
    held, ours = Held(logging.WARNING), logging.getLogger("salsa_peft")
    ours.addHandler(held)
    try:
        work(args, held.show)
        held.show()
    except (SalsaError, OSError) as error:
        if args.debug or isinstance(error, OSError):
            held.show()
        if args.debug:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command again goes on where it can", file=sys.stderr)
        return 130
    finally:
        ours.removeHandler(held)
    return 0


class Held(logging.Handler):
    """A command's warnings: each line once, none before `show`."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []
        self.shown = False

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)
            if self.shown:
                print(line, file=sys.stderr, flush=True)

    def show(self) -> None:
        """From now on warnings are printed at once."""
        if not self.shown:
            self.shown = True
            print("".join(f"{line}\n" for line in self.lines), end="", file=sys.stderr, flush=True)


def cook(args: argparse.Namespace, accepted: Callable[[], None]) -> None:
    """Make the soup that the arguments ask for, and say what it is. accepted: called when the members are."""
    weights = None if args.weights is None else parse_weights(args.weights)
    measured = args.strategy in MEASURED_STRATEGIES
    require(
        measured == (args.measure is not None),
        f"--measure: found {args.measure or 'none'} with strategy {args.strategy}, expected "
        + ("sft_loss, reward or module:name" if measured else "none: it is for greedy and learned"),
    )
    require(
        args.strategy != "greedy" or weights is None,
        f"--weights: found {args.weights} with strategy greedy, expected none: it chooses them",
    )
    require(
        measured or (args.data is None and args.reward is None),
        f"--data, --reward: found one with strategy {args.strategy}, expected none: they are for greedy and learned",
    )
    options: dict[str, Any] = {
        "strategy": args.strategy, "steps": args.steps, "step_size": args.step_size, "normalize": args.normalize, "rank": args.rank,
        "dtype": args.dtype, "merge": args.merge, "base": args.base, "quantized_base": args.quantized_base,
        "same_base": args.same_base, "untie": args.untie,
    }  # fmt: skip
    folders = local_members(args.members)
    if measured:
        check(args.out, folders, Options(**options))  # before a model is loaded
        from salsa_peft.soup.measures import of_command

        options["measure"] = of_command(args, folders, kind_of(folders))
        accepted()
    with progress_bar(1, "soup") as bar:

        def progress(done: int, total: int) -> None:
            accepted()
            bar.total = total
            bar.update(done - bar.n)

        summary = soup(args.out, folders, weights, names=called(args.members), progress=progress, **options)
    print_summary(summary)
    print(f"written to {args.out}")


def print_summary(summary: SoupSummary) -> None:
    """What was averaged, in a few lines."""
    kind = summary.get("kind", "adapters")
    if kind == "adapters":
        size = f"{summary['modules']} modules, rank {show(summary['ranks'])}"
    else:
        size = f"a checkpoint of {summary['parameters']:,} parameters"
    if kind == "merged":
        kind, size = f"adapters merged into {summary['base']}", f"{size}, LoRA in {summary['modules']} modules"
    print(
        f"soup of {len(summary['members'])} {kind} ({summary['strategy']}): {size}, {summary['bytes']:,} bytes, {summary['seconds']} s"
    )
    for member in summary["members"]:
        rank = f", rank {show(member['ranks'])}" if "ranks" in member else ""
        norm = "" if member["norm"] is None else f", norm of delta {member['norm']:.4g}"
        print(f"  {member['name']}: weight {member['weight']:g}{rank}{norm}")
    for pair in summary["pairs"]:
        cosine = "" if pair["cosine"] is None else f", cosine {pair['cosine']:.4f}"
        distance = "beyond float64" if pair["distance"] is None else f"{pair['distance']:.4g}"
        print(f"  {pair['a']} – {pair['b']}: distance {distance}{cosine}")
    if abs(summary.get("sum", 1.0) - 1) > 1e-6 and summary.get("kind") != "checkpoints":
        print(f"  the weights sum to {summary['sum']:g}: what was learned is scaled, not averaged")
    if summary["norm"] is not None:
        print(f"  soup: norm of delta {summary['norm']:.4g}")
    if error := summary.get("error"):
        worst = f"{error['worst']['module']} {error['worst']['error']:.3g}"
        print(f"  recompressed to rank {summary['rank']}: relative error {error['all']:.3g} in all, most in {worst}")
    for point in summary.get("tried", []):
        if "measure" in point:
            print(f"  tried {', '.join(f'{w:.3f}' for w in point['weights'])}: {point['measure']:.5g}")


def show(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


if __name__ == "__main__":
    raise SystemExit(main())

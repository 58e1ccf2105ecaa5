"""What `salsa run` is told, and how every command answers: a line on standard error, code 2 for a wrong word. Imports no torch."""

from __future__ import annotations

import argparse
import math

from salsa_peft import cards
from salsa_peft.config.load import names
from salsa_peft.utils.console import Parser


def parse_args(argv: list[str], prog: str = "salsa run") -> argparse.Namespace:
    """The command line; `--lora` takes a preset's name after it and leaves the recipe alone, wherever it stands."""
    parser = Parser(prog=prog, description="Run a recipe: seeds, reward model, soup, PPO, landscape, evaluation, report.",
                    epilog=f"Bundled recipes: {', '.join(names('recipes')) or 'none'}.", allow_abbrev=False)  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="RECIPE", help="a YAML file, or a bundled recipe's name")
    parser.add_argument(
        "--lora", metavar="PRESET", help=f"train adapters: one of {', '.join(names('adapters'))} (no value: lora)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as ppo.learning_rate=1e-6"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--gpu",
        type=_card,
        metavar="GIB",
        help="with --dry-run: the memory of a GPU to plan for (default: the one that is there)",
    )
    parser.add_argument("--stages", type=_comma, metavar="A,B", help="only these stages or units: sft,ppo/salsa")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="do a stage or unit again, and what hangs on it"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="instead of runs/<name>-<preset>")
    parser.add_argument("--prune", action="store_true", help="at the end remove results that this recipe no longer has")
    parser.add_argument("--debug", action="store_true", help="show traces")
    after = None
    for index, word in enumerate(argv):
        if word == "--":
            break
        if word == "--lora":
            after = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("-") else None
            argv = [
                *argv[:index],
                f"--lora={after}" if after in names("adapters") else "--lora=lora",
                *argv[index + 1 :],
            ]
            if after in names("adapters"):
                del argv[index + 1]
                after = None
            break
    args = parser.parse_intermixed_args(argv)
    if after is not None and len(args.words) == 2 and after in args.words:
        args.lora = after  # no preset of that name: load_recipe says which there are
        args.words.remove(after)
    if len(args.words) != 1:
        parser.error(
            f"found {len(args.words)} recipes ({' '.join(args.words) or 'none'}), expected one: a YAML file or a bundled name"
        )
    if args.gpu is not None and not args.dry_run:
        parser.error("found --gpu without --dry-run, expected both: it plans for a card, it chooses none")
    args.recipe = args.words[0]
    return args


def _card(text: str) -> cards.Card:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 10_000:
        raise argparse.ArgumentTypeError(f"found {text}, expected GiB such as 24")
    return cards.Card("--gpu", int(size * 2**30))


def _comma(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]

"""`salsa init`: writes a commented recipe for the user's model and data. It asks nothing, and overwrites nothing.

salsa init my.yaml --from smollm2 --demonstrations chats.jsonl --preferences pairs.jsonl
"""

import functools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from salsa_peft.cli.init.draft import STARTS, Draft, make_draft
from salsa_peft.cli.init.measure import look_at_model, quantile
from salsa_peft.cli.init.render import render
from salsa_peft.config.load import load_recipe
from salsa_peft.config.paths import LOCAL_SUFFIXES, check_path
from salsa_peft.config.schema import Source
from salsa_peft.data.check import check_local, check_source
from salsa_peft.models.architectures.checks import check
from salsa_peft.utils.console import Parser, complain
from salsa_peft.utils.errors import SalsaError, SalsaErrors, require, run_checks
from salsa_peft.utils.files import replacing
from salsa_peft.utils.fingerprints import base_fingerprint
from salsa_peft.utils.messages import one_line

KINDS = ("demonstrations", "preferences", "prompts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa init`. Returns 0, 2 if a file or option does not fit, or 1 if the recipe cannot be written."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    if args.path is not None and args.output is not None:
        complain("salsa init: give the recipe's path once, as RECIPE or as --output")
        return 2
    output = Path(args.path or args.output or "my.yaml")
    files = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind) is not None}
    try:
        _check_options(output, args.force, args.model, files)
        draft = make_draft(args.start, output.absolute(), args.model, files)
        _write(output, render(draft, shlex.join(["salsa", "init", *words]), output.name))
    except SalsaError as error:
        for problem in error.problems:
            complain(f"salsa init: {one_line(problem)}")
        return 2
    except OSError as error:
        complain(f"salsa init: {output} cannot be written: {error.strerror or error}")
        return 1
    _show(draft, output)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="salsa init", description="Write a commented recipe for your model and data. Asks nothing; looks at the files, and fills in"
        " the chat template, lengths, batch sizes and held-out prompts.",
    )  # fmt: skip
    add = parser.add_argument
    add("path", nargs="?", metavar="RECIPE", help="the file to write (default: my.yaml)")
    add("--output", metavar="RECIPE", help="the same")
    add(
        "--from",
        dest="start",
        choices=list(STARTS),
        default="smollm2",
        help="the bundled recipe to start from (default: smollm2)",
    )
    add("--model", metavar="MODEL", help="folder or Hub id of the base (default: that of the bundled recipe)")
    for kind, what in zip(
        KINDS,
        ("chats for SFT", "pairs for the reward model", "prompts for PPO (default: those of the pairs)"),
        strict=True,
    ):
        add(f"--{kind}", metavar="FILE", help=f"{what}: a file, a folder or a Hub id")
    add("--force", action="store_true", help="overwrite the recipe if it exists")
    return parser


def _check_options(output: Path, force: bool, model: str | None, files: dict[str, str]) -> None:
    """Raise SalsaError for a recipe that exists, a missing folder, and for a model or files that cannot be used."""

    def check_output() -> None:
        require(not output.is_dir(), f"{output}: is a folder; give the recipe's file")
        require(force or not output.exists(), f"{output}: exists; give another name, or --force to overwrite it")
        require(output.absolute().parent.is_dir(), f"{output}: there is no folder {output.parent}; make it first")
        require(output.suffix in (".yaml", ".yml"), f"{output}: a recipe's name ends with .yaml")

    def check_model() -> None:
        if model is not None:
            check_path("--model", os.path.abspath(model) if _is_local(model) else model, "a model", "config.json")
            look_at_model(model)
            if os.path.isdir(model):
                base_fingerprint(model)  # reads the weights' headers

    def check_file(kind: str, path: str) -> None:
        local = _is_local(path) or path.lower().endswith(LOCAL_SUFFIXES)
        check_source(f"--{kind}", kind, Source(path=os.path.abspath(path) if local else path))

    run_checks((check_output, check_model, *(functools.partial(check_file, *one) for one in files.items())))


def _is_local(path: str) -> bool:
    """Whether a path is no Hub id and no hf:// path, as in a recipe."""
    return os.path.exists(path) or path[:1] in ("", ".", "/", "~") or (path.count("/") > 1 and "://" not in path)


def _write(output: Path, text: str) -> None:
    """Write the recipe if it passes the checks of a dry run. Raises SalsaError if it does not."""
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            for lora in (None, "lora"):
                load_recipe(str(temporary), lora=lora, overrides=[], more=(check_local, check))
        except SalsaError as error:
            raise SalsaErrors([line.replace(temporary.name, output.name) for line in error.problems]) from error


def _show(draft: Draft, output: Path) -> None:
    """Print what was found, and the next commands."""
    for kind, found in draft.found.items():
        what = "tokens of a prompt" if kind == "prompts" else "tokens of a chat"
        half, most = quantile(found.chats, 0.5), quantile(found.chats, 0.95)
        print(f"{kind}: {found.rows:,} rows, columns {found.columns}; {what}: 50% up to {half:,}, 95% up to {most:,}")
    for remark in draft.remarks:
        print(remark)
    print(f"written: {output}")
    print(
        f"next:    salsa run {output} --lora --dry-run   the plan\n         salsa run {output} --lora             the run"
    )


if __name__ == "__main__":
    sys.exit(main())

"""`salsa hub`: results of a run to the Hub, and from it.

    salsa hub push RUN soup salsa --to you/smollm2          you/smollm2-soup, you/smollm2-salsa; private, one commit each
    salsa hub push RUN                                      what is pending: a push that failed
    salsa hub pull you/smollm2-soup [FOLDER]                its files, safetensors only

A recipe takes a Hub id or a folder as a seed (`sft: {from: […]}`), a reward model or a reference, without pulling first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from salsa_peft import hub_files, hub_push, runs
from salsa_peft.config import SalsaError, require
from salsa_peft.hub_options import REPO_EXPECTED, REPO_ID
from salsa_peft.messages import one_line, short
from salsa_peft.recipe import Parser, say

EPILOG = __doc__.split("\n\n", 1)[1] if __doc__ else ""


def parser() -> Parser:
    """The options."""
    import argparse

    made = Parser(prog="salsa hub", description="Push results of a run to the Hub, or pull one.", epilog=EPILOG,
                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="push | pull")
    push = commands.add_parser("push", help="results of a run, a repository and a commit each", allow_abbrev=False)
    push.add_argument("run", metavar="RUN", help="a run's folder")
    push.add_argument(
        "items", nargs="*", metavar="ITEM", help="soup, reward, seed-N, a policy's name; none: what is pending"
    )
    push.add_argument("--to", metavar="NAMESPACE/NAME", help="the repository; of several items NAMESPACE/NAME-ITEM")
    push.add_argument("--public", action="store_true", help="let everybody see it (default: private)")
    push.add_argument("--base-model", metavar="ID", help="the base's id on the Hub, where the run's is a local folder")
    push.add_argument("--dry-run", action="store_true", help="show card and files, send nothing")
    push.add_argument("--debug", action="store_true", help="show traces")
    pull = commands.add_parser("pull", help="a repository's files, safetensors only", allow_abbrev=False)
    pull.add_argument("repo", metavar="ID", help="namespace/name")
    pull.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="where to (default: the Hub's cache, whose folder is printed)"
    )
    pull.add_argument("--revision", metavar="REVISION", help="branch, tag or commit")
    pull.add_argument("--debug", action="store_true", help="show traces")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 2 for what can be mended before anything was sent; 1 where the Hub refused or could not be reached."""
    args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        return pull(args.repo, args.folder, args.revision) if args.command == "pull" else _push(args)
    except Failed as error:
        code, line = 1, one_line(error)
    except SalsaError as error:
        code, line = 2, one_line(error)
    if args.debug:
        import traceback

        traceback.print_exc()
    say(line)
    return code


class Failed(Exception):
    """The Hub did not take or give something."""


def _push(args: object) -> int:
    options = vars(args)
    run = Path(os.path.abspath(options["run"]))
    require(
        (run / "recipe.yaml").is_file(), f"{options['run']}: found no recipe.yaml in it, expected the folder of a run"
    )
    names, to, base = options["items"], options["to"], options["base_model"]
    require(
        bool(names) == bool(to),
        f"--to: found {'it without items' if to else 'none'}, expected --to namespace/name with items to push",
    )
    require(len(set(names)) == len(names), f"{' '.join(names)}: found an item twice, expected each once")
    require(to is None or REPO_ID.match(to) is not None, f"--to: found {short(to)}, {REPO_EXPECTED}")
    require(base is None or REPO_ID.match(base) is not None, f"--base-model: found {short(base)}, {REPO_EXPECTED}")
    wanted = [
        hub_push.Push(
            item=name, to=to if len(names) == 1 else f"{to}-{name}", private=not options["public"], base_model=base
        )
        for name in names
    ]
    require(
        bool(wanted or hub_push.pending(run)),
        f"{options['run']}: found nothing pending, expected items to push, such as soup",
    )
    if options["dry_run"]:
        return _show(run, wanted or hub_push.pending(run))
    with runs.locked(run):
        wanted, folders = wanted or hub_push.pending(run), hub_files.folders_of(run)
        recipe = hub_files.recipe_of(run, folders)
        for one in wanted:
            hub_push.item_of(run, recipe, one, folders)
        try:
            done = hub_push.push_all(run, wanted, recipe, folders)
        except SalsaError as error:
            raise Failed(str(error)) from error
    for pushed in done:
        print(pushed["url"], flush=True)
    return 0


def _show(run: Path, wanted: Sequence[hub_push.Push]) -> int:
    """Card and file list of each, nothing sent."""
    from salsa_peft.hub_card import card
    from salsa_peft.hub_files import CARD, folders_of, published, recipe_of
    from salsa_peft.hub_push import item_of

    folders = folders_of(run)
    recipe = recipe_of(run, folders)
    for one in wanted:
        item = item_of(run, recipe, one, folders)
        repo = one.to if not one.to.startswith("/") else f"you{one.to}"
        files = published(item, card(item, repo))
        print(f"{one.item} → {repo} ({'private' if one.private else 'public'}), one commit of {len(files)} files:\n")
        for name, content in files.items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            print(f"  {size:>13,}  {name}")
        card_text = files[CARD]
        assert isinstance(card_text, bytes)
        print(f"\n{card_text.decode()}")
    return 0


def pull(repo: str, folder: str | None, revision: str | None) -> int:
    """Fetch what salsa_peft publishes of a repository; prints its folder."""
    require(REPO_ID.match(repo) is not None, f"{short(repo)}: found no id of the Hub, {REPO_EXPECTED}")
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SalsaError(
                f"{folder}: can't be made ({error.strerror}), expected a folder; name another one"
            ) from error
    from huggingface_hub import snapshot_download

    from salsa_peft import adapter_folders
    from salsa_peft.hub_files import CARD, FIGURE, PUBLISHED, RECIPE

    patterns = [*PUBLISHED, CARD, FIGURE, RECIPE]
    try:
        found = Path(
            hub_push.tried(
                lambda: snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=patterns), repo
            )
        )
    except SalsaError as error:
        raise Failed(str(error)) from error
    there = (found / adapter_folders.CONFIG).is_file() or (found / "config.json").is_file()
    require(
        there and any(found.glob("*.safetensors")),
        f"{repo}: found no adapter and no checkpoint in safetensors, expected one (other formats are not fetched)",
    )
    print(os.path.abspath(found) if folder else found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`salsa hub`: pushes results of a run, or a soup, to the Hub, and pulls them.

    salsa hub push RUN soup salsa --to you/smollm2     push to you/smollm2-soup and you/smollm2-salsa, both private
    salsa hub push RUN/salsa --to you/smollm2          push one result of a run
    salsa hub push SOUP --to you/soup                  push a soup that `salsa soup SOUP …` made
    salsa hub push RUN                                 push the pending results again (their last push failed)
    salsa hub pull you/smollm2-soup [FOLDER]           download a repository, with weights only as safetensors

A recipe can name a Hub id as a seed (`sft: {from: […]}`), reward model or reference, without pulling it first.
"""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from salsa_peft.config.options.hub import REPO_EXPECTED, REPO_ID
from salsa_peft.report.publish import hub as hub_push
from salsa_peft.report.publish import model_card
from salsa_peft.report.publish.items import RECIPE, Item, Results, find_item, find_soup
from salsa_peft.soup.lora.read import CONFIG, SUMMARY
from salsa_peft.utils.console import Parser, complain
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.files import locked
from salsa_peft.utils.hub import PUBLISHED
from salsa_peft.utils.manifests import named_results
from salsa_peft.utils.messages import one_line, short

EPILOG = __doc__.split("\n\n", 1)[1] if __doc__ else ""


def parser() -> Parser:
    """The parser of the command line."""
    made = Parser(prog="salsa hub", description="Push results or a soup to the Hub, or pull a repository.", epilog=EPILOG,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="push | pull")
    push = commands.add_parser("push", help="push results of a run, each to a repository in one commit").add_argument
    push("run", metavar="RUN", help="the folder of a run, of one of its results, or of a soup")
    push("items", nargs="*", metavar="ITEM", help="soup, reward, seed-N or a policy's name (default: pending results)")
    push("--to", metavar="NAMESPACE/NAME", help="the repository; for several items NAMESPACE/NAME-ITEM")
    push("--public", action="store_true", help="make the repository public (default: private)")
    push("--base-model", metavar="ID", help="the base's id on the Hub, if the run's base is a local folder")
    push("--dry-run", action="store_true", help="show the model card and the files, and send nothing")
    push("--debug", action="store_true", help="show the traceback of an error")
    pull = commands.add_parser("pull", help="download a repository, with weights only as safetensors").add_argument
    pull("repo", metavar="ID", help="namespace/name")
    in_cache = "the Hub's cache; its path is printed"
    pull("folder", nargs="?", metavar="FOLDER", help=f"an empty or new folder (default: {in_cache})")
    pull("--revision", metavar="REVISION", help="a branch, tag or commit")
    pull("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa hub`.

    Returns 0; 2 for an error of the user before anything is sent; 1 if the Hub refuses or cannot be reached.
    """
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return pull(args.repo, args.folder, args.revision) if args.command == "pull" else push(args)
    except (HubFailure, SalsaError) as error:
        if args.debug:
            traceback.print_exc()
        complain(one_line(error))
        return 1 if isinstance(error, HubFailure) else 2


class HubFailure(Exception):
    """The Hub refused something or could not be reached."""


def push(args: argparse.Namespace) -> int:
    """Push the items that the arguments name, else the pending items; print the URLs of the repositories."""
    run, names = run_and_names(args.run, args.items)
    to, base = args.to, args.base_model
    require(not to or bool(names), "--to: works only with items; name the items to push, such as soup")
    require(not names or bool(to), "--to: is required with items; add --to namespace/name")
    require(len(set(names)) == len(names), f"{' '.join(names)}: name each item once")
    require(base is None or REPO_ID.match(base) is not None, f"--base-model: found {short(base)}, {REPO_EXPECTED}")
    require(
        bool(names) or (not args.public and base is None),
        "--public, --base-model: work only with items and --to; add both, such as soup --to namespace/name. Without"
        " items, pending results are pushed with the options of the first attempt",
    )
    repos = {name: to if len(names) == 1 else f"{to}-{name}" for name in names}
    for repo in repos.values():
        require(REPO_ID.match(repo) is not None, f"--to: found {short(repo)}, {REPO_EXPECTED}")
    private = not args.public
    wanted = [hub_push.Push(item=name, to=repo, private=private, base_model=base) for name, repo in repos.items()]
    require(
        bool(wanted or hub_push.pending(run)),
        f"{args.run}: no results are pending; name items to push, such as soup, and --to namespace/name",
    )
    if not is_run(run):
        soup = find_soup(run, base)
        return _show(wanted[0], soup) if args.dry_run else _push_soup(wanted[0], soup)
    if args.dry_run:
        results = Results.of_run(run)
        for one in wanted or hub_push.pending(run):
            _show(one, find_item(results, one.item, one.base_model))
        return 0
    with locked(run):
        results = Results.of_run(run)
        for one in wanted:  # raise errors before anything is sent or recorded
            find_item(results, one.item, one.base_model)
        try:
            done = hub_push.push_all(wanted or hub_push.pending(run), results)
        except SalsaError as error:
            raise HubFailure(str(error)) from error
    for pushed in done:
        print(pushed["url"], flush=True)
    return 0


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return (folder / RECIPE).is_file()


def run_and_names(folder: str, items: list[str]) -> tuple[Path, list[str]]:
    """The run's folder and the names of its results to push; of a soup that no run made, its folder and name.

    folder: the folder of a run, of one of its results (RUN/salsa), or of a soup; in the last two cases `items` may hold the
    folders of further results of the same run. Raises SalsaError for other folders.
    """
    given = Path(os.path.abspath(folder))
    if is_run(given):
        return given, items
    places = [given, *(Path(os.path.abspath(item)) for item in items)]
    if all(place.name in named_results(place.parent) for place in places) and len({p.parent for p in places}) == 1:
        return given.parent, [place.name for place in places]
    require(
        (given / SUMMARY).is_file(),
        f"{folder}: not a run's folder, since it has no {RECIPE}, nor one of a run's results, nor a soup ({SUMMARY});"
        " check the path",
    )
    require(not items, f"{' '.join(items)}: a soup has no items; push one soup at a time")
    return given, [given.name]


def _push_soup(wanted: hub_push.Push, soup: Item) -> int:
    """Push a soup that no run made, and print the repository's URL."""
    try:
        print(hub_push.push(wanted, soup)["url"], flush=True)
    except SalsaError as error:
        raise HubFailure(f"{error}. The soup is as it was; to push it, run the same command again") from error
    return 0


def _show(wanted: hub_push.Push, item: Item) -> int:
    """Print the model card and the files of an item."""
    repo = wanted.to if not wanted.to.startswith("/") else f"you{wanted.to}"
    card = model_card.render_card(item, repo)
    files = model_card.published_files(item, card)
    print(f"{wanted.item} → {repo} ({'private' if wanted.private else 'public'}), one commit of {len(files)} files:\n")
    for name, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        print(f"  {size:>13,}  {name}")
    print(f"\n{card}")
    return 0


def pull(repo: str, folder: str | None, revision: str | None) -> int:
    """Download a repository's files, only those that `salsa hub push` may push; print the folder."""
    require(REPO_ID.match(repo) is not None, f"ID: found {short(repo)}, {REPO_EXPECTED}")
    require(folder != "" and revision != "", f"{repo}: FOLDER and --revision must not be empty")
    from huggingface_hub import HfApi, snapshot_download

    if folder is not None:
        made = Path(folder)
        require(not made.exists() or made.is_dir(), f"{folder}: this is a file; choose a folder")
        kept = min((path.name for path in made.glob("*") if path.name != ".cache"), default=None)
        require(kept is None, f"{folder}: this folder is not empty (it has {kept}); choose an empty or new folder")
    patterns = [*PUBLISHED, model_card.CARD, model_card.FIGURE, RECIPE]
    download = functools.partial(
        snapshot_download, repo, revision=revision, local_dir=folder, allow_patterns=patterns, ignore_patterns="*/*"
    )
    try:
        names = hub_push.with_retries(lambda: HfApi().list_repo_files(repo, revision=revision), repo)
        require(
            bool({CONFIG, "config.json"} & set(names))
            and any(name.endswith(".safetensors") and "/" not in name for name in names),
            f"{repo}: has no adapter or checkpoint in safetensors, and other formats are not downloaded; choose another"
            " repository",
        )
        found = Path(hub_push.with_retries(download, repo))
    except SalsaError as error:
        raise HubFailure(str(error)) from error
    print(os.path.abspath(found) if folder else found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

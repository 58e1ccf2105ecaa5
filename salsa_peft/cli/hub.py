"""`salsa hub`: results of a run to the Hub, and from it.

    salsa hub push RUN soup salsa --to you/smollm2          you/smollm2-soup, you/smollm2-salsa; private, one commit each
    salsa hub push RUN                                      what is pending: a push that failed
    salsa hub pull you/smollm2-soup [FOLDER]                its files, safetensors only

A recipe takes a Hub id or a folder as a seed (`sft: {from: […]}`), a reward model or a reference, without pulling first.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salsa_peft.config.options.hub import REPO_EXPECTED, REPO_ID
from salsa_peft.report import hub as hub_push
from salsa_peft.report import model_card
from salsa_peft.soup.lora.read import CONFIG
from salsa_peft.utils import files as runs
from salsa_peft.utils.console import Parser, say
from salsa_peft.utils.errors import SalsaError, require
from salsa_peft.utils.messages import one_line, short

EPILOG = __doc__.split("\n\n", 1)[1] if __doc__ else ""


def parser() -> Parser:
    """The options."""
    import argparse

    made = Parser(prog="salsa hub", description="Push results of a run to the Hub, or pull one.", epilog=EPILOG,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="push | pull")
    push = commands.add_parser("push", help="results of a run, a repository and a commit each")
    push.add_argument("run", metavar="RUN", help="a run's folder")
    push.add_argument(
        "items", nargs="*", metavar="ITEM", help="soup, reward, seed-N, a policy's name; none: what is pending"
    )
    push.add_argument("--to", metavar="NAMESPACE/NAME", help="the repository; of several items NAMESPACE/NAME-ITEM")
    push.add_argument("--public", action="store_true", help="let everybody see it (default: private)")
    push.add_argument("--base-model", metavar="ID", help="the base's id on the Hub, where the run's is a local folder")
    push.add_argument("--dry-run", action="store_true", help="show card and files, send nothing")
    push.add_argument("--debug", action="store_true", help="show traces")
    pull = commands.add_parser("pull", help="a repository's files, safetensors only")
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
    except (Failed, SalsaError) as error:
        if args.debug:
            traceback.print_exc()
        say(one_line(error))
        return 1 if isinstance(error, Failed) else 2


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
    require(base is None or REPO_ID.match(base) is not None, f"--base-model: found {short(base)}, {REPO_EXPECTED}")
    require(
        bool(names) or (not options["public"] and base is None),
        "--public, --base-model: found one without items, expected none: what is pending goes as it was asked for; name the items and --to",
    )
    wanted = [
        hub_push.Push(
            item=name, to=to if len(names) == 1 else f"{to}-{name}", private=not options["public"], base_model=base
        )
        for name in names
    ]
    for one in wanted:
        require(REPO_ID.match(one.to) is not None, f"--to: found {short(one.to)}, {REPO_EXPECTED}")
    require(
        bool(wanted or hub_push.pending(run)),
        f"{options['run']}: found nothing pending, expected items to push, such as soup",
    )
    if options["dry_run"]:
        return _show(run, wanted or hub_push.pending(run))
    with runs.locked(run):
        folders = model_card.result_folders(run)
        recipe = model_card.recipe_of_run(run, folders)
        for one in wanted:  # refusals before anything is sent or noted
            model_card.find_item(run, recipe, one.item, one.base_model, folders)
        wanted = wanted or hub_push.pending(run)
        try:
            done = hub_push.push_all(run, wanted, recipe, folders)
        except SalsaError as error:
            raise Failed(str(error)) from error
    for pushed in done:
        print(pushed["url"], flush=True)
    return 0


def _show(run: Path, wanted: Sequence[hub_push.Push]) -> int:
    """Card and file list of each, nothing sent."""
    folders = model_card.result_folders(run)
    recipe = model_card.recipe_of_run(run, folders)
    for one in wanted:
        item = model_card.find_item(run, recipe, one.item, one.base_model, folders)
        repo = one.to if not one.to.startswith("/") else f"you{one.to}"
        files = model_card.published_files(item, model_card.render_card(item, repo))
        print(f"{one.item} → {repo} ({'private' if one.private else 'public'}), one commit of {len(files)} files:\n")
        for name, content in files.items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            print(f"  {size:>13,}  {name}")
        card_text = files[model_card.CARD]
        assert isinstance(card_text, bytes)
        print(f"\n{card_text.decode()}")
    return 0


def pull(repo: str, folder: str | None, revision: str | None) -> int:
    """Fetch what salsa_peft publishes of a repository; prints its folder."""
    require(REPO_ID.match(repo) is not None, f"{short(repo)}: found no id of the Hub, {REPO_EXPECTED}")
    require(folder != "" and revision != "", f"{repo}: found an empty FOLDER or --revision, expected a name")
    from huggingface_hub import HfApi, snapshot_download

    if folder is not None:
        made = Path(folder)
        require(not made.exists() or made.is_dir(), f"{folder}: found a file, expected a folder; name another one")
        kept = sorted(path.name for path in made.iterdir() if path.name != ".cache") if made.is_dir() else []
        require(not kept, f"{folder}: found {kept[:1]} in it, expected an empty folder; name another one")
    patterns = [*model_card.PUBLISHED, model_card.CARD, model_card.FIGURE, model_card.RECIPE]
    options: dict[str, Any] = {
        "revision": revision,
        "local_dir": folder,
        "allow_patterns": patterns,
        "ignore_patterns": "*/*",
    }
    try:
        names = hub_push.with_retries(lambda: HfApi().list_repo_files(repo, revision=revision), repo)
        require(
            bool({CONFIG, "config.json"} & set(names))
            and any(name.endswith(".safetensors") and "/" not in name for name in names),
            f"{repo}: found no adapter and no checkpoint in safetensors, expected one (other formats are not fetched)",
        )
        found = Path(hub_push.with_retries(lambda: snapshot_download(repo, **options), repo))
    except SalsaError as error:
        raise Failed(str(error)) from error
    print(os.path.abspath(found) if folder else found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
